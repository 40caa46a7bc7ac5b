"""What a method keeps of the topologies that its layers had: the first, and all together."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.topology import Topology
from sparsekern.topology.packed import (
    FAR,
    count_bits,
    gaps_of,
    in_both,
    no_bits,
    places_of,
    with_bits,
)


class Trace(NamedTuple):
    """By layer; never written to, so that an update that breaks off leaves it as it was.

    Attributes:
        start: positions before the first update, as gaps (`topology.packed`) in the host's memory,
            about a byte for each block; None where updates came before that nobody kept them of.
        explored: places that were ever active, a bit for each block of the dense weight, where the
            layer is; None if nobody asked for it.
    """

    start: Mapping[str, Tensor] | None
    explored: Mapping[str, Tensor] | None

    @property
    def nbytes(self) -> int:
        """Held by the bits."""
        return sum(bits.numel() for bits in (self.explored or {}).values())


class Exploration(NamedTuple):
    """Share of the places that were ever active, R_s.

    Liu et al., "Do we actually need dense over-parameterization? In-time over-parameterization in
    sparse training", ICML 2021.

    Attributes:
        layers: by name, in blocks; what has just grown counts.
        overall: of all layers together.
        nbytes: what it takes to know that.
    """

    layers: dict[str, float]
    overall: float
    nbytes: int


def traced(trace: Trace, layers: Mapping[str, SparseLayer], new: Mapping[str, Topology]) -> Trace:
    """With the layers' connections as they are, and the new ones that an update gives them."""
    start, bits = trace.start, trace.explored
    if start is not None:
        first = {n: layers[n].topology.positions() for n in new if n not in start}
        start = {**start, **{name: gaps_of(p).cpu() for name, p in first.items()}}
    if bits is not None:
        grown = {n: with_bits(_bits(trace, n, layers[n]), t.positions()) for n, t in new.items()}
        bits = {**bits, **grown}
    return Trace(start, bits)


def _bits(trace: Trace, name: str, layer: SparseLayer) -> Tensor:
    """What a layer has explored, its connections as they are included."""
    now, bits = layer.topology, (trace.explored or {}).get(name)
    bits = no_bits(now.grid.total, now.device) if bits is None else bits.to(now.device)
    return with_bits(bits, now.positions())


def overlap(trace: Trace, name: str, topology: Topology) -> float | None:
    """Share of the start's blocks that a topology has; None if the start is not known."""
    if trace.start is None:
        return None
    gaps = trace.start[name]
    size = int((gaps != FAR).sum())
    return in_both(gaps, topology.positions()) / size if size else 1.0


def explored(trace: Trace, name: str, topology: Topology) -> float | None:
    """Share of a layer's places that were ever active; None if that is not followed."""
    if trace.explored is None:
        return None
    return int(count_bits(trace.explored[name])) / topology.grid.total


def exploration(trace: Trace, layers: Mapping[str, SparseLayer]) -> Exploration:
    """How much of the layers was ever active.

    Raises:
        ConfigError: it was not asked for.
    """
    if trace.explored is None:
        raise ConfigError("exploration is not followed: make the method with `exploration=True`")
    counts = {n: int(count_bits(_bits(trace, n, layer))) for n, layer in layers.items()}
    totals = {name: layer.topology.grid.total for name, layer in layers.items()}
    shares = {name: counts[name] / totals[name] for name in layers}
    return Exploration(shares, sum(counts.values()) / sum(totals.values()), trace.nbytes)


# ---- saved with the method


def encode(trace: Trace) -> dict[str, Any]:
    """As strings, for JSON."""
    return {"start": _texts(trace.start), "explored": _texts(trace.explored)}


def decode(state: object) -> Trace:
    """What `encode` made.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return Trace(**{str(key): _sets(texts) for key, texts in dict(state).items()})  # type: ignore[call-overload]
    except (TypeError, ValueError, AttributeError):  # base64's own error is a ValueError
        raise ConfigError(
            "`trace` of a method state must hold the start and what was explored, layers by name; "
            f"got {str(state)[:80]}"
        ) from None


def check_fits(trace: Trace, layers: Mapping[str, SparseLayer]) -> None:
    """Raise `ConfigError` if a trace is of other layers than these."""
    totals = {name: layer._held().grid.total for name, layer in layers.items()}
    for name, gaps in (trace.start or {}).items():
        if places_of(gaps) > totals.get(name, -1):
            raise ConfigError(f"`start` of a method state must fit layer {name!r}; it does not")
    for name, bits in (trace.explored or {}).items():
        if bits.numel() != -(-totals.get(name, -8) // 8):
            raise ConfigError(f"`explored` of a method state must fit layer {name!r}; it does not")


def _texts(sets: Mapping[str, Tensor] | None) -> dict[str, str] | None:
    if sets is None:
        return None
    return {n: base64.b64encode(s.cpu().numpy().tobytes()).decode() for n, s in sets.items()}


def _sets(texts: Mapping[str, str] | None) -> dict[str, Tensor] | None:
    if texts is None:
        return None
    read = {str(n): base64.b64decode(text, validate=True) for n, text in texts.items()}
    return {n: torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for n, data in read.items()}
