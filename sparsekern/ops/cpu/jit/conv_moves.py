"""Vector primitives that move pixels: copies of runs, of every other pixel, and transposes.

As in `simd`, addresses are plain integers and strides are in elements. Nothing beyond a run is
read or written: its end is taken by a vector that overlaps the one before, or by a masked one.
"""

from typing import Any

from numba.core import cgutils

from sparsekern.ops.cpu.jit.simd import WIDTH, _primitive

ir = cgutils.ir


def _first(e: Any, count: Any) -> Any:
    """Mask of the first `count` lanes."""
    i32 = ir.IntType(32)
    kind = ir.VectorType(i32, e.vec.count)
    number = ir.Constant(kind, list(range(e.vec.count)))
    short = e.b.trunc(count, i32)
    one = e.b.insert_element(ir.Constant(kind, ir.Undefined), short, ir.Constant(i32, 0))
    return e.b.icmp_signed("<", number, e.shuffle(one, one, [0] * e.vec.count))


def _masked_load(e: Any, address: Any, mask: Any) -> Any:
    name = f"llvm.masked.load.v{e.vec.count}f{8 * e.size}.p0"
    pointer, i32 = e.vec.as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(e.vec, [pointer, i32, mask.type, e.vec])
    call = cgutils.get_or_insert_function(e.b.module, kind, name)
    zero = ir.Constant(e.vec, [0.0] * e.vec.count)
    return e.b.call(call, [e.ptr(address, e.vec), ir.Constant(i32, e.size), mask, zero])


def _masked_store(e: Any, value: Any, address: Any, mask: Any) -> None:
    name = f"llvm.masked.store.v{e.vec.count}f{8 * e.size}.p0"
    pointer, i32 = e.vec.as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [e.vec, pointer, i32, mask.type])
    call = cgutils.get_or_insert_function(e.b.module, kind, name)
    e.b.call(call, [value, e.ptr(address, e.vec), ir.Constant(i32, e.size), mask])


def _copy(e: Any, dst: Any, src: Any, count: Any) -> None:
    """Copy `count` elements that lie side by side.

    The last vector overlaps the one before: masked stores take many cycles on some processors.
    """

    def move(done: Any, width: int) -> None:
        kind = ir.VectorType(e.elem, width)
        e.store(e.load(e.at(src, done), kind), e.at(dst, done))

    def either_end(width: int) -> None:
        move(e.num(0), width)
        move(e.b.sub(count, e.num(width)), width)

    def short(width: int) -> None:
        """Fewer than 2 `width` elements."""
        with e.b.if_else(e.b.icmp_signed(">=", count, e.num(width))) as (fits, less):
            with fits:
                either_end(width)
            with less:
                if width > 1:
                    short(width // 2)

    n = e.vec.count
    with e.b.if_else(e.b.icmp_signed(">=", count, e.num(n))) as (whole, less):
        with whole:

            def body(i: Any, _: list[Any]) -> list[Any]:
                move(e.b.mul(i, e.num(n)), n)
                return []

            e.loop(e.num(0), e.b.sdiv(count, e.num(n)), [], body)
            move(e.b.sub(count, e.num(n)), n)
        with less:
            short(n // 2)


def _copy_even(e: Any, dst: Any, src: Any, count: Any) -> None:
    """Gather: `dst[i] = src[2 i]` for i < count."""
    n = e.vec.count

    def body(i: Any, _: list[Any]) -> list[Any]:
        done = e.b.mul(i, e.num(n))
        left = e.b.sub(count, done)
        at = e.at(src, e.b.mul(done, e.num(2)))
        # the last element read is number 2 left - 2
        spread = e.b.sub(e.b.mul(left, e.num(2)), e.num(1))
        low = _masked_load(e, at, _first(e, spread))
        high = e.at(at, e.num(n))
        high = _masked_load(e, high, _first(e, e.b.sub(spread, e.num(n))))
        value = e.shuffle(low, high, [2 * lane for lane in range(n)])
        _masked_store(e, value, e.at(dst, done), _first(e, left))
        return []

    e.loop(e.num(0), e.b.sdiv(e.b.add(count, e.num(n - 1)), e.num(n)), [], body)


def _spread_even(e: Any, dst: Any, src: Any, count: Any) -> None:
    """Scatter: `dst[2 i] = src[i]` for i < count; what lies between stays."""
    n = e.vec.count
    even = ir.Constant(ir.VectorType(ir.IntType(1), n), [lane % 2 == 0 for lane in range(n)])

    def body(i: Any, _: list[Any]) -> list[Any]:
        done = e.b.mul(i, e.num(n))
        left = e.b.sub(count, done)
        value = _masked_load(e, e.at(src, done), _first(e, left))
        home = e.at(dst, e.b.mul(done, e.num(2)))
        spread = e.b.sub(e.b.mul(left, e.num(2)), e.num(1))
        for half in range(2):
            part = e.shuffle(value, value, [half * n // 2 + lane // 2 for lane in range(n)])
            mask = e.b.and_(even, _first(e, e.b.sub(spread, e.num(half * n))))
            _masked_store(e, part, e.at(home, e.num(half * n)), mask)
        return []

    e.loop(e.num(0), e.b.sdiv(e.b.add(count, e.num(n - 1)), e.num(n)), [], body)


def _copy_runs(e: Any, *args: Any) -> None:
    """Copy runs of elements: dst, field of its offset, src, field of its offset, runs, how many.

    A run is three int64: two offsets and a length.
    """
    dst, dst_field, src, src_field, runs, count = args

    def body(i: Any, _: list[Any]) -> list[Any]:
        run = e.at(runs, i, 24)
        to, at = (
            e.at(base, e.load(e.at(run, field, 8), e.i64))
            for base, field in ((dst, dst_field), (src, src_field))
        )
        _copy(e, to, at, e.load(e.at(run, e.num(2), 8), e.i64))
        return []

    e.loop(e.num(0), count, [], body)


def _fill(e: Any, dst: Any, value: Any, count: Any) -> None:
    """Set `count` vectors to one scalar, read from the address `value`, or to 0 without one."""
    null = e.b.icmp_signed("==", value, e.num(0))
    scalar = e.load(e.b.select(null, dst, value), e.elem)
    vector = e.splat(e.b.select(null, ir.Constant(e.elem, 0.0), scalar))

    def body(i: Any, _: list[Any]) -> list[Any]:
        e.store(vector, e.at(dst, i, WIDTH))
        return []

    e.loop(e.num(0), count, [], body)


def _copy_strided(e: Any, *args: Any) -> None:
    """Copy `count` elements: arguments dst, its stride, src, its stride, count."""
    dst, dst_step, src, src_step, count = args

    def body(i: Any, _: list[Any]) -> list[Any]:
        value = e.load(e.at(src, e.b.mul(i, src_step)), e.elem)
        e.store(value, e.at(dst, e.b.mul(i, dst_step)))
        return []

    e.loop(e.num(0), count, [], body)


def _turn_edge(e: Any, *args: Any) -> None:
    """Transpose `rows` x `cols` elements, both at most LANES: dst ldd src lds rows cols."""
    dst, ldd, src, lds, rows, cols = args
    n, none = e.vec.count, e.num(0)
    in_row, in_col = _first(e, cols), _first(e, rows)
    lines = []
    for i in range(n):
        inside = e.b.icmp_signed(">", rows, e.num(i))
        # beyond the last row nothing is read: the mask is empty
        mask = e.b.and_(in_row, _first(e, e.b.select(inside, e.num(n), none)))
        lines.append(_masked_load(e, e.at(src, e.b.mul(lds, e.num(i))), mask))
    d = n // 2
    while d:
        for i in (i for i in range(n) if not i & d):
            a, b = lines[i], lines[i + d]
            lines[i] = e.shuffle(a, b, [j if not j & d else j - d + n for j in range(n)])
            lines[i + d] = e.shuffle(a, b, [j + d if not j & d else j + n for j in range(n)])
        d //= 2
    for j in range(n):
        inside = e.b.icmp_signed(">", cols, e.num(j))
        mask = e.b.and_(in_col, _first(e, e.b.select(inside, e.num(n), none)))
        _masked_store(e, lines[j], e.at(dst, e.b.mul(ldd, e.num(j))), mask)


copy_runs, copy_strided = _primitive(6, _copy_runs), _primitive(5, _copy_strided)
copy_even, spread_even = _primitive(3, _copy_even), _primitive(3, _spread_even)
fill, turn_edge = _primitive(3, _fill), _primitive(6, _turn_edge)
