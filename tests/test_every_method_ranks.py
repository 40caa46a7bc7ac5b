"""Every method on two ranks: without a wrapper, and where one counts on the sizes of layers."""

import pytest
import torch
import torch.distributed as dist
from processes import ranks, values
from test_every_method import attach, backward, batch, net, sgd, sizes
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from sparsekern.errors import ConfigError
from sparsekern.methods import METHODS
from sparsekern.methods.budget import same

STEPS = 10


class SparseMomentum(sk.SNFS):
    """Without redistribution, which DDP can't follow: what the RigL authors compare with."""

    budget = same
    resizes = False


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


def momentum(rank=0, world=1, batches=(STEPS, STEPS)):
    """Under DDP, with as many batches on each rank as its place in `batches` says."""
    model = net("snfs")
    optimizer = sgd(model, lr=0.0)
    ddp = DistributedDataParallel(model) if world > 1 else model
    method = SparseMomentum(model, optimizer, t_end=20, update_freq=2, first_update=1)

    def train():
        for i in range(batches[rank]):
            optimizer.zero_grad()
            backward(ddp, [t.chunk(2)[rank] for t in batch(i)] if world > 1 else batch(i))
            optimizer.step()

    if world > 1:
        with Join([ddp, method]):
            train()
    else:
        train()
    found = [layer.topology.digest() for layer in method.layers.values()]
    return found, {n: t.clone() for n, t in method.growth.state().items()}, len(method.history)


def every(rank, world):
    """In one go: a start of processes takes longer than all of the methods."""
    told = {"momentum": momentum(rank, world), "uneven": momentum(rank, world, (STEPS, 6))}
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


def test_momentum_under_ddp_is_that_of_one_process(told):
    alone = momentum()
    for rank in told:
        assert rank["momentum"][0] == alone[0]
        assert all(torch.equal(t, alone[1][n]) for n, t in rank["momentum"][1].items())
        assert rank["momentum"][2] == alone[2] >= 4


def test_a_rank_without_inputs_has_the_others_momentum(told):
    first, second = (rank["uneven"] for rank in told)
    assert first[0] == second[0]
    assert all(torch.equal(t, second[1][n]) for n, t in first[1].items())
    assert not torch.equal(first[1]["0"], told[0]["momentum"][1]["0"])
    assert first[2] == second[2]
