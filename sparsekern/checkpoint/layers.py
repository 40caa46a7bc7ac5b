"""Sparse layers of a file, and a model that is made to have them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.carry.resize import check_free
from sparsekern.carry.transaction import Data
from sparsekern.checkpoint.file import Content
from sparsekern.errors import CheckpointError, SparseKernError
from sparsekern.nn import SparseLayer
from sparsekern.nn.init import TORCH_GAIN
from sparsekern.nn.sharded import is_sharded
from sparsekern.ops import block_norm
from sparsekern.swap import Target, all_targets, sparse_layers
from sparsekern.swap.build import Drawing, sparse_layer
from sparsekern.swap.refuse import check_unwrapped
from sparsekern.swap.replace import replace_all
from sparsekern.topology import ARRAY_NAMES, Topology
from sparsekern.topology.blocks import Grid

log = logging.getLogger(__name__)


def check_whole(tensors: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where ranks hold parts of a tensor, as with FSDP2."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and is_sharded(tensor):
            raise CheckpointError(
                f"{name!r} is a DTensor, sharded over ranks by FSDP2: save and load it with "
                "torch.distributed.checkpoint"
            )


class SavedLayer(NamedTuple):
    """A sparse layer as a file holds it.

    Attributes:
        topology: its connections.
        values: (nnzb, bh, bw) in their order; of a masked layer, the dense (rows, cols).
        bias: (rows,), or None.
    """

    topology: Topology
    values: Tensor
    bias: Tensor | None

    def __repr__(self) -> str:
        bias = None if self.bias is None else tuple(self.bias.shape)
        kind, shape = self.values.dtype, tuple(self.values.shape)
        return f"SavedLayer({self.topology}, values={kind} of shape {shape}, bias of shape {bias})"


def saved_layers(content: Content) -> dict[str, SavedLayer]:
    """The sparse layers of a file, by name.

    Raises:
        CheckpointError: what the file says of one is not so.
    """
    found = content.head.get("layers", {})
    if not isinstance(found, dict):
        raise CheckpointError("`layers` of the file must be an object")
    return {name: _saved_layer(name, facts, content.tensors) for name, facts in found.items()}


def _saved_layer(name: str, facts: Any, tensors: Mapping[str, Tensor]) -> SavedLayer:
    layout = facts.get("layout") if isinstance(facts, dict) else None
    if not isinstance(layout, list) or [type(n) for n in layout] != [int] * 6:
        raise CheckpointError(f"layout of layer {name!r} must be six ints; got {str(layout)[:60]}")
    before = f"{name}." if name else ""
    missing = [n for n in ("values", "crow", "col") if before + n not in tensors]
    if missing:
        raise CheckpointError(f"layer {name!r} must have values, crow and col; lacks {missing}")
    crow, col, values = (tensors[before + n] for n in ("crow", "col", "values"))
    topology = topology_at(name, layout, crow, col)
    shape = tuple(values.shape)
    if shape not in (topology.values_shape, topology.shape) or not values.is_floating_point():
        raise CheckpointError(
            f"`values` of layer {name!r} must be floating point, of shape "
            f"{topology.values_shape}; got {values.dtype} of shape {shape}"
        )
    bias = tensors.get(before + "bias")
    if bias is not None and tuple(bias.shape) != topology.shape[:1]:
        raise CheckpointError(
            f"`bias` of layer {name!r} must have shape {topology.shape[:1]}; "
            f"got {tuple(bias.shape)}"
        )
    return SavedLayer(topology, values, bias)


def topology_at(name: str, layout: list[int], crow: Tensor, col: Tensor) -> Topology:
    """The topology of these two arrays, validated."""
    rows, cols, bh, bw, groups, taps = layout
    try:
        grid = Grid.of((rows, cols), (bh, bw), groups, taps)
        # before memory is taken for as many block rows and columns as the file says
        if crow.numel() != grid.rows + 1:
            raise CheckpointError(f"`crow` must have {grid.rows + 1} entries; got {crow.numel()}")
        if grid.groups * grid.cols > 2**31 - 2:
            raise CheckpointError(f"{grid.groups * grid.cols} block columns are too many")
        none: Any = dict.fromkeys(ARRAY_NAMES, torch.empty(0, dtype=torch.int32))
        like = Topology(grid.shape, grid.block, **none, groups=groups, taps=taps)
        return like.with_compressed(crow, col)
    except (SparseKernError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"layer {name!r}: {error}") from None


# ---- a model with these layers


def fit(model: nn.Module, saved: Mapping[str, SavedLayer], undo: ExitStack) -> list[str]:
    """Give the model sparse layers of these very connections; values come afterwards.

    Sparse layers change in place and keep their parameters; dense ones are replaced.

    Args:
        model: changed in place.
        saved: by name.
        undo: gets what takes the changes back.

    Returns:
        The names of the modules that were replaced.

    Raises:
        CheckpointError: a layer is not there, or has another shape; nothing has changed then.
    """
    own, targets = sparse_layers(model), {t.name: t for t in all_targets(model)}
    coming: dict[str, list[Target]] = {}
    for name, layer in saved.items():
        topology = layer.topology
        if name in own:
            held = own[name]._held()
            cut = held.shape, held.groups, held.taps
        elif name in targets:
            target = targets[name]
            cut = target.weight.shape, target.weight.groups, target.weight.taps
            there = topology.to(target.weight.parameter.device)
            coming.setdefault(target.owner, []).append(target._replace(topology=there))
        else:
            raise CheckpointError(f"the file's sparse layer {name!r} is no layer of the model")
        if cut != (topology.shape, topology.groups, topology.taps):
            raise CheckpointError(
                f"layer {name!r} must have shape {topology.shape} in {topology.groups} groups and "
                f"{topology.taps} taps; got {cut[0]} in {cut[1]} and {cut[2]}"
            )
    if "" in coming:
        raise CheckpointError("`model` must contain the layers: a bare one can't be replaced")
    _turn_sparse(model, coming, undo)
    for name, layer in saved.items():
        if name in own:
            _adopt(name, own[name], layer.topology, undo)
    return list(coming)


def _turn_sparse(model: nn.Module, coming: Mapping[str, list[Target]], undo: ExitStack) -> None:
    """Replace dense layers by sparse ones, which take over what users put on them."""
    if not coming:
        return
    check_unwrapped(model, "load")
    drawing = Drawing("keep", TORCH_GAIN, None, None)
    parents = {owner: model.get_submodule(owner.rpartition(".")[0]) for owner in coming}
    made = [sparse_layer(own, parents[owner], drawing) for owner, own in coming.items()]
    steps: list[Any] = []
    undo.callback(lambda: [step() for step in reversed(steps)])
    replace_all(model, made, steps)
    lost = [text for m in made for text in m.lost]
    if lost:
        log.warning("not carried over: %s", "; ".join(lost))


def _adopt(name: str, layer: SparseLayer, topology: Topology, undo: ExitStack) -> None:
    """Room for another number of blocks, or another block, in the layer's own parameter."""
    held = layer._held()
    if (held.nnzb, held.block) == (topology.nnzb, topology.block) and not layer._blank:
        return
    check_free({name: layer})
    old_block, old_grad = layer.block, layer.values.grad
    old_buffers, old_blank = dict(layer._buffers), layer._blank
    loads, new = layer._loads, layer.values.detach()
    if layer.dense_mask is None:
        new = new.new_zeros(topology.values_shape)
    values = Data(layer.values, new)
    put_back = values.saved()

    def restore() -> None:
        layer.block, layer._blank, layer._loads = old_block, old_blank, loads
        layer._buffers.update(old_buffers)
        put_back()
        layer.values.grad = old_grad
        layer._topology = None

    undo.callback(restore)
    device = layer.values.device
    moved = topology.to(device).clone()
    layer.block, layer._blank = topology.block, False
    for array in ARRAY_NAMES:
        layer._buffers[array] = getattr(moved, array)
    layer.values.grad = None
    values.write()
    if layer.dense_mask is not None:
        layer._buffers["dense_mask"] = moved.to_mask()
    layer._loads += 1
    layer._trust()


def largest(layer: SparseLayer, matrix: Tensor) -> Topology:
    """As many blocks as the layer has, those of largest summed magnitude; ties go to the lowest."""
    own = layer.topology
    full = Topology.random(own.shape, own.block, sparsity=0.0, groups=own.groups, taps=own.taps).to(
        matrix.device
    )
    scores = block_norm(full.pack(matrix), "l1")
    order = torch.argsort(scores, descending=True, stable=True)[: own.nnzb]
    return full.with_positions(full.positions()[order].sort().values)
