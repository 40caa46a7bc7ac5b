"""What connections do to a layer: live neurons, fan-in, overlap with the start, exploration."""

import copy
import logging
import statistics

import pytest
import torch
from loops import METHODS, adam, digests, layers, net, sgd, train
from torch import nn

from sparsekern import SET, RigL, SparseConv2d, SparseLinear, Static, sparse_layers, topology_facts
from sparsekern.errors import ConfigError
from sparsekern.topology import Topology
from sparsekern.topology.packed import (
    count_bits,
    gaps_of,
    no_bits,
    places_of,
    positions_of,
    with_bits,
)


def counted(mask):
    """From a dense mask (outputs, inputs, *kernel) of one group."""
    fan_in = sorted(mask.flatten(1).sum(1).tolist())
    inputs = mask.transpose(0, 1).flatten(1).any(1)
    live = sum(n > 0 for n in fan_in)
    median = statistics.median_low(fan_in)
    return (len(fan_in), live, len(inputs), int(inputs.sum()), median, fan_in[-1])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("block", [1, (4, 2), (3, 5)])
def test_facts_are_counted(block, sparsity):
    model = nn.Sequential(
        SparseLinear(19, 22, sparsity=sparsity, block=block),
        SparseConv2d(6, 9, 3, sparsity=sparsity, block=block if block != (3, 5) else 3),
    )
    facts = topology_facts(model)
    for name, layer in sparse_layers(model).items():
        assert tuple(facts[name]) == counted(layer.mask())
    assert topology_facts(model[0]) == {"": facts["0"]}


def test_inputs_of_groups_are_counted_one_by_one():
    layer = SparseConv2d(8, 8, 3, groups=2, sparsity=0.9)
    whole = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    mask = layer.mask()
    whole[:4, :4], whole[4:, 4:] = mask[:4], mask[4:]
    assert tuple(topology_facts(layer)[""]) == counted(whole)


def test_a_layer_without_connections():
    topology = Topology.from_positions(torch.empty(0, dtype=torch.int64), (4, 6))
    layer = SparseLinear(6, 4, topology=topology)
    assert tuple(topology_facts(layer)[""]) == (4, 0, 6, 0, 0, 0)


# ---- sets of positions


@pytest.mark.parametrize("total", [1, 8, 9, 3000, 10**6])
@pytest.mark.parametrize("n", [0, 1, 7, 500])
def test_positions_packed_and_unpacked(n, total):
    g = torch.Generator().manual_seed(n)
    positions = torch.randperm(total, generator=g)[:n].sort().values
    gaps = gaps_of(positions)
    assert gaps.dtype is torch.uint8
    assert torch.equal(positions_of(gaps), positions)
    assert places_of(gaps) == (int(positions[-1]) + 1 if len(positions) else 0)
    if total < 10**6:
        bits = with_bits(no_bits(total, positions.device), positions)
        more = torch.arange(0, total, 3)
        both = with_bits(bits, more)
        assert int(count_bits(bits)) == len(positions)
        assert int(count_bits(both)) == len(set(positions.tolist()) | set(more.tolist()))
        assert int(count_bits(no_bits(total, positions.device))) == 0  # a copy was written to


@pytest.mark.parametrize("far", [254, 255, 256, 509, 510, 511, 765])
def test_long_gaps(far):
    positions = torch.tensor([far, far + 1, 3 * far])
    assert torch.equal(positions_of(gaps_of(positions)), positions)


# ---- in a method's history


@pytest.mark.parametrize("family", ["linear", "conv2d", "gru"])
@pytest.mark.parametrize("method", [RigL, SET])
def test_updates_tell_what_they_made(method, family):
    model = net(family)
    optimizer = sgd(model)
    attached = method(model, optimizer, t_end=100, update_freq=2, exploration=True)
    start = {n: m.mask() for n, m in attached.layers.items()}
    ever = {n: m.clone() for n, m in start.items()}
    told = 0
    for i in range(7):
        train(model, [optimizer], [i])
        for name, layer in attached.layers.items():
            ever[name] |= layer.mask()
        if len(attached.history) > told:
            told += 1
            for name, layer in attached.layers.items():
                change = attached.history[-1].layers[name]
                mask = layer.mask()
                assert change.facts == topology_facts(model)[name]
                kept = int((mask & start[name]).sum())
                assert change.overlap == kept / int(start[name].sum())
                assert change.explored == int(ever[name].sum()) / mask.numel()
    assert told == 3 + (method is SET)
    found = attached.exploration()
    assert found.layers == {n: int(m.sum()) / m.numel() for n, m in ever.items()}
    sizes = [m.numel() for m in ever.values()]
    assert found.overall == sum(int(m.sum()) for m in ever.values()) / sum(sizes)
    assert found.nbytes == sum(-(-size // 8) for size in sizes)


def test_exploration_is_not_followed_unless_it_is_asked_for():
    model = net()
    optimizer = sgd(model)
    method = RigL(model, optimizer, t_end=100, update_freq=1)
    train(model, [optimizer], range(4))
    assert method.history[-1].layers["0"].explored is None
    with pytest.raises(ConfigError, match="exploration=True"):
        method.exploration()


def test_of_a_topology_that_stays_the_density_is_explored():
    model = net()
    method = Static(model, sgd(model), t_end=100, exploration=True)
    found = method.exploration()
    assert found.layers == {n: m.density for n, m in sparse_layers(model).items()}
    assert found.nbytes == 0


def test_connections_that_others_give_a_layer_count_at_the_next_update():
    model = net()
    optimizer = sgd(model)
    method = SET(model, optimizer, t_end=100, update_freq=1, exploration=True)
    layer = method.layers["0"]
    train(model, [optimizer], [0])
    before = layer.mask()
    layer.resize_(Topology.random((16, 12), sparsity=0.5))
    ever = before | layer.mask()
    train(model, [optimizer], [1])
    assert method.exploration().layers["0"] >= int((ever | layer.mask()).sum()) / 192


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_start_and_exploration_are_resumed(method, late):
    def made():
        model = net()
        optimizer = adam(model)
        return model, optimizer

    def attach(model, optimizer):
        kwargs = {"t_end": 100, "update_freq": 2, "exploration": True}
        return METHODS[method](model, optimizer, **kwargs)

    straight, cut = made(), made()
    whole = attach(*straight)
    attach(*cut)
    train(straight[0], [straight[1]], range(9))
    train(cut[0], [cut[1]], range(5))
    saved = copy.deepcopy([cut[0].state_dict(), cut[1].state_dict()])
    model, optimizer = made()
    attached = None if late else attach(model, optimizer)
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    attached = attached or attach(model, optimizer)
    train(model, [optimizer], range(5, 9))
    assert digests(model) == digests(straight[0])
    assert attached.history == whole.history
    assert attached.exploration() == whole.exploration()
    assert attached.state_dict() == whole.state_dict()


def test_histories_of_before_are_read_and_the_start_is_unknown_then(caplog):
    model = net()
    optimizer = sgd(model)
    old = {
        "weight_steps": 3,
        "last_update": 2,
        "history": '[[2, 0.3, {"0": [5, 4]}]]',
        "connections": None,
    }
    optimizer.param_groups[0]["sparsekern"] = old
    with caplog.at_level(logging.WARNING, "sparsekern"):
        method = RigL(model, optimizer, t_end=100, update_freq=1, exploration=True)
    assert "it counts from here on" in caplog.text
    change = method.history[0].layers["0"]
    assert (change.dropped, change.grown, change.facts, change.overlap) == (5, 4, None, None)
    train(model, [optimizer], range(2))
    change = method.history[1].layers["0"]
    assert change.overlap is None
    assert change.facts is not None
    assert change.explored is not None
    method.load_state_dict({"weight_steps": 0, "last_update": None})
    train(model, [optimizer], range(2))
    assert method.history[0].layers["0"].overlap is not None


def test_a_state_of_other_layers_is_refused_before_anything_changes():
    model = net()
    optimizer = sgd(model)
    method = RigL(model, optimizer, t_end=100, update_freq=1, exploration=True)
    train(model, [optimizer], range(3))
    state = method.state_dict()
    trace = state["trace"]
    far = {"0": "//////8="}  # 5 times 255 places
    for bad in (
        5,
        {"start": {}},
        {"start": {"0": "no text"}, "explored": None},
        {"start": {"0": 5}, "explored": None},
        {"start": {"9": ""}, "explored": None},
        {"start": far, "explored": None},
        {"start": {}, "explored": {"0": "AA=="}},
        {"start": {}, "explored": {"9": trace["explored"]["0"]}},
    ):
        with pytest.raises(ConfigError, match="method state"):
            method.load_state_dict({**state, "trace": bad})
        assert method.state_dict() == state
    other = layers("linear")
    assert not sparse_layers(other)


def test_an_update_that_breaks_off_has_explored_nothing(monkeypatch):
    model = net()
    optimizer = sgd(model)
    method = SET(model, optimizer, t_end=100, update_freq=1, exploration=True)
    train(model, [optimizer], [0])
    before, state = method.exploration(), method.state_dict()

    def breaks(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model[2]), "_trust", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(model, [optimizer], [1])
    monkeypatch.undo()
    assert method.exploration() == before
    assert method.state_dict()["trace"] == state["trace"]
