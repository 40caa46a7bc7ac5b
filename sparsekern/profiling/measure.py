"""What a training step costs on this machine: time and peak memory, of a copy of the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsekern.accounting import held_bytes, synchronize
from sparsekern.profiling.memory import peak_bytes
from sparsekern.profiling.step import Loss, clear, forward, training_step
from sparsekern.profiling.twin import Twin

WARM_UPS = 2


class Measured(NamedTuple):
    """A training step, measured.

    Attributes:
        forward_seconds: median of a forward pass with what backward needs.
        step_seconds: median of forward, backward and the optimizer's step.
        rounds: that the medians are of.
        held_bytes: parameters, buffers, optimizer state and inputs, read off the tensors.
        peak_bytes: those and the most that torch's allocator held besides during a step.
    """

    forward_seconds: float
    step_seconds: float
    rounds: int
    held_bytes: int
    peak_bytes: int


def measured(twin: Twin, loss: Loss, device: torch.device, seconds: float) -> Measured:
    """Time steps for about so many seconds, at least three; the twin is used up.

    Raises:
        ModelError: the model fails.
    """
    twin.model.train()
    for _ in range(WARM_UPS):
        training_step(twin, loss)
        clear(twin)
    held = _held(twin)
    peak = held + peak_bytes(lambda: training_step(twin, loss), device)
    forwards: list[float] = []
    steps: list[float] = []
    end = time.monotonic() + seconds
    while len(steps) < 3 or time.monotonic() < end:
        clear(twin)
        forwards.append(_timed(lambda: forward(twin, loss), device))
        steps.append(_timed(lambda: training_step(twin, loss), device))
    return Measured(statistics.median(forwards), statistics.median(steps), len(steps), held, peak)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _held(twin: Twin) -> int:
    optimizer = twin.optimizer or torch.optim.SGD(twin.model.parameters())
    inputs = [leaf for leaf in tree_leaves(twin.examples) if isinstance(leaf, Tensor)]
    own = sum(t.numel() * t.element_size() for t in inputs)
    return held_bytes(twin.model, optimizer).total + own
