"""The masked-dense reference: a dense weight that is zero where no connection exists.

It defines what is correct. Torch only, any dtype up to float64. It also serves as the named mode
`impl="dense"`: a dense weight that lives only as long as the operator, at dense FLOPs.
"""

from __future__ import annotations

from torch import Tensor

from sparsekern.topology import Topology


def spmm(
    x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """y = x wᵀ + bias, or max(y, 0): (M, cols) -> (M, rows)."""
    y = x @ topology.unpack(values).t()
    y = y if bias is None else y + bias
    return y.relu() if relu else y


def spmm_t(dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    return dy @ topology.unpack(values)


def sddmm(dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw); added to `out` if it is given."""
    dw = topology.pack(dy.t() @ x)
    return dw if out is None else out.add_(dw)


def backward(dy: Tensor, x: Tensor, values: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    return spmm_t(dy, values, topology), sddmm(dy, x, topology)
