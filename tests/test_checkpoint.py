"""`save` and `load`: everything comes back, whatever fails leaves the old file or the old model."""

import copy
import json
import os

import pytest
import torch
from checkpoint_models import dense, equal, same, sparse, states, train
from torch import nn

import sparsekern as sk
from sparsekern.checkpoint import file, optimizers

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
METHODS = {"rigl": sk.RigL, "set": sk.SET, "static": sk.Static}


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


def test_another_density_trains_on_in_the_same_parameters(tmp_path):
    """Their number and block change under an optimizer that holds them, and its state follows."""
    trio = _trio(0, 0.75)
    other = sparse(seed=1, block=1)
    optimizer = torch.optim.Adam(other.parameters())
    method = sk.SET(other, optimizer, t_end=9, update_freq=2)
    train(other, optimizer, 3)
    sk.save(tmp_path / "c", *trio)
    sk.load(tmp_path / "c", other, optimizer, method)
    assert train(other, optimizer, 6, 2) == train(*trio[:2], 6, 2)
    assert same(states(other), states(trio[0]))


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


def test_a_state_that_is_none_of_the_optimizers():
    """Whoever makes a file can make its digest too."""
    model = sparse()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    saved = optimizers.packed(optimizer, model)
    assert equal(optimizers.unpacked(saved, optimizer, model), optimizer.state_dict())
    state, groups = saved["state"]["state"], saved["state"]["param_groups"]
    first, shape = state[0], state[0]["exp_avg"].shape
    wrong_states = (
        {**state, "x": first},
        {**state, 99: {}},
        {**state, 0: first | {"exp_avg": torch.zeros(*shape, 2)}},
        {**state, 0: first | {"exp_avg": torch.zeros(shape[0] + 1, *shape[1:])}},
        {**state, 0: first | {"exp_avg": 3}},
        {**state, 0: [first]},
        [state],
    )
    wrong_groups = (
        [groups[0] | {"lr": "x"}],
        [groups[0] | {"lr": True}],
        [groups[0] | {"betas": 0.9}],
        [groups[0] | {"betas": (0.9,)}],
        [groups[0] | {"params": [0] * len(groups[0]["params"])}],
        [groups[0] | {"params": groups[0]["params"][1:]}],
        [],
        {},
    )
    for its, them in [(w, groups) for w in wrong_states] + [(state, w) for w in wrong_groups]:
        with pytest.raises(sk.CheckpointError):
            optimizers.unpacked(
                saved | {"state": {"state": its, "param_groups": them}}, optimizer, model
            )


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


@pytest.mark.parametrize("method", METHODS)
def test_another_density_into_a_model_that_is_being_trained(tmp_path, method):
    """Autograd and the method know the parameters with their old shapes."""
    sk.save(tmp_path / "c", sparse(seed=0, share=0.6))
    model = sparse(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attached = METHODS[method](model, optimizer, t_end=99, update_freq=2)
    train(model, optimizer, 1)
    graph = [layer.values.sum() for layer in sk.sparse_layers(model).values()]
    sk.load(tmp_path / "c", model)
    train(model, optimizer, 8)
    assert graph
    assert len(attached.history) >= (method != "static")
