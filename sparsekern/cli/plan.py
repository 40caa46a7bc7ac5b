"""`sparsekern plan`: its options, and what it writes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sparsekern.cli import options
from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.errors import MeasurementError
from sparsekern.planning.planner import BLOCKS, SECONDS, PlanInterrupted, plan
from sparsekern.planning.result import Budget, Plan
from sparsekern.planning.show import shown
from sparsekern.show import output_files
from sparsekern.topology.blocks import Block


def add_parser(commands: Any) -> None:
    """Add `plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="choose what to make sparse in a model, before training",
        description="Compare the time of each layer's training step, dense and in blocks of "
        "several sizes, and choose which layers to make sparse, how sparse and in which blocks. "
        "Times are predicted, or with --measure taken on this machine.",
    )
    parser.set_defaults(run=run)
    options.add_options(parser)
    _add_target(parser)
    _add_choices(parser)
    output_files.add_options(parser, json="everything; while measuring, after each layer")


def _add_target(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to reach: a sparsity, or a budget")
    group.add_argument(
        "--sparsity", type=float, metavar="S", help="of all weights in these layers together"
    )
    group.add_argument(
        "--flops",
        type=float,
        metavar="X",
        help="at most this share of the dense model's FLOPs in a training step",
    )
    group.add_argument(
        "--memory",
        type=float,
        metavar="X",
        help="at most this share of the bytes that the dense model holds between two steps",
    )
    group.add_argument(
        "--optimizer-states",
        type=int,
        default=2,
        metavar="N",
        help="numbers that the optimizer keeps for each weight; default: 2, as AdamW does",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to choose from, and how")
    group.add_argument(
        "--blocks",
        nargs="+",
        type=options.block,
        default=list(BLOCKS),
        metavar="B",
        help=f"like 16, or 16x32 (outputs x inputs); default: {' '.join(map(shown, BLOCKS))}",
    )
    group.add_argument(
        "--distribution", choices=tuple(DISTRIBUTIONS), default="erk", help="default: erk"
    )
    group.add_argument(
        "--exclude", nargs="+", default=[], metavar="GLOB", help="layers to leave dense"
    )
    group.add_argument(
        "--measure", action="store_true", help="time the layers here instead of predicting"
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"about how long to measure, besides compiling; default: {SECONDS:g}",
    )


def run(arguments: argparse.Namespace) -> None:
    """Plan, print the table and write the files; of a measurement that breaks off, what there is.

    Raises:
        ConfigError: an option is out of its domain; nothing has been measured then.
        MeasurementError, PlanInterrupted: after the partial plan was written.
    """
    files = output_files.files_of(arguments)
    budget = _budget(arguments)
    model, examples = options.model_and_examples(arguments)
    try:
        made = plan(
            model,
            examples,
            sparsity=arguments.sparsity,
            budget=budget,
            blocks=_unique(arguments.blocks),
            distribution=arguments.distribution,
            exclude=arguments.exclude,
            device=arguments.device,
            measure=arguments.measure,
            seconds=arguments.seconds,
            optimizer_states=arguments.optimizer_states,
            quiet=arguments.quiet,
            on_layer=lambda so_far: output_files.write(so_far, {"json": files["json"]}),
        )
    except (MeasurementError, PlanInterrupted) as error:
        if isinstance(error.plan, Plan):
            sys.stdout.write("Measuring broke off; what had been measured, the rest predicted:\n\n")
            _report(error.plan, files)
        raise
    _report(made, files)


def _report(made: Plan, files: output_files.Files) -> None:
    sys.stdout.write(f"{made}\n")
    for path in output_files.write(made, files):
        sys.stdout.write(f"Written: {path}\n")


def _budget(arguments: argparse.Namespace) -> Budget | None:
    if arguments.flops is None and arguments.memory is None:
        return None
    return Budget(flops=arguments.flops, memory=arguments.memory)


def _unique(blocks: list[Block]) -> tuple[Block, ...]:
    return tuple(dict.fromkeys(blocks))
