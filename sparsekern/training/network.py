"""The network that the command line trains, dense or sparse: fully connected, or a named model."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError
from sparsekern.swap import sparse_layers, sparsify_, summary
from sparsekern.training import zoo
from sparsekern.training.config import DENSE, TrainConfig
from sparsekern.training.data import CLASSES, Dataset, Images
from sparsekern.training.topology_frames import counts, first_layer

Widths = Callable[[int], int]
"""From the width of a layer, another one."""


def shaped(config: TrainConfig, data: Dataset) -> Dataset:
    """The data as the model takes it: images as (n, channels, height, width), or rows of pixels.

    Raises:
        ConfigError: the model's name leads to no function.
    """
    if not isinstance(data, Images):
        return data
    if config.augment:
        data = replace(data, augmented=True)
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
    model = dense_network(config, data, seed)
    if method != DENSE:
        make_sparse(model, config, data, seed)
    return model.to(config.device)


def dense_network(
    config: TrainConfig, data: Dataset, seed: int, other: Widths | None = None
) -> nn.Module:
    """The network on the CPU, before anything of it is sparse.

    Args:
        config: as in `build`.
        data: as in `build`.
        seed: of the values.
        other: changes the widths of its hidden layers.

    Raises:
        ConfigError: as in `build`, or nothing says how wide its layers are.
    """
    # modules draw from the global generator when they are made; the fork leaves it as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model is None:
            hidden = config.hidden if other is None else tuple(map(other, config.hidden))
            model = _fully_connected((data.train_x.shape[1], *hidden))
        else:
            given = {} if other is None else _changed(config.model, other)
            model = zoo.make(config.model, data, given)
    return model


def make_sparse(
    model: nn.Module,
    config: TrainConfig,
    data: Dataset,
    seed: int,
    *,
    masks: Mapping[str, Tensor] | None = None,
    fresh: bool = False,
) -> nn.Module:
    """Make all but its output layer sparse, in place.

    Args:
        model: dense, on the CPU.
        config: sparsity, block, distribution and implementation.
        data: what it predicts.
        seed: of connections and values.
        masks: connections, instead of a sparsity.
        fresh: draw new values where there are `masks`.

    Raises:
        ConfigError, ShapeError: a block is larger than a layer, or no layer comes out sparse.
        DeviceError, DtypeError, UnavailableError: the implementation can't run here.
    """
    draws = masks is None or fresh
    how: dict[str, Any] = {"init": "sparse", "gain": config.gain} if draws else {}
    if masks is None:
        how |= {"sparsity": config.sparsity, "distribution": config.distribution}
        how |= {"exclude": output_layer(model, data.classes)}
    else:
        how |= {"masks": masks, "filter_fn": lambda _module, _name: True}
    generator = torch.Generator().manual_seed(seed)
    sparsify_(model, block=config.block, impl=config.impl, generator=generator, **how)
    if not sparse_layers(model):
        why = "; ".join(f"{name}: {reason}" for name, reason in summary(model).dense.items())
        raise ConfigError(
            f"`sparsity` must leave a hidden layer sparse; {config.sparsity} distributed by "
            f"{config.distribution!r} in blocks of {config.block} makes them all dense ({why})"
        )
    return model


def output_layer(model: nn.Module, classes: int) -> list[str]:
    """Name of the last linear layer, if it is the one that scores the classes."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, m in linear[-1:] if m.out_features == classes]


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


def _changed(model: str, other: Widths) -> dict[str, tuple[int, ...]]:
    found = zoo.widths(model)
    if not found:
        raise ConfigError(
            f"a net of another width needs a model whose function has a parameter "
            f"{' or '.join(map(repr, zoo.WIDTHS))}; {model!r} has none"
        )
    return {name: tuple(map(other, widths)) for name, widths in found.items()}
