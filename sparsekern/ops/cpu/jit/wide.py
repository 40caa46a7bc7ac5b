"""numba kernels for wide blocks: both edges a multiple of two vectors (32 floats with AVX-512).

Activations stay where they are: the vectors run over a block's outputs, the register tile is
`ROWS` tokens by two vectors (in `wide_dots` `ROWS` rows of the block), and no activation is
transposed. Bound: L3 reads of x and writes of y; in cache a tile runs at the dense product's rate.

Tensors come as addresses, sizes and strides (in elements), so one compiled version serves every
layout. A kernel does the part of the work that its ranges name; parts write disjoint outputs, so
the number of threads changes no bit. `z` is a scalar of the element type, `eb` its bytes; `ptr`,
`idx`, `slot` are addresses of int32 arrays.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.simd import (
    ROWS,
    WIDTH,
    clear,
    geti,
    jit,
    move,
    prefetch,
    tile_one,
    tile_wide,
    turn,
    vfill,
    vmove,
)

PASS = 64  # tokens of one pass over a block: the panels of a pass stay in cache


@jit
def _sweep(
    z: Any, eb: int, rows: int, cols: int, c: Any, a: Any, b: Any, kn: int, soon: Any
) -> None:
    """`C[rows, cols] += A[rows, kn] B[kn, cols]` in register tiles; cols: a multiple of 2 vectors.

    Rows of x are a page apart, where no hardware prefetcher follows, so each step over A asks for
    a few rows of what is needed next: `soon` is (address or 0, stride, rows per step, bytes).
    """
    step = 2 * (WIDTH // eb)
    for j in range(0, cols, step):
        g = 0
        while g < rows:
            if j == 0 and soon[0]:
                for q in range(soon[2]):
                    at = soon[0] + (g // ROWS * soon[2] + q) * soon[1] * eb
                    for line in range(0, soon[3], 64):
                        prefetch(z, (at + line,))
            cg = c[0] + (g * c[1] + j) * eb
            ag = a[0] + g * a[1] * eb
            bj = b[0] + j * eb
            if rows - g >= ROWS:
                tile_wide(z, (cg, c[1], ag, a[1], a[2], bj, b[1], kn))
                g += ROWS
            else:
                tile_one(z, (cg, c[1], ag, a[1], a[2], bj, b[1], kn))
                g += 1


@jit
def _turn_block(z: Any, eb: int, dst: int, src: int, rows: int, cols: int) -> None:
    """Transpose a dense (rows, cols) block, both multiples of lanes."""
    lanes = WIDTH // eb
    for i in range(0, rows, lanes):
        for j in range(0, cols, lanes):
            turn(z, (dst + (j * rows + i) * eb, rows, src + (i * cols + j) * eb, cols))


@jit
def _fill(z: Any, eb: int, dst: int, ldd: int, rows: int, cols: int, bias: int) -> None:
    """Set each row to `bias` (an address; 0: to zero)."""
    lanes = WIDTH // eb
    for i in range(rows):
        at = dst + i * ldd * eb
        j = 0
        while j + lanes <= cols:
            if bias:
                vmove(z, (at + j * eb, bias + j * eb))
            else:
                vfill(z, (at + j * eb, 0))
            j += lanes
        while j < cols:
            if bias:
                move(z, (at, j, bias, j))
            else:
                clear(z, (at, j))
            j += 1


@jit
def _row(
    z: Any, eb: int, c: Any, x: Any, w: Any, arrays: Any, row: Any, turned: int, tokens: Any
) -> None:
    """The blocks of one block row of `wide_sum`, one pass of tokens (start, size, end of all)."""
    bo, bi = w[1], w[2]
    lo, hi = row
    m, size, end = tokens
    for e in range(lo, hi):
        i = geti(z, (arrays[1], e)) * bi
        b = turned + (e - lo) * bo * bi * eb
        if not w[3]:
            b = w[0] + geti(z, (arrays[2], e)) * bo * bi * eb
        a = (x[0] + (m * x[1] + i * x[2]) * eb, x[1], x[2])
        # next: the next block of the row, or the first one at the next pass
        at, d = (m, e + 1) if e + 1 < hi else (m + PASS, lo)
        near = x[0] + (at * x[1] + geti(z, (arrays[1], d)) * bi) * eb
        if at + PASS > end or x[2] != 1:
            near = 0
        soon = (near, x[1], ROWS, bi * eb)
        _sweep(z, eb, size, bo, c, a, (b, bo), min(bi, x[3] - i), soon)


@jit
def wide_sum(
    z: Any, eb: int, out: Any, x: Any, w: Any, arrays: Any, bias: int, rows: Any, tokens: Any
) -> None:
    """`out[m, o] = bias[o] + sum_i x[m, i] w[o, i]` for a range of block rows and of tokens.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        out: (address, row stride, features).
        x: (address, row stride, column stride, features).
        w: (address, out edge, in edge, 1 if a stored block is (out, in) else 0).
        arrays: (ptr, idx, slot); slot 0 means the identity.
        bias: address or 0.
        rows: range (start, stop) of block rows.
        tokens: range (start, stop).
    """
    bo, bi, most = w[1], w[2], 0
    for r in range(rows[0], rows[1]):
        most = max(most, geti(z, (arrays[0], r + 1)) - geti(z, (arrays[0], r)))
    scratch = np.empty((most * w[3] * bo * bi + PASS * bo) * eb + WIDTH, np.uint8)
    edge = scratch.ctypes.data
    turned = edge + PASS * bo * eb
    for r in range(rows[0], rows[1]):
        lo, hi = geti(z, (arrays[0], r)), geti(z, (arrays[0], r + 1))
        nb = min(bo, out[2] - r * bo)
        if w[3]:
            for e in range(lo, hi):
                _turn_block(
                    z, eb, turned + (e - lo) * bo * bi * eb, w[0] + e * bo * bi * eb, bo, bi
                )
        for m in range(tokens[0], tokens[1], PASS):
            size = min(PASS, tokens[1] - m)
            home = out[0] + (m * out[1] + r * bo) * eb
            c = (home, out[1]) if nb == bo else (edge, bo)
            _fill(z, eb, c[0], c[1], size, nb, bias + r * bo * eb if bias else 0)
            _row(z, eb, c, x, w, arrays, (lo, hi), turned, (m, size, tokens[1]))
            if nb < bo:
                for g in range(size):
                    for j in range(nb):
                        move(z, (home + g * out[1] * eb, j, edge + g * bo * eb, j))
    scratch[0] = 0  # numba frees an array after its last use: this keeps it until here


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
def wide_dots(
    z: Any, eb: int, dw: int, dy: Any, x: Any, block: Any, arrays: Any, entries: Any, tokens: int
) -> None:
    """`dw[e] += dyᵀ x` for a range of blocks, all tokens.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        dw: address of (nnzb, bh, bw), zeroed.
        dy: (address, row stride, column stride, features).
        x: likewise.
        block: (bh, bw).
        arrays: (crow, col).
        entries: range (start, stop) of blocks.
        tokens: M.
    """
    bh, bw = block
    scratch = np.empty((PASS * (bh + bw)) * eb, np.uint8)
    left = scratch.ctypes.data
    right = left + PASS * bh * eb
    first = 0
    while geti(z, (arrays[0], first + 1)) <= entries[0]:
        first += 1
    for m in range(0, tokens, PASS):
        size = min(PASS, tokens - m)
        r, fresh = first, True
        for e in range(entries[0], entries[1]):
            while geti(z, (arrays[0], r + 1)) <= e:
                r, fresh = r + 1, True
            if fresh:
                _panel(z, eb, left, dy, r * bh, bh, m, size)
                fresh = False
            _panel(z, eb, right, x, geti(z, (arrays[1], e)) * bw, bw, m, size)
            c = (dw + e * bh * bw * eb, bw)
            near = 0
            if e + 1 < entries[1] and x[2] == 1 and size == PASS:
                near = x[0] + (m * x[1] + geti(z, (arrays[1], e + 1)) * bw) * eb
            soon = (near, x[1], -(-PASS * ROWS // bh), bw * eb)
            _sweep(z, eb, bh, bw, c, (left, 1, bh), (right, bw), size, soon)
    scratch[0] = 0  # numba frees an array after its last use: this keeps it until here
