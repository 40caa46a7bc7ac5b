"""Which layer is at work, in forward and in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from sparsekern.cost.examples import Call

OTHER = ""
"""What no layer does: products between activations, as in attention."""

Called = Callable[[str, Call], None]


class Watch:
    """Follows a forward and a backward pass from layer to layer.

    Forward, the layer at work is the innermost that is running. Backward, it is the one that made
    the autograd node at hand, or one that runs its forward again.

    Args:
        layers: by name; none contains another.
        on_change: called with nothing just before another layer may be at work.
        on_call: called with a layer's name and its call, after a forward.

    Attributes:
        backward: whether the backward pass has begun.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        on_change: Callable[[], None] = lambda: None,
        on_call: Called = lambda _name, _call: None,
    ) -> None:
        self.backward = False
        self._layers, self._on_change, self._on_call = layers, on_change, on_call
        self._running: list[str] = []
        self._node = OTHER
        self._owned: set[Node] = set()

    @property
    def here(self) -> str:
        """The layer at work, or `OTHER`."""
        if self._running:
            return self._running[-1]
        return self._node if self.backward else OTHER

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the backward pass."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                for handle in self._hooks(name, layer):
                    stack.callback(handle.remove)
            yield
        self._owned.clear()

    def turn(self, loss: Tensor) -> None:
        """The forward pass has made `loss`; its backward pass follows."""
        self._own(OTHER, [loss.grad_fn], set(), through=True)
        self._on_change()
        self.backward, self._node = True, OTHER

    def _hooks(self, name: str, layer: nn.Module) -> Iterator[Any]:
        before: list[set[Any]] = []

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._on_change()
            self._running.append(name)
            if not self.backward:
                before.append(set(_nodes((args, kwargs))))

        def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._on_change()
            self._running.pop()
            if not self.backward:
                self._on_call(name, Call(args, kwargs, output))
                self._own(name, _nodes(output), before.pop())

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield layer.register_forward_hook(leave, with_kwargs=True)

    def _own(self, name: str, last: list[Any], stop: set[Any], *, through: bool = False) -> None:
        """Nodes between these and `stop` that nobody owns yet become the layer's.

        The way ends at nodes that have an owner, or leads `through` them.
        """

        def at(_gradients: Any) -> None:
            self._on_change()
            self._node = name
            self._running.clear()  # a forward that is run again ends early, by an exception

        todo, seen = [node for node in last if node is not None], set(stop)
        while todo:
            node = todo.pop()
            if node in seen or (node in self._owned and not through):
                continue
            seen.add(node)
            if node not in self._owned:
                self._owned.add(node)
                node.register_prehook(at)
            todo.extend(following for following, _ in node.next_functions if following is not None)


def tensors(values: Any) -> list[Tensor]:
    """The tensors among these."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _nodes(values: Any) -> list[Any]:
    return [tensor.grad_fn for tensor in tensors(values) if tensor.grad_fn is not None]
