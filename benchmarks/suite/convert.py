"""From pytest-benchmark's entries to the rows of a result file: small, and one line each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.comparing.results import KIND, VERSION
from sparsekern.show.output_files import write_whole

Row = dict[str, Any]

KEPT = ("median", "iqr", "min", "rounds")
"""Of pytest-benchmark's statistics; no raw rounds."""

DIGITS = 5


def row(entry: Mapping[str, Any]) -> Row:
    """An element of "benchmarks" in the JSON of pytest-benchmark, as `benchmarks.suite` fills it.

    Raises:
        ValueError: it is not one of the suite's.
    """
    info = entry.get("extra_info", {})
    if not {"id", "kind"} <= set(info):
        raise ValueError(f"{entry.get('fullname')!r} was not written by benchmarks.suite")
    found = {"id": info["id"], **info}
    if info["kind"] == "speed":
        found["seconds"] = {name: entry["stats"][name] for name in KEPT}
    shortened: Row = _short(found)
    return shortened


def content(environment: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """A result file."""
    head = {"kind": KIND, "version": VERSION, "environment": _short(dict(environment))}
    return {**head, "rows": list(rows)}


def write(path: Path, environment: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write a result file."""
    made = content(environment, rows)
    lines = [json.dumps(one, sort_keys=True) for one in made.pop("rows")]
    head = json.dumps(made, indent=1).removesuffix("\n}")
    write_whole(path, f'{head},\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n")


def unwritable(path: Path) -> str | None:
    """Make the folder of a result file; says why it could not be written, before hours go by."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        return f"--out must be a file that can be written; got {path}: {error}"
    return f"--out must be a file that can be written; got {path}" if path.is_dir() else None


def _short(value: Any) -> Any:
    """Floats to `DIGITS` significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return value
