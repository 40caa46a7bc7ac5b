"""Top-KAST: forward by the largest weights, gradients for some more.

Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K always sparse training", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import nn

from sparsekern.errors import ConfigError
from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.numbers import check_number, learning_rate
from sparsekern.methods.reserve import Reserve
from sparsekern.methods.update import drop_count, drop_smallest
from sparsekern.nn import SparseLayer
from sparsekern.topology.select import top_k_mask

EXPLORE = ("random", "none")


@shows_arguments
class TopKAST(Method):
    """Train with Top-KAST; other arguments as in `Method`.

    The layers' connections are the backward set B, of the density D + M that `sparsify_` gave
    them. The forward pass goes over the forward set A, those of largest magnitude in B, of density
    D; it and the gradient of the inputs see the others as zeros. All of B gets the gradient of its
    weights and takes the optimizer's step. A is chosen anew every `update_freq` weight steps, by
    topology updates and after the last one too. After each step weights are drawn to zero by
    `lr * penalty`, those of B without A by 1/D times that.

    `layer.values`, its state and averages of it are the forward weights, with zeros in B without A;
    `weights(name)` are all, and the optimizer's `state_dict` holds what the layer does not. A step
    costs what it costs at the density of B, and nothing dense is ever computed.

    What differs from the paper: weights outside of B do not exist here, where the paper keeps them
    and lets one into B that has become larger than one of B. In its stead, at each topology update
    `drop_fraction` of B without A, the smallest, give way to random positions (explore="random"),
    which come in at zero and with no optimizer state; or B stays as it is ("none"). The penalty is
    taken beside the gradient, as AdamW takes weight decay, and stops at zero.

    Args:
        model: as in `Method`.
        optimizer: as in `Method`; its learning rate for `values` is meant by `lr`.
        forward_share: D / (D + M), share of each layer's blocks that are in A; at least one is.
        penalty: strength of the pull to zero.
        explore: "random" or "none".
        **arguments: of `Method`.

    Raises:
        ConfigError, DtypeError: as `Method`; or an argument is out of its domain, or the weights
            are sharded.
    """

    source = Reserve
    growth: Reserve
    default_step_on_update = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        forward_share: float = 0.5,
        penalty: float = 1e-4,
        explore: str = "random",
        **arguments: Unpack[Arguments],
    ) -> None:
        self.forward_share = check_number("forward_share", forward_share, 1)
        self.penalty, self.explore = check_number("penalty", penalty), explore
        if explore not in EXPLORE:
            raise ConfigError(f"`explore` must be one of {EXPLORE}; got {explore!r}")
        super().__init__(model, optimizer, **arguments)
        if self._sharded():
            self.detach()
            raise ConfigError("Top-KAST keeps values apart, which it can't of sharded weights")
        for name, layer in self.trained_layers().items():
            if name not in self.growth.apart and not (layer._blank or layer.col.is_meta):
                self._choose(name, layer)

    def weights(self, name: str) -> torch.Tensor:
        """(nnzb, bh, bw): the weights of the backward set of a layer, in CSR order."""
        return self.growth.all_values(name)

    def forward_blocks(self, layer: SparseLayer) -> int:
        """How many blocks of a layer are in the forward set."""
        return max(1, round(self.forward_share * layer.topology.nnzb))

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> torch.Tensor:
        """All, or all but some of the smallest outside of the forward set."""
        outside = layer.topology.nnzb - self.forward_blocks(layer)
        dropped = drop_count(outside, fraction) if self.explore == "random" else 0
        return drop_smallest(self.drop_scores(name, layer), dropped)

    def _choose(self, name: str, layer: SparseLayer) -> None:
        """Choose the forward set, of a layer that holds all its values; the others go apart."""
        forward = top_k_mask(self.drop_scores(name, layer), self.forward_blocks(layer))
        self.growth.part(name, (~forward).nonzero()[:, 0])

    def _weights_move(self) -> None:
        for name in self.trained_layers():
            self.growth.restore(name)
        super()._weights_move()

    def _weights_moved(self) -> None:
        super()._weights_moved()
        after = self.weight_steps - self.schedule.t_end  # before, updates see to it
        anew = after >= 0 and after % self.schedule.freq == 0
        for name, layer in self.trained_layers().items():
            self._pull(name, layer)
            if anew or name not in self.growth.at:
                self._choose(name, layer)
            else:
                self.growth.part(name, self.growth.at[name])

    def _update_if_due(self) -> bool:
        if not self.due:
            return super()._update_if_due()
        restored = [name for name in self.trained_layers() if self.growth.restore(name)]
        made = False
        try:
            made = super()._update_if_due()
        finally:
            changed = self.updated_layers() if made else {}
            for name, layer in self.trained_layers().items():
                if name in changed:
                    self._choose(name, layer)
                elif made or name in restored:
                    self.growth.part(name, self.growth.at[name])
        return made

    def _pull(self, name: str, layer: SparseLayer) -> None:
        at = self.growth.at.get(name)
        if not self.penalty or at is None:
            return
        with torch.no_grad():
            blocks = layer.active_values()
            density = self.forward_blocks(layer) / layer.topology.grid.total
            times = blocks.new_ones(len(blocks), 1, 1).index_fill_(0, at, 1 / density)
            rate = learning_rate(self.optimizers, layer.values)
            left = (blocks.abs() - times * (rate * self.penalty)).clamp_(min=0)
            layer.set_active_values(left.copysign(blocks))
