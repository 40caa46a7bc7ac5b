"""`sparsekern train`: its options, and the comparison of methods that it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sparsekern.cli import train_options
from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.show import output_files
from sparsekern.show.progress import Progress
from sparsekern.swap import sparse_layers
from sparsekern.training import report
from sparsekern.training.config import MODEL_PRESETS, PRESETS, TrainConfig
from sparsekern.training.data import Dataset, Images
from sparsekern.training.grid import AXES, Cell, Grid, Spec
from sparsekern.training.network import first_layer_connections
from sparsekern.training.outcome import Connections
from sparsekern.training.pictures import connections, style
from sparsekern.training.results import DONE, ResultFile, heading
from sparsekern.training.runs import Task, file_name, in_turn, side_by_side
from sparsekern.training.trainer import Trainer, epoch_steps

LISTED_LAYERS = 6
INTERRUPTED = 130


def add_parser(commands: Any) -> None:
    """Add `train` to the command line; options left out are None, and take the dataset's preset."""
    train = commands.add_parser(
        "train",
        help="compare sparse training methods with dense training",
        description="Train a network by several methods, with the same data and seeds, and "
        "compare accuracy, FLOPs, bytes and time with dense training.",
    )
    train.set_defaults(run=run)
    train_options.add_task(train)
    train_options.add_training(train)
    train_options.add_output(train)


def _grid(arguments: argparse.Namespace) -> Grid:
    """The presets of dataset and model, with what was given in their place."""
    preset = replace(PRESETS[arguments.data])
    if arguments.model in MODEL_PRESETS:
        preset = replace(preset, **MODEL_PRESETS[arguments.model])
    names = TrainConfig.__dataclass_fields__
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if "methods" in given:
        given["methods"] = tuple(dict.fromkeys(given["methods"]))
    axes = {axis: tuple(given.pop(axis, (getattr(preset, axis),))) for axis in AXES}
    config = replace(preset, **given, **{axis: values[0] for axis, values in axes.items()})
    if config.model is not None and arguments.hidden:
        raise ConfigError(f"give `hidden` or `model`, not both; got model {config.model!r}")
    if len(axes["lr"]) > 1 and not config.validation:
        raise ConfigError("several `lr` need a validation split to choose by; got validation 0")
    return Grid(config, axes["sparsity"], axes["block"], axes["multiplier"], axes["lr"])


def run(arguments: argparse.Namespace) -> int:
    """Train by each method, and print, write and draw the comparison.

    Returns:
        0, or 130 if it was interrupted: what was done is printed and written all the same.
    """
    grid = _grid(arguments)
    for name in ("threads", "jobs"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    config = grid.config
    task = Task(config, arguments.data_dir, {}, arguments.threads, arguments.save, arguments.frames)
    data = task.load()
    _check_files(arguments)
    facts = _check(grid, data, picture_wanted=arguments.picture is not None)
    head = heading(config, data, arguments.threads)
    file = ResultFile(arguments.json, head, grid.specs(), resume=arguments.resume)
    task = task._replace(dense=head["dense"])
    sys.stdout.write(facts + "\n")
    _tell_lacking(task, file)
    with _termination():
        whole = _run_all(task, data, file, arguments.jobs, quiet=arguments.quiet)
    problem = _write_last(file)
    _show_results(file, arguments, data, facts, written=problem is None)
    if problem is not None:
        raise problem
    if whole:
        return 0
    left = f"{len(file.missing)} of {len(file.specs)} runs are missing"
    again = "; the same line with --resume goes on" if arguments.json else ""
    sys.stderr.write(f"sparsekern: interrupted: {left}{again}\n")
    return INTERRUPTED


def _tell_lacking(task: Task, file: ResultFile) -> None:
    """Say that runs of before are not run again for what is asked for besides now."""
    done = {Spec.of_json(run): run for run in file.asked()["runs"] if run["state"] == DONE}
    saved = [] if task.save is None else [task.save / file_name(spec) for spec in done]
    lacking = {
        "saved network": [path for path in saved if not path.exists()],
        "frames": [run for run in done.values() if task.frames and run.get("frames") is None],
    }
    for what, runs in lacking.items():
        if runs:
            sys.stderr.write(
                f"sparsekern: {len(runs)} runs that were done before have no {what}; only a new "
                "file, without --resume, trains them again\n"
            )


def _run_all(task: Task, data: Dataset, file: ResultFile, jobs: int, *, quiet: bool) -> bool:
    """All runs that are missing; False if that was interrupted."""
    specs = file.missing
    steps = {spec: task.steps(spec, data) for spec in specs}
    several = len({spec.cell.lr for spec in specs}) > 1
    labels = {s: f"{s.label}, lr {s.cell.lr:g}" if several else s.label for s in specs}
    progress = Progress(0, len(specs), quiet=quiet, total=sum(steps.values()))

    def tell(spec: Spec, done: int) -> None:
        if done:
            progress.step(done, labels[spec])
        else:
            progress.begin(labels[spec], steps[spec])

    if jobs > 1 and len(specs) > 1:
        outcomes = side_by_side(task, specs, jobs, tell)
    else:
        outcomes = in_turn(task, data, specs, tell)
    try:
        with progress:
            for spec, found in outcomes:
                progress.end(_outcome(found) + _add(file, spec, found), labels[spec])
    except KeyboardInterrupt:
        return False
    finally:
        outcomes.close()
    return True


def _add(file: ResultFile, spec: Spec, found: Mapping[str, Any]) -> str:
    """Keep a run; words on a file that can't be written now, which costs no run."""
    try:
        file.add(spec, found)
    except ConfigError as error:
        return f"; {error}; it is tried again after the next run"
    return ""


def _write_last(file: ResultFile) -> ConfigError | None:
    """Write the file, once more; what is in the way is told when the results are shown."""
    try:
        if file.content()["runs"]:
            file.write()
    except ConfigError as error:
        return error
    return None


@contextmanager
def _termination() -> Iterator[None]:
    """`kill` ends the runs as Ctrl-C does, so that what was done is told."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, which alone may ask for signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_results(
    file: ResultFile, arguments: argparse.Namespace, data: Dataset, facts: str, *, written: bool
) -> None:
    content = file.asked()
    if not content["runs"]:
        return
    sys.stdout.write("\n" + report.table(content) + "\n")
    if arguments.json and written:
        sys.stdout.write(f"Results as JSON: {arguments.json}\n")
    if arguments.picture and isinstance(data, Images):
        drawn = _drawn(content["runs"])
        if drawn:
            with output_files.explained("picture", arguments.picture):
                connections.draw(drawn, data.average, arguments.picture, facts)
            sys.stdout.write(f"Picture of {drawn[0].method}: {arguments.picture}\n")


class _Drawn(NamedTuple):
    method: str
    connections: Connections | None


def _drawn(runs: Sequence[Mapping[str, Any]]) -> list[_Drawn]:
    """Runs of one method: RigL's, or the first sparse one's."""
    cells = [Spec.of_json(run).cell for run in runs if run["state"] == DONE]
    if not cells:
        return []
    sparse = [cell for cell in cells if cell.sparsity]
    best = next((cell for cell in sparse if cell.method == "rigl"), [*sparse, *cells][0])
    return [
        _Drawn(best.method, Connections(*map(torch.tensor, run["connections"].values())))
        for run in runs
        if run["state"] == DONE and Spec.of_json(run).cell == best
    ]


# ---- what can be known before


def _check_files(arguments: argparse.Namespace) -> None:
    output_files.check({"json": arguments.json, "picture": arguments.picture})
    if arguments.picture:
        style.check_available()
    if arguments.resume and not arguments.json:
        raise ConfigError("`resume` needs the file that it goes on from: give `json` too")
    if arguments.save is not None:
        with output_files.explained("save", arguments.save):
            arguments.save.mkdir(parents=True, exist_ok=True)


def _check(grid: Grid, data: Dataset, *, picture_wanted: bool) -> str:
    """Find what can't work before hours of training; returns a line on what will be trained."""
    epoch_steps(grid.config, data)
    first: dict[Cell, Cell] = {}
    for cell in grid.cells():
        first.setdefault(cell._replace(lr=0.0, multiplier=1.0), cell)
    layers: dict[str, SparseLayer] = {}
    for cell in first.values():
        trainer = Trainer(cell.of(grid.config), data, cell.method, seed=0)
        if picture_wanted and first_layer_connections(trainer.model, trainer.data) is None:
            raise ConfigError(
                "`picture` shows the connections of each pixel with a fully connected first "
                f"layer; got model {grid.config.model!r} on {grid.config.data}"
            )
        found = sparse_layers(trainer.model)
        # asking for `resolved_impl` raises if the named implementation can't run here
        impls = {layer.resolved_impl for layer in found.values()}
        if not layers and impls:
            layers, told = found, ", ".join(sorted(impls))
    what = f"{grid.config.data}, {_architecture(trainer)}, {grid.config.epochs} epochs"
    if not layers:
        return f"{what}: dense at first"
    blocks = _listed([train_options.show(block).replace(",", "x") for block in grid.blocks])
    return (
        f"{what}, sparsity {_listed(grid.sparsities)} "
        f"({grid.config.distribution}, block {blocks}), "
        f"impl {told}; density: {_densities(layers)}"
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _architecture(trainer: Trainer) -> str:
    config, data = trainer.config, trainer.data
    if config.model is None:
        return "-".join(map(str, (data.train_x.shape[1], *config.hidden, data.classes)))
    shape = "x".join(map(str, data.train_x.shape[1:]))
    return f"{config.model} ({shape} to {data.classes})"


def _densities(layers: Mapping[str, SparseLayer]) -> str:
    """Each layer's density, or the range of many."""
    if len(layers) <= LISTED_LAYERS:
        return ", ".join(f"{name} {layer.density:.2%}" for name, layer in layers.items())
    ordered = sorted(layers.items(), key=lambda item: item[1].density)
    (lowest, low), *_, (highest, high) = ordered
    return (
        f"{low.density:.2%} ({lowest}) to {high.density:.2%} ({highest}), {len(layers)} sparse "
        "layers"
    )


def _outcome(run: Mapping[str, Any]) -> str:
    if run["state"] != DONE:
        return f"failed: {run['error']}"
    score = run["validation"] or run["test"]
    which = "validation" if run["validation"] else "test"
    if score["bits"] is None:
        return f"{which} {score['accuracy']:.2%} in {run['seconds']:.1f} s"
    return f"{which} {score['bits']:.3f} bits per character in {run['seconds']:.1f} s"
