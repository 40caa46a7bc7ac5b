"""How long a training step of a layer takes on a CPU, dense and sparse: a small table.

seconds = fixed cost + (FLOPs / rate + numbers in and out * cost of a number) / threads

The rates are fitted to layers of 16 to 4096 channels, measured with two threads of an AMD EPYC with
AVX2 (benchmarks/results/cpu/suite.json of commit d0025a7), by `python -m benchmarks.cpu_rates`,
with typical errors of 7 % (1x1 convolutions) to 18 % (recurrent). They hold for float32, with numba
installed. The fixed costs are those of tiny layers on the same machine. Another machine has another
speed, but much the same ratios.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "rates measured on an AMD EPYC with AVX2 (sparsekern/cost/cpu_rates.py)"


class Fixed(NamedTuple):
    """Seconds that a forward and backward take whatever the size: Python, and torch's calls.

    Attributes:
        dense_call: of a dense layer.
        sparse_call: of a sparse one.
        dense_step: more for each time step of a recurrent layer.
        sparse_step: the same, of a sparse one.
    """

    dense_call: float
    sparse_call: float
    dense_step: float = 0.0
    sparse_step: float = 0.0

    def dense(self, steps: int) -> float:
        """Seconds of a call over so many time steps."""
        return self.dense_call + steps * self.dense_step

    def sparse(self, steps: int) -> float:
        """Seconds of a call over so many time steps."""
        return self.sparse_call + steps * self.sparse_step


class Rates(NamedTuple):
    """What one thread does.

    Attributes:
        dense: GFLOP/s of a dense layer (1 multiply-add = 2 FLOPs).
        dense_number: nanoseconds for each number that goes in or comes out.
        sparse: GFLOP/s of the active weights, by block edge.
        sparse_number: as `dense_number`, whatever the block.
    """

    dense: float
    dense_number: float
    sparse: dict[int, float]
    sparse_number: float


WEIGHT_SECONDS = 1e-9
"""Of a stored float32 weight: read twice and its gradient written once, 12 bytes at 12 GB/s."""

FIXED = {
    "linear": Fixed(1.3e-4, 3.0e-4),
    "conv": Fixed(2.2e-4, 5.5e-4),
    "pointwise": Fixed(1.8e-4, 6.0e-4),
    "recurrent": Fixed(3.0e-4, 1.0e-3, 1.9e-4, 2.0e-4),
}
"""By kind of layer."""

RATES = {  # as printed by benchmarks.cpu_rates
    "linear": Rates(75.4, 5.8, {1: 22.3, 4: 22.4, 16: 37.5, 32: 51.6, 64: 65.3, 128: 75.4}, 3.3),
    "conv": Rates(67.9, 10, {1: 16.3, 16: 50, 32: 54.4}, 5.8),
    "pointwise": Rates(20, 1.8, {1: 7.76, 16: 20, 32: 20}, 3),
    "recurrent": Rates(207, 30, {1: 25.1, 16: 35, 32: 42.5}, 5.4),
}
"""By kind of layer; of another block, the rate of the largest that is no larger is taken."""


def kind_of(taps: int) -> str:
    """Kind of a convolution; 1x1 convolutions are bound by memory."""
    return "pointwise" if taps == 1 else "conv"


def stored_seconds(weights: float, block: int | None = None) -> float:
    """Seconds that reading and writing the weights themselves takes; of a block, with indices."""
    return weights * WEIGHT_SECONDS * (1 if block is None else 1 + 1 / block**2)


class Work(NamedTuple):
    """Forward and backward of one call.

    Attributes:
        flops: of all products, active ones if it is sparse.
        numbers: that go in or come out, each once.
        weights: that are stored.
        steps: of time, of a recurrent layer.
    """

    flops: float
    numbers: float
    weights: float
    steps: int = 0


def dense_seconds(kind: str, work: Work, threads: int) -> float:
    """Seconds of a dense layer."""
    rates = RATES[kind]
    shared = work.flops / rates.dense + work.numbers * rates.dense_number
    return FIXED[kind].dense(work.steps) + stored_seconds(work.weights) + 1e-9 * shared / threads


def sparse_seconds(kind: str, block: tuple[int, int], work: Work, threads: int) -> float:
    """Seconds of a sparse layer."""
    rates, edge = RATES[kind], min(block)
    rate = rates.sparse[max(known for known in rates.sparse if known <= edge)]
    shared = work.flops / rate + work.numbers * rates.sparse_number
    stored = stored_seconds(work.weights, edge)
    return FIXED[kind].sparse(work.steps) + stored + 1e-9 * shared / threads
