"""GraNet: prune gradually from half, and regrow where the gradient is largest at each update.

Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu, "Sparse training via boosting
pruning plasticity with neuroregeneration", NeurIPS 2021, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.change import Decision
from sparsekern.methods.schedule import CubicSchedule, UpdateSchedule
from sparsekern.methods.sources import Gradient
from sparsekern.methods.update import drop_count, drop_smallest
from sparsekern.nn import SparseLayer
from sparsekern.topology.blocks import active_count
from sparsekern.topology.select import top_k_mask


@shows_arguments
class GraNet(Method):
    """Train from `initial_sparsity` to `sparsity`; other arguments as in `Method`.

        sparsify_(model, GraNet.initial_sparsity, distribution=GraNet.initial_distribution)
        GraNet(model, optimizer, sparsity=0.95, t_end=int(0.75 * steps))

    After the weight step, each update first prunes by magnitude over all layers together, to the
    cubic schedule of gradual pruning; the last one comes at `t_end`. Then each layer replaces
    `drop_fraction` of what is left, decayed, by as many where the gradient is largest. Weights are
    counted over the sparse layers that train: what is dense at first stays so, as small layers do
    by ERK at 50 %. Layers hold only what is active, so a step gets cheaper as they
    shrink. Only the batch of an update costs a dense gradient.

    Args:
        model: see `Method`; no wrapper may count on the sizes of its parameters.
        optimizer: see `Method`.
        sparsity: at the end, of all these layers together.
        initial_sparsity: of the schedule's start; None for the class's own.

    Raises:
        ConfigError: as `Method`; or the layers have several block sizes, or can't be resized.
    """

    source = Gradient
    resizes = True
    default_step_on_update = True
    defaults: ClassVar[Arguments] = {"drop_fraction": 0.5}
    initial_sparsity: ClassVar[float] = 0.5
    """That a model should have before."""
    initial_distribution: ClassVar[str] = "uniform"
    """By which no layer is left dense."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        sparsity: float,
        initial_sparsity: float | None = None,
        **arguments: Unpack[Arguments],
    ) -> None:
        initial = self.initial_sparsity if initial_sparsity is None else initial_sparsity
        self._ends = sparsity, initial
        CubicSchedule(sparsity, 0, 1, initial=initial)  # checks them before anything else
        super().__init__(model, optimizer, **self.defaults | arguments)

    def scheduled(
        self, t_end: int, freq: int, drop_fraction: float, first: int, decay: str
    ) -> UpdateSchedule:
        """RigL's, and that of the sparsity."""
        sparsity, initial = self._ends
        self.pruning = CubicSchedule(sparsity, first, t_end, freq, initial)
        return super().scheduled(t_end, freq, drop_fraction, first, decay)

    @property
    def due(self) -> bool:
        """Whether the next optimizer step is an update step; one is at `t_end`, or after it."""
        return self.pruning.is_due(self.weight_steps, self.last_update)

    def decide(self, fraction: float) -> dict[str, Decision]:
        """What an update by this share would do to each layer; changes nothing."""
        self._left = self._pruned()
        return super().decide(fraction)

    def _pruned(self) -> dict[str, int]:
        """How many blocks pruning leaves in each layer: the largest of all, one at least."""
        layers = self.updated_layers()
        scores = [self.drop_scores(name, layer).cpu() for name, layer in layers.items()]
        for one in filter(len, scores):
            one[one.argmax()] = torch.inf
        total = sum(layer.topology.grid.total for layer in layers.values())
        wanted = active_count(total, self.pruning.at(self.weight_steps))
        stays = top_k_mask(torch.cat(scores), max(wanted, len(layers)))
        parts = torch.split(stays, [len(one) for one in scores])
        return {name: int(part.sum()) for name, part in zip(layers, parts, strict=True)}

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:
        """The largest, after pruning and before regrowth."""
        left, scores = self._left[name], self.drop_scores(name, layer)
        kept = left - drop_count(left, fraction)
        return drop_smallest(scores, scores.numel() - kept)

    def most_grown(self, name: str, layer: SparseLayer, fraction: float) -> int:  # noqa: ARG002
        """What a layer would replace if nothing were pruned."""
        return drop_count(layer.topology.nnzb, fraction)

    def grown_counts(
        self, dropped: Mapping[str, int], layers: Mapping[str, SparseLayer]
    ) -> dict[str, int]:
        """As many as pruning leaves, less those that survive."""
        return {n: self._left[n] - layers[n].topology.nnzb + k for n, k in dropped.items()}

    def size_after(self, layers: Mapping[str, SparseLayer]) -> int:
        """What the schedule says."""
        return sum(self._left[name] for name in layers)
