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
from sparsekern.ops.library import define, differentiate, vectorize
from sparsekern.ops.transforms import Rule, below_autograd, folded

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
        ctx.save_for_forward(x)
        copy: Tensor = below_autograd(capture, y, x, values, key)
        return copy

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy = _handed(ctx.key, dy, x)
        dx = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[1]:
            dx = _absent(dy, x, ctx.values, ctx.key, True)
        return dy, dx, None, None

    @staticmethod
    def jvp(ctx: Any, ty: Any, tx: Any, *_: Any) -> Tensor | None:
        if ty is None or tx is None:
            return None if ty is None else ty.clone()
        passed: Tensor = capture(ty, tx, ctx.values, ctx.key)  # x w depends on w once more
        return passed


class _CaptureBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, dy: Tensor, x: Tensor, key: int) -> Tensor:
        copy: Tensor = below_autograd(capture_backward, dy, x, key)
        return copy

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, None

    @staticmethod
    def jvp(_ctx: Any, t_dy: Any, *_: Any) -> Tensor | None:
        return None if t_dy is None else t_dy.clone()


differentiate({"capture": _Capture, "capture_backward": _CaptureBackward})
vectorize({"capture": folded(capture, 2), "capture_backward": folded(capture_backward, 2)})


class _Absent(torch.autograd.Function):
    """The product of dy, or of x, with the weights that do not exist: zero, but not its gradients.

    It stands beside the layer's own product wherever a gradient is differentiated again, and is
    closed under differentiation as that is.
    """

    @staticmethod
    def forward(given: Tensor, like: Tensor, *_: Any) -> Tensor:
        return given.new_zeros(()).expand(like.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        given, like, ctx.values, ctx.key, ctx.by_dy = inputs
        ctx.save_for_backward(given)
        ctx.save_for_forward(like)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = ctx.saved_tensors
        _handed(ctx.key, *((given, g) if ctx.by_dy else (g, given)))
        again = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[0]:
            again = _absent(g, given, ctx.values, ctx.key, not ctx.by_dy)
        return again, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t_given: Any, *_: Any) -> Tensor | None:
        (like,) = ctx.saved_tensors
        return None if t_given is None else _absent(t_given, like, ctx.values, ctx.key, ctx.by_dy)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _absent_rule(info, in_dims, *args)


def _absent(given: Tensor, like: Tensor, values: Tensor, key: int, by_dy: bool) -> Tensor:
    zeros: Tensor = _Absent.apply(given, like.detach(), values, key, by_dy)  # type: ignore[no-untyped-call]
    return zeros


_absent_rule: Rule = folded(_absent, 2)
