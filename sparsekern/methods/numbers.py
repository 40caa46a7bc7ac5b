"""Numbers that methods are given, and learning rates that they go by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekern.carry.wrappers import unwrapped
from sparsekern.errors import ConfigError, DtypeError


def check_number(name: str, value: object, most: float = float("inf")) -> float:
    """A finite number of at least 0 and at most `most`, as a float.

    Raises:
        ConfigError, DtypeError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(f"`{name}` must be a number; got {value!r}")
    if not (0 <= value <= most and value < float("inf")):
        up_to = "and finite" if most == float("inf") else f"and at most {most:g}"
        raise ConfigError(f"`{name}` must be at least 0 {up_to}; got {value}")
    return float(value)


def learning_rate(
    optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter
) -> float | Tensor:
    """What the optimizer that holds a parameter takes its steps by; 1 if it has no such thing."""
    groups = [g for given in optimizers for g in unwrapped(given)[-1].param_groups]
    found = next((g for g in groups if any(p is parameter for p in g["params"])), {})
    rate: float | Tensor = found.get("lr", 1.0)
    return rate
