"""Cutting a matrix into blocks: sizes, counts and views, with padding at ragged edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError

Block = int | tuple[int, int]
"""A block size: the edge of a square, or (rows, columns)."""


def as_block(block: object) -> tuple[int, int]:
    """Turn a block size, an int (square) or a pair, into a pair (bh, bw).

    Raises:
        DtypeError: `block` is neither an int nor a pair of ints.
        ConfigError: an edge is below 1.
    """
    edges = tuple(block) if isinstance(block, tuple | list) else (block, block)
    if len(edges) != 2 or not all(type(edge) is int for edge in edges):
        raise DtypeError(f"`block` must be an int or a pair of ints; got {block!r}")
    bh, bw = edges
    if bh < 1 or bw < 1:
        raise ConfigError(f"`block` edges must be at least 1; got {block!r}")
    return bh, bw


def check_sparsity(sparsity: object, name: str = "sparsity") -> float:
    """Return `sparsity` as a float.

    Raises:
        DtypeError: it is not a number.
        ConfigError: it lies outside [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise DtypeError(f"`{name}` must be a number; got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"`{name}` must lie in [0, 1); got {sparsity}")
    return float(sparsity)


def active_count(size: int, sparsity: float) -> int:
    """Active weights of a layer of `size` weights: size - floor(sparsity * size) (RigL code)."""
    # rounding first keeps 0.29 * 100 = 28.999... from losing a weight
    return size - math.floor(round(sparsity * size, 6))


class Grid(NamedTuple):
    """A matrix cut into blocks: `rows` and `cols` count blocks, ragged ones included."""

    shape: tuple[int, int]
    block: tuple[int, int]
    rows: int
    cols: int

    @property
    def total(self) -> int:
        """Number of blocks."""
        return self.rows * self.cols

    @staticmethod
    def of(shape: Sequence[int], block: Block) -> Grid:
        """Check and cut; raises `ShapeError` if the block is larger than the matrix."""
        bh, bw = as_block(block)
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(f"`shape` must be two positive sizes; got {tuple(shape)}")
        rows, cols = int(shape[0]), int(shape[1])
        if bh > rows or bw > cols:
            raise ShapeError(f"`block` {(bh, bw)} is larger than the layer's shape {(rows, cols)}")
        return Grid((rows, cols), (bh, bw), -(-rows // bh), -(-cols // bw))


def tiles_of(dense: Tensor, grid: Grid) -> Tensor:
    """View a dense matrix as (block_rows, bh, block_cols, bw), padding with zeros if ragged."""
    (rows, cols), (bh, bw) = grid.shape, grid.block
    if rows % bh or cols % bw:
        padded = dense.new_zeros(grid.rows * bh, grid.cols * bw)
        padded[:rows, :cols] = dense
        dense = padded
    return dense.reshape(grid.rows, bh, grid.cols, bw)
