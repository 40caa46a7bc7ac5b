"""How a run by name is prepared: its network, what is attached to it, and what it starts from.

A name is one of `RECIPES`, one of `sparsekern.methods.METHODS`, or MODULE:CLASS for a method of
your own.
What a method does and costs is asked of the method itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsekern import tickets
from sparsekern.errors import ConfigError
from sparsekern.methods import METHODS, Method
from sparsekern.methods.loop import Loop
from sparsekern.tickets import Masks, Pruning, Scores
from sparsekern.topology.blocks import as_block
from sparsekern.training import zoo
from sparsekern.training.config import DENSE, TrainConfig
from sparsekern.training.data import Dataset, Text, batches, for_model
from sparsekern.training.network import dense_network, make_sparse, output_layer
from sparsekern.training.score import loss_of

T_END_SHARE = 0.75
"""Topology updates stop at this share of the weight steps (Evci et al. 2020)."""
MOST_WIDE = 1 << 14
"""The largest width, or sixteenths of one, that is tried."""


class Setting(NamedTuple):
    """What a recipe works with.

    Attributes:
        config: of the run.
        data: to train on, as the network takes it, on `config.device`.
        seed: of the run.
        steps: weight steps of the run.
    """

    config: TrainConfig
    data: Dataset
    seed: int
    steps: int


Attach = Callable[[nn.Module, torch.optim.Optimizer], Loop | None]


class Prepared(NamedTuple):
    """What is ready to be trained.

    Attributes:
        model: on the device.
        attach: makes the method of model and optimizer; None where there is none.
    """

    model: nn.Module
    attach: Attach = lambda _model, _optimizer: None


class Recipe(NamedTuple):
    """One way to train.

    Attributes:
        prepare: makes the network.
        sparse: whether it depends on a sparsity.
        blocks: whether it can be of blocks.
    """

    prepare: Callable[[Setting], Prepared]
    sparse: bool = True
    blocks: bool = True


def find(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ConfigError: there is none; the text says which name is close. Or a class of the user's
            does not import, or is no method.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in METHODS:
        return Recipe(partial(_method, METHODS[name]))
    module, separator, attribute = name.rpartition(":")
    if separator:
        return Recipe(partial(_method, _own(name, module, attribute)))
    known = names()
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"`method` must be one of {', '.join(known)}, or MODULE:CLASS; got {name!r}{meant}"
    )


def names() -> list[str]:
    """All names, but those of a user's own."""
    return [DENSE, *METHODS, *(name for name in RECIPES if name != DENSE)]


def _own(name: str, module: str, attribute: str) -> type[Method]:
    found = zoo.imported("method", name, module, attribute)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(
            f"`method` {name!r} must be a subclass of sparsekern.Method; got {found!r:.60}"
        )
    return found


# ---- dense, and methods on topologies


def _dense(setting: Setting) -> Prepared:
    model = dense_network(setting.config, setting.data, setting.seed)
    return Prepared(model.to(setting.config.device))


def _method(kind: type[Method], setting: Setting) -> Prepared:
    """A sparse model, at the sparsity that the method starts from."""
    config, more = setting.config, {}
    start = getattr(kind, "initial_sparsity", None)
    if start is not None:  # its number of active weights falls while it trains
        if config.sparsity <= start:
            raise ConfigError(
                f"`sparsity` of {kind.__name__} must be above the {start} that it starts from; "
                f"got {config.sparsity}"
            )
        more = {"sparsity": config.sparsity}
        distribution = getattr(kind, "initial_distribution", config.distribution)
        config = replace(config, sparsity=start, distribution=distribution)
    model = dense_network(config, setting.data, setting.seed)
    make_sparse(model, config, setting.data, setting.seed)
    return Prepared(model.to(config.device), partial(_attached, kind, setting, more))


def _attached(
    kind: type[Method],
    setting: Setting,
    more: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Method:
    return kind(
        model,
        optimizer,
        t_end=updates_end(setting.steps),
        update_freq=setting.config.update_freq,
        drop_fraction=setting.config.drop_fraction,
        seed=setting.seed,
        **more,
    )


def updates_end(steps: int) -> int:
    """Weight step that no update comes after."""
    return max(1, int(T_END_SHARE * steps))


# ---- from a dense model


def _pruning(setting: Setting) -> Prepared:
    model = dense_network(setting.config, setting.data, setting.seed)
    return Prepared(model.to(setting.config.device), partial(_prune, setting))


def _prune(setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruning:
    config = setting.config
    return Pruning(
        model,
        optimizer,
        config.sparsity,
        t_end=max(1, updates_end(setting.steps)),
        update_freq=config.update_freq,
        block=config.block,
        exclude=output_layer(model, setting.data.classes),
    )


# ---- at initialisation


def _snip(setting: Setting, model: nn.Module, exclude: list[str]) -> Masks:
    scores = tickets.snip(model, _some(setting, 1), loss_of, exclude=exclude)
    return tickets.top(scores, setting.config.sparsity)


def _grasp(setting: Setting, model: nn.Module, exclude: list[str]) -> Masks:
    scores = tickets.grasp(model, _some(setting, 2), loss_of, exclude=exclude)
    return tickets.top(scores, setting.config.sparsity)


def _synflow(setting: Setting, model: nn.Module, exclude: list[str]) -> Masks:
    if isinstance(setting.data, Text):
        raise ConfigError("synflow needs inputs that are numbers; a text's are tokens")
    sparsity, example = setting.config.sparsity, for_model(setting.data.train_x[:1])
    return tickets.top(tickets.synflow(model, example, sparsity, exclude=exclude), sparsity)


def _random(setting: Setting, model: nn.Module, exclude: list[str]) -> Masks:
    generator = torch.Generator().manual_seed(setting.seed)
    scores: Scores = tickets.random(model, exclude=exclude, generator=generator)
    return tickets.top(scores, setting.config.sparsity, setting.config.distribution)


Ticket = Callable[[Setting, nn.Module, list[str]], Masks]


def _ticket(
    chosen: Ticket, setting: Setting, *, shuffle: bool = False, fresh: bool = False
) -> Prepared:
    """Masks at initialisation, kept through training; with the network's own values or fresh ones.

    Raises:
        ConfigError: single weights are chosen, and blocks were asked for.
    """
    config, seed = setting.config, setting.seed
    if as_block(config.block) != (1, 1):
        raise ConfigError(
            f"scores at initialisation are of single weights: `block` must be 1; got {config.block}"
        )
    model = dense_network(config, setting.data, seed).to(config.device)
    masks = chosen(setting, model, output_layer(model, setting.data.classes))
    if shuffle:
        masks = tickets.shuffled(masks, torch.Generator().manual_seed(seed))
    masks = {name: mask.cpu() for name, mask in masks.items()}
    make_sparse(model.cpu(), config, setting.data, seed, masks=masks, fresh=fresh)
    return Prepared(model.to(config.device), partial(_attached, METHODS["static"], setting, {}))


def _some(setting: Setting, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches that training does not see in this order."""
    drawn = batches(setting.data, setting.config.batch_size, 2 * setting.seed + 1)
    return [next(drawn) for _ in range(count)]


# ---- baselines of another width


def _small_dense(setting: Setting) -> Prepared:
    """Dense, of at most as many parameters as the sparse net: its widest layers narrowed first."""
    config, data, seed = setting.config, setting.data, setting.seed
    sparse = make_sparse(dense_network(config, data, seed), config, data, seed)
    most = _parameters(sparse)

    def made(width: int) -> nn.Module:
        return dense_network(config, data, seed, lambda w: min(w, width))

    width = _largest(lambda width: _parameters(made(width)) <= most)
    return Prepared(made(width).to(config.device))


def _big_sparse(setting: Setting) -> Prepared:
    """Sparse and wider, of at most as many active parameters as the dense net has, by RigL.

    Widths are multiples of 1/16 of the network's.
    """
    config, data, seed = setting.config, setting.data, setting.seed
    most = _parameters(dense_network(config, data, seed))

    def made(sixteenths: int) -> nn.Module:
        return dense_network(config, data, seed, lambda w: max(1, w * sixteenths // 16))

    def active(model: nn.Module) -> int:
        found = tickets.weights(model, exclude=output_layer(model, data.classes))
        # as a distribution rounds
        left_out = sum(int(config.sparsity * weight.numel()) for weight in found.values())
        return _parameters(model) - left_out

    model = made(_largest(lambda sixteenths: active(made(sixteenths)) <= most))
    make_sparse(model, config, data, seed)
    return Prepared(model.to(config.device), partial(_attached, METHODS["rigl"], setting, {}))


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest int of at least 1 that fits, by bisection; where none does, 1."""
    low, high = 1, 2
    while high <= MOST_WIDE and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _parameters(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(p.numel() for p in model.parameters())


TICKETS: dict[str, Ticket] = {
    "random": _random,
    "snip": _snip,
    "grasp": _grasp,
    "synflow": _synflow,
}
"""At initialisation, by name: each comes with its two controls, see `RECIPES`."""

RECIPES: dict[str, Recipe] = {
    DENSE: Recipe(_dense, sparse=False, blocks=False),
    "pruning": Recipe(_pruning),
    **{name: Recipe(partial(_ticket, chosen)) for name, chosen in TICKETS.items()},
    **{f"{n}-shuffled": Recipe(partial(_ticket, c, shuffle=True)) for n, c in TICKETS.items()},
    **{f"{n}-fresh": Recipe(partial(_ticket, c, fresh=True)) for n, c in TICKETS.items()},
    "small-dense": Recipe(_small_dense, blocks=False),
    "big-sparse": Recipe(_big_sparse),
}
"""What is no method on topologies. The controls: `-shuffled` keeps a mask's numbers of weights by
layer and nothing else (Su et al. 2020), `-fresh` its connections with newly drawn values."""
