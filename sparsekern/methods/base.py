"""`Method`: what all sparse training methods share, from few small nouns.

A schedule says when and how much, a source what growth looks at, a budget how many grow in each
layer. `decide` makes of them, and of the layers alone, what an update changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparsekern.carry.averages import Followed, follow, twins_of
from sparsekern.carry.followers import follows
from sparsekern.carry.resize import check_free
from sparsekern.carry.transaction import Append, Attribute, Write
from sparsekern.errors import ConfigError, DtypeError, TopologyError
from sparsekern.methods import progress, ranks
from sparsekern.methods.agreement import facts
from sparsekern.methods.arguments import Arguments
from sparsekern.methods.attaching import as_optimizers, check_blocks, layers_to_train, tell_idle
from sparsekern.methods.budget import Budget, check_exact, same
from sparsekern.methods.change import Decision, LayerChange, UpdateRecord, change
from sparsekern.methods.joining import check_joinable, led
from sparsekern.methods.overrides import expect, naming
from sparsekern.methods.progress import Progress
from sparsekern.methods.schedule import UpdateSchedule, resolve_end
from sparsekern.methods.source import Source
from sparsekern.methods.trace import Trace
from sparsekern.methods.traced import Traced
from sparsekern.methods.update import TopologyUpdate, drop_count, drop_smallest, rewire
from sparsekern.nn import SparseLayer, sharded
from sparsekern.nn.init import bounds
from sparsekern.ops import block_norm
from sparsekern.ops.grow import check_norm
from sparsekern.ops.ranges import ranged
from sparsekern.topology import Topology

log = logging.getLogger(__name__)

GROW_INITS = ("zeros", "init")
DECIDE = "decide a topology update"
T = TypeVar("T")


class Method(Traced):
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
        exploration: follow which places were ever active, see `exploration()`; it takes a bit for
            each block of the dense weight.

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
    resizes: ClassVar[bool] = False
    """Whether updates change how many active blocks a layer has."""
    default_step_on_update: ClassVar[bool] = False
    defaults: ClassVar[Arguments] = {}
    """Other defaults of arguments than here, see `shows_arguments`."""

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
        exploration: bool = False,
    ) -> None:
        steps_first = self.default_step_on_update if step_on_update is None else step_on_update
        UpdateSchedule(1, update_freq, drop_fraction, first_update, decay)  # checks the others
        end = resolve_end(t_end, total_steps, update_freq, first_update, not steps_first)
        schedule = self.scheduled(end, update_freq, drop_fraction, first_update, decay)
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
        layers = layers_to_train(model, optimizers)
        if self.resizes:
            check_free(layers)
            check_blocks(layers)
        super().__init__(layers, optimizers, schedule, steps_first, grad_accumulation)
        self.schedule: UpdateSchedule = schedule
        self.grow_init, self.norm, self.seed = grow_init, norm, seed
        self.followed: list[Followed] = []
        self._ready_layers: frozenset[str] | None = None  # of the update that is being made
        self._out_of_inputs: list[int] = []  # ranks, at that update
        self._trace = Trace({}, {} if exploration else None)
        self.growth = self.source(self.layers, norm, grad_accumulation)
        self.growth.optimizers = optimizers
        self._begin()
        tell_idle(self, drop_fraction)

    def scheduled(
        self, t_end: int, freq: int, drop_fraction: float, first: int, decay: str
    ) -> UpdateSchedule:
        """The schedule; called once, before anything is attached."""
        return UpdateSchedule(t_end, freq, drop_fraction, first, decay)

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

    @property
    def dense_at(self) -> str:
        """When it computes a dense gradient, see `Source`; for one that knows better to override.

        Its source's.
        """
        return self.source.dense_at

    # ---- which to drop, which to grow, with which value: for subclasses

    def drop_scores(self, name: str, layer: SparseLayer) -> Tensor:  # noqa: ARG002
        """Score of each active block, (nnzb,) in CSR order: the smallest are dropped."""
        return block_norm(layer.active_values().float(), self.norm)

    def survivors(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:
        """Mark the active blocks that stay, (nnzb,) bool; the schedule asks for `fraction` less."""
        scores = expect("drop_scores", name, self.drop_scores(name, layer), (layer.topology.nnzb,))
        return drop_smallest(scores, drop_count(layer.topology.nnzb, fraction))

    def most_grown(self, name: str, layer: SparseLayer, fraction: float) -> int:  # noqa: ARG002
        """How many blocks may grow in a layer at most, told to the source before the batch.

        Of a method that resizes layers, what all of them drop.
        """
        layers = self.trained_layers().values() if self.resizes else (layer,)
        return sum(drop_count(one.topology.nnzb, fraction) for one in layers)

    def grown_counts(
        self, dropped: Mapping[str, int], layers: Mapping[str, SparseLayer]
    ) -> dict[str, int]:
        """How many blocks each of these layers grows, from how many it drops: the budget's word."""
        return type(self).budget(dropped, layers, self.growth)

    def size_after(self, layers: Mapping[str, SparseLayer]) -> int:
        """How many active blocks all these layers have after the update together: as many as now.

        What the budget says is held against it.
        """
        return sum(layer.topology.nnzb for layer in layers.values())

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
        drawn = drawn.to(layer.values.device, layer.values.dtype) * 2 - 1
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
            with ranged("drop", name):
                keep[name] = self._asked(layer, partial(self._keep, name, layer, fraction))
        dropped = {name: kept.numel() - int(kept.sum()) for name, kept in keep.items()}
        grown = self._asked(None, partial(self._shared_out, dropped, layers))
        decisions = {}
        for name, layer in layers.items():
            with ranged("grow", name):
                make = partial(self._decision, name, layer, keep[name], grown[name])
                decisions[name] = self._asked(layer, make)
        return decisions

    def _asked(self, layer: SparseLayer | None, work: Callable[[], T]) -> T:
        """What overrides answer. Where ranks hold parts of a layer, it is whole for a while."""
        if not self._sharded():
            return work()
        with nullcontext() if layer is None else sharded.gathered(layer):
            return ranks.together(work, DECIDE)

    def _keep(self, name: str, layer: SparseLayer, fraction: float) -> Tensor:
        with naming(name):
            kept = self.survivors(name, layer, fraction)
            return expect("survivors", name, kept, (layer.topology.nnzb,), torch.bool)

    def _shared_out(
        self, dropped: dict[str, int], layers: dict[str, SparseLayer]
    ) -> dict[str, int]:
        grown = self.grown_counts(dropped, layers)
        check_exact(dropped, grown, layers, self.size_after(layers))
        resized = {n: m for n, m in layers.items() if grown[n] != dropped[n]}
        if resized:
            # graphs on a GPU replay what they captured, whatever has become of its memory
            scan = not self.history or torch.cuda.is_available()
            check_free(resized, quick=not scan)
        return grown

    def _decision(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> Decision:
        with naming(name):
            update = self._grow(name, layer, keep, n)
            values = self.grown_values(name, layer, update)
            if values is not None:
                expect("grown_values", name, values, (update.grown, *layer.block))
            return Decision(update, keep.numel() - int(keep.sum()), values)

    def _grow(self, name: str, layer: SparseLayer, keep: Tensor, n: int) -> TopologyUpdate:
        positions = self.grown_positions(name, layer, keep, n)
        expect("grown_positions", name, positions, (n,), torch.int64)
        try:
            return rewire(layer.topology, keep, positions)
        except TopologyError as error:  # a survivor, the same twice, or out of range
            raise TopologyError(f"`grown_positions` of layer {name!r}: {error}") from None

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
        if not self.attached:
            self.growth.rest()
            return
        fraction = self.schedule.fraction(self.weight_steps)
        layers = self.trained_layers() if due else {}
        self.growth.watch({n: self.most_grown(n, m, fraction) for n, m in layers.items()})

    def _update_if_due(self) -> bool:
        with ranks.naming(f"a topology update of layers {list(self.layers)}"):
            return super()._update_if_due()

    def _ready(self) -> bool:
        layers, step = self.trained_layers(), self.weight_steps
        self._meet()
        self._ready_layers = self.growth.ready(layers, step, self.last_update)
        if not self._ready_layers:
            self._watch(True)
            return False
        copies = not (self._sharded() or self._out_of_inputs)
        broken = ranks.not_finite(self._broken, copies)
        if broken:
            step = self.weight_steps
            log.warning("update at weight step %d not made: %s not finite", step, broken)
        return not broken

    def _broken(self) -> list[str]:
        held = {n: sharded.local(sharded.trained(m)) for n, m in self.updated_layers().items()}
        return [name for name, values in held.items() if not bool(values.isfinite().all())]

    def _update(self) -> None:
        step, fraction = self.weight_steps, self.schedule.fraction(self.weight_steps)
        if self._sharded():
            decisions = self.decide(fraction)
            twins = ranks.together(self._twins, DECIDE)
        else:
            decisions, twins = ranks.together(
                lambda: (self.decide(fraction), self._twins()), DECIDE
            )
        if self._out_of_inputs:
            make = self.grown_values
            decisions = led(decisions, self._out_of_inputs, self.layers, make)
        self._compare({name: d.update.topology for name, d in decisions.items()})

        def record(changes: dict[str, LayerChange], trace: Trace) -> list[Write]:
            done: list[Write] = [Append(self.history, UpdateRecord(step, fraction, changes))]
            done += [Attribute(self, "_trace", trace)]
            done += [Attribute(self, "last_update", step), *self._publishing(step)]
            return done + self._spending()

        change(self.layers, decisions, self.optimizers, twins, self._trace, record)

    def _weights_move(self) -> None:
        self.growth.see(self.trained_layers())

    def _progress(self) -> Progress:
        return super()._progress()._replace(own=self.growth.state())

    def _check(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        super()._check(optimizer, state)
        found = progress.in_group(state["param_groups"])
        if found is not None:
            self.growth.load_state(progress.decode(found).own, write=False)

    def _resume(self, found: Progress) -> None:
        self.growth.load_state(found.own, write=False)
        super()._resume(found)
        self.growth.load_state(found.own)

    def _meet(self) -> None:
        """Be where the other ranks are, with the topologies that they have."""
        if not ranks.is_distributed():
            return
        layers, enabled = self.trained_layers(), getattr(self._join_config, "enable", False)
        check_joinable(layers, enabled)
        digests = {name: layer.topology.digest() for name, layer in layers.items()}
        here = ranks.Standing(self.weight_steps, self.last_update, digests, self.joined)
        self._out_of_inputs = ranks.check_standing(here)

    def _compare(self, topologies: Mapping[str, Topology]) -> None:
        """Raise `RankMismatchError` unless other ranks hold the same layers, to the bit."""
        if not ranks.is_distributed():
            return
        held = self.layers, self.growth, self.optimizers, self.joined
        ranks.check_equal(
            lambda: {n: facts(n, held[0][n], t, *held[1:]) for n, t in topologies.items()}
        )

    def _twins(self) -> dict[str, list[SparseLayer]]:
        return twins_of(self.layers, self.followed)
