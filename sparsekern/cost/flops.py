"""FLOPs of one training step, by layer and by direction, and what its backward pass needs saved.

1 multiply-add = 2 FLOPs. The formulas are those of `torch.utils.flop_counter`, our operators' own
among them; each is asked twice, for what is executed and for the dense layer instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from sparsekern.cost.examples import Call
from sparsekern.cost.uses import Use, use_of
from sparsekern.cost.watch import OTHER, Called, Watch, tensors
from sparsekern.ops import flops  # noqa: F401  registers the formulas of the sparse operators
from sparsekern.ops.workspace import workspace_bytes


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
        uses: facts of each call; None of one that is not understood.
    """

    forward: int = 0
    backward: int = 0
    forward_dense: int = 0
    backward_dense: int = 0
    saved_bytes: int = 0
    workspace_bytes: int = 0
    calls: int = 0
    uses: list[Use | None] = field(default_factory=list)


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
    """Counts a forward and a backward pass while they run, layer by layer.

    Args:
        layers: by name; none contains another.
        ignored: storages that are not saved for backward alone: parameters and buffers.
        on_call: gets a layer's name and its call, after each forward.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        ignored: set[int],
        on_call: Called = lambda _name, _call: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = StepCount({name: Count() for name in (*layers, OTHER)})
        self._layers, self._on_call = layers, on_call
        self._watch = Watch(layers, on_call=self._called)
        self._saved = ignored
        self._kept: list[Any] = []  # storages stay, so that no address is used twice

    def step(self, forward: Callable[[], Tensor]) -> StepCount:
        """Count `forward`, which returns a loss, and the backward pass."""
        with self._watch.watching():
            with saved_tensors_hooks(self._pack, lambda tensor: tensor), self:
                loss = forward()
            self._watch.turn(loss)
            with self:
                torch.autograd.backward(loss)
        self._kept.clear()
        return self.count

    def _called(self, name: str, call: Call) -> None:
        self._on_call(name, call)
        count = self.count.layers[name]
        count.calls += 1
        use, i = use_of(self._layers[name], call), len(count.uses)
        count.uses.append(use and use._replace(dx=False, dw=False, states=0))

        def reached(_gradient: Tensor) -> None:
            count.uses[i] = use

        for tensor in tensors(call.output):
            if tensor.requires_grad:
                tensor.register_hook(reached)  # type: ignore[no-untyped-call]  # untyped in torch

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._saved:
            self._saved.add(storage._cdata)
            self._kept.append(storage)
            self.count.layers[self._watch.here].saved_bytes += storage.nbytes()
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, in parts where it has no formula and parts are known."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.count.uncounted[str(func)] += 1
            return func(*args, **kwargs)
        packet = _IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet not in flop_registry and func.namespace != "prim":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        count = self.count.layers[self._watch.here]
        count.workspace_bytes = max(count.workspace_bytes, workspace_bytes(func, args))
        if packet in flop_registry:
            self._add(packet, args, kwargs, out)
        elif not is_free(func):
            self.count.uncounted[str(packet)] += 1
        return out

    def _add(self, packet: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        executed = dense = _flops(packet, args, kwargs, out)
        if packet._qualified_op_name.startswith("sparsekern::") and isinstance(args[-1], str):
            dense = _flops(packet, (*args[:-1], "dense"), kwargs, out)
        count = self.count.layers[self._watch.here]
        if self._watch.backward:
            count.backward += executed
            count.backward_dense += dense
        else:
            count.forward += executed
            count.forward_dense += dense


@contextmanager
def as_products(*, recurrent: bool = True) -> Iterator[None]:
    """Attention as products, which have formulas; recurrent layers too, if there are any."""
    with (
        torch.backends.cudnn.flags(enabled=not recurrent),
        torch.backends.mkldnn.flags(not recurrent, None, None, None),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


_IN_PLACE = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}
"""Operators that take the formula of another one; torch has none for them."""


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    if packet is torch.ops.aten.convolution_backward:
        # torch's own formula counts the weight gradient once for each group
        dy, x, weight, *_ = args
        transposed, output_mask = args[7], args[10]
        forward = conv_flop_count(x.shape, weight.shape, dy.shape, transposed)
        return int(sum(output_mask[:2])) * int(forward)
    formula: Any = flop_registry[packet]
    return int(formula(*args, **kwargs, out_val=out))


def is_free(func: Any) -> bool:
    """Whether an operator has no products by its nature: views, copies, sums, elementwise ones."""
    if func.namespace != "aten":
        return bool(func.namespace == "prim")
    name = func._overloadpacket.__name__.lstrip("_")
    return func.is_view or torch.Tag.pointwise in func.tags or bool(_FREE.match(name))


_FREE = re.compile(
    r"(?:abs|adaptive|add|all|amax|amin|aminmax|any|arange|arg|argmax|argmin|argsort|as_strided|avg_pool|"
    r"batch_norm|bernoulli|binary_cross_entropy|cat|chunk|clone|constant_pad|copy|count_nonzero|"
    r"cudnn_batch_norm|cummax|cummin|cumprod|cumsum|detach|dropout|embedding|embedding_dense|empty|"
    r"eye|fill|flip|full|fused_dropout|fused_rms_norm|gather|glu|group_norm|histc|im2col|col2im|"
    r"index|instance_norm|layer_norm|lift|linspace|local_scalar|log_softmax|logcumsumexp|logsumexp|"
    r"masked_fill|masked_scatter|masked_select|max|max_pool|max_unpool|mean|median|min|mode|"
    r"multinomial|multi_margin_loss|multilabel_margin_loss|narrow|native_batch_norm|"
    r"native_channel_shuffle|native_dropout|native_group_norm|native_layer_norm|new|nll_loss|"
    r"nonzero|norm|normal|one_hot|ones|pad|permute|pixel_shuffle|pixel_unshuffle|prelu_kernel|prod|"
    r"put|rand|randint|randn|randperm|range|reflection_pad|repeat|replication_pad|resize|rms_norm|"
    r"roll|rot90|rrelu_with_noise|safe_softmax|scalar_tensor|scatter|searchsorted|select|"
    r"segment_reduce|set|slice|softmax|sort|split|squeeze|stack|std|sum|sym|take|to|topk|transpose|"
    r"tril|triu|unfold|uniform|unique|unsafe|unsqueeze|upsample|var|view|where|zero|zeros|"
    r"\w+_loss|amp_foreach|amp_update_scale|argwhere|assert|bincount|block_diag|bucketize|celu|clip|"
    r"coalesce|diag|diagonal|diff|div|elu|eq|expand|exponential|fake_quantize|foreach(?!_mm)|"
    r"functional|fused_adagrad|fused_adam|fused_adamw|fused_sgd|pack_padded_sequence|reshape|"
    r"thnn_differentiable|thnn_fused|weight_norm)(?:_|\d|$)"
)
"""Names of operators that move, compare, draw, sum or normalize numbers, and what follows them."""
