"""Parameters that FSDP2's `fully_shard` has cut up: each rank holds some blocks of a layer.

`values` is then a DTensor cut along its first dimension, by block (by row under `impl="masked"`).
While a forward or backward pass needs it, FSDP2 puts the whole parameter, a plain tensor, in its
place. Index arrays are not cut: every rank knows all connections.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparsekern.nn.base import SparseLayer


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts, or copies, of a tensor that is one tensor to all: a DTensor."""
    api = sys.modules.get("torch.distributed.tensor")
    kind = getattr(api, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory; all of it if it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    with torch.no_grad():
        own: Tensor = sharded.to_local()
    return own


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on each rank; of a sharded one a copy, for which all ranks must call."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    with torch.no_grad():
        full: Tensor = sharded.full_tensor()
    return full


def part(full: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `full` where it is cut as `like`: a copy, unless it is all of it."""
    if not is_sharded(like):
        return full
    sharded: Any = like
    mesh, cut = sharded.device_mesh, [p.is_shard() for p in sharded.placements]
    if True not in cut:
        return full
    axis = cut.index(True)
    rows = -(-full.shape[0] // mesh.size(axis))  # as `torch.chunk` cuts
    start = min(mesh.get_coordinate()[axis] * rows, full.shape[0])
    return full[start : start + rows].clone()


def problem_with(tensor: Tensor) -> str | None:
    """Why a sharded tensor is not one that `part` can cut; None if it is."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    usual = [type(p).__name__ == "Replicate" or _by_row(p) for p in placements]
    if not all(usual) or sum(map(_by_row, placements)) > 1:
        return f"it is cut as {tuple(placements)}, not along its first dimension alone"
    if mesh.get_coordinate() is None:
        return "this rank is not in its mesh"
    return None


def _by_row(placement: Any) -> bool:
    return type(placement).__name__ == "Shard" and placement.dim == 0


# ---- layers


def manage(model: nn.Module, layers: list[SparseLayer]) -> None:
    """Let layers know what FSDP2 keeps of their values, where it has cut them."""
    if not any(hasattr(module, "_get_fsdp_state") for module in model.modules()):
        return
    own = {id(layer): layer for layer in layers}
    for module in model.modules():
        for managed in _managed(module):
            info = managed._module_info
            for holder in (info.module, *info.shared_modules):
                if id(holder) in own and info.param_name == "values":
                    own[id(holder)]._sharding = managed


def _managed(module: nn.Module) -> Iterator[Any]:
    """FSDP2's records of the parameters that `fully_shard(module)` has cut."""
    state_of = getattr(module, "_get_fsdp_state", None)
    if state_of is None:
        return
    state: Any = state_of()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later
    for group in [state._fsdp_param_group] if groups is None else groups:
        if group is not None:
            yield from group.fsdp_params


def trained(layer: SparseLayer) -> nn.Parameter:
    """The parameter that an optimizer holds: `values`, or what is sharded of it between passes."""
    if layer._sharding is None:
        return layer.values
    parameter: nn.Parameter = layer._sharding.sharded_param
    return parameter


def gradients(layer: SparseLayer) -> list[Tensor]:
    """What has been accumulated since gradients were cleared: one, as a rule, or none."""
    managed = layer._sharding
    if managed is None:
        return [] if layer.values.grad is None else [layer.values.grad]
    unsharded = getattr(managed, "_unsharded_param", None)
    found = (
        managed.sharded_param.grad,
        None if unsharded is None else unsharded.grad,  # not reduced yet
        managed.unsharded_accumulated_grad,
    )
    return [grad for grad in found if grad is not None]


@contextmanager
def gathered(layer: SparseLayer) -> Iterator[None]:
    """Hold the whole values while this lasts: `active_values` needs no other rank then."""
    if not is_sharded(trained(layer)):
        yield
        return
    layer._whole = whole(trained(layer))
    try:
        yield
    finally:
        layer._whole = None
