"""Optimizer state follows its weights, starts as the optimizer starts it, or is refused at once."""

import pytest
import torch
from torch import nn

from sparsekern import SET, RigL, SparseLinear, Topology, sparsify_
from sparsekern.carry.rewire import carried, rewired
from sparsekern.carry.transaction import commit
from sparsekern.errors import OptimizerError

OPTIMIZERS = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"initial_accumulator_value": 0.5},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9},
}
START = {("Adagrad", "sum"): 0.5, ("Rprop", "step_size"): 0.01}


def step(model, optimizer, seed):
    optimizer.zero_grad()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_block_keeps_its_state_and_new_ones_start(name, block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    sparsify_(model, 0.7, block=block, distribution="uniform")
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **OPTIMIZERS[name])
    method = SET(model, optimizer, t_end=100, update_freq=3, first_update=3, step_on_update=False)
    layer = model[0]
    for i in range(3):
        step(model, optimizer, i)
    old = layer.topology.positions().tolist()
    before = {key: entry.clone() for key, entry in optimizer.state[layer.values].items()}
    assert method.step()
    assert set(before) == set(optimizer.state[layer.values])
    for key, entry in optimizer.state[layer.values].items():
        if entry.dim() == 0:
            assert torch.equal(entry, before[key])
            continue
        for new, position in zip(entry, layer.topology.positions().tolist(), strict=True):
            kept = position in old
            start = torch.full_like(new, START.get((name, key), 0.0))
            assert torch.equal(new, before[key][old.index(position)] if kept else start)


class Packed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "__getitem__":
            raise NotImplementedError("no indexing")
        return super().__torch_function__(func, types, args, kwargs or {})


class Holding(torch.optim.SGD):
    def step(self, closure=None):  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = self.made(p)


class Packing(Holding):
    def made(self, p):
        return torch.zeros_like(p).as_subclass(Packed)


class Flat(Holding):
    def made(self, _):
        return torch.zeros(3)


@pytest.mark.parametrize("kind", [Packing, Flat])
def test_state_that_can_not_follow_is_refused_when_the_method_is_attached(kind):
    model = nn.Sequential(SparseLinear(32, 64, sparsity=0.8))
    with pytest.raises(OptimizerError, match="state 'm' of layer '0'"):
        RigL(model, kind(model.parameters(), lr=0.1), t_end=100)


@pytest.mark.parametrize("block", [1, 4])
def test_a_layer_gets_more_or_fewer_blocks_and_stays_in_its_optimizer(block):
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear(16, 24, sparsity=0.8, block=block))
    optimizer = torch.optim.Adam(model.parameters())
    RigL(model, optimizer, t_end=100, first_update=50)  # its hooks keep autograd's nodes alive
    layer, values = model[0], model[0].values
    for i, n in enumerate((12, 3, 0, 9)):
        step(model, optimizer, i)
        old = layer.topology.positions().tolist()
        before = [values.detach().clone(), optimizer.state[values]["exp_avg"].clone()]
        topology = Topology.random((24, 16), block, nnzb=n)
        new = topology.positions().tolist()
        source = [old.index(p) if p in old else -1 for p in new]
        source = torch.tensor(source, dtype=torch.int64)
        moving = carried("0", layer, [optimizer])
        commit(rewired(moving, moving.whole(), topology, source))
        assert layer.values is values
        assert layer.topology.positions().tolist() == new
        after = [values.detach(), optimizer.state[values]["exp_avg"]]
        for a, b in zip(before, after, strict=True):
            for row, at in zip(b, source.tolist(), strict=True):
                assert torch.equal(row, a[at] if at >= 0 else torch.zeros_like(row))
        step(model, optimizer, i)  # autograd and the optimizer go on
    optimizer.load_state_dict(optimizer.state_dict())
