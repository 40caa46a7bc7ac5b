"""`sparsekern train`: its options, and the comparison of methods that it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsekern.cli import options
from sparsekern.cost.timing import paired_step_times, rounds_in
from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.ops.dispatch import BACKENDS
from sparsekern.show import output_files
from sparsekern.show.progress import Progress
from sparsekern.swap import sparse_layers
from sparsekern.training import picture, report
from sparsekern.training.config import ALL_METHODS, DENSE, OPTIMIZERS, PRESETS, TrainConfig
from sparsekern.training.data import DATASETS, Dataset, Images, Text, load
from sparsekern.training.network import build, first_layer_connections, shaped
from sparsekern.training.trainer import RunResult, Trainer, total_steps

LISTED_LAYERS = 6
TIMING_SECONDS = 60.0
"""About how long the comparison of step times may take."""


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
        "--method", nargs="+", choices=ALL_METHODS, dest="methods", help=_preset("methods")
    )
    group.add_argument("--hidden", type=_widths, metavar="N,N", help=_preset("hidden"))
    group.add_argument("--seq-len", type=int, metavar="T", help=_preset("seq_len") + ", of text")
    group.add_argument("--sparsity", type=float, metavar="S", help=_preset("sparsity"))
    group.add_argument(
        "--block",
        type=options.block,
        metavar="B",
        help="16, or 16x32 (outputs x inputs); default: 1",
    )
    group.add_argument("--distribution", choices=DISTRIBUTIONS, help=_preset("distribution"))


def _add_training(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("how to train")
    for option, kind in (
        ("epochs", int),
        ("batch-size", int),
        ("lr", float),
        ("momentum", float),
        ("weight-decay", float),
        ("update-freq", int),
        ("drop-fraction", float),
        ("seeds", int),
    ):
        help_text = _preset(option.replace("-", "_"))
        group.add_argument(f"--{option}", type=kind, metavar=option[0].upper(), help=help_text)
    group.add_argument("--optimizer", choices=OPTIMIZERS, help=_preset("optimizer"))
    group.add_argument("--augment", action=argparse.BooleanOptionalAction, help=_preset("augment"))
    group.add_argument("--device", help="cpu or cuda; default: cpu")
    group.add_argument("--impl", choices=BACKENDS, help="default: chosen by device")
    group.add_argument(
        "--threads", type=int, default=1, metavar="T", help="of the CPU; default: 1, for small nets"
    )


def _add_output(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("what to write")
    group.add_argument("--json", type=Path, metavar="FILE", help="all results, machine-readable")
    group.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="PNG of the connections that leave each input pixel, before and after training, if "
        "the first layer is fully connected",
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


def _config(arguments: argparse.Namespace) -> TrainConfig:
    """The dataset's preset, with what was given in its place."""
    names = TrainConfig.__dataclass_fields__
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    if "methods" in given:
        given["methods"] = tuple(dict.fromkeys(given["methods"]))
    return replace(PRESETS[arguments.data], **given)


def run(arguments: argparse.Namespace) -> None:
    """Train by each method, and print, write and draw the comparison."""
    config = _config(arguments)
    if arguments.threads < 1:
        raise ConfigError(f"`threads` must be at least 1; got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    if config.model is not None and arguments.hidden:
        raise ConfigError(f"give `hidden` or `model`, not both; got model {config.model!r}")
    data = load(config.data, arguments.data_dir, config.seq_len)
    methods = tuple(dict.fromkeys((DENSE, *config.methods)))
    facts = _check(config, data, methods, arguments)
    sys.stdout.write(facts + "\n")
    comparison = _compare(config, data, methods, quiet=arguments.quiet)
    sys.stdout.write("\n" + report.table(comparison) + "\n")
    if arguments.json:
        with output_files.explained("json", arguments.json):
            report.write_json(comparison, arguments.json)
        sys.stdout.write(f"Results as JSON: {arguments.json}\n")
    if arguments.picture and isinstance(data, Images):
        drawn = _drawn_method(methods)
        with output_files.explained("picture", arguments.picture):
            picture.draw(comparison.results[drawn], data.average, arguments.picture, facts)
        sys.stdout.write(f"Picture of {drawn}: {arguments.picture}\n")


def _check(
    config: TrainConfig, data: Dataset, methods: Sequence[str], arguments: argparse.Namespace
) -> str:
    """Find what can't work before hours of training; returns a line on what will be trained."""
    output_files.check({"json": arguments.json, "picture": arguments.picture})
    if arguments.picture:
        picture.check_available()
    total_steps(config, data)
    data = shaped(config, data)
    models = {method: build(config, data, method, seed=0) for method in methods}
    model = models[_drawn_method(methods)]
    if arguments.picture and first_layer_connections(model, data) is None:
        raise ConfigError(
            "`picture` shows the connections of each pixel with a fully connected first layer; "
            f"got model {config.model!r} on {config.data}"
        )
    what = f"{config.data}, {_architecture(config, data)}, {config.epochs} epochs"
    layers = sparse_layers(model)
    if not layers:
        return f"{what}: dense only"
    # asking for `resolved_impl` raises if the named implementation can't run here
    impls = ", ".join(sorted({layer.resolved_impl for layer in layers.values()}))
    return (
        f"{what}, sparsity {config.sparsity:g} "
        f"({config.distribution}, block {_show(config.block).replace(',', 'x')}), impl {impls}; "
        f"density: {_densities(layers)}"
    )


def _architecture(config: TrainConfig, data: Dataset) -> str:
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


def _drawn_method(methods: Sequence[str]) -> str:
    sparse = [method for method in methods if method != DENSE]
    return "rigl" if "rigl" in sparse else [*sparse, DENSE][0]


def _compare(
    config: TrainConfig, data: Dataset, methods: Sequence[str], *, quiet: bool
) -> report.Comparison:
    results: dict[str, list[RunResult]] = {method: [] for method in methods}
    runs = config.seeds * len(methods)
    with Progress(total_steps(config, data), runs, quiet=quiet) as progress:
        for seed in range(config.seeds):
            trainers = {method: Trainer(config, data, method, seed) for method in methods}
            for method, trainer in trainers.items():
                progress.begin(f"{method}, seed {seed}")
                result = trainer.train(progress.step)
                results[method].append(result)
                progress.end(f"{_outcome(result)} in {result.seconds:.1f} s")
    # the trained networks of the last seed: their connections are the ones that matter
    steps = {method: trainer.step for method, trainer in trainers.items()}
    last = [made[-1] for made in results.values()]
    rounds, burst = _effort(sum(r.seconds / (r.weight_steps + r.update_batches) for r in last))
    times = paired_step_times(
        steps, DENSE, device=torch.device(config.device), rounds=rounds, burst=burst
    )
    entropy = data.unigram_entropy if isinstance(data, Text) else None
    return report.Comparison(config, results, times, data.sample, entropy)


def _outcome(result: RunResult) -> str:
    bits = result.bits_per_character
    return f"{result.accuracy:.2%}" if bits is None else f"{bits:.3f} bits per character"


def _effort(seconds: float) -> tuple[int, int]:
    """Rounds and steps in a burst, given the seconds of a step of every method together."""
    burst = 5 if seconds < TIMING_SECONDS / 150 else 1
    return rounds_in(TIMING_SECONDS, burst * seconds, 5, 30), burst
