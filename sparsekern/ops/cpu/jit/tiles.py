"""numba kernels for any block, (1, 1) among them: tokens are the vector axis.

Activations are packed into tiles of at most `VECS` vectors of tokens, (features, LD tokens) within
a tile. Bound for (1, 1): L2 reads, one vector for each vector multiply-add, about a third of the
dense product's rate.

Tensors come as addresses, sizes and strides (in elements), so one compiled version serves every
layout. `z` is a scalar of the element type, `eb` its bytes; `job` is one of `job.py`.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.job import (
    BIAS,
    BLOCK_ROWS,
    FIRST,
    IDX,
    IN_EDGE,
    LD,
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
    WORKERS,
    X_COL,
    X_FEATURES,
    X_ROW,
    X_TILES,
    Y_COL,
    Y_FEATURES,
    Y_ROW,
    Y_TILES,
    W,
    X,
    Y,
)
from sparsekern.ops.cpu.jit.simd import (
    ROWS,
    VECS,
    WIDTH,
    clear,
    cut,
    field,
    geti,
    inlined,
    jit,
    move,
    prefetch,
    take,
    turn,
    vfill,
    vmove,
)
from sparsekern.ops.cpu.jit.sums import (
    entries_four,
    entries_most,
    entries_one,
    entries_two,
    sums_four,
    sums_most,
    sums_one,
    sums_two,
)


@jit
def _pack(z: Any, eb: int, dst: int, ld: int, x: Any, start: int, size: int, spare: int) -> None:
    """Copy `size` tokens of `x` as (features, ld); tokens beyond them, up to a vector, are zero."""
    lanes = WIDTH // eb
    for t in range(0, size, lanes):
        src, k, here = x[0] + (start + t) * x[1] * eb, 0, min(lanes, size - t)
        if x[2] == 1:
            while k + lanes <= x[3]:
                if here < lanes:  # through a square
                    for j in range(lanes):
                        if j < here:
                            vmove(z, (spare + j * WIDTH, src + (j * x[1] + k) * eb))
                        else:
                            vfill(z, (spare + j * WIDTH, 0))
                    turn(z, (dst + (k * ld + t) * eb, ld, spare, lanes))
                else:
                    turn(z, (dst + (k * ld + t) * eb, ld, src + k * eb, x[1]))
                k += lanes
        for i in range(k, x[3]):
            for j in range(lanes):
                if j < here:
                    move(z, (dst, i * ld + t + j, src, j * x[1] + i * x[2]))
                else:
                    clear(z, (dst, i * ld + t + j))


@jit
def _unpack(
    z: Any, eb: int, dst: int, ldd: int, src: int, ld: int, features: int, size: int, spare: int
) -> None:
    """Copy (features, ld) as `size` tokens of a row-major matrix."""
    lanes = WIDTH // eb
    for t in range(0, size, lanes):
        k, here = 0, min(lanes, size - t)
        while k + lanes <= features:
            to, at = dst + (t * ldd + k) * eb, src + (k * ld + t) * eb
            if here < lanes:
                turn(z, (spare, lanes, at, ld))
                for j in range(here):
                    vmove(z, (to + j * ldd * eb, spare + j * WIDTH))
            else:
                turn(z, (to, ldd, at, ld))
            k += lanes
        for j in range(t, t + here):
            for i in range(k, features):
                move(z, (dst, j * ldd + i, src, i * ld + j))


@jit
def _entries(z: Any, acc: int, w: int, run: Any, x: int, ld: int, vecs: int) -> None:
    """`acc[vecs] += sum_e w[e] x[idx[e], vecs]` for one row: run is (idx, first, last entry)."""
    v = 0
    while v < vecs:
        c, at = acc + v * WIDTH, x + v * WIDTH
        if vecs - v >= VECS:
            entries_most(z, (c, w, run[0], run[1], run[2], at, ld))
            v += VECS
        elif vecs - v >= 4:
            entries_four(z, (c, w, run[0], run[1], run[2], at, ld))
            v += 4
        elif vecs - v >= 2:
            entries_two(z, (c, w, run[0], run[1], run[2], at, ld))
            v += 2
        else:
            entries_one(z, (c, w, run[0], run[1], run[2], at, ld))
            v += 1


@jit
def _outputs(z: Any, eb: int, acc: int, valid: int, vecs: int, a: Any, b: Any, run: Any) -> None:
    """One block row: acc (address, ld) += sums over its blocks, in tiles of two vectors."""
    for j in range(0, vecs, 2):
        at = (b[0] + j * WIDTH, b[1], b[2], b[3])
        o = 0
        while o < valid:
            c = acc + o * b[1] * eb + j * WIDTH
            cg = (c, b[1], c, b[1])
            ag = (a[0] + o * a[1] * eb, a[1], a[2], a[3], a[4])
            if valid - o >= ROWS:
                sums_most(z, cg + ag + at + run)
                o += ROWS
            elif valid - o >= 4:
                sums_four(z, cg + ag + at + run)
                o += 4
            elif valid - o >= 2:
                sums_two(z, cg + ag + at + run)
                o += 2
            else:
                sums_one(z, cg + ag + at + run)
                o += 1


@jit
def _sum_tile(z: Any, eb: int, job: int, xt: int, tokens: Any, rows: Any, room: int) -> None:
    """A range of block rows for one packed tile of tokens (start, size)."""
    bo, bi, ld = field(z, (job, OUT_EDGE)), field(z, (job, IN_EDGE)), field(z, (job, LD))
    w, ptr, idx = field(z, (job, W)), field(z, (job, PTR)), field(z, (job, IDX))
    features, out_row, bias = (
        field(z, (job, OUT_FEATURES)),
        field(z, (job, OUT_ROW)),
        field(z, (job, BIAS)),
    )
    lanes, limit = WIDTH // eb, field(z, (job, X_FEATURES))
    group, vecs, acc = max(1, 2 * lanes // bo), -(-tokens[1] // lanes), room + WIDTH * lanes
    # a stored block is (out, in) if it is to be turned, else (in, out)
    strides = (bi, 1) if field(z, (job, TURNED)) else (1, bo)
    a, b = (w, strides[0], strides[1], 0, bo * bi), (xt, ld, bi * ld, 0)
    for r in range(rows[0], rows[1], group):
        last = min(r + group, rows[1])
        some = min((last - r) * bo, features - r * bo)
        home = field(z, (job, OUT)) + (tokens[0] * out_row + r * bo) * eb
        for i in range(tokens[1]):  # rows a page apart: no hardware prefetcher follows
            prefetch(z, (home + i * out_row * eb,))
        for i in range(some):
            for v in range(vecs):
                vfill(z, (acc + i * ld * eb + v * WIDTH, bias + (r * bo + i) * eb if bias else 0))
        for q in range(r, last):
            at, lo, hi = acc + (q - r) * bo * ld * eb, geti(z, (ptr, q)), geti(z, (ptr, q + 1))
            if bo == 1 and bi == 1:
                _entries(z, at, w, (idx, lo, hi), xt, ld, vecs)
            else:
                run = (idx, field(z, (job, SLOT)), lo, hi, bi, limit, 0, 0)
                _outputs(z, eb, at, min(bo, features - q * bo), vecs, a, b, run)
        _unpack(z, eb, home, out_row, acc, ld, some, tokens[1], room)


@jit
def _room(z: Any, eb: int, job: int) -> Any:
    """Bytes that `_sum_tile` needs: a square, and the outputs of some block rows."""
    bo, ld = field(z, (job, OUT_EDGE)), field(z, (job, LD))
    return (max(1, 2 * (WIDTH // eb) // bo) * bo * ld + (WIDTH // eb) ** 2) * eb


@inlined
def tile_sum(z: Any, eb: int, job: int) -> None:
    """`out[m, o] = bias[o] + sum_i x[m, i] w[o, i]`.

    Parts: tiles of SPAN tokens, each cut in SPLIT ranges of block rows. X_TILES: (workers, in
    features, LD). TURNED and SLOT as in `wide.wide_sum`.
    """
    tokens, span, split = field(z, (job, TOKENS)), field(z, (job, SPAN)), field(z, (job, SPLIT))
    features, ld = field(z, (job, X_FEATURES)), field(z, (job, LD))
    x = (field(z, (job, X)), field(z, (job, X_ROW)), field(z, (job, X_COL)), features)
    ptr, count = field(z, (job, PTR)), field(z, (job, BLOCK_ROWS))
    xt = field(z, (job, X_TILES)) + take(z, (job, WORKERS)) * features * ld * eb
    room = np.empty(_room(z, eb, job), np.uint8)
    spare = room.ctypes.data
    part, packed = take(z, (job, NEXT)), -1
    while part < field(z, (job, PARTS)):
        tile, of = part // split, part % split
        start = tile * span
        size = min(span, tokens - start)
        if tile != packed:
            _pack(z, eb, xt, ld, x, start, size, spare)
            packed = tile
        rows = (cut(z, ptr, count, of, split), cut(z, ptr, count, of + 1, split))
        _sum_tile(z, eb, job, xt, (start, size), rows, spare)
        part = take(z, (job, NEXT))
    room[0] = 0  # numba frees an array after its last use: this keeps it until here


@inlined
def tile_pack(z: Any, eb: int, job: int) -> None:
    """Pack TILES tiles of x and of y, tile FIRST the first of them, each of them a part."""
    tokens, span, ld = field(z, (job, TOKENS)), field(z, (job, SPAN)), field(z, (job, LD))
    room = np.empty((WIDTH // eb) * WIDTH, np.uint8)
    square = room.ctypes.data
    part = take(z, (job, NEXT))
    while part < field(z, (job, PARTS)):
        i = part // 2
        start = (field(z, (job, FIRST)) + i) * span
        source = (field(z, (job, X)), field(z, (job, X_ROW)), field(z, (job, X_COL)))
        features, tiles = field(z, (job, X_FEATURES)), field(z, (job, X_TILES))
        if part % 2:
            source = (field(z, (job, Y)), field(z, (job, Y_ROW)), field(z, (job, Y_COL)))
            features, tiles = field(z, (job, Y_FEATURES)), field(z, (job, Y_TILES))
        at, size = tiles + i * features * ld * eb, min(span, tokens - start)
        _pack(z, eb, at, ld, (*source, features), start, size, square)
        part = take(z, (job, NEXT))
    room[0] = 0  # numba frees an array after its last use: this keeps it until here


@jit
def tile_sum_single(job: int) -> None:
    """`tile_sum` of float32."""
    tile_sum(np.float32(0), 4, job)


@jit
def tile_sum_double(job: int) -> None:
    """`tile_sum` of float64."""
    tile_sum(np.float64(0), 8, job)


@jit
def tile_pack_single(job: int) -> None:
    """`tile_pack` of float32."""
    tile_pack(np.float32(0), 4, job)


@jit
def tile_pack_double(job: int) -> None:
    """`tile_pack` of float64."""
    tile_pack(np.float64(0), 8, job)
