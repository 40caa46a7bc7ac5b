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
    """A matrix cut into blocks: `rows` and `cols` count blocks, ragged ones included.

    The rows come in `groups` equal parts and the columns in `taps`, as those of a convolution's
    weight do; each part is cut by itself, so that no block straddles two.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    rows: int
    cols: int
    groups: int = 1
    taps: int = 1

    @property
    def total(self) -> int:
        """Number of blocks."""
        return self.rows * self.cols

    @property
    def part(self) -> tuple[int, int]:
        """Rows of a group, columns of a tap."""
        return self.shape[0] // self.groups, self.shape[1] // self.taps

    @property
    def part_blocks(self) -> tuple[int, int]:
        """Block rows of a group, block columns of a tap."""
        return self.rows // self.groups, self.cols // self.taps

    @property
    def ragged(self) -> bool:
        """Whether some blocks reach beyond their part."""
        return any(size % edge for size, edge in zip(self.part, self.block, strict=True))

    @staticmethod
    def of(shape: Sequence[int], block: Block, groups: int = 1, taps: int = 1) -> Grid:
        """Check and cut.

        Raises:
            ShapeError: the block is larger than a part, or the parts do not divide the matrix.
        """
        bh, bw = as_block(block)
        if not isinstance(shape, Sequence) or not all(hasattr(n, "__index__") for n in shape):
            raise DtypeError(f"`shape` must be two ints; got {shape!r}")
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(f"`shape` must be two positive sizes; got {tuple(shape)}")
        rows, cols = int(shape[0]), int(shape[1])
        if min(groups, taps) < 1 or rows % groups or cols % taps:
            raise ShapeError(
                f"{groups} groups and {taps} taps must divide the shape; got {(rows, cols)}"
            )
        part = rows // groups, cols // taps
        if bh > part[0] or bw > part[1]:
            raise ShapeError(
                f"`block` {(bh, bw)} is larger than the layer's shape {(rows, cols)}"
                if groups == taps == 1
                else f"`block` {(bh, bw)} is larger than the channels of a group: {part[0]} "
                f"outputs, {part[1]} inputs"
            )
        counts = groups * -(-part[0] // bh), taps * -(-part[1] // bw)
        return Grid((rows, cols), (bh, bw), *counts, groups, taps)

    def block_sizes(self, axis: int) -> list[int]:
        """Rows (axis 0) or columns (axis 1) that each block row or column really holds."""
        size, edge, parts = self.part[axis], self.block[axis], (self.groups, self.taps)[axis]
        return [min(edge, size - first) for first in range(0, size, edge)] * parts


def tiles_of(dense: Tensor, grid: Grid) -> Tensor:
    """View a dense matrix as (block_rows, bh, block_cols, bw), padding with zeros if ragged."""
    (bh, bw), (height, width) = grid.block, grid.part
    if grid.ragged:
        (down, across) = grid.part_blocks
        padded = dense.new_zeros(grid.groups, down * bh, grid.taps, across * bw)
        padded[:, :height, :, :width] = dense.reshape(grid.groups, height, grid.taps, width)
        dense = padded
    return dense.reshape(grid.rows, bh, grid.cols, bw)


def untiled(tiles: Tensor, grid: Grid) -> Tensor:
    """Inverse of `tiles_of`: the dense (rows, cols) matrix without padding."""
    (bh, bw), (down, across) = grid.block, grid.part_blocks
    height, width = grid.part
    parts = tiles.view(grid.groups, down * bh, grid.taps, across * bw)
    return parts[:, :height, :, :width].reshape(grid.shape)
