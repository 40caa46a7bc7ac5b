"""`Topology`: which connections of a weight matrix exist.

One immutable value object carries the index arrays of a sparse matrix and of its transpose. Block
(1, 1) *is* CSR. Values are kept elsewhere, as an ordinary dense tensor of shape (nnzb, bh, bw).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.topology import sampling
from sparsekern.topology.blocks import Block, Grid, active_count, check_sparsity, tiles_of, untiled

_INT32_MAX = 2**31 - 1
ARRAY_NAMES = ("crow", "col", "ccol", "row", "perm", "row_order", "col_order")


class TopologyDiff(NamedTuple):
    """What changed from one topology to another, as sorted flat block positions (int64)."""

    added: Tensor
    removed: Tensor
    kept: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Topology:
    """The active blocks of a (rows, cols) matrix cut into blocks of (bh, bw).

    A shape that is not a multiple of the block is padded inside: edge blocks are stored whole, and
    what lies beyond the matrix is always zero.

    The weight of a convolution is the matrix (C_out, kh kw C_in / groups), taps first, channels
    last. Its rows come in `groups` equal parts, its columns in `taps` = kh kw, and no block
    straddles two: each part is cut and padded by itself.

    Attributes:
        shape: (rows, cols) of the dense matrix; rows are outputs.
        block: (bh, bw); (1, 1) is CSR.
        crow: (block_rows + 1,) int32, where each block row starts in `col`.
        col: (nnzb,) int32, block column of each active block, ascending within a row.
        ccol: (groups block_cols + 1,) int32, where each block column of each group starts in
            `row` and `perm`; the columns of a group follow one another.
        row: (nnzb,) int32, block row of each active block in column order, group by group.
        perm: (nnzb,) int32, position in CSR order of each active block in column order.
        row_order: (block_rows,) int32, block rows from most to least active blocks; among equals
            the lower first. Kernels start the longest rows first and so end together.
        col_order: (groups block_cols,) int32, the same for block columns.
        groups: equal parts of the rows, each with inputs of its own; 1 but for grouped convolution.
        taps: equal parts of the columns: kernel positions of a convolution.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    crow: Tensor
    col: Tensor
    ccol: Tensor
    row: Tensor
    perm: Tensor
    row_order: Tensor
    col_order: Tensor
    groups: int = 1
    taps: int = 1

    # ---- construction

    @staticmethod
    def from_positions(
        positions: Tensor,
        shape: Sequence[int],
        block: Block = 1,
        *,
        groups: int = 1,
        taps: int = 1,
    ) -> Topology:
        """Build from flat block positions (block row * block_cols + block column).

        Args:
            positions: (nnzb,) int64, ascending and without duplicates.
            shape: (rows, cols) of the dense matrix.
            block: int or pair.
            groups: parts of the rows.
            taps: parts of the columns.

        Raises:
            TopologyError: a position is out of range, or they are not strictly ascending.
        """
        grid = Grid.of(shape, block, groups, taps)
        if positions.dtype != torch.int64 or positions.dim() != 1:
            raise TopologyError(
                f"`positions` must be a 1-D int64 tensor; got {positions.dim()}-D {positions.dtype}"
            )
        n = positions.numel()
        if n > _INT32_MAX:
            raise TopologyError(f"at most {_INT32_MAX} blocks can be active; got {n}")
        if n and bool((positions[1:] <= positions[:-1]).any()):
            raise TopologyError("`positions` must be strictly ascending")
        if n and not 0 <= int(positions[0]) <= int(positions[-1]) < grid.total:
            raise TopologyError(
                f"`positions` must lie in [0, {grid.total}); "
                f"got {int(positions[0])} to {int(positions[-1])}"
            )
        rows = torch.div(positions, grid.cols, rounding_mode="floor").to(torch.int32)
        cols = (positions - rows.long() * grid.cols).to(torch.int32)
        keys = cols
        if groups > 1:
            keys = torch.div(rows, grid.part_blocks[0], rounding_mode="floor") * grid.cols + cols
        # stable: within a column the blocks stay in row order, so sums have one fixed order
        perm = torch.argsort(keys, stable=True).to(torch.int32)
        crow, ccol = _offsets(rows, grid.rows), _offsets(keys, groups * grid.cols)
        return Topology(
            shape=grid.shape,
            block=grid.block,
            crow=crow,
            col=cols,
            ccol=ccol,
            row=rows[perm.long()],
            perm=perm,
            row_order=_longest_first(crow),
            col_order=_longest_first(ccol),
            groups=groups,
            taps=taps,
        )

    @staticmethod
    def random(
        shape: Sequence[int],
        block: Block = 1,
        *,
        sparsity: float | None = None,
        nnzb: int | None = None,
        groups: int = 1,
        taps: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Topology:
        """Draw active blocks uniformly at random, without ever making a dense mask.

        Memory is O(nnzb), also for a 65,536 x 65,536 matrix at 1 % density. Give either
        `sparsity`, which fixes the number of active weights to within one block, or `nnzb`,
        which fixes the number of blocks. Positions are drawn on the CPU, so that a seed gives
        the same topology on every device.

        Raises:
            ConfigError: `sparsity` outside [0, 1), `nnzb` out of range, or not exactly one given.
            ShapeError: a block edge is larger than the matrix.
            DtypeError: `generator` is no torch.Generator.
        """
        sampling.check_generator(generator)
        grid = Grid.of(shape, block, groups, taps)
        if (sparsity is None) == (nnzb is None):
            raise ConfigError("give exactly one of `sparsity` and `nnzb`")
        if sparsity is not None:
            target = active_count(grid.shape[0] * grid.shape[1], check_sparsity(sparsity))
            positions = sampling.sample_blocks(grid, target, generator)
        else:
            if nnzb is None or not 0 <= nnzb <= grid.total:
                raise ConfigError(f"`nnzb` must lie in [0, {grid.total}]; got {nnzb}")
            positions = sampling.sample_sorted(nnzb, grid.total, generator)
        topology = Topology.from_positions(positions, shape, block, groups=groups, taps=taps)
        return topology if device is None else topology.to(device)

    @staticmethod
    def from_mask(mask: Tensor, block: Block = 1, *, groups: int = 1, taps: int = 1) -> Topology:
        """Build from a dense (rows, cols) mask: a block is active where any of its weights is.

        Raises:
            ShapeError: `mask` is not 2-D, or a block edge is larger than it.
        """
        if mask.dim() != 2:
            raise ShapeError(f"`mask` must be 2-D (rows, cols); got shape {tuple(mask.shape)}")
        grid = Grid.of(mask.shape, block, groups, taps)
        tiles = tiles_of(mask != 0, grid)
        positions = tiles.any(dim=3).any(dim=1).flatten().nonzero()[:, 0]
        return Topology.from_positions(positions, mask.shape, block, groups=groups, taps=taps)

    @staticmethod
    def from_torch(tensor: Tensor) -> tuple[Topology, Tensor]:
        """Take over a `torch.sparse_csr` or `torch.sparse_bsr` matrix.

        Returns:
            The topology and the values (nnzb, bh, bw) in its order.

        Raises:
            DtypeError: `tensor` has another layout.
            TopologyError: its indices are out of range, unordered or duplicated.
        """
        if tensor.layout not in (torch.sparse_csr, torch.sparse_bsr):
            raise DtypeError(
                f"`tensor` must be a torch.sparse_csr or sparse_bsr matrix; got {tensor.layout}"
            )
        if tensor.dim() != 2:
            raise ShapeError(f"`tensor` must be 2-D; got shape {tuple(tensor.shape)}")
        values = tensor.values().detach()
        block = (1, 1) if tensor.layout is torch.sparse_csr else tuple(values.shape[1:])
        grid = Grid.of(tensor.shape, (int(block[0]), int(block[1])))
        crow, col = tensor.crow_indices().long(), tensor.col_indices().long()
        _check_compressed(crow, col, grid.rows, grid.cols, ("crow", "col"))
        rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
        positions = rows * grid.cols + col
        return Topology.from_positions(positions, tensor.shape, grid.block), values.reshape(
            -1, *grid.block
        )

    # ---- facts

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """The index arrays, in the order of `ARRAY_NAMES`."""
        return tuple(getattr(self, name) for name in ARRAY_NAMES)

    @property
    def device(self) -> torch.device:
        """Where the index arrays live."""
        return self.col.device

    @property
    def nnzb(self) -> int:
        """Number of active blocks."""
        return self.col.numel()

    @property
    def block_rows(self) -> int:
        """Number of block rows, the last one of each group possibly ragged."""
        return self.crow.numel() - 1

    @property
    def block_cols(self) -> int:
        """Number of block columns, the last one of each tap possibly ragged."""
        return (self.ccol.numel() - 1) // self.groups

    @property
    def grid(self) -> Grid:
        """How the matrix is cut."""
        counts = self.block_rows, self.block_cols
        return Grid(self.shape, self.block, *counts, self.groups, self.taps)

    @property
    def values_shape(self) -> tuple[int, int, int]:
        """Shape of the values tensor, (nnzb, bh, bw)."""
        return (self.nnzb, *self.block)

    @property
    def nnz(self) -> int:
        """Active weights inside the matrix; padding of edge blocks is not counted."""
        grid = self.grid
        if not grid.ragged:
            return self.nnzb * self.block[0] * self.block[1]
        heights, widths = (
            torch.tensor(grid.block_sizes(axis), device=self.device) for axis in (0, 1)
        )
        return int((heights[self.slot_rows()] * widths[self.col.long()]).sum())

    @property
    def density(self) -> float:
        """Active share of the matrix's weights."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def block_density(self) -> float:
        """Active share of the matrix's blocks; known from shapes, without asking the device."""
        return self.nnzb / max(self.block_rows * self.block_cols, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the index arrays: 4 (2 block_rows + 2 groups block_cols + 2 + 3 nnzb)."""
        return sum(array.numel() * array.element_size() for array in self.arrays)

    def slot_rows(self) -> Tensor:
        """Block row of each active block in CSR order, (nnzb,) int64; no host synchronisation."""
        return torch.repeat_interleave(self.crow.long().diff(), output_size=self.nnzb)

    def positions(self) -> Tensor:
        """Flat positions of the active blocks, (nnzb,) int64, ascending."""
        return self.slot_rows() * self.block_cols + self.col

    def digest(self) -> str:
        """Hex SHA-256 of shape, block and connections: equal on every rank and device."""
        parts = f"{self.groups},{self.taps}" if self.groups * self.taps > 1 else ""
        header = f"{self.shape}{self.block}{parts}".encode()
        body = b"".join(a.cpu().numpy().astype("<i4").tobytes() for a in (self.crow, self.col))
        return hashlib.sha256(header + body).hexdigest()

    # ---- conversion

    def to(self, device: torch.device | str) -> Topology:
        """The same topology with its arrays on `device`."""
        return self.with_arrays([array.to(device) for array in self.arrays])

    def with_arrays(self, arrays: Sequence[Tensor]) -> Topology:
        """The same matrix, cut alike, with other connections; unchecked, see `validate`."""
        named: dict[str, Any] = dict(zip(ARRAY_NAMES, arrays, strict=True))
        return replace(self, **named)

    def with_positions(self, positions: Tensor) -> Topology:
        """The same matrix, cut alike, with these blocks active; see `from_positions`."""
        return Topology.from_positions(
            positions, self.shape, self.block, groups=self.groups, taps=self.taps
        )

    def to_mask(self) -> Tensor:
        """Dense bool mask (rows, cols)."""
        ones = torch.ones(self.values_shape, dtype=torch.bool, device=self.device)
        return self.unpack(ones)

    def pack(self, dense: Tensor) -> Tensor:
        """Take the active blocks out of a dense (rows, cols) tensor: (nnzb, bh, bw)."""
        self._check_dense(dense)
        tiles = tiles_of(dense, self.grid)
        return tiles[self.slot_rows(), :, self.col.long(), :]

    def unpack(self, values: Tensor) -> Tensor:
        """Dense (rows, cols) tensor with `values` (nnzb, bh, bw) at the active blocks, else 0."""
        if tuple(values.shape) != self.values_shape:
            raise ShapeError(
                f"`values` must have shape {self.values_shape}; got {tuple(values.shape)}"
            )
        bh, bw = self.block
        tiles = values.new_zeros(self.block_rows, bh, self.block_cols, bw)
        tiles[self.slot_rows(), :, self.col.long(), :] = values
        return untiled(tiles, self.grid).contiguous()

    def clear_padding_(self, values: Tensor) -> Tensor:
        """Set what `values` (nnzb, bh, bw) hold beyond the matrix to exactly 0, in place."""
        grid = self.grid
        (height, width), (down, across), (bh, bw) = grid.part, grid.part_blocks, self.block
        with torch.no_grad():
            if height % bh:
                values[self.slot_rows() % down == down - 1, height % bh :, :] = 0
            if width % bw:
                values[self.col % across == across - 1, :, width % bw :] = 0
        return values

    def to_torch(self, values: Tensor) -> Tensor:
        """The matrix as `torch.sparse_csr` (block (1, 1)) or `torch.sparse_bsr`.

        Raises:
            ShapeError: `values` has another shape, or the matrix is not a multiple of the block.
        """
        if tuple(values.shape) != self.values_shape:
            raise ShapeError(
                f"`values` must have shape {self.values_shape}; got {tuple(values.shape)}"
            )
        if self.block == (1, 1):
            return torch.sparse_csr_tensor(
                self.crow, self.col, values.flatten(), self.shape, check_invariants=True
            )
        if self.grid.ragged:
            raise ShapeError(
                f"torch.sparse_bsr needs a shape that is a multiple of the block {self.block}; "
                f"got {self.grid.part}"
            )
        return torch.sparse_bsr_tensor(
            self.crow, self.col, values, self.shape, check_invariants=True
        )

    # ---- comparison and checking

    def diff(self, other: Topology) -> TopologyDiff:
        """Blocks that `other` adds, removes and keeps, seen from this topology.

        Raises:
            ShapeError: the two differ in shape or block.
        """
        if not self.is_cut_like(other):
            raise ShapeError(
                f"topologies must share shape and block; got {self._cut} and {other._cut}"
            )
        mine, theirs = self.positions(), other.positions()
        kept = contains(theirs, mine)
        return TopologyDiff(theirs[~contains(mine, theirs)], mine[~kept], mine[kept])

    def overlap(self, other: Topology) -> float:
        """Share of this topology's blocks that are active in `other` too; 1.0 if it has none."""
        return self.diff(other).kept.numel() / self.nnzb if self.nnzb else 1.0

    def is_cut_like(self, other: Topology) -> bool:
        """Whether both cut a matrix of one shape into the same blocks."""
        return self.grid == other.grid

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Topology):
            return NotImplemented
        return (
            self.is_cut_like(other)
            and torch.equal(self.crow, other.crow)
            and torch.equal(self.col, other.col)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors inside: use digest()

    def __repr__(self) -> str:
        return (
            f"Topology({self._cut}, nnzb={self.nnzb}, "
            f"density={self.density:.4g}, device={str(self.device)!r})"
        )

    @property
    def _cut(self) -> str:
        parts = f", groups={self.groups}, taps={self.taps}" if self.groups * self.taps > 1 else ""
        return f"shape={self.shape}, block={self.block}{parts}"

    def validate(self) -> Topology:
        """Check range, order, duplicates and that `perm` inverts the transpose; return self.

        Raises:
            TopologyError: naming the array and what is wrong with it.
        """
        grid = Grid.of(self.shape, self.block, self.groups, self.taps)
        for name, array in zip(ARRAY_NAMES, self.arrays, strict=True):
            if array.dtype != torch.int32 or array.dim() != 1:
                raise TopologyError(
                    f"`{name}` must be a 1-D int32 tensor; got {array.dim()}-D {array.dtype}"
                )
        _check_compressed(self.crow, self.col, grid.rows, grid.cols, ("crow", "col"))
        _check_compressed(self.ccol, self.row, grid.groups * grid.cols, grid.rows, ("ccol", "row"))
        rebuilt = self.with_positions(self.positions())
        for name in ARRAY_NAMES[2:]:
            if not torch.equal(getattr(self, name), getattr(rebuilt, name)):
                raise TopologyError(f"`{name}` does not follow from `crow` and `col`")
        return self

    def _check_dense(self, dense: Tensor) -> None:
        if tuple(dense.shape) != self.shape:
            raise ShapeError(f"dense tensor must have shape {self.shape}; got {tuple(dense.shape)}")


def contains(haystack: Tensor, needles: Tensor) -> Tensor:
    """For each needle, whether the ascending `haystack` holds it (bool, shape of `needles`)."""
    if not haystack.numel():
        return torch.zeros_like(needles, dtype=torch.bool)
    at = torch.searchsorted(haystack, needles).clamp_(max=haystack.numel() - 1)
    return haystack[at] == needles


def _offsets(indices: Tensor, n: int) -> Tensor:
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=indices.device)
    offsets[1:] = torch.bincount(indices, minlength=n).cumsum(0)
    return offsets


def _longest_first(offsets: Tensor) -> Tensor:
    return torch.argsort(offsets.diff(), descending=True, stable=True).to(torch.int32)


def _check_compressed(
    offsets: Tensor, indices: Tensor, n: int, bound: int, names: tuple[str, str]
) -> None:
    """Check one compressed index pair: lengths, monotone offsets, indices ascending per row."""
    outer, inner = names
    if offsets.numel() != n + 1:
        raise TopologyError(f"`{outer}` must have {n + 1} entries; got {offsets.numel()}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != indices.numel():
        raise TopologyError(
            f"`{outer}` must run from 0 to {indices.numel()}; "
            f"got {int(offsets[0])} to {int(offsets[-1])}"
        )
    counts = offsets.long().diff()
    if bool((counts < 0).any()):
        raise TopologyError(f"`{outer}` must not decrease")
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= bound:
        raise TopologyError(f"`{inner}` must lie in [0, {bound}); got {low} to {high}")
    outer_index = torch.repeat_interleave(counts, output_size=indices.numel())
    flat = outer_index * bound + indices
    if bool((flat[1:] <= flat[:-1]).any()):
        raise TopologyError(f"`{inner}` must ascend without duplicates within each row")
