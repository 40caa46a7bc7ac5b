"""What a GPU's physics allows: lower bounds on the time of sparse products.

Four walls stand between a kernel and infinite speed, and the slowest one is the prediction:

- TC: tensor cores (or CUDA cores, for unstructured weights and strict float32);
- HBM: every operand read once, every result written once;
- L2: what travels from L2 to the processors, because a random topology lets a tile of activations
  serve one block only. A tile of `rows x cols` outputs has an intensity of
  rows * cols / (rows + cols) multiply-adds per element read. Forward: tokens x bh; dX: tokens x bw;
  dW: bh x G bw, G neighbouring blocks sharing one tile of dY. The block's edge along the sum plays
  no part;
- SMEM: what the tensor cores read from shared memory, and what fills it. `wgmma` m64nN with both
  operands there reads 1/N + 1/64 of an element per multiply-add, filling a tile 1/rows + 1/cols.

FLOPs: 1 multiply-add = 2. Nothing in here is a measurement of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sparsekern.cost.crossing import last_that_holds
from sparsekern.errors import ConfigError

OPERATIONS = ("forward", "dx", "dw")
WGMMA_ROWS = 64  # rows of one wgmma, and the fewest that reach the tensor cores' full rate
MAX_WGMMA_COLS = 256
MAX_GROUP = 8  # blocks that share one tile of dY; together they are at most 256 wide
GROW_TILE = (128, 256)
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}


@dataclass(frozen=True)
class Device:
    """Rates of one GPU, per second.

    Attributes:
        name: as the driver gives it.
        flops: FLOP/s by kind of operand: what a dense product reaches, not the datasheet.
        l2: bytes from L2 to all processors.
        hbm: bytes from and to memory.
        csr_flops: FLOP/s that unstructured products reach on CUDA cores.
        smem_bytes_per_flop: shared memory bytes available per tensor core FLOP in bf16.
        processors: multiprocessors (SMs) that work.
        clock: Hz under load.
    """

    name: str
    flops: Mapping[str, float]
    l2: float
    hbm: float
    csr_flops: float
    smem_bytes_per_flop: float = 1 / 32
    processors: int = 132
    clock: float = 1.755e9

    @property
    def smem(self) -> float:
        """Bytes that tensor cores can read from shared memory."""
        return self.flops["bf16"] * self.smem_bytes_per_flop


H200 = Device(
    name="NVIDIA H200",
    # bf16: an 8192 cube through cuBLAS; tf32 and fp32: what cuBLAS is known to reach on Hopper
    flops={"bf16": 790e12, "fp16": 790e12, "tf32": 400e12, "fp32": 50e12},
    l2=9.7e12,  # read bandwidth of a working set of 12 to 30 MB
    hbm=4.3e12,  # device-to-device copy
    csr_flops=0.27 * 67e12,  # the share of the fp32 peak that Sputnik reaches (Gale et al. 2020)
)
H100 = replace(
    H200,  # the same chip; of its own, both seen: an 8192 cube through cuBLAS, a device copy
    name="NVIDIA H100 80GB HBM3",
    flops={**H200.flops, "bf16": 798e12, "fp16": 798e12},
    hbm=3.0e12,
)
DEVICES = (H200, H100)


@dataclass(frozen=True)
class Problem:
    """One product: M tokens, K inputs, N outputs, weights of `block` (outputs, inputs).

    A convolution's tokens are output pixels and K counts every tap; `read` is how many numbers of
    its input there are for each of them in memory, where a linear layer has K.
    """

    M: int
    K: int
    N: int
    block: tuple[int, int]
    density: float
    kind: str = "bf16"
    read: int | None = None

    @property
    def activations(self) -> int:
        """Numbers in memory of both activations."""
        return self.M * ((self.K if self.read is None else self.read) + self.N)

    @property
    def flops(self) -> float:
        """Of one of the three products."""
        return 2 * self.M * self.K * self.N * self.density


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        tokens: of one program in forward and dX; 256 is what registers hold.
        group: blocks that share a tile of dY in dW; None: as many as the registers hold.
    """

    tokens: int = 256
    group: int | None = None

    def shape(self, operation: str, block: tuple[int, int]) -> tuple[int, int]:
        """The outputs one program makes: (rows, cols)."""
        bh, bw = block
        if operation == "dw":
            group = self.group or max(1, min(MAX_GROUP, MAX_WGMMA_COLS // bw))
            return bh, group * bw
        return self.tokens, bh if operation == "forward" else bw


class Prediction(NamedTuple):
    """The least time of a product, and the wall that sets it.

    Attributes:
        flops: FLOPs done.
        walls: seconds by name of the wall.
    """

    flops: float
    walls: dict[str, float]

    @property
    def seconds(self) -> float:
        """The slowest wall."""
        return max(self.walls.values())

    @property
    def bound(self) -> str:
        """Name of the slowest wall."""
        return max(self.walls, key=lambda name: self.walls[name])

    @property
    def tflops(self) -> float:
        """Ceiling in TFLOP/s."""
        return self.flops / self.seconds / 1e12


class Total(NamedTuple):
    """Several products one after another."""

    predictions: tuple[Prediction, ...]

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return sum(p.seconds for p in self.predictions)

    @property
    def flops(self) -> float:
        """Of all of them."""
        return sum(p.flops for p in self.predictions)

    @property
    def bound(self) -> str:
        """The walls, in the order of the products, each once."""
        return "+".join(dict.fromkeys(p.bound for p in self.predictions))

    @property
    def tflops(self) -> float:
        """Ceiling in TFLOP/s."""
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Roofline:
    """The model of one device and one way of cutting the work."""

    device: Device = H200
    tile: Tile = field(default_factory=Tile)

    def predict(self, operation: str, problem: Problem) -> Prediction:
        """One of `OPERATIONS`, or "grow": the dense gradient, reduced to a score per block."""
        if operation == "grow":
            return self._grow(problem)
        if operation not in OPERATIONS:
            raise ConfigError(f"operation must be grow or one of {OPERATIONS}; got {operation!r}")
        hbm = self._bytes(problem) / self.device.hbm
        if problem.block == (1, 1):
            rate = min(self.device.csr_flops, self.device.flops[problem.kind])
            return Prediction(problem.flops, {"CUDA cores": problem.flops / rate, "HBM": hbm})
        return self._tiled(problem, self.tile.shape(operation, problem.block), hbm)

    def together(self, problem: Problem) -> Total:
        """Forward, dX and dW."""
        return Total(tuple(self.predict(operation, problem) for operation in OPERATIONS))

    def dense(self, problem: Problem) -> Prediction:
        """A dense product of the same shape; the same for forward, dX and dW."""
        return self._dense(replace(problem, density=1.0))

    def speedup(self, operation: str, problem: Problem) -> float:
        """Dense time over sparse time, both as the model has them; operation may be "three"."""
        if operation == "three":
            return 3 * self.dense(problem).seconds / self.together(problem).seconds
        return self.dense(problem).seconds / self.predict(operation, problem).seconds

    def break_even(self, operation: str, problem: Problem) -> float:
        """The largest density at which sparse is no slower than dense (1.0: always)."""
        return last_that_holds(
            lambda density: self.speedup(operation, replace(problem, density=density)) >= 1,
            0.0,
            1.0,
        )

    def _tiled(self, problem: Problem, tile: tuple[int, int], hbm: float) -> Prediction:
        size, (rows, cols) = ELEMENT_BYTES[problem.kind], tile
        # one element serves as many multiply-adds as the tile is wide on the other side
        moved = size * problem.flops / 2 * (1 / rows + 1 / cols)
        core = "CUDA cores" if problem.kind == "fp32" else "TC"
        walls = {
            core: problem.flops / self.device.flops[problem.kind],
            "L2": moved / self.device.l2,
            "HBM": hbm,
        }
        if core == "TC":
            walls["SMEM"] = size * problem.flops / 2 * _smem_share(rows, cols) / self.device.smem
        return Prediction(problem.flops, walls)

    def _dense(self, problem: Problem) -> Prediction:
        size = ELEMENT_BYTES[problem.kind]
        held = problem.activations + problem.K * problem.N
        core = "CUDA cores" if problem.kind == "fp32" else "TC"
        walls = {
            core: problem.flops / self.device.flops[problem.kind],
            "HBM": size * held / self.device.hbm,
        }
        return Prediction(problem.flops, walls)

    def _grow(self, problem: Problem) -> Prediction:
        dense, size = replace(problem, density=1.0), ELEMENT_BYTES[problem.kind]
        scores = 4 * problem.K * problem.N / (problem.block[0] * problem.block[1])
        read = size * problem.activations
        return self._tiled(dense, GROW_TILE, (read + scores) / self.device.hbm)

    def _bytes(self, problem: Problem) -> float:
        """From and to memory: both activations, the active weights and their indices."""
        size = ELEMENT_BYTES[problem.kind]
        weights = problem.K * problem.N * problem.density
        index = 4 / (problem.block[0] * problem.block[1])
        return size * problem.activations + (size + index) * weights


def _smem_share(rows: int, cols: int) -> float:
    """Elements of shared memory touched per multiply-add, in the better orientation."""
    fill = 1 / rows + 1 / cols
    # the side that lies on wgmma's 64 rows; narrower tiles waste rows either way
    sides = [(rows, cols), (cols, rows)]
    fitting = [(m, n) for m, n in sides if m >= WGMMA_ROWS] or sides
    return fill + min(1 / WGMMA_ROWS + 1 / min(n, MAX_WGMMA_COLS) for _, n in fitting)


def device_named(name: str) -> Device | None:
    """The constants for a device, if this file has them."""
    return next((device for device in DEVICES if device.name == name), None)
