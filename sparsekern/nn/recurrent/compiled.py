"""The cells' way back through time by the CPU's compiled kernels, in place of `gates`.

The same formulas, but a step takes the factors and the gradients of the gates in one pass, where
`gates` computes all factors first. For layers whose products run compiled too (`ops.cpu.jit`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.nn.recurrent.gates import Rows, States, Walk


def _kernels() -> Any:
    return importlib.import_module("sparsekern.ops.cpu.jit.gates")  # numba is optional


def _element(like: Tensor) -> tuple[Any, int]:
    size = like.element_size()
    return np.float32(0) if size == 4 else np.float64(0), size


def _matrix(x: Tensor) -> tuple[int, int]:
    """Address and row stride; a row is contiguous in all buffers that come here."""
    return x.data_ptr(), x.stride(0)


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _gru_backward(kept: Tensor, last: States, _new: States, rows: Rows) -> Walk:
    size, element, run = kept.shape[1] // 4, _element(kept), _kernels().gru_back
    hidden, inputs = (kept.new_empty(len(kept), 3 * size) for _ in range(2))
    buffers = [rows(b) for b in (kept, last[0], hidden, inputs)]
    updates = rows(kept[:, size : 2 * size])

    def step(t: int, dh: Tensor, _rest: States) -> None:
        dh = _plain(dh)
        run(*element, len(dh), size, _matrix(dh), *(_matrix(b[t]) for b in buffers))

    def carry(t: int, dh: Tensor, d_last: Tensor) -> None:
        d_last.addcmul_(dh, updates[t])

    return Walk(hidden, buffers[2], step, carry, lambda: inputs)


def _lstm_backward(kept: Tensor, last: States, new: States, rows: Rows) -> Walk:
    size, element, run = kept.shape[1] // 4, _element(kept), _kernels().lstm_back
    out = torch.empty_like(kept)
    buffers = [rows(b) for b in (kept, last[1], new[1].tanh(), out)]

    def step(t: int, dh: Tensor, rest: States) -> None:
        dh = _plain(dh)
        places = (_matrix(b[t]) for b in buffers)
        run(*element, len(dh), size, _matrix(dh), _matrix(rest[0]), *places)

    return Walk(out, buffers[3], step, None, lambda: out)


BACKWARD: dict[str, Callable[[Tensor, States, States, Rows], Walk]] = {
    "gru": _gru_backward,
    "lstm": _lstm_backward,
}
"""`gates.Kind.backward` of the cells that have compiled kernels."""
