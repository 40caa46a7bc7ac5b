"""One topology update of all layers: what was decided, and its making."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.carry.rewire import rewired
from sparsekern.carry.transaction import Write, commit
from sparsekern.methods.update import TopologyUpdate
from sparsekern.nn import SparseLayer
from sparsekern.ops.ranges import ranged


class LayerChange(NamedTuple):
    """One layer's part in a topology update, in blocks.

    Attributes:
        dropped: dropped, those grown again at once included.
        grown: those that were not active before.
    """

    dropped: int
    grown: int


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
    then: Callable[[dict[str, LayerChange]], Iterable[Write]] = lambda _: (),
) -> dict[str, LayerChange]:
    """Rewire the layers: values, optimizer state and averages follow their weights, all or nothing.

    Everything is computed before anything is written. What breaks in between, a signal too, is
    raised on, and leaves the layers as they were. Layers keep their memory where their number of
    active blocks stays; where it changes, the parameter stays the same object.

    Args:
        layers: by name.
        decisions: what is to happen to them.
        optimizers: whose state follows.
        twins: layers of averages that hold the same topology, for each layer.
        then: from what each layer did, what else is to be written with it.

    Raises:
        OptimizerError: a state can't follow; nothing has changed then.
    """
    writes: list[Write] = []
    for name, (update, _, values) in decisions.items():
        with ranged("rewire", name):
            writes += rewired(
                name,
                layers[name],
                update.topology,
                update.source,
                values=values,
                optimizers=optimizers,
                twins=twins.get(name, ()),
            )
    changes = {name: LayerChange(d.dropped, d.update.grown) for name, d in decisions.items()}
    writes += then(changes)
    commit(writes)
    return changes
