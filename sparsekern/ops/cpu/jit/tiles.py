"""numba kernels for any block, (1, 1) among them: tokens are the vector axis.

Activations are packed into tiles of `VECS` vectors of tokens, (features, tokens) within a tile, so
one tile of 1024 features stays in L2. Bound for (1, 1): L2 reads, `VECS` vectors per entry for as
many multiply-adds, a quarter to a third of the dense product's rate.

Tensors come as addresses, sizes and strides (in elements), so one compiled version serves every
layout. A kernel does the part of the work that its ranges name; parts write disjoint outputs, so
the number of threads changes no bit. `z` is a scalar of the element type, `eb` its bytes; `ptr`,
`idx`, `slot` are addresses of int32 arrays.
"""

from typing import Any

import numpy as np

from sparsekern.ops.cpu.jit.simd import (
    VECS,
    WIDTH,
    clear,
    csr_row,
    dots1,
    dots4,
    geti,
    jit,
    move,
    tok_four,
    tok_one,
    turn,
    vfill,
)


@jit
def pack(z: Any, eb: int, dst: int, x: Any, start: int, size: int) -> None:
    """Copy `size` tokens of `x` as (features, tile); tokens beyond them are zero."""
    lanes = WIDTH // eb
    tile = VECS * lanes
    for t in range(0, tile, lanes):
        k = 0
        src = x[0] + (start + t) * x[1] * eb
        if x[2] == 1 and t + lanes <= size:
            while k + lanes <= x[3]:
                turn(z, (dst + (k * tile + t) * eb, tile, src + k * eb, x[1]))
                k += lanes
        for i in range(k, x[3]):
            for j in range(lanes):
                if t + j < size:
                    move(z, (dst, i * tile + t + j, src, j * x[1] + i * x[2]))
                else:
                    clear(z, (dst, i * tile + t + j))


@jit
def _unpack(z: Any, eb: int, dst: int, ldd: int, src: int, features: int, size: int) -> None:
    """Copy (features, tile) as `size` tokens of a row-major matrix."""
    lanes = WIDTH // eb
    tile = VECS * lanes
    for t in range(0, size, lanes):
        k = 0
        if t + lanes <= size:
            while k + lanes <= features:
                turn(z, (dst + (t * ldd + k) * eb, ldd, src + (k * tile + t) * eb, tile))
                k += lanes
        for j in range(t, min(t + lanes, size)):
            for i in range(k, features):
                move(z, (dst, j * ldd + i, src, i * tile + j))


@jit
def tile_sum(
    z: Any, eb: int, out: Any, xt: int, w: Any, arrays: Any, bias: int, start: int, size: int
) -> None:
    """`out[m, o] = bias[o] + sum_i x[m, i] w[o, i]` for one packed tile of tokens.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        out: (address, row stride, features).
        xt: address of the tile, (in features, tile).
        w: (address, out edge, in edge, out stride, in stride, in features).
        arrays: (ptr, idx, slot, rows); slot 0 means the identity.
        bias: address or 0.
        start: the tile's first token.
        size: how many tokens it holds.
    """
    lanes = WIDTH // eb
    tile = VECS * lanes
    bo = w[1]
    group = max(1, lanes // bo)
    scratch = np.empty(group * bo * tile * eb, np.uint8)
    acc = scratch.ctypes.data
    for r in range(0, arrays[3], group):
        some = min(group * bo, out[2] - r * bo)
        for q in range(r, min(r + group, arrays[3])):
            _row(z, eb, acc + (q - r) * bo * tile * eb, xt, w, arrays, bias, q, out[2])
        _unpack(z, eb, out[0] + (start * out[1] + r * bo) * eb, out[1], acc, some, size)
    scratch[0] = 0  # numba frees an array after its last use: this keeps it until here


@jit
def _row(
    z: Any, eb: int, acc: int, xt: int, w: Any, arrays: Any, bias: int, r: int, outs: int
) -> None:
    """One block row of `tile_sum` into `acc`, (out edge, tile)."""
    tile = VECS * (WIDTH // eb)
    bo, bi = w[1], w[2]
    lo, hi = geti(z, (arrays[0], r)), geti(z, (arrays[0], r + 1))
    if bo == 1 and bi == 1:
        b = bias + r * eb if bias else 0
        # entries come in the order of `idx`
        csr_row(z, (acc, w[0], arrays[1], lo, hi, xt, tile, b))
        return
    valid = min(bo, outs - r * bo)
    for i in range(valid):
        for j in range(0, tile, WIDTH // eb):
            vfill(z, (acc + (i * tile + j) * eb, bias + (r * bo + i) * eb if bias else 0))
    for e in range(lo, hi):
        s = geti(z, (arrays[2], e)) if arrays[2] else e
        i = geti(z, (arrays[1], e)) * bi
        kn = min(bi, w[5] - i)
        b = xt + i * tile * eb
        o = 0
        while o < valid:
            c = acc + o * tile * eb
            a = w[0] + (s * bo * bi + o * w[3]) * eb
            if o + 4 <= valid:
                tok_four(z, (c, tile, a, w[3], w[4], b, tile, kn))
                o += 4
            else:
                tok_one(z, (c, tile, a, w[3], w[4], b, tile, kn))
                o += 1


@jit
def tile_dots(
    z: Any, eb: int, dw: int, dt: int, xt: int, block: Any, shape: Any, arrays: Any, entries: Any
) -> None:
    """`dw[e] += dyᵀ x` for a range of blocks, one packed tile of tokens.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        dw: address of (nnzb, bh, bw).
        dt: address of the tile of dy, (features, tile).
        xt: address of the tile of x, likewise.
        block: (bh, bw).
        shape: (rows, cols).
        arrays: (crow, col).
        entries: range (start, stop) of blocks.
    """
    line = VECS * WIDTH
    bh, bw = block
    e, r = entries[0], 0
    while e < entries[1]:
        while geti(z, (arrays[0], r + 1)) <= e:
            r += 1
        stop = min(entries[1], geti(z, (arrays[0], r + 1)))
        if bh == 1 and bw == 1:
            a = dt + r * line
            while e + 4 <= stop:
                p = xt + geti(z, (arrays[1], e)) * line
                q = xt + geti(z, (arrays[1], e + 1)) * line
                s = xt + geti(z, (arrays[1], e + 2)) * line
                t = xt + geti(z, (arrays[1], e + 3)) * line
                dots4(z, (dw + e * eb, a, p, q, s, t))
                e += 4
            while e < stop:
                dots1(z, (dw + e * eb, a, xt + geti(z, (arrays[1], e)) * line))
                e += 1
        while e < stop:
            k = geti(z, (arrays[1], e)) * bw
            for i in range(min(bh, shape[0] - r * bh)):
                a = dt + (r * bh + i) * line
                j, n = 0, min(bw, shape[1] - k)
                while j < n:
                    at, b = dw + ((e * bh + i) * bw + j) * eb, xt + (k + j) * line
                    if j + 4 <= n:
                        dots4(z, (at, a, b, b + line, b + 2 * line, b + 3 * line))
                        j += 4
                    else:
                        dots1(z, (at, a, b))
                        j += 1
            e += 1
