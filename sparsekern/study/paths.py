"""The straight line between two solutions: what a network does along it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsekern.cost.modes import evaluating
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.methods.schedule import check_int
from sparsekern.swap.refuse import check_model
from sparsekern.tickets.masks import Masks
from sparsekern.tickets.ticket import keys_of, masked

Measure = Callable[[nn.Module], float]
"""A loss or an error of a model, as a number; called in evaluation mode without gradients."""

STABLE = 0.02
"""Instability, as a share of errors, below which Frankle et al. 2020 call a network stable."""


class Path(NamedTuple):
    """What was measured between two states.

    Attributes:
        alphas: places; 0 is the start, 1 the end.
        losses: there.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """Highest loss from 0 to 1 over the mean of both ends (Frankle et al. 2020, section 2).

        Raises:
            ConfigError: an end was not measured.
        """
        known = dict(zip(self.alphas, self.losses, strict=True))
        if not {0.0, 1.0} <= known.keys():
            raise ConfigError(f"a barrier needs the losses at 0 and 1; got {self.alphas}")
        return max(v for a, v in known.items() if 0 <= a <= 1) - (known[0.0] + known[1.0]) / 2


class Instability(NamedTuple):
    """Two trainings from one state.

    Attributes:
        path: between what they came to.
        ends: their state_dicts.
    """

    path: Path
    ends: tuple[dict[str, Tensor], dict[str, Tensor]]

    @property
    def value(self) -> float:
        """The barrier between them."""
        return self.path.barrier

    @property
    def stable(self) -> bool:
        """Whether it is below `STABLE`, if errors were measured as shares."""
        return self.value < STABLE


def interpolate(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    measure: Measure,
    points: int = 30,
    span: tuple[float, float] = (0.0, 1.0),
    batches: Iterable[Tensor] | None = None,
) -> Path:
    """Measure (1 - a) start + a end at evenly spaced a.

    Floating-point buffers are interpolated as weights are: of a batch norm, running means and
    variances. The statistics between two networks are not the mean of theirs, so give `batches` to
    have them taken anew at each point, over all of these inputs. Other buffers are the start's; of
    sparse layers, both ends must have the same connections.

    Args:
        model: a copy of it is measured.
        start: state_dict.
        end: state_dict.
        measure: see `Measure`.
        points: at least 2.
        span: first and last a.
        batches: inputs of the model, for batch norms.

    Raises:
        ConfigError: the states have not the same keys, fewer than 2 points, an empty span, or
            integers (connections, say) that differ; counts of batches may.
        ShapeError: tensors of one key have not the same shape.
        DtypeError: `model` is no module.
    """
    check_model(model)
    check_int("points", points, 2)
    low, high = span
    if not low < high:
        raise ConfigError(f"`span` must rise; got {span}")
    _check_ends(start, end)
    twin = copy.deepcopy(model)
    inputs = None if batches is None else list(batches)
    # rounded: 0 and 1 are met exactly wherever the points meet them
    alphas = tuple(round(low + (high - low) * i / (points - 1), 12) for i in range(points))
    losses = []
    for a in alphas:
        twin.load_state_dict(_between(start, end, a))
        if inputs is not None:
            _renormalise(twin, inputs)
        with evaluating(twin):
            losses.append(float(measure(twin)))
    return Path(alphas, tuple(losses))


def instability(
    model: nn.Module,
    train: Callable[[nn.Module, int], object],
    error: Measure,
    seeds: tuple[int, int] = (0, 1),
    points: int = 30,
    batches: Iterable[Tensor] | None = None,
) -> Instability:
    """Train two copies that differ in their noise alone, and measure the line between them.

    "Linear mode connectivity and the lottery ticket hypothesis" (Frankle et al. 2020): instability
    is the barrier of the error. Of a subnetwork, make the model sparse before.

    Args:
        model: at weight step k.
        train: `train(model, seed)` trains in place to the end; the seed is of data order and
            augmentation.
        error: see `Measure`; a share, for `stable`.
        seeds: of the two.
        points: on the line, its ends among them; 30 in the paper.
        batches: see `interpolate`.

    Raises:
        ConfigError: the seeds are equal, or as in `interpolate`.
        DtypeError: `model` is no module, or `train` no function.
    """
    check_model(model)
    check_int("points", points, 2)
    if not callable(train):
        raise DtypeError(f"`train` must be a function of (model, seed); got {train!r}")
    if len(seeds) != 2 or seeds[0] == seeds[1]:
        raise ConfigError(f"`seeds` must be two different ones; got {seeds}")
    ends = []
    for seed in seeds:
        twin = copy.deepcopy(model)
        train(twin, seed)
        ends.append({key: t.detach().clone() for key, t in twin.state_dict().items()})
    path = interpolate(model, ends[0], ends[1], error, points, batches=batches)
    return Instability(path, (ends[0], ends[1]))


def to_pruned(
    model: nn.Module,
    start: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    masks: Masks,
    measure: Measure,
    points: int = 29,
    span: tuple[float, float] = (-0.2, 1.2),
    batches: Iterable[Tensor] | None = None,
) -> Path:
    """Measure from a state to the pruned solution, under one mask (Evci et al. 2022, section 5).

    Args:
        model: dense.
        start: state_dict of the dense model: an initialisation, or a solution under these masks.
        pruned: state_dict of the pruned solution.
        masks: of both.
        measure: see `Measure`.
        points: 29 in the paper.
        span: first and last a.
        batches: see `interpolate`.

    Raises:
        ConfigError, DtypeError, ShapeError: the masks do not fit, or as in `interpolate`.
    """
    check_model(model)
    keys = keys_of(model, masks)
    _check_ends(start, pruned)
    ends = masked(start, masks, keys), masked(pruned, masks, keys)
    return interpolate(model, *ends, measure, points, span, batches)


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], a: float) -> dict[str, Tensor]:
    return {
        key: (1 - a) * first + a * end[key] if first.is_floating_point() else first
        for key, first in start.items()
    }


def _check_ends(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    if start.keys() != end.keys():
        odd = sorted(start.keys() ^ end.keys())
        raise ConfigError(f"both ends must have the same keys; one lacks {odd}")
    for key, first in start.items():
        last = end[key]
        same = first.shape == last.shape
        if not first.is_floating_point() and not key.endswith("num_batches_tracked"):
            if not same or not torch.equal(first, last):
                raise ConfigError(
                    f"{key!r} differs between the ends and can't be interpolated: of sparse layers "
                    "with other connections, take dense states (densify_) and masks"
                )
        elif not same:
            raise ShapeError(
                f"{key!r} has shape {tuple(first.shape)} at the start, {tuple(last.shape)} at the "
                "end"
            )


def _renormalise(model: nn.Module, inputs: list[Tensor]) -> None:
    """Take the statistics of batch norms anew, as the mean over these inputs."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
            norm.train()
        for x in inputs:
            model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
