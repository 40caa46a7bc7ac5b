"""What a training step will cost, found without computing or allocating anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from sparsekern.cost.examples import Examples
from sparsekern.cost.flops import StepCount, StepCounter, as_products
from sparsekern.cost.memory import Lifetimes
from sparsekern.cost.step import Loss, clear, forward
from sparsekern.cost.twin import Twin, copied, weightless
from sparsekern.errors import ModelError, OptimizerError, told
from sparsekern.nn import SparseLayer
from sparsekern.ops.dispatch import Assumed
from sparsekern.profiling.rows import Trained, layers_of


class Prediction(NamedTuple):
    """A training step, counted.

    Attributes:
        step: by layer, under the names of `layers_of`.
        made: gradients, and the optimizer's state after a step; shapes alone.
        before_bytes: parameters, buffers, optimizer state and inputs.
        peak_bytes: most bytes alive at once during a step, those before it included.
        by_running: the model asks tensors for values, so that a copy with values was run.
    """

    step: StepCount
    made: Trained
    before_bytes: int
    peak_bytes: int
    by_running: bool


def predicted(
    model: nn.Module,
    examples: Examples,
    optimizer: torch.optim.Optimizer | None,
    loss: Loss,
    device: torch.device,
) -> Prediction:
    """Count a training step of a model, which may be on the meta device, as if on `device`.

    Raises:
        ModelError: it fails on the examples, can't be copied, or is on the meta device and needs to
            know values.
        OptimizerError: the optimizer can't take a step by itself.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.enable_grad():
        try:
            with mode:
                twin = weightless(model, examples, optimizer, mode)
                return _step_of(model, twin, loss, device)
        except (*_ASKED, ModelError) as error:
            asked = error if isinstance(error, _ASKED) else error.__cause__
            if not isinstance(asked, _ASKED):
                raise
            if any(p.is_meta for p in model.parameters()):
                raise ModelError(
                    "a model on the meta device must have shapes that do not depend on the values "
                    f"of its tensors; {error}"
                ) from error
        with torch.random.fork_rng(_cuda(model)):
            found = _step_of(model, copied(model, examples, optimizer), loss, device)
        return found._replace(by_running=True)


_ASKED = (DataDependentOutputException, DynamicOutputShapeException)
"""What a tensor without memory raises that is asked for its values."""


def _cuda(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


def _step_of(model: nn.Module, twin: Twin, loss: Loss, device: torch.device) -> Prediction:
    twin.model.train()
    _assume(twin.model, device)
    count = _counted(twin, loss)
    pairs = list(zip(model.parameters(), twin.model.parameters(), strict=True))
    gradients = frozenset(id(parameter) for parameter, own in pairs if own.grad is not None)
    clear(twin)
    before, peak = _lifetimes(twin, loss)
    state = {} if twin.optimizer is None else twin.optimizer.state
    known = {parameter: state[own] for parameter, own in pairs if own in state}
    return Prediction(count, Trained(gradients, known), before, peak, by_running=False)


def _assume(model: nn.Module, device: torch.device) -> None:
    """Let the layers of a copy choose as on `device`; with memory elsewhere, what counts alike."""
    for layer in model.modules():
        if not isinstance(layer, SparseLayer) or layer.impl == "masked":
            continue
        weightless = isinstance(layer.values, FakeTensor)
        if weightless or layer.values.device.type == device.type:
            assumed: Any = Assumed(layer.impl, device)
            layer.impl = assumed
        else:
            layer.impl = "dense" if layer.impl_on(device) == "dense" else None


def _counted(twin: Twin, loss: Loss) -> StepCount:
    held = {t.untyped_storage()._cdata for t in (*twin.model.parameters(), *twin.model.buffers())}
    counter = StepCounter(layers_of(twin.model), held)
    with as_products():
        return counter.step(lambda: forward(twin, loss))


def _lifetimes(twin: Twin, loss: Loss) -> tuple[int, int]:
    """Bytes held between steps, and the peak of a step that is not the first."""
    with Lifetimes() as lifetimes:
        lifetimes.hold([list(twin.model.parameters()), list(twin.model.buffers())])
        lifetimes.hold(twin.examples)
        if twin.optimizer is not None:
            _step(twin, loss, lifetimes)  # makes the optimizer's state
            lifetimes.hold([twin.optimizer.state.get(p) for p in twin.model.parameters()])
            clear(twin)
        lifetimes.restart()
        held = lifetimes.now
        _step(twin, loss, lifetimes)
        return held, lifetimes.peak


def _step(twin: Twin, loss: Loss, lifetimes: Lifetimes) -> None:
    torch.autograd.backward(forward(twin, loss))
    if twin.optimizer is not None:
        lifetimes.values_do_not_matter = True
        with _optimizer_explained(twin.optimizer):
            twin.optimizer.step()
        lifetimes.values_do_not_matter = False


@contextmanager
def _optimizer_explained(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OptimizerError(
            f"`optimizer` {type(optimizer).__name__} must take a step by itself, without a "
            f"closure; it raised {told(error)}"
        ) from error
