"""One topology update of all layers: what was decided, and its making."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.carry.rewire import Carried, carried, rewired
from sparsekern.carry.transaction import Write, commit
from sparsekern.methods import ranks
from sparsekern.methods.trace import Trace, explored, overlap, traced
from sparsekern.methods.update import TopologyUpdate
from sparsekern.nn import SparseLayer
from sparsekern.nn.facts import TopologyFacts, facts_of
from sparsekern.ops.ranges import ranged


class LayerChange(NamedTuple):
    """One layer's part in a topology update, in blocks.

    Attributes:
        dropped: dropped, those grown again at once included.
        grown: those that were not active before.
        facts: of the new topology: live neurons, fan-in; None in histories of before they were
            kept.
        overlap: share of the blocks before the first update that are active in it; None where that
            is not known.
        explored: share of all places that were active until now, those just grown included; None
            unless the method was made with `exploration=True`.
        blocks: active after it; None in histories of before they were kept.
    """

    dropped: int
    grown: int
    facts: TopologyFacts | None = None
    overlap: float | None = None
    explored: float | None = None
    blocks: int | None = None


class UpdateRecord(NamedTuple):
    """What one topology update did, and at which weight step."""

    step: int
    fraction: float
    layers: dict[str, LayerChange]


class Decision(NamedTuple):
    """What is to happen to one layer.

    Attributes:
        update: the new topology, and where its blocks come from.
        dropped: how many blocks are dropped.
        values: (update.grown, bh, bw) of the new blocks, in CSR order; None for zeros.
    """

    update: TopologyUpdate
    dropped: int
    values: Tensor | None


def change(
    layers: Mapping[str, SparseLayer],
    decisions: Mapping[str, Decision],
    optimizers: Sequence[torch.optim.Optimizer],
    twins: Mapping[str, Sequence[SparseLayer]],
    trace: Trace,
    then: Callable[[dict[str, LayerChange], Trace], Iterable[Write]],
) -> None:
    """Rewire the layers: values, optimizer state and averages follow their weights, all or nothing.

    Everything is computed before anything is written. What breaks in between, a signal too, is
    raised on, and leaves the layers as they were. Layers keep their memory where their number of
    active blocks stays; where it changes, the parameter stays the same object.

    Args:
        layers: by name.
        decisions: what is to happen to them.
        optimizers: whose state follows.
        twins: layers of averages that hold the same topology, for each layer.
        trace: of the layers until now.
        then: from what each layer did and the trace after it, what else is to be written with it.

    Raises:
        OptimizerError: a state can't follow; nothing has changed then.
    """
    moving, (changes, traced_now) = ranks.together(
        lambda: (
            [carried(n, layers[n], optimizers, twins.get(n, ())) for n in decisions],
            _described(layers, decisions, trace),
        ),
        "follow a topology update",
    )
    if any(one.sharded for one in moving):
        writes = _gathered(moving, decisions)
    else:
        writes = ranks.together(
            lambda: [write for one in moving for write in _rewired(one, one.whole(), decisions)],
            "prepare a topology update",
        )
    writes += then(changes, traced_now)
    commit(writes)


def _described(
    layers: Mapping[str, SparseLayer], decisions: Mapping[str, Decision], trace: Trace
) -> tuple[dict[str, LayerChange], Trace]:
    """What each layer does, and the trace after it."""
    with ranged("describe"):
        new = {name: decision.update.topology for name, decision in decisions.items()}
        now = traced(trace, layers, new)
        changes = {}
        for (name, decision), facts in zip(decisions.items(), facts_of(new.values()), strict=True):
            topology, counts = new[name], (decision.dropped, decision.update.grown)
            shares = overlap(now, name, topology), explored(now, name, topology)
            changes[name] = LayerChange(*counts, facts, *shares, topology.nnzb)
        return changes, now


def _gathered(moving: Sequence[Carried], decisions: Mapping[str, Decision]) -> list[Write]:
    """The same where ranks hold parts: one layer after the other is whole for a while."""
    writes: list[Write] = []
    for one in moving:
        with ranks.naming(f"layer {one.name!r}, gathering its values and optimizer state"):
            held = one.whole()
        prepare = partial(_rewired, one, held, decisions)
        writes += ranks.together(prepare, "prepare a topology update")
    return writes


def _rewired(
    moving: Carried, held: Sequence[Tensor], decisions: Mapping[str, Decision]
) -> list[Write]:
    update, _, values = decisions[moving.name]
    with ranged("rewire", moving.name):
        return rewired(moving, held, update.topology, update.source, values)
