"""Counts the multiply-adds of interpreted Triton launches where they happen.

Under `metered()` every matrix product (`tl.dot`) and every product of floating-point tiles that a
kernel makes adds to

- `lanes`: 2 FLOPs for each lane, as the hardware computes whole tiles;
- `live`: 2 FLOPs for each lane whose two factors are both nonzero. Loads give zero where a mask or
  the end of a descriptor turns a lane off, so on operands without a zero these are the lanes that
  are loaded: no tokens past the last, no padding of a ragged block, no taps outside of the image.

Address arithmetic is in integers and does not count. What the meter does not know raises.
"""

from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
# other ways to multiply
_UNKNOWN = ("create_dot_scaled", "create_fma", "create_fdiv")


class Meter:
    """FLOPs so far, and the kernels' names in the order of their first launch."""

    def __init__(self):
        self.lanes = self.live = 0
        self.kernels = []

    def dot(self, a, b):
        """A product of matrices (..., M, K) and (..., K, N)."""
        *lead, rows, inner = a.shape
        self.lanes += 2 * int(np.prod(lead)) * rows * inner * b.shape[-1]
        live = np.matmul(_nonzero(a).astype(np.int64), _nonzero(b).astype(np.int64))
        self.live += 2 * int(live.sum())

    def product(self, a, b):
        """A product lane by lane."""
        live = _nonzero(a) & _nonzero(b)
        self.lanes += 2 * live.size
        self.live += 2 * int(live.sum())

    def launched(self, name):
        if name not in self.kernels:
            self.kernels.append(name)


def _nonzero(tile):
    return tile != 0


@contextmanager
def metered():
    """Meter every interpreted launch inside the `with` block."""
    meter = Meter()
    dot, product, launch = _builder.create_dot, _builder.create_fmul, interpreter.GridExecutor

    def metered_dot(self, a, b, *rest):
        meter.dot(a.data, b.data)
        return dot(self, a, b, *rest)

    def metered_product(self, a, b):
        meter.product(a.data, b.data)
        return product(self, a, b)

    def unknown(self, *args):
        raise NotImplementedError("a kernel multiplies in a way that the meter does not know")

    call = launch.__call__

    def metered_call(self, *args, **kwargs):
        meter.launched(self.fn.__name__)
        return call(self, *args, **kwargs)

    replaced = {name: getattr(_builder, name) for name in _UNKNOWN}
    for name in _UNKNOWN:
        setattr(_builder, name, unknown)
    _builder.create_dot, _builder.create_fmul = metered_dot, metered_product
    launch.__call__ = metered_call
    try:
        yield meter
    finally:
        _builder.create_dot, _builder.create_fmul, launch.__call__ = dot, product, call
        for name, original in replaced.items():
            setattr(_builder, name, original)
