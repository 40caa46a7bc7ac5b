"""Iterative magnitude pruning: train, prune, rewind, and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.uses import Use
from sparsekern.errors import ConfigError, DtypeError, TrainingLoopError
from sparsekern.methods.schedule import check_int
from sparsekern.swap import Pattern, sparse_layers
from sparsekern.swap.targets import Filter
from sparsekern.tickets.masks import Masks, Scores, largest, weights
from sparsekern.tickets.rounds import Train, break_evens, run_round, worth
from sparsekern.tickets.ticket import State, Ticket, density_of, keys_of, masked, state_of
from sparsekern.topology.blocks import active_count

SCOPES = ("global", "layer")


class _Plan(NamedTuple):
    """What all rounds share."""

    model: nn.Module
    train: Train
    steps: int
    rewind: int
    rate: float
    scope: str
    layer_rates: Mapping[str, float]
    sparse_below: float | None
    keys: dict[str, str]


def imp(
    model: nn.Module,
    train: Train,
    rounds: int,
    rate: float = 0.5,
    rewind: int = 0,
    scope: str = "global",
    *,
    steps: int,
    layer_rates: Mapping[str, float] | None = None,
    exclude: Sequence[Pattern] = (),
    filter_fn: Filter | None = None,
    sparse_below: float | None = None,
    after: Ticket | None = None,
) -> Iterator[Ticket]:
    """Lottery tickets by iterative magnitude pruning (Frankle & Carbin 2019; Frankle et al. 2020).

    The dense net is trained; then, `rounds` times, the smallest of the weights that are left go,
    the others get back the values that they had at weight step `rewind`, and training goes on from
    there. The tickets come one by one, the dense net first: `rounds` + 1 of them.

    A layer that is sparse enough to be faster so is trained in a sparse layer, which can't revive a
    pruned weight; the others stay dense, and their pruned weights and gradients are kept zero.

    Args:
        model: dense, untrained. It is left as it is: copies are trained.
        train: `train(model, start, stop)` runs weight steps [start, stop) in place, with an
            optimizer that it makes for this model, and schedule and data order of these steps.
        rounds: how often to prune.
        rate: share of the weights that are left that goes each time, in (0, 1).
        rewind: weight step to go back to.
        scope: "global": all weights are compared with one another; "layer": each layer loses its
            share.
        steps: weight steps of a training.
        layer_rates: rates of weights that are pruned by themselves, by name; the field gives the
            output layer half the rate.
        exclude: weights that are never pruned; see `sparsify_`.
        filter_fn: see `sparsify_`.
        sparse_below: density up to which a layer is trained sparsely; 0 is never. None: up to the
            density that `sparsekern.cost` predicts for it to break even, from the calls of the
            dense training.
        after: go on after this ticket instead of from the start.

    Returns:
        An iterator; each step of it is a training.

    Raises:
        ConfigError: an argument is out of its domain, the model has sparse layers or no weight to
            prune, or `after` is of another model or rewind step.
        DtypeError: an argument is of the wrong type.
        TrainingLoopError: from the iterator: `train` moved pruned weights, or left NaN.
    """
    if not callable(train):
        raise DtypeError(f"`train` must be a function of (model, start, stop); got {train!r}")
    check_int("rounds", rounds, 1)
    check_int("steps", steps, 1)
    check_int("rewind", rewind, 0)
    if rewind >= steps:
        raise ConfigError(f"`rewind` must be below `steps`, {steps}; got {rewind}")
    _check_rate("`rate`", rate)
    if scope not in SCOPES:
        raise ConfigError(f"`scope` must be one of {SCOPES}; got {scope!r}")
    if sparse_below is not None and not 0 <= sparse_below <= 1:
        raise ConfigError(f"`sparse_below` must be a density in [0, 1]; got {sparse_below!r}")
    found = weights(model, filter_fn, exclude)
    if sparse_layers(model):
        raise ConfigError(f"`model` must be dense; {next(iter(sparse_layers(model)))!r} is sparse")
    own = dict(layer_rates or {})
    for name, share in own.items():
        if name not in found:
            raise ConfigError(f"`layer_rates` names {name!r}; the weights are {sorted(found)}")
        _check_rate(f"the rate of {name!r}", share)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in found.items()}
    state_of(model)  # refuses what is no tensor
    keys = keys_of(model, masks)
    if after is not None:
        _check_after(after, masks, rewind)
    plan = _Plan(model, train, steps, rewind, rate, scope, own, sparse_below, keys)
    return _tickets(plan, rounds, masks, after)


def next_masks(
    trained: State,
    masks: Masks,
    keys: Mapping[str, str],
    rate: float,
    scope: str = "global",
    layer_rates: Mapping[str, float] | None = None,
) -> Masks:
    """The masks without the smallest of the weights that are left.

    Of n weights n - floor(rate n) stay; of equal ones the first.

    Args:
        trained: state_dict of the dense model.
        masks: before.
        keys: of the weights, in the state_dict.
        rate: see `imp`.
        scope: see `imp`.
        layer_rates: see `imp`.

    Raises:
        TrainingLoopError: a weight is NaN.
    """
    scores: Scores = {}
    for name, mask in masks.items():
        weight = trained[keys[name]]
        if bool(weight.isnan().any()):
            raise TrainingLoopError(f"`train` left NaN in {name!r}: nothing can be pruned by it")
        scores[name] = weight.abs().masked_fill(~mask, -1)
    own = layer_rates or {}
    groups = [([name], share) for name, share in own.items()]
    rest = [name for name in masks if name not in own]
    groups += [([name], rate) for name in rest] if scope == "layer" else [(rest, rate)]
    made: Masks = {}
    for names, share in groups:
        if names:
            left = sum(int(masks[name].sum()) for name in names)
            made |= largest({name: scores[name] for name in names}, active_count(left, share))
    return {name: made[name] for name in masks}


def _tickets(plan: _Plan, rounds: int, ones: Masks, after: Ticket | None) -> Iterator[Ticket]:
    last = after
    if last is None:
        last = _dense(plan, ones)
        yield last
    while last.round < rounds:
        rates = plan.rate, plan.scope, plan.layer_rates
        masks = next_masks(last.trained, last.masks, plan.keys, *rates)
        start = masked(last.rewound, masks, plan.keys)
        below = last.break_even
        if plan.sparse_below is not None:
            below = dict.fromkeys(masks, plan.sparse_below)
        sparse = worth(plan.model, masks, below)
        span = [(plan.rewind, plan.steps)]
        (end,) = run_round(plan.model, start, masks, plan.train, span, sparse)
        last = last._replace(
            masks=masks,
            rewound=start,
            trained=end,
            density=density_of(masks),
            round=last.round + 1,
            sparse=sparse,
        )
        yield last


def _dense(plan: _Plan, ones: Masks) -> Ticket:
    """The first training; the state at the rewind step is kept on its way."""
    uses: dict[str, Use] = {}
    spans = [(0, plan.rewind), (plan.rewind, plan.steps)]
    rewound, trained = run_round(
        plan.model, state_of(plan.model), ones, plan.train, spans, uses=uses
    )
    even = break_evens(plan.model, ones, uses)
    return Ticket(ones, rewound, trained, 1.0, 0, plan.rewind, even)


def _check_rate(what: str, rate: object) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise DtypeError(f"{what} must be a number in (0, 1); got {rate!r}")
    if not 0 < rate < 1:
        raise ConfigError(f"{what} must be in (0, 1); got {rate}")


def _check_after(after: object, masks: Mapping[str, Tensor], rewind: int) -> None:
    if not isinstance(after, Ticket):
        raise DtypeError(f"`after` must be a Ticket; got {type(after).__name__}")
    if after.rewind != rewind:
        raise ConfigError(
            f"`rewind` is step {rewind}, which was not saved: `after` holds the weights of step "
            f"{after.rewind}"
        )
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    given = {name: tuple(mask.shape) for name, mask in after.masks.items()}
    if given != shapes:
        raise ConfigError(f"`after` must have masks of {shapes}; got {given}")
