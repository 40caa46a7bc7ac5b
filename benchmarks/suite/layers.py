"""Layers of integers, and the calls on them that are timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paired import Run
from benchmarks.suite.problem import Contender, Tensors
from sparsekern.nn import SparseLayer

HIGHEST = 3
"""Of the integers that everything is made of: sums of any order are exact."""


def integers(*shape: int) -> Tensor:
    """Float32 integers in [-HIGHEST, HIGHEST]."""
    return torch.randint(-HIGHEST, HIGHEST + 1, shape).float()


def fill(module: nn.Module) -> None:
    """Overwrite the parameters with integers."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(integers(*parameter.shape))


def forward(module: nn.Module, x: Tensor) -> Contender:
    """Forward only."""

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = module(x)
            return y

    return Contender(Run(call), lambda y: (y,), module)


def step(
    module: nn.Module, x: Tensor, dy: Tensor, output: Callable[[Any], Tensor] = lambda y: y
) -> Contender:
    """Forward and backward: y, dx, and all gradients of the parameters, dense."""

    def call() -> Tensor:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = output(module(x))
        torch.autograd.backward(y, dy)
        return y.detach()

    def read(y: Tensor) -> Tensors:
        return y, present(x.grad), *gradients(module)

    return Contender(Run(call), read, module)


def gradients(module: nn.Module) -> Tensors:
    """dw of every weight, dense and 0 where it is not active, and db, layer by layer."""
    found = []
    for layer in module.modules():
        if isinstance(layer, SparseLayer):
            blocks = layer.pack(present(layer.values.grad))
            found.append(layer.as_weight(layer.topology.unpack(blocks)))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            found.append(present(layer.weight.grad))
        else:
            continue
        found.append(present(layer.bias.grad if layer.bias is not None else None))
    return tuple(found)


def only_where(mask: Tensor, contender: Contender, place: int) -> Contender:
    """The same, with the result at `place` seen through a mask: a dense layer has all of dw."""

    def read(result: Any) -> Tensors:
        got = list(contender.read(result))
        got[place] = got[place] * mask
        return tuple(got)

    return Contender(contender.run, read, contender.module)


def present(tensor: Tensor | None) -> Tensor:
    """Itself.

    Raises:
        RuntimeError: there is none, because a gradient was not computed.
    """
    if tensor is None:
        raise RuntimeError("a gradient was not computed")
    return tensor
