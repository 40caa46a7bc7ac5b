"""Several ranks: the same topologies on all, and the same as one process would choose."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def worker(rank, world, port, method, block, queue, sabotage):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    try:
        layers = build(block)
        model = DistributedDataParallel(layers, broadcast_buffers=False)
        if sabotage and rank == 1:
            layers[0].values.data.neg_()[0] *= 100  # another drop than on rank 0
        queue.put((rank, train(model, layers, method, rank, world)))
    except RankMismatchError as error:
        queue.put((rank, str(error)))
    finally:
        dist.barrier()  # a group that is left while others still talk may abort the process
        dist.destroy_process_group()


def broadcasting(rank, world, port, queue):
    """A model of another topology on each rank, in a DDP module that broadcasts buffers."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = nn.Sequential(SparseLinear(24, 32, bias=False, sparsity=0.5), nn.BatchNorm1d(32))
    layer = model[0]
    queue.put((rank, "own", layer.topology.digest()))
    ddp = DistributedDataParallel(model)
    queue.put((rank, "built", layer.topology.digest()))
    if rank == 0:  # the next broadcast carries it to the others, past the tensors' versions
        layer.rewire_(other_topology(layer, 7), torch.arange(layer.topology.nnzb), [layer.values])
    layer.set_active_values(integers(*layer.values.shape))
    x = integers(5, 24)
    y = ddp(x).sum()
    right = torch.equal(layer(x), layer.to_dense()(x))
    queue.put((rank, "trained", (layer.topology.digest(), right)))
    y.backward()
    queue.put((rank, "broadcast", sorted(ddp.named_module_buffers)))
    layer.rewire_(other_topology(layer, rank), torch.arange(layer.topology.nnzb), [layer.values])
    before = layer.topology.digest()
    ddp(x).sum().backward()
    queue.put((rank, "kept", layer.topology.digest() == before))
    dist.barrier()
    dist.destroy_process_group()


def other_topology(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    return Topology.random(layer.matrix_shape, nnzb=layer.topology.nnzb, generator=generator)


def experts(ranks):
    """Which layers an update changes, and the topologies, after what these ranks see."""
    torch.manual_seed(0)
    model = nn.ModuleList(SparseLinear(12, 12, sparsity=0.5, dtype=torch.float64) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = RigL(model, optimizer, t_end=10)
    losses = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        losses += [model[i](x).square().sum() for i in USED[rank]]
    sum(losses).backward()
    optimizer.step()
    changed = [sorted(record.layers) for record in method.history]
    return changed, [m.topology.digest() for m in model]


USED = {0: (0, 1), 1: (1,)}


def with_experts(rank, world, port, queue):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    queue.put((rank, experts([rank])))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_layer_that_one_rank_uses_takes_part_and_one_that_none_uses_does_not():
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(with_experts, (2, free_port(), queue), nprocs=2)
    results = dict(queue.get() for _ in range(2))
    assert results[0] == results[1] == experts([0, 1])
    assert results[0][0] == [["0", "1"]]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawn(world, method, block, sabotage=False):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (world, free_port(), method, block, queue, sabotage), nprocs=world)
    return dict(queue.get() for _ in range(world))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "block"), [(RigL, 1), (RigL, 8), (SET, 1)])
def test_two_ranks_agree_with_each_other_and_with_one(method, block):
    model = build(block)
    alone = train(model, model, method)
    results = spawn(2, method, block)
    assert results[0] == results[1]
    assert results[0] == alone


@pytest.mark.slow
def test_a_rank_that_diverges_is_named():
    results = spawn(2, RigL, 1, sabotage=True)
    for rank in (0, 1):
        # seen before a topology is decided from it
        assert "layer '0' has other values on rank 1 than on rank 0" in results[rank]


@pytest.mark.slow
def test_index_arrays_are_made_equal_once_and_then_stay_out_of_the_broadcast():
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(broadcasting, (2, free_port(), queue), nprocs=2)
    found = {}
    while not queue.empty():
        rank, what, value = queue.get()
        found.setdefault(what, {})[rank] = value
    assert found["own"][0] != found["own"][1]
    assert found["built"] == dict.fromkeys((0, 1), found["own"][0])
    assert found["trained"][0] == found["trained"][1]
    assert found["trained"][0][1]
    assert found["trained"][0][0] != found["own"][0]
    left = ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert found["broadcast"] == dict.fromkeys((0, 1), left)
    assert found["kept"] == dict.fromkeys((0, 1), True)
