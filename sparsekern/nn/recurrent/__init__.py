"""Recurrent layers and cells: a scan over time, and what its cells compute."""

from sparsekern.nn.recurrent.base import SparseRecurrent
from sparsekern.nn.recurrent.cells import SparseGRUCell, SparseLSTMCell, SparseRNNCell
from sparsekern.nn.recurrent.modules import RECURRENT, SparseGRU, SparseLSTM, SparseRNN

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
