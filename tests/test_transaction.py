"""An update is made as a whole or not at all, whatever interrupts it, wherever."""

import os
import random
import signal
import sys

import pytest
import torch
from torch import nn

from sparsekern import SET, RigL, sparse_layers, sparsify_
from sparsekern.carry.transaction import Append, Attribute, Copy, Item, commit

EVERY = 1 if os.environ.get("SPARSEKERN_ALL_LINES") else 499
WRITING = ("carry/transaction.py", "carry/rewire.py", "methods/change.py")
CASES = [
    (method, block, impl)
    for method in (RigL, SET)
    for block, impl in ((1, None), (4, None), (4, "masked"))
]


class Injected(BaseException):
    pass


class NamedError(Exception):
    pass


class Run:
    """A model of linear and recurrent layers, just before an update."""

    def __init__(self, method, block, impl):
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(8, 16), nn.GRU(16, 8, batch_first=True)])
        sparsify_(self.model, 0.7, block=block, distribution="uniform", impl=impl)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.method = method(
            self.model,
            self.optimizer,
            t_end=1000,
            update_freq=2,
            grow_init="init",
            step_on_update=False,
        )
        self.layers = sparse_layers(self.model)
        self.backward(0)
        while not (self.method.due and self.optimizer.state):
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.backward(len(self.method.history))

    def backward(self, seed):
        x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(seed))
        self.model[1](self.model[0](x))[0].square().sum().backward()

    def held(self):
        """All that an update changes, of all layers, by what it means."""
        out = [len(self.method.history), self.method.last_update]
        out += [p.grad is None for p in self.model.parameters()]
        for layer in self.layers.values():
            topology = layer.topology.validate()
            state = self.optimizer.state[layer.values]
            moments = [layer.pack(state[key]) for key in ("exp_avg", "exp_avg_sq")]
            tensors = [topology.positions(), layer.active_values(), *moments]
            out += [t.flatten().tolist() for t in tensors]
            out.append(id(layer.values) if layer.dense_mask is None else layer.mask().tolist())
        return out


def injected(run, at):
    """Raise at the `at`-th line of an update, in any file; the lines, and those of the writing."""
    count, writing = 0, set()

    def local(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if frame.f_code.co_filename.endswith(WRITING):
                writing.add(count)
            if count == at:
                raise Injected
        return local

    before = sys.gettrace()
    sys.settrace(lambda *_: local)
    try:
        run.method.step()
    except Injected:
        pass
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)
    return count, writing


# what is raised in a weak reference's callback goes no further
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("method", "block", "impl"), CASES)
def test_an_exception_at_any_line_leaves_the_old_model_or_the_new_one(method, block, impl):
    run = Run(method, block, impl)
    old = comparable(run.held())
    lines, writing = injected(run, -1)
    new = comparable(run.held())
    assert old != new
    spots = sorted({*range(1, lines, EVERY), *(writing if EVERY == 1 else sorted(writing)[::61])})
    seen = set()
    for at in spots:
        run = Run(method, block, impl)
        injected(run, at)
        now = comparable(run.held())
        assert now in (old, new), f"line event {at} of {lines}"
        seen.add(now == new)
        if now == old and at % 5 == 0:  # and it can be made again
            assert run.method.due
    assert False in seen


def comparable(held):
    return [x for x in held if not (type(x) is int and x > 2**30)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("impl", [None, "masked"])
def test_a_signal_at_any_moment_leaves_the_old_model_or_the_new_one(impl):
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    run = Run(SET, 1, impl)
    old = comparable(run.held())
    run.method.step()
    new = comparable(run.held())

    def interrupt(*_):
        raise Injected

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(25):
            run = Run(SET, 1, impl)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-2))
                run.method.step()
            except Injected:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                torch.set_grad_enabled(True)
            assert comparable(run.held()) in (old, new)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize("kind", ["values", "state", "array"])
def test_a_target_that_can_never_be_written_leaves_the_old_model(monkeypatch, impl, kind):
    run = Run(RigL, 1, impl)
    layer = list(run.layers.values())[-1]
    chosen = {
        "values": layer.values,
        "state": run.optimizer.state[layer.values]["exp_avg_sq"],
        "array": layer.col,
    }[kind]
    old, copy = comparable(run.held()), torch.Tensor.copy_

    def boom(self, *args, **kwargs):
        if self is chosen:
            raise MemoryError
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", boom)
    with pytest.raises(MemoryError) as raised:
        run.method.step()
    monkeypatch.undo()
    assert not getattr(raised.value, "__notes__", ())
    assert comparable(run.held()) == old
    assert run.method.step()


def test_writes_are_taken_back_in_spite_of_a_second_exception(monkeypatch):
    class Thing:
        name = "old"

    thing, entries, items, tensor = Thing(), {"a": 1}, [1], torch.zeros(3)
    raised = []
    copy = torch.Tensor.copy_

    def once(self, *args):
        if len(raised) == 1:  # the first of the undo
            raised.append("undo")
            raise KeyboardInterrupt
        return copy(self, *args)

    class Failing(Append):
        __slots__ = ()

        def write(self):
            raised.append("write")
            raise NamedError

    monkeypatch.setattr(torch.Tensor, "copy_", once)
    writes = [
        Copy(tensor, torch.ones(3)),
        Attribute(thing, "name", "new"),
        Item(entries, "a", 2),
        Item(entries, "b", 2),
        Append(items, 2),
        Failing(items, 3),
    ]
    with pytest.raises(NamedError):
        commit(writes)
    assert raised == ["write", "undo"]
    assert (thing.name, entries, items) == ("old", {"a": 1}, [1])
    assert torch.equal(tensor, torch.zeros(3))
