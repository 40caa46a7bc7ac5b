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

from sparsekern.topology import kept

ir = cgutils.ir
F = TypeVar("F", bound=Callable[..., Any])

_FEATURES = str(get_host_cpu_features()).split(",")
# bytes of one vector register, and rows of the register tile that its register file can hold
WIDTH = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16
# how another machine's kernels are tested: the compiler splits what this one's registers can't hold
WIDTH = int(os.environ.get("SPARSEKERN_VECTOR_BYTES", WIDTH))
ROWS = 8 if WIDTH == 64 else 6
VECS = min(8, 256 // WIDTH)  # vectors of tokens that a tile of single entries takes at a time
LANES = {4: WIDTH // 4, 8: WIDTH // 8}


def jit(function: F) -> F:
    """Compile `function` and keep it on disk as long as no file of this folder changes."""
    return kept.jit(function, _stamp(Path(__file__).parent))


def inlined(function: F) -> F:
    """Make `function` a part of the one jitted function for each type that calls it.

    Compiled by itself it would be optimised twice, with all that it calls.
    """
    return cast(F, njit(inline="always", **kept.OPTIONS)(function))


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


def _take(e: Any, job: Any, field: Any) -> Any:
    return e.b.atomic_rmw("add", e.ptr(e.at(job, field, 8), e.i64), e.num(1), "seq_cst")


def _field(e: Any, job: Any, field: Any) -> Any:
    return e.load(e.at(job, field, 8), e.i64)


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


turn = _primitive(4, _turn)
geti = _primitive(2, _geti, types.int64)
move, clear = _primitive(4, _move), _primitive(2, _clear)
vmove, vfill = _primitive(2, _vmove), _primitive(2, _vfill)
prefetch = _primitive(1, _prefetch)
# of a job, an array of int64: count up a field and return what it was; read a field
take, field = _primitive(2, _take, types.int64), _primitive(2, _field, types.int64)


@jit
def cut(z: Any, ptr: int, rows: int, part: int, parts: int) -> int:
    """First block row of a part, so that all parts hold about as many blocks."""
    wanted = geti(z, (ptr, rows)) * part // parts
    lo, hi = 0, rows
    if part in (0, parts):
        return rows if part else 0
    while lo < hi:
        middle = (lo + hi) // 2
        if geti(z, (ptr, middle)) < wanted:
            lo = middle + 1
        else:
            hi = middle
    return lo
