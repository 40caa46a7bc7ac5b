"""One new layer for an old one: connections, values, parameters, and what users put on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.carry.hand_over import Moved
from sparsekern.nn import SparseLayer, SparseMultiheadAttention
from sparsekern.nn.attention_parts import PROJECTIONS
from sparsekern.nn.connections import (
    block_weights,
    count_within,
    largest_of,
    topology_of_largest,
)
from sparsekern.nn.init import draw_uniform_
from sparsekern.nn.kinds import convert
from sparsekern.nn.pruned import pruned_tensors, unpruned
from sparsekern.nn.recurrent import RECURRENT, SparseRecurrent
from sparsekern.nn.recurrent.base import matrices
from sparsekern.swap.carried import take_marks, take_over
from sparsekern.swap.targets import Target
from sparsekern.topology import Topology
from sparsekern.topology.blocks import active_count


class Drawing(NamedTuple):
    """How connections and values are made; see `sparsify_`."""

    init: str | None
    gain: float
    impl: str | None
    generator: torch.Generator | None


class Made(NamedTuple):
    """A new layer, ready to take its place.

    Attributes:
        old: the module that it replaces, unchanged.
        new: the module that comes.
        moves: parameters that an optimizer is to exchange.
        biases: parameters that both hold, with values drawn anew.
        drawn: whether values were drawn anew.
        lost: what could not be carried over, in words.
    """

    old: nn.Module
    new: nn.Module
    moves: list[Moved]
    biases: list[tuple[nn.Parameter, Tensor]]
    drawn: bool
    lost: list[str]


class _Slot(NamedTuple):
    """Where a parameter lies: the module, its name there, and below the layer."""

    holder: nn.Module
    attribute: str
    name: str
    rows: slice | None = None  # of a parameter that holds several matrices

    @property
    def parameter(self) -> nn.Parameter | None:
        return self.holder._parameters.get(self.attribute)


def sparse_layer(targets: list[Target], parent: nn.Module, drawing: Drawing) -> Made:
    """The sparse layer of one module, with all of its targets."""
    module, name = targets[0].module, targets[0].owner
    topologies = {t.weight.name: _topology(t, drawing) for t in targets}
    if isinstance(module, SparseLayer):
        layer: Any = _sparser(module, topologies[""], drawing.impl)
    else:
        layer = convert(module, topologies, drawing.impl)
    drawn = {t.weight.name for t in targets if drawing.init == "sparse" and t.pruned is None}
    if drawn:
        _draw(module, layer, parent, drawn, drawing)
    return _taken(name, module, layer, drawn)


def dense_layer(name: str, module: nn.Module) -> Made:
    """Torch's layer with the weights of a sparse one."""
    sparse: Any = module  # all kinds have `to_dense`
    made = _taken(name, module, sparse.to_dense(), set())
    several = isinstance(module, SparseRecurrent | SparseMultiheadAttention)
    for own, matrix in module.named_children() if several else ():
        if own != "out_proj" and any(
            hooks for key, hooks in vars(matrix).items() if "hooks" in key and "_with_" not in key
        ):
            made.lost.append(f"hooks on {f'{name}.{own}'!r}")
    return made


# ---- connections and values


def _topology(target: Target, drawing: Drawing) -> Topology:
    if target.topology is not None:
        return target.topology
    weight, module = target.weight, target.module
    if isinstance(module, SparseLayer):
        return _part_of(module, target.sparsity, drawing)
    parts: dict[str, Any] = {"groups": weight.groups, "taps": weight.taps}
    if drawing.init == "keep":
        return topology_of_largest(weight.matrix(), target.sparsity, target.block, **parts)
    return Topology.random(
        weight.shape, target.block, sparsity=target.sparsity, generator=drawing.generator, **parts
    )


def _part_of(layer: SparseLayer, sparsity: float, drawing: Drawing) -> Topology:
    """Some of a layer's connections, the largest or random ones."""
    own = layer.topology
    if drawing.init == "keep":
        return largest_of(own, layer.active_values(), sparsity)
    order = torch.randperm(own.nnzb, generator=drawing.generator, device="cpu").to(own.device)
    n = count_within(block_weights(own)[order], active_count(math.prod(own.shape), sparsity))
    return own.with_positions(own.positions()[order[: max(n, 1)]].sort().values)


def _sparser(layer: SparseLayer, topology: Topology, impl: str | None) -> SparseLayer:
    """A layer with some of the connections of another one, and their values."""
    kind: Any = type(layer)
    made: SparseLayer = kind.shaped_like(layer, topology, layer.impl if impl is None else impl)
    with torch.no_grad():
        made.values.copy_(_kept(layer, made, layer.values))
    made.values.requires_grad_(layer.values.requires_grad)
    return made.train(layer.training)


def _draw(old: nn.Module, layer: Any, parent: nn.Module, names: set[str], drawing: Drawing) -> None:
    gain, generator = drawing.gain, drawing.generator
    if isinstance(layer, SparseRecurrent | SparseMultiheadAttention):
        layer.reset_parameters(generator, names=names, gain=gain)
    elif isinstance(parent, SparseMultiheadAttention):
        own = next(name for name, child in parent.named_children() if child is old)
        layer.reset_parameters(generator, gain * parent.relative_gain(own))
    elif isinstance(parent, SparseRecurrent):  # as that would draw this matrix of it
        bound = 1 / math.sqrt(parent.hidden_size)
        layer.reset_values(generator, gain * math.sqrt(layer.in_features) * bound)
        if layer.bias is not None:
            draw_uniform_(layer.bias.data, generator, bound)
    else:
        layer.reset_parameters(generator, gain)


# ---- parameters


def _taken(name: str, old: nn.Module, new: nn.Module, drawn: set[str]) -> Made:
    """Give the new layer what the old one holds besides its weights."""
    lost = take_over(name, old, new)
    if isinstance(old, _ATTENTION):
        lost += _take_out_proj(name, old, new)
    moves, biases = [], []
    slots = dict(_slots(new))
    for key, slot in _slots(old):
        place, parameter = slots[key], slot.parameter
        fresh = place.parameter
        if parameter is None or fresh is None:
            continue
        move = _move(slot, place)
        if move is None:
            if key[0] == "bias" and key[1] in drawn:
                biases.append((parameter, fresh.detach()))
            setattr(place.holder, place.attribute, parameter)
            fresh = parameter
        else:
            lost += take_marks(name, parameter, fresh)
        names = f"{name}.{slot.name}", f"{name}.{place.name}"
        if move is not None or names[0] != names[1]:
            moves.append(Moved(name, names, parameter, fresh, move or Tensor.clone))
    return Made(old, new, moves, biases, bool(drawn), list(dict.fromkeys(lost)))


_ATTENTION = (nn.MultiheadAttention, SparseMultiheadAttention)


def _take_out_proj(name: str, old: Any, new: Any) -> list[str]:
    """The output projection is a module in torch's attention too: one that stays dense stays."""
    if isinstance(old.out_proj, SparseLayer) or isinstance(new.out_proj, SparseLayer):
        return take_over(f"{name}.out_proj", old.out_proj, new.out_proj)
    new.out_proj = old.out_proj
    return []


def _attention_slots(module: Any) -> Iterator[tuple[tuple[str, str], _Slot]]:
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        yield ("bias", name), _Slot(module, name, name)
    yield ("bias", "out_proj"), _Slot(module.out_proj, "bias", "out_proj.bias")
    for i, own in enumerate(PROJECTIONS):
        if isinstance(module, SparseMultiheadAttention) or own == "out_proj":
            layer = getattr(module, own)
            attribute = "values" if isinstance(layer, SparseLayer) else "weight"
            yield ("weight", own), _Slot(layer, attribute, f"{own}.{attribute}")
        elif module._qkv_same_embed_dim:
            rows = slice(i * module.embed_dim, (i + 1) * module.embed_dim)
            yield ("weight", own), _Slot(module, "in_proj_weight", "in_proj_weight", rows)
        else:
            yield ("weight", own), _Slot(module, f"{own}_weight", f"{own}_weight")


def _slots(module: nn.Module) -> Iterator[tuple[tuple[str, str], _Slot]]:
    """Where a layer's own parameters lie, by kind and matrix."""
    pruned = pruned_tensors(module)

    def slot(attribute: str) -> _Slot:
        attribute += "_orig" if attribute in pruned else ""
        return _Slot(module, attribute, attribute)

    if isinstance(module, _ATTENTION):
        yield from _attention_slots(module)
    elif isinstance(module, SparseRecurrent):
        for own, layer in module._matrices().items():
            for (kind, _), inner in _slots(layer):
                yield (kind, own), inner._replace(name=f"{own}.{inner.name}")
    elif type(module) in RECURRENT:
        for own in matrices(unpruned(module)):
            yield ("weight", own), slot(f"weight_{own}")
            yield ("bias", own), slot(f"bias_{own}")
    else:
        yield ("weight", ""), slot("values" if isinstance(module, SparseLayer) else "weight")
        yield ("bias", ""), slot("bias")


def _move(old: _Slot, new: _Slot) -> Callable[[Tensor], Tensor] | None:
    """How a tensor of one parameter's shape becomes one of the other's; None: they are one."""
    before, after = old.holder, new.holder
    if new.attribute == "values" and isinstance(after, SparseLayer):
        if old.attribute == "values" and isinstance(before, SparseLayer):
            return partial(_kept, before, after)
        return partial(_packed, after, old.rows)
    if old.attribute == "values" and isinstance(before, SparseLayer):
        return before.as_weight  # `densify_`, which no optimizer follows
    if old.rows is not None or new.rows is not None:
        return partial(_rows, old.rows)
    return Tensor.clone if old.attribute.endswith("_orig") else None


def _rows(rows: slice | None, tensor: Tensor) -> Tensor:
    return (tensor if rows is None else tensor[rows]).clone()


def _packed(layer: SparseLayer, rows: slice | None, dense: Tensor) -> Tensor:
    """A tensor of the dense weight's shape, or rows of it, as one of the shape of `values`."""
    dense = dense if rows is None else dense[rows]
    topology = layer.topology
    if topology.device != dense.device:  # state may be kept elsewhere
        topology = topology.to(dense.device)
    blocks = topology.pack(layer.as_matrix(dense))
    return _stored(layer, topology, blocks)


def _kept(old: SparseLayer, new: SparseLayer, tensor: Tensor) -> Tensor:
    """A tensor of the shape of a sparse layer's `values` as one of a sparser layer's."""
    before, after = old.topology, new.topology
    if before.device != tensor.device:
        before, after = before.to(tensor.device), after.to(tensor.device)
    blocks = tensor if old.dense_mask is None else before.pack(tensor)
    at = torch.searchsorted(before.positions(), after.positions())
    return _stored(new, after, blocks[at])


def _stored(layer: SparseLayer, topology: Topology, blocks: Tensor) -> Tensor:
    return blocks if layer.dense_mask is None else topology.unpack(blocks)
