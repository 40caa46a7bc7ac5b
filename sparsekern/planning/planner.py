"""`plan`: decide what to make sparse before training."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparsekern.cost.examples import Examples
from sparsekern.cost.layers import Layer, blocks_of
from sparsekern.cost.predict import Cut, Times, predictor, threads_shown
from sparsekern.devices import as_device
from sparsekern.errors import ConfigError, DtypeError, MeasurementError, told
from sparsekern.planning.curves import Curve, Measured
from sparsekern.planning.examine import examine
from sparsekern.planning.measure import measure as measure_layer
from sparsekern.planning.result import Budget, Plan
from sparsekern.planning.share import Asked, Decision
from sparsekern.planning.task import Task
from sparsekern.show.progress import Progress
from sparsekern.swap import Pattern
from sparsekern.topology.blocks import Block, check_sparsity

BLOCKS: tuple[Block, ...] = (1, 16, 32, 64, 128)
SECONDS = 60.0
UNSHARED = 0.5
"""Sparsity at which a layer is measured that has no share of the asked one."""


class PlanInterrupted(KeyboardInterrupt):
    """Measuring was interrupted.

    Attributes:
        plan: from what had been measured.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__("interrupted while measuring")
        self.plan = plan


@torch.inference_mode(False)  # it takes training steps, whatever surrounds it
def plan(
    model: nn.Module,
    example_inputs: Examples,
    *,
    sparsity: float | None = None,
    budget: Budget | None = None,
    blocks: Sequence[Block] = BLOCKS,
    distribution: str = "erk",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    exclude: Sequence[Pattern] | Pattern = (),
    device: torch.device | str | None = None,
    measure: bool = False,
    seconds: float = SECONDS,
    optimizer_states: int = 2,
    generator: torch.Generator | None = None,
    quiet: bool = True,
    on_layer: Callable[[Plan], object] | None = None,
) -> Plan:
    """Choose for each layer whether it is sparse, how sparse, and in which blocks.

    A layer takes the block with the least time of a training step. One that is faster dense stays
    dense, and the others take up its share of the sparsity, as long as each keeps half of the
    weights it would have had otherwise; then it stays sparse, and the plan says so. Layers that the
    model never calls on the examples, or that no block fits, stay dense and out of account.

    Times are for the dtype of the weights, without autocast. They are predicted: on a CPU from a
    table of measured rates (`cost.cpu_rates`), on a GPU from bounds that physics sets
    (`cost.roofline`) and from what the kernels take on (`ops.crossover`). `measure=True` times
    the layers on this machine instead, dense and sparse in turns; what layers have in common is
    measured once.

    Args:
        model: a copy of it takes one training step, in evaluation mode: dropout and layers that
            only training calls, such as auxiliary outputs, are left out. On the meta device
            nothing is computed. Neither the model nor the inputs nor torch's random state change.
        example_inputs: a batch as in training: a tensor, a tuple of arguments, or a dict of named
            ones.
        sparsity: of all these layers' weights together, in [0, 1).
        budget: what the model may cost instead; the lowest sparsity that keeps it is found.
        blocks: to choose from, edges or pairs (outputs, inputs).
        distribution: "erk", "er" or "uniform".
        filter_fn: as in `sparsify_`.
        exclude: as in `sparsify_`.
        device: to plan for, or to measure on; None: the model's.
        measure: instead of predicting.
        seconds: about how long measuring may take, besides compiling. Layers that it is too short
            for, the least costly ones, are predicted, and the plan says so.
        optimizer_states: numbers of the weight's dtype that the optimizer keeps for each weight: 2
            for AdamW, 1 for SGD with momentum.
        generator: of the connections of layers to measure.
        quiet: show no progress on stderr.
        on_layer: gets the plan so far whenever a layer has been measured.

    Raises:
        ConfigError: not exactly one of `sparsity` and `budget`; a value out of its domain; no layer
            to plan; a parameter that has no shape yet; a `filter_fn` that fails; a budget that
            can't be reached (says what can).
        DtypeError: an argument of the wrong type, or a bare layer as model.
        ModelError: the model fails on the examples, can't be copied, or has an output without a
            gradient.
        MeasurementError: a layer fails while it is measured, or `on_layer` does; `error.plan` has
            what was measured.
        PlanInterrupted: the same for a KeyboardInterrupt, which it is.
    """
    _check(sparsity, budget, seconds, optimizer_states)
    _check_types(
        ("model", model, nn.Module),
        ("filter_fn", filter_fn, Callable | None),
        ("generator", generator, torch.Generator | None),
        ("on_layer", on_layer, Callable | None),
        *(("exclude", pattern, str | re.Pattern) for pattern in _patterns(exclude)),
    )
    cuts = blocks_of(blocks)
    Asked((), cuts, distribution)  # checks the name before the model runs
    where = _device(model, device, measure=measure)
    with torch.random.fork_rng(_cuda(model, where if measure else None)):
        found = examine(model, example_inputs, distribution, filter_fn, exclude)
        left = {la.name: why for la in found.layers if (why := _left(la, cuts))}
        if len(left) == len(found.layers):
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
            raise ConfigError(f"`model` has no layer that could be made sparse ({reasons})")
        rest = tuple(la for la in found.layers if la.name not in left)
        task = Task(
            model=found,
            asked=Asked(rest, cuts, distribution),
            left=left,
            sparsity=sparsity,
            budget=budget,
            device=where,
            optimizer_states=optimizer_states,
            filter_fn=filter_fn,
        )
        times = predictor(where)
        return (
            task.plan(times)
            if not measure
            else _measured(task, times, seconds, generator, on_layer, quiet=quiet)
        )


def _measured(
    task: Task,
    otherwise: Times,
    seconds: float,
    generator: torch.Generator | None,
    on_layer: Callable[[Plan], object] | None,
    *,
    quiet: bool,
) -> Plan:
    """Measure one layer of each kind, the most costly first, then plan with what was found."""
    curves: dict[tuple[Any, ...], Curve] = {}
    times = Measured(curves, otherwise, _described(task.device))
    _, first = task.decide(otherwise)
    kinds: dict[tuple[Any, ...], Layer] = {}
    for layer in sorted(task.model.layers, key=lambda la: -otherwise.dense(la)):
        if layer.uses:
            kinds.setdefault(layer.key(), layer)
    deadline, failing = time.monotonic() + seconds, "measuring"
    try:
        with Progress(1, len(kinds), quiet=quiet) as progress:
            for i, (key, layer) in enumerate(kinds.items()):
                left = deadline - time.monotonic()
                if left <= 0 and curves:
                    break
                failing = f"measuring layer {layer.name!r}"
                progress.begin(layer.name)
                shares = _tried(layer, first.get(layer.name))
                blocks = [b for b in task.fitting(layer) if layer.takes(b, shares)]
                where: dict[str, Any] = {"device": task.device, "generator": generator}
                share = left / (len(kinds) - i)
                curves[key] = measure_layer(layer, blocks, shares, seconds=share, **where)
                progress.step(1)
                progress.end(_outcome(curves[key]))
                if on_layer is not None:
                    failing = "`on_layer`"
                    on_layer(task.plan(times))
    except KeyboardInterrupt:
        raise PlanInterrupted(task.plan(times)) from None
    except Exception as error:
        raise MeasurementError(f"{failing} failed: {told(error)}", task.plan(times)) from error
    return task.plan(times)


def _tried(layer: Layer, decision: Decision | None) -> tuple[float, ...]:
    """The sparsities to measure a layer at: the predicted plan's, if it has a share."""
    if decision is None or max(decision.sparsities) == 0:
        return (UNSHARED,) * len(layer.parts)
    return decision.sparsities


def _outcome(curve: Curve) -> str:
    """One line about a layer."""
    found = [(r, block) for block, points in curve.points.items() for _, r in points]
    dense = f"dense {1e3 * curve.dense:.3g} ms"
    if not found:
        return dense
    ratio, (height, width) = min(found)
    return f"{dense}, at best {1 / ratio:.2f}x in blocks of {height}x{width}"


def _left(layer: Layer, blocks: Sequence[Cut]) -> str | None:
    """Why a layer stays out of account, in words."""
    if not layer.uses:
        return "the model never calls it on the example inputs"
    reasons = [layer.too_small(block) for block in blocks]
    return None if None in reasons else reasons[0]


def _check(
    sparsity: float | None, budget: Budget | None, seconds: float, optimizer_states: int
) -> None:
    if (sparsity is None) == (budget is None):
        got = "neither" if sparsity is None else "both"
        raise ConfigError(f"give exactly one of `sparsity` and `budget`; got {got}")
    if sparsity is not None:
        check_sparsity(sparsity)
    if budget is not None and not isinstance(budget, Budget):
        raise DtypeError(f"`budget` must be a Budget; got {budget!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise DtypeError(f"`seconds` must be a number; got {seconds!r}")
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"`seconds` must be a positive number; got {seconds}")
    if type(optimizer_states) is not int or optimizer_states < 0:
        raise ConfigError(f"`optimizer_states` must be an int, 0 or more; got {optimizer_states!r}")


def _check_types(*arguments: tuple[str, object, Any]) -> None:
    """Name, value and type of each argument."""
    for name, value, kind in arguments:
        if not isinstance(value, kind):
            raise DtypeError(f"`{name}` must be {_KINDS[name]}; got {value!r}")


_KINDS = {
    "model": "an nn.Module",
    "filter_fn": "a function (module, name) -> bool",
    "generator": "a torch.Generator",
    "on_layer": "a function that takes a plan",
    "exclude": "globs or compiled regexes",
}


def _patterns(exclude: object) -> list[object]:
    """One pattern is as good as several, as in `sparsify_`."""
    return list(exclude) if isinstance(exclude, tuple | list | set | frozenset) else [exclude]


def _device(model: nn.Module, device: torch.device | str | None, *, measure: bool) -> torch.device:
    """What to plan for; a model of the meta device alone is planned for the CPU."""
    held = next((p.device for p in model.parameters()), torch.device("cpu"))
    where = held if device is None else as_device(device)
    where = torch.device("cpu") if where.type == "meta" else where
    if measure:
        try:
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            why = str(error).partition("\n")[0]
            raise ConfigError(f"`device` {device!r} can't be used here: {why}") from error
    return where


def _cuda(model: nn.Module, measured_on: torch.device | None) -> list[torch.device]:
    """The GPUs that are used; one that is only planned for may not be here."""
    used = {p.device for p in model.parameters()} | ({measured_on} if measured_on else set())
    return [device for device in used if device.type == "cuda"]


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this machine's {device.type}, {threads_shown(torch.get_num_threads())}"
