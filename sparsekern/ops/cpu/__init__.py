"""The products on a CPU: which implementation runs, and those that torch alone can do."""

from sparsekern.ops.cpu import threads  # with the package: it must see every fork

__all__ = ["threads"]
