"""Sources with a memory: the dense running average of SNFS, and the optimizer's own momentum."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsekern.carry.optimizer_state import moving_state
from sparsekern.errors import ConfigError
from sparsekern.methods import ranks
from sparsekern.methods.source import Observing
from sparsekern.methods.sources import Gradient
from sparsekern.methods.update import grow_largest
from sparsekern.nn import SparseLayer, sharded
from sparsekern.ops.grow import stream_grow_scores
from sparsekern.ops.ranges import ranged

log = logging.getLogger(__name__)

MOMENTA = ("momentum_buffer", "exp_avg")
"""Names of momentum in the states of optimizers."""


class OptimizerMomentum(Gradient):
    """Growth looks at the gradient; layers are compared by the optimizer's momentum.

    Only active weights have one, so it is there anyway.
    """

    def ready(self, names: Iterable[str], step: int, last: int | None) -> frozenset[str]:
        """As the gradient says; none if the momentum of one of them is not finite."""
        found = super().ready(names, step, last)
        broken = [name for name in found if not torch.isfinite(torch.tensor(self.statistic(name)))]
        if broken:
            self._postpone(
                step, last, f"the optimizer's momentum of {sorted(broken)} is not finite"
            )
            return frozenset()
        return found

    def statistic(self, name: str) -> float:
        """Mean |momentum| over active weights, Adam's over the root of its second moment.

        Raises:
            ConfigError: the optimizer has taken steps and keeps none that is known.
        """
        layer = self.layers[name]
        held = moving_state(self.optimizers, name, sharded.trained(layer))
        state = {entry.key: entry.tensor for entry in held}
        if not state:
            return 0.0
        first = next((state[key] for key in MOMENTA if key in state), None)
        if first is None:
            raise ConfigError(
                f"the optimizer's state of layer {name!r} must hold a momentum, one of {MOMENTA}; "
                f"got {sorted(map(str, state))}"
            )
        if "exp_avg_sq" in state:
            first = first / (state["exp_avg_sq"].sqrt() + 1e-8)
        return float(layer.pack(first).abs().double().sum()) / max(layer.nnz, 1)


def _always() -> bool:
    return True


class Momentum(Observing):
    """A running average of the dense gradient: its largest magnitudes (SNFS).

    m <- decay m + (1 - decay) g before every weight step. The gradient is streamed, slab by slab
    and layer by layer; the average is dense, and `bytes()` says how much that is: as much as the
    dense weights. Each layer's inputs and output gradients are held from backward until the step.
    Over micro-batches and ranks signed gradients are summed first. Rows of a gradient that are not
    finite leave the average as it is. Under GradScaler a gradient counts with the scale it has.
    """

    dense_at = "steps"
    decay: float = 0.9

    def __init__(self, layers: Mapping[str, SparseLayer], norm: str, passes: int) -> None:
        super().__init__(layers, norm, passes, _always)
        self._averages: dict[str, Tensor] = {}
        self._broken: dict[str, Tensor] = {}  # of this batch: a bool on the device
        self._looked = False

    def watch(self, most: Mapping[str, int]) -> None:  # noqa: ARG002
        """Observe the gradients of all layers that train."""
        self._looked = False
        self._broken.clear()
        trained = {n: m for n, m in self.layers.items() if sharded.trained(m).requires_grad}
        self._observe(dict.fromkeys(trained, 0))
        for name, layer in trained.items():
            if not layer.col.is_meta:
                self._average(name)

    def rest(self) -> None:
        """Observe no longer; the average stays."""
        self._observe({})

    def see(self, names: Iterable[str]) -> None:
        """Average the gradients of this batch in; a layer that has none keeps its average."""
        if self._looked:
            return
        self._looked = True
        seen, problems = self._seen(names)
        if problems:
            log.warning("gradients are left out of the momentum: %s", problems)
        for name in seen:
            if name not in problems:
                with ranks.naming(f"layer {name!r}, summing its gradient over ranks"):
                    self._blend(name)

    def _blend(self, name: str) -> None:
        average, at, good = self._average(name), 0, []
        summed = ranks.is_distributed()

        def take(slab: Tensor) -> None:
            nonlocal at
            if summed:
                ranks.sum_over_ranks(slab)
            rows = average[at : at + len(slab)]
            at += len(slab)
            good.append(slab.isfinite().all())
            new = (rows * self.decay).add_(slab.to(rows), alpha=1 - self.decay)
            rows.copy_(torch.where(good[-1], new, rows))

        self.observers[name].scores(take)
        self._broken[name] = ~torch.stack(good).all()

    def _average(self, name: str) -> Tensor:
        layer = self.layers[name]
        values = sharded.trained(layer)
        held = self._averages.get(name)
        if held is None:
            dtype = torch.float64 if values.dtype is torch.float64 else torch.float32
            held = torch.zeros(layer.matrix_shape, dtype=dtype, device=values.device)
        self._averages[name] = held.to(values.device)
        return self._averages[name]

    def ready(self, names: Iterable[str], step: int, last: int | None) -> frozenset[str]:
        """The layers that have a momentum; none if a gradient of this batch is not finite."""
        names = list(names)
        self.see(names)
        broken = [name for name, told in self._broken.items() if bool(told)]
        found = [n for n in names if n in self._averages and bool(self._averages[n].any())]
        if broken or not found:
            why = f"the gradient of {broken} is not finite" if broken else "there is no momentum"
            self._postpone(step, last, why)
            return frozenset()
        return frozenset(found)

    def facts(self, name: str) -> Mapping[str, Tensor]:
        """The average."""
        return {"momentum": self._averages[name]}

    def best(self, name: str, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The free positions where the average is largest."""
        topology, average = self.layers[name].topology, self._averages[name]
        with ranged("score"):
            scores = stream_grow_scores(
                lambda rows: average[rows].clone(), average, topology, n, self.norm
            )
        return grow_largest(topology, keep, n, scores)

    def statistic(self, name: str) -> float:
        """Mean |momentum| over active weights."""
        topology = self.layers[name].topology
        active = topology.pack(self._averages[name])
        return float(active.abs().double().sum()) / max(topology.nnz, 1)

    def state(self) -> dict[str, Tensor]:
        """The averages, (rows, cols) float32 or float64, by layer."""
        return dict(self._averages)

    def load_state(self, state: Mapping[str, Tensor], write: bool = True) -> None:
        """Take averages; without any, which is logged, they start at zero."""
        for name, given in state.items():
            shape = tuple(self.layers[name].matrix_shape) if name in self.layers else None
            if tuple(given.shape) != shape:
                raise ConfigError(
                    f"the momentum of layer {name!r} must have shape {shape}; got "
                    f"{tuple(given.shape)}"
                )
        if not write:
            return
        missing = [name for name in self._averages if name not in state]
        if missing:
            log.warning(
                "the state that was loaded holds no momentum of %s: it starts anew", missing
            )
        self._averages.clear()
        for name in (*missing, *state):
            fresh = self._average(name)
            if name in state:
                fresh.copy_(state[name])
