"""When the compiled loops run: on plain CPU tensors that are large, where numba is installed."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

SMALLEST = 2**12
"""Fewer elements are left to torch: numba takes seconds to be loaded the first time."""
_KINDS = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)


def loops(size: int, *tensors: Tensor) -> ModuleType | None:
    """The compiled loops, if they can work on these tensors and there are `size` elements to go.

    The environment variable `SPARSEKERN_CPU` chooses as it does for products: "blas" and "csr" are
    torch's own operators, and so is what runs without numba.
    """
    if size < SMALLEST or os.environ.get("SPARSEKERN_CPU", "jit") != "jit":
        return None
    return _module() if all(map(_is_plain, tensors)) else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers lie one after the other in this process's memory."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.dtype in _KINDS and tensor.is_contiguous()


@functools.cache
def _module() -> ModuleType | None:
    """None without numba; the answer of the first call stays, for an import that fails is slow."""
    try:
        return importlib.import_module("sparsekern.topology.compiled")
    except ImportError:
        return None
