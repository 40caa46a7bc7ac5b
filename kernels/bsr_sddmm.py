"""Dense times dense, sampled at the active blocks: `dw = dyᵀ x`.

Shapes: dy (M, N), x (M, K), dw (nnzb, BH, BW) in CSR order. Called by `sparsekern.ops` for the
weight gradient.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = element size: s * M * nnzb * (BW + BH / G), G blocks of a block row sharing one
tile of dy. Bytes from HBM, at least: s * (M * (N + K) + nnzb * BH * BW); when the sum over tokens
is cut into S > 1 parts, 8 * S * nnzb * BH * BW more.

One program makes up to G neighbouring blocks of one block row. Block row r owns the programs from
crow[r] // G + r on, at least as many as it needs; the bound nnzb // G + R on all of them is known
without asking the device, and a program that finds nothing left in its row ends. Parts are summed
in order by a second pass: no atomics.

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
from .launch import (
    arch_class,
    compute_kind,
    empty,
    in_dtype,
    input_precision,
    is_interpreted,
    output_dtype,
    splits,
    tma_fits,
)
from .tables import find

__all__ = ["bsr_sddmm"]

_TMA_EDGE = 64  # rows and columns of a block from which on descriptors and wgmma fit


@triton.jit
def _group_of_program(crow_ptr, pid, R, G: tl.constexpr):
    """Row of program `pid`, and the slots [lo, hi) that are left in that row from its group on."""
    left = pid * 0
    right = left + R - 1
    while left < right:
        middle = (left + right + 1) // 2
        fits = tl.load(crow_ptr + middle) // G + middle <= pid
        left = tl.where(fits, middle, left)
        right = tl.where(fits, right, middle - 1)
    begin = tl.load(crow_ptr + left)
    lo = begin + (pid - begin // G - left) * G
    return left, lo, tl.load(crow_ptr + left + 1)


# a new number of tokens must not mean a new compilation
@triton.jit(do_not_specialize=["M", "R", "span"])
def _bsr_sddmm_kernel(
    dy_ptr,  # (M, N), strides sym, syn
    x_ptr,  # (M, K), strides sxm, sxk
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
    syn,
    sxm,
    sxk,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, lo, hi = _group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        lane = tl.arange(0, G * BW)
        t = lo + lane // BW  # [G * BW] slot of each column of the gathered x
        j = lane % BW
        c = tl.load(col_ptr + t, mask=t < hi, other=0)
        k = tl.max_contiguous(tl.multiple_of(c.to(tl.int64) * BW + j, BW), BW)
        k_in = (k < K) & (t < hi)
        i = tl.arange(0, BH)
        n = r.to(tl.int64) * BH + i
        first = tl.program_id(1) * span
        acc = tl.zeros([G * BW, BH], dtype=tl.float32)
        for m0 in range(first, min(first + span, M), BM):
            m = m0 + tl.arange(0, BM).to(tl.int64)
            dy = tl.load(
                dy_ptr + m[:, None] * sym + n[None, :] * syn,
                mask=(m < M)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + m[:, None] * sxm + k[None, :] * sxk,
                mask=(m < M)[:, None] & k_in[None, :],
                other=0.0,
            )
            if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        # padding is zero by decree: masked zeros times an infinity would not be
        acc = tl.where(k_in[:, None] & (n < N)[None, :], acc, 0.0)
        slot = tl.program_id(1).to(tl.int64) * part + t.to(tl.int64) * (BH * BW)
        dw = dw_ptr + (slot + j)[:, None] + (i * BW)[None, :]
        if ADD:
            acc += tl.load(dw, mask=(t < hi)[:, None], other=0.0).to(tl.float32)
        tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=(t < hi)[:, None])


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
        col = col + (tl.load(col_ptr + lo + g, mask=lo + g < hi, other=0),)  # noqa: RUF005
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
    for g in tl.static_range(G):
        if lo + g < hi:
            dw = dw_ptr + (lo + g).to(tl.int64) * (BH * BW) + i * BW + j
            acc = accs[g]
            if ADD:
                acc += tl.load(dw).to(tl.float32)
            tl.store(dw, acc.to(dw_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "R", "span"])
def _bsr_sddmm_tma_kernel(
    dy_desc,  # (M, N) in tiles of (BM, BH)
    x_desc,  # (M, K) in tiles of (BM, BW)
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,
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
    r, lo, hi = _group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        first = tl.program_id(1) * span
        last = min(first + span, M)
        dw_part = dw_ptr + tl.program_id(1).to(tl.int64) * part
        # the last group of a row is often half empty: then half the tiles need no loading
        if G > 1 and hi - lo <= G // 2:
            _sum_blocks(
                dy_desc, x_desc, col_ptr, dw_part, r, lo, hi, first, last,
                BH, BW, BM, G // 2, ADD, PRECISION, INTERPRET,
            )  # fmt: skip
        else:
            _sum_blocks(
                dy_desc, x_desc, col_ptr, dw_part, r, lo, hi, first, last,
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
        dy: (M, N), any strides; fp32, fp16 or bf16.
        x: (M, K), any strides; dy's dtype.
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
    # only a finished sum can be added to, in fp32, where the kernel may store the dtype of `out`
    added = (
        out is not None
        and cut.parts == 1
        and out.dtype != torch.float64
        and out.dtype == output_dtype(out.dtype, _bsr_sddmm_kernel)
    )
    if out is not None and added:
        dw = out
    else:
        whole = out is None and cut.parts == 1
        dtype = output_dtype(x.dtype, _bsr_sddmm_kernel) if whole else torch.float32
        parts = () if cut.parts == 1 else (cut.parts,)
        dw = empty(x, *parts, col.numel(), *block, dtype=dtype)
    if dw.numel() > 0:
        tensors, variant = (dy, x, crow, col, dw), (dw.dtype, added)
        kernel = plan.start(
            _bsr_sddmm_tma_kernel if cut.tma else _bsr_sddmm_kernel, tensors, variant
        )
        if kernel is not None:
            with torch.cuda.device_of(x):
                (_launch_tma if cut.tma else _launch_pointer)(kernel, tensors, cut, ADD=added)
    if out is not None and added:
        return out
    total = dw if cut.parts == 1 else dw.sum(0)
    return in_dtype(total, x.dtype) if out is None else out.add_(total)


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
        (dy.data_ptr() | x.data_ptr()) % 16 == 0,
    )


def _cut(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
) -> _Cut:
    (M, N), K, (bh, bw) = dy.shape, x.shape[1], block
    arch = arch_class(x.device)
    tile, tma = find(
        arch,
        "sddmm",
        compute_kind(x.dtype),
        max(block),
        "any",
        # beyond a ragged edge dw is zero by decree, which a descriptor's zeros times inf are not
        tma=min(block) >= _TMA_EDGE and N % bh == K % bw == 0 and tma_fits(dy, x),
    )
    G = max(1, tile.LANES // bw)
    programs = col.numel() // G + crow.numel() - 1
    parts = splits(arch, programs, triton.cdiv(M, tile.BM))
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
    span = triton.cdiv(triton.cdiv(M, parts), tile.BM) * tile.BM
    return _Cut(programs, parts, span, tma, options)


def _launch_pointer(
    pointer_kernel: Any, tensors: tuple[torch.Tensor, ...], cut: _Cut, *, ADD: bool
) -> None:
    dy, x, crow, col, _ = tensors
    BH, BW = cut.options["BH"], cut.options["BW"]
    pointer_kernel[cut.programs, cut.parts](
        *tensors,
        *dy.shape,
        x.shape[1],
        crow.numel() - 1,
        cut.span,
        col.numel() * BH * BW,
        *dy.stride(),
        *x.stride(),
        ADD=ADD,
        **cut.options,
    )


def _launch_tma(
    tma_kernel: Any, tensors: tuple[torch.Tensor, ...], cut: _Cut, *, ADD: bool
) -> None:
    dy, x, crow, col, dw = tensors
    BM, BH, BW = (cut.options[name] for name in ("BM", "BH", "BW"))
    tma_kernel[cut.programs, cut.parts](
        TensorDescriptor.from_tensor(dy, [BM, BH]),
        TensorDescriptor.from_tensor(x, [BM, BW]),
        crow,
        col,
        dw,
        len(dy),
        crow.numel() - 1,
        cut.span,
        col.numel() * BH * BW,
        ADD=ADD,
        **cut.options,
    )
