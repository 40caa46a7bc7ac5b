"""Small scope in full, and what no program order and no number of tokens may change.

All 682 patterns of 1 to 3 by 1 to 3 blocks, ragged at both edges, on integers: `y`, `dx`, `dw` and
the scores to grow by equal float64 products in every bit.
"""

import inspect
import itertools

import pytest
import torch
from kernel_cases import DEVICE, DTYPES

from sparsekern import ops
from sparsekern.topology import Topology

BLOCK, TOKENS = 16, 5
CUT = (3, 7)  # rows and columns that the last blocks lack, unless they are the only ones
SHAPES = tuple(itertools.product((1, 2, 3), repeat=2))
PATTERNS = tuple((r, c, bits) for r, c in SHAPES for bits in range(2 ** (r * c)))
SHARES = 22
NORMS = {
    "l1": lambda blocks: blocks.abs().sum((2, 3)),
    "l2": lambda blocks: blocks.square().sum((2, 3)),
    "max": lambda blocks: blocks.abs().amax((2, 3)),
}
# an older signature takes no implementation
GROW_IMPL = {"impl": "triton"} if "impl" in inspect.signature(ops.grow_scores).parameters else {}


def integers(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=g).float()


def in_blocks(dense, r, c):
    """(r, c, BLOCK, BLOCK) blocks of a matrix, zero beyond its edges."""
    full = torch.zeros(r * BLOCK, c * BLOCK, dtype=dense.dtype)
    full[: dense.shape[0], : dense.shape[1]] = dense
    return full.view(r, BLOCK, c, BLOCK).transpose(1, 2)


def topology_of(mask, shape, block):
    positions = mask.flatten().nonzero()[:, 0]
    return Topology.from_positions(positions, shape, block).to(DEVICE)


def oracle(dense, x, dy, mask, norm, k):
    """y, dx, dw, block scores and the k best inactive positions, in float64."""
    r, c = mask.shape
    w = (
        dense.double()
        * mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[
            : dense.shape[0], : dense.shape[1]
        ]
    )
    gradient = in_blocks(dy.double().t() @ x.double(), r, c)
    scores = NORMS[norm](gradient)
    inactive = (~mask).flatten().nonzero()[:, 0].tolist()
    best = sorted(inactive, key=lambda at: (-scores.flatten()[at].item(), at))[:k]
    return x.double() @ w.t(), dy.double() @ w, gradient[mask], scores, sorted(best)


def assert_equal(got, want, what):
    got = got.cpu()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    wrong = (got.double() != want).nonzero()
    assert not len(wrong), (
        f"{what}: {len(wrong)} of {want.numel()} wrong, first {wrong[0].tolist()}"
    )


def check_pattern(number, r, c, bits):
    mask = torch.tensor([bits >> i & 1 for i in range(r * c)], dtype=torch.bool).view(r, c)
    shape = tuple(n * BLOCK - (cut if n > 1 else 0) for n, cut in zip((r, c), CUT, strict=True))
    topology = topology_of(mask, shape, BLOCK)
    dense = integers(*shape, seed=number)
    x, dy = (integers(TOKENS, n, seed=number + 1) for n in reversed(shape))
    norm, k = list(NORMS)[number % 3], number % 4
    y, dx, dw, scores, best = oracle(dense, x, dy, mask, norm, k)
    values = in_blocks(dense, r, c)[mask].to(DEVICE)
    x, dy = x.to(DEVICE), dy.to(DEVICE)
    what = f"blocks {mask.int().tolist()}"
    assert_equal(ops.spmm(x, values, topology, impl="triton"), y, f"y, {what}")
    assert_equal(ops.spmm_t(dy, values, topology, impl="triton"), dx, f"dx, {what}")
    assert_equal(ops.sddmm(dy, x, topology, impl="triton"), dw, f"dw, {what}")
    grown = ops.grow_scores(dy, x, topology, k, norm=norm, **GROW_IMPL)
    what = f"{norm} of {what}"
    assert_equal(grown.active, scores[mask], f"active, {what}")
    assert grown.positions.tolist() == best, f"positions, {what}"
    assert_equal(grown.scores, scores.flatten()[best], f"scores, {what}")


def test_the_enumeration_is_complete():
    assert len(PATTERNS) == len(set(PATTERNS)) == 682


@pytest.mark.parametrize("share", range(SHARES))
def test_every_small_pattern(share):
    for number in range(share, len(PATTERNS), SHARES):
        check_pattern(number, *PATTERNS[number])


# (block, dtype, rows, columns): with and without descriptors, which need aligned sizes
PROBLEMS = {
    "csr": (1, "fp32", 19, 23),
    "b16": (16, "fp32", 45, 53),
    "b16-half": (16, "fp16", 45, 53),
    "b32x64": ((32, 64), "bf16", 90, 130),
    "b64-aligned": (64, "fp16", 192, 256),
}


def problem(name, tokens):
    """A random topology, its values, and activations that are no integers."""
    block, dtype, rows, cols = PROBLEMS[name]
    g = torch.Generator().manual_seed(7)
    topology = Topology.random((rows, cols), block, sparsity=0.5, generator=g)
    sizes = (tokens, rows), (tokens, cols), (rows, cols)
    dy, x, w = (torch.randn(s, generator=g).to(DTYPES[dtype]) for s in sizes)
    return topology.to(DEVICE), topology.pack(w).to(DEVICE), dy.to(DEVICE), x.to(DEVICE)


def products(topology, values, dy, x):
    """Everything that the kernels make of a problem."""
    grown = ops.grow_scores(dy, x, topology, 5, norm="l2", **GROW_IMPL)
    return {
        "y": ops.spmm(x, values, topology, impl="triton"),
        "dx": ops.spmm_t(dy, values, topology, impl="triton"),
        "dw": ops.sddmm(dy, x, topology, impl="triton"),
        "active": grown.active,
        "grown": grown.scores,
        "positions": grown.positions,
    }


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU chooses the order of programs itself")
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_order_of_programs_changes_no_bit(name):
    import sanitizer

    inputs = problem(name, 150)
    first = products(*inputs)
    for seed in range(1, 9):
        with sanitizer.order(seed):
            again = products(*inputs)
        for what, want in first.items():
            assert torch.equal(again[what], want), f"{what} differs in order {seed}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_row_does_not_depend_on_the_rows_with_it(name):
    topology, values, dy, x = problem(name, 130)
    y = ops.spmm(x, values, topology, impl="triton")
    dx = ops.spmm_t(dy, values, topology, impl="triton")
    for m in (1, 2, 15, 16, 17, 33, 64, 65, 129):
        part = slice(130 - m, 130)
        got = ops.spmm(x[part], values, topology, impl="triton")
        assert torch.equal(got, y[part]), f"y of the last {m} tokens"
        got = ops.spmm_t(dy[part].clone(), values, topology, impl="triton")
        assert torch.equal(got, dx[part]), f"dx of the last {m} tokens"
