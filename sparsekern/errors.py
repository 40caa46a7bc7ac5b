"""Every error the library raises on purpose.

Each class is a `SparseKernError` and also the built-in error that a caller would expect, so
`except ValueError` works too. The text says what was expected and what came.
"""


class SparseKernError(Exception):
    """Base of all errors raised by sparsekern."""


class ConfigError(SparseKernError, ValueError):
    """An argument has a value outside its domain."""


class ShapeError(SparseKernError, ValueError):
    """A tensor or a block has the wrong shape."""


class DtypeError(SparseKernError, TypeError):
    """A tensor or an argument has the wrong type."""


class DeviceError(SparseKernError, RuntimeError):
    """Tensors live on different devices, or on one that an implementation can't use."""


class TopologyError(SparseKernError, ValueError):
    """Index arrays do not describe a valid topology."""


class UnavailableError(SparseKernError, RuntimeError):
    """A named implementation or an optional package can't be used here."""


class IncompleteError(SparseKernError, RuntimeError):
    """Part of a computation was not run, so that there is no result."""


class WeightError(SparseKernError, AttributeError):
    """What was asked of a sparse layer's `weight` needs the dense matrix, which is not stored."""


class OptimizerError(SparseKernError, ValueError):
    """An optimizer does not hold a layer's values, or its state can't follow a topology update."""


class TrainingLoopError(SparseKernError, RuntimeError):
    """A training loop did not do what a method was told it would."""


class RankMismatchError(SparseKernError, RuntimeError):
    """Ranks of a distributed job disagree about a topology."""


class DataError(SparseKernError, ValueError):
    """A data file or folder is missing or damaged."""


class CheckpointError(SparseKernError, ValueError):
    """A checkpoint is damaged or does not fit, or something can't be written to one."""


class ModelError(SparseKernError, RuntimeError):
    """A model fails on the inputs it was given."""


class MeasurementError(SparseKernError, RuntimeError):
    """A layer fails while its time is measured.

    Attributes:
        plan: the `sparsekern.Plan` made from what had been measured before.
    """

    def __init__(self, message: str, plan: object = None) -> None:
        super().__init__(message)
        self.plan = plan


def told(error: BaseException) -> str:
    """An exception on one line: its type and its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
