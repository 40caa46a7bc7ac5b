"""FLOPs that the operators execute, as `torch.utils.flop_counter` sees them.

1 multiply-add = 2 FLOPs. Blocks count whole, padding included, because that is what is executed;
the `dense` and `masked` implementations count as the dense products they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from sparsekern.ops import library  # noqa: F401  defines the operators counted here
from sparsekern.topology import ARRAY_NAMES, Topology


def product_flops(tokens: int, topology: Topology, impl: str = "cpu") -> int:
    """FLOPs of one of `spmm`, `spmm_t`, `sddmm` over `tokens` rows of activations."""
    layout = [*topology.shape, *topology.block]
    return _product(tokens, topology.nnzb, layout, impl)


def grow_flops(tokens: int, topology: Topology) -> int:
    """FLOPs of the streamed dense gradient: 2 tokens rows cols."""
    return 2 * tokens * topology.shape[0] * topology.shape[1]


def _product(tokens: int, nnzb: int, layout: Sequence[int], impl: str) -> int:
    rows, cols, bh, bw = layout
    weights = rows * cols if impl in ("dense", "masked") else nnzb * bh * bw
    return 2 * tokens * weights


_ops = torch.ops.sparsekern


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
    rows, cols, _bh, _bw = rest[len(ARRAY_NAMES)]
    return sum(2 * int(dy[0]) for dy in dys) * int(rows) * int(cols)
