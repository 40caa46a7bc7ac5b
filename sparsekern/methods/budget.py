"""How many blocks grow in each layer: exactly as many in all as were dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsekern.errors import ConfigError
from sparsekern.methods.sources import Source
from sparsekern.nn import SparseLayer

Budget = Callable[[Mapping[str, int], Mapping[str, SparseLayer], Source], dict[str, int]]
"""From how many blocks each layer dropped, the layers by name, and what growth looks at (for its
statistics): how many each layer grows."""


def same(
    dropped: Mapping[str, int], _layers: Mapping[str, SparseLayer], _source: Source
) -> dict[str, int]:
    """Each layer grows what it dropped."""
    return dict(dropped)


def check_exact(dropped: Mapping[str, int], grown: Mapping[str, int]) -> None:
    """Raise `ConfigError` unless each layer grows what it dropped: its size can't change."""
    if dict(grown) != dict(dropped):
        raise ConfigError(
            f"a budget must let each layer grow what it dropped, {dict(dropped)}; got {dict(grown)}"
        )
