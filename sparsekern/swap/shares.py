"""How sparse each weight becomes, and in which blocks: by a distribution, by name, or by a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from sparsekern.distribution import DISTRIBUTIONS, distribute
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.connections import block_weights, count_within, every_block
from sparsekern.nn.conv_arguments import check_groups
from sparsekern.nn.kinds import is_depthwise
from sparsekern.ops import block_norm
from sparsekern.swap.patterns import Pattern, check_known, first_match, is_alone
from sparsekern.swap.targets import Choice, Target
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, Grid, active_count, as_block, check_sparsity
from sparsekern.topology.sampling import block_counts, check_count

Distribution = str | Mapping[Pattern, float] | Callable[[str, nn.Module], float]
Blocks = Block | Mapping[Pattern, Block] | Callable[[str, nn.Module], Block]

GLOBAL = "global"
NO_SHARE = "its share of the sparsity is 0, and dense is faster"
NO_MORE = "it is sparse already, and its share is no more"


class Planned(NamedTuple):
    """What a plan says of a weight that is to be sparse.

    Attributes:
        shape: of the weight that it was made for.
        sparsity: its share.
        block: its block.
    """

    shape: tuple[int, ...]
    sparsity: float
    block: Block


class Plans(Protocol):
    """What `sparsify_` takes as a plan; `sparsekern.Plan` is one."""

    @property
    def sparsity(self) -> float:
        """That was shared out."""

    @property
    def planned(self) -> Mapping[str, Planned]:
        """The weights that are to be sparse, by name; all others stay dense."""


def check_distribution(distribution: object, init: str | None) -> None:
    """Raise unless it is a known name, a mapping or a callable, and goes with `init`."""
    if isinstance(distribution, str):
        if distribution not in (*DISTRIBUTIONS, GLOBAL):
            raise ConfigError(
                f"`distribution` must be one of {sorted((*DISTRIBUTIONS, GLOBAL))}, a dict or a "
                f"callable; got {distribution!r}"
            )
        if distribution == GLOBAL and init != "keep":
            raise ConfigError(
                "`distribution` 'global' compares the model's own weights: it needs init='keep'; "
                f"got init={init!r}"
            )
    elif not isinstance(distribution, Mapping) and not callable(distribution):
        raise DtypeError(
            f"`distribution` must be a name, a dict or a callable; got {distribution!r}"
        )


def by_distribution(
    choice: Choice,
    sparsity: float,
    distribution: Distribution,
    block: Blocks,
    known: Sequence[str],
) -> Choice:
    """Share `sparsity` out, and give each weight its block.

    Weights that no block fits stay dense with their share: the others do not take it up.
    """
    if distribution != GLOBAL:
        shared = _with_shares(choice.targets, sparsity, distribution, known)
        choice = choice._replace(targets=shared)
        choice = choice.leaving({t.name: NO_SHARE for t in shared if t.sparsity == 0})
    choice = choice._replace(targets=with_blocks(choice.targets, block, known))
    choice = choice.leaving(unfit(choice.targets, block, known))
    if distribution == GLOBAL and choice.targets:
        choice = choice._replace(targets=over_all(choice.targets, sparsity))
    choice = choice.leaving({t.name: NO_MORE for t in choice.targets if _is_no_sparser(t)})
    return choice.leaving({t.name: NO_SHARE for t in choice.targets if t.sparsity == 0})


def _is_no_sparser(target: Target) -> bool:
    module = target.module
    return isinstance(module, SparseLayer) and (
        active_count(target.size, target.sparsity) >= module.nnz
    )


def by_plan(choice: Choice, plan: Plans, known: Sequence[Target]) -> Choice:
    """What a plan says, to the letter.

    Raises:
        ConfigError: it names a weight that the model does not have, or that is excluded.
        ShapeError: a weight has another shape than it was planned for, or the block does not fit.
    """
    planned = plan.planned
    names = {target.name: target for target in known}
    for name, (shape, _, _) in planned.items():
        if name not in names:
            raise ConfigError(f"`plan` names {name!r}, which `model` does not have")
        if names[name].shape != tuple(shape):
            raise ShapeError(
                f"`plan` was made for a {name!r} of shape {tuple(shape)}; got {names[name].shape}"
            )
        if name in choice.dense:
            raise ConfigError(f"`plan` makes {name!r} sparse, but {choice.dense[name]}")
    targets = []
    for target in choice.targets:
        if target.name in planned:
            _, share, block = planned[target.name]
            share = check_sparsity(share, f"sparsity of layer {target.name!r}")
            targets.append(target._replace(sparsity=share, block=block))
            check_cut(targets[-1])
    rest = {t.name: "the plan leaves it dense" for t in choice.targets if t.name not in planned}
    return choice.leaving(rest)._replace(targets=targets)


def with_blocks(targets: list[Target], block: Blocks, known: Sequence[str]) -> list[Target]:
    """Each target's block; one that is sparse already keeps its own."""
    if isinstance(block, Mapping):
        check_known("block", block, known)
        blocks = {t.name: first_match(block, t.name, 1) for t in targets}
    elif callable(block):
        blocks = {t.name: block(t.name, t.module) for t in targets}
    else:
        as_block(block)
        blocks = dict.fromkeys((t.name for t in targets), block)
    return [
        t if isinstance(t.module, SparseLayer) else t._replace(block=as_block(blocks[t.name]))
        for t in targets
    ]


def unfit(targets: list[Target], block: Blocks, known: Sequence[str]) -> dict[str, str]:
    """Why some targets can't have their block, by name.

    Raises:
        ConfigError, ShapeError: one that a mapping gives to this layer alone does not fit.
        TopologyError: more blocks than int32 can count.
    """
    reasons = {}
    for target in targets:
        try:
            check_cut(target)
        except (ConfigError, ShapeError) as error:
            if isinstance(block, Mapping) and is_alone(block, target.name, known):
                raise
            if is_depthwise(target.module):
                raise
            reasons[target.name] = _why_unfit(target, error)
    return reasons


def check_cut(target: Target) -> None:
    """The block fits the weight, and there are blocks for all groups."""
    if is_depthwise(target.module):
        raise ConfigError(f"layer {target.name!r} is a depthwise convolution: leave it dense")
    weight, (bh, bw) = target.weight, as_block(target.block)
    height, width = weight.part
    if bh > height or bw > width:
        raise ShapeError(
            f"`block` {(bh, bw)} is larger than layer {target.name!r} of shape {target.shape}"
            f"{_channels(target)}; use a smaller block or exclude=({target.name!r},)"
        )
    active = active_count(target.size, target.sparsity)
    grid = Grid.of(weight.shape, target.block, weight.groups, weight.taps)
    check_count(block_counts(grid, active)[0], grid, f"layer {target.name!r}: ")
    check_groups(round(active / (bh * bw)), weight.groups)


def _why_unfit(target: Target, error: Exception) -> str:
    if isinstance(error, ShapeError):
        height, width = target.weight.part
        return f"a block of {as_block(target.block)} is larger than its {height} by {width}" + (
            " channels at a tap" if len(target.shape) > 2 else ""
        )
    blocks = round(active_count(target.size, target.sparsity) / math.prod(as_block(target.block)))
    return f"its share is {blocks} blocks for {target.weight.groups} groups"


def _channels(target: Target) -> str:
    if len(target.shape) == 2:
        return ""
    height, width = target.weight.part
    return f", {height} by {width} channels at a tap of a group"


def _with_shares(
    targets: list[Target], sparsity: float, distribution: Distribution, known: Sequence[str]
) -> list[Target]:
    if isinstance(distribution, str):
        shapes = {t.name: t.shape for t in targets}
        shares: dict[str, Any] = dict(distribute(shapes, sparsity, distribution))
    elif isinstance(distribution, Mapping):
        check_known("distribution", distribution, known)
        shares = {t.name: first_match(distribution, t.name, sparsity) for t in targets}
    else:
        shares = {t.name: distribution(t.name, t.module) for t in targets}
    return [
        t._replace(sparsity=check_sparsity(shares[t.name], f"sparsity of layer {t.name!r}"))
        for t in targets
    ]


# ---- over all layers at once


class _Pool(NamedTuple):
    """A layer's blocks: where they stand, their mean magnitude, and their weights."""

    topology: Topology
    scores: torch.Tensor
    sizes: torch.Tensor


def over_all(targets: list[Target], sparsity: float) -> list[Target]:
    """The blocks of largest mean magnitude in all layers together, with their connections.

    Each layer keeps its best one, each group of a convolution could have one. Ties go to the
    earlier layer and the lower position. The count is exact to within one block.
    """
    pools = [_pool(target) for target in targets]
    for target, pool in zip(targets, pools, strict=True):
        least = min(max(target.weight.groups, 1), pool.scores.numel())
        best = torch.argsort(pool.scores, descending=True, stable=True)[:least]
        pool.scores[best] = torch.inf
    scores, sizes = (
        torch.cat([getattr(p, name).cpu() for p in pools]) for name in _Pool._fields[1:]
    )
    order = torch.argsort(scores, descending=True, stable=True)
    wanted = active_count(sum(target.size for target in targets), sparsity)
    n = max(count_within(sizes[order], wanted), int(scores.isinf().sum()))
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[:n]] = True
    parts = torch.split(keep, [len(pool.scores) for pool in pools])
    return list(_at(targets, pools, parts))


def _at(
    targets: list[Target], pools: list[_Pool], parts: Sequence[torch.Tensor]
) -> Iterator[Target]:
    for target, pool, keep in zip(targets, pools, parts, strict=True):
        kept = keep.to(pool.topology.device)
        share = 1 - int(pool.sizes[kept].sum()) / target.size
        topology = pool.topology.with_positions(pool.topology.positions()[kept])
        yield target._replace(sparsity=share, topology=topology)


def _pool(target: Target) -> _Pool:
    module, weight = target.module, target.weight
    if isinstance(module, SparseLayer):
        topology, values = module.topology.clone(), module.active_values()
    else:
        matrix = weight.matrix()
        topology = every_block(matrix, target.block, groups=weight.groups, taps=weight.taps)
        values = topology.pack(matrix)
    sizes = block_weights(topology)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    scores = block_norm(values.to(wide), "l1") / sizes
    if not bool(scores.isfinite().all()):
        raise ConfigError(f"weights of layer {target.name!r} must be finite to be compared")
    return _Pool(topology, scores, sizes)
