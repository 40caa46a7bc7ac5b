"""An optimizer's state by the names of its parameters, so that their order does not matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import CheckpointError, DtypeError

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def as_tuple(optimizer: Optimizers | None) -> tuple[torch.optim.Optimizer, ...]:
    """None, one or several."""
    if optimizer is None:
        return ()
    found = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise DtypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(one).__name__}"
            )
    return found


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of each group's parameters.

    Raises:
        CheckpointError: one is none of the model's.
    """
    known = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        names = [known.get(id(p)) for p in group["params"]]
        foreign = names.count(None)
        if foreign:
            raise CheckpointError(
                f"the optimizer must hold parameters of the model; group {number} has {foreign} "
                "others (build it after sparsify_, or after loading)"
            )
        groups.append([name for name in names if name is not None])
    return groups


def packed(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Its class, its parameters' names and its state, for `tree.encode`."""
    return {
        "class": type(optimizer).__name__,
        "names": names_of(optimizer, model),
        "state": dict(optimizer.state_dict()),
    }


def unpacked(saved: Any, optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """A state_dict for `optimizer`, its parameters put into the order that they have here.

    Raises:
        CheckpointError: it is not the state of such an optimizer over these parameters.
    """
    if not isinstance(saved, dict) or set(saved) != {"class", "names", "state"}:
        raise CheckpointError("the state of an optimizer must have class, names and state")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the file holds the state of {str(saved['class'])[:60]}, not of "
            f"{type(optimizer).__name__}"
        )
    here, state = names_of(optimizer, model), saved["state"]
    there = saved["names"]
    if not _are_names(there) or [sorted(g) for g in there] != [sorted(g) for g in here]:
        raise CheckpointError(
            f"the file's optimizer must hold the same parameters in the same groups; "
            f"it holds {str(there)[:300]}, this one {str(here)[:300]}"
        )
    _check_parts(state, there)
    numbers = [
        dict(zip(names, group["params"], strict=True))
        for names, group in zip(there, state["param_groups"], strict=True)
    ]
    groups = []
    for names, by_name, group in zip(here, numbers, state["param_groups"], strict=True):
        groups.append({**group, "params": [by_name[name] for name in names]})
    parameters = {
        number: p
        for saved_group, group in zip(groups, optimizer.param_groups, strict=True)
        for number, p in zip(saved_group["params"], group["params"], strict=True)
    }
    for number, entries in state["state"].items():
        if type(number) is int and number in parameters:
            _check_entries(entries, parameters[number], optimizer)
        elif _is_torchs(optimizer):  # others may keep what belongs to no parameter
            raise CheckpointError(f"the state of {str(number)[:60]!r} belongs to no parameter")
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        _check_options(group, own)
    return {**state, "param_groups": groups}


def _are_names(groups: Any) -> bool:
    return isinstance(groups, list) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    )


def _check_parts(state: Any, names: list[list[str]]) -> None:
    """A dict of states by number, and groups of as many parameters as there are names."""
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("state"), dict)
        or not isinstance(state.get("param_groups"), list)
        or not all(
            isinstance(group, dict) and isinstance(group.get("params"), list)
            for group in state["param_groups"]
        )
        or [len(g["params"]) for g in state["param_groups"]] != [len(g) for g in names]
    ):
        raise CheckpointError("the state of an optimizer must have state and param_groups")
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if not all(type(n) is int for n in numbers) or len(set(numbers)) < len(numbers):
        raise CheckpointError("the parameters of an optimizer's state must be different numbers")


def _check_entries(entries: Any, parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """State tensors of torch's optimizers have the parameter's shape, or 1 in its place."""
    if not isinstance(entries, dict):
        raise CheckpointError(f"a parameter's state must be a dict; got {type(entries).__name__}")
    if not _is_torchs(optimizer):
        return
    if isinstance(optimizer, torch.optim.LBFGS):  # flat, over all parameters
        return
    for key, entry in entries.items():
        if not isinstance(entry, Tensor):
            if entry is not None and not (key == "step" and isinstance(entry, int | float)):
                raise CheckpointError(
                    f"state {str(key)[:60]!r} must be a tensor; got {str(entry)[:60]!r}"
                )
            continue
        like = entry.dim() == parameter.dim() and all(
            size in (1, own) for size, own in zip(entry.shape, parameter.shape, strict=True)
        )
        if not like and entry.dim():
            raise CheckpointError(
                f"state {str(key)[:60]!r} must fit its parameter of shape "
                f"{tuple(parameter.shape)}; got {tuple(entry.shape)}"
            )


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _check_options(group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Options are of the kind that they have here."""
    for key, now in own.items():
        if key not in group or key == "params":
            continue
        came = group[key]
        number = isinstance(now, int | float) and not isinstance(now, bool)
        scalar = isinstance(came, Tensor) and came.numel() == 1
        if number and not scalar and (isinstance(came, bool) or not isinstance(came, int | float)):
            raise CheckpointError(f"option {key!r} must be a number; got {str(came)[:60]!r}")
        if isinstance(now, tuple) and (not isinstance(came, tuple) or len(came) != len(now)):
            raise CheckpointError(f"option {key!r} must be like {now}; got {str(came)[:60]!r}")


def kept(optimizer: torch.optim.Optimizer) -> Any:
    """A function that puts an optimizer back to what it is now."""
    groups, state = list(optimizer.param_groups), optimizer.state.copy()
    told = optimizer.state_dict()
    options = [dict(group) for group in groups]
    held = {key: dict(entries) for key, entries in state.items()}

    def restore() -> None:
        optimizer.load_state_dict(told)  # whoever listens, as methods do, goes back with it
        for group, was in zip(groups, options, strict=True):
            group.clear()
            group.update(was)
        optimizer.param_groups[:] = groups
        optimizer.state.clear()
        optimizer.state.update(held)

    return restore
