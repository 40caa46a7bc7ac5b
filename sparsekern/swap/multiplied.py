"""Layers whose weight the module around them takes and multiplies by itself, as Mamba's does."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

_FACTS = frozenset(("dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad"))
"""What a sparse layer's `weight` answers."""

_QUIET = ("__init__", "reset", "init", "_init", "extra_repr", "tie_weights", "_tie")
"""Beginnings of names of methods that no forward pass calls."""

_READ = re.compile(r"self\s*\.\s*\w+\s*\.\s*weight\b")

_HARMLESS = ("isinstance", "hasattr", "getattr", "type")


def multiplied_by_itself(model: nn.Module) -> dict[int, str]:
    """Why layers stay dense whose weight is taken past their forward, by the layer's id.

    Found in the source of the module that holds the layer: `self.layer.weight` as an operand, in a
    method that a forward pass may call. Torch's own modules ask first whether a weight is a tensor.
    Where no source is at hand nothing is found; then the product raises `WeightError`.
    """
    found = {}
    for module in model.modules():
        kind: Any = type(module)
        for child in taken_weights(kind):
            layer = module._modules.get(child)
            if layer is not None:
                found[id(layer)] = f"{kind.__name__} multiplies by its weight itself"
    return found


@functools.cache
def taken_weights(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose `weight` a class of modules takes as a tensor."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "sparsekern", "builtins"):
            continue
        for function in _functions(base):
            if not function.name.startswith(_QUIET):
                names |= _taken(function)
    return frozenset(names)


def _functions(kind: type) -> Iterator[ast.FunctionDef]:
    """What is defined in the source of a class, if it could read such a weight at all."""
    found = _classes(kind.__module__)
    if found is None:  # as in some notebooks
        try:
            found = {kind.__qualname__: [ast.parse(textwrap.dedent(inspect.getsource(kind)))]}
        except (OSError, TypeError, SyntaxError, ValueError):
            return
    for node in found.get(kind.__qualname__, ()):
        yield from (n for n in ast.walk(node) if isinstance(n, ast.FunctionDef))


@functools.cache
def _classes(module: str) -> dict[str, list[ast.AST]] | None:
    """The classes of a module by qualified name, none where no weight is read; None: no source.

    `inspect` would read and parse the whole file anew for each of them.
    """
    try:
        text = inspect.getsource(sys.modules[module])
        tree = ast.parse(text if _READ.search(text) else "")
    except (KeyError, OSError, TypeError, SyntaxError, ValueError):
        return None
    found: dict[str, list[ast.AST]] = {}
    queue: list[tuple[str, ast.AST]] = [("", tree)]
    while queue:
        prefix, node = queue.pop()
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.ClassDef):
                found.setdefault(prefix + child.name, []).append(child)
                inner = f"{prefix}{child.name}."
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{prefix}{child.name}.<locals>."
            queue.append((inner, child))
    return found


def _taken(function: ast.FunctionDef) -> set[str]:
    harmless: set[int] = set()
    taken = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _HARMLESS:
            harmless.update(map(id, node.args))
        child = _child(node)
        if child:
            taken[id(node)] = child
    return {child for node, child in taken.items() if node not in harmless}


def _child(node: ast.AST) -> str:
    """Of `self.child.weight`, as it is read; "" of anything else."""
    if not isinstance(node, ast.Attribute) or node.attr != "weight":
        return ""
    inner = node.value
    read = isinstance(node.ctx, ast.Load) and isinstance(inner, ast.Attribute)
    if read and isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
        return inner.attr if inner.value.id == "self" else ""
    return ""
