"""Which connections exist: the value object, how a matrix is cut into blocks, and random draws."""

from sparsekern.topology.topology import ARRAY_NAMES, DERIVED_NAMES, STORED_NAMES, Topology

__all__ = ["ARRAY_NAMES", "DERIVED_NAMES", "STORED_NAMES", "Topology"]
