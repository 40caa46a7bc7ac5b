"""The time of a layer's training step, measured: dense and sparse layers in turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.cost.layers import Layer
from sparsekern.cost.predict import LEAST_DENSITY, Cut
from sparsekern.cost.timing import HostClock, StepTime, paired_step_times, rounds_in
from sparsekern.nn.kinds import convert
from sparsekern.planning.curves import Curve, density_of
from sparsekern.topology import Topology

DENSE = "dense"
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
BURST_SECONDS = 0.004
"""Short steps are timed several at once, for about so long."""
FIRST, AGAIN, HALVED = 0.3, 0.25, 0.2
"""Shares of a layer's time: for all blocks at the planned density, for those in the running once
more, and for half of the density. The rest seeks break-even."""
IN_THE_RUNNING = 1.25  # times the least time, dense included
STEPS_TO_BREAK_EVEN = 5  # each doubles or halves the density
FINALISTS = 2  # blocks that take part in them


def measure(
    layer: Layer,
    blocks: Sequence[Cut],
    sparsities: Sequence[float],
    *,
    device: torch.device,
    seconds: float,
    generator: torch.Generator | None,
) -> Curve:
    """Measure a layer: forward and backward of all its calls, dense and with each block in turns.

    All blocks at the planned density, those that are nearly the fastest there once more, all at
    half of it, and the fastest at densities towards break-even. Layers and inputs are made afresh,
    with random numbers.

    Args:
        layer: it is not changed.
        blocks: that fit it.
        sparsities: of its parts; 0 leaves one dense, at every density.
        device: where to run.
        seconds: about how long this may take, besides compiling; a few rounds are always taken.
        generator: of the connections.
    """
    bench = _Bench(layer, sparsities, device, generator)
    deadline = time.monotonic() + seconds
    planned = bench.ratios(1.0, blocks, FIRST * seconds)
    dense, least = bench.dense_seconds, min([1.0, *planned.values()])
    running = [block for block, ratio in planned.items() if ratio <= IN_THE_RUNNING * least]
    if running:
        bench.ratios(1.0, running, AGAIN * seconds)  # with connections drawn anew
    if planned:
        bench.ratios(0.5, blocks, HALVED * seconds)
        _seek_break_even(bench, planned, deadline)
    return Curve(dense, bench.points(), bench.rounds)


def _seek_break_even(bench: _Bench, planned: Mapping[Cut, float], deadline: float) -> None:
    """Double the density while the fastest blocks win, or halve it while they lose."""
    final = sorted(planned, key=lambda block: planned[block])[:FINALISTS]
    wins, density = planned[final[0]] <= 1, density_of(bench.layer, bench.sparsities)
    for step in range(1, STEPS_TO_BREAK_EVEN + 1):
        factor = 2.0**step if wins else 2.0 ** -(step + 1)
        over = factor / 2 * density >= 1 or factor * density < LEAST_DENSITY
        left = deadline - time.monotonic()
        if over or left <= 0:
            break
        found = bench.ratios(factor, final, left / (STEPS_TO_BREAK_EVEN + 1 - step))
        if (min(found.values(), default=math.inf) <= 1) != wins:
            break


def _scaled(sparsity: float, factor: float) -> float:
    """Of a part with `factor` times the weights; a dense one stays as it is."""
    return max(0.0, 1 - factor * (1 - sparsity)) if sparsity > 0 else 0.0


def _name(block: Cut) -> str:
    return f"{block[0]}x{block[1]}"


class _Bench:
    """Dense and sparse layers of one kind, with inputs they share."""

    def __init__(
        self,
        layer: Layer,
        sparsities: Sequence[float],
        device: torch.device,
        generator: torch.Generator | None,
    ) -> None:
        self.layer, self.sparsities = layer, sparsities
        self.device, self.generator = device, generator
        self.seen: dict[Cut, dict[float, list[float]]] = {}
        self.dense = _fresh(layer.module, device)
        self.inputs = [
            (_random(call.args, device, use.dx), _random(call.kwargs, device, use.dx))
            for call, use in zip(layer.calls, layer.uses, strict=True)
        ]
        outputs = [_first_tensor(self.dense(*args, **named)) for args, named in self.inputs]
        self.gradients = [torch.randn_like(y.detach()) for y in outputs]
        self.dense_seconds, self.rounds = 0.0, MOST_ROUNDS

    def ratios(self, factor: float, blocks: Sequence[Cut], seconds: float) -> dict[Cut, float]:
        """Sparse time / dense time with `factor` times the planned weights, where blocks fit."""
        scaled = [_scaled(s, factor) for s in self.sparsities]
        fitting = [block for block in blocks if self.layer.takes(block, scaled)]
        times = self._times(fitting, scaled, seconds)
        found = {block: times[_name(block)].ratio for block in fitting}
        for block, ratio in found.items():
            by_density = self.seen.setdefault(block, {})
            by_density.setdefault(density_of(self.layer, scaled), []).append(ratio)
        return found

    def points(self) -> dict[Cut, tuple[tuple[float, float], ...]]:
        """All that was found, by block; the mean where a density was measured twice."""
        return {
            block: tuple(sorted((d, statistics.fmean(r)) for d, r in by_density.items()))
            for block, by_density in self.seen.items()
        }

    def _times(
        self, blocks: Sequence[Cut], sparsities: Sequence[float], seconds: float
    ) -> dict[str, StepTime]:
        """Step times by block name and of the dense layer, in about so many seconds."""
        steps = {DENSE: self._step(self.dense)}
        for block in blocks:
            steps[_name(block)] = self._step(self._sparse(block, sparsities))
        for step in steps.values():
            step()  # compiles what is not compiled yet
        clock = HostClock(self.device)
        once = {name: clock.once(step) for name, step in steps.items()}
        burst = max(1, round(BURST_SECONDS / max(once.values())))
        rounds = rounds_in(seconds, burst * sum(once.values()), LEAST_ROUNDS, MOST_ROUNDS)
        self.rounds = min(self.rounds, rounds)
        times = paired_step_times(steps, DENSE, device=self.device, rounds=rounds, burst=burst)
        self.dense_seconds = times[DENSE].seconds
        return times

    def _sparse(self, block: Cut, sparsities: Sequence[float]) -> nn.Module:
        """With random connections; a part that is planned dense stays so."""
        topologies = {
            part.weight.name: Topology.random(
                part.weight.shape,
                block,
                sparsity=sparsity,
                groups=part.weight.groups,
                taps=part.weight.taps,
                generator=self.generator,
            )
            for part, sparsity, planned in zip(
                self.layer.parts, sparsities, self.sparsities, strict=True
            )
            if planned > 0
        }
        layer: nn.Module = convert(self.dense, topologies, None)
        return layer

    def _step(self, module: nn.Module) -> Callable[[], None]:
        def step() -> None:
            module.zero_grad(set_to_none=True)
            uses = zip(self.layer.uses, self.inputs, self.gradients, strict=True)
            for use, (args, named), dy in uses:
                _forget((args, named))
                y = _first_tensor(module(*args, **named))
                if use.dx or use.dw:
                    torch.autograd.backward(y, dy)

        return step


def _fresh(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy with small random weights and no hooks."""
    made = copy.deepcopy(module).to_empty(device=device)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(made, hooks).clear()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(-0.05, 0.05)
    return made.eval()  # a recurrent layer's dropout is no part of it


def _random(value: Any, device: torch.device, dx: bool) -> Any:
    """The same shapes and strides filled with random numbers; integers stay."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.detach().to("cpu" if value.device.type == "cpu" else device)
        return torch.randn_like(value.detach(), device=device).requires_grad_(dx)
    if isinstance(value, Mapping):
        return {name: _random(part, device, dx) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_random(part, device, dx) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _forget(value: Any) -> None:
    """Drop the gradients of the last step."""
    if isinstance(value, Tensor):
        value.grad = None
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            _forget(part)


def _first_tensor(value: Any) -> Tensor:
    """The output, or the first of them."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value
