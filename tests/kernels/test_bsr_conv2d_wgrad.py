"""`bsr_conv2d_wgrad` against the exact and the a-priori oracle."""

import pytest
import torch
from conv_problems import BSR_CASES, PLAIN, ConvCase, operands, table, wgrad_oracle, window
from kernel_cases import DTYPES, assert_exact, assert_loads_are_filled, assert_within_bound, ids

from sparsekern.kernels import bsr_conv2d_wgrad as module
from sparsekern.kernels import launch
from sparsekern.kernels.bsr_conv2d_wgrad import bsr_conv2d_wgrad


def wgrad(case, o):
    return bsr_conv2d_wgrad(o.dy, o.x, *o.pattern.forward[:2], case.block, case.window)


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_exact(case, dtype):
    o = operands(case, DTYPES[dtype])
    assert_exact(wgrad(case, o), wgrad_oracle(o.dy, o.x, o.pattern), DTYPES[dtype])


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (64, 64)], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_within_bound(block, dtype):
    case = ConvCase(block, block[0] + 3, block[1] + 5, (6, 7), window(3, 2, 1), 3)
    o = operands(case, DTYPES[dtype], exact=False)
    assert_within_bound(wgrad(case, o), wgrad_oracle(o.dy, o.x, o.pattern), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 29), (3, 3), (16, 16)])
def test_pixels_summed_in_parts(dtype, size, monkeypatch):
    monkeypatch.setattr(launch, "START_BYTES", 0)
    # tiles of more and of fewer pixels than an image has
    batch = -(-1100 // (size[0] * size[1]))
    case = ConvCase((16, 16), 20, 18, size, PLAIN, batch)
    o = operands(case, DTYPES[dtype])
    assert_exact(wgrad(case, o), wgrad_oracle(o.dy, o.x, o.pattern), DTYPES[dtype])


@pytest.mark.parametrize("layout", ["nchw", "strided", "nhwc"])
def test_images_are_copied_a_few_at_a_time(layout, monkeypatch):
    case = ConvCase((16, 16), 20, 18, (5, 4), window(3, 2, 1), 5, "random", layout)
    o = operands(case, torch.float16)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 2 * (o.x[0].numel() + o.dy[0].numel()) + 3)
    assert_exact(wgrad(case, o), wgrad_oracle(o.dy, o.x, o.pattern), torch.float16)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf times zero
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_is_zero_even_next_to_infinity(groups):
    w = window(3, 1, 1, groups=groups)
    case = ConvCase((16, 16), 17 * groups, 19 * groups, (3, 4), w, kind="full")
    o = operands(case, torch.float32)
    o.dy[:], o.x[:] = float("inf"), float("nan")
    dw, inside = wgrad(case, o).cpu(), o.pattern.inside()
    assert dw[inside].isnan().all()
    assert (dw[~inside] == 0).all()


def test_inputs_are_left_alone_and_runs_agree():
    case = ConvCase((32, 16), 70, 40, (9, 9), PLAIN, 6)
    o = operands(case, torch.float32, exact=False)
    before = o.dy.clone(), o.x.clone()
    runs = [wgrad(case, o) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(o.dy, before[0])
    assert torch.equal(o.x, before[1])


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracle_can_fail(check):
    case = ConvCase((16, 16), 20, 40, (4, 5), PLAIN)
    o = operands(case, torch.float32)
    dw, want = wgrad(case, o).cpu(), wgrad_oracle(o.dy, o.x, o.pattern)
    check(dw, want, torch.float32)
    for fault in (dw.transpose(1, 2).contiguous(), dw.flip(0), dw[1:], dw.half(), dw * 0):
        with pytest.raises(AssertionError):
            check(fault, want, torch.float32)
