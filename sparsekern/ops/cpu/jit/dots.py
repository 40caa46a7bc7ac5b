"""numba kernels of the sampled product, dw = dyᵀ x at active blocks; see `wide` and `tiles`.

Wide blocks: a register tile is `ROWS` rows of the block by two vectors, over the tokens of a pass,
whose rows of dy and x are copied to dense panels; bound: multiply-adds. Others: dot products of
packed tiles, tokens the vector axis; bound: L2 reads of x, one vector for each multiply-add.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.job import (
    FIRST,
    IDX,
    IN_EDGE,
    LD,
    NEXT,
    OUT,
    OUT_EDGE,
    PARTS,
    PTR,
    SIZE,
    SPAN,
    TILES,
    TOKENS,
    X_COL,
    X_FEATURES,
    X_ROW,
    X_TILES,
    Y_COL,
    Y_FEATURES,
    Y_ROW,
    Y_TILES,
    X,
    Y,
)
from sparsekern.ops.cpu.jit.simd import (
    ROWS,
    WIDTH,
    clear,
    field,
    geti,
    inlined,
    jit,
    move,
    prefetch,
    take,
    vmove,
)
from sparsekern.ops.cpu.jit.sums import (
    dots1,
    dots4,
    dots8,
    tile_four,
    tile_most,
    tile_one,
    tile_two,
)

DOTS = 64  # tokens of one pass over the blocks of a range


@jit
def _sweep(z: Any, eb: int, rows: int, cols: int, c: Any, first: Any, a: Any, b: Any) -> None:
    """`C = first + A B` in register tiles: C (address, stride), first, A (address, strides), B.

    B is (address, stride, depth); cols is a multiple of two vectors.
    """
    for j in range(0, cols, 2 * (WIDTH // eb)):
        at = (b[0] + j * eb, b[1], b[2])
        g = 0
        while g < rows:
            cg = (c[0] + (g * c[1] + j) * eb, c[1], first[0] + (g * first[1] + j) * eb, first[1])
            ag = (a[0] + g * a[1] * eb, a[1], a[2])
            if rows - g >= ROWS:
                tile_most(z, cg + ag + at)
                g += ROWS
            elif rows - g >= 4:
                tile_four(z, cg + ag + at)
                g += 4
            elif rows - g >= 2:
                tile_two(z, cg + ag + at)
                g += 2
            else:
                tile_one(z, cg + ag + at)
                g += 1


@jit
def _panel(z: Any, eb: int, dst: int, x: Any, col: int, edge: int, start: int, size: int) -> None:
    """Copy tokens x `edge` features of `x` to a dense panel, zero beyond the last feature."""
    lanes = WIDTH // eb
    valid = min(edge, x[3] - col)
    for m in range(size):
        src = x[0] + ((start + m) * x[1] + col * x[2]) * eb
        at = dst + m * edge * eb
        k = 0
        while x[2] == 1 and k + lanes <= valid:
            vmove(z, (at + k * eb, src + k * eb))
            k += lanes
        for j in range(k, valid):
            move(z, (at, j, src, j * x[2]))
        for j in range(valid, edge):
            clear(z, (at, j))


@jit
def _soon(z: Any, eb: int, x: Any, col: int, edge: int, start: int, size: int) -> None:
    """Ask for the rows of a panel that is copied next."""
    for m in range(size):
        src = x[0] + ((start + m) * x[1] + col) * eb
        for line in range(0, edge * eb, 64):
            prefetch(z, (src + line,))


@jit
def _wide_part(z: Any, eb: int, job: int, entries: Any) -> None:
    """One part of `wide_dots`: a range of blocks."""
    bh, bw, tokens = field(z, (job, OUT_EDGE)), field(z, (job, IN_EDGE)), field(z, (job, TOKENS))
    ptr, idx, dw = field(z, (job, PTR)), field(z, (job, IDX)), field(z, (job, OUT))
    dy = (field(z, (job, Y)), field(z, (job, Y_ROW)), field(z, (job, Y_COL)))
    x = (field(z, (job, X)), field(z, (job, X_ROW)), field(z, (job, X_COL)))
    left_x, left_y = (field(z, (job, X_FEATURES)),), (field(z, (job, Y_FEATURES)),)
    scratch = np.zeros((DOTS * (bh + bw) + bw) * eb, np.uint8)
    zeros = scratch.ctypes.data
    left = zeros + bw * eb
    right = left + DOTS * bh * eb
    first = 0
    while geti(z, (ptr, first + 1)) <= entries[0]:
        first += 1
    for m in range(0, tokens, DOTS):
        size = min(DOTS, tokens - m)
        r, fresh = first, True
        for e in range(entries[0], entries[1]):
            while geti(z, (ptr, r + 1)) <= e:
                r, fresh = r + 1, True
            if fresh:
                _panel(z, eb, left, dy + left_y, r * bh, bh, m, size)
                fresh = False
            _panel(z, eb, right, x + left_x, geti(z, (idx, e)) * bw, bw, m, size)
            if e + 1 < entries[1] and x[2] == 1:
                _soon(z, eb, x, geti(z, (idx, e + 1)) * bw, bw, m, size)
            at = dw + e * bh * bw * eb
            start = (at, bw) if m else (zeros, 0)
            _sweep(z, eb, bh, bw, (at, bw), start, (left, 1, bh), (right, bw, size))
    scratch[0] = 0  # numba frees an array after its last use: this keeps it until here


@inlined
def wide_dots(z: Any, eb: int, job: int) -> None:
    """`dw[e] = dyᵀ x` for SIZE blocks, all tokens (at least one); parts are ranges of blocks."""
    parts, count = field(z, (job, PARTS)), field(z, (job, SIZE))
    part = take(z, (job, NEXT))
    while part < parts:
        _wide_part(z, eb, job, (count * part // parts, count * (part + 1) // parts))
        part = take(z, (job, NEXT))


@jit
def _tile_entries(z: Any, eb: int, job: int, dt: int, xt: int, vecs: int, entries: Any) -> None:
    """A range of single entries of `tile_dots`, one tile."""
    ptr, idx, dw = field(z, (job, PTR)), field(z, (job, IDX)), field(z, (job, OUT))
    line, e, r = field(z, (job, LD)) * eb, entries[0], 0
    while e < entries[1]:
        while geti(z, (ptr, r + 1)) <= e:
            r += 1
        stop, a = min(entries[1], geti(z, (ptr, r + 1))), dt + r * line
        while e + 8 <= stop:
            p, q = xt + geti(z, (idx, e)) * line, xt + geti(z, (idx, e + 1)) * line
            s, t = xt + geti(z, (idx, e + 2)) * line, xt + geti(z, (idx, e + 3)) * line
            g, h = xt + geti(z, (idx, e + 4)) * line, xt + geti(z, (idx, e + 5)) * line
            k, n = xt + geti(z, (idx, e + 6)) * line, xt + geti(z, (idx, e + 7)) * line
            dots8(z, (vecs, dw + e * eb, a, p, q, s, t, g, h, k, n))
            e += 8
        while e + 4 <= stop:
            p, q = xt + geti(z, (idx, e)) * line, xt + geti(z, (idx, e + 1)) * line
            s, t = xt + geti(z, (idx, e + 2)) * line, xt + geti(z, (idx, e + 3)) * line
            dots4(z, (vecs, dw + e * eb, a, p, q, s, t))
            e += 4
        while e < stop:
            dots1(z, (vecs, dw + e * eb, a, xt + geti(z, (idx, e)) * line))
            e += 1


@jit
def _tile_blocks(z: Any, eb: int, job: int, dt: int, xt: int, vecs: int, entries: Any) -> None:
    """A range of blocks of `tile_dots`, one tile."""
    bh, bw, ptr = field(z, (job, OUT_EDGE)), field(z, (job, IN_EDGE)), field(z, (job, PTR))
    line, r = field(z, (job, LD)) * eb, 0
    for e in range(entries[0], entries[1]):
        while geti(z, (ptr, r + 1)) <= e:
            r += 1
        k = geti(z, (field(z, (job, IDX)), e)) * bw
        n = min(bw, field(z, (job, X_FEATURES)) - k)
        for i in range(min(bh, field(z, (job, Y_FEATURES)) - r * bh)):
            a, j = dt + (r * bh + i) * line, 0
            while j < n:
                at, b = field(z, (job, OUT)) + ((e * bh + i) * bw + j) * eb, xt + (k + j) * line
                if j + 4 <= n:
                    dots4(z, (vecs, at, a, b, b + line, b + 2 * line, b + 3 * line))
                    j += 4
                else:
                    dots1(z, (vecs, at, a, b))
                    j += 1


@inlined
def tile_dots(z: Any, eb: int, job: int) -> None:
    """`dw[e] += dyᵀ x` for SIZE blocks and TILES packed tiles; parts are ranges of blocks.

    Tile FIRST is the first of those in Y_TILES, of dy, and X_TILES.
    """
    parts, count = field(z, (job, PARTS)), field(z, (job, SIZE))
    tokens, span, ld = field(z, (job, TOKENS)), field(z, (job, SPAN)), field(z, (job, LD))
    single = field(z, (job, OUT_EDGE)) == 1 and field(z, (job, IN_EDGE)) == 1
    part = take(z, (job, NEXT))
    while part < parts:
        entries = (count * part // parts, count * (part + 1) // parts)
        for i in range(field(z, (job, TILES))):
            start = (field(z, (job, FIRST)) + i) * span
            vecs = -(-min(span, tokens - start) // (WIDTH // eb))
            dt = field(z, (job, Y_TILES)) + i * field(z, (job, Y_FEATURES)) * ld * eb
            xt = field(z, (job, X_TILES)) + i * field(z, (job, X_FEATURES)) * ld * eb
            if single:
                _tile_entries(z, eb, job, dt, xt, vecs, entries)
            else:
                _tile_blocks(z, eb, job, dt, xt, vecs, entries)
        part = take(z, (job, NEXT))


@jit
def wide_dots_single(job: int) -> None:
    """`wide_dots` of float32."""
    wide_dots(np.float32(0), 4, job)


@jit
def wide_dots_double(job: int) -> None:
    """`wide_dots` of float64."""
    wide_dots(np.float64(0), 8, job)


@jit
def tile_dots_single(job: int) -> None:
    """`tile_dots` of float32."""
    tile_dots(np.float32(0), 4, job)


@jit
def tile_dots_double(job: int) -> None:
    """`tile_dots` of float64."""
    tile_dots(np.float64(0), 8, job)
