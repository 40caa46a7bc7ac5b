"""Named ranges in `torch.profiler`, for what is no operator of its own.

    sparsekern::update         a topology update; inside it, for each layer,
    sparsekern::drop           what to drop,
    sparsekern::grow           what to grow, and
    sparsekern::rewire         the move of values and optimizer state
    sparsekern::score          the dense gradient, streamed in the backward pass before an update
    sparsekern::scan           a recurrent layer's time steps, in one direction
    sparsekern::scan_backward  the same on the way back

Operators (`sparsekern::spmm` and so on) show under their own names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_profiler: Any = torch.autograd.profiler


def ranged(name: str, detail: str | None = None) -> AbstractContextManager[object]:
    """The range `sparsekern::<name>` around a `with` block, if a profiler records.

    Args:
        name: one of those above, without the namespace.
        detail: recorded as the range's argument, such as a layer's name.
    """
    # where nobody looks it is a comparison, and no operator for a tracer to trip over
    if not _profiler._is_profiler_enabled:
        return nullcontext()
    return record_function(f"sparsekern::{name}", detail)
