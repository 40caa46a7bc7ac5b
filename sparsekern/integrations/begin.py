"""Attaching a method to what a trainer has made: its optimizers and how it counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparsekern.carry.wrappers import parameters, unwrapped
from sparsekern.errors import ConfigError
from sparsekern.methods import Method
from sparsekern.methods.registry import attached_to
from sparsekern.swap import sparse_layers


def begin(
    method: type[Method] | None,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    options: Mapping[str, Any],
    *,
    passes: int,
    total_steps: Callable[[], float],
) -> Method:
    """Attach a method to those optimizers that hold sparse weights, or find the one that is there.

    Args:
        method: `sparsekern.RigL`, `SET`, a class of one's own; None if one is attached already.
        model: holds the sparse layers.
        optimizers: of the trainer.
        options: of the method; they go before what the trainer knows.
        passes: micro-batches per optimizer step, which become `grad_accumulation`.
        total_steps: optimizer steps of the whole training, asked if `t_end` is a share of them.

    Raises:
        ConfigError: `method` is None and none is attached, or the trainer does not know its number
            of steps.
    """
    own = {id(layer.values) for layer in sparse_layers(model).values()}
    held = [o for o in optimizers if any(id(p) in own for p in parameters(unwrapped(o)))]
    if method is None:
        found = next((m for m in map(attached_to, held) if isinstance(m, Method)), None)
        if found is None:
            raise ConfigError(
                "`method` must be given, such as sparsekern.RigL, or be attached to the optimizer "
                "before training begins"
            )
        return found
    known = {"grad_accumulation": passes, **options}
    if isinstance(known.get("t_end"), float) and "total_steps" not in known:
        known["total_steps"] = _whole(total_steps())
    return method(model, held[0] if len(held) == 1 else held, **known)


def _whole(steps: float) -> int:
    if not math.isfinite(steps) or steps < 1:
        raise ConfigError(
            f"`t_end` is a share of the training, but the trainer has no end: its number of steps "
            f"is {steps}; give `t_end` as an int, or `total_steps`"
        )
    return int(steps)
