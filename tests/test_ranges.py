"""What `torch.profiler` shows of sparse layers and of topology updates."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import sparsekern as sk
from sparsekern.ops import ranges


def names(run):
    """How often each event of this library occurs in a profile of `run`."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    found = {}
    for event in profiler.events():
        if event.name.startswith("sparsekern::"):
            found[event.name] = found.get(event.name, 0) + 1
    return found


def step(model, x):
    y = model(x)
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()


@pytest.mark.parametrize(
    ("layer", "shape", "forward", "backward"),
    [
        (sk.SparseLinear(8, 6, sparsity=0.5), (3, 8), "spmm", "spmm_backward"),
        (sk.SparseConv2d(4, 6, 3, sparsity=0.5), (2, 4, 5, 5), "conv2d", "conv2d_backward"),
    ],
    ids=["linear", "conv"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_operators_have_their_names(layer, shape, forward, backward, compiled):
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(shape, requires_grad=True)
    step(run, x)
    found = names(lambda: step(run, x))
    assert {forward, backward} == {name.removeprefix("sparsekern::") for name in found}


def test_recurrent_layers_show_their_scans():
    layer = sk.SparseGRU(8, 6, 2, sparsity=0.5, bidirectional=True)
    x = torch.randn(5, 2, 8, requires_grad=True)
    found = names(lambda: step(layer, x))
    assert found["sparsekern::scan"] == found["sparsekern::scan_backward"] == 4
    with torch.no_grad():
        assert names(lambda: layer(x))["sparsekern::scan"] == 4


@pytest.mark.parametrize(("method", "scored"), [(sk.RigL, True), (sk.SET, False)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_topology_update_shows_its_parts(method, scored, compiled):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), sk.SparseConv2d(4, 4, 3, sparsity=0.5), nn.Flatten(), nn.Linear(16, 8)
    )
    model.append(sk.SparseLinear(8, 8, sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = method(model, optimizer, t_end=100, update_freq=2)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(3, 2, 6, 6)

    def train():
        optimizer.zero_grad()
        step(run, x)
        optimizer.step()

    seen = []
    for _ in range(4):
        before = len(attached.history)
        found = names(train)
        updated = len(attached.history) - before
        seen.append(updated)
        assert found.get("sparsekern::update", 0) == updated
        assert found.get("sparsekern::drop", 0) == 2 * updated
        assert found.get("sparsekern::grow", 0) == 2 * updated
        assert found.get("sparsekern::rewire", 0) == 2 * updated
        assert found.get("sparsekern::score", 0) == 2 * updated * scored
    assert set(seen) == {0, 1}


def test_ranges_lie_inside_each_other_and_name_the_layer():
    model = nn.Sequential(sk.SparseLinear(8, 8, sparsity=0.5), sk.SparseLinear(8, 8, sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer, t_end=10, update_freq=1)
    step(model, torch.randn(3, 8))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        method.step() or optimizer.step()
    assert method.history
    events = {e.name: e for e in profiler.events() if e.name.startswith("sparsekern::")}
    outer = events["sparsekern::update"].time_range
    for name in ("sparsekern::drop", "sparsekern::grow", "sparsekern::rewire"):
        inner = events[name].time_range
        assert outer.start <= inner.start <= inner.end <= outer.end


def test_nothing_is_recorded_where_nobody_looks(monkeypatch):
    def refuse(*_):
        raise AssertionError("a range was opened")

    monkeypatch.setattr(ranges, "record_function", refuse)
    layer = sk.SparseGRU(4, 4, sparsity=0.5)
    step(layer, torch.randn(3, 2, 4))
    with ranges.ranged("update"):
        pass
