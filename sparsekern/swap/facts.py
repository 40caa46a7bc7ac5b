"""`topology_facts`: what the connections of a model's sparse layers are like now."""

from __future__ import annotations

from torch import nn

from sparsekern.nn.facts import TopologyFacts, facts_of
from sparsekern.swap.sparsify import sparse_layers


def topology_facts(model: nn.Module) -> dict[str, TopologyFacts]:
    """Live neurons and fan-in of a model's sparse layers, by name; of a single one, under "".

    What each update of a method made of them is in `method.history`.

    Raises:
        DtypeError: `model` is no module.
    """
    layers = sparse_layers(model)
    facts = facts_of(layer.topology for layer in layers.values())
    return dict(zip(layers, facts, strict=True))
