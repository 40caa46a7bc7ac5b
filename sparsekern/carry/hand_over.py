"""An optimizer that exists already takes up other parameters, with the state of the old ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.carry.optimizer_state import check_followable
from sparsekern.carry.wrappers import unwrapped
from sparsekern.errors import DtypeError, OptimizerError

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
Undo = list[Callable[[], object]]
"""What takes back what has been done, oldest first; each can be called twice."""

_PARTITIONED = ("ZeroRedundancyOptimizer", "DistributedOptimizer")


class Moved(NamedTuple):
    """A parameter that another one replaces; the same one if only its name changes.

    Attributes:
        layer: whose it is, for messages.
        names: in the model, before and after.
        old: that the optimizer holds.
        new: that it is to hold.
        move: a tensor of the old one's shape as one of the new one's, in memory of its own.
    """

    layer: str
    names: tuple[str, str]
    old: nn.Parameter
    new: nn.Parameter
    move: Callable[[Tensor], Tensor]


class HandOver(NamedTuple):
    """What is to be written into optimizers: all of it is computed.

    Attributes:
        lists: each with what it is to hold: parameters of a group, and their names.
        states: of optimizers, with the parameters that leave and what comes.
    """

    lists: tuple[tuple[list[Any], list[Any]], ...] = ()
    states: tuple[tuple[Any, tuple[nn.Parameter, ...], dict[nn.Parameter, Any]], ...] = ()

    @property
    def moves_state(self) -> bool:
        """Whether there is state to move."""
        return any(coming for _, _, coming in self.states)


def as_optimizers(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """None, one optimizer or several, with all that they wrap.

    Raises:
        DtypeError: something else.
        OptimizerError: one whose state can't be handed over.
    """
    if optimizer is None:
        return ()
    several = optimizer if isinstance(optimizer, list | tuple) else (optimizer,)
    found: list[torch.optim.Optimizer] = []
    for one in several:
        if not isinstance(one, torch.optim.Optimizer):
            raise DtypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(one).__name__}"
            )
        found += [o for o in unwrapped(one) if not any(o is known for known in found)]
    for one in found:
        check_followable(one)
        if any(kind.__name__ in _PARTITIONED for kind in type(one).__mro__):
            raise OptimizerError(
                f"a {type(one).__name__} has shared its parameters out over ranks: build it after "
                "the model has been changed"
            )
    return tuple(found)


def prepare(
    optimizers: Sequence[torch.optim.Optimizer], moves: Sequence[Moved], staying: Collection[int]
) -> HandOver:
    """Compute what the optimizers are to hold; changes nothing.

    Groups keep their options and order. State of a parameter's shape is moved; scalars, such as
    step counts, stay.

    Args:
        optimizers: as `as_optimizers` gives them.
        moves: the parameters that change.
        staying: ids of old parameters that the model goes on to hold elsewhere.

    Raises:
        OptimizerError: none of the old parameters is held, or a state can't be moved.
    """
    if not optimizers:
        return HandOver()
    changed = [m for m in moves if m.old is not m.new]
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if changed and held.isdisjoint(id(m.old) for m in changed):
        raise OptimizerError(
            f"the optimizer must hold weights of the model; it holds none of layers "
            f"{', '.join(dict.fromkeys(m.layer for m in changed))}"
        )
    return HandOver(
        tuple(_lists(optimizers, moves, staying)), tuple(_states(optimizers, changed, staying))
    )


def commit(made: HandOver, undo: Undo) -> None:
    """Write it, by what can't fail; what takes it back is put on `undo` first."""
    for items, new in made.lists:
        undo.append(_restoring_list(items, list(items)))
        items[:] = new
    for state, leaving, coming in made.states:
        undo.append(_restoring_state(state, leaving, coming))
        state.update(coming)
        for parameter in leaving:
            state.pop(parameter, None)


@contextmanager
def undoing() -> Iterator[Undo]:
    """Take back what was done, whatever breaks it off; the exception is raised on."""
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        _take_back(undo)
        raise


def _take_back(undo: Undo) -> None:
    """All of it, also when a signal comes in between: a step can be taken twice."""
    while undo:
        try:
            undo[-1]()
            undo.pop()
        except KeyboardInterrupt:
            continue


def _restoring_list(items: list[Any], old: list[Any]) -> Callable[[], object]:
    def restore() -> None:
        items[:] = old

    return restore


def _restoring_state(
    state: Any, leaving: Sequence[nn.Parameter], coming: dict[nn.Parameter, Any]
) -> Callable[[], object]:
    old = {parameter: state[parameter] for parameter in leaving if parameter in state}

    def restore() -> None:
        for parameter in coming:
            state.pop(parameter, None)
        state.update(old)

    return restore


# ---- what is to be written


def _lists(
    optimizers: Sequence[torch.optim.Optimizer], moves: Sequence[Moved], staying: Collection[int]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Each group's parameters and names, once: a wrapper may share them with what it wraps."""
    by_old: dict[int, list[Moved]] = {}
    for move in moves:
        by_old.setdefault(id(move.old), []).append(move)
    done: set[int] = set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        params, names = group["params"], group.get("param_names")
        if id(params) in done:
            continue
        done |= {id(params), id(names)}
        new_params, new_names = [], []
        for i, parameter in enumerate(params):
            own = by_old.get(id(parameter), [])
            name = names[i] if names else ""
            if not own or (id(parameter) in staying and own[0].new is not parameter):
                new_params.append(parameter)
                new_names.append(name)
            new_params += [move.new for move in own]
            new_names += [_renamed(name, move) for move in own]
        yield params, new_params
        if names:
            yield names, new_names


def _renamed(name: str, move: Moved) -> str:
    """A name that may have a prefix before the model's own."""
    before, after = move.names
    return name.removesuffix(before) + after if name.endswith(before) else after


def _states(
    optimizers: Sequence[torch.optim.Optimizer], changed: Sequence[Moved], staying: Collection[int]
) -> Iterator[tuple[Any, tuple[nn.Parameter, ...], dict[nn.Parameter, Any]]]:
    done: set[int] = set()
    for state in (optimizer.state for optimizer in optimizers):
        if id(state) in done:
            continue
        done.add(id(state))
        own = [move for move in changed if move.old in state]
        coming: dict[nn.Parameter, Any] = {move.new: _moved(move, state[move.old]) for move in own}
        leaving = tuple(move.old for move in own if id(move.old) not in staying)
        yield state, leaving, coming


def _moved(move: Moved, entries: Any) -> Any:
    """The state of one parameter, moved."""
    if not isinstance(entries, dict):
        raise OptimizerError(
            f"state of layer {move.layer!r} must be a dict to be handed over; got "
            f"{type(entries).__name__}"
        )
    return {key: _entry(move, key, entry) for key, entry in entries.items()}


def _entry(move: Moved, key: Any, entry: Any) -> Any:
    if isinstance(entry, Tensor) and entry.shape == move.old.shape:
        with torch.no_grad():
            return move.move(entry.detach())
    if isinstance(entry, Tensor) and entry.numel() == 1:
        return entry.clone()
    if entry is None or isinstance(entry, int | float | bool | str):
        return entry
    got = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)[:60]
    raise OptimizerError(
        f"state {key!r} of layer {move.layer!r} must have the parameter's shape "
        f"{tuple(move.old.shape)} to be handed over; got {got}"
    )
