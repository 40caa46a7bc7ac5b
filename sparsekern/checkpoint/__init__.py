"""Whole training states in one file: `save` and `load`."""

from sparsekern.checkpoint.layers import SavedLayer
from sparsekern.checkpoint.loading import load
from sparsekern.checkpoint.saving import save

__all__ = ["SavedLayer", "load", "save"]
