"""The options of `sparsekern train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsekern.cli import options
from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.ops.dispatch import BACKENDS
from sparsekern.training import recipes
from sparsekern.training.config import OPTIMIZERS, PRESETS
from sparsekern.training.data import DATASETS

VALIDATION = 0.1
"""Share of the training samples that is kept to choose by, if nobody says another."""


def add_task(train: argparse.ArgumentParser) -> None:
    """Add what is trained; options left out are None, and take the presets."""
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


def add_training(train: argparse.ArgumentParser) -> None:
    """Add how it is trained."""
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


def add_output(train: argparse.ArgumentParser) -> None:
    """Add what is written."""
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
        name: " ".join(map(str, v)) if field == "methods" else show(v) for name, v in values.items()
    }
    data: dict[str, list[str]] = {}
    for name, value in shown.items():
        data.setdefault(value, []).append(name)
    if len(data) == 1:
        return f"default: {shown[DATASETS[0]]}"
    most = max(data, key=lambda value: len(data[value]))
    others = [f"{v} for {' and '.join(names)}" for v, names in data.items() if v != most]
    return f"default: {most}; {', '.join(others)}"


def show(value: object) -> str:
    """An option's value as it is written."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _widths(text: str) -> tuple[int, ...]:
    widths = text.split(",")
    if not all(width.strip().isdecimal() for width in widths):
        raise argparse.ArgumentTypeError(f"expected widths like 300,100; got {text!r}")
    return tuple(map(int, widths))
