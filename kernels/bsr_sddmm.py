"""Dense times dense, sampled at the active blocks: `dw = dyᵀ x`.

Shapes: dy (M, N), x (M, K), dw (nnzb, BH, BW) in CSR order. Called by `sparsekern.ops` for the
weight gradient.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = element size: s * M * nnzb * (BW + BH / G), G blocks of a block row sharing one
tile of dy. Bytes from HBM, at least: s * (M * (N + K) + nnzb * BH * BW); when the sum over tokens
is cut into S > 1 parts, 8 * S * nnzb * BH * BW more; what has no rows of whole 16-byte loads is
copied first, twice its bytes.

One program makes up to G neighbouring blocks of one block row. Programs count the groups of all
block rows and take theirs; a bound on their number is known without asking the device, and those
beyond the last group end. Blocks that a group lacks are not loaded. The launcher chooses S by the
number of blocks, never by where they lie; parts are summed in order by a second pass (`parts`): no
atomics.

Two kernels: `_bsr_sddmm_kernel` gathers the columns of its blocks through pointers into one tile;
`_bsr_sddmm_tma_kernel` loads a tile for each block through tensor descriptors, and keeps as many
accumulators.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# mypy: disable-error-code="assignment, var-annotated"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import plans
from .groups import clear, group_of_program, store_sums
from .launch import (
    aligned_rows,
    arch_class,
    compute_kind,
    empty,
    has_aligned_rows,
    in_dtype,
    input_precision,
    is_interpreted,
    load_unit,
    most_groups,
    output_dtype,
    parts_of_sum,
    tma_fits,
    usual_groups,
)
from .parts import add_parts
from .tables import find

__all__ = ["bsr_sddmm"]

_TMA_EDGE = 64  # rows and columns of a block from which on descriptors and wgmma fit
_NO_COLUMN = tl.constexpr(1 << 22)  # times the widest block: beyond every matrix, within int32


# a new number of tokens must not mean a new compilation, nor new sizes: UNIT divides the strides
@triton.jit(do_not_specialize=["M", "N", "K", "R", "span", "sym", "sxm"])
def _bsr_sddmm_kernel(
    dy_ptr,  # (M, N), strides UNIT * sym, 1; zeros from N up to the next multiple of UNIT
    x_ptr,  # (M, K), strides UNIT * sxm, 1; zeros from K up to the next multiple of UNIT
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,
    N,
    K,
    R,  # block rows
    span,  # tokens of one part
    part,  # nnzb * BH * BW
    sym,
    sxm,
    UNIT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, lo, hi = group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        lane = tl.arange(0, G * BW)
        t = lo + lane // BW  # [G * BW] slot of each column of the gathered x
        j = lane % BW
        c = tl.load(col_ptr + t, mask=t < hi, other=0)
        k = tl.max_contiguous(tl.multiple_of(c.to(tl.int64) * BW + j, BW), BW)
        k_in = (k < tl.cdiv(K, UNIT) * UNIT) & (t < hi)
        i = tl.arange(0, BH)
        n = r.to(tl.int64) * BH + i
        n_in = n < tl.cdiv(N, UNIT) * UNIT
        first = tl.program_id(1) * span
        left = min(first + span, M) - first
        m = tl.arange(0, BM)
        dy_step = sym.to(tl.int64) * (UNIT * BM)
        x_step = sxm.to(tl.int64) * (UNIT * BM)
        row = (first + m).to(tl.int64)[:, None] * UNIT
        dy_at = dy_ptr + row * sym + n[None, :]
        x_at = x_ptr + row * sxm + k[None, :]
        acc = tl.zeros([G * BW, BH], dtype=tl.float32)
        for m0 in range(0, left, BM):
            live = (m < left - m0)[:, None]
            dy = tl.load(dy_at, mask=live & n_in[None, :], other=0.0)
            x = tl.load(x_at, mask=live & k_in[None, :], other=0.0)
            dy_at += dy_step
            x_at += x_step
            if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        slot = tl.program_id(1).to(tl.int64) * part + t.to(tl.int64) * (BH * BW)
        dw = dw_ptr + (slot + j)[:, None] + (i * BW)[None, :]
        mine = (t < hi)[:, None]
        store_sums(dw, acc, mine, ADD)
        if (K % BW != 0) | ((r + 1) * BH > N):
            tl.debug_barrier()  # threads clear what others have stored
            clear(dw, mine & ((k >= K)[:, None] | (n >= N)[None, :]))


@triton.jit
def _sum_blocks(
    dy_desc,
    x_desc,
    col_ptr,
    dw_ptr,
    r,
    lo,
    hi,
    first,
    last,
    N,
    K,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Up to G blocks of block row r from slot lo on, over tokens [first, last)."""
    col = ()
    accs = ()
    for g in tl.static_range(G):
        # a tile beyond the last column is zeros and costs no traffic
        c = tl.load(col_ptr + lo + g, mask=lo + g < hi, other=_NO_COLUMN)
        col = col + (c,)  # noqa: RUF005
        accs = accs + (tl.zeros([BH, BW], dtype=tl.float32),)  # noqa: RUF005
    for m0 in range(first, last, BM):
        dy = dy_desc.load([m0, r * BH])
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            dy = dy.to(tl.float32)
        sums = ()
        for g in tl.static_range(G):
            x = x_desc.load([m0, col[g] * BW])
            if INTERPRET:
                x = x.to(tl.float32)
            sums = sums + (tl.dot(dy.T, x, accs[g], input_precision=PRECISION),)  # noqa: RUF005
        accs = sums
    i = tl.arange(0, BH)[:, None]
    j = tl.arange(0, BW)[None, :]
    dw = dw_ptr + lo.to(tl.int64) * (BH * BW) + i * BW + j
    for g in tl.static_range(G):
        if lo + g < hi:
            store_sums(dw + g * (BH * BW), accs[g], i * 0 + g < hi - lo, ADD)
    if (K % BW != 0) | ((r + 1) * BH > N):
        tl.debug_barrier()  # threads clear what others have stored
        for t in range(lo, hi):
            padding = (i >= N - r * BH) | (j >= K - tl.load(col_ptr + t) * BW)
            clear(dw + (t - lo) * (BH * BW), padding)


@triton.jit(do_not_specialize=["M", "N", "K", "R", "span"])
def _bsr_sddmm_tma_kernel(
    dy_desc,  # (M, N) in tiles of (BM, BH)
    x_desc,  # (M, K) in tiles of (BM, BW)
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,
    N,
    K,
    R,  # block rows
    span,  # tokens of one part, a multiple of BM
    part,  # nnzb * BH * BW
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, lo, hi = group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        first = tl.program_id(1) * span
        last = min(first + span, M)
        dw_part = dw_ptr + tl.program_id(1).to(tl.int64) * part
        if G > 1 and hi - lo <= G // 2:
            _sum_blocks(
                dy_desc, x_desc, col_ptr, dw_part, r, lo, hi, first, last, N, K,
                BH, BW, BM, G // 2, ADD, PRECISION, INTERPRET,
            )  # fmt: skip
        else:
            _sum_blocks(
                dy_desc, x_desc, col_ptr, dw_part, r, lo, hi, first, last, N, K,
                BH, BW, BM, G, ADD, PRECISION, INTERPRET,
            )  # fmt: skip


class _Cut(NamedTuple):
    """How a product is cut: the grid, and the options of both kernels."""

    programs: int
    parts: int
    span: int
    tma: bool
    options: dict[str, Any]


def bsr_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dw = (dyᵀ x)` at the active blocks.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16. Read as it lies if its rows are whole 16-byte
            loads, else copied into such rows.
        x: (M, K), dy's dtype, read likewise.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        block: (BH, BW).
        out: (nnzb, BH, BW), contiguous, any float dtype: dw is added to it in place, without a
            tensor of its own unless the sum over tokens is cut into parts.

    Returns:
        (nnzb, BH, BW), contiguous, x's dtype; rows and columns outside (N, K) are exact zeros.
        `out` if it is given.
    """
    plan = plans.find(_bsr_sddmm_kernel, x, _key(dy, x, crow, col, block))
    cut: _Cut = plan.decide(_cut, dy, x, crow, col, block)
    # sums are added in fp32, where a kernel may store the dtype of `out`
    storable = output_dtype(x.dtype if out is None else out.dtype, _bsr_sddmm_kernel)
    held = out if out is not None and out.dtype in (storable, torch.float32) else None
    dtype = storable if out is None else torch.float32
    dw = empty(x, col.numel(), *block, dtype=dtype) if held is None else held
    if dw.numel() > 0:
        _make(plan, cut, (dy, x, crow, col, dw), ADD=held is not None)
    if out is None:
        return in_dtype(dw, x.dtype)
    return out.add_(dw) if held is None else out


def _make(plan: plans.Plan, cut: _Cut, tensors: tuple[torch.Tensor, ...], *, ADD: bool) -> None:
    """Make or add to dw, the last of the tensors."""
    if cut.parts == 1:
        _launch(plan, cut, tensors, ADD=ADD)
        return
    *operands, dw = tensors
    sums = empty(dw, cut.parts, *dw.shape, dtype=torch.float32)
    _launch(plan, cut, (*operands, sums), ADD=False)
    add_parts(plan, sums, dw, ADD=ADD)


def _key(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
) -> tuple[Any, ...]:
    """All that a product's launch depends on, its result's type apart."""
    return (
        "bsr_sddmm",
        dy.shape,
        dy.stride(),
        dy.dtype,
        x.shape,
        x.stride(),
        x.dtype,
        crow.numel(),
        col.numel(),
        block,
        input_precision(x.dtype),
        dy.data_ptr() % 16 == 0,
        x.data_ptr() % 16 == 0,
    )


def _cut(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
) -> _Cut:
    M, (bh, bw) = len(x), block
    tile, tma = find(
        arch_class(x.device),
        "sddmm",
        compute_kind(x.dtype),
        max(block),
        "any",
        tma=min(block) >= _TMA_EDGE and M > 0 and all(map(_tma_fits, (dy, x))),
    )
    G = max(1, tile.LANES // bw)
    nnzb, R = col.numel(), crow.numel() - 1
    loads = (bh + G * bw) * tile.BM * x.element_size()
    steps = triton.cdiv(M, tile.BM)
    parts = parts_of_sum(x.device, usual_groups(nnzb, R, G), steps, loads, nnzb * bh * bw)
    options = {
        "BH": bh,
        "BW": bw,
        "BM": tile.BM,
        "G": G,
        "PRECISION": input_precision(x.dtype),
        "INTERPRET": is_interpreted(_bsr_sddmm_kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    span = triton.cdiv(steps, parts) * tile.BM
    return _Cut(most_groups(nnzb, R, G), parts, span, tma, options)


def _tma_fits(a: torch.Tensor) -> bool:
    # what has no aligned rows is copied into such
    return tma_fits(a) if has_aligned_rows(a) else max(a.shape) < 2**31


def _launch(plan: plans.Plan, cut: _Cut, tensors: tuple[torch.Tensor, ...], *, ADD: bool) -> None:
    dy, x, crow, col, dw = tensors
    (M, N), K = dy.shape, x.shape[1]
    tensors = aligned_rows(dy), aligned_rows(x), crow, col, dw
    kernel = _bsr_sddmm_tma_kernel if cut.tma else _bsr_sddmm_kernel
    kernel = plan.start(kernel, tensors, (dw.dtype, ADD))
    if kernel is None:
        return
    sizes = M, N, K, crow.numel() - 1, cut.span, col.numel() * cut.options["BH"] * cut.options["BW"]
    with torch.cuda.device_of(x):
        (_launch_tma if cut.tma else _launch_pointer)(kernel, tensors, sizes, cut, ADD=ADD)


def _launch_pointer(
    pointer_kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
    cut: _Cut,
    *,
    ADD: bool,
) -> None:
    unit = load_unit(tensors[0].dtype)
    strides = (a.stride(0) // unit for a in tensors[:2])
    pointer_kernel[cut.programs, cut.parts](
        *tensors, *sizes, *strides, UNIT=unit, ADD=ADD, **cut.options
    )


def _launch_tma(
    tma_kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
    cut: _Cut,
    *,
    ADD: bool,
) -> None:
    dy, x, *rest = tensors
    BM, BH, BW = (cut.options[name] for name in ("BM", "BH", "BW"))
    tma_kernel[cut.programs, cut.parts](
        TensorDescriptor.from_tensor(dy, [BM, BH]),
        TensorDescriptor.from_tensor(x, [BM, BW]),
        *rest,
        *sizes,
        ADD=ADD,
        **cut.options,
    )
