"""Bytes that a sparse operator holds beside its operands and results while it runs: formulas.

For predictions of peak memory. Those of the CPU path with numba are exact: they come from the code
that cuts the work. The others count the copies that an implementation makes and are upper bounds.
What compiled loops keep on their own stacks is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.ops.conv_library import geometry_of
from sparsekern.ops.cpu import choice, conv
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of
from sparsekern.ops.library import topology_of
from sparsekern.topology import Topology

ENTRY_BYTES = 40
"""Of `csr` for each entry of a block: its place and feature, as int64 and int32, and copies."""
_PRODUCTS: dict[str, tuple[bool, bool, bool]] = {
    "spmm": (True, False, False),
    "spmm_t": (False, True, False),
    "sddmm": (False, False, True),
    "sddmm_add": (False, False, True),
    "spmm_backward": (False, True, True),
    "conv2d": (True, False, False),
    "conv2d_dgrad": (False, True, False),
    "conv2d_wgrad": (False, False, True),
    "conv2d_backward": (False, True, True),
}
"""Which of y, dx and dw each operator computes."""


class _Call(NamedTuple):
    """One call: x (M, cols) or (N, C_in, H, W), and y of the same rank, in shape alone."""

    x: Tensor
    y: Tensor
    t: Topology
    g: ConvGeometry | None
    products: tuple[bool, bool, bool]


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes for one call of an operator; 0 for operators of others.

    Args:
        func: an operator overload, such as `torch.ops.sparsekern.spmm.default`.
        args: its arguments; tensors may be fake.
    """
    name = func._overloadpacket.__name__
    if func.namespace != "sparsekern" or name not in _PRODUCTS:
        return 0
    call = _call(name, args)
    return _FORMULAS[args[-1]](call) if call.x.numel() and call.y.numel() else 0


def _call(name: str, args: tuple[Any, ...]) -> _Call:
    layout = args[-3 if name == "spmm" else -2]  # a flag and the backend's name follow it
    arrays = [a for a in args if isinstance(a, Tensor)][-7:]
    t = topology_of(*arrays, layout)
    first = args[1] if name == "sddmm_add" else args[0]
    if not name.startswith("conv2d"):
        x, y = (first.new_empty(len(first), size) for size in reversed(t.shape))
        return _Call(x, y, t, None, _PRODUCTS[name])
    g, size = geometry_of(layout), layout[-2:]
    channels = t.shape[1] // t.taps * t.groups, t.shape[0]
    like = {"memory_format": format_of(first), "dtype": first.dtype, "device": first.device}
    x, y = (
        torch.empty((len(first), c, *s), **like)
        for c, s in zip(channels, (size, g.output_size(*size)), strict=True)
    )
    return _Call(x, y, t, g, _PRODUCTS[name])


# ---- by implementation


def _dense(call: _Call) -> int:
    """The dense weight, its gradient, and a convolution's other order of each."""
    weight = call.t.shape[0] * call.t.shape[1] * (1 if call.g is None else 2)
    y, dx, dw = call.products
    sides = max(y or dx, dw) if call.g is None else (y or dx) + dw
    return sides * weight * call.x.element_size()


def _triton(call: _Call) -> int:
    """Copies of activations into the layout that a kernel reads, bounded for each launch."""
    from sparsekern.kernels.launch import CHUNK_ELEMENTS  # noqa: PLC0415  triton is optional

    single = call.t.block == (1, 1)
    # unstructured kernels read tokens, or a row of pixels, side by side; blocks read channels so
    turned = call.g is None or format_of(call.x) is torch.channels_last
    if single != turned:
        return 0
    return sum(min(a.numel(), CHUNK_ELEMENTS) for a in (call.x, call.y)) * call.x.element_size()


def _cpu(call: _Call) -> int:
    kind = choice.compute_dtype(call.x.dtype)
    # 16-bit operands and results are held once more in float32
    numbers = call.x.numel() + call.y.numel() + 2 * _stored(call.t) + call.t.shape[0]
    wide = 0 if kind is call.x.dtype else kind.itemsize * numbers
    if call.g is None:
        name = choice.backend_for(call.t, call.x.dtype)
        return wide + _LINEAR[name](call)
    if call.g.pointwise and format_of(call.x) is torch.channels_last:
        return wide + _cpu(_as_linear(call))
    run, _ = conv.plan(call.t, call.g, call.x)
    return wide + (_unfolded(call) if hasattr(run, "linear") else _line(call))


def _as_linear(call: _Call) -> _Call:
    x, y = (a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]) for a in (call.x, call.y))
    return call._replace(x=x, y=y, g=None)


def _jit(call: _Call) -> int:
    from sparsekern.ops.cpu.jit.linear import scratch  # noqa: PLC0415  numba is optional

    _, dx, dw = call.products
    kind = choice.compute_dtype(call.x.dtype)
    return kind.itemsize * scratch(call.x.to(kind), call.t, dx=dx, dw=dw)


def _csr(call: _Call) -> int:
    from sparsekern.ops.cpu.csr import DOT_TOKENS, TOKENS  # noqa: PLC0415  loaded where it runs

    t, size = call.t, choice.compute_dtype(call.x.dtype).itemsize
    weights = _stored(t)
    tokens = DOT_TOKENS if call.products[2] else TOKENS
    chunk = min(len(call.x), tokens) * (t.block_rows * t.block[0] + t.block_cols * t.block[1])
    return size * chunk + ENTRY_BYTES * weights


def _line(call: _Call) -> int:
    from sparsekern.ops.cpu.jit import conv_plan as plans  # noqa: PLC0415  numba is optional

    x, y, t, g, (forward, dx, dw) = call
    if g is None:
        raise TypeError("a convolution has a geometry")
    if (g.taps, g.stride, g.padding) == (1, (1, 1), (0, 0)):
        x, y = (a.flatten(2).unsqueeze(2) for a in (x, y))  # as `jit.conv` does
    kind = choice.compute_dtype(x.dtype)
    made = plans.Call.of(t, g, x, y)._replace(itemsize=kind.itemsize)
    if forward:
        return kind.itemsize * plans.forward_scratch(made)
    return kind.itemsize * plans.backward_scratch(made, dx=dx, dw=dw)


def _stored(t: Topology) -> int:
    return t.nnzb * t.block[0] * t.block[1]


def _unfolded(call: _Call) -> int:
    from sparsekern.ops.cpu.unfold import ELEMENTS  # noqa: PLC0415  loaded where it runs

    x, y, t, *_ = call
    columns = t.block_cols * t.block[1]
    most = max(min(ELEMENTS, (x.numel() + y.numel()) // 4), columns)
    pixels = most // columns
    # pixels cut out, padded and unfolded; what goes into or comes out of the product, twice
    window = 3 * most + 2 * pixels * t.shape[0] + 2 * _stored(t)
    unfolded = call._replace(x=x.new_empty(pixels, columns), g=None)
    linear = _LINEAR[choice.backend_for(t, x.dtype)]
    return window * x.element_size() + linear(unfolded)


_LINEAR: dict[str, Callable[[_Call], int]] = {"jit": _jit, "blas": lambda _: 0, "csr": _csr}
_FORMULAS: dict[str, Callable[[_Call], int]] = {
    "cpu": _cpu,
    "dense": _dense,
    "masked": _dense,
    "triton": _triton,
}
