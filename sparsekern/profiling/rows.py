"""A row of the report for each layer: what it is, what it computes, and the bytes it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.flops import Count
from sparsekern.cost.held import tensor_bytes as _bytes
from sparsekern.cost.watch import OTHER, tensors
from sparsekern.nn import SparseLayer
from sparsekern.nn.kinds import SPARSE_TYPES, weights_of
from sparsekern.nn.recurrent.base import SparseRecurrent


class Trained(NamedTuple):
    """What a training step makes beside the parameters.

    Attributes:
        gradients: ids of the parameters that get one.
        state: the optimizer's, by parameter.
    """

    gradients: frozenset[int]
    state: Mapping[Any, Mapping[str, Any]]


WHOLE = (SparseLayer, SparseRecurrent, *SPARSE_TYPES)
"""Modules that are one row with all that they contain."""

MATRICES = (nn.MultiheadAttention, nn.modules.conv._ConvNd, nn.Bilinear)
"""Modules whose parameters of several dimensions are all weights of products."""


@dataclass(frozen=True)
class LayerRow:
    """One layer. 1 multiply-add = 2 FLOPs; bytes are those that it alone adds.

    Attributes:
        name: in the model; "(other)" for what no layer holds or does.
        type: of the module.
        shape: of its weight as torch's dense layer has it; None without one or with several.
        block: edges (outputs, inputs) of a sparse weight's blocks; None if dense.
        weights: numbers in its weight matrices if they were dense; biases are left out.
        nnz: of these, those that are active.
        density: nnz / weights; None without weights.
        impl: implementation of a sparse layer; "torch" for torch's own layers.
        calls: of its forward in a step.
        forward_flops: executed.
        backward_flops: executed.
        step_flops: forward and backward.
        forward_flops_dense: if the layer were dense.
        backward_flops_dense: the same.
        step_flops_dense: the same.
        values_bytes: parameters, and buffers such as running statistics.
        index_bytes: which connections exist.
        gradient_bytes: of the parameters, after a backward pass.
        optimizer_bytes: state of the optimizer, after its first step.
        held_bytes: the four together: what stays allocated between two steps.
        held_bytes_dense: the same if the layer were dense.
        saved_bytes: activations that its forward first keeps for backward.
        workspace_bytes: most that one of its operators holds beside operands and results.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    block: tuple[int, int] | None
    weights: int
    nnz: int
    density: float | None
    impl: str
    calls: int
    forward_flops: int
    backward_flops: int
    step_flops: int
    forward_flops_dense: int
    backward_flops_dense: int
    step_flops_dense: int
    values_bytes: int
    index_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    held_bytes: int
    held_bytes_dense: int
    saved_bytes: int
    workspace_bytes: int

    @property
    def flops_ratio(self) -> float | None:
        """Step FLOPs executed, over those of the dense layer; None without products."""
        return self.step_flops / self.step_flops_dense if self.step_flops_dense else None

    def as_dict(self) -> dict[str, Any]:
        """All facts by name, the ratio too, in values that JSON knows."""
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        pairs = {name: facts[name] and list(facts[name]) for name in ("shape", "block")}
        return facts | pairs | {"flops_ratio": self.flops_ratio}


SUMMED = tuple(f.name for f in fields(LayerRow) if f.type == "int" and f.name != "workspace_bytes")
"""Facts whose total is their sum; of workspaces only one exists at a time."""


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that make a row, by their first name; none contains another.

    Those that torch or this package know as one layer, and modules without children.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, WHOLE) or not any(module.children()):
            found[name or "(model)"] = module
            inside.update(module.modules())
    return found


def rows_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    counts: Mapping[str, Count],
    made: Trained,
    device: torch.device,
) -> list[LayerRow]:
    """A row for each layer and one for the rest; a tensor that several hold is the first one's.

    Args:
        model: real, on the meta device or fake.
        layers: of `layers_of(model)`.
        counts: of a step, by the layers' names and `OTHER`.
        made: by a step, for the parameters of `model`.
        device: where the step is to run.
    """
    taken: set[int] = set()
    rows = [
        _row(name, module, counts[name], made, taken, device) for name, module in layers.items()
    ]
    held = _held(model, [], made, taken)
    rest = LayerRow(
        name="(other)",
        type="",
        shape=None,
        block=None,
        weights=0,
        nnz=0,
        density=None,
        impl="torch",
        held_bytes_dense=held["held_bytes"],
        **held,
        **_counted(counts[OTHER]),
    )
    return [*rows, rest] if rest.held_bytes or rest.step_flops or rest.saved_bytes else rows


def _row(
    name: str,
    module: nn.Module,
    count: Count,
    made: Trained,
    taken: set[int],
    device: torch.device,
) -> LayerRow:
    sparse = [m for m in module.modules() if isinstance(m, SparseLayer)]
    dense = _dense_weights(module)
    shapes = [tuple(m.weight.shape) for m in sparse] + [tuple(w.shape) for w in dense]
    weights = sum(map(math.prod, shapes))
    nnz = sum(map(_active, sparse)) + sum(w.numel() for w in dense)
    blocks = {m.block for m in sparse}
    missing = [m for m in sparse if id(m.values) not in taken]
    held = _held(module, sparse, made, taken)
    return LayerRow(
        name=name,
        type=type(module).__name__,
        shape=shapes[0] if len(shapes) == 1 else None,
        block=blocks.pop() if len(blocks) == 1 else None,
        weights=weights,
        nnz=nnz,
        density=nnz / weights if weights else None,
        impl="+".join(dict.fromkeys(m.impl_on(device) for m in sparse)) or "torch",
        held_bytes_dense=held["held_bytes"] - held["index_bytes"] + _spared(missing, made),
        **held,
        **_counted(count),
    )


def _counted(count: Count) -> dict[str, int]:
    return {
        "calls": count.calls,
        "forward_flops": count.forward,
        "backward_flops": count.backward,
        "step_flops": count.forward + count.backward,
        "forward_flops_dense": count.forward_dense,
        "backward_flops_dense": count.backward_dense,
        "step_flops_dense": count.forward_dense + count.backward_dense,
        "saved_bytes": count.saved_bytes,
        "workspace_bytes": count.workspace_bytes,
    }


def _held(
    module: nn.Module, sparse: Iterable[SparseLayer], made: Trained, taken: set[int]
) -> dict[str, int]:
    """Bytes of the tensors of a module that are not taken; they are afterwards."""
    parameters = [p for p in module.parameters() if id(p) not in taken]
    buffers = [b for b in module.buffers() if id(b) not in taken]
    taken.update(map(id, [*parameters, *buffers]))
    index = {id(b) for layer in sparse for b in layer.buffers()}
    parts = {
        "values_bytes": _bytes([*parameters, *(b for b in buffers if id(b) not in index)]),
        "index_bytes": _bytes(b for b in buffers if id(b) in index),
        "gradient_bytes": _bytes(p for p in parameters if id(p) in made.gradients),
        "optimizer_bytes": sum(_bytes(_state_tensors(p, made)) for p in parameters),
    }
    return parts | {"held_bytes": sum(parts.values())}


def _spared(sparse: Iterable[SparseLayer], made: Trained) -> int:
    """Bytes that dense weights, gradients and optimizer state would take beyond these values'."""
    more = 0
    for layer in sparse:
        values = layer.values
        like = [t for t in _state_tensors(values, made) if t.shape == values.shape]
        size = values.element_size() * (2 if id(values) in made.gradients else 1)
        size += sum(t.element_size() for t in like)
        more += (math.prod(layer.weight_shape) - values.numel()) * size
    return more


def _active(layer: SparseLayer) -> int:
    """Active weights; with shapes alone, where edge blocks lie is unknown and they count whole."""
    t = layer.topology
    if t.grid.ragged and layer.values.is_meta:
        return min(t.nnzb * t.block[0] * t.block[1], math.prod(t.shape))
    return layer.nnz


def _dense_weights(module: nn.Module) -> list[Tensor]:
    """The dense weight matrices in a layer; all of those of attention and rarer convolutions."""
    if isinstance(module, MATRICES):
        return [p for p in module.parameters() if p.dim() > 1]
    return [w.parameter for m in module.modules() for w in weights_of(m).values()]


def _state_tensors(parameter: Tensor, made: Trained) -> list[Tensor]:
    return tensors(dict(made.state.get(parameter, {})))
