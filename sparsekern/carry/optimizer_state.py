"""Optimizer state follows the weights it belongs to.

State of the shape of `values`, or whose first dimension counts the active blocks (Adafactor's
factors of blocks), moves block by block; scalars, such as step counts, stay. Anything else can't be
placed and is refused: when a method is attached, by a step of a small optimizer of the same kind.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.carry.wrappers import unwrapped
from sparsekern.errors import OptimizerError
from sparsekern.nn.sharded import local, problem_with

_ROWS = 7
"""Blocks of the parameter that a trial steps; no block edge may be this long."""


class StateEntry(NamedTuple):
    """A state tensor that moves with the blocks of one layer.

    Attributes:
        state: of the parameter, where it lies.
        key: there.
        tensor: it.
        start: what it holds for a new weight, or "values" for the weight's own value.
    """

    state: MutableMapping[Any, Any]
    key: Any
    tensor: Tensor
    start: float | str


START: dict[tuple[str, str], Callable[[Mapping[str, Any]], float | str]] = {
    ("Adagrad", "sum"): lambda group: float(group.get("initial_accumulator_value", 0.0)),
    ("Rprop", "step_size"): lambda group: float(group["lr"]),
    ("Lookahead", "slow_buffer"): lambda _: "values",
    ("Lookahead", "slow_param"): lambda _: "values",
    ("Lookahead", "slow_params"): lambda _: "values",
    ("SAM", "old_p"): lambda _: "values",
    ("SGDScheduleFree", "z"): lambda _: "values",
    ("AdamWScheduleFree", "z"): lambda _: "values",
    ("RAdamScheduleFree", "z"): lambda _: "values",
    ("Prodigy", "p0"): lambda _: "values",
}
"""How optimizers start a state that is not zero at first, from the parameter's group."""


def check_followable(optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptimizerError` for LBFGS, whose flat state belongs to no single parameter."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "the optimizer's state must follow single parameters; LBFGS keeps flat state over all"
        )


def check_state(
    optimizers: Sequence[torch.optim.Optimizer], name: str, values: nn.Parameter
) -> None:
    """Check what state a layer's values have, or will have after the first step.

    An optimizer with attributes of its own is not tried out, since a step could change them: its
    state is seen when there is some.

    Raises:
        OptimizerError: it can't follow a topology update.
    """
    for optimizer in _all(optimizers):
        moving_state([optimizer], name, values)
        made = None if optimizer.state.get(values) else _trial(optimizer, values)
        if made is not None:
            twin, state = made
            for _ in _moving(state, {}, "", name, twin):
                pass


def moving_state(
    optimizers: Sequence[torch.optim.Optimizer], name: str, values: nn.Parameter
) -> list[StateEntry]:
    """The state tensors of `values` that must move with its blocks, each once.

    Args:
        optimizers: with whatever they wrap.
        name: of the layer.
        values: its parameter.

    Raises:
        OptimizerError: a state entry can't be placed.
    """
    found: dict[int, StateEntry] = {}
    for optimizer in _all(optimizers):
        state = optimizer.state.get(values)
        if not state:
            continue
        if not isinstance(state, MutableMapping):
            raise OptimizerError(f"state of layer {name!r} must be a dict; got {type(state)}")
        group = _group_of(optimizer, values) or {}
        kind = next((k for k, _ in START if _is_a(optimizer, k)), "")
        for entry in _moving(state, group, kind, name, values):
            found.setdefault(id(entry.tensor), entry)
    return list(found.values())


def _all(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    return list({id(o): o for given in optimizers for o in unwrapped(given)}.values())


def _is_a(optimizer: torch.optim.Optimizer, kind: str) -> bool:
    return any(c.__name__ == kind for c in type(optimizer).__mro__)


def _group_of(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Any] | None:
    groups = optimizer.param_groups
    return next((g for g in groups if any(p is values for p in g["params"])), None)


def _moving(
    state: MutableMapping[Any, Any],
    group: Mapping[str, Any],
    kind: str,
    name: str,
    values: Tensor,
) -> Iterator[StateEntry]:
    for key, entry in state.items():
        if isinstance(entry, Tensor) and _by_block(entry, values):
            _check_indexing(entry, key, name)
            start = START[kind, key](group) if (kind, key) in START else 0.0
            yield StateEntry(state, key, entry, start)
        elif not _is_scalar(entry):
            shape = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)[:60]
            raise OptimizerError(
                f"state {key!r} of layer {name!r} must have the shape of `values`, "
                f"{tuple(values.shape)}, or its first dimension, to follow a topology update; "
                f"got {shape}"
            )


def _by_block(entry: Tensor, values: Tensor) -> bool:
    blocks = values.dim() == 3 and entry.dim() > 0 and entry.shape[0] == values.shape[0]
    return entry.shape == values.shape or blocks


def _check_indexing(entry: Tensor, key: object, name: str) -> None:
    """A subclass may hold packed numbers, as 8-bit optimizers do, that can't be taken out."""
    if type(entry) in (Tensor, nn.Parameter):
        return
    if problem := problem_with(entry):
        raise OptimizerError(f"state {key!r} of layer {name!r} can't follow its weights: {problem}")
    try:
        held = local(entry)
        none = torch.zeros(0, dtype=torch.int64, device=held.device)
        _ = held[none]
        held.index_select(0, none)
    except Exception as error:
        raise OptimizerError(
            f"state {key!r} of layer {name!r} must be a tensor that can be indexed, to follow a "
            f"topology update; got {type(entry).__name__}: {error}"
        ) from error


def _is_scalar(entry: object) -> bool:
    if isinstance(entry, Tensor):
        return entry.numel() == 1
    return entry is None or isinstance(entry, int | float | bool | str)


# ---- what state there will be

_LATER = frozenset({"step", "_opt_called", "_step_count", "grad_scale", "found_inf"}) | {
    "_patched_by_lr_sched",
    "_need_device_dtype_check_for_fused",
    "_step_supports_amp_scaling",
}
"""Attributes that torch gives an optimizer after its making."""


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@cache
def _usual() -> frozenset[str]:
    """Attributes of every optimizer; one that has others keeps something of its own."""
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1, device="cpu"))], lr=0.1)
    return _LATER | vars(plain).keys()


def _trial(
    optimizer: torch.optim.Optimizer, values: nn.Parameter
) -> tuple[Tensor, MutableMapping[Any, Any]] | None:
    """A small parameter like `values` and its state after one step; None if that can't be told."""
    group = _group_of(optimizer, values)
    if group is None or values.is_meta or not set(vars(optimizer)) <= _usual():
        return None
    if values.dim() != 3:
        return None  # the reference; its shape is a matrix's, as ever
    rows = _ROWS + sum(values.shape[1:])
    with torch.no_grad():
        twin = nn.Parameter(local(values).detach().new_zeros(rows, *values.shape[1:]))
    twin.grad = torch.zeros_like(twin)
    trial = object.__new__(type(optimizer))
    vars(trial).update(vars(optimizer))
    fresh: dict[str, Any] = {"params": [twin]}
    fresh |= {k: _own(v) for k, v in group.items() if k != "params"}
    vars(trial).update(state=defaultdict(dict), param_groups=[fresh])
    # its hooks, which a step of a base class calls, belong to real steps
    vars(trial).update({name: OrderedDict() for name in _HOOKS})
    step: Any = inspect.unwrap(type(optimizer).step)  # no hook sees it
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            step(trial)
    except Exception:
        return None
    return twin, trial.state[twin]


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
