"""The layers that a method holds on to, and whether they are still those that it knew."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsekern.carry.optimizer_state import moving_state
from sparsekern.carry.wrappers import check_holds
from sparsekern.methods.joining import Joins
from sparsekern.nn import SparseLayer, sharded

log = logging.getLogger(__name__)


class Holds(Joins):
    """A loop with sparse layers, by name."""

    def __init__(self, layers: dict[str, SparseLayer], *loop: Any) -> None:
        self.layers = layers
        self._loads = {name: layer._loads for name, layer in layers.items()}
        self._held = {n: sharded.trained(m) for n, m in self.trained_layers().items()}
        super().__init__(*loop)

    def trained_layers(self) -> dict[str, SparseLayer]:
        """The layers that take part now: those whose values are not frozen."""
        return {n: m for n, m in self.layers.items() if sharded.trained(m).requires_grad}

    def _sharded(self) -> bool:
        return any(sharded.is_sharded(sharded.trained(m)) for m in self.trained_layers().values())

    def _weights(self) -> Iterable[nn.Parameter]:
        return map(sharded.trained, self.layers.values())

    def _takes_part(self) -> bool:
        layers = self.trained_layers()
        for name in layers:
            self._check_held(name)
        return bool(layers)

    def _check_held(self, name: str) -> None:
        values = sharded.trained(self.layers[name])
        if self._held.get(name) is not values:  # unfrozen since, or another parameter
            check_holds(self.optimizers, name, values)
            self._held[name] = values

    def _check_loads(self, with_state: bool) -> None:
        """Say that optimizer state belongs to other connections than the layers have."""
        for layer in self.layers.values():
            if not layer._blank:
                _ = layer.topology  # what was written into the arrays is seen now, if not before
        if self._state_of is not None and self._state_of != self._connections():
            log.warning(
                "the optimizer's state was saved with other connections than the model has now, so "
                "it belongs to other weights; load the model that was saved with it"
            )
        self._state_of = None
        loads = {name: layer._loads for name, layer in self.layers.items()}
        if loads == self._loads:
            return
        changed = {n: m for n, m in self.layers.items() if loads[n] != self._loads[n]}
        for name in changed.keys() & self.trained_layers().keys():
            self._check_held(name)
        late = [
            name
            for name, layer in changed.items()
            if not with_state and moving_state(self.optimizers, name, sharded.trained(layer))
        ]
        self._loads = loads
        if late:
            log.warning(
                "other connections were loaded into %s, but no optimizer state: what the optimizer "
                "holds belongs to the old ones; load its state too, or build it anew",
                late,
            )

    def _connections(self) -> str | None:
        layers = self.layers.values()
        if any(layer._blank or layer.col.is_meta for layer in layers):
            return None
        digests = "".join(layer.topology.digest() for layer in layers)
        return hashlib.sha256(digests.encode()).hexdigest()
