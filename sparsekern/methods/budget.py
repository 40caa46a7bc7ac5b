"""How many blocks grow in each layer. In all, as many grow as the method says, to the block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from sparsekern.errors import ConfigError
from sparsekern.methods.source import Source
from sparsekern.nn import SparseLayer

Counts = Mapping[str, int]
Budget = Callable[[Counts, Mapping[str, SparseLayer], Source], dict[str, int]]
"""From how many blocks each layer dropped, the layers by name, and what growth looks at (for its
statistics): how many each layer grows."""

FULL = Fraction(99, 100)
"""Share of its free places that redistribution fills in a layer, as in the code of SNFS."""


def same(dropped: Counts, _layers: Mapping[str, SparseLayer], _source: Source) -> dict[str, int]:
    """Each layer grows what it dropped."""
    return dict(dropped)


def proportional(
    dropped: Counts, layers: Mapping[str, SparseLayer], source: Source
) -> dict[str, int]:
    """Layers grow in proportion to a statistic of the source (Dettmers & Zettlemoyer 2019).

    What would fill more than 99 % of a layer's free places goes in equal parts to the others, in
    the exact limit of the authors' loop. Where the statistic is zero in all layers, as an
    optimizer's momentum is before the first step, each grows what it dropped.
    """
    found = {name: source.statistic(name) for name in dropped}
    if not any(found.values()):
        return dict(dropped)
    free = rooms(dropped, layers)
    return shared_out(found, free, least_grown(dropped, layers), sum(dropped.values()), FULL)


def by_survivors(
    dropped: Counts, layers: Mapping[str, SparseLayer], _source: Source
) -> dict[str, int]:
    """Layers grow in proportion to how many blocks survived in them (Mostafa & Wang 2019)."""
    left = {name: layers[name].topology.nnzb - n for name, n in dropped.items()}
    if not any(left.values()):
        return dict(dropped)
    least = least_grown(dropped, layers)
    return shared_out(left, rooms(dropped, layers), least, sum(dropped.values()))


def rooms(dropped: Counts, layers: Mapping[str, SparseLayer]) -> dict[str, int]:
    """How many blocks each layer could grow: free places, those just dropped among them."""
    held = {name: layers[name].topology for name in dropped}
    return {name: t.grid.total - t.nnzb + dropped[name] for name, t in held.items()}


def least_grown(dropped: Counts, layers: Mapping[str, SparseLayer]) -> dict[str, int]:
    """How many it must: a layer that has blocks keeps at least one."""
    held = {name: layers[name].topology.nnzb for name in dropped}
    return {name: int(held[name] == n and n > 0) for name, n in dropped.items()}


def shared_out(
    shares: Mapping[str, float],
    room: Counts,
    least: Counts,
    total: int,
    full: Fraction = Fraction(1),
) -> dict[str, int]:
    """Share `total` out in proportion to `shares`, in whole numbers whose sum is exact.

    Args:
        shares: finite, not negative, not all zero.
        room: the most that each can take.
        least: that each must take.
        total: at most the sum of the rooms.
        full: share of the room that is taken; all of it where the total would not fit.
    """
    caps = {name: full * n for name, n in room.items()}
    if sum(map(math.floor, caps.values())) < total:
        caps = {name: Fraction(n) for name, n in room.items()}
    ideal = _limit(shares, caps, total)
    most = {name: max(math.floor(cap), least[name]) for name, cap in caps.items()}
    counts = {n: min(max(math.floor(x), least[n]), most[n]) for n, x in ideal.items()}
    # largest remainders; of equal ones the larger share first
    while (left := total - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        bound = most if left > 0 else least
        able = [name for name in counts if counts[name] != bound[name]]
        able.sort(key=lambda n: ((ideal[n] - counts[n]) * step, ideal[n] * step), reverse=True)
        for name in able[: abs(left)]:
            counts[name] += step
    return counts


def _limit(
    shares: Mapping[str, float], caps: Mapping[str, Fraction], total: int
) -> dict[str, Fraction]:
    """In proportion, but what is above a cap goes in equal parts to all below theirs."""
    exact = {name: Fraction(share) for name, share in shares.items()}
    whole = sum(exact.values())
    given = {name: total * share / whole for name, share in exact.items()}
    while excess := sum((max(given[n] - cap, Fraction(0)) for n, cap in caps.items()), Fraction(0)):
        given = {name: min(given[name], cap) for name, cap in caps.items()}
        below = [name for name, cap in caps.items() if given[name] < cap]
        if not below:
            break
        for name in below:
            given[name] += excess / len(below)
    return given


def check_exact(
    dropped: Counts, grown: Counts, layers: Mapping[str, SparseLayer], size: int
) -> None:
    """Raise `ConfigError` unless each layer has room for what it grows, and keeps a block.

    Args:
        dropped: blocks, by layer.
        grown: the budget's answer.
        layers: by name.
        size: active blocks that all these layers together must have then.
    """
    if dropped.keys() != grown.keys():
        raise ConfigError(
            f"a budget must say what grows in each of {sorted(dropped)}; got {dict(grown)}"
        )
    kept = {name: layers[name].topology.nnzb - n for name, n in dropped.items()}
    least = least_grown(dropped, layers)
    for name, room in rooms(dropped, layers).items():
        n = grown[name]
        if type(n) is not int or not least[name] <= n <= room:
            raise ConfigError(
                f"a budget must let layer {name!r} grow an int in [{least[name]}, {room}]; "
                f"got {n!r}"
            )
    asked = size - sum(kept.values())
    if sum(grown.values()) != asked:
        raise ConfigError(
            f"a budget must let {asked} blocks grow in all, where {dict(dropped)} are dropped; "
            f"got {sum(grown.values())}: {dict(grown)}"
        )
