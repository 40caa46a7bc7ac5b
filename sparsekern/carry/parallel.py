"""Which ways of sharing a model out over processes a method can follow; others are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.nn.sharded import is_sharded, problem_with, trained

REFUSED = {
    "FullyShardedDataParallel": "FSDP1 flattens parameters: use FSDP2's fully_shard",
    "DeepSpeedEngine": "DeepSpeed keeps its parameters in flat buffers: use FSDP2's fully_shard",
}
"""Wrappers whose parameters a topology update can't follow, by class name, and why."""


def check_parallel(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raise `ConfigError` naming a wrapper, or an optimizer, that no method can follow."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in REFUSED:
                raise ConfigError(f"`model` is inside {kind.__name__}: {REFUSED[kind.__name__]}")
    for optimizer in optimizers:
        if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(optimizer).__mro__):
            raise ConfigError(
                f"{type(optimizer).__name__} can't be followed: {REFUSED['DeepSpeedEngine']}"
            )


def check_sharding(name: str, layer: SparseLayer) -> None:
    """Raise `ConfigError` where ranks hold a layer in a way that topology updates can't follow."""
    values: Any = trained(layer)
    if not is_sharded(values):
        expected = layer._held().values_shape if layer.dense_mask is None else layer.matrix_shape
        if tuple(values.shape) != tuple(expected):
            raise ConfigError(
                f"`values` of layer {name!r} must have shape {tuple(expected)}; it has "
                f"{tuple(values.shape)}: something holds parts of it (FSDP1, DeepSpeed's ZeRO-3), "
                "which a method can't follow. Use FSDP2's fully_shard"
            )
        return
    if layer._sharding is None:
        raise ConfigError(
            f"the values of layer {name!r} are a DTensor, but no module of `model` was given to "
            "FSDP2's fully_shard with them: give the whole model. Tensor parallelism is not "
            "supported"
        )
    problem = problem_with(values)
    if problem is None and layer._sharding.offload_to_cpu:
        problem = "it is offloaded by a CPUOffloadPolicy"
    if problem is None and dist.get_world_size() != values.device_mesh.size():
        problem = (
            f"its mesh has {values.device_mesh.size()} of {dist.get_world_size()} processes, as "
            "with tensor or pipeline parallelism"
        )
    if problem:
        raise ConfigError(f"layer {name!r}, sharded by FSDP2, can't be followed: {problem}")
