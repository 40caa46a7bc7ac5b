"""What overrides of a method give, checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsekern.errors import ShapeError


def expect(
    what: str, name: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """Check what an override gave for a layer."""
    if tuple(got.shape) != shape or dtype not in (None, got.dtype):
        kind = f"{dtype} " if dtype else ""
        raise ShapeError(
            f"`{what}` of layer {name!r} must be {kind}of shape {shape}; "
            f"got {got.dtype} of shape {tuple(got.shape)}"
        )
    return got


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let an exception say which layer it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise
