"""`Source`: what growth looks at, and what a source asks of the gradients of its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.errors import TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.observer import GradientObserver, Seen
from sparsekern.nn import SparseLayer

log = logging.getLogger(__name__)


class Source:
    """Base of what growth looks at; by itself it sees nothing, so it is always ready.

    Args:
        layers: the sparse layers of a method, by name.
        norm: how a block's entries become one score.
        passes: backward passes per optimizer step.
    """

    dense_at: ClassVar[str] = "never"
    """When a dense gradient is computed: "never", on batches of "updates", or in all "steps"."""
    optimizers: Sequence[torch.optim.Optimizer] = ()
    """Those of the method, which it sets."""

    def __init__(self, layers: Mapping[str, SparseLayer], norm: str, passes: int) -> None:
        self.layers, self.norm, self.passes = layers, norm, passes

    def watch(self, most: Mapping[str, int]) -> None:
        """Called before each batch.

        Args:
            most: layers that an update of this batch will ask about, and how many blocks each of
                them can grow at most; empty if no update is due.
        """

    def rest(self) -> None:
        """Called when the method is detached."""
        self.watch({})

    def see(self, names: Iterable[str]) -> None:
        """Called once before each weight step, by all ranks, when the gradients are there.

        Args:
            names: of the layers that train.
        """

    def ready(self, names: Iterable[str], step: int, last: int | None) -> frozenset[str]:  # noqa: ARG002
        """Those of these layers that a due update can change; if none, it waits for a batch.

        The same on all ranks, which all call it.

        Args:
            names: of the layers.
            step: the weight step of the update.
            last: that of the one before.
        """
        return frozenset(names)

    def facts(self, name: str) -> Mapping[str, Tensor]:  # noqa: ARG002
        """What it found out of a layer, equal on all ranks, by what to call it in a message."""
        return {}

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """The positions, (n,) int64, that a layer should grow.

        Args:
            name: of the layer.
            keep: (nnzb,) bool, the survivors of the drop; all other positions are free.
            n: how many to grow.
            generator: for what is random; equal on every rank and after a resume.
        """
        raise NotImplementedError(f"{type(self).__name__} has no positions to grow")

    def statistic(self, name: str) -> float:
        """What budgets share growth out by: of a layer's active weights, finite, not negative."""
        raise NotImplementedError(f"{type(self).__name__} has no statistic of layer {name!r}")

    def state(self) -> dict[str, Tensor]:
        """What it holds from step to step, to be saved with the method."""
        return {}

    def load_state(self, state: Mapping[str, Tensor], write: bool = True) -> None:
        """Take what `state` gave; without `write` only check that it could be taken.

        Raises:
            ConfigError: it does not fit the layers.
        """
        if state and write:
            log.warning("%s needs nothing of the state %s", type(self).__name__, sorted(state))

    def bytes(self) -> int:
        """Memory that it holds from step to step."""
        return sum(t.numel() * t.element_size() for t in self.state().values())


class Observing(Source):
    """Base of sources that look at dense gradients, layer by layer."""

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        norm: str,
        passes: int,
        hold: Callable[[], bool] = ranks.is_distributed,
    ) -> None:
        super().__init__(layers, norm, passes)
        self.observers = {n: GradientObserver(m, norm, passes, hold) for n, m in layers.items()}
        self._postponed: int | None = -1
        self._told_few = False

    def each_row(self, name: str) -> int:  # noqa: ARG002
        """How many of the best inactive blocks of each block row are wanted besides."""
        return 0

    def _observe(self, most: Mapping[str, int]) -> None:
        for name, observer in self.observers.items():
            if name in most:
                observer.arm(most[name], self.each_row(name))
            else:
                observer.disarm()

    def _seen(self, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """Layers that have a gradient on some rank, and problems with gradients; on all ranks.

        Raises:
            TrainingLoopError: there were more backward passes than were declared.
        """
        everyone = ranks.gather({name: self.observers[name].seen() for name in names})
        self._check_passes(everyone)
        seen = [name for name in everyone[0] if any(mine[name].passes for mine in everyone)]
        return seen, {n: s.problem for mine in everyone for n, s in mine.items() if s.problem}

    def _check_passes(self, everyone: list[dict[str, Seen]]) -> None:
        for rank, mine in enumerate(everyone):
            for name, seen in mine.items():
                if seen.passes > self.passes:
                    where = f" on rank {rank}" if len(everyone) > 1 else ""
                    raise TrainingLoopError(
                        f"layer {name!r} saw {seen.passes} backward passes{where} before a "
                        f"topology update; expected {self.passes} (argument `grad_accumulation`)"
                    )
        # an expert sees some of the micro-batches only; but no layer saw them all
        most = max((seen.passes for mine in everyone for seen in mine.values()), default=0)
        if 0 < most < self.passes and not self._told_few:
            text = (
                "a topology update uses the gradient of %d backward passes; expected %d (argument"
            )
            log.warning(text + " `grad_accumulation`); told once", most, self.passes)
            self._told_few = True

    def _postpone(self, step: int, last: int | None, why: object) -> None:
        # once for each update that is due, not once for each batch it waits
        level = logging.DEBUG if self._postponed == last else logging.WARNING
        log.log(level, "update at weight step %d postponed: %s", step, why)
        self._postponed = last
