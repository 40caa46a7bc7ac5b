"""Weight gradient of a block-sparse convolution, at the active blocks only, without im2col.

Shapes: dy (N, C_out, P, Q), x (N, C_in, H, W), dw (nnzb, BH, BW) in CSR order; blocks as in
`bsr_conv2d`. Called by `sparsekern.ops` for the weight gradient.

FLOPs: 2 * N * P * Q * nnzb * BH * BW.
Bytes from L2, s = element size: s * N * P * Q * nnzb * (BW + BH / G), G blocks of a block row
sharing one tile of dy. Bytes from HBM, at least: s * (N * P * Q * C_out + N * H * W * C_in + nnzb *
BH * BW); when the sum over pixels is cut into S > 1 parts, 8 * S * nnzb * BH * BW more.

The linear sampled product (`bsr_sddmm`: groups, parts, epilogue) with a shift of x for each lane:
one program makes up to G neighbouring blocks of one block row, whose taps are fixed for the whole
sum. It walks the output pixels and counts their row, their column and the input pixel they meet up,
as dividing would cost more than the product. Pixels of dy and x are evenly spaced: each needs one
number for its address. Other images are copied, which costs twice their bytes.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl

from . import plans
from .groups import clear, group_of_program, store_sums
from .launch import (
    arch_class,
    compute_kind,
    empty,
    in_dtype,
    input_precision,
    is_interpreted,
    load_unit,
    most_groups,
    output_dtype,
    parts_of_sum,
    usual_groups,
)
from .parts import add_parts
from .pixels import FAR, below, pixel, walk
from .tables import find
from .window import (
    Window,
    has_pixel_rows,
    images_at_once,
    pixel_rows,
    pixel_stride,
    window_options,
)

__all__ = ["bsr_conv2d_wgrad"]


# a new batch or image size must not mean a new compilation, nor new channels: UNIT divides strides
@triton.jit(
    do_not_specialize=[
        "M", "H", "W", "P", "Q", "R", "RB", "CB", "Cg", "Cog", "span", "sym", "sxm",
    ]
)  # fmt: skip
def _bsr_conv2d_wgrad_kernel(
    dy_ptr,  # (N, P, Q, groups, Cog rounded up to UNIT), UNIT * sym from pixel to pixel
    x_ptr,  # (N, H, W, groups, Cg rounded up to UNIT), UNIT * sxm from pixel to pixel
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,  # output pixels of all images
    H,
    W,
    P,
    Q,
    R,  # block rows
    RB,  # of which a group has
    CB,  # block columns of a tap
    Cg,  # input channels of a group
    Cog,  # its output channels
    span,  # pixels of one part, a multiple of BM
    part,  # nnzb * BH * BW
    sym,
    sxm,
    UNIT: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, lo, hi = group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        g = row // RB
        lane = tl.arange(0, G * BW)
        t = lo + lane // BW  # [G * BW] slot of each lane of the gathered x
        j = lane % BW
        # scalars: what comes from a load of a tensor the compiler would not compute anew in the
        # layout of x, but move there in every iteration
        c = lane * 0
        for u in tl.static_range(G):
            c = tl.where(lane // BW == u, tl.load(col_ptr + lo + u, mask=lo + u < hi, other=0), c)
        tap = c // CB
        ch = tl.max_contiguous(tl.multiple_of((c - tap * CB) * BW + j, BW), BW)
        width = tl.cdiv(Cg, UNIT) * UNIT
        h = tap // KW * DH - PH
        w = tap % KW * DW - PW
        x_lane = x_ptr + g * width + (h * W + w).to(tl.int64) * sxm * UNIT + ch
        # lanes of no channel read nothing
        h = tl.where((ch < width) & (t < hi), h, FAR)
        i = tl.arange(0, BH)
        o = row % RB * BH + i
        o_width = tl.cdiv(Cog, UNIT) * UNIT
        first = tl.program_id(1) * span
        left = min(first + span, M) - first
        m = tl.arange(0, BM)
        dy_at = dy_ptr + (first + m).to(tl.int64)[:, None] * sym * UNIT + (g * o_width + o)[None, :]
        dy_step = sym.to(tl.int64) * (UNIT * BM)
        n, p, q = pixel(first + m, P * Q, Q)
        at = (n * H + p * SH) * W + q * SW  # of the input pixels that the first tap would meet
        dp = BM // Q
        dq = BM - dp * Q
        dn = dp // P
        dp -= dn * P
        ahead = (dn * H + dp * SH) * W + dq * SW
        next_row = SH * W - SW * Q
        next_image = (H - SH * P) * W
        acc = tl.zeros([G * BW, BH], dtype=tl.float32)
        for m0 in range(0, left, BM):
            live = m < left - m0
            dy = tl.load(dy_at, mask=live[:, None] & (o < o_width)[None, :], other=0.0)
            dy_at += dy_step
            top = tl.where(live, p * SH, FAR)[:, None]  # pixels beyond the last read nothing
            x = tl.load(
                x_lane[None, :] + at.to(tl.int64)[:, None] * sxm * UNIT,
                mask=below(h[None, :] + top, H) & below(w[None, :] + (q * SW)[:, None], W),
                other=0.0,
            )
            p, q, at = walk(p, q, at, dp, dq, ahead, next_row, next_image, P, Q)
            if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        slot = tl.program_id(1).to(tl.int64) * part + t.to(tl.int64) * (BH * BW)
        dw = dw_ptr + (slot + j)[:, None] + (i * BW)[None, :]
        mine = (t < hi)[:, None]
        store_sums(dw, acc, mine, ADD)
        if (Cg % BW != 0) | (Cog % BH != 0):
            tl.debug_barrier()  # threads clear what others have stored
            clear(dw, mine & ((ch >= Cg)[:, None] | (o >= Cog)[None, :]))


def bsr_conv2d_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    window: Window,
) -> torch.Tensor:
    """Gradient of `conv2d` with respect to the active blocks of its weight.

    Args:
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read as it lies if `has_pixel_rows`,
            else copied, some images at a time.
        x: (N, C_in, H, W), dy's dtype, read likewise.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        block: (BH, BW).
        window: geometry; N * P * Q is less than 2**31.

    Returns:
        (nnzb, BH, BW), contiguous, x's dtype; rows and columns that stand for no channel are exact
        zeros.
    """
    batch, n_out, P, Q = dy.shape
    _, n_in, H, W = x.shape
    (bh, bw), groups = block, window.groups
    plan = plans.find(_bsr_conv2d_wgrad_kernel, x, _key(dy, x, crow, col, block, window))
    cut: _Cut = plan.decide(_cut, dy, x, crow, col, block, window)
    # rounded once: after the last images and part
    whole = cut.step >= batch
    dtype = output_dtype(x.dtype, _bsr_conv2d_wgrad_kernel)
    dw = empty(x, col.numel(), *block, dtype=dtype if whole or cut.parts > 1 else torch.float32)
    if dw.numel() == 0 or dy.numel() == 0:
        return in_dtype(dw.zero_(), x.dtype)
    sums = dw if cut.parts == 1 else empty(x, cut.parts, *dw.shape, dtype=torch.float32)
    sizes = {"H": H, "W": W, "P": P, "Q": Q, "R": crow.numel() - 1, "part": dw.numel()}
    sizes |= {"RB": triton.cdiv(n_out // groups, bh), "CB": triton.cdiv(n_in // groups, bw)}
    sizes |= {"Cg": n_in // groups, "Cog": n_out // groups}
    unit = load_unit(x.dtype)
    for first in range(0, batch, cut.step):
        dys, xs = (pixel_rows(a[first : first + cut.step], groups) for a in (dy, x))
        images = min(cut.step, batch - first)
        tensors = dys, xs, crow, col, sums
        ADD = first > 0
        kernel = plan.start(_bsr_conv2d_wgrad_kernel, tensors, (images, ADD, sums.dtype))
        if kernel is not None:
            with torch.cuda.device_of(x):
                kernel[cut.programs, cut.parts](
                    *tensors,
                    M=images * P * Q,
                    span=cut.span,
                    sym=cast("int", pixel_stride(dys)) // unit,
                    sxm=cast("int", pixel_stride(xs)) // unit,
                    ADD=ADD,
                    **sizes,
                    **cut.options,
                )
    if cut.parts > 1:
        add_parts(plan, sums, dw, ADD=False)
    return in_dtype(dw, x.dtype)


class _Cut(NamedTuple):
    """How a product is cut: images of a launch, its grid, and the options of the kernel."""

    step: int
    programs: int
    parts: int
    span: int
    options: dict[str, Any]


def _cut(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    window: Window,
) -> _Cut:
    (bh, bw), nnzb, R = block, col.numel(), crow.numel() - 1
    kind = compute_kind(x.dtype)
    tile, _ = find(arch_class(x.device), "conv2d_wgrad", kind, max(block), "any", tma=False)
    G = max(1, tile.LANES // bw)
    copied = sum(0 if has_pixel_rows(a, window.groups) else a.shape[1:].numel() for a in (dy, x))
    # the kernel counts input pixels in 32 bits
    step = min(images_at_once(len(x), copied=copied), (2**31 - 1) // max(1, x.shape[2:].numel()))
    steps = triton.cdiv(step * dy.shape[2:].numel(), tile.BM)
    loads = (bh + G * bw) * tile.BM * x.element_size()
    parts = parts_of_sum(x.device, usual_groups(nnzb, R, G), steps, loads, nnzb * bh * bw)
    options = {
        "UNIT": load_unit(x.dtype),
        "BH": bh,
        "BW": bw,
        "BM": tile.BM,
        "G": G,
        "PRECISION": input_precision(x.dtype),
        "INTERPRET": is_interpreted(_bsr_conv2d_wgrad_kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
        **window_options(window),
    }
    span = triton.cdiv(steps, parts) * tile.BM
    return _Cut(step, most_groups(nnzb, R, G), parts, span, options)


def _key(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    window: Window,
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    operands = dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype
    held = crow.numel(), col.numel(), block, window
    aligned = dy.data_ptr() % 16 == 0, x.data_ptr() % 16 == 0
    return "bsr_conv2d_wgrad", *operands, *held, input_precision(x.dtype), *aligned
