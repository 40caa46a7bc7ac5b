"""The `torch.library` operators of the namespace `sparsekern::`; convolutions in `conv_library`.

A topology crosses the operator boundary as its index arrays and six sizes, because schemas
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
from sparsekern.ops.transforms import (
    Rule,
    below_autograd,
    bilinear_tangent,
    both_gradients,
    each,
    folded,
    kernel_of,
    refused,
    tangent_sum,
)
from sparsekern.topology import ARRAY_NAMES, Topology
from sparsekern.topology.known import known_topology, versions_if_counted, versions_of

TOPOLOGY = ", ".join(f"Tensor {name}" for name in ARRAY_NAMES) + ", int[] layout"
_COL, _LAYOUT = 1, len(ARRAY_NAMES)  # places among the trailing arguments
NO_GRADS = [None] * (len(ARRAY_NAMES) + 2)
_make_library: Any = torch.library.Library  # untyped in torch
_LIBRARY = _make_library("sparsekern", "DEF")
_jit: Any = torch.jit  # untyped likewise


def parts(topology: Topology) -> tuple[Any, ...]:
    """A topology as operator arguments: index arrays, and [rows, cols, bh, bw, groups, taps]."""
    return *topology.arrays, list(topology.layout)


def topology_of(*parts: Any) -> Topology:
    """Inverse of `parts`, unchecked; a convolution's sizes may follow in the last one."""
    *arrays, layout = parts
    rows, cols, bh, bw, groups, taps = layout[:6]
    named: dict[str, Any] = dict(zip(ARRAY_NAMES, arrays, strict=True))
    return Topology((rows, cols), (bh, bw), **named, groups=groups, taps=taps)


def checked_topology(*parts: Any) -> Topology:
    """Inverse of `parts`, for kernels: the object that the arrays came from, if it is alive.

    Raises:
        TopologyError: the arrays are no topology.
    """
    *arrays, layout = parts
    found = known_topology(arrays, tuple(layout[:6]))
    if found is not None:
        return found
    topology = topology_of(*parts)
    return topology if topology.known() is not None else topology.validate()


def is_traced() -> bool:
    """Whether `torch.jit.trace` follows what is called now."""
    return bool(_jit.is_tracing())


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator with its kernel for real tensors and the one that only knows shapes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sparsekern, name).default


# ---- kernels: the last argument names the backend


def _spmm(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *parts, relu, impl = rest
    return backend(impl).spmm(x, values, checked_topology(*parts), bias, relu=relu)


def _spmm_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    *parts, impl = rest
    return backend(impl).spmm_t(dy, values, checked_topology(*parts))


def _sddmm(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *parts, impl = rest
    return backend(impl).sddmm(dy, x, checked_topology(*parts))


def _sddmm_add(out: Tensor, dy: Tensor, x: Tensor, *rest: Any) -> None:
    *parts, impl = rest
    with torch.no_grad():
        backend(impl).sddmm(dy, x, checked_topology(*parts), out=out)
    if impl == "triton":  # a kernel writes unseen: whoever saved `out` must notice
        torch.autograd.graph.increment_version(out)


def _spmm_backward(dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *parts, impl = rest
    return backend(impl).backward(dy, x, values, checked_topology(*parts))


def _grow_scores(
    dys: Sequence[Tensor], xs: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *parts, k, norm, impl = rest
    scores = grow_scores_of(dys, xs, checked_topology(*parts), k, norm, impl)
    return scores.active, scores.positions, scores.scores


# ---- fake kernels: shapes without computing


def _fake_spmm(x: Tensor, values: Tensor, bias: Any, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[_LAYOUT][0])


def _fake_spmm_t(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], rest[_LAYOUT][1])


def _fake_sddmm(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(rest[_COL].shape[0], *rest[_LAYOUT][2:4])


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


spmm = define(
    f"spmm(Tensor x, Tensor values, Tensor? bias, {TOPOLOGY}, bool relu, str impl) -> Tensor",
    _spmm,
    _fake_spmm,
)
spmm_t = define(
    f"spmm_t(Tensor dy, Tensor values, {TOPOLOGY}, str impl) -> Tensor", _spmm_t, _fake_spmm_t
)
sddmm = define(f"sddmm(Tensor dy, Tensor x, {TOPOLOGY}, str impl) -> Tensor", _sddmm, _fake_sddmm)
sddmm_add = define(
    f"sddmm_add(Tensor(a!) out, Tensor dy, Tensor x, {TOPOLOGY}, str impl) -> ()",
    _sddmm_add,
    _fake_sddmm_add,
)
spmm_backward = define(
    f"spmm_backward(Tensor dy, Tensor x, Tensor values, {TOPOLOGY}, str impl) -> (Tensor, Tensor)",
    _spmm_backward,
    _fake_spmm_backward,
)
grow_scores = define(
    f"grow_scores(Tensor[] dys, Tensor[] xs, {TOPOLOGY}, int k, str norm, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _grow_scores,
    _fake_grow_scores,
)


# ---- autograd: the products are closed under differentiation


def keep(ctx: Any, *operands: Any) -> None:
    """Save tensors, index arrays, layout and implementation for the backward pass.

    The arrays are kept beside the saved tensors, as `direct` keeps its topology: activation
    checkpointing compares what is saved, and may come by one way in forward and the other again.
    """
    *tensors, ctx.layout, ctx.impl = operands
    ctx.arrays = tensors[-len(ARRAY_NAMES) :]
    ctx.versions = versions_if_counted(ctx.arrays)
    ctx.save_for_backward(*tensors[: -len(ARRAY_NAMES)])
    ctx.save_for_forward(*tensors[: -len(ARRAY_NAMES)])


def restore(ctx: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The saved operands, and the trailing arguments of every product."""
    saved = ctx.saved_tensors
    check_unchanged(ctx.arrays, ctx.versions)
    return saved, (*ctx.arrays, ctx.layout, ctx.impl)


def check_unchanged(arrays: Sequence[Tensor], versions: tuple[int, ...] | None) -> None:
    """Raise, as torch does for saved tensors, if index arrays changed since the forward pass."""
    if versions is None or versions_of(arrays) == versions:
        return
    pairs = zip(ARRAY_NAMES, versions, versions_of(arrays), strict=True)
    changed = ", ".join(name for name, then, now in pairs if then != now)
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: the topology's {changed} changed between forward and backward"
    )


def _plain_spmm(x: Tensor, values: Tensor, rest: tuple[Any, ...]) -> Any:
    *parts, impl = rest
    return spmm(x, values, None, *parts, False, impl)


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        *parts, relu, impl = rest
        y = below_autograd(spmm, x, values, bias, *rest)
        keep(ctx, x, values, *((y,) if relu else ()), *parts, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, values, *clamped), rest = restore(ctx)
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
        return dx, dw, dy.sum(0) if needs_bias else None, *NO_GRADS, None

    @staticmethod
    def jvp(ctx: Any, tx: Any, t_values: Any, t_bias: Any, *_: Any) -> Tensor | None:
        (x, values, *clamped), rest = restore(ctx)
        product = bilinear_tangent(_plain_spmm, (x, values), (tx, t_values), rest)
        ty = tangent_sum(product, None if t_bias is None else t_bias.expand(x.shape[0], -1))
        return torch.ops.aten.threshold_backward(ty, clamped[0], 0) if clamped else ty


def _tangent_of(op: Any) -> Callable[..., Tensor | None]:
    """The forward derivative of an operator of two tensors."""

    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        operands, rest = restore(ctx)
        return bilinear_tangent(op, operands, tangents[:2], *rest)

    return jvp


def gradient_functions(
    product: Callable[..., Any], transposed: Any, sampled: Any, backward: Any
) -> tuple[Any, Any, Any]:
    """Autograd functions of a product's three gradient operators, which are products again.

    Args:
        product: (x, values, rest) -> y.
        transposed: the operator of dx, (dy, values, *rest).
        sampled: of dw, (dy, x, *rest).
        backward: of both, (dy, x, values, *rest).
    """

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, dy: Tensor, values: Tensor, *rest: Any) -> Any:
            keep(ctx, dy, values, *rest)
            return below_autograd(transposed, dy, values, *rest)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
            (dy, values), rest = restore(ctx)
            needs_dy, needs_values = ctx.needs_input_grad[:2]
            d_dy = product(g, values, rest) if needs_dy else None
            d_values = sampled(dy, g, *rest) if needs_values else None
            return d_dy, d_values, *NO_GRADS

        jvp = staticmethod(_tangent_of(transposed))

    class Sampled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor, *rest: Any) -> Any:
            keep(ctx, dy, x, *rest)
            return below_autograd(sampled, dy, x, *rest)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
            (dy, x), rest = restore(ctx)
            needs_dy, needs_x = ctx.needs_input_grad[:2]
            d_dy = product(x, g, rest) if needs_dy else None
            d_x = transposed(dy, g, *rest) if needs_x else None
            return d_dy, d_x, *NO_GRADS

        jvp = staticmethod(_tangent_of(sampled))

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> Any:
            keep(ctx, dy, x, values, *rest)
            return below_autograd(backward, dy, x, values, *rest)

        @staticmethod
        def backward(ctx: Any, gx: Tensor, gw: Tensor) -> tuple[Any, ...]:
            (dy, x, values), rest = restore(ctx)
            needs_dy, needs_x, needs_values = ctx.needs_input_grad[:3]
            d_dy = product(gx, values, rest) + product(x, gw, rest) if needs_dy else None
            d_x = transposed(dy, gw, *rest) if needs_x else None
            d_values = sampled(dy, gx, *rest) if needs_values else None
            return d_dy, d_x, d_values, *NO_GRADS

        @staticmethod
        def jvp(ctx: Any, t_dy: Any, tx: Any, t_values: Any, *_: Any) -> tuple[Any, Any]:
            (dy, x, values), rest = restore(ctx)
            return (
                bilinear_tangent(transposed, (dy, values), (t_dy, t_values), *rest),
                bilinear_tangent(sampled, (dy, x), (t_dy, tx), *rest),
            )

    return Transposed, Sampled, Backward


def differentiate(functions: dict[str, Any]) -> None:
    """Give operators, by name, their autograd functions."""
    for name, function in functions.items():
        _LIBRARY.impl(name, kernel_of(function), "Autograd")


def vectorize(rules: dict[str, Rule]) -> None:
    """Give operators, by name, their rules under `torch.vmap`."""
    for name, rule in rules.items():
        torch.library.register_vmap(f"sparsekern::{name}", rule, lib=_LIBRARY)


_transposed, _sampled, _both = gradient_functions(_plain_spmm, spmm_t, sddmm, spmm_backward)
differentiate({"spmm": _Spmm, "spmm_t": _transposed, "sddmm": _sampled, "spmm_backward": _both})
vectorize(
    {
        "spmm": folded(spmm),
        "spmm_t": folded(spmm_t),
        "sddmm": each(sddmm),
        "spmm_backward": both_gradients(spmm_backward, spmm_t, sddmm),
        "sddmm_add": refused("sddmm_add", "call `sddmm`, which writes to no operand"),
        "grow_scores": refused("grow_scores", "a topology is scored by all tokens at once"),
    }
)


class Operators:
    """The operators in the form of a `Backend`, whose name they pass on."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def spmm(
        self,
        x: Tensor,
        values: Tensor,
        topology: Topology,
        bias: Tensor | None,
        *,
        relu: bool = False,
    ) -> Tensor:
        """(M, cols) -> (M, rows)."""
        y: Tensor = spmm(x, values, bias, *parts(topology), relu, self.impl)
        return y

    def spmm_t(self, dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
        """(M, rows) -> (M, cols)."""
        dx: Tensor = spmm_t(dy, values, *parts(topology), self.impl)
        return dx

    def sddmm(
        self, dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None
    ) -> Tensor:
        """(M, rows), (M, cols) -> (nnzb, bh, bw), added to `out` if it is given."""
        if out is not None:
            sddmm_add(out, dy, x, *parts(topology), self.impl)
            return out
        dw: Tensor = sddmm(dy, x, *parts(topology), self.impl)
        return dw

    def backward(
        self, dy: Tensor, x: Tensor, values: Tensor, topology: Topology
    ) -> tuple[Tensor, Tensor]:
        """dx and dw at once."""
        both: tuple[Tensor, Tensor] = spmm_backward(dy, x, values, *parts(topology), self.impl)
        return both
