"""Copies of layers: which layer each was made of, and which of them hold the same connections.

All of it is weak and stays in the process: a copy keeps no layer alive, and a pickle forgets.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

import torch

if TYPE_CHECKING:
    from sparsekern.nn.held import HeldTopology

_alive: WeakSet[HeldTopology] = WeakSet()
_births: Counter[str] = Counter()


class Era:
    """One topology's time in a layer, compared by identity: it ends when the library changes it.

    Copies share it, so layers of one era hold the same connections unless someone else wrote to
    their index arrays.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Era], tuple[()]]:
        return Era, ()


class Origin:
    """The layer that a copy was made of, held weakly, and that one's own origin."""

    def __init__(self, layer: HeldTopology | None = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)
        self._before = None if layer is None else layer._origin

    def ancestors(self) -> Iterator[HeldTopology]:
        """Those that are alive, nearest first."""
        at: Origin | None = self
        while at is not None:
            layer = None if at._layer is None else at._layer()
            if layer is not None:
                yield layer
            at = at._before

    def is_of(self, layer: HeldTopology) -> bool:
        """Whether the copy was made of this very layer."""
        return self._layer is not None and self._layer() is layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Of an average that is copied after its model, in one go: the copied model's layer."""
        source = (
            None if self._before is None or self._before._layer is None else self._before._layer()
        )
        twin = memo.get(id(source))
        if source is None or type(twin) is not type(source):
            return self
        made = Origin()
        made._layer, made._before = weakref.ref(twin), self
        return made

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()


def register(layer: HeldTopology) -> None:
    """Take note of a new layer, made or copied."""
    _alive.add(layer)
    _births["layers"] += 1


def born() -> int:
    """How many layers there have been: nothing new can hold one as long as it stays the same."""
    return _births["layers"]


def alive() -> list[HeldTopology]:
    """All layers there are."""
    return list(_alive)


def same_connections(layer: HeldTopology, other: HeldTopology) -> bool:
    """Whether all index arrays of two layers have equal entries, on whatever devices."""
    mine, theirs = layer._held(), other._held()
    if mine.layout != theirs.layout:
        return False
    pairs = zip(mine.arrays, theirs.arrays, strict=True)
    return all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)


def join_era(layer: HeldTopology) -> None:
    """Begin an era, or share that of a relative which holds the same connections."""
    layer._era = Era()
    if not layer._related or layer.col.is_meta:
        return
    for other in alive():
        known = other is not layer and other._related and not other.col.is_meta
        if known and same_connections(layer, other):
            layer._era = other._era
            return
