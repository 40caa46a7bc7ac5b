"""Cases to ask the model about: the shipped launch table entries, and any change of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu import model_figures
from benchmarks.gpu.model_fluid import Launch, Persistent, Program
from benchmarks.gpu.model_launch import (
    Held,
    Kernel,
    Tile,
    gradient_programs,
    held_programs,
    product_programs,
    topology,
)
from sparsekern.cost.roofline import ELEMENT_BYTES, Problem
from sparsekern.kernels import launch, tables

LINEAR = {"forward": "spmm", "dx": "spmm_t", "dw": "sddmm"}
"""Products of a linear layer, and their operations in the launch tables."""

CONV = {"conv2d": "forward", "conv2d_dgrad": "dx", "conv2d_wgrad": "dw"}
"""Products of a convolution, and what the roofline calls them."""

IMAGES, CHANNELS, EDGE, TAPS = 256, 256, 14, 9  # of the convolution: batch, in and out, pixels, 3x3
TMA_EDGE = 64  # of blocks whose tiles come through descriptors


@dataclass(frozen=True)
class Case:
    """One product, and how it is done; change it with `dataclasses.replace`.

    Attributes:
        operation: of `LINEAR` or `CONV`.
        problem: shapes, block, density.
        tile: how it is cut.
        kernel: what the compiled code uses.
        slots: programs an SM; None: what registers and shared memory allow.
        parts: that the sum of dW is cut into.
        passes: kernels that add them: one, or a sum and a cast.
        persistent: programs that walk tiles; None: one tile a program.
        held: activations are held in shared memory (forward, dX); `tile` counts for nothing then.
        taps: of a convolution.
        seed: of the random topology.
    """

    operation: str
    problem: Problem
    tile: Tile
    kernel: Kernel
    slots: int | None = None
    parts: int = 1
    passes: int = 1
    persistent: Persistent | None = None
    held: Held | None = None
    taps: int = 1
    seed: int = 0

    @property
    def product(self) -> str:
        """As the roofline calls it."""
        return CONV.get(self.operation, self.operation)

    def launch(self) -> Launch:
        """Programs in the order of the grid."""
        return Launch(list(self._programs()), self.slots or self.kernel.slots, self.persistent)

    def _programs(self) -> Iterator[Program]:
        lengths, (bh, bw) = self.lengths(), self.problem.block
        if self.product == "dw":
            return gradient_programs(self.problem, lengths, self.tile, self.kernel, self.parts)
        ways = (bw, bh) if self.product == "forward" else (bh, bw)
        if self.held is not None:
            return held_programs(self.problem, sum(lengths), ways, self.held, self.kernel)
        return product_programs(self.problem, lengths, ways, self.tile, self.kernel)

    def lengths(self) -> list[int]:
        """Blocks of each row of blocks of the output (dW: of the weight), in the grid's order."""
        t = topology(self.problem, self.seed, self.taps)
        counts = t.crow.diff()
        if self.product == "forward":
            counts = counts[t.row_order.long()]
        elif self.product == "dx":
            counts = t.ccol.diff().view(self.taps, -1).sum(0)
            if self.taps == 1:
                counts = counts[t.col_order.long()]
        found: list[int] = counts.to(torch.int64).tolist()
        return found


def linear(
    block: int,
    density: float = 0.1,
    *,
    tokens: int = 8192,
    inputs: int = 4096,
    outputs: int = 4096,
) -> Problem:
    """A linear layer in bf16."""
    return Problem(tokens, inputs, outputs, (block, block), density)


def conv(block: int, density: float = 0.1) -> Problem:
    """A 3x3 convolution in bf16: 256 channels, 14x14 pixels, batch 256."""
    pixels = IMAGES * EDGE**2
    shape = (pixels, TAPS * CHANNELS, CHANNELS)
    return Problem(*shape, (block, block), density, "bf16", CHANNELS)


def shipped(operation: str, block: int, problem: Problem | None = None) -> Case:
    """What the launch table of sm_90 starts for a square block in bf16.

    Args:
        operation: of `LINEAR` or `CONV`.
        block: edge.
        problem: None: `linear(block)` or `conv(block)`.
    """
    convolved = operation in CONV
    problem = problem or (conv if convolved else linear)(block)
    key, config = _entry(LINEAR.get(operation, operation), problem)
    kernel, taps = model_figures.kernel(str(key)), TAPS if convolved else 1
    if CONV.get(operation, operation) != "dw":
        BK = min(config.BK, block) if key.loads == "tma" else config.BK
        tile = Tile(config.BM, BK, config.GROUP, config.SWAP)
        return Case(operation, problem, tile, kernel, taps=taps)
    group = max(1, config.LANES // block)
    tail = "half" if key.loads == "tma" and group > 1 else "full"
    tile = Tile(config.BM, group=group, tail=tail, even=True)
    case = Case(operation, problem, tile, kernel, passes=1, taps=taps)
    return replace(case, parts=_shipped_parts(case))


def _entry(op: str, problem: Problem) -> tuple[tables.Key, Any]:
    """Launch table entry of a product."""
    edge = problem.block[0]
    rows = "any"
    if op.startswith("spmm"):
        rows = launch.rows_class(round(problem.K * problem.density), edge, edge)
    tma = edge >= TMA_EDGE and not op.startswith("conv")
    config, by_tma = tables.find("sm90", op, "half", edge, rows, tma=tma)
    return tables.Key(op, "half", str(edge), rows, "tma" if by_tma else "pointer"), config


def _shipped_parts(case: Case) -> int:
    lengths, tile, (bh, bw) = case.lengths(), case.tile, case.problem.block
    blocks, rows, steps = sum(lengths), len(lengths), -(-case.problem.M // tile.BM)
    loads = (bh + tile.group * bw) * tile.BM * ELEMENT_BYTES[case.problem.kind]
    groups = launch.usual_groups(blocks, rows, tile.group)
    result = blocks * bh * bw
    return int(launch.parts_of_sum(torch.device("cpu"), groups, steps, loads, result))
