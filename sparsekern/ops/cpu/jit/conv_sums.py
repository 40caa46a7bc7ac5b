"""numba kernels of the sparse convolution's sums: the forward product and the input gradient.

On flat planes (`conv_pack`) a tap of the kernel is a shift, so an output channel is a sum of
shifted input rows: register tiles of 8 outputs by half of `SUM_VECS` vectors of pixels. Bound: for
blocks, multiply-adds; for single entries, L2 reads of `ENTRY_VECS` vectors per entry.

`z` is a scalar of the element type, `eb` its bytes; addresses are integers, strides in elements.
"""

from typing import Any

from sparsekern.ops.cpu.jit.conv_moves import fill
from sparsekern.ops.cpu.jit.conv_pack import copy_out, segments
from sparsekern.ops.cpu.jit.conv_simd import (
    EIGHT_AT_ONCE,
    ENTRY_VECS,
    SUM_VECS,
    entry_sums,
    sum_eight,
    sum_four,
    sum_one,
)
from sparsekern.ops.cpu.jit.simd import WIDTH, jit


@jit
def locate(
    crow: Any, col: Any, table: Any, counts: Any, group: int, rows: int, at: Any, kn: Any
) -> None:
    """Where each stored block reads: `at[e] = table[col] + group` times its group.

    Args:
        crow: int32, of the topology.
        col: int32.
        table: int64, offset of each block column of group 0.
        counts: int64, channels of each block column.
        group: elements from one group's channels to the next's.
        rows: block rows of a group.
        at: int32, (nnzb,), receives the offsets.
        kn: int32, (nnzb,) or less if all counts are equal, receives the counts.
    """
    for r in range(crow.size - 1):
        base = r // rows * group
        for e in range(crow[r], crow[r + 1]):
            at[e] = table[col[e]] + base
            if e < kn.size:
                kn[e] = counts[col[e]]


@jit
def locate_transposed(arrays: Any, taps: Any, sizes: Any, ptr: Any, places: Any) -> None:
    """The same for the input gradient, whose outputs are (phase, group, block of channels).

    Args:
        arrays: (ccol, row, perm) of the topology, int32.
        taps: int64, (taps, 2): phase and shift of each tap.
        sizes: (phases, groups, block columns per tap, block rows per group, output channels per
            group, bh, row stride of dy in scratch).
        ptr: int32, (outputs + 1,), receives where each output starts.
        places: int32, (3, nnzb), receives offsets, counts and slots.
    """
    ccol, row, perm = arrays
    phases, groups, columns, rows, outs, bh, ld = sizes
    i, b = 0, 0
    for phase in range(phases):
        for g in range(groups):
            for c in range(columns):
                ptr[b] = i
                b += 1
                for tap in range(taps.shape[0]):
                    if taps[tap, 0] == phase:
                        key = (g * taps.shape[0] + tap) * columns + c
                        for q in range(ccol[key], ccol[key + 1]):
                            first = (row[q] - g * rows) * bh
                            places[0, i] = (g * outs + first) * ld - taps[tap, 1]
                            places[1, i] = min(bh, outs - first)
                            places[2, i] = perm[q]
                            i += 1
    ptr[b] = i


@jit
def _row_sum(
    z: Any, eb: int, c: Any, x: Any, w: Any, places: Any, span: Any, valid: int, size: int
) -> None:
    """`c[valid, size] += ` the blocks lo <= e < hi of one block row."""
    lanes = WIDTH // eb
    lo, hi = span
    at, kn, step, slot = places
    if w[1] == 1:
        for m in range(0, size, ENTRY_VECS * lanes):
            entry_sums(z, (c[0] + m * eb, w[0], at, lo, hi, x[0] + m * eb))
        return
    half = SUM_VECS // 2 * lanes
    for m in range(0, size, SUM_VECS * lanes):
        o = 0
        while o < valid:
            home, a = c[0] + (o * c[1] + m) * eb, w[0] + o * w[2] * eb
            rest = (w[1], w[2], w[3], slot, at, kn, step, lo, hi)
            here = x[0] + m * eb
            if EIGHT_AT_ONCE and o + 8 <= valid:
                sum_eight(z, (home, c[1], a, *rest, here, x[1]))
                sum_eight(z, (home + half * eb, c[1], a, *rest, here + half * eb, x[1]))
                o += 8
            elif o + 4 <= valid:
                sum_four(z, (home, c[1], a, *rest, here, x[1]))
                o += 4
            else:
                sum_one(z, (home, c[1], a, *rest, here, x[1]))
                o += 1


@jit
def sum_chunk(
    z: Any, eb: int, x: Any, w: Any, ptr: Any, places: Any, out: Any, acc: Any, found: Any, m: Any
) -> None:
    """Write all pixels of one chunk of some block rows of a product.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        x: (address of the chunk's first pixel, row stride) of the input in scratch.
        w: (address, elements of a block, strides of out and in channel).
        ptr: int32, where each block row starts.
        places: addresses of int32 arrays (offsets, counts, step of counts, slots or 0).
        out: (address, views, groups, block rows per group, channels per group, channels per block,
            bias address or 0, first and last + 1 block row).
        acc: (address, row stride) of scratch for one block row.
        found: int64 scratch for runs.
        m: (first pixel, last + 1, pixels to compute).
    """
    address, views, groups, blocks, channels, edge, bias, first, last = out
    known, count = -1, 0
    for b in range(first, last):
        phase = b // (groups * blocks)
        if phase != known:
            known, count = phase, segments(views[phase], m[0], m[1], found)
        g = b // blocks - phase * groups
        j = b % blocks * edge
        valid = min(edge, channels - j)
        channel = g * channels + j
        for i in range(valid):
            at = bias + (channel + i) * eb if bias else 0
            fill(z, (acc[0] + i * acc[1] * eb, at, m[2] // (WIDTH // eb)))
        _row_sum(z, eb, acc, x, w, places, (ptr[b], ptr[b + 1]), valid, m[2])
        home = address + channel * views[phase, 11] * eb
        copy_out(z, eb, home, views[phase], found, count, acc[0], acc[1], valid)
