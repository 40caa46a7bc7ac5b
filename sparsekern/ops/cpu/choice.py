"""Which CPU implementation runs, and the arithmetic type it runs in.

The rule, `backend_for`, depends on nothing but what is installed, the block and the dtype:

1. `"jit"` (`jit.linear`, needs the optional package numba): every block and dtype.
2. `"blas"` (`blas`, torch only): both block edges at least 32.
3. `"csr"` (`csr`, torch only): all smaller blocks, (1, 1) among them.

`SPARSEKERN_CPU=jit|blas|csr` in the environment, or `with force(...)`, overrides it. float32 and
float64 are computed as they are. float16 and bfloat16 are computed in float32 and rounded once:
operands are widened, products and sums are float32, and only the result is 16 bits wide. That is
what a GPU's tensor cores do too; it saves memory between products, and no time inside one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from sparsekern.errors import ConfigError, DtypeError, UnavailableError

if TYPE_CHECKING:
    from sparsekern.topology import Topology

NAMES = ("jit", "blas", "csr")
INSTALL = 'pip install "sparsekern[cpu]"'
BLAS_EDGE = 32
_COMPUTE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_ENVIRON: Any = os.environ
_KEY = _ENVIRON.encodekey("SPARSEKERN_CPU")
_forced: ContextVar[str | None] = ContextVar("sparsekern_cpu_backend", default=None)


def has_numba() -> bool:
    """Whether numba is installed and works with this numpy (it refuses a version it does not know).

    The answer of the first call stays: an import that fails is slow.
    """
    return _numba_missing() is None


@functools.cache
def _numba_missing() -> str | None:
    """Why numba can't be imported; None if it can."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def warn_of_missing_numba() -> None:
    """Say once what is lost where numba can't be imported and nothing was chosen by name."""
    missing = _numba_missing()
    if missing is not None and not _named():
        logging.getLogger(__name__).warning(
            "numba can't be imported (%s): sparse products on the CPU take 2 to 4 times as long as "
            "they need to. %s brings it",
            missing,
            INSTALL,
        )


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
    return _rule(min(t.block))


def described(edge: int) -> str:
    """Name the implementation of blocks whose smaller edge is `edge`, and what it is made with."""
    name = _rule(edge)
    return f"{name} ({'numba' if name == 'jit' else 'torch'})"


def _rule(edge: int) -> str:
    named = _named()
    if named:
        return _checked(named)
    if has_numba():
        return "jit"
    return "blas" if edge >= BLAS_EDGE else "csr"


def _named() -> str | None:
    return _forced.get() or _environment()


def _environment() -> str | None:
    """`SPARSEKERN_CPU` as it is now: `os.environ.get` encodes the name each time, for 1 us."""
    found = _ENVIRON._data.get(_KEY)
    return None if found is None else _ENVIRON.decodevalue(found)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic type of products of `dtype`: float32 for the 16-bit types."""
    return _COMPUTE[dtype]


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ConfigError(f"a CPU implementation is one of {NAMES}; got {name!r}")
    if name == "jit" and not has_numba():
        raise UnavailableError(f"the CPU implementation 'jit' needs numba: {INSTALL}")
    return name
