"""How much sparsity each layer gets, so that the model as a whole gets what was asked for.

Uniform, Erdős-Rényi (ER) and Erdős-Rényi-Kernel (ERK) as in Evci et al. 2020, section 3 (1), with
the loop of the reference code that makes overfull layers dense. Sizes and densities of whole
layers are all that is needed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparsekern.errors import ConfigError
from sparsekern.topology.blocks import check_sparsity

Shapes = Mapping[str, Sequence[int]]
"""Weight shapes by layer name: (out, in) or (out, in, *kernel)."""


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity everywhere."""
    return dict.fromkeys(shapes, check_sparsity(sparsity))


def er(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Density proportional to (n_in + n_out) / (n_in n_out); kernel sizes are left out."""
    raw = {name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in shapes.items()}
    return _scaled(shapes, sparsity, raw)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Density proportional to the sum of all dimensions over their product."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    return _scaled(shapes, sparsity, raw)


DISTRIBUTIONS = {"uniform": uniform, "er": er, "erk": erk}


def distribute(shapes: Shapes, sparsity: float, distribution: str) -> dict[str, float]:
    """Sparsity of each layer by a named distribution.

    Raises:
        ConfigError: the name is unknown, or sparsity is outside [0, 1).
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(
            f"`distribution` must be one of {sorted(DISTRIBUTIONS)}, a dict or a callable; "
            f"got {distribution!r}"
        )
    return DISTRIBUTIONS[distribution](shapes, sparsity)


def _scaled(shapes: Shapes, sparsity: float, raw: Mapping[str, float]) -> dict[str, float]:
    """Solve density_l = eps * raw_l for eps; layers that would exceed 1 become dense."""
    check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        sparse = [name for name in shapes if name not in dense]
        ones = sum(sizes[name] - math.floor(sparsity * sizes[name]) for name in sparse)
        zeros_owed = sum(math.floor(sparsity * sizes[name]) for name in dense)
        eps = (ones - zeros_owed) / sum(raw[name] * sizes[name] for name in sparse)
        largest = max(raw[name] for name in sparse)
        if eps * largest <= 1:
            return {name: 0.0 if name in dense else 1 - eps * raw[name] for name in shapes}
        dense |= {name for name in sparse if raw[name] == largest}
    return dict.fromkeys(shapes, 0.0)
