"""Copies of layers: which layer each was made of, and which of them hold the same connections.

All of it is weak and stays in the process: a copy keeps no layer alive, and a pickle forgets.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
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
    """The layer that a copy was made of, held weakly, and that one's own origin.

    Copies of one call of `copy.deepcopy` know of each other: a model's, and its average's.
    """

    def __init__(self, layer: HeldTopology | None = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)
        self._before = None if layer is None else layer._origin
        self._call: object = None  # of deepcopy, that made the copy

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

    def source(self, is_average: Callable[[HeldTopology], bool]) -> HeldTopology | None:
        """The layer whose weights a copy averages: the nearest ancestor that is no average.

        A copy of an average that was copied together with its model averages the model's copy.
        """
        parent = None if self._layer is None else self._layer()
        if self._before is None or (parent is not None and not is_average(parent)):
            return parent
        older = [origin._layer for origin in self._before.chain()]
        found = []
        for layer in alive() if self._call is not None else ():
            origin = layer._origin
            if origin is not None and origin._call is self._call and not is_average(layer):
                for distance, one in enumerate(origin.chain()):
                    if one._layer is not None and one._layer in older:
                        found.append((older.index(one._layer), distance, layer))
                        break
        if found:
            return min(found, key=lambda item: item[:2])[2]
        return self._before.source(is_average)

    def is_near(self, source: HeldTopology) -> bool:
        """Whether the copy was made of this layer, or of an average of what that was made of."""
        made = source._origin
        together = made is not None and self._call is not None and made._call is self._call
        return together or self.is_of(source)

    def chain(self) -> Iterator[Origin]:
        """This one and those before it."""
        at: Origin | None = self
        while at is not None:
            yield at
            at = at._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        copied = Origin()
        copied._layer, copied._before = self._layer, self._before
        copied._call = memo.setdefault(id(Origin), object())
        return copied

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
