"""What a model says about an input that does not fit."""

from __future__ import annotations

from torch import Tensor


def check_images(x: Tensor, channels: int, size: int | None = None, least: int = 1) -> None:
    """`x` must be (n, channels, size, size), or at least `least` pixels high and wide.

    Raises:
        ValueError: it is not; the text says what came.
    """
    got = tuple(x.shape)
    if size is not None and (x.dim() != 4 or got[1:] != (channels, size, size)):
        raise ValueError(f"images must have shape (n, {channels}, {size}, {size}); got {got}")
    if x.dim() != 4 or got[1] != channels or min(got[2:]) < least:
        raise ValueError(
            f"images must have shape (n, {channels}, height, width), at least {least} x {least} "
            f"pixels; got {got}"
        )


def check_tokens(x: Tensor, longest: int | None = None) -> None:
    """`x` must be integers (n, t), with t at most `longest`.

    Raises:
        ValueError: it is not; the text says what came.
    """
    if x.dim() != 2 or x.is_floating_point() or (longest is not None and x.shape[1] > longest):
        limit = "" if longest is None else f", t at most {longest}"
        raise ValueError(
            f"tokens must be integers of shape (n, t){limit}; got {x.dtype} {tuple(x.shape)}"
        )
