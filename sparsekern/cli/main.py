"""The command line.

`sparsekern train` compares sparse training methods with dense training, `sparsekern compare` joins
its results, and `sparsekern picture` draws them; `sparsekern plan` chooses what to make sparse in a
model, and in which blocks; `sparsekern profile` says what a training step costs; `sparsekern tune`
measures launch configurations on the present GPU.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any

import sparsekern
from sparsekern.cli import compare, picture, plan, profile, train, tune
from sparsekern.errors import SparseKernError
from sparsekern.ops.cpu import choice
from sparsekern.show import environment

VERSIONS = ("sparsekern", "torch", "triton", "numba", "numpy", "python")
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


class _Version(argparse.Action):
    """Print what runs: versions, and the path of products on the CPU; asked only when wanted."""

    def __call__(self, top: argparse.ArgumentParser, *_: Any) -> None:
        found = environment.environment()
        lines = [f"{name} {found[name] or 'not installed'}" for name in VERSIONS]
        small, large = (choice.described(edge) for edge in (1, choice.BLAS_EDGE))
        others = "" if large == small else f"; blocks of {choice.BLAS_EDGE} and more: {large}"
        sys.stdout.write("\n".join([*lines, f"products on the CPU: {small}{others}\n"]))
        top.exit()


class _Command(argparse.ArgumentParser):
    """A command that refuses unknown options itself: argparse would show no command's usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and exit if something is left over."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = re.findall(r"--[a-z][a-z-]*", self.format_usage())
            close = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known, unknown


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(prog="sparsekern", description=sparsekern.__doc__.split("\n")[0])
    top.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    commands = top.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for command in (train, compare, picture, plan, profile, tune):
        command.add_parser(commands)
    return top
