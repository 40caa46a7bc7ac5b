"""Masks and matrices of other libraries: torch's own pruning, sparsimony, torchao, SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.nn.connections import topology_of_mask
from sparsekern.nn.conv import matrix_of
from sparsekern.nn.pruned import pruned_tensors
from sparsekern.swap import sparsify_
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks by parameter name, for `sparsekern.sparsify_(model, masks=...)`.

    Of `torch.nn.utils.prune`, and of parametrizations such as `FakeSparsity` of `torch.ao.pruning`
    and of sparsimony, which hold a buffer `mask`.
    """
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for parameter, mask in pruned_tensors(module).items():
            masks[prefix + parameter] = mask.bool()
        for parameter, mask in _parametrized(module).items():
            masks[prefix + parameter] = mask.bool()
    return masks


def from_masked_(model: nn.Module, *, block: Block = 1, optimizer: Any = None) -> nn.Module:
    """Make sparse what `masks_of` finds, in place; pruning hooks and parametrizations are gone.

    Args:
        model: with masks over its weights.
        block: of the sparse weights; masks have to consist of whole blocks.
        optimizer: one or several that hold the model's weights; they go on with the sparse ones.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no mask in it.
        ShapeError, TopologyError: a mask does not consist of blocks; nothing has changed then.
    """
    masks = masks_of(model)
    if not masks:
        raise ConfigError(
            "`model` has no mask: neither pruning hooks nor parametrizations with one"
        )
    for name, mask in masks.items():
        _check_blocks(name, model.get_submodule(name.rpartition(".")[0]), mask, block)
    return sparsify_(_unmasked(model), masks=masks, block=block, optimizer=optimizer)


def _check_blocks(name: str, module: nn.Module, mask: Tensor, block: Block) -> None:
    """Raise unless a mask is made of whole blocks."""
    sizes: Any = getattr(module, "kernel_size", ())
    groups: Any = getattr(module, "groups", 1)
    try:
        matrix = mask if mask.dim() == 2 else matrix_of(mask)
        topology_of_mask(matrix, block, groups=groups, taps=math.prod(sizes))
    except (ShapeError, TopologyError) as error:
        raise type(error)(f"mask of {name!r}: {error}") from None


def _unmasked(model: nn.Module) -> nn.Module:
    """The same model without hooks and parametrizations, the masked weights in their place."""
    for module in list(model.modules()):
        for name in pruned_tensors(module):
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        for name in _parametrized(module):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def sparsify_torchao_(
    model: nn.Module,
    config: Any,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    optimizer: Any = None,
) -> nn.Module:
    """`torchao.sparsity.sparsify_`, for training: blocks of zeros are left out.

    Args:
        model: dense, with whole blocks of zeros in its linear weights.
        config: `BlockSparseWeightConfig`, of which `blocksize` is read.
        filter_fn: (module, name) -> whether to convert it; by default linear layers.
        optimizer: one or several that hold the model's weights.

    Raises:
        ConfigError: a config without `blocksize`: 2:4 sparsity has no counterpart here.
        ShapeError: a weight does not fit its blocks.
    """
    size = getattr(config, "blocksize", None)
    if type(size) is not int:
        raise ConfigError(
            f"`config` must have a `blocksize`, as BlockSparseWeightConfig has; "
            f"got {type(config).__name__}"
        )
    masks = {}
    for name, module in model.named_modules():
        chosen = isinstance(module, nn.Linear)
        if filter_fn is not None:
            chosen = chosen and filter_fn(module, name)
        if chosen:
            weight: Tensor = module.weight.detach()
            masks[name] = Topology.from_mask(weight != 0, size).to_mask()
    return sparsify_(model, masks=masks, block=size, optimizer=optimizer)


def from_scipy(matrix: Any) -> tuple[Topology, Tensor]:
    """Take over a CSR or BSR matrix or array of SciPy.

    Returns:
        The topology and the values (nnzb, bh, bw) in its order.

    Raises:
        DtypeError: it has another format: call `tocsr()` or `tobsr(blocksize)`.
        TopologyError: its indices are out of range.
    """
    form = getattr(matrix, "format", None)
    if form not in ("csr", "bsr"):
        raise DtypeError(
            f"`matrix` must be CSR or BSR of SciPy; got {form or type(matrix).__name__}"
        )
    clean = matrix.copy()
    clean.sum_duplicates()  # and sorts
    arrays = [torch.from_numpy(a.copy()) for a in (clean.indptr, clean.indices, clean.data)]
    make: Any = torch.sparse_csr_tensor if form == "csr" else torch.sparse_bsr_tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        tensor = make(*arrays, size=clean.shape, check_invariants=False)
    return Topology.from_torch(tensor)


def _parametrized(module: nn.Module) -> dict[str, Tensor]:
    """Masks by parameter of parametrizations that hold one."""
    if not parametrize.is_parametrized(module):
        return {}
    found: dict[str, Tensor] = {}
    for name, steps in module.parametrizations.items():  # type: ignore[operator,union-attr]
        for step in steps:
            mask = getattr(step, "mask", None)
            if isinstance(mask, Tensor):
                found[name] = mask
    return found
