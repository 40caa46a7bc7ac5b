"""What a new layer takes over from the one that it replaces: hooks, attributes, own tensors."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from sparsekern.errors import ConfigError
from sparsekern.nn.kinds import SPARSE_KINDS, dense_counterpart, sparse_type
from sparsekern.nn.recurrent import RECURRENT, SparseRecurrent

_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
_HELD = ("_parameters", "_buffers", "_modules")


def take_over(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    """Give `new` the hooks, attributes, buffers and submodules that users put on `old`.

    Handles of hooks go on to work, since both share the hooks' dicts. Nothing of `old` changes.

    Returns:
        What can't be carried over, in words.

    Raises:
        ConfigError: a method of `old` was replaced, as `layer.forward = ...` does.
    """
    _take_hooks(old, new)
    return _take_attributes(name, old, new) + _take_held(name, old, new)


def take_marks(name: str, old: nn.Parameter, new: nn.Parameter) -> list[str]:
    """Give a parameter the attributes of the one that it replaces; returns what is lost."""
    lost = []
    for key, value in vars(old).items():
        if isinstance(value, Tensor) and value.shape == old.shape and old.dim() > 0:
            lost.append(f"attribute {key!r} of the weight of {name!r}, a tensor of its shape")
        else:
            setattr(new, key, value)
    if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
        lost.append(f"hooks on the weight of {name!r}")
    return lost


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    for key in _HOOKS:
        theirs, own = vars(old)[key], vars(new)[key]
        if not isinstance(theirs, dict):
            vars(new)[key] = theirs if theirs is not None else own
            continue
        kept = {k: _bound(hook, new) for k, hook in theirs.items() if not _is_pruning(hook)}
        if own or any(kept.get(k) is not hook for k, hook in theirs.items()):
            vars(new)[key] = OrderedDict({**own, **kept})
        else:
            vars(new)[key] = theirs


def _is_pruning(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod)


def _bound(hook: Any, new: nn.Module) -> Any:
    """The hook, bound to the new module where torch has bound it to the old one."""
    if not getattr(hook, "with_module", False):
        return hook
    return type(hook)(hook.hook, new)


def _take_attributes(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    lost = []
    usual = _usual(_kind(old))
    for key, value in vars(old).items():
        if key in usual or key in _pruned(old):
            continue
        if hasattr(type(old), key):
            if callable(value):
                raise ConfigError(
                    f"`{key}` of layer {name!r} was replaced by another function, which its sparse "
                    f"or dense counterpart can't take over: leave the layer as it is, by "
                    f"exclude=({name!r},), or undo that"
                )
        elif key in vars(new) or hasattr(type(new), key):
            lost.append(f"attribute {key!r} of {name!r}, a name that {type(new).__name__} uses")
        else:
            vars(new)[key] = value
    return lost


def _take_held(name: str, old: nn.Module, new: nn.Module) -> list[str]:
    """Parameters, buffers and submodules besides the layer's own."""
    lost, usual = [], _usual(_kind(old))
    for kind in _HELD:
        for key, value in vars(old)[kind].items():
            if key in usual or _is_matrix(old, key) or key.rpartition("_")[0] in _pruned(old):
                continue
            if isinstance(new, SparseRecurrent) and kind == "_modules":
                lost.append(f"submodule {key!r} of {name!r}")
            elif key in vars(new)[kind] or hasattr(type(new), key):
                lost.append(f"{key!r} of {name!r}, a name that {type(new).__name__} uses")
            else:
                vars(new)[kind][key] = value
                if key in old._non_persistent_buffers_set:
                    new._non_persistent_buffers_set.add(key)
    return lost


def _pruned(module: nn.Module) -> set[str]:
    """Names of parameters that torch's pruning has replaced."""
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)}


def _is_matrix(module: nn.Module, key: str) -> bool:
    """Whether it is a recurrent module's own weight or bias, whatever its number of layers."""
    if isinstance(module, SparseRecurrent):
        return key in module._shapes()
    return type(module) in RECURRENT and key.startswith(("weight_", "bias_"))


def _kind(module: nn.Module) -> Any:
    """The class of torch or of ours that it is of, or is derived from."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if sparse_type(kind) or kind in SPARSE_KINDS)


@functools.cache
def _usual(kind: Any) -> frozenset[str]:
    """Names of all that a fresh module of this class, torch's or ours, holds."""
    dense: Any = dense_counterpart(kind)
    with torch.random.fork_rng(devices=()), torch.device("cpu"):  # draws nothing of the caller's
        module = dense(1, 1, 1) if issubclass(dense, nn.Conv1d | nn.Conv2d) else dense(1, 1)
        module = module if kind is dense else kind.from_dense(module)
    held = (key for place in _HELD for key in vars(module)[place])
    return frozenset((*vars(module), *held))
