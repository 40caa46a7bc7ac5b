"""The second pass of a sum that was cut into parts: they are added in order, without atomics.

Bytes: 4 * S * n read, n * (element size) written, n numbers in the result, S parts.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl

from . import plans

__all__ = ["add_parts"]

_BLOCK = 512  # four numbers to a thread: 16-byte loads


@triton.jit(do_not_specialize=["S"])
def _add_parts_kernel(
    parts_ptr,  # (S, n) fp32, contiguous
    out_ptr,  # (n,)
    S,
    n,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if ADD:
        total += tl.load(out_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    part = parts_ptr + at
    for first in range(0, S, AT_ONCE):
        for s in tl.static_range(AT_ONCE):
            total += tl.load(part, mask=(at < n) & (first + s < S), other=0.0)
            part += n
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < n)


def add_parts(plan: plans.Plan, parts: torch.Tensor, out: torch.Tensor, *, ADD: bool) -> None:
    """`out = parts.sum(0)`, or `out += parts.sum(0)`, summed in fp32.

    Args:
        plan: of the launcher that made the parts.
        parts: (S, *shape), fp32, contiguous.
        out: (*shape), contiguous, a dtype that a kernel can store.
        ADD: whether `out` holds something to add to.
    """
    tensors = parts, out
    kernel = plan.start(_add_parts_kernel, tensors, ("parts", out.dtype, ADD, len(parts)))
    if kernel is not None:
        with torch.cuda.device_of(out):
            kernel[(triton.cdiv(out.numel(), _BLOCK),)](
                *tensors,
                len(parts),
                out.numel(),
                ADD=ADD,
                BLOCK=_BLOCK,
                AT_ONCE=4,
                num_warps=4,
                enable_fp_fusion=True,
            )
