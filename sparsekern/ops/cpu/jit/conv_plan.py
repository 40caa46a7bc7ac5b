"""How a call of the sparse convolution is cut: from shapes alone, so that a plan can be kept.

The line of pixels (`conv_line`) is cut into chunks that fit into L2; a task is a run of chunks. The
weight gradient is summed in a number of parts that depends on shapes alone, and the parts are added
in order, so the number of threads changes no bit. Nothing here depends on which blocks are active.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsekern.ops.cpu.jit.conv_line import Line
from sparsekern.ops.cpu.jit.conv_simd import ENTRY_VECS, OUTER_ROWS, SUM_VECS
from sparsekern.ops.cpu.jit.conv_spec import Cut, Range, Task
from sparsekern.ops.cpu.jit.simd import WIDTH
from sparsekern.ops.geometry import ConvGeometry

if TYPE_CHECKING:
    from sparsekern.topology import Topology

BYTES = 1 << 19  # of the activations of a chunk
PARTS = 8  # most that a weight gradient is summed in
GRAIN = 1 << 20  # multiply-adds that are worth waking another thread for
MOVED = 2  # multiply-adds that take as long as moving an element in or out


class Call(NamedTuple):
    """What a plan depends on, but for the strides of the images."""

    g: ConvGeometry
    block: tuple[int, int]
    blocks: tuple[int, int]  # block rows and columns
    stored: int
    x: torch.Size
    y: torch.Size
    itemsize: int
    threads: int
    most: int  # `BYTES`
    grain: int  # `GRAIN`

    @staticmethod
    def of(t: Topology, g: ConvGeometry, x: Tensor, y: Tensor) -> Call:
        """The call of a product of these images, in shape alone."""
        blocks, stored = (t.crow.numel() - 1, t.block_cols), t.col.numel()
        work = torch.get_num_threads(), BYTES, GRAIN
        return Call(g, t.block, blocks, stored, x.shape, y.shape, x.element_size(), *work)


class Plan(NamedTuple):
    """How a call runs.

    Attributes:
        tasks: what runs side by side.
        cut: of the line.
        strides: row strides in scratch: of the source, of one block row of it, of x for the dots.
        planes: elements of scratch of these three, for one task.
        runs: of pixels, at most, in a chunk.
        parts: that the weight gradient is summed in.
        source: views of the image that is copied first.
        target: views of the image that is written.
        second: views of x, for the dots.
        table: what `locate` is told of block columns of x.
        group: and from one group to the next.
        count: channels of each block if one count holds for all, else None.
        panels: of x, of one group; 0 if it is rows of channels.
    """

    tasks: list[Task]
    cut: Cut
    strides: tuple[int, int, int]
    planes: tuple[int, int, int]
    runs: int
    parts: int
    source: Any
    target: Any
    second: Any
    table: Any
    group: tuple[int, int]
    count: Any
    panels: int

    @property
    def scratch(self) -> int:
        """Elements that a task works on."""
        return sum(self.planes)


@functools.lru_cache(maxsize=256)
def sizes(call: Call) -> Sizes:
    """What all plans of a call share."""
    return Sizes(call)


@functools.lru_cache(maxsize=256)
def forward(call: Call, x: Sequence[int], y: Sequence[int]) -> Plan:
    """The plan of y for images of these strides."""
    s = sizes(call)
    chunk = s.chunk(s.line.phases * s.channels, s.threads)
    ld, lda = s.stride(chunk + s.line.reach), s.stride(chunk)
    table, group, count = s.places(s.channels * ld, call.block[1] * ld, 1, s.ins * ld)
    return Plan(
        tasks=s.forward_tasks(chunk),
        cut=Cut(chunk, s.tile, s.line.length, 0, s.line.reach, 0),
        strides=(ld, lda, 0),
        planes=(s.line.phases * s.channels * ld, call.block[0] * lda, 0),
        runs=s.runs(ld),
        parts=0,
        source=s.line.inputs(x),
        target=s.line.outputs(y),
        second=None,
        table=table,
        group=group,
        count=count,
        panels=0,
    )


@functools.lru_cache(maxsize=256)
def backward(
    call: Call, y: Sequence[int], x: Sequence[int] | None, dx: Sequence[int] | None
) -> Plan:
    """The plan of the gradients from dy of strides `y`: of dw if there is x, of dx if there is."""
    s, line = sizes(call), sizes(call).line
    # panels hold whole blocks of channels, rows what there is
    inner = s.panels * s.lanes * call.g.groups if s.panels else s.channels
    parts = s.parts() if x is not None else s.threads
    chunk = s.chunk(call.y[1] + (line.phases * inner if x is not None else 0), parts)
    front = -(-line.reach // s.lanes) * s.lanes
    ld, ldx = s.stride(front + chunk), s.stride(chunk + line.reach) if x is not None else 0
    lda = s.stride(chunk) if dx is not None else 0
    width = s.lanes if s.panels else 1  # of a pixel in a panel
    group = inner // call.g.groups * ldx
    table, groups, count = s.places(inner * ldx, call.block[1] * ldx, width, group)
    outputs = line.phases * call.g.groups * s.columns if dx is not None else 0
    return Plan(
        tasks=s.tasks(chunk, parts, outputs, call.stored if x is not None else 0),
        cut=Cut(chunk, s.tile, line.length, front, 0, line.reach),
        strides=(ld, lda, ldx),
        planes=(call.y[1] * ld, call.block[1] * lda, line.phases * inner * ldx),
        runs=s.runs(max(ld, ldx)),
        parts=parts,
        source=line.outputs(y),
        target=None if dx is None else line.inputs(dx),
        second=None if x is None else line.inputs(x),
        table=table,
        group=groups,
        count=count,
        panels=s.panels,
    )


class Sizes:
    """The line of a call, and rules for cutting it."""

    def __init__(self, call: Call) -> None:
        (bh, bw), g = call.block, call.g
        self.call = call
        self.line = Line.of(call.x[0], (call.x[2], call.x[3]), g)
        self.channels = call.x[1]
        self.lanes = WIDTH // call.itemsize
        self.tile = (ENTRY_VECS if call.block == (1, 1) else SUM_VECS) * self.lanes
        # of one group
        self.rows, self.columns = call.blocks[0] // g.groups, call.blocks[1] // g.taps
        self.outs, self.ins = call.y[1] // g.groups, call.x[1] // g.groups
        moved = MOVED * (call.x.numel() + call.y.numel())
        work = call.y[0] * call.y[2] * call.y[3] * call.stored * bh * bw + moved
        self.threads = max(1, min(call.threads, work // call.grain))
        whole = bw % self.lanes == 0 and bh % OUTER_ROWS == 0
        self.panels = self.columns * bw // self.lanes if whole else 0

    def places(
        self, phase: int, column: int, pixel: int, group: int
    ) -> tuple[Any, tuple[int, int], Any]:
        """The `table`, `group` and `count` of a plan.

        Args:
            phase: elements from one phase of x in scratch to the next.
            column: from one block of channels to the next.
            pixel: from one pixel to the next.
            group: from one group to the next.
        """
        taps, bw, across = self.line.taps, self.call.block[1], np.arange(self.columns)
        at = (taps[:, :1] * phase + taps[:, 1:] * pixel + across * column).ravel()
        counts = np.tile(np.minimum(bw, self.ins - across * bw), len(taps))
        marks = (taps[:, :1] * (self.call.g.groups * self.columns) + across).ravel()
        count = np.full(1, bw, np.int32) if self.ins % bw == 0 else None
        return np.stack([at, counts, marks]), (group, self.columns), count

    def forward_tasks(self, chunk: int) -> list[Task]:
        """Runs of chunks, and where threads would be idle, ranges of block rows."""
        count = -(-self.line.length // chunk)
        parts = min(count, self.threads)
        splits = -(-self.threads // parts)
        return [
            Task(chunks, outputs)
            for chunks in even(count, parts)
            for outputs in even(self.call.blocks[0], splits)
        ]

    def tasks(self, chunk: int, parts: int, outputs: int, blocks: int) -> list[Task]:
        """Each part of the chunks is one task, or, where threads would be idle, several."""
        splits = max(1, -(-self.threads // parts))
        ranges = [even(n, splits, whole=True) for n in (outputs, blocks)]
        return [
            Task(chunks, outs, parts_of_dw, part)
            for part, chunks in enumerate(even(-(-self.line.length // chunk), parts))
            for outs, parts_of_dw in zip(*ranges, strict=True)
        ]

    def stride(self, pixels: int) -> int:
        """Row stride in scratch: an odd number of vectors, which spreads rows over cache sets."""
        return (-(-pixels // self.lanes) | 1) * self.lanes

    def chunk(self, channels: int, parts: int) -> int:
        """Pixels of a chunk: within `BYTES`, no larger than a part, and large next to the halo."""
        most = max(
            self.call.most // (self.call.itemsize * channels), 2 * self.line.reach, self.tile
        )
        share = -(-self.line.length // parts)
        size = -(-share // -(-share // most))
        return -(-size // self.tile) * self.tile

    def parts(self) -> int:
        """In how many parts dw is summed: they stay small next to the activations."""
        weights = self.call.stored * self.call.block[0] * self.call.block[1]
        room = (self.call.x.numel() + self.call.y.numel()) // (4 * max(weights, 1))
        return max(1, min(PARTS, room, self.line.length // (2 * self.tile)))

    def runs(self, pixels: int) -> int:
        """Runs of pixels that so many places can hold, at most."""
        return pixels // self.line.columns.extent + 3


def even(count: int, parts: int, *, whole: bool = False) -> list[Range]:
    """Cut range(count) into `parts` ranges; empty ones are left out unless `whole`."""
    cuts = [count * i // parts for i in range(parts + 1)]
    pairs = itertools.pairwise(cuts)
    return [(a, b) for a, b in pairs if whole or a < b]


# ---- what a call holds beside its operands and results


def forward_scratch(call: Call) -> int:
    """Elements that all threads hold at once; strides change nothing."""
    plan = forward(call, (0, 0, 0, 0), (0, 0, 0, 0))
    return min(sizes(call).threads, len(plan.tasks)) * plan.scratch


def backward_scratch(call: Call, *, dx: bool, dw: bool) -> int:
    """Elements that all threads hold at once, or the parts of dw and their sum less the sum."""
    none = (0, 0, 0, 0)
    plan = backward(call, none, none if dw else None, none if dx else None)
    weights = call.stored * call.block[0] * call.block[1]
    held = min(sizes(call).threads, len(plan.tasks)) * plan.scratch
    held += weights if dx and call.block == (1, 1) else 0
    if not dw or plan.parts == 1:
        return held
    return max(held + (plan.parts - 1) * weights, plan.parts * weights)
