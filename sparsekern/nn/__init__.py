"""Layers whose weights are sparse in memory."""

from sparsekern.nn.base import SparseLayer, WeightView
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

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseGRUCell",
    "SparseLSTM",
    "SparseLSTMCell",
    "SparseLayer",
    "SparseLinear",
    "SparseRNN",
    "SparseRNNCell",
    "SparseRecurrent",
    "WeightView",
]
