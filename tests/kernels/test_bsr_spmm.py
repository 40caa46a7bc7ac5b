"""`bsr_spmm` and `bsr_spmm_t` against the exact and the a-priori oracle."""

import pytest
import torch
from kernel_cases import (
    BSR_BLOCKS,
    BSR_CASES,
    DTYPES,
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

from sparsekern.kernels import bsr_spmm as module
from sparsekern.kernels.bsr_spmm import bsr_spmm, bsr_spmm_t


def setup_case(case, dtype, exact=True, padding=0.0):
    p = pattern(case.N, case.K, case.block, case.kind)
    values = block_values(p, dtype, 1, exact, padding)
    x = numbers((case.M, case.K), dtype, 2, case.layout, exact)
    dy = numbers((case.M, case.N), dtype, 3, case.layout, exact)
    bias = numbers((1, case.N), dtype, 4, "strided", exact)[0] if case.bias else None
    return p, values, p.dense(values), x, dy, bias


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_forward_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, values, w, x, _, bias = setup_case(case, dtype)
    y = bsr_spmm(x, values, *p.forward, bias, case.N)
    assert_exact(y, spmm_oracle(x, w, bias), dtype)


@pytest.mark.parametrize(("case", "dtype"), table(BSR_CASES), ids=ids)
def test_transposed_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, values, w, _, dy, _ = setup_case(case, dtype)
    dx = bsr_spmm_t(dy, values, *p.transposed, case.K)
    assert_exact(dx, spmm_oracle(dy, w.t()), dtype)


@pytest.mark.parametrize("block", BSR_BLOCKS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_within_bound(block, dtype):
    dtype = DTYPES[dtype]
    case = BSR_CASES[0]._replace(
        block=block, M=19, N=2 * block[0] + 3, K=3 * block[1] + 5, kind="random"
    )
    p, values, w, x, dy, bias = setup_case(case, dtype, exact=False)
    y = bsr_spmm(x, values, *p.forward, bias, case.N)
    assert_within_bound(y, spmm_oracle(x, w, bias), dtype)
    dx = bsr_spmm_t(dy, values, *p.transposed, case.K)
    assert_within_bound(dx, spmm_oracle(dy, w.t()), dtype)


@pytest.mark.parametrize("block", BSR_BLOCKS, ids=ids)
def test_padding_of_values_is_never_used(block):
    case = BSR_CASES[0]._replace(
        block=block, M=5, N=2 * block[0] - 3, K=2 * block[1] - 5, kind="full"
    )
    p, poisoned, _, x, dy, bias = setup_case(case, torch.float32, padding=float("nan"))
    w = p.dense(poisoned)
    assert poisoned.isnan().any()
    y = bsr_spmm(x, poisoned, *p.forward, bias, case.N)
    assert_exact(y, spmm_oracle(x, w, bias), torch.float32)
    dx = bsr_spmm_t(dy, poisoned, *p.transposed, case.K)
    assert_exact(dx, spmm_oracle(dy, w.t()), torch.float32)


@pytest.mark.parametrize("layout", ["aligned", "row", "col"])
@pytest.mark.parametrize("width", [72, 71, 80])
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128)], ids=ids)
def test_any_width_and_stride(block, width, layout, monkeypatch):
    # rows of whole loads are read as they lie, others in a copy: NaN beyond them is never met
    copies = []
    made = module.aligned_rows
    monkeypatch.setattr(module, "aligned_rows", lambda x: copies.append(x) or made(x))
    for dtype in ("fp32", "bf16"):
        case = BSR_CASES[0]._replace(block=block, M=21, N=width, K=width, layout=layout)
        p, values, w, x, dy, bias = setup_case(case, DTYPES[dtype], padding=float("nan"))
        y = bsr_spmm(x, values, *p.forward, bias, width)
        assert_exact(y, spmm_oracle(x, w, bias), DTYPES[dtype])
        dx = bsr_spmm_t(dy, values, *p.transposed, width)
        assert_exact(dx, spmm_oracle(dy, w.t()), DTYPES[dtype])
    assert len(copies) == (0 if layout == "aligned" and width % 8 == 0 else 4)


def test_rows_do_not_depend_on_their_number():
    case = BSR_CASES[0]._replace(block=(32, 32), M=130, N=33, K=60, kind="random")
    p, values, _, x, _, bias = setup_case(case, torch.float32, exact=False)
    whole = bsr_spmm(x, values, *p.forward, bias, case.N)
    for m in (1, 31, 129):
        assert torch.equal(bsr_spmm(x[:m], values, *p.forward, bias, case.N), whole[:m])


def test_inputs_are_left_alone_and_runs_agree():
    case = BSR_CASES[0]._replace(block=(16, 32), M=33, N=70, K=90, kind="random")
    p, values, _, x, dy, bias = setup_case(case, torch.float32, exact=False)
    inputs = (x, dy, values, bias, p.crow, p.col, p.ccol, p.row, p.perm)
    before = [a.clone() for a in inputs]
    runs = [
        (
            bsr_spmm(x, values, *p.forward, bias, case.N),
            bsr_spmm_t(dy, values, *p.transposed, case.K),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


FAULTS = {
    "one element": lambda y: y.index_put((torch.tensor(3), torch.tensor(4)), y[3, 4] + 1),
    "nan": lambda y: y.index_put((torch.tensor(0), torch.tensor(0)), y[0, 0] * float("nan")),
    "row lost": lambda y: torch.cat([y[:-1], torch.zeros_like(y[:1])]),
    "shape": lambda y: y[:-1],
    "dtype": lambda y: y.double(),
    "scale": lambda y: y * (1 + 2**-7),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracles_can_fail(check, fault):
    case = BSR_CASES[0]._replace(block=(16, 16), M=9, N=33, K=50, kind="random")
    p, values, w, x, _, bias = setup_case(case, torch.float32)
    y, want = bsr_spmm(x, values, *p.forward, bias, case.N).cpu(), spmm_oracle(x, w, bias)
    check(y, want, torch.float32)
    with pytest.raises(AssertionError):
        check(FAULTS[fault](y), want, torch.float32)


def test_the_bound_sees_a_truncated_cast():
    case = BSR_CASES[0]._replace(block=(16, 16), M=40, N=64, K=64, kind="full")
    _, _, w, x, _, bias = setup_case(case, torch.bfloat16, exact=False)
    want = spmm_oracle(x, w, bias)
    cut = (want.value.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError):
        assert_within_bound(cut, want, torch.bfloat16)
