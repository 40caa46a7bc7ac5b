"""The network that the command line trains: fully connected, its hidden layers sparse or dense."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.config import DENSE, TrainConfig
from sparsekern.data import CLASSES
from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.swap import sparse_layers, sparsify_


def build(config: TrainConfig, inputs: int, method: str, seed: int) -> nn.Module:
    """The network: linear layers with ReLU between, all but the last sparse unless dense.

    Raises:
        ConfigError, ShapeError: a block is larger than a layer, or no layer comes out sparse.
        DeviceError, DtypeError, UnavailableError: the implementation can't run here.
    """
    # modules draw from the global generator when they are made; the fork leaves it as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (inputs, *config.hidden)
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            modules[f"hidden{i}"] = nn.Linear(before, after)
            modules[f"relu{i}"] = nn.ReLU()
        modules["output"] = nn.Linear(widths[-1], CLASSES)
        model: nn.Module = nn.Sequential(modules)
        if method != DENSE:
            _sparsify(model, config, seed)
    return model.to(config.device)


def first_layer_connections(model: nn.Module) -> Tensor:
    """How many connections leave each input of the first layer, (inputs,) int64 on the CPU."""
    first = next(iter(model.children()))
    if isinstance(first, SparseLayer):
        return first.mask().sum(0).cpu()
    rows, cols = cast(nn.Linear, first).weight.shape
    return torch.full((cols,), rows)


def _sparsify(model: nn.Module, config: TrainConfig, seed: int) -> None:
    sparsify_(
        model,
        config.sparsity,
        block=config.block,
        distribution=config.distribution,
        exclude=["output"],
        impl=config.impl,
        generator=torch.Generator().manual_seed(seed),
    )
    if not sparse_layers(model):
        raise ConfigError(
            f"`sparsity` must leave a hidden layer sparse; {config.sparsity} distributed by "
            f"{config.distribution!r} makes them all dense"
        )
