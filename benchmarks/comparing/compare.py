"""What changed between two result files, beyond noise.

The rule. A median of n rounds with interquartile range IQR lies, with about 95 % confidence when
two are compared, within its notch, 1.57 IQR / sqrt(n) to either side (McGill, Tukey and Larsen
1978, "Variations of box plots"). The ratio of two medians then lies between the ratios of the
notches' ends. A case changed if that interval excludes 1, and its ratio is more than `threshold`
from 1, up or down (slower means above 1 + threshold, faster below 1 / (1 + threshold)).

Rounds of one run share what the machine did in that hour, which no IQR shows. Times relative to a
baseline of the same rounds (`relative_to`) are free of it; their noise is that of the ratios.
Bytes have no noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.comparing.results import Results, Timing
from sparsekern.errors import ConfigError

THRESHOLD = 0.05
NOTCH = 1.57
"""Half the width of a notch, in IQR / sqrt(rounds)."""

EXPECTED_TO_DIFFER = ("date", "commit", "ceilings")
"""Facts of the environment that are no reason to doubt a comparison."""


class Change(NamedTuple):
    """One quantity of a case in both files.

    Attributes:
        case: its id.
        what: "seconds", "time / dense" or "peak bytes", for example.
        old: in the first file.
        new: in the second.
        low: end of the interval of new / old.
        high: its other end.
    """

    case: str
    what: str
    old: float
    new: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """New over old: above 1 is slower, or larger."""
        return self.new / self.old if self.old else (math.inf if self.new else 1.0)

    def verdict(self, threshold: float) -> str:
        """Of a change: "worse", "better" or "same"."""
        if self.low > 1 and self.ratio > 1 + threshold:
            return "worse"
        if self.high < 1 and self.ratio < 1 / (1 + threshold):
            return "better"
        return "same"


@dataclass(frozen=True)
class Comparison:
    """Two files, case by case.

    Attributes:
        worse: slower or larger, largest change first.
        better: faster or smaller, largest change first.
        same: how many quantities did not change beyond noise.
        new: cases that only the second file has numbers for; where the first has the case, as
            "id: what", like "linear/step/...: time / dense".
        missing: those that only the first file has numbers for, likewise.
        failed: ids that have no numbers in the second file because they failed there, and why.
        environment: facts that differ, old and new, by name.
    """

    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    same: int
    new: tuple[str, ...]
    missing: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    environment: dict[str, tuple[object, object]]


def compare(
    old: Results, new: Results, *, threshold: float = THRESHOLD, relative_to: str | None = None
) -> Comparison:
    """Compare case by case.

    Args:
        old: before.
        new: after.
        threshold: relative changes up to this one are never reported.
        relative_to: a baseline such as "dense", to compare times in units of its time in the same
            rounds; cases without it in both files are left out. None compares seconds.

    Raises:
        ConfigError: the threshold is negative, or a file has no case with that baseline.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ConfigError(f"`threshold` must be a number of at least 0; got {threshold}")
    known = _baselines(old) & _baselines(new)
    if relative_to is not None and relative_to not in known:
        raise ConfigError(
            f"`relative_to` must be a baseline that both files have; got {relative_to!r}, and they "
            f"have {sorted(known)}"
        )
    before, after = (_quantities(file, relative_to) for file in (old, new))
    by_verdict: dict[str, list[Change]] = {"worse": [], "better": [], "same": []}
    for key in before.keys() & after.keys():
        change = _change(*key, before[key], after[key])
        by_verdict[change.verdict(threshold)].append(change)
    failed = {case: row["failed"] for case, row in new.rows.items() if "failed" in row}
    return Comparison(
        worse=tuple(sorted(by_verdict["worse"], key=lambda c: (-c.ratio, c.case, c.what))),
        better=tuple(sorted(by_verdict["better"], key=lambda c: (c.ratio, c.case, c.what))),
        same=len(by_verdict["same"]),
        new=_lacking((key for key in after if key not in before), old),
        missing=_lacking((k for k in before if k not in after and k[0] not in failed), new),
        failed=tuple(failed.items()),
        environment=_differing(old, new),
    )


def report(old: Results, new: Results, found: Comparison) -> str:
    """The comparison for people to read."""
    lines = [
        f"old: {old.path} (commit {old.environment.get('commit')})",
        f"new: {new.path} (commit {new.environment.get('commit')})",
    ]
    lines += [
        f"DIFFERENT ENVIRONMENTS: {name}: {before!r} against {after!r}"
        for name, (before, after) in found.environment.items()
    ]
    for title, changes in (("worse", found.worse), ("better", found.better)):
        lines += [f"{title}: {len(changes)}"] if changes else []
        lines += [f"  {_line(change)}" for change in changes]
    for title, cases in (("new", found.new), ("missing", found.missing)):
        lines += [f"{title}: {len(cases)}"] if cases else []
        lines += [f"  {case}" for case in cases]
    lines += [f"failed: {case}: {why}" for case, why in found.failed]
    lines.append(
        f"{found.same} the same within noise, {len(found.better)} better, {len(found.worse)} worse"
    )
    return "\n".join(lines)


def _differing(old: Results, new: Results) -> dict[str, tuple[object, object]]:
    before, after = old.environment, new.environment
    names = sorted({*before, *after} - {*EXPECTED_TO_DIFFER})
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def _quantities(file: Results, relative_to: str | None) -> dict[tuple[str, str], Timing]:
    """All that is compared, by case and what it is; bytes have no spread."""
    found = {}
    for case, row in file.rows.items():
        timing = _timing(file, case, relative_to) if row.get("kind") == "speed" else None
        if timing is not None:
            found[case, "seconds" if relative_to is None else f"time / {relative_to}"] = timing
        for part in ("peak_bytes", "held_bytes") if row.get("kind") == "memory" else ():
            if "sparse" in row[part]:
                found[case, part.replace("_", " ")] = Timing(row[part]["sparse"], 0.0, 1)
    return found


def _lacking(some: Iterable[tuple[str, str]], other: Results) -> tuple[str, ...]:
    """Quantities as "id: what"; where the other file has no numbers of the case, its id once."""
    measured = {case for case, row in other.rows.items() if "failed" not in row}
    return tuple(dict.fromkeys(f"{c}: {what}" if c in measured else c for c, what in some))


def _change(case: str, what: str, old: Timing, new: Timing) -> Change:
    change = Change(case, what, old.median, new.median, 0.0, math.inf)
    if what.endswith("bytes"):
        return change._replace(low=change.ratio, high=change.ratio)
    (a_low, a_high), (b_low, b_high) = _notch(old), _notch(new)
    high = b_high / a_low if a_low > 0 else math.inf
    return change._replace(low=max(b_low, 0.0) / a_high, high=high)


def _timing(file: Results, case: str, relative_to: str | None) -> Timing | None:
    """Its seconds, or its time in units of another's."""
    if relative_to is None:
        return file.timing(case)
    one, rounds = file.rows[case]["against"].get(relative_to, {}), file.rows[case]["seconds"]
    if "ratio" not in one:
        return None
    # the file has the other's time over ours; the quartiles of the inverse swap places
    return Timing(1 / one["ratio"], 1 / one["q1"] - 1 / one["q3"], rounds["rounds"])


def _notch(timing: Timing) -> tuple[float, float]:
    half = NOTCH * timing.iqr / math.sqrt(timing.rounds)
    return timing.median - half, timing.median + half


def _baselines(file: Results) -> set[str]:
    rows = [row for row in file.rows.values() if row.get("kind") == "speed"]
    return {name for row in rows for name, one in row["against"].items() if "ratio" in one}


def _line(change: Change) -> str:
    sign = "+" if change.ratio > 1 else "-"
    off = abs(change.ratio - 1)
    return (
        f"{sign}{off:.1%}  {change.case}: {change.what} {change.old:.4g} -> {change.new:.4g} "
        f"({change.ratio:.3f}x, [{change.low:.3f}, {change.high:.3f}])"
    )
