"""Arguments of the functions on weights by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError

Weights = Mapping[str, Tensor]
"""Weights by name, as they are before or after training."""


def unknown(what: str, got: object, known: Iterable[str]) -> str:
    """The text of an error, with the name that is close."""
    names = list(known)
    close = difflib.get_close_matches(got, names, n=1) if isinstance(got, str) else []
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{what} must be one of {', '.join(names)}; got {got!r}{meant}"


def check_all(sides: Mapping[str, Weights], masks: Mapping[str, Tensor] | None) -> None:
    """Every side holds finite weights of the same names and shapes; masks are bool.

    Raises:
        ConfigError: names differ, or a weight is not finite.
        DtypeError: something is no mapping of tensors of that kind.
        ShapeError: shapes differ.
    """
    first, others = next(iter(sides)), {**sides, **({} if masks is None else {"masks": masks})}
    for side, tensors in others.items():
        if not isinstance(tensors, Mapping) or not tensors:
            raise DtypeError(f"`{side}` must map names to tensors; got {type(tensors).__name__}")
        for name, tensor in tensors.items():
            _check_one(side, name, tensor)
        if tensors.keys() != sides[first].keys():
            odd = sorted(map(str, tensors.keys() ^ sides[first].keys()))
            raise ConfigError(f"`{first}` and `{side}` must have the same names; {odd} differ")
        for name, tensor in tensors.items():
            if tensor.shape != sides[first][name].shape:
                raise ShapeError(
                    f"{name!r} must have one shape; `{first}` has "
                    f"{tuple(sides[first][name].shape)}, `{side}` {tuple(tensor.shape)}"
                )


def _check_one(side: str, name: str, tensor: object) -> None:
    masks = side == "masks"
    kind = "a bool tensor" if masks else "a floating-point tensor"
    if not isinstance(tensor, Tensor) or (
        tensor.dtype != torch.bool if masks else not tensor.is_floating_point()
    ):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DtypeError(f"`{side}` of {name!r} must be {kind}; got {got}")
    if not masks and not bool(tensor.isfinite().all()):
        raise ConfigError(f"`{side}` of {name!r} is not finite")
