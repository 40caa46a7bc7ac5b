"""The network that the command line trains, dense or sparse: fully connected, or a named model."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError
from sparsekern.swap import sparse_layers, sparsify_
from sparsekern.training import zoo
from sparsekern.training.config import DENSE, TrainConfig
from sparsekern.training.data import CLASSES, Dataset, Images
from sparsekern.training.topology_frames import counts, first_layer


def shaped(config: TrainConfig, data: Dataset) -> Dataset:
    """The data as the model takes it: images as (n, channels, height, width), or rows of pixels.

    Raises:
        ConfigError: the model's name leads to no function.
    """
    if not isinstance(data, Images):
        return data
    data = replace(data, augmented=config.augment)
    if config.model is None:
        return data
    return data.with_channel() if zoo.takes_images(zoo.find(config.model)) else data


def build(config: TrainConfig, data: Dataset, method: str, seed: int) -> nn.Module:
    """The network, all but its output layer sparse unless dense.

    Args:
        config: names the model, or the widths of the fully connected net.
        data: as `shaped` gives it.
        method: "dense", or any other for sparse layers.
        seed: of values and connections.

    Raises:
        ConfigError, ShapeError: the model does not exist or does not fit the data, a block is
            larger than a layer, or no layer comes out sparse.
        DeviceError, DtypeError, UnavailableError: the implementation can't run here.
    """
    # modules draw from the global generator when they are made; the fork leaves it as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model is not None:
            model = zoo.make(config.model, data)
        else:
            model = _fully_connected((data.train_x.shape[1], *config.hidden))
        if method != DENSE:
            _sparsify(model, config, data.classes, seed)
    return model.to(config.device)


def first_layer_connections(model: nn.Module, data: Dataset) -> Tensor | None:
    """How many connections leave each pixel, (pixels,) int64 on the CPU.

    None unless the first layer that holds weights is fully connected to the image.
    """
    if not isinstance(data, Images) or (first := first_layer(model, data.inputs)) is None:
        return None
    return counts(first)[0].view(data.channels, -1).sum(0)


def _fully_connected(widths: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
        modules[f"hidden{i}"] = nn.Linear(before, after)
        modules[f"relu{i}"] = nn.ReLU()
    modules["output"] = nn.Linear(widths[-1], CLASSES)
    return nn.Sequential(modules)


def _output_layer(model: nn.Module, classes: int) -> list[str]:
    """Name of the last linear layer, if it is the one that scores the classes."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, m in linear[-1:] if m.out_features == classes]


def _sparsify(model: nn.Module, config: TrainConfig, classes: int, seed: int) -> None:
    sparsify_(
        model,
        config.sparsity,
        block=config.block,
        distribution=config.distribution,
        exclude=_output_layer(model, classes),
        impl=config.impl,
        generator=torch.Generator().manual_seed(seed),
    )
    if not sparse_layers(model):
        raise ConfigError(
            f"`sparsity` must leave a hidden layer sparse; {config.sparsity} distributed by "
            f"{config.distribution!r} makes them all dense"
        )
