"""New layers in the places of old ones, in a way that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sparsekern.carry.hand_over import Undo
from sparsekern.swap.build import Made


def replace_all(model: nn.Module, made: Sequence[Made], undo: Undo) -> None:
    """Put each new layer wherever the model holds the old one, and write biases drawn anew.

    A module that is used under two names stays one. What takes it back is put on `undo` first.
    """
    new = {id(m.old): m.new for m in made}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # named_children lists each module once
        if child is not None and id(child) in new
    ]
    for parent, name, child in places:
        undo.append(partial(setattr, parent, name, child))
        setattr(parent, name, new[id(child)])
    for bias, values in (pair for m in made for pair in m.biases):
        undo.append(_writing(bias, bias.detach().clone()))
        _writing(bias, values)()


def _writing(bias: nn.Parameter, values: Tensor) -> Callable[[], object]:
    def write() -> None:
        with torch.no_grad():
            bias.copy_(values)

    return write


def staying(model: nn.Module, made: Sequence[Made]) -> set[int]:
    """Ids of the parameters that modules hold which are not replaced."""
    # what such a module contains goes with it, or stays without being named in a move
    replaced = {id(module) for m in made for module in m.old.modules()}
    return {
        id(parameter)
        for module in model.modules()
        if id(module) not in replaced
        for parameter in module.parameters(recurse=False)
    }
