"""`sparsekern profile`: its options, and what it writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparsekern.cli import options
from sparsekern.cost.methods import METHODS
from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.errors import ConfigError, ModelError
from sparsekern.profiling.profiler import SECONDS, measured_too, profile
from sparsekern.show import output_files
from sparsekern.swap import sparsify_

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


def add_parser(commands: Any) -> None:
    """Add `profile` to the command line."""
    parser = commands.add_parser(
        "profile",
        help="say what a training step of a model costs, layer by layer",
        description="FLOPs, bytes and time of a training step by layer, executed and if the layer "
        "were dense, predicted and measured. 1 multiply-add = 2 FLOPs.",
    )
    parser.set_defaults(run=run)
    options.add_options(parser)
    sparse = parser.add_argument_group("making the model sparse first")
    sparse.add_argument("--sparsity", type=float, metavar="S", help="default: the model as it is")
    sparse.add_argument("--block", type=options.block, default=1, metavar="B", help="16, or 16x32")
    sparse.add_argument("--distribution", choices=tuple(DISTRIBUTIONS), default="erk")
    step = parser.add_argument_group("the step")
    step.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="default: none")
    step.add_argument("--method", choices=METHODS, help="marked among the costs of training")
    step.add_argument("--no-measure", action="store_true", help="predict only")
    step.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="to measure; default: 1"
    )
    output_files.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Profile, print the tables and write the files; a prediction before anything is measured.

    Raises:
        ConfigError, ModelError: bad options, or a model that fails.
    """
    if not 0 < arguments.seconds < float("inf"):
        raise ConfigError(f"`seconds` must be finite and above 0; got {arguments.seconds:g}")
    files = output_files.files_of(arguments)
    model, examples = options.model_and_examples(arguments)
    _make_sparse(model, arguments)
    make = OPTIMIZERS.get(arguments.optimizer)
    optimizer = make(model.parameters()) if make else None
    meta = arguments.meta
    _say(arguments, "predicting a step")
    report = profile(
        model,
        examples,
        optimizer=optimizer,
        method=arguments.method,
        device=arguments.device if meta else None,
        measure=False,
    )
    written = output_files.write(report, files)
    if not meta and not arguments.no_measure:
        _say(arguments, f"measuring steps for {arguments.seconds:g} s")
        report = measured_too(report, model, examples, optimizer, seconds=arguments.seconds)
        written = output_files.write(report, files)
    sys.stdout.write(f"{report}\n")
    for path in written:
        sys.stdout.write(f"Written: {path}\n")
    if report.failure:
        raise ModelError(f"measuring failed, the prediction stands: {report.failure}")


def _make_sparse(model: nn.Module, arguments: argparse.Namespace) -> None:
    if arguments.sparsity is not None:
        sparsify_(
            model,
            arguments.sparsity,
            block=arguments.block,
            distribution=arguments.distribution,
        )


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
