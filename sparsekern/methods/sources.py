"""What growth looks at, to find the positions that a layer grows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.observer import GradientObserver
from sparsekern.methods.update import grow_largest, grow_random
from sparsekern.nn import SparseLayer

log = logging.getLogger(__name__)


class Source:
    """Base of what growth looks at; by itself it sees nothing, so it is always ready.

    Args:
        layers: the sparse layers of a method, by name.
        norm: how a block's entries become one score.
        passes: backward passes per optimizer step.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], norm: str, passes: int) -> None:
        self.layers, self.norm, self.passes = layers, norm, passes

    def watch(self, most: Mapping[str, int]) -> None:
        """Called before each batch.

        Args:
            most: layers that an update of this batch will ask about, and how many blocks each of
                them can grow at most; empty if no update is due.
        """

    def ready(self, names: Iterable[str], step: int, last: int | None) -> bool:  # noqa: ARG002
        """Whether a due update of these layers can be decided; if not, it waits for a batch.

        Args:
            names: of the layers.
            step: the weight step of the update.
            last: that of the one before.
        """
        return True

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """The positions, (n,) int64, that a layer should grow.

        Args:
            name: of the layer.
            keep: (nnzb,) bool, the survivors of the drop; all other positions are free.
            n: how many to grow.
            generator: for what is random; equal on every rank and after a resume.
        """
        raise NotImplementedError(f"{type(self).__name__} has no positions to grow")


class Random(Source):
    """Chance: uniform over all free positions, the same on every rank and implementation."""

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Any free positions."""
        return grow_random(self.layers[name].topology, keep, n, generator).to(keep.device)


class Gradient(Source):
    """The dense gradient of the batch that an update spends: its largest magnitudes.

    It is streamed slab by slab inside backward, one layer at a time; on all other batches nothing
    dense is computed. Over several backward passes and ranks the signed gradients are summed first.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], norm: str, passes: int) -> None:
        super().__init__(layers, norm, passes)
        self.observers = {n: GradientObserver(m, norm, passes) for n, m in layers.items()}
        self._postponed: int | None = -1

    def __getstate__(self) -> dict[str, Any]:
        # a copy observes the copied layers by observers of its own
        return {k: v for k, v in self.__dict__.items() if k != "observers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.observers = {
            n: GradientObserver(m, self.norm, self.passes) for n, m in self.layers.items()
        }

    def watch(self, most: Mapping[str, int]) -> None:
        """Observe the gradients of the layers in `most`, and keep the best candidates of each."""
        reduce = ranks.sum_over_ranks if most and ranks.is_distributed() else None
        for name, observer in self.observers.items():
            if name in most:
                observer.arm(most[name], reduce)
            else:
                observer.disarm()

    def ready(self, names: Iterable[str], step: int, last: int | None) -> bool:
        """Whether each layer's gradient was seen and is finite.

        Raises:
            TrainingLoopError: there were more backward passes than were declared.
        """
        observers = {name: self.observers[name] for name in names}
        for name, observer in observers.items():
            if observer.rounds > self.passes:
                raise TrainingLoopError(
                    f"layer {name!r} saw {observer.rounds} backward passes before a topology "
                    f"update; expected {self.passes} (argument `grad_accumulation`)"
                )
        scores = {name: observer.scores() for name, observer in observers.items()}
        missing = [name for name, s in scores.items() if s is None]
        broken = [name for name, s in scores.items() if s is not None and not s.is_finite()]
        if missing or broken:
            # once for each update that is due, not once for each batch it waits
            level = logging.DEBUG if self._postponed == last else logging.WARNING
            text = "update at weight step %d postponed: no gradient for %s, not finite for %s"
            log.log(level, text, step, missing, broken)
            self._postponed = last
        return not (missing or broken)

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The free positions where the gradient is largest."""
        observer = self.observers[name]
        scores = observer.scores()
        if scores is None:
            raise TrainingLoopError(f"layer {name!r} has no gradient to grow by")
        if n > observer.k == scores.positions.numel():
            raise ConfigError(
                f"layer {name!r} grows {n} blocks, but the gradient was searched for the best "
                f"{observer.k}: `most_grown` must say how many"
            )
        return grow_largest(self.layers[name].topology, keep, n, scores)
