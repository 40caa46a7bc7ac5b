"""What a training step will cost, found without computing or allocating anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from sparsekern.errors import ModelError, OptimizerError
from sparsekern.examples import Examples
from sparsekern.ops.dispatch import assuming
from sparsekern.profiling.flops import StepCount, StepCounter
from sparsekern.profiling.memory import Lifetimes
from sparsekern.profiling.rows import State, layers_of
from sparsekern.profiling.step import Loss, clear, forward
from sparsekern.profiling.twin import Twin, weightless


class Prediction(NamedTuple):
    """A training step, counted.

    Attributes:
        step: by layer, under the names of `layers_of`.
        state: of the optimizer after a step, by the model's parameters; shapes alone.
        held_bytes: parameters, buffers, optimizer state and inputs.
        peak_bytes: most bytes alive at once during a step, those held included.
    """

    step: StepCount
    state: State
    held_bytes: int
    peak_bytes: int


def predicted(
    model: nn.Module,
    examples: Examples,
    optimizer: torch.optim.Optimizer | None,
    loss: Loss,
    device: torch.device,
) -> Prediction:
    """Count a training step of a model, which may be on the meta device, as if on `device`.

    Raises:
        ModelError: it fails on the examples, can't be copied, or needs to know values.
        OptimizerError: the optimizer can't take a step without a closure.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = weightless(model, examples, optimizer, mode)
    twin.model.train()
    with assuming(device), mode, _explained():
        count = _counted(twin, loss)
        clear(twin)
        held, peak = _lifetimes(twin, loss)
    known: State = {} if twin.optimizer is None else twin.optimizer.state
    pairs = zip(model.parameters(), twin.model.parameters(), strict=True)
    state = {parameter: known[own] for parameter, own in pairs if own in known}
    return Prediction(count, state, held, peak)


def _counted(twin: Twin, loss: Loss) -> StepCount:
    held = {t.untyped_storage()._cdata for t in (*twin.model.parameters(), *twin.model.buffers())}
    counter = StepCounter(layers_of(twin.model), held)
    # recurrent layers and attention as products that have a formula
    with (
        torch.backends.cudnn.flags(enabled=False),
        torch.backends.mkldnn.flags(False, None, None, None),
        sdpa_kernel(SDPBackend.MATH),
    ):
        return counter.step(lambda: forward(twin, loss))


def _lifetimes(twin: Twin, loss: Loss) -> tuple[int, int]:
    """Bytes held between steps, and the peak of a step that is not the first."""
    with Lifetimes() as lifetimes:
        lifetimes.hold([list(twin.model.parameters()), list(twin.model.buffers())])
        lifetimes.hold(twin.examples)
        if twin.optimizer is not None:
            _step(twin, loss, lifetimes)  # makes the optimizer's state
            lifetimes.hold(_tensors(twin.optimizer))
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


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    own = [list(entries.values()) for entries in optimizer.state.values()]
    return [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor)]


@contextmanager
def _explained() -> Iterator[None]:
    """Say what it means when a model asks a tensor without memory for its values."""
    asked = (DataDependentOutputException, DynamicOutputShapeException)
    try:
        yield
    except asked as error:
        raise ModelError(_needs_values(error)) from error
    except ModelError as error:
        if isinstance(error.__cause__, asked):
            raise ModelError(f"{error}; {_needs_values(error.__cause__)}") from error
        raise


def _needs_values(error: Any) -> str:
    return (
        "a profile needs a model whose shapes do not depend on the values of its tensors; "
        f"{error.func} asks for them"
    )


@contextmanager
def _optimizer_explained(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OptimizerError(
            f"`optimizer` {type(optimizer).__name__} must take a step without a closure; it raised "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
