"""Who holds on to layers: a method that follows one must not lose it without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn


class Follower(Protocol):
    """What follows layers, as a training method does."""

    @property
    def attached(self) -> bool:
        """Whether it still does."""

    @property
    def layers(self) -> Mapping[str, Any]:
        """Those that it follows, by name."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """What trains them."""

    @property
    def followed(self) -> Sequence[Any]:
        """Averages of them that were named."""

    def look_again(self) -> None:
        """A layer has another size now."""

    def __hash__(self) -> int: ...


_followers: WeakKeyDictionary[nn.Module, WeakSet[Follower]] = WeakKeyDictionary()


def follows(follower: Follower, layers: Iterable[nn.Module]) -> None:
    """Note that `follower` holds on to these layers."""
    for layer in layers:
        _followers.setdefault(layer, WeakSet()).add(follower)


def follower_of(layer: nn.Module) -> Follower | None:
    """Who is attached to a layer now, if anybody is."""
    return next((f for f in _followers.get(layer, ()) if f.attached), None)
