"""`SparseLinear` as a drop-in for `nn.Linear`, on every implementation."""

import copy
import io
import pickle

import pytest
import torch
from support import integer_values, integers
from torch import nn
from torch.nn import functional as F

from sparsekern import SparseLinear, Topology, sparsify_
from sparsekern.errors import ConfigError, DtypeError, ShapeError, SparseKernError, TopologyError
from sparsekern.nn.init import bounds, fan_in

ALL_IMPLS = ("cpu", "triton", "dense", "masked")
SHAPES = [((33, 17), 1), ((48, 40), 16)]  # (in, out), block


def layer_of(impl, sizes, block, **kwargs):
    layer = SparseLinear(*sizes, sparsity=0.6, block=block, impl=impl, **kwargs)
    layer.set_active_values(integer_values(layer.topology, layer.values.dtype))
    if layer.bias is not None:
        layer.bias.data.copy_(integers(sizes[1]))
    return layer


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(("sizes", "block"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_forward_and_gradients_equal_the_dense_layer(impl, sizes, block, bias, lead):
    layer = layer_of(impl, sizes, block, bias=bias)
    dense, mask = layer.to_dense(), layer.mask()
    x = integers(*lead, sizes[0]).requires_grad_()
    dy = integers(*lead, sizes[1])
    y = layer(x)
    assert torch.equal(y, dense(x))
    y.backward(dy)
    dx = x.grad.clone()
    x.grad = None
    dense(x).backward(dy)
    assert torch.equal(dx, x.grad)
    expected = layer.topology.pack(dense.weight.grad * mask)
    assert torch.equal(layer.pack(layer.values.grad), expected)
    if bias:
        assert torch.equal(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_copies_and_checkpoints_carry_the_topology(impl):
    layer = layer_of(impl, (48, 40), 16)
    x = integers(3, 48)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = SparseLinear(48, 40, sparsity=0.6, block=16, impl=impl)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert twin.topology == layer.topology
        assert torch.equal(twin(x), layer(x))


def test_a_copy_is_not_observed():
    layer = SparseLinear(4, 4)
    layer.observe(7)
    assert copy.deepcopy(layer)._capture_key == 0
    assert layer._capture_key == 7


def test_a_checkpoint_that_is_no_topology_is_refused_before_anything_changes():
    layer = SparseLinear(8, 8, sparsity=0.5)
    before = layer.topology.digest()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["col"][0] = 99
    with pytest.raises(TopologyError, match=r"`col` must lie in \[0, 8\)"):
        layer.load_state_dict(state)
    assert layer.topology.digest() == before


def test_weight_answers_without_storing_a_dense_one():
    layer = SparseLinear(6, 5, sparsity=0.5, dtype=torch.float64)
    assert layer.weight.shape == (5, 6)
    assert layer.weight.dtype is torch.float64
    assert layer.weight.device == torch.device("cpu")
    assert torch.equal(layer.weight.to_dense(), layer.topology.unpack(layer.values.detach()))
    assert [n for n, _ in layer.named_parameters()] == ["values", "bias"]
    assert layer.nnz == 15
    assert layer.density == layer.sparsity == 0.5
    assert layer.mask().sum() == 15


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"block": 4, "sparsity": 0.5},
            "in_features=16, out_features=8, bias=True, block=4, sparsity=0.5, nnz=64, "
            "impl=cpu (auto)",
        ),
        ({"block": (2, 4), "impl": "masked"}, "block=(2, 4), sparsity=0.875, nnz=16, impl=masked"),
    ],
)
def test_repr_tells_what_runs(kwargs, text):
    assert text in repr(SparseLinear(16, 8, **kwargs))


@pytest.mark.parametrize("impl", ["cpu", "dense", "masked"])
def test_compiles_as_one_graph(impl):
    layer = layer_of(impl, (48, 40), 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = integers(3, 48).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    grad = layer.values.grad.clone()
    layer.values.grad = None
    layer(x).sum().backward()
    assert torch.equal(grad, layer.values.grad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from torch's own compiler
def test_compiles_with_inductor():
    layer = layer_of("cpu", (48, 40), 16)
    x = integers(3, 48)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("impl", ["cpu", "dense", "masked"])
def test_autocast_computes_in_the_lower_precision(impl):
    layer = layer_of(impl, (48, 40), 16)
    x = integers(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y.float(), layer(x).bfloat16().float())
    y.float().sum().backward()
    assert layer.values.grad.dtype is torch.float32


@pytest.mark.parametrize("block", [1, (3, 2), 4])
def test_from_dense_keeps_the_largest_and_to_dense_gives_it_back(block):
    dense = nn.Linear(14, 10)
    layer = SparseLinear.from_dense(dense, sparsity=0.7, block=block)
    asked = 140 - 98
    bh, bw = layer.block
    assert abs(layer.nnz - asked) < max(2, bh * bw)
    mask = layer.mask()
    assert torch.equal(layer.dense_weight(), dense.weight * mask)
    scores = dense.weight.detach().abs()
    blocks = Topology.random((10, 14), block, sparsity=0).pack(scores).sum((1, 2))
    kept = layer.topology.pack(scores).sum((1, 2))
    assert torch.equal(kept.sort().values, blocks.sort().values[-len(kept) :])
    back = SparseLinear.from_dense(layer.to_dense(), block=block)
    assert back.topology == layer.topology
    assert torch.equal(back.values, layer.values)
    assert torch.equal(layer.to_dense().bias, dense.bias)


@pytest.mark.parametrize("impl", ["cpu", "masked"])
def test_from_dense_takes_a_ticket_and_the_modules_settings(impl):
    dense = nn.Linear(8, 6, bias=False, dtype=torch.float64).eval().requires_grad_(False)
    mask = torch.rand(6, 8) < 0.3
    layer = SparseLinear.from_dense(dense, mask=mask, impl=impl)
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(layer.dense_weight(), dense.weight * mask)
    assert layer.values.dtype is torch.float64
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias is None
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.allclose(layer(x), F.linear(x, dense.weight * mask))


# ---- initialisation


@pytest.mark.parametrize("block", [1, (4, 3), 5])
def test_fan_in_counts_real_inputs(block):
    topology = Topology.random((13, 17), block, sparsity=0.7)
    assert torch.equal(fan_in(topology), topology.to_mask().sum(1).float())


@pytest.mark.parametrize("block", [1, 8])
def test_initial_scale_follows_each_neurons_inputs(block):
    torch.manual_seed(1)
    layer = SparseLinear(4096, 64, sparsity=0.75, block=block)
    dense, fan = layer.dense_weight(), fan_in(layer.topology)
    limit = 1 / fan.clamp(min=1).sqrt()  # as nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    assert bool((dense.abs() <= limit[:, None] * (1 + 2**-20)).all())
    deviation = dense.square().sum(1).div(fan).sqrt() * fan.sqrt()
    # the standard deviation of U(-1, 1) is 1/sqrt(3); its estimate from n >= 700 draws varies by
    # sqrt((9/5 - 1) / 4 / n) relative
    spread = 5 * (0.2 / fan.min()).sqrt()
    assert bool(((deviation * 3**0.5 - 1).abs() < spread).all())


def test_padding_and_neurons_without_inputs_are_harmless():
    mask = torch.zeros(5, 7)
    mask[0, :3] = 1
    topology = Topology.from_mask(mask, (2, 3))
    assert bool(bounds(topology).isfinite().all())
    layer = SparseLinear(7, 5, topology=topology)
    y = layer(torch.ones(1, 7))
    assert torch.equal(y[0, 2:], layer.bias[2:])
    ragged = SparseLinear(7, 5, block=4, sparsity=0.0)
    outside = ragged.topology.pack(torch.ones(5, 7)) == 0
    assert bool((ragged.values[outside] == 0).all())
    optimizer = torch.optim.AdamW(ragged.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ragged(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
    assert bool((ragged.values[outside] == 0).all())


def test_generator_decides_everything():
    def draw():
        return SparseLinear(20, 10, generator=torch.Generator().manual_seed(5))

    a, b = draw(), draw()
    assert a.topology == b.topology
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.bias, b.bias)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: SparseLinear(8, 8, sparsity=1.0), ConfigError, r"in \[0, 1\); got 1.0"),
        (lambda: SparseLinear(8, 8, sparsity=-1), ConfigError, "got -1"),
        (lambda: SparseLinear(8, 4, block=8), ShapeError, r"\(8, 8\) is larger .* \(4, 8\)"),
        (lambda: SparseLinear(0, 4), ConfigError, "`in_features` must be at least 1; got 0"),
        (lambda: SparseLinear(4.0, 4), DtypeError, "`in_features` must be an int; got 4.0"),
        (lambda: SparseLinear(4, 4, impl="cuda"), ConfigError, "got 'cuda'"),
        (lambda: SparseLinear(4, 4, dtype=torch.int8), DtypeError, "floating point"),
        (lambda: SparseLinear(4, 4)(torch.ones(2, 5)), ShapeError, r"\(..., 4\); got \(2, 5\)"),
        (
            lambda: SparseLinear(4, 4)(torch.ones(2, 4).double()),
            DtypeError,
            "`x` must have dtype torch.float32; got torch.float64",
        ),
        (
            lambda: SparseLinear(4, 5, topology=Topology.random((4, 5), nnzb=2)),
            ShapeError,
            r"shape \(5, 4\); got \(4, 5\)",
        ),
        (
            lambda: SparseLinear.from_dense(nn.Linear(4, 5), mask=torch.ones(4, 5)),
            ShapeError,
            r"weight's shape \(5, 4\); got \(4, 5\)",
        ),
        (
            lambda: SparseLinear.from_dense(nn.Linear(4, 4), mask=torch.eye(4), block=2),
            TopologyError,
            r"whole \(2, 2\) blocks; 4 weights",
        ),
        (
            lambda: SparseLinear.from_dense(nn.Linear(4, 4), mask=torch.eye(4), sparsity=0.5),
            ConfigError,
            "not both",
        ),
        (lambda: SparseLinear.from_dense(nn.ReLU()), DtypeError, "nn.Linear; got ReLU"),
        (
            lambda: SparseLinear(4, 4).set_active_values(torch.ones(3, 1, 1)),
            ShapeError,
            r"must have shape \(2, 1, 1\); got \(3, 1, 1\)",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text) as info:
        call()
    assert error is RuntimeError or isinstance(info.value, SparseKernError)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_density_changes_nothing(strict):
    layer = SparseLinear(64, 32, sparsity=0.9)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    foreign = SparseLinear(64, 32, sparsity=0.5).state_dict()
    with pytest.raises(ShapeError, match="must have 205 active blocks .* got 1024"):
        layer.load_state_dict(foreign, strict=strict)
    partial = {k: v for k, v in before.items() if k in ("crow", "col")}
    with pytest.raises(TopologyError, match=r"got only \['crow', 'col'\]"):
        layer.load_state_dict(partial, strict=False)
    assert all(map(torch.equal, before.values(), layer.state_dict().values()))


def test_weight_view_makes_fused_inference_paths_step_aside():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    sparsify_(encoder, 0.5, distribution="uniform")
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = encoder.train(mode=False)(x)
    assert expected.shape == x.shape
    with pytest.raises(DtypeError, match=r"layer\.weight\.to_dense"):
        torch.add(encoder.linear1.weight, 1)


def test_layers_made_from_one_topology_do_not_share_it():
    """An update of one overwrites its index arrays; the other must keep its own."""
    first = SparseLinear(32, 32, sparsity=0.5, block=16)
    second = SparseLinear(32, 32, topology=first.topology)
    before = second.topology.digest()
    for name in ("crow", "col", "ccol", "row", "perm"):
        getattr(first, name).zero_()
    assert second.topology.digest() == before
