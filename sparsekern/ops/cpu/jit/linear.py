"""CPU path with numba: compiled loops over the active blocks, split over torch's threads.

Two families: *wide* (`wide`) when both block edges are multiples of two vectors (32 floats
with AVX-512), which reads activations where they lie; otherwise *tiles* (`tiles`), which packs
tokens. All sums are chains of fused multiply-adds in a fixed order: the same bits for any number
of threads. FLOPs: 2 M bh bw per active block and product. Workspace: wide, per thread the blocks of
one block row; tiles, per thread one tile of tokens, in `sddmm` a chunk of tiles of x and dy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.ops.cpu.jit import tiles as cpu_tiles
from sparsekern.ops.cpu.jit import wide as cpu_wide
from sparsekern.ops.cpu.jit.simd import VECS, WIDTH
from sparsekern.ops.cpu.threads import Task, run

if TYPE_CHECKING:
    from sparsekern.topology import Topology

CHUNK = 4  # tiles of tokens packed at a time for the tiled sddmm, at least one per thread
GRAIN = 1 << 20  # multiply-adds that are worth waking another thread for
Ranges = list[tuple[int, int]]


def spmm(x: Tensor, values: Tensor, t: Topology, bias: Tensor | None) -> Tensor:
    """y = x wᵀ + bias: (M, cols) -> (M, rows)."""
    return _product(x, values.contiguous(), t, bias, transposed=False)


def spmm_t(dy: Tensor, values: Tensor, t: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    return _product(dy, values.contiguous(), t, None, transposed=True)


def sddmm(dy: Tensor, x: Tensor, t: Topology) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw), zero in the padding."""
    job = _Job(t, x)
    dw = x.new_zeros(t.nnzb, *t.block)
    if job.wide:
        run([job.wide_dots(dw, dy, x, part) for part in _even(t.nnzb, job.threads)])
        t.clear_padding_(dw)
    else:
        _tiled_backward(job, dw, dy, x)
    return dw


def backward(dy: Tensor, x: Tensor, values: Tensor, t: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`; the tiled family packs dy once for both."""
    job, values = _Job(t, x), values.contiguous()
    dw = x.new_zeros(t.nnzb, *t.block)
    dx = dy.new_empty(dy.shape[0], t.shape[1])
    if job.wide:
        tasks = job.wide_sums(dx, dy, values, None, transposed=True)
        tasks += [job.wide_dots(dw, dy, x, part) for part in _even(t.nnzb, job.threads)]
        run(tasks)
        t.clear_padding_(dw)
    else:
        _tiled_backward(job, dw, dy, x, (dx, _in_order(values, t)))
    return dx, dw


def scratch(x: Tensor, t: Topology, *, dx: bool, dw: bool) -> int:
    """Elements of packed tokens and reordered values that a product holds while it runs.

    Args:
        x: (M, cols); only its shape and dtype matter.
        t: the topology.
        dx: whether the input gradient is made.
        dw: whether the weight gradient is; without either, the product is `spmm`.
    """
    job = _Job(t, x)
    if job.wide:
        return 0
    tiles = -(-job.tokens // job.tile)
    reordered = t.nnzb if dx and t.block == (1, 1) else 0
    if dw:
        return reordered + min(max(CHUNK, job.threads), tiles) * sum(t.shape) * job.tile
    return reordered + min(tiles, job.threads) * t.shape[0 if dx else 1] * job.tile


class _Job:
    """What all kernel calls of one product share: element type, addresses, how to split."""

    def __init__(self, t: Topology, x: Tensor) -> None:
        self.t = t
        self.eb = x.element_size()
        self.z = np.float32(0) if self.eb == 4 else np.float64(0)
        lanes = WIDTH // self.eb
        self.tile = VECS * lanes
        self.tokens = x.shape[0]
        self.wide = t.block[0] % (2 * lanes) == 0 and t.block[1] % (2 * lanes) == 0
        work = self.tokens * t.nnzb * t.block[0] * t.block[1]
        self.threads = max(1, min(torch.get_num_threads(), work // GRAIN))

    def arrays(self, *, transposed: bool) -> tuple[int, int, int]:
        t = self.t
        if transposed:
            slot = 0 if t.block == (1, 1) else t.perm.data_ptr()  # see `_in_order`
            return t.ccol.data_ptr(), t.row.data_ptr(), slot
        return t.crow.data_ptr(), t.col.data_ptr(), 0

    def wide_sums(
        self, out: Tensor, x: Tensor, values: Tensor, bias: Tensor | None, *, transposed: bool
    ) -> list[Task]:
        """Tasks of one product: by tokens where each thread gets a pass, else by block rows."""
        t = self.t
        bh, bw = t.block
        ptr = t.ccol if transposed else t.crow
        edges = (bw, bh, 0) if transposed else (bh, bw, 1)
        head: tuple[Any, ...] = (
            self.z,
            self.eb,
            (out.data_ptr(), out.stride(0), out.shape[1]),
            _matrix(x),
        )
        head += ((values.data_ptr(), *edges), self.arrays(transposed=transposed), _address(bias))
        rows = (0, ptr.numel() - 1)
        if self.tokens >= self.threads * cpu_wide.PASS:
            parts = [(rows, part) for part in _even(self.tokens, self.threads, 8)]
        else:
            parts = [(part, (0, self.tokens)) for part in _balanced(ptr, self.threads)]
        return [_task(cpu_wide.wide_sum, *head, r, m) for r, m in parts]

    def wide_dots(self, dw: Tensor, dy: Tensor, x: Tensor, entries: tuple[int, int]) -> Task:
        """One range of blocks of the sampled product."""
        arrays = self.arrays(transposed=False)[:2]
        head = (self.z, self.eb, dw.data_ptr(), _matrix(dy), _matrix(x), self.t.block, arrays)
        return _task(cpu_wide.wide_dots, *head, entries, self.tokens)

    def tile_dots(self, dw: Tensor, dt: int, xt: int, entries: tuple[int, int]) -> None:
        """One range of blocks of the sampled product, one packed tile."""
        t, arrays = self.t, self.arrays(transposed=False)[:2]
        head = (self.z, self.eb, dw.data_ptr(), dt, xt, t.block, t.shape, arrays)
        cpu_tiles.tile_dots(*head, entries)

    def pack(self, at: int, x: Tensor, tile: int) -> None:
        """Pack one tile of tokens."""
        start = tile * self.tile
        size = min(self.tile, self.tokens - start)
        cpu_tiles.pack(self.z, self.eb, at, _matrix(x), start, size)

    def tile_sum(
        self, out: Tensor, at: int, values: Tensor, bias: Tensor | None, tile: int, transposed: bool
    ) -> None:
        """One packed tile of a product."""
        t = self.t
        bh, bw = t.block
        edges = (bw, bh, 1, bw, t.shape[0]) if transposed else (bh, bw, bw, 1, t.shape[1])
        arrays = (*self.arrays(transposed=transposed), t.block_cols if transposed else t.block_rows)
        head = (self.z, self.eb, (out.data_ptr(), out.stride(0), out.shape[1]), at)
        start = tile * self.tile
        size = min(self.tile, self.tokens - start)
        w = (values.data_ptr(), *edges)
        cpu_tiles.tile_sum(*head, w, arrays, _address(bias), start, size)


def _product(
    x: Tensor, values: Tensor, t: Topology, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    job = _Job(t, x)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape[0], t.shape[1] if transposed else t.shape[0])
    if job.wide:
        run(job.wide_sums(out, x, values, bias, transposed=transposed))
        return out
    values = _in_order(values, t) if transposed else values
    tiles = _even(-(-job.tokens // job.tile), job.threads)
    scratch = x.new_empty(len(tiles), x.shape[1] * job.tile)

    def part(i: int) -> None:
        at = scratch[i].data_ptr()
        for tile in range(*tiles[i]):
            job.pack(at, x, tile)
            job.tile_sum(out, at, values, bias, tile, transposed)

    run([_task(part, i) for i in range(len(tiles))])
    return out


def _in_order(values: Tensor, t: Topology) -> Tensor:
    """Values as the transposed product reads them: entries in column order, blocks as stored.

    Every tile of tokens would else fetch each single entry from another cache line.
    """
    return values.view(-1).index_select(0, t.perm) if t.block == (1, 1) else values


def _tiled_backward(
    job: _Job, dw: Tensor, dy: Tensor, x: Tensor, dx: tuple[Tensor, Tensor] | None = None
) -> None:
    """Fill dw, and dx from (dx, values): per chunk, pack and dx by tile, then dw by entries."""
    step = max(CHUNK, job.threads)
    tiles = -(-job.tokens // job.tile)
    dt = dy.new_empty(min(step, tiles), dy.shape[1] * job.tile)
    xt = x.new_empty(min(step, tiles), x.shape[1] * job.tile)
    for base in range(0, tiles, step):
        count = min(step, tiles - base)

        def prepare(part: tuple[int, int], base: int = base) -> None:
            for i in range(*part):
                at = dt[i].data_ptr()
                job.pack(at, dy, base + i)
                job.pack(xt[i].data_ptr(), x, base + i)
                if dx is not None:
                    job.tile_sum(dx[0], at, dx[1], None, base + i, True)

        def reduce(part: tuple[int, int], count: int = count) -> None:
            for i in range(count):
                job.tile_dots(dw, dt[i].data_ptr(), xt[i].data_ptr(), part)

        run([_task(prepare, part) for part in _even(count, job.threads)])
        run([_task(reduce, part) for part in _even(job.t.nnzb, job.threads)])


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _even(count: int, parts: int, unit: int = 1) -> Ranges:
    """Cut range(count) into at most `parts` ranges of whole units; empty ones are left out."""
    units = -(-count // unit)
    cuts = [min(count, units * i // parts * unit) for i in range(parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def _balanced(ptr: Tensor, parts: int) -> Ranges:
    """Cut block rows so that each range holds about as many blocks; all rows are covered."""
    rows = ptr.numel() - 1
    total = int(ptr[-1]) if parts > 1 else 0
    wanted = ptr.new_tensor([total * i // parts for i in range(1, parts)])
    cuts = [0, *torch.searchsorted(ptr, wanted).clamp(max=rows).tolist(), rows]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def _task(function: Callable[..., None], *args: Any) -> Task:
    return lambda: function(*args)
