"""The time of a layer's training step without running it: on a CPU from a table, on a GPU bounds.

Both answer the questions of `Times`, as measurements do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from sparsekern.cost import cpu_rates
from sparsekern.cost.layers import Layer, Part, Use
from sparsekern.cost.roofline import H200, Problem, Roofline, device_named
from sparsekern.errors import DeviceError, DtypeError
from sparsekern.ops.cpu.choice import has_numba
from sparsekern.ops.crossover import DENSE_ABOVE, dense_wins

Cut = tuple[int, int]
"""A block, (outputs, inputs)."""

EDGES = frozenset(DENSE_ABOVE["half"]) - {1}
"""Of blocks that have GPU kernels, besides 1: those that the crossover table knows."""

HALVINGS = 40
LEAST_DENSITY = 1e-4
"""Below it no break-even density is looked for."""


class Estimate(NamedTuple):
    """Time of a training step of a sparse layer.

    Attributes:
        seconds: forward and backward.
        densely: `impl=None` would compute it from a dense weight: it saves memory, but no time.
    """

    seconds: float
    densely: bool = False


class BreakEven(NamedTuple):
    """The largest density at which the best sparse block is no slower than dense.

    Attributes:
        density: 0.0 if dense is faster at every density.
        bound: "" if it was found; ">=" or "<=" if measuring stopped on that side of it.
    """

    density: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.density:.2g}"


class Times(Protocol):
    """What is known of the time of layers, per training step."""

    def source(self, layer: Layer) -> str:
        """What the answers are made from, in words."""

    def dense(self, layer: Layer) -> float:
        """Seconds of the dense layer."""

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Of the layer with parts of these sparsities; 0 is a part that stays dense."""

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """With the best of the blocks at each density."""


def predictor(device: torch.device) -> Times:
    """Predictions for a kind of device, whether or not there is one here.

    Raises:
        DeviceError: there are none for this kind of device.
    """
    if device.type in ("cpu", "meta"):
        return CpuTimes(torch.get_num_threads())
    if device.type == "cuda":
        return CudaTimes.here()
    raise DeviceError(f"`device` must be cpu or cuda; got {device}")


def crossing(best: Callable[[float], float], dense: float) -> BreakEven:
    """Where sparse seconds, which grow with density, reach dense ones."""
    if best(1.0) <= dense:
        return BreakEven(1.0)
    if best(LEAST_DENSITY) > dense:
        return BreakEven(0.0)
    low, high = LEAST_DENSITY, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle) <= dense else (low, middle)
    return BreakEven(low)


@dataclass(frozen=True)
class CpuTimes:
    """Predictions from the table of `cpu_rates`.

    Attributes:
        threads: that work.
    """

    threads: int

    def source(self, layer: Layer) -> str:
        """The table, and what about it does not hold here."""
        notes = [] if has_numba() else ["with numba, which is not installed here"]
        if layer.dtype is not torch.float32:
            notes.append(f"float32, not {str(layer.dtype).removeprefix('torch.')}")
        where = f"{cpu_rates.SOURCE}, {threads_shown(self.threads)}"
        return ", ".join([f"predicted from {where}", *notes])

    def dense(self, layer: Layer) -> float:
        """Seconds of all calls."""
        return sum(
            cpu_rates.dense_seconds(layer.kind, _work(use, layer.size, layer.size), self.threads)
            for use in layer.uses
        )

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Seconds of all calls."""
        shares = list(zip(layer.parts, sparsities, strict=True))
        stored = sum(part.held(block, s).stored for part, s in shares if s > 0)
        return self._sum(layer, block, stored, sum(part.size for part, s in shares if s == 0))

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """All parts at the same density."""
        return crossing(
            lambda density: min(
                self._sum(layer, block, density * layer.size, 0).seconds for block in blocks
            ),
            self.dense(layer),
        )

    def _sum(self, layer: Layer, block: Cut, stored: float, dense: int) -> Estimate:
        seconds = 0.0
        for use in layer.uses:
            work = _work(use, stored, stored + dense)
            seconds += cpu_rates.sparse_seconds(layer.kind, block, work, self.threads)
            rest = 2 * use.products * use.tokens * dense / cpu_rates.RATES[layer.kind].dense
            seconds += 1e-9 * rest / self.threads
        return Estimate(seconds)


def threads_shown(threads: int) -> str:
    """In words."""
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _work(use: Use, multiplied: float, weights: float) -> cpu_rates.Work:
    flops = 2 * use.products * use.tokens * multiplied
    return cpu_rates.Work(flops, use.numbers, weights, use.steps)


_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class CudaTimes:
    """Lower bounds from the roofline model; the crossover table says what the kernels take on.

    Attributes:
        roofline: of one device.
        described: where its constants come from, in words.
    """

    roofline: Roofline
    described: str

    @staticmethod
    def here() -> CudaTimes:
        """For the present GPU if the model knows it, else for an H200."""
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        known = device_named(name) if name else None
        if known:
            return CudaTimes(Roofline(known), known.name)
        why = f"there are no constants for {name}" if name else "no GPU is here"
        return CudaTimes(Roofline(H200), f"{H200.name} ({why})")

    def source(self, layer: Layer) -> str:
        """The model, and the arithmetic it assumes."""
        kind = _kinds(layer)[0]
        return (
            f"predicted from the roofline model of {self.described}, {kind}; launches not counted"
        )

    def dense(self, layer: Layer) -> float:
        """Seconds of all calls."""
        return sum(self._dense(layer, part) for part in layer.parts)

    def sparse(self, layer: Layer, block: Cut, sparsities: Sequence[float]) -> Estimate:
        """Seconds of all calls; a density that the crossover table gives to dense takes as long."""
        densities = [
            part.held(block, s).stored / part.size if s > 0 else None
            for part, s in zip(layer.parts, sparsities, strict=True)
        ]
        return self._estimate(layer, block, densities)

    def break_even(self, layer: Layer, blocks: Sequence[Cut]) -> BreakEven:
        """Only where the sparse kernels run."""

        def best(density: float) -> float:
            every = [self._estimate(layer, b, [density] * len(layer.parts)) for b in blocks]
            return min((e.seconds for e in every if not e.densely), default=float("inf"))

        return crossing(best, self.dense(layer))

    def _estimate(self, layer: Layer, block: Cut, densities: Sequence[float | None]) -> Estimate:
        precision = _kinds(layer)[1]
        seconds, densely = 0.0, False
        for part, density in zip(layer.parts, densities, strict=True):
            if density is None:
                seconds += self._dense(layer, part)
            elif not _covered(block) or dense_wins(precision, block, min(density, 1.0)):
                seconds += self._dense(layer, part)
                densely = True
            else:
                seconds += sum(self._sparse(layer, u, part, block, density) for u in layer.uses)
        return Estimate(seconds, densely)

    def _dense(self, layer: Layer, part: Part) -> float:
        return sum(
            count * use.products * self.roofline.dense(problem).seconds
            for use in layer.uses
            for count, problem in [_products(layer, use, part, (1, 1), 1.0)]
        )

    def _sparse(self, layer: Layer, use: Use, part: Part, block: Cut, density: float) -> float:
        count, problem = _products(layer, use, part, block, density)
        operations = ["forward", *["dx"] * use.dx, *["dw"] * use.dw]
        return count * sum(self.roofline.predict(name, problem).seconds for name in operations)


def _covered(block: Cut) -> bool:
    """Whether there are sparse kernels for it."""
    return block == (1, 1) or all(edge in EDGES for edge in block)


def _products(
    layer: Layer, use: Use, part: Part, block: Cut, density: float
) -> tuple[int, Problem]:
    """How many products one after another a weight takes part in, and one of them."""
    rows, cols = part.weight.shape
    read = use.numbers // use.tokens - rows if part.weight.parameter.dim() > 2 else None
    count = 1
    if use.steps and part.weight.name.startswith("hh"):  # a state's weight, step by step
        count = use.steps // sum(p.weight.name.startswith("hh") for p in layer.parts)
    tokens = max(1, use.tokens // count)
    return count, Problem(tokens, cols, rows, block, density, _kinds(layer)[0], read)


def _kinds(layer: Layer) -> tuple[str, str]:
    """Operands as the roofline model calls them, and as the crossover table does."""
    if layer.dtype in _HALVES:
        return _HALVES[layer.dtype], "half"
    if layer.dtype is not torch.float32:
        raise DtypeError(f"GPU kernels take float32, float16 and bfloat16; got {layer.dtype}")
    strict = torch.get_float32_matmul_precision() == "highest"
    return ("fp32", "ieee") if strict else ("tf32", "tf32")
