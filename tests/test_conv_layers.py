"""`SparseConv2d` and `SparseConv1d` as drop-ins for torch's, on every implementation."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from support import UNIT_ROUNDOFF, integer_values, integers
from torch import nn
from torch.nn import functional as F

from sparsekern import RigL, SparseConv1d, SparseConv2d, Topology, sparse_layers, sparsify_
from sparsekern.errors import ConfigError, DtypeError, ShapeError, SparseKernError, TopologyError
from sparsekern.nn.init import bounds, fan_in
from sparsekern.topology import DERIVED_NAMES

IMPLS = ("cpu", "triton", "dense", "masked")
BLOCKS = {"cpu": 4, "triton": 16, "dense": 4, "masked": 4}

ARGUMENTS = {
    "plain": {"kernel_size": 3},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "strided": {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0), "bias": False},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "pointwise": {"kernel_size": 1},
    "pointwise, strided": {"kernel_size": 1, "stride": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


def layer_of(impl, arguments, channels=(32, 48), dtype=torch.float32):
    """A layer with small integers in it."""
    layer = SparseConv2d(
        *channels, **arguments, sparsity=0.6, block=BLOCKS[impl], impl=impl, dtype=dtype
    )
    layer.set_active_values(integer_values(layer.topology, dtype))
    if layer.bias is not None:
        layer.bias.data.copy_(integers(channels[1]))
    return layer


def dense_run(dense, x, dy):
    with warnings.catch_warnings():
        # torch copies the image for even kernels, and says so
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        y = dense(x)
    return y, torch.autograd.grad(y, [x, *dense.parameters()], dy)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_output_and_gradients_equal_the_dense_layer(impl, name):
    layer = layer_of(impl, ARGUMENTS[name])
    dense = layer.to_dense()
    assert isinstance(dense, nn.Conv2d)
    for size in ((2, 32, 9, 7), (32, 6, 8), (0, 32, 9, 7)):
        x = integers(*size).requires_grad_()
        y = layer(x)
        dy = integers(*y.shape)
        wanted, (dx, dw, *db) = dense_run(dense, x, dy)
        assert torch.equal(y, wanted)
        assert y.is_contiguous() == wanted.is_contiguous()
        parameters = [layer.values] + ([layer.bias] if layer.bias is not None else [])
        got_dx, got_dw, *got_db = torch.autograd.grad(y, [x, *parameters], dy)
        assert torch.equal(got_dx, dx)
        matrix = dw.permute(0, 2, 3, 1).reshape(layer.matrix_shape)
        assert torch.equal(layer.pack(got_dw), layer.topology.pack(matrix))
        assert all(torch.equal(a, b) for a, b in zip(got_db, db, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_channels_last_images_come_back_channels_last(impl):
    layer = layer_of(impl, {"kernel_size": 3, "padding": 1})
    x = integers(2, 32, 8, 7).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x.contiguous()))


@pytest.mark.parametrize("impl", ["cpu", "dense", "masked"])
@pytest.mark.parametrize(
    "arguments", [{"stride": 2, "padding": 1}, {"padding": "same", "groups": 2}]
)
def test_one_dimension(impl, arguments):
    layer = SparseConv1d(8, 12, 3, **arguments, sparsity=0.5, block=2, impl=impl)
    layer.set_active_values(integer_values(layer.topology))
    layer.bias.data.copy_(integers(12))
    dense = layer.to_dense()
    assert isinstance(dense, nn.Conv1d)
    assert layer.weight.shape == dense.weight.shape
    for size in ((2, 8, 11), (8, 5), (0, 8, 5)):
        x = integers(*size)
        assert torch.equal(layer(x), dense(x))
    again = SparseConv1d.from_dense(dense, block=2)
    assert torch.equal(again.dense_weight(), dense.weight)


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half(impl, dtype):
    layer = layer_of(impl, {"kernel_size": 3})
    x = integers(2, 32, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x).to(dtype))
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_facts_answer_for_the_dense_weight():
    layer = layer_of("cpu", {"kernel_size": (3, 2), "groups": 2, "padding": 1})
    dense = layer.to_dense()
    assert layer.weight.shape == dense.weight.shape == (48, 16, 3, 2)
    assert torch.equal(layer.weight.to_dense(), dense.weight)
    assert layer.nnz == int(layer.mask().sum())
    assert layer.density == layer.nnz / dense.weight.numel()
    assert repr(layer).startswith(
        "SparseConv2d(32, 48, kernel_size=(3, 2), stride=(1, 1), padding=(1, 1), groups=2, block=4"
    )


@pytest.mark.parametrize("impl", ["cpu", "masked"])
def test_copies_and_checkpoints_carry_the_topology(impl):
    layer, x = layer_of(impl, ARGUMENTS["groups"]), integers(1, 32, 5, 4)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(impl, ARGUMENTS["groups"])
    assert other.topology != layer.topology
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert twin.topology == layer.topology
        assert torch.equal(twin(x), layer(x))


def test_a_topology_of_other_parts_is_refused_from_a_checkpoint():
    layer = SparseConv2d(4, 4, 2, sparsity=0.5)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state |= {name: layer.get_buffer(name).clone() for name in DERIVED_NAMES}
    state["row"][[0, -1]] = state["row"][[-1, 0]]
    with pytest.raises(TopologyError, match="`row` must ascend"):
        layer.load_state_dict(state)


def test_tickets_of_a_dense_layer():
    dense = nn.Conv2d(8, 6, 3, groups=2, padding=1)
    mask = torch.rand(dense.weight.shape) < 0.5
    ticket = SparseConv2d.from_dense(dense, mask=mask)
    assert torch.equal(ticket.mask(), mask)
    assert torch.equal(ticket.dense_weight(), dense.weight * mask)
    largest = SparseConv2d.from_dense(dense, sparsity=0.75)
    kept = dense.weight.detach().abs()[largest.mask()]
    assert len(kept) == dense.weight.numel() // 4
    assert kept.min() >= dense.weight.detach().abs()[~largest.mask()].max()
    with pytest.raises(ShapeError, match=r"`mask` must have the weight's shape \(6, 4, 3, 3\)"):
        SparseConv2d.from_dense(dense, mask=mask[0])
    with pytest.raises(DtypeError, match=r"must be an nn\.Conv2d; got Conv1d"):
        SparseConv2d.from_dense(nn.Conv1d(2, 2, 1))


def test_initial_values_are_scaled_by_the_inputs_a_neuron_really_has():
    layer = SparseConv2d(10, 7, 3, groups=1, sparsity=0.7, block=(2, 3))
    t = layer.topology
    per_row = layer.mask().sum((1, 2, 3))
    assert torch.equal(fan_in(t), per_row.float())
    inside = t.pack(torch.ones(t.shape))
    limits = bounds(t)
    assert bool((layer.values.detach().abs() <= limits * inside).all())
    exact = per_row.clamp(min=1).double()[t.slot_rows() * 2].rsqrt()
    error = (limits[:, 0, 0].double() / exact - 1).abs().max()
    assert error <= 4 * UNIT_ROUNDOFF[torch.float32]  # gain, quotient, root and product
    full = SparseConv2d(8, 8, 3, sparsity=0)
    assert full.values.detach().abs().max() <= (8 * 9) ** -0.5


def test_no_block_straddles_a_tap_or_a_group():
    layer = SparseConv2d(10, 14, (3, 2), groups=2, sparsity=0.5, block=(4, 3))
    t = layer.topology.validate()
    assert (t.groups, t.taps, t.shape) == (2, 6, (14, 30))
    assert (t.block_rows, t.block_cols) == (2 * 2, 6 * 2)  # 7 = 4 + 3 rows, 5 = 3 + 2 columns
    tiles = layer.mask().permute(0, 2, 3, 1).reshape(2, 7, 6, 5)
    for group, tap in ((0, 0), (1, 5)):
        corner = tiles[group, :, tap]
        for rows, cols in (((0, 4), (0, 3)), ((4, 7), (0, 3)), ((0, 4), (3, 5)), ((4, 7), (3, 5))):
            block = corner[rows[0] : rows[1], cols[0] : cols[1]]
            assert bool(block.all()) or not bool(block.any())


BAD = [
    (
        (8, 8, 3),
        {"groups": 3},
        ConfigError,
        "`groups` must divide in_channels 8 and out_channels 8",
    ),
    ((8, 8, 3), {"groups": 8}, ConfigError, "depthwise convolution, leave it dense"),
    ((8, 8, 3), {"groups": 4, "sparsity": 0.99}, ConfigError, "each of 4 groups needs an active"),
    (
        (8, 8, 3),
        {"groups": 2, "block": 8},
        ShapeError,
        r"\(8, 8\) is larger than the channels of a",
    ),
    ((0, 8, 3), {}, ConfigError, "`in_channels` must be at least 1"),
    ((8, 8.0, 3), {}, DtypeError, "`out_channels` must be an int"),
    ((8, 8, (3, 3, 3)), {}, DtypeError, "`kernel_size` must be an int or a tuple of 2"),
    ((8, 8, 0), {}, ConfigError, "`kernel_size` must be at least 1"),
    ((8, 8, 3), {"padding": -1}, ConfigError, "`padding` must be at least 0"),
    ((8, 8, 3), {"padding": "full"}, ConfigError, "must be a size, 'same' or 'valid'; got 'full'"),
    ((8, 8, 3), {"padding": "same", "stride": 2}, ConfigError, "'same' needs a stride of 1"),
    ((8, 8, 3), {"padding_mode": "mirror"}, ConfigError, "`padding_mode` must be one of"),
    (
        (8, 8, 3),
        {"topology": Topology.random((8, 72), nnzb=9)},
        ShapeError,
        "1 groups and 9 taps",
    ),
    ((8, 8, 3), {"sparsity": 1.0}, ConfigError, r"`sparsity` must lie in \[0, 1\)"),
]


@pytest.mark.parametrize(("sizes", "arguments", "error", "text"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments_are_named(sizes, arguments, error, text):
    with pytest.raises(error, match=text) as info:
        SparseConv2d(*sizes, **arguments)
    assert isinstance(info.value, SparseKernError)


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((2, 7, 5, 5), r"input must have shape \(N, 8, height, width\) or \(8, height, width\)"),
        ((8, 5), r"got \(8, 5\)"),
        ((2, 8, 2, 5), "at least as large as the dilated kernel, 3 along axis H"),
    ],
)
def test_bad_images_are_named(impl, size, text):
    with pytest.raises(ShapeError, match=text):
        SparseConv2d(8, 8, 3, impl=impl)(torch.ones(size))


# ---- training


def small_net(impl, block, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU(),
        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(36, 4),
    )  # fmt: skip
    return sparsify_(model, 0.6, block=block, impl=impl, exclude=["6"])


@pytest.mark.parametrize("block", [1, 2])
def test_rigl_takes_the_same_decisions_as_on_the_masked_reference(block):
    def train(impl):
        model = small_net(impl, block).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        rigl = RigL(model, optimizer, t_end=40, update_freq=5, drop_fraction=0.4)
        stream, seen = torch.Generator().manual_seed(1), []
        while rigl.weight_steps < 40:
            x = torch.randn(4, 4, 7, 7, generator=stream, dtype=torch.float64)
            target = x.mean((2, 3)).argmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
            seen.append([m.topology.digest() for m in sparse_layers(model).values()])
        assert len(rigl.history) == 8
        grown = sum(change.grown for record in rigl.history for change in record.layers.values())
        return seen, grown

    (reference, grown), (found, _) = train("masked"), train("cpu")
    assert found == reference
    assert grown > 10


def test_a_layer_on_two_resolutions_grows_by_the_sum_of_both():
    layer = SparseConv2d(3, 4, 3, padding=1, sparsity=0.5, impl="cpu")
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl = RigL(model, optimizer, t_end=10, update_freq=1)
    images = [integers(2, 3, n, n) for n in (4, 6)]
    gradients = [integers(2, 4, n, n) for n in (4, 6)]
    dense = layer.to_dense()
    for x, dy in zip(images, gradients, strict=True):
        dense(x).backward(dy)
    (sum((layer(x) * dy).sum() for x, dy in zip(images, gradients, strict=True))).backward()
    scores = rigl.growth.observers["0"].scores()
    matrix = dense.weight.grad.permute(0, 2, 3, 1).reshape(layer.matrix_shape).abs()
    assert torch.equal(scores.active, layer.topology.pack(matrix).flatten())


def test_padding_of_other_modes_keeps_the_memory_format():
    x = integers(2, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    for name in ("reflect", "replicate", "circular", "same, even kernel"):
        y = layer_of("cpu", ARGUMENTS[name])(x)
        assert y.is_contiguous(memory_format=torch.channels_last), name


def test_autocast_leaves_float64_alone_and_the_meta_device_has_none():
    layer = layer_of("cpu", {"kernel_size": 3}, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(integers(1, 32, 4, 4, dtype=torch.float64)).dtype is torch.float64
    shapes = SparseConv2d(8, 8, 3, device="meta", impl="dense")
    assert shapes(torch.empty(2, 8, 9, 9, device="meta")).shape == (2, 8, 7, 7)
