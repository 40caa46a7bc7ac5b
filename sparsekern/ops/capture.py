"""Handing a layer's inputs and output gradients to whoever asked for them.

A layer under observation passes its output through `capture`; in backward, the sink registered
under that key receives the pair (dy, x), whose product dyᵀ x is the dense gradient. Where a
gradient is differentiated again (a gradient penalty), the weight is met once more, in dx = dy w:
the sink then receives (dy, the gradient of dx) too. The operators are opaque to `torch.compile`, so
a compiled layer can be observed. Layers that are not observed never call them. A layer whose
backward pass is a function of its own (`sparsekern.nn.recurrent.scan`) calls `expect` and `receive`
itself.

`values` passes through only to stand in the graph: its gradient is accumulated after all pairs of a
backward pass have come.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparsekern.ops.direct import is_plain
from sparsekern.ops.library import below_autograd, define, differentiate

_C: Any = torch._C  # untyped in torch


class Sink(Protocol):
    """What receives captured pairs."""

    def expect(self) -> None:
        """A forward pass went through the layer."""

    def receive(self, dy: Tensor, x: Tensor) -> None:
        """A backward pass came through: (M, rows) and (M, cols), or images."""


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


# ---- operators


def _capture(y: Tensor, x: Tensor, values: Tensor, key: int) -> Tensor:
    expect(key)
    return y.clone()


def _capture_backward(dy: Tensor, x: Tensor, key: int) -> Tensor:
    receive(key, dy, x)
    return dy.clone()


def _fake(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


capture = define("capture(Tensor y, Tensor x, Tensor values, int key) -> Tensor", _capture, _fake)
"""Return a copy of `y`, and tell the sink that a backward pass may follow."""
capture_backward = define(
    "capture_backward(Tensor dy, Tensor x, int key) -> Tensor", _capture_backward, _fake
)
"""Give (dy, x) to the sink; return a copy of dy."""


def _handed(key: int, dy: Tensor, x: Tensor) -> Tensor:
    """Give (dy, x) to the sink: at once, or by the operator where a tracer has to see it."""
    traced = (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
    )
    if traced or not is_plain(dy, x):
        passed: Tensor = capture_backward(dy, x, key)
        return passed
    receive(key, dy, x)
    return dy


# ---- autograd


class _Capture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, values: Tensor, key: int) -> Tensor:
        ctx.values, ctx.key = values, key
        ctx.save_for_backward(x)
        copy: Tensor = below_autograd(capture, y, x, values, key)
        return copy

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy = _handed(ctx.key, dy, x)
        dx = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[1]:
            dx = _absent(dy, ctx.values, x, ctx.key, True)
        return dy, dx, None, None


class _CaptureBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, dy: Tensor, x: Tensor, key: int) -> Tensor:
        copy: Tensor = below_autograd(capture_backward, dy, x, key)
        return copy

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, None


differentiate({"capture": _Capture, "capture_backward": _CaptureBackward})


class _Absent(torch.autograd.Function):
    """The product of dy, or of x, with the weights that do not exist: zero, but not its gradients.

    It stands beside the layer's own product wherever a gradient is differentiated again, and is
    closed under differentiation as that is.
    """

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, values: Tensor, like: Tensor, key: int, by_dy: bool
    ) -> Tensor:
        ctx.values, ctx.key, ctx.by_dy = values, key, by_dy
        ctx.save_for_backward(given)
        return given.new_zeros(()).expand(like.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = ctx.saved_tensors
        receive(ctx.key, *((given, g) if ctx.by_dy else (g, given)))
        again = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[0]:
            again = _absent(g, ctx.values, given, ctx.key, not ctx.by_dy)
        return again, None, None, None, None


def _absent(given: Tensor, values: Tensor, like: Tensor, key: int, by_dy: bool) -> Tensor:
    zeros: Tensor = _Absent.apply(given, values, like.detach(), key, by_dy)  # type: ignore[no-untyped-call]
    return zeros
