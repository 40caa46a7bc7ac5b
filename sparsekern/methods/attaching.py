"""What a method can be attached to: the optimizers and layers it is given, checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsekern.carry.optimizer_state import check_followable, check_state
from sparsekern.carry.parallel import check_parallel, check_sharding
from sparsekern.carry.wrappers import check_holds, check_steps, unwrapped
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.methods.source import Source
from sparsekern.nn import SparseLayer, sharded
from sparsekern.swap import sparse_layers

if TYPE_CHECKING:
    from sparsekern.methods.base import Method

log = logging.getLogger(__name__)


def as_optimizers(given: object) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of one method; raises if a method can't follow one of them."""
    optimizers = tuple(given) if isinstance(given, list | tuple) else (given,)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DtypeError(
                "`optimizer` must be a torch.optim.Optimizer, or several in a list; "
                f"got {type(optimizer).__name__}"
            )
        for inner in unwrapped(optimizer):
            check_followable(inner)
        check_steps(optimizer)
    if (
        len({id(unwrapped(optimizer)[-1]) for optimizer in optimizers}) != len(optimizers)
        or not optimizers
    ):
        raise ConfigError(f"`optimizer` must name each optimizer once; got {len(optimizers)}")
    return optimizers


def layers_to_train(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, SparseLayer]:
    """All sparse layers; raises unless those that are not frozen are held by one optimizer.

    A layer that is frozen now takes part from when it is unfrozen.
    """
    layers = sparse_layers(model)
    check_parallel(model, [one for optimizer in optimizers for one in unwrapped(optimizer)])
    sharded.manage(model, list(layers.values()))
    if not layers:
        raise ConfigError(
            "`model` has no sparse layer; call sparsify_ first (at a low sparsity ERK leaves all "
            "layers dense)"
        )
    for name, layer in layers.items():
        check_sharding(name, layer)
        values = sharded.trained(layer)
        if values.requires_grad:
            check_holds(optimizers, name, values)
            check_state(optimizers, name, values)
    return layers


def check_blocks(layers: Mapping[str, SparseLayer]) -> None:
    """Raise `ConfigError` unless all layers have one block size, so that blocks are worth the same.

    A block that leaves a layer with small ones could not come to one with large ones whole.
    """
    blocks = {name: tuple(layer.block) for name, layer in layers.items()}
    if len(set(blocks.values())) > 1:
        raise ConfigError(
            "a method that moves blocks from layer to layer needs one block size for all of them; "
            f"got {blocks}"
        )


def tell_idle(method: Method, fraction: float) -> None:
    """Warn if the first update, the largest, would change nothing: that is no dynamic training."""
    layers = method.trained_layers()
    known = not any(layer._blank or layer.col.is_meta for layer in layers.values())
    if method.source is Source or not layers or not known:
        return
    if not any(method.most_grown(name, layer, fraction) for name, layer in layers.items()):
        log.warning(
            "updates of %s change nothing: a share of %g is less than one block in each layer (%s "
            "active blocks); take smaller blocks, a lower sparsity or a larger `drop_fraction`",
            type(method).__name__,
            fraction,
            ", ".join(str(layer.topology.nnzb) for layer in layers.values()),
        )
