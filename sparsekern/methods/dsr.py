"""DSR: one threshold for all layers, adapted; random growth where more weights survive.

Mostafa & Wang, "Parameter efficient training of deep convolutional neural networks by dynamic
sparse reparameterization", ICML 2019, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError
from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.budget import by_survivors
from sparsekern.methods.sources import Random
from sparsekern.methods.update import drop_count
from sparsekern.nn import SparseLayer
from sparsekern.ops import block_norm


@shows_arguments
class DSR(Method):
    """Train with dynamic sparse reparameterization; other arguments as in `Method`.

    Weights below the threshold go (blocks, by their mean magnitude), in all layers; each keeps its
    largest. As many grow at random, layer by layer in proportion to what survived. More than 1.1
    times as many as `drop_fraction` and `decay` ask for halve the threshold, fewer than .9 times
    double it.

    The authors ask for a constant number of weights; this follows RigL's schedule, and takes the
    weight step of an update's batch first.

    Args:
        model: see `Method`; no wrapper may count on the sizes of its parameters.
        optimizer: see `Method`.
        initial_threshold: of the first update.

    Raises:
        ConfigError: as `Method`; or the layers have several block sizes, or can't be resized.
    """

    source = Random
    budget = by_survivors
    resizes = True
    default_step_on_update = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        initial_threshold: float = 1e-3,
        **arguments: Unpack[Arguments],
    ) -> None:
        if not 0 < initial_threshold < math.inf:
            raise ConfigError(f"`initial_threshold` must be positive; got {initial_threshold!r}")
        self.initial_threshold = initial_threshold
        super().__init__(model, optimizer, **arguments)

    @property
    def threshold(self) -> float:
        """Of the next update; it follows from the history, so a resume has it."""
        threshold = self.initial_threshold
        for record in self.history:
            # an update keeps their sum; layers that were frozen then may have changed since
            active = sum(
                self.layers[name].topology.nnzb if change.blocks is None else change.blocks
                for name, change in record.layers.items()
            )
            asked = drop_count(active, record.fraction)
            dropped = sum(change.dropped for change in record.layers.values())
            threshold *= 0.5 if dropped > 1.1 * asked else 2.0 if dropped < 0.9 * asked else 1.0
        return threshold

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:  # noqa: ARG002
        """Those that reach the threshold, and the largest."""
        scores = block_norm(layer.active_values().float(), "l1") / math.prod(layer.block)
        keep = scores >= self.threshold
        if len(scores):
            keep[scores.argmax()] = True
        return keep
