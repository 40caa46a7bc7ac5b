"""FSDP2: layers cut by block over 1, 2 and 4 processes train as one process does.

By default some of the cases, on two processes; SPARSEKERN_RANKS=all runs them all.
"""

import os

import pytest
import torch
import torch.distributed as dist
from loops import METHODS, layers
from processes import DiedError, FailedError, failure, ranks
from support import UNIT_ROUNDOFF
from torch import nn
from torch.nn import functional as F

from sparsekern import sparse_layers, sparsify_

STEPS = 9
# sums over 16 samples and their micro-batches, in another order, at each step
BOUND = 16 * STEPS * 64 * UNIT_ROUNDOFF[torch.float64]
ALL = os.environ.get("SPARSEKERN_RANKS") == "all"
WORLDS = (1, 2, 4) if ALL else (2,)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def adagrad(model):  # its state starts at another number than 0
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Case:
    """A model, how it is cut, and a loop."""

    def __init__(self, family="linear", method="rigl", block=1, **more):
        self.family, self.method, self.block = family, method, block
        self.optimizer = more.pop("optimizer", adamw)
        self.sparsity, self.impl = more.pop("sparsity", 0.6), more.pop("impl", None)
        self.parts, self.sync = more.pop("parts", 1), more.pop("sync", True)
        self.nested, self.reshard = more.pop("nested", True), more.pop("reshard", True)
        self.clip, self.hybrid = more.pop("clip", None), more.pop("hybrid", False)
        self.options = more

    def model(self):
        torch.manual_seed(0)
        model = layers(self.family).double()
        return sparsify_(
            model, self.sparsity, block=self.block, impl=self.impl, distribution="uniform"
        )

    def cut(self, model):
        from torch.distributed.fsdp import fully_shard

        mesh = hybrid_mesh() if self.hybrid else None
        wholes = [m for m in model.children() if any(True for _ in m.parameters())]
        for child in wholes if self.nested else ():
            fully_shard(child, mesh=mesh, reshard_after_forward=self.reshard)
        return fully_shard(model, mesh=mesh, reshard_after_forward=self.reshard)

    def train(self, model, rank=0, world=1):
        optimizer = self.optimizer(model)
        method = METHODS[self.method](
            model,
            optimizer,
            t_end=100,
            update_freq=2,
            grad_accumulation=self.parts,
            **self.options,
        )
        for i in range(STEPS):
            optimizer.zero_grad()
            for part in range(self.parts):
                self.backward(model, i, part, rank, world)
            if self.clip:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
        return result(model, optimizer, method)

    def backward(self, model, i, part, rank, world):
        if not self.sync and world > 1:
            model.set_requires_gradient_sync(part == self.parts - 1)
        x, target = (t.chunk(self.parts)[part].chunk(world)[rank] for t in batch(i))
        (F.cross_entropy(model(x), target) / self.parts).backward()


def hybrid_mesh():
    """HSDP: half of the ranks hold copies of what the others hold."""
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    copies = 2 if world > 1 else 1
    names = ("copies", "parts")
    return init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=names)


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 12, generator=g).double(), torch.randint(0, 8, (16,), generator=g)


def result(model, optimizer, method):
    found = sparse_layers(model)
    state = [optimizer.state[p] for p in model.parameters()]
    tensors = [t for entry in state for t in entry.values() if t.dim()]
    return {
        "digests": [layer.topology.digest() for layer in found.values()],
        "weights": [layer.dense_weight() for layer in found.values()],
        "state": [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors],
        "history": method.history,
    }


CASES = {
    "rigl": Case(),
    "set": Case(method="set"),
    "static": Case(method="static"),
    "blocks": Case(block=4),
    "blocks set drawn": Case(method="set", block=4, grow_init="init"),
    "fewer blocks than ranks": Case(block=8, sparsity=0.5),
    "conv2d": Case("conv2d"),
    "conv1d": Case("conv1d", method="set", optimizer=momentum),
    "gru": Case("gru"),
    "masked": Case(impl="masked"),
    "root alone": Case(nested=False),
    "kept after forward": Case(reshard=False),
    "adagrad": Case(optimizer=adagrad, method="set"),
    "clipped": Case(optimizer=momentum, clip=0.1),
    "micro-batches": Case(parts=2),
    "micro-batches, one reduction": Case(parts=2, sync=False),
    "weight step first": Case(step_on_update=True),
    "hybrid": Case(hybrid=True, block=4),
    "hybrid set": Case(hybrid=True, method="set", parts=2, sync=False),
}
USUAL = (
    "rigl",
    "blocks set drawn",
    "fewer blocks than ranks",
    "gru",
    "micro-batches, one reduction",
    "hybrid",
)
if not ALL:
    CASES = {name: CASES[name] for name in USUAL}


def worker(rank, world):
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = case.train(case.cut(case.model()), rank, world)
        except Exception as error:
            found[name] = failure(error)
    return found


@pytest.fixture(scope="module")
def trained():
    """All cases on each number of processes, by rank."""
    return {world: ranks(worker, world) for world in WORLDS}


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_sharded_layers_train_as_one_process_does(trained, name, world):
    expected = CASES[name].train(CASES[name].model())
    assert len(expected["history"]) >= 3 or CASES[name].method == "static"
    for rank in range(world):
        found = trained[world][rank]
        assert not isinstance(found, DiedError | FailedError), found
        found = found[name]
        assert not isinstance(found, FailedError), found
        assert found["digests"] == expected["digests"]
        assert found["history"] == expected["history"]
        for key in ("weights", "state"):
            for one, right in zip(found[key], expected[key], strict=True):
                torch.testing.assert_close(one, right, rtol=BOUND, atol=BOUND)
