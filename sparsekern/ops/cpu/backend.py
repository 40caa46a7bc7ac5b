"""The CPU backend: linear products, convolutions, and in `cpu_choice` what decides how they run."""

from sparsekern.ops.cpu_conv import conv2d, conv2d_backward, conv2d_dgrad, conv2d_wgrad
from sparsekern.ops.cpu_linear import backward, sddmm, spmm, spmm_t

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
