"""The Triton backend: hands tensors to the launchers in `sparsekern.kernels`."""

from __future__ import annotations

from torch import Tensor

from sparsekern.kernels.bsr_sddmm import bsr_sddmm
from sparsekern.kernels.bsr_spmm import bsr_spmm, bsr_spmm_t
from sparsekern.kernels.csr_sddmm import csr_sddmm
from sparsekern.kernels.csr_spmm import csr_spmm, csr_spmm_t
from sparsekern.topology import Topology


def spmm(
    x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """y = x wᵀ + bias, or max(y, 0): (M, cols) -> (M, rows)."""
    launch = csr_spmm if topology.block == (1, 1) else bsr_spmm
    indices = topology.crow, topology.col, topology.row_order
    return launch(x, values, *indices, bias, topology.shape[0], relu=relu)


def spmm_t(dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    launch = csr_spmm_t if topology.block == (1, 1) else bsr_spmm_t
    indices = topology.ccol, topology.row, topology.perm, topology.col_order
    return launch(dy, values, *indices, topology.shape[1])


def sddmm(dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw); added to `out` if it is given."""
    if topology.block == (1, 1):
        return csr_sddmm(dy, x, topology.crow, topology.col, out=out)
    return bsr_sddmm(dy, x, topology.crow, topology.col, topology.block, out=out)


def backward(dy: Tensor, x: Tensor, values: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    return spmm_t(dy, values, topology), sddmm(dy, x, topology)
