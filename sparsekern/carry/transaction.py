"""All or nothing: many writes, into tensors and objects, that are made together or not at all.

What is to be written is computed before. Then target after target is saved in a journal and
written; whatever breaks in between, a signal too, takes back what was written and is raised on.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TRIES = 3
_MISSING = object()


class Copy(NamedTuple):
    """Overwrite a tensor in place with a new one of its shape."""

    target: Tensor
    new: Tensor

    def saved(self) -> Undo:
        """How to take it back; a target that was never written to is left alone."""
        target = self.target
        version = None if target.is_inference() else target._version
        old = target.detach().clone()

        def restore() -> None:
            if version is None or target._version != version:
                _copy(target, old)

        return restore

    def write(self) -> None:
        """Make it."""
        _copy(self.target, self.new)


class Attribute(NamedTuple):
    """Set an attribute of an object."""

    holder: Any
    name: str
    new: Any

    def saved(self) -> Undo:
        """How to take it back."""
        holder, name, old = self.holder, self.name, getattr(self.holder, self.name)
        return lambda: setattr(holder, name, old)

    def write(self) -> None:
        """Make it."""
        setattr(self.holder, self.name, self.new)


class Item(NamedTuple):
    """Set an entry of a mapping."""

    mapping: MutableMapping[Any, Any]
    key: Any
    new: Any

    def saved(self) -> Undo:
        """How to take it back."""
        mapping, key, old = self.mapping, self.key, self.mapping.get(self.key, _MISSING)

        def restore() -> None:
            if old is not _MISSING:
                mapping[key] = old
            else:
                mapping.pop(key, None)

        return restore

    def write(self) -> None:
        """Make it."""
        self.mapping[self.key] = self.new


class Append(NamedTuple):
    """Append to a list."""

    items: list[Any]
    new: Any

    def saved(self) -> Undo:
        """How to take it back."""
        items, n = self.items, len(self.items)

        def restore() -> None:
            del items[n:]

        return restore

    def write(self) -> None:
        """Make it."""
        self.items.append(self.new)


class Call(NamedTuple):
    """Call what may be called again, and need not be taken back."""

    function: Callable[[], object]

    def saved(self) -> Undo:
        """Nothing to take back."""
        return _nothing

    def write(self) -> None:
        """Make it."""
        self.function()


class Data(NamedTuple):
    """Give a parameter other memory, of another shape; it stays the same object."""

    parameter: Tensor
    new: Tensor

    def saved(self) -> Undo:
        """How to take it back."""
        parameter, old = self.parameter, self.parameter.data
        return lambda: _put(parameter, old)

    def write(self) -> None:
        """Make it."""
        _put(self.parameter, self.new)


Undo = Callable[[], object]
"""Takes a write back; it can be called again, and when the write was never made."""
Write = Copy | Attribute | Item | Append | Call | Data


def commit(writes: list[Write]) -> None:
    """Make all writes, or none of them.

    Args:
        writes: in this order; used up, so that what was written can be freed.

    Raises:
        BaseException: whatever broke it off, once all is as it was. What could not be taken back,
            even at the third attempt, is said in a note.
    """
    journal: list[_Saved] = []
    grad_mode = torch.is_grad_enabled()
    # twice: a signal may come between the exception and what handles it
    try:
        try:
            writes.reverse()
            while writes:
                write = writes.pop()
                journal.append(_Saved(write.saved()))
                write.write()
        except BaseException as error:
            _take_back(journal, error)
            raise
    except BaseException as error:
        _take_back(journal, error)
        torch._C._set_grad_enabled(grad_mode)
        raise


@dataclass
class _Saved:
    restore: Undo
    failures: int = 0


def _take_back(journal: list[_Saved], error: BaseException) -> None:
    """Undo the newest first, going on over whatever is raised meanwhile."""
    while journal:
        try:
            journal[-1].restore()
            journal.pop()
        except Exception as problem:
            journal[-1].failures += 1
            if journal[-1].failures == _TRIES:
                journal.pop()
                error.add_note(f"a part of what was written could not be taken back: {problem!r}")
        except BaseException:  # noqa: S112  a signal: the same again
            continue


def _nothing() -> None:
    """What a `Call` has to take back."""


def _copy(target: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        target.copy_(new)


def _put(parameter: Tensor, new: Tensor) -> None:
    # autograd checks a gradient against the shape it knew, until the type changes too
    other = torch.float32 if parameter.dtype is torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=new.device)
    parameter.data = new
