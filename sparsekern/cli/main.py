"""The command line.

`sparsekern train` compares sparse training methods with dense training; `sparsekern plan` chooses
what to make sparse in a model, and in which blocks; `sparsekern profile` says what a training step
costs; `sparsekern tune` measures launch configurations on the present GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sparsekern
from sparsekern.cli import plan, profile, train, tune
from sparsekern.errors import SparseKernError

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 2 for bad input (one line on stderr), 130 when interrupted.
    """
    return run(parser(), argv)


def run(commands: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, call what the chosen command set as `run`, and turn errors into exit statuses."""
    arguments = commands.parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except SparseKernError as error:
        sys.stderr.write(f"{commands.prog}: error: {error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"{commands.prog}: interrupted\n")
        return INTERRUPTED
    return status or 0


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(prog="sparsekern", description=sparsekern.__doc__.split("\n")[0])
    top.add_argument("--version", action="version", version=sparsekern.__version__)
    commands = top.add_subparsers(required=True, metavar="command")
    for command in (train, plan, profile, tune):
        command.add_parser(commands)
    return top
