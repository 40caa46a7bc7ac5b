"""Static: the random topology of the start is kept."""

from __future__ import annotations

from typing import Any

import torch

from sparsekern.errors import RankMismatchError
from sparsekern.methods import ranks
from sparsekern.methods.base import Method


class Static(Method):
    """Train with a fixed topology; takes `Method`'s arguments so that methods can be swapped.

    Over several ranks nothing would tell that they hold different topologies, so they are compared
    when the method is attached (or at the first step, if the process group is made later) and, with
    the weights, every `update_freq` weight steps. A rank that saves compares with what all agreed
    on.
    """

    _agreed: dict[str, str] | None = None  # digests of the topologies
    _agreed_at = 0
    _loads_then = 0

    @property
    def due(self) -> bool:
        """Never."""
        return False

    def step(self) -> bool:
        """Compare with the other ranks now and then; returns False."""
        if self._agreed is None or self._agreed_at != self._period():
            self._agree()
        return False

    def _begin(self) -> None:
        super()._begin()
        self._agree()

    def _agree(self) -> None:
        blank = any(layer._blank or layer.col.is_meta for layer in self.layers.values())
        if blank or not ranks.is_distributed():
            return
        self._meet()
        self._compare({name: layer.topology for name, layer in self.trained_layers().items()})
        self._agreed, self._agreed_at = self._digests(), self._period()
        self._loads_then = self._count_loads()

    def _period(self) -> int:
        return self.weight_steps // self.schedule.freq

    def _count_loads(self) -> int:
        return sum(layer._loads for layer in self.layers.values())

    def _digests(self) -> dict[str, str]:
        return {name: layer.topology.digest() for name, layer in self.layers.items()}

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        agreed = self._agreed
        if agreed is not None and self._loads_then == self._count_loads():
            for name, digest in self._digests().items():
                if agreed[name] != digest:
                    raise RankMismatchError(
                        f"layer {name!r} has another topology than the ranks agreed on: digest "
                        f"{digest[:12]} against {agreed[name][:12]}"
                    )
        super()._save(optimizer, state)
