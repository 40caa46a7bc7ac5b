"""numba kernels of the sparse convolution's sums: the forward product and the input gradient.

On flat planes (`conv_pack`) a tap of the kernel is a shift, so an output channel is a sum of
shifted input rows: register tiles of 4 outputs by `SUM_VECS` vectors of pixels, or of 8 by half of
them. Bound: for blocks, multiply-adds; for single entries, L2 reads of `ENTRY_VECS` vectors each.

`z` is a scalar of the element type, `eb` its bytes; addresses are integers, strides in elements.
"""

from typing import Any

from sparsekern.ops.cpu.jit.conv_moves import fill
from sparsekern.ops.cpu.jit.conv_pack import BY_CHANNEL, copy_out, segments
from sparsekern.ops.cpu.jit.conv_simd import (
    ENTRY_VECS,
    LARGE,
    SUM_VECS,
    entry_sums,
    sum_eight,
    sum_four,
    sum_one,
)
from sparsekern.ops.cpu.jit.conv_spec import Places, Sums, Weights
from sparsekern.ops.cpu.jit.simd import WIDTH, jit


@jit
def locate(
    crow: Any, col: Any, table: Any, group: Any, rows: int, at: Any, count: Any, used: Any
) -> None:
    """Where each stored block reads its input.

    Args:
        crow: int32, of the topology.
        col: int32.
        table: int64, (3, block columns): offset in scratch, channels, and place in `used` of each
            block column, of group 0.
        group: (elements, marks in `used`) from one group's channels to the next's.
        rows: block rows of a group.
        at: int32, (nnzb,), receives the offsets.
        count: int32, (nnzb,) or less if all counts are equal, receives how many channels.
        used: uint8, see `Image`, set to 1 where a block reads.
    """
    for r in range(crow.size - 1):
        g = r // rows
        for e in range(crow[r], crow[r + 1]):
            c = col[e]
            at[e] = table[0, c] + g * group[0]
            if e < count.size:
                count[e] = table[1, c]
            used[table[2, c] + g * group[1]] = 1


@jit
def locate_transposed(arrays: Any, taps: Any, sizes: Any, ptr: Any, places: Places) -> None:
    """The same for the input gradient, whose outputs are (phase, group, block of channels).

    Args:
        arrays: (ccol, row, perm) of the topology, int32.
        taps: int64, (taps, 2): phase and shift of each tap.
        sizes: (phases, groups, block columns per tap, block rows per group, output channels per
            group, bh, row stride of dy in scratch).
        ptr: int32, (outputs + 1,), receives where each output starts.
        places: receives what each block reads.
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
                            places.at[i] = (g * outs + first) * ld - taps[tap, 1]
                            places.count[i] = min(bh, outs - first)
                            places.slot[i] = perm[q]
                            i += 1
    ptr[b] = i


@jit
def mark_rows(crow: Any, used: Any) -> None:
    """Mark the block rows that hold a block."""
    for r in range(crow.size - 1):
        used[r] = crow[r + 1] > crow[r]


@jit
def _row_sum(
    z: Any, eb: int, c: Any, x: Any, w: Weights, places: Places, span: Any, valid: int, size: int
) -> None:
    """`c[valid, size] += ` the blocks lo <= e < hi of one block row."""
    lanes = WIDTH // eb
    lo, hi = span
    at, count = places.at.ctypes.data, places.count.ctypes.data
    if w.block == 1:
        for m in range(0, size, ENTRY_VECS * lanes):
            entry_sums(z, (c[0] + m * eb, w.address, at, lo, hi, x[0] + m * eb))
        return
    half = SUM_VECS // 2 * lanes
    slot = places.slot.ctypes.data if places.slot.size else 0
    step = 1 if places.count.size > 1 else 0
    rest = (w.block, w.out, w.into, slot, at, count, step, lo, hi)
    for m in range(0, size, SUM_VECS * lanes):
        o = 0
        while o < valid:
            home, a = c[0] + (o * c[1] + m) * eb, w.address + o * w.out * eb
            here = x[0] + m * eb
            if LARGE and o + 8 <= valid:
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
    z: Any, eb: int, x: Any, sums: Sums, outputs: Any, acc: Any, found: Any, pixels: Any
) -> None:
    """Write all pixels of one chunk of some block rows of a product.

    Args:
        z: scalar of the element type.
        eb: its bytes.
        x: (address of the chunk's first pixel, row stride) of the input in scratch.
        sums: the product.
        outputs: first and last + 1 block row.
        acc: (address, row stride) of scratch for one block row.
        found: int64 scratch for runs.
        pixels: (first pixel, last + 1, pixels to compute).
    """
    out = sums.out
    known, count = -1, 0
    for b in range(outputs[0], outputs[1]):
        phase = b // (out.groups * out.blocks)
        if phase != known:
            known, count = phase, segments(out.views[phase], pixels[0], pixels[1], found)
        g = b // out.blocks - phase * out.groups
        j = b % out.blocks * out.edge
        valid = min(out.edge, out.channels - j)
        channel = g * out.channels + j
        for i in range(valid):
            at = out.bias + (channel + i) * eb if out.bias else 0
            fill(z, (acc[0] + i * acc[1] * eb, at, pixels[2] // (WIDTH // eb)))
        span = (sums.ptr[b], sums.ptr[b + 1])
        _row_sum(z, eb, acc, x, sums.weights, sums.places, span, valid, pixels[2])
        home = out.address + channel * out.views[phase, BY_CHANNEL] * eb
        copy_out(z, eb, home, out.views[phase], found, count, acc[0], acc[1], valid)
