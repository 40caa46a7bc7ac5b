"""How far a method has come, as plain data, and its place in an optimizer's `state_dict`.

Whoever saves an optimizer saves the method with it: an entry of its first parameter group. That is
what survives torch.save, torch.distributed.checkpoint and ZeRO's consolidation, where another key
at the top of the state is dropped. An attached optimizer holds the entry at all times, without the
history: what flattens a state asks the group which keys it has, and a pickled optimizer has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.methods import trace as traces
from sparsekern.methods.change import LayerChange, UpdateRecord
from sparsekern.methods.trace import Trace
from sparsekern.nn.facts import TopologyFacts

ENTRY = "sparsekern"
"""The key in an optimizer's first parameter group."""

NEEDED = ("weight_steps", "last_update")


class Progress(NamedTuple):
    """What a method needs to go on; topologies and values are in the model.

    Attributes:
        weight_steps: taken so far.
        last_update: weight step of the last update, or None.
        history: of all updates; None where it is not known.
        connections: digest of all topologies that the optimizer's state belongs to, or None.
        own: tensors of the method's own, by name, such as SNFS's momentum; empty for most.
        trace: the start, and what was explored; None where it was not kept.
    """

    weight_steps: int
    last_update: int | None
    history: list[UpdateRecord] | None
    connections: str | None = None
    own: Mapping[str, Tensor] = {}
    trace: Trace | None = None


def encode(progress: Progress) -> dict[str, Any]:
    """As plain data, and tensors if it has some; random streams follow from the weight step."""
    history = [
        [record.step, record.fraction, {n: _plain(c) for n, c in record.layers.items()}]
        for record in progress.history or ()
    ]
    own = {"own": dict(progress.own)} if progress.own else {}
    trace = {} if progress.trace is None else {"trace": traces.encode(progress.trace)}
    return {**short(progress), "history": history, **own, **trace}


def _plain(change: LayerChange) -> list[Any]:
    facts = None if change.facts is None else list(change.facts)
    return [*change[:2], facts, *change[3:]]


def short(progress: Progress) -> dict[str, Any]:
    """Without the history."""
    return {"weight_steps": progress.weight_steps, "last_update": progress.last_update}


def entry(progress: Progress) -> dict[str, Any]:
    """For an optimizer's state: the history is one string, which nothing takes apart or averages.

    Its keys are the same at every step, as torch.distributed.checkpoint needs them to be.
    """
    encoded = encode(progress)
    trace = encoded.pop("trace", None)
    updates = encoded["history"]
    history = json.dumps(updates if trace is None else {"updates": updates, "trace": trace})
    return encoded | {"history": history, "connections": progress.connections}


def decode(state: object) -> Progress:
    """What `encode` or `entry` made; states without a history are read too.

    Raises:
        ConfigError: keys are missing or unknown, or a value is not what it should be.
    """
    keys = sorted(map(str, state)) if isinstance(state, Mapping) else state
    known = {*NEEDED, "history", "connections", "own", "trace"}
    if not isinstance(state, Mapping) or not (set(NEEDED) <= set(state) <= known):
        raise ConfigError(
            f"method state must have keys weight_steps, last_update and history; got {keys!r}"
        )
    steps, last = state["weight_steps"], state["last_update"]
    if not (_is_count(steps) and (last is None or (_is_count(last) and last <= steps))):
        raise ConfigError(
            "method state must hold step counts, the last update's no larger than weight_steps; "
            f"got weight_steps={steps!r}, last_update={last!r}"
        )
    connections = state.get("connections")
    if not isinstance(connections, str | None):
        raise ConfigError(
            f"`connections` of a method state must be a digest; got {connections!r:.60}"
        )
    history: Any = _read(state.get("history"))
    trace = state.get("trace")
    if isinstance(history, Mapping):  # of an optimizer
        history, trace = history.get("updates", 0), history.get("trace")
    return Progress(
        steps,
        last,
        None if history is None else _history(history),
        connections,
        _own(state.get("own", {})),
        None if trace is None else traces.decode(trace),
    )


def find(chains: Iterable[Sequence[torch.optim.Optimizer]]) -> object:
    """The entry of the first optimizer that has one, else None."""
    for chain in chains:
        for optimizer in chain:
            if (found := in_group(optimizer.param_groups)) is not None:
                return found
    return None


def in_group(groups: Sequence[Mapping[str, Any]]) -> object:
    """The entry of parameter groups, or None."""
    return groups[0].get(ENTRY) if groups else None


def _own(data: object) -> dict[str, Tensor]:
    if not (isinstance(data, Mapping) and all(isinstance(t, Tensor) for t in data.values())):
        raise ConfigError(f"`own` of a method state must hold tensors by name; got {data!r:.80}")
    return {str(name): tensor for name, tensor in data.items()}


def _read(data: object) -> Any:
    """Of an optimizer's state, where it is one string; with it goes the trace."""
    try:
        return json.loads(data) if isinstance(data, str) else data
    except (ValueError, RecursionError):
        return data


def _history(records: Any) -> list[UpdateRecord]:
    try:
        read = [_record(*record) for record in records]
    except (TypeError, ValueError, AttributeError, RecursionError):
        read = [None]
    if None in read:
        raise ConfigError(
            "`history` of a method state must be a list of [weight step, fraction, "
            f"{{layer: [dropped, grown, ...]}}]; got {str(records)[:80]}"
        )
    return [record for record in read if record is not None]


def _record(step: object, fraction: object, layers: Mapping[str, Any]) -> UpdateRecord | None:
    changes = {name: _change(*change) for name, change in layers.items()}
    good = _is_count(step) and None not in changes.values() and all(map(_is_name, changes))
    if not (good and isinstance(fraction, int | float) and 0 <= fraction <= 1):
        return None
    return UpdateRecord(step, float(fraction), changes)  # type: ignore[arg-type]


def _change(
    dropped: object,
    grown: object,
    facts: Any = None,
    overlap: object = None,
    explored: object = None,
    blocks: object = None,
) -> LayerChange | None:
    figures = None if facts is None else TopologyFacts(*facts)
    shares = [share for share in (overlap, explored) if share is not None]
    counts = [n for n in (blocks, *(figures or ())) if n is not None]  # newer ones
    good = all(map(_is_count, (dropped, grown, *counts)))
    if not (good and all(isinstance(s, int | float) and 0 <= s <= 1 for s in shares)):
        return None
    return LayerChange(dropped, grown, figures, overlap, explored, blocks)  # type: ignore[arg-type]


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
