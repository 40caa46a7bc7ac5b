"""`sparsekern tune`: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekern.kernels.tables import CONFIGS, ENVIRONMENT
from sparsekern.tuning.problems import BLOCKS, KINDS, Request

if TYPE_CHECKING:
    from sparsekern.tuning.driver import Result, Tuned

_DEFAULTS = Request()


def add_parser(commands: Any) -> None:
    """Add `tune` to the command line."""
    tune = commands.add_parser(
        "tune",
        help="measure launch configurations of the GPU kernels",
        description="Measure launch configurations on the present GPU and write the best as a "
        f"launch table; {ENVIRONMENT}=FILE makes the library use it. A candidate must be exact on "
        "integers before it is timed, and replaces the current one only if it is faster by more "
        "than the noise, twice.",
    )
    tune.set_defaults(run=run)
    tune.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="an existing table is continued"
    )
    tune.add_argument("--op", nargs="+", choices=tuple(CONFIGS), help="default: all")
    tune.add_argument(
        "--block", nargs="+", type=int, choices=BLOCKS, help="edges of blocks; default: all"
    )
    tune.add_argument(
        "--dtype", nargs="+", choices=tuple(KINDS), help="default: bf16, which stands for fp16 too"
    )
    _add_problem(tune)
    tune.add_argument(
        "--rounds", type=int, default=25, metavar="N", help="times of each candidate; default: 25"
    )
    tune.add_argument(
        "--budget-s", type=float, default=float("inf"), metavar="S", help="stop after S seconds"
    )
    tune.add_argument("--again", action="store_true", help="also keys that FILE holds already")
    tune.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU, whose times mean nothing"
    )
    tune.add_argument("--quiet", action="store_true", help="no progress, only the results")


def _add_problem(tune: argparse.ArgumentParser) -> None:
    group = tune.add_argument_group("what to measure on")
    group.add_argument(
        "--tokens", type=int, default=_DEFAULTS.tokens, metavar="M", help="default: 8192"
    )
    group.add_argument(
        "--shape",
        nargs=2,
        type=int,
        default=_DEFAULTS.shape,
        metavar=("OUT", "IN"),
        help="of the weight; default: 4096 4096",
    )
    group.add_argument(
        "--density",
        nargs="+",
        type=float,
        default=_DEFAULTS.densities,
        metavar="D",
        help="default: 0.1; where it makes no rows of a key's class, a density that does is taken",
    )


def run(arguments: argparse.Namespace) -> None:
    """Tune, and print what changed."""
    from sparsekern.tuning.driver import Plan, tune  # noqa: PLC0415  `train` needs none of it

    request = Request(
        ops=_unique(arguments.op, _DEFAULTS.ops),
        blocks=_unique(arguments.block, _DEFAULTS.blocks),
        dtypes=_unique(arguments.dtype, _DEFAULTS.dtypes),
        tokens=arguments.tokens,
        shape=tuple(arguments.shape),
        densities=_unique(arguments.density, _DEFAULTS.densities),
    )
    plan = Plan(
        request,
        arguments.out,
        rounds=arguments.rounds,
        budget_s=arguments.budget_s,
        again=arguments.again,
        dry_run=arguments.dry_run,
        quiet=arguments.quiet,
    )
    result = tune(plan)
    sys.stdout.write(table(result) + "\n")
    if result.left:
        sys.stdout.write(f"The budget ended: {result.left} keys are left; run it again.\n")
    if arguments.out.exists():
        sys.stdout.write(f"To use the table: {ENVIRONMENT}={arguments.out}\n")


def _unique(given: Any, default: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(given)) if given else default


def table(result: Result) -> str:
    """A row for each key: old configuration, what the new one changes, time new / old."""
    rows = [("key", "old", "new", "time x")]
    rows += [(str(t.key), _show(t.old), _change(t), _ratio(t)) for t in result.tuned]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    for tuned in result.tuned:
        failed = [f"{_show(tuned.configs[i])}: {why}" for i, why in sorted(tuned.errors.items())]
        notes = [tuned.note] if tuned.note else []
        lines += [f"{tuned.key}: {text}" for text in notes + failed]
    if result.kept:
        lines.append(f"{result.kept} keys are in the table already (--again measures them)")
    return "\n".join(line.rstrip() for line in lines)


def _show(config: Any) -> str:
    return " ".join(f"{name}={int(value)}" for name, value in config._asdict().items())


def _change(tuned: Tuned) -> str:
    """Only the fields that differ."""
    if tuned.new is None:
        return "not measured"
    old, new = tuned.old._asdict(), tuned.new._asdict()
    changed = [f"{name}={int(value)}" for name, value in new.items() if value != old[name]]
    return " ".join(changed) or "the same"


def _ratio(tuned: Tuned) -> str:
    return "-" if tuned.ratio is None else f"{tuned.ratio:.3f}"
