"""One training step of a copy of a model: what reaches its layers, and what the step computes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from sparsekern.cost.examples import Call, Examples, arguments, run
from sparsekern.cost.flops import StepCounter, as_products
from sparsekern.cost.layers import Layer, Model, Part
from sparsekern.cost.modes import evaluating
from sparsekern.cost.step import total
from sparsekern.cost.twin import copied
from sparsekern.cost.uses import Use, argument
from sparsekern.errors import ConfigError, DtypeError, ModelError, told
from sparsekern.nn.kinds import SPARSE_TYPES, is_depthwise, weights_of
from sparsekern.swap import Pattern, Target, candidates

ATTENTION = "no cost is known of attention's projections: sparsify_ without a plan takes them"


class _Step(NamedTuple):
    """What a training step did.

    Attributes:
        calls: of the layers that are looked at, by name.
        uses: the facts of each.
        trained: ids of the model's parameters that got a gradient.
        flops: of its products.
    """

    calls: Mapping[str, Sequence[Call]]
    uses: Mapping[str, Sequence[Use | None]]
    trained: frozenset[int]
    flops: int


def examine(
    model: nn.Module,
    examples: Examples,
    distribution: str,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    exclude: Sequence[Pattern] | Pattern,
) -> Model:
    """Take a training step of a copy of the model, in evaluation mode, and gather its layers.

    Raises:
        ConfigError: there is no layer to plan, a parameter has no shape yet, `filter_fn` fails, or
            an `exclude` pattern matches nothing.
        DtypeError: `model` is itself a layer.
        ModelError: it can't be copied, fails on the examples, or its output needs no gradient
            although parameters do.
    """
    _check(model)
    targets = candidates(
        model,
        _explaining(filter_fn),
        [exclude] if isinstance(exclude, str | re.Pattern) else exclude,
        first_conv_stays=distribution == "uniform",
    )
    depthwise = {t.owner for t in targets if is_depthwise(t.module)}
    # projections that get three inputs
    attention = {t.name: ATTENTION for t in targets if isinstance(t.module, nn.MultiheadAttention)}
    targets = [t for t in targets if t.owner not in depthwise and t.name not in attention]
    if not targets:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_TYPES)
        left = f"; {', '.join(attention)}: {ATTENTION}" if attention else ""
        raise ConfigError(f"`model` has no layer that could be made sparse ({kinds}{left})")
    owners = list(dict.fromkeys(t.owner for t in targets))
    step = _step(model, examples, owners)
    parameters = list(model.parameters())
    return Model(
        tuple(_layer([t for t in targets if t.owner == owner], step) for owner in owners),
        tuple(sorted(depthwise)),
        attention,
        step.flops,
        _bytes(parameters),
        _bytes(p for p in parameters if id(p) in step.trained),
        _bytes(model.buffers()),
    )


def _check(model: nn.Module) -> None:
    if weights_of(model):
        raise DtypeError(
            f"`model` must contain layers, as `sparsify_` takes it; got a bare "
            f"{type(model).__name__}: wrap it in nn.Sequential"
        )
    held = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in held if is_lazy(tensor)]
    if lazy:
        raise ConfigError(
            f"`model` must have parameters with shapes: run it once before; got {', '.join(lazy)} "
            "without"
        )


def _explaining(
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> Callable[[nn.Module, str], bool] | None:
    """The filter, with errors that name it."""
    if filter_fn is None:
        return None

    def explained(module: nn.Module, name: str) -> bool:
        try:
            return filter_fn(module, name)
        except Exception as error:
            raise ConfigError(
                f"`filter_fn` must tell of each layer whether it takes part; of {name!r} it raised "
                f"{told(error)}"
            ) from error

    return explained


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(model: nn.Module, examples: Examples, owners: Sequence[str]) -> _Step:
    """A training step of a copy; gradients are dropped as soon as they are there."""
    twin = copied(model, (), None).model
    names = dict(twin.named_modules())
    calls: dict[str, list[Call]] = {owner: [] for owner in owners}
    trained = _noting_gradients(twin)
    counter = StepCounter(
        {owner: names[owner] for owner in owners},
        set(),
        lambda name, call: calls[name].append(call),
    )
    with _counting(twin):
        _count(counter, lambda: _loss(twin, run(twin, _cloned(examples))))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    counts = counter.count.layers
    return _Step(
        calls,
        {owner: counts[owner].uses for owner in owners},
        frozenset(id(p) for p, own in pairs if id(own) in trained),
        sum(count.forward + count.backward for count in counts.values()),
    )


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with gradients, and operators that have formulas."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with ExitStack() as stack:
        if any(hasattr(m, "_orig_mod") for m in model.modules()):  # compiled: run as it was written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(as_products(recurrent=recurrent))
        yield


def _count(counter: StepCounter, forward: Callable[[], Tensor]) -> None:
    try:
        counter.step(forward)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"`model` fails on the example inputs in its backward pass: it raised {told(error)}"
        ) from error


def _noting_gradients(model: nn.Module) -> set[int]:
    """The ids of the parameters that will have got a gradient."""
    found: set[int] = set()

    def note(parameter: Tensor) -> None:
        found.add(id(parameter))
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    return found


def _loss(model: nn.Module, output: Any) -> Tensor:
    """The sum of all outputs; of a model with nothing to train, a number that needs no products."""
    if not any(p.requires_grad for p in model.parameters()):
        return torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    return total(vars(output) if dataclasses.is_dataclass(output) else output)


def _cloned(examples: Examples) -> Examples:
    """Inputs that the model may write to."""

    def clone(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fresh = value.detach().clone().requires_grad_(value.requires_grad)
        # one that needs a gradient can be written to only if it is a result, as this one may be
        return fresh if value.is_leaf else fresh.clone()

    args, kwargs = arguments(examples)
    cloned: Examples = tree_map(clone, kwargs or args)
    return cloned


def _layer(targets: list[Target], step: _Step) -> Layer:
    name, module = targets[0].owner, targets[0].module
    parts = tuple(Part(t.name, t.weight, id(t.weight.parameter) in step.trained) for t in targets)
    for call, use in zip(step.calls[name], step.uses[name], strict=True):
        if use is None:
            raise ModelError(
                f"layer {name!r} must get a tensor with numbers in it; got "
                f"{argument(call, 0, 'input')!r}"
            )
    uses = [use for use in step.uses[name] if use is not None]
    return Layer.of(name, module, parts, uses, step.calls[name])
