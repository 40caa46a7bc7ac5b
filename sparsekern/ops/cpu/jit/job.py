"""A job of the linear numba kernels: an array of int64 that a compiled function works through.

A kernel takes one address. Behind it are the addresses and sizes of the operands and two counters:
threads take the parts of a job one after another until none is left, so it does not matter how many
come, and a thread that is held up takes fewer. No part depends on another, and which thread does it
changes no bit.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from typing import Any

from sparsekern.errors import IncompleteError
from sparsekern.ops.cpu import threads

(
    # counters: parts taken, threads that came; then how many parts there are
    NEXT,
    WORKERS,
    PARTS,
    # addresses, of which each call has its own
    OUT,
    X,
    Y,
    W,
    BIAS,
    PTR,
    IDX,
    SLOT,
    X_TILES,
    Y_TILES,
    # sizes and strides, in elements
    TOKENS,
    OUT_ROW,
    OUT_FEATURES,
    X_ROW,
    X_COL,
    X_FEATURES,
    Y_ROW,
    Y_COL,
    Y_FEATURES,
    OUT_EDGE,
    IN_EDGE,
    BLOCK_ROWS,
    SPLIT,
    SPAN,
    TURNED,
    LD,
    FIRST,
    SIZE,
    TILES,
) = range(32)

Kernel = Callable[[int], None]
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def launch(kernel: Any, fields: tuple[int, ...], workers: int) -> None:
    """Run a compiled kernel on a job, on at most `workers` threads, and wait for it.

    Args:
        kernel: what `entry` returned.
        fields: the job, in the order above.
        workers: at most `torch.get_num_threads()`.

    Raises:
        IncompleteError: a part was not begun.
    """
    job = array("q", fields)
    address = job.buffer_info()[0]
    if workers < 2:
        kernel(address)
        return
    region = None if threads._Pool.forked else _region()
    if region is None:
        threads.run([functools.partial(kernel, address)] * workers)
    else:
        region(kernel, address, workers, 0)
    if job[NEXT] < job[PARTS]:
        raise IncompleteError(f"{job[PARTS]} parts of a product must run; {job[NEXT]} did")


def entry(function: Any) -> Any:
    """Compile a jitted `function(job)`, or load what numba kept, to be called without the GIL."""
    from numba import types  # noqa: PLC0415  numba is optional

    # what numba itself does to pass a function to a compiled one as a value
    result = function.get_compile_result(types.void(types.int64))
    address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
    return _KERNEL(address)


@functools.cache
def _region() -> Callable[[Any, int, int, int], None] | None:
    """`GOMP_parallel` of torch's OpenMP library; compiled kernels run on it without Python."""
    library = threads._openmp()
    if library is None:
        return None
    kind = ctypes.CFUNCTYPE(None, _KERNEL, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return kind(("GOMP_parallel", library))
