"""`profile`: what a training step of a model costs, by layer, predicted beside measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from sparsekern.cost.examples import Examples, arguments, described
from sparsekern.cost.methods import METHODS, PruningSchedule, method_costs
from sparsekern.cost.predict import predictor
from sparsekern.cost.step import Loss, total
from sparsekern.cost.twin import copied
from sparsekern.cost.watch import tensors
from sparsekern.devices import as_device
from sparsekern.errors import ConfigError, DeviceError, DtypeError, ModelError, OptimizerError, told
from sparsekern.methods import Method
from sparsekern.profiling.measure import measured
from sparsekern.profiling.predict import Prediction, predicted
from sparsekern.profiling.report import Report
from sparsekern.profiling.rows import layers_of, rows_of
from sparsekern.profiling.seconds import predicted_seconds
from sparsekern.show.environment import environment

UPDATE_FREQ = 100
"""Weight steps between topology updates that costs assume without a method: the paper's."""
SECONDS = 1.0


@torch.inference_mode(False)  # it takes training steps, whatever surrounds it
def profile(
    model: nn.Module,
    example_inputs: Examples,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    method: Method | str | None = None,
    loss: Loss | None = None,
    batch: int | None = None,
    device: torch.device | str | None = None,
    measure: bool | None = None,
    seconds: float = SECONDS,
    pruning: PruningSchedule | None = None,
) -> Report:
    """Say what a training step of a model costs: FLOPs, bytes and time, by layer.

    1 multiply-add = 2 FLOPs. The prediction counts a step on tensors without memory, so a model on
    the meta device may be of any size; one that asks its tensors for values (packed sequences,
    branches) is counted by running a copy. The measurement takes real steps of a copy. Both are in
    training mode, and neither changes the model, the optimizer, a topology or the random numbers;
    forward hooks of the user's run on the copies too.

    Args:
        model: any module; sparse layers count what they execute, whole blocks.
        example_inputs: a tensor, a tuple of arguments or a mapping of named ones, with the batch
            size that matters.
        optimizer: of the model's parameters; its state is counted and its step taken. Without one
            there is no optimizer state.
        method: in use: one of "dense", "static", "set", "snip", "rigl", "snfs" and "pruning", or
            the `sparsekern.Method` that is attached, whose update frequency is taken.
        loss: from the model's output to one number; None: the sum of all outputs.
        batch: samples in the inputs, for costs per sample; None: the length of the first tensor.
        device: that the prediction is for; None: the model's, and for the meta device "cuda" if
            there is a GPU, else "cpu".
        measure: whether to take steps on this machine too; None: unless model or inputs are on the
            meta device, or `device` is another one than the model's.
        seconds: about how long to measure, at least three steps.
        pruning: schedule behind the cost of "pruning"; None: that of the paper's ResNet-50.

    Returns:
        The report. `str()` is a table; `to_dict`, `to_json`, `to_markdown`, `to_csv`.

    Raises:
        ModelError: the model fails on the inputs (the text names the layer), can't be copied, or is
            on the meta device and asks its tensors for values.
        OptimizerError: the optimizer holds none of the model's parameters, or can't step by itself.
        ConfigError, DtypeError: an argument is out of its domain.
    """
    home = _check(model, example_inputs, optimizer)
    target = _target(home, device)
    where = {home.type, *_devices(example_inputs)}
    wanted = _check_measuring(measure, seconds, where, target.type)
    name, update_freq = _method(method)
    samples = _batch(example_inputs, batch)
    method_costs(1, 1, update_freq=update_freq, pruning=pruning)  # raises before any work
    found = predicted(model, example_inputs, optimizer, _checked(loss), target)
    layers = layers_of(model)
    rows = rows_of(model, layers, found.step.layers, found.made, target)
    f_s, f_d = (sum(r.forward_flops for r in rows), sum(r.forward_flops_dense for r in rows))
    costs = method_costs(f_s // samples, f_d // samples, update_freq=update_freq, pruning=pruning)
    report = Report(
        model=type(model).__name__,
        inputs=described(example_inputs),
        device=str(target),
        layers=tuple(rows),
        before_bytes=found.before_bytes,
        peak_bytes=found.peak_bytes,
        seconds=_seconds(layers, found, target),
        methods=costs,
        method=name,
        update_freq=update_freq,
        by_running=found.by_running,
        uncounted=found.step.uncounted,
        measured=None,
        failure=None,
        environment=environment(home if home.type == "cuda" else torch.device("cpu")),
    )
    if not wanted:
        return report
    return measured_too(report, model, example_inputs, optimizer, loss, seconds)


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
    home = _check(model, example_inputs, optimizer)
    random = torch.random.fork_rng([home] if home.type == "cuda" else [])
    try:
        with torch.enable_grad(), random:
            twin = copied(model, example_inputs, optimizer)
            found = measured(twin, _checked(loss), home, seconds)
    except Exception as error:  # whatever a model raises, the prediction stands
        return replace(report, failure=told(error))
    return replace(report, measured=found)


def _check(
    model: nn.Module, examples: Examples, optimizer: torch.optim.Optimizer | None
) -> torch.device:
    """The device of the model, of which there must be one, that of the inputs too."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"`model` must be an nn.Module; got {type(model).__name__}")
    parameters = list(model.parameters())
    if any(isinstance(p, UninitializedParameter) for p in parameters):
        raise ModelError("`model` must have run once: it holds lazy parameters without a shape")
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        raise ConfigError(
            "`model` must have parameters, all on one device; got "
            f"{sorted(map(str, devices)) or 'none'}"
        )
    home = devices.pop()
    others = _devices(examples) - {home.type, "meta"}
    if others and home.type != "meta":
        raise DeviceError(f"`example_inputs` must be on {home}, like the model; got {others}")
    if optimizer is not None:
        _check_optimizer(optimizer, parameters)
    return home


def _devices(examples: Examples) -> set[str]:
    """Types of the devices of the inputs."""
    return {tensor.device.type for tensor in tensors(arguments(examples))}


def _check_optimizer(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DtypeError(
            f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
        raise OptimizerError(
            "`optimizer` must hold parameters of the model; it holds none of them (build it after "
            "sparsify_)"
        )


def _check_measuring(measure: bool | None, seconds: float, where: set[str], target: str) -> bool:
    """Whether to measure."""
    if measure not in (None, True, False):
        raise DtypeError(f"`measure` must be a bool or None; got {measure!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise DtypeError(f"`seconds` must be a number; got {seconds!r}")
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"`seconds` must be finite and at least 0; got {seconds}")
    possible = where == {target}
    if measure and not possible:
        raise ConfigError(f"`measure` needs model and inputs on {target}; got {sorted(where)}")
    return possible if measure is None else measure


def _checked(loss: Loss | None) -> Loss:
    if loss is not None and not callable(loss):
        raise DtypeError(f"`loss` must be a function of the model's output; got {loss!r}")
    return loss or total


def _target(home: torch.device, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return as_device(device)
    if home.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return as_device(home)


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


def _batch(examples: Examples, batch: int | None) -> int:
    if batch is not None:
        if type(batch) is not int or batch < 1:
            raise ConfigError(f"`batch` must be an int of at least 1; got {batch!r}")
        return batch
    first = next(iter(tensors(arguments(examples))), None)
    return max(1, len(first)) if first is not None and first.dim() else 1


def _seconds(
    layers: dict[str, nn.Module], found: Prediction, target: torch.device
) -> dict[str, float]:
    times, gradients = predictor(target), found.made.gradients
    every = {
        name: predicted_seconds(name, module, found.step.layers[name], gradients, times, target)
        for name, module in layers.items()
    }
    return {name: seconds for name, seconds in every.items() if seconds is not None}
