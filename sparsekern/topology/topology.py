"""`Topology`: which connections of a weight matrix exist.

One immutable value object carries the index arrays of a sparse matrix and of its transpose. Block
(1, 1) *is* CSR. Values are kept elsewhere, as an ordinary dense tensor of shape (nnzb, bh, bw).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.topology import sampling
from sparsekern.topology.blocks import Block, Grid, active_count, check_sparsity, tiles_of, untiled
from sparsekern.topology.build import arrays_at, contains
from sparsekern.topology.checks import (
    check_array,
    check_compressed,
    check_tensor,
    check_topology,
    checked_counts,
)
from sparsekern.topology.known import Known, prove, versions_of, vouch
from sparsekern.topology.native import loops

STORED_NAMES = ("crow", "col")
"""The arrays that connections are saved by."""

DERIVED_NAMES = ("ccol", "row", "perm", "row_order", "col_order")
"""Those that follow from them."""

ARRAY_NAMES = (*STORED_NAMES, *DERIVED_NAMES)


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
    _known: Known | None = field(default=None, init=False)  # stays with the object: never copied

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
        check_tensor("positions", positions)
        # index arrays count who writes to them, which inference tensors do not
        with torch.inference_mode(False):
            grid = Grid.of(shape, block, groups, taps)
            arrays = arrays_at(positions, grid)
        topology = Topology(grid.shape, grid.block, **arrays, groups=groups, taps=taps)
        vouch(topology)
        return topology

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
            TopologyError: more blocks than int32 can count.
            DtypeError: `generator` is no torch.Generator.
        """
        sampling.check_generator(generator)
        grid = Grid.of(shape, block, groups, taps)
        if (sparsity is None) == (nnzb is None):
            raise ConfigError("give exactly one of `sparsity` and `nnzb`")
        if sparsity is not None:
            target = active_count(grid.shape[0] * grid.shape[1], check_sparsity(sparsity))
            sampling.check_count(sampling.block_counts(grid, target)[0], grid)
            positions = sampling.sample_blocks(grid, target, generator)
        else:
            if nnzb is None or not 0 <= nnzb <= grid.total:
                raise ConfigError(f"`nnzb` must lie in [0, {grid.total}]; got {nnzb}")
            sampling.check_count(nnzb, grid)
            positions = sampling.sample_sorted(nnzb, grid.total, generator)
        topology = Topology.from_positions(positions, shape, block, groups=groups, taps=taps)
        return topology if device is None else topology.to(device)

    @staticmethod
    def from_mask(mask: Tensor, block: Block = 1, *, groups: int = 1, taps: int = 1) -> Topology:
        """Build from a dense (rows, cols) mask: a block is active where any of its weights is.

        Raises:
            ShapeError: `mask` is not 2-D, or a block edge is larger than it.
            TopologyError: it holds NaN, which is neither active nor inactive.
        """
        check_tensor("mask", mask)
        if mask.dim() != 2:
            raise ShapeError(f"`mask` must be 2-D (rows, cols); got shape {tuple(mask.shape)}")
        if mask.is_floating_point() and bool(mask.isnan().any()):
            raise TopologyError("`mask` must say of each weight whether it is active; got NaN")
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
        check_tensor("tensor", tensor)
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
        check_compressed(crow, col, grid.rows, grid.cols, ("crow", "col"))
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
    def layout(self) -> tuple[int, ...]:
        """(rows, cols, bh, bw, groups, taps)."""
        return *self.shape, *self.block, self.groups, self.taps

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
        """Block row of each active block in CSR order, (nnzb,) int64.

        No host synchronisation, unless the arrays were not validated as they are: torch trusts the
        counts that it is given.

        Raises:
            TopologyError: `crow` does not run from 0 to the number of blocks.
        """
        known, crow = self._known, self.crow
        trusted = known is not None and versions_of(known.arrays) == known.versions
        if trusted or torch.compiler.is_compiling() or type(crow) is not Tensor or crow.is_meta:
            counts = crow.long().diff()
        else:
            counts = checked_counts("crow", crow, self.block_rows, self.nnzb)
        return torch.repeat_interleave(counts, output_size=self.nnzb)

    def positions(self) -> Tensor:
        """Flat positions of the active blocks, (nnzb,) int64, ascending."""
        native = loops(self.nnzb, self.crow, self.col)
        if native is not None:
            positions = torch.empty(self.nnzb, dtype=torch.int64, device="cpu")
            # offsets that were never checked could point anywhere
            if native.flat(self.crow.numpy(), self.col.numpy(), self.block_cols, positions.numpy()):
                return positions
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
        return self._copied(lambda array: array.to(device))

    def clone(self) -> Topology:
        """The same topology in memory of its own; a layer's changes with the layer."""
        return self._copied(torch.clone)

    def _copied(self, copy: Callable[[Tensor], Tensor]) -> Topology:
        """The same topology, known to be one if this is."""
        with torch.inference_mode(False):
            copied = self.with_arrays([copy(array) for array in self.arrays])
        if self._known is not None and versions_of(self.arrays) == self._known.versions:
            vouch(copied)
        return copied

    def with_arrays(self, arrays: Sequence[Tensor]) -> Topology:
        """The same matrix, cut alike, with other connections; unchecked, see `validate`."""
        named: dict[str, Any] = dict(zip(ARRAY_NAMES, arrays, strict=True))
        return replace(self, **named)

    def with_positions(self, positions: Tensor) -> Topology:
        """The same matrix, cut alike, with these blocks active; see `from_positions`."""
        return Topology.from_positions(
            positions, self.shape, self.block, groups=self.groups, taps=self.taps
        )

    def with_compressed(self, crow: Tensor, col: Tensor) -> Topology:
        """The same matrix, cut alike, with the connections of `crow` and `col`.

        The other arrays follow from these two, so only they are saved.

        Raises:
            TopologyError: they describe none; naming the array and what is wrong with it.
        """
        grid = Grid.of(self.shape, self.block, self.groups, self.taps)
        for name, array in (("crow", crow), ("col", col)):
            check_array(name, array, col)
        check_compressed(crow, col, grid.rows, grid.cols, ("crow", "col"))
        rows = torch.repeat_interleave(crow.long().diff(), output_size=col.numel())
        return self.with_positions(rows * grid.cols + col)

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
                self.crow,
                self.col,
                values.flatten(),
                self.shape,
                device=self.device,
                check_invariants=True,
            )
        if self.grid.ragged:
            raise ShapeError(
                f"torch.sparse_bsr needs a shape that is a multiple of the block {self.block}; "
                f"got {self.grid.part}"
            )
        return torch.sparse_bsr_tensor(
            self.crow, self.col, values, self.shape, device=self.device, check_invariants=True
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

    def traced_to(self, old: Topology) -> Tensor:
        """(nnzb,) int64: where each block stands in `old`, of the same grid; -1 for a new one."""
        before, now = old.positions(), self.positions().to(old.device)
        if not before.numel():
            return torch.full_like(now, -1)
        at = torch.searchsorted(before, now).clamp_(max=before.numel() - 1)
        return torch.where(before[at] == now, at, -1)

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

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what is known of these tensors does not hold for copies of them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

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

    def known(self) -> Known | None:
        """What kernels may take for granted; validates the arrays unless that was done.

        An array that was written to since is validated again. None if there is no memory to check
        (meta and fake tensors) or torch does not count the writes (inference tensors).

        Raises:
            TopologyError: as `validate` does.
        """
        known = self._known
        if known is not None and versions_of(known.arrays) == known.versions:
            return known
        return prove(self)

    def validate(self) -> Topology:
        """Check kind, range, order, duplicates and that `perm` inverts the transpose; return self.

        Raises:
            TopologyError: naming the array and what is wrong with it.
        """
        check_topology(self, ARRAY_NAMES)
        return self

    def _check_dense(self, dense: Tensor) -> None:
        if tuple(dense.shape) != self.shape:
            raise ShapeError(f"dense tensor must have shape {self.shape}; got {tuple(dense.shape)}")
