"""`bsr_sddmm` against the exact and the a-priori oracle."""

import pytest
import torch
from kernel_cases import (
    BSR_BLOCKS,
    BSR_CASES,
    DTYPES,
    Case,
    assert_exact,
    assert_loads_are_filled,
    assert_within_bound,
    ids,
    numbers,
    pattern,
    sddmm_oracle,
    table,
)

from sparsekern.kernels import bsr_sddmm as module
from sparsekern.kernels import launch
from sparsekern.kernels.bsr_sddmm import bsr_sddmm
from sparsekern.kernels.tables import find


def setup_case(case, dtype, exact=True):
    p = pattern(case.N, case.K, case.block, case.kind)
    # another layout for each side: neither stride may stand in for the other's
    other = {"row": "col", "col": "strided", "strided": "row"}.get(case.layout, "row")
    dy = numbers((case.M, case.N), dtype, 3, case.layout, exact)
    x = numbers((case.M, case.K), dtype, 2, other, exact)
    return p, dy, x


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, dy, x = setup_case(case, dtype)
    dw = bsr_sddmm(dy, x, p.crow, p.col, case.block)
    assert_exact(dw, sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize("layout", ["one-row", "one-col"])
def test_expanded_x(layout):
    p = pattern(40, 70, (16, 32), "random")
    dy, x = numbers((9, 40), torch.float32, 1), numbers((9, 70), torch.float32, 2, layout)
    assert 0 in x.stride()
    assert_exact(bsr_sddmm(dy, x, p.crow, p.col, p.block), sddmm_oracle(dy, x, p), torch.float32)


@pytest.mark.parametrize("block", BSR_BLOCKS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_within_bound(block, dtype):
    dtype = DTYPES[dtype]
    case = Case(block, 67, 2 * block[0] + 3, 3 * block[1] + 5, "random")
    p, dy, x = setup_case(case, dtype, exact=False)
    dw = bsr_sddmm(dy, x, p.crow, p.col, block)
    assert_within_bound(dw, sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ragged", [0, 1, 5])
def test_tokens_summed_in_parts(dtype, ragged, monkeypatch):
    monkeypatch.setattr(launch, "START_BYTES", 0)
    dtype = DTYPES[dtype]
    tile, _ = find("sm90", "sddmm", launch.compute_kind(dtype), 64, "any", tma=False)
    assert launch.parts_of_sum(torch.device("cpu"), 2, 17, 40960, 3 << 12) > 1
    tokens = 17 * tile.BM - ragged
    case = Case((64, 64), tokens, 70, 90, "random", "col")
    p, dy, x = setup_case(case, dtype)
    dw = bsr_sddmm(dy, x, p.crow, p.col, case.block)
    assert_exact(dw, sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize("per_row", [1, 7, 8, 9, 17])
def test_groups_of_a_row(per_row):
    # rows of any length against groups of 4 or 8 blocks, empty rows between
    p = pattern(16 * 5, 16 * per_row, (16, 16), "full").keep_rows(slice(0, None, 2))
    for dtype in (torch.float32, torch.float16):
        dy, x = numbers((3, p.rows), dtype, 1), numbers((3, p.cols), dtype, 2)
        assert_exact(bsr_sddmm(dy, x, p.crow, p.col, p.block), sddmm_oracle(dy, x, p), dtype)


def test_rows_beyond_those_that_are_counted_at_once():
    p = pattern(16 * 1030, 40, (16, 16), "full")
    p = p.keep_rows(torch.tensor([0, 3, 511, 512, 513, 1024, 1029]))
    dy, x = numbers((3, p.rows), torch.float32, 1), numbers((3, p.cols), torch.float32, 2)
    assert_exact(bsr_sddmm(dy, x, p.crow, p.col, p.block), sddmm_oracle(dy, x, p), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf times zero
def test_padding_is_zero_even_next_to_infinity():
    p = pattern(17, 19, (16, 16), "full")
    dy, x = numbers((4, 17), torch.float32, 1), numbers((4, 19), torch.float32, 2)
    dy[:], x[:] = float("inf"), float("nan")
    dw = bsr_sddmm(dy, x, p.crow, p.col, p.block).cpu()
    assert dw[p.inside()].isnan().all()
    assert (dw[~p.inside()] == 0).all()


def test_inputs_are_left_alone_and_runs_agree():
    p, dy, x = setup_case(Case((32, 16), 300, 70, 90), torch.float32, exact=False)
    before = dy.clone(), x.clone()
    runs = [bsr_sddmm(dy, x, p.crow, p.col, p.block) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(dy, before[0])
    assert torch.equal(x, before[1])


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracles_can_fail(check):
    p, dy, x = setup_case(Case((16, 16), 9, 33, 50), torch.float32)
    dw, want = bsr_sddmm(dy, x, p.crow, p.col, p.block).cpu(), sddmm_oracle(dy, x, p)
    check(dw, want, torch.float32)
    for fault in (dw.transpose(1, 2).contiguous(), dw.flip(0), dw[1:], dw.half(), dw * 0):
        with pytest.raises(AssertionError):
            check(fault, want, torch.float32)


def test_supported_blocks():
    edges = (16, 32, 64, 128)
    assert launch.supported((1, 1))
    assert all(launch.supported((a, b)) for a in edges for b in edges)
    assert not any(map(launch.supported, [(8, 8), (1, 16), (16, 1), (48, 48), (256, 64)]))
