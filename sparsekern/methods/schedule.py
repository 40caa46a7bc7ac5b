"""When a topology is updated, and what fraction of it is replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from sparsekern.errors import ConfigError, DtypeError
from sparsekern.topology.blocks import check_sparsity


def cosine(progress: float) -> float:
    """(1 + cos(pi t / T_end)) / 2: the paper's f_decay (Evci et al. 2020, section 3 (2))."""
    return (1 + math.cos(math.pi * progress)) / 2


def constant(_progress: float) -> float:
    """1: the fraction never decays."""
    return 1.0


def linear(progress: float) -> float:
    """1 - t / T_end: inverse power with k = 1 (appendix G)."""
    return 1 - progress


DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
}


class Schedule(Protocol):
    """What a loop asks a schedule."""

    @property
    def t_end(self) -> int:
        """Weight step that nothing happens after."""

    def is_due(self, step: int, last: int | None) -> bool:
        """Whether an update belongs to weight step `step`; `last` is that of the one before."""


@dataclass(frozen=True)
class UpdateSchedule:
    """When to update, counted in weight steps.

    An update is due at weight step t when first <= t < t_end and at least `freq` weight steps lie
    between it and the one before. As in the reference code, an update that takes no weight step
    does not advance t: a cycle is one update batch and `freq` weight steps.

    Attributes:
        t_end: updates happen before this weight step only.
        freq: update frequency, in weight steps.
        drop_fraction: share of the active weights replaced at t = 0.
        first: weight step of the first update.
        decay: name in `DECAYS`, a function of t / t_end.
    """

    t_end: int
    freq: int = 100
    drop_fraction: float = 0.3
    first: int = 0
    decay: str = "cosine"

    def __post_init__(self) -> None:
        check_int("t_end", self.t_end, 1)
        check_int("update_freq", self.freq, 1)
        check_int("first_update", self.first, 0)
        if isinstance(self.drop_fraction, bool) or not isinstance(self.drop_fraction, int | float):
            raise DtypeError(f"`drop_fraction` must be a number; got {self.drop_fraction!r}")
        if not 0 < self.drop_fraction <= 1:
            raise ConfigError(f"`drop_fraction` must lie in (0, 1]; got {self.drop_fraction}")
        if self.decay not in DECAYS:
            raise ConfigError(f"`decay` must be one of {sorted(DECAYS)}; got {self.decay!r}")

    def is_due(self, step: int, last: int | None) -> bool:
        """Whether weight step `step` is to be preceded by an update; `last` is the previous one."""
        since = self.freq if last is None else step - last
        return self.first <= step < self.t_end and since >= self.freq

    def fraction(self, step: int) -> float:
        """Drop fraction at weight step `step`."""
        return self.drop_fraction * DECAYS[self.decay](min(step / self.t_end, 1.0))


@dataclass(frozen=True)
class CubicSchedule:
    """s(t) = S + (S_0 - S) (1 - (t - t_start) / (t_end - t_start))^3 (Zhu & Gupta 2017, eq. 1).

    Attributes:
        sparsity: S, reached at `t_end`.
        t_start: weight step of the first update.
        t_end: weight step of the last one.
        freq: weight steps between updates.
        initial: S_0.
    """

    sparsity: float
    t_start: int
    t_end: int
    freq: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_sparsity(self.initial)
        check_int("t_start", self.t_start, 0)
        check_int("update_freq", self.freq, 1)
        if not self.sparsity:
            raise ConfigError("`sparsity` must be more than 0 to prune anything; got 0")
        if self.t_start >= self.t_end:
            raise ConfigError(
                f"`t_start` must come before `t_end`; got {self.t_start} and {self.t_end}"
            )
        if self.initial > self.sparsity:
            raise ConfigError(
                f"`initial_sparsity` can't exceed `sparsity`, {self.sparsity}; got {self.initial}"
            )

    def is_due(self, step: int, last: int | None) -> bool:
        """Whether weight step `step` is followed by an update; `last` is the previous one."""
        if step < self.t_start or (last is not None and last >= self.t_end):
            return False
        return last is None or step - last >= self.freq or step >= self.t_end

    def at(self, step: int) -> float:
        """The sparsity after weight step `step`."""
        left = 1 - min(max((step - self.t_start) / (self.t_end - self.t_start), 0.0), 1.0)
        return self.sparsity + (self.initial - self.sparsity) * left**3


def resolve_end(
    t_end: float | None, total_steps: int | None, freq: int, first: int, spends: bool
) -> int:
    """`t_end` in weight steps.

    Args:
        t_end: an int, in weight steps; or a float in (0, 1], a share of `total_steps`.
        total_steps: the optimizer steps of the whole training, batches spent on updates included.
        freq: weight steps between updates.
        first: weight step of the first update.
        spends: whether an update spends its batch.

    Raises:
        ConfigError, DtypeError: an argument is missing or out of its domain.
    """
    if t_end is None:
        raise ConfigError(
            "`t_end` must be given, when updates end: an int in weight steps, or a share of the "
            "training such as t_end=0.75 with total_steps=, its number of optimizer steps"
        )
    if total_steps is not None:
        check_int("total_steps", total_steps, 1)
    if not isinstance(t_end, float):
        if total_steps is not None:
            raise ConfigError(
                f"`total_steps` goes with a `t_end` that is a float in (0, 1]; got {t_end!r}"
            )
        check_int("t_end", t_end, 1)
        return int(t_end)
    t_end = float(t_end)  # NumPy's too
    if not 0 < t_end <= 1:
        raise ConfigError(
            f"`t_end` must lie in (0, 1] if it is a float, a share of `total_steps`, "
            f"or be an int in weight steps; got {t_end}"
        )
    if total_steps is None:
        raise ConfigError(f"`t_end` is a share, {t_end}: `total_steps` must say of how many steps")
    return share_in_weight_steps(t_end, total_steps, freq, first, spends)


def share_in_weight_steps(
    share: float, total_steps: int, freq: int, first: int, spends: bool
) -> int:
    """The `t_end` with which updates come on trainer steps n < share * total_steps, and no others.

    Steps count from 0. With `spends` a cycle is `freq` + 1 of them, one of which is spent on an
    update, so that an update comes on steps first + k (freq + 1), at weight step first + k freq;
    without, all are weight steps. An update that is postponed shifts those after it.
    """
    end = math.ceil(Fraction(str(share)) * total_steps)  # the decimal that was written, exactly
    if not spends or end <= first:
        return end
    updates = math.ceil(Fraction(end - first, freq + 1))
    last = first + (updates - 1) * freq
    return max(end - updates, last + 1)


def check_int(name: str, value: object, low: int) -> None:
    """Raise `ConfigError` or `DtypeError` unless it is an int of at least `low`."""
    unit = "optimizer steps" if name == "total_steps" else "weight steps"
    if type(value) is not int:
        raise DtypeError(f"`{name}` must be an int, in {unit}; got {value!r}")
    if value < low:
        raise ConfigError(f"`{name}` must be at least {low}; got {value}")
