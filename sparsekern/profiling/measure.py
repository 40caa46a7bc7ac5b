"""What a training step costs on this machine: time and peak memory, of a copy of the model."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsekern.cost.held import held_bytes
from sparsekern.cost.memory import peak_bytes
from sparsekern.cost.step import Loss, clear, forward, training_step
from sparsekern.cost.timing import HostClock, synchronize
from sparsekern.cost.twin import Twin
from sparsekern.cost.watch import OTHER, Watch
from sparsekern.profiling.rows import layers_of

WARM_UPS = 2
LEAST_ROUNDS = 3


class Measured(NamedTuple):
    """A training step, measured.

    Attributes:
        forward_seconds: median of a forward pass with what backward needs.
        step_seconds: median of forward, backward and the optimizer's step.
        rounds: that the medians are of.
        before_bytes: parameters, buffers, optimizer state and inputs, read off the tensors.
        peak_bytes: those and the most that torch's allocator held besides during a step.
        layer_seconds: median of each layer's forward and backward, by name; taken apart from the
            steps above, as looking between layers takes time too.
    """

    forward_seconds: float
    step_seconds: float
    rounds: int
    before_bytes: int
    peak_bytes: int
    layer_seconds: dict[str, float]


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
    layers: list[dict[str, float]] = []
    clock, end = HostClock(device), time.monotonic() + seconds
    while len(steps) < LEAST_ROUNDS or time.monotonic() < end:
        clear(twin)
        forwards.append(clock.once(lambda: forward(twin, loss)))
        steps.append(clock.once(lambda: training_step(twin, loss)))
        clear(twin)
        layers.append(_by_layer(twin, loss, device))
    return Measured(
        forward_seconds=statistics.median(forwards),
        step_seconds=statistics.median(steps),
        rounds=len(steps),
        before_bytes=held,
        peak_bytes=peak,
        layer_seconds={name: statistics.median(one[name] for one in layers) for name in layers[0]},
    )


def _by_layer(twin: Twin, loss: Loss, device: torch.device) -> dict[str, float]:
    """Seconds of forward and backward that each layer was at work."""
    layers = layers_of(twin.model)
    spent = dict.fromkeys((*layers, OTHER), 0.0)
    since = time.perf_counter()

    def changed() -> None:
        nonlocal since
        synchronize(device)
        now = time.perf_counter()
        spent[watch.here] += now - since
        since = time.perf_counter()

    watch = Watch(layers, on_change=changed)
    with watch.watching():
        value = forward(twin, loss)
        watch.turn(value)
        torch.autograd.backward(value)
        changed()
    del spent[OTHER]
    return spent


def _held(twin: Twin) -> int:
    optimizer = twin.optimizer or torch.optim.SGD(twin.model.parameters())
    inputs = [leaf for leaf in tree_leaves(twin.examples) if isinstance(leaf, Tensor)]
    own = sum(t.numel() * t.element_size() for t in inputs)
    return held_bytes(twin.model, optimizer).total + own
