"""Index arrays from block positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import TopologyError
from sparsekern.topology import sampling
from sparsekern.topology.blocks import Grid
from sparsekern.topology.native import loops


def arrays_at(positions: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The index arrays by name, for blocks at flat `positions` (nnzb,) int64.

    Raises:
        TopologyError: a position is out of range, or they are not strictly ascending.
    """
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise TopologyError(
            f"`positions` must be a 1-D int64 tensor; got {positions.dim()}-D {positions.dtype}"
        )
    n = positions.numel()
    sampling.check_count(n, grid)
    arrays = _compiled(positions, grid)
    if arrays is None:
        _check_ascending(positions, grid)
        arrays = _by_torch(positions, grid)
    for name in ("row", "col"):
        arrays[f"{name}_order"] = _longest_first(arrays["crow" if name == "row" else "ccol"])
    return arrays


def _check_ascending(positions: Tensor, grid: Grid) -> None:
    n = positions.numel()
    if n and bool((positions[1:] <= positions[:-1]).any()):
        raise TopologyError("`positions` must be strictly ascending")
    if n and not 0 <= int(positions[0]) <= int(positions[-1]) < grid.total:
        raise TopologyError(
            f"`positions` must lie in [0, {grid.total}); "
            f"got {int(positions[0])} to {int(positions[-1])}"
        )


def _compiled(positions: Tensor, grid: Grid) -> dict[str, Tensor] | None:
    """All arrays but the orders by counting; None if loops can't run, or a position is wrong."""
    n = positions.numel()
    native = loops(n, positions)
    if native is None:
        return None
    sizes = {"crow": grid.rows + 1, "col": n, "ccol": grid.groups * grid.cols + 1}
    sizes |= {"row": n, "perm": n}
    arrays = {name: positions.new_empty(size, dtype=torch.int32) for name, size in sizes.items()}
    crow, col, *others = (array.numpy() for array in arrays.values())
    if not native.compress(positions.numpy(), grid.cols, crow, col):
        return None
    native.transpose(crow, col, grid.part_blocks[0], grid.cols, *others)
    return arrays


def _by_torch(positions: Tensor, grid: Grid) -> dict[str, Tensor]:
    """All arrays but the orders."""
    rows = torch.div(positions, grid.cols, rounding_mode="floor").to(torch.int32)
    cols = (positions - rows.long() * grid.cols).to(torch.int32)
    keys = cols
    if grid.groups > 1:
        keys = torch.div(rows, grid.part_blocks[0], rounding_mode="floor") * grid.cols + cols
    # stable: within a column the blocks stay in row order, so sums have one fixed order
    perm = torch.argsort(keys, stable=True).to(torch.int32)
    return {
        "crow": _offsets(rows, grid.rows),
        "col": cols,
        "ccol": _offsets(keys, grid.groups * grid.cols),
        "row": rows[perm.long()],
        "perm": perm,
    }


def _offsets(indices: Tensor, n: int) -> Tensor:
    offsets = torch.zeros(n + 1, dtype=torch.int32, device=indices.device)
    offsets[1:] = torch.bincount(indices, minlength=n).cumsum(0)
    return offsets


def _longest_first(offsets: Tensor) -> Tensor:
    return torch.argsort(offsets.diff(), descending=True, stable=True).to(torch.int32)


def contains(haystack: Tensor, needles: Tensor) -> Tensor:
    """For each needle, whether the ascending `haystack` holds it (bool, shape of `needles`)."""
    if not haystack.numel():
        return torch.zeros_like(needles, dtype=torch.bool)
    at = torch.searchsorted(haystack, needles).clamp_(max=haystack.numel() - 1)
    return haystack[at] == needles
