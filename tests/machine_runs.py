"""Runs of the state machine from a seed, and the shortest that still goes wrong.

PYTHONPATH=.:tests python tests/machine_runs.py SEED [OPERATIONS]
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from machine import OPERATIONS, WEIGHTS, Interrupted, Machine, Operation
from machine_parts import Spec


class Outcome(NamedTuple):
    """Operations made, and what went wrong with the last of them."""

    made: int
    problem: BaseException | None


def drawn(seed: int, count: int) -> tuple[Spec, list[Operation]]:
    """What to train, and what to do with it."""
    g = random.Random(seed)
    spec = Spec.draw(g)
    while not spec.possible():
        spec = Spec.draw(g)
    names = g.choices(list(OPERATIONS), [WEIGHTS.get(n, 1) for n in OPERATIONS], k=count)
    return spec, [Operation(name, g.randrange(2**32)) for name in names]


def run(spec: Spec, seed: int, operations: list[Operation]) -> Outcome:
    """Make operations until one goes wrong."""
    made = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            machine = Machine(spec, seed, Path(folder))
            for operation in operations:
                made += 1
                machine.run(operation)
        except (Exception, Interrupted) as problem:
            return Outcome(made, problem)
    return Outcome(made, None)


def shrunk(spec: Spec, seed: int, operations: list[Operation]) -> list[Operation]:
    """Fewer operations that still go wrong."""
    left = operations[: run(spec, seed, operations).made]
    size = len(left) // 2
    while size:
        at = 0
        while at < len(left):
            fewer = left[:at] + left[at + size :]
            outcome = run(spec, seed, fewer)
            if outcome.problem is None:
                at += size
            else:
                left = fewer[: outcome.made]
        size //= 2
    return left


def violation(seed: int, count: int) -> tuple[int, str]:
    """Operations made with a seed, and what went wrong, told in full; empty if nothing did."""
    spec, operations = drawn(seed, count)
    outcome = run(spec, seed, operations)
    if outcome.problem is None:
        return outcome.made, ""
    fewer = shrunk(spec, seed, operations)
    last = run(spec, seed, fewer).problem
    what = f"{type(last).__name__}: {last}"
    return outcome.made, f"seed {seed}: {spec}\n  {[o.name for o in fewer]}\n  {what}"


if __name__ == "__main__":
    made, told = violation(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
    print(made, told or "no violation")
