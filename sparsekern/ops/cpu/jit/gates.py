"""numba kernels of the recurrent cells' way back: one pass over a time step's gates.

Torch's operators take a pass, and new memory, for every factor; here a step reads what forward has
kept and writes the gradients of the gates. Bound: reads and writes, 6 to 10 numbers each per hidden
unit. A matrix is (address, row stride); strides are in elements, and rows contiguous. `z` is a
scalar of the element type, `eb` its bytes. Formulas: `nn.recurrent.gates`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numba.core import cgutils

from sparsekern.ops.cpu.jit.simd import _primitive, jit

ir = cgutils.ir


def _each(count: int, formula: Callable[..., Sequence[Any]]) -> Any:
    """`outs[i] = formula(ins[i])` for `size` elements: the addresses, `count` of them, then `size`.

    The formula is given the builder, a constant 1, and the values at all addresses but those that
    it fills, which come last.
    """

    def each(e: Any, *args: Any) -> None:
        places, size = args[:-1], args[-1]

        def part(kind: Any, one: Any, start: Any, stop: Any, width: int) -> None:
            def body(i: Any, _: list[Any]) -> list[Any]:
                at = [e.at(place, e.b.mul(i, e.num(width))) for place in places]
                # what is only written may be uninitialised, but reading it does no harm
                found = formula(e.b, one, *(e.load(address, kind) for address in at))
                for address, value in zip(at[-len(found) :], found, strict=True):
                    e.store(value, address)
                return []

            e.loop(start, stop, [], body)

        n = e.vec.count
        whole = e.b.sdiv(size, e.num(n))
        part(e.vec, ir.Constant(e.vec, [1.0] * n), e.num(0), whole, n)
        part(e.elem, ir.Constant(e.elem, 1.0), e.b.mul(whole, e.num(n)), size, 1)

    return _primitive(count + 1, each)


def _gru(b: Any, one: Any, dh: Any, r: Any, z: Any, a: Any, n: Any, last: Any, *_: Any) -> Any:
    """Gradients of r, z and a, then of r, z and n."""
    dn = b.fmul(b.fmul(dh, b.fsub(one, z)), b.fsub(one, b.fmul(n, n)))
    dz = b.fmul(b.fmul(dh, b.fsub(last, n)), b.fmul(z, b.fsub(one, z)))
    dr = b.fmul(b.fmul(dn, a), b.fmul(r, b.fsub(one, r)))
    return dr, dz, b.fmul(dn, r), dr, dz, dn


def _lstm(
    b: Any,
    one: Any,
    dh: Any,
    i: Any,
    f: Any,
    g: Any,
    o: Any,
    last: Any,
    squashed: Any,
    dc: Any,
    *_: Any,
) -> Any:
    """The gradient of the last c in the place of that of c, then those of i, f, g and o."""
    slope = b.fsub(one, b.fmul(squashed, squashed))
    dc = b.fadd(dc, b.fmul(b.fmul(dh, o), slope))
    d_i = b.fmul(b.fmul(dc, g), b.fmul(i, b.fsub(one, i)))
    d_f = b.fmul(b.fmul(dc, last), b.fmul(f, b.fsub(one, f)))
    d_g = b.fmul(b.fmul(dc, i), b.fsub(one, b.fmul(g, g)))
    d_o = b.fmul(b.fmul(dh, squashed), b.fmul(o, b.fsub(one, o)))
    return b.fmul(dc, f), d_i, d_f, d_g, d_o


_gru_row, _lstm_row = _each(12, _gru), _each(12, _lstm)


@jit
def gru_back(
    z: Any, eb: int, rows: int, size: int, dh: Any, kept: Any, last: Any, hidden: Any, inputs: Any
) -> None:
    """Fill (rows, 3 size) of `hidden` and `inputs` from r, z, a, n of `kept` (rows, 4 size)."""
    step = size * eb
    for m in range(rows):
        k = kept[0] + m * kept[1] * eb
        h, i = hidden[0] + m * hidden[1] * eb, inputs[0] + m * inputs[1] * eb
        given = (dh[0] + m * dh[1] * eb, k, k + step, k + 2 * step, k + 3 * step)
        to = (h, h + step, h + 2 * step, i, i + step, i + 2 * step)
        _gru_row(z, (*given, last[0] + m * last[1] * eb, *to, size))


@jit
def lstm_back(
    z: Any,
    eb: int,
    rows: int,
    size: int,
    dh: Any,
    dc: Any,
    kept: Any,
    last: Any,
    squashed: Any,
    out: Any,
) -> None:
    """Fill (rows, 4 size) of `out` from i, f, g, o of `kept`; dc becomes that of the last c."""
    step = size * eb
    for m in range(rows):
        k, to = kept[0] + m * kept[1] * eb, out[0] + m * out[1] * eb
        given = (dh[0] + m * dh[1] * eb, k, k + step, k + 2 * step, k + 3 * step)
        state = (last[0] + m * last[1] * eb, squashed[0] + m * squashed[1] * eb)
        places = (dc[0] + m * dc[1] * eb, to, to + step, to + 2 * step, to + 3 * step)
        _lstm_row(z, (*given, *state, *places, size))
