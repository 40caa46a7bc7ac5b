"""Gradual magnitude pruning: train dense, leave out more and more, go on truly sparse."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from sparsekern.carry.parallel import check_parallel
from sparsekern.carry.resize import holders
from sparsekern.carry.transaction import Append, Attribute, Copy, Write, commit
from sparsekern.carry.wrappers import check_holds
from sparsekern.errors import ConfigError
from sparsekern.methods import ranks
from sparsekern.methods.attaching import as_optimizers
from sparsekern.methods.change import LayerChange, UpdateRecord
from sparsekern.methods.loop import Loop
from sparsekern.methods.progress import Progress
from sparsekern.methods.schedule import CubicSchedule, check_int, resolve_end
from sparsekern.methods.steps import Moves
from sparsekern.nn.sharded import is_sharded
from sparsekern.swap import Pattern, candidates, sparse_layers, sparsify_
from sparsekern.swap.refuse import check_model
from sparsekern.swap.shares import check_cut
from sparsekern.swap.targets import Filter
from sparsekern.tickets.masks import Masks, block_masks, top, weights
from sparsekern.topology.blocks import Block, as_block

log = logging.getLogger(__name__)


class Pruning(Loop):
    """Gradual magnitude pruning (Zhu & Gupta 2017), attached to a dense model and its optimizer.

    After every `update_freq`-th weight step the smallest of the weights that are left go, and stay
    zero from then on; the loop does not change. The training is dense until `t_end`: it costs what
    dense training costs, plus one byte a weight. Then the layers turn sparse in memory by
    themselves, with values and optimizer state, and the rest of the training is cheap. Under
    DistributedDataParallel or torch.compile, which count on the parameters, they stay masked,
    which is logged: call `finish` where nothing wraps the model any more. An average of the dense
    model (EMA) can't follow into the sparse one: make it anew then.

    The masks need no place of their own in a saved state: they are where weights are not zero. So
    load the model and its optimizer's state together.

    Args:
        model: dense; `weights` of it are pruned.
        optimizer: one or several that hold these weights.
        sparsity: at the end, of all these weights together.
        t_start: weight step of the first update.
        t_end: of the last one: an int, in weight steps, or a float in (0, 1], a share of
            `total_steps`.
        total_steps: weight steps of the whole training, for a share.
        update_freq: weight steps between updates.
        initial_sparsity: after the first update; .7 makes it GMP* (Kurtic & Alistarh 2022).
        scope: "global" compares all weights with one another; "layer", "er", "erk" and mappings
            are those of `top`.
        block: connections go in blocks of this size, by mean magnitude; see `sparsify_`.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.
        grad_accumulation: backward passes per optimizer step.

    Raises:
        ConfigError, DtypeError: an argument is missing or out of its domain, or the model has no
            dense weight to prune, or a sparse layer.
        OptimizerError: not exactly one optimizer holds a weight, or one can't be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        sparsity: float,
        *,
        t_start: int = 0,
        t_end: float | None = None,
        total_steps: int | None = None,
        update_freq: int = 100,
        initial_sparsity: float = 0.0,
        scope: str | Mapping[str, float] = "global",
        block: Block = 1,
        filter_fn: Filter | None = None,
        exclude: Sequence[Pattern] = (),
        grad_accumulation: int = 1,
    ) -> None:
        check_model(model)
        end = resolve_end(t_end, total_steps, update_freq, t_start, spends=False)
        schedule = CubicSchedule(sparsity, t_start, end, update_freq, initial_sparsity)
        check_int("grad_accumulation", grad_accumulation, 1)
        optimizers = as_optimizers(optimizer)
        check_parallel(model, optimizers)
        if sparse_layers(model):
            raise ConfigError(
                "`model` has sparse layers already: pruning needs the dense phase before them "
                f"({next(iter(sparse_layers(model)))!r} is one)"
            )
        self.weights = weights(model, filter_fn, exclude)
        for name, weight in self.weights.items():
            if is_sharded(weight):
                raise ConfigError(
                    f"the weight of layer {name!r} is sharded over ranks by FSDP2, which pruning "
                    "can't follow: prune before fully_shard"
                )
            check_holds(optimizers, name, weight)
        self.model, self.scope, self.block = model, scope, as_block(block)
        self._targets = {
            t.name: t for t in candidates(model, filter_fn, exclude, first_conv_stays=False)
        }
        for target in self._targets.values():
            check_cut(target._replace(block=self.block, sparsity=sparsity))
        self._chosen(sparsity, {})  # refuses a scope
        self._masks: Masks | None = None  # until they are read off the weights
        super().__init__(optimizers, schedule, True, grad_accumulation)
        self.schedule: CubicSchedule = schedule
        self._begin()

    @property
    def masks(self) -> Masks:
        """Which weights are active now: bool, of the weights' shapes, by name; none when sparse."""
        if self._masks is None:
            self._masks = self._read()
        return dict(self._masks)

    @property
    def done(self) -> bool:
        """Whether the last update has been made."""
        return self.last_update is not None and self.last_update >= self.schedule.t_end

    def __repr__(self) -> str:
        s = self.schedule
        return (
            f"{type(self).__name__}(layers={len(self.weights)}, sparsity={s.sparsity}, "
            f"t_end={s.t_end}, update_freq={s.freq}, weight_steps={self.weight_steps}, "
            f"updates={len(self.history)})"
        )

    def finish(self) -> nn.Module:
        """Turn the pruned layers into sparse ones now, with their values and optimizer state.

        By itself this happens after the last update; by hand it can be done before, or where a
        wrapper was in the way. The method is detached.

        Returns:
            The model.

        Raises:
            ConfigError: something still counts on the parameters, or the layers are sparse already.
        """
        held = self._held()
        if held:
            raise ConfigError(f"{held}: call finish() on the model without it")
        self._turn_sparse()
        self.detach()
        return self.model

    # ---- what a loop asks

    def _watch(self, due: bool) -> None:
        """Nothing: magnitudes need no gradient."""

    def _takes_part(self) -> bool:
        return True

    def _ready(self) -> bool:
        broken = ranks.not_finite(self._broken, copies=True)
        if broken:
            step = self.weight_steps
            log.warning("update at weight step %d not made: %s not finite", step, broken)
        return not broken

    def _broken(self) -> list[str]:
        return [n for n, w in self.weights.items() if not bool(w.isfinite().all())]

    def _weights(self) -> Iterable[nn.Parameter]:
        return self.weights.values()

    def _resume(self, found: Progress) -> None:
        super()._resume(found)
        self._masks = None

    def _check_loads(self, with_state: bool) -> None:
        if with_state or self._masks is None:  # now, before the step moves what is zero
            self._masks = self._read()

    def _step_ends(self, moves: Moves) -> None:
        """Momentum moves what is zero too: it is zero again."""
        if self.last_update is not None:
            with torch.no_grad():
                for name, mask in self.masks.items():
                    if moves(self.weights[name]):
                        self.weights[name].mul_(mask)

    def _update_if_due(self) -> bool:
        made = super()._update_if_due()
        if made and self.done:
            self._hand_over()
        return made

    def _update(self) -> None:
        step, old = self.weight_steps, self.masks
        sparsity = self.schedule.at(step)
        new = ranks.together(lambda: self._chosen(sparsity, old), "choose what to prune")
        changes = {n: LayerChange(int((m & ~new[n]).sum()), 0) for n, m in old.items()}
        writes: list[Write] = [Copy(w, w.detach() * new[n]) for n, w in self.weights.items()]
        writes += [
            Attribute(self, "_masks", new),
            Append(self.history, UpdateRecord(step, sparsity, changes)),
            Attribute(self, "last_update", step),
            *self._publishing(step),
        ]
        commit(writes)

    def _chosen(self, sparsity: float, active: Masks) -> Masks:
        """The largest; of the ones that are zero, those that are active stay before others."""
        if self.block != (1, 1):
            return block_masks(self._targets, sparsity, self.scope, self.block)
        scores = {name: w.detach().abs() for name, w in self.weights.items()}
        for name, mask in active.items():
            scores[name].masked_fill_(~mask, -1)
        return top(scores, sparsity, self.scope)

    def _read(self) -> Masks:
        """The masks of a training that goes on: what is not zero, as often as was kept."""
        masks = {name: w.detach() != 0 for name, w in self.weights.items()}
        for name, mask in masks.items():
            dropped = sum(record.layers[name].dropped for record in self.history)
            missing = mask.numel() - dropped - int(mask.sum())
            if missing > 0:  # an active weight is zero by chance, or dead
                free = (~mask).flatten().nonzero()[:missing, 0]
                mask.view(-1)[free] = True
        return masks

    # ---- turning sparse

    def _held(self) -> str:
        """What is in the way of other parameters; empty if nothing is."""
        found = next(holders(*(target.module for target in self._targets.values())), None)
        return f"its layers can't turn sparse: {found} counts on their parameters" if found else ""

    def _hand_over(self) -> None:
        held = self._held()
        if held:
            log.warning("pruning is done, but %s; it stays masked until finish() is called", held)
            return
        self._turn_sparse()
        self._retire()

    def _turn_sparse(self) -> None:
        if not self.weights:
            raise ConfigError("the layers have turned sparse already")
        self._stop_counting()  # by hooks on the parameters, which would be missed
        pruned = {name: mask for name, mask in self.masks.items() if not bool(mask.all())}
        sparsify_(
            self.model,
            masks=pruned,
            block=self.block,
            filter_fn=_any,
            optimizer=list(self.optimizers),
        )
        self.weights, self._targets, self._masks = {}, {}, {}
        log.info("pruning is done at weight step %d: the model is sparse now", self.weight_steps)


def _any(_module: nn.Module, _name: str) -> bool:
    """The masks say which."""
    return True
