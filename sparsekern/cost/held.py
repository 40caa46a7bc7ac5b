"""What a training run costs: FLOPs by formula, bytes of real tensors, and measured time.

1 multiply-add = 2 FLOPs. Products count, those of weights and those of attention: biases,
activations and the optimizer are left out, as are the scores of a topology update. Sparse layers
count what is executed: whole blocks, and dense products where an implementation computes them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sparsekern.models import evaluating
from sparsekern.nn import SparseLayer
from sparsekern.ops import flops  # noqa: F401  registers the formulas of the sparse operators

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


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that stay allocated between two training steps, summed over real tensors.

    Attributes:
        weights: parameters, and buffers like the running statistics of norms.
        gradients: of the parameters.
        optimizer: its state.
        index: which connections exist.
    """

    weights: int
    gradients: int
    optimizer: int
    index: int

    @property
    def trained(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Index arrays included."""
        return self.trained + self.index


@dataclass(frozen=True)
class StepTime:
    """Median time of a training step, and median ratio to the baseline beside it.

    Attributes:
        seconds: of one step.
        ratio: to the baseline's step measured in the same round.
    """

    seconds: float
    ratio: float


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


def run_flops(forward: ForwardFlops, batch: int, weight_steps: int, update_batches: int) -> Flops:
    """FLOPs of a run, by Evci et al. 2020, appendix H.

    Args:
        forward: of one sample; the number of active weights never changes.
        batch: samples per step.
        weight_steps: each costs 3 f_S per sample: forward, input and weight gradient.
        update_batches: batches spent on a dense weight gradient, 2 f_S + f_D per sample each.
    """
    f_s, f_d = forward
    training = batch * (3 * f_s * weight_steps + (2 * f_s + f_d) * update_batches)
    return Flops(inference=f_s, dense_equivalent=f_d, training=training)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> HeldBytes:
    """Sum the tensors that exist now; call it after a step, while the gradients are there."""
    parameters = list(model.parameters())
    index = {b for m in model.modules() if isinstance(m, SparseLayer) for b in m.buffers()}
    state = tree_leaves([dict(optimizer.state.get(p, {})) for p in parameters])
    return HeldBytes(
        weights=tensor_bytes([*parameters, *(b for b in model.buffers() if b not in index)]),
        gradients=tensor_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=tensor_bytes(entry for entry in state if isinstance(entry, Tensor)),
        index=tensor_bytes(index),
    )


def paired_step_times(
    steps: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    device: torch.device,
    rounds: int = 30,
    burst: int = 5,
) -> dict[str, StepTime]:
    """Time short bursts of steps in turn.

    Each ratio is between neighbours in time, so a machine that drifts favours nobody.

    Args:
        steps: a training step by name, warmed up.
        baseline: whose time the ratios divide by.
        device: to wait for at the end of a burst.
        rounds: bursts of each; their order is reversed every other round.
        burst: steps in a burst.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names if i % 2 else reversed(names):
            seconds = _timed(steps[name], burst, device)
            if i:  # the first round warms up
                times[name].append(seconds)
    return {
        name: StepTime(
            seconds=statistics.median(taken),
            ratio=statistics.median(
                t / base for t, base in zip(taken, times[baseline], strict=True)
            ),
        )
        for name, taken in times.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], object], burst: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(burst):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / burst


def _count(model: nn.Module, sample: Tensor, formulas: Mapping[Any, Formula]) -> int:
    with (
        evaluating(model),
        # recurrent layers and attention as products that the counter knows
        torch.backends.cudnn.flags(enabled=False),
        torch.backends.mkldnn.flags(False, None, None, None),
        sdpa_kernel(SDPBackend.MATH),
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


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
