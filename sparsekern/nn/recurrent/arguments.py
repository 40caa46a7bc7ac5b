"""Arguments that recurrent layers and cells share, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

from sparsekern.errors import ConfigError, DtypeError

Shares = float | Mapping[str, float | None]
"""One sparsity, or one for each matrix by name; None leaves a matrix dense."""
T = TypeVar("T")


def by_name(argument: str, given: T | Mapping[str, T], names: Mapping[str, object]) -> dict[str, T]:
    """One entry for each name, from a mapping that has just these or from a single value.

    Raises:
        ConfigError: names are missing or unknown.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    if set(given) != set(names):
        raise ConfigError(
            f"`{argument}` must name each of {', '.join(names)}; got {', '.join(map(str, given))}"
        )
    return {name: given[name] for name in names}


def check_size(name: str, size: object, least: int = 1) -> None:
    """Raise `DtypeError` or `ConfigError` unless `size` is an int of at least `least`."""
    if type(size) is not int:
        raise DtypeError(f"`{name}` must be an int; got {size!r}")
    if size < least:
        raise ConfigError(f"`{name}` must be at least {least}; got {size}")


def check_flag(name: str, flag: object) -> None:
    """Raise `DtypeError` unless `flag` is a bool."""
    if not isinstance(flag, bool):
        raise DtypeError(f"`{name}` must be a bool; got {flag!r}")


def check_nonlinearity(nonlinearity: object) -> None:
    """Raise `ConfigError` unless it is one that a plain RNN has."""
    if nonlinearity not in ("tanh", "relu"):
        raise ConfigError(f"`nonlinearity` must be 'tanh' or 'relu'; got {nonlinearity!r}")


def checked_dropout(dropout: object, num_layers: int) -> float:
    """The probability of dropping an output; warns where there is nothing between layers."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise DtypeError(f"`dropout` must be a number; got {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ConfigError(f"`dropout` must lie in [0, 1]; got {dropout}")
    if dropout and num_layers == 1:
        warnings.warn(
            f"dropout acts between layers: dropout={dropout} has no effect with num_layers=1",
            stacklevel=4,
        )
    return float(dropout)
