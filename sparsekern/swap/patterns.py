"""Layers chosen by name: globs and regular expressions."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsekern.errors import ConfigError

Pattern = str | re.Pattern[str]


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a glob is the name, or a compiled regex is found in it."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def shown(pattern: Pattern) -> str:
    """As it was written, in quotes."""
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def check_known(argument: str, values: Mapping[Pattern, Any], known: Sequence[str]) -> None:
    """Raise `ConfigError` where a pattern matches none of the names that the model has."""
    for pattern in values:
        if not any(matches(pattern, name) for name in known):
            raise ConfigError(
                f"`{argument}` pattern {shown(pattern)} matches none of {list(known)}"
            )


def first_match(values: Mapping[Pattern, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in values.items() if matches(pattern, name)), default)


def is_alone(values: Mapping[Pattern, Any], name: str, known: Sequence[str]) -> bool:
    """Whether the first pattern that matches `name` matches no other name that the model has."""
    for pattern in values:
        if matches(pattern, name):
            return not any(matches(pattern, other) for other in known if other != name)
    return False
