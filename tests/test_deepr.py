"""DeepR: signs that are kept, and what reaches zero replaced by chance."""

import pytest
import torch
from loops import adam, loss, net, same, sgd, train
from torch import nn

from sparsekern import DeepR, SparseLinear, sparse_layers
from sparsekern.errors import ConfigError, DtypeError


def blocks(layer):
    return layer.active_values().clone()


@pytest.mark.parametrize("update_freq", [1, 3])
@pytest.mark.parametrize("family", ["linear", "conv2d", "gru"])
@pytest.mark.parametrize("block", [1, (4, 2)])
def test_steps_and_rewiring_are_those_of_the_paper(block, family, update_freq):
    """A dense loop beside it: theta = sign * w, l1, zero for what is not positive."""
    model = net(family, block)
    optimizer = sgd(model, lr=0.5, momentum=0.0)
    method = DeepR(model, optimizer, t_end=8, update_freq=update_freq, l1=0.05, noise=0)
    shapes = {n: m.topology.nnzb for n, m in method.layers.items()}
    dead_seen = 0
    for i in range(10):
        signs = {n: blocks(m).sign() for n, m in method.layers.items()}
        old = {n: m.topology.clone() for n, m in method.layers.items()}
        updates = len(method.history)
        optimizer.zero_grad()
        loss(model, i).backward()
        stepped = {n: blocks(m) - 0.5 * m.values.grad for n, m in method.layers.items()}
        optimizer.step()
        for name, layer in method.layers.items():
            if i >= 8:  # plain
                assert torch.equal(blocks(layer), stepped[name])
                continue
            moved = stepped[name] - signs[name] * (0.05 * 0.5)
            theta = signs[name] * moved
            expected = moved.where(theta > 0, 0.0)
            inside = old[name].pack(torch.ones(layer.matrix_shape))
            stay = 2 * (theta > 0).sum((1, 2)) > inside.sum((1, 2))
            assert layer.topology.nnzb == shapes[name]
            if len(method.history) == updates:
                assert torch.equal(blocks(layer), expected)
                continue
            alive = old[name].positions()[stay]
            now = layer.topology.positions()
            stays = torch.isin(now, alive)
            assert int(stays.sum()) == len(alive)
            assert torch.equal(blocks(layer)[stays], expected[stay])
            fresh = blocks(layer)[~stays]
            inside = layer.topology.pack(torch.ones(layer.matrix_shape))[~stays]
            assert torch.equal(fresh.abs(), inside * torch.tensor(1e-12))
            assert method.history[-1].layers[name].dropped == shapes[name] - len(alive)
            dead_seen += len(fresh)
    assert dead_seen > 3
    assert len(method.history) == -(-8 // update_freq)


def held(weight, gradient, steps=1, **kwargs):
    """A layer of these four weights, all there are, after steps with this gradient."""
    layer = SparseLinear.from_dense(nn.Linear(4, 2, bias=False), mask=torch.ones(2, 4))
    layer.set_active_values(weight.view(-1, 1, 1))
    model = nn.Sequential(layer)
    optimizer = sgd(model, lr=1.0, momentum=0.0)
    DeepR(model, optimizer, t_end=100, first_update=50, **kwargs)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.eye(4)) * gradient.view(2, 4).t()).sum().backward()
        optimizer.step()
    return layer.active_values().flatten()


def test_what_reached_zero_stays_there_until_it_is_rewired():
    weight = torch.tensor([1.0, -1, 0.5, -0.5, 0, 2, -2, 1])
    gradient = torch.tensor([0.25, 0, 1, -1, 3, 0, 0, 0.25])
    end = held(weight, gradient, steps=3, l1=0, noise=0)
    assert end.tolist() == [0.25, -1, 0, 0, 0, 2, -2, 0.25]
    end = held(weight, gradient * 0, steps=2, l1=0.5, noise=0)
    assert end.tolist() == [0, 0, 0, 0, 0, 1, -1, 0]


def test_noise_shakes_what_is_alive():
    weight = torch.full((8,), 100.0)
    weight[3] = 0
    end = held(weight, torch.zeros(8), steps=500, l1=0, noise=0.5)
    assert end[3] == 0
    moved = end[weight > 0] - 100
    # each N(0, 500 / 4); the mean square of 7 lies in these bounds but for 1 in 10^6
    assert 0.01 < float(moved.square().mean()) / 125 < 8
    again = held(weight, torch.zeros(8), steps=500, l1=0, noise=0.5)
    assert torch.equal(end, again)


@pytest.mark.parametrize("impl", ["cpu", "masked"])
def test_resumes_with_the_same_bits(impl):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(
            SparseLinear(12, 16, sparsity=0.6, impl=impl), nn.ReLU(), SparseLinear(16, 8, impl=impl)
        )
        optimizer = adam(model, lr=0.1)
        return model, optimizer, DeepR(model, optimizer, t_end=100, update_freq=2, noise=0.1)

    straight, first, second = made(), made(), made()
    train(straight[0], [straight[1]], range(9))
    train(first[0], [first[1]], range(4))
    for part, state in zip(second[:2], first[:2], strict=True):
        part.load_state_dict(state.state_dict())
    train(second[0], [second[1]], range(4, 9))
    assert same(second[0], straight[0])
    assert second[2].history == straight[2].history
    assert sum(c.dropped for r in straight[2].history for c in r.layers.values())
    assert all(layer.nnz for layer in sparse_layers(second[0]).values())


def test_masked_weights_move_alike():
    def trained(impl):
        torch.manual_seed(0)
        model = nn.Sequential(SparseLinear(12, 8, sparsity=0.6, impl=impl))
        optimizer = sgd(model, momentum=0.0)
        DeepR(model, optimizer, t_end=100, update_freq=2, noise=0.1, l1=0.1)
        train(model, [optimizer], range(5))
        return model[0]

    one, other = trained("dense"), trained("masked")
    assert one.topology == other.topology
    assert torch.allclose(one.dense_weight(), other.dense_weight(), rtol=0, atol=1e-5)


def test_bad_arguments():
    model = net()
    optimizer = sgd(model)
    for error, kwargs in (
        (DtypeError, {"l1": "a"}),
        (DtypeError, {"noise": True}),
        (ConfigError, {"l1": -1e-5}),
        (ConfigError, {"noise": float("nan")}),
    ):
        with pytest.raises(error):
            DeepR(model, optimizer, t_end=10, **kwargs)
    DeepR(model, optimizer, t_end=10)
