"""Which of torch's layers have a sparse counterpart, their weights, and how to convert them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sparsekern.nn.attention import SparseMultiheadAttention
from sparsekern.nn.attention_parts import projections
from sparsekern.nn.conv import SparseConv1d, SparseConv2d, matrix_of
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.pruned import pruned_tensors, unpruned
from sparsekern.nn.recurrent import RECURRENT
from sparsekern.nn.recurrent.base import matrices
from sparsekern.nn.transposed import SparseTransposedLinear, dense_type, is_transposed
from sparsekern.topology import Topology


class Weight(NamedTuple):
    """A weight that can be sparse.

    Attributes:
        name: within its module: "" if it is the only one, else such as "hh_l0".
        parameter: as torch holds it.
        groups: of a convolution.
        taps: kernel positions of a convolution.
        transposed: whether torch's layer holds it as (inputs, outputs).
    """

    name: str
    parameter: Tensor
    groups: int = 1
    taps: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the weight as a matrix."""
        rows = self.parameter.shape[1 if self.transposed else 0]
        return rows, self.parameter.numel() // rows

    @property
    def part(self) -> tuple[int, int]:
        """Rows of a group, columns of a tap: what a block must fit into."""
        rows, cols = self.shape
        return rows // self.groups, cols // self.taps

    def matrix(self) -> Tensor:
        """The weight as that matrix, taps first, detached."""
        return self.as_matrix(self.parameter.detach())

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as that matrix."""
        if self.transposed:
            return tensor.t()
        return tensor if tensor.dim() == 2 else matrix_of(tensor)


SPARSE_TYPES: dict[type[nn.Module], Any] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    **RECURRENT,
    nn.MultiheadAttention: SparseMultiheadAttention,
}
"""Torch's layers and their sparse counterparts."""

SPARSE_KINDS: tuple[Any, ...] = (*SPARSE_TYPES.values(), SparseTransposedLinear)
"""The sparse counterparts of torch's layers, and of others'."""


def sparse_type(kind: type[nn.Module]) -> Any:
    """The sparse counterpart of a class of layers; None if it has none."""
    return SparseTransposedLinear if is_transposed(kind) else SPARSE_TYPES.get(kind)


def dense_counterpart(kind: type[nn.Module]) -> Any:
    """The class of layers that a sparse one stands for; of any other class itself."""
    if kind is SparseTransposedLinear:
        return dense_type()
    return next((dense for dense, sparse in SPARSE_TYPES.items() if sparse is kind), kind)


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """The weights of one module that can be sparse, by name.

    None of other and derived types, nor of layers whose weights something else makes (weight norm,
    pruning) or that hold one twice.
    """
    kind = type(module)
    if kind in RECURRENT:
        held = matrices(module)
        plain = len({id(p) for p in held.values()}) == len(held) == len(_usual_names(module))
        return {name: Weight(name, p) for name, p in held.items()} if plain else {}
    if kind is nn.MultiheadAttention:
        return {name: Weight(name, w) for name, w in _plain_projections(module).items()}
    if sparse_type(kind) is None or not isinstance(module.weight, nn.Parameter):
        return {}
    if is_transposed(kind):
        return {"": Weight("", module.weight, transposed=True)}
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        taps = math.prod(module.kernel_size)
        return {"": Weight("", module.weight, module.groups, taps)}
    return {"": Weight("", module.weight)}


def _plain_projections(module: Any) -> Mapping[str, Tensor]:
    """Those of an attention layer whose weights nothing else makes; none otherwise."""
    out = module.out_proj
    first = "in_proj_weight" if module._qkv_same_embed_dim else "q_proj_weight"
    plain = isinstance(out, nn.Linear) and type(out).__module__ == nn.Linear.__module__
    held = plain and "weight" in out._parameters and module._parameters.get(first) is not None
    pruned = {**pruned_tensors(module), **pruned_tensors(out)}
    return projections(module) if held and not pruned else {}


def _usual_names(module: nn.Module) -> list[str]:
    """The weights that a torch recurrent layer or cell holds under their own names."""
    if not isinstance(module, nn.RNNBase):
        names = ["weight_ih", "weight_hh"]
    else:
        names = [name for name in module._flat_weights_names if name.startswith("weight_")]
    return [name for name in names if isinstance(getattr(module, name, None), nn.Parameter)]


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution with a single input channel in each of several groups."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.in_channels == module.groups > 1


def convert(module: nn.Module, topologies: Mapping[str, Topology], impl: str | None) -> Any:
    """The sparse layer with the values of `module` at these connections, by weight name.

    Of a layer that torch has pruned, the values that `prune.remove` would leave.
    """
    module = unpruned(module)
    sparse = sparse_type(type(module))
    if type(module) in RECURRENT or type(module) is nn.MultiheadAttention:
        every = {name: topologies.get(name) for name in weights_of(module)}
        return sparse.from_topologies(module, every, impl=impl)
    return sparse.from_topology(module, topologies[""], impl=impl)
