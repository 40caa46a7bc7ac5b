"""What a sparse layer takes from a state_dict: checked, and turned into what it holds.

A state is `values`, `crow` and `col`; older ones hold all seven index arrays, and a dense layer's
holds `weight`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.errors import DtypeError, ShapeError, TopologyError
from sparsekern.nn.sharded import is_sharded, local, part
from sparsekern.topology import ARRAY_NAMES, DERIVED_NAMES, STORED_NAMES, Topology

if TYPE_CHECKING:
    from sparsekern.nn.held import HeldTopology

log = logging.getLogger(__name__)


def prepare(
    layer: HeldTopology, state: dict[str, Any], prefix: str, *, assign: bool
) -> Topology | None:
    """Check the entries of `layer` in `state`, and replace them by what it can load as it is.

    Args:
        layer: changes nothing of it.
        state: by full name; torch lets a module change it.
        prefix: of the layer's names.
        assign: whether the layer is to hold these very tensors.

    Returns:
        The connections to come; None if there are none.

    Raises:
        TopologyError: the index arrays are no topology, or some are missing or without data.
        ShapeError, DtypeError: tensors of another size or kind.
    """
    present = [name for name in (*ARRAY_NAMES, "values") if prefix + name in state]
    for name in (*present, "weight", "bias"):
        entry = state.get(prefix + name)
        if isinstance(entry, Tensor) and entry.is_meta:
            raise TopologyError(f"`{name}` of {prefix!r} must hold data; got a meta tensor")
    if not present and prefix + "weight" in state:
        return _from_dense(layer, state, prefix)
    if not present:
        log.warning(
            "nothing is loaded into sparse layer %r: the state has neither `values`, `crow` and "
            "`col` nor a `weight` of it",
            prefix[:-1],
        )
        return None
    if not {*STORED_NAMES, "values"} <= set(present):
        raise TopologyError(
            f"state of {prefix!r} must hold values, crow and col; got only {present}"
        )
    topology = _topology(layer, state, prefix, assign=assign)
    state[prefix + "values"] = _values(layer, topology, state[prefix + "values"], prefix)
    for name in DERIVED_NAMES:
        state.pop(prefix + name, None)
    return topology


def _topology(layer: HeldTopology, state: dict[str, Any], prefix: str, *, assign: bool) -> Topology:
    arrays = {name: state[prefix + name] for name in ARRAY_NAMES if prefix + name in state}
    if not assign:  # they are copied into arrays whose strides are right
        arrays = {n: a.contiguous() if isinstance(a, Tensor) else a for n, a in arrays.items()}
    own = layer._held()
    stored: tuple[Any, ...] = tuple(arrays[name] for name in STORED_NAMES)
    rebuilt = own.with_compressed(*stored)
    if len(arrays) > len(STORED_NAMES):  # it must be what it says it is
        every = [arrays.get(name, getattr(rebuilt, name)) for name in ARRAY_NAMES]
        own.with_arrays(every).validate()
    if rebuilt.nnzb != own.nnzb:
        raise ShapeError(
            f"state of {prefix!r} must have {own.nnzb} active blocks and values of shape "
            f"{tuple(layer.values.shape)}; got {rebuilt.nnzb} "
            "(sparsekern.load fits a model to a file of another density)"
        )
    return rebuilt


def _values(layer: HeldTopology, topology: Topology, values: Any, prefix: str) -> Tensor:
    """What comes as values, as the layer stores them: blocks, or the matrix if it is masked."""
    if not isinstance(values, Tensor) or values.layout is not torch.strided:
        raise DtypeError(f"`values` of {prefix!r} must be a dense tensor; got {_kind(values)}")
    if not values.is_floating_point():
        raise DtypeError(f"`values` of {prefix!r} must be floating point; got {values.dtype}")
    shape = tuple(values.shape)
    if shape not in (topology.values_shape, topology.shape):
        raise ShapeError(
            f"`values` of {prefix!r} must have shape {topology.values_shape}, or "
            f"{topology.shape} of a masked layer; got {shape}"
        )
    masked = layer.dense_mask is not None
    if is_sharded(values):
        return _sharded_values(topology, values, prefix, fits=masked == (len(shape) == 2))
    if masked != (len(shape) == 2):
        topology = topology.to(values.device)
        return topology.unpack(values) if masked else topology.pack(values)
    if not masked and topology.grid.ragged:  # kernels count on zeros beyond the matrix
        return topology.to(values.device).clear_padding_(values.clone())
    return values


def _sharded_values(topology: Topology, values: Tensor, prefix: str, *, fits: bool) -> Tensor:
    """Values that FSDP2 has cut up: as they are, with zeros beyond the matrix."""
    if not fits:
        raise DtypeError(
            f"`values` of {prefix!r} must be a dense tensor to be stored another way; got a DTensor"
        )
    if topology.grid.ragged and values.dim() == 3:
        inside = torch.ones(topology.values_shape, device=values.device)
        beyond = part(topology.to(values.device).clear_padding_(inside), values) == 0
        values = values.clone()
        local(values).masked_fill_(beyond, 0)
    return values


def _from_dense(layer: HeldTopology, state: dict[str, Any], prefix: str) -> Topology:
    """Take a dense layer's weight at the layer's own connections."""
    weight, shape = state[prefix + "weight"], tuple(layer.weight_shape)
    if not isinstance(weight, Tensor) or weight.layout is not torch.strided:
        raise DtypeError(f"`weight` of {prefix!r} must be a dense tensor; got {_kind(weight)}")
    if is_sharded(weight):
        raise DtypeError(f"`weight` of {prefix!r} must be a dense tensor; got a DTensor")
    if not weight.is_floating_point():
        raise DtypeError(f"`weight` of {prefix!r} must be floating point; got {weight.dtype}")
    if tuple(weight.shape) != shape:
        raise ShapeError(
            f"`weight` of {prefix!r} must have shape {shape}; got {tuple(weight.shape)}"
        )
    own = layer.topology
    if own.device.type == "meta":
        raise TopologyError(
            f"layer {prefix[:-1]!r} has no connections yet, so a dense weight can't be taken at "
            "them: load a sparse state first"
        )
    matrix, own = layer.as_matrix(weight.detach()), own.to(weight.device)
    blocks = own.pack(matrix)
    _tell_share(prefix, int((blocks != 0).sum()), int((matrix != 0).sum()))
    del state[prefix + "weight"]
    state[prefix + "values"] = blocks if layer.dense_mask is None else own.unpack(blocks)
    copied = layer.topology.clone()
    state[prefix + "crow"], state[prefix + "col"] = copied.crow, copied.col
    return copied


def _tell_share(prefix: str, kept: int, nonzero: int) -> None:
    """Say what of a dense weight is left out."""
    log.log(
        logging.WARNING if kept < nonzero else logging.INFO,
        "sparse layer %r takes a dense weight at its own connections: %d of %d nonzero weights "
        "(sparsekern.load(..., connections='magnitude') takes the largest)",
        prefix[:-1],
        kept,
        nonzero,
    )


def _kind(value: object) -> str:
    return f"layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
