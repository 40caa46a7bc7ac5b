"""Host time of the GPU path, without a GPU: Triton's launcher over the tests' stand-in driver.

    python -m benchmarks.launch_time        writes benchmarks/results/cpu/launch_time.json

CPU tensors stand for CUDA tensors, and the driver does nothing, so what is timed is what the CPU
does for a call: the launcher alone, the operator, a layer forward, forward and backward. CPU time
of the process, the least of many bursts: other processes then make little difference. A real
driver's own share, some microseconds a launch, is not in it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.result_files import save

DTYPE = torch.bfloat16
TESTS = Path(__file__).parent.parent / "tests"


class Case(NamedTuple):
    """A layer, small enough that a GPU would wait for its host."""

    name: str
    block: int


CASES = (Case("tensor descriptors, block 64", 64), Case("pointers, block 16", 16))
SIZE, TOKENS = 512, 64


def microseconds(step: Callable[[], object], burst: int, rounds: int) -> float:
    """CPU time of a call: the least of `rounds` bursts."""
    for _ in range(20):
        step()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(burst):
            step()
        found.append((time.process_time() - start) / burst * 1e6)
    return round(min(found), 2)


def steps(case: Case) -> dict[str, Callable[[], object]]:
    """Calls of one layer by name, the cheapest first."""
    from sparsekern import SparseLinear, ops  # noqa: PLC0415  after the stand-in driver
    from sparsekern.ops import triton as backend  # noqa: PLC0415

    layer = SparseLinear(SIZE, SIZE, block=case.block, sparsity=0.9, dtype=DTYPE, impl="triton")
    t, values = layer.topology, layer.values.detach()
    x, dy = torch.zeros(TOKENS, SIZE, dtype=DTYPE), torch.zeros(TOKENS, SIZE, dtype=DTYPE)
    grown = x.clone().requires_grad_()

    def inference() -> Tensor:
        with torch.no_grad():
            y: Tensor = layer(x)
        return y

    return {
        "launcher spmm": lambda: backend.spmm(x, values, t, None),
        "launcher spmm_t": lambda: backend.spmm_t(dy, values, t),
        "launcher sddmm": lambda: backend.sddmm(dy, x, t),
        "ops.spmm": lambda: ops.spmm(x, values, t, impl="triton"),
        "layer forward, no gradient": inference,
        "layer forward": lambda: layer(grown),
        "layer forward + backward": lambda: torch.autograd.backward(layer(grown), dy),
    }


def yardsticks() -> dict[str, Callable[[], object]]:
    """What torch itself takes on this machine."""
    dense, x = nn.Linear(8, 8), torch.zeros(8, 8, requires_grad=True)
    dy = torch.zeros(8, 8)
    return {
        "nn.Linear(8, 8) forward": lambda: dense(x),
        "nn.Linear(8, 8) forward + backward": lambda: torch.autograd.backward(dense(x), dy),
    }


def measured(burst: int, rounds: int, *, planned: bool) -> dict[str, Any]:
    """Microseconds of every call of every case."""
    from sparsekern.kernels import plans  # noqa: PLC0415  after the stand-in driver

    found: dict[str, Any] = {}
    with mock.patch.object(plans, "_KNOWN", plans._KNOWN if planned else None):
        plans.clear()
        for case in CASES:
            found[case.name] = {
                name: microseconds(step, burst, rounds) for name, step in steps(case).items()
            }
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--burst", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--name", default="launch_time", help="of the file of results")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(TESTS))
    importlib.import_module("launch.standin")
    import triton  # noqa: PLC0415  after the stand-in driver

    from sparsekern.ops import dispatch  # noqa: PLC0415

    torch.set_num_threads(1)
    size = args.burst, args.rounds
    # the stand-in takes CPU tensors for its own
    with mock.patch.object(dispatch, "_check_triton"):
        results = {
            "microseconds": measured(*size, planned=True),
            "without plans": measured(*size, planned=False),
        }
    results["torch"] = {name: microseconds(step, *size) for name, step in yardsticks().items()}
    print(save(args.name, {"triton": triton.__version__, **results}))
    for kind, found in results.items():
        print(kind, *(f"  {name}: {value}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    main()
