"""Averages of weights (EMA, SWA) follow topology updates.

A block that is dropped leaves the average too, and a new one starts there at 0, as a weight that
was inactive would have been averaged. One that is dropped and grown again later begins anew.

Known averages, see `sparsekern.nn.averaged`, are found by themselves: their layers are copies of
the model's, and the library knows of what a copy was made. Others are named by `Method.follow`.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparsekern.errors import AverageError, DtypeError, TopologyError
from sparsekern.nn import SparseLayer, lineage
from sparsekern.nn.averaged import (
    LeftBehind,
    averaged_model,
    averages,
    check_not_left,
    held_layers,
    source_of,
    times_averaged,
)
from sparsekern.nn.sharded import local

log = logging.getLogger(__name__)

Twins = dict[str, list[SparseLayer]]


class Followed:
    """An average that was named: which of its layers belongs to which layer of the model.

    The average is held weakly, and belongs to one model: a copy of the model's method has none,
    unless it was copied with its average.
    """

    def __init__(self, average: nn.Module | None, names: Mapping[str, str]) -> None:
        self._average = None if average is None else weakref.ref(average)
        self.names = dict(names)

    @property
    def average(self) -> nn.Module | None:
        """None once it is gone."""
        return None if self._average is None else self._average()

    def layers(self) -> dict[str, SparseLayer | None]:
        """Its layers by the names of the model's; None for one that it has no longer."""
        found = _named(self.average)
        return {name: found.get(own) for name, own in self.names.items()}

    def __getstate__(self) -> dict[str, Any]:
        # the average itself: what is copied later in the same go must be this copy
        return {"average": self.average, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        average, self.names = state["average"], state["names"]
        self._average = None if average is None else weakref.ref(average)


def follow(layers: Mapping[str, SparseLayer], average: Any) -> Followed:
    """Let an average follow the layers' topology updates from now on.

    Args:
        layers: of the model, by name.
        average: a module whose sparse layers have the same names, but for a prefix on either side,
            and hold the same connections.

    Raises:
        DtypeError: it is no module.
        AverageError: naming the layer that it lacks, or that differs, and how.
    """
    model = averaged_model(average)
    if not isinstance(model, nn.Module):
        raise DtypeError(
            "`average` must be a module that holds a copy of the model's sparse layers, such as "
            f"torch.optim.swa_utils.AveragedModel; got {type(average).__name__}"
        )
    own = _named(model)
    names = _matched(list(layers), list(own))
    for name, layer in layers.items():
        if name not in names:
            raise AverageError(f"`average` has no sparse layer that is {name!r} of the model")
        twin = own[names[name]]
        if _shares_memory(layer, twin):
            raise AverageError(f"layer {name!r} of `average` is the model's own, not a copy of it")
        twin._left = None
        problem = _difference(layer, twin)
        if problem:
            raise AverageError(f"layer {name!r} of `average` can't follow: {problem}")
    for name, layer in layers.items():
        own[names[name]]._era = layer._era
    return Followed(model, names)


def twins_of(layers: Mapping[str, SparseLayer], followed: Sequence[Followed]) -> Twins:
    """The averages' layers that a topology update of `layers` must rewire with them.

    Raises:
        AverageError: an average of the model holds other connections; nothing has changed.
    """
    try:
        return _twins_of(layers, followed)
    except AverageError:
        pass
    gc.collect()  # it may be an average that nobody can reach any more
    averages(again=True)
    return _twins_of(layers, followed)


def in_step(layers: Mapping[str, SparseLayer], twins: Mapping[str, Sequence[SparseLayer]]) -> None:
    """Record that twins hold the connections of their layers, as after an update of both."""
    for name, found in twins.items():
        for twin in found:
            twin._era, twin._left = layers[name]._era, None


def _twins_of(layers: Mapping[str, SparseLayer], followed: Sequence[Followed]) -> Twins:
    twins: Twins = {name: [] for name in layers}
    for item in followed:
        if item.average is None:
            continue
        for name, own in item.layers().items():
            if own is None:
                raise AverageError(f"a followed average has lost its layer {name!r}")
            if name in twins:
                _take(twins[name], name, layers[name], own, item.average, required=True)
    names = {id(layer): name for name, layer in layers.items()}
    for average in averages():
        for twin, path in held_layers(averaged_model(average)).items():
            if not isinstance(twin, SparseLayer) or any(
                twin is t for ts in twins.values() for t in ts
            ):
                continue
            source = source_of(twin)
            if source is None:
                _mark_unknown(layers, twin, path, average)
            elif id(source) in names:
                name = names[id(source)]
                direct = twin._origin is not None and twin._origin.is_of(source)
                _take(twins[name], name, layers[name], twin, average, required=direct)
    in_step(layers, twins)
    return twins


def _take(
    twins: list[SparseLayer],
    name: str,
    layer: SparseLayer,
    twin: SparseLayer,
    average: Any,
    *,
    required: bool,
) -> None:
    """Add a twin that holds the layer's connections."""
    if _shares_memory(layer, twin) or any(twin is known for known in twins):
        return
    kind = type(average).__name__
    try:
        problem = _difference(layer, twin)
    except AverageError as error:
        raise AverageError(f"layer {name!r} of the model's {kind}: {error}") from None
    if problem is None:
        twins.append(twin)
    elif required and times_averaged(average):  # a first update copies the whole model
        raise AverageError(
            f"layer {name!r} of the model's {kind} can't follow a topology update: {problem}. Load "
            "both from one checkpoint; an average that is to stay as it is may be kept as a copy "
            "of the averaged model"
        )


def _difference(layer: SparseLayer, twin: SparseLayer) -> str | None:
    """Why a twin can't be rewired as its layer is; None if it can."""
    mine, theirs = layer._held(), twin._held()
    if mine.layout != theirs.layout or layer.values.shape != twin.values.shape:
        shapes = [(layer.matrix_shape, tuple(layer.values.shape))]
        shapes += [(twin.matrix_shape, tuple(twin.values.shape))]
        return f"it must have shape and values of shape {shapes[0]}; it has {shapes[1]}"
    if twin.col.is_meta:
        return "it is on the meta device"
    check_not_left(twin)
    try:
        found = twin.topology
    except TopologyError as error:
        return f"its index arrays are no topology ({error})"
    if lineage.same_connections(layer, twin):
        return None
    shared = layer.topology.overlap(found.to(mine.device))
    return f"it holds other connections ({shared:.1%} of the model's)"


def _mark_unknown(
    layers: Mapping[str, SparseLayer], twin: SparseLayer, path: str, average: Any
) -> None:
    """Take note of an average that holds a layer's connections but was built of another model."""
    check_not_left(twin)
    for name, layer in layers.items():
        if not path.endswith(name) or twin.col.is_meta or not times_averaged(average):
            continue
        if twin._left is None and lineage.same_connections(layer, twin):
            twin._left = LeftBehind(weakref.ref(layer), layer._era)
            log.warning(
                "layer %r of an average (%s) holds the connections of the model, but is no copy "
                "of its layer and does not follow its topology: if it averages this model, call "
                "method.follow(average)",
                path,
                type(average).__name__,
            )


def _shares_memory(layer: SparseLayer, twin: SparseLayer) -> bool:
    mine, theirs = local(layer.values), local(twin.values)
    return twin is layer or (
        mine.device == theirs.device
        and mine.numel() > 0
        and not mine.is_meta
        and mine.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
    )


def _named(model: Any) -> dict[str, SparseLayer]:
    found = held_layers(model).items()
    return {name: layer for layer, name in found if isinstance(layer, SparseLayer)}


def _matched(names: list[str], own: list[str]) -> dict[str, str]:
    """The average's name of each layer, where one prefix on one side makes them equal."""
    best: dict[str, str] = {}
    for other in own:
        for name in names[:1]:
            if other.endswith(name):
                added = other.removesuffix(name)
                found = {n: added + n for n in names if added + n in own}
            elif name.endswith(other):
                gone = name.removesuffix(other)
                cut = {n: n.removeprefix(gone) for n in names if n.startswith(gone)}
                found = {n: short for n, short in cut.items() if short in own}
            else:
                continue
            best = max(best, found, key=len)
    return best
