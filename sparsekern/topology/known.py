"""Which index arrays are known to be a topology: validated once, until something writes to them.

Kernels trust index arrays, so none reaches a kernel that was not validated. Arrays are known by
identity and by version, the counter that torch raises with every write in place. Their addresses
say nothing: an allocator gives them out again. Writes that the counter does not see, through
`.data` or in DDP's broadcast of buffers, can put one topology in the place of another; so nothing
that is kept beside a `Topology` may depend on what its arrays hold.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from sparsekern.topology.topology import Topology

EACH_TIME = os.environ.get("SPARSEKERN_CHECK") == "1"
"""Whether arrays are validated at each use, as if torch counted no writes; read at import."""

_VERSION = operator.attrgetter("_version")


class Known(NamedTuple):
    """Facts of a topology whose arrays were validated, none of which depends on their contents.

    Attributes:
        arrays: the index arrays.
        versions: of each when it was validated.
        values_shape: (nnzb, bh, bw).
        outputs: (rows,), the shape of a bias.
        device: where the arrays live.
        block_density: active share of the blocks.
    """

    arrays: tuple[Tensor, ...]
    versions: tuple[int, ...]
    values_shape: tuple[int, int, int]
    outputs: tuple[int]
    device: torch.device
    block_density: float


class _Proof(NamedTuple):
    """The same without holding the arrays, for whoever comes with them alone."""

    arrays: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    layout: tuple[int, ...]
    topology: weakref.ref[Topology]


_proofs: Any = WeakTensorKeyDictionary()  # by the first array

menders: list[Callable[[Topology], bool]] = []
"""Asked before arrays that someone wrote to are validated: True where they are valid now."""


def versions_of(arrays: Iterable[Tensor]) -> tuple[int, ...]:
    """How often each was written to; fails for inference tensors, which do not count."""
    return tuple(map(_VERSION, arrays))


def versions_if_counted(arrays: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The same, or None if there are inference tensors."""
    return None if any(a.is_inference() for a in arrays) else versions_of(arrays)


def is_tracked(arrays: Iterable[Tensor]) -> bool:
    """Whether these are real tensors whose writes torch counts; fake and meta ones are not."""
    return not EACH_TIME and _are_counted(arrays)


def _are_counted(arrays: Iterable[Tensor]) -> bool:
    return all(type(a) is Tensor and not a.is_meta and not a.is_inference() for a in arrays)


def vouch(topology: Topology) -> Known | None:
    """Record that the arrays are valid as they are now; None if torch does not count writes."""
    arrays = topology.arrays
    if torch.compiler.is_compiling() or not is_tracked(arrays):
        return None
    known = Known(
        arrays,
        versions_of(arrays),
        topology.values_shape,
        (topology.shape[0],),
        topology.device,
        topology.block_density,
    )
    refs = tuple(weakref.ref(a) for a in arrays)
    _proofs[arrays[0]] = _Proof(refs, known.versions, topology.layout, weakref.ref(topology))
    object.__setattr__(topology, "_known", known)
    return known


def forget(topology: Topology) -> None:
    """Take back what was recorded of these arrays."""
    object.__setattr__(topology, "_known", None)
    _proofs.pop(topology.arrays[0], None)


def prove(topology: Topology) -> Known | None:
    """Validate the arrays unless that was done; None if torch does not count their writes.

    Raises:
        TopologyError: naming the array and what is wrong with it.
    """
    if not is_tracked(topology.arrays):
        if EACH_TIME and _are_counted(topology.arrays) and not torch.compiler.is_compiling():
            topology.validate()
        return None
    unproven = _proof_of(topology.arrays, topology.layout) is None
    if unproven and not any(mend(topology) for mend in menders):
        topology.validate()
    names = {f.name for f in fields(topology)}
    for name in vars(topology).keys() - names:  # whatever was derived from the arrays as they were
        vars(topology).pop(name)
    return vouch(topology)


def known_topology(arrays: Sequence[Tensor], layout: tuple[int, ...]) -> Topology | None:
    """The topology that holds these very arrays, valid and alive, if there is one."""
    proof = _proof_of(arrays, layout)
    return None if proof is None else proof.topology()


def _proof_of(arrays: Sequence[Tensor], layout: tuple[int, ...]) -> _Proof | None:
    proof: _Proof | None = _proofs.get(arrays[0])
    if proof is None or proof.layout != layout or not is_tracked(arrays):
        return None
    same = all(ref() is array for ref, array in zip(proof.arrays, arrays, strict=True))
    return proof if same and versions_of(arrays) == proof.versions else None
