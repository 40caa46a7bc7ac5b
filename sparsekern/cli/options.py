"""Command-line options that name a model and what goes into it, for commands that look at both."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.cost.examples import Examples
from sparsekern.devices import as_device
from sparsekern.errors import ConfigError, told
from sparsekern.topology.blocks import Block
from sparsekern.training.zoo import find

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
}
"""Dtypes of example inputs by name; the integers are tokens."""


DOMAINS = {
    "threads": (1, 1024),  # far more make torch abort
    "vocab": (1, 2**31 - 1),
    "seed": (0, 2**64 - 1),  # as torch.manual_seed takes it
}
"""Least and most of options that are integers."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and its example inputs to a command, as `model_and_examples` reads them."""
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that makes an nn.Module, or a pair of one and its "
        "example inputs: a tensor, a tuple of arguments or a dict of named ones; a bare name is "
        "looked up in sparsekern.models",
    )
    group = parser.add_argument_group("example inputs")
    group.add_argument(
        "--input",
        nargs="+",
        type=shape,
        metavar="SHAPE",
        help="of each argument of the model, the batch first, like 64x3x32x32; the values are "
        "random. In place of the function's own",
    )
    group.add_argument(
        "--input-dtype", choices=tuple(DTYPES), help="default: float32, int64 with --vocab"
    )
    group.add_argument("--vocab", type=int, metavar="N", help="tokens are drawn from 0 to N - 1")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="from 0; default: 0")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cpu")
    where.add_argument(
        "--meta",
        action="store_true",
        help="shapes alone: neither weights nor inputs take memory, and nothing is computed",
    )
    where.add_argument("--threads", type=int, metavar="T", help="of the CPU; default: torch's own")


def model_and_examples(arguments: argparse.Namespace) -> tuple[nn.Module, Examples]:
    """Make the model and its inputs, on their device; sets the number of threads and the seed.

    With `--meta` both are on the meta device, and `--device` is left for the command to read.

    Raises:
        ConfigError: an option is out of its domain, the function does not import or fails, makes
            something else, or brings no inputs where none are given.
    """
    _check(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    named = as_device(arguments.device or "cpu")
    device = torch.device("meta") if arguments.meta else _usable(named)
    torch.manual_seed(arguments.seed)
    # only meta tensors must be made in place: a model may well be built on the CPU and then move
    with device if arguments.meta else contextlib.nullcontext():
        made = _called(find(arguments.model), arguments.model)
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`model` {arguments.model}() must return an nn.Module, or one and its example inputs; "
            f"got {type(made).__name__}"
        )
    if arguments.input:
        examples = tuple(_drawn(sizes, arguments) for sizes in arguments.input)
    if examples is None:
        raise ConfigError(
            f"`model` {arguments.model}() brings no example inputs: give --input, like 64x3x32x32"
        )
    with _explained(f"`device` {device} must have room for the model and its inputs"):
        return model.to(device), moved(examples, device)


def shape(text: str) -> tuple[int, ...]:
    """Sizes like 64x3x32x32, for argparse."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected a shape like 64x3x32x32; got {text!r}")
    return tuple(map(int, sizes))


def block(text: str) -> Block:
    """A block like 16 or 16x32, for argparse."""
    edges = text.lower().split("x")
    if not 1 <= len(edges) <= 2 or not all(edge.isdecimal() for edge in edges):
        raise argparse.ArgumentTypeError(f"expected a block like 16 or 16x32; got {text!r}")
    return int(edges[0]) if len(edges) == 1 else (int(edges[0]), int(edges[1]))


def number_or_name(text: str) -> float | str:
    """A number like 0.5, or any other text, for argparse."""
    try:
        return float(text)
    except ValueError:
        return text


def moved(value: Any, device: torch.device) -> Any:
    """The same value with the tensors in its tuples, lists and mappings on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(moved(part, device) for part in value)
    return value


def _check(arguments: argparse.Namespace) -> None:
    for name, (least, most) in DOMAINS.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"`{name}` must lie in [{least}, {most}]; got {value}")
    dtype = _dtype(arguments)
    if arguments.input and dtype.is_floating_point == (arguments.vocab is not None):
        raise ConfigError(
            "tokens need both an integer `input_dtype` and a `vocab` to draw from; got "
            f"{str(dtype).removeprefix('torch.')} and vocab {arguments.vocab}"
        )
    if not arguments.input and (arguments.vocab or arguments.input_dtype):
        raise ConfigError("`vocab` and `input_dtype` describe `input`; got no `input`")


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    default = "float32" if arguments.vocab is None else "int64"
    return DTYPES[arguments.input_dtype or default]


def _usable(device: torch.device) -> torch.device:
    with _explained(f"`device` {str(device)!r} can't be used here"):
        torch.empty(0, device=device)
    return device


@contextlib.contextmanager
def _explained(text: str) -> Iterator[None]:
    """Say what an error of torch's is about, which may name no option and be of any type."""
    try:
        yield
    # torch asserts that it was built with CUDA, and some sizes overflow on their way to it
    except (RuntimeError, MemoryError, AssertionError, OverflowError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"{text}: {why}") from error


def _called(function: Callable[..., Any], spec: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise ConfigError(f"`model` {spec}() failed: {told(error)}") from error


def _drawn(sizes: tuple[int, ...], arguments: argparse.Namespace) -> Tensor:
    """Random numbers or tokens; of the meta device if asked, so that no memory is taken."""
    dtype = _dtype(arguments)
    with _explained(f"`input` {'x'.join(map(str, sizes))} must fit into memory"):
        if arguments.meta:
            return torch.empty(sizes, dtype=dtype, device="meta")
        if dtype.is_floating_point:
            return torch.randn(sizes).to(dtype)
        return torch.randint(arguments.vocab, sizes, dtype=dtype)
