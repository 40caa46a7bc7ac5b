"""CPU path without numba for large blocks: one BLAS call per active block, on strided views.

No activation is gathered, transposed or copied: BLAS takes the leading dimension of a column
slice. Gathering a block row's inputs first (the other way to larger products) lost by 1.6 times in
cache and more beyond. What remains per block is torch's dispatch, about 10 us, so edges below 32
belong to `csr`. FLOPs: 2 M bh bw per block and product, edge blocks cut to the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsekern.topology import Topology


def spmm(x: Tensor, values: Tensor, t: Topology, bias: Tensor | None) -> Tensor:
    """y = x wᵀ + bias: (M, cols) -> (M, rows)."""
    y = x.new_zeros(x.shape[0], t.shape[0])
    if bias is not None:
        y += bias
    ins, outs = torch.split(blas_ready(x), t.block[1], 1), torch.split(y, t.block[0], 1)
    for (r, c), w in zip(_blocks(t), values.transpose(1, 2).unbind(0), strict=True):
        a, out = ins[c], outs[r]
        torch.addmm(out, a, w[: a.shape[1], : out.shape[1]], out=out)
    return y


def spmm_t(dy: Tensor, values: Tensor, t: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    dx = dy.new_zeros(dy.shape[0], t.shape[1])
    ins, outs = torch.split(blas_ready(dy), t.block[0], 1), torch.split(dx, t.block[1], 1)
    for (r, c), w in zip(_blocks(t), values.unbind(0), strict=True):
        a, out = ins[r], outs[c]
        torch.addmm(out, a, w[: a.shape[1], : out.shape[1]], out=out)
    return dx


def sddmm(dy: Tensor, x: Tensor, t: Topology) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw), zero in the padding."""
    bh, bw = t.block
    dw = x.new_zeros(t.nnzb, bh, bw)
    lefts, rights = torch.split(blas_ready(dy).t(), bh, 0), torch.split(blas_ready(x), bw, 1)
    for (r, c), out in zip(_blocks(t), dw.unbind(0), strict=True):
        a, b = lefts[r], rights[c]
        torch.mm(a, b, out=out[: a.shape[0], : b.shape[1]])
    return dw


def backward(dy: Tensor, x: Tensor, values: Tensor, t: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    dy, x = blas_ready(dy), blas_ready(x)
    return spmm_t(dy, values, t), sddmm(dy, x, t)


def blas_ready(x: Tensor) -> Tensor:
    """Return `x`, copied unless BLAS can read it: one unit stride, and no overlap."""
    # an expanded or doubly strided operand would be copied once per block instead
    rows, cols = x.shape
    by_row = x.stride(1) == 1 and x.stride(0) >= max(1, cols)
    by_col = x.stride(0) == 1 and x.stride(1) >= max(1, rows)
    return x if by_row or by_col else x.contiguous()


def _blocks(t: Topology) -> Iterator[tuple[int, int]]:
    """Block row and block column of each stored block."""
    ptr = t.crow.tolist()
    cols = t.col.tolist()
    for r in range(len(ptr) - 1):
        for c in cols[ptr[r] : ptr[r + 1]]:
            yield r, c
