"""What makes seven index arrays a topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekern.errors import DtypeError, TopologyError
from sparsekern.topology.blocks import Grid

if TYPE_CHECKING:
    from sparsekern.topology.topology import Topology


def check_topology(t: Topology, names: tuple[str, ...]) -> None:
    """Check kind, range, order and duplicates, and that the last arrays follow from the first two.

    Raises:
        TopologyError: naming the array and what is wrong with it.
        ShapeError, DtypeError: shape, block, groups and taps do not go together.
    """
    grid = Grid.of(t.shape, t.block, t.groups, t.taps)
    sizes = *t.shape, t.groups, t.taps
    if not isinstance(t.shape, tuple) or not all(type(size) is int for size in sizes):
        raise DtypeError(f"shape, groups and taps must be ints; got {t.shape}, {sizes[2:]}")
    for name, array in zip(names, t.arrays, strict=True):
        check_array(name, array, t.col)
    check_compressed(t.crow, t.col, grid.rows, grid.cols, ("crow", "col"))
    check_compressed(t.ccol, t.row, grid.groups * grid.cols, grid.rows, ("ccol", "row"))
    rebuilt = t.with_positions(t.positions())
    for name in names[2:]:
        if not torch.equal(getattr(t, name), getattr(rebuilt, name)):
            raise TopologyError(f"`{name}` does not follow from `crow` and `col`")


def check_tensor(name: str, value: object) -> None:
    """Raise `DtypeError` unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise DtypeError(f"`{name}` must be a tensor; got {type(value).__name__}")


def check_array(name: str, array: object, col: object) -> None:
    """What a kernel that walks the array takes for granted."""
    if not isinstance(array, Tensor) or not isinstance(col, Tensor):
        raise TopologyError(f"`{name}` must be a 1-D int32 tensor; got {type(array).__name__}")
    if array.dtype != torch.int32 or array.dim() != 1 or array.layout is not torch.strided:
        kind = "" if array.layout is torch.strided else f" of layout {array.layout}"
        raise TopologyError(
            f"`{name}` must be a 1-D int32 tensor; got {array.dim()}-D {array.dtype}{kind}"
        )
    if array.device != col.device:
        raise TopologyError(f"`{name}` must be on {col.device} as `col` is; got {array.device}")
    if not array.is_contiguous():
        raise TopologyError(f"`{name}` must be contiguous; got stride {array.stride(0)}")


def checked_counts(name: str, offsets: Tensor, n: int, entries: int) -> Tensor:
    """Entries of each of `n` rows, (n,) int64, if offsets run from 0 to `entries` upwards."""
    if offsets.numel() != n + 1:
        raise TopologyError(f"`{name}` must have {n + 1} entries; got {offsets.numel()}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries:
        raise TopologyError(
            f"`{name}` must run from 0 to {entries}; got {int(offsets[0])} to {int(offsets[-1])}"
        )
    counts = offsets.long().diff()
    if bool((counts < 0).any()):
        raise TopologyError(f"`{name}` must not decrease")
    return counts


def check_compressed(
    offsets: Tensor, indices: Tensor, n: int, bound: int, names: tuple[str, str]
) -> None:
    """Check one compressed index pair: lengths, monotone offsets, indices ascending per row."""
    outer, inner = names
    counts = checked_counts(outer, offsets, n, indices.numel())
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= bound:
        raise TopologyError(f"`{inner}` must lie in [0, {bound}); got {low} to {high}")
    outer_index = torch.repeat_interleave(counts, output_size=indices.numel())
    flat = outer_index * bound + indices
    if bool((flat[1:] <= flat[:-1]).any()):
        raise TopologyError(f"`{inner}` must ascend without duplicates within each row")
