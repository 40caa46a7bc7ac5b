"""Result files of `python -m benchmarks.suite`, read and checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown  # cut short, however long or deep a damaged value is
from typing import Any, NamedTuple

from sparsekern.errors import DataError

KIND = "sparsekern benchmarks"
VERSION = 1
"""Of the format."""

LARGEST = sys.float_info.max

Row = Mapping[str, Any]


class Timing(NamedTuple):
    """Times of one case in seconds: the median and interquartile range of so many rounds."""

    median: float
    iqr: float
    rounds: int


@dataclass(frozen=True)
class Results:
    """One file.

    Attributes:
        path: where it was read.
        environment: of the machine, by name.
        rows: by case id, in the file's order; one with "failed" has no numbers.
    """

    path: Path
    environment: Mapping[str, Any]
    rows: Mapping[str, Row]

    def timing(self, case: str) -> Timing | None:
        """How long a case took; None if it has no time."""
        seconds = self.rows[case].get("seconds")
        return None if seconds is None else Timing(*(seconds[name] for name in Timing._fields))


def read(path: Path) -> Results:
    """Read a result file.

    Raises:
        DataError: it is missing, damaged, or of another kind or version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: expected a readable result file; got: {error}") from error
    except ValueError as error:  # bytes that are no text, text that is no JSON
        raise DataError(f"{path}: expected JSON; got: {error}") from error
    except RecursionError as error:
        raise DataError(f"{path}: expected JSON of a few levels; got one nested deeply") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        kind = found.get("kind") if isinstance(found, dict) else type(found).__name__
        raise DataError(
            f"{path}: expected results of `python -m benchmarks.suite`, kind {KIND!r}; "
            f"got kind {shown(kind)}"
        )
    version, environment, rows = (found.get(key) for key in ("version", "environment", "rows"))
    if not _is_whole(version) or version != VERSION:
        raise DataError(f"{path}: expected version {VERSION}; got {shown(version)}")
    if not isinstance(environment, dict) or not isinstance(rows, list):
        raise DataError(
            f"{path}: expected an environment and rows; got keys {shown(sorted(found))}"
        )
    by_id: dict[str, Row] = {}
    for i, row in enumerate(rows):
        _check(row, f"{path}: row {i}")
        if row["id"] in by_id:
            raise DataError(f"{path}: row {i}: expected a new id; got {row['id']!r} again")
        kept = {"id", "failed"} if "failed" in row else row.keys()
        by_id[row["id"]] = {name: row[name] for name in kept}
    return Results(path, environment, by_id)


FIELDS = {"kind": str, "family": str, "operation": str, "name": str}
"""What every row says in words."""


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise DataError(f"{where}: expected an object with an id; got {shown(row)}")
    if "failed" in row:
        if not isinstance(row["failed"], str):
            raise DataError(f"{where}: failed must say why; got {shown(row['failed'])}")
        return
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise DataError(f"{where}: {name} must be a text; got {shown(row.get(name))}")
    _check_whole(row.get("block"), "block", where, least=1)
    _check_number(row.get("density"), "density", where, above_zero=True, most=1)
    checks = {"speed": _check_speed, "memory": _check_memory}
    if row["kind"] not in checks:
        raise DataError(f"{where}: kind must be one of {tuple(checks)}; got {shown(row['kind'])}")
    checks[row["kind"]](row, where)


def _check_speed(row: Row, where: str) -> None:
    seconds, against = row.get("seconds"), row.get("against")
    if not isinstance(seconds, dict) or not isinstance(against, dict):
        raise DataError(f"{where}: expected seconds and against; got keys {shown(sorted(row))}")
    _check_number(seconds.get("median"), "median", where, above_zero=True)
    _check_number(seconds.get("iqr"), "iqr", where)
    _check_whole(seconds.get("rounds"), "rounds", where, least=1)
    for other, one in against.items():
        _check_ratio(one, f"{where}: against {other!r}")


def _check_ratio(one: Any, where: str) -> None:
    """Of another's time, with its quartiles; or why there is none."""
    if isinstance(one, dict) and "ratio" not in one and isinstance(one.get("cannot"), str):
        return
    if not isinstance(one, dict) or "ratio" not in one:
        raise DataError(f"{where}: expected a ratio, or why there is none; got {shown(one)}")
    for name in ("ratio", "q1", "q3"):
        _check_number(one.get(name), name, where, above_zero=True)
    if not one["q1"] <= one["ratio"] <= one["q3"]:
        got = [one[name] for name in ("q1", "ratio", "q3")]
        raise DataError(f"{where}: expected q1 <= ratio <= q3; got {shown(got)}")


def _check_memory(row: Row, where: str) -> None:
    for part in ("peak_bytes", "held_bytes"):
        if not isinstance(row.get(part), dict):
            raise DataError(f"{where}: expected {part}; got keys {shown(sorted(row))}")
        for name, number in row[part].items():
            _check_whole(number, f"{part} of {name}", where, least=0)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _check_whole(number: Any, name: str, where: str, *, least: int) -> None:
    if not (_is_whole(number) and least <= number <= LARGEST):
        raise DataError(
            f"{where}: {name} must be a whole number of at least {least}; got {shown(number)}"
        )


def _check_number(
    number: Any, name: str, where: str, *, above_zero: bool = False, most: float = LARGEST
) -> None:
    good = _is_whole(number) or isinstance(number, float)
    # NaN compares as false; whole numbers too large for a float compare all the same
    if not (good and 0 <= number <= most and (number > 0 or not above_zero)):
        least = "above 0" if above_zero else "of at least 0"
        end = "" if most == LARGEST else f" and at most {most}"
        raise DataError(f"{where}: {name} must be a number {least}{end}; got {shown(number)}")
