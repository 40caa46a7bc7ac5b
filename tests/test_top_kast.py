"""Top-KAST: forward by the largest, gradients for the whole backward set."""

import logging

import pytest
import torch
from loops import adam, layers, loss, net, same, sgd, train
from torch import nn

from sparsekern import SparseLinear, TopKAST, sparse_layers, sparsify_
from sparsekern.errors import ConfigError, DtypeError

RATE, MOMENTUM, PENALTY = 0.25, 0.5, 0.01


def blocks(layer):
    return layer.active_values().clone()


def forward_set(theta, share):
    """Marks the largest blocks by magnitude; theta (nnzb, bh, bw)."""
    n = max(1, round(share * len(theta)))
    order = theta.abs().sum((1, 2)).sort(descending=True, stable=True).indices
    marked = torch.zeros(len(theta), dtype=torch.bool)
    marked[order[:n]] = True
    return marked.view(-1, 1, 1)


@pytest.mark.parametrize("block", [1, (4, 2)])
@pytest.mark.parametrize("family", ["linear", "conv1d", "conv2d", "gru"])
def test_steps_are_those_of_the_paper(family, block):
    model = net(family, block)
    start = {n: blocks(m) for n, m in sparse_layers(model).items()}
    optimizer = sgd(model, lr=RATE, momentum=MOMENTUM)
    method = TopKAST(
        model,
        optimizer,
        t_end=5,
        update_freq=3,
        forward_share=0.4,
        penalty=PENALTY,
        explore="none",
    )
    theta, speed = start, {n: torch.zeros_like(t) for n, t in start.items()}
    chosen = {n: forward_set(t, 0.4) for n, t in theta.items()}
    reached = 0  # gradients of what the forward pass leaves out
    for i in range(10):
        for name, layer in method.layers.items():
            assert torch.equal(blocks(layer), theta[name] * chosen[name])
            assert torch.equal(method.weights(name), theta[name])
        optimizer.zero_grad()
        loss(model, i).backward()
        for name, layer in method.layers.items():
            gradient = layer.values.grad
            reached += bool((gradient[~chosen[name].flatten()] != 0).any())
            speed[name] = MOMENTUM * speed[name] + gradient if i else gradient.clone()
            stepped = theta[name] - RATE * speed[name]
            density = int(chosen[name].sum()) / layer.topology.grid.total
            pull = torch.where(chosen[name], 1.0, 1 / density) * (RATE * PENALTY)
            theta[name] = stepped.sign() * (stepped.abs() - pull).clamp(min=0)
        optimizer.step()
        for name, layer in method.layers.items():
            # the optimizer's sums may round otherwise
            bound = 4 * torch.finfo(torch.float32).eps * (1 + theta[name].abs())
            assert bool(((method.weights(name) - theta[name]).abs() <= bound).all())
            theta[name] = method.weights(name)
            if i in (0, 3, 5, 8):  # the last two are after t_end
                chosen[name] = forward_set(theta[name], 0.4)
            assert layer.topology.nnzb == len(start[name])
    assert reached > 4


@pytest.mark.parametrize("family", ["linear", "conv2d"])
def test_random_positions_come_into_the_backward_set(family):
    model = net(family)
    optimizer = sgd(model, lr=2.0**-10)
    method = TopKAST(model, optimizer, t_end=100, update_freq=2, penalty=0, decay="constant")
    for i in range(6):
        old = {n: (m.topology.clone(), len(method.history)) for n, m in method.layers.items()}
        train(model, [optimizer], [i])
        for name, layer in method.layers.items():
            topology, updates = old[name]
            now, weights = layer.topology, method.weights(name)
            assert now.nnzb == topology.nnzb
            if len(method.history) == updates:
                assert now == topology
                continue
            outside = now.nnzb - max(1, round(0.5 * now.nnzb))
            change = method.history[-1].layers[name]
            assert change.dropped == int(0.3 * outside)
            fresh = ~torch.isin(now.positions(), topology.positions())
            assert int(fresh.sum()) == change.grown
            assert bool((weights[fresh] == 0).all())
            forward = blocks(layer) != 0
            assert int(forward.sum()) == now.nnzb - outside
            assert weights[~forward].abs().max() <= weights[forward].abs().min()
    assert len(method.history) == 3


@pytest.mark.parametrize("first", [True, False])  # the method, or its optimizer's state
@pytest.mark.parametrize("kwargs", [{}, {"step_on_update": False}])
def test_resumes_with_the_same_bits(first, kwargs):
    def made():
        model = net()
        optimizer = adam(model)
        return model, optimizer

    arguments = {"t_end": 100, "update_freq": 2, **kwargs}
    straight, cut = made(), made()
    ends = TopKAST(*straight, **arguments)
    TopKAST(*cut, **arguments)
    train(straight[0], [straight[1]], range(9))
    train(cut[0], [cut[1]], range(5))
    model = sparsify_(layers("linear"), 0.6)
    optimizer = adam(model)
    if first:
        again = TopKAST(model, optimizer, **arguments)
    optimizer.load_state_dict(cut[1].state_dict())
    model.load_state_dict(cut[0].state_dict())
    if not first:
        again = TopKAST(model, optimizer, **arguments)
    train(model, [optimizer], range(5, 9))
    assert same(model, straight[0])
    for name in again.layers:
        assert torch.equal(again.weights(name), ends.weights(name))
    assert again.history == ends.history


def test_weights_that_are_loaded_later_replace_what_was_kept_apart(caplog):
    model = net()
    optimizer = sgd(model, lr=0.0)
    method = TopKAST(model, optimizer, t_end=100, penalty=0, explore="none")
    other = net("linear")
    with torch.no_grad():
        for layer in sparse_layers(other).values():
            layer.values.copy_(torch.arange(1.0, layer.nnz + 1).view_as(layer.values))
    model.load_state_dict(other.state_dict())
    with caplog.at_level(logging.WARNING, "sparsekern"):
        train(model, [optimizer], range(2))
    assert caplog.text.count("what was kept apart is forgotten") == len(method.layers)
    for name, layer in sparse_layers(other).items():
        assert torch.equal(method.weights(name), layer.values)


def test_masked_weights_move_alike():
    def trained(impl):
        torch.manual_seed(0)
        model = nn.Sequential(SparseLinear(12, 8, sparsity=0.6, impl=impl))
        optimizer = sgd(model, momentum=0.0)
        method = TopKAST(model, optimizer, t_end=100, update_freq=2)
        train(model, [optimizer], range(5))
        return model[0], method.weights("0")

    (one, weights), (other, others) = trained("dense"), trained("masked")
    assert one.topology == other.topology
    assert torch.allclose(weights, others, rtol=0, atol=1e-5)
    assert torch.allclose(one.dense_weight(), other.dense_weight(), rtol=0, atol=1e-5)


def test_bad_arguments_and_states():
    model = net()
    optimizer = sgd(model)
    for error, kwargs in (
        (DtypeError, {"penalty": "a"}),
        (ConfigError, {"penalty": -1}),
        (ConfigError, {"forward_share": 1.5}),
        (ConfigError, {"explore": "gradient"}),
    ):
        with pytest.raises(error):
            TopKAST(model, optimizer, t_end=10, **kwargs)
    method = TopKAST(model, optimizer, t_end=10)
    state = method.state_dict()
    at = state["own"]["0.at"]
    for bad in (
        {"0.at": at},
        {"0.at": at, "0.values": torch.zeros(2, 1, 1)},
        {"0.at": at.flip(0), "0.values": state["own"]["0.values"]},
        {"9.at": at, "9.values": state["own"]["0.values"]},
    ):
        with pytest.raises(ConfigError, match="kept apart"):
            method.load_state_dict({**state, "own": bad})
    method.load_state_dict(state)
