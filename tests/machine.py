"""A random state machine over training: operations are drawn, and all is checked after each."""

import contextlib
import copy
import pickle
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_models import equal
from machine_checks import all_rows, check, check_moved, check_parts, check_product
from machine_parts import Parts, Spec, dense
from torch.optim.swa_utils import AveragedModel

import sparsekern as sk


class Interrupted(BaseException):
    pass


class Operation(NamedTuple):
    """One operation, and what its own draws begin with."""

    name: str
    seed: int


class Machine:
    """A model in training, and what it should be."""

    def __init__(self, spec: Spec, seed: int, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.parts = Parts(spec, seed, torch.float64 if seed % 2 else torch.float32)
        self.counts = {n: m.topology.nnzb for n, m in self.parts.layers().items()}
        self.saved: Any = None
        self.left: tuple[Parts, Any] | None = None  # what a copy was made of, and how it was
        self.interrupt_at = 0
        self.unfrozen = False  # since the last step: a batch may come before the method looks
        self._identities()

    def _identities(self) -> None:
        self.same = {n: id(m.values) for n, m in self.parts.layers().items()}

    def run(self, operation: Operation) -> None:
        """Make one operation and check everything."""
        g = random.Random(operation.seed)
        with self._updates_checked():
            OPERATIONS[operation.name](self, g)
        check_parts(self.parts, self.counts)
        names = list(self.same)
        check_product(self.parts.layers()[g.choice(names)], self.parts.dtype)
        now = {n: id(m.values) for n, m in self.parts.layers().items()}
        check(now == self.same, "a parameter is another object")
        if self.left is not None:
            check(equal(self.left[0].held(), self.left[1]), "what was copied changed with its copy")

    # ---- updates

    @contextlib.contextmanager
    def _updates_checked(self) -> Any:
        made = sk.Method._update

        def update(method: Any) -> None:
            check(method is self.parts.method, "another method makes an update")
            old, before, n = all_rows(self.parts), self._all(), len(method.history)
            try:
                with interrupted(self.interrupt_at):
                    made(method)
            except Interrupted:
                if len(method.history) == n:
                    check(equal(self._all(), before), "an interrupted update left a part")
                    raise
                check_moved(old, all_rows(self.parts), self.spec)
                raise
            check_moved(old, all_rows(self.parts), self.spec)

        sk.Method._update = update  # type: ignore[method-assign]
        try:
            yield
        finally:
            sk.Method._update = made  # type: ignore[method-assign]

    def _all(self) -> dict[str, Any]:
        gradients = [p.grad is None for p in self.parts.model.parameters()]
        return {**self.parts.held(), "gradients": gradients}

    def stepped(self, step: Any) -> None:
        """Make a step, and check what it counts as."""
        method = self.parts.method
        steps, n = method.state_dict()["weight_steps"], len(method.history)
        due = method.schedule.is_due(steps, method.last_update)
        due = due and self.spec.method != "static" and bool(method.trained_layers())
        step()
        updated = len(method.history) - n
        due, self.unfrozen = due and not (self.unfrozen and not updated), False
        check(updated == int(due), f"{updated} updates; due: {due}")
        spent = updated and not method.step_on_update
        now = method.state_dict()["weight_steps"]
        check(now == steps + (not spent), f"{now} weight steps after {steps}, spent: {spent}")

    def unchanged(self, function: Any) -> None:
        """Do what must change nothing."""
        before = self.parts.held()
        function()
        check(equal(self.parts.held(), before), "something changed")

    # ---- others

    def fresh(self, g: random.Random, model: Any = None) -> Parts:
        """Parts that never trained, of the same kind and size."""
        new = Parts(self.spec, g.randrange(2**20), self.parts.dtype)
        if model is not None:
            new.model = model
            new.attach()
            new.average = new.averaged()
        return new

    def taken(self, new: Parts, held: Any) -> None:
        """Go on with other parts, which must be the same."""
        check(equal(new.held(), held), "what was loaded or copied is not what was saved")
        frozen = [n for n, m in self.parts.layers().items() if not m.values.requires_grad]
        for name in frozen:
            new.layers()[name].values.requires_grad_(False)
        self.parts = new
        self._identities()


@contextlib.contextmanager
def interrupted(at: int) -> Any:
    """Raise at the `at`-th line that is executed in here; 0 for never."""
    count = 0

    def local(_frame: Any, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        if count == at and event == "line":
            raise Interrupted
        return local

    if not at:
        yield
        return
    before = sys.gettrace()
    sys.settrace(lambda *_: local)
    try:
        yield
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)


# ---- operations


def train(m: Machine, g: random.Random) -> None:
    m.parts.optimizer.zero_grad(set_to_none=g.random() < 0.7)
    m.parts.backward(g.randrange(2**20))
    m.stepped(m.parts.optimizer.step)


def closure(m: Machine, g: random.Random) -> None:
    seed, losses = g.randrange(2**20), []

    def run() -> Any:
        m.parts.optimizer.zero_grad()
        losses.append(m.parts.backward(seed))
        return losses[-1]

    given: list[Any] = []
    m.stepped(lambda: given.append(m.parts.optimizer.step(run)))
    check(len(losses) == 1, f"the closure ran {len(losses)} times")
    check(given[0] is losses[0], "the closure's loss is not handed on")


def skip(m: Machine, g: random.Random) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if g.random() < 0.5 else None
    m.parts.optimizer.zero_grad()

    def skipped() -> None:
        training = [module.training for module in m.parts.model.modules()]
        m.parts.model.eval()  # so that no norm counts the batch
        loss = m.parts.backward(g.randrange(2**20), float("inf"))
        for module, mode in zip(m.parts.model.modules(), training, strict=True):
            module.training = mode
        check(not loss.isfinite(), "the loss is finite")
        if scaler is not None:
            scaler.scale(loss)  # makes the scale
            scaler.step(m.parts.optimizer)
            scaler.update()
        m.parts.optimizer.zero_grad()

    m.unchanged(skipped)


def scaled(m: Machine, g: random.Random) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    m.parts.optimizer.zero_grad()
    m.parts.backward(g.randrange(2**20), 8.0)
    m.stepped(lambda: scaler.step(m.parts.optimizer))


def evaluate(m: Machine, g: random.Random) -> None:
    def forward() -> None:
        m.parts.model.eval()
        with torch.no_grad() if g.random() < 0.5 else torch.inference_mode():
            m.parts.loss(g.randrange(2**20))
        m.parts.model.train()

    m.unchanged(forward)


def average(m: Machine, _: random.Random) -> None:
    m.parts.update_average()


def freeze(m: Machine, g: random.Random) -> None:
    values = m.parts.layers()[g.choice(list(m.same))].values
    values.requires_grad_(not values.requires_grad)
    m.unfrozen |= values.requires_grad


def save(m: Machine, _: random.Random) -> None:
    m.saved = m.parts.held()


def load(m: Machine, _: random.Random) -> None:
    if m.saved is not None:
        put(m.parts, m.saved)
        check(equal(m.parts.held(), m.saved), "what was loaded is not what was saved")


def put(parts: Parts, held: dict[str, Any]) -> None:
    parts.model.load_state_dict(copy.deepcopy(held["model"]))
    parts.optimizer.load_state_dict(copy.deepcopy(held["optimizer"]))
    if parts.average is not None:
        parts.average.load_state_dict(copy.deepcopy(held["average"]))


def load_fresh(m: Machine, g: random.Random) -> None:
    held, new = m.parts.held(), m.fresh(g)
    if {n: t.topology.nnzb for n, t in new.layers().items()} != m.counts:
        return  # resized: that is for files
    put(new, held)
    m.taken(new, held)


def file(m: Machine, g: random.Random) -> None:
    held, path, other = m.parts.held(), m.folder / "run", m.folder / "average"
    parts, extra = m.parts, {"drawn": g.random()}
    sk.save(path, parts.model, parts.optimizer, parts.method, extra=extra)
    if parts.average is not None:
        sk.save(other, parts.average)
    kind = g.choice(("self", "sparse", "dense"))
    if kind == "self":
        train(m, g)
        new = m.parts
    elif kind == "sparse" or m.spec.impl == "masked":
        new = m.fresh(g)
    else:
        model = dense(m.spec, g.randrange(2**20), parts.dtype)
        sk.load(path, model)
        new = m.fresh(g, model)
    got = sk.load(path, new.model, new.optimizer, new.method)
    check(got == extra, "extra came back otherwise")
    if new.average is not None:
        sk.load(other, new.average)
    m.taken(new, held)


def deepcopy(m: Machine, g: random.Random) -> None:
    parts, held = m.parts, m.parts.held()
    new, names = copy.copy(parts), ["model", "optimizer", "method", "average"]
    if not isinstance(parts.average, AveragedModel):  # that one must come after its model
        g.shuffle(names)
    for name, copied in zip(names, copy.deepcopy([vars(parts)[n] for n in names]), strict=True):
        setattr(new, name, copied)
    m.left = parts, held
    m.taken(new, held)


def pickled(m: Machine, g: random.Random) -> None:
    parts, held = m.parts, m.parts.held()
    model = pickle.loads(pickle.dumps(parts.model))
    check(equal(dict(model.state_dict()), dict(held["model"])), "a pickled model is another")
    if parts.average is None and g.random() < 0.5:
        new = copy.copy(parts)
        of = parts.model, parts.optimizer, parts.method
        new.model, new.optimizer, new.method = pickle.loads(pickle.dumps(of))
        m.left = parts, held
        m.taken(new, held)


def cast(m: Machine, g: random.Random) -> None:
    dtype = g.choice((torch.float32, torch.float64))
    m.parts.optimizer.zero_grad()
    for model in (m.parts.model, m.parts.average):
        if model is not None:
            model.to(dtype)
    m.parts.optimizer.load_state_dict(m.parts.optimizer.state_dict())  # its state is cast so
    m.parts.dtype, m.saved = dtype, None


def resize(m: Machine, g: random.Random) -> None:
    name = g.choice(list(m.same))
    topology = m.parts.layers()[name].topology
    grid = topology.block_rows * topology.block_cols
    count = g.randrange(max(1, topology.nnzb - 3), min(grid, topology.nnzb + 3) + 1)
    new = torch.tensor(sorted(g.sample(range(grid), count)))
    before = all_rows(m.parts)
    m.parts.layers()[name].resize_(topology.with_positions(new))
    check_moved(before, all_rows(m.parts), m.spec._replace(grow_init="zeros"))
    m.counts[name], m.saved = count, None


def interrupt(m: Machine, g: random.Random) -> None:
    m.interrupt_at = g.randrange(1, 2 ** g.randrange(1, 15))
    m.parts.optimizer.zero_grad()
    m.parts.backward(g.randrange(2**20))
    try:
        m.parts.optimizer.step()
    except Interrupted:
        if g.random() < 0.5:  # and the same batch again
            m.interrupt_at = 0
            m.parts.optimizer.step()
    finally:
        m.interrupt_at = 0


def attach(m: Machine, g: random.Random) -> None:
    parts = m.parts
    state = parts.method.state_dict()
    parts.method.detach()
    check("sparsekern" not in parts.optimizer.param_groups[0], "a detached method left its entry")
    if g.random() < 0.5:
        parts.optimizer.zero_grad()
        parts.backward(g.randrange(2**20))
        parts.optimizer.step()
    parts.attach(parts.optimizer)
    parts.method.load_state_dict(state)
    if parts.average is not None and not isinstance(parts.average, AveragedModel):
        parts.method.follow(parts.average)


OPERATIONS: dict[str, Any] = {
    f.__name__: f
    for f in (
        train,
        closure,
        skip,
        scaled,
        evaluate,
        average,
        freeze,
        save,
        load,
        load_fresh,
        file,
        deepcopy,
        pickled,
        cast,
        resize,
        interrupt,
        attach,
    )
}
WEIGHTS = {"train": 6, "average": 4, "interrupt": 3}
