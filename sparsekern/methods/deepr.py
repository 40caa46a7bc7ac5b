"""DeepR: what would change its sign goes, and chance brings in another connection.

Bellec, Kappel, Maass, Legenstein, "Deep rewiring: training very sparse deep networks", ICLR 2018,
Algorithm 1, with the constants of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from sparsekern.methods.arguments import Arguments, shows_arguments
from sparsekern.methods.base import Method
from sparsekern.methods.numbers import check_number, learning_rate
from sparsekern.methods.sources import Random
from sparsekern.methods.update import TopologyUpdate, grow_random
from sparsekern.nn import SparseLayer, sharded
from sparsekern.nn.connections import block_weights

TINY = 1e-12
"""Magnitude of a weight that comes in; in half precision the smallest normal number."""


@shows_arguments
class DeepR(Method):
    """Train with DeepR; other arguments as in `Method`, `drop_fraction` and `decay` apart.

    Each weight keeps the sign that it came in with. After each weight step it is drawn to zero by
    `lr * l1` and shaken by `lr * noise * N(0, 1)`; one that reaches zero or would go beyond it is
    held at zero from then on. Every `update_freq` weight steps those that are zero are dropped, and
    as many random positions that were not active come in at +-1e-12, with no optimizer state. With
    `update_freq=1` that is the paper's algorithm, whose positions may be the dropped ones. From
    `t_end` on training is plain, without signs, l1 and noise.

    A block is dropped once half of its weights or more are zero. A position that comes in again
    later draws its sign anew. A byte for each active weight is held while the optimizer steps.

    Args:
        model: as in `Method`.
        optimizer: as in `Method`; its learning rate for `values` is meant by `lr`.
        l1: strength of the pull to zero.
        noise: standard deviation of what shakes the weights; equal on ranks whose devices are of
            one kind.
        **arguments: of `Method`.

    Raises:
        ConfigError, DtypeError: as `Method`; or `l1` or `noise` is no number of at least 0.
    """

    source = Random
    default_step_on_update = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        l1: float = 1e-5,
        noise: float = 1e-5,
        **arguments: Unpack[Arguments],
    ) -> None:
        check_number("l1", l1)
        check_number("noise", noise)
        self.l1, self.noise = float(l1), float(noise)
        self._signs: dict[str, Tensor] = {}  # of the weights before a step that is running
        super().__init__(model, optimizer, **arguments)

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:  # noqa: ARG002
        """Those of whose weights more than half are not held at zero."""
        alive = (layer.active_values() != 0).flatten(1).sum(1)
        return 2 * alive > block_weights(layer.topology)

    def grown_positions(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> Tensor:
        """Positions that were not active, and where there are too few, some that are dropped."""
        topology = layer.topology
        if n > topology.grid.total - topology.nnzb:
            return super().grown_positions(name, layer, keep, n)
        taken = torch.ones_like(keep)
        return grow_random(topology, taken, n, self.generator(name)).to(keep.device)

    def grown_values(self, name: str, layer: SparseLayer, update: TopologyUpdate) -> Tensor:
        """As good as zero, with random signs."""
        dtype = layer.values.dtype
        shape = update.grown, *layer.block
        signs = torch.randint(0, 2, shape, generator=self._stream(name, 1), device="cpu") * 2 - 1
        values = signs.to(layer.values.device, dtype) * max(TINY, torch.finfo(dtype).tiny)
        whole = values.new_zeros(update.topology.values_shape)
        whole[update.source < 0] = values
        return update.topology.clear_padding_(whole)[update.source < 0]

    def _grow(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> TopologyUpdate:
        """What is dropped and drawn again at once, in a layer nearly full, begins anew."""
        made = super()._grow(name, layer, keep, n)
        again = (made.source >= 0) & ~keep[made.source.clamp(min=0)]
        return TopologyUpdate(made.topology, made.source.masked_fill(again, -1))

    def _weights_move(self) -> None:
        super()._weights_move()
        active = self.weight_steps < self.schedule.t_end
        layers = self.trained_layers() if active else {}
        self._signs = {n: _blocks(m).sign().to(torch.int8) for n, m in layers.items()}

    def _weights_moved(self) -> None:
        super()._weights_moved()
        signs, self._signs = self._signs, {}
        with torch.no_grad():
            for name, before in signs.items():
                self._hold_signs(name, self.layers[name], before)

    def _hold_signs(self, name: str, layer: SparseLayer, before: Tensor) -> None:
        blocks, parameter = _blocks(layer).clone(), sharded.trained(layer)
        signs, rate = before.to(blocks.dtype), learning_rate(self.optimizers, parameter)
        blocks -= signs * (self.l1 * rate)
        if self.noise:
            stream = self._stream(name, 2, blocks.device)
            shape = layer.topology.values_shape
            shaken = torch.randn(shape, generator=stream, dtype=torch.float32, device=blocks.device)
            if layer.dense_mask is None:
                shaken = sharded.part(shaken, parameter)
            blocks += signs.abs() * shaken.to(blocks.dtype) * (self.noise * rate)
        blocks = blocks.where(blocks * signs > 0, 0.0)
        if layer.dense_mask is None:
            sharded.local(parameter).copy_(blocks)
        else:
            layer.set_active_values(blocks)

    def _stream(self, name: str, of: int, device: torch.device | None = None) -> torch.Generator:
        """Random numbers of their own for each purpose, layer and weight step."""
        seed = self.generator(name).initial_seed() + of * 2**60
        return torch.Generator(device or "cpu").manual_seed(seed % 2**63)


def _blocks(layer: SparseLayer) -> Tensor:
    """The active weights that this rank holds; all of them under `impl="masked"`."""
    if layer.dense_mask is not None:
        return layer.active_values()
    return sharded.local(sharded.trained(layer)).detach()
