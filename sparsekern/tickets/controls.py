"""What a ticket must beat: its mask with fresh values, other masks with its values.

A ticket that is no better than its controls is none (Frankle & Carbin 2019; Ma et al. 2021, "Sanity
checks for lottery tickets").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError
from sparsekern.methods.schedule import check_int
from sparsekern.nn.init import as_gain, draw_uniform_
from sparsekern.tickets.masks import Masks, largest, shuffled
from sparsekern.tickets.rounds import Train, run_round, worth
from sparsekern.tickets.ticket import State, Ticket, keys_of, masked, targets_of
from sparsekern.topology.sampling import check_generator


class Start(NamedTuple):
    """Where the training of a control begins.

    Attributes:
        masks: what is active.
        state: state_dict of the dense model, pruned weights zero.
        step: weight step that it is of.
    """

    masks: Masks
    state: State
    step: int


class _Asked(NamedTuple):
    model: nn.Module
    dense: Ticket
    ticket: Ticket
    gain: float
    generator: torch.Generator | None


def control(
    name: str,
    model: nn.Module,
    dense: Ticket,
    ticket: Ticket,
    *,
    gain: float | str | None = None,
    generator: torch.Generator | None = None,
) -> Start:
    """The start of a control, as dense as a ticket. What has no mask is as in the dense net then.

    Args:
        name: "fresh_dense": the ticket's mask, weights drawn as a dense layer's. "fresh_sparse":
            the same, scaled by the active inputs of each neuron. "shuffled": as many weights of
            each layer in random places, with the values of the dense net there. "one_shot": the
            largest weights of the dense training, at once. "random": connections by chance over
            all layers together.
        model: dense, as given to `imp`.
        dense: the first ticket of `imp`.
        ticket: the one in question.
        gain: of fresh values: standard deviation times the root of the inputs; see `sparsify_`.
        generator: of random connections and values.

    Raises:
        ConfigError: the name or the gain is unknown, `dense` is pruned, or the tickets are of
            another model or not of one another.
        DtypeError: `generator` is no torch.Generator.
    """
    if name not in CONTROLS:
        raise ConfigError(f"`name` must be one of {tuple(CONTROLS)}; got {name!r}")
    check_generator(generator)
    if dense.round != 0:
        raise ConfigError(f"`dense` must be the first ticket of imp; got that of {dense.round}")
    if dense.masks.keys() != ticket.masks.keys() or dense.rewind != ticket.rewind:
        raise ConfigError("`dense` and `ticket` must come from one sequence of tickets")
    keys = keys_of(model, ticket.masks)
    asked = _Asked(model, dense, ticket, as_gain(gain), generator)
    masks, values = CONTROLS[name](asked)
    state = dense.rewound | {keys[own]: tensor for own, tensor in values.items()}
    return Start(masks, masked(state, masks, keys), ticket.rewind)


def retrain(
    model: nn.Module, train: Train, start: Start, steps: int, sparse_below: float = 0.0
) -> State:
    """The state_dict of the dense model after training from a start, masks held.

    Args:
        model: dense; a copy is trained.
        train: see `imp`.
        start: from `control`.
        steps: weight steps of a whole training.
        sparse_below: density up to which a layer is trained sparsely.

    Raises:
        ConfigError: masks do not fit the model, or the start is not before `steps`.
        TrainingLoopError: `train` moved pruned weights.
    """
    check_int("steps", steps, start.step + 1)
    sparse = worth(model, start.masks, dict.fromkeys(start.masks, sparse_below))
    span = [(start.step, steps)]
    return run_round(model, start.state, start.masks, train, span, sparse)[0]


# ---- each control: masks, and new values by name


def _fresh_dense(asked: _Asked) -> tuple[Masks, dict[str, Tensor]]:
    whole = {name: torch.ones_like(mask) for name, mask in asked.ticket.masks.items()}
    return asked.ticket.masks, _drawn(asked, whole)


def _fresh_sparse(asked: _Asked) -> tuple[Masks, dict[str, Tensor]]:
    return asked.ticket.masks, _drawn(asked, asked.ticket.masks)


def _shuffled(asked: _Asked) -> tuple[Masks, dict[str, Tensor]]:
    return shuffled(asked.ticket.masks, asked.generator), {}


def _one_shot(asked: _Asked) -> tuple[Masks, dict[str, Tensor]]:
    keys = keys_of(asked.model, asked.ticket.masks)
    scores = {name: asked.dense.trained[key].abs() for name, key in keys.items()}
    return largest(scores, _active(asked.ticket)), {}


def _random(asked: _Asked) -> tuple[Masks, dict[str, Tensor]]:
    scores = {
        name: torch.rand(mask.shape, generator=asked.generator).to(mask.device)
        for name, mask in asked.ticket.masks.items()
    }
    return largest(scores, _active(asked.ticket)), {}


CONTROLS: Mapping[str, Callable[[_Asked], tuple[Masks, dict[str, Tensor]]]] = {
    "fresh_dense": _fresh_dense,
    "fresh_sparse": _fresh_sparse,
    "shuffled": _shuffled,
    "one_shot": _one_shot,
    "random": _random,
}
"""By name; see `control`."""


def _active(ticket: Ticket) -> int:
    return sum(int(mask.sum()) for mask in ticket.masks.values())


def _drawn(asked: _Asked, counted: Masks) -> dict[str, Tensor]:
    """U(-b, b), with standard deviation gain / sqrt(inputs of the neuron in `counted`)."""
    values = {}
    for name, target in targets_of(asked.model, counted).items():
        weight = target.weight
        inputs = weight.as_matrix(counted[name]).sum(1).clamp(min=1).double()
        bound = asked.gain * (3 / inputs).sqrt()
        like = torch.empty_like(weight.parameter, requires_grad=False)
        along = (1, -1) if weight.transposed else (-1, *[1] * (like.dim() - 1))
        values[name] = draw_uniform_(like, asked.generator).mul_(bound.to(like.dtype).view(along))
    return values
