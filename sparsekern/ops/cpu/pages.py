"""Fresh memory for large results.

The C library hands out 32 MiB and more as new pages each time, and the first write to each page
costs 2 to 3 us on a virtual machine: longer than a sparse product takes to fill it. Pages of 2 MiB
are fewer. Where the system does not offer them for the asking, nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 25  # bytes from which the C library never hands out used memory
_PAGE = 1 << 21


def fresh(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (rows, cols) tensor on the CPU."""
    out = torch.empty((rows, cols), dtype=dtype, device="cpu")
    advise = _advise() if rows * cols * dtype.itemsize >= LARGE else None
    if advise is not None:
        first = -(-out.data_ptr() // _PAGE) * _PAGE
        last = (out.data_ptr() + out.nbytes) // _PAGE * _PAGE
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """`madvise` of the C library, where it knows of large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise.restype = ctypes.c_int
    return advise
