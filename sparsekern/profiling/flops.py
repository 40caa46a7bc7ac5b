"""FLOPs of one training step, by layer and by direction, and what its backward pass needs saved.

1 multiply-add = 2 FLOPs. The formulas are those of `torch.utils.flop_counter`, our operators' own
among them; each is asked twice, for what is executed and for the dense layer instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sparsekern.ops import flops  # noqa: F401  registers the formulas of the sparse operators
from sparsekern.ops.workspace import workspace_bytes

OTHER = ""
"""What no layer does: products between activations, as in attention."""


@dataclass
class Count:
    """What one layer does in a step.

    Attributes:
        forward: FLOPs executed.
        backward: the same, in the backward pass.
        forward_dense: FLOPs if the layer were dense.
        backward_dense: the same.
        saved_bytes: of tensors that its forward first keeps for backward.
        workspace_bytes: most that one operator needs beside operands and results.
        calls: of its forward.
        numbers: that go in and come out of all calls.
    """

    forward: int = 0
    backward: int = 0
    forward_dense: int = 0
    backward_dense: int = 0
    saved_bytes: int = 0
    workspace_bytes: int = 0
    calls: int = 0
    numbers: int = 0


@dataclass
class StepCount:
    """One training step.

    Attributes:
        layers: by name; `OTHER` is everything outside of them.
        uncounted: calls of operators without a formula that are not elementwise, by name.
    """

    layers: dict[str, Count] = field(default_factory=dict)
    uncounted: Counter[str] = field(default_factory=Counter)


class StepCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Counts a forward and a backward pass while they run.

    Forward, the innermost of the `layers` that is running gets what is executed. Backward, an
    autograd node belongs to the layer that made it.

    Args:
        layers: by name; none contains another.
        ignored: storages that are not saved for backward alone: parameters and buffers.
    """

    def __init__(self, layers: Mapping[str, nn.Module], ignored: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = StepCount({name: Count() for name in (*layers, OTHER)})
        self._layers = layers
        self._running: list[str] = []  # layers in their forward
        self._node = OTHER  # whose node autograd is at
        self._backward = False
        self._owned: set[Node] = set()
        self._saved = ignored
        self._kept: list[Any] = []  # storages stay, so that no address is used twice

    # ---- to be used in this order

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which layer is in its forward, also while it is run again for backward."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                for handle in self._watch(name, layer):
                    stack.callback(handle.remove)
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count a forward pass."""
        with saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
            yield

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Count the backward pass of `loss`."""
        self._own(OTHER, [loss.grad_fn], set(), through=True)
        self._backward, self._node = True, OTHER
        with self:
            yield
        self._owned.clear()
        self._kept.clear()

    # ---- forward

    def _watch(self, name: str, layer: nn.Module) -> Iterator[Any]:
        before: list[set[Any]] = []

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._running.append(name)
            if self._backward:
                return
            before.append(set(_nodes((args, kwargs))))

        def leave(_module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            if self._backward:  # run again, to make what was not saved
                return
            count = self.count.layers[name]
            count.calls += 1
            count.numbers += sum(t.numel() for t in _tensors((args, output)))
            self._own(name, _nodes(output), before.pop())

        yield layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield layer.register_forward_hook(leave)

    def _own(self, name: str, last: list[Any], stop: set[Any], *, through: bool = False) -> None:
        """Nodes between these and `stop` that nobody owns yet set the layer when they run.

        The way ends at nodes that have an owner, or leads `through` them.
        """

        def at(_gradients: Any) -> None:
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

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._saved:
            self._saved.add(storage._cdata)
            self._kept.append(storage)
            self.count.layers[self._here()].saved_bytes += storage.nbytes()
        return tensor

    # ---- operators

    def _here(self) -> str:
        """The layer at work; one that runs its forward again in backward is still in forward."""
        if self._running:
            return self._running[-1]
        return self._node if self._backward else OTHER

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, in parts where it has no formula and parts are known."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.count.uncounted[str(func)] += 1
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet not in flop_registry and func.namespace != "prim":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        count = self.count.layers[self._here()]
        count.workspace_bytes = max(count.workspace_bytes, workspace_bytes(func, args))
        if packet in flop_registry:
            self._add(packet, args, kwargs, out)
        elif not _is_free(func):
            self.count.uncounted[str(packet)] += 1
        return out

    def _add(self, packet: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        formula: Any = flop_registry[packet]
        executed = dense = int(formula(*args, **kwargs, out_val=out))
        if packet._qualified_op_name.startswith("sparsekern::") and isinstance(args[-1], str):
            dense = int(formula(*args[:-1], "dense", **kwargs, out_val=out))
        count = self.count.layers[self._here()]
        if self._backward:
            count.backward += executed
            count.backward_dense += dense
        else:
            count.forward += executed
            count.forward_dense += dense


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _nodes(values: Any) -> list[Any]:
    """Autograd nodes of the tensors among these."""
    return [tensor.grad_fn for tensor in _tensors(values) if tensor.grad_fn is not None]


def _is_free(func: Any) -> bool:
    """Whether an operator has no products by its nature: views, copies, sums, elementwise ones."""
    if func.namespace != "aten":
        return bool(func.namespace == "prim")
    name = func._overloadpacket.__name__.removeprefix("_")
    return (
        func.is_view
        or torch.Tag.pointwise in func.tags
        or any(name.startswith(start) for start in _FREE)
    )


_FREE = (
    "adaptive_avg_pool", "adaptive_max_pool", "add", "amax", "arange", "argmax", "as_strided",
    "avg_pool", "bernoulli", "cat", "clone", "constant_pad", "copy", "cudnn_batch_norm", "cumsum",
    "detach", "embedding", "empty", "fill", "full", "fused_dropout", "gather", "index", "lift",
    "local_scalar", "log_softmax", "masked_fill", "max_pool", "mean", "native_batch_norm",
    "native_dropout", "native_group_norm", "native_layer_norm", "new_", "nll_loss", "norm", "ones",
    "rand", "rms_norm", "fused_rms_norm", "safe_softmax", "scalar_tensor", "scatter", "select",
    "slice", "softmax", "sort", "split", "stack", "std", "sum", "to_copy", "topk", "transpose",
    "tril", "triu", "unsafe_", "var", "where", "zero", "zeros", "view",
)  # fmt: skip
"""Beginnings of names of operators that move, compare, sum or normalize numbers."""
