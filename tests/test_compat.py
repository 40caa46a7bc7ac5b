"""Names of other libraries: what they do here is what they do there."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import sparsekern as sk
from sparsekern.compat.masks import from_masked_, from_scipy, masks_of, sparsify_torchao_
from sparsekern.compat.rigl_torch import RigLScheduler, masks_of_rigl_torch
from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError

DELTA, T_END, ALPHA = 4, 16, 0.3


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5)
    ).double()


def batch(i):
    g = torch.Generator().manual_seed(i)
    return torch.randn(16, 10, generator=g).double(), torch.randint(0, 5, (16,), generator=g)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Reference:
    """What rigl-torch does with masks over dense weights, written anew from its description."""

    def __init__(self, weights, masks, optimizer):
        self.weights, self.masks, self.optimizer = weights, masks, optimizer
        self.calls = self.updates = 0

    def __call__(self):
        self.calls += 1
        if self.calls % DELTA or self.calls >= T_END:
            for w, mask in zip(self.weights, self.masks, strict=True):
                w.grad *= mask
            return True
        share = ALPHA / 2 * (1 + math.cos(self.calls * math.pi / T_END))
        with torch.no_grad():
            for w, mask in zip(self.weights, self.masks, strict=True):
                n = int(mask.sum())
                gone = int(n * share)
                score = torch.where(mask, w.abs(), -1.0).flatten()
                keep = torch.zeros(w.numel(), dtype=torch.bool)
                keep[score.topk(n - gone).indices] = True
                grow = torch.where(keep, -1.0, w.grad.abs().flatten())
                new = keep.clone()
                new[grow.topk(gone).indices] = True
                new = new.view_as(mask)
                w.mul_(new & mask)  # grown weights start at 0
                self.optimizer.state[w]["momentum_buffer"] *= new & mask
                mask.copy_(new)
        self.updates += 1
        return False


def train(model, optimizer, scheduler, steps):
    for i in steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        if scheduler():
            optimizer.step()


def as_reference(pruner, start):
    """The dense twin of a scheduled model, at its connections."""
    layers = sk.sparse_layers(pruner.model)
    weights = [start[int(name)].weight for name in layers]
    masks = [layer.mask().clone() for layer in layers.values()]
    with torch.no_grad():
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)
    return Reference(weights, masks, sgd(start))


def test_the_schedule_and_the_connections_are_those_of_rigl_torch():
    model = net()
    pruner = RigLScheduler(model, optimizer := sgd(model), 0.4, T_END, delta=DELTA, alpha=ALPHA)
    assert list(sk.sparse_layers(model)) == ["2", "4"]  # the first layer stays dense
    start = net()
    reference = as_reference(pruner, start)
    train(start, reference.optimizer, reference, range(20))
    train(model, optimizer, pruner, range(20))
    assert pruner.step == reference.calls == 20
    assert pruner.rigl_steps == reference.updates == 3
    layers = sk.sparse_layers(model).values()
    for layer, mask, w in zip(layers, reference.masks, reference.weights, strict=True):
        assert torch.equal(layer.mask(), mask)
        torch.testing.assert_close(layer.weight.to_dense(), w.detach(), rtol=1e-9, atol=1e-9)


def test_a_saved_scheduler_of_rigl_torch_goes_on():
    model = net()
    pruner = RigLScheduler(model, sgd(model), 0.4, T_END, delta=DELTA, alpha=ALPHA)
    start = net()
    reference = as_reference(pruner, start)
    train(start, reference.optimizer, reference, range(9))
    saved = {
        "hyperparams": {"delta_T": DELTA, "alpha": ALPHA, "T_end": T_END, "grad_accumulation_n": 1},
        "step": reference.calls,
        "rigl_steps": reference.updates,
        "backward_masks": [None, *(mask.clone() for mask in reference.masks)],
    }
    again = net()
    again.load_state_dict(start.state_dict())
    optimizer = sgd(again)
    optimizer.load_state_dict(reference.optimizer.state_dict())
    resumed = RigLScheduler(again, optimizer, state_dict=saved)
    assert (resumed.step, resumed.rigl_steps) == (9, 2)
    train(start, reference.optimizer, reference, range(9, 20))
    train(again, optimizer, resumed, range(9, 20))
    assert (resumed.step, resumed.rigl_steps) == (20, 3)
    for layer, mask in zip(sk.sparse_layers(again).values(), reference.masks, strict=True):
        assert torch.equal(layer.mask(), mask)


@pytest.mark.parametrize(("t_end", "delta"), [(12, 4), (13, 4), (16, 4), (1, 4), (100, 7), (99, 2)])
def test_updates_come_on_the_calls_of_rigl_torch(t_end, delta):
    model = net()
    pruner = RigLScheduler(model, optimizer := sgd(model), 0.4, t_end, delta=delta)
    calls = []
    for call in range(1, 110):
        optimizer.zero_grad()
        model(batch(0)[0]).square().sum().backward()
        if pruner():
            optimizer.step()
        else:
            calls.append(call)
    assert calls == [n for n in range(1, 110) if n % delta == 0 and n < t_end]


def test_options_of_rigl_torch():
    model = net()
    RigLScheduler(model, sgd(model), 0.4, 10, sparsity_distribution="erk", delta=4)
    assert len(sk.sparse_layers(model)) >= 2
    model = net()
    with pytest.raises(ConfigError, match="nothing|no layer"):
        RigLScheduler(model, sgd(model), 0.4, 10, ignore_linear_layers=True)
    static = RigLScheduler(model, sgd(model), 0.4, 10, static_topo=True)
    assert isinstance(static.method, sk.Static)
    for wrong in ({"dense_allocation": 0}, {"T_end": None}, {"delta": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RigLScheduler(model, sgd(model), **{"dense_allocation": 0.4, "T_end": 9} | wrong)
    with pytest.raises(ConfigError, match="one entry for each of 3"):
        masks_of_rigl_torch(net(), [None])
    with pytest.raises(ShapeError, match="'0' must have shape"):
        masks_of_rigl_torch(net(), [torch.ones(2, 2), None, None])


# ---- masks


def test_pruned_layers():
    model = net()
    prune.random_unstructured(model[2], "weight", 0.5)
    want = model[2].weight.detach().clone()
    assert list(masks_of(model)) == ["2.weight"]
    from_masked_(model)
    assert torch.equal(model[2].weight.to_dense(), want)


class FakeSparsity(nn.Module):
    """As torch.ao.pruning and sparsimony have it."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * x


def test_parametrized_layers_and_their_optimizer():
    model = net()
    mask = torch.rand(12, 12) < 0.4
    parametrize.register_parametrization(model[2], "weight", FakeSparsity(mask))
    twin, optimizer = net(), sgd(model)
    with torch.no_grad():
        twin[2].weight *= mask
    other = sgd(twin)
    for i in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(batch(i)[0]).square().mean().backward()
            if m is twin:
                m[2].weight.grad *= mask
            o.step()
    from_masked_(model, optimizer=optimizer)
    assert isinstance(model[2], sk.SparseLinear)
    for i in range(3, 6):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(batch(i)[0]).square().mean().backward()
            if m is twin:
                m[2].weight.grad *= mask
            o.step()
    torch.testing.assert_close(model[2].weight.to_dense(), twin[2].weight.detach())
    with pytest.raises(ConfigError, match="no mask"):
        from_masked_(net())


def test_torch_ao_pruning():
    pruning = pytest.importorskip("torch.ao.pruning")
    model = net().float()
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(4, 4))
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    want = model[2].weight.detach().clone()
    from_masked_(model, block=4)
    assert model[2].block == (4, 4)
    assert torch.equal(model[2].weight.to_dense(), want)


class Config:
    def __init__(self, blocksize):
        self.blocksize = blocksize


def test_torchao_configs():
    model = net().float()
    with torch.no_grad():
        model[2].weight[:4] = 0
    want = model[2].weight.detach().clone()
    sparsify_torchao_(model, Config(4), lambda module, name: name == "2")
    assert list(sk.sparse_layers(model)) == ["2"]
    assert model[2].topology.nnzb == 6
    assert torch.equal(model[2].weight.to_dense(), want)
    with pytest.raises(ConfigError, match="blocksize"):
        sparsify_torchao_(net(), object())


@pytest.mark.parametrize("block", [1, (2, 3)])
def test_matrices_of_scipy(block):
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(6, 9, 0.3, format="csr", rng=0)
    given = matrix if block == 1 else matrix.tobsr(block)
    topology, values = from_scipy(given)
    assert torch.equal(topology.unpack(values), torch.from_numpy(matrix.toarray()))
    with pytest.raises(DtypeError, match="CSR or BSR"):
        from_scipy(matrix.tocoo())


def test_masks_that_fit_no_blocks_leave_the_model_as_it_was():
    model = net()
    layer = model[2]
    prune.random_unstructured(layer, "weight", 0.5)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(TopologyError):
        from_masked_(model, block=4)
    assert prune.is_pruned(layer)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
