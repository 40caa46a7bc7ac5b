"""SNFS: grow where a running average of the dense gradient is largest, in the layers where it is.

Dettmers & Zettlemoyer, "Sparse networks from scratch: faster training without losing performance",
2019, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import nn

from sparsekern.errors import ConfigError
from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.budget import proportional
from sparsekern.methods.momentum import Momentum


@shows_arguments
class SNFS(Method):
    """Train with sparse momentum; other arguments as in `Method`.

    Each layer drops its smallest weights. What all have dropped grows where momentum is largest, in
    proportion to the layers' mean |momentum| over active weights (`budget.proportional`), so layers
    change their size and the model keeps its. The momentum is dense and costs a dense gradient in
    every step: `growth.bytes()` is its memory, the optimizer's `state_dict` holds it.

    The authors update once an epoch and let layers that are nearly dense drop less; this follows
    RigL's schedule, as SET does here, and takes the weight step of an update's batch first.

    Args:
        model: see `Method`; no wrapper may count on the sizes of its parameters.
        optimizer: see `Method`.
        momentum_decay: of the running average; .7 to .9 are equally good.

    Raises:
        ConfigError: as `Method`; or the layers have several block sizes, or can't be resized.
    """

    source = Momentum
    budget = proportional
    resizes = True
    default_step_on_update = True
    defaults: ClassVar[Arguments] = {"drop_fraction": 0.5}
    growth: Momentum

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        momentum_decay: float = 0.9,
        **arguments: Unpack[Arguments],
    ) -> None:
        if not 0 <= momentum_decay < 1:
            raise ConfigError(f"`momentum_decay` must lie in [0, 1); got {momentum_decay!r}")
        super().__init__(model, optimizer, **self.defaults | arguments)
        self.growth.decay = momentum_decay
