"""Agreement between the ranks of a distributed job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from sparsekern.errors import RankMismatchError
from sparsekern.topology import Topology

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(slab: Tensor) -> None:
    """Sum a slab of the signed dense gradient over all ranks, in place.

    Summing signed gradients before any absolute value makes the result independent of the number of
    ranks; leaving it out was a bug of the first RigL code (Evci et al. 2020, appendix M).
    """
    dist.all_reduce(slab)


def gather(mine: T) -> list[T]:
    """What each rank gives, by rank; of a single process, what it gives itself."""
    if not is_distributed():
        return [mine]
    everyone: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def check_agreement(topologies: Mapping[str, Topology]) -> None:
    """Compare all ranks' topologies.

    Raises:
        RankMismatchError: naming the first layer and rank that differ from rank 0.
    """
    mine = {name: topology.digest() for name, topology in topologies.items()}
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name, digest in everyone[0].items():
            if theirs.get(name) != digest:
                raise RankMismatchError(
                    f"layer {name!r} has another topology on rank {rank} than on rank 0: "
                    f"digest {str(theirs.get(name))[:12]} against {digest[:12]}"
                )
