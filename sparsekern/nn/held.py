"""`HeldTopology`: a module whose buffers are the index arrays of one topology.

Kernels trust index arrays, and anyone may overwrite, cast or replace a module's buffers. So what
the buffers hold is validated before it is used, once, until a buffer is another tensor or is
written to; see `sparsekern.topology.known`. Only what this library writes itself is trusted.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import TopologyError, WeightError
from sparsekern.nn import averaged, lineage, saved_state
from sparsekern.nn.lineage import Era, Origin
from sparsekern.topology import ARRAY_NAMES, DERIVED_NAMES, STORED_NAMES, Topology
from sparsekern.topology.known import forget, is_tracked, menders, vouch

_PARAMETRIZE = "torch.nn.utils.parametrize"
_LEFT = "_sparsekern_arrays_stay"  # mark of a DDP module that broadcasts no index arrays


class HeldTopology(nn.Module):
    """Base of `SparseLayer`: int32 buffers, overwritten in place by topology updates.

    A state_dict holds `crow` and `col` alone; the others are rebuilt from them when it is loaded.
    """

    values: nn.Parameter
    crow: Tensor
    col: Tensor
    ccol: Tensor
    row: Tensor
    perm: Tensor
    row_order: Tensor
    col_order: Tensor
    dense_mask: Tensor | None
    _blank = False  # whether the index arrays are memory that nothing was written to
    _topology: Topology | None = None  # of the buffers as they were then
    _buffers_then: tuple[Tensor | None, ...] = ()
    _era: Era
    _origin: Origin | None = None  # of a copy
    _related = False  # whether it is a copy, or was copied
    _left: averaged.LeftBehind | None = None
    _loads = 0  # how often a load gave it other connections or another parameter
    _sharding: Any = None  # what FSDP2 keeps of `values`
    _whole: Tensor | None = None  # all of sharded values, while they are gathered
    _ddp: weakref.ref[nn.Module] | None = None  # the DDP module that it runs in

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.matrix_shape = topology.shape
        self.block = topology.block
        self._cut = topology.groups, topology.taps
        known = topology.known()
        with torch.inference_mode(False):  # inference tensors would not count who writes to them
            for name, array in zip(ARRAY_NAMES, topology.arrays, strict=True):
                # a copy: an update overwrites it, and the topology may be another layer's
                self.register_buffer(name, array.clone(), persistent=name in STORED_NAMES)
        if known is not None:
            self._trust()
        self._era = Era()
        lineage.register(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight; the matrix's own unless a subclass differs."""
        return self.matrix_shape

    @property
    def topology(self) -> Topology:
        """The current connections, in the buffers' memory: an update changes them; `clone` keeps.

        Raises:
            TopologyError: there are none, as after `to_empty`, or the buffers were overwritten by
                something that is no topology.
        """
        self.check_known()
        topology = self._connections()
        if not torch.compiler.is_compiling():
            topology.known()
        return topology

    def check_known(self) -> None:
        """Raise `TopologyError` if the index arrays were never filled: kernels trust them."""
        if self._blank:
            raise TopologyError(
                "the layer came from the meta device by `to_empty` and has no connections yet: "
                "load a state_dict first"
            )

    def _connections(self) -> Topology:
        """What the buffers hold, unchecked: the operators of `ops` validate what they are given.

        It is the same object as long as the buffers are the same tensors and `_trust` is not
        called, so what was derived from it may be kept with it.
        """
        if torch.compiler.is_compiling():
            return self._held()
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if ddp is not None:
            _leave_broadcast(ddp)
        topology = self._topology
        if topology is not None and all(map(is_, self._buffers.values(), self._buffers_then)):
            return topology
        return self._hold()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The dense layer's weight as a matrix (rows, cols)."""
        return weight

    def _hold(self) -> Topology:
        """Take up the buffers as they are now."""
        for name in ARRAY_NAMES:
            array = self._buffers[name]
            if type(array) is Tensor and array.is_inference():
                with torch.inference_mode(False):
                    self._buffers[name] = array.clone()  # this one counts who writes to it
        topology = self._held()
        tracked = is_tracked(topology.arrays)
        self._topology = topology if tracked else None
        self._buffers_then = tuple(self._buffers.values())
        return topology

    def _trust(self) -> None:
        """Take up the buffers, which this library has just filled with a topology."""
        vouch(self._hold())

    def _held(self) -> Topology:
        """What the buffers hold, whether or not it means anything."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAY_NAMES}
        groups, taps = self._cut
        return Topology(self.matrix_shape, self.block, **arrays, groups=groups, taps=taps)

    def _follow_stored(self) -> bool:
        """Rebuild what follows from `crow` and `col` if these, and only these, were written to.

        A state_dict holds them, so who writes to its tensors in place, as a distributed checkpoint
        does, has written all there is.
        """
        written = self._written()
        if not written or not written <= set(STORED_NAMES):
            return False
        if self._related and averaged.is_averaged(self):
            return False  # what averages a state_dict writes numbers that mean nothing
        rebuilt, era = self._held().with_compressed(self.crow, self.col), self._era
        for name in DERIVED_NAMES:
            getattr(self, name).copy_(getattr(rebuilt, name))
        if self.dense_mask is not None:
            self.dense_mask.copy_(rebuilt.to_mask())
        self._era, self._left = Era(), None
        self._reconnected(era)
        return True

    def _written(self) -> set[str]:
        """Names of the index arrays that were written to since they were last known."""
        known = self._topology and self._topology._known
        if not known or not is_tracked(known.arrays):
            return set()
        now = zip(ARRAY_NAMES, known.arrays, known.versions, strict=True)
        return {name for name, array, version in now if array._version != version}

    def _reconnected(self, era: Era) -> None:
        """Other connections were loaded; until then the layer was in `era`."""
        self._loads += 1
        self.values.grad = None  # it belongs to the old ones
        averaged.leave_behind(self, era)

    def _overwrite_(self, topology: Topology) -> None:
        """Switch the index arrays to a validated `topology`, in place."""
        for name, array in zip(ARRAY_NAMES, topology.arrays, strict=True):
            getattr(self, name).copy_(array)
        self._trust()
        self._era, self._left = Era(), None

    # ---- torch plumbing

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, unless it is a part of the topology or is to be parametrized."""
        if name in ARRAY_NAMES:
            raise TopologyError(
                f"`{name}` can't be deleted, replaced or parametrized: it is a part of the "
                f"layer's topology"
            )
        # FSDP deletes it too, and puts a view in its place
        if name == "values" and sys._getframe(1).f_globals.get("__name__") == _PARAMETRIZE:
            raise WeightError(
                "`values` of a sparse layer can't be parametrized: a topology update writes to the "
                "parameter itself, and torch keeps parametrizations in a ModuleDict, which has a "
                "method of that name"
            )
        super().__delattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, but never cast the index arrays, as `Module.type` would.

        Memory that the meta device's index arrays get holds no connections yet.
        """
        was_meta = self.col.is_meta
        kept = {id(t) for t in self._buffers.values()}

        def place(t: Tensor) -> Tensor:
            made = fn(t)
            return t.to(made.device) if id(t) in kept and made.dtype != t.dtype else made

        super()._apply(place, recurse)  # type: ignore[no-untyped-call]
        self._blank = self._blank or (was_meta and not self.col.is_meta)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy has tensors of its own: what is known of these does not hold for them."""
        self._related = True
        lost = {"_topology": None, "_buffers_then": (), "_left": None}
        lost |= {"_sharding": None, "_whole": None, "_ddp": None}
        return self.__dict__ | lost | {"_origin": Origin(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a pickle; an older one says that all index arrays are to be saved."""
        super().__setstate__({"_era": Era()} | state)  # type: ignore[no-untyped-call]
        self._non_persistent_buffers_set |= set(DERIVED_NAMES)
        lineage.register(self)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As torch's. Who walks a model to its buffers finds no arrays that averaging spoiled."""
        self._mend()
        named: Iterator[tuple[str, nn.Module]] = super().named_modules(
            memo, prefix, remove_duplicate
        )
        return named

    def _mend(self) -> None:
        """Write index arrays of an average anew that are no topology since they were averaged."""
        if not self._related or torch.compiler.is_compiling() or averaged.is_known(self):
            return
        if averaged.mend(self):
            self._trust()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._mend()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Refuse what does not fit before anything is copied; see `saved_state`."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        incoming = saved_state.prepare(self, state_dict, prefix, assign=assign)
        if torch.__future__.get_swap_module_params_on_conversion():
            self._let_go()
        kept = incoming is None or (self._stores(incoming) and not self._written())
        era = self._era
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if incoming is not None and self._stores(incoming):
            self._derive(incoming, assign=assign)
        if incoming is not None:
            self._left = None
            lineage.join_era(self)
        if not kept:
            self._reconnected(era)
        elif assign:
            self._loads += 1  # the parameter is another one
        mask = self.dense_mask
        if mask is not None and (incoming is not None or not self._blank):
            held = self.topology.to_mask()
            if mask.is_meta:
                self.dense_mask = held
            else:
                mask.copy_(held)

    def _let_go(self) -> None:
        """Know nothing of the buffers: torch swaps no tensors that something refers to weakly."""
        for topology in (self._topology, self._held()):
            if topology is not None:
                forget(topology)
        self._topology = None

    def _stores(self, topology: Topology) -> bool:
        """Whether the arrays that a state_dict holds are a topology's."""
        return all(_holds(getattr(self, n), getattr(topology, n)) for n in STORED_NAMES)

    def _derive(self, topology: Topology, *, assign: bool) -> None:
        """Fill the index arrays that follow from `crow` and `col`, which were loaded."""
        for name in DERIVED_NAMES:
            array = getattr(topology, name)
            if assign:
                setattr(self, name, array)
            else:
                getattr(self, name).copy_(array)
        self._blank = self._blank and self.col.is_meta
        if is_tracked(self._held().arrays):
            self._trust()


def _holds(own: Tensor, other: Tensor) -> bool:
    """Whether it is a real tensor with the other's dtype and entries."""
    return not own.is_meta and own.dtype == other.dtype and torch.equal(own, other.to(own.device))


def _leave_broadcast(ddp: Any) -> None:
    """Take index arrays out of the buffers that a DDP module broadcasts before its forward passes.

    They are equal on all ranks: the DDP module made them so when it was built, and updates are the
    same everywhere. The broadcast hides its writes from the tensors' versions, so what the first
    one, which has just been, may have written is validated.
    """
    if _LEFT in vars(ddp):
        return
    names = set(ddp.parameters_to_ignore)
    for prefix, module in ddp.module.named_modules():
        if isinstance(module, HeldTopology):
            held = [name for name, array in module._buffers.items() if array is not None]
            names.update(f"{prefix}.{name}" if prefix else name for name in held)
            forget(module._held())
            module._topology, module._ddp = None, weakref.ref(ddp)
    ddp.parameters_to_ignore = names
    ddp._assign_modules_buffers()
    vars(ddp)[_LEFT] = True


def _follow_written(topology: Topology) -> bool:
    """Let the other arrays follow where a layer's `crow` or `col` was written to."""
    for layer in lineage.alive():
        if layer._buffers.get("crow") is topology.crow:
            return layer._follow_stored()
    return False


menders.insert(0, _follow_written)  # before what mends averages
