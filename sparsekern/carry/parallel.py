"""Which ways of sharing a model out over processes a method can follow; others are named."""

from __future__ import annotations

import torch.distributed as dist

from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.nn.sharded import is_sharded, problem_with, trained


def check_sharding(name: str, layer: SparseLayer) -> None:
    """Raise `ConfigError` where ranks hold a layer in a way that topology updates can't follow."""
    values = trained(layer)
    if not is_sharded(values):
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
