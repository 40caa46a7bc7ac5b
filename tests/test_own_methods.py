"""Methods that a user writes: a source, a budget or an override, in a few lines."""

import pytest
import torch
from test_methods import backward, batch, digests, net, sgd, snapshot
from torch import nn

from sparsekern import SET, Method, RigL, SparseLinear, sparse_layers
from sparsekern.errors import ConfigError, ShapeError, SparseKernError, TopologyError
from sparsekern.methods import Gradient, Random, Source
from sparsekern.ops import capture
from sparsekern.topology.select import top_k_mask


class Average:
    """Sums the dense gradients of a layer, each weighing .9 of the next."""

    def __init__(self, layer):
        self.sum = torch.zeros(layer.matrix_shape)
        self.key = capture.register(self)
        layer.observe(self.key)

    def expect(self):
        pass

    def receive(self, dy, x):
        self.sum = 0.9 * self.sum + dy.t() @ x


class Momentum(Source):
    """The largest momentum, as in SNFS; dense, for a test."""

    def __init__(self, layers, norm, passes):
        super().__init__(layers, norm, passes)
        self.averages = {name: Average(layer) for name, layer in layers.items()}

    def best(self, name, keep, n, _generator):
        scores = self.averages[name].sum.abs().flatten()
        scores[self.layers[name].topology.positions()[keep]] = -1.0
        return top_k_mask(scores, n).nonzero()[:, 0]


class SparseMomentum(Method):
    source = Momentum


class DropAtRandom(Method):
    source = Gradient

    def drop_scores(self, name, layer):
        return torch.rand(layer.topology.nnzb, generator=self.generator(name))


def test_a_method_that_grows_by_momentum():
    dense = nn.Linear(6, 1, bias=False)
    layer = SparseLinear.from_dense(dense, mask=torch.tensor([[1, 1, 0, 0, 0, 0]]))
    model = nn.Sequential(layer)
    optimizer = sgd(model, lr=0.0)
    method = SparseMomentum(
        model, optimizer, t_end=10, first_update=2, drop_fraction=1.0, decay="constant"
    )
    # momentum: 5 * .81 - 4 * .9 in column 2, .9 + 3 in column 3, 2 in column 5
    for gradient in ([0.0, 0, 5, 0, 0, 0], [0.0, 0, -4, 1, 0, 0], [0.0, 0, 0, 3, 0, 2]):
        optimizer.zero_grad()
        model(torch.tensor([gradient])).sum().backward()
        optimizer.step()
    assert layer.topology.positions().tolist() == [3, 5]
    assert [record.step for record in method.history] == [2]


def test_a_method_that_drops_at_random():
    def train(seed):
        model = net()
        optimizer = sgd(model)
        nnz = [layer.nnz for layer in sparse_layers(model).values()]
        method = DropAtRandom(model, optimizer, t_end=100, update_freq=2, seed=seed)
        for i in range(9):
            optimizer.zero_grad()
            backward(model, batch(seed=i))
            optimizer.step()
        assert len(method.history) == 3
        assert [layer.nnz for layer in sparse_layers(model).values()] == nnz
        return digests(model)

    assert train(0) == train(0)
    assert train(0) != train(1)


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize("block", [1, 4])
def test_grown_values_are_the_methods_choice(impl, block):
    class Ones(SET):
        def grown_values(self, _name, layer, update):
            return torch.full((update.grown, *layer.block), 7.0, dtype=torch.float64)

    model = net(impl, block)
    optimizer = sgd(model)
    before = {name: layer.mask() for name, layer in sparse_layers(model).items()}
    Ones(model, optimizer, t_end=10, drop_fraction=1.0)
    backward(model, batch())
    optimizer.step()
    for name, layer in sparse_layers(model).items():
        fresh = layer.mask() & ~before[name]
        assert bool(fresh.any())
        assert torch.equal(layer.dense_weight() == 7.0, fresh)


def test_a_budget_sees_what_was_dropped_the_layers_and_the_source():
    seen = {}

    def watching(dropped, layers, source):
        seen.update(dropped=dropped, layers=layers, source=source)
        return dropped

    class Watched(RigL):
        budget = watching

    model = net()
    optimizer = sgd(model)
    method = Watched(model, optimizer, t_end=10)
    backward(model, batch())
    optimizer.step()
    assert seen["dropped"] == {n: c.dropped for n, c in method.history[0].layers.items()}
    assert seen["layers"] == method.layers
    assert seen["source"] is method.growth


def test_survivors_and_how_many_may_grow_go_together():
    """A method that drops more than the schedule says tells its source before the batch."""

    class Half(RigL):
        def survivors(self, _name, layer, _fraction):
            keep = torch.ones(layer.topology.nnzb, dtype=torch.bool)
            keep[::2] = False
            return keep

    class Told(Half):
        def most_grown(self, _name, layer, _fraction):
            return layer.topology.nnzb

    model = net()
    optimizer = sgd(model)
    method = Told(model, optimizer, t_end=10)
    dense = {n: m.to_dense() for n, m in method.layers.items()}
    x, target = batch()
    nn.functional.cross_entropy(dense["2"](dense["0"](x).relu()), target).backward()
    expected = {}
    for name, layer in method.layers.items():
        positions = layer.topology.positions()
        scores = dense[name].weight.grad.abs().flatten()
        scores[positions[1::2]] = torch.inf
        expected[name] = set(scores.topk(len(positions)).indices.tolist())
    backward(model, (x, target))
    optimizer.step()
    assert expected == {n: set(m.topology.positions().tolist()) for n, m in method.layers.items()}

    model = net()
    optimizer = sgd(model)
    Half(model, optimizer, t_end=10)
    refused(model, optimizer, ConfigError, "layer '0' grows 39 .* best 23: `most_grown` must say")


def refused(model, optimizer, error, text):
    """The next step raises `error`, and nothing has changed."""
    backward(model, batch())
    before = snapshot(model)
    with pytest.raises(error, match=text) as info:
        optimizer.step()
    assert isinstance(info.value, SparseKernError)
    assert all(map(torch.equal, before.values(), snapshot(model).values()))


def bad(name, value):
    """A method that takes what it grows from chance, and one thing from `value`."""
    override = {name: value} if name == "budget" else {name: lambda *_args: value(*_args[1:])}
    return type("Bad", (Method,), {"source": Random} | override)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (
            bad("survivors", lambda _n, layer, _f: torch.ones(3, dtype=torch.bool)),
            ShapeError,
            r"`survivors` of layer '0' must be torch.bool of shape \(77,\); got .* shape \(3,\)",
        ),
        (
            bad("survivors", lambda _n, layer, _f: torch.ones(layer.topology.nnzb)),
            ShapeError,
            r"must be torch.bool of shape \(77,\); got torch.float32 of shape \(77,\)",
        ),
        (
            bad("drop_scores", lambda _n, _l: torch.ones(3)),
            ShapeError,
            r"`drop_scores` of layer '0' must be of shape \(77,\); got .* shape \(3,\)",
        ),
        (
            bad("grown_positions", lambda _n, _l, _k, n: torch.arange(n + 1)),
            ShapeError,
            r"`grown_positions` of layer '0' must be torch.int64 of shape \(23,\); got",
        ),
        (
            bad("grown_positions", lambda _n, layer, keep, n: layer.topology.positions()[keep][:n]),
            TopologyError,
            "`grown_positions` of layer '0': .* strictly ascending",
        ),
        (
            bad("grown_positions", lambda _n, _l, _k, n: 10_000 + torch.arange(n)),
            TopologyError,
            r"`grown_positions` of layer '0': .* must lie in \[0, 192\)",
        ),
        (
            bad("grown_values", lambda _n, _l, update: torch.ones(update.grown)),
            ShapeError,
            r"`grown_values` of layer '0' must be of shape \(\d+, 1, 1\); got",
        ),
        (
            bad("budget", lambda dropped, _l, _s: {"0": dropped["0"] + 1, "2": dropped["2"]}),
            ConfigError,
            r"let 38 blocks grow in all, where {'0': 23, '2': 15} are dropped; got 39",
        ),
        (bad("budget", lambda *_: {}), ConfigError, r"what grows in each of \['0', '2'\]; got {}"),
    ],
)
def test_what_an_override_gets_wrong_is_told_before_anything_changes(method, error, text):
    model = net()
    optimizer = sgd(model)
    method(model, optimizer, t_end=10)
    refused(model, optimizer, error, text)


def test_a_method_without_a_source_says_so():
    model = net()
    optimizer = sgd(model)
    Method(model, optimizer, t_end=10)
    backward(model, batch())
    with pytest.raises(NotImplementedError, match="Source has no positions to grow"):
        optimizer.step()
