"""ZeroRedundancyOptimizer: each rank steps a shard of the parameters, or no sparse layer at all."""

import pytest
import torch
from loops import METHODS, net, same
from processes import ranks, values
from torch.nn.parallel import DistributedDataParallel

from sparsekern import sparse_layers


def train(name, make, rank, world):
    model = net().double()
    ddp = DistributedDataParallel(model)
    optimizer = make(model.parameters())
    # RigL spends its batch, SET takes the weight step first
    method = METHODS[name](model, optimizer, t_end=100, update_freq=2)
    for i in range(9):
        g = torch.Generator().manual_seed(i * world + rank)
        optimizer.zero_grad()
        ddp(torch.randn(6, 12, generator=g).double()).square().mean().backward()
        optimizer.step()
    return model, method, optimizer


def moments(state):
    """Of an optimizer's state, by parameter: AdamW's averages and its count of steps."""
    return {n: {k: v.tolist() for k, v in entry.items()} for n, entry in state["state"].items()}


def worker(rank, world):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own doings

    def plain(params):
        return torch.optim.AdamW(params, lr=1e-2)

    def zero(params):
        return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=1e-2)

    told = {}
    for name in ("rigl", "set"):
        expected, known, other = train(name, plain, rank, world)
        model, method, optimizer = train(name, zero, rank, world)
        optimizer.consolidate_state_dict()
        entry = resumed = None
        equal = True
        if rank == 0:
            state = optimizer.state_dict()
            equal = moments(state) == moments(other.state_dict())
            entry = state["param_groups"][0]["sparsekern"]["weight_steps"]
            method.load_state_dict({"weight_steps": 0, "last_update": None})
            optimizer.load_state_dict(state)
            resumed = method.weight_steps
        mine = {id(p) for group in optimizer.optim.param_groups for p in group["params"]}
        found = {
            "same": same(expected, model) and equal,
            "updates": len(known.history),
            "told": (entry, resumed),
            "owned": sum(id(m.values) in mine for m in sparse_layers(model).values()),
        }
        told[name] = found
    return told


@pytest.mark.slow
def test_zero_redundancy_optimizer_trains_as_its_plain_one():
    found = values(ranks(worker, 3))
    for name, weight_steps in (("rigl", 6), ("set", 9)):
        by_rank = [one[name] for one in found]
        assert all(one["same"] for one in by_rank)
        assert all(one["updates"] >= 3 for one in by_rank)
        assert 0 in {one["owned"] for one in by_rank}  # there are two layers, three ranks
        assert by_rank[0]["told"] == (weight_steps, weight_steps)
