"""Run a model on example inputs, and say which layer fails."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsekern.errors import ModelError, told

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
                f"{described(inputs)} and raised {told(error)}"
            ) from error


def described(value: Any) -> str:
    """Shapes and dtypes of tensors, as an error message shows them."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(described, value))})"
    return type(value).__name__
