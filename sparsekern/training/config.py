"""`TrainConfig`: what a training run of the command line depends on, as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sparsekern.distribution import DISTRIBUTIONS
from sparsekern.errors import ConfigError, DeviceError, DtypeError
from sparsekern.methods import UpdateSchedule
from sparsekern.nn.init import as_gain
from sparsekern.ops.dispatch import check_impl
from sparsekern.topology.blocks import Block, as_block, check_sparsity
from sparsekern.training.data import DATASETS

DENSE = "dense"
PLAIN = (DENSE, "static", "set", "rigl")
"""What is compared if nobody says what."""
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on, besides its data, method and seed.

    Attributes:
        data: name in `sparsekern.training.data.DATASETS`.
        methods: to compare, see `sparsekern.training.recipes`; "dense" is always run, as the
            baseline.
        model: None for the fully connected net of `hidden`; a name in sparsekern.models, or
            MODULE:FUNCTION, see `sparsekern.training.zoo`.
        sparsity: of all sparse layers together, in [0, 1); the output layer is dense, and what
            `sparsify_` leaves dense.
        block: edge or pair (outputs, inputs).
        distribution: "erk", "er" or "uniform".
        hidden: width of each hidden layer of the fully connected net.
        seq_len: bytes in a sequence of text.
        epochs: passes over the training samples.
        batch_size: samples per step; an incomplete last batch is dropped.
        lr: at the start; it decays to 0 as half a cosine.
        momentum: Nesterov's, of SGD.
        weight_decay: L2 penalty of SGD, decoupled decay of AdamW.
        optimizer: "sgd" or "adamw".
        update_freq: weight steps between topology updates.
        drop_fraction: share of the connections replaced by the first update.
        multiplier: times `epochs`; schedules of learning rate and topology stretch with it.
        validation: share of the training samples that is kept out of training, to choose by;
            which ones depends on the data alone.
        gain: of fresh sparse values, a number or "relu", see `sparsify_`; None is torch's own.
        seeds: runs of each method, with seeds 0, 1, ...
        device: where to train.
        impl: of the sparse layers, see `sparsekern.ops.resolve`; None chooses.
        augment: shift and mirror training images at random.

    Raises:
        ConfigError, DtypeError: a value is out of its domain; the text names it.
        DeviceError: the device does not exist here.
    """

    data: str = "digits"
    methods: tuple[str, ...] = PLAIN
    model: str | None = None
    sparsity: float = 0.9
    block: Block = 1
    distribution: str = "erk"
    hidden: tuple[int, ...] = (300, 100)
    seq_len: int = 128
    epochs: int = 10
    batch_size: int = 100
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    update_freq: int = 100
    drop_fraction: float = 0.3
    multiplier: float = 1.0
    validation: float = 0.0
    gain: float | str | None = None
    seeds: int = 3
    device: str = "cpu"
    impl: str | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("data", self.data, DATASETS),
            ("distribution", self.distribution, tuple(DISTRIBUTIONS)),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ConfigError(f"`{name}` must be one of {known}; got {value!r}")
        for name in ("epochs", "batch_size", "seeds", "seq_len"):
            _check_count(name, getattr(self, name))
        if not self.hidden:
            raise ConfigError("`hidden` must name at least one layer; got none")
        for width in self.hidden:
            _check_count("hidden", width)
        if self.data == "text" and self.model is None:
            raise ConfigError(
                "data 'text' needs a `model` that reads bytes, like 'char_gru'; got none"
            )
        _check_number("lr", self.lr, math.ulp(0))  # above 0
        _check_number("momentum", self.momentum, 0, 1)
        _check_number("weight_decay", self.weight_decay, 0)
        _check_number("multiplier", self.multiplier, math.ulp(0))
        _check_number("validation", self.validation, 0, 1)
        as_gain(self.gain)
        check_sparsity(self.sparsity)
        as_block(self.block)
        check_impl(self.impl)
        UpdateSchedule(1, self.update_freq, self.drop_fraction)
        _check_device(self.device)


def _check_count(name: str, value: object) -> None:
    if type(value) is not int:
        raise DtypeError(f"`{name}` must be an int; got {value!r}")
    if value < 1:
        raise ConfigError(f"`{name}` must be at least 1; got {value}")


def _check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """`value` must lie in [low, high); a `low` of `math.ulp(0)` means above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DtypeError(f"`{name}` must be a number; got {value!r}")
    if not low <= value < high:  # NaN fails too
        if low == math.ulp(0):
            raise ConfigError(f"`{name}` must be a positive number; got {value}")
        raise ConfigError(f"`{name}` must lie in [{low:g}, {high:g}); got {value}")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"`device` must be one like 'cpu' or 'cuda:0'; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"`device` must exist; got {name!r}, and torch sees {torch.cuda.device_count()} "
            "CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"`device` must be the CPU or a CUDA device; got {name!r}")


PRESETS = {
    "digits": TrainConfig(sparsity=0.95, epochs=30, update_freq=20, weight_decay=2e-3),
    "fashion-mnist": TrainConfig(
        data="fashion-mnist", sparsity=0.98, drop_fraction=0.5, weight_decay=5e-4
    ),
    "mnist": TrainConfig(data="mnist", sparsity=0.98, drop_fraction=0.5, weight_decay=5e-4),
    "cifar-10": TrainConfig(
        data="cifar-10",
        model="wide_resnet_22_2",
        batch_size=128,
        weight_decay=5e-4,
        augment=True,
    ),
    "text": TrainConfig(
        data="text",
        model="char_gru",
        sparsity=0.75,
        distribution="uniform",
        batch_size=32,
        optimizer="adamw",
        lr=2e-3,
        weight_decay=0.01,
    ),
}
"""A configuration by dataset: what the command line starts from."""

_ADAMW = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
_NORMED = {"lr": 0.1, "weight_decay": 5e-4, "drop_fraction": 0.3, "sparsity": 0.9}
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    # at the rate 0.1 of the others it stays at chance
    "lenet_5": _NORMED | {"lr": 0.05, "weight_decay": 1e-4, "epochs": 4},
    "wide_resnet_22_2": _NORMED,
    "resnet_50": _NORMED,
    "mobilenet_v1": _NORMED,
    "vgg_16": _NORMED | {"lr": 0.05},
    "vit": _ADAMW | {"sparsity": 0.9},
    "small_gpt": _ADAMW,
}
"""What is different for a model by name: no rate suits all."""
