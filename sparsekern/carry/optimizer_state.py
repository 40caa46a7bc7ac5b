"""Optimizer state follows the weights it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekern.errors import OptimizerError


def check_followable(optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptimizerError` for LBFGS, whose flat state belongs to no single parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "the optimizer's state must follow single parameters; LBFGS keeps flat state over all"
        )


def state_tensors(
    optimizer: torch.optim.Optimizer, name: str, values: nn.Parameter
) -> list[Tensor]:
    """The state tensors of `values` that must move with its blocks.

    Scalars, such as step counts, stay. Anything else can't be placed.

    Raises:
        OptimizerError: a state entry is neither a scalar nor of the shape of `values`.
    """
    moving = []
    for key, entry in optimizer.state.get(values, {}).items():
        if isinstance(entry, Tensor) and entry.shape == values.shape:
            moving.append(entry)
        elif not _is_scalar(entry):
            shape = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)[:60]
            raise OptimizerError(
                f"state {key!r} of layer {name!r} must have the shape of `values`, "
                f"{tuple(values.shape)}, to follow a topology update; got {shape}"
            )
    return moving


def _is_scalar(entry: object) -> bool:
    if isinstance(entry, Tensor):
        return entry.numel() == 1
    return entry is None or isinstance(entry, int | float | bool | str)
