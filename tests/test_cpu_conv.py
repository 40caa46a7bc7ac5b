import importlib
import itertools
import random
import threading
import tracemalloc

import pytest
import torch
from support import UNIT_ROUNDOFF, AllocationTracer, assert_within, integer_values, integers
from torch.nn import functional

from sparsekern.errors import ShapeError
from sparsekern.ops.cpu import backend, conv, unfold
from sparsekern.ops.cpu import choice as cpu_choice
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of
from sparsekern.topology import Topology

NAMES = ("jit", "blas", "csr") if cpu_choice.has_numba() else ("blas", "csr")
KERNELS = [(1, 1), (2, 2), (3, 3), (5, 5), (1, 3), (3, 1)]
STRIDES = [(1, 1), (2, 2), (3, 3), (2, 1)]
PADDINGS = [(0, 0), (1, 1), (2, 2), (0, 3)]
DILATIONS = [(1, 1), (2, 2), (1, 3)]
BLOCKS = [(1, 1), (4, 4), (16, 16), (32, 32), (16, 32), (8, 16), (3, 5), (1, 16)]
SIZES = [(1, 1), (7, 9), (1, 12), (6, 1), (14, 14), (5, 35)]
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _cases():
    """Every value of every choice many times, in random company."""
    draw = random.Random(0)
    choices = (KERNELS, STRIDES, PADDINGS, DILATIONS, SIZES, BLOCKS, (1, 1, 2, 3), LAYOUTS, LAYOUTS)
    found = []
    while len(found) < 240:
        kernel, stride, padding, dilation, size, *rest = (draw.choice(c) for c in choices)
        g = ConvGeometry(kernel, stride, padding, dilation, rest[1])
        try:
            g.output_size(*size)
        except ShapeError:
            continue
        n = draw.choice((0, 1, 2, 5))
        dtype = draw.choices(DTYPES, (6, 2, 1, 1))[0]
        found.append((g, size, rest[0], rest[2], rest[3], n, dtype))
    return found


CASES = _cases()
POINTWISE = [
    (ConvGeometry((1, 1), groups=groups), size, block, a, b, 3, torch.float32)
    for groups, size, block, (a, b) in itertools.product(
        (1, 2), ((4, 5), (1, 1)), ((1, 1), (4, 4), (32, 32)), itertools.product(LAYOUTS, repeat=2)
    )
]
# a BLAS call per block and a chunk per group are slow: those run a share of the cases
RUNS = [
    (case, name)
    for i, case in enumerate(CASES + POINTWISE)
    for name in NAMES
    if name == "jit" or (i % 4 == (name == "csr") and (name == "csr" or min(case[2]) >= 4))
]


def case_id(case):
    if isinstance(case, str):
        return case
    g, size, block, layout, dy_layout, n, dtype = case
    parts = [g.kernel, g.stride, g.padding, g.dilation, size, block]
    text = "-".join(f"{a}x{b}" for a, b in parts)
    return f"{text}-g{g.groups}-n{n}-{layout}-{dy_layout}-{str(dtype)[6:]}"


@pytest.fixture(autouse=True)
def _fine_grained(monkeypatch):
    # tiny cases are otherwise one chunk on one thread
    if "jit" in NAMES:
        jit = importlib.import_module("sparsekern.ops.cpu.jit.conv_plan")
        monkeypatch.setattr(jit, "GRAIN", 1)
        monkeypatch.setattr(jit, "BYTES", 1 << 13)
    monkeypatch.setattr(importlib.import_module("sparsekern.ops.cpu.unfold"), "ELEMENTS", 4096)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def image(shape, layout, dtype=torch.float32, make=integers):
    n, c, h, w = shape
    if layout == "channels_last":
        return make(n, c, h, w).to(dtype).to(memory_format=torch.channels_last)
    if layout == "sliced":
        return make(n, c + 2, 2 * h, w + 3).to(dtype)[:, 1:-1, ::2, 2:-1]
    if layout == "expanded":
        return make(1, 1, 1, 1).to(dtype).expand(n, c, h, w)
    return make(n, c, h, w).to(dtype)


def draw(g, block, sparsity=0.6, extra=(3, 2), seed=0):
    """A topology with ragged channels, `extra` more per group than two blocks hold."""
    outs, ins = (edge + (edge > 1) * more for edge, more in zip(block, extra, strict=True))
    outs, ins = (10, 6) if block == (1, 1) else (outs, ins)
    generator = torch.Generator().manual_seed(seed)
    return Topology.random(
        (outs * g.groups, ins * g.taps),
        block,
        sparsity=sparsity,
        groups=g.groups,
        taps=g.taps,
        generator=generator,
    )


def inputs_of(t):
    return t.shape[1] // t.taps * t.groups


def homes(t):
    """Slot, and rows and columns in the matrix, of each block: from the definition."""
    (bh, bw), outs, ins = t.block, t.shape[0] // t.groups, t.shape[1] // t.taps
    rows, columns = t.block_rows // t.groups, t.block_cols // t.taps
    slot = 0
    for r, count in enumerate(t.crow.diff().tolist()):
        for c in t.col[slot : slot + count].tolist():
            i, j = r % rows * bh, c % columns * bw
            top, left = r // rows * outs, c // columns * ins
            home = (
                slice(top + i, top + min(i + bh, outs)),
                slice(left + j, left + min(j + bw, ins)),
            )
            yield slot, home
            slot += 1


def dense(t, values, g):
    """float64 weight (C_out, C_in / groups, kh, kw)."""
    full = torch.zeros(t.shape, dtype=torch.float64)
    for slot, home in homes(t):
        part = full[home]
        part.copy_(values[slot, : part.shape[0], : part.shape[1]])
    return full.view(t.shape[0], *g.kernel, -1).permute(0, 3, 1, 2)


def sampled(t, gradient):
    """Active blocks of a dense weight gradient, zero in the padding."""
    matrix = gradient.permute(0, 2, 3, 1).reshape(t.shape)
    out = torch.zeros(t.values_shape, dtype=gradient.dtype)
    for slot, home in homes(t):
        part = matrix[home]
        out[slot, : part.shape[0], : part.shape[1]] = part
    return out


def expected(x, dy, values, t, g, bias):
    """y, dx, dw of torch's dense convolution in float64."""
    wide = x.double().contiguous().requires_grad_()
    w = dense(t, values, g).requires_grad_()
    b = None if bias is None else bias.double()
    y = functional.conv2d(wide, w, b, g.stride, g.padding, g.dilation, g.groups)
    if not y.numel():
        return y, torch.zeros_like(wide), torch.zeros(t.values_shape, dtype=torch.float64)
    dx, dw = torch.autograd.grad(y, (wide, w), dy.double().contiguous())
    return y.detach(), dx, sampled(t, dw)


def products(x, dy, values, t, g, bias=None):
    dx, dw = backend.conv2d_backward(dy, x, values, t, g)
    size = (x.shape[2], x.shape[3])
    return (
        backend.conv2d(x, values, t, g, bias),
        dx,
        dw,
        backend.conv2d_dgrad(dy, values, t, g, size=size),
        backend.conv2d_wgrad(dy, x, t, g),
    )


def problem(case):
    g, size, block, layout, dy_layout, n, dtype = case
    t = draw(g, block)
    x = image((n, inputs_of(t), *size), layout, dtype)
    dy = image((n, t.shape[0], *g.output_size(*size)), dy_layout, dtype)
    values = t.clear_padding_(integers(*t.values_shape).to(dtype))
    bias = integers(t.shape[0]).to(dtype) if n % 2 else None
    return x, dy, values, t, g, bias


@pytest.mark.parametrize(("case", "name"), RUNS, ids=case_id)
def test_exact_on_integers(case, name):
    x, dy, values, t, g, bias = problem(case)
    kept = [a.clone() for a in (x, dy, values)]
    with cpu_choice.force(name):
        y, dx, dw, dx2, dw2 = products(x, dy, values, t, g, bias)
    for got, want in zip((y, dx, dw), expected(x, dy, values, t, g, bias), strict=True):
        assert torch.equal(got, want.to(x.dtype))
    assert torch.equal(dx, dx2)
    assert torch.equal(dw, dw2)
    for out, like in ((y, x), (dx, x), (dx2, dy)):
        assert out.dtype == x.dtype
        assert out.is_contiguous(memory_format=format_of(like))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, dy, values), strict=True))


# a BLAS call per block is slow with small blocks
MANY = [
    (block, name)
    for block in ((1, 1), (4, 4), (16, 16), (8, 32))
    for name in NAMES
    if name == "jit" or (name == "blas") == (min(block) >= 8)
]


@pytest.mark.parametrize(("block", "name"), MANY)
def test_many_images_and_channels_in_several_chunks(block, name, monkeypatch):
    if name == "jit":
        job = importlib.import_module("sparsekern.ops.cpu.jit.conv_plan")
        monkeypatch.setattr(job, "BYTES", 1 << 17)
    else:
        monkeypatch.undo()
    g = ConvGeometry((3, 3), padding=(1, 1))
    t = Topology.random((72, 9 * 40), block, sparsity=0.8, taps=9)
    x, dy = integers(5, 40, 12, 13), integers(5, 72, 12, 13)
    values = t.clear_padding_(integers(*t.values_shape))
    with cpu_choice.force(name):
        y, dx, dw, *_ = products(x, dy, values, t, g)
    for got, want in zip((y, dx, dw), expected(x, dy, values, t, g, None), strict=True):
        assert torch.equal(got, want.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_no_active_block(block, name):
    g = ConvGeometry((3, 3), padding=(1, 1))
    nothing = torch.zeros(0, dtype=torch.int64)
    t = Topology.from_positions(nothing, (20, 9 * 18), block, taps=9)
    values, bias = torch.zeros(t.values_shape), integers(20)
    with cpu_choice.force(name):
        y, dx, dw, *_ = products(integers(2, 18, 5, 5), integers(2, 20, 5, 5), values, t, g, bias)
    assert torch.equal(y, bias.view(1, 20, 1, 1).expand(2, 20, 5, 5))
    assert torch.equal(dx, torch.zeros(2, 18, 5, 5))
    assert dw.shape == t.values_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [(4, 4), (16, 16), (1, 1)])
def test_within_the_a_priori_bound(block, name, dtype):
    g = ConvGeometry((3, 3), (2, 1), (1, 2), (1, 2), 2)
    t = draw(g, block, 0.3)
    make = torch.randn
    x = image((3, inputs_of(t), 9, 11), "contiguous", dtype, make)
    dy = image((3, t.shape[0], *g.output_size(9, 11)), "contiguous", dtype, make)
    values = t.clear_padding_(torch.randn(t.values_shape).to(dtype))
    with cpu_choice.force(name):
        got = products(x, dy, values, t, g)[:3]
    exact = expected(x, dy, values, t, g, None)
    spread = expected(x.abs(), dy.abs(), values.abs(), t, g, None)
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    terms = (t.shape[1], t.taps * t.shape[0] // 2, pixels)
    for one, want, size, count in zip(got, exact, spread, terms, strict=True):
        # gamma_K times the sum of magnitudes, then one rounding to the output
        unit = count * UNIT_ROUNDOFF[torch.float32]
        error = unit / (1 - unit) * size
        assert_within(one, want, error + UNIT_ROUNDOFF[dtype] * (want.abs() + error))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [(4, 4), (8, 16), (32, 32), (3, 5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_garbage_in_the_padding_of_values_is_never_read(groups, block, name):
    g = ConvGeometry((3, 3), padding=(1, 1), groups=groups)
    t = draw(g, block, 0.0)
    clean = t.clear_padding_(integers(*t.values_shape))
    inside = t.clear_padding_(torch.ones(t.values_shape))
    dirty = torch.where(inside != 0, clean, float("nan"))
    x, dy = integers(2, inputs_of(t), 5, 6), integers(2, t.shape[0], 5, 6)
    with cpu_choice.force(name):
        for a, b in zip(products(x, dy, clean, t, g), products(x, dy, dirty, t, g), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16), (32, 32)])
@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
def test_same_bits_again_and_for_any_number_of_threads(block):
    g = ConvGeometry((3, 3), (2, 2), (1, 1))
    t = Topology.random((64, 9 * 48), block, sparsity=0.7, taps=9)
    x, dy = torch.randn(9, 48, 13, 10), torch.randn(9, 64, 7, 5)
    values = t.clear_padding_(torch.randn(t.values_shape))
    outs = []
    for threads in (1, 1, 2, 3, 2):
        torch.set_num_threads(threads)
        with cpu_choice.force("jit"):
            outs.append(products(x, dy, values, t, g))
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
def test_one_large_image_is_cut_and_one_small_one_is_shared():
    torch.set_num_threads(3)
    g = ConvGeometry((5, 5), padding=(2, 2))
    for size in ((60, 70), (4, 4)):
        t = Topology.random((48, 25 * 32), (16, 16), sparsity=0.5, taps=25)
        x, dy = integers(1, 32, *size), integers(1, 48, *size)
        values = integers(*t.values_shape)
        with cpu_choice.force("jit"):
            got = products(x, dy, values, t, g)
        for a, b in zip(got, expected(x, dy, values, t, g, None), strict=False):
            assert torch.equal(a, b.float())


@pytest.mark.parametrize(("block", "name"), [c for c in MANY if c[0] in {(1, 1), (16, 16)}])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_of_the_size_of_an_unfolded_image_is_held(block, layout, name, monkeypatch):
    monkeypatch.undo()  # chunks as they are in use
    torch.set_num_threads(1)  # the tracer sees one thread
    g = ConvGeometry((3, 3), padding=(1, 1))
    t = Topology.random((64, 9 * 64), block, sparsity=0.95, taps=9)
    x, dy = image((8, 64, 32, 32), layout), image((8, 64, 32, 32), layout)
    values = integers(*t.values_shape)
    with cpu_choice.force(name):
        products(x, dy, values, t, g)  # compiled, caches filled
        with AllocationTracer() as tracer:
            products(x, dy, values, t, g)
        tracemalloc.start()
        products(x, dy, values, t, g)
        peak = tracemalloc.get_traced_memory()[1]  # numpy reports its arrays there
        tracemalloc.stop()
    assert tracer.largest <= x.numel(), tracer.at
    assert peak < x.nbytes // 4


@pytest.mark.parametrize("name", NAMES)
def test_callers_in_several_threads(name):
    g = ConvGeometry((3, 3), padding=(1, 1))
    t = draw(g, (16, 16), 0.2)
    x, dy = integers(4, inputs_of(t), 8, 8), integers(4, t.shape[0], 8, 8)
    values = t.clear_padding_(integers(*t.values_shape))
    with cpu_choice.force(name):
        want = products(x, dy, values, t, g)
    wrong = []

    def call():
        with cpu_choice.force(name):
            for _ in range(5):
                got = products(x, dy, values, t, g)
                wrong.extend(a for a, b in zip(got, want, strict=True) if not torch.equal(a, b))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for step in (threading.Thread.start, threading.Thread.join):
        for caller in callers:
            step(caller)
    assert not wrong


@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
def test_neighbours_share_their_padding():
    line = importlib.import_module("sparsekern.ops.cpu.jit.conv_line").Line
    plain = line.of(8, (14, 14), ConvGeometry((3, 3), padding=(1, 1)))
    assert plain.length == 8 * 15 * 15
    assert plain.reach == 2 * 15 + 2
    halved = line.of(8, (14, 14), ConvGeometry((3, 3), (2, 2), (1, 1)))
    assert (halved.phases, halved.length) == (4, 8 * 8 * 8)
    # one tap per pixel read: the other phases are not copied
    assert line.of(8, (14, 14), ConvGeometry((1, 1), (2, 2))).phases == 1


def test_far_apart_taps_are_unfolded_in_bounded_windows(monkeypatch):
    """What the compiled path holds grows with the distance of the outermost taps."""
    t = Topology.random((512, 9 * 512), 16, sparsity=0.99, taps=9)
    image = torch.empty(1, 512, 64, 64)
    near, far = (ConvGeometry((3, 3), (1, 1), (d, d), (d, d)) for d in (1, 24))
    run = [conv.plan(t, g, image)[0] for g in (near, far)]
    jit = cpu_choice.has_numba()
    assert isinstance(run[0], unfold.Products) != jit
    assert isinstance(run[1], unfold.Products)

    monkeypatch.setattr(conv, "SPAN_BYTES", 0)
    for block in (1, 16):
        small = Topology.random((40, 9 * 20), block, sparsity=0.5, taps=9)
        values = integer_values(small)
        x, dy = integers(2, 20, 9, 8), integers(2, 40, 9, 8)
        g = ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2))
        weight = small.unpack(values).view(40, 3, 3, 20).permute(0, 3, 1, 2).contiguous()
        weight.requires_grad_()
        leaf = x.clone().requires_grad_()
        y = functional.conv2d(leaf, weight, None, 1, 2, 2)
        dx, dw = torch.autograd.grad(y, (leaf, weight), dy)
        assert torch.equal(backend.conv2d(x, values, small, g, None), y)
        found = backend.conv2d_backward(dy, x, values, small, g)
        assert torch.equal(found[0], dx)
        assert torch.equal(found[1], small.pack(dw.permute(0, 2, 3, 1).reshape(small.shape)))
