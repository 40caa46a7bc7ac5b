"""Methods that move connections between layers, against short dense ones; and momentum."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from support import integers
from test_every_method import FINAL, FREQ, T_END, attach, batch, net, sgd, sizes, train
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError
from sparsekern.methods import METHODS, Momentum
from sparsekern.methods.budget import FULL, shared_out

MOVING = [name for name, method in METHODS.items() if method.resizes]


# ---- against dense ones


def shrunk(matrix, block):
    """Sums of magnitudes over blocks, one row after the other."""
    rows, cols = matrix.shape
    return (
        np.abs(matrix).reshape(rows // block, block, cols // block, block).sum((1, 3)).reshape(-1)
    )


def largest(scores, among, n):
    """The `n` places with the largest scores; of equal ones the first."""
    return set(sorted(among, key=lambda p: (-scores[p], p))[:n])


class Dense:
    """What a method should do to the connections of a model that stands still."""

    def __init__(self, model, block):
        self.block = block
        self.weights = {k: m.dense_weight().numpy() for k, m in sk.sparse_layers(model).items()}
        self.active = {
            k: set(m.topology.positions().tolist()) for k, m in sk.sparse_layers(model).items()
        }
        self.places = {k: w.size // block**2 for k, w in self.weights.items()}
        self.momentum = dict.fromkeys(self.weights, 0.0)
        self.size = sum(map(len, self.active.values()))

    def gradients(self, model, data):
        layers = sk.sparse_layers(model)
        x, weights = data[0], []
        for i, k in enumerate(self.weights):
            weights.append(torch.tensor(self.weights[k], requires_grad=True))
            x = nn.functional.linear(x.relu() if i else x, weights[-1], layers[k].bias.detach())
        grads = torch.autograd.grad((x * data[1]).sum(), weights)
        return dict(zip(self.weights, (g.numpy() for g in grads), strict=True))

    def score(self, matrices):
        return {k: shrunk(m, self.block) for k, m in matrices.items()}

    def mean_of_active(self, matrices):
        scores = self.score(matrices)
        return [
            sum(scores[k][p] for p in self.active[k]) / (len(self.active[k]) * self.block**2)
            for k in scores
        ]

    def dropped(self, fraction):
        sizes = self.score(self.weights)
        dropped = {
            k: int(np.float32(len(a)) * np.float32(fraction)) for k, a in self.active.items()
        }
        return {k: largest(sizes[k], a, len(a) - dropped[k]) for k, a in self.active.items()}

    def grow(self, kept, counts, by):
        """New weights are zero."""
        scores = self.score(by)
        for k, keep in kept.items():
            free = set(range(self.places[k])) - keep
            new = keep | largest(scores[k], free, counts[k])
            stays = np.zeros(self.places[k], bool)
            stays[list(new & self.active[k])] = True
            rows, cols = (n // self.block for n in self.weights[k].shape)
            mask = np.kron(stays.reshape(rows, cols), np.ones((self.block, self.block)))
            self.weights[k], self.active[k] = self.weights[k] * mask, new

    def redistribute(self, fraction, by, shares):
        kept = self.dropped(fraction)
        names = list(kept)
        gone = {k: len(self.active[k]) - len(kept[k]) for k in names}
        rooms = {k: self.places[k] - len(kept[k]) for k in names}
        least = dict.fromkeys(names, 0)
        found = dict(zip(names, shares, strict=True))
        counts = shared_out(found, rooms, least, sum(gone.values()), FULL)
        self.grow(kept, counts if any(shares) else gone, by)


def cosine(step, drop=0.5):
    return drop * (1 + math.cos(math.pi * min(step / T_END, 1))) / 2


def follow_snfs(dense, model, data, step, due):
    gradients = dense.gradients(model, data)
    dense.momentum = {k: 0.9 * dense.momentum[k] + 0.1 * g for k, g in gradients.items()}
    if due:
        dense.redistribute(cosine(step), dense.momentum, dense.mean_of_active(dense.momentum))


def follow_sg(dense, model, data, step, due):
    if due:
        gradients = dense.gradients(model, data)
        dense.redistribute(cosine(step), gradients, dense.mean_of_active(gradients))


def follow_granet(dense, model, data, step, due):
    if not due:
        return
    left = (1 - min((step - 2) / (T_END - 2), 1.0)) ** 3
    places = sum(dense.places.values())
    wanted = places - math.floor(places * (FINAL + (0.5 - FINAL) * left))
    sizes, gradients = dense.score(dense.weights), dense.gradients(model, data)
    best = {k: largest(sizes[k], a, 1) for k, a in dense.active.items()}
    ranked = sorted(
        (p not in best[k], -sizes[k][p], i, p, k)
        for i, (k, a) in enumerate(dense.active.items())
        for p in a
    )
    left = {k: sum(one[-1] == k for one in ranked[:wanted]) for k in dense.active}
    new = {k: int(np.float32(n) * np.float32(cosine(step))) for k, n in left.items()}
    kept = {k: largest(sizes[k], a, left[k] - new[k]) for k, a in dense.active.items()}
    dense.grow(kept, new, gradients)


ORACLES = {"snfs": follow_snfs, "rigl-sg": follow_sg, "granet": follow_granet}


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", ORACLES)
def test_it_does_what_the_dense_one_does(name, block):
    model = net(name, block)
    dense, optimizer = Dense(model, block), sgd(model, lr=0.0)
    method = attach(name, model, optimizer)
    last = None
    for i in range(26):
        step = method.weight_steps
        due = 2 <= step < T_END and (last is None or step - last >= FREQ)
        if name == "granet":
            due = due or (step >= T_END and last < T_END)
        last = step if due else last
        ORACLES[name](dense, model, batch(i), step, due)
        train(model, optimizer, [i])
        found = {k: set(m.topology.positions().tolist()) for k, m in method.layers.items()}
        assert found == dense.active, i
    assert len(method.history) >= 6
    assert len({tuple(sorted(r.layers.items())) for r in method.history}) > 1


def test_layers_are_compared_by_the_optimizers_momentum():
    """Of two layers that are alike only the one whose momentum is larger grows."""
    for make, key in (
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9), "momentum_buffer"),
        (lambda m: torch.optim.Adam(m.parameters(), lr=0.0), "exp_avg"),
    ):
        model = net("rigl-sm")
        optimizer = make(model)
        method = attach("rigl-sm", model, optimizer)
        before = sizes(model)
        train(model, optimizer, range(2))
        for k, layer in method.layers.items():
            optimizer.state[layer.values][key].fill_(float(k == "2"))
            if "exp_avg_sq" in optimizer.state[layer.values]:
                optimizer.state[layer.values]["exp_avg_sq"].fill_(1.0)
        train(model, optimizer, [2])
        moved = {k: n - before[k] for k, n in sizes(model).items()}
        (record,) = method.history
        assert moved["0"] == -record.layers["0"].dropped
        assert moved["2"] == -moved["0"] - moved["4"]


def test_an_optimizer_without_momentum_is_named():
    model = net("rigl-sm")
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0)
    attach("rigl-sm", model, optimizer)
    with pytest.raises(ConfigError, match="must hold a momentum, one of .*; got .'square_avg'"):
        train(model, optimizer, range(3))


def test_dsr_follows_its_threshold():
    model = net("dsr")
    optimizer = sgd(model, lr=0.0)
    method = attach("dsr", model, optimizer, initial_threshold=0.5, decay="constant")
    threshold = 0.5
    total = sum(sizes(model).values())
    for i in range(22):
        weights = {k: m.active_values().abs().flatten() for k, m in method.layers.items()}
        old = {k: m.topology.positions() for k, m in method.layers.items()}
        updates = len(method.history)
        train(model, optimizer, [i])
        if len(method.history) == updates:
            continue
        kept = {k: old[k][w >= threshold] for k, w in weights.items()}
        gone = total - sum(map(len, kept.values()))
        for k, layer in method.layers.items():
            assert set(kept[k].tolist()) <= set(layer.topology.positions().tolist())
            share = gone * len(kept[k]) / (total - gone)
            assert abs(layer.topology.nnzb - len(kept[k]) - share) < 1
        asked = int(np.float32(total) * np.float32(0.5))
        threshold *= 0.5 if gone > 1.1 * asked else 2.0 if gone < 0.9 * asked else 1.0
        assert method.threshold == threshold
    assert len(method.history) >= 6


def test_dsr_keeps_the_thresholds_of_updates_that_a_layer_was_frozen_in():
    model = net("dsr")
    optimizer = sgd(model, lr=2.0**-12)
    method = attach("dsr", model, optimizer, initial_threshold=0.5, update_freq=1, t_end=40)
    known = []
    for i in range(40):
        model[4].values.requires_grad_(i % 3 != 1)
        train(model, optimizer, [i])
        known.append((len(method.history), method.threshold))
    history = method.history
    assert len(history) > 20
    for updates, threshold in known:
        method.history = history[:updates]
        assert method.threshold == threshold


# ---- momentum

FAMILIES = {
    "linear": (lambda: nn.Linear(12, 16), (6, 12)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), (2, 8, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3), (2, 8, 7)),
}


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_momentum_is_the_average_of_dense_gradients(family, block, impl):
    make, shape = FAMILIES[family]
    model = sk.sparsify_(
        nn.Sequential(make().double()), 0.6, block=block, impl=impl, distribution=lambda *_: 0.6
    )
    (layer,) = sk.sparse_layers(model).values()
    method = sk.SNFS(model, sgd(model, lr=0.0), t_end=9, first_update=5, momentum_decay=0.5)
    expected = 0.0
    for i in range(4):
        torch.manual_seed(i)
        x = integers(*shape, dtype=torch.float64)
        dense = sk.densify_(copy.deepcopy(model))[0]
        weight = integers(*dense(x).shape, dtype=torch.float64)
        (dense(x) * weight).sum().backward()
        method.optimizer.zero_grad()
        (model(x) * weight).sum().backward()
        method.optimizer.step()
        expected = 0.5 * expected + 0.5 * dense.weight.grad
    (average,) = method.growth.state().values()
    assert torch.equal(layer.as_weight(average), expected)
    assert method.growth.bytes() == 8 * expected.numel()
    assert method.dense_at == "steps"


def test_a_gradient_that_is_not_finite_stays_out_of_the_momentum(caplog):
    model = net("snfs")
    optimizer = sgd(model, lr=0.0)
    method = attach("snfs", model, optimizer, first_update=1)
    train(model, optimizer, [0])
    before = copy.deepcopy(method.growth.state())
    topology = model[0].topology
    with caplog.at_level(logging.WARNING, "sparsekern"):
        x, target = batch(1)
        optimizer.zero_grad()
        (model(x) * target).sum().backward()
        # what is active is finite, the rest is not: a pair that came late
        bad = torch.full((8, 12), torch.inf, dtype=torch.float64)
        observer = method.growth.observers["0"]
        pair = observer._pairs[0]
        observer._pairs[0] = pair._replace(x=bad)
        optimizer.step()
    assert "the gradient of ['0'] is not finite" in caplog.text
    assert torch.equal(method.growth.state()["0"], before["0"])
    assert not torch.equal(method.growth.state()["2"], before["2"])
    assert not method.history
    assert model[0].topology is topology
    train(model, optimizer, [2])
    assert len(method.history) == 1


def test_a_method_that_is_detached_looks_no_longer():
    model = net("snfs")
    method = attach("snfs", model, optimizer := sgd(model))
    assert all(layer._capture_key for layer in method.layers.values())
    method.detach()
    assert not any(layer._capture_key for layer in method.layers.values())
    train(model, optimizer, range(3))


def test_momentum_of_another_shape_is_refused_and_none_is_told(caplog):
    model = net("snfs")
    optimizer = sgd(model)
    method = attach("snfs", model, optimizer)
    train(model, optimizer, range(4))
    state = copy.deepcopy(method.state_dict())
    wrong = state | {"own": state["own"] | {"0": torch.zeros(3, 3)}}
    with pytest.raises(ConfigError, match=r"momentum of layer '0' must have shape \(16, 12\)"):
        method.load_state_dict(wrong)
    assert torch.equal(method.growth.state()["0"], state["own"]["0"])
    del state["own"]
    with caplog.at_level(logging.WARNING, "sparsekern"):
        method.load_state_dict(state)
    assert "holds no momentum of ['0', '2', '4']: it starts anew" in caplog.text
    assert isinstance(method.growth, Momentum)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("dropped", [0.5, 1.0])
def test_layers_of_no_block_or_of_few(name, dropped):
    """One that has none may get some; one that has some keeps one, whatever it drops."""
    torch.manual_seed(0)
    empty = sk.SparseLinear(12, 16, topology=sk.Topology.from_mask(torch.zeros(16, 12)))
    mask = torch.zeros(8, 24)
    mask[3, 5] = 1
    last = sk.SparseLinear(24, 8, topology=sk.Topology.from_mask(mask))
    middle = sk.SparseLinear(16, 24, sparsity=0.5)
    model = nn.Sequential(empty, nn.ReLU(), middle, nn.ReLU(), last).double()
    total = sum(sizes(model).values())
    method = attach(name, model, sgd(model), drop_fraction=dropped)
    train(model, method.optimizer, range(12))
    assert len(method.history) >= 2
    assert sizes(model)["4"] >= 1
    assert sum(sizes(model).values()) == total or name == "granet"


# ---- what counts on sizes


@pytest.mark.parametrize("name", MOVING)
def test_a_compiled_model_is_refused_before_anything_is_attached(name):
    model = net(name)
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ConfigError, match="a compiled module counts on the size"):
        attach(name, compiled, optimizer)
    assert "sparsekern" not in optimizer.param_groups[0]


def test_what_was_compiled_meanwhile_is_refused_at_the_update():
    model = net("rigl-sg")
    optimizer = sgd(model)
    method = attach("rigl-sg", model, optimizer)
    train(model, optimizer, range(2))
    compiled = torch.compile(model, backend="eager")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match="a compiled module counts on the size"):
        train(compiled, optimizer, [2])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not method.history


def test_layers_of_several_block_sizes_are_refused():
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 24))
    sk.sparsify_(model, 0.5, block={"0": 4, "1": 2}, distribution="uniform")
    with pytest.raises(ConfigError, match=r"one block size .*'0': \(4, 4\), '1': \(2, 2\)"):
        sk.SNFS(model, sgd(model), t_end=5)


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("snfs", {"momentum_decay": 1.0}, "`momentum_decay` must lie in"),
        ("dsr", {"initial_threshold": 0.0}, "`initial_threshold` must be positive"),
        ("granet", {"sparsity": 0.3}, "`initial_sparsity` can't exceed `sparsity`"),
        ("granet", {"first_update": 30}, "`t_start` must come before `t_end`"),
    ],
)
def test_arguments_of_their_own_are_checked(name, wrong, text):
    with pytest.raises(ConfigError, match=text):
        attach(name, model := net(name), sgd(model), **wrong)
