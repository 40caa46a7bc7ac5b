"""Averages of models: which there are, and index arrays that their averaging has spoiled.

An average of weights copies its model and writes to the copy's parameters, and to its buffers too:
it copies those of the model, or averages them, which rounds and leaves no topology. The index
arrays of an average are its model's; where they are not, they are written anew.
"""

from __future__ import annotations

import gc
import logging
import weakref
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

from sparsekern.errors import AverageError, TopologyError
from sparsekern.nn import lineage
from sparsekern.nn.lineage import Era
from sparsekern.topology import Topology
from sparsekern.topology.known import is_tracked, menders, versions_of

if TYPE_CHECKING:
    from sparsekern.nn.held import HeldTopology

log = logging.getLogger(__name__)

PLACES = {
    ("torch", "AveragedModel"): "module",  # Lightning's WeightAveraging holds one
    ("lightning", "StochasticWeightAveraging"): "_average_model",
    ("pytorch_lightning", "StochasticWeightAveraging"): "_average_model",
    ("ema_pytorch", "EMA"): "ema_model",
    ("ema_pytorch", "KarrasEMA"): "ema_model",
    ("timm", "ModelEma"): "ema",
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("ultralytics", "ModelEMA"): "ema",
}
"""Package and class of a known average, and its attribute that is the averaged model."""


class _Scan:
    """The averages that were found, and how many layers there had been then."""

    def __init__(self) -> None:
        self.born = -1
        self.averages: tuple[weakref.ref[Any], ...] = ()
        self.layers: WeakSet[HeldTopology] = WeakSet()


_scan = _Scan()


def place_of(kind: type) -> str | None:
    """The attribute of a known average that is the averaged model; None for other classes."""
    for base in kind.__mro__:
        place = PLACES.get((str(base.__module__).partition(".")[0], base.__name__))
        if place is not None:
            return place
    return None


def averages(again: bool = False) -> list[Any]:
    """The known averages that are alive.

    They are looked for among all objects, and only if a layer was made since the last time.
    """
    if again or _scan.born != lineage.born():
        found = _containers()
        _scan.born = lineage.born()
        _scan.averages = tuple(weakref.ref(container) for container in found)
        _scan.layers = WeakSet(layer for c in found for layer in held_layers(averaged_model(c)))
    return [c for c in (ref() for ref in _scan.averages) if c is not None]


def averaged_model(average: Any) -> Any:
    """The averaged model of a known average; of anything else, itself."""
    place = place_of(type(average))
    return average if place is None else getattr(average, place, None)


def times_averaged(average: Any) -> int:
    """How often torch's average was updated; 0 means that its first update will copy the model."""
    count = getattr(average, "n_averaged", None)
    return int(count) if isinstance(count, Tensor) and count.numel() == 1 else 1


def is_averaged(layer: HeldTopology) -> bool:
    """Whether a layer belongs to a known average."""
    averages()
    return layer in _scan.layers


def source_of(twin: HeldTopology) -> HeldTopology | None:
    """The layer whose weights a copy averages: the nearest it descends from that is no average."""
    origin = twin._origin
    found = origin.ancestors() if origin is not None else ()
    return next((layer for layer in found if not is_averaged(layer)), None)


def held_layers(model: Any) -> dict[HeldTopology, str]:
    """Layers of a model with their names; unlike `named_modules`, it mends none on its way."""
    found: dict[HeldTopology, str] = {}
    if not isinstance(model, nn.Module):
        return found
    todo, seen = [("", model)], set()
    while todo:
        name, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if "_era" in module.__dict__:
            found[module] = name  # type: ignore[index]
        inner = [(f"{name}.{n}" if name else n, m) for n, m in module._modules.items() if m]
        todo += reversed(inner)
    return found


def mend(layer: HeldTopology) -> bool:
    """Make sure that the index arrays, which someone wrote to, are those of the layer's relatives.

    Returns:
        Whether they are a topology now; if not, nobody knows.

    Raises:
        AverageError: an average's values belong to other connections than its index arrays.
    """
    if not is_tracked(layer._held().arrays):
        return False
    check_not_left(layer)
    kin = [o for o in lineage.alive() if o is not layer and o._era is layer._era and _is_sound(o)]
    for other in kin:
        if lineage.same_connections(layer, other):
            return True
    origin = layer._origin
    for other in origin.ancestors() if origin and not kin else ():
        if _is_sound(other) and lineage.same_connections(layer, other):
            layer._era = other._era
            return True
    if not kin or not any(map(is_averaged, (layer, *kin))):
        return False
    try:
        layer._held().validate()
    except TopologyError:
        era = layer._era
        layer._overwrite_(kin[0]._held().to(layer.col.device))
        layer._era = era
        log.debug("index arrays that were averaged are the model's again")
        return True
    if is_averaged(layer):
        raise AverageError(
            "an average's layer was given connections that its values do not have: the model that "
            "it is updated from is another one than it was built from; build it from that model, "
            "or call method.follow(average)"
        )
    layer._era = Era()  # whoever wrote them wrote the values too, as a broadcast does
    return True


class LeftBehind(NamedTuple):
    """What an average's layer missed: an update of a layer with the same connections, or a load.

    Attributes:
        layer: the one that was updated, held weakly.
        era: of both before.
    """

    layer: weakref.ref[HeldTopology]
    era: Era


def check_not_left(layer: HeldTopology) -> None:
    """Raise `AverageError` if a layer took over connections without moving its values."""
    left = layer._left
    source = None if left is None else left.layer()
    if left is None or source is None or source._era is left.era:
        return
    if lineage.same_connections(layer, source):
        raise AverageError(
            "an average took over the connections of a topology update that it did not follow, so "
            "its values mix weights of different connections; build the average from the model "
            "that it is updated from, or call method.follow(average) before"
        )


def leave_behind(layer: HeldTopology, era: Era) -> None:
    """Take note of averages of a layer that was given other connections, without them, by a load.

    Args:
        layer: the model's.
        era: that it was in before.
    """
    for average in averages() if layer._related else ():
        for twin in held_layers(averaged_model(average)):
            # a first update copies the whole model
            if twin._era is era and source_of(twin) is layer and times_averaged(average):
                twin._left = LeftBehind(weakref.ref(layer), era)


def is_known(layer: HeldTopology) -> bool:
    """Whether the index arrays are as they were when they were last validated."""
    topology = layer._topology
    if topology is None or topology._known is None:
        return False
    pairs = zip(layer._buffers.values(), layer._buffers_then, strict=False)
    known = topology._known
    return all(a is b for a, b in pairs) and versions_of(known.arrays) == known.versions


def _is_sound(layer: HeldTopology) -> bool:
    if layer._blank or not is_tracked(layer._held().arrays):
        return False
    if is_known(layer):
        return True
    try:
        layer._held().validate()
    except TopologyError:
        return False
    return True


def _containers() -> list[Any]:
    objects = gc.get_objects()  # a great many, so nothing below is a loop of Python's
    kinds = list(map(type, objects))
    ids = list(map(id, kinds))
    places = {key for key, kind in dict(zip(ids, kinds, strict=True)).items() if place_of(kind)}
    return list(compress(objects, map(places.__contains__, ids)))


def _mend_arrays(topology: Topology) -> bool:
    """Mend the layer whose arrays these are, if it has relatives."""
    for layer in lineage.alive():
        if layer._related and layer._buffers.get("crow") is topology.crow:
            return mend(layer)
    return False


menders.append(_mend_arrays)
