"""The products of one weight matrix, made ready once and then taken at every time step.

A recurrent layer multiplies by its hidden-to-hidden weight once a step. Everything that does not
change from step to step (which implementation runs, the index arrays, a dense weight where there is
one) is settled when a product is made, so that a step is one kernel call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparsekern.nn.base import SparseLayer
from sparsekern.ops import library, resolve
from sparsekern.ops.dispatch import backend


class Product(Protocol):
    """y = x wᵀ + bias for a w (rows, cols), and what its gradients need."""

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(M, cols) -> (M, rows)."""

    def transposed(self, dy: Tensor) -> Tensor:
        """(M, rows) -> (M, cols): the gradient of x."""

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """(M, rows), (M, cols) -> the gradient of the weight, in the shape it is stored in."""


class Recipe(NamedTuple):
    """How to make the product of a weight, and the tensors to make it from, the weight first.

    They are apart so that an autograd function can save the tensors.
    """

    make: Callable[[Sequence[Tensor]], Product]
    tensors: tuple[Tensor, ...]
    bias: Tensor | None


class _Sparse:
    """A sparse weight, by the kernels; by the operators around them where something watches.

    A counter of FLOPs or a tracer sees operators. Where none is active, a step spares itself the
    operator's dispatch and the making of a topology, which cost as much as a small product.
    """

    def __init__(self, layout: list[int], impl: str, tensors: Sequence[Tensor]) -> None:
        self.values, *arrays = tensors
        self.parts = *arrays, layout
        self.impl = impl
        self.topology = library.topology_of(*self.parts)
        watched = _get_current_dispatch_mode() is not None or library.is_traced()
        self.kernels = None if watched else backend(impl)

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernels is not None:
            return self.kernels.spmm(x, self.values, self.topology, bias)
        y: Tensor = library.spmm(x, self.values, bias, *self.parts, False, self.impl)
        return y

    def transposed(self, dy: Tensor) -> Tensor:
        if self.kernels is not None:
            return self.kernels.spmm_t(dy, self.values, self.topology)
        dx: Tensor = library.spmm_t(dy, self.values, *self.parts, self.impl)
        return dx

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        dw: Tensor = library.sddmm(dy, x, *self.parts, self.impl)
        return dw


class _Dense:
    """A dense weight, or one that is multiplied by a mask."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        weight, *mask = tensors
        self.mask = mask[0] if mask else None
        self.weight = weight if self.mask is None else weight * self.mask

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, bias)

    def transposed(self, dy: Tensor) -> Tensor:
        return dy @ self.weight

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        dw = dy.t() @ x
        return dw if self.mask is None else dw * self.mask


class _Unpacked(_Dense):
    """`impl="dense"`: sparse storage, and a dense weight that lives as long as the product."""

    def __init__(self, layout: list[int], tensors: Sequence[Tensor]) -> None:
        values, *arrays = tensors
        self.topology = library.topology_of(*arrays, layout)
        super().__init__([self.topology.unpack(values)])

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.topology.pack(dy.t() @ x)


def recipe_of(layer: nn.Module, dtype: torch.dtype) -> Recipe:
    """The product of a `SparseLinear` or `nn.Linear`, computed in `dtype`.

    Casts to `dtype` are differentiable, so gradients arrive in the parameters' own dtype.
    """
    bias: Any = layer.bias
    bias = None if bias is None else bias.to(dtype)
    if not isinstance(layer, SparseLayer):
        weight: Any = layer.weight
        return Recipe(_Dense, (weight.to(dtype),), bias)
    layer.check_known()
    values = layer.values.to(dtype)
    if layer.dense_mask is not None:
        return Recipe(_Dense, (values, layer.dense_mask), bias)
    topology = layer.topology
    impl = resolve(layer.impl, values.device, dtype, topology.block, topology.block_density)
    *arrays, layout = library.parts(topology)
    make = partial(_Unpacked, layout) if impl == "dense" else partial(_Sparse, layout, impl)
    return Recipe(make, (values, *arrays), bias)
