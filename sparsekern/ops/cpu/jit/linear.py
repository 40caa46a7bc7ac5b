"""CPU path with numba: compiled loops over the active blocks, split over torch's threads.

Two families: *wide* (`wide`) when both block edges are multiples of two vectors (32 floats
with AVX-512), which reads activations where they lie; otherwise *tiles* (`tiles`), which packs
tokens. All sums are chains of fused multiply-adds in a fixed order: the same bits for any number
of threads, and a token's result does not depend on the other tokens. FLOPs: 2 M bh bw per active
block and product. Workspace: wide, per thread the blocks of one block row; tiles, per thread one
tile of tokens, in `sddmm` a chunk of tiles of x and dy.

What depends on sizes alone, a plan, is kept; addresses are read at each call.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.ops.cpu.jit import dots, tiles, wide
from sparsekern.ops.cpu.jit.job import entry, launch
from sparsekern.ops.cpu.jit.simd import VECS, WIDTH
from sparsekern.ops.cpu.pages import fresh

if TYPE_CHECKING:
    from sparsekern.topology import Topology

CHUNK = 4  # tiles of tokens packed at a time for the tiled sddmm, at least one per thread
GRAIN = 1 << 18  # multiply-adds that are worth waking another thread for
NEAR = 1 << 19  # bytes of x that a part of a wide product reads again for each block row
TILE_BYTES = 1 << 19  # of a tile of x, which each block row reads again
PLANS = 4096  # that are kept


class _Call(NamedTuple):
    """What a plan depends on.

    Attributes:
        block: (bh, bw).
        shape: (rows, cols).
        blocks: active ones.
        tokens: M.
        strides: of each operand, in elements.
        size: bytes of an element.
        workers: threads that the work is worth.
    """

    block: tuple[int, int]
    shape: tuple[int, int]
    blocks: int
    tokens: int
    strides: tuple[int, ...]
    size: int
    workers: int


class _Plan(NamedTuple):
    """How a product runs.

    Attributes:
        kernel: compiled.
        workers: threads that can be of use.
        parts: of the job.
        sizes: the job's fields after the addresses.
        scratch: elements of packed tokens.
        tiles: of tokens.
    """

    kernel: Any
    workers: int
    parts: int
    sizes: tuple[int, ...]
    scratch: int = 0
    tiles: int = 0


def spmm(x: Tensor, values: Tensor, t: Topology, bias: Tensor | None) -> Tensor:
    """y = x wᵀ + bias: (M, cols) -> (M, rows)."""
    plan = _sum_plan(_call(t, x, x.stride()), transposed=False)
    y = fresh(x.shape[0], t.shape[0], x.dtype)
    arrays = t.crow.data_ptr(), t.col.data_ptr(), 0
    return _sum(plan, y, x, values, bias, arrays)


def spmm_t(dy: Tensor, values: Tensor, t: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    plan = _sum_plan(_call(t, dy, dy.stride()), transposed=True)
    dx = fresh(dy.shape[0], t.shape[1], dy.dtype)
    arrays = t.ccol.data_ptr(), t.row.data_ptr(), t.perm.data_ptr()
    if t.block == (1, 1):
        # in the order of reading: each tile would else fetch an entry from another cache line
        values, arrays = values.view(-1).index_select(0, t.perm), (*arrays[:2], 0)
    return _sum(plan, dx, dy, values, None, arrays)


def sddmm(dy: Tensor, x: Tensor, t: Topology) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw), zero in the padding."""
    call = _call(t, x, (*x.stride(), *dy.stride()))
    if not call.tokens or not call.blocks:
        return x.new_zeros(t.values_shape)
    if not _is_wide(t.block, call.size):
        return _tiled_dots(call, dy, x, t)
    plan = _dots_plan(call)
    dw = x.new_empty(t.values_shape)
    arrays = t.crow.data_ptr(), t.col.data_ptr(), 0
    _launch(plan, (dw.data_ptr(), x.data_ptr(), dy.data_ptr(), 0, 0, *arrays, 0, 0))
    rows, cols = t.shape
    return t.clear_padding_(dw) if rows % t.block[0] or cols % t.block[1] else dw


def backward(dy: Tensor, x: Tensor, values: Tensor, t: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    return spmm_t(dy, values, t), sddmm(dy, x, t)


def scratch(x: Tensor, t: Topology, *, dx: bool, dw: bool) -> int:
    """Most elements of packed tokens and reordered values that a product holds while it runs.

    Args:
        x: (M, cols); only its shape and dtype matter.
        t: the topology.
        dx: whether the input gradient is made.
        dw: whether the weight gradient is; without either, the product is `spmm`.
    """
    call = _call(t, x, (0, 0, 0, 0))
    if _is_wide(t.block, call.size) or not call.tokens:
        return 0
    sums = _sum_plan(call._replace(strides=(0, 0)), transposed=dx).scratch
    if dx and t.block == (1, 1):
        sums += call.blocks
    if not dw:
        return sums
    packed = _dots_plan(call).scratch if call.blocks else 0
    # dx comes first, when dw is not there yet
    return max(packed, sums - call.blocks * t.block[0] * t.block[1]) if dx else packed


def _call(t: Topology, x: Tensor, strides: tuple[int, ...]) -> _Call:
    block, tokens, blocks = t.block, x.shape[0], t.col.numel()
    workers = min(torch.get_num_threads(), tokens * blocks * block[0] * block[1] // GRAIN)
    return _Call(block, t.shape, blocks, tokens, strides, x.element_size(), max(1, workers))


def _is_wide(block: tuple[int, int], size: int) -> bool:
    step = 2 * WIDTH // size
    return block[0] % step == 0 and block[1] % step == 0


@functools.lru_cache(PLANS)
def _sum_plan(call: _Call, *, transposed: bool) -> _Plan:
    (bh, bw), (rows, cols) = call.block, call.shape
    edges, features = ((bw, bh), (cols, rows)) if transposed else ((bh, bw), (rows, cols))
    in_place, unit = _is_wide(call.block, call.size), WIDTH // call.size
    if in_place:
        most = max(wide.PASS, NEAR // (features[1] * call.size))
        parts, split, span = _wide_parts(call.tokens, call.workers, most)
        ld = 0
    else:
        # tiles of blocks are taken two vectors at a time
        unit *= 1 if call.block == (1, 1) else 2
        span = min(_tile(features[1], call.size), -(-call.tokens // unit) * unit)
        parts, ld = -(-call.tokens // max(1, span)), span
        split = -(-call.workers // max(1, parts))
    out = call.tokens, features[0], features[0]
    x = *call.strides, features[1]
    blocks = -(-features[0] // edges[0])
    sizes = (*out, *x, 0, 0, 0, *edges, blocks, split, span, int(not transposed), ld, 0, 0, 0)
    workers = min(call.workers, parts * split)
    kernel = _kernel("wide_sum" if in_place else "tile_sum", call.size)
    return _Plan(kernel, workers, parts * split, sizes, workers * features[1] * ld)


def _tile(features: int, size: int) -> int:
    """Most tokens of a tile: half as many where it would not stay in L2."""
    most = VECS * WIDTH
    return most // size if features * most <= TILE_BYTES else most // (2 * size)


def _wide_parts(tokens: int, workers: int, most: int) -> tuple[int, int, int]:
    """How many parts, into how many ranges of block rows each, of how many tokens."""
    if tokens < workers * wide.LEAST:
        return 1, 1 if workers == 1 else 2 * workers, tokens
    parts = workers * -(-tokens // (workers * most))
    span = -(-tokens // parts)
    span += -span % wide.UNIT
    return -(-tokens // span), 1, span


@functools.lru_cache(PLANS)
def _dots_plan(call: _Call) -> _Plan:
    in_place = _is_wide(call.block, call.size)
    rows, cols = call.shape
    lanes = WIDTH // call.size
    span = ld = min(_tile(cols, call.size), -(-call.tokens // lanes) * lanes)
    count = -(-call.tokens // span)
    held = min(count, max(CHUNK, call.workers))
    out = call.tokens, 0, 0
    x = *call.strides[:2], cols, *call.strides[2:], rows
    sizes = (*out, *x, *call.block, -(-rows // call.block[0]), 0, span, 0, ld, 0, call.blocks, held)
    parts = min(call.blocks, 1 if call.workers == 1 else 4 * call.workers)
    kernel = _kernel("wide_dots" if in_place else "tile_dots", call.size)
    elements = 0 if in_place else held * (rows + cols) * ld
    return _Plan(kernel, min(call.workers, parts), parts, sizes, elements, count)


@functools.cache
def _kernel(name: str, size: int) -> Any:
    module = dots if name.endswith("dots") else wide if name.startswith("wide") else tiles
    return entry(getattr(module, f"{name}_{'single' if size == 4 else 'double'}"))


def _sum(
    plan: _Plan,
    out: Tensor,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    arrays: tuple[int, int, int],
) -> Tensor:
    values = values.contiguous()
    bias = None if bias is None else bias.contiguous()
    packed = x.new_empty(plan.scratch) if plan.scratch else None
    ends = _address(bias), *arrays, _address(packed), 0
    if plan.parts:
        _launch(plan, (out.data_ptr(), x.data_ptr(), 0, values.data_ptr(), *ends))
    return out


def _tiled_dots(call: _Call, dy: Tensor, x: Tensor, t: Topology) -> Tensor:
    """Per chunk of tiles: pack, then dots by ranges of blocks."""
    plan = _dots_plan(call)
    pack = _kernel("tile_pack", call.size)
    dw = x.new_zeros(t.values_shape)
    packed = x.new_empty(plan.scratch)
    held, ld = plan.sizes[-1], plan.sizes[-4]
    homes = packed.data_ptr(), packed.data_ptr() + held * t.shape[1] * ld * call.size
    operands = dw.data_ptr(), x.data_ptr(), dy.data_ptr(), 0, 0, t.crow.data_ptr()
    head = (*operands, t.col.data_ptr(), 0, *homes)
    for first in range(0, plan.tiles, held):
        count = min(held, plan.tiles - first)
        sizes = (*plan.sizes[:-3], first, call.blocks, count)
        workers = min(call.workers, 2 * count)
        launch(pack, (0, 0, 2 * count, *head, *sizes), workers)
        launch(plan.kernel, (0, 0, plan.parts, *head, *sizes), plan.workers)
    return dw


def _launch(plan: _Plan, addresses: tuple[int, ...]) -> None:
    launch(plan.kernel, (0, 0, plan.parts, *addresses, *plan.sizes), plan.workers)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
