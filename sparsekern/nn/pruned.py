"""Layers that `torch.nn.utils.prune` has put masks on."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

M = TypeVar("M", bound=nn.Module)


def pruned_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Masks by the name of the parameter that each is on, such as "weight" or "weight_hh_l0"."""
    names = [
        hook._tensor_name
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod)
    ]
    masks = {name: module._buffers.get(f"{name}_mask") for name in names}
    return {name: mask for name, mask in masks.items() if mask is not None}


def unpruned(module: M) -> M:
    """The layer as `prune.remove` would leave it; `module` is not changed, and is not copied.

    What is returned is for reading: it shares all but the pruned parameters with `module`.
    """
    masks = pruned_tensors(module)
    if not masks:
        return module
    plain = object.__new__(type(module))
    vars(plain).update({k: v for k, v in vars(module).items() if k not in masks})
    parameters: dict[str, Any] = dict(module._parameters)
    for name, mask in masks.items():
        original = parameters.pop(f"{name}_orig")
        product = original.detach() * mask.to(original.dtype)
        parameters[name] = nn.Parameter(product, requires_grad=original.requires_grad)
    vars(plain)["_parameters"] = parameters
    return plain
