"""What was asked of a model: it stays with it, also in a copy and a pickle."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from sparsekern.carry.hand_over import Undo
from sparsekern.swap.targets import Choice

_KEY = "_sparsekern_asked"


class Asked(NamedTuple):
    """What `sparsify_` was asked for.

    Attributes:
        sparsity: of the whole; None where layers were asked one by one.
        layers: sparsity of each, by name; of those too that had a share and stay dense.
        dense: why each of the others stays dense, by name.
    """

    sparsity: float | None
    layers: dict[str, float]
    dense: dict[str, str]


def asked(sparsity: float | None, choice: Choice) -> Asked:
    """What a choice asks for."""
    shares = {t.name: t.sparsity for t in choice.targets}
    return Asked(sparsity, {**choice.shares, **shares}, dict(choice.dense))


def write(model: nn.Module, new: Asked | None, undo: Undo) -> None:
    """Keep it with the model, over what was asked before; None takes it away."""
    own = vars(model)
    before = own.get(_KEY)
    undo.append(lambda: own.pop(_KEY, None) if before is None else own.update({_KEY: before}))
    if new is None:
        own.pop(_KEY, None)
        return
    if before is not None:  # a layer that is sparse already was asked then
        new = new._replace(layers=before["layers"] | new.layers)
    own[_KEY] = new._asdict()  # a plain dict: a pickle needs no class of ours


def read(model: nn.Module) -> Asked:
    """What was asked of the model and of its parts; the part's own word counts for its layers."""
    top = vars(model).get(_KEY, {"sparsity": None})
    layers: dict[str, float] = {}
    dense: dict[str, str] = {}
    for prefix, module in model.named_modules():
        found = vars(module).get(_KEY)
        if found is not None:
            dot = f"{prefix}." if prefix else ""
            layers |= {dot + name: share for name, share in found["layers"].items()}
            dense |= {dot + name: reason for name, reason in found["dense"].items()}
    return Asked(top["sparsity"], layers, dense)
