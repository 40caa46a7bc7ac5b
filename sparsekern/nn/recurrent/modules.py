"""Drop-ins for `torch.nn.GRU`, `LSTM` and `RNN` that hold only their active weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparsekern.nn.recurrent.arguments import Shares, check_nonlinearity
from sparsekern.nn.recurrent.base import SparseRecurrent
from sparsekern.nn.recurrent.cells import SparseGRUCell, SparseLSTMCell, SparseRNNCell
from sparsekern.nn.recurrent.layers import RecurrentLayers
from sparsekern.nn.symbolic import one_node
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block

__all__ = [
    "RECURRENT",
    "SparseGRU",
    "SparseGRUCell",
    "SparseLSTM",
    "SparseLSTMCell",
    "SparseRNN",
    "SparseRNNCell",
    "SparseRecurrent",
]


class SparseGRU(RecurrentLayers):
    """A GRU, as `torch.nn.GRU`, with weights that are sparse in memory.

    Each weight matrix is a submodule, a `SparseLinear` with its own bias: `ih_l0` (3 H, inputs) and
    `hh_l0` (3 H, H) in the first layer, `ih_l1` and so on, `ih_l0_reverse` in the other direction.
    The inputs' product runs once for all time steps; a step takes one product with `hh`, whose
    weight gradient is one product over all steps again. Each costs 2 nnz FLOPs a token. Memory
    besides the weights is in proportion to tokens H. The layer calls the products of `hh` itself,
    so forward hooks of that submodule don't run, and it can be differentiated once only.

    Args:
        input_size: features of the input.
        hidden_size: features of the state, H.
        num_layers: layers, each fed by the one before.
        bias: whether both products add a bias, which is dense.
        batch_first: sequences come as (batch, time, features), not (time, batch, features).
        dropout: probability, in [0, 1], of dropping an output between layers.
        bidirectional: run over time in both directions, and concatenate.
        sparsity: share of the weights that do not exist, in [0, 1); one number, or one for each
            matrix by name, where None leaves a matrix dense. Exact to within one block a matrix.
        block: edge or pair (outputs, inputs) of the blocks; 1 is unstructured (CSR).
        impl: None chooses by device, see `sparsekern.ops.resolve`; "masked" is the reference.
        topologies: connections to start from, for each matrix by name; overrides sparsity and
            block.
        generator: of random topologies and values; torch's default one if None.
        device: where parameters and index arrays live.
        dtype: of the parameters.

    Raises:
        ConfigError, ShapeError, DtypeError: an argument is out of its domain, or the block is
            larger than a matrix.
    """

    dense_type = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "gru", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        )
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @one_node
    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Outputs and final state, as `torch.nn.GRU` gives them.

        Args:
            input: (T, B, input_size), (B, T, input_size) if batch_first, (T, input_size), or a
                PackedSequence.
            hx: (layers directions, B, H), without B if the input has none; zeros if None.

        Returns:
            The last layer's h at every token, in the layout of the input, and h_n, like `hx`.
        """
        y, (h,) = self._run(input, hx)
        return y, h


class SparseRNN(RecurrentLayers):
    """A plain RNN, as `torch.nn.RNN`, with weights that are sparse in memory.

    `nonlinearity` is "tanh" or "relu", in torch's place before `bias`; the other arguments are
    those of `SparseGRU`, with matrices of H rows.
    """

    dense_type = nn.RNN
    arguments = (*RecurrentLayers.arguments, "nonlinearity")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
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
        super().__init__(
            nonlinearity,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
        )
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @property
    def nonlinearity(self) -> str:
        """Either "tanh" or "relu"."""
        return self.kind

    @one_node
    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Outputs and final state, as in `SparseGRU.forward`."""
        y, (h,) = self._run(input, hx)
        return y, h


class SparseLSTM(RecurrentLayers):
    """An LSTM, as `torch.nn.LSTM`, with weights that are sparse in memory.

    With `proj_size`, h is a projection of that size, by the matrix `hr_l0` (proj_size, H). The
    other arguments are those of `SparseGRU`, with matrices of 4 H rows.
    """

    dense_type = nn.LSTM
    arguments = (*RecurrentLayers.arguments, "proj_size")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
        )
        self._build(sparsity, block, impl, topologies, generator, device, dtype)

    @one_node
    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Outputs and final (h, c), as in `SparseGRU.forward`; `hx` is a pair too."""
        y, (h, c) = self._run(input, hx)
        return y, (h, c)


RECURRENT: dict[type[nn.Module], type[SparseRecurrent]] = {
    made.dense_type: made
    for made in (SparseGRU, SparseLSTM, SparseRNN, SparseGRUCell, SparseLSTMCell, SparseRNNCell)
}
"""The sparse module for each torch module."""
