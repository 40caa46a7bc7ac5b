"""Sparse layers under `torch.fx.symbolic_trace`: each is one node, as torch's own layers are.

A tracer takes modules of `torch.nn` for leaves by where they are defined; these say it themselves,
to whichever tracer comes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.fx import Proxy

from sparsekern.errors import UnavailableError

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["Proxy", "node_of", "one_node"]


def node_of(layer: nn.Module, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of a layer as a node of the graph that is traced.

    Args:
        layer: in the model that is traced.
        first: one of its inputs, the tracer's.
        args: of its forward.
        kwargs: likewise.

    Raises:
        UnavailableError: the layer is itself what is traced.
    """
    tracer = first.tracer
    name = tracer.path_of_module(layer)
    if not name:
        raise UnavailableError(
            f"torch.fx can't trace into a {type(layer).__name__}, which is one node of a graph: "
            "trace a model that holds it, such as nn.Sequential(layer)"
        )
    return tracer.create_proxy("call_module", name, args, kwargs)


def one_node(forward: F) -> F:
    """Make a `forward` whose first input comes from a tracer a node."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Proxy):
            return node_of(self, first, args, kwargs)
        return forward(self, *args, **kwargs)

    return cast(F, run)
