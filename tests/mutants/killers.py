"""Short problems that a faulty kernel cannot get right, the cheapest first.

Exact ones hold integers, so the answer must be equal in every bit; those of floats must stay inside
the a-priori bound. All go through the public operators, under the sanitizer.
"""

# ruff: noqa: ARG001  (all checks of the table are called alike)
import functools
import inspect
from typing import NamedTuple

import corners
import numpy as np
import sanitizer
import torch
from mutants import conv_killers
from support import UNIT_ROUNDOFF

from sparsekern import ops
from sparsekern.kernels import bsr_sddmm, csr_sddmm, launch
from sparsekern.topology import Topology

GROW_IMPL = {"impl": "triton"} if "impl" in inspect.signature(ops.grow_scores).parameters else {}


class Problem(NamedTuple):
    """Sizes, block, and how the operands lie in memory; `fill` is the share of active blocks.

    "whole" is "plain" with NaN in what lies beyond the matrix.
    """

    block: int | tuple[int, int]
    tokens: int
    rows: int
    cols: int
    dtype: torch.dtype = torch.float32
    layout: str = "row"
    fill: float = 0.6
    exact: bool = True
    relu: bool = False
    norm: str = "l1"
    open_end: bool = False  # last block row and column empty


def laid_out(a, layout):
    """The matrix in another layout, NaN around and between its entries."""
    m, k = a.shape
    if layout in ("plain", "whole"):
        return a.contiguous()
    if layout == "col":
        return laid_out(a.t(), "row").t()
    step = 2 if layout == "strided" else 1
    store = torch.full((step * m + 3, step * k + 5), float("nan"), dtype=a.dtype)
    return store[1 : step * m + 1 : step, 2 : step * k + 2 : step].copy_(a)


class Operands(NamedTuple):
    """What a product takes, and the dense weight in float64."""

    topology: Topology
    values: torch.Tensor
    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    bias: torch.Tensor


@functools.cache
def operands(p):
    """Operands of a problem; each has another layout, so that no stride stands in for another."""
    g = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randint, -3, 4) if p.exact else torch.randn
    b = p.block if isinstance(p.block, tuple) else (p.block, p.block)
    grid = -(-p.rows // b[0]), -(-p.cols // b[1])
    mask = torch.rand(grid, generator=g) < p.fill
    if p.fill > 0:
        mask[-1, -1] = mask[0, 0] = True
    if grid[0] > 2:
        mask[1] = False  # an empty block row
    if p.open_end:
        mask[-1] = mask[:, -1] = False
    topology = Topology.from_positions(mask.flatten().nonzero()[:, 0], (p.rows, p.cols), b)
    sizes = (p.rows, p.cols), (p.tokens, p.cols), (p.tokens, p.rows), (1, p.rows)
    w, x, dy, bias = (draw(s, generator=g).to(p.dtype) for s in sizes)
    values = topology.pack(w)
    if p.exact:
        # what lies beyond the matrix belongs to no weight
        inside = topology.pack(torch.ones_like(w)) == 1
        values = torch.where(inside, values, 0 if p.layout == "plain" else float("nan"))
    mirrored = {"row": "col", "col": "strided", "strided": "row"}.get(p.layout, p.layout)
    weight = topology.unpack(torch.where(values.isnan(), 0, values)).double()
    bias = laid_out(bias, "strided" if p.layout != "plain" else "plain")[0]
    x, dy = laid_out(x, p.layout), laid_out(dy, mirrored)
    return Operands(topology, values, weight, x, dy, bias)


@functools.cache
def want(p, what):
    """(result, sum of magnitudes, terms) in float64."""
    o = operands.__wrapped__(p)  # no mutant has seen these
    x, dy = o.x.double(), o.dy.double()
    if what == "y":
        y, size = x @ o.weight.t() + o.bias.double(), x.abs() @ o.weight.abs().t()
        return y.relu() if p.relu else y, size + o.bias.double().abs(), p.cols + 1
    if what == "dx":
        return dy @ o.weight, dy.abs() @ o.weight.abs(), p.rows
    gradient, size = dy.t() @ x, dy.abs().t() @ x.abs()
    if what == "dw":
        return o.topology.pack(gradient), o.topology.pack(size), p.tokens
    bh, bw = o.topology.block
    grid = torch.zeros(o.topology.block_rows * bh, o.topology.block_cols * bw, dtype=torch.float64)
    grid[: p.rows, : p.cols] = gradient
    blocks = grid.view(-1, bh, o.topology.block_cols, bw)
    return ops.NORMS[p.norm](blocks, (1, 3)), None, None


def got(p, what):
    """What the operator says."""
    o = operands(p)
    if what == "y":
        extra = {"activation": "relu"} if p.relu else {}
        return ops.spmm(o.x, o.values, o.topology, o.bias, impl="triton", **extra)
    if what == "dx":
        return ops.spmm_t(o.dy, o.values, o.topology, impl="triton")
    if what == "dw":
        return ops.sddmm(o.dy, o.x, o.topology, impl="triton")
    inactive = o.topology.block_rows * o.topology.block_cols - o.topology.nnzb
    return ops.grow_scores(o.dy, o.x, o.topology, inactive, norm=p.norm, **GROW_IMPL)


def right(p, what):
    """Whether the operator is right about a problem."""
    result, (value, size, terms) = got(p, what), want(p, what)
    if what == "grow":
        at = operands(p).topology.positions()
        same = torch.equal(result.active.double(), value.flatten()[at])
        return same and torch.equal(result.scores.double(), value.flatten()[result.positions])
    if p.exact:
        return torch.equal(result.double(), value)
    u, out = UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[p.dtype]
    gamma = terms * u / (1 - terms * u) * size
    rounded = 0 if p.dtype == torch.float32 else out * (value.abs() + gamma)
    return bool(((result.double() - value).abs() <= gamma + rounded).all())


def chunked(p, what):
    """The same with the tokens cut into the smallest chunks a launcher knows."""
    before, launch.CHUNK_ELEMENTS = launch.CHUNK_ELEMENTS, 1
    try:
        return right(p, what)
    finally:
        launch.CHUNK_ELEMENTS = before


def added(p, what):
    """The gradient added to what a tensor holds."""
    o = operands(p)
    t = o.topology
    total = t.pack(torch.ones(t.shape))
    expected = want(p, what)[0] + total.double()
    launcher = bsr_sddmm.bsr_sddmm if t.block != (1, 1) else csr_sddmm.csr_sddmm
    sizes = (t.block,) if t.block != (1, 1) else ()
    made = launcher(o.dy, o.x, t.crow, t.col, *sizes, out=total)
    return made is total and torch.equal(total.double(), expected)


def in_parts(p, what, check=right):
    """The same with the tokens cut into parts even where that does not pay."""
    before, launch.START_BYTES = launch.START_BYTES, 0
    try:
        return check(p, what)
    finally:
        launch.START_BYTES = before


def added_in_parts(p, what):
    """Both at once."""
    return in_parts(p, what, added)


def hot(p, what):
    """Infinite gradients: what is zero by decree stays zero, not zero times infinity."""
    o = operands(p)
    x, dy = torch.ones_like(o.x), torch.ones_like(o.dy)
    x[:, -1] = dy[:, -1] = float("inf")
    if what == "grow":
        k = o.topology.block_rows * o.topology.block_cols - o.topology.nnzb
        scores = ops.grow_scores(dy, x, o.topology, k, norm=p.norm, **GROW_IMPL)
        return not scores.active.isnan().any() and not scores.scores.isnan().any()
    dw = ops.sddmm(dy, x, o.topology, impl="triton")
    return torch.equal(dw, o.topology.pack(dy.t() @ x))


def constant(p, what):
    """Sums that fp16 cannot hold."""
    o = operands(p)
    x, dy = torch.full_like(o.x, 3), torch.full_like(o.dy, 3)
    total = 9 * p.tokens
    if what == "grow":
        scores = ops.grow_scores(dy, x, o.topology, 1, norm="max", **GROW_IMPL)
        return bool((scores.active == total).all())
    return bool((ops.sddmm(dy, x, o.topology, impl="triton") == total).any())


def not_finite(p, what):
    """A gradient that is NaN everywhere has no finite score, whatever the norm."""
    o = operands(p)
    dy = torch.full_like(o.dy, float("nan"))
    scores = ops.grow_scores(dy, o.x, o.topology, 1, norm=p.norm, **GROW_IMPL)
    return not scores.active.isfinite().any()


def nothing(p, what):
    """No tokens: a zero gradient of the right shape."""
    o = operands(p)
    if what == "grow":
        scores = ops.grow_scores(o.dy[:0], o.x[:0], o.topology, 1, norm=p.norm, **GROW_IMPL)
        return not scores.active.any()
    dw = ops.sddmm(o.dy[:0], o.x[:0], o.topology, impl="triton")
    return torch.equal(dw, torch.zeros(o.topology.values_shape))


def apart(p, what):
    """An infinite feature reaches only what is connected to it."""
    o = operands(p)
    mask = o.topology.to_mask()
    a = (o.x if what == "y" else o.dy).clone()
    a[:, 0] = float("inf")
    if what == "y":
        made, apart_from = ops.spmm(a, o.values, o.topology, impl="triton"), ~mask[:, 0]
    else:
        made, apart_from = ops.spmm_t(a, o.values, o.topology, impl="triton"), ~mask[0]
    return bool(apart_from.any()) and bool(made[:, apart_from].isfinite().all())


def far(corner, what):
    """An operand of more than 2**31 elements is reached to its end, inside its bounds."""
    return all(reach >= corners.LIMIT for reach in corners.run(corner).values())


LOADS = 2000  # several times what the largest of these launches makes
HALF, FLOATS = torch.float16, {"exact": False, "layout": "plain"}
TINY = Problem(16, 29, 45, 53)
WIDE = Problem((32, 16), 70, 90, 53, layout="col")
TALL = Problem((16, 64), 5, 61, 150, layout="strided")
MANY = Problem(16, 1100, 20, 40, layout="plain")
ALIGNED = Problem(64, 130, 192, 192, HALF, "plain")
LONG = Problem(64, 300, 128, 576, HALF, "plain", 1.0)
BROAD = Problem(128, 70, 256, 256, HALF, "plain")
ROUGH = Problem(16, 33, 40, 300, fill=1.0, **FLOATS)
ROUGH_HALF = Problem(64, 33, 128, 320, HALF, fill=1.0, **FLOATS)
POINT = Problem(16, 1, 16, 16)
CSR = Problem(1, 29, 19, 27)
CSR_WIDE = Problem(1, 130, 37, 21, layout="col")
CSR_ROUGH = Problem(1, 33, 20, 90, fill=1.0, **FLOATS)
PARTS = Problem((16, 32), 290, 33, 40, layout="col")
SHORT_PARTS = Problem(16, 700, 16, 16, layout="plain")
PARTS_TMA = Problem(64, 1100, 64, 64, HALF, "plain")
CSR_PARTS = Problem(1, 2100, 3, 40, layout="col")
FULL = Problem(16, 29, 45, 300, fill=1.0, layout="strided")
SHIFTED = Problem(64, 20, 128, 128, HALF)  # descriptors would fit but for the first address
ENDED = Problem(16, 5, 48, 48, open_end=True)
ENDED_TMA = Problem(64, 5, 192, 192, HALF, "plain", open_end=True)
GATHERED = Problem(16, 9, 90, 120, HALF)  # blocks of a row, four at a time, not all there
OBLONG = Problem((64, 32), 20, 128, 128, HALF, "plain")
EMPTY = Problem(16, 3, 32, 32, fill=0.0)
MANY_ROWS = Problem(16, 3, 16 * 600, 16, fill=0.05)
RAGGED_TMA = Problem(64, 9, 100, 150, HALF, "plain", 1.0)
CUT = Problem(64, 20, 128, 120, HALF, "whole")  # descriptors would fit, but not mask the last block

KILLERS = {
    "bsr_spmm": [
        *((right, p, w) for p in (TINY, TALL, WIDE) for w in ("y", "dx")),
        (right, TINY._replace(relu=True), "y"),
        *((right, p, w) for p in (ALIGNED, LONG, ROUGH, ROUGH_HALF) for w in ("y", "dx")),
        *((right, p, w) for p in (SHIFTED, ENDED, ENDED_TMA) for w in ("y", "dx")),
        (right, CUT, "y"),
        *((right, GATHERED, w) for w in ("y", "dx")),
        (right, OBLONG, "y"),
        (right, OBLONG._replace(block=(32, 64)), "dx"),
        *((right, p, w) for p in (BROAD, POINT, EMPTY, MANY) for w in ("y", "dx")),
        (right, ALIGNED._replace(relu=True), "y"),
    ],
    "bsr_sddmm": [
        *((right, p, "dw") for p in (TINY, WIDE, TALL, FULL, ALIGNED)),
        *((in_parts, p, "dw") for p in (PARTS, PARTS_TMA)),
        *((added, p, "dw") for p in (TINY, ALIGNED)),
        (added_in_parts, PARTS, "dw"),
        *((right, p, "dw") for p in (BROAD, ROUGH._replace(tokens=250), POINT, EMPTY)),
        (right, ROUGH_HALF._replace(tokens=250), "dw"),
        *((right, p, "dw") for p in (SHIFTED, ENDED, ENDED_TMA)),
        (hot, TINY._replace(fill=1.0), "dw"),
        (hot, RAGGED_TMA, "dw"),
        (nothing, TINY, "dw"),
    ],
    "groups": [
        *((right, p, "dw") for p in (TINY, FULL, WIDE, ALIGNED, CSR, CSR_WIDE, PARTS, CSR_PARTS)),
        *((added, p, "dw") for p in (TINY, ALIGNED)),
        (right, MANY_ROWS, "dw"),
        (hot, TINY._replace(fill=1.0), "dw"),
        (hot, RAGGED_TMA, "dw"),
        *((right, p, "dw") for p in (ENDED, ENDED_TMA, POINT, EMPTY)),
    ],
    "parts": [
        *((in_parts, p, "dw") for p in (PARTS, PARTS_TMA, SHORT_PARTS)),
        *((added_in_parts, p, "dw") for p in (PARTS, SHORT_PARTS)),
    ],
    "bsr_grow": [
        *((right, TINY._replace(norm=n), "grow") for n in ("l1", "l2", "max")),
        *((right, p, "grow") for p in (WIDE, TALL, ALIGNED, SHIFTED)),
        (hot, TINY, "grow"),
        (constant, TINY._replace(tokens=301), "grow"),
        (not_finite, TINY._replace(norm="max"), "grow"),
        (nothing, TINY, "grow"),
        (right, Problem(16, 3, 290, 300), "grow"),
        (right, Problem(64, 3, 1300, 200), "grow"),
        (right, Problem(16, 600, 40, 40), "grow"),
    ],
    "csr_spmm": [
        *((right, p, w) for p in (CSR, CSR_WIDE) for w in ("y", "dx")),
        (right, CSR._replace(relu=True), "y"),
        *((apart, CSR, w) for w in ("y", "dx")),
        *((right, CSR_ROUGH, w) for w in ("y", "dx")),
        *((chunked, CSR_WIDE, w) for w in ("y", "dx")),
    ],
    "csr_sddmm": [
        *((right, p, "dw") for p in (CSR, CSR_WIDE, CSR_PARTS)),
        (chunked, CSR_PARTS, "dw"),
        *((added, p, "dw") for p in (CSR, CSR_PARTS)),
        (nothing, CSR, "dw"),
        (right, CSR._replace(fill=0.0), "dw"),
        (right, CSR_ROUGH._replace(tokens=300), "dw"),
    ],
    **conv_killers.KILLERS,
}


def killers(mutant):
    """The problems that a mutant has to get wrong, the likeliest to tell first."""
    if mutant.operator == "int64 dropped":
        return [(far, corner, corner.op) for corner in corners.of_kernel(mutant.module)]
    return KILLERS[mutant.module]


def killed(problems):
    """The first problem that comes out wrong or raises, as text; None if all come out right."""
    operands.cache_clear()  # another mutant may have written to its inputs
    for check, p, what in problems:
        try:
            with np.errstate(all="ignore"), sanitizer.at_most(LOADS):
                fine = check(p, what)
        except Exception as error:
            return f"{what} of {p}: {type(error).__name__} {str(error)[:200]}"
        if not fine:
            return f"{what} of {p}: wrong"
    return None
