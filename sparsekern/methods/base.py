"""`Method`: what all sparse training methods share, from few small nouns.

A schedule says when and how much, a source what growth looks at, a budget how many grow in each
layer. `decide` makes of them, and of the layers alone, what an update changes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.carry.averages import Followed, follow, twins_of
from sparsekern.carry.followers import follows
from sparsekern.carry.optimizer_state import check_followable, check_state, moving_state
from sparsekern.carry.transaction import Append, Attribute, Write
from sparsekern.carry.wrappers import check_holds, check_steps, unwrapped
from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.methods import ranks
from sparsekern.methods.budget import Budget, check_exact, same
from sparsekern.methods.change import Decision, LayerChange, UpdateRecord, change
from sparsekern.methods.loop import Loop
from sparsekern.methods.schedule import UpdateSchedule, resolve_end
from sparsekern.methods.sources import Source
from sparsekern.methods.update import TopologyUpdate, drop_count, drop_smallest, rewire
from sparsekern.nn import SparseLayer
from sparsekern.nn.init import bounds
from sparsekern.ops import block_norm
from sparsekern.ops.grow import check_norm
from sparsekern.ops.ranges import ranged
from sparsekern.swap import sparse_layers

log = logging.getLogger(__name__)

GROW_INITS = ("zeros", "init")


class Method(Loop):
    """A sparse training method attached to a model and its optimizer.

    A method of its own is a subclass that names its `source` and `budget`, and overrides what else
    is different: `drop_scores` or `survivors`, `grown_positions`, `grown_values`.

    Args:
        model: holds the sparse layers, see `sparsekern.sparsify_`.
        optimizer: any torch optimizer that holds the layers' `values`, or what wraps one; or
            several that step together, of which each layer's values are in exactly one.
        t_end: no update happens from there on: an int, in weight steps, or a float in (0, 1], a
            share of `total_steps`; about 3/4 of the training.
        total_steps: the optimizer steps of the whole training, for a share: the batches that
            updates spend are among them, as in a trainer's count.
        update_freq: weight steps between updates (Delta T).
        drop_fraction: share of the active weights replaced by an update at step 0 (alpha).
        decay: "cosine", "linear" or "constant" decay of that share until `t_end`.
        first_update: weight step of the first update; 0 as in the reference code.
        step_on_update: False: an update spends its batch and takes no weight step. True: the
            weight step is taken first, then the topology changes. None: the method's default.
        grow_init: "zeros", or "init" to draw grown weights as at initialisation.
        norm: how a block's entries become one score: "l1", "l2" or "max".
        grad_accumulation: backward passes per optimizer step.
        seed: of whatever is random, equal on all ranks.

    Raises:
        ConfigError, DtypeError: an argument is missing or out of its domain, or the model has no
            sparse layer, or the optimizer's state holds no valid state of a method.
        OptimizerError: not exactly one optimizer holds a layer's `values`, or one is LBFGS or
            takes its steps where no hook sees them.
    """

    source: ClassVar[type[Source]] = Source
    """What growth looks at; the method's own is `self.growth`."""
    budget: ClassVar[Budget] = same
    """How many grow in each layer: a function, called without `self`, of `methods.budget`."""
    default_step_on_update: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        t_end: float | None = None,
        total_steps: int | None = None,
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
        steps_first = self.default_step_on_update if step_on_update is None else step_on_update
        UpdateSchedule(1, update_freq, drop_fraction, first_update, decay)  # checks the others
        end = resolve_end(t_end, total_steps, update_freq, first_update, not steps_first)
        schedule = UpdateSchedule(end, update_freq, drop_fraction, first_update, decay)
        check_norm(norm)
        if grow_init not in GROW_INITS:
            raise ConfigError(f"`grow_init` must be one of {GROW_INITS}; got {grow_init!r}")
        if type(grad_accumulation) is not int or grad_accumulation < 1:
            raise ConfigError(
                f"`grad_accumulation` must be an int of at least 1; got {grad_accumulation!r}"
            )
        if type(seed) is not int:
            raise DtypeError(f"`seed` must be an int; got {seed!r}")
        optimizers = as_optimizers(optimizer)
        self.layers = _layers_to_train(model, optimizers)
        self._loads = {name: layer._loads for name, layer in self.layers.items()}
        self._held = {name: m.values for name, m in self.trained_layers().items()}
        super().__init__(optimizers, schedule, steps_first, grad_accumulation)
        self.schedule: UpdateSchedule = schedule
        self.grow_init, self.norm, self.seed = grow_init, norm, seed
        self.followed: list[Followed] = []
        self._ready_layers: frozenset[str] | None = None  # of the update that is being made
        self.growth = self.source(self.layers, norm, grad_accumulation)
        self._begin()

    def follow(self, average: Any) -> None:
        """Let an average of the model follow its topology updates: weights keep their positions.

        Torch's `AveragedModel`, and those of Lightning, ema_pytorch and timm, are found by
        themselves where they were built from the model; this is for all others. An average is
        held weakly. New weights start at 0 in it.

        Args:
            average: a module with a copy of the model's sparse layers, under the same names but
                for a prefix.

        Raises:
            AverageError: naming the layer that it lacks, or that holds other connections.
            DtypeError: it is no module.
        """
        known = [item for item in self.followed if item.average is not None]
        self.followed = [*known, follow(self.layers, average)]

    # ---- which to drop, which to grow, with which value: for subclasses

    def drop_scores(self, name: str, layer: SparseLayer) -> Tensor:  # noqa: ARG002
        """Score of each active block, (nnzb,) in CSR order: the smallest are dropped."""
        return block_norm(layer.active_values().float(), self.norm)

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:
        """Mark the active blocks that stay, (nnzb,) bool; the schedule asks for `fraction` less."""
        return drop_smallest(
            self.drop_scores(name, layer), drop_count(layer.topology.nnzb, fraction)
        )

    def most_grown(self, name: str, layer: SparseLayer, fraction: float) -> int:  # noqa: ARG002
        """How many blocks may grow in a layer at most, told to the source before the batch."""
        return drop_count(layer.topology.nnzb, fraction)

    def grown_positions(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> Tensor:  # noqa: ARG002
        """The `n` positions, int64, that a layer grows where it keeps the blocks `keep`."""
        return self.growth.best(name, keep, n, self.generator(name))

    def grown_values(self, name: str, layer: SparseLayer, update: TopologyUpdate) -> Tensor | None:
        """Values of the new blocks, (update.grown, bh, bw) in CSR order; None for zeros."""
        if self.grow_init == "zeros":
            return None
        topology = update.topology
        drawn = torch.rand(
            topology.values_shape,
            generator=self.generator(name),
            dtype=torch.float32,
            device="cpu",
        )
        drawn = drawn.to(layer.values) * 2 - 1
        drawn = topology.clear_padding_(drawn * bounds(topology).to(drawn.dtype))
        return drawn[update.source < 0]

    # ---- the update

    def decide(self, fraction: float) -> dict[str, Decision]:
        """What an update by this share would do to each layer; changes nothing.

        Raises:
            ConfigError, ShapeError, TopologyError: an override or the budget gives what can't be.
        """
        layers, keep = self.updated_layers(), {}
        for name, layer in layers.items():
            with ranged("drop", name), _naming(name):
                kept = self.survivors(name, layer, fraction)
                keep[name] = _expect("survivors", name, kept, (layer.topology.nnzb,), torch.bool)
        dropped = {name: kept.numel() - int(kept.sum()) for name, kept in keep.items()}
        grown = type(self).budget(dropped, layers, self.growth)
        check_exact(dropped, grown)
        decisions = {}
        for name, layer in layers.items():
            with ranged("grow", name), _naming(name):
                update = self._grow(name, layer, keep[name], grown[name])
                values = self.grown_values(name, layer, update)
                if values is not None:
                    _expect("grown_values", name, values, (update.grown, *layer.block))
            decisions[name] = Decision(update, dropped[name], values)
        return decisions

    def _grow(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> TopologyUpdate:
        positions = self.grown_positions(name, layer, keep, n)
        _expect("grown_positions", name, positions, (n,), torch.int64)
        try:
            return rewire(layer.topology, keep, positions)
        except TopologyError as error:  # a survivor, the same twice, or out of range
            raise TopologyError(f"`grown_positions` of layer {name!r}: {error}") from None

    def trained_layers(self) -> dict[str, SparseLayer]:
        """The layers that take part now: those whose values are not frozen."""
        return {name: m for name, m in self.layers.items() if m.values.requires_grad}

    def updated_layers(self) -> dict[str, SparseLayer]:
        """Those of them that an update changes: without a gradient, RigL leaves a layer out."""
        layers, ready = self.trained_layers(), self._ready_layers
        return {n: m for n, m in layers.items() if ready is None or n in ready}

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded by seed, weight step and layer: equal on every rank and resume."""
        index = list(self.layers).index(name)
        seed = (self.seed * 1_000_003 + self.weight_steps) * 1_009 + index
        return torch.Generator().manual_seed(seed % 2**63)

    def __repr__(self) -> str:
        s = self.schedule
        return (
            f"{type(self).__name__}(layers={len(self.layers)}, t_end={s.t_end}, "
            f"update_freq={s.freq}, drop_fraction={s.drop_fraction}, decay={s.decay!r}, "
            f"weight_steps={self.weight_steps}, updates={len(self.history)})"
        )

    def _attach(self) -> None:
        super()._attach()
        follows(self, self.layers.values())

    def _watch(self, due: bool) -> None:
        self._ready_layers = None
        fraction = self.schedule.fraction(self.weight_steps)
        layers = self.trained_layers() if due else {}
        self.growth.watch({n: self.most_grown(n, m, fraction) for n, m in layers.items()})

    def _weights(self) -> Iterable[nn.Parameter]:
        return (layer.values for layer in self.layers.values())

    def _takes_part(self) -> bool:
        layers = self.trained_layers()
        for name in layers:
            self._check_held(name)
        return bool(layers)

    def _check_held(self, name: str) -> None:
        values = self.layers[name].values
        if self._held.get(name) is not values:  # unfrozen since, or another parameter
            check_holds(self.optimizers, name, values)
            self._held[name] = values

    def _check_loads(self, with_state: bool) -> None:
        """Say that optimizer state belongs to other connections than the layers have."""
        for layer in self.layers.values():
            if not layer._blank:
                _ = layer.topology  # what was written into the arrays is seen now, if not before
        if self._state_of is not None and self._state_of != self._connections():
            log.warning(
                "the optimizer's state was saved with other connections than the model has now, so "
                "it belongs to other weights; load the model that was saved with it"
            )
        self._state_of = None
        loads = {name: layer._loads for name, layer in self.layers.items()}
        if loads == self._loads:
            return
        changed = {n: m for n, m in self.layers.items() if loads[n] != self._loads[n]}
        for name in changed.keys() & self.trained_layers().keys():
            self._check_held(name)
        late = [
            name
            for name, layer in changed.items()
            if not with_state and moving_state(self.optimizers, name, layer.values)
        ]
        self._loads = loads
        if late:
            log.warning(
                "other connections were loaded into %s, but no optimizer state: what the optimizer "
                "holds belongs to the old ones; load its state too, or build it anew",
                late,
            )

    def _connections(self) -> str | None:
        layers = self.layers.values()
        if any(layer._blank or layer.col.is_meta for layer in layers):
            return None
        digests = "".join(layer.topology.digest() for layer in layers)
        return hashlib.sha256(digests.encode()).hexdigest()

    def _ready(self) -> bool:
        layers, step = self.trained_layers(), self.weight_steps
        self._ready_layers = self.growth.ready(layers, step, self.last_update)
        if not self._ready_layers:
            self._watch(True)
            return False
        return ranks.all_agree(self._are_finite, "look at its weights")

    def _are_finite(self) -> bool:
        layers = self.updated_layers()
        broken = [n for n, m in layers.items() if not bool(m.values.isfinite().all())]
        if broken:
            step = self.weight_steps
            log.warning("update at weight step %d not made: %s not finite", step, broken)
        return not broken

    def _update(self) -> None:
        step, fraction = self.weight_steps, self.schedule.fraction(self.weight_steps)
        decisions, twins = ranks.together(
            lambda: (self.decide(fraction), twins_of(self.layers, self.followed)),
            "decide a topology update",
        )
        if ranks.is_distributed():
            ranks.check_agreement({name: d.update.topology for name, d in decisions.items()})

        def record(changes: dict[str, LayerChange]) -> list[Write]:
            done: list[Write] = [Append(self.history, UpdateRecord(step, fraction, changes))]
            done += [Attribute(self, "last_update", step), *self._publishing(step)]
            return done + self._spending()

        change(self.layers, decisions, self.optimizers, twins, record)


def as_optimizers(given: object) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of one method; raises if a method can't follow one of them."""
    optimizers = tuple(given) if isinstance(given, list | tuple) else (given,)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DtypeError(
                "`optimizer` must be a torch.optim.Optimizer, or several in a list; "
                f"got {type(optimizer).__name__}"
            )
        for inner in unwrapped(optimizer):
            check_followable(inner)
        check_steps(optimizer)
    if (
        len({id(unwrapped(optimizer)[-1]) for optimizer in optimizers}) != len(optimizers)
        or not optimizers
    ):
        raise ConfigError(f"`optimizer` must name each optimizer once; got {len(optimizers)}")
    return optimizers


def _layers_to_train(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, SparseLayer]:
    """All sparse layers; raises unless those that are not frozen are held by one optimizer.

    A layer that is frozen now takes part from when it is unfrozen.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ConfigError(
            "`model` has no sparse layer; call sparsify_ first (at a low sparsity ERK leaves all "
            "layers dense)"
        )
    for name, layer in layers.items():
        if layer.values.requires_grad:
            check_holds(optimizers, name, layer.values)
            check_state(optimizers, name, layer.values)
    return layers


def _expect(
    what: str, name: str, got: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """Check what an override gave for a layer."""
    if tuple(got.shape) != shape or dtype not in (None, got.dtype):
        kind = f"{dtype} " if dtype else ""
        raise ShapeError(
            f"`{what}` of layer {name!r} must be {kind}of shape {shape}; "
            f"got {got.dtype} of shape {tuple(got.shape)}"
        )
    return got


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let an exception say which layer it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise
