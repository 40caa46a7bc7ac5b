"""Plain objects as JSON: numbers, texts, lists, tuples, dicts, and tensors by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsekern.errors import CheckpointError

MOST_NESTED = 50


def encode(value: Any, what: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """What JSON holds for `value`; tensors in it are added to `tensors`.

    Args:
        value: of the plain types alone, which come back as they were.
        what: it is, for messages; tensors are named after it.
        tensors: by name.
        depth: of nesting around it.

    Raises:
        CheckpointError: something in it is of another type.
    """
    if depth > MOST_NESTED:
        raise CheckpointError(f"{what} is nested more than {MOST_NESTED} deep")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        name = f"{what}{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if type(value) is list:
        return [encode(v, what, tensors, depth + 1) for v in value]
    if type(value) is tuple:
        return {"tuple": [encode(v, what, tensors, depth + 1) for v in value]}
    if isinstance(value, Mapping):
        pairs = [(k, v) for k, v in value.items()]
        return {
            "dict": [[encode(part, what, tensors, depth + 1) for part in pair] for pair in pairs]
        }
    raise CheckpointError(
        f"{what} must be made of numbers, texts, lists, tuples, dicts and tensors; got "
        f"{type(value).__name__}"
    )


def decode(tree: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """Undo `encode`.

    Raises:
        CheckpointError: it is nothing that `encode` makes.
    """
    if depth > 2 * MOST_NESTED:
        raise CheckpointError("the file's plain data is nested too deep")
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is list:
        return [decode(v, tensors, depth + 1) for v in tree]
    if type(tree) is dict and len(tree) == 1:
        ((kind, held),) = tree.items()
        if kind == "tensor" and isinstance(held, str) and held in tensors:
            return tensors[held]
        if kind == "float" and held in ("inf", "-inf", "nan"):
            return float(held)
        if kind == "tuple" and type(held) is list:
            return tuple(decode(held, tensors, depth + 1))
        if kind == "dict" and type(held) is list:
            return _decode_dict(held, tensors, depth)
    raise CheckpointError(f"the file's plain data holds {str(tree)[:60]!r}, which means nothing")


def _decode_dict(held: list[Any], tensors: Mapping[str, Tensor], depth: int) -> dict[Any, Any]:
    made = {}
    for pair in held:
        if type(pair) is not list or len(pair) != 2:
            raise CheckpointError(f"a dict of the file holds {str(pair)[:60]!r}, no pair")
        key = decode(pair[0], tensors, depth + 1)
        if isinstance(key, list | dict | Tensor) or key in made:
            raise CheckpointError(f"a dict of the file has the key {str(key)[:60]!r} wrongly")
        made[key] = decode(pair[1], tensors, depth + 1)
    return made
