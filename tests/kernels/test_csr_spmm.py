"""`csr_spmm` and `csr_spmm_t` against the exact and the a-priori oracle."""

import pytest
import torch
from kernel_cases import (
    CSR_CASES,
    DTYPES,
    Case,
    assert_exact,
    assert_loads_are_filled,
    assert_within_bound,
    block_values,
    ids,
    numbers,
    pattern,
    spmm_oracle,
    table,
)

from sparsekern.kernels import csr_spmm as module
from sparsekern.kernels import launch
from sparsekern.kernels.csr_spmm import csr_spmm, csr_spmm_t


def setup_case(case, dtype, exact=True):
    p = pattern(case.N, case.K, (1, 1), case.kind)
    values = block_values(p, dtype, 1, exact)
    x = numbers((case.M, case.K), dtype, 2, case.layout, exact)
    dy = numbers((case.M, case.N), dtype, 3, case.layout, exact)
    bias = numbers((1, case.N), dtype, 4, "strided", exact)[0] if case.bias else None
    return p, values, p.dense(values), x, dy, bias


@pytest.mark.parametrize(("case", "dtype"), table(CSR_CASES), ids=ids)
def test_forward_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, values, w, x, _, bias = setup_case(case, dtype)
    y = csr_spmm(x, values, *p.forward, bias, case.N)
    assert_exact(y, spmm_oracle(x, w, bias), dtype)


@pytest.mark.parametrize(("case", "dtype"), table(CSR_CASES), ids=ids)
def test_transposed_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, values, w, _, dy, _ = setup_case(case, dtype)
    dx = csr_spmm_t(dy, values, *p.transposed, case.K)
    assert_exact(dx, spmm_oracle(dy, w.t()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "random", "holes"])
def test_floats_within_bound(kind, dtype):
    dtype = DTYPES[dtype]
    case = Case((1, 1), 41, 37, 61, kind)
    p, values, w, x, dy, bias = setup_case(case, dtype, exact=False)
    y = csr_spmm(x, values, *p.forward, bias, case.N)
    assert_within_bound(y, spmm_oracle(x, w, bias), dtype)
    dx = csr_spmm_t(dy, values, *p.transposed, case.K)
    assert_within_bound(dx, spmm_oracle(dy, w.t()), dtype)


def test_chunks_of_tokens_change_nothing(monkeypatch):
    case = Case((1, 1), 300, 21, 33)
    p, values, _, x, _, bias = setup_case(case, torch.float32, exact=False)
    whole = csr_spmm(x, values, *p.forward, bias, case.N)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 1)
    assert launch.token_chunk(case.K, 128) == 128
    assert torch.equal(csr_spmm(x, values, *p.forward, bias, case.N), whole)


def test_rows_do_not_depend_on_their_number():
    case = Case((1, 1), 130, 21, 33)
    p, values, _, x, _, bias = setup_case(case, torch.float32, exact=False)
    whole = csr_spmm(x, values, *p.forward, bias, case.N)
    for m in (1, 31, 129):
        assert torch.equal(csr_spmm(x[:m], values, *p.forward, bias, case.N), whole[:m])


def test_inputs_are_left_alone_and_runs_agree():
    p, values, _, x, dy, bias = setup_case(Case((1, 1), 33, 21, 35), torch.float32, exact=False)
    inputs = (x, dy, values, bias, p.crow, p.col, p.ccol, p.row, p.perm)
    before = [a.clone() for a in inputs]
    runs = [
        (
            csr_spmm(x, values, *p.forward, bias, p.rows),
            csr_spmm_t(dy, values, *p.transposed, p.cols),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracles_can_fail(check):
    p, values, w, x, _, bias = setup_case(Case((1, 1), 9, 9, 30), torch.float32)
    y, want = csr_spmm(x, values, *p.forward, bias, 9).cpu(), spmm_oracle(x, w, bias)
    check(y, want, torch.float32)
    for fault in (y.t().contiguous(), y.flip(0), y[1:], y.half(), y * 0, y / 0):
        with pytest.raises(AssertionError):
            check(fault, want, torch.float32)
