"""Static: the random topology of the start is kept."""

from __future__ import annotations

from sparsekern.methods.base import Method


class Static(Method):
    """Train with a fixed topology; takes `Method`'s arguments so that methods can be swapped."""

    @property
    def due(self) -> bool:
        """Never."""
        return False
