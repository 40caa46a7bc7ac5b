"""RigL: drop the smallest weights, grow where the dense gradient is largest.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
Algorithm 1.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from sparsekern.errors import TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.base import Method, log
from sparsekern.methods.observer import GradientObserver
from sparsekern.methods.update import drop_count, grow_largest
from sparsekern.nn import SparseLayer


class RigL(Method):
    """Train with RigL; arguments as in `Method`.

        sparsify_(model, sparsity=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        RigL(model, optimizer, t_end=int(0.75 * steps))   # the loop stays as it is

    On the batch of an update the dense gradient is streamed slab by slab inside backward, one layer
    at a time; on all other batches nothing dense is computed. Over several micro-batches
    (`grad_accumulation`) the score is the magnitude of their summed gradient, as if they were one
    batch. Over several ranks the signed gradients are summed first. An update whose gradient is not
    finite does not happen; it waits for the next batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.observers: dict[str, GradientObserver] = {}
        self._postponed: int | None = -1
        super().__init__(*args, **kwargs)

    def arm(self, due: bool) -> None:
        """Observe gradients on batches that an update will spend."""
        if due and not self.observers:
            reduce = ranks.sum_over_ranks if ranks.is_distributed() else None
            self.observers = {
                name: GradientObserver(layer, self.norm, self.grad_accumulation, reduce)
                for name, layer in self.layers.items()
            }
        trained = self.trained_layers()
        fraction = self.schedule.fraction(self.weight_steps)
        for name, observer in self.observers.items():
            if due and name in trained:
                observer.arm(drop_count(self.layers[name].topology.nnzb, fraction))
            else:
                observer.disarm()

    def is_ready(self) -> bool:
        """Whether every layer's gradient was seen and is finite."""
        observers = {name: self.observers[name] for name in self.trained_layers()}
        for name, observer in observers.items():
            if observer.rounds > self.grad_accumulation:
                raise TrainingLoopError(
                    f"layer {name!r} saw {observer.rounds} backward passes before a topology "
                    f"update; expected {self.grad_accumulation} (argument `grad_accumulation`)"
                )
        scores = {name: observer.scores() for name, observer in observers.items()}
        missing = [name for name, s in scores.items() if s is None]
        broken = [name for name, s in scores.items() if s is not None and not s.is_finite()]
        if missing or broken:
            # once for each update that is due, not once for each batch it waits
            level = logging.DEBUG if self._postponed == self.last_update else logging.WARNING
            log.log(
                level,
                "update at weight step %d postponed: no gradient for %s, not finite for %s",
                self.weight_steps,
                missing,
                broken,
            )
            self._postponed = self.last_update
            self._prepare()
        return not (missing or broken)

    def grown_positions(self, name: str, layer: SparseLayer, keep: Tensor) -> Tensor:
        """The non-survivors with the largest dense gradient."""
        scores = self.observers[name].scores()
        if scores is None:
            raise TrainingLoopError(f"layer {name!r} has no gradient to grow by")
        return grow_largest(layer.topology, keep, scores)
