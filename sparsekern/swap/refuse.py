"""What can't be changed, because something else holds on to its parameters."""

from __future__ import annotations

from torch import nn

from sparsekern.carry.followers import follower_of
from sparsekern.carry.resize import WRAPPERS
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn.sharded import is_sharded


def check_model(model: object) -> None:
    """Raise `DtypeError` unless it is a module."""
    if not isinstance(model, nn.Module):
        raise DtypeError(f"`model` must be an nn.Module; got {type(model).__name__}")


def check_unwrapped(model: nn.Module, verb: str) -> None:
    """Raise `ConfigError` where a model, or a part of it, was given out to ranks already."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        wrapper = next((w for w in WRAPPERS if w in kinds), None)
        if wrapper:
            where = f"submodule {name!r}" if name else "`model`"
            raise ConfigError(
                f"{where} is inside {wrapper}, which would not synchronise new parameters: call "
                f"{verb} before wrapping it"
            )
        for own, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter):
                raise ConfigError(
                    f"parameter {own!r} of submodule {name!r} is a DTensor, shared out over ranks "
                    f"by tensor parallelism or FSDP2: call {verb} before (FSDP2), or leave it out"
                )


def follower_name(layer: nn.Module) -> str | None:
    """Class of the method that follows a layer now."""
    follower = follower_of(layer)
    return None if follower is None else type(follower).__name__


def refuse_followed(name: str, layer: nn.Module) -> None:
    """Raise `ConfigError` if an attached method follows the layer, which it would lose."""
    follower = follower_name(layer)
    if follower:
        raise ConfigError(
            f"layer {name!r} is followed by an attached {follower}, which would go on with the old "
            "one: detach() it first, and attach a new one afterwards"
        )
