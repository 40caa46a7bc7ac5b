"""SRigL: a constant fan-in, and neurons that are left out and come back."""

import math

import pytest
import torch
from loops import adam, layers, loss, net, same, sgd, train
from torch import nn

from sparsekern import SparseLinear, SRigL, sparse_layers, sparsify_
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn import SparseConv1d, SparseConv2d
from sparsekern.ops import grow_scores
from sparsekern.topology import Topology
from sparsekern.topology.blocks import tiles_of
from sparsekern.topology.select import RowsTopK, StreamedTopK, best_of_rows

FAMILIES = ["linear", "conv1d", "conv2d", "gru"]


def largest(items, scores, k):
    """The k items of largest score, ties to the first."""
    return sorted(items, key=lambda at: (-scores[at], at))[: max(k, 0)]


def expected(mask, weights, gradient, dropped, gamma):
    """An update by the paper, neuron by neuron; arguments are (block rows, block columns)."""
    rows, cols = mask.shape
    every = [(r, c) for r in range(rows) for c in range(cols)]
    active = [at for at in every if mask[at]]
    n = len(active)
    salient = {*largest(active, weights, n - dropped), *largest(every, gradient, dropped)}
    counts = [sum(at[0] == r for at in salient) for r in range(rows)]
    threshold = max(1, math.floor(gamma * n / rows)) if gamma else 0
    now = len({r for r, _ in active})
    least = math.ceil(n / min(cols, 2 * math.ceil(n / now)))
    living = [r for r in range(rows) if counts[r] >= threshold]
    if len(living) < least:
        living = largest(range(rows), counts, least)
    quota = {r: n // len(living) for r in living}
    for r in largest(sorted(living), counts, n % len(living)):
        quota[r] += 1
    stay = largest([at for at in active if at[0] in quota], weights, n - dropped)
    new = set()
    for r, many in quota.items():
        kept = largest([at for at in stay if at[0] == r], weights, many)
        free = [(r, c) for c in range(cols) if (r, c) not in kept]
        new |= {*kept, *largest(free, gradient, many - len(kept))}
    assert len(new) == n
    return new


def blocks_of(layer, matrix):
    """Norm of each block of a matrix of the weight's: (block rows, block columns)."""
    return tiles_of(matrix, layer.topology.grid).abs().sum((1, 3))


def active_blocks(layer):
    cols = layer.topology.block_cols
    return {(p // cols, p % cols) for p in layer.topology.positions().tolist()}


def dense_gradient(model, layer, i):
    """By a weight of zeros that is added to a layer's output."""
    extra = nn.Parameter(torch.zeros(layer.weight_shape))
    if isinstance(layer, SparseConv1d | SparseConv2d):
        dense = layer.to_dense()
        dense.bias, dense.weight = None, extra
        hook = layer.register_forward_hook(lambda _m, x, y: y + dense(x[0]))
    else:
        hook = layer.register_forward_hook(lambda _m, x, y: y + nn.functional.linear(x[0], extra))
    gradient = torch.autograd.grad(loss(model, i), extra)[0]
    hook.remove()
    return layer.as_matrix(gradient) if hasattr(layer, "as_matrix") else gradient


@pytest.mark.parametrize("block", [1, (4, 2)])
@pytest.mark.parametrize("family", ["linear", "conv1d", "conv2d"])
def test_an_update_is_that_of_a_loop_over_neurons(family, block):
    model = net(family, block)
    optimizer = sgd(model)
    method = SRigL(model, optimizer, t_end=20, update_freq=1, gamma_sal=0.7, decay="constant")
    for i in range(6):
        due, wanted = method.due, {}
        optimizer.zero_grad()
        for name, layer in method.layers.items():
            gradient = blocks_of(layer, dense_gradient(model, layer, i))
            mask = torch.zeros(gradient.shape, dtype=torch.bool)
            mask[tuple(zip(*active_blocks(layer), strict=True))] = True
            weights = blocks_of(layer, layer.topology.unpack(layer.active_values()))
            dropped = int(0.3 * len(active_blocks(layer)))
            wanted[name] = expected(mask, weights, gradient, dropped, 0.7)
        before = {n: m.nnz for n, m in method.layers.items()}
        loss(model, i).backward()
        optimizer.step()
        for name, layer in method.layers.items():
            assert layer.topology.nnzb == len(wanted[name])
            assert before[name] == layer.nnz or layer.topology.grid.ragged
            if due:
                assert active_blocks(layer) == wanted[name]
    assert len(method.history) == 3


def fan_in(layer):
    return layer.topology.crow.diff()


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fan_in_is_constant_from_the_start_and_nothing_is_lost(family, block):
    if block == 4 and family != "linear":
        block = (4, 2)
    model = net(family, block)
    before = {n: m.topology.nnzb for n, m in sparse_layers(model).items()}
    values = {n: m.dense_weight() for n, m in sparse_layers(model).items()}
    optimizer = adam(model)
    method = SRigL(model, optimizer, t_end=100, update_freq=2)
    for name, layer in method.layers.items():
        kept = layer.dense_weight() == values[name]
        assert bool((kept & layer.mask()).any())
        assert bool((layer.active_values() != 0).any(2).any(1).all())

    def check(_):
        for name, layer in method.layers.items():
            live = fan_in(layer)[fan_in(layer) > 0]
            assert int(live.max()) - int(live.min()) <= 1
            assert layer.topology.nnzb == before[name]

    check(0)
    train(model, [optimizer], range(8), check)
    assert len(method.history) == 3


def test_a_start_of_constant_fan_in_stays_as_it_is():
    layer = SparseLinear(8, 4, topology=Topology.from_positions(torch.arange(0, 32, 2), (4, 8)))
    digest, values = layer.topology.digest(), layer.values.detach().clone()
    SRigL(nn.Sequential(layer), sgd(nn.Sequential(layer)), t_end=10)
    assert layer.topology.digest() == digest
    assert torch.equal(layer.values, values)


def outputs(*active):
    """A layer of 4 outputs and 8 inputs, with these connections of each."""
    mask = torch.zeros(4, 8)
    for row, columns in enumerate(active):
        mask[row, list(columns)] = 1
    return SparseLinear.from_dense(nn.Linear(8, 4, bias=False), mask=mask)


def one_update(layer, gradient, **kwargs):
    model = nn.Sequential(layer)
    optimizer = sgd(model)
    SRigL(model, optimizer, t_end=10, drop_fraction=0.5, **kwargs)
    (model(torch.eye(8)) * gradient.t()).sum().backward()
    optimizer.step()
    return fan_in(layer).tolist()


@pytest.mark.parametrize(
    ("kwargs", "found"),
    [({}, [3, 0, 3, 2]), ({"gamma_sal": 0}, [2] * 4), ({"no_ablation": ("0",)}, [2] * 4)],
)
def test_a_neuron_without_salient_weights_is_left_out_and_its_share_given_away(kwargs, found):
    layer = outputs((0, 1), (2, 3), (4, 5), (6, 7))
    layer.set_active_values(torch.tensor([9.0, 9, 1, 1, 8, 8, 0.5, 2]).view(-1, 1, 1))
    gradient = torch.zeros(4, 8)
    gradient[2, :3] = torch.tensor([5.0, 6, 7])
    gradient[3, 0] = 8.0
    gradient[0, 2:4] = torch.tensor([1.0, 2])
    gradient[1, 0] = 0.5
    # salient: 9 9 8 8 stay; 8, 7, 6, 5 grow: 2 of row 0, none of row 1, 5 of row 2, 1 of row 3
    # 8 weights for three rows: one more for rows 2 and 0
    assert one_update(layer, gradient, **kwargs) == found
    if not kwargs:
        # ties of gradients go to the lowest position: 25
        assert layer.topology.positions().tolist() == [0, 1, 3, 18, 20, 21, 24, 25]


def test_a_neuron_that_was_left_out_comes_back_with_a_large_gradient():
    layer = outputs((0, 1), (), (4, 5), (6, 7))
    layer.set_active_values(torch.tensor([9.0, 9, 8, 8, 3, 2]).view(-1, 1, 1))
    gradient = torch.zeros(4, 8)
    gradient[1, :4] = torch.tensor([5.0, 6, 7, 8])
    # what stays: 9 9 8; what grows: 8 7 6, all of row 1; row 3 has nothing
    assert one_update(layer, gradient, gamma_sal=1.0) == [2, 2, 2, 0]
    assert layer.topology.positions().tolist() == [0, 1, 10, 11, 16, 20]


def test_bad_arguments():
    model = net()
    optimizer = sgd(model)
    for error, kwargs in (
        (DtypeError, {"gamma_sal": "a"}),
        (ConfigError, {"gamma_sal": 1.5}),
        (ConfigError, {"no_ablation": ("nothing",)}),
        (ConfigError, {"norm": "l7"}),
    ):
        with pytest.raises(error):
            SRigL(model, optimizer, t_end=10, **kwargs)
    SRigL(model, optimizer, t_end=10)


def test_a_resume_levels_nothing_and_ends_with_the_same_bits():
    def made():
        model = net()
        optimizer = adam(model)
        return model, optimizer, SRigL(model, optimizer, t_end=100, update_freq=2)

    straight, first = made(), made()
    train(straight[0], [straight[1]], range(9))
    train(first[0], [first[1]], range(5))
    model = sparsify_(layers("linear"), 0.6)
    optimizer = adam(model)
    optimizer.load_state_dict(first[1].state_dict())
    before = [layer.topology.digest() for layer in sparse_layers(model).values()]
    method = SRigL(model, optimizer, t_end=100, update_freq=2)
    assert [layer.topology.digest() for layer in sparse_layers(model).values()] == before
    model.load_state_dict(first[0].state_dict())
    train(model, [optimizer], range(5, 9))
    assert same(model, straight[0])
    assert method.history == straight[2].history


# ---- what it is made of


@pytest.mark.parametrize("each", [1, 3, 20])
@pytest.mark.parametrize("step", [1, 2, 6])
def test_the_best_of_each_row_and_of_all(each, step):
    g = torch.Generator().manual_seed(each)
    scores = torch.randint(0, 4, (6, 10), generator=g).float()
    scores[2] = -torch.inf
    top = RowsTopK(StreamedTopK(7, scores), each, 10)
    for row in range(0, 6, step):
        top.push(scores[row : row + step].clone().flatten(), row * 10)
    positions, found = top.result()
    every = [at for at in range(60) if scores.flatten()[at] > -torch.inf]
    flat = scores.flatten().tolist()
    wanted = set(largest(every, flat, 7))
    for row in range(6):
        wanted |= set(largest([at for at in every if at // 10 == row], flat, each))
    assert positions.tolist() == sorted(wanted)
    assert torch.equal(found, scores.flatten()[positions])


def test_the_first_of_equal_scores_in_each_row():
    rows = torch.tensor([0, 0, 0, 2, 2])
    scores = torch.tensor([1.0, 1, 1, 0, 5])
    marked = best_of_rows(rows, scores, torch.tensor([2, 4, 1]))
    assert marked.tolist() == [True, True, False, False, True]


def test_scores_of_each_row_are_summed_over_micro_batches():
    topology = Topology.random((8, 12), sparsity=0.7, generator=torch.Generator().manual_seed(0))
    dy, x = torch.randn(6, 8), torch.randn(6, 12)
    found = grow_scores([dy[:3], dy[3:]], [x[:3], x[3:]], topology, 2, each_row=2)
    scores = (dy.t() @ x).abs()
    scores.view(-1)[topology.positions()] = -1
    assert {p // 12 for p in found.positions.tolist()} == set(range(8))
    for row in range(8):
        best = scores[row].topk(2).indices + 12 * row
        assert set(best.tolist()) <= set(found.positions.tolist())
