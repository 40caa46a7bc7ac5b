"""`sparsekern train`: its options, and the comparison of methods that it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsekern.cli import options
from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.ops.dispatch import BACKENDS
from sparsekern.show import output_files
from sparsekern.show.progress import Progress
from sparsekern.swap import sparse_layers
from sparsekern.training import recipes, report
from sparsekern.training.config import MODEL_PRESETS, OPTIMIZERS, PRESETS, TrainConfig
from sparsekern.training.data import DATASETS, Dataset, Images
from sparsekern.training.grid import AXES, Cell, Grid, Spec
from sparsekern.training.network import first_layer_connections
from sparsekern.training.outcome import Connections
from sparsekern.training.pictures import connections, style
from sparsekern.training.results import DONE, ResultFile, heading
from sparsekern.training.runs import Task, in_turn, side_by_side
from sparsekern.training.trainer import Trainer, epoch_steps

LISTED_LAYERS = 6
VALIDATION = 0.1
"""Share of the training samples that is kept to choose by, if nobody says another."""
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
    _add_task(train)
    _add_training(train)
    _add_output(train)


def _add_task(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("what to train")
    group.add_argument("--data", choices=DATASETS, default="digits", help="default: digits")
    group.add_argument(
        "--data-dir",
        metavar="PATH",
        help="for mnist and fashion-mnist, the folder of train-images-idx3-ubyte and its "
        "companions, .gz or plain (Debian has fashion-mnist's as the package "
        "dataset-fashion-mnist); for cifar-10, the folder or archive of its published files; for "
        "text, any file: its bytes are the tokens, and its last tenth is held out",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a function in sparsekern.models, like lenet_5, or MODULE:FUNCTION of your own that "
        "makes an nn.Module; images go in as (n, 1, height, width) if it has a parameter "
        "in_channels, else as rows of pixels; default: the fully connected net, for text char_gru",
    )
    group.add_argument(
        "--method",
        nargs="+",
        dest="methods",
        metavar="NAME",
        help=f"{', '.join(recipes.names())}, or MODULE:CLASS of your own; {_preset('methods')}",
    )
    group.add_argument("--hidden", type=_widths, metavar="N,N", help=_preset("hidden"))
    group.add_argument("--seq-len", type=int, metavar="T", help=_preset("seq_len") + ", of text")
    group.add_argument(
        "--sparsity", nargs="+", type=float, metavar="S", help=_preset("sparsity") + "; or several"
    )
    group.add_argument(
        "--block",
        nargs="+",
        type=options.block,
        metavar="B",
        help="16, or 16x32 (outputs x inputs), or several; default: 1",
    )
    group.add_argument("--distribution", choices=DISTRIBUTIONS, help=_preset("distribution"))
    group.add_argument(
        "--gain",
        type=options.number_or_name,
        metavar="G",
        help="of fresh sparse values: a number, or relu for He's sqrt(2); default: torch's own",
    )


def _add_training(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("how to train")
    for option, kind in (
        ("epochs", int),
        ("batch-size", int),
        ("momentum", float),
        ("weight-decay", float),
        ("update-freq", int),
        ("drop-fraction", float),
        ("seeds", int),
    ):
        help_text = _preset(option.replace("-", "_"))
        group.add_argument(f"--{option}", type=kind, metavar=option[0].upper(), help=help_text)
    group.add_argument(
        "--lr",
        nargs="+",
        type=float,
        metavar="L",
        help=_preset("lr") + "; of several each method takes the best in validation",
    )
    group.add_argument(
        "--multiplier",
        nargs="+",
        type=float,
        metavar="M",
        help="times the epochs, or several: schedules stretch with it; default: 1",
    )
    group.add_argument(
        "--validation",
        type=float,
        default=VALIDATION,
        metavar="SHARE",
        help="of the training samples, kept out of training to choose by; default: 0.1",
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=_preset("optimizer"))
    group.add_argument("--augment", action=argparse.BooleanOptionalAction, help=_preset("augment"))
    group.add_argument("--device", help="cpu or cuda; default: cpu")
    group.add_argument("--impl", choices=BACKENDS, help="default: chosen by device")
    group.add_argument(
        "--threads", type=int, default=1, metavar="T", help="of the CPU; default: 1, for small nets"
    )
    group.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each a process; default: 1",
    )


def _add_output(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("what to write")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="all results, written anew after each run"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with FILE: what is done is not run again"
    )
    group.add_argument(
        "--save", type=Path, metavar="DIR", help="weights and topology of each run, in a file each"
    )
    group.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="PNG of the connections that leave each input pixel, before and after training, if "
        "the first layer is fully connected",
    )
    group.add_argument(
        "--frames",
        action="store_true",
        help="keep the first layer's connections after each update, for a movie",
    )
    group.add_argument("--quiet", action="store_true", help="no progress, only the results")


def _preset(field: str) -> str:
    """Help text: the default of each dataset."""
    values = {name: getattr(config, field) for name, config in PRESETS.items()}
    shown = {
        name: " ".join(map(str, v)) if field == "methods" else _show(v)
        for name, v in values.items()
    }
    if len(set(shown.values())) == 1:
        return f"default: {shown[DATASETS[0]]}"
    return "default: " + ", ".join(f"{value} for {name}" for name, value in shown.items())


def _show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _widths(text: str) -> tuple[int, ...]:
    widths = text.split(",")
    if not all(width.strip().isdecimal() for width in widths):
        raise argparse.ArgumentTypeError(f"expected widths like 300,100; got {text!r}")
    return tuple(map(int, widths))


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
    with _termination():
        whole = _run_all(task, data, file, arguments.jobs, quiet=arguments.quiet)
    _show_results(file, arguments, data, facts)
    if whole:
        return 0
    left = f"{len(file.missing)} of {len(file.specs)} runs are missing"
    again = "; the same line with --resume goes on" if arguments.json else ""
    sys.stderr.write(f"sparsekern: interrupted: {left}{again}\n")
    return INTERRUPTED


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
                file.add(spec, found)
                progress.end(_outcome(found), labels[spec])
    except KeyboardInterrupt:
        return False
    finally:
        outcomes.close()
    file.write()
    return True


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
    file: ResultFile, arguments: argparse.Namespace, data: Dataset, facts: str
) -> None:
    content = file.asked()
    if not content["runs"]:
        return
    sys.stdout.write("\n" + report.table(content) + "\n")
    if arguments.json:
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
    return (
        f"{what}, sparsity {_listed(grid.sparsities)} ({grid.config.distribution}, block "
        f"{_listed([_show(b).replace(',', 'x') for b in grid.blocks])}), impl {told}; density: "
        f"{_densities(layers)}"
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
