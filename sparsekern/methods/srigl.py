"""SRigL: RigL with a constant fan-in, and neurons that are left out.

Lasby, Golubeva, Evci, Nica, Ioannou, "Dynamic sparse training with structured sparsity", ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from sparsekern.errors import TrainingLoopError
from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.change import Decision, change
from sparsekern.methods.constant_fan_in import chosen, levelled, most_in_a_row
from sparsekern.methods.numbers import check_number
from sparsekern.methods.sources import Gradient
from sparsekern.methods.trace import Trace
from sparsekern.methods.update import drop_count, rewire
from sparsekern.nn import SparseLayer, sharded
from sparsekern.nn.init import sparse_uniform_
from sparsekern.ops import GrowScores
from sparsekern.swap.patterns import Pattern, check_known, first_match


class GradientOfRows(Gradient):
    """The dense gradient's largest magnitudes in all, and in each block row."""

    def each_row(self, name: str) -> int:
        """As many as one update can need."""
        return most_in_a_row(self.layers[name].topology)

    def found(self, name: str) -> GrowScores:
        """The scores of a layer that is ready."""
        scores = self.observers[name].scores()
        if scores is None:
            raise TrainingLoopError(f"layer {name!r} has no gradient to grow by")
        return scores


@shows_arguments
class SRigL(Method):
    """Train with SRigL; other arguments as in `Method`.

        sparsify_(model, sparsity=0.9)
        SRigL(model, optimizer, t_end=0.75, total_steps=steps, no_ablation=("head",))

    All neurons of a layer that are left have as many inputs; in blocks, all block rows as many
    blocks. A layer's number of blocks never changes, so it is constant to within one: what is left
    over goes to the most salient. The start is made so when the method is attached: where a neuron
    has too many, its smallest weights go, and the others get random ones, with values drawn as at
    initialisation.

    An update drops and grows by RigL's criteria. A neuron with fewer salient weights than
    `gamma_sal` times the layer's fan-in (its blocks shared among all block rows) is left out, and
    the others share its weights; it comes back at an update that finds enough of them. Salient are
    weights among the largest, as many as RigL keeps, or among those of largest gradient, as many as
    RigL grows. As in the authors' code, but for two things: the fan-in at most doubles in one
    update, which bounds what is remembered of the gradient, and rests are given out.

    Args:
        model: as in `Method`.
        optimizer: as in `Method`.
        gamma_sal: in [0, 1]; 0 leaves no neuron out.
        no_ablation: names of layers that keep all neurons, as globs or compiled regexes: a
            classifier's last layer loses classes.
        **arguments: of `Method`.

    Raises:
        ConfigError, DtypeError: as `Method`; or `gamma_sal` is out of its domain, or a name of
            `no_ablation` matches no layer.
    """

    source = GradientOfRows
    growth: GradientOfRows

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        gamma_sal: float = 0.3,
        no_ablation: Sequence[Pattern] = (),
        **arguments: Unpack[Arguments],
    ) -> None:
        self.gamma_sal = check_number("gamma_sal", gamma_sal, 1)
        self.no_ablation = tuple(no_ablation)
        self._grown: dict[str, Tensor] = {}  # of the update that is being decided
        super().__init__(model, optimizer, **arguments)
        try:
            check_known("no_ablation", dict.fromkeys(self.no_ablation), list(self.layers))
            if self.weight_steps == 0 and self.last_update is None:
                self._level()
        except BaseException:
            self.detach()
            raise

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:
        """The largest in all, but no more of a neuron than it may have."""
        topology, dropped = layer.topology, drop_count(layer.topology.nnzb, fraction)
        scores = self.drop_scores(name, layer)
        choice = chosen(
            topology, scores, self.growth.found(name), dropped, self._threshold(name, layer)
        )
        self._grown[name] = choice.grown
        return choice.keep

    def grown_positions(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> Tensor:  # noqa: ARG002
        """What fills up each neuron: those of largest gradient."""
        return self._grown.pop(name)

    def _threshold(self, name: str, layer: SparseLayer) -> int:
        """Salient blocks that a block row needs."""
        spared = first_match(dict.fromkeys(self.no_ablation, True), name, False)
        if not self.gamma_sal or spared:
            return 0
        fan_in = layer.topology.nnzb / layer.topology.block_rows
        return max(1, math.floor(self.gamma_sal * fan_in))

    def _level(self) -> None:
        """Make the fan-in of the start constant, where the connections are known by now."""
        layers = self.trained_layers()
        known = {n: m for n, m in layers.items() if not (m._blank or m.col.is_meta)}
        decisions = {}
        for name, layer in known.items():
            generator = self.generator(name)
            with sharded.gathered(layer):
                choice = levelled(layer.topology, self.drop_scores(name, layer), generator)
            if choice is not None:
                update = rewire(layer.topology, choice.keep, choice.grown)
                new = update.topology
                held = sharded.local(sharded.trained(layer)).detach()
                values = sparse_uniform_(held.new_empty(new.values_shape), new, generator=generator)
                dropped = choice.keep.numel() - int(choice.keep.sum())
                decisions[name] = Decision(update, dropped, values[update.source < 0])
        twins = self._twins() if decisions else {}
        nowhere = Trace(None, None)
        change(self.layers, decisions, self.optimizers, twins, nowhere, lambda *_: [])
