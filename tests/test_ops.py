"""Operators: bitwise against the reference, inside the bound, pure, compilable, countable."""

import itertools

import pytest
import torch
from support import IMPLS, assert_within, integer_values, integers, product_bound
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import ops
from sparsekern.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    ShapeError,
    SparseKernError,
    UnavailableError,
)
from sparsekern.ops import crossover, dispatch, library
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

# (tokens, rows, cols, block, sparsity): 1, primes, block - 1, block + 1, full, nearly empty, empty
CASES = [
    (1, 1, 1, 1, 0.0),
    (5, 7, 9, 1, 0.5),
    (33, 17, 29, 1, 0.9),
    (64, 40, 31, 1, 0.0),
    (0, 8, 8, 1, 0.5),
    (1, 16, 16, 16, 0.0),
    (7, 48, 33, 16, 0.5),
    (65, 17, 47, 16, 0.7),
    (16, 31, 64, (16, 32), 0.4),
    (9, 64, 40, (32, 16), 0.5),
    (3, 65, 63, 32, 0.3),
    (0, 32, 32, 16, 0.5),
    (4, 130, 64, 64, 0.5),
]
CPU_ONLY = [
    (5, 8, 12, 4, 0.5),
    (6, 13, 11, (2, 3), 0.6),
    (7, 9, 33, (1, 16), 0.5),
    (7, 40, 5, (16, 1), 0.5),
]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]


def laid_out(tensor, layout):
    """The same kind of operand in another memory layout."""
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        return tensor.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape[0], -1) if tensor.shape[0] else tensor
    return tensor


def problems():
    for impl, case, layout in itertools.product(IMPLS, CASES, LAYOUTS):
        yield pytest.param(impl, case, layout, id=f"{impl}-{case}-{layout}".replace(" ", ""))
    for impl, case, layout in itertools.product(("cpu", "dense"), CPU_ONLY, LAYOUTS):
        yield pytest.param(impl, case, layout, id=f"{impl}-{case}-{layout}".replace(" ", ""))


@pytest.mark.parametrize(("impl", "case", "layout"), list(problems()))
def test_products_are_exact_on_integers(impl, case, layout):
    tokens, rows, cols, block, sparsity = case
    topology = Topology.random((rows, cols), block, sparsity=sparsity)
    values, bias = integer_values(topology), integers(rows)
    x, dy = laid_out(integers(tokens, cols), layout), laid_out(integers(tokens, rows), layout)
    before = [t.clone() for t in (x, dy, values)]
    w = topology.unpack(values).double()
    xd, dyd = x.double(), dy.double()
    y = ops.spmm(x, values, topology, bias, impl=impl)
    assert torch.equal(y.double(), xd @ w.t() + bias)
    assert torch.equal(ops.spmm(x, values, topology, impl=impl).double(), xd @ w.t())
    assert torch.equal(ops.spmm_t(dy, values, topology, impl=impl).double(), dyd @ w)
    dw = ops.sddmm(dy, x, topology, impl=impl)
    assert torch.equal(dw.double(), topology.pack(dyd.t() @ xd))
    assert all(map(torch.equal, before, (x, dy, values)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [1, 16])
def test_no_active_block_gives_the_bias(impl, block):
    topology = Topology.random((32, 48), block, nnzb=0)
    values, bias = torch.zeros(topology.values_shape), integers(32)
    x, dy = integers(5, 48), integers(5, 32)
    assert torch.equal(ops.spmm(x, values, topology, bias, impl=impl), bias.expand(5, 32))
    assert torch.equal(ops.spmm_t(dy, values, topology, impl=impl), torch.zeros(5, 48))
    assert ops.sddmm(dy, x, topology, impl=impl).shape == topology.values_shape


FLOATS = [
    (impl, dtype, block)
    for impl, dtype, block in itertools.product(
        IMPLS, (torch.float32, torch.float16, torch.bfloat16, torch.float64), (1, 16, 32)
    )
    if not (impl == "triton" and dtype is torch.float64)
    # torch's own dense product keeps wide sums only up to a point for 16-bit types on the CPU
    and not (impl == "dense" and dtype in (torch.float16, torch.bfloat16))
]


@pytest.mark.parametrize(("impl", "dtype", "block"), FLOATS)
def test_floats_stay_inside_the_proven_bound(impl, dtype, block):
    topology = Topology.random((65, 100), block, sparsity=0.6)
    values = topology.pack(torch.randn(65, 100).to(dtype))
    x, dy = torch.randn(37, 100).to(dtype), torch.randn(37, 65).to(dtype)
    w, xd, dyd = topology.unpack(values).double(), x.double(), dy.double()
    fan = int((w != 0).sum(1).max())
    fan_out = int((w != 0).sum(0).max())
    got = ops.spmm(x, values, topology, impl=impl)
    assert_within(got, xd @ w.t(), product_bound(xd, w.t(), fan, dtype), "y")
    got = ops.spmm_t(dy, values, topology, impl=impl)
    assert_within(got, dyd @ w, product_bound(dyd, w, fan_out, dtype), "dx")
    got = topology.unpack(ops.sddmm(dy, x, topology, impl=impl))
    mask = topology.to_mask()
    assert_within(got, mask * (dyd.t() @ xd), mask * product_bound(dyd.t(), xd, 37, dtype), "dw")


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("block", [1, (4, 3)])
def test_gradcheck_to_second_order(impl, block):
    topology = Topology.random((11, 7), block, sparsity=0.5)

    def wide(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    # padding of edge blocks is not a variable of the function: it enters as zero
    inside = topology.pack(torch.ones(11, 7, dtype=torch.float64))
    values, x, bias, dy = wide(*topology.values_shape), wide(3, 7), wide(11), wide(3, 11)

    def forward(x, values, bias):
        return ops.spmm(x, values * inside, topology, bias, impl=impl)

    def transposed(dy, values):
        return ops.spmm_t(dy, values * inside, topology, impl=impl)

    def sampled(dy, x):
        return ops.sddmm(dy, x, topology, impl=impl)

    for function, inputs in (
        (forward, (x, values, bias)),
        (transposed, (dy, values)),
        (sampled, (dy, x)),
    ):
        assert torch.autograd.gradcheck(function, inputs, nondet_tol=0.0)
        assert torch.autograd.gradgradcheck(function, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [1, 16])
def test_opcheck(impl, block):
    topology = Topology.random((20, 17), block, sparsity=0.5)
    parts = library.parts(topology)
    values = torch.randn(topology.values_shape, requires_grad=True)
    x, dy = torch.randn(4, 17, requires_grad=True), torch.randn(4, 20, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    for op, operands, *flags in (
        (library.spmm, (x, values, bias), False),
        (library.spmm, (x, values, None), True),
        (library.spmm_t, (dy, values)),
        (library.sddmm, (dy, x)),
        (library.sddmm_add, (torch.zeros(topology.values_shape), dy.detach(), x.detach())),
        (library.spmm_backward, (dy, x, values)),
    ):
        verdict = torch.library.opcheck(op, (*operands, *parts, *flags, impl))
        assert set(verdict.values()) == {"SUCCESS"}
        assert len(verdict) == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck_of_grow_scores(impl):
    topology = Topology.random((40, 33), 16 if impl == "triton" else 4, sparsity=0.5)
    operands = ([torch.randn(4, 40)], [torch.randn(4, 33)])
    for k in (0, 3, 10_000):
        rest = *library.parts(topology), k, "l2", impl
        torch.library.opcheck(library.grow_scores, (*operands, *rest))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [1, 16])
def test_relu_is_part_of_the_product(impl, block):
    topology = Topology.random((40, 33), block, sparsity=0.5)
    values, x, bias = integer_values(topology), integers(5, 33), integers(40)
    inputs = [t.requires_grad_() for t in (x, values, bias)]
    y = ops.spmm(x, values, topology, bias, activation="relu", impl=impl)
    want = ops.spmm(x, values, topology, bias, impl="masked").relu()
    assert torch.equal(y, want)
    assert 0 < int((y == 0).sum()) < y.numel()
    dy = integers(*y.shape)
    got = torch.autograd.grad(y, inputs, dy)
    assert all(map(torch.equal, got, torch.autograd.grad(want, inputs, dy)))


def test_only_relu_can_be_fused():
    topology = Topology.random((4, 4), sparsity=0.5)
    with pytest.raises(ConfigError, match="`activation` must be None or 'relu'; got 'gelu'"):
        ops.spmm(torch.zeros(1, 4), torch.zeros(8, 1, 1), topology, activation="gelu")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", [1, 16])
def test_sddmm_adds_to_out(impl, block):
    topology = Topology.random((40, 33), block, sparsity=0.5)
    dy, x, before = integers(5, 40), integers(5, 33), integer_values(topology)
    out = before.clone()
    assert ops.sddmm(dy, x, topology, out=out, impl=impl) is out
    assert torch.equal(out, before + ops.sddmm(dy, x, topology, impl="masked"))


def test_sddmm_refuses_an_out_that_does_not_fit():
    topology = Topology.random((8, 8), sparsity=0.5)
    dy, x = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(ShapeError, match=r"`values` must have shape \(32, 1, 1\)"):
        ops.sddmm(dy, x, topology, out=torch.zeros(31, 1, 1))
    with pytest.raises(ShapeError, match="`out` must be contiguous"):
        ops.sddmm(dy, x, topology, out=torch.zeros(64, 1, 1)[::2])


@pytest.mark.parametrize("impl", IMPLS)
def test_relu_lets_no_infinite_gradient_through_where_it_clamped(impl):
    topology = Topology.random((4, 4), sparsity=0)
    x = torch.tensor([[-1.0, -1, -1, -1]], requires_grad=True)
    y = ops.spmm(x, torch.ones(16, 1, 1), topology, activation="relu", impl=impl)
    y.backward(torch.full((1, 4), torch.inf))
    assert torch.equal(x.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("impl", IMPLS)
def test_sddmm_into_out_is_seen_by_autograd_and_leaves_no_graph(impl):
    topology = Topology.random((40, 33), 16, sparsity=0.5)
    dy, x = torch.ones(5, 40, requires_grad=True), torch.ones(5, 33, requires_grad=True)
    out = torch.ones(topology.values_shape)
    with pytest.raises(ConfigError, match="`out` must not require a gradient"):
        ops.sddmm(dy, x, topology, out=out.clone().requires_grad_(), impl=impl)
    scale = torch.ones((), requires_grad=True)
    product = scale * out  # keeps `out` for its backward pass
    assert not ops.sddmm(dy, x, topology, out=out, impl=impl).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_grow_scores_keep_no_graph(impl):
    topology = Topology.random((40, 33), 16, sparsity=0.5)
    dy, x = torch.ones(5, 40, requires_grad=True), torch.ones(5, 33, requires_grad=True)
    found = ops.grow_scores(dy, x, topology, 2, impl=impl)
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("norm", ops.NORMS)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # numpy's
def test_what_is_not_finite_shows_without_active_blocks_too(impl, bad, norm):
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[:16] = False
    topology = Topology.from_mask(mask, 16)
    dy, x = torch.ones(3, 64), torch.ones(3, 64)
    dy[1, 5] = bad
    found = ops.grow_scores(dy, x, topology, 2, norm=norm, impl=impl)
    assert found.active.isfinite().all()
    assert not found.is_finite()


class Impls(TorchDispatchMode):
    """Notes which implementation each operator was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparsekern":
            self.seen.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
def test_the_density_has_no_say_in_grow_scores():
    topology = Topology.random((64, 48), 16, sparsity=0.1)  # a GPU computes it densely
    on_gpu = dispatch.Assumed(None, torch.device("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True), Impls() as impls:
        ops.grow_scores(torch.ones(5, 64), torch.ones(5, 48), topology, 2, impl=on_gpu)
        ops.spmm(torch.ones(5, 48), torch.ones(topology.values_shape), topology, impl=on_gpu)
    assert impls.seen == [("grow_scores", "triton"), ("spmm", "dense")]


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
def test_either_way_of_allowing_tf32_is_understood():
    from sparsekern.kernels.launch import compute_kind

    assert compute_kind(torch.float32) == "ieee"
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for said, kind in (("tf32", "tf32"), ("ieee", "ieee")):
            settings.fp32_precision = said
            assert compute_kind(torch.float32) == kind
            assert compute_kind(torch.bfloat16) == "half"
    finally:
        settings.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    try:
        assert compute_kind(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("norm", ops.NORMS)
@pytest.mark.parametrize(("shape", "block"), [((70, 90), 16), ((64, 100), (32, 64))])
def test_fused_grow_scores_are_the_streamed_ones(shape, block, norm):
    topology = Topology.random(shape, block, sparsity=0.6)
    dy, x = integers(9, shape[0]), integers(9, shape[1])
    for k in (0, 2, 100):
        fused = ops.grow_scores(dy, x, topology, k, norm=norm, impl="triton")
        streamed = ops.grow_scores(dy, x, topology, k, norm=norm, impl="masked")
        assert all(map(torch.equal, fused, streamed))
    dy[3, 5] = torch.nan
    assert not ops.grow_scores(dy, x, topology, 2, norm=norm, impl="triton").is_finite()


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_is_pure_and_repeatable(impl):
    topology = Topology.random((48, 64), 16, sparsity=0.5)
    values = torch.randn(topology.values_shape, requires_grad=True)
    x = torch.randn(9, 64, requires_grad=True)
    y = ops.spmm(x, values, topology, impl=impl)
    dy = torch.randn(1, 48).expand(9, 48)  # stride 0, as sum().backward() gives
    saved = x.detach().clone(), values.detach().clone(), dy.clone()
    versions = x._version, values._version
    first = torch.autograd.grad(y, (x, values), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, values), dy)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, saved, (x, values, dy)))
    assert versions == (x._version, values._version)


def test_a_topology_changed_between_forward_and_backward_is_noticed():
    topology = Topology.random((8, 8), sparsity=0.5)
    values = torch.randn(topology.values_shape, requires_grad=True)
    y = ops.spmm(torch.randn(2, 8), values, topology)
    topology.col.copy_(topology.col.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("block", [1, 4])
def test_flop_counter_sees_what_is_executed(impl, block):
    topology = Topology.random((24, 40), block, sparsity=0.75)
    values = torch.randn(topology.values_shape, requires_grad=True)
    x = torch.randn(2, 5, 40, requires_grad=True)
    weights = 24 * 40 if impl == "dense" else values.numel()
    with FlopCounterMode(display=False) as counter:
        ops.spmm(x, values, topology, impl=impl).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * weights
    with FlopCounterMode(display=False) as counter:
        ops.grow_scores(torch.randn(10, 24), x.detach().view(10, 40), topology, 3)
    # the streamed product is counted once, as the operator's own
    assert counter.get_total_flops() == 2 * 10 * 24 * 40


def test_leading_dimensions_and_dtypes():
    topology = Topology.random((6, 8), sparsity=0.5)
    values = torch.randn(topology.values_shape, dtype=torch.float64)
    assert ops.spmm(torch.randn(2, 3, 4, 8).double(), values, topology).shape == (2, 3, 4, 6)
    assert ops.spmm(torch.randn(8).double(), values, topology).shape == (6,)
    assert ops.spmm_t(torch.randn(2, 3, 6).double(), values, topology).shape == (2, 3, 8)


# ---- grow scores


@pytest.mark.parametrize("norm", sorted(ops.NORMS))
@pytest.mark.parametrize("block", [1, (3, 2), 4])
@pytest.mark.parametrize("slab", [1, 10**9])
def test_grow_scores_equal_those_of_the_stored_gradient(norm, block, slab, monkeypatch):
    monkeypatch.setattr(ops.grow, "SLAB_ELEMENTS", slab)
    topology = Topology.random((40, 21), block, sparsity=0.6)
    dy, x = integers(9, 40), integers(9, 21)
    k = 7
    got = ops.grow_scores(dy, x, topology, k, norm=norm)
    full = Topology.random((40, 21), block, sparsity=0.0)
    scores = ops.block_norm(full.pack(dy.t() @ x), norm)
    assert torch.equal(got.active, scores[topology.positions()])
    inactive = scores.clone()
    inactive[topology.positions()] = -1
    # stable sort: among equal scores the lowest position wins
    best = torch.sort(inactive, descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(got.positions, best)
    assert torch.equal(got.scores, scores[best])


def test_grow_scores_sum_signed_gradients_before_the_norm():
    topology = Topology.random((10, 12), sparsity=0.5)
    dys, xs = [integers(4, 10) for _ in range(3)], [integers(4, 12) for _ in range(3)]
    parts = ops.grow_scores(dys, xs, topology, 5)
    whole = ops.grow_scores(torch.cat(dys), torch.cat(xs), topology, 5)
    assert all(map(torch.equal, parts, whole))
    halved = ops.grow_scores(dys, xs, topology, 5, reduce=lambda slab: slab.mul_(2))
    assert torch.equal(halved.scores, 2 * whole.scores)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("active", [True, False])
def test_grow_scores_report_a_gradient_that_is_not_finite(bad, active):
    mask = torch.zeros(4, 4)
    mask[1, 1] = 1
    topology = Topology.from_mask(mask)
    dy, x = torch.zeros(1, 4), torch.zeros(1, 4)
    at = (1, 1) if active else (2, 3)
    dy[0, at[0]], x[0, at[1]] = bad, 1
    assert not ops.grow_scores(dy, x, topology, 2).is_finite()
    dy[0, at[0]] = 1
    assert ops.grow_scores(dy, x, topology, 2).is_finite()


# ---- choice of implementation and bad input


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
@pytest.mark.parametrize(("density", "linear"), [(0.012, "triton"), (0.0125, "dense")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unstructured_layers_on_a_gpu(density, linear, dtype):
    """Linear ones keep their kernels while they are very sparse, convolutions never do."""
    cuda = torch.device("cuda")
    layers = {
        sk.SparseLinear(400, 400, sparsity=1 - density, dtype=dtype): linear,
        sk.SparseConv2d(20, 64, 3, sparsity=0.995, dtype=dtype): "dense",
        sk.SparseConv2d(200, 64, 1, sparsity=0.995, dtype=dtype): "dense",
        sk.SparseConv1d(20, 64, 3, sparsity=0.995, dtype=dtype): "dense",
        sk.SparseConv2d(64, 64, 3, sparsity=0.995, block=16, dtype=dtype): "triton",
    }
    for layer, name in layers.items():
        assert layer.impl_on(cuda) == name, layer


@pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")
def test_the_operators_of_a_convolution_choose_as_its_layer_does():
    topology = Topology.random((8, 36), 1, sparsity=0.99, taps=9)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1))
    on_gpu = dispatch.Assumed(None, torch.device("cuda"))
    x, dy = torch.ones(2, 4, 5, 5), torch.ones(2, 8, 5, 5)
    values = torch.ones(topology.values_shape)
    with FakeTensorMode(allow_non_fake_inputs=True), Impls() as impls:
        ops.conv2d(x, values, topology, geometry, impl=on_gpu)
        ops.conv2d_dgrad(dy, values, topology, geometry, size=(5, 5), impl=on_gpu)
        ops.conv2d_wgrad(dy, x, topology, geometry, impl=on_gpu)
    assert dict(impls.seen) == dict.fromkeys(("conv2d", "conv2d_dgrad", "conv2d_wgrad"), "dense")


def test_only_none_chooses():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert ops.resolve(None, cpu, torch.float32, (4, 4)) == "cpu"
    assert ops.resolve("dense", cpu, torch.float32, (4, 4)) == "dense"
    if dispatch.has_triton():
        assert ops.resolve(None, cuda, torch.float32, (16, 16)) == "triton"
        assert ops.resolve(None, cuda, torch.bfloat16, (1, 1)) == "triton"
        for block in (1, 16, 32, 64, 128):
            bound = crossover.DENSE_ABOVE["half"][block]
            for density, name in ((bound, "triton"), (bound + 1e-3, "dense")):
                found = ops.resolve(None, cuda, torch.float16, (block, block), density)
                assert found == name
        assert ops.resolve("triton", cuda, torch.float16, (16, 16), 1.0) == "triton"
        for block, name in (((1, 1), "dense"), ((16, 16), "triton")):
            found = ops.resolve(None, cuda, torch.float16, block, 1e-3, conv=True)
            assert found == name
        assert ops.resolve("triton", cuda, torch.float16, (1, 1), 1e-3, conv=True) == "triton"
    assert ops.resolve(None, cpu, torch.float32, (16, 16), 1.0) == "cpu"
    assert ops.resolve(None, cuda, torch.float64, (16, 16)) == "dense"
    assert ops.resolve(None, cuda, torch.float32, (4, 4)) == "dense"
    with pytest.raises(DeviceError, match="impl='cpu' needs CPU tensors; got cuda"):
        ops.resolve("cpu", cuda, torch.float32, (1, 1))


def test_triton_refuses_what_it_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not dispatch.has_triton():
        with pytest.raises(UnavailableError, match="pip install triton"):
            ops.resolve("triton", cpu, torch.float32, (16, 16))
        return
    with pytest.raises(DeviceError, match="needs CUDA tensors"):
        ops.resolve("triton", cpu, torch.float32, (16, 16))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(DtypeError, match="got torch.float64"):
        ops.resolve("triton", cpu, torch.float64, (16, 16))
    with pytest.raises(ShapeError, match=r"edges of 16, 32, 64 and 128; got \(4, 4\)"):
        ops.resolve("triton", cpu, torch.float32, (4, 4))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t, v: ops.spmm(torch.ones(2, 7), v, t), ShapeError, r"\(..., 8\); got \(2, 7\)"),
        (lambda t, v: ops.spmm(torch.ones(()), v, t), ShapeError, r"\(..., 8\); got \(\)"),
        (lambda t, v: ops.spmm(torch.ones(2, 8), v[1:], t), ShapeError, r"`values` must have"),
        (lambda t, v: ops.spmm(torch.ones(2, 8).double(), v, t), DtypeError, "got torch.float64"),
        (lambda t, v: ops.spmm(torch.ones(2, 8), v.int(), t), DtypeError, "floating point"),
        (lambda t, v: ops.spmm(torch.ones(2, 8), v, t, torch.ones(5)), ShapeError, "`bias`"),
        (lambda t, v: ops.spmm(torch.ones(2, 8), v, t, torch.ones(2, 6)), ShapeError, "`bias`"),
        (lambda t, v: ops.spmm(torch.ones(2, 8), v, t, impl="gpu"), ConfigError, "got 'gpu'"),
        (
            lambda t, v: ops.spmm(torch.ones(2, 8, device="meta"), v, t),
            DeviceError,
            "`x` must be on cpu; got meta",
        ),
        (
            lambda t, v: ops.spmm(torch.ones(2, 8), v, t.to("meta")),
            DeviceError,
            "topology must be on cpu; got meta",
        ),
        (lambda t, v: ops.spmm_t(torch.ones(2, 8), v, t), ShapeError, r"`dy` .* \(..., 6\)"),
        (
            lambda t, v: ops.sddmm(torch.ones(2, 6), torch.ones(3, 8), t),
            ShapeError,
            r"leading sizes; got \(2,\) and \(3,\)",
        ),
        (
            lambda t, v: ops.grow_scores(torch.ones(2, 6), torch.ones(2, 8), t, 1, norm="l3"),
            ConfigError,
            r"one of \['l1', 'l2', 'max'\]; got 'l3'",
        ),
        (
            lambda t, v: ops.grow_scores(torch.ones(2, 6), torch.ones(2, 8), t, -1),
            ConfigError,
            "`k` must not be negative; got -1",
        ),
        (lambda t, v: ops.grow_scores([], [], t, 1), ShapeError, "in pairs; got 0 and 0"),
    ],
)
def test_bad_input(call, error, text):
    topology = Topology.random((6, 8), sparsity=0.5)
    with pytest.raises(error, match=text) as info:
        call(topology, torch.ones(topology.values_shape))
    assert isinstance(info.value, SparseKernError)
