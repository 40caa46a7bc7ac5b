"""Input gradient of a block-sparse convolution, without im2col and without atomics.

Shapes: dy (N, C_out, P, Q), dx (N, C_in, H, W), w held as in `bsr_conv2d`. Called by
`sparsekern.ops` for the input gradient.

FLOPs and bytes: those of `bsr_conv2d`, with dy in place of x and dx in place of y.

It gathers too: a program makes BM input pixels times one block of input channels. Its blocks stand
in one list for each tap; the lists of up to TAPS_AT_ONCE taps are walked as one, so that short
lists still fill the pipeline. With a stride, input pixels fall into stride_h * stride_w phases;
those of one phase meet the same taps, at consecutive outputs.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# mypy: disable-error-code="var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .launch import (
    in_dtype,
    input_precision,
    is_interpreted,
    load_unit,
    output_dtype,
    unit_of,
)
from .pixels import FAR, both, inside, phase, pixel, tile_of_program
from .window import (
    Window,
    block_options,
    by_images,
    channels_layout,
    empty_images,
    pixel_strides,
    wanted_format,
)

__all__ = ["TAPS_AT_ONCE", "bsr_conv2d_dgrad"]

# taps whose lists of blocks the input gradient walks as one: two scalars in registers for each
TAPS_AT_ONCE = 9


@triton.jit
def _place(i, starts, ends, U: tl.constexpr):
    """Tap (counted from the first of U) and place in the index of the i-th block of their lists."""
    tap = i * 0
    t = i + starts[0]
    for u in tl.static_range(U - 1):
        beyond = i >= ends[u]
        tap += beyond.to(tl.int32)
        t = tl.where(beyond, i + starts[u + 1], t)
    return tap, t


@triton.jit(
    do_not_specialize=[
        "N", "M", "H", "W", "P", "Q", "R", "RB", "CB", "Cg", "Cog", "C_in", "syn", "syh", "syw"
    ]
)  # fmt: skip
def _bsr_conv2d_dgrad_kernel(
    dy_ptr,  # (N, P, Q, groups, Cog rounded up to UNIT), strides UNIT * (syn, syh, syw), then dense
    w_ptr,  # (nnzb, IN, OUT), contiguous
    start_ptr,  # (groups * TAPS * CB + 1,) int32: ccol
    index_ptr,  # (nnzb,) int32: row
    perm_ptr,  # (nnzb,) int32: slot in w
    dx_ptr,  # (N, H, W, C_in), contiguous
    N,
    M,  # input pixels of the largest phase, all images
    H,
    W,
    P,
    Q,
    R,  # blocks of input channels, all groups
    RB,  # block rows of a group
    CB,  # blocks of input channels of a group
    Cg,  # input channels of a group
    Cog,  # its output channels
    C_in,
    syn,
    syh,
    syw,
    UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,  # divides Cg: UNIT or 1
    TAPS: tl.constexpr,
    U: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, m0 = tile_of_program(M, R, BM, GROUP)
    fh, fw, rows, columns = phase(H, W, SH, SW)
    g = row // CB
    cb = row - g * CB
    if m0 < N * rows * columns:
        m = m0 + tl.arange(0, BM)
        n, h, w = pixel(m, rows * columns, columns)
        width = tl.cdiv(Cog, UNIT) * UNIT
        dy_pixel = dy_ptr + g * width + n.to(tl.int64)[:, None] * syn * UNIT
        dy_pixel += (h.to(tl.int64)[:, None] * syh + w.to(tl.int64)[:, None] * syw) * UNIT
        live = m < N * rows * columns
        p = tl.where(live, h, FAR)[:, None]  # pixels beyond the last read nothing
        q = w[:, None]
        w_out = w_ptr + tl.arange(0, OUT)[None, :]
        lane = tl.arange(0, BK)
        WIDE: tl.constexpr = IN >= BK  # one block to an iteration: its tap is a scalar
        acc = tl.zeros([BM, OUT], dtype=tl.float32)
        for first in range(0, TAPS, U):
            starts = ()
            ends = ()
            total = 0 * row
            for u in tl.static_range(U):
                tap = first + u
                # of a tap that this phase never meets no block counts
                met = (fh + PH - tap // KW * DH) % SH == 0
                met = met & ((fw + PW - tap % KW * DW) % SW == 0) & (tap < TAPS)
                key = (g * TAPS + tap) * CB + cb
                lo = tl.load(start_ptr + key, mask=met, other=0)
                hi = tl.load(start_ptr + key + 1, mask=met, other=0)
                starts = starts + (lo - total,)  # noqa: RUF005
                total += hi - lo
                ends = ends + (total,)  # noqa: RUF005
            i = 0 * row if WIDE else lane // IN
            tap, t = _place(i, starts, ends, U)
            r = tl.load(index_ptr + t, mask=i < total, other=0)
            s = tl.load(perm_ptr + t, mask=i < total, other=0)
            for k in range(0, total * IN, BK):
                inner = (k + lane) % IN
                ch = (r - g * RB) * IN + inner
                ch = tl.max_contiguous(tl.multiple_of(ch, min(IN, BK)), min(IN, BK))
                keep = both(ch < width, i < total, INTERPRET)
                # exact: other taps were left out
                dp = (fh + PH - (first + tap) // KW * DH) // SH
                dq = (fw + PW - (first + tap) % KW * DW) // SW
                if not WIDE:
                    dp = dp[None, :]
                    dq = dq[None, :]
                dy = tl.load(
                    dy_pixel + (dp.to(tl.int64) * syh + dq.to(tl.int64) * syw) * UNIT + ch[None, :],
                    mask=inside(p + dp, q + dq, P, Q) & keep[None, :],
                    other=0.0,
                )
                w_in = s.to(tl.int64) * (IN * OUT) + inner * OUT
                keep = keep & (ch < Cog)
                weight = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
                # loaded an iteration ahead: where it is used it would halve the pipeline
                i = (k + BK) // IN if WIDE else (k + BK + lane) // IN
                tap, t = _place(i, starts, ends, U)
                r = tl.load(index_ptr + t, mask=i < total, other=0)
                s = tl.load(perm_ptr + t, mask=i < total, other=0)
                if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                    dy = dy.to(tl.float32)
                    weight = weight.to(tl.float32)
                acc = tl.dot(dy, weight, acc, input_precision=PRECISION)
        Cg = tl.cdiv(Cg, C_UNIT) * C_UNIT
        C_in = tl.cdiv(C_in, C_UNIT) * C_UNIT
        c = cb * OUT + tl.arange(0, OUT)
        at = (n * H + h * SH + fh) * W + w * SW + fw
        dx = dx_ptr + at.to(tl.int64)[:, None] * C_in + (g * Cg + c)[None, :]
        tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=live[:, None] & (c < Cg)[None, :])


def bsr_conv2d_dgrad(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    n_in: int,
    size: tuple[int, int],
    window: Window,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Gradient of `conv2d` with respect to its input, the values read in place through `perm`.

    Args:
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read like `x` of `bsr_conv2d`.
        values: (nnzb, BH, BW), dy's dtype, in CSR order.
        ccol: (groups * taps * CB + 1,) int32: where the blocks of input channels cb of group g at
            a tap start, under the key (g * taps + tap) * CB + cb.
        row: (nnzb,) int32 block rows, in the order of the keys.
        perm: (nnzb,) int32 slots in values, in the order of the keys.
        n_in: C_in.
        size: (H, W) of the input.
        window: geometry; N * H * W is less than 2**31.
        memory_format: of the result; by default channels-last if dy is, else contiguous.

    Returns:
        (N, C_in, H, W), dy's dtype.
    """
    batch, n_out, P, Q = dy.shape
    H, W = size
    dtype = output_dtype(dy.dtype, _bsr_conv2d_dgrad_kernel)
    dx = empty_images(dy, (batch, n_in, H, W), dtype, memory_format or wanted_format(dy))
    if dx.numel() == 0:
        return in_dtype(dx, dy.dtype)
    values = values.contiguous()
    bh, bw = values.shape[1:]
    plan = plans.find(_bsr_conv2d_dgrad_kernel, dy, _key(dy, values, n_in, size, window))
    cut = plan.decide(
        block_options,
        "conv2d_dgrad",
        dy,
        (bh, bw),
        window,
        is_interpreted(_bsr_conv2d_dgrad_kernel),
    )
    groups, (SH, SW), taps = window.groups, window.stride, window.kernel[0] * window.kernel[1]
    RB, CB = triton.cdiv(n_out // groups, bh), triton.cdiv(n_in // groups, bw)
    sizes = {"H": H, "W": W, "P": P, "Q": Q, "R": groups * CB, "RB": RB, "CB": CB, "C_in": n_in}
    Cg, unit = n_in // groups, load_unit(dy.dtype)
    sizes |= {"Cg": Cg, "Cog": n_out // groups, "UNIT": unit, "C_UNIT": unit_of(Cg, dy.dtype)}
    sizes |= {"TAPS": taps, "U": min(taps, TAPS_AT_ONCE)}

    def launch(dy: torch.Tensor, dx: torch.Tensor) -> None:
        M = len(dx) * triton.cdiv(H, SH) * triton.cdiv(W, SW)
        tensors = dy, values, ccol, row, perm, dx
        ordinary_kernel = plan.start(_bsr_conv2d_dgrad_kernel, tensors, len(dx))
        if ordinary_kernel is not None:
            steps = (step // unit for step in pixel_strides(dy, (P, Q)))
            strides = dict(zip(("syn", "syh", "syw"), steps, strict=True))
            ordinary_kernel[triton.cdiv(M, cut["BM"]) * groups * CB, SH * SW](
                *tensors, N=len(dx), M=M, **strides, **sizes, **cut
            )

    by_images(dy, dx, channels_layout(groups), launch)
    return in_dtype(dx, dy.dtype)


def _key(
    dy: torch.Tensor, values: torch.Tensor, n_in: int, size: tuple[int, int], window: Window
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    held = values.shape, values.dtype, n_in, tuple(size), window
    return (
        "bsr_conv2d_dgrad",
        dy.shape,
        dy.stride(),
        dy.dtype,
        *held,
        input_precision(dy.dtype),
        (dy.data_ptr() % 16 == 0),
    )
