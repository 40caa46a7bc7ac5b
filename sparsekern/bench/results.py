"""Result files of `python -m benchmarks.suite`, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsekern.errors import DataError

KIND = "sparsekern benchmarks"
VERSION = 1
"""Of the format."""

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
        found = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: expected a readable result file; got: {error}") from error
    except ValueError as error:  # bytes that are no text, text that is no JSON
        raise DataError(f"{path}: expected JSON; got: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        kind = found.get("kind") if isinstance(found, dict) else type(found).__name__
        raise DataError(
            f"{path}: expected results of `python -m benchmarks.suite`, kind {KIND!r}; "
            f"got kind {kind!r}"
        )
    if found.get("version") != VERSION:
        raise DataError(f"{path}: expected version {VERSION}; got {found.get('version')!r}")
    environment, rows = found.get("environment"), found.get("rows")
    if not isinstance(environment, dict) or not isinstance(rows, list):
        raise DataError(f"{path}: expected an environment and rows; got keys {sorted(found)}")
    by_id: dict[str, Row] = {}
    for i, row in enumerate(rows):
        _check(row, f"{path}: row {i}")
        if row["id"] in by_id:
            raise DataError(f"{path}: row {i}: expected a new id; got {row['id']!r} again")
        by_id[row["id"]] = row
    return Results(path, environment, by_id)


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise DataError(f"{where}: expected an object with an id; got {str(row)[:80]}")
    if "failed" in row:
        return
    for name, kind in FIELDS.items():
        if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
            raise DataError(f"{where}: {name} is damaged; got {row.get(name)!r}")
    checks = {"speed": _check_speed, "memory": _check_memory}
    if row["kind"] not in checks:
        raise DataError(f"{where}: kind must be one of {tuple(checks)}; got {row['kind']!r}")
    checks[row["kind"]](row, where)


FIELDS = {
    "kind": str,
    "family": str,
    "operation": str,
    "name": str,
    "block": int,
    "density": int | float,
}
"""What every row says."""


def _check_speed(row: Row, where: str) -> None:
    seconds, against = row.get("seconds"), row.get("against")
    if not isinstance(seconds, dict) or not isinstance(against, dict):
        raise DataError(f"{where}: expected seconds and against; got keys {sorted(row)}")
    for name in Timing._fields:
        _check_number(seconds.get(name), name, where, above_zero=name != "iqr")
    for other, one in against.items():
        if not isinstance(one, dict) or not ({"cannot", "ratio"} & set(one)):
            raise DataError(f"{where}: against {other!r}: expected a ratio; got {one!r}")
        for name in ("ratio", "q1", "q3") if "ratio" in one else ():
            _check_number(one.get(name), name, where, above_zero=True)


def _check_memory(row: Row, where: str) -> None:
    for part in ("peak_bytes", "held_bytes"):
        if not isinstance(row.get(part), dict):
            raise DataError(f"{where}: expected {part}; got keys {sorted(row)}")
        for name, number in row[part].items():
            _check_number(number, f"{part} of {name}", where)


def _check_number(number: Any, name: str, where: str, *, above_zero: bool = False) -> None:
    good = isinstance(number, int | float) and not isinstance(number, bool)
    if not (good and math.isfinite(number) and number >= 0 and (number > 0 or not above_zero)):
        least = "above 0" if above_zero else "of at least 0"
        raise DataError(f"{where}: {name} must be a number {least}; got {number!r}")
