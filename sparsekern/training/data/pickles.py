"""Pickles of arrays read as data: nothing that a file names is imported, called or built.

The files of MNIST and CIFAR-10 are pickles, and unpickling runs what a pickle asks for. Here a
stack machine of this file's own follows the few opcodes that lists, dicts and numpy arrays are made
of; any other opcode, and any other name, raises.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from sparsekern.errors import DataError
from sparsekern.training.data.idx import Bounded

MOST_OPCODES = 1 << 20
"""A batch of CIFAR-10 has 60,000. A byte of a file can make an object of 60."""

_PLAIN = re.compile("[biuf][1248]")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_CALLABLE = {
    **{f"{module} _reconstruct": "array" for module in _NUMPY},
    "numpy ndarray": "kind",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    "__builtin__ bytes": "no bytes",
}


class _Name(NamedTuple):
    """Stands for a function or class of `_CALLABLE`."""

    what: str


class _Dtype:
    code: str
    order = "|"


class _Array:
    array: np.ndarray | None = None


def array_in(value: object) -> np.ndarray:
    """The array that a place of `read_pickle`'s result holds.

    Raises:
        DataError: it holds something else.
    """
    if not isinstance(value, _Array) or value.array is None:
        raise DataError(f"expected an array; got {type(value).__name__.strip('_').lower()}")
    return value.array


def read_pickle(file: Bounded) -> Any:
    """What a pickle holds: tuples, lists, dicts, numbers, bytes, text, and arrays (`array_in`).

    Text of Python 2 comes as bytes.

    Raises:
        DataError: it is damaged, or holds or asks for anything else.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(cast(Any, file))):
            if opcode.name == "STOP":
                break
            machine.take(opcode.name, argument, position, count)
        return machine.stack[-1]
    except DataError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        struct.error,
        MemoryError,
    ) as error:
        raise DataError(f"expected a pickle; got: {error!r}") from error


class _Machine:
    """The stack machine of pickles, as far as arrays need it."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, name: str, argument: Any, position: int | None, count: int) -> None:
        """Follow one opcode, the `count`-th."""
        if count >= MOST_OPCODES:
            raise DataError(f"expected a pickle of at most {MOST_OPCODES:,} opcodes; got more")
        if name in _PUSHED:
            self.stack.append(_PUSHED[name](argument))
        elif name in _FOLLOWED:
            _FOLLOWED[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise DataError(
                f"expected a pickle of arrays, lists and numbers; got opcode {name} at "
                f"byte {position}"
            )

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count:
            raise IndexError("the stack is empty")
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise DataError(f"expected a list to append to; got {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise DataError(f"expected a dict and pairs; got {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, bytes | str | int):  # hashing deep tuples overflows the stack
                raise DataError(f"expected keys of a dict to be text; got {type(key).__name__}")
            target[key] = value

    def pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]

    def name(self, text: str) -> None:
        what = _CALLABLE.get(text)
        if what is None:
            raise DataError(f"expected a pickle of numpy arrays; it asks for {text!r}")
        self.stack.append(_Name(what))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        what = function.what if isinstance(function, _Name) else None
        if what == "array" and arguments[0] == _Name("kind"):
            self.stack.append(_Array())
        elif what == "dtype":
            made = _Dtype()
            made.code = _text(arguments[0])
            if not _PLAIN.fullmatch(made.code):
                raise DataError(f"expected arrays of plain numbers; got dtype {made.code!r}")
            self.stack.append(made)
        elif what == "encode" and len(arguments) == 2 and _text(arguments[1]) == "latin1":
            self.stack.append(
                arguments[0].encode("latin1")
            )  # bytes, as protocols below 3 have them
        elif what == "no bytes" and arguments == ():  # so protocols below 3 write b""
            self.stack.append(b"")
        else:
            raise DataError(f"expected a pickle of numpy arrays; it calls {what or function!r}")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            target.order = _text(state[1])
        elif isinstance(target, _Array):
            _, shape, dtype, fortran, content = state
            kind = np.dtype(dtype.order + dtype.code)
            flat = np.frombuffer(content, dtype=kind)
            target.array = flat.reshape(shape, order="F" if fortran else "C")
        else:
            raise DataError(f"expected the state of an array; got one of {type(target).__name__}")


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return value
    raise DataError(f"expected text; got {type(value).__name__}")


def _as_is(argument: Any) -> Any:
    return argument


_PUSHED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _as_is),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _as_is),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _as_is),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), lambda text: text.encode("latin1")),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}

_FOLLOWED: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pair()),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, text: m.name(text),
    "STACK_GLOBAL": lambda m, _: m.name(" ".join(map(_text, m.pair()))),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, at: m.memo.__setitem__(at, m.stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, at: m.stack.append(m.memo[at])),
}
