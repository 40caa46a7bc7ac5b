"""The CPU backend: linear products, convolutions, and in `choice` what decides how they run."""

from sparsekern.ops.cpu.conv import conv2d, conv2d_backward, conv2d_dgrad, conv2d_wgrad
from sparsekern.ops.cpu.linear import backward, sddmm, spmm, spmm_t

__all__ = [
    "backward",
    "conv2d",
    "conv2d_backward",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "sddmm",
    "spmm",
    "spmm_t",
]
