"""The arguments that all methods share, for those that add some of their own."""

from __future__ import annotations

import inspect
from typing import TypedDict, TypeVar

C = TypeVar("C", bound=type)


class Arguments(TypedDict, total=False):
    """Keyword arguments of `Method`."""

    t_end: float | None
    total_steps: int | None
    update_freq: int
    drop_fraction: float
    decay: str
    first_update: int
    step_on_update: bool | None
    grow_init: str
    norm: str
    grad_accumulation: int
    seed: int
    exploration: bool


def shows_arguments(cls: C) -> C:
    """Let `inspect` see the shared arguments where a constructor hands them on by `**`."""
    init, defaults = vars(cls)["__init__"], getattr(cls, "defaults", {})
    own = inspect.signature(init)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    inherited = inspect.signature(vars(cls.__mro__[1])["__init__"]).parameters
    shared = [p for name, p in inherited.items() if name not in own.parameters]
    shown = [p.replace(default=defaults.get(p.name, p.default)) for p in shared]
    init.__signature__ = own.replace(parameters=[*kept, *shown])
    return cls
