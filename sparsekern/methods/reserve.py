"""Values of active blocks that a forward pass takes to be zero, kept outside of the layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.methods.sources import Random
from sparsekern.nn import SparseLayer

log = logging.getLogger(__name__)


class Apart(NamedTuple):
    """What of a layer stands apart.

    Attributes:
        at: (m,) int64, ascending, places of blocks in CSR order.
        values: (m, bh, bw), their values.
    """

    at: Tensor
    values: Tensor


class Reserve(Random):
    """Growth by chance, of a method that keeps some values of its layers apart.

    While they are, the layer holds zeros in their places. `restore` puts them back, and `part`
    takes them out again.
    """

    def __init__(self, layers: Mapping[str, SparseLayer], norm: str, passes: int) -> None:
        super().__init__(layers, norm, passes)
        self.apart: dict[str, Apart] = {}
        self.at: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # the parameter that was left, and its version

    def part(self, name: str, at: Tensor) -> None:
        """Keep the values of the blocks at these places, and leave zeros."""
        layer = self.layers[name]
        with torch.no_grad():
            blocks = layer.active_values()
            at = at.to(blocks.device)
            self.apart[name] = Apart(at, blocks.index_select(0, at))
            layer.set_active_values(blocks.index_fill(0, at, 0))
        self.at[name], self._seen[name] = at, _version(layer)

    def restore(self, name: str) -> bool:
        """Put the values back where they were taken from; whether there were any."""
        apart, layer = self.apart.pop(name, None), self.layers[name]
        if apart is None:
            return False
        if not self._belongs(name, layer, apart):
            del self.at[name]
            return False
        with torch.no_grad():
            blocks = layer.active_values().clone()
            at, values = (t.to(blocks.device) for t in apart)
            layer.set_active_values(blocks.index_copy_(0, at, values.to(blocks)))
        return True

    def all_values(self, name: str) -> Tensor:
        """(nnzb, bh, bw): the values of all active blocks."""
        apart, blocks = self.apart.get(name), self.layers[name].active_values().clone()
        if apart is None:
            return blocks
        return blocks.index_copy_(0, apart.at.to(blocks.device), apart.values.to(blocks))

    def _belongs(self, name: str, layer: SparseLayer, apart: Apart) -> bool:
        """Whether the layer has zeros there, if someone has written to its weights since."""
        if self._seen.get(name) == _version(layer):
            return True
        blocks = layer.active_values()
        fits = apart.at.numel() < len(blocks) and int(apart.at[-1:].sum()) < len(blocks)
        if fits and not bool(blocks[apart.at.to(blocks.device)].any()):
            return True
        log.warning("layer %r has other weights by now: what was kept apart is forgotten", name)
        return False

    # ---- saved with the method

    def state(self) -> dict[str, Tensor]:
        """Places and values of what is apart, by layer."""
        state: dict[str, Tensor] = {}
        for name, apart in self.apart.items():
            state |= {f"{name}.{what}": tensor for what, tensor in apart._asdict().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor], write: bool = True) -> None:
        """Take what `state` gave."""
        names = dict.fromkeys(key.rpartition(".")[0] for key in state)
        read = {}
        for name in names:
            layer, apart = self.layers.get(name), [state.get(f"{name}.{f}") for f in Apart._fields]
            if layer is None or None in [t if t is None else 0 for t in apart]:
                raise ConfigError(
                    f"the values kept apart are of layers {list(names)}, not of these"
                )
            read[name] = Apart(*apart)  # type: ignore[arg-type]
            _check(name, layer, read[name])
        if write and read:
            self.apart = read
            self.at = {name: apart.at for name, apart in read.items()}
            self._seen = {}


def _version(layer: SparseLayer) -> tuple[int, int]:
    return id(layer.values), layer.values._version


def _check(name: str, layer: SparseLayer, apart: Apart) -> None:
    at, values = apart
    good = at.dim() == 1 and at.dtype is torch.int64
    if not good or tuple(values.shape) != (len(at), *layer.block):
        raise ConfigError(
            f"the values kept apart of layer {name!r} must be (m, {layer.block[0]}, "
            f"{layer.block[1]}) at (m,) int64 places; got {tuple(values.shape)} at "
            f"{at.dtype} of shape {tuple(at.shape)}"
        )
    inside = bool(((at >= 0) & (at < layer._held().nnzb)).all()) and bool((at.diff() > 0).all())
    if not inside:
        raise ConfigError(f"the values kept apart of layer {name!r} stand where no blocks are")
