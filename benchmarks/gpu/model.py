"""Speeds that a fluid model expects of the GPU kernels, before anyone has measured them.

    python -m benchmarks.gpu.model                         tables for an H200
    python -m benchmarks.gpu.model --device "NVIDIA H100 80GB HBM3"

Every figure is modelled: a range between two settings (`model_fluid.OPTIMISTIC`, `PESSIMISTIC`),
whose constants nobody has measured here. It is good for comparing two ways of doing a thing.

How to ask what if:

    from dataclasses import replace
    from benchmarks.gpu.model import Held, Kernel, Persistent, answer, conv, linear, shipped

    case = shipped("forward", 64)               # what the launch table starts today
    print(answer(case))                         # us, share of the ceiling, x dense, bound
    answer(shipped("dx", 16, linear(16, density=0.05, tokens=4096)), H100)
    answer(replace(case, tile=case.tile._replace(BM=256), kernel=Kernel(8, 154, 122904, 104)))
    answer(replace(case, kernel=case.kernel._replace(instructions=80, serial=False)))
    answer(replace(case, slots=2))              # programs an SM, whatever would fit
    answer(replace(case, persistent=Persistent(start=0.2, finish=1.0)))
    dw = shipped("dw", 64)
    answer(replace(dw, parts=1))                # no second pass
    answer(replace(dw, tile=dw.tile._replace(group=8, tail="exact"), kernel=Kernel(...)))
    kernel = Kernel(16, 128, 200_000, 40, barriers=0.25, depth=32)  # x held in shared memory
    answer(replace(shipped("forward", 16), held=Held(sharers=8, ahead=True), kernel=kernel))

`Kernel` is what compiled code uses: warps, registers, shared bytes, a warp's instructions a step,
barriers, whether `wgmma` is serialised, depth. Of a kernel of your own take the loop from
`model_figures.loops(sass)`. A step is BK of the sum (forward, dX), BM tokens (dW), a block of each
walker (held; depth is then that of its ring in blocks). What no builder knows is asked with
`answer_of(launch, product, problem)` and programs of your own (`model_fluid.Program`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.gpu.model_cases import CONV, LINEAR, Case, conv, linear, shipped
from benchmarks.gpu.model_fluid import KERNEL_GAP, SETTINGS, Launch, Persistent, Setting, simulate
from benchmarks.gpu.model_launch import Held, Kernel, Tile
from sparsekern.cost.roofline import DEVICES, H100, H200, Device, Problem, Roofline, device_named

__all__ = [
    "H100", "H200", "Answer", "Case", "Held", "Kernel", "Persistent", "Tile",
    "answer", "answer_of", "conv", "linear", "shipped", "table",
]  # fmt: skip

BLOCKS = (128, 64, 32, 16)
CUDNN = 650 / 790  # of a cube's rate, that a dense convolution reaches; assumed


class Answer(NamedTuple):
    """What the model expects; pairs are (optimistic, pessimistic).

    Attributes:
        us: microseconds, with the second pass of dW.
        ceiling: share of the roofline's rate that is reached.
        dense: times a dense product.
        bound: what holds the SMs up longest.
        share: of the SMs' time by what holds them up.
        used: share of each resource that is used.
        slots: programs an SM.
        programs: in the grid.
        waves: of programs.
        gigabytes: from L2.
    """

    us: tuple[float, float]
    ceiling: tuple[float, float]
    dense: tuple[float, float]
    bound: tuple[str, str]
    share: tuple[dict[str, float], dict[str, float]]
    used: tuple[dict[str, float], dict[str, float]]
    slots: int
    programs: int
    waves: float
    gigabytes: float

    def __str__(self) -> str:
        (fast, slow), bounds = self.us, " / ".join(dict.fromkeys(self.bound))
        return (
            f"{fast:4.0f}-{slow:4.0f} us, "
            f"{100 * self.ceiling[1]:2.0f}-{100 * self.ceiling[0]:2.0f} % of the ceiling, "
            f"{self.dense[1]:4.2f}-{self.dense[0]:4.2f}x dense, {bounds}; "
            f"{self.programs} programs, {self.slots} an SM, {self.waves:.1f} waves, "
            f"{self.gigabytes:.2f} GB from L2"
        )


def answer(case: Case, device: Device = H200) -> Answer:
    """What the model expects of a case."""
    return answer_of(case.launch(), case.product, case.problem, device, case.parts, case.passes)


def answer_of(
    launch: Launch,
    product: str,
    problem: Problem,
    device: Device = H200,
    parts: int = 1,
    passes: int = 1,
) -> Answer:
    """The same for programs of one's own."""
    roofline = Roofline(device)
    ceiling, dense = roofline.predict(product, problem).seconds, dense_seconds(problem, device)
    found = [simulate(launch, device, setting) for setting in SETTINGS]
    fast, slow = (
        outcome.seconds + second_pass(problem, parts, passes, setting)
        for outcome, setting in zip(found, SETTINGS, strict=True)
    )
    loops = [loop for program in launch.programs for loop in program.loops]
    return Answer(
        (1e6 * fast, 1e6 * slow),
        (ceiling / fast, ceiling / slow),
        (dense / fast, dense / slow),
        (found[0].bound, found[1].bound),
        (found[0].share, found[1].share),
        (found[0].used, found[1].used),
        launch.slots,
        len(launch.programs),
        len(launch.programs) / launch.slots / device.processors,
        sum(n * load.size for n, step in loops for load in step.loads) / 1e9,
    )


def dense_seconds(problem: Problem, device: Device) -> float:
    """Of one dense product: cuBLAS, or cuDNN for a convolution."""
    return Roofline(device).dense(problem).seconds / (1 if problem.read is None else CUDNN)


def second_pass(problem: Problem, parts: int, passes: int, setting: Setting) -> float:
    """Seconds of the kernels that add up `parts` of dW: a sum, and its cast if that is apart."""
    if parts == 1:
        return 0.0
    stored = problem.K * problem.N * problem.density
    written = 2 if passes == 1 else 4 + 4 + 2
    return (4 * parts + written) * stored / setting.elementwise + passes * KERNEL_GAP


def table(device: Device = H200, blocks: Sequence[int] = BLOCKS) -> list[str]:
    """Lines of the table: every shipped product."""
    lines = [f"modelled, nothing measured: {device.name}, bf16, density 0.1"]
    for operation in (*LINEAR, *CONV):
        for block in blocks:
            case = shipped(operation, block)
            parts = f"{case.parts} parts" if case.parts > 1 else ""
            lines.append(f"{operation:13}{block:4} {parts:9} {answer(case, device)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [device.name for device in DEVICES]
    parser.add_argument("--device", choices=names, default=H200.name)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, choices=BLOCKS)
    given = parser.parse_args(arguments)
    print("\n".join(table(device_named(given.device) or H200, given.blocks)))


if __name__ == "__main__":
    main()
