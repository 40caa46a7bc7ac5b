"""The convolution operators of the namespace `sparsekern::`, defined as those in `library` are.

`layout`, the list of ints that crosses the boundary, holds the topology's six sizes, then the nine
of the geometry, then height and width of the input. The three products are closed under
differentiation: each gradient is again one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.ops.dispatch import ConvBackend, backend
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of
from sparsekern.ops.library import (
    NO_GRADS,
    TOPOLOGY,
    checked_topology,
    define,
    differentiate,
    gradient_functions,
    is_traced,
    keep,
    parts,
    restore,
    vectorize,
)
from sparsekern.ops.transforms import (
    below_autograd,
    bilinear_tangent,
    both_gradients,
    each,
    folded,
    tangent_sum,
)
from sparsekern.topology import ARRAY_NAMES, Topology

_LAYOUT = len(ARRAY_NAMES)  # place among the trailing arguments
_SIZES = 6  # of the topology, ahead of the geometry in `layout`
_ARGUMENTS = TOPOLOGY.replace("int[]", "SymInt[]") + ", str impl"


def conv_parts(
    topology: Topology, geometry: ConvGeometry, height: int, width: int
) -> tuple[Any, ...]:
    """Topology and geometry as operator arguments."""
    *arrays, sizes = parts(topology)
    if is_traced():  # the tracer, whose sizes are tensors, takes plain ints only
        height, width = int(height), int(width)
    return *arrays, [*sizes, *geometry.as_ints(), height, width]


def output_size(layout: Sequence[int]) -> tuple[int, int]:
    """(P, Q) of the convolution that a `layout` describes."""
    *_, height, width = layout
    return geometry_of(layout).output_size(height, width)


def geometry_of(layout: Sequence[int]) -> ConvGeometry:
    """The geometry of the convolution that a `layout` describes."""
    return ConvGeometry.from_ints(layout[_SIZES:-2])


def _split(rest: tuple[Any, ...]) -> tuple[ConvBackend, Topology, ConvGeometry]:
    """The backend, topology and geometry behind an operator's trailing arguments."""
    *parts, impl = rest
    return backend(impl), checked_topology(*parts), _geometry(tuple(parts[-1][_SIZES:-2]))


@functools.lru_cache(maxsize=256)
def _geometry(sizes: tuple[int, ...]) -> ConvGeometry:
    return ConvGeometry.from_ints(sizes)


# ---- kernels: the last argument names the backend


def _conv2d(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    run, t, g = _split(rest)
    return run.conv2d(x, values, t, g, bias)


def _dgrad(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    run, t, g = _split(rest)
    *_, height, width = rest[_LAYOUT]
    return run.conv2d_dgrad(dy, values, t, g, size=(height, width))


def _wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    run, t, g = _split(rest)
    return run.conv2d_wgrad(dy, x, t, g)


def _backward(dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    run, t, g = _split(rest)
    return run.conv2d_backward(dy, x, values, t, g)


# ---- fake kernels: shapes and strides without computing


def _image_like(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], channels, *size).contiguous(memory_format=format_of(x))


def _fake_conv2d(x: Tensor, values: Tensor, bias: Any, *rest: Any) -> Tensor:
    return _image_like(x, rest[_LAYOUT][0], output_size(rest[_LAYOUT]))


def _fake_dgrad(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    layout = rest[_LAYOUT]
    channels = layout[1] // layout[5] * layout[4]  # columns of a tap, times groups
    return _image_like(dy, channels, layout[-2:])


def _fake_wgrad(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(rest[1].shape[0], *rest[_LAYOUT][2:4])


def _fake_backward(dy: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _image_like(x, x.shape[1], x.shape[2:]), values.new_empty(values.shape)


conv2d = define(
    f"conv2d(Tensor x, Tensor values, Tensor? bias, {_ARGUMENTS}) -> Tensor", _conv2d, _fake_conv2d
)
conv2d_dgrad = define(
    f"conv2d_dgrad(Tensor dy, Tensor values, {_ARGUMENTS}) -> Tensor", _dgrad, _fake_dgrad
)
conv2d_wgrad = define(
    f"conv2d_wgrad(Tensor dy, Tensor x, {_ARGUMENTS}) -> Tensor", _wgrad, _fake_wgrad
)
conv2d_backward = define(
    f"conv2d_backward(Tensor dy, Tensor x, Tensor values, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


# ---- autograd


def _plain_conv2d(x: Tensor, values: Tensor, rest: tuple[Any, ...]) -> Any:
    return conv2d(x, values, None, *rest)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        keep(ctx, x, values, *rest)
        return below_autograd(conv2d, x, values, bias, *rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x, values), rest = restore(ctx)
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if needs_x and needs_values:
            dx, dw = conv2d_backward(dy, x, values, *rest)
        elif needs_x:
            dx = conv2d_dgrad(dy, values, *rest)
        elif needs_values:
            dw = conv2d_wgrad(dy, x, *rest)
        return dx, dw, dy.sum((0, 2, 3)) if needs_bias else None, *NO_GRADS

    @staticmethod
    def jvp(ctx: Any, tx: Any, t_values: Any, t_bias: Any, *_: Any) -> Tensor | None:
        (x, values), rest = restore(ctx)
        product = bilinear_tangent(_plain_conv2d, (x, values), (tx, t_values), rest)
        if t_bias is None:
            return product
        size = x.shape[0], -1, *output_size(rest[-2])
        return tangent_sum(product, t_bias.view(1, -1, 1, 1).expand(size))


_dgrad_function, _wgrad_function, _both = gradient_functions(
    _plain_conv2d, conv2d_dgrad, conv2d_wgrad, conv2d_backward
)
differentiate(
    {
        "conv2d": _Conv2d,
        "conv2d_dgrad": _dgrad_function,
        "conv2d_wgrad": _wgrad_function,
        "conv2d_backward": _both,
    }
)
vectorize(
    {
        "conv2d": folded(conv2d),
        "conv2d_dgrad": folded(conv2d_dgrad),
        "conv2d_wgrad": each(conv2d_wgrad),
        "conv2d_backward": both_gradients(conv2d_backward, conv2d_dgrad, conv2d_wgrad),
    }
)


class ConvOperators:
    """The operators in the form of a `ConvBackend`, whose name they pass on."""

    def __init__(self, impl: str) -> None:
        self.impl = impl

    def conv2d(
        self,
        x: Tensor,
        values: Tensor,
        topology: Topology,
        geometry: ConvGeometry,
        bias: Tensor | None,
    ) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, P, Q)."""
        rest = conv_parts(topology, geometry, *x.shape[2:])
        y: Tensor = conv2d(x, values, bias, *rest, self.impl)
        return y

    def conv2d_dgrad(
        self,
        dy: Tensor,
        values: Tensor,
        topology: Topology,
        geometry: ConvGeometry,
        *,
        size: tuple[int, int],
    ) -> Tensor:
        """(N, C_out, P, Q) -> (N, C_in, *size)."""
        dx: Tensor = conv2d_dgrad(dy, values, *conv_parts(topology, geometry, *size), self.impl)
        return dx

    def conv2d_wgrad(
        self, dy: Tensor, x: Tensor, topology: Topology, geometry: ConvGeometry
    ) -> Tensor:
        """(N, C_out, P, Q), (N, C_in, H, W) -> (nnzb, bh, bw)."""
        rest = conv_parts(topology, geometry, *x.shape[2:])
        dw: Tensor = conv2d_wgrad(dy, x, *rest, self.impl)
        return dw

    def conv2d_backward(
        self, dy: Tensor, x: Tensor, values: Tensor, topology: Topology, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        """dx, in the format of x, and dw at once."""
        rest = conv_parts(topology, geometry, *x.shape[2:])
        both: tuple[Tensor, Tensor] = conv2d_backward(dy, x, values, *rest, self.impl)
        return both
