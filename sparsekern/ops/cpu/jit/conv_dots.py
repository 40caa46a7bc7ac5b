"""numba kernels of the sparse convolution's weight gradient, one chunk of pixels at a time.

An entry is a dot of a row of dy with a shifted row of x. For blocks whose channels fill vectors it
is an outer product of a row of dy and a panel of x, (pixels, lanes), which needs no sum across
lanes and reads whole vectors. Bound: multiply-adds; for single entries L2 reads.

`z` is a scalar of the element type, `eb` its bytes; addresses are integers, strides in elements.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.conv_simd import (
    DOT_ROWS,
    OUTER_ROWS,
    dots_column,
    dots_one,
    dots_row,
    dots_tile,
    outer_one,
    outer_one_row,
    outer_two,
    outer_two_row,
)
from sparsekern.ops.cpu.jit.conv_spec import Dots
from sparsekern.ops.cpu.jit.simd import WIDTH, jit

SEGMENT = 512  # pixels of dy and x that one pass of an outer product takes


@jit
def _outer_pair(
    z: Any, eb: int, c: Any, d: Any, x: Any, rows: int, pair: int, ldc: int, size: int
) -> None:
    """Outer products of `rows` rows of dy with one or two panels, in segments of pixels."""
    for m in range(0, size, SEGMENT):
        n = min(SEGMENT, size - m)
        xa, xb = x[0] + m * WIDTH, x[1] + m * WIDTH
        i = 0
        while i < rows:
            a, ca, cb = d[0] + (i * d[1] + m) * eb, c[0] + i * ldc * eb, c[1] + i * ldc * eb
            if i + OUTER_ROWS <= rows:
                if pair:
                    outer_two(z, (ldc, a, d[1], n, ca, xa, cb, xb))
                else:
                    outer_one(z, (ldc, a, d[1], n, ca, xa))
                i += OUTER_ROWS
            else:
                if pair:
                    outer_two_row(z, (ldc, a, d[1], n, ca, xa, cb, xb))
                else:
                    outer_one_row(z, (ldc, a, d[1], n, ca, xa))
                i += 1


@jit
def _outer_row(
    z: Any, eb: int, dw: int, block: Any, d: Any, x: Any, at: Any, span: Any, rows: int, size: int
) -> None:
    """Outer products of the blocks lo <= e < hi of one block row; a block is bw / lanes strips."""
    bh, bw = block
    lanes = WIDTH // eb
    strips = bw // lanes
    s, last = span[0] * strips, span[1] * strips
    while s < last:
        pair = 1 if s + 1 < last else 0
        t = s + pair
        e, f = s // strips, t // strips
        k, n = s - e * strips, t - f * strips
        c = (dw + (e * bh * bw + k * lanes) * eb, dw + (f * bh * bw + n * lanes) * eb)
        p = (x[0] + (at[e] + k * x[1]) * eb, x[0] + (at[f] + n * x[1]) * eb)
        _outer_pair(z, eb, c, d, p, rows, pair, bw, size)
        s = t + 1


@jit
def _dots_entries(z: Any, eb: int, dw: int, d: int, x: int, at: Any, span: Any, size: int) -> None:
    """Dots of one row of dy for single entries."""
    e, last = span
    while e < last:
        if e + 4 <= last:
            p, q, r, s = x + at[e] * eb, x + at[e + 1] * eb, x + at[e + 2] * eb, x + at[e + 3] * eb
            n = min(e + 4, last - 4)
            soon = (x + at[n] * eb, x + at[n + 1] * eb, x + at[n + 2] * eb, x + at[n + 3] * eb)
            dots_row(z, (dw + e * eb, 1, d, 1, size, p, q, r, s, *soon))
            e += 4
        else:
            dots_one(z, (dw + e * eb, 1, d, 1, size, x + at[e] * eb))
            e += 1


@jit
def _dots_block(
    z: Any, eb: int, dw: int, ldw: int, d: Any, x: Any, rows: int, cols: int, size: int
) -> None:
    """Dots of `rows` rows of dy with `cols` rows of x: one block."""
    i = 0
    while i < rows:
        several = i + DOT_ROWS <= rows
        a = d[0] + i * d[1] * eb
        j = 0
        while j < cols:
            at, p, step = dw + (i * ldw + j) * eb, x[0] + j * x[1] * eb, x[1] * eb
            if j + 4 <= cols:
                xs = (p, p + step, p + 2 * step, p + 3 * step)
                if several:
                    dots_tile(z, (at, ldw, a, d[1], size, *xs))
                else:
                    dots_row(z, (at, ldw, a, d[1], size, *xs, *xs))
                j += 4
            else:
                if several:
                    dots_column(z, (at, ldw, a, d[1], size, p))
                else:
                    dots_one(z, (at, ldw, a, d[1], size, p))
                j += 1
        i += DOT_ROWS if several else 1


@jit
def dots_chunk(z: Any, eb: int, d: Any, x: Any, dots: Dots, blocks: Any, size: int) -> None:
    """Add one chunk's share of dw for a range of blocks.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        d: (address of the chunk's first pixel, row stride) of dy in scratch.
        x: (address, row stride) of x in scratch, or (address, elements of a panel).
        dots: the weight gradient.
        blocks: first and last + 1 block.
        size: pixels, a multiple of lanes.
    """
    crow, bh, bw = dots.crow, dots.block[0], dots.block[1]
    r = np.searchsorted(crow, blocks[0], side="right") - 1
    while r < crow.size - 1 and crow[r] < blocks[1]:
        span = (max(blocks[0], crow[r]), min(blocks[1], crow[r + 1]))
        g = r // dots.rows
        top = (r - g * dots.rows) * bh
        valid = min(bh, dots.outs - top)
        dr = (d[0] + (g * dots.outs + top) * d[1] * eb, d[1])
        if dots.panels:
            _outer_row(z, eb, dots.address, dots.block, dr, x, dots.at, span, valid, size)
        elif bh * bw == 1:
            _dots_entries(z, eb, dots.address, dr[0], x[0], dots.at, span, size // (WIDTH // eb))
        else:
            for e in range(span[0], span[1]):
                home, p = dots.address + e * bh * bw * eb, (x[0] + dots.at[e] * eb, x[1])
                cols = dots.count[e] if dots.count.size > 1 else dots.count[0]
                _dots_block(z, eb, home, bw, dr, p, valid, cols, size // (WIDTH // eb))
        r += 1
