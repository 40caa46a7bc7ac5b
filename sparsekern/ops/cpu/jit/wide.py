"""numba kernels for wide blocks: both edges a multiple of two vectors (16 floats with AVX).

Activations stay where they are: the vectors run over a block's outputs, a register tile is `ROWS`
tokens by two vectors and stays in registers over all blocks of a row. Bound: multiply-adds, while x
comes from L3 or nearer; the parts of a job are ranges of tokens small enough for that.

Tensors come as addresses, sizes and strides (in elements), so one compiled version serves every
layout. `z` is a scalar of the element type, `eb` its bytes; `job` is one of `job.py`.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.job import (
    BIAS,
    BLOCK_ROWS,
    IDX,
    IN_EDGE,
    NEXT,
    OUT,
    OUT_EDGE,
    OUT_FEATURES,
    OUT_ROW,
    PARTS,
    PTR,
    SLOT,
    SPAN,
    SPLIT,
    TOKENS,
    TURNED,
    X_COL,
    X_FEATURES,
    X_ROW,
    W,
    X,
)
from sparsekern.ops.cpu.jit.simd import (
    ROWS,
    WIDTH,
    clear,
    cut,
    field,
    geti,
    inlined,
    jit,
    move,
    take,
    turn,
    vmove,
)
from sparsekern.ops.cpu.jit.sums import sums_four, sums_most, sums_one, sums_two

PASS = 16 * ROWS  # tokens of one pass over a block row: what it reads of x stays in L2
LEAST = 64  # tokens for which each thread takes all block rows
UNIT = 2 * ROWS  # tokens that a part takes a multiple of
COPY = 32  # tokens for which a copy of the weights in the order of reading pays


@jit
def _row(z: Any, eb: int, cols: int, c: Any, bias: int, x: Any, b: Any, run: Any, end: Any) -> None:
    """All blocks of one block row, one pass of tokens.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        cols: outputs, a multiple of two vectors.
        c: (address, row stride) of the first token's outputs.
        bias: address of `cols` numbers.
        x: (address of the first token, row stride, column stride, stride of a feature block).
        b: (address, row stride, stride of a slot, stride from two vectors of outputs to the next).
        run: (idx, slot, first block, last, depth of a block, all features).
        end: (tokens of the pass, tokens from its start to where x is read no further).
    """
    step = 2 * (WIDTH // eb)
    for j in range(0, cols, step):
        at = (b[0] + j // step * b[3] * eb, b[1], 0, b[2])
        g = 0
        while g < end[0]:
            cg = (c[0] + (g * c[1] + j) * eb, c[1], bias + j * eb, 0)
            ag = (x[0] + g * x[1] * eb, x[1], x[2], x[3], 0)
            # the first outputs ask for the rows that the next tile of tokens reads
            lines = run[4] * eb // 64 if j == 0 and x[2] == 1 and g + 2 * ROWS <= end[1] else 0
            rest = (ROWS * x[1] * eb, lines)
            if end[0] - g >= ROWS:
                sums_most(z, cg + ag + at + run + rest)
                g += ROWS
            elif end[0] - g >= 4:
                sums_four(z, cg + ag + at + run + (0, 0))
                g += 4
            elif end[0] - g >= 2:
                sums_two(z, cg + ag + at + run + (0, 0))
                g += 2
            else:
                sums_one(z, cg + ag + at + run + (0, 0))
                g += 1


@jit
def _panels(z: Any, eb: int, dst: int, w: int, bo: int, bi: int, run: Any, turned: int) -> None:
    """Copy the blocks of a block row as panels (two vectors of outputs, blocks, features)."""
    lanes = WIDTH // eb
    step, count = 2 * lanes, run[3] - run[2]
    for e in range(count):
        s = geti(z, (run[1], run[2] + e)) if run[1] else run[2] + e
        src = w + s * bo * bi * eb
        for j in range(0, bo, lanes):
            to = dst + (((j // step * count + e) * bi) * step + j % step) * eb
            if turned:
                for k in range(0, bi, lanes):
                    turn(z, (to + k * step * eb, step, src + (j * bi + k) * eb, bi))
            else:
                for k in range(bi):
                    vmove(z, (to + k * step * eb, src + (k * bo + j) * eb))


@jit
def _lead(z: Any, dst: int, bias: int, valid: int, edge: int) -> None:
    """Copy a block row's bias (an address; 0: zero), zero beyond the last output."""
    for j in range(edge):
        if bias and j < valid:
            move(z, (dst, j, bias, j))
        else:
            clear(z, (dst, j))


@jit
def _sum_rows(z: Any, eb: int, job: int, rows: Any, tokens: Any) -> None:
    """One part of `wide_sum`: ranges of block rows and of tokens."""
    bo, bi, out_row = field(z, (job, OUT_EDGE)), field(z, (job, IN_EDGE)), field(z, (job, OUT_ROW))
    x_row, x_col, bias = field(z, (job, X_ROW)), field(z, (job, X_COL)), field(z, (job, BIAS))
    ptr, turned, w, most = field(z, (job, PTR)), field(z, (job, TURNED)), field(z, (job, W)), 0
    for r in range(rows[0], rows[1]):
        most = max(most, geti(z, (ptr, r + 1)) - geti(z, (ptr, r)))
    copied = turned or tokens[1] - tokens[0] >= COPY
    step = 2 * (WIDTH // eb)
    scratch = np.empty((copied * most * bo * bi + (PASS + 1) * bo) * eb, np.uint8)
    lead = scratch.ctypes.data
    edge = lead + bo * eb
    panel = edge + PASS * bo * eb
    for r in range(rows[0], rows[1]):
        lo, hi = geti(z, (ptr, r)), geti(z, (ptr, r + 1))
        run = (field(z, (job, IDX)), field(z, (job, SLOT)), lo, hi)
        rest = (bi, field(z, (job, X_FEATURES)))
        valid = min(bo, field(z, (job, OUT_FEATURES)) - r * bo)
        _lead(z, lead, bias + r * bo * eb if bias else 0, valid, bo)
        b = (w, bo, bo * bi, step)
        if copied:
            _panels(z, eb, panel, w, bo, bi, run, turned)
            b = (panel - lo * bi * step * eb, step, bi * step, (hi - lo) * bi * step)
            run = (run[0], 0, lo, hi)
        for m in range(tokens[0], tokens[1], PASS):
            size = min(PASS, tokens[1] - m)
            home = field(z, (job, OUT)) + (m * out_row + r * bo) * eb
            c = (home, out_row) if valid == bo else (edge, bo)
            x = (field(z, (job, X)) + m * x_row * eb, x_row, x_col, bi * x_col)
            _row(z, eb, bo, c, lead, x, b, run + rest, (size, tokens[1] - m))
            if valid < bo:
                for g in range(size):
                    for j in range(valid):
                        move(z, (home + g * out_row * eb, j, edge + g * bo * eb, j))
    scratch[0] = 0  # numba frees an array after its last use: this keeps it until here


@inlined
def wide_sum(z: Any, eb: int, job: int) -> None:
    """`out[m, o] = bias[o] + sum_i x[m, i] w[o, i]`.

    Parts: ranges of SPAN tokens, each cut in SPLIT ranges of block rows. TURNED: a stored block is
    (out, in), else (in, out). SLOT 0: blocks are stored in the order of IDX.
    """
    split, span = field(z, (job, SPLIT)), field(z, (job, SPAN))
    tokens = field(z, (job, TOKENS))
    ptr, count = field(z, (job, PTR)), field(z, (job, BLOCK_ROWS))
    part = take(z, (job, NEXT))
    while part < field(z, (job, PARTS)):
        first, of = part // split * span, part % split
        rows = (cut(z, ptr, count, of, split), cut(z, ptr, count, of + 1, split))
        _sum_rows(z, eb, job, rows, (first, min(tokens, first + span)))
        part = take(z, (job, NEXT))


@jit
def wide_sum_single(job: int) -> None:
    """`wide_sum` of float32."""
    wide_sum(np.float32(0), 4, job)


@jit
def wide_sum_double(job: int) -> None:
    """`wide_sum` of float64."""
    wide_sum(np.float64(0), 8, job)
