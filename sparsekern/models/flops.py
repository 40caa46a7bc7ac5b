"""FLOPs of a forward pass at density 1, counted without computing anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsekern.cost import run_flops


def forward_flops(
    build: Callable[[], nn.Module], *shape: int, dtype: torch.dtype | None = None
) -> int:
    """FLOPs of one forward pass.

    1 multiply-add = 2 FLOPs, which is what multiplications, additions and a bias addition for every
    output make together, as the RigL authors count. Attention products are included; norms,
    activations and pooling are not.

    Args:
        build: makes the model; it is called on the meta device, so no weights are allocated.
        shape: of the input, batch first.
        dtype: of the input: float32, or int64 for tokens.
    """
    with torch.device("meta"):
        return run_flops.forward_flops(build(), torch.zeros(shape, dtype=dtype)).executed
