"""Register tiles of the linear numba kernels: sums over the blocks of a row, and dot products.

Addresses are plain integers, strides are in elements; `z` picks the element type. Every sum is one
chain of fused multiply-adds in a fixed order, whatever it is grouped with: the size of a register
tile changes no bit of a sum over blocks.
"""

from typing import Any

from numba.core import cgutils

from sparsekern.ops.cpu.jit.simd import ROWS, VECS, _fold, _pair, _prefetch, _primitive

ir = cgutils.ir


def _index(e: Any, base: Any, i: Any) -> Any:
    return e.b.sext(e.load(e.at(base, i, 4), ir.IntType(32)), e.i64)


def _products(
    e: Any, acc: list[Any], n: Any, lefts: list[Any], a_col: Any, b: Any, b_row: Any
) -> list[Any]:
    """`acc[rows, vecs] += a[rows, n] @ b[n, vecs]`, in registers."""
    vecs = len(acc) // len(lefts)

    def body(k: Any, acc: list[Any]) -> list[Any]:
        right, shift = e.at(b, e.b.mul(k, b_row)), e.b.mul(k, a_col)
        bs = [e.vload(right, v) for v in range(vecs)]
        new = []
        for r, left in enumerate(lefts):
            w = e.splat(e.load(e.at(left, shift), e.elem))
            new += [e.fma(w, bs[v], acc[r * vecs + v]) for v in range(vecs)]
        return new

    out: list[Any] = e.loop(e.num(0), n, acc, body)
    return out


def _rows(e: Any, base: Any, stride: Any, count: int) -> list[Any]:
    return [e.at(base, e.b.mul(stride, e.num(r))) for r in range(count)]


def _tile(rows: int, vecs: int) -> Any:
    """`c = first + a[rows, n] @ b[n, vecs]`: arguments c ldc first ldf a a_row a_col b b_row n."""

    def tile(e: Any, *args: Any) -> None:
        c, ldc, first, ldf, a, a_row, a_col, b, b_row, n = args
        acc = [e.vload(f, v) for f in _rows(e, first, ldf, rows) for v in range(vecs)]
        acc = _products(e, acc, n, _rows(e, a, a_row, rows), a_col, b, b_row)
        outs = _rows(e, c, ldc, rows)
        for i, value in enumerate(acc):
            e.vstore(value, outs[i // vecs], i % vecs)

    return _primitive(10, tile)


def _sums(rows: int, vecs: int) -> Any:
    """`c[rows, vecs] = first + sum over blocks e of a_e[rows, n_e] @ b_e[n_e, vecs]`.

    Arguments: c ldc first ldf; a and b with their strides: row, (a: column,) feature block, slot;
    idx slot lo hi; depth of a block and all features; ahead and lines. Block `lo <= e < hi` has
    the feature block `idx[e]` and the slot `slot[e]` (address 0: e), and n_e features: `depth`,
    less in the last feature block. `lines` cache lines of each row of `a`, `ahead` bytes from
    those it reads, are asked for: rows a page apart are followed by no hardware prefetcher.
    """

    def sums(e: Any, *args: Any) -> None:
        c, ldc, first, ldf, a, a_row, a_col, a_idx, a_slot, *args_b = args
        b, b_row, b_idx, b_slot, idx, slot, lo, hi, depth, limit, ahead, lines = args_b
        null = e.b.icmp_signed("==", slot, e.num(0))
        safe = e.b.select(null, idx, slot)

        def block(i: Any, acc: list[Any]) -> list[Any]:
            feature, place = _index(e, idx, i), e.b.select(null, i, _index(e, safe, i))
            left = e.at(e.at(a, e.b.mul(feature, a_idx)), e.b.mul(place, a_slot))
            right = e.at(e.at(b, e.b.mul(feature, b_idx)), e.b.mul(place, b_slot))
            lefts = _rows(e, left, a_row, rows)

            def ask(q: Any, _: list[Any]) -> list[Any]:
                for row in lefts:
                    _prefetch(e, e.b.add(e.b.add(row, ahead), e.b.mul(q, e.num(64))))
                return []

            if rows == ROWS:  # smaller tiles are the last ones
                e.loop(e.num(0), lines, [], ask)
            rest = e.b.sub(limit, e.b.mul(feature, depth))
            n = e.b.select(e.b.icmp_signed("<", rest, depth), rest, depth)
            return _products(e, acc, n, lefts, a_col, right, b_row)

        acc = [e.vload(f, v) for f in _rows(e, first, ldf, rows) for v in range(vecs)]
        acc = e.loop(lo, hi, acc, block)
        outs = _rows(e, c, ldc, rows)
        for i, value in enumerate(acc):
            e.vstore(value, outs[i // vecs], i % vecs)

    return _primitive(21, sums)


def _entries(vecs: int) -> Any:
    """`c[vecs] += sum_e w[e] x[idx[e], vecs]`: arguments c w idx lo hi x ldx."""

    def entries(e: Any, *args: Any) -> None:
        c, w, idx, lo, hi, x, ldx = args

        def body(i: Any, acc: list[Any]) -> list[Any]:
            ws = e.splat(e.load(e.at(w, i), e.elem))
            row = e.at(x, e.b.mul(_index(e, idx, i), ldx))
            return [e.fma(ws, e.vload(row, v), acc[v]) for v in range(vecs)]

        acc = e.loop(lo, hi, [e.vload(c, v) for v in range(vecs)], body)
        for v in range(vecs):
            e.vstore(acc[v], c, v)

    return _primitive(7, entries)


def _dots(count: int) -> Any:
    """`out[j] += a[n vectors] . x_j[n vectors]`, j < count (8, 4 or 1): arguments n out a x_0 ....

    One dot is added up in the same order as several, so how entries are grouped changes no bit.
    """

    def dots(e: Any, n: Any, out: Any, a: Any, *xs: Any) -> None:
        def body(v: Any, acc: list[Any]) -> list[Any]:
            shift = e.b.mul(v, e.num(e.vec.count))
            left = e.vload(e.at(a, shift), 0)
            return [
                e.fma(left, e.vload(e.at(x, shift), 0), s) for x, s in zip(xs, acc, strict=True)
            ]

        sums = e.loop(e.num(0), n, [ir.Constant(e.vec, None)] * count, body)
        if e.vec.count < 4:
            totals = [_fold(e, acc, 1) for acc in sums]
        else:
            fours = [(sums * 4)[j : j + 4] for j in range(0, count, 4)]
            totals = [
                _fold(e, _pair(e, _pair(e, p, q, 1), _pair(e, r, s, 1), 2), 4)
                for p, q, r, s in fours
            ]
            if count == 1:
                totals = [e.shuffle(totals[0], totals[0], [0])]
        for j, total in enumerate(totals):
            place = e.at(out, e.num(j * (count // len(totals))))
            e.store(e.b.fadd(e.load(place, total.type), total), place)

    return _primitive(3 + count, dots)


tile_most, tile_four, tile_two, tile_one = (_tile(rows, 2) for rows in (ROWS, 4, 2, 1))
sums_most, sums_four, sums_two, sums_one = (_sums(rows, 2) for rows in (ROWS, 4, 2, 1))
entries_most, entries_four, entries_two, entries_one = (_entries(v) for v in (VECS, 4, 2, 1))
dots8, dots4, dots1 = _dots(8), _dots(4), _dots(1)
