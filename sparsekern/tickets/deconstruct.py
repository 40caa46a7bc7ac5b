"""What of a lottery ticket matters (Zhou, Lan, Liu & Yosinski 2019): its mask, signs, zeros.

Pure functions on weights by name. A ticket of the paper is

    scores = tickets.CRITERIA["large_final"](initial, final)
    masks = tickets.top(scores, 0.8, "layer")
    start = tickets.survivors("rewind", initial, masks)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.tickets.checks import Weights, check_all, unknown
from sparsekern.tickets.masks import Scores
from sparsekern.topology.sampling import check_generator

_INITIAL, _FINAL = "initial", "final"
_BOTH = (_INITIAL, _FINAL)

SIGNS = ("kept", "random")


# ---- mask criteria


class Criterion(NamedTuple):
    """Scores of weights by what training did to them; the largest stay.

    Attributes:
        name: the paper's.
        formula: score of one layer's weights before and after training, both (n,).
        needs: which of the two it looks at.
    """

    name: str
    formula: Callable[[Tensor, Tensor], Tensor]
    needs: tuple[str, ...]

    def __call__(
        self,
        initial: Weights | None,
        final: Weights | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """Scores of the weights' shapes, on the device of `final`, or of `initial` without it.

        Args:
            initial: the weights before training.
            final: after it; what a criterion does not look at may be None.
            masks: bool; what they left out before gets -inf, and the criterion does not see it.
            generator: of "random" alone.

        Raises:
            ConfigError: weights are missing that the criterion needs, names differ, a weight is
                not finite, or there is a generator that nothing draws from.
            DtypeError, ShapeError: something is no mapping of floating-point tensors, or shapes
                differ.
        """
        check_generator(generator)
        draws = self.name == "random"
        if generator is not None and not draws:
            raise ConfigError(f"criterion {self.name!r} draws nothing: `generator` is of 'random'")
        given = {_INITIAL: initial, _FINAL: final}
        for side in self.needs:
            if given[side] is None:
                when = "before" if side == _INITIAL else "after"
                raise ConfigError(
                    f"criterion {self.name!r} needs the weights {when} training, and `{side}` is "
                    "None: keep a copy of them"
                )
        known = {side: weights for side, weights in given.items() if weights is not None}
        if not known:
            raise ConfigError(f"criterion {self.name!r} needs `initial` or `final`, for shapes")
        check_all(known, masks)
        last = list(known.values())[-1]
        scores = {}
        for name, like in last.items():
            parts = [known.get(side, last)[name].detach().to(like.device) for side in _BOTH]
            mask = torch.ones_like(like, dtype=torch.bool) if masks is None else masks[name]
            mask = mask.to(like.device)
            seen = [part[mask] for part in parts]
            found = _uniform(seen[1], generator) if draws else self.formula(seen[0], seen[1])
            scores[name] = found.new_full(like.shape, -torch.inf)
            scores[name][mask] = found
        return scores


class _Table(dict[str, Criterion]):
    """By name; a name that is not there is an error that says which is close."""

    def __missing__(self, name: object) -> NoReturn:
        raise ConfigError(unknown("criterion", name, self))


def _rank(magnitudes: Tensor) -> Tensor:
    """How many are smaller: the percentile of each, times their number; equal ones are equal."""
    rank: Tensor = torch.searchsorted(magnitudes.sort().values, magnitudes)
    return rank.double()


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device="cpu").to(like.device)


def _signed(criterion: Criterion, same: bool) -> Criterion:
    """The same with 0 for the weights whose sign has changed, or, not `same`, has not."""

    def formula(initial: Tensor, final: Tensor) -> Tensor:
        agrees = (initial.sign() == final.sign()) == same
        return criterion.formula(initial, final).where(agrees, 0.0)

    return Criterion(f"{criterion.name}_{'same' if same else 'diff'}_sign", formula, _BOTH)


_PLAIN = (
    Criterion("large_final", lambda _, f: f.abs(), (_FINAL,)),
    Criterion("small_final", lambda _, f: -f.abs(), (_FINAL,)),
    Criterion("large_init", lambda i, _: i.abs(), (_INITIAL,)),
    Criterion("small_init", lambda i, _: -i.abs(), (_INITIAL,)),
    # above a common percentile of both, whichever keeps as many as are asked for
    Criterion(
        "large_init_large_final",
        lambda i, f: torch.minimum(_rank(i.abs()), _rank(f.abs())),
        _BOTH,
    ),
    Criterion(
        "small_init_small_final",
        lambda i, f: torch.minimum(_rank(-i.abs()), _rank(-f.abs())),
        _BOTH,
    ),
    Criterion("magnitude_increase", lambda i, f: f.abs() - i.abs(), _BOTH),
    Criterion("movement", lambda i, f: (f - i).abs(), _BOTH),
    Criterion("random", lambda _, f: f, ()),  # drawn
)

CRITERIA: Mapping[str, Criterion] = _Table((c.name, c) for c in _PLAIN)
"""The paper's nine criteria, and the variants of two of them that look at signs.

A `_same_sign` score is 0 where training has changed the sign, so that a mask of more weights than
have kept theirs is decided among equal scores: give `top` a generator, as the paper's code does.
"""
CRITERIA.update(  # type: ignore[attr-defined]
    (signed.name, signed)
    for name in ("large_final", "magnitude_increase")
    for signed in (_signed(CRITERIA[name], True), _signed(CRITERIA[name], False))
)


# ---- mask-1 actions


def survivors(
    action: str,
    initial: Weights,
    masks: Mapping[str, Tensor],
    *,
    sign: str = "kept",
    fresh: Weights | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Values from which the kept weights train; 0 elsewhere.

    Args:
        action: "rewind": to their initial values. "reinit": newly drawn ones. "reshuffle": the
            kept initial values of a layer, permuted among themselves. "constant": the standard
            deviation of the layer's initial weights.
        initial: the weights before training.
        masks: bool; True is kept.
        sign: "kept": every value has the sign of its initial weight (0 counts as positive).
            "random": the sign of a fair coin.
        fresh: newly drawn weights for "reinit", by the rule that drew `initial`. Without them,
            those of a normal distribution of the layer's mean square.
        generator: of values, order and signs.

    Raises:
        ConfigError: an unknown action or sign, names differ, or `fresh` beside another action.
        DtypeError, ShapeError: as in `Criterion`.
    """
    if action not in _SURVIVORS:
        raise ConfigError(unknown("action on kept weights", action, _SURVIVORS))
    if sign not in SIGNS:
        raise ConfigError(unknown("sign", sign, SIGNS))
    if fresh is not None and action != "reinit":
        raise ConfigError(f"`fresh` is of action 'reinit'; got {action!r}")
    check_generator(generator)
    check_all({_INITIAL: initial} | ({} if fresh is None else {"fresh": fresh}), masks)
    start = {}
    for name, given in initial.items():
        before, mask = given.detach(), masks[name].to(given.device)
        drawn = None if fresh is None else fresh[name].detach().to(before)
        values = _SURVIVORS[action](before, mask, drawn, generator).abs()
        if sign == "kept":
            values = torch.copysign(values, before + 0.0)  # -0 + 0 is 0
        else:
            coin = torch.randint(2, before.shape, generator=generator, device="cpu")
            values = values * (2 * coin - 1).to(values)
        start[name] = values.where(mask, 0.0)
    return start


_Values = Callable[[Tensor, Tensor, Tensor | None, torch.Generator | None], Tensor]


def _rewound(
    before: Tensor, _mask: Tensor, _fresh: Tensor | None, _generator: torch.Generator | None
) -> Tensor:
    return before


def _redrawn(
    before: Tensor, _mask: Tensor, fresh: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    if fresh is not None:
        return fresh
    normal = torch.randn(before.shape, generator=generator, device="cpu").to(before)
    return normal * before.square().mean().sqrt()


def _reshuffled(
    before: Tensor, mask: Tensor, _fresh: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    kept = before[mask]
    order = torch.randperm(kept.numel(), generator=generator, device="cpu").to(before.device)
    values = torch.zeros_like(before)
    values[mask] = kept[order]
    return values


def _constant(
    before: Tensor, _mask: Tensor, _fresh: Tensor | None, _generator: torch.Generator | None
) -> Tensor:
    return before.std(correction=0).expand_as(before)


_SURVIVORS: dict[str, _Values] = {
    "rewind": _rewound,
    "reinit": _redrawn,
    "reshuffle": _reshuffled,
    "constant": _constant,
}


# ---- mask-0 actions


def pruned(
    action: str,
    start: Weights,
    initial: Weights,
    masks: Mapping[str, Tensor],
    final: Weights | None = None,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """`start` with the values at which the weights left out are frozen.

    All but "zero" need a masked dense net to train in, whose gradients outside the mask are
    dropped: values that are not 0 have no place in a sparse one.

    Args:
        action: "zero": as tickets do. "freeze": at the initial value. "freeze_init_zero_mask"
            (variant 1): so, but 0 where training shrank the weight's magnitude.
            "freeze_init_zero_all" (variant 2): so, and kept weights that shrank start at 0 too.
            Controls of variant 1: "freeze_init_zero_mask_rev" has 0 where it did not shrink, and
            "freeze_init_zero_mask_reshuffle" has as many zeros as variant 1, in random places.
        start: values of the kept weights, see `survivors`.
        initial: the weights before training.
        masks: bool; True is kept.
        final: the weights after training, for the variants.
        generator: of random places.

    Raises:
        ConfigError: an unknown action, `final` is missing, or names differ.
        DtypeError, ShapeError: as in `Criterion`.
    """
    if action not in PRUNED:
        raise ConfigError(unknown("action on pruned weights", action, PRUNED))
    looks_back = action not in ("zero", "freeze")
    if looks_back and final is None:
        raise ConfigError(f"action {action!r} needs `final`, the weights after training")
    check_generator(generator)
    after = initial if final is None else final
    check_all({"start": start, _INITIAL: initial, _FINAL: after}, masks)
    result = {}
    for name, given in initial.items():
        before, mask = given.detach(), masks[name].to(given.device)
        shrunk = before.abs() > after[name].detach().to(before.device).abs()
        frozen = before
        if action == "zero":
            frozen = torch.zeros_like(before)
        elif looks_back:
            frozen = before.masked_fill(_zeroed(action, shrunk, ~mask, generator), 0.0)
        values = start[name].detach().to(before.device)
        if action == "freeze_init_zero_all":
            values = values.masked_fill(shrunk, 0.0)
        result[name] = values.where(mask, frozen)
    return result


def _zeroed(action: str, shrunk: Tensor, free: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which of the `free` weights are 0."""
    if action == "freeze_init_zero_mask_rev":
        return ~shrunk
    if action == "freeze_init_zero_mask_reshuffle":
        own = shrunk[free]
        order = torch.randperm(own.numel(), generator=generator, device="cpu").to(own.device)
        zeroed = torch.zeros_like(shrunk)
        zeroed[free] = own[order]
        return zeroed
    return shrunk


PRUNED = (
    "zero",
    "freeze",
    "freeze_init_zero_mask",
    "freeze_init_zero_all",
    "freeze_init_zero_mask_rev",
    "freeze_init_zero_mask_reshuffle",
)
SURVIVORS = tuple(_SURVIVORS)


def rescaled(start: Weights, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's weights times size / kept: the paper's dynamic weight rescaling, at one mask.

    On a net of ReLU and no biases it scales the output and changes no prediction. A layer of which
    nothing is kept stays as it is.

    Raises:
        ConfigError, DtypeError, ShapeError: as in `Criterion`.
    """
    check_all({"start": start}, masks)
    return {
        name: weight.detach() * (weight.numel() / max(1, int(masks[name].sum())))
        for name, weight in start.items()
    }
