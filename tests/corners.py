"""Problems with more than 2**31 elements in an operand, and no memory: the last programs only.

Operands are on the meta device, which the sanitizer bounds-checks without touching memory; index
arrays are real. Sizes lie between 2**31 and 2**32 elements, so that arithmetic in int32 gives an
address below the tensor instead of a wrong one inside it.
"""

import itertools
from typing import NamedTuple

import conv_corners
import sanitizer
import torch
from conv_corners import ConvCorner

from sparsekern.kernels import launch
from sparsekern.ops import triton as backend
from sparsekern.topology import Topology

LIMIT = 2**31


class Corner(NamedTuple):
    """A product of huge operands, and which of them has its last elements touched."""

    op: str  # "y", "dx", "dw" or "grow"
    block: int
    tokens: int
    rows: int
    cols: int
    big: tuple[str, ...]
    layout: str = "row"
    full: bool = False  # all blocks but those that share the last one's row and column
    dtype: torch.dtype = torch.float32  # halves in aligned blocks go through descriptors

    def __str__(self):
        big, kind = "-".join(self.big), str(self.dtype).removeprefix("torch.")
        return f"{self.op}-b{self.block}-m{self.tokens}-{big}-{self.layout}-{kind}"


def huge(m, n, layout, dtype):
    """A matrix that takes no memory."""
    if layout == "col":
        return torch.empty(n, m, device="meta", dtype=dtype).t()
    if layout == "sliced":
        return torch.empty(m, 2 * n, device="meta", dtype=dtype)[:, :n]
    return torch.empty(m, n, device="meta", dtype=dtype)


def topology_of(corner):
    """One block for each row or column, the last one last; or nearly all blocks."""
    r, c = -(-corner.rows // corner.block), -(-corner.cols // corner.block)
    if corner.full:
        mask = torch.ones(r, c, dtype=torch.bool)
        mask[-1, :-1] = mask[:-1, -1] = False
        positions = mask.flatten().nonzero()[:, 0]
    else:
        n = min(r, c)
        positions = (torch.arange(r - n, r) * c) + torch.arange(c - n, c)
    return Topology.from_positions(positions, (corner.rows, corner.cols), corner.block)


def few(grid):
    """The first two and the last two programs along every axis."""
    ends = (sorted({*range(min(2, n)), *range(max(n - 2, 0), n)}) for n in grid)
    return list(itertools.product(*ends))


def last_one(grid):
    """Of a topology with `full`: the others would walk a whole row of blocks."""
    return [(grid[0] - 1, 0, 0)]


def run(corner):
    """Run the corner's programs; how many elements into each big operand they reached."""
    if isinstance(corner, ConvCorner):
        return _run_convolution(corner)
    t = topology_of(corner)
    x = huge(corner.tokens, corner.cols, corner.layout, corner.dtype)
    dy = huge(corner.tokens, corner.rows, corner.layout, corner.dtype)
    values = torch.empty(t.values_shape, device="meta", dtype=corner.dtype)
    held = {"x": x, "dy": dy, "values": values}
    gap = 2**10 if "bias" in corner.big else 1
    held["bias"] = huge(corner.rows, gap, "row", corner.dtype)[:, 0]
    long_rows = corner.full and corner.op != "dw"
    chunk, launch.CHUNK_ELEMENTS = launch.CHUNK_ELEMENTS, 2**40  # one launch for all tokens
    try:
        with sanitizer.only_programs(last_one if long_rows else few):
            held["out"] = _product(corner, t, held)
    finally:
        launch.CHUNK_ELEMENTS = chunk
    turned = corner.block == 1 and corner.op in {"y", "dx"}  # that kernel writes the transpose
    return {
        name: _reach(_written() if turned and name == "out" else _region_of(held[name]))
        for name in corner.big
    }


def _run_convolution(corner):
    pattern, held = conv_corners.held_by(corner)
    long_rows = corner.full and corner.op != "conv_dw"
    with sanitizer.only_programs(last_one if long_rows else few):
        held["out"] = conv_corners.product(corner, pattern, held)
    return {name: _reach(_region_of(held[name])) for name in corner.big}


def _product(corner, t, held):
    x, dy, values = held["x"], held["dy"], held["values"]
    if corner.op == "y":
        return backend.spmm(x, values, t, held["bias"])
    if corner.op == "dx":
        return backend.spmm_t(dy, values, t)
    if corner.op == "dw":
        return backend.sddmm(dy, x, t)
    from sparsekern.kernels.bsr_grow import bsr_grow

    return bsr_grow(dy, x, t.block)


def _region_of(tensor):
    # a copy that no kernel saw would be a mistake of the table: KeyError
    return sanitizer.last.regions[tensor.untyped_storage()._cdata], tensor.element_size()


def _written():
    (region,) = (r for r in sanitizer.last.regions.values() if "y_ptr" in r.names)
    return region, 4


def _reach(region_and_size):
    region, size = region_and_size
    _, high = max(region.touched.values(), key=lambda span: span[1])
    return (high - region.first) // size


TALL, LONG = 2**17 + 3, 2**14 + 16  # their product exceeds 2**31
FLAT, WIDE = 37, 2**26 + 128  # so does theirs: few tokens where a kernel sums over them
_SQUARE = 400 * 128  # all its blocks of 128 exceed 2**31


def _bsr_corners():
    # launchers copy activations that are no rows of whole 16-byte loads
    for layout in ("row", "sliced"):
        gaps = 2 if layout == "sliced" else 1
        long, wide = LONG // gaps, WIDE // gaps
        yield Corner("y", 16, TALL, 48, long, ("x",), layout)
        yield Corner("dx", 16, TALL, long, 48, ("dy",), layout)
        yield Corner("dw", 128, FLAT, wide, 256, ("dy",), layout)
        yield Corner("dw", 128, FLAT, 256, wide, ("x",), layout)
        yield Corner("grow", 128, FLAT, wide, 256, ("dy",), layout)
        yield Corner("grow", 128, FLAT, 256, wide, ("x",), layout)
        yield Corner("grow", 64, FLAT, 256, wide, ("x",), layout)
    yield Corner("y", 16, TALL, LONG, 48, ("out",))
    yield Corner("dx", 16, TALL, 48, LONG, ("out",))
    yield Corner("y", 16, TALL, LONG, LONG, ("x", "out"))
    yield Corner("dx", 16, TALL, LONG, LONG, ("dy", "out"))
    yield Corner("dw", 128, FLAT, WIDE, WIDE, ("dy", "x"))
    yield Corner("y", 128, 9, _SQUARE, _SQUARE, ("values",), full=True)
    yield Corner("dx", 128, 9, _SQUARE, _SQUARE, ("values",), full=True)
    yield Corner("dw", 128, 9, _SQUARE, _SQUARE, ("out",), full=True)
    yield Corner("y", 16, 3, 2**21 + 128, 48, ("bias",))
    even = LONG + 48  # a multiple of the block
    yield Corner("y", 64, TALL, 192, even, ("x",), dtype=torch.float16)
    yield Corner("dx", 64, TALL, even, 192, ("dy",), dtype=torch.float16)
    yield Corner("dw", 64, FLAT, 192, WIDE, ("x",), dtype=torch.float16)
    yield Corner("y", 64, 3, 2**21 + 256, 192, ("bias",), dtype=torch.float16)
    yield Corner("grow", 16, 5, 2**20, 2**19 + 2**17, ("out",))


def _csr_corners():
    # launchers copy activations unless tokens lie side by side
    yield Corner("y", 1, TALL, 40, LONG, ("x",), "col")
    yield Corner("dx", 1, TALL, LONG, 40, ("dy",), "col")
    for tokens, width in ((2**10 + 3, 2**21), (2**11 + 3, 2**20)):
        yield Corner("dw", 1, tokens, width, 40, ("dy",), "col")
        yield Corner("dw", 1, tokens, 40, width, ("x",), "col")
    for layout in ("row", "col", "sliced"):
        yield Corner("y", 1, TALL, LONG, 40, ("out",), layout)
        yield Corner("dx", 1, TALL, 40, LONG, ("out",), layout)
    yield Corner("y", 1, TALL, LONG, LONG, ("x", "out"), "col")
    yield Corner("dx", 1, TALL, LONG, LONG, ("dy", "out"), "col")
    yield Corner("dw", 1, 2**10 + 3, 2**21, 2**21, ("dy", "x"), "col")
    yield Corner("dw", 1, 2**12, 2**19 + 3, 2**19 + 5, ("dy", "x"), "col")
    yield Corner("y", 1, 3, 2**21 + 128, 40, ("bias",))


CORNERS = (*_bsr_corners(), *_csr_corners(), *conv_corners.CORNERS)

# an operator, whether its block is 1, and the module of its kernel
KERNELS = {
    ("y", False): "bsr_spmm",
    ("dx", False): "bsr_spmm",
    ("dw", False): "bsr_sddmm",
    ("grow", False): "bsr_grow",
    ("y", True): "csr_spmm",
    ("dx", True): "csr_spmm",
    ("dw", True): "csr_sddmm",
    **conv_corners.KERNELS,
}


def of_kernel(kernel):
    """The corners that a kernel module runs."""
    return [c for c in CORNERS if KERNELS[c.op, c.block == 1] == kernel]
