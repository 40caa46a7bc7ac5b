"""`bsr_conv2d` and `bsr_conv2d_dgrad` against the exact and the a-priori oracle."""

import pytest
import torch
from conv_problems import (
    BSR_CASES,
    DEVICE,
    GEOMETRIES,
    PLAIN,
    ConvCase,
    assert_format,
    conv_oracle,
    conv_pattern,
    dgrad_oracle,
    operands,
    table,
    window,
)
from kernel_cases import DTYPES, assert_exact, assert_loads_are_filled, assert_within_bound, ids

from sparsekern.kernels import bsr_conv2d as module
from sparsekern.kernels import bsr_conv2d_dgrad as backward_module
from sparsekern.kernels import launch
from sparsekern.kernels.bsr_conv2d import bsr_conv2d
from sparsekern.kernels.bsr_conv2d_dgrad import bsr_conv2d_dgrad
from sparsekern.topology import Topology


def forward(case, o):
    return bsr_conv2d(o.x, o.values, *o.pattern.forward, o.bias, case.n_out, case.window)


def dgrad(case, o, **more):
    sizes = case.n_in, case.size, case.window
    return bsr_conv2d_dgrad(o.dy, o.values, *o.pattern.transposed, *sizes, **more)


def check_forward(case, o, dtype, check=assert_exact):
    y = forward(case, o)
    assert_format(y, o.x)
    check(y.contiguous(), conv_oracle(o.x, o.weight, o.bias, case.window), dtype)


def check_dgrad(case, o, dtype, check=assert_exact):
    dx = dgrad(case, o)
    assert_format(dx, o.dy)
    check(dx.contiguous(), dgrad_oracle(o.dy, o.weight, case.x_shape, case.window), dtype)


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_forward_exact(case, dtype):
    check_forward(case, operands(case, DTYPES[dtype]), DTYPES[dtype])


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_dgrad_exact(case, dtype):
    check_dgrad(case, operands(case, DTYPES[dtype]), DTYPES[dtype])


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (64, 64)], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_within_bound(block, dtype):
    case = ConvCase(block, block[0] + 3, block[1] + 5, (4, 5), window(3, 2, 1), bias=True)
    o = operands(case, DTYPES[dtype], exact=False)
    check_forward(case, o, DTYPES[dtype], assert_within_bound)
    check_dgrad(case, o, DTYPES[dtype], assert_within_bound)


@pytest.mark.parametrize("block", [(16, 16), (16, 64), (128, 32)], ids=ids)
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_of_values_is_never_used(block, groups):
    n_out, n_in = groups * (block[0] - 3), groups * (block[1] + 1)
    case = ConvCase(block, n_out, n_in, (3, 4), window(3, 1, 1, groups=groups), kind="full")
    o = operands(case, torch.float32, padding=float("nan"))
    assert o.values.isnan().any()
    check_forward(case, o, torch.float32)
    check_dgrad(case, o, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf times zero
def test_a_channel_of_another_group_is_never_read():
    case = ConvCase((16, 16), 40, 40, (4, 4), window(3, 1, 1, groups=2), kind="full", bias=False)
    o = operands(case, torch.float32)
    o.x[:, 20:] = o.dy[:, 20:] = float("inf")
    assert forward(case, o)[:, :20].isfinite().all()
    assert dgrad(case, o)[:, :20].isfinite().all()


def test_an_image_does_not_depend_on_the_images_with_it():
    case = ConvCase((32, 32), 33, 60, (7, 6), PLAIN, batch=5)
    o = operands(case, torch.float32, exact=False)
    y, dx = forward(case, o), dgrad(case, o)
    for part in (slice(0, 1), slice(1, 3), slice(4, 5)):
        some = o._replace(x=o.x[part], dy=o.dy[part])
        assert torch.equal(forward(case, some), y[part])
        assert torch.equal(dgrad(case, some), dx[part])


@pytest.mark.parametrize("layout", ["nchw", "strided"])
def test_images_are_copied_a_few_at_a_time(layout, monkeypatch):
    case = ConvCase((16, 16), 20, 18, (5, 4), window(3, 2, 1), 5, "random", layout)
    o = operands(case, torch.float32)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 2 * (o.x[0].numel() + o.dy[0].numel()) + 3)
    check_forward(case, o, torch.float32)
    check_dgrad(case, o._replace(dy=o.dy.contiguous()), torch.float32)


@pytest.mark.parametrize("dy_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_input_gradient(dy_layout, wanted):
    case = ConvCase((16, 16), 20, 18, (5, 4), PLAIN)
    o = operands(case, torch.float32)
    o = o._replace(dy=o.dy.contiguous(memory_format=dy_layout))
    dx = dgrad(case, o, memory_format=wanted)
    assert dx.is_contiguous(memory_format=wanted)
    want = dgrad_oracle(o.dy, o.weight, case.x_shape, case.window)
    assert_exact(dx.contiguous(), want, torch.float32)


def test_inputs_are_left_alone_and_runs_agree():
    case = ConvCase((16, 32), 40, 50, (5, 6), window(3, 2, 1), kind="random")
    o = operands(case, torch.float32, exact=False)
    inputs = (o.x, o.dy, o.values, o.bias, *o.pattern.forward, *o.pattern.transposed)
    before = [a.clone() for a in inputs]
    runs = [(forward(case, o), dgrad(case, o)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_order_of_programs_changes_no_bit():
    if torch.cuda.is_available():
        pytest.skip("a GPU chooses the order of programs itself")
    import sanitizer

    case = ConvCase((16, 16), 40, 50, (7, 8), window(3, 2, 1), 3)
    o = operands(case, torch.float32, exact=False)
    first = forward(case, o), dgrad(case, o)
    for seed in (1, 2, 3):
        with sanitizer.order(seed):
            again = forward(case, o), dgrad(case, o)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (1, 1)], ids=ids)
def test_topology_has_the_same_index_arrays(block, groups):
    n_out, n_in = groups * (2 * block[0] + 1), groups * (3 * block[1] + 2)
    p = conv_pattern(n_out, n_in, block, window((3, 2), groups=groups))
    positions = p.mask.reshape(-1).nonzero()[:, 0]
    shape = n_out, 6 * n_in // groups
    t = Topology.from_positions(positions, shape, block, groups=groups, taps=6).to(DEVICE)
    mine = (*p.forward, *p.transposed)
    theirs = (t.crow, t.col, t.row_order, t.ccol, t.row, t.perm)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_table_meets_every_geometry():
    seen = {(c.window, c.block == (16, 16)) for c in BSR_CASES}
    assert {(w, True) for w, _, _ in GEOMETRIES} <= seen


@pytest.mark.parametrize("kernels", [module, backward_module])
def test_masked_loads_are_filled(kernels):
    assert_loads_are_filled(kernels)


FAULTS = {
    "one element": lambda y: y.index_put(tuple(torch.tensor([1, 2, 3, 0])), y[1, 2, 3, 0] + 1),
    "shifted": lambda y: y.roll(1, 3),
    "images swapped": lambda y: y.flip(0),
    "shape": lambda y: y[:-1],
    "dtype": lambda y: y.double(),
    "scale": lambda y: y * (1 + 2**-7),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracle_can_fail(check, fault):
    case = ConvCase((16, 16), 9, 17, (4, 5), PLAIN, kind="random")
    o = operands(case, torch.float32)
    y, want = forward(case, o).cpu().contiguous(), conv_oracle(o.x, o.weight, o.bias, case.window)
    check(y, want, torch.float32)
    with pytest.raises(AssertionError):
        check(FAULTS[fault](y).contiguous(), want, torch.float32)
