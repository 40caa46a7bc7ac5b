"""Block-sparse times dense on Hopper with the activations held in shared memory.

Shapes: x (M, K), w (N, K) held as values (nnzb, BH, BW) at the active blocks, y (M, N), and with
the same kernel dx = dy w. It computes what `bsr_spmm` does, which calls it where a launch table
asks for it (`spmm_resident/half/32/any/tma`). No shipped table does: it has been compiled and
emulated but never run on a GPU.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = 2: s * M * K * (programs that share a token tile) for x, which `bsr_spmm` reads
again for every block, s * ceil(M / 64) * nnzb * BH * BW for w, s * M * N out. Bytes from shared
memory, which bound it: s * ceil(M / 64) * nnzb * (64 * IN + IN * OUT); IN and OUT are the block's
edges along the sum and along the output. Blocks of 16 x 16 are bound by instructions instead: about
40 issue slots a block, more through `perm`, where shared memory needs 20 cycles.

One program holds 64 tokens of x as K / IN slices [64, IN]; `wgmma` reads both operands from shared
memory, the slice chosen by the block's column at run time. Four walkers, a warpgroup each, take a
run of block rows apiece, so that one's waits hide behind another's products. A walker's blocks are
one run in CSR order (CSC through `perm` for dx), cut into chunks of G that stream through its own
ring of STAGES chunks; every row is summed in that order, by one walker.

Synchronisation. Walkers share only x: it's written before they start and each waits for its
barrier. Within a walker chunk n uses slot n % STAGES, whose barrier has one arrival (thread 0, with
the bytes expected) and completes phase n // STAGES. All threads wait for that phase before any
product of the chunk. After the first product of chunk n, `wait(1)` leaves only that product in
flight, so this warp's reads of chunk n - 1 are over; the thread barrier says so of all four warps;
only then is its slot given to chunk n - 1 + STAGES. No thread can lag two phases, as all passed
phase k before that thread barrier and hence before phase k + 1 was armed. Copies and products are
both of the async proxy, and no thread writes either buffer itself; barriers are initialised by
ordinary stores, hence the one proxy fence. A chunk is fetched only if it has a block, and every
such chunk is waited for, so no copy outlives its program.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

from typing import NamedTuple

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

from .launch import arch_class

__all__ = [
    "TOKENS",
    "WALKERS",
    "ResidentConfig",
    "bsr_spmm_resident",
    "bsr_spmm_t_resident",
    "resident_config",
    "resident_fits",
    "shared_layout",
]

# names of Triton 3.9, or 3.6
_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or (
    gl.shared_memory_descriptor._reinterpret
)

TOKENS = 64
WALKERS = 4
EDGES = (16, 32, 64)

_SHARED_LIMIT = 227 * 1024
_SHARED_EXTRA = 1024  # barriers, and what the walkers are handed
_CHUNK_BYTES = 4096  # small blocks are copied several at a time
RING_KB = 64  # of all walkers: covers the latency of L2 twice
_PROGRAMS = 132  # one to a multiprocessor
_LOAD = 0.1  # fetching a tile of x, as a part of a whole tile's time; modelled, not measured


class ResidentConfig(NamedTuple):
    """Ring of each walker: STAGES chunks of G blocks."""

    G: int
    STAGES: int


def resident_config(
    block: tuple[int, int], K: int, ring_kb: int = RING_KB
) -> ResidentConfig | None:
    """The deepest ring, up to `ring_kb`, that fits beside 64 tokens of K; None if none does."""
    size = block[0] * block[1] * 2
    G = max(1, _CHUNK_BYTES // size)
    room = min(ring_kb * 1024, _SHARED_LIMIT - _SHARED_EXTRA - TOKENS * K * 2)
    stages = room // (WALKERS * G * size)
    return None if stages < 2 else ResidentConfig(G, 1 << (stages.bit_length() - 1))


def resident_fits(
    arch: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    K: int,
    trans: bool,
    ring_kb: int = RING_KB,
) -> bool:
    """Whether these kernels can compute `x wᵀ` (or `dy w` if `trans`).

    Args:
        arch: architecture class, as `launch.arch_class` gives it.
        dtype: of x (or dy) and values.
        block: (BH, BW).
        K: columns of x (or of dy).
        trans: whether the sum runs along the block's rows.
        ring_kb: shared memory for weights, in KiB.

    Returns:
        True for fp16 and bf16 on sm90, edges of 16, 32 and 64 (BH of 8 too, forward), K a multiple
        of the edge along the sum and small enough to be held.
    """
    reduce, out = block if trans else reversed(block)
    return (
        arch == "sm90"
        and dtype in (torch.float16, torch.bfloat16)
        and reduce in EDGES
        and (out in EDGES or (out == 8 and not trans))
        and K > 0
        and K % reduce == 0
        and resident_config(block, K, ring_kb) is not None
    )


def shared_layout(columns: int) -> gl.NVMMASharedLayout:
    """Rows of `columns` 16-bit numbers, swizzled over their whole width as TMA and wgmma do."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)


@gluon.jit
def _fetch(
    n,  # chunk of this walker
    first,  # its first block
    last,  # one past its last
    w_desc,
    perm_ptr,
    ring,
    full,
    WALKER: gl.constexpr,
    BH: gl.constexpr,
    BW: gl.constexpr,
    G: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
):
    slot = WALKER * STAGES + (n & (STAGES - 1))
    ready = full.index(slot)
    t = first + n * G
    live = t < last
    # a box is counted whole, zero-filled past the end of values
    mbarrier.expect(ready, G * BH * BW * 2, live)
    if TRANS:
        # all loads before the first copy; past the end the last block again, so the bytes add up
        slots = ()
        for g in gl.static_range(G):
            p = gl.load(perm_ptr + gl.minimum(t + g, last - 1), mask=live, other=0)
            slots = slots + (p,)  # noqa: RUF005  all that the compiler knows of tuples
        for g in gl.static_range(G):
            _copy(w_desc, [slots[g] * BH, 0], ready, ring.index(slot * G + g), live)
    else:
        # G blocks [BH, BW] are one box [G * BH, BW]: in memory and, swizzled by rows of 8, here
        boxes = _view(ring, w_desc.dtype, [ring.shape[0] // G, G * BH, BW], w_desc.layout)
        _copy(w_desc, [t * BH, 0], ready, boxes.index(slot), live)


@gluon.jit
def _walk(
    held,  # x [K / IN, 64, IN], its barrier, ring [4 * STAGES * G, BH, BW], its barriers
    given,  # arguments of the kernel
    r0,  # first block row
    r1,  # one past the last
    WALKER: gl.constexpr,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    G: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OUT, 16])
    BH: gl.constexpr = IN if TRANS else OUT
    BW: gl.constexpr = OUT if TRANS else IN
    x, x_ready, ring, full = held
    w_desc, start_ptr, index_ptr, perm_ptr, bias_ptr, y_ptr, M, N, sb = given
    if r0 < r1:
        m = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA))
        o = gl.arange(0, OUT, gl.SliceLayout(0, MMA))
        y_row = y_ptr + m.to(gl.int64)[:, None] * N
        lo = gl.load(start_ptr + r0)
        hi = gl.load(start_ptr + r0 + 1)
        first = lo
        last = gl.load(start_ptr + r1)
        for ahead in gl.static_range(STAGES - 1):
            _fetch(
                ahead, first, last, w_desc, perm_ptr, ring, full, WALKER, BH, BW, G, STAGES, TRANS
            )
        c = gl.load(index_ptr + first, mask=first < last, other=0)
        mbarrier.wait(x_ready, 0)
        for r in range(r0, r1):
            after = gl.load(start_ptr + gl.minimum(r + 2, r1))
            acc = gl.zeros([64, OUT], gl.float32, MMA)
            for t in range(lo, hi):
                i = t - first
                n = i // G
                if i & (G - 1) == 0:
                    slot = WALKER * STAGES + (n & (STAGES - 1))
                    mbarrier.wait(full.index(slot), (n // STAGES) & 1)
                w = ring.index(WALKER * STAGES * G + (i & (STAGES * G - 1)))
                w_in = w if TRANS else w.permute((1, 0))
                acc = warpgroup_mma(x.index(c), w_in, acc, is_async=True)
                # next block's index now, so that its product never waits for it
                c = gl.load(index_ptr + t + 1, mask=t + 1 < last, other=0)
                acc = warpgroup_mma_wait(1, deps=[acc])
                if i & (G - 1) == 0:
                    _barrier()
                    _fetch(
                        n + (STAGES - 1),
                        first,
                        last,
                        w_desc,
                        perm_ptr,
                        ring,
                        full,
                        WALKER,
                        BH,
                        BW,
                        G,
                        STAGES,
                        TRANS,
                    )
            acc = warpgroup_mma_wait(0, deps=[acc])
            row = r * OUT + o
            if HAS_BIAS:
                b = gl.load(bias_ptr + row * sb, mask=row < N, other=0.0)
                acc += b.to(gl.float32)[None, :]
            keep = (m < M)[:, None] & (row < N)[None, :]
            gl.store(y_row + row[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)
            lo = hi
            hi = after


@gluon.jit
def _bsr_spmm_resident_kernel(
    x_desc,  # (M, K) in boxes [64, IN]
    w_desc,  # (nnzb * BH, BW) in boxes [G * BH, BW], or [BH, BW] if TRANS
    start_ptr,  # (R + 1,) int32: crow, or ccol
    index_ptr,  # (nnzb,) int32: col, or row
    perm_ptr,  # (nnzb,) int32: slot in w; read only if TRANS
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    M,
    N,
    R,  # block rows of the output
    rows,  # block rows a walker
    sb,
    SLICES: gl.constexpr,
    IN: gl.constexpr,
    OUT: gl.constexpr,
    G: gl.constexpr,
    STAGES: gl.constexpr,
    TRANS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    BH: gl.constexpr = IN if TRANS else OUT
    BW: gl.constexpr = OUT if TRANS else IN
    x = gl.allocate_shared_memory(x_desc.dtype, [SLICES, 64, IN], x_desc.layout)
    ring = gl.allocate_shared_memory(w_desc.dtype, [4 * STAGES * G, BH, BW], w_desc.layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(x_ready, count=1)
    for slot in gl.static_range(4 * STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    mbarrier.expect(x_ready, SLICES * 64 * IN * 2)
    for k in range(SLICES):
        _copy(x_desc, [gl.program_id(0) * 64, k * IN], x_ready, x.index(k))
    r0 = gl.program_id(1) * rows * 4
    r1 = gl.minimum(r0 + rows, R)
    r2 = gl.minimum(r0 + rows * 2, R)
    r3 = gl.minimum(r0 + rows * 3, R)
    r4 = gl.minimum(r0 + rows * 4, R)
    held = (x, x_ready, ring, full)
    given = (w_desc, start_ptr, index_ptr, perm_ptr, bias_ptr, y_ptr, M, N, sb)
    gl.warp_specialize(
        [
            (_walk, (held, given, r0, r1, 0, IN, OUT, G, STAGES, TRANS, HAS_BIAS)),
            (_walk, (held, given, r1, r2, 1, IN, OUT, G, STAGES, TRANS, HAS_BIAS)),
            (_walk, (held, given, r2, r3, 2, IN, OUT, G, STAGES, TRANS, HAS_BIAS)),
            (_walk, (held, given, r3, r4, 3, IN, OUT, G, STAGES, TRANS, HAS_BIAS)),
        ],
        [4, 4, 4],
        [128, 128, 128],  # all that 512 threads can have: nothing is moved between warpgroups
    )


def bsr_spmm_resident(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
    *,
    ring_kb: int = RING_KB,
) -> torch.Tensor:
    """`y = x wᵀ (+ bias)`.

    Args:
        x: (M, K), any strides; fp16 or bf16.
        values: (nnzb, BH, BW), x's dtype, in CSR order.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        bias: (n_out,) or None.
        n_out: N, the rows of w.
        ring_kb: shared memory for weights, in KiB.

    Returns:
        (M, N), contiguous, x's dtype.

    Raises:
        ValueError: `resident_fits` says no.
    """
    return _launch(x, values, crow, col, None, bias, n_out, ring_kb)


def bsr_spmm_t_resident(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    n_out: int,
    *,
    ring_kb: int = RING_KB,
) -> torch.Tensor:
    """`dx = dy w`, the values read in place through `perm`.

    Args:
        dy: (M, N), any strides; fp16 or bf16.
        values: (nnzb, BH, BW), dy's dtype, in CSR order.
        ccol: (block columns + 1,) int32.
        row: (nnzb,) int32 block rows, in CSC order.
        perm: (nnzb,) int32 slots in values, in CSC order.
        n_out: K, the columns of w.
        ring_kb: shared memory for weights, in KiB.

    Returns:
        (M, K), contiguous, dy's dtype.

    Raises:
        ValueError: `resident_fits` says no.
    """
    return _launch(dy, values, ccol, row, perm, None, n_out, ring_kb)


def _parts(tiles: int, most: int) -> int:
    """Programs that share a token tile: those that fill whole waves at the least repeated loads."""
    return min(
        range(1, min(most, 16) + 1),
        key=lambda parts: -(-tiles * parts // _PROGRAMS) * (1 / parts + _LOAD),
    )


def _rows_of_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same matrix as TMA takes it; a copy unless it already is."""
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    index: torch.Tensor,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_out: int,
    ring_kb: int,
) -> torch.Tensor:
    (M, K), (nnzb, BH, BW), R = x.shape, values.shape, start.numel() - 1
    trans = perm is not None
    config = resident_config((BH, BW), K, ring_kb)
    arch = arch_class(x.device)
    if config is None or not resident_fits(arch, x.dtype, (BH, BW), K, trans, ring_kb):
        raise ValueError(f"not held in shared memory: {x.dtype}, blocks {(BH, BW)}, {K} columns")
    y = x.new_zeros(M, n_out) if nnzb == 0 else x.new_empty(M, n_out)
    if y.numel() == 0 or nnzb == 0:  # TMA takes no empty matrix
        return y if bias is None else y + bias
    reduce, out = (BH, BW) if trans else (BW, BH)
    x = _rows_of_16_bytes(x)
    w = _rows_of_16_bytes(values.reshape(nnzb * BH, BW))
    tiles = triton.cdiv(M, TOKENS)
    rows = triton.cdiv(R, WALKERS * _parts(tiles, triton.cdiv(R, WALKERS)))
    box = [BH if trans else config.G * BH, BW]
    with torch.cuda.device_of(x):
        _bsr_spmm_resident_kernel[(tiles, triton.cdiv(R, rows * WALKERS))](
            TensorDescriptor(x, [M, K], list(x.stride()), [TOKENS, reduce], shared_layout(reduce)),
            TensorDescriptor(w, [nnzb * BH, BW], [BW, 1], box, shared_layout(BW)),
            start,
            index,
            index if perm is None else perm,
            x if bias is None else bias,
            y,
            M,
            n_out,
            R,
            rows,
            0 if bias is None else bias.stride(0),
            SLICES=K // reduce,
            IN=reduce,
            OUT=out,
            G=config.G,
            STAGES=config.STAGES,
            TRANS=trans,
            HAS_BIAS=bias is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return y
