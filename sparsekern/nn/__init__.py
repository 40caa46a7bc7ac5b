"""Layers whose weights are sparse in memory."""

from sparsekern.nn.base import SparseLayer, WeightView
from sparsekern.nn.linear import SparseLinear

__all__ = ["SparseLayer", "SparseLinear", "WeightView"]
