"""Models of the command line by name: a function that makes an `nn.Module` for some data."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sparsekern.cost.modes import evaluating
from sparsekern.errors import ConfigError, told
from sparsekern.training.data import Dataset, Images, for_model

ZOO = "sparsekern.models"
"""Where a name without a module is looked up."""
WIDTHS = ("conv", "hidden")
"""Parameters of a model's function that say how wide its layers are."""


def find(spec: str) -> Callable[..., nn.Module]:
    """The function that `spec` names, NAME of `ZOO` or MODULE:FUNCTION.

    Modules are found as `python -m` finds them, in the current directory first.

    Raises:
        ConfigError: it does not import, or is no function.
    """
    before, _, name = spec.rpartition(":")
    module = before or ZOO
    found = imported("model", spec, module, name)
    if not callable(found):
        raise ConfigError(
            f"`model` {spec!r}: expected a function that makes an nn.Module; "
            f"{module}:{name} is {type(found).__name__}"
        )
    made: Callable[..., nn.Module] = found
    return made


def imported(option: str, spec: str, module: str, name: str) -> Any:
    """What `module` holds under `name`; `spec` is what was given for `option`.

    Raises:
        ConfigError: it does not import.
    """
    try:
        with _current_directory_first():
            return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise ConfigError(
            f"`{option}` {spec!r}: expected {module}:{name} to import; got {told(error)}"
            f"{_advice(module)}"
        ) from error


def takes_images(function: Callable[..., nn.Module]) -> bool:
    """Whether the model wants (n, channels, height, width): it has a parameter `in_channels`.

    Any other model gets images as rows of pixels.
    """
    return "in_channels" in _parameters(function)


def widths(spec: str) -> dict[str, tuple[int, ...]]:
    """Its parameters that are widths of layers, `conv` and `hidden`, with what they are by default.

    Raises:
        ConfigError: as in `find`.
    """
    try:
        parameters = inspect.signature(find(spec)).parameters
    except (TypeError, ValueError):
        return {}
    found = {name: parameters[name].default for name in WIDTHS if name in parameters}
    return {name: tuple(v) for name, v in found.items() if isinstance(v, Sequence) and v}


def make(
    spec: str, data: Dataset, widths: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> nn.Module:
    """Call the function with those of these parameters that it has, and check what it made.

    `classes`, `in_channels` and `image_size` (the edge, or height and width) for images; `vocab`
    and `seq_len` for text; and `widths`.

    Raises:
        ConfigError: it fails, makes no module, or its module does not fit the data.
    """
    function = find(spec)
    known = _parameters(function)
    given = {k: v for k, v in (_offered(data) | dict(widths)).items() if k in known}
    called = f"{spec}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
    try:
        model = function(**given)
    except Exception as error:
        raise ConfigError(f"`model` {called} failed: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` {called} must return an nn.Module; got {type(model).__name__}")
    _check_fits(model, called, data)
    return model


def _offered(data: Dataset) -> dict[str, Any]:
    if not isinstance(data, Images):
        return {"vocab": data.classes, "seq_len": data.train_x.shape[1]}
    height, width = data.image_shape
    edge = height if height == width else (height, width)
    return {"classes": data.classes, "in_channels": data.channels, "image_size": edge}


def _check_fits(model: nn.Module, called: str, data: Dataset) -> None:
    x = for_model(data.test_x[:1])
    expected = (*data.test_y[:1].shape, data.classes)
    try:
        with evaluating(model):
            y: Tensor = model(x)
    except Exception as error:
        raise ConfigError(
            f"`model` {called} must take {x.dtype} of shape {tuple(x.shape)}, one "
            f"{data.sample} of {data.name}; got {told(error)}"
        ) from error
    if not isinstance(y, Tensor) or tuple(y.shape) != expected:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ConfigError(
            f"`model` {called} must map {tuple(x.shape)} to {expected}, one {data.sample} of "
            f"{data.name} to a score for each class; got {got}"
        )


def _parameters(function: Callable[..., nn.Module]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in callables have none to show
        return frozenset()


def _advice(module: str) -> str:
    names = getattr(sys.modules.get(module), "__all__", ())
    if names:
        return f"; {module} has {', '.join(names)}"
    return f"; {module} must be importable from the current directory"


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")
