"""`python -m benchmarks compare` and `plot`: their options, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparing import compare, plot
from benchmarks.comparing.results import read
from sparsekern.cli.main import run

SLOWER = 1
"""Exit status of a comparison that found something worse, if that was asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it.

    Returns:
        The exit status: 0, 1 when `compare` was asked to fail and found a reason, 2 for bad input.
    """
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Result files of `python -m benchmarks.suite`: what changed between two, and "
        "pictures of one.",
    )
    parts = top.add_subparsers(required=True, metavar="part")
    _add_compare(parts)
    _add_plot(parts)
    return top


def _add_compare(parts: Any) -> None:
    parser = parts.add_parser(
        "compare",
        help="what changed between two files beyond noise",
        description="A case changed if the interval of the ratio of its medians, from their "
        "interquartile ranges and rounds, excludes 1, and the ratio is more than the threshold "
        "from 1.",
    )
    parser.set_defaults(run=_compare)
    parser.add_argument("old", type=Path, metavar="OLD", help="a result file")
    parser.add_argument("new", type=Path, metavar="NEW", help="another")
    parser.add_argument(
        "--threshold",
        type=float,
        default=compare.THRESHOLD,
        metavar="T",
        help="relative change that is never reported; default: 0.05",
    )
    parser.add_argument(
        "--relative-to",
        metavar="NAME",
        help="compare times in units of a baseline's in the same rounds, like dense: free of what "
        "the machine did that hour",
    )
    parser.add_argument(
        "--fail-on-slower",
        action="store_true",
        help="exit status 1 if a case is slower, larger, failed or missing",
    )


def _add_plot(parts: Any) -> None:
    parser = parts.add_parser(
        "plot",
        help="speed-up and memory against density",
        description="Write speedup.png and memory.png: each block's curve over density, with the "
        "ideal one, and where it breaks even with dense.",
    )
    parser.set_defaults(run=_plot)
    parser.add_argument("file", type=Path, metavar="FILE", help="a result file")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="an existing folder; default: that of FILE"
    )


def _compare(arguments: argparse.Namespace) -> int:
    old, new = read(arguments.old), read(arguments.new)
    found = compare.compare(
        old, new, threshold=arguments.threshold, relative_to=arguments.relative_to
    )
    sys.stdout.write(compare.report(old, new, found) + "\n")
    bad = found.worse or found.failed or found.missing
    return SLOWER if arguments.fail_on_slower and bad else 0


def _plot(arguments: argparse.Namespace) -> None:
    results = read(arguments.file)
    for path in plot.plot(results, arguments.out or arguments.file.parent):
        sys.stdout.write(f"drawn: {path}\n")


if __name__ == "__main__":
    sys.exit(main())
