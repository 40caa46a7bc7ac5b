"""Case tables, input generators and the two oracles of the kernel tests.

Exact: inputs are integers in -3..3, so every partial sum is exact in fp32 and any right order of
summation gives the same bits; the answer must be `torch.equal` to a float64 product.
Bound: on random floats no right kernel can leave |y - y*| <= g (|x||w|ᵀ) + u_out (|y*| + g ...),
g = n u / (1 - n u), n the terms of the longest sum: nothing in it is tuned.
"""

import ast
import inspect
from dataclasses import dataclass
from typing import NamedTuple

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# unit roundoff of a stored result; the accumulator is itself fp32
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Pattern:
    """A topology as the launchers take it, and its dense block mask."""

    rows: int
    cols: int
    block: tuple[int, int]
    mask: torch.Tensor
    crow: torch.Tensor
    col: torch.Tensor
    ccol: torch.Tensor
    row: torch.Tensor
    perm: torch.Tensor
    row_order: torch.Tensor
    col_order: torch.Tensor

    def keep_rows(self, rows):
        """The same with only some block rows active."""
        mask = torch.zeros_like(self.mask)
        mask[rows] = self.mask[rows]
        return from_block_mask(self.rows, self.cols, self.block, mask)

    @property
    def forward(self):
        """Index arrays of `*_spmm`."""
        return self.crow, self.col, self.row_order

    @property
    def transposed(self):
        """Index arrays of `*_spmm_t`."""
        return self.ccol, self.row, self.perm, self.col_order

    def dense(self, values):
        """(rows, cols) float64 matrix of block values, padding cut off."""
        bh, bw = self.block
        br, bc = self.mask.shape
        out = torch.zeros(br, bc, bh, bw, dtype=torch.float64)
        r, c = self.mask.nonzero(as_tuple=True)
        out[r, c] = values.double().cpu()
        return out.transpose(1, 2).reshape(br * bh, bc * bw)[: self.rows, : self.cols]

    def sample(self, dense):
        """(nnzb, bh, bw) active blocks of a (rows, cols) matrix, padding zero."""
        bh, bw = self.block
        br, bc = self.mask.shape
        full = torch.zeros(br * bh, bc * bw, dtype=dense.dtype)
        full[: self.rows, : self.cols] = dense
        r, c = self.mask.nonzero(as_tuple=True)
        return full.reshape(br, bh, bc, bw).transpose(1, 2)[r, c]

    def inside(self):
        """(nnzb, bh, bw) bool: which stored values are weights, not padding."""
        return self.sample(torch.ones(self.rows, self.cols)) == 1


def pattern(rows, cols, block, kind, seed=0):
    """Topology of a named kind: full, empty, random (about a third), holes, diagonal."""
    mask = mask_of(rows, cols, block, kind, seed)
    return from_block_mask(rows, cols, block, mask)


def mask_of(rows, cols, block, kind, seed):
    """Which blocks are active, (block rows, block columns) bool."""
    br, bc = -(-rows // block[0]), -(-cols // block[1])
    g = torch.Generator().manual_seed(seed)
    mask = {
        "full": lambda: torch.ones(br, bc, dtype=torch.bool),
        "empty": lambda: torch.zeros(br, bc, dtype=torch.bool),
        "diagonal": lambda: torch.eye(br, bc, dtype=torch.bool),
    }.get(kind, lambda: torch.rand(br, bc, generator=g) < 0.35)()
    if kind == "random" and mask.numel():
        mask[-1, -1] = True  # the ragged corner is always active
    if kind == "holes":  # first, last and every third row and column empty, the rest dense
        mask[:] = True
        for axis in (mask, mask.t()):
            axis[::3] = False
            axis[-1:] = False
    return mask


def from_block_mask(rows, cols, block, mask):
    """Topology of the active blocks."""
    br = len(mask)
    r, c = mask.nonzero(as_tuple=True)
    order = torch.argsort(c * br + r)
    counts = (mask.sum(1), mask.sum(0))
    crow, ccol = (torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in counts)
    longest = [torch.argsort(n, descending=True, stable=True) for n in counts]
    indices = (crow, c, ccol, r[order], order, *longest)
    arrays = (a.to(torch.int32).to(DEVICE) for a in indices)
    return Pattern(rows, cols, block, mask, *arrays)


def laid_out(a, layout):
    """The matrix in another memory layout, NaN everywhere around and between its entries."""
    m, k = a.shape
    if layout == "row":
        store, view = (m + 3, k + 5), lambda s: s[1 : m + 1, 2 : k + 2]
    elif layout == "col":
        store, view = (k + 5, m + 3), lambda s: s[2 : k + 2, 1 : m + 1].t()
    elif layout == "strided":
        store, view = (2 * m + 2, 3 * k + 3), lambda s: s[1 : 2 * m + 1 : 2, 1 : 3 * k + 1 : 3]
    elif layout == "aligned":  # rows that start every 64 bytes, as tensor descriptors want
        store, view = (m + 3, -(-k // 16) * 16 + 32), lambda s: s[1 : m + 1, 16 : k + 16]
    else:
        raise ValueError(layout)
    out = view(torch.full(store, float("nan"), dtype=a.dtype, device=DEVICE))
    return out.copy_(a)


def numbers(shape, dtype, seed, layout="row", exact=True):
    """A matrix of integers in -3..3, or of normal floats; `one-*` layouts have a stride of 0."""
    g = torch.Generator().manual_seed(seed)
    if layout.startswith("one-"):
        thin = (1, shape[1]) if layout == "one-row" else (shape[0], 1)
        return numbers(thin, dtype, seed, "row", exact).expand(shape)
    a = torch.randint(-3, 4, shape, generator=g) if exact else torch.randn(shape, generator=g)
    return laid_out(a.to(dtype), layout)


def block_values(p, dtype, seed, exact=True, padding=0.0):
    """(nnzb, bh, bw) values; `padding` is what edge blocks hold outside the matrix."""
    g = torch.Generator().manual_seed(seed)
    shape = (p.col.numel(), *p.block)
    v = torch.randint(-3, 4, shape, generator=g) if exact else torch.randn(shape, generator=g)
    return torch.where(p.inside(), v.to(dtype), padding).to(dtype).to(DEVICE)


class Sum(NamedTuple):
    """A result in float64, the same sum over absolute values, and its number of terms."""

    value: torch.Tensor
    magnitude: torch.Tensor
    terms: int


def spmm_oracle(x, w, bias=None):
    """`x wᵀ + bias` in float64; terms = active entries of the fullest row of w, and the bias."""
    x = x.double().cpu()
    value, magnitude = x @ w.t(), x.abs() @ w.abs().t()
    terms = int((w != 0).sum(1).max()) if w.numel() else 0
    if bias is not None:
        value, magnitude = value + bias.double().cpu(), magnitude + bias.double().abs().cpu()
    return Sum(value, magnitude, terms + (bias is not None))


def sddmm_oracle(dy, x, p):
    """`dyᵀ x` at the active blocks in float64; terms = tokens."""
    dy, x = dy.double().cpu(), x.double().cpu()
    return Sum(p.sample(dy.t() @ x), p.sample(dy.abs().t() @ x.abs()), len(x))


def assert_exact(got, want, dtype):
    """Same shape, dtype and value in every element; contiguous; no tolerance."""
    want = getattr(want, "value", want)  # of any kind of sum
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == dtype, f"dtype {got.dtype}, expected {dtype}"
    assert got.is_contiguous(), f"strides {got.stride()}"
    want = want.to(dtype)
    wrong = (got.cpu() != want).nonzero()
    assert len(wrong) == 0, f"{len(wrong)} of {want.numel()} differ, first at {wrong[0].tolist()}"


def assert_within_bound(got, want, dtype):
    """Inside the a-priori bound of its own sum, element by element; NaN is outside."""
    assert got.shape == want.value.shape
    assert got.dtype == dtype
    # tensor cores cut off where the IEEE sum rounds: one bit
    u = 2.0**-23 if got.is_cuda and dtype != torch.float32 else 2.0**-24
    gamma = want.terms * u / (1 - want.terms * u) * want.magnitude
    u_out = 0.0 if dtype == torch.float32 else ROUNDOFF[dtype]
    tiny = torch.finfo(dtype).smallest_normal * u_out  # rounding of a subnormal
    bound = gamma + u_out * (want.value.abs() + gamma) + tiny
    inside = (got.double().cpu() - want.value).abs() <= bound
    assert inside.all(), f"{int((~inside).sum())} of {inside.numel()} outside the bound"


def assert_loads_are_filled(module):
    """Every `tl.load` with a mask names what masked lanes hold: a GPU leaves them undefined."""
    loads = [
        {k.arg for k in node.keywords}
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    assert loads
    assert all("other" in keys for keys in loads if "mask" in keys)


class Case(NamedTuple):
    """One launch: block, sizes, kind of pattern, layout of the activations, bias or none."""

    block: tuple[int, int]
    M: int
    N: int
    K: int
    kind: str = "random"
    layout: str = "row"
    bias: bool = True

    def __str__(self):
        bias = "bias" if self.bias else "nobias"
        block = "x".join(map(str, self.block))
        return f"b{block}-m{self.M}-n{self.N}-k{self.K}-{self.kind}-{self.layout}-{bias}"


LAYOUTS = ("row", "col", "strided", "one-row", "one-col")
KINDS = ("full", "empty", "random", "holes", "diagonal")
BSR_BLOCKS = (
    *((e, e) for e in (16, 32, 64, 128)),
    *((16, 32), (32, 16), (16, 128), (128, 64)),
)


def _bsr_cases():
    for bh, bw in BSR_BLOCKS:
        b = (bh, bw)
        yield Case(b, 1, 1, 1, "full")
        yield Case(b, 37, 2 * bh, 3 * bw, "full", bias=False)
        yield Case(b, 13, bh - 1, bw + 1, "full", "col")
        yield Case(b, 17, bh + 1, bw - 1, "full", "strided")
        yield Case(b, 131, 2 * bh + 1, 2 * bw + 7, "random", bias=False)
    for kind in KINDS:
        for layout in LAYOUTS:
            yield Case((16, 16), 29, 61, 83, kind, layout, bias=layout in ("row", "strided"))
    for m in (2, 63, 64, 65, 127, 128, 129, 257):
        yield Case((32, 32), m, 33, 65, "random", "col", bias=m % 2 == 0)
    for b in ((16, 16), (32, 64)):
        for m, n, k in ((0, 40, 70), (5, 0, 70), (5, 40, 0), (0, 0, 0)):
            yield Case(b, m, n, k, "full")


def _csr_cases():
    for kind in KINDS:
        for layout in LAYOUTS:
            yield Case((1, 1), 29, 19, 27, kind, layout, bias=layout in ("row", "strided"))
    for m in (1, 2, 127, 128, 129, 257):
        for n, k in ((1, 1), (1, 37), (37, 1), (17, 33)):
            yield Case((1, 1), m, n, k, "random", bias=(m + n) % 2 == 0)
    for m, n, k in ((0, 4, 7), (5, 0, 7), (5, 4, 0), (0, 0, 0)):
        yield Case((1, 1), m, n, k, "full")


BSR_CASES = tuple(_bsr_cases())
CSR_CASES = tuple(_csr_cases())


def ids(case):
    """Readable test id of a case or a dtype."""
    return str(case)


def table(cases):
    """(case, dtype name) pairs: all in fp32, every third in fp16, every seventh in bf16.

    In the interpreter they differ by tile and casts alone; steps prime to five meet every kind and
    every layout.
    """
    steps = (("fp32", 1), ("fp16", 3), ("bf16", 7))
    return [(case, dtype) for dtype, step in steps for case in cases[::step]]
