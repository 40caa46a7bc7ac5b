"""Vector primitives of the convolution kernels, next to those of `simd`.

The vectors run over pixels (`sums`, `entry_sums`, `dots`) or over input channels (`outer`).
Addresses are plain integers, strides are in elements; `z` picks the element type. Every sum is one
chain of fused multiply-adds in a fixed order, whatever it is grouped with.
"""

from typing import Any

from numba.core import cgutils

from sparsekern.ops.cpu.jit.simd import WIDTH, _fold, _pair, _prefetch, _primitive

ir = cgutils.ir

# with 32 registers, or with 16: vectors of a tile of 4 outputs (8 outputs take half as many, where
# they fit), of one output of single entries, and rows of dy that an outer product and a dot take
LARGE = WIDTH == 64
SUM_VECS = 6 if LARGE else 3
ENTRY_VECS = 8 if LARGE else 4
OUTER_ROWS = 8 if LARGE else 4
DOT_ROWS = 4 if LARGE else 2


def _sums(rows: int, vecs: int, *, ahead: bool = False) -> Any:
    """`c[rows, vecs] += sum over blocks e and channels k of w[e, rows, k] x[at[e] + k, vecs]`.

    Arguments: c ldc, w and its strides (block, row, channel), slot (address or 0), at, kn, step of
    kn (0 or 1), lo hi, x ldx. The accumulators stay in registers over all blocks lo <= e < hi.
    """

    def sums(e: Any, *args: Any) -> None:
        c, ldc, w, w_block, w_row, w_col, slot, at, kn, kn_step, lo, hi, x, ldx = args
        i32 = ir.IntType(32)
        outs = [e.at(c, e.b.mul(ldc, e.num(r))) for r in range(rows)]
        null = e.b.icmp_signed("==", slot, e.num(0))
        safe = e.b.select(null, at, slot)

        def int_at(base: Any, index: Any) -> Any:
            return e.b.sext(e.load(e.at(base, index, 4), i32), e.i64)

        def block(i: Any, acc: list[Any]) -> list[Any]:
            place = e.b.select(null, i, int_at(safe, i))
            first = e.at(w, e.b.mul(place, w_block))
            lefts = [e.at(first, e.b.mul(w_row, e.num(r))) for r in range(rows)]
            source = e.at(x, int_at(at, i))
            # unaligned reads are twice as slow from L2, so each block asks for the next one's rows
            after = e.b.add(i, e.num(1))
            after = e.b.select(e.b.icmp_signed("<", after, hi), after, lo)
            soon = e.at(x, int_at(at, after))

            def channel(k: Any, acc: list[Any]) -> list[Any]:
                shift = e.b.mul(k, ldx)
                right, near = e.at(source, shift), e.at(soon, shift)
                for v in range(vecs + 1 if ahead else 0):
                    _prefetch(e, e.b.add(near, e.num(v * WIDTH)))
                shift = e.b.mul(k, w_col)
                bs = [e.vload(right, v) for v in range(vecs)]
                new = []
                for r in range(rows):
                    ws = e.splat(e.load(e.at(lefts[r], shift), e.elem))
                    new += [e.fma(ws, bs[v], acc[r * vecs + v]) for v in range(vecs)]
                return new

            count = int_at(kn, e.b.mul(i, kn_step))
            return list(e.loop(e.num(0), count, acc, channel))

        acc = e.loop(lo, hi, [e.vload(o, v) for o in outs for v in range(vecs)], block)
        for i, value in enumerate(acc):
            e.vstore(value, outs[i // vecs], i % vecs)

    return _primitive(14, sums)


def _entry_sums(vecs: int) -> Any:
    """`c[vecs] += sum_e w[e] x[at[e], vecs]`: arguments c w at lo hi x."""

    def entry_sums(e: Any, *args: Any) -> None:
        c, w, at, lo, hi, x = args

        def source(i: Any) -> Any:
            return e.at(x, e.b.sext(e.load(e.at(at, i, 4), ir.IntType(32)), e.i64))

        def body(i: Any, acc: list[Any]) -> list[Any]:
            ws = e.splat(e.load(e.at(w, i), e.elem))
            row = source(i)
            # unaligned reads are slow from L2: ask ahead
            near = e.b.add(i, e.num(2))
            near = source(e.b.select(e.b.icmp_signed("<", near, hi), near, i))
            for v in range(vecs + 1):
                _prefetch(e, e.b.add(near, e.num(v * WIDTH)))
            return [e.fma(ws, e.vload(row, v), acc[v]) for v in range(vecs)]

        acc = e.loop(lo, hi, [e.vload(c, v) for v in range(vecs)], body)
        for v in range(vecs):
            e.vstore(acc[v], c, v)

    return _primitive(6, entry_sums)


def _outer(rows: int, count: int) -> Any:
    """`c_j[rows, lanes] += sum_m d[rows, m] x_j[m, lanes]`.

    Arguments: ldc d ldd n, then c_j and x_j for each j < count; a row of x_j is one vector.
    """

    def outer(e: Any, *args: Any) -> None:
        ldc, d, ldd, n = args[:4]
        cs, xs = args[4::2], args[5::2]
        homes = [e.at(c, e.b.mul(ldc, e.num(r))) for r in range(rows) for c in cs]
        lefts = [e.at(d, e.b.mul(ldd, e.num(r))) for r in range(rows)]

        def body(m: Any, acc: list[Any]) -> list[Any]:
            rights = [e.load(e.at(x, m, WIDTH)) for x in xs]
            new = []
            for r in range(rows):
                left = e.splat(e.load(e.at(lefts[r], m), e.elem))
                new += [e.fma(left, rights[j], acc[r * count + j]) for j in range(count)]
            return new

        acc = e.loop(e.num(0), n, [e.vload(h, 0) for h in homes], body)
        for value, home in zip(acc, homes, strict=True):
            e.vstore(value, home, 0)

    return _primitive(4 + 2 * count, outer)


def _dots(rows: int, count: int) -> Any:
    """`out[r, j] += d_r . x_j` over n vectors, r < rows, j < count (4 or 1).

    Arguments: out ldo d ldd n, then x_j for each j < count; for one row, the next four.
    A dot of one row or one column is added up in the same order as one of four.
    """
    more = count if rows == 1 and count > 1 else 0  # bound by reads, it asks ahead

    def dots(e: Any, *args: Any) -> None:
        out, ldo, d, ldd, n = args[:5]
        lefts = [e.at(d, e.b.mul(ldd, e.num(r))) for r in range(rows)]

        def body(v: Any, acc: list[Any]) -> list[Any]:
            for near in args[5 + count :]:
                _prefetch(e, e.at(near, v, WIDTH))
            rights = [e.load(e.at(x, v, WIDTH)) for x in args[5 : 5 + count]]
            new = []
            for r in range(rows):
                left = e.load(e.at(lefts[r], v, WIDTH))
                new += [e.fma(left, rights[j], acc[r * count + j]) for j in range(count)]
            return new

        zero = ir.Constant(e.vec, [0.0] * e.vec.count)
        acc = e.loop(e.num(0), n, [zero] * (rows * count), body)
        for r in range(rows):
            home = e.at(out, e.b.mul(ldo, e.num(r)))
            for j, total in enumerate(_totals(e, acc[r * count : (r + 1) * count])):
                place = e.at(home, e.num(j))
                e.store(e.b.fadd(e.load(place, total.type), total), place)

    return _primitive(5 + count + more, dots)


def _totals(e: Any, sums: list[Any]) -> list[Any]:
    """Each vector's sum over its lanes: one vector of four, or single elements."""
    if e.vec.count < 4:
        return [_fold(e, acc, 1) for acc in sums]
    p, q, r, s = sums * (4 // len(sums))
    total = _fold(e, _pair(e, _pair(e, p, q, 1), _pair(e, r, s, 1), 2), 4)
    return [total if len(sums) == 4 else e.shuffle(total, total, [0])]


sum_four, sum_one = _sums(4, SUM_VECS), _sums(1, SUM_VECS)
sum_eight = _sums(8, 3, ahead=True)
entry_sums = _entry_sums(ENTRY_VECS)
outer_two, outer_one = _outer(OUTER_ROWS, 2), _outer(OUTER_ROWS, 1)
outer_two_row, outer_one_row = _outer(1, 2), _outer(1, 1)
dots_tile, dots_column = _dots(DOT_ROWS, 4), _dots(DOT_ROWS, 1)
dots_row, dots_one = _dots(1, 4), _dots(1, 1)
