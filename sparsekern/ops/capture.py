"""Handing a layer's inputs and output gradients to whoever asked for them.

A layer under observation passes its output through `capture`; in backward, the sink registered
under that key receives the pair (dy, x). The operators are opaque to `torch.compile`, so a compiled
layer can be observed too. Layers that are not observed never call them. A layer whose backward pass
is a function of its own (`sparsekern.nn.recurrent.scan`) calls `expect` and `receive` itself.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Sink(Protocol):
    """What receives captured pairs."""

    def expect(self) -> None:
        """A forward pass went through the layer."""

    def receive(self, dy: Tensor, x: Tensor) -> None:
        """Its backward pass came: (M, rows) and (M, cols)."""


_sinks: WeakValueDictionary[int, Sink] = WeakValueDictionary()
_keys = itertools.count(1)


def register(sink: Sink) -> int:
    """Register a sink, which is held weakly; returns its key, never 0."""
    key = next(_keys)
    _sinks[key] = sink
    return key


def expect(key: int) -> None:
    """Tell the sink, if there is one, that a backward pass may follow."""
    sink = _sinks.get(key)
    if sink is not None:
        sink.expect()


def receive(key: int, dy: Tensor, x: Tensor) -> None:
    """Give (dy, x) to the sink, if there is one."""
    sink = _sinks.get(key)
    if sink is not None:
        sink.receive(dy, x)


@torch.library.custom_op("sparsekern::capture", mutates_args=())
def capture(y: Tensor, x: Tensor, key: int) -> Tensor:
    """Return a copy of `y`, and tell the sink that a backward pass may follow."""
    expect(key)
    return y.clone()


@torch.library.custom_op("sparsekern::capture_backward", mutates_args=())
def capture_backward(dy: Tensor, x: Tensor, key: int) -> Tensor:
    """Give (dy, x) to the sink; return a copy of dy."""
    receive(key, dy, x)
    return dy.clone()


@capture.register_fake
def _(y: Tensor, x: Tensor, key: int) -> Tensor:
    return torch.empty_like(y)


@capture_backward.register_fake
def _(dy: Tensor, x: Tensor, key: int) -> Tensor:
    return torch.empty_like(dy)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, x, ctx.key = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return capture_backward(dy, x, ctx.key), None, None


capture.register_autograd(_backward, setup_context=_save)
capture_backward.register_autograd(lambda _ctx, grad: (grad, None, None))
