"""`bsr_grow` against the exact and the a-priori oracle."""

import pytest
import torch
from kernel_cases import (
    BSR_BLOCKS,
    DTYPES,
    assert_loads_are_filled,
    ids,
    numbers,
)

from sparsekern.kernels import bsr_grow as module
from sparsekern.kernels.bsr_grow import NORMS, bsr_grow


def norms(tiles, norm):
    """Norm over the last two dimensions."""
    if norm == "l2":
        return tiles.square().sum((-2, -1))
    return tiles.abs().amax((-2, -1)) if norm == "max" else tiles.abs().sum((-2, -1))


def oracle(dy, x, block, norm):
    """Block norms of the dense gradient in float64, padding zero."""
    dense = dy.double().cpu().t() @ x.double().cpu()
    bh, bw = block
    pad = (0, -dense.shape[1] % bw, 0, -dense.shape[0] % bh)
    dense = torch.nn.functional.pad(dense, pad)
    tiles = dense.view(dense.shape[0] // bh, bh, dense.shape[1] // bw, bw)
    return norms(tiles.transpose(1, 2), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", BSR_BLOCKS, ids=ids)
@pytest.mark.parametrize("layout", ["aligned", "row", "strided"])
def test_exact(block, norm, layout):
    # whole tiles, ragged tiles, more than one tile each way; squares of small sums stay exact
    for m, n, k in ((5, 130, 270), (37, block[0], 3 * block[1] + 1)):
        dy = numbers((m, n), torch.float16, 1, layout)
        x = numbers((m, k), torch.float16, 2, layout)
        got = bsr_grow(dy, x, block, norm)
        assert got.dtype == torch.float32
        assert torch.equal(got.cpu().double(), oracle(dy, x, block, norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["aligned", "col", "one-row", "one-col"])
def test_every_dtype_and_layout(dtype, layout):
    dy = numbers((70, 48), DTYPES[dtype], 1, layout)
    x = numbers((70, 96), DTYPES[dtype], 2, "aligned")
    for norm in ("l1", "max"):
        assert torch.equal(bsr_grow(dy, x, (16, 32), norm).cpu(), oracle(dy, x, (16, 32), norm))


@pytest.mark.parametrize("norm", NORMS)
def test_floats_within_bound(norm):
    dy = numbers((50, 40), torch.float32, 1, exact=False)
    x = numbers((50, 70), torch.float32, 2, exact=False)
    got, want = bsr_grow(dy, x, (16, 32), norm).cpu().double(), oracle(dy, x, (16, 32), norm)
    # each entry g errs by at most e = gamma |dy||x|; a norm of it by as much, and by its own sum
    u = 2.0**-23
    entry = 50 * u * (dy.double().abs().t() @ x.double().abs())
    pad = torch.nn.functional.pad(entry, (0, 26, 0, 8)).view(3, 16, 3, 32).transpose(1, 2)
    exact = dy.double().t() @ x.double()
    tiles = torch.nn.functional.pad(exact, (0, 26, 0, 8)).view(3, 16, 3, 32).transpose(1, 2)
    moved = pad * (2 * tiles.abs() + pad) if norm == "l2" else pad
    error = moved.amax((-2, -1)) if norm == "max" else moved.sum((-2, -1))
    terms = 16 * 32 + 1  # entries of a block, and the rounding of each
    assert ((got - want).abs() <= error + terms * u * (want + error)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # numpy's
def test_what_is_not_finite_shows_and_stays_in_its_blocks(norm, bad):
    dy = numbers((9, 48), torch.float32, 1)
    x = numbers((9, 64), torch.float32, 2)
    dy[4, 20] = bad
    scores = bsr_grow(dy, x, (16, 16), norm).cpu()
    assert not scores[1].isfinite().any()
    assert scores[[0, 2]].isfinite().all()


def test_empty_sizes():
    for m, n, k in ((0, 32, 48), (4, 0, 48), (4, 32, 0)):
        dy, x = torch.zeros(m, n), torch.zeros(m, k)
        got = bsr_grow(dy, x, (16, 16))
        assert got.shape == (-(-n // 16), -(-k // 16))
        assert (got == 0).all()


def test_inputs_are_left_alone_and_runs_agree():
    dy, x = (numbers((33, n), torch.float32, n, exact=False) for n in (40, 90))
    before = dy.clone(), x.clone()
    runs = [bsr_grow(dy, x, (16, 32)) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(dy, before[0])
    assert torch.equal(x, before[1])


def test_masked_loads_are_filled():
    assert_loads_are_filled(module)


def test_the_oracle_can_fail():
    dy, x = numbers((5, 32), torch.float32, 1), numbers((5, 48), torch.float32, 2)
    want = oracle(dy, x, (16, 16), "l1")
    for wrong in (dy.flip(1), dy * 2, dy[:, :31]):
        got = bsr_grow(wrong, x, (16, 16)).double().cpu()
        assert not torch.equal(got, want)
