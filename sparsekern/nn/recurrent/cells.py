"""One time step: drop-ins for `torch.nn.GRUCell`, `LSTMCell` and `RNNCell`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.errors import ShapeError
from sparsekern.nn.recurrent.arguments import (
    Shares,
    check_flag,
    check_nonlinearity,
    check_size,
)
from sparsekern.nn.recurrent.base import SparseRecurrent, uncompiled
from sparsekern.nn.recurrent.gates import KINDS
from sparsekern.nn.recurrent.scan import scan
from sparsekern.nn.symbolic import one_node
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block


class _Cell(SparseRecurrent):
    arguments: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")
    kind: str

    def __init__(self, kind: str, input_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        check_flag("bias", bias)
        self.kind = kind
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias

    def _shapes(self) -> dict[str, tuple[int, int]]:
        rows = KINDS[self.kind].gates * self.hidden_size
        return {"ih": (rows, self.input_size), "hh": (rows, self.hidden_size)}

    def _step(self, x: Tensor, hx: Any) -> list[Tensor]:
        """The next states."""
        return uncompiled(self._step_eagerly, x, hx)

    def _step_eagerly(self, x: Tensor, hx: Any) -> list[Tensor]:
        self._check_tensor("input", x)
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            raise ShapeError(
                f"`input` must have shape (batch, {self.input_size}) or ({self.input_size},); "
                f"got {tuple(x.shape)}"
            )
        names = ("h_0", "c_0")[: KINDS[self.kind].states]
        shapes = dict.fromkeys(names, (*x.shape[:-1], self.hidden_size))
        state = self._initial(hx, x, shapes)
        layers = self._matrices()
        inputs = layers["ih"](x.reshape(-1, self.input_size))
        state = [s.reshape(-1, self.hidden_size).to(inputs.dtype) for s in state]
        _, *final = scan(self.kind, inputs, state, layers["hh"], None, [inputs.shape[0]])
        return [s.view(*x.shape[:-1], self.hidden_size) for s in final]

    def extra_repr(self) -> str:
        """As torch's; the matrices tell their sparsity themselves."""
        facts = f"{self.input_size}, {self.hidden_size}"
        facts += "" if self.bias else ", bias=False"
        return facts + (", nonlinearity=relu" if self.kind == "relu" else "")


class SparseGRUCell(_Cell):
    """One step of a GRU, as `torch.nn.GRUCell`, with weights that are sparse in memory.

    Args:
        input_size: features of the input.
        hidden_size: features of the state, H.
        bias: whether both products add a bias, which is dense.
        sparsity: share of the weights that do not exist, in [0, 1); one number, or one for each of
            `ih` (3 H, input_size) and `hh` (3 H, H), where None leaves a matrix dense.
        block: edge or pair (outputs, inputs) of the blocks; 1 is unstructured (CSR).
        impl: None chooses by device, see `sparsekern.ops.resolve`; "masked" is the reference.
        topologies: connections of `ih` and `hh` to start from; overrides sparsity and block.
        generator: of random topologies and values; torch's default one if None.
        device: where parameters and index arrays live.
        dtype: of the parameters.

    Raises:
        ConfigError, ShapeError, DtypeError: an argument is out of its domain, or the block is
            larger than a matrix.
    """

    dense_type = nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("gru", input_size, hidden_size, bias)
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @one_node
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Next state (B, H) or (H,) of `input` (B, input_size) or (input_size,) and `hx`."""
        return self._step(input, hx)[0]


class SparseRNNCell(_Cell):
    """One step of a plain RNN, as `torch.nn.RNNCell`, with weights that are sparse in memory.

    `nonlinearity` is "tanh" or "relu"; the other arguments are those of `SparseGRUCell`, with
    matrices of H rows.
    """

    dense_type = nn.RNNCell
    arguments = (*_Cell.arguments, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_nonlinearity(nonlinearity)
        super().__init__(nonlinearity, input_size, hidden_size, bias)
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @property
    def nonlinearity(self) -> str:
        """Either "tanh" or "relu"."""
        return self.kind

    @one_node
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Next state (B, H) or (H,) of `input` (B, input_size) or (input_size,) and `hx`."""
        return self._step(input, hx)[0]


class SparseLSTMCell(_Cell):
    """One step of an LSTM, as `torch.nn.LSTMCell`, with weights that are sparse in memory.

    The arguments are those of `SparseGRUCell`, with matrices of 4 H rows.
    """

    dense_type = nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias)
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @one_node
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Next (h, c), each (B, H) or (H,), of `input` and the last pair."""
        h, c = self._step(input, hx)
        return h, c
