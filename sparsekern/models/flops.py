"""FLOPs of a forward pass at density 1, counted without computing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # products that the counter knows
        model, x = build().eval(), torch.zeros(shape, dtype=dtype)
        counter = stack.enter_context(FlopCounterMode(display=False))
        model(x)
    return int(counter.get_total_flops())
