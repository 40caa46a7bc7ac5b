"""Several ranks: the same topologies on all, and the same as one process would choose."""

import pytest
import torch
from processes import ranks, values
from support import integers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsekern import SET, RigL, SparseLinear, Topology, sparse_layers, sparsify_
from sparsekern.errors import RankMismatchError

STEPS = 9


def build(block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsify_(model, 0.6, block=block, distribution="uniform")
    return model


def data(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 24, generator=g), torch.randn(16, 16, generator=g)


def train(model, layers, method, rank=0, world=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attached = method(layers, optimizer, t_end=100, update_freq=2, drop_fraction=0.5)
    digests = []
    for step in range(STEPS):
        x, target = (part.chunk(world)[rank] for part in data(step))
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        digests.append([m.topology.digest() for m in sparse_layers(layers).values()])
    assert len(attached.history) >= 3
    return digests


def worker(rank, world, method, block, sabotage):
    layers = build(block)
    model = DistributedDataParallel(layers, broadcast_buffers=False)
    if sabotage and rank == 1:
        layers[0].values.data.neg_()[0] *= 100  # another drop than on rank 0
    try:
        return train(model, layers, method, rank, world)
    except RankMismatchError as error:
        return str(error)


def broadcasting(rank, _world):
    """A model of another topology on each rank, in a DDP module that broadcasts buffers."""
    torch.manual_seed(rank)
    model = nn.Sequential(SparseLinear(24, 32, bias=False, sparsity=0.5), nn.BatchNorm1d(32))
    layer = model[0]
    found = {"own": layer.topology.digest()}
    ddp = DistributedDataParallel(model)
    found["built"] = layer.topology.digest()
    if rank == 0:  # the next broadcast carries it to the others, past the tensors' versions
        layer.rewire_(other_topology(layer, 7), torch.arange(layer.topology.nnzb), [layer.values])
    layer.set_active_values(integers(*layer.values.shape))
    x = integers(5, 24)
    y = ddp(x).sum()
    right = torch.equal(layer(x), layer.to_dense()(x))
    found["trained"] = layer.topology.digest(), right
    y.backward()
    found["broadcast"] = sorted(ddp.named_module_buffers)
    layer.rewire_(other_topology(layer, rank), torch.arange(layer.topology.nnzb), [layer.values])
    before = layer.topology.digest()
    ddp(x).sum().backward()
    return found | {"kept": layer.topology.digest() == before}


def other_topology(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    return Topology.random(layer.matrix_shape, nnzb=layer.topology.nnzb, generator=generator)


def experts(seen_by):
    """Which layers an update changes, and the topologies, after what these ranks see."""
    torch.manual_seed(0)
    model = nn.ModuleList(SparseLinear(12, 12, sparsity=0.5, dtype=torch.float64) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = RigL(model, optimizer, t_end=10)
    losses = []
    for rank in seen_by:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        losses += [model[i](x).square().sum() for i in USED[rank]]
    sum(losses).backward()
    optimizer.step()
    changed = [sorted(record.layers) for record in method.history]
    return changed, [m.topology.digest() for m in model]


USED = {0: (0, 1), 1: (1,)}


def with_experts(rank, _world):
    return experts([rank])


@pytest.mark.slow
def test_a_layer_that_one_rank_uses_takes_part_and_one_that_none_uses_does_not():
    first, second = values(ranks(with_experts, 2))
    assert first == second == experts([0, 1])
    assert first[0] == [["0", "1"]]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "block"), [(RigL, 1), (RigL, 8), (SET, 1)])
def test_two_ranks_agree_with_each_other_and_with_one(method, block):
    model = build(block)
    alone = train(model, model, method)
    assert values(ranks(worker, 2, method, block, False)) == [alone, alone]


@pytest.mark.slow
def test_a_rank_that_diverges_is_named():
    for told in values(ranks(worker, 2, RigL, 1, True)):
        # seen before a topology is decided from it
        assert "layer '0' has other values on rank 1 than on rank 0" in told


@pytest.mark.slow
def test_index_arrays_are_made_equal_once_and_then_stay_out_of_the_broadcast():
    first, second = values(ranks(broadcasting, 2))
    assert first["own"] != second["own"]
    assert first["built"] == second["built"] == first["own"]
    assert first["trained"] == second["trained"]
    digest, right = first["trained"]
    assert right
    assert digest != first["own"]
    left = ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert first["broadcast"] == second["broadcast"] == left
    assert first["kept"]
    assert second["kept"]
