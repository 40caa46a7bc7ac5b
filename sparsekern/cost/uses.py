"""What one call of a layer does in a training step: the facts that its time follows from."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence

from sparsekern.cost.examples import Call
from sparsekern.nn import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear
from sparsekern.nn.kinds import weights_of
from sparsekern.nn.recurrent.base import SparseRecurrent
from sparsekern.nn.transposed import is_transposed


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        shape: of its first input.
        tokens: how often each weight is applied: rows of the input, output pixels, or sequences
            times time steps.
        numbers: that go in and come out; of a recurrent layer, of each of its products.
        steps: time steps that follow one another, over all layers and directions; 0 elsewhere.
        dx: whether the backward pass computes a gradient of the input.
        dw: whether it computes one of a weight.
        states: how often it computes a gradient of the state before, of a recurrent layer; less
            often than there are time steps if the first state needs none.
    """

    shape: tuple[int, ...]
    tokens: int
    numbers: int
    steps: int
    dx: bool
    dw: bool
    states: int = 0

    @property
    def products(self) -> int:
        """Of each weight: forward, and the gradients of weight and input that are needed."""
        return 1 + self.dw + self.dx


def use_of(module: nn.Module, call: Call) -> Use | None:
    """Of a layer, dense or sparse, in a step where a gradient comes back to the call's output.

    None if it is of no kind that is known, or got no tensor with numbers in it.
    """
    given = argument(call, 0, "input")
    x = given.data if isinstance(given, PackedSequence) else given
    if not isinstance(x, Tensor) or not x.numel():
        return None
    steps = states = 0
    if isinstance(module, _CONVOLUTIONS):
        back = isinstance(module, _ConvTransposeNd)  # applies its weight to each pixel of the input
        channels, applied = (module.in_channels, x) if back else (module.out_channels, call.output)
        tokens = applied.numel() // int(channels)
        numbers = x.numel() + call.output.numel()
    elif isinstance(module, nn.Linear | SparseLinear) or is_transposed(type(module)):
        tokens = x.numel() // x.shape[-1]
        numbers = x.numel() + call.output.numel()
    elif isinstance(module, _RECURRENT):
        tokens = x.numel() // x.shape[-1]
        numbers, steps = tokens * _features(module), _steps(module, given)
        states = _states(module, given, call, tokens)
    else:
        return None
    return Use(tuple(x.shape), tokens, numbers, steps, x.requires_grad, True, states)


_CONVOLUTIONS = (_ConvNd, SparseConv1d, SparseConv2d)
_RECURRENT = (SparseRecurrent, nn.RNNBase, nn.RNNCellBase)


def argument(call: Call, position: int, name: str) -> Any:
    """Of a call, given by position or by name; None without."""
    if len(call.args) > position:
        return call.args[position]
    return call.kwargs.get(name)


def _features(module: nn.Module) -> int:
    """Inputs and outputs of all weights of a recurrent layer."""
    sparse = [m.matrix_shape for m in module.modules() if isinstance(m, SparseLayer)]
    dense = [w.shape for m in module.modules() for w in weights_of(m).values()]
    return sum(rows + cols for rows, cols in [*sparse, *dense])


def _states(module: Any, given: Any, call: Call, tokens: int) -> int:
    """How often a gradient of the state before is computed: not of one that was no result."""
    state = argument(call, 1, "hx")
    state = state[0] if isinstance(state, tuple) else state
    if state is not None and state.requires_grad:
        return tokens
    if not hasattr(module, "num_layers"):
        return 0  # a cell
    if isinstance(given, PackedSequence):
        return tokens - int(given.batch_sizes[0])
    batch = given.shape[0 if module.batch_first else 1] if given.dim() == 3 else 1
    return tokens - int(batch)


def _steps(module: Any, given: Any) -> int:
    """Of all layers and directions; a cell takes one."""
    if not hasattr(module, "num_layers"):
        return 1
    if isinstance(given, PackedSequence):
        length = len(given.batch_sizes)
    else:
        length = given.shape[1 if module.batch_first and given.dim() == 3 else 0]
    return int(length * module.num_layers * (2 if module.bidirectional else 1))
