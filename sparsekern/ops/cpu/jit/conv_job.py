"""One call of the sparse convolution with numba: how it is cut, and what the kernels are told.

The line of pixels (`conv_line`) is cut into chunks that fit into L2; a task is a run of chunks.
The weight gradient is summed in a number of parts that depends on shapes alone, and the parts are
added in order, so the number of threads changes no bit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsekern.ops.cpu.jit import conv_sums as sums_of
from sparsekern.ops.cpu.jit import conv_sweep as kernels
from sparsekern.ops.cpu.jit.conv_line import Ints, Line
from sparsekern.ops.cpu.jit.conv_simd import ENTRY_VECS, SUM_VECS
from sparsekern.ops.cpu.jit.simd import WIDTH
from sparsekern.ops.cpu.threads import run
from sparsekern.ops.geometry import ConvGeometry

if TYPE_CHECKING:
    from sparsekern.topology import Topology

BYTES = 1 << 19  # of the activations of a chunk
PARTS = 8  # most that a weight gradient is summed in
GRAIN = 1 << 20  # multiply-adds that are worth waking another thread for
OUTER_ROWS = 8  # rows that an outer product takes at a time
_NO_VIEW = np.zeros((0, 12), np.int64)
_NO_INDEX = np.zeros(0, np.int32)
_NO_SUMS = (0, (0, 0, 0, 0), _NO_INDEX, (0, 0, 0, 0), (0, _NO_VIEW, 1, 1, 0, 1, 0))
_NO_DOTS = (0, (0, (1, 1)), (_NO_INDEX, _NO_INDEX, _NO_INDEX, 1, 1), (1, 0))
_NO_SOURCE = (0, _NO_VIEW, 0, 0)
Range = tuple[int, int]


class _Task(NamedTuple):
    """One run of chunks, and what it does with them."""

    chunks: Range
    outputs: Range = (0, 0)  # block rows of the product
    blocks: Range = (0, 0)  # blocks of the weight gradient
    part: int = 0  # of the weight gradient


class Job:
    """One call: the line, how it is cut, and what the kernels are told.

    Args:
        t: connections.
        g: geometry.
        x: the input image, or its gradient.
        y: the output image, or its gradient.
    """

    def __init__(self, t: Topology, g: ConvGeometry, x: Tensor, y: Tensor) -> None:
        self.t, self.x, self.y = t, x, y
        self.line = Line.of(x.shape[0], (x.shape[2], x.shape[3]), g)
        self.eb = x.element_size()
        self.z = np.float32(0) if self.eb == 4 else np.float64(0)
        self.lanes = WIDTH // self.eb
        single = t.block == (1, 1)
        self.tile = (ENTRY_VECS if single else SUM_VECS) * self.lanes
        self.rows, self.columns = t.block_rows // t.groups, t.block_cols // t.taps
        self.outs, self.ins = y.shape[1] // t.groups, x.shape[1] // t.groups  # of one group
        work = y.shape[0] * y.shape[2] * y.shape[3] * t.nnzb * t.block[0] * t.block[1]
        self.threads = max(1, min(torch.get_num_threads(), work // GRAIN))
        whole = t.block[1] % self.lanes == 0 and t.block[0] % OUTER_ROWS == 0
        self.kind = 2 if whole else 1  # of the dots: panels or rows
        self.panels = self.columns * t.block[1] // self.lanes if whole else 0  # of one group

    def forward(self, values: Tensor, bias: Tensor | None) -> None:
        """Fill y."""
        t, line, (bh, bw) = self.t, self.line, self.t.block
        chunk, ld = self.forward_sizes()
        at, kn = self.places(self.x.shape[1] * ld, bw * ld, 1, self.ins * ld)
        places = (at.ctypes.data, kn.ctypes.data, int(kn.size > 1), 0)
        address = 0 if bias is None else bias.data_ptr()
        out = (self.y.data_ptr(), line.outputs(self.y), t.groups, self.rows, self.outs, bh, address)
        sums = (1, (values.data_ptr(), bh * bw, bw, 1), t.crow.numpy(), places, out)
        source = (self.x.data_ptr(), line.inputs(self.x), self.x.shape[1], 0, line.reach)
        tasks = self.forward_tasks(chunk)
        self.run(tasks, chunk, source, (ld, bh), sums, _NO_DOTS, _NO_SOURCE, 0)

    def backward(self, x: Tensor | None, values: Tensor | None, dx: Tensor | None) -> Tensor:
        """Fill dx if there are values; return dw if there is x, else an empty tensor."""
        t, line = self.t, self.line
        parts, chunk, front, ld, ldx = self.backward_sizes(dots=x is not None)
        source = (self.y.data_ptr(), line.outputs(self.y), self.y.shape[1], front, 0)
        sums, dots, second, keep, outputs = _NO_SUMS, _NO_DOTS, _NO_SOURCE, None, 0
        if values is not None and dx is not None:
            if not line.complete:
                dx.zero_()
            sums, keep = self.transposed(values, dx, ld)
            outputs = line.phases * t.groups * self.columns
        dw = self.y.new_zeros(0)
        if x is not None:
            dots = self.dots(ldx)
            second = (x.data_ptr(), line.inputs(x), x.shape[1], line.reach)
            dw = self.y.new_empty(parts, *t.values_shape)  # tasks fill it, in their threads
        tasks = self.tasks(-(-line.length // chunk), parts, outputs, dw.numel())
        if dw.numel():
            dw[tasks[-1].part + 1 :] = 0
        self.run(tasks, chunk, source, (ld, t.block[1]), sums, dots, second, ldx, dw)
        del keep
        if x is None:
            return dw
        return t.clear_padding_(self.total(dw))

    def total(self, parts: Tensor) -> Tensor:
        """Sum over the first axis, in order, in one parallel region if it is worth one."""
        if parts.shape[0] == 1:
            return parts[0]
        whole = parts.new_empty(parts.shape[1:])
        lines, out = parts.view(parts.shape[0], -1).numpy(), whole.view(-1).numpy()

        def add(span: Range) -> None:
            home = out[slice(*span)]
            home[:] = lines[0, slice(*span)]
            for line in lines[1:]:
                home += line[slice(*span)]

        threads = self.threads if lines.size > GRAIN else 1
        run([functools.partial(add, span) for span in _even(out.size, threads)])
        return whole

    # ---- what the kernels are told

    def transposed(self, values: Tensor, dx: Tensor, ld: int) -> tuple[Any, Any]:
        """The `sums` of the input gradient, and what must live as long as they do."""
        t, line, (bh, bw) = self.t, self.line, self.t.block
        ptr = np.empty(line.phases * t.groups * self.columns + 1, np.int32)
        places = np.empty((3, t.nnzb), np.int32)
        sizes = (line.phases, t.groups, self.columns, self.rows, self.outs, bh, ld)
        arrays = (t.ccol.numpy(), t.row.numpy(), t.perm.numpy())
        sums_of.locate_transposed(arrays, line.taps, sizes, ptr, places)
        at, kn, slot = (places[i].ctypes.data for i in range(3))
        if t.block == (1, 1):
            # single entries are read one after the other, so they are put in that order
            values = values.view(-1).index_select(0, torch.from_numpy(places[2]))
        w = (values.data_ptr(), bh * bw, 1, bw)
        views = line.inputs(dx)
        out = (dx.data_ptr(), views, t.groups, self.columns, self.ins, bw, 0)
        return (1, w, ptr, (at, kn, 1, slot), out), (places, values)

    def dots(self, ldx: int) -> Any:
        """The `dots` of the weight gradient, but for the address of dw."""
        t, bw = self.t, self.t.block[1]
        if self.kind == 2:
            group = self.panels * ldx * self.lanes
            at, kn = self.places(group * t.groups, bw * ldx, self.lanes, group)
        else:
            at, kn = self.places(self.x.shape[1] * ldx, bw * ldx, 1, self.ins * ldx)
        index = (t.crow.numpy(), at, kn, self.rows, self.outs)
        return (self.kind, (0, t.block), index, (t.groups, self.panels))

    def places(self, phase: int, column: int, pixel: int, group: int) -> tuple[Any, Any]:
        """Offsets and channel counts of all blocks in CSR order.

        Args:
            phase: elements from one phase of x in scratch to the next.
            column: from one block of channels to the next.
            pixel: from one pixel to the next.
            group: from one group to the next.
        """
        t, bw = self.t, self.t.block[1]
        taps = self.line.taps
        first = taps[:, :1] * phase + taps[:, 1:] * pixel
        table: Ints = (first + np.arange(self.columns) * column).ravel()
        counts = np.minimum(bw, self.ins - np.arange(self.columns) * bw)
        at = np.empty(t.nnzb, np.int32)
        kn = np.full(1, bw, np.int32) if self.ins % bw == 0 else np.empty(t.nnzb, np.int32)
        index = (t.crow.numpy(), t.col.numpy())
        sums_of.locate(*index, table, np.tile(counts, t.taps), group, self.rows, at, kn)
        return at, kn

    # ---- cutting

    def forward_sizes(self) -> tuple[int, int]:
        """Pixels of a chunk, and the row stride of x in scratch."""
        chunk = self.chunk(self.line.phases * self.x.shape[1], self.threads)
        return chunk, self.stride(chunk + self.line.reach)

    def forward_tasks(self, chunk: int) -> list[_Task]:
        """Runs of chunks, and where threads would be idle, ranges of block rows."""
        count = -(-self.line.length // chunk)
        parts = min(count, self.threads)
        splits = -(-self.threads // parts)
        return [
            _Task(chunks, outputs)
            for chunks in _even(count, parts)
            for outputs in _even(self.t.block_rows, splits)
        ]

    def backward_sizes(self, *, dots: bool) -> tuple[int, int, int, int, int]:
        """Parts of dw, pixels of a chunk, those ahead of it, row strides of dy and x in scratch."""
        channels, line = self.y.shape[1], self.line
        if dots:
            channels += line.phases * self.inner
        parts = self.parts() if dots else self.threads
        chunk = self.chunk(channels, parts)
        front = -(-line.reach // self.lanes) * self.lanes
        return parts, chunk, front, self.stride(front + chunk), self.stride(chunk + line.reach)

    @property
    def inner(self) -> int:
        """Channels of x in scratch, where the dots read it: in panels, or as they are."""
        return self.panels * self.lanes * self.t.groups if self.kind == 2 else self.x.shape[1]

    def planes(
        self, source: tuple[int, int], edge: int, strides: tuple[int, int, int], phases: int
    ) -> list[int]:
        """Elements of scratch: the source, one block row of it, x for the dots, one line of x.

        Args:
            source: views and channels of what is copied first.
            edge: rows of a block.
            strides: of the source, of a block row, of x.
            phases: views of x; 0 without dots.
        """
        ld, lda, ldx = strides
        line = self.lanes * ldx if self.kind == 2 else 0
        return [source[0] * source[1] * ld, edge * lda, phases * self.inner * ldx, line]

    def forward_scratch(self) -> int:
        """Elements that all threads hold at once."""
        chunk, ld = self.forward_sizes()
        source = self.line.phases, self.x.shape[1]
        planes = self.planes(source, self.t.block[0], (ld, self.stride(chunk), 0), 0)
        return min(self.threads, len(self.forward_tasks(chunk))) * sum(planes)

    def backward_scratch(self, *, sums: bool, dots: bool) -> int:
        """Elements that all threads hold at once, or the parts of dw and their sum less the sum."""
        t, line = self.t, self.line
        parts, chunk, _, ld, ldx = self.backward_sizes(dots=dots)
        strides = ld, self.stride(chunk) if sums else 0, ldx if dots else 0
        phases = line.phases if dots else 0
        planes = self.planes((1, self.y.shape[1]), t.block[1], strides, phases)
        weights = t.nnzb * t.block[0] * t.block[1]
        outputs = line.phases * t.groups * self.columns if sums else 0
        tasks = self.tasks(-(-line.length // chunk), parts, outputs, weights if dots else 0)
        held = min(self.threads, len(tasks)) * sum(planes)
        held += weights if sums and t.block == (1, 1) else 0
        if not dots or parts == 1:
            return held
        return max(held + (parts - 1) * weights, parts * weights)

    def stride(self, pixels: int) -> int:
        """Row stride in scratch: an odd number of vectors, which spreads rows over cache sets."""
        return (-(-pixels // self.lanes) | 1) * self.lanes

    def chunk(self, channels: int, parts: int) -> int:
        """Pixels of a chunk: within `BYTES`, no larger than a part, and large next to the halo."""
        most = max(BYTES // (self.eb * channels), 2 * self.line.reach, self.tile)
        share = -(-self.line.length // parts)
        size = -(-share // -(-share // most))
        return -(-size // self.tile) * self.tile

    def parts(self) -> int:
        """In how many parts dw is summed: they stay small next to the activations."""
        weights = self.t.nnzb * self.t.block[0] * self.t.block[1]
        activations = self.x.numel() + self.y.numel()
        room = activations // (4 * max(weights, 1))
        return max(1, min(PARTS, room, self.line.length // (2 * self.tile)))

    def tasks(self, count: int, parts: int, outputs: int, blocks: int) -> list[_Task]:
        """Each part of the chunks is one task, or, where threads would be idle, several."""
        splits = max(1, -(-self.threads // parts))
        ranges = [_even(n, splits, whole=True) for n in (outputs, self.t.nnzb if blocks else 0)]
        return [
            _Task(chunks, outs, parts_of_dw, part)
            for part, chunks in enumerate(_even(count, parts))
            for outs, parts_of_dw in zip(*ranges, strict=True)
        ]

    def run(
        self,
        tasks: Sequence[_Task],
        chunk: int,
        source: Any,
        sizes: tuple[int, int],
        sums: Any,
        dots: Any,
        second: Any,
        ldx: int,
        dw: Tensor | None = None,
    ) -> None:
        """Run the tasks; `sizes` are the row stride of the source and the rows of a block."""
        ld, edge = sizes
        lda = self.stride(chunk) if sums[0] else 0
        views = source[1].shape[0], source[2]
        planes = self.planes(views, edge, (ld, lda, ldx), second[1].shape[0])
        starts = np.cumsum([0, *planes]).tolist()
        runs = (max(ld, ldx) // self.line.columns.extent) + 3
        chunked = (chunk, self.tile, self.line.length)

        def one(task: _Task) -> None:
            scratch = self.y.new_empty(starts[-1])
            places = [scratch.data_ptr() + self.eb * at for at in starts[:4]]
            home = (*places, ld, lda, ldx, np.empty((runs, 3), np.int64))
            out = (*sums[4], *task.outputs)
            to = (dots[1][0], dots[1][1], *task.blocks)
            if dw is not None and dw.numel():
                dw[task.part].numpy()[slice(*task.blocks)] = 0
                to = (dw[task.part].data_ptr(), dots[1][1], *task.blocks)
            kernels.sweep(
                self.z,
                self.eb,
                (*task.chunks, *chunked),
                source,
                home,
                (*sums[:4], out),
                (dots[0], to, *dots[2:]),
                second,
            )

        run([functools.partial(one, task) for task in tasks])


def _even(count: int, parts: int, *, whole: bool = False) -> list[Range]:
    """Cut range(count) into `parts` ranges; empty ones are left out unless `whole`."""
    cuts = [count * i // parts for i in range(parts + 1)]
    pairs = itertools.pairwise(cuts)
    return [(a, b) for a, b in pairs if whole or a < b]
