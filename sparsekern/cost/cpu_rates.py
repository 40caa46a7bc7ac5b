"""How long a training step of a layer takes on a CPU, dense and sparse: a small table.

seconds = fixed cost + (FLOPs / rate + numbers in and out * cost of a number) / threads

The rates are fitted to layers of 16 to 4096 channels, measured with two threads of an Intel Xeon at
2.5 to 2.8 GHz with AVX-512 (speed.json, conv_speed.json and recurrent_speed.json as of commit
ddb53b6), by `python -m benchmarks.cpu_rates`, with typical errors of 7 % (linear) to 22 %
(recurrent). They hold for float32, with numba installed. The fixed costs are those of tiny layers
on the same machine. Another machine has another speed, but much the same ratios.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "rates measured on an Intel Xeon at 2.5 to 2.8 GHz (sparsekern/cost/cpu_rates.py)"


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
    "linear": Fixed(0.8e-4, 4.0e-4),
    "conv": Fixed(1.2e-4, 7.5e-4),
    "pointwise": Fixed(0.9e-4, 7.5e-4),
    "recurrent": Fixed(1.8e-4, 1.1e-3, 1.1e-4, 1.35e-4),
}
"""By kind of layer."""

RATES = {  # as printed by benchmarks.cpu_rates
    "linear": Rates(105, 5.1, {1: 20.5, 4: 28.4, 16: 46, 32: 73.3, 64: 102, 128: 105}, 7.2),
    "conv": Rates(88.6, 7.4, {1: 29.1, 16: 72, 32: 64.6, 64: 72.4}, 5.5),
    "pointwise": Rates(32, 4.2, {1: 18.3, 16: 23.1, 32: 32, 64: 28.2}, 3.7),
    "recurrent": Rates(124, 26, {1: 13.2, 16: 22.8, 32: 29.7}, 17),
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
