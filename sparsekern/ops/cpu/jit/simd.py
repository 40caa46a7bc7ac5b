"""Vector primitives for the numba kernels: what the auto-vectorizer can't be asked for.

Each primitive is a numba intrinsic that emits LLVM vector instructions of the host's width
(`LANES`), so accumulators stay in registers and every sum has one fixed order: a fused
multiply-add per term, no fast-math. Addresses are plain integers and strides are in elements; the
first argument `z` is a scalar whose type (float32 or float64) picks the element type.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

ir = cgutils.ir
F = TypeVar("F", bound=Callable[..., Any])

_FEATURES = str(get_host_cpu_features()).split(",")
# bytes of one vector register, and rows of the register tile that its register file can hold
WIDTH = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16
# how another machine's kernels are tested: the compiler splits what this one's registers can't hold
WIDTH = int(os.environ.get("SPARSEKERN_VECTOR_BYTES", WIDTH))
ROWS = 4 if WIDTH == 32 else 8
LANES = {4: WIDTH // 4, 8: WIDTH // 8}


def jit(function: F) -> F:
    """Compile `function` without the GIL; cache on disk where a writable place is found."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write to
        return cast(F, njit(**options)(function))
    # numba dates a cached kernel by the kernel's own file only: add those it is built from
    store: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(store, "_source_stamp"):
        store._source_stamp = (store._source_stamp, _stamp(Path(__file__).parent))
    return cast(F, compiled)


def _stamp(folder: Path) -> tuple[Any, ...]:
    """What compiled kernels depend on: the width of vectors, and each file of this folder."""
    files = [path.stat() for path in sorted(folder.glob("*.py"))]
    return WIDTH, *((file.st_mtime, file.st_size) for file in files)


class _Emit:
    """Shorthand for one intrinsic's body: typed loads, stores and loops."""

    def __init__(self, context: Any, builder: Any, z: Any) -> None:
        self.b = builder
        self.elem = context.get_value_type(z)
        self.size = context.get_abi_sizeof(self.elem)
        self.vec = ir.VectorType(self.elem, WIDTH // self.size)
        self.i64 = ir.IntType(64)

    def num(self, value: int) -> Any:
        return ir.Constant(self.i64, value)

    def at(self, base: Any, index: Any, size: int | None = None) -> Any:
        return self.b.add(base, self.b.mul(index, self.num(size or self.size)))

    def ptr(self, address: Any, kind: Any) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, kind: Any = None) -> Any:
        return self.b.load(self.ptr(address, kind or self.vec), align=self.size)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.ptr(address, value.type), align=self.size)

    def vload(self, base: Any, v: int) -> Any:
        return self.load(self.b.add(base, self.num(v * WIDTH)))

    def vstore(self, value: Any, base: Any, v: int) -> None:
        self.store(value, self.b.add(base, self.num(v * WIDTH)))

    def splat(self, scalar: Any) -> Any:
        one = self.b.insert_element(
            ir.Constant(self.vec, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
        )
        return self.shuffle(one, one, [0] * self.vec.count)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        kind = ir.VectorType(ir.IntType(32), len(lanes))
        return self.b.shuffle_vector(a, b, ir.Constant(kind, lanes))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        name = f"llvm.fma.v{self.vec.count}f{8 * self.size}"
        kind = ir.FunctionType(self.vec, [self.vec] * 3)
        call = cgutils.get_or_insert_function(self.b.module, kind, name)
        return self.b.call(call, [a, b, c])

    def loop(self, start: Any, stop: Any, state: list[Any], body: Callable[..., Any]) -> Any:
        """`for i in range(start, stop): state = body(i, state)` with the state in registers."""
        before = self.b.block
        head = self.b.append_basic_block("head")
        inside = self.b.append_basic_block("body")
        after = self.b.append_basic_block("after")
        self.b.branch(head)
        self.b.position_at_end(head)
        phis = [self.b.phi(s.type) for s in (start, *state)]
        for phi, s in zip(phis, (start, *state), strict=True):
            phi.add_incoming(s, before)
        self.b.cbranch(self.b.icmp_signed("<", phis[0], stop), inside, after)
        self.b.position_at_end(inside)
        out = [self.b.add(phis[0], self.num(1)), *body(phis[0], phis[1:])]
        for phi, s in zip(phis, out, strict=True):
            phi.add_incoming(s, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis[1:]


def _primitive(count: int, emit: Callable[..., Any], result: Any = types.void) -> Any:
    """Wrap `emit(e, *integers)` as a numba intrinsic of `z` and one tuple of `count` integers."""

    def typer(typingctx: Any, z: Any, ints: Any) -> Any:  # noqa: ARG001
        sig = result(z, types.UniTuple(types.int64, count))

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            e = _Emit(context, builder, sig.args[0])
            out = emit(e, *cgutils.unpack_tuple(builder, args[1], count))
            return context.get_dummy_value() if out is None else out

        return sig, codegen

    typer.__name__ = emit.__name__
    return intrinsic(typer)


def _tile(rows: int, vecs: int) -> Any:
    """`c[rows, vecs] += a[rows, n] @ b[n, vecs]`: arguments c ldc a a_row a_col b b_row n."""

    def tile(e: Any, *args: Any) -> None:
        c, ldc, a, a_row, a_col, b, b_row, n = args
        outs = [e.at(c, e.b.mul(ldc, e.num(r))) for r in range(rows)]
        lefts = [e.at(a, e.b.mul(a_row, e.num(r))) for r in range(rows)]

        def body(k: Any, acc: list[Any]) -> list[Any]:
            right = e.at(b, e.b.mul(k, b_row))
            shift = e.b.mul(k, a_col)
            bs = [e.vload(right, v) for v in range(vecs)]
            new = []
            for r in range(rows):
                w = e.splat(e.load(e.at(lefts[r], shift), e.elem))
                new += [e.fma(w, bs[v], acc[r * vecs + v]) for v in range(vecs)]
            return new

        start = [e.vload(o, v) for o in outs for v in range(vecs)]
        acc = e.loop(e.num(0), n, start, body)
        for i, value in enumerate(acc):
            e.vstore(value, outs[i // vecs], i % vecs)

    return _primitive(8, tile)


def _csr_row(vecs: int) -> Any:
    """`out[vecs] = bias + sum_e w[e] x[idx[e], vecs]`: arguments out w idx lo hi x ldx bias."""

    def csr_row(e: Any, *args: Any) -> None:
        out, w, idx, lo, hi, x, ldx, bias = args
        i32 = ir.IntType(32)

        def body(i: Any, acc: list[Any]) -> list[Any]:
            ws = e.splat(e.load(e.at(w, i), e.elem))
            row = e.at(x, e.b.mul(e.b.sext(e.load(e.at(idx, i, 4), i32), e.i64), ldx))
            return [e.fma(ws, e.vload(row, v), acc[v]) for v in range(vecs)]

        # `bias` is an address; 0 means none (then read where reading is safe)
        null = e.b.icmp_signed("==", bias, e.num(0))
        safe = e.b.select(null, out, bias)
        first = e.b.select(null, ir.Constant(e.elem, 0.0), e.load(safe, e.elem))
        acc = e.loop(lo, hi, [e.splat(first)] * vecs, body)
        for v in range(vecs):
            e.vstore(acc[v], out, v)

    return _primitive(8, csr_row)


def _dots(count: int, vecs: int) -> Any:
    """`out[j] += a[vecs] . x_j[vecs]`, j < count (4 or 1): arguments out a x_0 ... x_(count-1).

    One dot is added up in the same order as four, so how entries are grouped changes no bit.
    """

    def dots(e: Any, out: Any, a: Any, *xs: Any) -> None:
        left = [e.vload(a, v) for v in range(vecs)]
        sums = []
        for x in xs:
            acc = e.b.fmul(left[0], e.vload(x, 0))
            for v in range(1, vecs):
                acc = e.fma(left[v], e.vload(x, v), acc)
            sums.append(acc)
        if e.vec.count < 4:
            totals = [_fold(e, acc, 1) for acc in sums]
        else:
            p, q, r, s = sums * (4 // count)
            totals = [_fold(e, _pair(e, _pair(e, p, q, 1), _pair(e, r, s, 1), 2), 4)]
            if count == 1:
                totals = [e.shuffle(totals[0], totals[0], [0])]
        for j, total in enumerate(totals):
            place = e.at(out, e.num(j))
            e.store(e.b.fadd(e.load(place, total.type), total), place)

    return _primitive(2 + count, dots)


def _fold(e: Any, total: Any, count: int) -> Any:
    """Add the upper half of the lanes to the lower until `count` are left."""
    while total.type.count > count:
        half = total.type.count // 2
        lower = e.shuffle(total, total, list(range(half)))
        total = e.b.fadd(lower, e.shuffle(total, total, list(range(half, 2 * half))))
    return total


def _pair(e: Any, p: Any, q: Any, step: int) -> Any:
    """Add lanes `step` apart within `p` and within `q`; interleave the sums, p's first."""
    lanes = range(p.type.count)
    left = [i if not i & step else i - step + len(lanes) for i in lanes]
    right = [i + step if not i & step else i + len(lanes) for i in lanes]
    return e.b.fadd(e.shuffle(p, q, left), e.shuffle(p, q, right))


def _turn(e: Any, dst: Any, ldd: Any, src: Any, lds: Any) -> None:
    """Transpose one square of LANES x LANES elements in registers."""
    n = e.vec.count
    rows = [e.vload(e.at(src, e.b.mul(lds, e.num(i))), 0) for i in range(n)]
    d = n // 2
    while d:
        for i in (i for i in range(n) if not i & d):
            a, b = rows[i], rows[i + d]
            rows[i] = e.shuffle(a, b, [j if not j & d else j - d + n for j in range(n)])
            rows[i + d] = e.shuffle(a, b, [j + d if not j & d else j + n for j in range(n)])
        d //= 2
    for i in range(n):
        e.vstore(rows[i], e.at(dst, e.b.mul(ldd, e.num(i))), 0)


def _get(e: Any, base: Any, index: Any) -> Any:
    return e.load(e.at(base, index), e.elem)


def _geti(e: Any, base: Any, index: Any) -> Any:
    return e.b.sext(e.load(e.at(base, index, 4), ir.IntType(32)), e.i64)


def _move(e: Any, dst: Any, i: Any, src: Any, j: Any) -> None:
    e.store(_get(e, src, j), e.at(dst, i))


def _clear(e: Any, dst: Any, i: Any) -> None:
    e.store(ir.Constant(e.elem, 0.0), e.at(dst, i))


def _vmove(e: Any, dst: Any, src: Any) -> None:
    e.vstore(e.vload(src, 0), dst, 0)


def _vfill(e: Any, dst: Any, src: Any) -> None:
    # one scalar, read from an address, or 0 without one
    null = e.b.icmp_signed("==", src, e.num(0))
    value = e.load(e.b.select(null, dst, src), e.elem)
    e.vstore(e.splat(e.b.select(null, ir.Constant(e.elem, 0.0), value)), dst, 0)


def _prefetch(e: Any, address: Any) -> None:
    i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    call = cgutils.get_or_insert_function(e.b.module, kind, "llvm.prefetch.p0")
    # a read (0), to keep in all levels (3), of data (1)
    e.b.call(call, [e.b.inttoptr(address, byte), *(ir.Constant(i32, v) for v in (0, 3, 1))])


VECS = 4  # vectors per token tile of the token-contiguous kernels
tile_wide, tile_one = _tile(ROWS, 2), _tile(1, 2)
tok_four, tok_one = _tile(4, VECS), _tile(1, VECS)
csr_row = _csr_row(VECS)
dots4, dots1 = _dots(4, VECS), _dots(1, VECS)
turn = _primitive(4, _turn)
geti = _primitive(2, _geti, types.int64)
move, clear = _primitive(4, _move), _primitive(2, _clear)
vmove, vfill = _primitive(2, _vmove), _primitive(2, _vfill)
prefetch = _primitive(1, _prefetch)
