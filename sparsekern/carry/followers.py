"""Who holds on to layers: a method that follows one must not lose it without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn


class Follower(Protocol):
    """What follows layers, as a training method does."""

    @property
    def attached(self) -> bool:
        """Whether it still does."""

    def __hash__(self) -> int: ...


_followers: WeakKeyDictionary[nn.Module, WeakSet[Follower]] = WeakKeyDictionary()


def follows(follower: Follower, layers: Iterable[nn.Module]) -> None:
    """Note that `follower` holds on to these layers."""
    for layer in layers:
        _followers.setdefault(layer, WeakSet()).add(follower)


def follower_of(layer: nn.Module) -> Follower | None:
    """Who is attached to a layer now, if anybody is."""
    return next((f for f in _followers.get(layer, ()) if f.attached), None)
