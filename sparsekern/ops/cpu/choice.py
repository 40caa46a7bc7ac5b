"""Which CPU implementation runs, and the arithmetic type it runs in.

The rule, `backend_for`, depends on nothing but what is installed, the block and the dtype:

1. `"jit"` (`jit.linear`, needs the optional package numba): every block and dtype.
2. `"blas"` (`blas`, torch only): both block edges at least 32.
3. `"csr"` (`csr`, torch only): all smaller blocks, (1, 1) among them.

`SPARSEKERN_CPU=jit|blas|csr` in the environment, or `with force(...)`, overrides it. float32 and
float64 are computed as they are; float16 and bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from sparsekern.errors import ConfigError, DtypeError, UnavailableError

if TYPE_CHECKING:
    from sparsekern.topology import Topology

NAMES = ("jit", "blas", "csr")
BLAS_EDGE = 32
_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_forced: ContextVar[str | None] = ContextVar("sparsekern_cpu_backend", default=None)


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed and works with this numpy (it refuses a version it does not know).

    The answer of the first call stays: an import that fails is slow.
    """
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run the CPU products of this context on the implementation `name`, whatever the rule says.

    Raises:
        ConfigError: `name` is not one of "jit", "blas", "csr".
        UnavailableError: "jit" without numba.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(t: Topology, dtype: torch.dtype) -> str:
    """Name the implementation that runs for a topology and a dtype: "jit", "blas" or "csr".

    Raises:
        DtypeError: `dtype` is not float32, float64, float16 or bfloat16.
        ConfigError, UnavailableError: the override names something that can't run here.
    """
    if dtype not in _COMPUTE:
        raise DtypeError(f"CPU products take {', '.join(map(str, _COMPUTE))}; got {dtype}")
    named = _forced.get() or os.environ.get("SPARSEKERN_CPU")
    if named:
        return _checked(named)
    if has_numba():
        return "jit"
    return "blas" if min(t.block) >= BLAS_EDGE else "csr"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic type of products of `dtype`: float32 for the 16-bit types."""
    return _COMPUTE[dtype]


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ConfigError(f"a CPU implementation is one of {NAMES}; got {name!r}")
    if name == "jit" and not has_numba():
        raise UnavailableError("the CPU implementation 'jit' needs numba: pip install numba")
    return name
