"""Operators on sparse weights: SpMM, its transpose, SDDMM and grow scores.

The weight is a pair of a `Topology` and its `values`, shape (nnzb, bh, bw). All functions are
differentiable (`grow_scores` apart), work under `torch.compile(fullgraph=True)` and are counted by
`torch.utils.flop_counter.FlopCounterMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sparsekern.errors import ConfigError, ShapeError
from sparsekern.ops import direct, flops, library
from sparsekern.ops.checks import (
    check_bias,
    check_device,
    check_operand,
    check_tokens,
    check_values,
    check_whole,
    fits,
    implementation,
)
from sparsekern.ops.conv import conv2d, conv2d_dgrad, conv2d_grow_scores, conv2d_wgrad
from sparsekern.ops.dispatch import BACKENDS, resolve
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.grow import (
    NORMS,
    GrowScores,
    block_norm,
    check_norm,
    linear_slabs,
    stream_grow_scores,
)
from sparsekern.ops.library import Operators
from sparsekern.topology import Topology

__all__ = [
    "BACKENDS",
    "NORMS",
    "ConvGeometry",
    "GrowScores",
    "block_norm",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_grow_scores",
    "conv2d_wgrad",
    "flops",
    "grow_scores",
    "resolve",
    "sddmm",
    "spmm",
    "spmm_t",
]


def spmm(
    x: Tensor,
    values: Tensor,
    topology: Topology,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sparse linear map, y = x wᵀ + bias (SpMM).

    Args:
        x: (..., cols), any strides.
        values: (nnzb, bh, bw), the active blocks of w in CSR order.
        topology: connections of w, shape (rows, cols).
        bias: (rows,), added in the same pass.
        activation: None, or "relu" for max(y, 0) in the same pass; the backward pass reads its
            derivative off the result. Other activations would need y itself kept.
        impl: see `resolve`.

    Returns:
        (..., rows), in the dtype of `x`; sums are kept in float32 at least.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError, UnavailableError: bad arguments.
    """
    rows, cols = topology.shape
    known = None if direct.is_watched() else topology.known()
    check_whole(topology)
    if known is None or not fits(x, cols, -1, values, bias, known):
        check_values(values, topology)
        check_operand("x", x, cols, values)
        check_bias(bias, rows, values)
    if activation not in (None, "relu"):
        raise ConfigError(f"`activation` must be None or 'relu'; got {activation!r}")
    relu, name = activation == "relu", implementation(impl, values, topology)
    tokens = x if x.dim() == 2 else x.reshape(-1, cols)
    if known is not None and direct.is_plain(x, values, bias):
        y = direct.linear(tokens, values, bias, topology, known, relu=relu, impl=name)
    else:
        y = Operators(name).spmm(tokens, values, topology, bias, relu=relu)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def spmm_t(dy: Tensor, values: Tensor, topology: Topology, *, impl: str | None = None) -> Tensor:
    """Transposed SpMM, dx = dy w: (..., rows) -> (..., cols). The gradient of `spmm` for x."""
    rows, cols = topology.shape
    check_whole(topology)
    check_values(values, topology)
    check_operand("dy", dy, rows, values)
    impl = implementation(impl, values, topology)
    dx: Tensor = library.spmm_t(dy.reshape(-1, rows), values, *library.parts(topology), impl)
    return dx.view(*dy.shape[:-1], cols)


def sddmm(
    dy: Tensor,
    x: Tensor,
    topology: Topology,
    *,
    out: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sampled dense-dense product, dw = dyᵀ x at active blocks only: (nnzb, bh, bw).

    The gradient of `spmm` for its values. `dy` is (..., rows), `x` (..., cols), with the same
    leading sizes. With `out`, a contiguous tensor of that shape and any float dtype such as
    `layer.values.grad`, dw is added to it in place; that call is not differentiable.
    """
    rows, cols = topology.shape
    check_whole(topology)
    check_operand("x", x, cols, x)
    check_operand("dy", dy, rows, x)
    check_tokens(dy, x)
    check_device(topology, x)
    flat = dy.reshape(-1, rows), x.reshape(-1, cols)
    rest = *library.parts(topology), implementation(impl, x, topology)
    if out is None:
        dw: Tensor = library.sddmm(*flat, *rest)
        return dw
    check_values(out, topology)
    if not out.is_contiguous():
        raise ShapeError(f"`out` must be contiguous; got strides {out.stride()}")
    if out.requires_grad:
        raise ConfigError("`out` must not require a gradient: it is written in place")
    library.sddmm_add(out, *(t.detach() for t in flat), *rest)
    return out


def grow_scores(
    dy: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    topology: Topology,
    k: int,
    *,
    norm: str = "l1",
    reduce: Callable[[Tensor], None] | None = None,
    impl: str | None = None,
    each_row: int = 0,
) -> GrowScores:
    """Score the dense gradient dyᵀ x without storing it (Evci et al. 2020, section 3).

    Args:
        dy: (M, rows), or several, whose products with `x` are summed before any norm is taken.
        x: (M, cols), or several.
        topology: what is active now.
        k: how many of the best inactive blocks to report.
        norm: "l1" (sum of magnitudes), "l2" (sum of squares) or "max" over a block.
        reduce: sums a slab of the gradient over ranks, in place.
        impl: see `resolve`. "triton" takes block norms inside the product; all others, several
            pairs, `reduce` and unstructured weights stream slabs of the gradient.
        each_row: report so many of the best inactive blocks of each block row besides; streamed.
    """
    check_norm(norm)
    check_whole(topology)
    if k < 0:
        raise ConfigError(f"`k` must not be negative; got {k}")
    dys, xs = ([t] if isinstance(t, Tensor) else list(t) for t in (dy, x))
    if len(dys) != len(xs) or not xs:
        raise ShapeError(f"`dy` and `x` must come in pairs; got {len(dys)} and {len(xs)}")
    for one_dy, one_x in zip(dys, xs, strict=True):
        check_operand("x", one_x, topology.shape[1], one_x)
        check_operand("dy", one_dy, topology.shape[0], one_x)
        check_tokens(one_dy, one_x)
        check_device(topology, one_x)
    # a graph would keep every slab
    dys, xs = ([t.detach().reshape(-1, t.shape[-1]) for t in group] for group in (dys, xs))
    if reduce is not None or each_row:
        topology.known()
        slabs = linear_slabs(dys, xs)
        return stream_grow_scores(slabs, xs[0], topology, k, norm, reduce, each_row)
    # the gradient is dense whatever the density
    impl = resolve(impl, xs[0].device, xs[0].dtype, topology.block)
    return GrowScores(*library.grow_scores(dys, xs, *library.parts(topology), k, norm, impl))
