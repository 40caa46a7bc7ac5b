"""Triton's interpreter as a dry run needs it: one whose sums do not depend on a tile's shape."""

from __future__ import annotations

from typing import Any

_FLOATS = ("float16", "float32")


def steady_dots() -> None:
    """Let the interpreter's dot products be computed in float64 and rounded once; for the process.

    The interpreter asks NumPy, whose float32 products add up in an order that depends, on some
    processors, on how many rows there are: a kernel whose rows do not depend on one another would
    seem to fail.
    """
    import numpy as np  # noqa: PLC0415  with triton, only where it interprets
    from triton.runtime import interpreter  # noqa: PLC0415

    builder: Any = interpreter.InterpreterBuilder
    ordinary = builder.create_dot
    if getattr(ordinary, "is_steady", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype.name not in _FLOATS or d.data.dtype != np.float32:
            return ordinary(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)

    create_dot.is_steady = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot
