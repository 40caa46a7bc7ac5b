"""A model, its optimizer and its inputs as tensors that have shapes but no memory."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from sparsekern.cost.examples import Examples
from sparsekern.errors import ModelError, told


class Twin(NamedTuple):
    """What a training step works on.

    Attributes:
        model: a copy, of the same classes, in training mode if the original is.
        examples: its inputs.
        optimizer: of the copy's parameters, with the original's state; None if there is none.
    """

    model: nn.Module
    examples: Examples
    optimizer: torch.optim.Optimizer | None


def weightless(
    model: nn.Module,
    examples: Examples,
    optimizer: torch.optim.Optimizer | None,
    mode: FakeTensorMode,
) -> Twin:
    """A twin of fake tensors: operators tell shapes and compute nothing, under `mode`.

    Tensors of the meta device become fake tensors of the CPU.

    Raises:
        ModelError: the model can't be copied.
    """
    held = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        held += [t for own in optimizer.state.values() for t in own.values() if _is_tensor(t)]
    memo = {id(tensor): _fake(tensor, mode) for tensor in held}
    inputs = tree_map(lambda x: _fake(x, mode) if _is_tensor(x) else x, examples)
    return Twin(*_copied((model, optimizer), memo, inputs))


def copied(model: nn.Module, examples: Examples, optimizer: torch.optim.Optimizer | None) -> Twin:
    """A twin with memory of its own, for steps that must not change the original.

    Raises:
        ModelError: the model can't be copied.
    """
    inputs = tree_map(lambda x: x.detach().clone() if _is_tensor(x) else x, examples)
    return Twin(*_copied((model, optimizer), {}, inputs))


def _copied(
    pair: tuple[nn.Module, torch.optim.Optimizer | None], memo: dict[int, Any], inputs: Examples
) -> tuple[nn.Module, Examples, torch.optim.Optimizer | None]:
    try:
        model, optimizer = copy.deepcopy(pair, memo)
    except Exception as error:
        raise ModelError(
            f"`model` must be one that copy.deepcopy takes; it raised {told(error)}"
        ) from error
    for parameter in model.parameters():
        parameter.grad = None
    return model, inputs, optimizer


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    home = "cpu" if tensor.device.type == "meta" else tensor.device
    fake = FakeTensor(mode, shape, torch.device(home))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)
