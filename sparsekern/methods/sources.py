"""Sources of growth: chance, and the dense gradient of one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.source import Observing, Source
from sparsekern.methods.update import grow_largest, grow_random
from sparsekern.ops import GrowScores


class Random(Source):
    """Chance: uniform over all free positions, the same on every rank and implementation."""

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Any free positions."""
        return grow_random(self.layers[name].topology, keep, n, generator).to(keep.device)


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
        return float(self._scores(name).active.double().sum()) / max(self.layers[name].nnz, 1)

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
