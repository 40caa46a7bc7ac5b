"""Launching with an entry of one's own in the launch table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparsekern.kernels import tables
from sparsekern.kernels.tables import Key


@contextmanager
def launching(arch: str, key: Key, config: Any) -> Iterator[None]:
    """Launch with `config`; by pointers, if the key says so, where descriptors would do as well."""
    entries = tables.table(arch)
    twin = key._replace(loads="tma")
    taken = entries.pop(twin, None) if key.loads == "pointer" else None
    try:
        with tables.overridden(arch, {key: config}):
            yield
    finally:
        if taken is not None:
            entries[twin] = taken
        tables.find.cache_clear()


def is_read(arch: str, key: Key, launch: Callable[[], Any]) -> bool:
    """Whether the launch takes this entry: one without any field must be missed."""
    try:
        with launching(arch, key, object()):
            launch()
    except AttributeError:
        return True
    return False
