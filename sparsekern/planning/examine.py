"""One training step of a copy of a model: what reaches its layers, and what the step computes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from sparsekern.cost.examples import Call, Examples, arguments, recording, run
from sparsekern.cost.flops import StepCounter
from sparsekern.cost.layers import Layer, Model, Part, Use
from sparsekern.cost.modes import evaluating
from sparsekern.cost.step import total
from sparsekern.cost.twin import copied
from sparsekern.errors import ConfigError, DtypeError, ModelError
from sparsekern.nn.kinds import SPARSE_TYPES, is_depthwise, weights_of
from sparsekern.swap import Pattern, Target, candidates


class _Step(NamedTuple):
    """What a training step did.

    Attributes:
        calls: of the layers that are looked at, by name.
        reached: whether a gradient came back to the output of each call.
        trained: ids of the model's parameters that got a gradient.
        flops: of its products.
    """

    calls: Mapping[str, Sequence[Call]]
    reached: Mapping[str, Sequence[bool]]
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
    targets = [t for t in targets if t.owner not in depthwise]
    if not targets:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_TYPES)
        raise ConfigError(f"`model` has no layer that could be made sparse ({kinds})")
    owners = list(dict.fromkeys(t.owner for t in targets))
    step = _step(model, examples, owners)
    parameters = list(model.parameters())
    return Model(
        tuple(_layer([t for t in targets if t.owner == owner], step) for owner in owners),
        tuple(sorted(depthwise)),
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
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error

    return explained


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(model: nn.Module, examples: Examples, owners: Sequence[str]) -> _Step:
    """A training step of a copy; gradients are dropped as soon as they are there."""
    twin = copied(model, (), None).model
    names = dict(twin.named_modules())
    wanted = {names[owner] for owner in owners}
    calls: dict[str, list[Call]] = {}
    reached: dict[str, list[bool]] = {}
    trained = _noting_gradients(twin)
    with _counting(twin):

        def forward() -> Tensor:
            with recording(twin, wanted.__contains__) as found:
                output = run(twin, _cloned(examples))
            for name, own in found.items():
                calls[name], reached[name] = own, [False] * len(own)
                for i, call in enumerate(own):
                    _note_arrival(call.output, reached[name], i)
            return _loss(twin, output)

        count = _counted(forward)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return _Step(calls, reached, frozenset(id(p) for p, own in pairs if id(own) in trained), count)


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with gradients, and operators that have formulas."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with ExitStack() as stack:
        if any(hasattr(m, "_orig_mod") for m in model.modules()):  # compiled: run as it was written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        # recurrent layers and attention as products
        stack.enter_context(torch.backends.cudnn.flags(enabled=not recurrent))
        stack.enter_context(torch.backends.mkldnn.flags(not recurrent, None, None, None))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _counted(forward: Callable[[], Tensor]) -> int:
    try:
        layers = StepCounter({}, set()).step(forward).layers
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            "`model` fails on the example inputs in its backward pass: it raised "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return sum(count.forward + count.backward for count in layers.values())


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


def _note_arrival(output: Any, reached: list[bool], i: int) -> None:
    """Note in `reached[i]` that a gradient comes back to an output."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            note: Any = leaf.register_hook  # untyped in torch
            note(lambda _: reached.__setitem__(i, True))


def _loss(model: nn.Module, output: Any) -> Tensor:
    """The sum of all outputs; of a model with nothing to train, a number that needs no products."""
    if not any(p.requires_grad for p in model.parameters()):
        return torch.zeros((), requires_grad=True)
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
    calls, reached = step.calls.get(name, ()), step.reached.get(name, ())
    return Layer(
        name=name,
        module=module,
        parts=parts,
        calls=tuple(calls),
        uses=tuple(
            _use(name, module, call, parts, back) for call, back in zip(calls, reached, strict=True)
        ),
        dtype=targets[0].weight.parameter.dtype,
    )


def _use(name: str, module: nn.Module, call: Call, parts: Sequence[Part], reached: bool) -> Use:
    given = _argument(call, 0, "input")
    x = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(x, Tensor) or not x.numel():
        raise ModelError(f"layer {name!r} must get a tensor with numbers in it; got {given!r}")
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        y: Tensor = call.output
        tokens, numbers, steps = y.numel() // module.out_channels, x.numel() + y.numel(), 0
    else:
        tokens, steps = x.numel() // x.shape[-1], _steps(module, given)
        numbers = tokens * sum(sum(part.weight.shape) for part in parts)
    dx, dw = reached and x.requires_grad, reached and any(part.trained for part in parts)
    states = _states(module, given, call, tokens) if reached else 0
    return Use(tuple(x.shape), tokens, numbers, steps, dx, dw, states)


def _argument(call: Call, position: int, name: str) -> Any:
    if len(call.args) > position:
        return call.args[position]
    return call.kwargs.get(name)


def _states(module: nn.Module, given: Any, call: Call, tokens: int) -> int:
    """How often a gradient of the state before is computed: not of one that was no result."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return 0
    state = _argument(call, 1, "hx")
    state = state[0] if isinstance(state, tuple) else state
    if state is not None and state.requires_grad:
        return tokens
    if not isinstance(module, nn.RNNBase):
        return 0
    if isinstance(given, PackedSequence):
        return tokens - int(given.batch_sizes[0])
    return tokens - (given.shape[0 if module.batch_first else 1] if given.dim() == 3 else 1)


def _steps(module: nn.Module, given: Any) -> int:
    if isinstance(module, nn.Linear):
        return 0
    if not isinstance(module, nn.RNNBase):
        return 1  # a cell
    if isinstance(given, PackedSequence):
        length = len(given.batch_sizes)
    else:
        length = given.shape[1 if module.batch_first and given.dim() == 3 else 0]
    return int(length) * module.num_layers * (2 if module.bidirectional else 1)
