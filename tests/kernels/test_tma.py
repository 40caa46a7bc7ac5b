"""The kernels that load through tensor descriptors: taken where they should be, and exact."""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    assert_exact,
    assert_within_bound,
    block_values,
    ids,
    numbers,
    pattern,
    sddmm_oracle,
    spmm_oracle,
)

from sparsekern.kernels import bsr_sddmm as sddmm_module
from sparsekern.kernels import bsr_spmm as spmm_module
from sparsekern.kernels import launch, tables
from sparsekern.kernels.bsr_sddmm import bsr_sddmm
from sparsekern.kernels.bsr_spmm import bsr_spmm, bsr_spmm_t

BLOCKS = ((64, 64), (128, 128), (64, 128), (128, 64))
# (kind, block rows and columns): the last two have rows, columns long enough for the table's other
# entry
KINDS = (
    ("full", (3, 2)),
    ("random", (3, 4)),
    ("holes", (4, 5)),
    ("diagonal", (3, 4)),
    ("empty", (2, 2)),
    ("full", (2, 9)),
    ("full", (9, 2)),
)
CASES = (
    *(((64, 64), kind, dtype) for kind in KINDS for dtype in ("fp16", "fp32")),
    *((block, KINDS[1], dtype) for block in BLOCKS for dtype in DTYPES),
    ((128, 128), ("full", (1, 5)), "fp16"),
    ((128, 128), ("full", (5, 1)), "bf16"),
)


class Counter:
    """Stands in for a kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def counted(monkeypatch):
    """Counters of the descriptor kernels and of the pointer kernels."""
    found = {}
    for module in (spmm_module, sddmm_module):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            found[name] = Counter(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    # a counter is no JITFunction, which is how the launchers tell the interpreter
    real = launch.is_interpreted
    for module in (spmm_module, sddmm_module):
        monkeypatch.setattr(module, "is_interpreted", lambda k: real(getattr(k, "kernel", k)))
    monkeypatch.setattr(launch, "is_interpreted", lambda k: real(getattr(k, "kernel", k)))
    return lambda: {n: c.launches for n, c in found.items() if c.launches}


@pytest.fixture
def tf32():
    """TF32 products of fp32 allowed: exact on small integers all the same."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def operands(block, kind, dtype, tokens, exact=True, blocks=(3, 4)):
    rows, cols = block[0] * blocks[0], block[1] * blocks[1]
    p = pattern(rows, cols, block, kind)
    values = block_values(p, dtype, 1, exact)
    x = numbers((tokens, cols), dtype, 2, "aligned", exact)
    dy = numbers((tokens, rows), dtype, 3, "aligned", exact)
    return p, values, x, dy, numbers((1, rows), dtype, 4, "strided", exact)[0]


@pytest.mark.parametrize(("block", "kind", "dtype"), CASES, ids=ids)
@pytest.mark.usefixtures("tf32")
def test_exact(block, kind, dtype, counted):
    # more tokens than a tile has, unless the case is large
    kind, blocks = kind
    dtype, tokens = DTYPES[dtype], 130 if max(blocks) < 5 else 37
    p, values, x, dy, bias = operands(block, kind, dtype, tokens, blocks=blocks)
    w = p.dense(values)
    assert_exact(bsr_spmm(x, values, *p.forward, bias, p.rows), spmm_oracle(x, w, bias), dtype)
    if len(values):
        assert counted() == {"_bsr_spmm_tma_kernel": 1}
    assert_exact(bsr_spmm_t(dy, values, *p.transposed, p.cols), spmm_oracle(dy, w.t()), dtype)
    dw = bsr_sddmm(dy, x, p.crow, p.col, block)
    assert_exact(dw, sddmm_oracle(dy, x, p), dtype)
    if len(values):
        assert counted() == {"_bsr_spmm_tma_kernel": 2, "_bsr_sddmm_tma_kernel": 1}


def test_both_row_classes_are_met():
    for way in (1, -1):
        sizes = [blocks[::way] for kind, blocks in KINDS if kind == "full"]
        assert {launch.rows_class(a * b, a, 64) for a, b in sizes} == {"short", "long"}


@pytest.mark.parametrize("swap", [False, True])
def test_orientation_and_group_do_not_change_the_sum(swap):
    p, values, x, dy, bias = operands((64, 64), "random", torch.float16, 200, exact=False)
    results = []
    for group, tokens in ((1, 64), (3, 64), (8, 128)):
        config = tables.SpmmConfig(tokens, 64, group, swap, 4, 3)
        keys = [tables.Key(op, "half", "64", "short", "tma") for op in ("spmm", "spmm_t")]
        with tables.overridden("sm90", dict.fromkeys(keys, config)):
            y = bsr_spmm(x, values, *p.forward, bias, p.rows)
            results.append((y, bsr_spmm_t(dy, values, *p.transposed, p.cols)))
    for y, dx in results:
        assert_within_bound(y, spmm_oracle(x, p.dense(values), bias), torch.float16)
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])  # TF32 rounds operands: another bound
def test_floats_within_bound(dtype):
    dtype = DTYPES[dtype]
    p, values, x, dy, bias = operands((64, 64), "random", dtype, 67, exact=False)
    w = p.dense(values)
    y = bsr_spmm(x, values, *p.forward, bias, p.rows)
    assert_within_bound(y, spmm_oracle(x, w, bias), dtype)
    dx = bsr_spmm_t(dy, values, *p.transposed, p.cols)
    assert_within_bound(dx, spmm_oracle(dy, w.t()), dtype)
    dw = bsr_sddmm(dy, x, p.crow, p.col, (64, 64))
    assert_within_bound(dw, sddmm_oracle(dy, x, p), dtype)


@pytest.mark.parametrize(
    ("layout", "cut"),
    [("row", 0), ("col", 0), ("strided", 0), ("aligned", 1), ("aligned", 8)],
)
def test_what_descriptors_cannot_address_is_copied_or_goes_through_pointers(layout, cut, counted):
    # unaligned rows and strided columns are copied; a last block that is not whole needs a mask
    p = pattern(128, 192 - cut, (64, 64), "full")
    values = block_values(p, torch.float16, 1, padding=float("nan"))
    x = numbers((9, 192 - cut), torch.float16, 2, layout)
    dy = numbers((9, 128), torch.float16, 3, layout)
    y = bsr_spmm(x, values, *p.forward, None, 128)
    assert_exact(y, spmm_oracle(x, p.dense(values)), torch.float16)
    dw = bsr_sddmm(dy, x, p.crow, p.col, (64, 64))
    assert_exact(dw, sddmm_oracle(dy, x, p), torch.float16)
    # dw has no padding to read, so copies in aligned rows are enough for descriptors
    spmm = "_bsr_spmm_kernel" if cut else "_bsr_spmm_tma_kernel"
    assert counted() == {spmm: 1, "_bsr_sddmm_tma_kernel": 1}


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of inf times zero
@pytest.mark.parametrize("tokens", [9, 1100])
def test_padding_is_zero_even_next_to_infinity(tokens, counted):
    p = pattern(100, 150, (64, 64), "full")
    dy, x = (numbers((tokens, n), torch.float16, n) for n in (p.rows, p.cols))
    dy[:], x[:] = float("inf"), float("nan")
    dw = bsr_sddmm(dy, x, p.crow, p.col, p.block).cpu()
    assert counted() == {"_bsr_sddmm_tma_kernel": 1}
    assert dw[p.inside()].isnan().all()
    assert (dw[~p.inside()] == 0).all()


@pytest.mark.parametrize("per_row", [1, 2, 3, 4, 5, 7])
def test_groups_of_a_row(per_row):
    # rows of any length against groups of four, full or half loaded; empty rows between
    p = pattern(64 * 3, 64 * per_row, (64, 64), "full").keep_rows(slice(0, None, 2))
    dy = numbers((70, p.rows), torch.float16, 1, "aligned")
    x = numbers((70, p.cols), torch.float16, 2, "aligned")
    assert_exact(bsr_sddmm(dy, x, p.crow, p.col, p.block), sddmm_oracle(dy, x, p), torch.float16)


@pytest.mark.parametrize("ragged", [0, 1, 70])
def test_tokens_summed_in_parts(ragged):
    tokens = 17 * 64 - ragged
    assert launch.parts_of_sum(torch.device("cpu"), 2, 17, 40960, 3 << 12) > 1
    p, _, x, dy, _ = operands((64, 64), "random", torch.float16, tokens, blocks=(2, 3))
    dw = bsr_sddmm(dy, x, p.crow, p.col, (64, 64))
    assert_exact(dw, sddmm_oracle(dy, x, p), torch.float16)


@pytest.mark.parametrize("tokens", [65, 1100])
@pytest.mark.parametrize("block", [(64, 64), (16, 32)], ids=ids)
@pytest.mark.parametrize("held", DTYPES)
def test_dw_is_added_to_out(held, block, tokens):
    held = DTYPES[held]
    p, _, x, dy, _ = operands(block, "random", torch.float16, tokens, blocks=(2, 3))
    out = block_values(p, held, 7)
    want = sddmm_oracle(dy, x, p).value + out.double().cpu()
    assert bsr_sddmm(dy, x, p.crow, p.col, block, out=out) is out
    assert_exact(out, want, held)


@pytest.mark.parametrize("block", [(64, 64), (32, 16)], ids=ids)
def test_relu_clamps_and_keeps_nan(block):
    p, values, x, _, bias = operands(block, "random", torch.float16, 33)
    x[3, :] = float("nan")
    y = bsr_spmm(x, values, *p.forward, bias, p.rows, relu=True)
    want = spmm_oracle(x, p.dense(values), bias).value.relu().half()
    assert torch.equal(y.cpu().nan_to_num(7), want.nan_to_num(7))
    assert (y == 0).any()
    assert y.isnan().any()
