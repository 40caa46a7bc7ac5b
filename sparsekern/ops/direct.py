"""The short way to a kernel, taken where nothing in torch has to see an operator.

A call through the dispatcher and an autograd function on either side of it costs several times what
a small product takes. Where no mode, transform, tracer, compiler, autocast or profiler is active
and all operands are plain tensors, a product is one `torch.autograd.Function` around the backend,
or the backend alone where nothing requires a gradient. The results are the operators' own, bit for
bit. Whatever watches gets the operators of `library`, which is also where gradients are
differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from sparsekern.ops.conv_library import ConvOperators
from sparsekern.ops.dispatch import Backend, ConvBackend, backend
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.library import Operators, check_unchanged
from sparsekern.topology import Topology
from sparsekern.topology.known import Known

_C: Any = torch._C  # untyped in torch
_autograd: Any = torch.autograd

_is_batched: Any = _C._functorch.is_legacy_batchedtensor
_is_functional: Any = torch._is_functional_tensor


def is_watched() -> bool:
    """Whether something has to see operators: asked at every call, in well under a microsecond.

    A default device (`torch.set_default_device`, `with torch.device(...)`) is a mode that only acts
    on the making of tensors; it does not watch.
    """
    return bool(
        torch.compiler.is_compiling()  # first: a compiler takes the rest for granted
        or _C._len_torch_dispatch_stack()
        or (_C._len_torch_function_stack() and _has_function_mode())
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or _C._is_any_autocast_enabled()
        or _autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def any_autocast() -> bool:
    """Whether autocast is on for some kind of device."""
    return bool(_C._is_any_autocast_enabled())


def _has_function_mode() -> bool:
    modes = (_C._get_function_stack_at(i) for i in range(_C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def is_plain(*operands: Tensor | None) -> bool:
    """Whether kernels can read these as they lie: no subclass, and nothing left to be computed.

    Negation may be lazy, as in the imaginary part of a conjugate; so may be zeros. Tensors that
    batch gradients (`is_grads_batched`) or functionalize have torch's own type.
    """
    for t in operands:
        if t is None:
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not nn.Parameter) or t.is_neg() or t._is_zerotensor():
            return False
        if _is_batched(t) or _is_functional(t):
            return False
    return True


def needs_grad(*operands: Tensor | None) -> bool:
    """Whether autograd has to record a function of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Topology,
    known: Known,
    *,
    relu: bool,
    impl: str,
) -> Tensor:
    """`ops.spmm` of checked operands, x being (M, cols), where nothing watches."""
    if needs_grad(x, values, bias):
        y: Tensor = _apply_linear(x, values, bias, topology, known, relu, impl)
        return y
    return backend(impl).spmm(x, values, topology, bias, relu=relu)


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topology: Topology,
    known: Known,
    *,
    geometry: ConvGeometry,
    impl: str,
) -> Tensor:
    """`ops.conv2d` of checked operands, where nothing watches."""
    if needs_grad(x, values, bias):
        y: Tensor = _apply_conv2d(x, values, bias, topology, known, geometry, impl)
        return y
    return backend(impl).conv2d(x, values, topology, geometry, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        topology: Topology,
        known: Known,
        relu: bool,
        impl: str,
    ) -> Tensor:
        y = backend(impl).spmm(x, values, topology, bias, relu=relu)
        ctx.save_for_backward(x, values, *((y,) if relu else ()))
        _remember(ctx, topology, known, impl)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, values, *clamped = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        topology = _recall(ctx)
        if clamped:  # the derivative of max(y, 0) can be read off its result
            dy = torch.ops.aten.threshold_backward(dy, clamped[0], 0)
        free = _is_free(dy, x, values)
        run: Backend = backend(ctx.impl) if free else Operators(ctx.impl)
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if needs_x and needs_values:
            dx, dw = run.backward(dy, x, values, topology)
        elif needs_x:
            dx = run.spmm_t(dy, values, topology)
        elif needs_values:
            dw = run.sddmm(dy, x, topology)
        return dx, dw, dy.sum(0) if needs_bias else None, None, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        topology: Topology,
        known: Known,
        geometry: ConvGeometry,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.geometry = geometry
        _remember(ctx, topology, known, impl)
        return backend(impl).conv2d(x, values, topology, geometry, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        t, g = _recall(ctx), ctx.geometry
        free = _is_free(dy, x, values)
        run: ConvBackend = backend(ctx.impl) if free else ConvOperators(ctx.impl)
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if needs_x and needs_values:
            dx, dw = run.conv2d_backward(dy, x, values, t, g)
        elif needs_x:
            dx = run.conv2d_dgrad(dy, values, t, g, size=(x.shape[2], x.shape[3]))
        elif needs_values:
            dw = run.conv2d_wgrad(dy, x, t, g)
        return dx, dw, dy.sum((0, 2, 3)) if needs_bias else None, None, None, None, None


def _is_free(*operands: Tensor) -> bool:
    """Whether a backward pass may take the short way: nobody differentiates it again."""
    return not torch.is_grad_enabled() and is_plain(*operands) and not is_watched()


def _remember(ctx: Any, topology: Topology, known: Known, impl: str) -> None:
    ctx.set_materialize_grads(False)
    ctx.topology, ctx.known, ctx.impl = topology, known, impl


def _recall(ctx: Any) -> Topology:
    known: Known = ctx.known
    check_unchanged(known.arrays, known.versions)
    topology: Topology = ctx.topology
    return topology


# torch's own `apply` looks for transforms and wrapped tensors, which are not here
_below: Any = super
_apply_linear: Any = _below(torch.autograd.Function, _Linear).apply
_apply_conv2d: Any = _below(torch.autograd.Function, _Conv2d).apply
