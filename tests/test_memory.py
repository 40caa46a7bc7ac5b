"""Only active weights are held: bytes equal the formula, and nothing dense-sized is ever made."""

import pytest
import torch
from support import AllocationTracer
from torch import nn
from torch.nn import functional as F

from sparsekern import SET, RigL, SparseConv2d, SparseLinear, sparse_layers, sparsify_
from sparsekern.ops.grow import slab_block_rows
from sparsekern.topology import ARRAY_NAMES


def held_bytes(layer, optimizer):
    """Bytes of values, gradient, optimizer state and index arrays, read off the tensors."""
    state = [t for t in optimizer.state[layer.values].values() if t.numel() > 1]
    arrays = [getattr(layer, n) for n in ARRAY_NAMES]
    tensors = [layer.values, layer.values.grad, *state, *arrays]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("sizes", [(100, 60), (64, 64)])
@pytest.mark.parametrize("block", [1, 16, (8, 4)])
@pytest.mark.parametrize(("optimizer", "states"), [("SGD", 1), ("AdamW", 2)])
def test_bytes_of_a_layer_equal_the_formula(sizes, block, optimizer, states):
    layer = SparseLinear(*sizes, bias=False, sparsity=0.8, block=block)
    kwargs = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(layer.parameters(), lr=0.1, **kwargs)
    layer(torch.randn(3, sizes[0])).sum().backward()
    opt.step()
    topology = layer.topology
    bh, bw = layer.block
    block_rows, block_cols = -(-sizes[1] // bh), -(-sizes[0] // bw)
    numbers = topology.nnzb * bh * bw
    indices = 2 * block_rows + 1 + 2 * block_cols + 1 + 3 * topology.nnzb
    assert held_bytes(layer, opt) == 4 * (numbers * (2 + states) + indices)


@pytest.mark.parametrize(("groups", "block"), [(1, 1), (1, (8, 4)), (2, (4, 8)), (4, 1)])
def test_bytes_of_a_convolution_equal_the_formula(groups, block):
    layer = SparseConv2d(24, 40, 3, groups=groups, bias=False, sparsity=0.7, block=block)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 24, 5, 5)).sum().backward()
    optimizer.step()
    t, (bh, bw) = layer.topology, layer.block
    block_rows = groups * -(-40 // groups // bh)
    block_cols = 9 * -(-24 // groups // bw)
    indices = 2 * block_rows + 1 + 2 * groups * block_cols + 1 + 3 * t.nnzb
    assert held_bytes(layer, optimizer) == 4 * (t.nnzb * bh * bw * (2 + 2) + indices)


def test_a_training_step_of_a_sparse_network_makes_nothing_of_the_size_of_an_unfolded_image():
    """Convolutions as in a residual network, whose unfolded images are nine times the image."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    sparsify_(model, 0.8, block={"3": 16, "6": 16}, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(8, 3, 24, 24), torch.randint(0, 10, (8,))
    assert {layer.resolved_impl for layer in sparse_layers(model).values()} == {"cpu"}
    with AllocationTracer() as tracer:
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    activations = 8 * 16 * 24 * 24  # the largest image of the network
    unfolded = 9 * 8 * 16 * 12 * 12  # of the strided convolution, which is the smallest
    assert tracer.largest <= activations * 26 * 26 // (24 * 24) < unfolded, tracer.at


@pytest.mark.slow
@pytest.mark.parametrize(("method", "block"), [(RigL, 1), (RigL, 16), (SET, 1)])
def test_a_thousand_steps_hold_nothing_dense_but_one_slab(block, method):
    """No tensor as large as the smallest dense weight; on armed steps, at most one slab."""
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    sparsify_(model, 0.95, block=block, distribution="uniform")
    head = nn.Linear(128, 10)
    everything = nn.Sequential(model, head)
    optimizer = torch.optim.AdamW(everything.parameters(), lr=1e-3, foreach=False)
    rigl = method(everything, optimizer, t_end=1000, update_freq=100)
    x, target = torch.randn(16, 256), torch.randint(0, 10, (16,))
    smallest = min(layer.weight.shape.numel() for layer in sparse_layers(model).values())
    slabs = [
        slab_block_rows(layer.topology) * layer.block[0] * layer.matrix_shape[1]
        for layer in sparse_layers(model).values()
    ]
    worst = {True: 0, False: 0}
    for _ in range(1000):
        armed = rigl.due
        with AllocationTracer() as tracer:
            optimizer.zero_grad()
            F.cross_entropy(everything(x), target).backward()
            optimizer.step()
        worst[armed] = max(worst[armed], tracer.largest)
    assert len(rigl.history) == 10
    assert worst[False] < smallest
    assert max(slabs) < smallest
    assert worst[True] <= max(*slabs, worst[False])


def test_a_wide_layer_trains_and_updates_in_memory_of_its_active_weights():
    """The small cousin of benchmarks/scale.py: 8,192 x 8,192 at 1 % density."""
    with AllocationTracer() as tracer:
        layer = SparseLinear(8192, 8192, sparsity=0.99)
        model = nn.Sequential(layer)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        rigl = RigL(model, optimizer, t_end=10, update_freq=1)
        x = torch.randn(4, 8192)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert len(rigl.history) == 1
    assert rigl.weight_steps == 1
    slab = slab_block_rows(layer.topology) * 8192
    # sampling and sorting take a few times the active weights
    assert tracer.largest <= max(slab, 4 * layer.nnz)
    assert tracer.largest < 8192 * 8192 / 8
