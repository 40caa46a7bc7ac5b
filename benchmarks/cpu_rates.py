"""The rates of `sparsekern.cost.cpu_rates`, fitted to what was measured.

    python -m benchmarks.cpu_rates [--results benchmarks/results/cpu/suite.json]

A step's forward and backward take a fixed time, a time for each FLOP and one for each number that
goes in or comes out. The latter two are fitted to the results of `benchmarks.suite`, by least
squares of logarithms. The machine's speed drifts between the cases but not within a pair, so a
ratio of dense to sparse time counts ten times as much as a time. Prints the table to put there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.comparing.results import Results, Row, read
from benchmarks.result_files import RESULTS
from sparsekern.cost.cpu_rates import FIXED, kind_of, stored_seconds
from sparsekern.errors import DataError

GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
SECONDS_WEIGHT = 0.1  # of a time, where a ratio has 1
THREADS = 2  # that the results must have
GUESS = 1e-11, 1e-9  # seconds per FLOP, per number


class Case(NamedTuple):
    """A measured pair: sizes of the dense layer, and its seconds times threads."""

    layer: str
    block: int
    density: float
    flops: float
    dense: float
    ratio: float
    kind: str
    numbers: float
    weights: int
    steps: int = 0


def cases(results: Results) -> list[Case]:
    """All training steps that were measured beside a dense layer.

    Raises:
        DataError: they were measured with another number of threads.
    """
    threads = results.environment.get("threads")
    if threads != THREADS:
        raise DataError(f"{results.path}: expected {THREADS} threads; got {threads}")
    return [
        Case(
            layer=row["name"],
            block=row["block"],
            density=row["active"],
            flops=row["dense_flops"],
            dense=THREADS * row["against"]["dense"]["seconds"],
            ratio=row["against"]["dense"]["ratio"],
            **_sizes(row),
        )
        for row in results.rows.values()
        if row.get("operation") == "step" and "ratio" in row.get("against", {}).get("dense", {})
    ]


def fit(kind: str, every: list[Case]) -> dict[str, Any]:
    """GFLOP/s and nanoseconds per number of one thread, dense and sparse by block."""
    own = [case for case in every if case.kind == kind]
    names = [1, *sorted({case.block for case in own} - {1})]
    # logarithms keep all of them positive: dense FLOP and number, sparse number, and by how much
    # a FLOP of each block takes longer than a dense one
    start = [*GUESS, GUESS[1], *(GUESS[0] for _ in names)]
    unknown = torch.tensor(start, dtype=torch.float64).log_().requires_grad_()
    solver = torch.optim.LBFGS([unknown], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        total = torch.stack([_error(unknown.exp(), names, case) for case in own]).sum()
        torch.autograd.backward(total)
        return total.detach()

    step: Any = solver.step  # torch has no types for it
    step(loss)
    dense_flop, dense_number, number, *more = unknown.detach().exp().tolist()
    flop = [dense_flop + extra for extra in more]
    return {
        "dense": (1e-9 / dense_flop, 1e9 * dense_number),
        "sparse": ({b: 1e-9 / f for b, f in zip(names, flop, strict=True)}, 1e9 * number),
        "spread": (float(loss()) / len(own)) ** 0.5,
    }


def _error(unknown: Tensor, names: list[int], case: Case) -> Tensor:
    fixed = FIXED[case.kind]
    known = THREADS * (fixed.dense(case.steps) + stored_seconds(case.weights))
    dense = known + unknown[0] * case.flops + unknown[1] * case.numbers
    flop = unknown[0] + unknown[3 + names.index(case.block)]
    stored = stored_seconds(case.weights * case.density, case.block)
    known = THREADS * (fixed.sparse(case.steps) + stored)
    sparse = known + flop * case.flops * case.density + unknown[2] * case.numbers
    ratio = (dense / sparse).log() - torch.tensor(case.ratio).log()
    seconds = dense.log() - torch.tensor(case.dense).log()
    return ratio.square() + SECONDS_WEIGHT * seconds.square()


def _linear(sizes: dict[str, int]) -> dict[str, Any]:
    outputs, inputs = sizes["outputs"], sizes["inputs"]
    numbers = sizes["tokens"] * (outputs + inputs)
    return {"kind": "linear", "numbers": numbers, "weights": outputs * inputs}


def _conv(sizes: dict[str, int]) -> dict[str, Any]:
    inputs, outputs, size = sizes["inputs"], sizes["outputs"], sizes["size"]
    taps, out = sizes["kernel"] ** 2, -(-size // sizes["stride"])
    numbers = sizes["images"] * (inputs * size**2 + outputs * out**2)
    return {"kind": kind_of(taps), "numbers": numbers, "weights": inputs * outputs * taps}


def _recurrent(sizes: dict[str, int], gates: int) -> dict[str, Any]:
    size, tokens = sizes["hidden"], sizes["steps"] * sizes["batch"]
    return {
        "kind": "recurrent",
        "numbers": tokens * 2 * size * (1 + gates),
        "weights": 2 * gates * size**2,
        "steps": sizes["steps"],
    }


def _sizes(row: Row) -> dict[str, Any]:
    """Kind, numbers, weights and time steps of a row's layer."""
    if row["family"] == "recurrent":
        return _recurrent(row["sizes"], GATES[row["name"]])
    return {"linear": _linear, "conv2d": _conv}[row["family"]](row["sizes"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu" / "suite.json")
    every = cases(read(parser.parse_args().results))
    for kind in FIXED:
        found = fit(kind, every)
        (dense, dense_number), (sparse, number) = found["dense"], found["sparse"]
        blocks = ", ".join(f"{block}: {rate:.3g}" for block, rate in sparse.items())
        middle = statistics.median(case.ratio for case in every if case.kind == kind)
        sys.stdout.write(
            f'"{kind}": Rates({dense:.3g}, {dense_number:.2g}, {{{blocks}}}, {number:.2g}),'
            f"  # typical error {found['spread']:.0%}, median ratio {middle:.1f}\n"
        )


if __name__ == "__main__":
    main()
