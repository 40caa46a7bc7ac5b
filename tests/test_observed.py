"""What growth sees is the gradient that the values accumulate, whatever the loop does."""

import copy
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekern as sk
from sparsekern.errors import TrainingLoopError, UnavailableError
from sparsekern.topology.select import top_k_mask

FAMILIES = {
    "linear": (lambda: nn.Linear(12, 16), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (3, 8, 7)),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1, stride=2), (2, 8, 6, 5)),
    "gru": (lambda: nn.GRU(8, 8), (4, 3, 8)),
    "lstm": (lambda: nn.LSTM(8, 8, 2), (4, 3, 8)),
    "gru cell": (lambda: nn.GRUCell(8, 8), (5, 8)),
    "lstm cell": (lambda: nn.LSTMCell(8, 8), (5, 8)),
}
PRODUCTS = ("linear", "conv1d", "conv2d")


class Net(nn.Module):
    def __init__(self, family):
        super().__init__()
        torch.manual_seed(0)
        make, self.shape = FAMILIES[family]
        self.first = make()
        self.last = nn.Linear(self.run(torch.zeros(self.shape)).shape[-1], 3)

    def run(self, x):
        y = self.first(x)
        return (y if isinstance(y, torch.Tensor) else y[0]).flatten(1)

    def forward(self, x):
        return self.last(self.run(x).tanh())


def pair(family="linear", block=1, **kwargs):
    """A sparse net in float64 under RigL, and its dense twin."""
    model = sk.sparsify_(
        Net(family).double(), block=block, distribution={"*": 0.6}, exclude=("last",)
    )
    dense = sk.densify_(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return (
        model,
        dense,
        optimizer,
        sk.RigL(model, optimizer, t_end=100, drop_fraction=0.5, **kwargs),
    )


def data(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.shape, generator=generator, dtype=torch.float64)


def loss_of(f, x):
    return f(x).square().mean()


def dense_gradient(dense, name):
    module, _, matrix = name.partition(".")
    own = dense.get_submodule(module)
    return getattr(own, f"weight_{matrix}" if matrix else "weight").grad


def expected(method, dense, norm="l1"):
    """The topologies that the dense twin's gradients ask for, by layer."""
    found = {}
    for name, layer in method.layers.items():
        matrix = torch.zeros(layer.matrix_shape, dtype=torch.float64)
        gradient = dense_gradient(dense, name)
        index = torch.arange(matrix.numel()).view_as(matrix)
        matrix.view(-1)[layer.as_weight(index).flatten()] = gradient.flatten()
        everywhere = sk.Topology.from_mask(torch.ones_like(matrix), layer.block)
        scores = sk.ops.block_norm(everywhere.pack(matrix), norm)
        keep = method.survivors(name, layer, method.drop_fraction_now)
        old = layer.topology.positions()
        scores[old[keep]] = -1.0
        grown = top_k_mask(scores, int((~keep).sum()))
        grown[old[keep]] = True
        found[name] = grown.nonzero()[:, 0].tolist()
    return found


def check(dense, optimizer, method, norm="l1"):
    """The coming step grows what the dense twin's gradient says."""
    method.drop_fraction_now = method.schedule.fraction(method.weight_steps)
    want = expected(method, dense, norm)
    before = {n: m.topology.positions().tolist() for n, m in method.layers.items()}
    optimizer.step()
    assert len(method.history) == 1
    got = {n: m.topology.positions().tolist() for n, m in method.layers.items()}
    assert got == want
    assert got != before


def penalty(f, x):
    x = x.clone().requires_grad_()
    y = f(x).square().mean()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    g = g.flatten(1)
    return y + 3 * (g.norm(2, 1) - 1).square().mean()


def only_penalty(f, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(2, 1) - 1).square().mean()


def saliency(f, x):
    probe = x.clone().requires_grad_()
    torch.autograd.grad(f(probe).square().sum(), probe)
    torch.autograd.grad(f(probe).square().sum(), list(f.parameters()))
    f(probe).square().sum().backward(inputs=[probe])
    return loss_of(f, x)


def of_third_order(f, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return h.square().sum()


def values_penalty(f, x):
    """Differentiates the weights' own gradient again, as learning to learn does."""
    weight = getattr(f.first, "values", None)
    if weight is None:
        weight = f.first.weight
    (g,) = torch.autograd.grad(f(x).square().sum(), f.first.bias, create_graph=True)
    return g.square().sum() + 0 * weight.sum()


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_step(family, block, norm):
    model, dense, optimizer, method = pair(family, block, norm=norm)
    for f in (model, dense):
        loss_of(f, data(model)).backward()
    check(dense, optimizer, method, norm)


@pytest.mark.parametrize("loss", [penalty, only_penalty, of_third_order, values_penalty])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", PRODUCTS)
def test_a_gradient_penalty(family, block, loss):
    model, dense, optimizer, method = pair(family, block)
    for f in (model, dense):
        loss(f, data(model)).backward()
    check(dense, optimizer, method)


def test_a_gradient_penalty_through_a_recurrent_layer_is_refused():
    model, *_ = pair("gru")
    with pytest.raises(UnavailableError, match="differentiated once"):
        penalty(model, data(model)).backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_that_are_not_accumulated_do_not_count(family):
    model, dense, optimizer, method = pair(family)
    for f in (model, dense):
        saliency(f, data(model)).backward()
    check(dense, optimizer, method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to_none", [True, False])
def test_the_second_pass_of_sam_counts(family, to_none):
    model, dense, optimizer, method = pair(family)
    for f in (model, dense):
        loss_of(f, data(model, 1)).backward()
        f.zero_grad(set_to_none=to_none)
        loss_of(f, data(model)).backward()
    check(dense, optimizer, method)


def reentrant(f):
    return lambda x: checkpoint(f, x.clone().requires_grad_(), use_reentrant=True)


def other(f):
    return lambda x: checkpoint(f, x, use_reentrant=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", [lambda f: f, reentrant, other], ids=["plain", "reentrant", "not"])
@pytest.mark.parametrize("passes", [1, 2])
def test_skipped_batches_leave_nothing(family, wrap, passes):
    model, dense, optimizer, method = pair(family, grad_accumulation=passes)
    run = wrap(model)
    for seed in range(3):
        model.zero_grad()
        for _ in range(passes):
            loss_of(run, data(model, seed)).backward()
    model.zero_grad()
    for seed in range(passes):
        loss_of(run, data(model, seed + 7)).backward()
        loss_of(dense, data(model, seed + 7)).backward()
    held = [len(o._pairs) for o in method.growth.observers.values()]
    assert held == [0] * len(held)
    check(dense, optimizer, method)


def test_a_layer_in_several_checkpointed_parts_is_seen_whole_from_the_next_batch_on():
    torch.manual_seed(0)
    layer = sk.SparseLinear(6, 6, sparsity=0.5, dtype=torch.float64)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = sk.RigL(model, optimizer, t_end=10)
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        inner = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True).tanh()
        checkpoint(layer, inner, use_reentrant=True).square().sum().backward()
        before = len(method.history)
        dense = nn.Sequential(layer.to_dense())
        dense(dense(x).tanh()).square().sum().backward()
        method.drop_fraction_now = 0.3
        want = {"0": dense[0].weight.grad}
        keep = method.survivors("0", layer, 0.3)
        old = layer.topology.positions()
        optimizer.step()
    assert (before, len(method.history)) == (0, 1)
    scores = want["0"].abs().flatten()
    scores[old[keep]] = torch.inf
    assert set(scores.topk(len(old)).indices.tolist()) == set(layer.topology.positions().tolist())


def test_micro_batches_may_fill_one_tensor_again():
    model, dense, optimizer, method = pair(grad_accumulation=3)
    buffer = data(model)
    for seed in range(3):
        buffer.copy_(data(model, seed))
        loss_of(model, buffer).backward()
        loss_of(dense, data(model, seed)).backward()
    check(dense, optimizer, method)


def test_a_gradient_that_was_not_seen_whole_postpones(caplog):
    model, _, optimizer, method = pair()
    method.detach()
    loss_of(model, data(model)).backward()
    method = sk.RigL(model, optimizer, t_end=10)
    loss_of(model, data(model, 1)).backward()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        optimizer.step()
    assert "not observed" in caplog.text
    assert not method.history
    optimizer.zero_grad()
    loss_of(model, data(model, 1)).backward()
    optimizer.step()
    assert len(method.history) == 1


def test_too_few_passes_are_told_once(caplog):
    model, dense, optimizer, method = pair(grad_accumulation=4)
    for f in (model, dense):
        for seed in range(2):
            loss_of(f, data(model, seed)).backward()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        check(dense, optimizer, method)
    assert caplog.text.count("the gradient of 2 backward passes; expected 4") == 1


class Experts(nn.Module):
    """Two experts, and one that nobody asks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, used):
        for i in used:
            x = self.parts[i](x).tanh()
        return x


@pytest.mark.parametrize("to_none", [True, False])
def test_a_layer_that_is_never_used_is_left_out(to_none, caplog):
    model = sk.sparsify_(Experts(), 0.6, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.RigL(model, optimizer, t_end=100, update_freq=1, grad_accumulation=2)
    unused = model.parts[2].topology.positions().tolist()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        for _ in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            for used in ((0, 1), (0,)):  # the second sees fewer passes
                model(torch.randn(5, 12), used).square().sum().backward()
            optimizer.step()
    assert not caplog.text
    assert [sorted(r.layers) for r in method.history] == [["parts.0", "parts.1"]] * 2
    assert model.parts[2].topology.positions().tolist() == unused
    assert not any(m._capture_key for m in method.layers.values()) or method.due


def test_nothing_outlives_its_use():
    model, _, optimizer, method = pair(grad_accumulation=2)
    refs = []
    observer = method.growth.observers["first"]
    receive = observer.receive

    def spy(dy, x):
        receive(dy, x)
        refs.extend(
            weakref.ref(t) for p in observer._running.values() for q in p.pairs for t in q[:2]
        )

    observer.receive = spy
    for run in (lambda: loss_of(model, data(model)).backward(), optimizer.zero_grad):
        run()
    loss_of(model, data(model, 1))  # a forward pass of the next batch
    assert refs
    assert all(ref() is None for ref in refs)
    for seed in range(2):
        loss_of(model, data(model, seed)).backward()
    assert all(ref() is None for ref in refs)
    optimizer.step()
    assert len(method.history) == 1
    refs.clear()
    optimizer.zero_grad()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, _g):
            raise ValueError("no")

    method.growth.watch({"first": 3})
    x = Fails.apply(data(model).requires_grad_())
    held = nn.Parameter(model.first.values.detach().clone())
    with pytest.raises(ValueError, match="no"):
        (loss_of(model, x) + 0 * held.sum()).backward()
    method.detach()
    assert all(ref() is None for ref in refs)


def test_a_compiled_model_streams_each_layer_at_its_turn():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    sk.sparsify_(model, 0.5, distribution="uniform")
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    methods = [sk.RigL(m, o, t_end=9) for m, o in zip((model, plain), optimizers, strict=True)]
    held = []
    for observer in methods[0].growth.observers.values():
        stream = observer._stream

        def spy(pairs, reduce, stream=stream):
            others = methods[0].growth.observers.values()
            held.append(sum(len(p.pairs) for o in others for p in o._running.values()))
            return stream(pairs, reduce)

        observer._stream = spy
    x = torch.randn(4, 8)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert held == [1, 1, 1]
    plain(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [m.topology for m in methods[0].layers.values()] == [
        m.topology for m in methods[1].layers.values()
    ]


def test_too_many_passes_are_an_error():
    model, _, optimizer, _ = pair("gru")
    for seed in range(2):
        loss_of(model, data(model, seed)).backward()
    with pytest.raises(TrainingLoopError, match="saw 2 backward passes.*expected 1"):
        optimizer.step()


@pytest.mark.parametrize("family", PRODUCTS)
@pytest.mark.parametrize("block", [1, 4])
def test_a_pair_of_no_tokens_has_a_gradient_of_zeros(family, block):
    layer = pair(family, block)[0].first
    scores = layer.grow_scores(*([t] for t in layer.no_pair()), 3, "l1", lambda slab: None)
    assert not scores.active.any()
    assert not scores.scores.any()
    assert scores.positions.numel() == 3
