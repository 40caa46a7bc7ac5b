"""Every method on two ranks: without a wrapper, and where one counts on the sizes of layers."""

import pytest
import torch
import torch.distributed as dist
from processes import ranks, values
from test_every_method import attach, backward, batch, net, sgd, sizes
from torch.nn.parallel import DistributedDataParallel

from sparsekern.errors import ConfigError
from sparsekern.methods import METHODS

STEPS = 10


def run(name, rank=0, world=1, wrap=False):
    """Gradients are summed over ranks by hand, or averaged by DDP; weights stand still."""
    model = net(name)
    optimizer = sgd(model, lr=0.0)
    ddp = DistributedDataParallel(model) if wrap else model
    method = attach(name, model, optimizer)
    for i in range(STEPS):
        optimizer.zero_grad()
        backward(ddp, [t.chunk(world)[rank] for t in batch(i)])
        if world > 1 and not wrap:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
    momentum = {n: t.clone() for n, t in method.growth.state().items()}
    found = [layer.topology.digest() for layer in method.layers.values()]
    return found, sizes(model), momentum, len(method.history)


def every(rank, world):
    """In one go: a start of processes takes longer than all of the methods."""
    told = {}
    for name, method in METHODS.items():
        told[name] = run(name, rank, world)
        try:
            told[name, "wrapped"] = run(name, rank, world, wrap=True)
        except ConfigError as error:
            told[name, "wrapped"] = str(error)
            assert method.resizes
    return told


@pytest.fixture(scope="module")
def told():
    return values(ranks(every, 2))


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_do_what_one_does(name, told):
    alone = run(name)
    for rank in told:
        assert rank[name][0] == alone[0]
        assert rank[name][1] == alone[1]
        assert all(torch.equal(t, alone[2][n]) for n, t in rank[name][2].items())
        assert rank[name][3] == alone[3]
    assert alone[3] >= 2 or name == "static"


@pytest.mark.parametrize("name", METHODS)
def test_what_counts_on_sizes_is_refused_by_name_and_all_else_works(name, told):
    for rank in told:
        if METHODS[name].resizes:
            assert "DistributedDataParallel counts on the size" in rank[name, "wrapped"]
        else:
            assert rank[name, "wrapped"][0] == rank[name][0]
