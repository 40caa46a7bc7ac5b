"""An optimizer goes on with a model that turns sparse; hooks stay; all or nothing."""

import copy
import logging

import pytest
import torch
from test_masks import every_weight, our_name, random_mask
from test_swap import Everything, mlp
from torch import nn
from torch.nn.utils import prune

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, OptimizerError
from sparsekern.swap import build, sparsify

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


def packed(layer, dense):
    matrix = dense if dense.dim() == 2 else dense.movedim(1, -1).reshape(dense.shape[0], -1)
    blocks = layer.topology.pack(matrix)
    return blocks if layer.dense_mask is None else layer.topology.unpack(blocks)


def give_gradients(model, steps, optimizer, seed, layers=None):
    """Steps with gradients drawn for dense parameters; sparse values get those at their place."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for name, shape, target in model:
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            layer = (layers or {}).get(name)
            target.grad = gradient if layer is None else packed(layer, gradient)
        optimizer.step()


@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_after_a_hand_over_are_those_of_the_masked_twin(kind, impl):
    """Optimizers work entry by entry: what a sparse weight holds is what the dense one would."""
    dense = Everything().double()
    twin = copy.deepcopy(dense)
    runs = []
    for model in (dense, twin):
        optimizer = OPTIMIZERS[kind](model.parameters())
        trained = [(n, p.shape, p) for n, p in model.named_parameters()]
        give_gradients(trained, 5, optimizer, seed=1)
        runs.append((optimizer, trained))
    (optimizer, trained), (twin_optimizer, twin_trained) = runs
    order = [group["params"].copy() for group in optimizer.param_groups]
    masks = {name: random_mask(w.shape) for name, w in every_weight(dense).items()}
    sk.sparsify_(dense, masks=masks, init="keep", optimizer=optimizer, impl=impl)
    layers = {n: sk.sparse_layers(dense)[our_name(n)] for n in masks}
    now = [(n, s, layers[n].values if n in layers else p) for n, s, p in trained]
    assert {id(p) for p in dense.parameters()} == {id(p) for _, _, p in now}  # biases stay
    moved = {id(old): new for (_, _, old), (_, _, new) in zip(trained, now, strict=True)}
    for group, before in zip(optimizer.param_groups, order, strict=True):
        assert [id(p) for p in group["params"]] == [id(moved[id(p)]) for p in before]
    give_gradients(now, 5, optimizer, seed=2, layers=layers)
    give_gradients(twin_trained, 5, twin_optimizer, seed=2)
    for (name, _, new), (_, _, expected) in zip(now, twin_trained, strict=True):
        want = packed(layers[name], expected) if name in layers else expected
        assert torch.equal(new, want), name
        for key, entry in twin_optimizer.state[expected].items():
            moves = name in layers and entry.dim()
            want = packed(layers[name], entry) if moves else entry
            assert torch.equal(optimizer.state[new][key], want), (name, key)
    assert len(optimizer.state) == len(twin_optimizer.state)


def test_training_goes_on_as_that_of_the_masked_dense_model():
    """End to end, with the same products: masked storage against a dense model times its masks."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    optimizer = torch.optim.Adam(dense.parameters(), lr=0.01)
    xs = torch.randn(10, 8, 12, dtype=torch.float64)
    for x in xs[:5]:
        optimizer.zero_grad()
        dense(x).pow(2).mean().backward()
        optimizer.step()
    twin, twin_optimizer = copy.deepcopy((dense, optimizer))
    masks = {n: random_mask(dense[int(n)].weight.shape) for n in "02"}
    sk.sparsify_(dense, masks=masks, init="keep", optimizer=optimizer, impl="masked")
    for x in xs[5:]:
        optimizer.zero_grad()
        dense(x).pow(2).mean().backward()
        optimizer.step()
        twin_optimizer.zero_grad()
        hidden = nn.functional.linear(x, twin[0].weight * masks["0"], twin[0].bias).tanh()
        nn.functional.linear(hidden, twin[2].weight * masks["2"], twin[2].bias).pow(
            2
        ).mean().backward()
        twin_optimizer.step()
    for n in "02":
        assert torch.equal(dense[int(n)].dense_weight(), twin[int(n)].weight * masks[n])
        assert torch.equal(dense[int(n)].bias, twin[int(n)].bias)


@pytest.mark.parametrize("impl", [None, "masked"])
def test_sparse_layers_hand_their_state_to_sparser_ones(impl):
    model = sk.sparsify_(Everything().double(), 0.4, distribution="er", impl=impl)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trained = [(n, p.shape, p) for n, p in model.named_parameters()]
    give_gradients(trained, 2, optimizer, seed=1)
    before = sk.sparse_layers(model)
    states = {n: optimizer.state[m.values]["exp_avg"].clone() for n, m in before.items()}
    sk.sparsify_(model, 0.7, distribution="er", init="keep", optimizer=optimizer)
    after = sk.sparse_layers(model)
    for name, old in before.items():
        layer = after[name]
        whole = old.as_weight(old.topology.unpack(old.pack(states[name])))
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], packed(layer, whole))
        assert old.values not in optimizer.state
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_matrices_and_biases_that_stay_dense_are_the_same_parameters():
    model, optimizer = trained_model()
    before = dict(model.rnn.named_parameters())
    sk.sparsify_(
        model, 0.5, distribution="er", exclude=("rnn.ih*",), init=None, optimizer=optimizer
    )
    assert model.rnn.ih_l0.weight is before["weight_ih_l0"]
    for name, matrix in model.rnn.named_children():
        assert matrix.bias is before.get(f"bias_{name}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == set(map(id, optimizer.state))
    weight = model.rnn.ih_l0.weight.detach().clone()
    sk.sparsify_(model, 0.6, distribution="er", init="keep", optimizer=optimizer)
    assert torch.equal(model.rnn.ih_l0.dense_weight(), weight * model.rnn.ih_l0.mask())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == set(map(id, optimizer.state))


def test_wrapped_optimizers_and_names_follow():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})
            self.state = optimizer.state

    model = mlp()
    inner = torch.optim.Adam([{"params": [(n, p)]} for n, p in model.named_parameters()])
    model(torch.randn(2, 784)).sum().backward()
    inner.step()
    outer = Wrapper(inner)
    sk.sparsify_(model, 0.9, distribution="uniform", init="keep", optimizer=outer)
    names = [group["param_names"][0] for group in inner.param_groups]
    assert names == ["0.values", "0.bias", "2.values", "2.bias", "4.values", "4.bias"]
    for optimizer in (inner, outer):
        held = [group["params"][0] for group in optimizer.param_groups]
        by_name = dict(model.named_parameters())
        assert all(p is by_name[n] for n, p in zip(names, held, strict=True))
    assert set(map(id, inner.state)) == set(map(id, model.parameters()))
    sk.RigL(model, outer, t_end=10)


def test_state_of_pruned_parameters_moves():
    model = mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.l1_unstructured(model[2], "bias", 0.5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 784)).sum().backward()
    optimizer.step()
    state = optimizer.state[model[2].weight_orig]["exp_avg"].clone()
    sk.sparsify_(model, 0.5, distribution="uniform", init="keep", optimizer=optimizer)
    assert torch.equal(optimizer.state[model[2].values]["exp_avg"], packed(model[2], state))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_drawn_values_beside_old_state_are_told(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 784)).sum().backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        sk.sparsify_(model, 0.5, optimizer=optimizer)
    assert "state is of the old ones" in caplog.text


# ---- refused, and nothing changed


def snapshot(model, optimizer):
    return (
        [(n, id(m)) for n, m in model.named_modules()],
        {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()},
        [list(map(id, group["params"])) for group in optimizer.param_groups],
        {
            id(p): {k: (id(v), copy.deepcopy(v)) for k, v in s.items()}
            for p, s in optimizer.state.items()
        },
        "_sparsekern_asked" in vars(model),
    )


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[2] == b[2]
    assert a[4] == b[4]
    assert a[1].keys() == b[1].keys()
    assert all(a[1][n][0] == b[1][n][0] and torch.equal(a[1][n][1], b[1][n][1]) for n in a[1])
    assert a[3].keys() == b[3].keys()
    for one, other in ((a[3][p], b[3][p]) for p in a[3]):
        assert one.keys() == other.keys()
        assert all(one[k][0] == other[k][0] and torch.equal(one[k][1], other[k][1]) for k in one)


def trained_model():
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_state_that_cannot_move_is_refused_before_anything_changes():
    model, optimizer = trained_model()
    optimizer.state[model.head.weight]["row"] = torch.zeros(10, 1)
    before = snapshot(model, optimizer)
    with pytest.raises(OptimizerError, match=r"'row' of layer 'head'.*got shape \(10, 1\)"):
        sk.sparsify_(model, 0.5, distribution="er", optimizer=optimizer)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1),
            OptimizerError,
            "none of",
        ),
        (lambda m: torch.optim.LBFGS(m.parameters()), OptimizerError, "LBFGS"),
        (lambda _: "adam", DtypeError, "must be a torch.optim.Optimizer; got str"),
    ],
)
def test_optimizers_that_cannot_follow_are_refused(make, error, text):
    model = mlp()
    modules = list(model.modules())
    with pytest.raises(error, match=text):
        sk.sparsify_(model, 0.5, distribution="uniform", optimizer=make(model))
    assert list(model.modules()) == modules


FAIL_AT = {
    "the third layer is made": (build, "_taken", 3, "before"),
    "the third layer is put in": (Everything, "__setattr__", 3, "before"),
    "the optimizer is written": (sparsify, "commit", 1, "after"),
    "all is written": (sparsify.record, "write", 1, "after"),
}


@pytest.mark.parametrize("place", FAIL_AT)
def test_a_failure_at_any_place_leaves_model_and_optimizer(monkeypatch, place):
    owner, name, at, when = FAIL_AT[place]
    model, optimizer = trained_model()
    before = snapshot(model, optimizer)
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and when == "before":
            raise MemoryError
        result = original(*args, **kwargs)
        if len(calls) == at:
            raise MemoryError
        return result

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(MemoryError):
        sk.sparsify_(model, 0.5, distribution="er", optimizer=optimizer)
    monkeypatch.undo()
    assert len(calls) >= at
    assert_same(snapshot(model, optimizer), before)


def test_models_in_wrappers_are_refused_by_name():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = DistributedDataParallel(mlp())
    with pytest.raises(ConfigError, match="inside DistributedDataParallel.*before wrapping"):
        sk.sparsify_(model, 0.5)
    with pytest.raises(ConfigError, match="inside DistributedDataParallel"):
        sk.densify_(model)


@pytest.mark.parametrize("method", [sk.RigL, sk.SET, sk.Static])
def test_layers_that_an_attached_method_follows_are_refused(method, caplog):
    model = sk.sparsify_(mlp(), 0.5, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = method(model, optimizer, t_end=10)
    before = list(model.modules())
    with pytest.raises(ConfigError, match=f"'0' is followed by an attached {method.__name__}"):
        sk.sparsify_(model, 0.8, distribution="uniform", init="keep", optimizer=optimizer)
    assert list(model.modules()) == before
    (twin, _, copied) = copy.deepcopy((model, optimizer, attached))
    with pytest.raises(ConfigError, match="is followed by"):  # a copy follows the copy
        sk.sparsify_(twin, 0.8, distribution="uniform", init="keep")
    copied.detach()
    attached.detach()
    sk.sparsify_(model, 0.8, distribution="uniform", init="keep", optimizer=optimizer)
    method(model, optimizer, t_end=10)
    with caplog.at_level(logging.WARNING, "sparsekern"):
        sk.densify_(model)
    assert f"the {method.__name__} that follows '0'" in caplog.text


# ---- what users put on a layer


FAMILIES = {
    "linear": (lambda: nn.Linear(8, 8), "weight", (2, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), "weight", (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=2), "weight", (2, 4, 5, 5)),
    "gru": (lambda: nn.GRU(8, 8), "weight_hh_l0", (3, 2, 8)),
    "rnn cell": (lambda: nn.RNNCell(8, 8), "weight_hh", (2, 8)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_attributes_and_flags_survive_there_and_back(family):
    make, attribute, shape = FAMILIES[family]
    layer, calls = make().eval(), []
    removable = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.note = "mine"
    layer.register_buffer("steps", torch.zeros(1), persistent=False)
    getattr(layer, attribute).lr_scale = 0.1
    getattr(layer, attribute).requires_grad_(False)
    model = nn.ModuleList([layer])
    biases = [id(p) for n, p in layer.named_parameters() if "bias" in n]

    def check():
        calls.clear()
        result = model[0](torch.randn(shape, requires_grad=True))
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        model[0].state_dict()
        assert calls == ["pre", "forward", "backward", "state"]
        assert model[0].note == "mine"
        assert not model[0].training
        assert "steps" in dict(model[0].named_buffers())
        assert not any("steps" in key for key in model.state_dict())
        assert [id(p) for n, p in model[0].named_parameters() if "bias" in n] == biases
        (weight,) = [p for p in model.parameters() if hasattr(p, "lr_scale")]
        assert not weight.requires_grad

    check()
    sk.sparsify_(model, 0.5, distribution="uniform", filter_fn=lambda *_: True)
    assert sk.sparse_layers(model)
    check()
    sk.sparsify_(model, 0.7, distribution="uniform", init="keep", filter_fn=lambda *_: True)
    sk.densify_(model)
    assert type(model[0]) is type(layer)
    check()
    removable.remove()
    calls.clear()
    model[0](torch.randn(shape))
    assert calls == ["pre"]


def test_what_cannot_be_carried_over_is_named(caplog):
    model = mlp()
    model[0].weight.register_hook(lambda g: g)
    model[2].topology = "mine"
    with caplog.at_level(logging.WARNING, "sparsekern"):
        sk.sparsify_(model, 0.5, distribution="uniform")
    assert "hooks on the weight of '0'" in caplog.text
    assert "attribute 'topology' of '2'" in caplog.text
    model = mlp()
    model[0].forward = lambda x: x
    with pytest.raises(ConfigError, match=r"`forward` of layer '0' was replaced"):
        sk.sparsify_(model, 0.5, distribution="uniform")
    assert type(model[0]) is nn.Linear
