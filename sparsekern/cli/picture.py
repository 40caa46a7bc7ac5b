"""`sparsekern picture`: pictures and a movie of a result file of training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparsekern.cli import options
from sparsekern.topology.blocks import as_block
from sparsekern.training.pictures import gallery
from sparsekern.training.pictures.runs import chosen, runs_of


def add_parser(commands: Any) -> None:
    """Add `picture` to the command line."""
    parser = commands.add_parser(
        "picture",
        help="draw the results of training",
        description="Draw a result file of `sparsekern train --json`: accuracy against training "
        "FLOPs (cost) and against the length of training (length), loss and accuracy over time "
        "(curves), density and fan-in by layer over topology updates (layers), and the topology "
        "of a first layer as a movie.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the pictures; default: RESULTS"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=gallery.PICTURES,
        default=[],
        help="default: all that the file holds",
    )
    group = parser.add_argument_group("which runs; default: all that learned, and dense always")
    group.add_argument("--method", nargs="+", default=[], dest="methods", metavar="M")
    group.add_argument("--sparsity", type=float, metavar="S")
    group.add_argument("--block", type=options.block, metavar="B", help="16, or 16x32")
    group.add_argument("--multiplier", type=float, metavar="X", help="length of training")


def run(arguments: argparse.Namespace) -> None:
    """Draw, and say which files were written, and which pictures could not be made."""
    block = None if arguments.block is None else as_block(arguments.block)
    runs = chosen(
        runs_of(arguments.results),
        methods=arguments.methods,
        sparsity=arguments.sparsity,
        block=block,
        multiplier=arguments.multiplier,
    )
    folder = arguments.out or arguments.results.with_suffix("")
    drawn = gallery.draw(runs, folder, arguments.only)
    sys.stdout.writelines(f"{path}\n" for path in drawn.files)
    sys.stdout.writelines(f"no {name}: {why}\n" for name, why in drawn.missing.items())
