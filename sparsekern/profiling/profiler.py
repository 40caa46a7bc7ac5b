"""`profile`: what a training step of a model costs, by layer, predicted beside measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekern.environment import environment
from sparsekern.errors import ConfigError, DtypeError, OptimizerError
from sparsekern.examples import Examples, arguments, described
from sparsekern.methods import Method
from sparsekern.ops.dispatch import assuming
from sparsekern.profiling.cost import METHODS, PruningSchedule, method_costs
from sparsekern.profiling.measure import measured
from sparsekern.profiling.predict import Prediction, predicted
from sparsekern.profiling.report import Report
from sparsekern.profiling.rows import LayerRow, layers_of, rows_of
from sparsekern.profiling.seconds import predicted_seconds
from sparsekern.profiling.step import Loss, total
from sparsekern.profiling.twin import copied

UPDATE_FREQ = 100
"""Weight steps between topology updates that costs assume without a method: the paper's."""
SECONDS = 1.0


def profile(
    model: nn.Module,
    example_inputs: Examples,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    method: Method | str | None = None,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
    measure: bool | None = None,
    seconds: float = SECONDS,
    pruning: PruningSchedule | None = None,
) -> Report:
    """Say what a training step of a model costs: FLOPs, bytes and time, by layer.

    1 multiply-add = 2 FLOPs. The prediction counts a step on tensors without memory, so a model on
    the meta device may be of any size. The measurement takes real steps of a copy in training mode.
    Neither changes the model, the optimizer or a topology.

    Args:
        model: any module; sparse layers count what they execute, whole blocks.
        example_inputs: a tensor, a tuple of arguments or a mapping of named ones, with the batch
            size that matters.
        optimizer: of the model's parameters; its state is counted and its step taken. Without one
            there is no optimizer state.
        method: in use: one of "dense", "static", "set", "snip", "rigl", "snfs" and "pruning", or
            the `sparsekern.Method` that is attached, whose update frequency is taken.
        loss: from the model's output to one number; None: the sum of all outputs.
        device: that the prediction is for; None: the model's, and for the meta device "cuda" if
            there is a GPU, else "cpu".
        measure: whether to take steps on this machine too; None: unless the model is on the meta
            device, or `device` is another one than the model's.
        seconds: about how long to measure, at least three steps.
        pruning: schedule behind the cost of "pruning"; None: that of the paper's ResNet-50.

    Returns:
        The report. `str()` is a table; `to_dict`, `to_json`, `to_markdown`, `to_csv`.

    Raises:
        ModelError: the model fails on the inputs (the text names the layer), can't be copied, or
            has shapes that depend on the values of its tensors.
        OptimizerError: the optimizer holds none of the model's parameters, or can't step without a
            closure.
        ConfigError, DtypeError: an argument is out of its domain.
    """
    home = _check(model, optimizer)
    target = _target(home, device)
    possible = home.type != "meta" and home.type == target.type
    if measure and not possible:
        raise ConfigError(f"`measure` needs a model on {target.type}; got one on {home.type}")
    name, update_freq = _method(method)
    found = predicted(model, example_inputs, optimizer, loss or total, target)
    layers = layers_of(model)
    with assuming(target):
        rows = rows_of(model, layers, found.step.layers, found.state)
    f_s, f_d = (
        sum(getattr(row, f"forward_flops{dense}") for row in rows) // _batch(example_inputs)
        for dense in ("", "_dense")
    )
    report = Report(
        model=type(model).__name__,
        inputs=described(example_inputs),
        device=str(target),
        layers=tuple(rows),
        held_bytes=found.held_bytes,
        peak_bytes=found.peak_bytes,
        seconds=_seconds(rows, layers, found, target),
        methods=method_costs(f_s, f_d, update_freq=update_freq, pruning=pruning),
        method=name,
        update_freq=update_freq,
        uncounted=found.step.uncounted,
        measured=None,
        failure=None,
        environment=environment(home if home.type == "cuda" else torch.device("cpu")),
    )
    wanted = possible if measure is None else measure
    return (
        measured_too(report, model, example_inputs, optimizer, loss, seconds) if wanted else report
    )


def measured_too(
    report: Report,
    model: nn.Module,
    example_inputs: Examples,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    seconds: float = SECONDS,
) -> Report:
    """The report of a prediction, completed by steps on this machine.

    If they fail, for want of memory for example, the report says so and keeps its prediction.
    """
    try:
        twin = copied(model, example_inputs, optimizer)
        found = measured(twin, loss or total, _check(model, optimizer), seconds)
    except Exception as error:  # whatever a model raises, the prediction stands
        return replace(report, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return replace(report, measured=found)


def _check(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> torch.device:
    """The device of the model, of which there must be one."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"`model` must be an nn.Module; got {type(model).__name__}")
    parameters = list(model.parameters())
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        raise ConfigError(
            "`model` must have parameters, all on one device; got "
            f"{sorted(map(str, devices)) or 'none'}"
        )
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DtypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, parameters)):
            raise OptimizerError(
                "`optimizer` must hold parameters of the model; it holds none of them (build it "
                "after sparsify_)"
            )
    return devices.pop()


def _target(home: torch.device, device: torch.device | str | None) -> torch.device:
    if device is None and home.type == "meta":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = home if device is None else torch.device(device)
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"`device` must be cpu or cuda; got {target}")
    return target


def _method(method: Method | str | None) -> tuple[str | None, int]:
    """Its name among `METHODS`, and its update frequency."""
    if method is None:
        return None, UPDATE_FREQ
    if isinstance(method, Method):
        name = type(method).__name__.lower()
        return (name if name in METHODS else None), method.schedule.freq
    if method not in METHODS:
        raise ConfigError(
            f"`method` must be a sparsekern.Method or one of {METHODS}; got {method!r}"
        )
    return method, UPDATE_FREQ


def _batch(examples: Examples) -> int:
    """Samples: the length of the first tensor."""
    args, kwargs = arguments(examples)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return max(1, len(tensors[0])) if tensors and tensors[0].dim() else 1


def _seconds(
    rows: list[LayerRow], layers: dict[str, nn.Module], found: Prediction, target: torch.device
) -> dict[str, float]:
    times = {}
    for row in rows:
        if row.name in layers:
            count = found.step.layers[row.name]
            seconds = predicted_seconds(row, layers[row.name], count, target)
            if seconds is not None:
                times[row.name] = seconds
    return times
