"""ZeroRedundancyOptimizer: each rank steps a shard of the parameters, or no sparse layer at all."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loops import METHODS, net, same
from test_ranks import free_port
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


def worker(rank, world, port, queue):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own doings

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    torch.set_num_threads(1)

    def plain(params):
        return torch.optim.AdamW(params, lr=1e-2)

    def zero(params):
        return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=1e-2)

    for name in ("rigl", "set"):
        expected, known, _ = train(name, plain, rank, world)
        model, method, optimizer = train(name, zero, rank, world)
        optimizer.consolidate_state_dict()
        entry = resumed = None
        if rank == 0:
            state = optimizer.state_dict()
            entry = state["param_groups"][0]["sparsekern"]["weight_steps"]
            method.load_state_dict({"weight_steps": 0, "last_update": None})
            optimizer.load_state_dict(state)
            resumed = method.weight_steps
        mine = {id(p) for group in optimizer.optim.param_groups for p in group["params"]}
        found = {
            "same": same(expected, model),
            "updates": len(known.history),
            "told": (entry, resumed),
            "owned": sum(id(m.values) in mine for m in sparse_layers(model).values()),
        }
        queue.put((name, rank, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_zero_redundancy_optimizer_trains_as_its_plain_one():
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (3, free_port(), queue), nprocs=3)
    found = {}
    while not queue.empty():
        name, rank, what = queue.get()
        found.setdefault(name, {})[rank] = what
    for name, weight_steps in (("rigl", 6), ("set", 9)):
        ranks = found[name]
        assert all(one["same"] for one in ranks.values())
        assert all(one["updates"] >= 3 for one in ranks.values())
        assert 0 in {one["owned"] for one in ranks.values()}  # there are two layers, three ranks
        assert ranks[0]["told"] == (weight_steps, weight_steps)
