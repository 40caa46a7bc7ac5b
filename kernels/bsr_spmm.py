"""Block-sparse times dense: `y = x wᵀ (+ bias)` and, with the same kernels, `dx = dy w`.

Shapes: x (M, K), w (N, K) held as values (nnzb, BH, BW) at the active blocks, y (M, N). Called by
`sparsekern.ops` for forward and for the input gradient.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = element size: s * M * nnzb * IN for x, s * ceil(M / BM) * nnzb * BH * BW for w,
s * M * N out; IN is the block's edge along the sum (BW forward, BH transposed). Bytes from HBM, at
least: s * (M * K + M * N + nnzb * BH * BW).

One program makes one tile of BM tokens times one block row, walking that row's active blocks in
order, so the sum has one order and needs no atomics. Long rows go first, GROUP token tiles
together, so that programs in flight share x and w in L2 and end at about the same time. The next
iteration's index is loaded an iteration ahead: an index loaded where it is used would halve the
depth of the pipeline.

Two kernels: `_bsr_spmm_kernel` loads through pointers, any shape, blocks narrower than
BK gathered several to an iteration; `_bsr_spmm_tma_kernel` loads and stores tiles through tensor
descriptors and serves aligned operands on GPUs that have them. Two more run where a launch table
asks for them: `bsr_spmm_persistent`, whose programs stay, and `bsr_spmm_resident`, which holds
activations in shared memory.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import optional, plans
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
    output_dtype,
    rows_class,
    tma_fits,
    unit_of,
)
from .tables import SpmmConfig, find

__all__ = ["bsr_spmm", "bsr_spmm_t"]

# a descriptor's box narrower than this wastes the cache lines that it touches
_TMA_ROW_BYTES = 64


@triton.jit
def _tile_of_program(order_ptr, M, R, BM: tl.constexpr, GROUP: tl.constexpr):
    """Block row and first token of this program: ranks slow, the tokens of a group fast."""
    pid = tl.program_id(0)
    first = pid // (GROUP * R) * GROUP
    size = min(tl.cdiv(M, BM) - first, GROUP)
    within = pid % (GROUP * R)
    return tl.load(order_ptr + within // size), (first + within % size) * BM


@triton.jit
def _finish(acc, bias_ptr, n, N, sb, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    """Bias and activation on a (tokens, outputs) tile in fp32."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n * sb, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        # unlike a maximum, this keeps NaN
        acc = tl.where(acc < 0, 0.0, acc)
    return acc


# a new number of tokens must not mean a new compilation; of sizes and strides, units say what
# divides them, so that copies to shared memory are 16 bytes wide
@triton.jit(do_not_specialize=["M", "K", "N", "R", "sxm"])
def _bsr_spmm_kernel(
    x_ptr,  # (M, K), strides UNIT * sxm, 1; zeros from K up to the next multiple of UNIT
    w_ptr,  # (nnzb, IN, OUT) read through the strides that TRANS sets
    start_ptr,  # (R + 1,) int32: crow, or ccol
    index_ptr,  # (nnzb,) int32: col, or row
    perm_ptr,  # (nnzb,) int32: slot in w; read only if TRANS
    order_ptr,  # (R,) int32: block rows, longest first
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    M,
    K,
    N,
    R,  # block rows of the output
    sxm,
    sb,
    UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,  # divides K: UNIT or 1
    N_UNIT: tl.constexpr,  # divides N
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TRANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, m0 = _tile_of_program(order_ptr, M, R, BM, GROUP)
    m = m0.to(tl.int64) + tl.arange(0, BM)
    o = tl.arange(0, OUT)
    n = r.to(tl.int64) * OUT + o
    lane = tl.arange(0, BK)
    lo = tl.load(start_ptr + r)
    hi = tl.load(start_ptr + r + 1)
    x_row = x_ptr + m[:, None] * UNIT * sxm
    width = tl.cdiv(K, UNIT) * UNIT
    N = tl.cdiv(N, N_UNIT) * N_UNIT
    # w[slot][BH][BW]: the sum runs along BW forward, along BH transposed
    w_out = w_ptr + (o if TRANS else o * IN)[None, :]
    t = lo + lane // IN  # [BK] place of each lane's block in this row's list
    c = tl.load(index_ptr + t, mask=t < hi, other=0)
    s = tl.load(perm_ptr + t, mask=t < hi, other=0) if TRANS else t
    acc = tl.zeros([BM, OUT], dtype=tl.float32)
    for k in range(0, (hi - lo) * IN, BK):
        inner = (k + lane) % IN
        kk = c.to(tl.int64) * IN + inner
        kk = tl.max_contiguous(tl.multiple_of(kk, min(IN, BK)), min(IN, BK))
        keep = (kk < width) & (t < hi)
        x = tl.load(x_row + kk[None, :], mask=(m < M)[:, None] & keep[None, :], other=0.0)
        w_in = s.to(tl.int64) * (IN * OUT) + inner * (OUT if TRANS else 1)
        if not TRANS:
            w_in = tl.max_contiguous(tl.multiple_of(w_in, min(IN, BK)), min(IN, BK))
        if TRANS:
            keep = keep & (kk < K)
        w = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
        if K_UNIT == 1 and not TRANS:  # a mask that no unit divides would be one of single elements
            w = tl.where((kk < K)[:, None], w, 0.0)
        t = lo + (k + BK + lane) // IN
        c = tl.load(index_ptr + t, mask=t < hi, other=0)
        s = tl.load(perm_ptr + t, mask=t < hi, other=0) if TRANS else t
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    acc = _finish(acc, bias_ptr, n, N, sb, HAS_BIAS, RELU)
    y = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M", "R"])
def _bsr_spmm_tma_kernel(
    x_desc,  # (M, K) in tiles of (BM, BK)
    w_desc,  # (nnzb * BH, BW) in tiles of (OUT, BK), or (BK, OUT) if TRANS
    start_ptr,  # (R + 1,) int32: crow, or ccol
    index_ptr,  # (nnzb,) int32: col, or row
    perm_ptr,  # (nnzb,) int32: slot in w; read only if TRANS
    order_ptr,  # (R,) int32: block rows, longest first
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_desc,  # (M, N) in tiles of (BM, OUT)
    M,
    N,
    R,  # block rows of the output
    sb,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    TRANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, m0 = _tile_of_program(order_ptr, M, R, BM, GROUP)
    lo = tl.load(start_ptr + r)
    hi = tl.load(start_ptr + r + 1)
    CUTS: tl.constexpr = IN // BK  # iterations that a block takes
    acc = tl.zeros([OUT, BM] if SWAP else [BM, OUT], dtype=tl.float32)
    c = tl.load(index_ptr + lo, mask=lo < hi, other=0)
    s = tl.load(perm_ptr + lo, mask=lo < hi, other=0) if TRANS else lo
    for i in range((hi - lo) * CUTS):
        k = i % CUTS * BK
        x = x_desc.load([m0, c * IN + k])
        w = w_desc.load([s * IN + k, 0]) if TRANS else w_desc.load([s * OUT, k]).T
        t = lo + (i + 1) // CUTS
        c = tl.load(index_ptr + t, mask=t < hi, other=0)
        s = tl.load(perm_ptr + t, mask=t < hi, other=0) if TRANS else t
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if SWAP:
            acc = tl.dot(w.T, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SWAP:
        acc = acc.T
    n = r.to(tl.int64) * OUT + tl.arange(0, OUT)
    acc = _finish(acc, bias_ptr, n, N, sb, HAS_BIAS, RELU)
    y_desc.store([m0, r * OUT], acc.to(y_desc.dtype))


class _Side(NamedTuple):
    """The index arrays of the direction in which a product walks the weight."""

    start: torch.Tensor
    inner: torch.Tensor
    perm: torch.Tensor | None
    order: torch.Tensor


def bsr_spmm(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
    *,
    relu: bool = False,
) -> torch.Tensor:
    """`y = x wᵀ (+ bias)`.

    Args:
        x: (M, K), any strides; fp32, fp16 or bf16.
        values: (nnzb, BH, BW), x's dtype, in CSR order.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        order: (block rows,) int32, the order in which block rows are started.
        bias: (n_out,) or None.
        n_out: N, the rows of w.
        relu: return `max(y, 0)`.

    Returns:
        (M, N), contiguous, x's dtype.
    """
    return _launch(x, values, _Side(crow, col, None, order), bias, n_out, relu)


def bsr_spmm_t(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    order: torch.Tensor,
    n_out: int,
) -> torch.Tensor:
    """`dx = dy w`, the values read in place through `perm`.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        values: (nnzb, BH, BW), dy's dtype, in CSR order.
        ccol: (block columns + 1,) int32.
        row: (nnzb,) int32 block rows, in CSC order.
        perm: (nnzb,) int32 slots in values, in CSC order.
        order: (block columns,) int32, the order in which block columns are started.
        n_out: K, the columns of w.

    Returns:
        (M, K), contiguous, dy's dtype.
    """
    return _launch(dy, values, _Side(ccol, row, perm, order), None, n_out, False)


_Given = tuple[torch.Tensor, torch.Tensor, _Side, torch.Tensor | None, torch.Tensor, bool]


class _Cut(NamedTuple):
    """How a product is cut, and the options of its kernel."""

    grid: tuple[int]
    tile: SpmmConfig
    copied: bool  # x, into aligned rows
    tma: bool
    ring_kb: int | None  # shared memory for weights in the kernel that holds activations
    stages: int | None  # of the kernel whose programs stay
    options: dict[str, Any]


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    side: _Side,
    bias: torch.Tensor | None,
    n_out: int,
    relu: bool,
) -> torch.Tensor:
    y = empty(x, x.shape[0], n_out, dtype=output_dtype(x.dtype, _bsr_spmm_kernel))
    if y.numel() == 0:
        return in_dtype(y, x.dtype)
    values = values.contiguous()
    given = x, values, side, bias, y, relu
    plan = plans.find(_bsr_spmm_kernel, x, _key(given))
    cut: _Cut = plan.decide(_cut, given)
    if cut.ring_kb is not None:
        return optional.launch_held(x, values, side, bias, n_out, cut.ring_kb)
    start, inner, perm, order = side
    indices = start, inner, inner if perm is None else perm, order
    rows = aligned_rows(x) if cut.copied else x
    tensors = rows, values, *indices, rows if bias is None else bias, y
    kernel = plan.start(_kernel_of(cut), tensors)
    if kernel is not None:
        sb = 0 if bias is None else bias.stride(0)
        with torch.cuda.device_of(x):
            if cut.stages is not None:
                optional.launch_stages(kernel, tensors, cut.options, cut.stages, sb)
            elif cut.tma:
                _launch_tma(kernel, tensors, cut, sb)
            else:
                _launch_pointer(kernel, tensors, x.shape[1], cut, sb)
    return in_dtype(y, x.dtype)


def _key(given: _Given) -> tuple[Any, ...]:
    """All that a product's launch depends on."""
    x, values, side, bias, y, relu = given
    held = values.shape, values.dtype, y.shape, side.start.numel(), side.perm is None
    added = None if bias is None else (bias.stride(0), bias.dtype)
    # the others' alignment decides about descriptors, that of x about a copy
    aligned = x.data_ptr() % 16 == 0, (values.data_ptr() | y.data_ptr()) % 16 == 0
    how = added, relu, input_precision(x.dtype), aligned
    return "bsr_spmm", x.shape, x.stride(), x.dtype, *held, *how


def _cut(given: _Given) -> _Cut:
    x, values, side, bias, y, relu = given
    (nnzb, bh, bw), R = values.shape, side.start.numel() - 1
    copied = not has_aligned_rows(x)
    op, reduce, out = ("spmm", bw, bh) if side.perm is None else ("spmm_t", bh, bw)
    tile, tma = find(
        arch_class(x.device),
        op,
        compute_kind(x.dtype),
        out,
        rows_class(nnzb, R, reduce),
        # a ragged last block would need its padding masked, which descriptors cannot do for w
        tma=x.shape[1] % reduce == 0
        and reduce * x.element_size() >= _TMA_ROW_BYTES
        and tma_fits(values.view(-1, bw), y)
        and (copied or tma_fits(x)),
    )
    options = {
        "IN": reduce,
        "OUT": out,
        "BM": tile.BM,
        "BK": min(tile.BK, reduce) if tma else tile.BK,
        "GROUP": tile.GROUP,
        "TRANS": side.perm is not None,
        "HAS_BIAS": bias is not None,
        "RELU": relu,
        "PRECISION": input_precision(x.dtype),
        "INTERPRET": is_interpreted(_bsr_spmm_kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    trans, compiled = side.perm is not None, not is_interpreted(_bsr_spmm_kernel)
    ring_kb = optional.held_ring(x, values, trans, relu) if compiled else None
    stages = optional.stages(x, values, y, trans) if compiled else None
    return _Cut((triton.cdiv(len(x), tile.BM) * R,), tile, copied, tma, ring_kb, stages, options)


def _kernel_of(cut: _Cut) -> Any:
    if cut.stages is not None:
        return optional.persistent_kernel()
    return _bsr_spmm_tma_kernel if cut.tma else _bsr_spmm_kernel


def _launch_pointer(
    pointer_kernel: Any, tensors: tuple[torch.Tensor, ...], K: int, cut: _Cut, sb: int
) -> None:
    x, _, start, *_, y = tensors
    N, unit = y.shape[1], load_unit(x.dtype)
    sizes = {"M": x.shape[0], "K": K, "N": N, "R": start.numel() - 1}
    sizes |= {"sxm": x.stride(0) // unit, "sb": sb}
    units = {"UNIT": unit, "K_UNIT": unit_of(K, x.dtype), "N_UNIT": unit_of(N, x.dtype)}
    pointer_kernel[cut.grid](*tensors, **sizes, **units, **cut.options)


def _launch_tma(tma_kernel: Any, tensors: tuple[torch.Tensor, ...], cut: _Cut, sb: int) -> None:
    x, values, start, *others, y = tensors
    w = values.view(-1, values.shape[2])
    out, BM, BK = (cut.options[name] for name in ("OUT", "BM", "BK"))
    tma_kernel[cut.grid](
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(w, [BK, out] if cut.options["TRANS"] else [out, BK]),
        start,
        *others,
        TensorDescriptor.from_tensor(y, [BM, out]),
        *y.shape,
        start.numel() - 1,
        sb,
        SWAP=cut.tile.SWAP,
        **cut.options,
    )
