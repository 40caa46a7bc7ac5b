"""FLOPs that the operators execute, as `torch.utils.flop_counter` sees them.

1 multiply-add = 2 FLOPs. Blocks count whole, padding included, because that is what is executed;
the `dense` and `masked` implementations count as the dense products they are. A convolution counts
every weight for every output pixel, those taps included that fall outside of the image: kernels
multiply by the zeros there.

The kernels are opaque to every tracer, since they run inside these operators: `torch.compile` never
sees a launch that the counter would have to know of, or could leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from sparsekern.ops import conv_library
from sparsekern.topology import ARRAY_NAMES


def _product(tokens: int, nnzb: int, layout: Sequence[int], impl: str) -> int:
    """FLOPs of one product with a weight over rows of activations, or output pixels."""
    rows, cols, bh, bw = layout[:4]
    weights = rows * cols if impl in ("dense", "masked") else nnzb * bh * bw
    return 2 * tokens * weights


_ops = torch.ops.sparsekern

OPERATORS = (
    "spmm",
    "spmm_t",
    "sddmm",
    "sddmm_add",
    "spmm_backward",
    "grow_scores",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv2d_backward",
)
"""Operators of the namespace `sparsekern` that have a formula: all that multiply."""


@register_flop_formula(_ops.spmm)
def _(x: Any, values: Any, bias: Any, *rest: Any, **_: Any) -> int:
    *_arrays, layout, _relu, impl = rest
    return _product(x[0], values[0], layout, impl)


@register_flop_formula([_ops.spmm_t, _ops.sddmm])
def _(dy: Any, _other: Any, *rest: Any, **_: Any) -> int:
    _crow, col, *_arrays, layout, impl = rest
    return _product(dy[0], col[0], layout, impl)


@register_flop_formula(_ops.sddmm_add)
def _(_out: Any, dy: Any, _x: Any, *rest: Any, **_: Any) -> int:
    _crow, col, *_arrays, layout, impl = rest
    return _product(dy[0], col[0], layout, impl)


@register_flop_formula(_ops.spmm_backward)
def _(dy: Any, x: Any, values: Any, *rest: Any, **_: Any) -> int:
    *_arrays, layout, impl = rest
    return 2 * _product(dy[0], values[0], layout, impl)


@register_flop_formula(_ops.grow_scores)
def _(dys: Any, xs: Any, *rest: Any, **_: Any) -> int:
    rows, cols, *_ = rest[len(ARRAY_NAMES)]
    return sum(2 * int(dy[0]) for dy in dys) * int(rows) * int(cols)


def _convolution(batch: int, rest: tuple[Any, ...]) -> int:
    """FLOPs of one product of a convolution: the weights once for each output pixel."""
    *arrays, layout, impl = rest
    out_height, out_width = conv_library.output_size(layout)
    return _product(batch * out_height * out_width, arrays[1][0], layout, impl)


@register_flop_formula(_ops.conv2d)
def _(x: Any, _values: Any, _bias: Any, *rest: Any, **_: Any) -> int:
    return _convolution(x[0], rest)


@register_flop_formula([_ops.conv2d_dgrad, _ops.conv2d_wgrad])
def _(dy: Any, _other: Any, *rest: Any, **_: Any) -> int:
    return _convolution(dy[0], rest)


@register_flop_formula(_ops.conv2d_backward)
def _(dy: Any, _x: Any, _values: Any, *rest: Any, **_: Any) -> int:
    return 2 * _convolution(dy[0], rest)
