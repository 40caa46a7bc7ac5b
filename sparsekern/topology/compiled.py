"""Loops over positions and scores, compiled by numba; `native` says when they run.

All of them are linear: scores are chosen by counting the bits of their keys, positions are sorted
by counting or merged where they are sorted already. Each does exactly what the torch code beside
its caller does, ties and order included. Arrays are contiguous and 1-D; outputs are given.
"""

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsekern.topology.kept import jit

ir = cgutils.ir

CHUNK = 16
"""Scores that are compared with the threshold at once."""
_DIGIT = 12
_DIGITS = 1 << _DIGIT
_RADIX = 11
_VECTOR_BYTES = 32


# ---- selection


def _emit_any_above(_context: Any, scores: Any, at: Any, threshold: Any) -> Any:
    """Whether one of the `CHUNK` scores from `at` on is above the threshold, or NaN."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(kind)
        lanes = _VECTOR_BYTES // size
        vector, i32 = ir.VectorType(kind, lanes), ir.IntType(32)
        unset = ir.Constant(vector, ir.Undefined)
        limit = b.insert_element(unset, args[2], ir.Constant(i32, 0))
        same = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        limit = b.shuffle_vector(limit, unset, same)
        first = b.gep(context.make_array(signature.args[0])(context, b, args[0]).data, [args[1]])
        found = None
        for i in range(0, CHUNK, lanes):
            place = b.bitcast(b.gep(first, [ir.Constant(args[1].type, i)]), vector.as_pointer())
            above = b.fcmp_unordered(">", b.load(place, align=size), limit)
            found = above if found is None else b.or_(found, above)
        bits = ir.IntType(lanes)
        return b.icmp_unsigned("!=", b.bitcast(found, bits), ir.Constant(bits, 0))

    return types.boolean(scores, at, threshold), emit


_any_above = intrinsic(_emit_any_above)


@jit
def _key(bits: Any, i: int) -> Any:
    """An int64 that sorts as the number with these bits does; both zeros are 0."""
    b = np.int64(bits[i])
    return (
        b if b >= 0 else -(b & np.int64(0x7FFFFFFFFFFFFFFF if bits.itemsize == 8 else 0x7FFFFFFF))
    )


@jit
def _digit(counts: Any, k: int) -> Any:
    """The digit of the `k`-th largest, and which of those with that digit it is."""
    digit = counts.size - 1
    while counts[digit] < k:
        k -= counts[digit]
        digit -= 1
    return digit, k


@jit
def _kth(bits: Any, n: int, k: int) -> Any:
    """Key of the `k`-th largest of `n` numbers, and how many of that key are among the `k`."""
    low = high = _key(bits, 0)
    for i in range(n):
        key = _key(bits, i)
        low, high = min(low, key), max(high, key)
    # distances from the lowest key, which may need all 64 bits, digit by digit from the highest on
    start, shift = np.uint64(low), 0
    while ((np.uint64(high) - start) >> np.uint64(shift)) >= np.uint64(_DIGITS):
        shift += 1
    counts = np.zeros(_DIGITS, np.int64)
    for i in range(n):
        counts[np.int64((np.uint64(_key(bits, i)) - start) >> np.uint64(shift))] += 1
    digit, k = _digit(counts, k)
    prefix = np.uint64(digit)
    while shift:
        step = min(_DIGIT, shift)
        after = np.uint64(shift - step)
        mask = np.uint64((1 << step) - 1)
        counts[:] = 0
        for i in range(n):
            distance = np.uint64(_key(bits, i)) - start
            if (distance >> np.uint64(shift)) == prefix:
                counts[np.int64((distance >> after) & mask)] += 1
        digit, k = _digit(counts, k)
        prefix = (prefix << np.uint64(step)) | np.uint64(digit)
        shift -= step
    return np.int64(start + prefix), k


@jit
def mark_best(bits: Any, k: int, mask: Any) -> None:
    """Mark the `k` largest, 0 < k <= n; among equal ones the first win."""
    least, ties = _kth(bits, bits.size, k)
    for i in range(bits.size):
        key = _key(bits, i)
        tie = (key == least) & (ties > 0)
        ties -= tie
        mask[i] = (key > least) | tie


@jit
def keep_best(scores: Any, bits: Any, positions: Any, held: int, k: int) -> Any:
    """Move the `k` largest of the first `held` to the front, in order; returns the smallest."""
    least, ties = _kth(bits, held, k)
    smallest = scores[0]
    out = 0
    for i in range(held):
        key, score, position = _key(bits, i), scores[i], positions[i]
        tie = (key == least) & (ties > 0)
        ties -= tie
        if key == least:
            smallest = score
        scores[out], positions[out] = score, position
        out += (key > least) | tie
    return smallest


@jit
def offer(
    fresh: Any,
    first: int,
    scores: Any,
    bits: Any,
    positions: Any,
    held: int,
    threshold: Any,
    k: int,
) -> Any:
    """Append those of `fresh` above the threshold; raise it when there is no room for a chunk.

    `scores`, of which `bits` is a view, and `positions` have room for at least k + CHUNK.
    Returns how many are held, and the threshold.
    """
    room, n, limit = scores.size - CHUNK, fresh.size, scores.dtype.type(threshold)
    for at in range(0, n, CHUNK):
        stop = at + CHUNK
        if stop > n:
            stop = n
        elif not _any_above(fresh, at, limit):
            continue
        if held > room:
            limit = keep_best(scores, bits, positions, held, k)
            held = k
        for i in range(at, stop):
            score = fresh[i]
            if score != score:  # noqa: PLR0124  NaN counts as infinity
                score = scores.dtype.type(np.inf)
            # stored in any case, and kept by counting it: a jump would be guessed wrongly
            scores[held], positions[held] = score, first + i
            held += score > limit
    return held, limit


@jit
def count(mask: Any) -> int:
    """How many are true."""
    n = 0
    for i in range(mask.size):
        n += mask[i]
    return n


@jit
def take_active(scores: Any, cols: int, crow: Any, col: Any, active: Any) -> None:
    """Make scores magnitudes, copy those of active blocks in the rows of `crow`, let them lose."""
    for i in range(scores.size):
        scores[i] = abs(scores[i])
    for row in range(crow.size - 1):
        base = row * cols
        for i in range(crow[row], crow[row + 1]):
            at = base + col[i]
            active[i - crow[0]] = scores[at]
            scores[at] = -np.inf


# ---- positions in ascending order


@jit
def flat(crow: Any, col: Any, cols: int, out: Any) -> bool:
    """Flat positions of a topology; False if offsets do not run from 0 to the size of `col`."""
    if crow[0] != 0 or crow[-1] != col.size:
        return False
    for row in range(crow.size - 1):
        lo, hi, base = crow[row], crow[row + 1], row * cols
        if hi < lo or hi > col.size:
            return False
        for i in range(lo, hi):
            out[i] = base + col[i]
    return True


@jit
def compress(positions: Any, cols: int, crow: Any, col: Any) -> bool:
    """Fill `crow` and `col`; False, and no use, if a position is out of order or range."""
    rows = crow.size - 1
    row, base, before = 0, 0, np.int64(-1)
    crow[0] = 0
    for i in range(positions.size):
        position = positions[i]
        if position <= before:
            return False
        before = position
        while position >= base + cols:
            row += 1
            if row == rows:
                return False
            base += cols
            crow[row] = i
        col[i] = position - base
    crow[row + 1 :] = positions.size
    return True


@jit
def transpose(crow: Any, col: Any, down: int, cols: int, ccol: Any, row: Any, perm: Any) -> None:
    """Fill `ccol`, `row` and `perm`; a group has `down` rows. A band of columns at a time."""
    rows, band = crow.size - 1, 4096
    ccol[:] = 0
    for r in range(rows):
        base = r // down * cols + 1
        for i in range(crow[r], crow[r + 1]):
            ccol[base + col[i]] += 1
    for c in range(1, ccol.size):
        ccol[c] += ccol[c - 1]
    place = ccol[:-1].copy()
    seen = crow[:-1].copy()
    # the places written to next lie in few pages
    for end in range(band, cols + band, band):
        for r in range(rows):
            base, i, stop = r // down * cols, seen[r], crow[r + 1]
            while i < stop and col[i] < end:
                at = place[base + col[i]]
                row[at], perm[at] = r, i
                place[base + col[i]] = at + 1
                i += 1
            seen[r] = i


@jit
def merge_dropped(
    old: Any,
    keep: Any,
    active: Any,
    others: Any,
    their_scores: Any,
    positions: Any,
    scores: Any,
) -> None:
    """Merge what is not kept of `old` with `others`, both ascending, each with its score."""
    n, j = 0, 0
    for i in range(old.size):
        if keep[i]:
            continue
        while j < others.size and others[j] < old[i]:
            positions[n], scores[n] = others[j], their_scores[j]
            n, j = n + 1, j + 1
        positions[n], scores[n] = old[i], active[i]
        n += 1
    positions[n:], scores[n:] = others[j:], their_scores[j:]


@jit
def merge_grown(old: Any, keep: Any, grown: Any, new: Any, source: Any) -> None:
    """Merge what is kept of `old` with `grown`; `source` tells where each stood in `old`, or -1."""
    n, j = 0, 0
    for i in range(old.size):
        position = old[i]
        while j < grown.size and grown[j] < position:
            new[n], source[n] = grown[j], -1
            n, j = n + 1, j + 1
        if keep[i]:
            new[n], source[n] = position, i
            n += 1
        elif j < grown.size and grown[j] == position:
            new[n], source[n] = position, i
            n, j = n + 1, j + 1
    new[n:], source[n:] = grown[j:], -1


@jit
def scale_rows(values: Any, crow: Any, scale: Any) -> None:
    """Multiply blocks (nnzb, bh, bw) by their rows' factors (block rows, bh)."""
    for row in range(crow.size - 1):
        for i in range(crow[row], crow[row + 1]):
            for r in range(values.shape[1]):
                for c in range(values.shape[2]):
                    values[i, r, c] *= scale[row, r]


@jit
def ascending(positions: Any) -> bool:
    """Whether no position is below the one before it."""
    for i in range(1, positions.size):  # noqa: SIM110  numba compiles no generator
        if positions[i] < positions[i - 1]:
            return False
    return True


@jit
def in_both(gaps: Any, far: int, positions: Any) -> int:
    """How many members of a set packed as gaps, see `packed`, are among ascending positions."""
    at, j, found = np.int64(-1), 0, 0
    for i in range(gaps.size):
        gap = np.int64(gaps[i])
        if gap == far:
            at += gap
            continue
        at += gap + 1
        while j < positions.size and positions[j] < at:
            j += 1
        if j < positions.size and positions[j] == at:
            found += 1
    return found


@jit
def sort_distinct(drawn: Any, other: Any, bits: int) -> Any:
    """Sort numbers of `bits` bits and leave out repeats; `other` is of the same size.

    Returns how many are left, and which of the two arrays holds them: False for `drawn`.
    """
    counts = np.empty(1 << _RADIX, np.int64)
    swapped = False
    for shift in range(0, bits, _RADIX):
        counts[:] = 0
        for i in range(drawn.size):
            counts[(drawn[i] >> shift) & ((1 << _RADIX) - 1)] += 1
        before = 0
        for digit in range(counts.size):
            before, counts[digit] = before + counts[digit], before
        for i in range(drawn.size):
            digit = (drawn[i] >> shift) & ((1 << _RADIX) - 1)
            other[counts[digit]] = drawn[i]
            counts[digit] += 1
        drawn, other, swapped = other, drawn, not swapped
    n = 0
    for i in range(drawn.size):
        if i == 0 or drawn[i] != drawn[i - 1]:
            # n <= i, and what is read next stands after i
            other[n] = drawn[i]
            n += 1
    return n, not swapped
