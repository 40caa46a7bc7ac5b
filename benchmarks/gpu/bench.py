"""What every part is handed: device, clock, plan, and the gate that withholds numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.agenda import Row
from benchmarks.gpu.cases import Plan
from benchmarks.gpu.correctness import Gate, is_exact
from sparsekern.cost.roofline import OPERATIONS, Prediction, Problem, Roofline, Total, device_named
from sparsekern.cost.timing import WARM_UPS, Clock, Run, Timing, clock_of, rounds_in, take_turns
from sparsekern.errors import told
from sparsekern.tuning.trial import Block, Operands, Shape, operands, random_topology

CASE_SECONDS = 1.0  # a slow case takes fewer rounds
FEWEST_ROUNDS = 3


@dataclass
class Bench:
    """One part's surroundings.

    Attributes:
        gate: what the correctness part found.
        deadline: on the monotonic clock; a part starts no case after it.
    """

    plan: Plan
    device: torch.device
    gate: Gate
    deadline: float = float("inf")
    clock: Clock = field(init=False)
    roofline: Roofline | None = field(init=False)

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self.clock = clock_of(self.device)
        known = device_named(torch.cuda.get_device_name(self.device)) if cuda else None
        self.roofline = Roofline(known) if known else None

    @property
    def late(self) -> bool:
        """Whether the time of this part is up."""
        return time.monotonic() >= self.deadline

    def times(self, count: int) -> int:
        """How often to repeat what a plan that measures repeats so often."""
        return count if self.plan.rounds > 1 else 1

    def time(self, runs: Mapping[str, Run]) -> Timing:
        """Time all `runs` in turns; slow ones get fewer rounds."""
        if self.plan.rounds == 1:
            return take_turns(self.clock.once, runs, 1)
        for run in runs.values():
            for _ in range(WARM_UPS):
                run()
        each = sum(self.clock.once(run) for run in runs.values())
        most = self.plan.rounds
        rounds = rounds_in(CASE_SECONDS, each, min(FEWEST_ROUNDS, most), most)
        return take_turns(self.clock.once, runs, rounds, warm_up=0)

    def generator(self, seed: int = 0) -> torch.Generator:
        """A seeded generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def shape_for(self, block: Block) -> Shape:
        """The first shape that a block is timed at."""
        return self.plan.csr_shape if block == (1, 1) else self.plan.shapes[0]

    def operands(self, shape: Shape, block: Block, density: float, kind: str) -> Operands:
        """Random operands of one case."""
        topology = random_topology(shape, block, density, self.device)
        return operands(shape, topology, kind, density, self.generator())

    def verdicts(self, o: Operands, impl: str = "triton") -> dict[str, str]:
        """By operation and for "three": "ok", or why there is no number.

        Besides the gate, the very case to be timed must be exact on integers.
        """
        integers = o.with_integers(self.generator(1))
        found = {}
        for operation in OPERATIONS:
            gate = self.gate.verdict(operation, o.topology.block, o.kind)
            found[operation] = gate if impl == "triton" else "ok"
            if found[operation] == "ok":
                try:
                    wrong = is_exact(operation, integers, impl)
                except Exception as error:  # reported, and the next case goes on
                    found[operation] = f"failed: {told(error)[:300]}"
                else:
                    found[operation] = "incorrect" if wrong else "ok"
        broken = [verdict for verdict in found.values() if verdict != "ok"]
        return found | {"three": broken[0] if broken else "ok"}

    def against_dense(self, timing: Timing, operation: str, problem: Problem) -> Row:
        """Times of "sparse" and "dense", and what the roofline model would allow, if it can say."""
        ms, ratios = timing.ms("sparse"), timing.ratios("dense", "sparse")
        flops = problem.flops * (len(OPERATIONS) if operation == "three" else 1)
        row: Row = {"ms": ms, "dense_ms": timing.ms("dense"), "ratio": statistics.median(ratios)}
        row |= {"ratio_low": ratios[0], "ratio_high": ratios[-1], "rounds": len(ratios)}
        row["tflops"] = flops / ms / 1e9
        ceiling = self.ceiling(operation, problem)
        if ceiling is None:
            return row
        row |= {"ceiling_ms": 1e3 * ceiling.seconds, "ceiling_tflops": ceiling.tflops}
        row |= {"ceiling_bound": ceiling.bound}
        return row | {"percent_of_ceiling": 1e5 * ceiling.seconds / ms}

    def ceiling(self, operation: str, problem: Problem) -> Prediction | Total | None:
        """The model's least time, if it knows the device."""
        if self.roofline is None:
            return None
        if operation == "three":
            return self.roofline.together(problem)
        return self.roofline.predict(operation, problem)


def describe(o: Operands) -> Row:
    """The columns that name a case."""
    return o.shape._asdict() | {
        "block": list(o.topology.block),
        "kind": o.kind,
        "density": o.asked,
        "nnzb": o.topology.nnzb,
    }
