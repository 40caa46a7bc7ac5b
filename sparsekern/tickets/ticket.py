"""`Ticket`: a mask, the weights that it began with, and those that training made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.errors import CheckpointError, ConfigError, DtypeError
from sparsekern.swap.targets import Target, aliases, all_targets
from sparsekern.tickets.masks import Masks

State = dict[str, Tensor]
"""A state_dict of the dense model."""


class Ticket(NamedTuple):
    """What a round of `imp` trained. Tensors are plain, where the model is, and nobody else's.

    To train it again, truly sparsely: `model.load_state_dict(ticket.rewound)`, then
    `sk.sparsify_(model, masks=ticket.masks)`.

    Attributes:
        masks: of the weights that take part, by the names of `sparsify_`; True is active.
        rewound: state_dict of the dense model where the round began, pruned weights zero.
        trained: the same at its end.
        density: active share of the weights that take part.
        round: how often was pruned before; 0 is the dense net.
        rewind: the weight step that `rewound` is of.
        break_even: largest density at which each of the weights trains faster sparse.
        sparse: names of the weights that this round trained in sparse layers.
    """

    masks: Masks
    rewound: State
    trained: State
    density: float
    round: int
    rewind: int
    break_even: dict[str, float]
    sparse: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Everything as plain tensors by name, for `torch.save` or safetensors."""
        return {
            "round": torch.tensor(self.round),
            "rewind": torch.tensor(self.rewind),
            **{f"masks.{name}": mask for name, mask in self.masks.items()},
            **{f"rewound.{key}": tensor for key, tensor in self.rewound.items()},
            **{f"trained.{key}": tensor for key, tensor in self.trained.items()},
            **{
                f"break_even.{name}": torch.tensor(density, dtype=torch.float64)
                for name, density in self.break_even.items()
            },
            **{f"sparse.{name}": torch.tensor(name in self.sparse) for name in self.masks},
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Ticket:
        """What `tensors` gave.

        Raises:
            CheckpointError: something is missing.
        """
        kinds = ("masks", "rewound", "trained", "break_even", "sparse")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in parts and isinstance(tensor, Tensor):
                parts[kind][name] = tensor
        masks, rewound, trained, even, sparse = parts.values()
        lacking = [key for key in ("round", "rewind") if key not in tensors]
        lacking += [kind for kind in ("masks", "rewound") if not parts[kind]]
        lacking += [f"trained.{key}" for key in rewound if key not in trained]
        lacking += [f"sparse.{key}" for key in masks if key not in sparse]
        if lacking:
            raise CheckpointError(f"the tensors of a ticket must hold {', '.join(lacking)}")
        return Ticket(
            {name: mask.bool() for name, mask in masks.items()},
            rewound,
            trained,
            density_of(masks),
            int(tensors["round"]),
            int(tensors["rewind"]),
            {name: float(density) for name, density in even.items()},
            tuple(name for name, was in sparse.items() if bool(was)),
        )


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Active share of all weights that have masks."""
    active = sum(int(mask.sum()) for mask in masks.values())
    return active / sum(mask.numel() for mask in masks.values())


def state_of(model: nn.Module) -> State:
    """A copy of its state_dict.

    Raises:
        ConfigError: a module keeps extra state that is no tensor.
    """
    state = model.state_dict()
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ConfigError(f"the state of `model` must be tensors; {odd} are none")
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def targets_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Target]:
    """The model's dense weights that the masks name.

    Raises:
        ConfigError: one of the names is that of no dense weight, or a mask has another shape.
        DtypeError: a mask is no tensor.
    """
    known = {target.name: target for target in all_targets(model)}
    for name, mask in masks.items():
        if name not in known:
            raise ConfigError(f"{name!r} is no dense weight of `model`; these are {sorted(known)}")
        if not isinstance(mask, Tensor):
            raise DtypeError(f"the mask of {name!r} must be a tensor; got {type(mask).__name__}")
        if tuple(mask.shape) != known[name].shape:
            raise ConfigError(
                f"the mask of {name!r} must have shape {known[name].shape}; got {tuple(mask.shape)}"
            )
    return {name: known[name] for name in masks}


def keys_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """The key of each weight in the state_dict.

    Raises:
        ConfigError, DtypeError: as in `targets_of`, or a weight is a part of a parameter.
    """
    names = {id(p): key for key, p in model.named_parameters(remove_duplicate=False)}
    found = {}
    for name, target in targets_of(model, masks).items():
        key = names.get(id(target.weight.parameter))
        if key is None:
            called = ", ".join(aliases(model, target))
            raise ConfigError(f"{called} is a part of a parameter, which has no mask of its own")
        found[name] = key
    return found


def masked(state: Mapping[str, Tensor], masks: Masks, keys: Mapping[str, str]) -> State:
    """A copy of a state with zeros where masks are False."""
    by_key = {keys[name]: mask for name, mask in masks.items()}
    return {
        key: tensor.masked_fill(~by_key[key], 0) if key in by_key else tensor.clone()
        for key, tensor in state.items()
    }
