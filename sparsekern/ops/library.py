"""The `torch.library` operators of the namespace `sparsekern::`.

A topology crosses the operator boundary as its index arrays and four sizes, because schemas
know tensors and ints only; everything else in the library passes a `Topology`. The three products
are closed under differentiation: each gradient is again one of them.

The operators are defined on the dispatcher directly: `torch.library.custom_op` would cost 0.15 ms
more for each call, as much as a small layer's product takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.ops.dispatch import backend
from sparsekern.ops.grow import grow_scores_of
from sparsekern.topology import ARRAY_NAMES, Topology

_TOPOLOGY = ", ".join(f"Tensor {name}" for name in ARRAY_NAMES) + ", int[] layout"
_COL, _LAYOUT = 1, len(ARRAY_NAMES)  # places among the trailing arguments
_NO_GRADS = [None] * (len(ARRAY_NAMES) + 2)
_make_library: Any = torch.library.Library  # untyped in torch
_LIBRARY = _make_library("sparsekern", "DEF")


def parts(topology: Topology) -> tuple[Any, ...]:
    """A topology as operator arguments: index arrays, and (rows, cols, bh, bw)."""
    return *topology.arrays, [*topology.shape, *topology.block]


def _topology(*parts: Any) -> Topology:
    *arrays, (rows, cols, bh, bw) = parts
    return Topology((rows, cols), (bh, bw), *arrays)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator with its kernel for real tensors and the one that only knows shapes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sparsekern, name).default


# ---- kernels: the last argument names the backend


def _spmm(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *parts, relu, impl = rest
    return backend(impl).spmm(x, values, _topology(*parts), bias, relu=relu)


def _spmm_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *parts, impl = rest
    return backend(impl).spmm_t(dy, values, _topology(*parts))


def _sddmm(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *parts, impl = rest
    return backend(impl).sddmm(dy, x, _topology(*parts))


def _sddmm_add(out: Tensor, dy: Tensor, x: Tensor, *rest: Any) -> None:
    *parts, impl = rest
    with torch.no_grad():
        backend(impl).sddmm(dy, x, _topology(*parts), out=out)
    if impl == "triton":  # a kernel writes unseen: whoever saved `out` must notice
        torch.autograd.graph.increment_version(out)


def _spmm_backward(dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *parts, impl = rest
    return backend(impl).backward(dy, x, values, _topology(*parts))


def _grow_scores(
    dys: Sequence[Tensor], xs: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *parts, k, norm, impl = rest
    scores = grow_scores_of(dys, xs, _topology(*parts), k, norm, impl)
    return scores.active, scores.positions, scores.scores


# ---- fake kernels: shapes without computing


def _fake_spmm(x: Tensor, values: Tensor, bias: Any, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[_LAYOUT][0])


def _fake_spmm_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], rest[_LAYOUT][1])


def _fake_sddmm(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(rest[_COL].shape[0], *rest[_LAYOUT][2:])


def _fake_sddmm_add(out: Tensor, dy: Tensor, x: Tensor, *rest: Any) -> None:
    return None


def _fake_spmm_backward(dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


def _fake_grow_scores(dys: Any, xs: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    crow, col, ccol, *_others, k, _norm, _impl = rest
    dtype = torch.float64 if xs[0].dtype is torch.float64 else torch.float32
    inactive = (crow.shape[0] - 1) * (ccol.shape[0] - 1) - col.shape[0]
    best = xs[0].new_empty(min(k, inactive), dtype=dtype)
    return xs[0].new_empty(col.shape[0], dtype=dtype), best.long(), best


spmm = _define(
    f"spmm(Tensor x, Tensor values, Tensor? bias, {_TOPOLOGY}, bool relu, str impl) -> Tensor",
    _spmm,
    _fake_spmm,
)
spmm_t = _define(
    f"spmm_t(Tensor dy, Tensor values, {_TOPOLOGY}, str impl) -> Tensor", _spmm_t, _fake_spmm_t
)
sddmm = _define(f"sddmm(Tensor dy, Tensor x, {_TOPOLOGY}, str impl) -> Tensor", _sddmm, _fake_sddmm)
sddmm_add = _define(
    f"sddmm_add(Tensor(a!) out, Tensor dy, Tensor x, {_TOPOLOGY}, str impl) -> ()",
    _sddmm_add,
    _fake_sddmm_add,
)
spmm_backward = _define(
    f"spmm_backward(Tensor dy, Tensor x, Tensor values, {_TOPOLOGY}, str impl) -> (Tensor, Tensor)",
    _spmm_backward,
    _fake_spmm_backward,
)
grow_scores = _define(
    f"grow_scores(Tensor[] dys, Tensor[] xs, {_TOPOLOGY}, int k, str norm, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _grow_scores,
    _fake_grow_scores,
)


# ---- autograd: the products are closed under differentiation


def _keep(ctx: Any, *operands: Any) -> None:
    *tensors, ctx.layout, ctx.impl = operands
    ctx.save_for_backward(*tensors)


def _restore(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The saved operands, and the trailing arguments of every product."""
    saved = ctx.saved_tensors
    n = len(saved) - len(ARRAY_NAMES)
    return saved[:n], (*saved[n:], ctx.layout, ctx.impl)


def _plain_spmm(x: Tensor, values: Tensor, rest: tuple[Any, ...]) -> Any:
    *parts, impl = rest
    return spmm(x, values, None, *parts, False, impl)


def _below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        *parts, relu, impl = rest
        y = _below_autograd(spmm, x, values, bias, *rest)
        _keep(ctx, x, values, *((y,) if relu else ()), *parts, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, values, *clamped), rest = _restore(ctx)
        if clamped:  # the derivative of max(y, 0) can be read off its result
            dy = torch.ops.aten.threshold_backward(dy, clamped[0], 0)
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if needs_x and needs_values:
            dx, dw = spmm_backward(dy, x, values, *rest)
        elif needs_x:
            dx = spmm_t(dy, values, *rest)
        elif needs_values:
            dw = sddmm(dy, x, *rest)
        return dx, dw, dy.sum(0) if needs_bias else None, *_NO_GRADS, None


class _SpmmT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, values: Tensor, *rest: Any) -> Any:
        _keep(ctx, dy, values, *rest)
        return _below_autograd(spmm_t, dy, values, *rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (dy, values), rest = _restore(ctx)
        needs_dy, needs_values = ctx.needs_input_grad[:2]
        d_dy = _plain_spmm(g, values, rest) if needs_dy else None
        d_values = sddmm(dy, g, *rest) if needs_values else None
        return d_dy, d_values, *_NO_GRADS


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
        _keep(ctx, dy, x, *rest)
        return _below_autograd(sddmm, dy, x, *rest)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (dy, x), rest = _restore(ctx)
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        d_dy = _plain_spmm(x, g, rest) if needs_dy else None
        d_x = spmm_t(dy, g, *rest) if needs_x else None
        return d_dy, d_x, *_NO_GRADS


class _SpmmBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> Any:
        _keep(ctx, dy, x, values, *rest)
        return _below_autograd(spmm_backward, dy, x, values, *rest)

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gw: Tensor) -> tuple[Any, ...]:
        (dy, x, values), rest = _restore(ctx)
        needs_dy, needs_x, needs_values = ctx.needs_input_grad[:3]
        d_dy = _plain_spmm(gx, values, rest) + _plain_spmm(x, gw, rest) if needs_dy else None
        d_x = spmm_t(dy, gw, *rest) if needs_x else None
        d_values = sddmm(dy, gx, *rest) if needs_values else None
        return d_dy, d_x, d_values, *_NO_GRADS


for _name, _function in (
    ("spmm", _Spmm),
    ("spmm_t", _SpmmT),
    ("sddmm", _Sddmm),
    ("spmm_backward", _SpmmBackward),
):
    _LIBRARY.impl(_name, _function.apply, "Autograd")
