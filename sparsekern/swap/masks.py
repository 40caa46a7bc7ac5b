"""Connections that are given: masks by name, and those that `torch.nn.utils.prune` has put on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.nn import SparseLayer
from sparsekern.nn.connections import check_mask, topology_of_mask
from sparsekern.nn.conv_arguments import check_groups
from sparsekern.nn.init import fan_in
from sparsekern.swap.shares import Blocks, check_cut, unfit, with_blocks
from sparsekern.swap.targets import Choice, Target, aliases
from sparsekern.topology import Topology
from sparsekern.topology.build import contains

log = logging.getLogger(__name__)

FULL = "its mask leaves nothing out, and dense is faster"


def by_masks(
    model: nn.Module,
    choice: Choice,
    masks: Mapping[str, Tensor],
    block: Blocks,
    known: Sequence[Target],
) -> Choice:
    """The layers that `masks` names, with the connections that it gives them.

    Raises:
        ConfigError: a name is unknown, given twice, or that of a layer that stays dense.
        DtypeError, ShapeError, TopologyError: a mask does not fit its layer.
    """
    given = _by_target(model, masks, known)
    for name in given:
        if name in choice.dense:
            raise ConfigError(f"`masks` makes {name!r} sparse, but {choice.dense[name]}")
    rest = {t.name: "`masks` does not name it" for t in choice.targets if t.name not in given}
    choice = choice.leaving(rest)
    targets = with_blocks(choice.targets, block, [target.name for target in known])
    targets = [_masked(target, given[target.name]) for target in targets]
    return _without_full(choice._replace(targets=targets))


def by_pruning(choice: Choice, block: Blocks, known: Sequence[str]) -> Choice:
    """Targets that are pruned already, with the masks that are on them."""
    choice = choice._replace(targets=with_blocks(choice.targets, block, known))
    choice = choice.leaving(unfit(choice.targets, block, known))
    targets = [_masked(t, t.pruned) for t in choice.targets if t.pruned is not None]
    return _without_full(choice._replace(targets=targets))


def _without_full(choice: Choice) -> Choice:
    full = {t.name: FULL for t in choice.targets if t.sparsity == 0}
    for target in choice.targets:
        _tell_what_is_cut_off(target)
    return choice.leaving(full)


def _by_target(
    model: nn.Module, masks: Mapping[str, Tensor], known: Sequence[Target]
) -> dict[str, Tensor]:
    """Masks by our names."""
    if not isinstance(masks, Mapping):
        raise DtypeError(f"`masks` must map names to tensors; got {type(masks).__name__}")
    names = {alias: target for target in known for alias in aliases(model, target)}
    given: dict[str, Tensor] = {}
    for name, mask in masks.items():
        target = names.get(name)
        if target is None:
            raise ConfigError(
                f"`masks` names {name!r}, which is no weight of `model` that can be sparse; these "
                f"are: {', '.join(target.name for target in known)}"
            )
        if target.name in given:
            raise ConfigError(f"`masks` names {target.name!r} twice")
        if target.pruned is not None:
            raise ConfigError(
                f"layer {target.name!r} is pruned by torch, whose mask counts: leave it out of "
                "`masks`, or call torch.nn.utils.prune.remove first"
            )
        given[target.name] = mask
    return given


def _masked(target: Target, mask: Tensor | None) -> Target:
    """The target with the connections of a mask of the weight's shape."""
    try:
        check_cut(target)
        topology = _topology(target, mask)
        check_groups(topology.nnzb, target.weight.groups)
    except (ConfigError, DtypeError, ShapeError, TopologyError) as error:
        if repr(target.name) in str(error):
            raise
        raise type(error)(f"layer {target.name!r}: {error}") from None
    return target._replace(sparsity=1 - topology.nnz / target.size, topology=topology)


def _topology(target: Target, mask: Tensor | None) -> Topology:
    weight, module = target.weight, target.module
    checked = _checked(mask, weight.parameter)
    matrix = weight.as_matrix(checked)
    topology = topology_of_mask(matrix, target.block, groups=weight.groups, taps=weight.taps)
    if isinstance(module, SparseLayer):
        own, new = module.topology.positions(), topology.positions()
        extra = int((~contains(own, new.to(own.device))).sum())
        if extra:
            raise TopologyError(
                f"the mask of a sparse layer can only leave out more; {extra} of its blocks are "
                "not active now"
            )
    return topology


def _checked(mask: Tensor | None, weight: Tensor) -> Tensor:
    """The mask as bool."""
    if not isinstance(mask, Tensor):
        raise DtypeError(f"a mask must be a tensor; got {type(mask).__name__}")
    check_mask(mask, weight)
    if mask.layout is not torch.strided:
        raise DtypeError(f"a mask must be dense (torch.strided); got {mask.layout}")
    mask = mask.detach()
    active = mask != 0
    if mask.dtype != torch.bool and not bool(((mask == 1) | ~active).all()):
        raise ConfigError("a mask must hold 0 and 1 only")
    return active


def _tell_what_is_cut_off(target: Target) -> None:
    """Log what a mask leaves without any input: the layer, groups of it, or neurons."""
    topology = target.topology
    if topology is None:
        return
    if not topology.nnzb:
        log.warning("the mask of layer %r is empty: the layer gives its bias alone", target.name)
        return
    inputs = fan_in(topology)
    per_group = inputs.view(topology.groups, -1).sum(1)
    groups, neurons = int((per_group == 0).sum()), int((inputs == 0).sum())
    if groups:
        log.warning(
            "the mask of layer %r leaves %d of %d groups empty",
            target.name,
            groups,
            topology.groups,
        )
    elif neurons:
        log.info(
            "the mask of layer %r leaves %d of %d outputs without inputs",
            target.name,
            neurons,
            len(inputs),
        )
