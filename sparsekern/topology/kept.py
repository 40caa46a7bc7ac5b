"""Compiled kernels kept on disk: numba's cache, with a digest in each file.

numba loads what it finds as it is: a file cut short raises whatever its bytes happen to mean, and a
changed bit of machine code kills the process. Here a file that is not what was written counts as
none, is compiled again and replaced, with a warning. Whoever can write to the cache's folder can
still run code: like numba's own files, these are trusted to be ours.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import IndexDataCacheFile

_LOGGER = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
OPTIONS = {"nogil": True, "error_model": "numpy"}
_DIGEST = hashlib.sha256().digest_size


class CheckedFiles(IndexDataCacheFile):  # type: ignore[misc]  # numba has no types
    """The files of one function: an index, and machine code for each signature.

    The digest covers what the code was made from as well: numba writes the index first, so after
    an interrupted write it may name an older file.
    """

    def load(self, key: Any) -> Any:
        """What was kept for a signature, or None."""
        name = self._load_index().get(key)
        return None if name is None else self._load_data(name)

    def _load_index(self) -> dict[Any, str]:
        stamp, overloads = self._read(self._index_path, b"") or (None, {})
        return overloads if stamp == self._source_stamp else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, (self._source_stamp, overloads), b"")

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name), self._made_from)

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data, self._made_from)

    @property
    def _made_from(self) -> bytes:
        return repr(self._source_stamp).encode()

    def _read(self, path: str, salt: bytes) -> Any:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(path, "can't be read", error)
            return None
        if hashlib.sha256(salt + content[_DIGEST:]).digest() != content[:_DIGEST]:
            _warn(path, "is damaged", "its digest is another")
            return None
        return pickle.loads(content[_DIGEST:])  # noqa: S301  see the top of this file

    def _write(self, path: str, data: Any, salt: bytes) -> None:
        content = self._dump(data)
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(salt + content).digest() + content)


def jit(function: F, made_from: tuple[Any, ...] = ()) -> F:
    """Compile `function` without the GIL; cache on disk where a writable place is found.

    `made_from` is what it depends on besides its own file, which numba dates.
    """
    try:
        compiled = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # numba found no folder that it may write to
        return cast(F, numba.njit(**OPTIONS)(function))
    _keep_checked(compiled, made_from)
    return cast(F, compiled)


def _keep_checked(compiled: Any, made_from: tuple[Any, ...]) -> None:
    """Let a function keep its kernels in checked files; one that can't be written is none."""
    cache = getattr(compiled, "_cache", None)
    store = getattr(cache, "_cache_file", None)
    if cache is None or not isinstance(store, IndexDataCacheFile):
        return
    # numba's version in the name: another one's files are other files
    name = f"{store._index_name.removesuffix('.nbi')}.numba-{numba.__version__}"
    stamp = store._source_stamp, made_from
    cache._cache_file = CheckedFiles(store._cache_path, name, stamp)
    cache.save_overload = _saving(cache.save_overload, store._cache_path)


def _saving(save: Callable[[Any, Any], None], folder: str) -> Callable[[Any, Any], None]:
    def save_overload(signature: Any, data: Any) -> None:
        try:
            save(signature, data)
        except OSError as error:
            _warn(folder, "can't be written to", error)

    return save_overload


def _warn(path: str, what: str, why: object) -> None:
    _LOGGER.warning("compiled kernels: %s %s (%s); compiled again", path, what, why)
