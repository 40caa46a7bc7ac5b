"""`csr_conv2d`, `csr_conv2d_dgrad` and `csr_conv2d_wgrad` against both oracles."""

import pytest
import torch
from conv_problems import (
    CSR_CASES,
    PLAIN,
    ConvCase,
    assert_format,
    conv_oracle,
    dgrad_oracle,
    operands,
    table,
    wgrad_oracle,
    window,
)
from kernel_cases import DTYPES, assert_exact, assert_loads_are_filled, assert_within_bound, ids

from sparsekern.kernels import csr_conv2d as forward_module
from sparsekern.kernels import csr_conv2d_wgrad as wgrad_module
from sparsekern.kernels import launch
from sparsekern.kernels.csr_conv2d import csr_conv2d, csr_conv2d_dgrad
from sparsekern.kernels.csr_conv2d_wgrad import csr_conv2d_wgrad


def forward(case, o):
    return csr_conv2d(o.x, o.values, *o.pattern.forward, o.bias, case.n_out, case.window)


def dgrad(case, o, **more):
    sizes = case.n_in, case.size, case.window
    return csr_conv2d_dgrad(o.dy, o.values, *o.pattern.transposed, *sizes, **more)


def wgrad(case, o):
    return csr_conv2d_wgrad(o.dy, o.x, *o.pattern.forward[:2], case.window)


def check_all(case, o, dtype, check=assert_exact):
    y, dx, dw = forward(case, o), dgrad(case, o), wgrad(case, o)
    assert_format(y, o.x)
    assert_format(dx, o.dy)
    check(y.contiguous(), conv_oracle(o.x, o.weight, o.bias, case.window), dtype)
    check(dx.contiguous(), dgrad_oracle(o.dy, o.weight, case.x_shape, case.window), dtype)
    check(dw, wgrad_oracle(o.dy, o.x, o.pattern), dtype)


@pytest.mark.parametrize(("case", "dtype"), table(CSR_CASES), ids=ids)
def test_exact(case, dtype):
    check_all(case, operands(case, DTYPES[dtype]), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_floats_within_bound(dtype, layout):
    case = ConvCase((1, 1), 9, 8, (6, 7), window(3, 2, 1), 3, "random", layout)
    o = operands(case, DTYPES[dtype], exact=False)
    check_all(case, o, DTYPES[dtype], assert_within_bound)


@pytest.mark.parametrize("layout", ["nhwc", "channels", "nchw"])
def test_images_are_copied_a_few_at_a_time(layout, monkeypatch):
    case = ConvCase((1, 1), 5, 4, (5, 4), window(3, 2, 1), 5, "random", layout)
    o = operands(case, torch.float16)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 2 * (o.x[0].numel() + o.dy[0].numel()) + 3)
    check_all(case, o, torch.float16)


@pytest.mark.parametrize("size", [(1, 29), (3, 3), (20, 20)])
def test_pixels_summed_in_parts(size):
    batch = -(-2100 // (size[0] * size[1]))
    case = ConvCase((1, 1), 2, 3, size, PLAIN, batch, "full", "nchw")
    o = operands(case, torch.float32)
    assert_exact(wgrad(case, o), wgrad_oracle(o.dy, o.x, o.pattern), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf times zero
def test_an_infinite_channel_reaches_only_what_is_connected_to_it():
    case = ConvCase((1, 1), 8, 6, (4, 4), window(3, 1, 1, groups=2), bias=False)
    o = operands(case, torch.float32)
    o.x[:, 0] = o.dy[:, 0] = float("inf")
    used = o.pattern.mask[0, :, :, 0].any(1)  # output channels of group 0 that see channel 0
    assert forward(case, o)[:, :4][:, ~used].isfinite().all()
    assert forward(case, o)[:, 4:].isfinite().all()
    used = o.pattern.mask[0, 0].any(0)  # input channels that output channel 0 sees
    assert dgrad(case, o)[:, :3][:, ~used].isfinite().all()
    assert dgrad(case, o)[:, 3:].isfinite().all()


def test_an_image_does_not_depend_on_the_images_with_it():
    case = ConvCase((1, 1), 7, 5, (7, 6), PLAIN, batch=5)
    o = operands(case, torch.float32, exact=False)
    y, dx = forward(case, o), dgrad(case, o)
    for part in (slice(0, 1), slice(1, 3), slice(4, 5)):
        some = o._replace(x=o.x[part], dy=o.dy[part])
        assert torch.equal(forward(case, some), y[part])
        assert torch.equal(dgrad(case, some), dx[part])


@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_input_gradient(wanted):
    case = ConvCase((1, 1), 5, 4, (5, 4), PLAIN)
    o = operands(case, torch.float32)
    dx = dgrad(case, o, memory_format=wanted)
    assert dx.is_contiguous(memory_format=wanted)
    want = dgrad_oracle(o.dy, o.weight, case.x_shape, case.window)
    assert_exact(dx.contiguous(), want, torch.float32)


def test_inputs_are_left_alone_and_runs_agree():
    case = ConvCase((1, 1), 7, 6, (9, 9), window(3, 2, 1), 4)
    o = operands(case, torch.float32, exact=False)
    inputs = (o.x, o.dy, o.values, o.bias, *o.pattern.forward, *o.pattern.transposed)
    before = [a.clone() for a in inputs]
    runs = [(forward(case, o), dgrad(case, o), wgrad(case, o)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("module", [forward_module, wgrad_module])
def test_masked_loads_are_filled(module):
    assert_loads_are_filled(module)
