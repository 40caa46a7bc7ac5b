"""The products of one weight matrix, made ready once and then taken at every time step.

A recurrent layer multiplies by its hidden-to-hidden weight once a step. Everything that does not
change from step to step (which implementation runs, the index arrays, a dense weight where there is
one) is settled when a product is made, so that a step is one kernel call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sparsekern.nn.base import SparseLayer
from sparsekern.ops import resolve
from sparsekern.ops.cpu.choice import backend_for
from sparsekern.ops.direct import is_watched
from sparsekern.ops.dispatch import Backend, backend
from sparsekern.ops.library import Operators
from sparsekern.topology import Topology

EXACT = (torch.float32, torch.float64)
"""Types that the compiled kernels compute in as they are."""


class Product(Protocol):
    """y = x wᵀ + bias for a w (rows, cols), and what its gradients need.

    Attributes:
        compiled: whether the CPU's compiled kernels run it.
    """

    compiled: bool

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(M, cols) -> (M, rows)."""

    def transposed(self, dy: Tensor) -> Tensor:
        """(M, rows) -> (M, cols): the gradient of x."""

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """(M, rows), (M, cols) -> the gradient of the weight, in the shape it is stored in."""


class Recipe(NamedTuple):
    """How to make the product of a weight.

    Attributes:
        make: makes it of `tensors`, and of whether all that it will be given is plain
            (`ops.direct.is_plain`): kernels read nothing else.
        tensors: the weight first; apart, so that an autograd function can save them.
        bias: of the weight, or None.
        topology: of a sparse weight, or None.
    """

    make: Callable[[Sequence[Tensor], bool], Product]
    tensors: tuple[Tensor, ...]
    bias: Tensor | None
    topology: Topology | None = None


class _Sparse:
    """A sparse weight, by the kernels; by the operators around them where something watches.

    A counter of FLOPs or a tracer sees operators. Where none is active, a step spares itself the
    operator's dispatch, which costs as much as a small product.
    """

    def __init__(
        self, topology: Topology, impl: str, tensors: Sequence[Tensor], plain: bool
    ) -> None:
        (self.values,) = tensors
        self.topology = topology
        self.impl = impl
        # no short way for fake tensors, or for index arrays that torch does not follow
        known = topology.known() if plain else None
        self.free = known is not None and not is_watched()
        self.run: Backend = backend(impl) if self.free else Operators(impl)
        # whoever watches: the bits of a layer don't depend on it
        kind, native = self.values.dtype, known is not None and impl == "cpu"
        self.compiled = native and kind in EXACT and backend_for(topology, kind) == "jit"

    @cached_property
    def turned(self) -> tuple[Tensor, Topology] | None:
        """Single entries in the order of wᵀ: each step would else put them in order."""
        return _turned(self.values, self.topology) if self.free and self.compiled else None

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.run.spmm(x, self.values, self.topology, bias)

    def transposed(self, dy: Tensor) -> Tensor:
        if self.turned is not None:
            return self.run.spmm(dy, *self.turned, None)
        return self.run.spmm_t(dy, self.values, self.topology)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return self.run.sddmm(dy, x, self.topology)


def _turned(values: Tensor, t: Topology) -> tuple[Tensor, Topology] | None:
    """Single entries of wᵀ, and its rows: all that a product with it reads of a topology."""
    if t.block != (1, 1):
        return None
    turned = replace(t, shape=(t.shape[1], t.shape[0]), crow=t.ccol, col=t.row)
    return values.index_select(0, t.perm), turned


class _Dense:
    """A dense weight, or one that is multiplied by a mask."""

    compiled = False

    def __init__(self, tensors: Sequence[Tensor], plain: bool) -> None:  # noqa: ARG002
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

    def __init__(self, topology: Topology, tensors: Sequence[Tensor], plain: bool) -> None:
        (values,) = tensors
        self.topology = topology
        super().__init__([self.topology.unpack(values)], plain)

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
    values = layer.values.to(dtype)
    if layer.dense_mask is not None:
        return Recipe(_Dense, (values, layer.dense_mask), bias)
    topology = layer.topology
    impl = resolve(layer.impl, values.device, dtype, topology.block, topology.block_density)
    make = partial(_Unpacked, topology) if impl == "dense" else partial(_Sparse, topology, impl)
    return Recipe(make, (values,), bias, topology)
