"""`Method`: what all dynamic sparse training methods share.

It attaches to an optimizer by step hooks, so that a training loop does not change, and leaves two
questions to its subclasses: which positions to grow, and what it needs to observe for that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekern.carry.optimizer_state import check_followable, check_holds, state_tensors
from sparsekern.errors import ConfigError, DtypeError, TrainingLoopError
from sparsekern.methods import ranks
from sparsekern.methods.schedule import UpdateSchedule
from sparsekern.methods.update import TopologyUpdate, drop_count, drop_smallest, rewire
from sparsekern.nn import SparseLayer
from sparsekern.nn.init import bounds
from sparsekern.ops import block_norm
from sparsekern.ops.grow import check_norm
from sparsekern.ops.ranges import ranged
from sparsekern.swap import sparse_layers

log = logging.getLogger(__name__)

GROW_INITS = ("zeros", "init")
_attached: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[Method]] = WeakKeyDictionary()


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


class Method:
    """A sparse training method attached to a model and its optimizer.

    Args:
        model: holds the sparse layers, see `sparsekern.sparsify_`.
        optimizer: any torch optimizer that holds the layers' `values`.
        t_end: no update happens from this weight step on; about 3/4 of the training.
        update_freq: weight steps between updates (Delta T).
        drop_fraction: share of the active weights replaced by an update at step 0 (alpha).
        decay: "cosine", "linear" or "constant" decay of that share until `t_end`.
        first_update: weight step of the first update; 0 as in the reference code.
        step_on_update: False: an update spends its batch and takes no weight step. True: the
            weight step is taken first, then the topology changes.
        grow_init: "zeros", or "init" to draw grown weights as at initialisation.
        norm: how a block's entries become one score: "l1", "l2" or "max".
        grad_accumulation: backward passes per optimizer step.
        seed: of whatever is random, equal on all ranks.

    Raises:
        ConfigError, DtypeError: an argument is out of its domain, or the model has no sparse layer.
        OptimizerError: the optimizer does not hold a layer's `values`, or is LBFGS.
    """

    default_step_on_update = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        t_end: int,
        update_freq: int = 100,
        drop_fraction: float = 0.3,
        decay: str = "cosine",
        first_update: int = 0,
        step_on_update: bool | None = None,
        grow_init: str = "zeros",
        norm: str = "l1",
        grad_accumulation: int = 1,
        seed: int = 0,
    ) -> None:
        self.schedule = UpdateSchedule(t_end, update_freq, drop_fraction, first_update, decay)
        check_norm(norm)
        if grow_init not in GROW_INITS:
            raise ConfigError(f"`grow_init` must be one of {GROW_INITS}; got {grow_init!r}")
        if type(grad_accumulation) is not int or grad_accumulation < 1:
            raise ConfigError(
                f"`grad_accumulation` must be an int of at least 1; got {grad_accumulation!r}"
            )
        if type(seed) is not int:
            raise DtypeError(f"`seed` must be an int; got {seed!r}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DtypeError(
                f"`optimizer` must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        self.layers = {n: m for n, m in sparse_layers(model).items() if m.values.requires_grad}
        if not self.layers:
            raise ConfigError(
                "`model` has no trainable sparse layer; call sparsify_ first (at a low sparsity "
                "ERK leaves all layers dense)"
            )
        for name, layer in self.layers.items():
            check_holds(optimizer, name, layer.values)
        check_followable(optimizer)
        if any(method.attached for method in _attached.get(optimizer, ())):
            raise ConfigError(
                "the optimizer has a method attached already; detach() that one first"
            )
        self.optimizer = optimizer
        self.step_on_update = (
            self.default_step_on_update if step_on_update is None else step_on_update
        )
        self.grow_init, self.norm = grow_init, norm
        self.grad_accumulation, self.seed = grad_accumulation, seed
        self.weight_steps = 0
        self.last_update: int | None = None
        self.history: list[UpdateRecord] = []
        self._took_step = False
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.setdefault(optimizer, WeakSet()).add(self)
        self._prepare()

    # ---- for subclasses

    def grown_positions(self, name: str, layer: SparseLayer, keep: Tensor) -> Tensor:
        """Positions to grow in one layer, as many as `keep` (nnzb,) bool drops."""
        raise NotImplementedError

    def arm(self, due: bool) -> None:
        """Called before each batch: whether its gradients will be asked for."""

    def is_ready(self) -> bool:
        """Whether a due update can be decided; if not, it waits for the next batch."""
        return True

    # ---- the training loop's side

    @property
    def attached(self) -> bool:
        """Whether the optimizer's steps still drive this method."""
        return bool(self._hooks)

    def trained_layers(self) -> dict[str, SparseLayer]:
        """The layers that take part now: those whose values are not frozen."""
        return {name: m for name, m in self.layers.items() if m.values.requires_grad}

    @property
    def due(self) -> bool:
        """Whether the next optimizer step is an update step."""
        return self.schedule.is_due(self.weight_steps, self.last_update)

    def step(self) -> bool:
        """Update the topology now if an update is due; returns whether it did.

        The optimizer's hooks call this; calling it by hand after backward does no harm. With
        `step_on_update` the update belongs after the weight step, so only the hooks make it.
        """
        if self.step_on_update or not self._update_if_due():
            return False
        # the batch is spent: without gradients the optimizer takes no weight step either
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def __call__(self) -> bool:
        """For loops written as `if method(): optimizer.step()`: False after an update step."""
        if self.step_on_update:
            return True
        return not self.step()

    def detach(self) -> None:
        """Remove the hooks: training goes on with the topology as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.arm(False)

    def state_dict(self) -> dict[str, Any]:
        """Progress of the schedule; topologies and values are in the model's own state_dict."""
        return {"weight_steps": self.weight_steps, "last_update": self.last_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the schedule.

        Raises:
            ConfigError: keys are missing or unknown, or a value is no step count.
        """
        if set(state) != {"weight_steps", "last_update"}:
            raise ConfigError(
                f"method state must have keys weight_steps, last_update; got {sorted(state)}"
            )
        steps, last = state["weight_steps"], state["last_update"]
        if type(steps) is not int or steps < 0 or not (last is None or type(last) is int):
            raise ConfigError(f"method state must hold step counts; got {dict(state)}")
        self.weight_steps, self.last_update = steps, last
        self._prepare()

    def __repr__(self) -> str:
        s = self.schedule
        return (
            f"{type(self).__name__}(layers={len(self.layers)}, t_end={s.t_end}, "
            f"update_freq={s.freq}, drop_fraction={s.drop_fraction}, decay={s.decay!r}, "
            f"weight_steps={self.weight_steps}, updates={len(self.history)})"
        )

    # ---- hooks

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if any(callable(a) for a in (*args, kwargs.get("closure"))):
            raise TrainingLoopError(
                "a topology update needs the gradients before optimizer.step(); got a closure: "
                "call backward first"
            )
        if not self.step_on_update:
            self.step()
        self._took_step = any(
            p.grad is not None for group in optimizer.param_groups for p in group["params"]
        )

    def _after_step(self, *_: Any) -> None:
        if not self._took_step:
            return
        if self.step_on_update:
            self._update_if_due()
        self.weight_steps += 1
        self._prepare()

    def _prepare(self) -> None:
        self.arm(self.due)

    # ---- the update

    def _update_if_due(self) -> bool:
        if not (self.due and self.is_ready()):
            return False
        layers = self.trained_layers()
        broken = [n for n, m in layers.items() if not bool(m.values.isfinite().all())]
        if broken:
            log.warning(
                "update at weight step %d not made: %s not finite", self.weight_steps, broken
            )
            return False
        with ranged("update"):
            self._update(layers)
        return True

    def _update(self, layers: Mapping[str, SparseLayer]) -> None:
        fraction = self.schedule.fraction(self.weight_steps)
        tensors = {n: self._moving_tensors(n, layer) for n, layer in layers.items()}
        updates = {n: self._decide(n, layer, fraction) for n, layer in layers.items()}
        changes = {}
        for name, (update, dropped) in updates.items():
            with ranged("rewire", name):
                self.layers[name].rewire_(update.topology, update.source, tensors[name])
            self._init_grown(name, update)
            self.layers[name].values.grad = None  # it belongs to the old positions
            changes[name] = LayerChange(dropped, update.grown)
        if ranks.is_distributed():
            ranks.check_agreement({n: layer.topology for n, layer in self.layers.items()})
        self.last_update = self.weight_steps
        self.history.append(UpdateRecord(self.weight_steps, fraction, changes))
        self._prepare()

    def _moving_tensors(self, name: str, layer: SparseLayer) -> list[Tensor]:
        return [layer.values.data, *state_tensors(self.optimizer, name, layer.values)]

    def _decide(self, name: str, layer: SparseLayer, fraction: float) -> tuple[TopologyUpdate, int]:
        topology = layer.topology
        k = drop_count(topology.nnzb, fraction)
        with ranged("drop_grow", name):
            keep = drop_smallest(block_norm(layer.active_values().float(), self.norm), k)
            return rewire(topology, keep, self.grown_positions(name, layer, keep)), k

    def _init_grown(self, name: str, update: TopologyUpdate) -> None:
        if self.grow_init == "zeros":
            return
        layer, fresh = self.layers[name], update.source < 0
        blocks = layer.active_values().clone()
        drawn = torch.rand(blocks.shape, generator=self.generator(name), device="cpu")
        drawn = drawn.to(blocks) * 2 - 1
        drawn = update.topology.clear_padding_(drawn * bounds(update.topology).to(blocks.dtype))
        blocks[fresh] = drawn[fresh]
        layer.set_active_values(blocks)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded by seed, weight step and layer: equal on every rank and resume."""
        index = list(self.layers).index(name)
        seed = (self.seed * 1_000_003 + self.weight_steps) * 1_009 + index
        return torch.Generator().manual_seed(seed % 2**63)
