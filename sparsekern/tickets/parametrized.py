"""Taking torch's parametrization off one layer, in a way that can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from sparsekern.errors import ConfigError
from sparsekern.swap.refuse import check_model

_T = TypeVar("_T")
_P = TypeVar("_P", bound=nn.Module)


def parametrized_by(model: nn.Module, kind: type[_P]) -> dict[str, tuple[nn.Module, _P]]:
    """Layers whose weight a parametrization of this kind makes, with it, by name.

    Raises:
        ConfigError: one of them has another parametrization too.
        DtypeError: `model` is no module.
    """
    check_model(model)
    found: dict[str, tuple[nn.Module, _P]] = {}
    for name, layer in model.named_modules():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        every: Mapping[str, nn.ModuleList] = layer.parametrizations
        own = [one for one in every["weight"] if isinstance(one, kind)]
        if own and (len(every) > 1 or len(every["weight"]) > 1):
            raise ConfigError(f"layer {name!r} has another parametrization beside {kind.__name__}")
        if own:
            found[name] = (layer, own[0])
    return found


def original(layer: nn.Module) -> nn.Parameter:
    """What the parametrization of the weight is given."""
    found: nn.Parameter = layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return found


class Before(NamedTuple):
    """What of a layer `bare_` changes."""

    kind: type
    parameters: dict[str, nn.Parameter | None]
    children: dict[str, nn.Module | None]

    @classmethod
    def of(cls, layer: nn.Module) -> Before:
        """The layer as it is."""
        return cls(type(layer), dict(layer._parameters), dict(layer._modules))

    def restore(self, layer: nn.Module) -> None:
        """Make the layer what it was."""
        layer.__class__ = self.kind
        _replace(layer._parameters, self.parameters)
        _replace(layer._modules, self.children)


def bare_(layer: nn.Module, weight: nn.Parameter) -> None:
    """Give a layer this weight in the place of its only parametrization.

    torch's own way takes the property off the layer's class, which copies of the layer share.
    """
    kind = parametrize.type_before_parametrizations(layer)
    Before(kind, {"weight": weight, **layer._parameters}, {}).restore(layer)


def _replace(old: dict[str, _T], new: Mapping[str, _T]) -> None:
    old.clear()
    old.update(new)
