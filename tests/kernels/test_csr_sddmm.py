"""`csr_sddmm` against the exact and the a-priori oracle."""

import pytest
import torch
from kernel_cases import (
    CSR_CASES,
    DEVICE,
    DTYPES,
    Case,
    assert_exact,
    assert_loads_are_filled,
    assert_within_bound,
    block_values,
    from_block_mask,
    ids,
    numbers,
    pattern,
    sddmm_oracle,
    table,
)

from sparsekern.kernels import csr_sddmm as module
from sparsekern.kernels import launch
from sparsekern.kernels.csr_sddmm import csr_sddmm


def setup_case(case, dtype, exact=True):
    p = pattern(case.N, case.K, (1, 1), case.kind)
    # another layout for each side: neither stride may stand in for the other's
    other = {"row": "col", "col": "strided", "strided": "row"}.get(case.layout, "row")
    dy = numbers((case.M, case.N), dtype, 3, case.layout, exact)
    x = numbers((case.M, case.K), dtype, 2, other, exact)
    return p, dy, x


@pytest.mark.parametrize(("case", "dtype"), table(CSR_CASES), ids=ids)
def test_exact(case, dtype):
    dtype = DTYPES[dtype]
    p, dy, x = setup_case(case, dtype)
    assert_exact(csr_sddmm(dy, x, p.crow, p.col), sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize("layout", ["one-row", "one-col"])
def test_expanded_x(layout):
    p = pattern(20, 30, (1, 1), "random")
    dy, x = numbers((9, 20), torch.float32, 1), numbers((9, 30), torch.float32, 2, layout)
    assert 0 in x.stride()
    assert_exact(csr_sddmm(dy, x, p.crow, p.col), sddmm_oracle(dy, x, p), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "random", "holes"])
def test_floats_within_bound(kind, dtype):
    dtype = DTYPES[dtype]
    p, dy, x = setup_case(Case((1, 1), 300, 21, 43, kind), dtype, exact=False)
    assert_within_bound(csr_sddmm(dy, x, p.crow, p.col), sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2100])
def test_tokens_summed_in_parts(dtype, tokens, monkeypatch):
    dtype = DTYPES[dtype]
    p, dy, x = setup_case(Case((1, 1), tokens, 5, 40, "random", "col"), dtype)
    assert launch.splits("sm90", 6, tokens // 128) > 1
    want = sddmm_oracle(dy, x, p)
    assert_exact(csr_sddmm(dy, x, p.crow, p.col), want, dtype)
    # and in chunks of 128 tokens, the last one ragged
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 1)
    assert_exact(csr_sddmm(dy, x, p.crow, p.col), want, dtype)


def test_partial_sums_do_not_grow_with_the_batch(monkeypatch):
    p = pattern(3, 400, (1, 1), "full")
    dy, x = torch.ones(900, 3, device=DEVICE), torch.ones(900, 400, device=DEVICE)
    monkeypatch.setattr(launch, "CHUNK_ELEMENTS", 1)  # chunks of 128 tokens: eight of them
    made = []
    real = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, **kw: made.append(torch.Size(size).numel()) or real(self, *size, **kw),
    )
    dw = csr_sddmm(dy, x, p.crow, p.col)
    assert_exact(dw, sddmm_oracle(dy, x, p), torch.float32)
    assert max(made) == p.col.numel()


@pytest.mark.parametrize("held", [torch.float64, *DTYPES.values()], ids=str)
def test_dw_is_added_to_out(held):
    p, dy, x = setup_case(Case((1, 1), 150, 9, 20), torch.float16)
    out = block_values(p, held, 7)
    want = sddmm_oracle(dy, x, p).value + out.double().cpu()
    assert csr_sddmm(dy, x, p.crow, p.col, out=out) is out
    assert_exact(out, want, held)


def test_groups_of_a_row():
    # rows of every length around a group of 32 entries, an empty one among them
    lengths = (0, 1, 31, 32, 33, 64, 65, 0, 100)
    mask = torch.arange(100) < torch.tensor(lengths)[:, None]
    p = from_block_mask(*mask.shape, (1, 1), mask)
    dy, x = numbers((7, p.rows), torch.float32, 1), numbers((7, p.cols), torch.float32, 2)
    assert_exact(csr_sddmm(dy, x, p.crow, p.col), sddmm_oracle(dy, x, p), torch.float32)


def test_inputs_are_left_alone_and_runs_agree():
    p, dy, x = setup_case(Case((1, 1), 300, 17, 29), torch.float32, exact=False)
    before = dy.clone(), x.clone()
    runs = [csr_sddmm(dy, x, p.crow, p.col) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(dy, before[0])
    assert torch.equal(x, before[1])


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


@pytest.mark.parametrize("check", [assert_exact, assert_within_bound])
def test_the_oracles_can_fail(check):
    p, dy, x = setup_case(Case((1, 1), 9, 13, 20), torch.float32)
    dw, want = csr_sddmm(dy, x, p.crow, p.col).cpu(), sddmm_oracle(dy, x, p)
    check(dw, want, torch.float32)
    for fault in (dw.flip(0), dw[1:], dw.half(), dw * 0, dw + 1):
        with pytest.raises(AssertionError):
            check(fault, want, torch.float32)
