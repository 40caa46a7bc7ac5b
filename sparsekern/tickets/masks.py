"""Masks and scores by weight, under the names that `sparsify_` uses and takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekern.distribution import DISTRIBUTIONS, distribute
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn.connections import topology_of_largest
from sparsekern.swap import Pattern, candidates
from sparsekern.swap.refuse import check_model
from sparsekern.swap.shares import over_all
from sparsekern.swap.targets import Filter, Target
from sparsekern.topology.blocks import active_count, check_sparsity
from sparsekern.topology.sampling import check_generator
from sparsekern.topology.select import top_k_mask

Masks = dict[str, Tensor]
"""Bool masks of the weights' shapes; True is active."""
Scores = dict[str, Tensor]
"""Scores of the weights' shapes; the largest stay."""


def weights(
    model: nn.Module, filter_fn: Filter | None = None, exclude: Sequence[Pattern] = ()
) -> dict[str, nn.Parameter]:
    """The dense weights that `sparsify_` would make sparse, with these arguments of it, by name.

    Raises:
        ConfigError: there are none, a pattern matches nothing, or one is a part of the packed
            weight of `nn.MultiheadAttention`.
        DtypeError: `model` is no module.
    """
    check_model(model)
    found = {
        target.name: target.weight.parameter
        for target in candidates(model, filter_fn, exclude, first_conv_stays=False)
    }
    if not found:
        raise ConfigError("`model` has no dense weight that sparsify_ could make sparse")
    parts = [name for name, weight in found.items() if not isinstance(weight, nn.Parameter)]
    if parts:
        raise ConfigError(
            f"attention's matrices are parts of one parameter, which has no scores and no masks of "
            f"its own here: give exclude={parts!r}, or sparsify_ the model without them"
        )
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)}


def top(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str | Mapping[str, float] = "global",
    *,
    generator: torch.Generator | None = None,
) -> Masks:
    """Masks of the largest scores. Counts are exact.

    Args:
        scores: by weight.
        sparsity: of all weights together, in [0, 1).
        scope: "global": all scores are compared with one another. "layer": each weight has this
            sparsity. "er", "erk": shares by that distribution. Or the sparsity of each weight.
        generator: chooses among equal scores; without it the first stay.

    Raises:
        ConfigError: an argument is out of its domain, or a score is NaN.
        DtypeError: the scores are no mapping of floating-point tensors, or `generator` is no
            torch.Generator.
    """
    check_sparsity(sparsity)
    check_generator(generator)
    _check_scores(scores)
    if scope == "global":
        count = active_count(sum(s.numel() for s in scores.values()), sparsity)
        return largest(scores, count, generator)
    shares = _shares({name: s.shape for name, s in scores.items()}, sparsity, scope)
    return {
        name: _largest(s.detach().flatten(), active_count(s.numel(), shares[name]), generator).view(
            s.shape
        )
        for name, s in scores.items()
    }


def largest(
    scores: Mapping[str, Tensor], count: int, generator: torch.Generator | None = None
) -> Masks:
    """Masks of the `count` largest scores of all; of equal ones the first, or by chance."""
    every = torch.cat([s.detach().flatten() for s in scores.values()])
    flat = _largest(every, count, generator)
    parts = torch.split(flat, [s.numel() for s in scores.values()])
    return {n: part.view(scores[n].shape) for n, part in zip(scores, parts, strict=True)}


def _largest(scores: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Marks the k largest of (n,) scores; a generator breaks ties by chance."""
    if generator is None:
        return top_k_mask(scores, k)
    order = torch.randperm(scores.numel(), generator=generator, device="cpu").to(scores.device)
    mask = torch.empty_like(scores, dtype=torch.bool)
    mask[order] = top_k_mask(scores[order], k)
    return mask


def block_masks(
    targets: Mapping[str, Target],
    sparsity: float,
    scope: str | Mapping[str, float],
    block: tuple[int, int],
) -> Masks:
    """Masks of the whole blocks of largest mean magnitude; counts are exact to within one block.

    Args:
        targets: the weights, by name.
        sparsity: of all of them together.
        scope: see `top`.
        block: (outputs, inputs).
    """
    cut = [target._replace(block=block) for target in targets.values()]
    if scope == "global":
        cut = over_all(cut, sparsity)
    else:
        shares = _shares({t.name: t.shape for t in cut}, sparsity, scope)
        cut = [
            t._replace(
                topology=topology_of_largest(
                    t.weight.matrix(),
                    shares[t.name],
                    block,
                    groups=t.weight.groups,
                    taps=t.weight.taps,
                )
            )
            for t in cut
        ]
    return {t.name: _mask_of(t) for t in cut}


def _mask_of(target: Target) -> Tensor:
    """Of the weight's shape."""
    if target.topology is None:
        return torch.ones(target.shape, dtype=torch.bool, device=target.weight.parameter.device)
    matrix, shape = target.topology.to_mask(), target.shape
    if len(shape) == 2:
        return matrix.t() if target.weight.transposed else matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Masks:
    """The control: as many active weights in each layer, in random places.

    A method at initialisation that is no better than its own mask, shuffled within layers, has
    found the layers' densities and nothing else (Su et al. 2020, "Sanity-checking pruning").

    Raises:
        DtypeError: `generator` is no torch.Generator.
    """
    check_generator(generator)
    result = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator, device="cpu").to(mask.device)
        result[name] = mask.flatten()[order].view(mask.shape)
    return result


def _shares(
    shapes: Mapping[str, Sequence[int]], sparsity: float, scope: str | Mapping[str, float]
) -> Mapping[str, float]:
    if isinstance(scope, Mapping):
        if scope.keys() != shapes.keys():
            raise ConfigError(
                f"`scope` must give a sparsity to each of {sorted(shapes)}; got {sorted(scope)}"
            )
        return {name: check_sparsity(share) for name, share in scope.items()}
    if scope != "layer" and scope not in DISTRIBUTIONS:
        known = ("global", "layer", *sorted(DISTRIBUTIONS))
        raise ConfigError(f"`scope` must be one of {known}, or a mapping; got {scope!r}")
    return distribute(shapes, sparsity, "uniform" if scope == "layer" else scope)


def _check_scores(scores: object) -> None:
    if not isinstance(scores, Mapping) or not scores:
        raise DtypeError(f"`scores` must map names to tensors; got {type(scores).__name__}")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise DtypeError(f"the scores of {name!r} must be a floating-point tensor")
        if bool(score.isnan().any()):
            raise ConfigError(f"the scores of {name!r} hold NaN: nothing can be chosen by them")
