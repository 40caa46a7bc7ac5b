"""The linear products on the CPU: by the implementation that `choice` names, in its type."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from sparsekern.ops.cpu.choice import backend_for, compute_dtype, warn_of_missing_numba

if TYPE_CHECKING:
    from sparsekern.ops.dispatch import Backend
    from sparsekern.topology import Topology

MODULES = {
    "jit": "sparsekern.ops.cpu.jit.linear",
    "blas": "sparsekern.ops.cpu.blas",
    "csr": "sparsekern.ops.cpu.csr",
}
"""The linear products of each implementation; imported when first used, as numba is optional."""


def spmm(
    x: Tensor, values: Tensor, t: Topology, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """y = x wᵀ + bias.

    Args:
        x: (M, cols), any strides.
        values: (nnzb, bh, bw) in CSR order of `t`.
        t: the topology of w.
        bias: (rows,) or None.
        relu: return max(y, 0).

    Returns:
        (M, rows) of x's dtype.
    """
    run, kind = _plan(t, x)
    if kind is x.dtype:
        y = run.spmm(x, values, t, bias)
    else:
        added = None if bias is None else bias.to(kind)
        y = run.spmm(x.to(kind), values.to(kind), t, added).to(x.dtype)
    return y.relu_() if relu else y


def spmm_t(dy: Tensor, values: Tensor, t: Topology) -> Tensor:
    """dx = dy w: (M, rows) of any strides -> (M, cols) of dy's dtype."""
    run, kind = _plan(t, dy)
    if kind is dy.dtype:
        return run.spmm_t(dy, values, t)
    return run.spmm_t(dy.to(kind), values.to(kind), t).to(dy.dtype)


def sddmm(dy: Tensor, x: Tensor, t: Topology, *, out: Tensor | None = None) -> Tensor:
    """dw = dyᵀ x at active blocks: (M, rows), (M, cols) -> (nnzb, bh, bw), exact 0 in padding.

    Added to `out` if it is given.
    """
    run, kind = _plan(t, x)
    dw = run.sddmm(dy, x, t) if kind is x.dtype else run.sddmm(dy.to(kind), x.to(kind), t)
    return dw.to(x.dtype) if out is None else out.add_(dw)


def backward(dy: Tensor, x: Tensor, values: Tensor, t: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`, sharing what the two products have in common."""
    run, kind = _plan(t, x)
    if kind is x.dtype:
        return run.backward(dy, x, values, t)
    dx, dw = run.backward(dy.to(kind), x.to(kind), values.to(kind), t)
    return dx.to(dy.dtype), dw.to(values.dtype)


def _plan(t: Topology, x: Tensor) -> tuple[Backend, torch.dtype]:
    name = backend_for(t, x.dtype)
    return module_of(name), compute_dtype(x.dtype)


@functools.cache
def module_of(name: str) -> Backend:
    """The linear products of an implementation that `choice` names."""
    warn_of_missing_numba()
    return cast("Backend", importlib.import_module(MODULES[name]))
