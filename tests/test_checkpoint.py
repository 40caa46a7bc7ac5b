"""`save` and `load`: everything comes back, whatever fails leaves the old file or the old model."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.checkpoint import file

pytest.importorskip("safetensors")

ROOT = Path(sk.__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METHODS = {"rigl": sk.RigL, "set": sk.SET, "static": sk.Static}


class Tied(nn.Module):
    """Layers of all kinds, a tied weight, a buffer, and an extra state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 6)
        self.fc = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.embedding = nn.Embedding(7, 10)
        self.out = nn.Linear(10, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.steps = 0

    def forward(self, x):
        y = self.line(self.conv(x).flatten(2).relu())
        y, _ = self.rnn(y.permute(2, 0, 1))
        return self.out(self.norm(self.fc(y[-1])))

    def get_extra_state(self):
        return {"steps": self.steps, "pair": (1, float("inf"))}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def dense(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Tied().to(dtype)


def sparse(dtype=torch.float32, seed=0, block=2, share=0.5, **kwargs):
    return sk.sparsify_(
        dense(dtype, seed), share, block=block, distribution="uniform", exclude=("conv",), **kwargs
    )


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(4, 2, 4, 4, generator=g).to(model.fc.weight.dtype)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(model):
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal(a, b):
    """Whether two plain objects are the same, with tensors and NaN in them."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)  # noqa: PLR0124


def facts(model, optimizer=None, method=None):
    """All that a failed load must leave as it was."""
    found = {"types": [type(m) for m in model.modules()], "ids": [*map(id, model.parameters())]}
    found["tensors"] = states(model)
    if optimizer is not None:
        found["state"] = copy.deepcopy(optimizer.state_dict())
    if method is not None:
        found["method"] = copy.deepcopy(method.state_dict())
    return found


def assert_unchanged(before, *trio):
    assert equal(facts(*trio), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_model_turns_into_the_saved_one(tmp_path, dtype):
    path, model = tmp_path / "m.safetensors", sparse(dtype)
    model.steps = 7
    sk.save(path, model)
    for other in (dense(dtype, 1), sparse(dtype, 1), sparse(dtype, 2, block=1, share=0.75)):
        before = dict(other.named_parameters())
        was_sparse = set(sk.sparse_layers(other))
        assert sk.load(path, other) is None
        assert same(states(model), states(other))
        assert other.steps == 7
        assert other.out.weight is other.embedding.weight
        for name, layer in sk.sparse_layers(other).items():
            layer.topology.validate()
            if name in was_sparse:
                assert layer.values is before[f"{name}.values"]
        other.eval(), model.eval()
        x = torch.randn(2, 2, 4, 4, dtype=dtype)
        assert torch.equal(other(x), model(x))


def test_a_masked_model_turns_others_sparse_and_back(tmp_path):
    masked, model = sparse(impl="masked"), dense(seed=1)
    sk.save(tmp_path / "m", masked)
    sk.load(tmp_path / "m", model)
    assert all(layer.impl is None for layer in sk.sparse_layers(model).values())
    sk.save(tmp_path / "s", model)
    again = sparse(seed=2, share=0.75, impl="masked")
    sk.load(tmp_path / "s", again)
    for other in (model, again):
        for name, layer in sk.sparse_layers(other).items():
            own = sk.sparse_layers(masked)[name]
            assert layer.topology == own.topology
            assert torch.equal(layer.dense_weight(), own.dense_weight())
    assert torch.equal(again.fc.values, masked.fc.values * masked.fc.mask())


def test_a_file_alone_holds_its_layers(tmp_path):
    path, model = tmp_path / "m.safetensors", sparse()
    sk.save(path, model)
    found = sk.load(path)
    own = sk.sparse_layers(model)
    assert found.keys() == own.keys()
    for name, (topology, values, bias) in found.items():
        assert topology == own[name].topology
        assert torch.equal(values, own[name].values)
        assert torch.equal(bias, own[name].bias)


def test_a_file_is_as_small_as_promised(tmp_path):
    model = nn.Sequential(sk.SparseLinear(512, 512, bias=False, sparsity=0.9))
    sk.save(tmp_path / "m", model)
    t = model[0].topology
    size = (tmp_path / "m").stat().st_size - (4 * t.nnz + 4 * t.nnzb + 4 * (t.block_rows + 1))
    assert 0 < size < 2000


def test_others_read_it(tmp_path):
    from safetensors.torch import load_file

    path, model = tmp_path / "m.safetensors", sparse()
    sk.save(path, model)
    assert {k for k in load_file(path) if not k.startswith("@")} == states(model).keys() - {
        "out.weight"
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["adamw", "sgd", "adagrad"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, method, kind):
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    }[kind]

    def build(seed):
        model = sparse(seed=seed)
        optimizer = make(model.parameters())
        return model, optimizer, METHODS[method](model, optimizer, t_end=30, update_freq=3)

    trio = build(0)
    train(*trio[:2], 7)
    sk.save(tmp_path / "c", *trio, extra={"step": 7, "rng": torch.get_rng_state()})
    wanted = train(*trio[:2], 10, 7)
    other = build(3)
    train(*other[:2], 2)
    extra = sk.load(tmp_path / "c", *other)
    assert extra["step"] == 7
    assert extra["rng"].dtype is torch.uint8
    assert train(*other[:2], 10, 7) == wanted
    assert same(states(trio[0]), states(other[0]))
    assert trio[2].state_dict() == other[2].state_dict()


def test_parameters_in_another_order_find_their_state(tmp_path):
    model, other = sparse(), sparse(seed=1)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    sk.save(tmp_path / "c", model, optimizer)
    reversed_ = torch.optim.Adam(reversed(list(other.parameters())))
    sk.load(tmp_path / "c", other, reversed_)
    names = {id(p): n for n, p in other.named_parameters()}
    found = {names[id(p)]: s["exp_avg"] for p, s in reversed_.state.items()}
    for name, p in model.named_parameters():
        assert torch.equal(found[name], optimizer.state[p]["exp_avg"])
    halves = torch.optim.Adam([{"params": [p]} for p in other.parameters()])
    with pytest.raises(sk.CheckpointError, match="same parameters in the same groups"):
        sk.load(tmp_path / "c", other, halves)
    with pytest.raises(sk.CheckpointError, match="the state of Adam, not of SGD"):
        sk.load(tmp_path / "c", other, torch.optim.SGD(other.parameters(), lr=1))


def test_several_optimizers(tmp_path):
    model, other = sparse(), sparse(seed=1)

    def two(model):
        parameters = list(model.parameters())
        return (
            torch.optim.Adam(parameters[:5]),
            torch.optim.SGD(parameters[5:], lr=0.1, momentum=0.9),
        )

    first, second = two(model), two(other)
    train(model, first[0], 2)
    train(model, first[1], 2)
    sk.save(tmp_path / "c", model, first)
    sk.load(tmp_path / "c", other, second)
    for a, b in zip(first, second, strict=True):
        assert equal(a.state_dict(), b.state_dict())
    with pytest.raises(sk.CheckpointError, match="holds 2 optimizers; expected 1"):
        sk.load(tmp_path / "c", other, second[0])


@pytest.mark.parametrize("connections", ["keep", "magnitude"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_dense_file_into_a_sparse_model(tmp_path, connections, ours):
    from safetensors.torch import save_model

    path, source, model = tmp_path / "m.safetensors", dense(), sparse(seed=1)
    if ours:
        sk.save(path, source)
    else:
        plain = nn.Sequential(nn.Linear(8, 6), nn.GRU(6, 4))
        save_model(plain, path)
        source = plain
        model = sk.sparsify_(copy.deepcopy(plain), 0.5, block=2, distribution="uniform")
    before = {n: m.topology.clone() for n, m in sk.sparse_layers(model).items()}
    sk.load(path, model, connections=connections)
    targets = {t.name: t.weight.matrix() for t in sk.swap.all_targets(source)}
    for name, layer in sk.sparse_layers(model).items():
        matrix = targets[name]
        assert layer.topology.nnzb == before[name].nnzb
        if connections == "keep":
            assert layer.topology == before[name]
        kept = layer.topology.pack(matrix)
        assert torch.equal(layer.values, kept)
        if connections == "magnitude" and layer.topology.taps == 1:
            full = matrix.abs().unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)).flatten()
            least = kept.abs().sum((1, 2)).min()
            assert int((full > least * (1 + 1e-5)).sum()) < layer.topology.nnzb


def test_what_does_not_fit_changes_nothing(tmp_path):
    path = tmp_path / "c"
    model = sparse()
    optimizer = torch.optim.Adam(model.parameters())
    method = sk.SET(model, optimizer, t_end=9, update_freq=2)
    train(model, optimizer, 3)
    sk.save(path, model, optimizer, method)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    for target in (other, nn.Linear(3, 4)):
        before = facts(target)
        with pytest.raises(sk.CheckpointError, match="is no layer of the model"):
            sk.load(path, target)
        assert_unchanged(before, target)
    target = dense()
    target.norm = nn.BatchNorm1d(11)
    before = facts(target)
    with pytest.raises(sk.CheckpointError, match="size mismatch for norm"):
        sk.load(path, target)
    assert_unchanged(before, target)
    fresh = dense(seed=1)
    adam = torch.optim.Adam(fresh.parameters())
    before = facts(fresh, adam)
    with pytest.raises(sk.CheckpointError, match="turn sparse and get new parameters"):
        sk.load(path, fresh, adam)
    assert_unchanged(before, fresh, adam)
    with pytest.raises(sk.ConfigError, match="`connections` must be one of"):
        sk.load(path, fresh, connections="all")
    sk.save(tmp_path / "bare", sparse())
    with pytest.raises(sk.CheckpointError, match="holds 0 optimizers; expected 1"):
        sk.load(tmp_path / "bare", model, optimizer)
    with pytest.raises(sk.CheckpointError, match="holds no method's state"):
        sk.load(tmp_path / "bare", model, method=method)


@pytest.mark.parametrize("error", [RuntimeError("late"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_all_or_nothing_where_the_last_part_fails(tmp_path, monkeypatch, error, share):
    path = tmp_path / "c"
    trio = _trio(0, share)
    sk.save(path, *trio)
    other = _trio(1, 0.5)
    train(*other[:2], 3)
    before = facts(*other)
    monkeypatch.setattr(sk.SET, "load_state_dict", _raising(error))
    with pytest.raises((sk.CheckpointError, type(error))):
        sk.load(path, *other)
    monkeypatch.undo()
    assert_unchanged(before, *other)
    for layer in sk.sparse_layers(other[0]).values():
        layer.topology.validate()
    train(*other[:2], 4)


def _trio(seed, share):
    model = sparse(seed=seed, share=share)
    optimizer = torch.optim.Adam(model.parameters())
    method = sk.SET(model, optimizer, t_end=9, update_freq=2)
    train(model, optimizer, 2)
    return model, optimizer, method


def _raising(error):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 1:
            raise error

    return fail


def test_what_can_not_be_saved_leaves_the_old_file(tmp_path):
    path, model = tmp_path / "c", sparse()
    sk.save(path, model)
    before = path.read_bytes()
    wrong = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1)
    cases = (
        ((model, wrong), {}, "must hold parameters of the model; group 0 has 1 others"),
        ((model,), {"extra": {"f": print}}, "must be made of numbers.*got builtin_function"),
        ((model,), {"extra": torch.zeros(2, device="meta")}, "got a meta tensor"),
        ((model,), {"extra": torch.eye(2).to_sparse()}, "must be a plain one"),
    )
    for args, kwargs, text in cases:
        with pytest.raises(sk.CheckpointError, match=text):
            sk.save(path, *args, **kwargs)
        assert path.read_bytes() == before
    with pytest.raises(sk.DtypeError, match="`model` must be"):
        sk.save(path, {})
    broken = sparse()
    broken.fc.col.fill_(99)
    with pytest.raises(sk.TopologyError):
        sk.save(path, broken)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_shared_and_strided_tensors_and_plain_extras(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    extra = {
        "t": base.t(),
        "view": base[1],
        "same": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
        (1, "key"): [None, -(2**70), float("nan"), "ä\0", (), {}],
    }
    sk.save(tmp_path / "c", nn.Linear(2, 2), extra=extra)
    found = sk.load(tmp_path / "c", nn.Linear(2, 2))
    assert equal(found, extra)


# ---- failures while writing


FAILURES = (OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt())


class Calls:
    """Stands in for the calls that a save makes to the system; one of them fails."""

    def __init__(self, monkeypatch, at, error, short=False):
        self.at, self.error, self.short, self.made = at, error, short, []
        for owner, name in (
            (os, "open"),
            (os, "fdopen"),
            (os, "fsync"),
            (os, "close"),
            (Path, "replace"),
            (Path, "chmod"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))

    def wrapped(self, name, call):
        def wrapper(*args, **kwargs):
            self.made.append(name)
            fails = len(self.made) == self.at
            if fails and not (self.short and name == "fdopen"):
                raise self.error
            result = call(*args, **kwargs)
            if fails:
                return _Short(result, self.error)
            return _File(result, self) if name == "fdopen" else result

        return wrapper


class _File:
    """A file whose writes and flushes count too."""

    def __init__(self, file, calls):
        self.file, self.calls = file, calls
        self.write = calls.wrapped("write", file.write)
        self.flush = calls.wrapped("flush", file.flush)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def fileno(self):
        return self.file.fileno()


class _Short(_File):
    """A file that takes half of what is written and then fails."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise self.error

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("error", FAILURES, ids=["ENOSPC", "EIO", "KeyboardInterrupt"])
@pytest.mark.parametrize("short", [False, True])
def test_every_call_of_a_save_made_to_fail(tmp_path, error, short):
    path, old, new = tmp_path / "c", sparse(), sparse(seed=1)
    optimizer = torch.optim.Adam(old.parameters())
    failed = 0
    for at in range(1, 100):
        sk.save(path, old, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, at, error, short)
            try:
                sk.save(path, new)
            except (OSError, KeyboardInterrupt):
                failed += 1
            done = len(calls.made) < at
        assert os.listdir(tmp_path) == ["c"], calls.made
        target = dense(seed=2)
        sk.load(path, target)
        assert same(states(target), states(old)) or same(states(target), states(new))
        if done:
            break
    assert {"open", "write", "flush", "fsync", "replace"} <= set(calls.made)
    assert calls.made.count("fsync") == 2  # the file, then its folder
    assert failed == len(calls.made)


SAVER = """
import sys, torch, sparsekern as sk
path = sys.argv[1]
model = torch.nn.Sequential(sk.SparseLinear(256, 256, sparsity=.5))
print("ready", flush=True)
n = 0
while True:
    n += 1
    with torch.no_grad(): model[0].values.fill_(n)
    sk.save(path, model, extra=n)
"""


def test_kill_9_during_saves_loses_nothing(tmp_path):
    path = tmp_path / "c"
    kills = int(os.environ.get("SPARSEKERN_KILLS", "3"))
    model = nn.Sequential(sk.SparseLinear(256, 256, sparsity=0.5))
    for kill in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        ) as child:
            child.stdout.readline()
            while not path.exists() and child.poll() is None:
                time.sleep(0.001)
            time.sleep(0.001 * (7 * kill % 50))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        n = sk.load(path, model)
        assert torch.equal(model[0].values, torch.full_like(model[0].values, n))


def test_the_head_is_json_and_says_its_version(tmp_path, monkeypatch):
    sk.save(tmp_path / "c", sparse())
    head = file.read(tmp_path / "c").head
    assert json.loads(json.dumps(head)) == head
    assert head["version"] == file.VERSION
    monkeypatch.setattr(file, "VERSION", 2)
    with pytest.raises(sk.CheckpointError, match="must be of version 2; got 1"):
        sk.load(tmp_path / "c")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        sk.load(tmp_path / "no")
    with pytest.raises(OSError, match="directory"):
        sk.load(tmp_path)
