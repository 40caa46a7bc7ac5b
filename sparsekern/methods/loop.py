"""The training loop's side of a method: optimizers' steps, counted and followed by hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsekern.carry.transaction import Attribute, Call, Item, Write
from sparsekern.carry.wrappers import has_hooks, parameters, unwrapped
from sparsekern.errors import ConfigError
from sparsekern.methods import progress
from sparsekern.methods.change import UpdateRecord
from sparsekern.methods.passes import BackwardPasses
from sparsekern.methods.progress import Progress
from sparsekern.methods.registry import attached_to, note
from sparsekern.methods.schedule import Schedule
from sparsekern.methods.steps import Arguments, changes_weights, has_stepped, run_closure
from sparsekern.ops.ranges import ranged

log = logging.getLogger(__name__)

T = TypeVar("T")

PASSES_WITHOUT_STEP = 10
"""Times `grad_accumulation`: so many backward passes without a step are worth a warning."""


class Loop:
    """Follows optimizers' steps by hooks, so that a training loop does not change.

    It knows when an update is due, and leaves to its subclass what an update is.

    Steps that follow one another with no backward pass between them, at most one of each optimizer,
    are a *round*: one weight step. An update comes before the first of a round that would change a
    weight (with `step_on_update` after the last), and spends the gradients of all.
    """

    def __init__(
        self,
        optimizers: tuple[torch.optim.Optimizer, ...],
        schedule: Schedule,
        step_on_update: bool,
        grad_accumulation: int,
    ) -> None:
        self.optimizers = optimizers
        self.schedule: Schedule = schedule
        self.optimizer = optimizers[0]
        self.step_on_update, self.grad_accumulation = step_on_update, grad_accumulation
        self.weight_steps = 0
        self.last_update: int | None = None
        self.history: list[UpdateRecord] = []
        self.postponed = 0  # batches of this process on which a due update was not made
        self._chains = tuple(unwrapped(optimizer) for optimizer in optimizers)
        self._hooks: list[RemovableHandle] = []
        self._retired = False  # the hooks are left, which can't be removed while they run
        self._passes: BackwardPasses | None = None
        self._outermost: torch.optim.Optimizer | None = None  # whose step is running
        self._stepping: torch.optim.Optimizer | None = None  # the one inside that takes it
        self._moving = False  # that step changes weights
        self._round: list[torch.optim.Optimizer] = []  # who has stepped in it
        self._moved = False  # a step of this round did
        self._spent = False  # an update of this round spent the gradients
        self._warned = False  # that none of the passes was followed by a step
        self._passed = False  # there was a backward pass since the last step
        self._state_loaded = False  # an optimizer's was, since then
        self._state_of: str | None = None  # digest of the connections that it belongs to

    # ---- for the subclass

    def _watch(self, due: bool) -> None:
        """Called before each batch: whether its gradients will be asked for."""
        raise NotImplementedError

    def _takes_part(self) -> bool:
        """Whether any layer takes part in an update now."""
        raise NotImplementedError

    def _ready(self) -> bool:
        """Whether a due update can be made now; if not, it waits for the next batch."""
        raise NotImplementedError

    def _update(self) -> None:
        """Make the update, all or nothing, `last_update` and `_spending` with it."""
        raise NotImplementedError

    def _weights(self) -> Iterable[nn.Parameter]:
        """The parameters that a backward pass of the model reaches."""
        raise NotImplementedError

    def _weights_move(self) -> None:
        """Called before each weight step, and what update is made instead: gradients are there."""

    def _weights_moved(self) -> None:
        """Called after each weight step, before an update that belongs to it."""

    def _check_loads(self, with_state: bool) -> None:
        """Called before each step: whether an optimizer's state was loaded since the last one."""

    def _connections(self) -> str | None:
        """A digest of all topologies as they are."""
        return None

    # ---- for the training loop

    @property
    def attached(self) -> bool:
        """Whether the optimizers' steps still drive this method."""
        return bool(self._hooks) and not self._retired

    @property
    def due(self) -> bool:
        """Whether the next optimizer step is an update step."""
        return self.schedule.is_due(self.weight_steps, self.last_update)

    def step(self) -> bool:
        """Update the topology now if an update is due; returns whether it did.

        The optimizer's hooks call this; calling it by hand after backward does no harm. With
        `step_on_update` the update belongs after the weight step, so only the hooks make it.
        """
        return not self.step_on_update and self._update_if_due()

    def __call__(self) -> bool:
        """For loops written as `if method(): optimizer.step()`: False after an update step."""
        if self.step_on_update:
            return True
        return not self.step()

    def _retire(self) -> None:
        """Follow no longer, from inside a hook, where `detach` can't be called."""
        self._retired = True
        self._drop_entries()
        self._stop_counting()

    def look_again(self) -> None:
        """A layer has another size now: what was seen of its gradient is of no use any more."""
        self._state_of = None
        self._watch(self.due)

    def detach(self) -> None:
        """Remove the hooks, and the entry in the optimizers: the topology stays as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stop_counting()
        if not self._retired:
            self._drop_entries()
        self._watch(False)

    def _drop_entries(self) -> None:
        for chain in self._chains:
            for optimizer in chain:
                optimizer.param_groups[0].pop(progress.ENTRY, None)

    def state_dict(self) -> dict[str, Any]:
        """Progress of the schedule and history, as plain data; the optimizers' states hold it too.

        Topologies and values are in the model's own state_dict.
        """
        return progress.encode(self._progress())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the schedule; a state without history leaves an empty one.

        Raises:
            ConfigError: keys are missing or unknown, or a value is no step count or no history.
        """
        self._resume(progress.decode(state))
        self._publish()

    def _spending(self) -> list[Write]:
        """What spends the batch: without gradients no optimizer takes a weight step either."""
        if self.step_on_update:
            return []
        own = {id(p): p for chain in self._chains for p in parameters(chain) if p.grad is not None}
        writes: list[Write] = [Attribute(p, "grad", None) for p in own.values()]
        stepping = self._stepping
        if stepping is None:
            return writes
        # those that step later keep gradients of zero until then: GradScaler wants to see some
        later = [c for c in self._chains if c[-1] is not stepping]
        kept = {id(p): p for chain in later for p in parameters(chain) if id(p) in own}
        return [*writes, *(Call(partial(_zero_gradient, p)) for p in kept.values())]

    # ---- attaching

    def _begin(self) -> None:
        """Attach for the first time, and go on where the optimizers' state says."""
        found = progress.find(self._chains)
        resumed = None if found is None else progress.decode(found)
        self._attach()
        if resumed is not None:
            self._resume(resumed)
            self._state_of = resumed.connections
            self._publish()
            text = "%s goes on at weight step %d, as the optimizer's state says"
            log.log(self._late(), text, type(self).__name__, self.weight_steps)
        elif any(map(has_stepped, self._chains)):
            self._say_nothing_found("the optimizer has taken steps")

    def _attach(self) -> None:
        for chain in self._chains:
            if attached_to(chain[-1]) is not None:
                raise ConfigError(
                    "the optimizer has a method attached already; detach() that one first"
                )
        for chain in self._chains:
            note(chain[-1], self)
            self._hook(chain)
        self._passes = BackwardPasses(self._weights(), self._count_pass)
        self._watch(self.due)
        self._publish()

    def _hook(self, chain: tuple[torch.optim.Optimizer, ...]) -> None:
        known: list[object] = []
        for optimizer in reversed(chain):
            # a wrapper may share the hooks of the one inside (Lightning's does), or have none
            hooks = optimizer._optimizer_step_pre_hooks if has_hooks(optimizer) else None
            if hooks is None or any(hooks is other for other in known):
                continue
            known.append(hooks)
            self._hooks += [
                optimizer.register_step_pre_hook(self._live(self._before_step)),
                optimizer.register_step_post_hook(self._live(self._after_step)),
                optimizer.register_state_dict_post_hook(self._live(self._save)),
                optimizer.register_load_state_dict_pre_hook(self._live(self._check)),
                optimizer.register_load_state_dict_post_hook(self._live(self._load)),
            ]

    def _live(self, hook: Callable[..., T]) -> Callable[..., T | None]:
        return lambda *args: None if self._retired else hook(*args)

    def __getstate__(self) -> dict[str, Any]:
        # hooks belong to one optimizer; a copy hangs its own on the copied one
        own: dict[str, Any] = {"_hooks": [], "_passes": None, "_outermost": None, "_stepping": None}
        # a round that has begun counts: the copy begins another one
        own |= {"weight_steps": self.weight_steps + self._moved, "_round": [], "_moved": False}
        return self.__dict__ | own | {"_spent": False, "_attach_again": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attach = state.pop("_attach_again")
        self.__dict__.update(state)
        if attach:
            self._attach()

    # ---- steps

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        chain = next(c for c in self._chains if any(o is optimizer for o in c))
        around = chain[: chain.index(optimizer)]
        if not any(self._outermost is outer for outer in around):
            self._outermost, self._stepping = optimizer, None
        if optimizer is not chain[-1]:
            return None
        self._stepping, self._moving = optimizer, False
        self._check_loads(self._state_loaded)
        self._state_loaded = False
        run = run_closure(args, kwargs)
        if self._passed or any(optimizer is other for other in self._round):
            self._close_round()
        spent = self._spent
        if spent:
            for parameter in parameters(chain):
                parameter.grad = None
        moving = changes_weights(chain, self._passed)
        self._passed = False
        if moving and not self._moved:
            self._weights_move()
            if self.step():
                spent = self._spent = True
        self._moving = moving and not spent
        if run is None:
            return None
        closure, handed_on = run
        closure.spent = spent
        return handed_on

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # a wrapper may still change the weights: ZeRO hands out those of other ranks
        if optimizer is not self._outermost:
            return
        stepped, self._outermost, self._stepping = self._stepping, None, None
        if stepped is None:
            return
        self._stop_counting(for_good=len(self._chains) == 1)
        self._round.append(stepped)
        self._moved |= self._moving
        self._publish()
        if len(self._round) == len(self._chains):
            if self._moved:
                self._weights_moved()
            if self._moved and self.step_on_update:
                self._update_if_due()
            self._close_round()

    def _close_round(self) -> None:
        if not self._round:
            return
        self.weight_steps += self._moved
        self._round.clear()
        self._moved = self._spent = False
        self._watch(self.due)
        self._publish()

    def _update_if_due(self) -> bool:
        asked = self.due and self._takes_part()
        if not (asked and self._ready()):
            self.postponed += asked
            return False
        self._check_loads(self._state_loaded)  # `step` may be called by hand
        with ranged("update"):
            self._update()
        self._watch(self.due)
        self._publish()
        return True

    def _count_pass(self, passes: int) -> None:
        self._passed = True
        if passes == PASSES_WITHOUT_STEP * self.grad_accumulation and not self._warned:
            self._warned = True
            log.warning(
                "%d backward passes and no step of the optimizer that %s is attached to: "
                "attach it to the one that takes the steps",
                passes,
                type(self).__name__,
            )

    def _stop_counting(self, for_good: bool = True) -> None:
        if self._passes is not None:
            self._passes.restart()
            if for_good:
                self._passes.stop()
                self._passes = None

    # ---- the optimizers' state

    def _progress(self) -> Progress:
        return Progress(self.weight_steps + self._moved, self.last_update, self.history)

    def _publish(self) -> None:
        for write in self._publishing(self.last_update):
            write.write()

    def _publishing(self, last_update: int | None) -> list[Item]:
        """What tells the optimizers of the last update."""
        now = progress.short(self._progress()._replace(last_update=last_update))
        chains = self._chains if self.attached else ()
        groups = [optimizer.param_groups[0] for chain in chains for optimizer in chain]
        return [Item(group, progress.ENTRY, dict(now)) for group in groups]

    def _save(self, _optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        now = self._progress()._replace(connections=self._connections())
        state["param_groups"][0][progress.ENTRY] = progress.entry(now)

    def _check(self, _optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        found = progress.in_group(state["param_groups"])
        if found is not None:
            progress.decode(found)

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        self._state_loaded = True
        found = progress.in_group(optimizer.param_groups)
        if found is None:
            self._say_nothing_found("the optimizer state that was loaded holds no method's state")
        else:
            decoded = progress.decode(found)
            self._resume(decoded)
            self._state_of = decoded.connections
        self._publish()

    def _resume(self, found: Progress) -> None:
        self.weight_steps, self.last_update = found.weight_steps, found.last_update
        self.history = found.history or []
        self._round.clear()
        self._moved = self._spent = False
        self._watch(self.due)

    def _late(self) -> int:
        return logging.WARNING if self.weight_steps >= self.schedule.t_end else logging.INFO

    def _say_nothing_found(self, what: str) -> None:
        log.warning(
            "%s: the schedule of %s goes on at weight step %d; load its own state if it has one",
            what,
            type(self).__name__,
            self.weight_steps,
        )


def _zero_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = torch.zeros_like(parameter)
