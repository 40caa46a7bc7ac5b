"""Layers whose weights are sparse in memory."""

from sparsekern.nn.attention import SparseMultiheadAttention
from sparsekern.nn.base import SparseLayer
from sparsekern.nn.conv import SparseConv1d, SparseConv2d
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.recurrent import (
    SparseGRU,
    SparseGRUCell,
    SparseLSTM,
    SparseLSTMCell,
    SparseRecurrent,
    SparseRNN,
    SparseRNNCell,
)
from sparsekern.nn.transposed import SparseTransposedLinear
from sparsekern.nn.view import WeightView

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseGRUCell",
    "SparseLSTM",
    "SparseLSTMCell",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseRNN",
    "SparseRNNCell",
    "SparseRecurrent",
    "SparseTransposedLinear",
    "WeightView",
]
