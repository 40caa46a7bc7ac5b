"""What growth looks at, to find the positions that a layer grows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.observer import GradientObserver, Seen
from sparsekern.methods.update import grow_largest, grow_random
from sparsekern.nn import SparseLayer
from sparsekern.ops import GrowScores

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


class Random(Source):
    """Chance: uniform over all free positions, the same on every rank and implementation."""

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Any free positions."""
        return grow_random(self.layers[name].topology, keep, n, generator).to(keep.device)


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


class Gradient(Observing):
    """The dense gradient of the batch that an update spends: its largest magnitudes.

    It is streamed slab by slab inside backward, one layer at a time; on all other batches nothing
    dense is computed. Over several backward passes the signed gradients are summed first. So they
    are over ranks, at the update and not inside backward: ranks have to agree first on which layers
    take part, so each holds the inputs and output gradients of its layers until then.
    """

    dense_at = "updates"

    def watch(self, most: Mapping[str, int]) -> None:
        """Observe the gradients of the layers in `most`, and keep the best candidates of each."""
        self._observe(most)

    def ready(self, names: Iterable[str], step: int, last: int | None) -> frozenset[str]:
        """The layers that have a gradient; none if one of those is not finite or not all seen.

        Raises:
            TrainingLoopError: there were more backward passes than were declared.
        """
        seen, problems = self._seen(names)
        if problems or not seen:
            self._postpone(step, last, problems or "no layer has a gradient")
            return frozenset()
        reduce = ranks.sum_over_ranks if ranks.is_distributed() else None
        scores: dict[str, GrowScores | None] = {}
        for name in seen:
            with ranks.naming(f"layer {name!r}, summing its gradient over ranks"):
                scores[name] = self.observers[name].scores(reduce)
        broken = [name for name, s in scores.items() if s is not None and not s.is_finite()]
        if broken:
            self._postpone(step, last, f"the gradient of {broken} is not finite")
            return frozenset()
        return frozenset(seen)

    def facts(self, name: str) -> Mapping[str, Tensor]:
        """The scores, of active blocks and of candidates, and where those stand."""
        found = self.observers[name].scores()
        if found is None:
            return {}
        return {"score": found.active, "candidate": found.positions, "best score": found.scores}

    def statistic(self, name: str) -> float:
        """Mean |gradient| over active weights; of blocks by another norm than l1, mean score."""
        return float(self._scores(name).active.double().sum()) / self.layers[name].nnz

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The free positions where the gradient is largest."""
        scores, k = self._scores(name), self.observers[name].k
        if n > k == scores.positions.numel():
            raise ConfigError(
                f"layer {name!r} grows {n} blocks, but the gradient was searched for the best "
                f"{k}: `most_grown` must say how many"
            )
        return grow_largest(self.layers[name].topology, keep, n, scores)

    def _scores(self, name: str) -> GrowScores:
        scores = self.observers[name].scores()
        if scores is None:
            raise TrainingLoopError(f"layer {name!r} has no gradient to grow by")
        return scores
