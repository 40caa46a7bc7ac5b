"""The recurrence as torch's own differentiable operators, one time step after the other.

For who has to see into it: transforms of `torch.func`, forward-mode derivatives, `torch.export`,
`torch.jit.trace`.
It keeps more of each step than `scan` does, and takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparsekern.ops.library import is_traced

_C: Any = torch._C  # untyped in torch
States = Sequence[Tensor]


def is_transformed() -> bool:
    """Whether something acts now that an autograd function over all time would stop."""
    return bool(
        torch.compiler.is_compiling()
        or is_traced()
        or _C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def unrolled(
    kind: str,
    inputs: Tensor,
    state: States,
    hidden: nn.Module,
    projection: nn.Module | None,
    sizes: Sequence[int],
    *,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """As `scan`, whose arguments and results these are."""
    cell, state = CELLS[kind], tuple(state)
    steps = range(len(sizes))
    rows, outs = torch.split_with_sizes(inputs, list(sizes)), {}
    for t in reversed(steps) if reverse else steps:
        n = sizes[t]
        last = state if n == sizes[0] else tuple(s[:n] for s in state)
        h, *rest = cell(rows[t], hidden(last[0]), last)
        outs[t] = h if projection is None else projection(h)
        new = (outs[t], *rest)
        whole = n == sizes[0]
        state = new if whole else tuple(torch.cat([a, s[n:]]) for a, s in _pairs(new, state))
    return torch.cat([outs[t] for t in steps]), *state


def _pairs(new: States, old: States) -> zip[tuple[Tensor, Tensor]]:
    return zip(new, old, strict=True)


# ---- the next states of (input's contribution, hidden state's, last states), by the operators of
# `gates`, for the same bits


def _gru(x: Tensor, a: Tensor, state: States) -> States:
    (x_r, x_z, x_n), (a_r, a_z, a_n) = x.chunk(3, 1), a.chunk(3, 1)
    n = torch.addcmul(x_n, torch.sigmoid(x_r + a_r), a_n).tanh()
    return (torch.lerp(n, state[0], torch.sigmoid(x_z + a_z)),)


def _lstm(x: Tensor, a: Tensor, state: States) -> States:
    i, f, g, o = (x + a).chunk(4, 1)
    c = torch.addcmul(torch.sigmoid(f) * state[1], torch.sigmoid(i), torch.tanh(g))
    return torch.tanh(c) * torch.sigmoid(o), c


CELLS: dict[str, Callable[[Tensor, Tensor, States], States]] = {
    "gru": _gru,
    "lstm": _lstm,
    "tanh": lambda x, a, _: (torch.tanh(x + a),),
    "relu": lambda x, a, _: (torch.relu(x + a),),
}
"""By the names of `gates.KINDS`."""
