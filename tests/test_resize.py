"""`layer.resize_`: another number of active blocks, in a layer that trains already."""

import copy

import pytest
import torch
from support import integers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk
from sparsekern.methods.update import drop_count

FAMILIES = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24)), (6, 16)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)), (2, 8, 5, 5)),
    "gru": (lambda: nn.Sequential(nn.GRU(16, 8)), (3, 2, 16)),
}


def build(family, block=1, impl=None):
    """A model and an input, all of small integers: linear ones compute exactly, in any order."""
    torch.manual_seed(0)
    make, shape = FAMILIES[family]
    g = torch.Generator().manual_seed(1)
    model = sk.sparsify_(
        make().double(), 0.6, block=block, distribution=lambda *_: 0.6, impl=impl, generator=g
    )
    for layer in sk.sparse_layers(model).values():
        blocks = integers(*layer.topology.values_shape, dtype=torch.float64)
        layer.set_active_values(layer.topology.clear_padding_(blocks))
        if layer.bias is not None:
            layer.bias.data.copy_(integers(*layer.bias.shape, dtype=torch.float64))
    return model, integers(*shape, dtype=torch.float64)


def train(model, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        optimizer.step()


def other(layer, sparsity):
    """A topology of another size, half of the old blocks in it."""
    old = layer.topology
    g = torch.Generator().manual_seed(2)
    groups, taps = old.groups, old.taps
    drawn = sk.Topology.random(
        old.shape, old.block, sparsity=sparsity, groups=groups, taps=taps, generator=g
    )
    kept = torch.cat([drawn.positions(), old.positions()[::2]]).unique()
    return old.with_positions(kept)


def by_position(layer, tensor):
    """The tensor's blocks by their position in the matrix."""
    blocks = layer.pack(tensor.detach())
    return dict(zip(layer.topology.positions().tolist(), blocks.tolist(), strict=True))


@pytest.mark.parametrize("sparsity", [0.2, 0.95])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_state_and_averages_move_and_training_equals_the_masked_twin(
    family, block, sparsity
):
    runs = {}
    for impl in (None, "masked"):
        model, x = build(family, block, impl)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        method = sk.SET(model, optimizer, t_end=100, update_freq=1000, first_update=50)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        train(model, optimizer, x, 3)
        average.update_parameters(model)
        for name, layer in sk.sparse_layers(model).items():
            values, state = layer.values, optimizer.state[layer.values]
            tensors = {"values": values} | {k: v for k, v in state.items() if v.dim()}
            before = {k: by_position(layer, v) for k, v in tensors.items()}
            topology = other(layer, sparsity)
            assert topology.nnzb != layer.topology.nnzb
            layer.resize_(topology)
            assert layer.values is values
            assert values.grad is None
            assert layer.topology == topology
            assert sk.sparse_layers(average.module)[name].topology == topology
            tensors = {"values": values} | {k: v for k, v in state.items() if v.dim()}
            for key, old in before.items():
                for position, now in by_position(layer, tensors[key]).items():
                    zeros = torch.zeros(layer.block, dtype=torch.float64).tolist()
                    assert now == old.get(position, zeros), (key, position)
        train(model, optimizer, x, 3)
        average.update_parameters(model)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert not method.history
        runs[impl] = model
    for mine, twin in zip(*(sk.sparse_layers(m).values() for m in runs.values()), strict=True):
        assert mine.topology == twin.topology
        if family != "gru":  # whose sigmoids round
            assert torch.equal(mine.dense_weight(), twin.dense_weight())


def test_an_optimizer_without_a_method_is_named():
    model, x = build("linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, x, 2)
    layer = model[0]
    layer.resize_(other(layer, 0.9), optimizer=optimizer)
    assert optimizer.state[layer.values]["momentum_buffer"].shape == layer.values.shape
    train(model, optimizer, x, 2)
    with pytest.raises(sk.OptimizerError, match="must hold `values`"):
        layer.resize_(other(layer, 0.5), optimizer=torch.optim.SGD([torch.zeros(2)], lr=1))


@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize("sparsity", [0.2, 0.95])
def test_an_update_that_is_due_is_of_the_new_size(sparsity, impl):
    model, x = build("linear", impl=impl)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    method = sk.RigL(model, optimizer, t_end=100, update_freq=2)
    train(model, optimizer, x, 3)
    assert method.due
    layer = model[0]
    layer.resize_(other(layer, sparsity))
    size = layer.topology.nnzb
    train(model, optimizer, x, 1)
    assert len(method.history) == 2
    assert method.history[1].layers["0"].dropped == drop_count(size, method.history[1].fraction)
    assert layer.topology.nnzb == size


def refused(layer, match):
    before = layer.topology.clone(), layer.values.detach().clone()
    with pytest.raises(sk.ConfigError, match=match):
        layer.resize_(other(layer, 0.95))
    assert layer.topology == before[0]
    assert torch.equal(layer.values, before[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_it_is_refused_where_something_counts_on_the_size(tmp_path):
    model, _ = build("linear")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(model)
        refused(model[0], "DistributedDataParallel counts on the size")
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    model, _ = build("linear")
    compiled = torch.compile(model)
    refused(model[0], "a compiled module counts on the size")
    del compiled
    model, _ = build("linear")
    model.compile()
    refused(model[0], "a compiled module counts on the size")


def test_what_it_is_given_is_checked():
    model, _ = build("linear")
    with pytest.raises(sk.DtypeError, match="must be a Topology; got int"):
        model[0].resize_(3)
    with pytest.raises(sk.ShapeError, match="the new topology"):
        model[0].resize_(sk.Topology.random((4, 4), sparsity=0.5))
    with pytest.raises(sk.DtypeError, match="`optimizer` must be"):
        model[0].resize_(other(model[0], 0.9), optimizer="adam")
