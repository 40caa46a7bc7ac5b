"""The `torch.library` operators of the namespace `sparsekern::`.

A topology crosses the operator boundary as its five index arrays and four sizes, because schemas
know tensors and ints only; everything else in the library passes a `Topology`. The three products
are closed under differentiation: each gradient is again one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.ops.dispatch import backend
from sparsekern.ops.grow import stream_grow_scores
from sparsekern.topology import ARRAY_NAMES, Topology

_COL, _LAYOUT = 1, len(ARRAY_NAMES)  # places among the trailing arguments
_NO_GRADS = [None] * (len(ARRAY_NAMES) + 2)
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int]]


def parts(topology: Topology) -> Parts:
    """A topology as operator arguments: index arrays, and (rows, cols, bh, bw)."""
    return *topology.arrays, [*topology.shape, *topology.block]


def _topology(*parts: Any) -> Topology:
    *arrays, (rows, cols, bh, bw) = parts
    return Topology((rows, cols), (bh, bw), *arrays)


@torch.library.custom_op("sparsekern::spmm", mutates_args=())
def spmm(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    perm: Tensor,
    layout: Sequence[int],
    impl: str,
) -> Tensor:
    """y = x wᵀ + bias."""
    return backend(impl).spmm(x, values, _topology(crow, col, ccol, row, perm, layout), bias)


@torch.library.custom_op("sparsekern::spmm_t", mutates_args=())
def spmm_t(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    perm: Tensor,
    layout: Sequence[int],
    impl: str,
) -> Tensor:
    """dx = dy w."""
    return backend(impl).spmm_t(dy, values, _topology(crow, col, ccol, row, perm, layout))


@torch.library.custom_op("sparsekern::sddmm", mutates_args=())
def sddmm(
    dy: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    perm: Tensor,
    layout: Sequence[int],
    impl: str,
) -> Tensor:
    """dw = dyᵀ x at active blocks."""
    return backend(impl).sddmm(dy, x, _topology(crow, col, ccol, row, perm, layout))


@torch.library.custom_op("sparsekern::spmm_backward", mutates_args=())
def spmm_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    perm: Tensor,
    layout: Sequence[int],
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm` in one go, so that a backend can share its preparation of dy."""
    return backend(impl).backward(dy, x, values, _topology(crow, col, ccol, row, perm, layout))


@torch.library.custom_op("sparsekern::grow_scores", mutates_args=())
def grow_scores(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    perm: Tensor,
    layout: Sequence[int],
    k: int,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block scores of the dense gradient: (active, positions, scores) of `GrowScores`."""
    topology = _topology(crow, col, ccol, row, perm, layout)
    scores = stream_grow_scores(dys, xs, topology, k, norm)
    return scores.active, scores.positions, scores.scores


# ---- fake kernels: shapes without computing


@spmm.register_fake
def _(x: Tensor, values: Tensor, bias: Any, *parts: Any) -> Tensor:
    return x.new_empty(x.shape[0], parts[_LAYOUT][0])


@spmm_t.register_fake
def _(dy: Tensor, values: Tensor, *parts: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], parts[_LAYOUT][1])


@sddmm.register_fake
def _(dy: Tensor, x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty(parts[_COL].shape[0], *parts[_LAYOUT][2:])


@spmm_backward.register_fake
def _(dy: Tensor, x: Tensor, values: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


@grow_scores.register_fake
def _(dys: Any, xs: Any, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
    crow, col, ccol, _row, _perm, _layout, k, _norm = parts
    dtype = torch.float64 if xs[0].dtype is torch.float64 else torch.float32
    inactive = (crow.shape[0] - 1) * (ccol.shape[0] - 1) - col.shape[0]
    best = xs[0].new_empty(min(k, inactive), dtype=dtype)
    return xs[0].new_empty(col.shape[0], dtype=dtype), best.long(), best


# ---- autograd: the products are closed under differentiation


def _save_two(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    first, second, *parts, ctx.layout, ctx.impl = inputs
    ctx.save_for_backward(first, second, *parts)


def _restore(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The saved operands, and the trailing arguments of every product."""
    saved = ctx.saved_tensors
    n = len(saved) - len(ARRAY_NAMES)
    return saved[:n], (*saved[n:], ctx.layout, ctx.impl)


def _save_spmm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, values, bias, *rest = inputs
    _save_two(ctx, (x, values, *rest), output)
    ctx.has_bias = bias is not None


def _spmm_grad(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (x, values), rest = _restore(ctx)
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    dx = dw = None
    if needs_x and needs_values:
        dx, dw = spmm_backward(dy, x, values, *rest)
    elif needs_x:
        dx = spmm_t(dy, values, *rest)
    elif needs_values:
        dw = sddmm(dy, x, *rest)
    db = dy.sum(0) if ctx.has_bias and needs_bias else None
    return dx, dw, db, *_NO_GRADS


def _spmm_t_grad(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (dy, values), rest = _restore(ctx)
    needs_dy, needs_values = ctx.needs_input_grad[:2]
    d_dy = spmm(g, values, None, *rest) if needs_dy else None
    d_values = sddmm(dy, g, *rest) if needs_values else None
    return d_dy, d_values, *_NO_GRADS


def _sddmm_grad(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    (dy, x), rest = _restore(ctx)
    needs_dy, needs_x = ctx.needs_input_grad[:2]
    d_dy = spmm(x, g, None, *rest) if needs_dy else None
    d_x = spmm_t(dy, g, *rest) if needs_x else None
    return d_dy, d_x, *_NO_GRADS


def _save_three(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, values, *parts, ctx.layout, ctx.impl = inputs
    ctx.save_for_backward(dy, x, values, *parts)


def _spmm_backward_grad(ctx: Any, gx: Tensor, gw: Tensor) -> tuple[Any, ...]:
    (dy, x, values), rest = _restore(ctx)
    d_dy = spmm(gx, values, None, *rest) + spmm(x, gw, None, *rest)
    return d_dy, spmm_t(dy, gw, *rest), sddmm(dy, gx, *rest), *_NO_GRADS


spmm.register_autograd(_spmm_grad, setup_context=_save_spmm)
spmm_t.register_autograd(_spmm_t_grad, setup_context=_save_two)
sddmm.register_autograd(_sddmm_grad, setup_context=_save_two)
spmm_backward.register_autograd(_spmm_backward_grad, setup_context=_save_three)
