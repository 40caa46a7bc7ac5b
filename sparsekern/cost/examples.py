"""Run a model on example inputs, see what reaches its layers, and say which one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsekern.errors import ModelError

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor, positional arguments, or keyword arguments of a model's forward."""


class Call(NamedTuple):
    """One call of one module.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        output: what it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def arguments(examples: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that the examples stand for."""
    if isinstance(examples, Mapping):
        return (), dict(examples)
    return (tuple(examples) if isinstance(examples, tuple | list) else (examples,)), {}


def run(model: nn.Module, examples: Examples) -> Any:
    """The model's output on the examples.

    Raises:
        ModelError: it fails; names the innermost layer that did, and what reached it.
    """
    args, kwargs = arguments(examples)
    names = {module: name for name, module in model.named_modules()}
    stack: list[tuple[nn.Module, tuple[Any, ...]]] = []
    with ExitStack() as hooks:
        for module in names:
            entered = module.register_forward_pre_hook(lambda m, a: stack.append((m, a)))
            left = module.register_forward_hook(lambda *_: stack.pop() and None)
            hooks.callback(entered.remove)
            hooks.callback(left.remove)
        try:
            return model(*args, **kwargs)
        except Exception as error:
            module, inputs = stack[-1] if stack else (model, args)
            where = f"its layer {names[module]!r} " if names[module] else ""
            raise ModelError(
                f"`model` fails on the example inputs: {where}({type(module).__name__}) got "
                f"{described(inputs)} and raised {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error


@contextmanager
def recording(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> Iterator[dict[str, list[Call]]]:
    """Keep the calls of those of the model's modules that `wanted` picks, by their first name.

    Modules that are never called have an empty list.
    """
    calls: dict[str, list[Call]] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if wanted(module):
                own = calls.setdefault(name, [])
                handle = module.register_forward_hook(
                    lambda _m, args, kwargs, out, own=own: own.append(Call(args, kwargs, out)),
                    with_kwargs=True,
                )
                hooks.callback(handle.remove)
        yield calls


def described(value: Any) -> str:
    """Shapes and dtypes of tensors, as an error message shows them."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return type(value).__name__
