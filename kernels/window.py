"""Geometry of a convolution as its kernels take it, and activations in the layout they want.

The BSR kernels want the channels of a pixel side by side, the CSR kernels the pixels of an image's
row. Other activations are copied, some images at a time: the copies stay small beside a batch.
"""

from typing import NamedTuple

import torch

from . import launch

__all__ = [
    "Window",
    "channels_adjacent",
    "columns_adjacent",
    "empty_images",
    "has_adjacent_channels",
    "has_adjacent_columns",
    "images_at_once",
    "output_size",
    "wanted_format",
]


class Window(NamedTuple):
    """What a convolution reads: `x[p * stride - padding + r * dilation]` for r in range(kernel)."""

    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def output_size(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    """(P, Q) of the output for an input of (H, W)."""
    P, Q = (
        (size[i] + 2 * window.padding[i] - window.dilation[i] * (window.kernel[i] - 1) - 1)
        // window.stride[i]
        + 1
        for i in (0, 1)
    )
    return P, Q


def wanted_format(a: torch.Tensor) -> torch.memory_format:
    """Memory format of what is computed from `a`: channels-last if `a` is that and no other."""
    if a.is_contiguous(memory_format=torch.channels_last) and not a.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_images(
    a: torch.Tensor, size: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> torch.Tensor:
    """Memory for a 4-D result on `a`'s device."""
    return torch.empty(size, dtype=dtype, device=a.device, memory_format=memory_format)


def has_adjacent_channels(a: torch.Tensor) -> bool:
    """Whether the BSR kernels can read images as they lie."""
    return a.shape[1] == 1 or a.stride(1) == 1


def channels_adjacent(a: torch.Tensor) -> torch.Tensor:
    """The same images with a pixel's channels side by side; a copy unless they are."""
    if has_adjacent_channels(a):
        return a
    return a.contiguous(memory_format=torch.channels_last)


def has_adjacent_columns(a: torch.Tensor) -> bool:
    """Whether the CSR kernels can read images as they lie."""
    return a.shape[3] == 1 or a.stride(3) <= 1


def columns_adjacent(a: torch.Tensor) -> torch.Tensor:
    """The same images with a row's pixels side by side; a copy unless they are."""
    return a if has_adjacent_columns(a) else a.contiguous()


def images_at_once(batch: int, *, copied: int) -> int:
    """Images of one launch: all, or so few that `copied` elements of each keep to the bound."""
    if copied == 0:
        return max(batch, 1)
    return max(1, min(batch, launch.CHUNK_ELEMENTS // copied))
