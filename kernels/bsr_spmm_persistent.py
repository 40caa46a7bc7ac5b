"""Block-sparse times dense on Hopper by programs that stay: one to a multiprocessor.

Shapes: x (M, K), w (N, K) held as values (nnzb, BH, BW) at the active blocks, y (M, N), and with
the same kernel dx = dy w. It computes what `bsr_spmm` does, which calls it where a launch table
asks for it (`spmm_persistent/half/64/any/tma`). No shipped table does: it has been compiled and
emulated but never run on a GPU.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = 2: s * M * nnzb * IN for x, s * ceil(M / 256) * nnzb * BH * BW for w, s * M * N
out; IN is the block's edge along the sum. They bound it: of what L2 and the tensor cores allow it's
modelled to take half to four fifths at 8192 x 4096 x 4096 and density 0.1.

A program walks the tiles that `dealing` gives it: 256 tokens times one block row, the row's blocks
in order, so every sum has one order. One warp, the producer, copies x and w into a ring of STAGES
steps, BK of the sum each. Two warpgroups, the consumers, multiply 128 tokens each and write them
out. The producer never waits for an end of a tile: while consumers finish one, the ring fills with
the next one's first steps. It loads a tile's row three tiles ahead, the row's run two and the first
index one.

Synchronisation. Step n uses slot n % STAGES for the (n // STAGES)-th time, counting from 0, so its
phase is n // STAGES % 2.
- `full[slot]` has one arrival, the producer's, with the bytes expected. Both consumers wait for it
  with the phase of the step.
- `empty[slot]` has two, one of each consumer, made once no thread of it reads the slot any more:
  after the product of step n is issued, `wait(1)` retires that of step n - 1 for this warp, and the
  thread barrier that stands before an arrival says so of all four. The last step of a tile is
  retired by `wait(0)`. The producer waits with the other phase: for the first use of a slot that is
  the phase before a fresh barrier's first, which counts as complete.
- Nobody lags two phases: `full` can complete again only after `empty` has, to which each consumer
  arrives after it has seen `full`; and the other way round.
- Every step that is copied is waited for by both consumers, as all three walk the same tiles, so no
  copy outlives its program. A row without blocks has no step; its tile is zeros and the bias.
- A consumer's tile of y goes to memory by TMA while the next is multiplied. `store_wait` comes
  before it is written again, the proxy fence after, thread barriers on both sides.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dealing import deal
from .launch import BLOCK_EDGES

__all__ = ["launch_persistent", "persistent_fits", "persistent_stages", "shared_layout"]

# names of Triton 3.9, or 3.6
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

TOKENS = 256  # of a tile: 128 to each consumer
STEP = 64  # of the sum, at most: rows of 128 bytes
LEAST_STAGES = 2  # a step is let go of when the next is multiplied: with one slot both would wait
MOST_STAGES = 8
PROGRAMS = 132  # multiprocessors of a whole chip

_SHARED_LIMIT = 227 * 1024
_SHARED_EXTRA = 1024  # barriers, and what the warpgroups are handed


def persistent_stages(reduce: int, out: int) -> int:
    """Steps that fit into shared memory beside the tiles of y."""
    room = _SHARED_LIMIT - _SHARED_EXTRA - TOKENS * out * 2
    return min(MOST_STAGES, room // ((TOKENS + out) * min(reduce, STEP) * 2))


def persistent_fits(arch: str, dtype: torch.dtype, block: tuple[int, int]) -> bool:
    """Whether these kernels can compute products of the block, operands that TMA takes provided."""
    half = dtype in (torch.float16, torch.bfloat16)
    return arch == "sm90" and half and all(edge in BLOCK_EDGES for edge in block)


def shared_layout(columns: int) -> gl.NVMMASharedLayout:
    """Rows of `columns` 16-bit numbers, swizzled as TMA and wgmma do, over 128 bytes at most."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(2 * columns, 128), element_bitwidth=16, rank=2
    )


@gluon.jit
def _place(turn, deal):
    """Place in the line of the tile that this program gets in a turn."""
    _T, _R, _group, back = deal
    p = gl.program_id(0)
    P = gl.num_programs(0)
    return turn * P + gl.where((turn & back) != 0, P - 1 - p, p)


@gluon.jit
def _count(deal):
    """Tiles of this program; of the last round some get none."""
    T, R, _group, _back = deal
    last = (T * R - 1) // gl.num_programs(0)
    return last + gl.where(_place(last, deal) < T * R, 1, 0)


@gluon.jit
def _tile(turn, count, deal):
    """Rank among the block rows, and token tile; past the last tile that one again."""
    T, R, group, _back = deal
    k = _place(gl.minimum(turn, count - 1), deal)
    g = k // (group * R)
    size = gl.minimum(T - g * group, group)
    within = k - g * (group * R)
    rank = within // size
    backwards = (((T - 1) // group - g) & 1) != 0
    return gl.where(backwards, R - 1 - rank, rank), g * group + within % size


@gluon.jit
def _produce(held, given, deal, shape: gl.constexpr):
    IN: gl.constexpr = shape[0]
    OUT: gl.constexpr = shape[1]
    BK: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[3]
    TRANS: gl.constexpr = shape[4]
    x_ring, w_ring, _y, full, empty = held
    x_desc, w_desc, _desc, start_ptr, index_ptr, perm_ptr, order_ptr, _bias_ptr, _N, _sb = given
    count = _count(deal)
    rank, q = _tile(0, count, deal)
    r = gl.load(order_ptr + rank)
    rank, q1 = _tile(1, count, deal)
    r1 = gl.load(order_ptr + rank)
    rank, q2 = _tile(2, count, deal)
    r2 = gl.load(order_ptr + rank)
    lo = gl.load(start_ptr + r)
    hi = gl.load(start_ptr + r + 1)
    lo1 = gl.load(start_ptr + r1)
    hi1 = gl.load(start_ptr + r1 + 1)
    c = gl.load(index_ptr + lo, mask=lo < hi, other=0)
    s = gl.load(perm_ptr + lo, mask=lo < hi, other=0) if TRANS else lo
    slot = 0
    phase = 1
    for j in range(count):
        rank, q3 = _tile(j + 3, count, deal)
        r3 = gl.load(order_ptr + rank)
        lo2 = gl.load(start_ptr + r2)
        hi2 = gl.load(start_ptr + r2 + 1)
        c1 = gl.load(index_ptr + lo1, mask=lo1 < hi1, other=0)
        s1 = gl.load(perm_ptr + lo1, mask=lo1 < hi1, other=0) if TRANS else lo1
        for t in range(lo, hi):
            more = t + 1 < hi
            after = gl.load(index_ptr + t + 1, mask=more, other=0)
            s_after = gl.load(perm_ptr + t + 1, mask=more, other=0) if TRANS else t + 1
            for k in gl.static_range(0, IN, BK):
                mbarrier.wait(empty.index(slot), phase)
                ready = full.index(slot)
                mbarrier.expect(ready, (256 + OUT) * BK * 2)
                _copy(x_desc, [q * 256, c * IN + k], ready, x_ring.index(slot * 2))
                _copy(x_desc, [q * 256 + 128, c * IN + k], ready, x_ring.index(slot * 2 + 1))
                if TRANS:
                    _copy(w_desc, [s * IN + k, 0], ready, w_ring.index(slot))
                else:
                    _copy(w_desc, [s * OUT, k], ready, w_ring.index(slot))
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1
            c = after
            s = s_after
        q, lo, hi, c, s = q1, lo1, hi1, c1, s1
        q1, lo1, hi1 = q2, lo2, hi2
        q2, r2 = q3, r3


@gluon.jit
def _consume(
    held,
    given,
    deal,
    shape: gl.constexpr,
    PART: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RELU: gl.constexpr,
):
    IN: gl.constexpr = shape[0]
    OUT: gl.constexpr = shape[1]
    BK: gl.constexpr = shape[2]
    STAGES: gl.constexpr = shape[3]
    TRANS: gl.constexpr = shape[4]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 16])
    x_ring, w_ring, y, full, empty = held
    _x_desc, _w_desc, y_desc, start_ptr, _index_ptr, _perm_ptr, order_ptr, bias_ptr, N, sb = given
    tile = y.index(PART)
    count = _count(deal)
    rank, q = _tile(0, count, deal)
    r = gl.load(order_ptr + rank)
    rank, q1 = _tile(1, count, deal)
    r1 = gl.load(order_ptr + rank)
    lo = gl.load(start_ptr + r)
    hi = gl.load(start_ptr + r + 1)
    slot = 0
    phase = 0
    for j in range(count):
        rank, q2 = _tile(j + 2, count, deal)
        r2 = gl.load(order_ptr + rank)
        lo1 = gl.load(start_ptr + r1)
        hi1 = gl.load(start_ptr + r1 + 1)
        acc = gl.zeros([128, OUT], gl.float32, MMA)
        before = slot
        for i in range((hi - lo) * (IN // BK)):
            mbarrier.wait(full.index(slot), phase)
            w = w_ring.index(slot)
            w_in = w if TRANS else w.permute((1, 0))
            acc = warpgroup_mma(x_ring.index(slot * 2 + PART), w_in, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            _barrier()
            mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
            before = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        _barrier()
        mbarrier.arrive(empty.index(before), count=1, pred=lo < hi)
        if HAS_BIAS:
            n = r * OUT + gl.arange(0, OUT, gl.SliceLayout(0, MMA))
            b = gl.load(bias_ptr + n * sb, mask=n < N, other=0.0)
            acc += b.to(gl.float32)[None, :]
        if RELU:
            # unlike a maximum, this keeps NaN
            acc = gl.where(acc < 0, 0.0, acc)
        tma.store_wait(0)
        _barrier()
        tile.store(acc.to(y_desc.dtype))
        fence_async_shared()
        _barrier()
        _store(y_desc, [q * 256 + PART * 128, r * OUT], tile)
        q, r, lo, hi = q1, r1, lo1, hi1
        q1, r1 = q2, r2
    tma.store_wait(0)


# a new number of tokens must not mean a new compilation
@gluon.jit(do_not_specialize=["T", "N", "R", "group", "back"])
def _bsr_spmm_persistent_kernel(
    x_desc,  # (M, K) in boxes [128, BK]
    w_desc,  # (nnzb * BH, BW) in boxes [OUT, BK], or [BK, OUT] if TRANS
    start_ptr,  # (R + 1,) int32: crow, or ccol
    index_ptr,  # (nnzb,) int32: col, or row
    perm_ptr,  # (nnzb,) int32: slot in w; read only if TRANS
    order_ptr,  # (R,) int32: block rows, longest first
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_desc,  # (M, N) in boxes [128, OUT]
    T,  # token tiles
    N,
    R,  # block rows of the output
    group,  # token tiles walked together
    back,  # 1: every second round goes backwards
    sb,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    RELU: gl.constexpr,
):
    W_ROWS: gl.constexpr = BK if TRANS else OUT
    W_COLUMNS: gl.constexpr = OUT if TRANS else BK
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, 128, BK], x_desc.layout)
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES, W_ROWS, W_COLUMNS], w_desc.layout)
    y = gl.allocate_shared_memory(y_desc.dtype, [2, 128, OUT], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    held = (x, w, y, full, empty)
    given = (x_desc, w_desc, y_desc, start_ptr, index_ptr, perm_ptr, order_ptr, bias_ptr, N, sb)
    deal = (T, R, group, back)
    shape: gl.constexpr = (IN, OUT, BK, STAGES, TRANS)
    gl.warp_specialize(
        [
            (_consume, (held, given, deal, shape, 0, HAS_BIAS, RELU)),
            (_consume, (held, given, deal, shape, 1, HAS_BIAS, RELU)),
            (_produce, (held, given, deal, shape)),
        ],
        [4, 1],
        [240, 24],  # of 168 that each of 384 threads starts with; the first consumer keeps 240
    )


def launch_persistent(
    kernel: Any, tensors: tuple[torch.Tensor, ...], options: dict[str, Any], stages: int, sb: int
) -> None:
    """Launch `_bsr_spmm_persistent_kernel`, or what stands for it.

    Args:
        kernel: the kernel, as `plans.Plan.start` returns it.
        tensors: x (M, K), values (nnzb, BH, BW), start, index, perm, order, bias, y (M, N); x,
            values and y as TMA takes them, K a multiple of the block's edge along the sum.
        options: IN, OUT, TRANS, HAS_BIAS and RELU.
        stages: of the ring, at most.
        sb: stride of the bias.
    """
    x, values, start, *others, y = tensors
    reduce, out = options["IN"], options["OUT"]
    BK, w = min(reduce, STEP), values.view(-1, values.shape[2])
    R, T = start.numel() - 1, triton.cdiv(x.shape[0], TOKENS)
    programs = min(_programs(x.device), R * T)
    columns, tile_bytes = x.shape[1] // reduce, TOKENS * x.shape[1] * x.element_size()
    how = deal(R, columns, len(values), T, programs, tile_bytes)
    kernel[(programs,)](
        _described(x, 128, BK),
        _described(w, *((BK, out) if options["TRANS"] else (out, BK))),
        start,
        *others,
        _described(y, 128, out),
        T,
        y.shape[1],
        R,
        how.group,
        int(how.back),
        sb,
        BK=BK,
        STAGES=max(LEAST_STAGES, min(stages, persistent_stages(reduce, out))),
        **options,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _described(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns], shared_layout(columns))
