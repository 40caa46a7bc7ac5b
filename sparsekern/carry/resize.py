"""`layer.resize_`: another number of active blocks, in a layer that trains already."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.carry.averages import twins_of
from sparsekern.carry.followers import follower_of
from sparsekern.carry.rewire import carried, rewired
from sparsekern.carry.transaction import commit
from sparsekern.carry.wrappers import check_holds
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.base import resizers
from sparsekern.nn.sharded import trained
from sparsekern.topology import Topology

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
"""Classes that hold a model's gradients in buckets or shards of a fixed size, by name."""


def resize_(
    layer: SparseLayer,
    topology: Topology,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
) -> None:
    """Give a layer another topology, of another size too; see `SparseLayer.resize_`."""
    if not isinstance(topology, Topology):
        raise DtypeError(f"`topology` must be a Topology; got {type(topology).__name__}")
    follower = follower_of(layer)
    optimizers = _optimizers(optimizer, follower)
    name = "resized"
    if follower is not None:
        name = next(n for n, own in follower.layers.items() if own is layer)
    if optimizer is not None:
        check_holds(optimizers, name, layer.values)
    if topology.nnzb != layer.topology.nnzb:
        check_free({name: layer})
    followed = () if follower is None else follower.followed
    twins = twins_of({name: layer}, [item for item in followed if name in item.names])
    source = topology.traced_to(layer.topology)
    moving = carried(name, layer, optimizers, twins.get(name, ()))
    commit(rewired(moving, moving.whole(), topology, source))
    if follower is not None:
        follower.look_again()


def _optimizers(given: Any, follower: Any) -> tuple[torch.optim.Optimizer, ...]:
    if given is None:
        return () if follower is None else tuple(follower.optimizers)
    optimizers = tuple(given) if isinstance(given, list | tuple) else (given,)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DtypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
    return optimizers


def check_free(layers: Mapping[str, SparseLayer], quick: bool = False) -> None:
    """Raise `ConfigError` where something counts on the size of a layer's parameter.

    Args:
        layers: by name.
        quick: look at the layers alone, which know of FSDP2, and of a DDP module that they have run
            in; not through all objects that there are, which takes tenths of a second.
    """
    for name, layer in layers.items():
        values: Any = trained(layer)
        if type(values.data) is not Tensor:
            raise ConfigError(
                f"layer {name!r} can't change its number of active blocks: its values are a "
                f"{type(values.data).__name__}, sharded over ranks"
            )
        if layer._ddp is not None and layer._ddp() is not None:
            raise _counted(name, "DistributedDataParallel")
    if not quick and (what := next(holders(*layers.values()), None)) is not None:
        raise _counted(next((n for n, m in layers.items() if any(holders(m))), ""), what)


def _counted(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"layer {name!r} can't change its number of active blocks: {what} counts on the size of "
        "its parameter; resize before wrapping, compiling or capturing"
    )


def holders(*layers: nn.Module) -> Iterator[str]:
    """What counts on the sizes of the parameters of one of these layers: a wrapper and the like."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        yield "the CUDA graph that is being captured"
    kinds: dict[type, bool] = {}  # few, where objects are many
    for item in gc.get_objects():
        kind = type(item)
        if kind not in kinds:
            kinds[kind] = _is_graph(kind) or issubclass(kind, nn.Module)
        if not kinds[kind]:
            continue
        if _is_graph(kind):
            yield "a captured CUDA graph"  # which of its tensors are the layer's, nobody can tell
        elif (held := _size_counts(item)) and any(
            module is layer for module in item.modules() for layer in layers
        ):
            yield held


def _is_graph(kind: type) -> bool:
    return kind.__module__ == "torch.cuda.graphs" and kind.__name__ == "CUDAGraph"


def _size_counts(module: Any) -> str | None:
    """Why a module counts on the sizes of the parameters in it; None if it does not."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "OptimizedModule" in kinds or vars(module).get("_compiled_call_impl") is not None:
        return "a compiled module"
    return next((wrapper for wrapper in WRAPPERS if wrapper in kinds), None)


resizers.append(resize_)
