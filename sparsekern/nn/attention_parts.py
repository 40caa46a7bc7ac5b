"""Torch's attention layer in parts: its four matrices, its biases, its arguments, its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.errors import ShapeError
from sparsekern.nn.linear import SparseLinear
from sparsekern.topology import Topology

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
BIASES = ("in_proj_bias", "bias_k", "bias_v")


def projections(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The four weight matrices of torch's layer, detached, by the names they have here."""
    if module._qkv_same_embed_dim:
        held = list(module.in_proj_weight.detach().chunk(3))
    else:
        separate: Any = module
        held = [getattr(separate, f"{name}_weight").detach() for name in PROJECTIONS[:3]]
    return dict(zip(PROJECTIONS, [*held, module.out_proj.weight.detach()], strict=True))


def split_packed(state: dict[str, Any], prefix: str) -> None:
    """Give the entries of torch's layer in a state_dict the names they have here.

    The packed `in_proj_weight` (3 E, E) is three of them.
    """
    packed = state.get(f"{prefix}in_proj_weight")
    if isinstance(packed, Tensor):
        del state[f"{prefix}in_proj_weight"]
        if packed.dim() != 2 or packed.shape[0] % 3:
            raise ShapeError(
                f"`in_proj_weight` of {prefix!r} must be three matrices of as many rows; got shape "
                f"{tuple(packed.shape)}"
            )
        for name, part in zip(PROJECTIONS[:3], packed.chunk(3), strict=True):
            state[f"{prefix}{name}.weight"] = part
    for name in PROJECTIONS[:3]:
        if f"{prefix}{name}_weight" in state:
            state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_weight")


def projection(
    name: str,
    shape: tuple[int, int],
    topology: Topology | None,
    impl: str | None,
    bias: bool,
    where: dict[str, Any],
) -> nn.Module:
    """One of the four: biases of the first three are one parameter, as in torch."""
    rows, cols = shape
    bias = bias and name == "out_proj"
    if topology is None:
        empty: Any = nn.utils.skip_init
        made: nn.Module = empty(nn.Linear, cols, rows, bias=bias, **where)
        return made
    unused = torch.Generator("cpu").manual_seed(0)
    return SparseLinear(cols, rows, bias, topology=topology, impl=impl, generator=unused, **where)


def arguments(module: Any) -> dict[str, Any]:
    """Of the constructors of torch's layer and of ours."""
    same = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    return {name: getattr(module, name) for name in same} | {
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
    }


def copy_biases(source: Any, target: Any) -> None:
    """Values and flags of the biases, all of them, from one layer to another."""
    for own, other in [
        *((getattr(target, n), getattr(source, n)) for n in BIASES),
        (target.out_proj.bias, source.out_proj.bias),
    ]:
        if own is not None:
            own.data.copy_(other.detach())
            own.requires_grad_(other.requires_grad)
