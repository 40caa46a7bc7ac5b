"""FLOPs of a training run, by formula (Evci et al. 2020, appendix H).

1 multiply-add = 2 FLOPs. Products count, those of weights and those of attention: biases,
activations and the optimizer are left out, as are the scores of a topology update. Sparse layers
count what is executed: whole blocks, and dense products where an implementation computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sparsekern.cost.flops import as_products
from sparsekern.cost.modes import evaluating

Formula = Callable[..., int]

FLOP_CONVENTION = "1 multiply-add = 2 FLOPs; biases, activations and the optimizer are not counted"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run.

    Attributes:
        inference: of one forward pass, per sample, executed.
        dense_equivalent: of the same pass if every layer were dense.
        training: of the whole run, executed.
    """

    inference: int
    dense_equivalent: int
    training: int


class ForwardFlops(NamedTuple):
    """FLOPs of a forward pass per sample.

    Attributes:
        executed: f_S.
        dense_equivalent: f_D, if every sparse layer were dense.
    """

    executed: int
    dense_equivalent: int


def forward_flops(model: nn.Module, sample: Tensor) -> ForwardFlops:
    """Count the products of a forward pass over one sample.

    A weight counts as often as it is applied: for each output pixel of a convolution, for each
    time step of a recurrent layer.

    Args:
        model: run twice in evaluation mode; nothing of it changes.
        sample: a batch of one.
    """
    executed = _count(model, sample, {})
    return ForwardFlops(executed, _count(model, sample, _AS_DENSE))


class Segment(NamedTuple):
    """Batches in a row that cost the same.

    Attributes:
        forward: of one sample, as the topology was.
        weight_steps: 3 f_S per sample each: forward, input and weight gradient.
        dense_steps: how many of these took a dense weight gradient, 2 f_S + f_D each.
        update_batches: batches spent on a dense weight gradient without a weight step, as much.
    """

    forward: ForwardFlops
    weight_steps: int = 0
    dense_steps: int = 0
    update_batches: int = 0

    @property
    def training(self) -> int:
        """FLOPs per sample."""
        f_s, f_d = self.forward
        dense = self.dense_steps + self.update_batches
        return 3 * f_s * (self.weight_steps - self.dense_steps) + (2 * f_s + f_d) * dense


def run_flops(segments: Sequence[Segment], batch: int) -> Flops:
    """FLOPs of a run, by Evci et al. 2020, appendix H: summed over the topologies that it had.

    Args:
        segments: one after the other; inference is that of the last one.
        batch: samples per step.
    """
    f_s, f_d = segments[-1].forward
    training = batch * sum(segment.training for segment in segments)
    return Flops(inference=f_s, dense_equivalent=f_d, training=training)


def _count(model: nn.Module, sample: Tensor, formulas: Mapping[Any, Formula]) -> int:
    with (
        evaluating(model),
        as_products(),
        FlopCounterMode(display=False, custom_mapping=dict(formulas)) as counter,
    ):
        model(sample)
    return int(counter.get_total_flops())


def _as_dense(formula: Formula) -> Formula:
    """The formula of a sparse operator, whose last argument names the implementation."""
    return lambda *args, **_: formula(*args[:-1], "dense")


_AS_DENSE = {
    op: _as_dense(flop_registry[op])
    for op in (torch.ops.sparsekern.spmm, torch.ops.sparsekern.conv2d)
}
"""The forward products as if their weights were dense."""
