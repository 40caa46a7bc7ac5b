"""Convolution operators against torch's own: exact, differentiable, compilable, counted."""

import os

import pytest
import torch
from conv_cases import ConvCase, combinations, operands
from support import UNIT_ROUNDOFF, AllocationTracer, assert_within, integers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import ops
from sparsekern.errors import ConfigError, DeviceError, DtypeError, ShapeError
from sparsekern.ops import conv_library
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

CPU_BLOCKS = ((1, 1), (1, 1), (4, 4), (2, 3), (16, 16), (8, 16), (32, 32))
TRITON_BLOCKS = ((1, 1), (16, 16), (16, 32))
SMALL_KERNELS = ((1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (4, 3))  # interpreted taps take long
GROUP = 15  # cases to a test


def batched(cases):
    return [cases[i : i + GROUP] for i in range(0, len(cases), GROUP)]


def reference(case, o):
    """y, dx, dw, db by torch's dense convolution.

    In float64, which oneDNN leaves to others: in torch 2.13 it reads out of bounds on some images
    one pixel wide.
    """
    g, dtype = case.geometry, o.x.dtype
    x, weight, bias = (t.detach().double().requires_grad_() for t in (o.x, o.weight, o.bias))
    y = F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), o.dy.double())
    dw = o.topology.pack(dw.permute(0, 2, 3, 1).reshape(o.topology.shape))
    return tuple(result.to(dtype) for result in (y, dx, dw, db))


def compare(case, impl, dtype=torch.float32):
    """All three products, through autograd and by themselves."""
    o, g = operands(case, dtype), case.geometry
    wanted = reference(case, o)
    x, values, bias = (t.detach().requires_grad_() for t in (o.x, o.values, o.bias))
    y = ops.conv2d(x, values, o.topology, g, bias, impl=impl)
    found = (y, *torch.autograd.grad(y, (x, values, bias), o.dy))
    for name, got, want in zip(("y", "dx", "dw", "db"), found, wanted, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want), f"{case}: {name}"
    dx = ops.conv2d_dgrad(o.dy, o.values, o.topology, g, size=case.size, impl=impl)
    assert torch.equal(dx, wanted[1]), f"{case}: dgrad"
    dw = ops.conv2d_wgrad(o.dy, o.x, o.topology, g, impl=impl)
    assert torch.equal(dw, wanted[2]), f"{case}: wgrad"
    for image, like in ((y, o.x), (dx, o.dy)):
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        wish = torch.channels_last if last else torch.contiguous_format
        assert image.is_contiguous(memory_format=wish), f"{case}: layout"


@pytest.mark.parametrize("cases", batched(combinations(CPU_BLOCKS, 420)), ids=len)
def test_cpu_equals_torch_exactly(cases):
    for case in cases:
        compare(case, "cpu")


# interpreted kernels are slow, and have tables of cases of their own in tests/kernels
INTERPRETED = int(os.environ.get("SPARSEKERN_CONV_CASES", "30"))


@pytest.mark.parametrize(
    "cases", batched(combinations(TRITON_BLOCKS, INTERPRETED, 1, SMALL_KERNELS)), ids=len
)
def test_triton_equals_torch_exactly(cases):
    for case in cases:
        compare(case, "triton")


@pytest.mark.parametrize("impl", ["dense", "masked"])
def test_the_reference_equals_torch_exactly(impl):
    for case in combinations(CPU_BLOCKS, 40, seed=2):
        o = operands(case)
        clean = o._replace(values=o.topology.clear_padding_(o.values))
        wanted, g = reference(case, clean), case.geometry
        x, values, bias = (t.detach().requires_grad_() for t in (o.x, clean.values, o.bias))
        y = ops.conv2d(x, values, o.topology, g, bias, impl=impl)
        found = (y, *torch.autograd.grad(y, (x, values, bias), o.dy))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


SMALL = ConvCase(ConvGeometry((3, 3), (2, 1), (1, 0), groups=2), 5, 3, (5, 4), (2, 2), "sliced")
CASES_64 = [
    SMALL,
    SMALL._replace(block=(1, 1)),
    SMALL._replace(geometry=ConvGeometry((1, 1))),
    SMALL._replace(geometry=ConvGeometry((2, 3), dilation=(1, 2), padding=(2, 2))),
    SMALL._replace(batch=0, layout="contiguous"),
]


def floats(case, dtype):
    """Operands of normal numbers with zero padding."""
    o = operands(case)
    values = o.topology.clear_padding_(torch.randn_like(o.values))
    x, dy = torch.randn_like(o.x), torch.randn(o.dy.shape)
    return o._replace(values=values.to(dtype), x=x.to(dtype), dy=dy.to(dtype))


@pytest.mark.parametrize("impl", ["cpu", "dense"])
@pytest.mark.parametrize("case", CASES_64, ids=str)
def test_gradients_of_first_and_second_order(case, impl):
    o = floats(case, torch.float64)
    t, g = o.topology, case.geometry
    x, values, bias = (a.double().requires_grad_() for a in (o.x, o.values, o.bias))
    dy = o.dy.requires_grad_()
    products = (
        (lambda x, v, b: ops.conv2d(x, v, t, g, b, impl=impl), (x, values, bias)),
        (
            lambda dy, v: ops.conv2d_dgrad(dy, v, t, g, size=case.size, impl=impl),
            (dy, values),
        ),
        (lambda dy, x: ops.conv2d_wgrad(dy, x, t, g, impl=impl), (dy, x)),
    )
    for product, inputs in products:
        assert torch.autograd.gradcheck(product, inputs, nondet_tol=0.0)
        assert torch.autograd.gradgradcheck(product, inputs, nondet_tol=0.0, fast_mode=True)


def bound_of(case, o, dtype):
    """Largest rounding error of y: gamma_K (|w| * |x|) and one final rounding, as for products."""
    g, u = case.geometry, UNIT_ROUNDOFF[torch.float32]
    args = (g.stride, g.padding, g.dilation, g.groups)
    weight = dense_weight(case, o).double()
    x, bias = o.x.double(), o.bias.double()
    exact = F.conv2d(x, weight, bias, *args)
    spread = F.conv2d(x.abs(), weight.abs(), bias.abs(), *args)
    terms = g.taps * case.inputs + 1
    gamma = terms * u / (1 - terms * u) * spread
    return exact, gamma + UNIT_ROUNDOFF[dtype] * (exact.abs() + gamma)


def dense_weight(case, o):
    matrix = o.topology.unpack(o.values)
    return matrix.view(len(matrix), *case.geometry.kernel, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_floats_stay_inside_the_bound(impl, dtype):
    for case in combinations(TRITON_BLOCKS, 12, 3, SMALL_KERNELS):
        o = floats(case, dtype)
        y = ops.conv2d(o.x, o.values, o.topology, case.geometry, o.bias.to(dtype), impl=impl)
        assert_within(y, *bound_of(case, o, dtype), str(case))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_backward_leaves_its_inputs_alone_and_repeats_bit_for_bit(impl):
    case = SMALL._replace(block=(16, 16), outputs=16, inputs=17)
    o = floats(case, torch.float32)
    dy = torch.randn(()).expand(o.dy.shape)
    before = [t.clone() for t in (o.x, o.values, dy)]
    x, values = o.x.requires_grad_(), o.values.requires_grad_()
    y = ops.conv2d(x, values, o.topology, case.geometry, impl=impl)
    runs = [torch.autograd.grad(y, (x, values), dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((o.x, o.values, dy), before, strict=True))


@pytest.mark.parametrize("case", CASES_64, ids=str)
def test_opcheck(case):
    o = floats(case, torch.float32)
    parts = conv_library.conv_parts(o.topology, case.geometry, *case.size)
    x, values, bias, dy = (t.requires_grad_() for t in (o.x, o.values, o.bias, o.dy))
    for name, args in (
        ("conv2d", (x, values, bias)),
        ("conv2d_dgrad", (dy, values)),
        ("conv2d_wgrad", (dy, x)),
        ("conv2d_backward", (dy, x, values)),
    ):
        op = getattr(torch.ops.sparsekern, name).default
        torch.library.opcheck(op, (*args, *parts, "cpu"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_as_one_graph_for_changing_sizes(layout):
    o, g = operands(SMALL), SMALL.geometry
    values = o.topology.clear_padding_(o.values).requires_grad_()

    def loss(x):
        return ops.conv2d(x, values, o.topology, g).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 6, 5, 4), (3, 6, 8, 9)):
        x = integers(*size).contiguous(memory_format=layout).requires_grad_()
        found, wanted = (torch.autograd.grad(f(x), (x, values)) for f in (compiled, loss))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "dense"])
def test_flops_are_counted_for_every_product(impl):
    o, g = operands(SMALL), SMALL.geometry
    x, values = o.x.requires_grad_(), o.values.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.conv2d(x, values, o.topology, g, impl=impl).sum().backward()
    pixels = SMALL.batch * o.dy.shape[2] * o.dy.shape[3]
    weights = values.numel() if impl == "cpu" else o.weight.numel()
    assert counter.get_total_flops() == 3 * 2 * pixels * weights


def test_the_flops_of_a_dense_convolution_are_those_that_torch_counts():
    o, g = operands(SMALL), SMALL.geometry
    counts = []
    for run in (
        lambda: ops.conv2d(o.x, o.values, o.topology, g, impl="dense"),
        lambda: F.conv2d(o.x, o.weight, None, g.stride, g.padding, g.dilation, g.groups),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_nothing_of_the_size_of_an_unfolded_image_is_made(impl):
    case = ConvCase(ConvGeometry((3, 3), padding=(1, 1)), 32, 32, (12, 12), (16, 16), "contiguous")
    o = operands(case._replace(batch=8))
    x, values = o.x.requires_grad_(), o.topology.clear_padding_(o.values).requires_grad_()
    with AllocationTracer() as tracer:
        y = ops.conv2d(x, values, o.topology, case.geometry, impl=impl)
        torch.autograd.grad(y, (x, values), torch.ones_like(y))
    # the padded image is the largest: (12 + 2)^2 pixels instead of 12^2
    assert tracer.largest <= o.x.numel() * 14 * 14 // (12 * 12), tracer.at


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("groups", [1, 3])
def test_grow_scores_are_norms_of_the_summed_dense_gradient(norm, groups):
    case = SMALL._replace(geometry=ConvGeometry((3, 2), groups=groups), block=(2, 2), outputs=17)
    pairs = [operands(case), operands(case)]
    t, g = pairs[0].topology, case.geometry
    full = Topology.random(t.shape, t.block, sparsity=0, groups=t.groups, taps=t.taps)
    gradient = sum(reference(case, o._replace(topology=full))[2] for o in pairs)
    wanted = ops.block_norm(gradient, norm)
    inactive = full.nnzb - t.nnzb
    dys, xs = [o.dy for o in pairs], [o.x for o in pairs]
    found = ops.conv2d_grow_scores(dys, xs, t, g, inactive, norm=norm)
    at = t.positions()
    assert torch.equal(found.active, wanted[at])
    assert torch.equal(found.scores, wanted[found.positions])
    assert torch.cat([at, found.positions]).sort().values.tolist() == list(range(full.nnzb))
    best = ops.conv2d_grow_scores(dys, xs, t, g, 3, norm=norm).scores
    assert torch.equal(best.sort().values, found.scores.sort().values[-3:])


BAD = [
    ({"x": torch.ones(2, 5, 5, 4)}, ShapeError, r"`x` must have shape \(N, 6, height, width\)"),
    ({"x": torch.ones(6, 5, 4)}, ShapeError, r"`x` must have shape \(N, 6"),
    ({"x": torch.ones(2, 6, 5, 4).double()}, DtypeError, "`x` must have dtype torch.float32"),
    ({"x": torch.ones(2, 6, 5, 4, device="meta")}, DeviceError, "`x` must be on cpu; got meta"),
    ({"x": torch.ones(2, 6, 0, 4)}, ShapeError, "at least as large as the dilated kernel, 3 along"),
    ({"values": torch.ones(3, 2, 2)}, ShapeError, "`values` must have shape"),
    ({"bias": torch.ones(7)}, ShapeError, r"`bias` must have shape \(..., 10\)"),
    ({"geometry": ConvGeometry((3, 3))}, ShapeError, "must have 1 groups and 9 taps"),
    ({"impl": "tritn"}, ConfigError, "`impl` must be None or one of"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD, ids=lambda v: str(v)[:30])
def test_bad_arguments_are_named(change, error, text):
    o = operands(SMALL)
    good = {"x": o.x, "values": o.values, "topology": o.topology, "geometry": SMALL.geometry}
    with pytest.raises(error, match=text):
        ops.conv2d(**good | change)


def test_gradient_operators_check_sizes_too():
    o, g = operands(SMALL), SMALL.geometry
    with pytest.raises(ShapeError, match=r"`dy` must have shape \(2, 10, 3, 3\) for an input of 6"):
        ops.conv2d_dgrad(o.dy, o.values, o.topology, g, size=(6, 5))
    with pytest.raises(ShapeError, match=r"`dy` must have shape \(2, 10, 3, 2\)"):
        ops.conv2d_wgrad(o.dy[:1], o.x, o.topology, g)
    with pytest.raises(ShapeError, match="one group and one tap"):
        ops.spmm(torch.ones(2, 27), o.values, o.topology)
    with pytest.raises(ConfigError, match="`k` must not be negative"):
        ops.conv2d_grow_scores(o.dy, o.x, o.topology, g, -1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kernel": (0, 1)}, ConfigError, "`kernel` must be at least 1"),
        ({"kernel": (3,)}, DtypeError, "`kernel` must be a pair of ints"),
        ({"kernel": (3, 3), "padding": (-1, 0)}, ConfigError, "`padding` must be at least 0"),
        ({"kernel": (3, 3), "stride": (1.0, 1)}, DtypeError, "`stride` must be a pair of ints"),
        ({"kernel": (3, 3), "groups": 0}, ConfigError, "`groups` must be at least 1"),
    ],
)
def test_a_geometry_checks_itself(arguments, error, text):
    with pytest.raises(error, match=text):
        ConvGeometry(**arguments)
