"""Memory formats of image activations, (N, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor


def format_of(x: Tensor) -> torch.memory_format:
    """The format that a convolution of `x` returns: channels-last if `x` is, else contiguous.

    A tensor that is both (one channel, or one pixel) counts as contiguous.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def pixels_of(x: Tensor) -> Tensor:
    """(N H W, C) of an image tensor (N, C, H, W): a view if it is channels-last, else a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image_of(pixels: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Inverse of `pixels_of`: a channels-last view (N, C, H, W) of (N H W, C)."""
    return pixels.view(batch, height, width, pixels.shape[1]).permute(0, 3, 1, 2)
