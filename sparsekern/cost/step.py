"""One training step, as it is counted, simulated and timed: always the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsekern.cost import examples
from sparsekern.cost.twin import Twin
from sparsekern.errors import ModelError, told

Loss = Callable[[Any], Tensor]
"""From the model's output to a number."""


def total(output: Any) -> Tensor:
    """The loss if none is given: the sum of all outputs that depend on a parameter.

    Raises:
        ModelError: none does.
    """
    parts = [
        leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not parts:
        raise ModelError(
            "`model` must have an output that depends on a parameter that requires a gradient; got "
            f"{examples.described(output)}"
        )
    return torch.stack([part.sum() for part in parts]).sum() if len(parts) > 1 else parts[0].sum()


def forward(twin: Twin, loss: Loss) -> Tensor:
    """The loss of a forward pass.

    Raises:
        ModelError: the model fails, or the loss is no number that can be differentiated.
    """
    output = examples.run(twin.model, twin.examples)
    try:
        value = loss(output)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"`loss` fails on {examples.described(output)}: {told(error)}") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ModelError(
            "`loss` must map the model's output to one number with a gradient; got "
            f"{examples.described(value)}"
        )
    return value


def training_step(twin: Twin, loss: Loss) -> None:
    """Forward, backward, and the optimizer's step if there is one; gradients stay."""
    torch.autograd.backward(forward(twin, loss))
    if twin.optimizer is not None:
        twin.optimizer.step()


def clear(twin: Twin) -> None:
    """Forget the gradients."""
    for parameter in twin.model.parameters():
        parameter.grad = None
