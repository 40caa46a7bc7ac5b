"""`sparsekern compare`: result files of `sparsekern train`, joined into one table."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsekern.errors import ConfigError
from sparsekern.training import report
from sparsekern.training.results import differing, read

ALIKE = ("name", "test", "test_digest", "sample")
"""Facts of the data that files must share to be compared."""


def add_parser(commands: Any) -> None:
    """Add `compare` to the command line."""
    compare = commands.add_parser(
        "compare",
        help="join result files of train into one table",
        description="Join result files of `sparsekern train --json` into one table. They must have "
        "been tested on the same data; in what else their configurations differ is said.",
    )
    compare.set_defaults(run=run)
    compare.add_argument("files", nargs="+", type=Path, metavar="FILE.json")


def run(arguments: argparse.Namespace) -> None:
    """Print the joined table."""
    contents = {path: read(path) for path in dict.fromkeys(arguments.files)}
    sys.stdout.write(joined(contents) + "\n")


def joined(contents: Mapping[Path, Mapping[str, Any]]) -> str:
    """One table of several result files.

    Raises:
        ConfigError: they were tested on other data.
    """
    (first, one), *others = contents.items()
    for path, other in others:
        for name in ALIKE:
            if one["data"][name] != other["data"][name]:
                raise ConfigError(
                    f"{first} and {path} can't be compared: `{name}` of their data is "
                    f"{one['data'][name]!r} and {other['data'][name]!r}"
                )
    found = {path: report.rows(content) for path, content in contents.items()}
    keys = Counter((row.name, row.sparsity) for rows in found.values() for row in rows)
    every = [
        row if keys[row.name, row.sparsity] == 1 else replace(row, name=f"{row.name} [{i}]")
        for i, rows in enumerate(found.values(), 1)
        for row in rows
    ]
    below = _sources(contents) + [
        note
        for path, content in contents.items()
        for note in report.notes(content, found[path])[len(contents) > 1 :]
    ]
    bits = report.in_bits(one)
    return report.printed(every, list(dict.fromkeys(below)), bits=bits)


def _sources(contents: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Which file is which, and in what they differ from the first."""
    first = next(iter(contents.values()))
    lines = []
    for i, (path, content) in enumerate(contents.items(), 1):
        differences = [
            f"{what}{name} {content[part].get(name)}"
            for part, what in (("task", ""), ("dense", "FLOPs of dense "))
            for name in differing(first[part], content[part])
        ]
        text = f"; {', '.join(differences)}" if differences else ""
        runs = Counter(run["state"] for run in content["runs"])
        counted = ", ".join(f"{count} runs {state}" for state, count in runs.items())
        lines.append(f"[{i}] {path}: {counted}{text}.")
    return [*lines, "FLOPs against dense training of the same file."]
