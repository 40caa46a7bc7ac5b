"""Sparse layers for the cost counters fvcore, thop and ptflops, through the hooks they offer.

All three count multiply-adds (MACs) of a forward pass, whatever they call them: 1 MAC = 2 FLOPs. A
sparse layer counts its stored weights once for each token or output pixel, whole blocks, or all of
them where a dense product runs (`impl="dense"`, `"masked"`). Biases and activations of sparse
layers are left out. `torch.utils.flop_counter.FlopCounterMode` needs nothing from here.

    FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles()).total()
    thop.profile(model, (x,), custom_ops=thop_ops())
    get_model_complexity_info(model, shape, custom_modules_hooks=ptflops_hooks())

None of the three packages is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import flop_registry

from sparsekern.nn import SparseLayer
from sparsekern.nn.attention import SparseMultiheadAttention
from sparsekern.nn.kinds import SPARSE_KINDS
from sparsekern.nn.recurrent import SparseRecurrent
from sparsekern.ops import flops

__all__ = ["fvcore_handles", "layer_macs", "ptflops_hooks", "thop_ops"]


def layer_macs(module: nn.Module, output: Any) -> int:
    """Multiply-adds of one forward pass through a sparse layer.

    Args:
        module: a sparse linear, convolutional or recurrent layer or cell.
        output: what it returned, as a forward hook gets it.
    """
    if isinstance(module, SparseRecurrent):
        y = output if isinstance(output, Tensor) else output[0]
        y = y.data if isinstance(y, PackedSequence) else y
        tokens: int = y.numel() // y.shape[-1]
        return tokens * sum(_applied(matrix) for matrix in module.children())
    layer: Any = module
    tokens = output.numel() // layer.matrix_shape[0]
    return tokens * _applied(layer)


# attention is counted by its projections, which are called
_COUNTED = [kind for kind in SPARSE_KINDS if kind is not SparseMultiheadAttention]


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for `FlopCountAnalysis(...).set_op_handle(**handles)`, by operator.

    fvcore traces the model with `torch.jit.trace`, so operators called outside of a layer count
    too, and the products of recurrent layers at every time step. Those of `hh` and `hr` belong to
    the recurrent layer: fvcore reports these submodules as never called.
    """
    return {f"sparsekern::{name}": _handle(name) for name in flops.OPERATORS}


def thop_ops() -> dict[type[nn.Module], Callable[[Any, Any, Any], None]]:
    """Rules for `thop.profile(..., custom_ops=rules)`, by layer type.

    Layers are found by their exact type, and operators called outside of a layer aren't seen. thop
    adds the elementwise work of torch's own recurrent layers to theirs; for sparse ones it is
    products alone.
    """
    return dict.fromkeys(_COUNTED, _add_total_ops)


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """Hooks for `get_model_complexity_info(..., custom_modules_hooks=hooks)`.

    They serve both of its backends: layers by their exact type ("pytorch") and operators ("aten").
    The backend "pytorch" also counts torch functions by name while the model runs, such as those
    that a recurrent layer, or a CPU product without numba, is made of; leave them out with
    `backend_specific_config={"count_functional": False}`. ptflops adds biases and activations to
    the work of torch's own layers; for sparse ones it is products alone. An `nn.ReLU` beside them
    costs one MAC for each output in the backend "pytorch", and another one as the function that it
    calls unless those are left out; in "aten" it costs nothing.
    """
    layers: dict[Any, Callable[..., Any]] = dict.fromkeys(_COUNTED, _add_flops)
    operators = {getattr(torch.ops.sparsekern, n): _aten_hook(n) for n in flops.OPERATORS}
    # how a matrix that stays dense in a recurrent layer shows up there
    return layers | operators | {torch.ops.aten.linear: _aten_linear}


def _applied(layer: Any) -> int:
    """Weights that a layer multiplies by for each token."""
    if isinstance(layer, SparseLayer) and layer.resolved_impl not in ("dense", "masked"):
        return layer.values.numel()
    rows, cols = layer.matrix_shape if isinstance(layer, SparseLayer) else layer.weight.shape
    return int(rows * cols)


def _macs(name: str, arguments: list[Any]) -> int:
    """Multiply-adds of an operator, from its arguments or their shapes."""
    return int(flop_registry[getattr(torch.ops.sparsekern, name)](*arguments)) // 2


def _handle(name: str) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], _outputs: list[Any]) -> int:
        return _macs(name, [_traced(value) for value in inputs])

    return handle


def _traced(value: Any) -> Any:
    """Shape of a tensor in a traced graph, or the constant that any other value is."""
    if value.isCompleteTensor():
        return value.type().sizes()
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [_traced(item) for item in node.inputs()]
    return value.toIValue()


def _add_total_ops(module: Any, _inputs: Any, output: Any) -> None:
    module.total_ops += layer_macs(module, output)
    # some matrices of a recurrent layer are called, others are not: all were counted here
    for matrix in module.children():
        matrix.total_ops.zero_()


def _add_flops(module: Any, _inputs: Any, output: Any) -> None:
    module.__flops__ += layer_macs(module, output)


def _aten_hook(name: str) -> Callable[[tuple[Any, ...], Any], int]:
    def hook(arguments: tuple[Any, ...], _outputs: Any) -> int:
        return _macs(name, list(arguments))

    return hook


def _aten_linear(arguments: tuple[Any, ...], _outputs: Any) -> int:
    x, weight = arguments[:2]
    return int(x.numel() * weight.shape[0])
