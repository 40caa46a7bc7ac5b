"""What to measure a launch key on: pure functions of the key and of what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sparsekern.errors import ConfigError
from sparsekern.kernels.tables import CONFIGS, Key

KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "ieee"}
"""Operand kind of each dtype; "tf32" and "fp32" are float32 with and without tensor cores."""

BLOCKS = (16, 32, 64, 128)

_SHORT_ROW = 512  # lanes; `launch.rows_class` draws the line there
_LANES = {"short": 256, "long": 1024}  # of a row, where no density given makes such rows


class Problem(NamedTuple):
    """Operands of one product: a (rows, cols) weight in square blocks, and tokens."""

    dtype: str
    block: int
    tokens: int
    rows: int
    cols: int
    density: float


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        ops: names in `tables.CONFIGS`.
        blocks: edges of square blocks.
        dtypes: names in `KINDS`.
        tokens: rows of the activations.
        shape: (rows, cols) of the weight.
        densities: active shares of the weight.
        tiny: sizes for a dry run, in place of the given ones.
    """

    ops: tuple[str, ...] = tuple(CONFIGS)
    blocks: tuple[int, ...] = BLOCKS
    dtypes: tuple[str, ...] = ("bf16",)
    tokens: int = 8192
    shape: tuple[int, int] = (4096, 4096)
    densities: tuple[float, ...] = (0.1,)
    tiny: bool = False

    def __post_init__(self) -> None:
        """Check."""
        for name, known in (("ops", CONFIGS), ("blocks", BLOCKS), ("dtypes", KINDS)):
            values = getattr(self, name)
            if not values or not set(values) <= set(known):
                raise ConfigError(f"`{name}` must be some of {tuple(known)}; got {values}")
        if self.tokens < 1:
            raise ConfigError(f"`tokens` must be at least 1; got {self.tokens}")
        if min(self.shape) < max(self.blocks):
            raise ConfigError(
                f"`shape` must hold a block of {max(self.blocks)}; got {self.shape[0]} x "
                f"{self.shape[1]}"
            )
        if not self.densities or not all(0 < d <= 1 for d in self.densities):
            raise ConfigError(f"`densities` must lie in (0, 1]; got {self.densities}")


def keys(request: Request, entries: Collection[Key]) -> list[Key]:
    """The entries that were asked for: first those that well-aligned operands take."""
    kinds = {KINDS[dtype] for dtype in request.dtypes}
    edges = {"any", *map(str, request.blocks)}
    asked = [k for k in entries if k.op in request.ops and k.kind in kinds and k.edge in edges]
    order = {op: i for i, op in enumerate(request.ops)}
    return sorted(asked, key=lambda k: (_is_second_choice(k, entries), order[k.op], k))


def _is_second_choice(key: Key, entries: Collection[Key]) -> bool:
    return key.loads == "pointer" and key._replace(loads="tma") in entries


def problems(key: Key, request: Request) -> list[Problem]:
    """Problems whose launch takes the entry of `key`; none if the shape can't make such rows."""
    block = _block(key, request.blocks)
    rows, cols = _tiny_shape(key, block) if request.tiny else request.shape
    tokens, densities = (32, (0.5,)) if request.tiny else (request.tokens, request.densities)
    width = rows if key.op.endswith("_t") else cols
    return [
        Problem(dtype, block, tokens, rows, cols, density)
        for dtype in request.dtypes
        if KINDS[dtype] == key.kind
        for density in _densities(key.rows, width, densities)
    ]


def _block(key: Key, blocks: Iterable[int]) -> int:
    if key.op.startswith("csr"):
        return 1
    return max(blocks) if key.edge == "any" else int(key.edge)


def _tiny_shape(key: Key, block: int) -> tuple[int, int]:
    """The interpreter takes about a millisecond for each tile."""
    if block == 1:
        return 32, 48
    if key.rows != "long":
        return 2 * block, 2 * block
    return (_SHORT_ROW, block) if key.op.endswith("_t") else (block, _SHORT_ROW)


def _densities(rows: str, width: int, densities: tuple[float, ...]) -> tuple[float, ...]:
    """Those that make rows of the class; if there are none, one that does."""
    if rows == "any":
        return densities
    fitting = tuple(d for d in densities if (d * width < _SHORT_ROW) == (rows == "short"))
    if fitting or (rows == "long" and width < _SHORT_ROW):
        return fitting
    return (min(1.0, _LANES[rows] / width),)
