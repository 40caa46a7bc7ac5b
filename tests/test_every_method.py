"""What every method promises, a new one as soon as it is in `METHODS`.

Linear losses and small dyadic numbers keep everything exact, so that other orders of summation give
the same bits.
"""

import copy
import io
import logging

import pytest
import torch
from support import integers
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparsekern as sk
from sparsekern.methods import METHODS
from sparsekern.topology.blocks import active_count

FINAL, START = 0.8, 0.6  # sparsity of methods that prune while they train, and of all others
T_END, FREQ, STEPS = 20, 3, 26
LAYERS = ("0", "2", "4")
OWN = {"deepr": {"l1": 0, "noise": 0}, "top-kast": {"penalty": 0}}
"""What leaves weights as they are where the learning rate is 0, and exact elsewhere."""
SCALE = {"top-kast": 2.0**-3}
"""Of the first weights, where larger ones diverge: values kept apart add up unseen."""
TINY = 2.0**-4


@pytest.fixture(autouse=True)
def _dyadic(monkeypatch):
    monkeypatch.setattr(sk.methods.deepr, "TINY", TINY)


def net(name, block=1, impl=None, seed=0):
    torch.manual_seed(seed)
    body = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)]
    share = getattr(METHODS[name], "initial_sparsity", START)
    g = torch.Generator().manual_seed(seed)
    model = sk.sparsify_(
        nn.Sequential(*body).double(),
        share,
        block=block,
        impl=impl,
        distribution=lambda *_: share,
        generator=g,
    )
    if name == "srigl":  # what it makes of a start is of no exact values
        METHODS[name](model, sgd(model), t_end=1).detach()
    with torch.no_grad():
        for layer in sk.sparse_layers(model).values():
            weights = 0.25 * integers(*layer.matrix_shape, low=1, high=9).double()
            weights *= SCALE.get(name, 1.0)
            signs = integers(*layer.matrix_shape, low=0, high=1).double() * 2 - 1
            layer.set_active_values(layer.topology.pack(weights * signs))
            layer.bias.copy_(0.25 * integers(*layer.bias.shape))
    return model


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **{"lr": 2.0**-8, "momentum": 0.5} | kwargs)


def attach(name, model, optimizer, **kwargs):
    """Where a method needs more than an update schedule, it is said here."""
    own = {"sparsity": FINAL} if hasattr(METHODS[name], "initial_sparsity") else OWN.get(name, {})
    schedule = {"t_end": T_END, "update_freq": FREQ, "first_update": 2, "drop_fraction": 0.5}
    return METHODS[name](model, optimizer, **schedule | own | kwargs)


def batch(i, n=8):
    g = torch.Generator().manual_seed(i)
    x = torch.randint(-3, 4, (n, 12), generator=g).double()
    return x, torch.randint(-3, 4, (n, 8), generator=g).double()


def backward(model, data):
    (model(data[0]) * data[1]).sum().backward()


def train(model, optimizer, steps, then=lambda i: None):
    for i in steps:
        optimizer.zero_grad()
        backward(model, batch(i))
        optimizer.step()
        then(i)


def dense(model):
    return {n: m.dense_weight() for n, m in sk.sparse_layers(model).items()}


def masks(model):
    return {n: m.mask() for n, m in sk.sparse_layers(model).items()}


def sizes(model):
    return {n: m.topology.nnzb for n, m in sk.sparse_layers(model).items()}


def places(model):
    """How many blocks the layers could hold in all."""
    return sum(m.topology.grid.total for m in sk.sparse_layers(model).values())


def same(a, b):
    """The same nested state, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def claimed(name, model, step):
    """Active blocks in all that a method claims to have after an update at this weight step."""
    if not hasattr(METHODS[name], "initial_sparsity"):
        return sum(sizes(net(name, sk.sparse_layers(model)["0"].block)).values())
    left = (1 - min((step - 2) / (T_END - 2), 1.0)) ** 3
    sparsity = FINAL + (METHODS[name].initial_sparsity - FINAL) * left
    return active_count(places(model), sparsity)


every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize(("impl", "block"), [("cpu", 1), ("cpu", 4), ("masked", 4)])
def test_the_size_is_as_claimed_at_every_step_and_state_follows(name, block, impl):
    """At learning rate 0 weights stay what they are, but for those that are dropped or new."""
    model = net(name, block, impl)
    optimizer = sgd(model, lr=0.0, momentum=1.0, dampening=1.0)  # both stay as they are
    start = sizes(model)
    method = attach(name, model, optimizer)
    train(model, optimizer, [0])
    codes = {}
    for key, layer in method.layers.items():
        code = torch.arange(1.0, layer.mask().numel() + 1).double().view(layer.matrix_shape)
        codes[key] = code
        buffer = layer.topology.pack(code)
        stored = buffer if layer.dense_mask is None else layer.topology.unpack(buffer)
        optimizer.state[layer.values]["momentum_buffer"].copy_(stored)
    weights, active, updates = dense(model), masks(model), len(method.history)
    for i in range(1, STEPS):
        train(model, optimizer, [i])
        for key, layer in method.layers.items():
            mask, weight = layer.mask(), layer.dense_weight()
            stays = mask & active[key]
            assert torch.equal(weight, weights[key] * stays), key
            held = optimizer.state[layer.values]["momentum_buffer"]
            held = layer.topology.unpack(layer.pack(held))
            assert torch.equal(held, codes[key] * stays), key
            assert layer.topology.nnzb >= 1
            codes[key] = held
        if len(method.history) > updates:
            updates = len(method.history)
            record = method.history[-1]
            assert sum(sizes(model).values()) == claimed(name, model, record.step)
            if not method.resizes:
                assert sizes(model) == start
        else:
            assert all(torch.equal(m, active[key]) for key, m in masks(model).items())
        weights, active = dense(model), masks(model)
    assert updates >= 6 or not method.history
    if hasattr(METHODS[name], "initial_sparsity"):
        assert sum(sizes(model).values()) == active_count(places(model), FINAL)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def put(model, optimizer, method, path):
    """Through `sk.save`, and through torch."""
    sk.save(path, model, optimizer, method=method)
    return through_a_file([model.state_dict(), optimizer.state_dict()])


@every_method
@pytest.mark.parametrize("way", ["sparsekern", "torch", "torch, attached after the load"])
def test_a_resume_goes_on_to_the_bit(name, way, tmp_path):
    cut = 9 if way == "torch" else 10
    model = net(name)
    optimizer = sgd(model)
    method = attach(name, model, optimizer)
    train(model, optimizer, range(cut))
    saved = put(model, optimizer, method, tmp_path / "training")
    train(model, optimizer, range(cut, STEPS))

    other = net(name, seed=1)
    resumed = sgd(other)
    again = attach(name, other, resumed) if "after" not in way else None
    if way == "sparsekern":
        sk.load(tmp_path / "training", other, resumed, method=again)
    else:
        then = {k: saved[0][f"{k}.values"].shape[0] for k in method.layers}
        assert method.resizes or then == sizes(other)
        if then != sizes(other):
            with pytest.raises(sk.ShapeError, match=r"sparsekern\.load fits a model"):
                other.load_state_dict(saved[0])
            sk.load(tmp_path / "training", other)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    if again is None:
        again = attach(name, other, resumed)
    train(other, resumed, range(cut, STEPS))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(again.state_dict(), method.state_dict())
    assert same(resumed.state_dict(), optimizer.state_dict())


@every_method
def test_copies_go_on_by_themselves(name):
    model = net(name)
    optimizer = sgd(model)
    method = attach(name, model, optimizer)
    train(model, optimizer, range(9))
    twin, twins, copied = copy.deepcopy((model, optimizer, method))
    train(model, optimizer, range(9, STEPS))
    assert copied.weight_steps < method.weight_steps
    train(twin, twins, range(9, STEPS))
    assert same(dict(twin.state_dict()), dict(model.state_dict()))
    assert same(copied.state_dict(), method.state_dict())


@every_method
def test_averages_follow(name):
    def towards(average, value, _n):
        return average + 0.5 * (value - average)

    model = net(name)
    optimizer = sgd(model)
    attach(name, model, optimizer)
    average = AveragedModel(model, avg_fn=towards)
    expected = {}

    def mean(_):
        """Dense, by position: what is dropped is forgotten, what is new starts at zero."""
        average.update_parameters(model)
        for key, weight in dense(model).items():
            old = expected.get(key)
            held = None if old is None else old * masks(model)[key]
            expected[key] = weight if held is None else held + 0.5 * (weight - held)

    train(model, optimizer, range(STEPS), mean)
    assert same(dense(average.module), expected)


@every_method
def test_frozen_layers_stay_and_take_part_again_later(name):
    model = net(name)
    optimizer = sgd(model)
    method = attach(name, model, optimizer)
    train(model, optimizer, range(4))
    frozen = model[2]
    frozen.values.requires_grad_(False)
    before = frozen.values.clone(), frozen.topology.digest(), len(method.history)
    optimizer.zero_grad()
    train(model, optimizer, range(4, 12))
    assert torch.equal(frozen.values, before[0])
    assert frozen.topology.digest() == before[1]
    assert len(method.history) > before[2] or not method.history
    assert all("2" not in record.layers for record in method.history[before[2] :])
    frozen.values.requires_grad_(True)
    train(model, optimizer, range(12, STEPS))
    assert not torch.equal(frozen.values, before[0]) or frozen.values.shape != before[0].shape
    if method.history:
        assert "2" in method.history[-1].layers
    if not hasattr(METHODS[name], "initial_sparsity"):
        assert sum(sizes(model).values()) == claimed(name, model, T_END)


@every_method
def test_micro_batches_count_as_one_batch(name):
    def run(parts):
        model = net(name)
        optimizer = sgd(model, lr=0.0)  # other weights would need ever more bits
        attach(name, model, optimizer, grad_accumulation=parts)
        for i in range(12):
            optimizer.zero_grad()
            data = batch(i)
            for k in range(parts):
                backward(model, [t.chunk(parts)[k] for t in data])
            optimizer.step()
        return dict(model.state_dict())

    assert same(run(1), run(2))


@every_method
def test_it_says_when_it_computes_a_dense_gradient(name):
    method = attach(name, model := net(name), sgd(model))
    assert method.dense_at in ("never", "updates", "steps")
    assert isinstance(getattr(sk, type(method).__name__), type)


@every_method
def test_arguments_out_of_their_domain_are_refused_before_anything_is_attached(name):
    for wrong in ({"t_end": None}, {"update_freq": 0}, {"drop_fraction": 1.5}, {"norm": "l3"}):
        model = net(name)
        optimizer = sgd(model)
        with pytest.raises(sk.SparseKernError):
            attach(name, model, optimizer, **wrong)
        assert "sparsekern" not in optimizer.param_groups[0]
        backward(model, batch(0))
        optimizer.step()


@every_method
def test_too_few_blocks_to_drop_any_are_told(name, caplog):
    model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 0.5, block=16)
    own = {"sparsity": FINAL} if hasattr(METHODS[name], "initial_sparsity") else {}
    with caplog.at_level(logging.WARNING, "sparsekern"):
        METHODS[name](model, sgd(model), t_end=T_END, **own).detach()
    # methods whose own share is a half find a block of two
    idle = name not in ("static", "snfs", "granet")
    assert ("change nothing: a share of 0.3 is less than one block" in caplog.text) == idle
    caplog.clear()
    METHODS[name](model, sgd(model), t_end=T_END, drop_fraction=0.5, **own)
    assert "change nothing" not in caplog.text


# ---- optimizers of which some miss rounds


def halves(name, misses):
    """A method with an optimizer for each half of the layers, the second of which misses rounds."""
    model = net(name)
    optimizers = [
        torch.optim.SGD(half.parameters(), lr=2.0**-8, momentum=0.5)
        for half in (model[:2], model[2:])
    ]
    method = attach(name, model, optimizers)
    held = []
    for i in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, batch(i))
        for k, optimizer in enumerate(optimizers):
            if not misses(i, k):
                optimizer.step()
        if name == "top-kast":
            held += [
                int(m.active_values().count_nonzero()) <= method.forward_blocks(m)
                for m in method.layers.values()
            ]
    return method, held


@every_method
def test_an_optimizer_that_misses_steps_holds_nothing_up(name):
    """As under GradScaler, which skips those of one optimizer alone."""
    method, held = halves(name, lambda i, k: k == 1 and i % 4 == 1)
    assert all(held)
    assert len(method.history) >= 4 or name == "static"


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].default_step_on_update])
def test_optimizers_that_take_turns_are_not_waited_for(name):
    method, held = halves(name, lambda i, k: i % 2 != k)
    assert all(held)
    # a gradient of one batch is what these optimizers share no round of
    assert len(method.history) >= 3 or METHODS[name].source.dense_at == "updates"
