"""How good the choices of `sparsekern.plan` are, on shapes that its table was not made from.

    python -m benchmarks.planner [--shapes 10] [--plan-seconds 5] [--seconds 8]

Draws shapes of linear layers and convolutions, small ones among them, asks the planner once with
measuring and once without, and then measures every choice, dense and all blocks in turns. A choice
is good if its time is within 10 % of the best choice's, which is the number to reach in 9 of 10
shapes. float32, forward and backward.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

import sparsekern as sk
from benchmarks.result_files import save
from benchmarks.suite.layers import step
from sparsekern.cost.timing import paired_step_times, rounds_in
from sparsekern.topology.blocks import Block

BLOCKS: tuple[Block, ...] = (1, 16, 32, 64, 128)
DENSITIES = (0.1, 0.25)
WITHIN = 1.1
ASKED = 0.9
MOST_FLOPS = 4e9  # of a dense step, so that all choices can be measured often
LEAST_ROUNDS, MOST_ROUNDS = 9, 101


class Shape(NamedTuple):
    """A linear layer (kernel 0), or a convolution of square images."""

    batch: int
    inputs: int
    outputs: int
    size: int = 0
    kernel: int = 0
    stride: int = 1

    @property
    def flops(self) -> float:
        """Of a dense step (1 multiply-add = 2 FLOPs)."""
        pixels = (self.size // self.stride) ** 2 if self.kernel else 1
        return 6 * self.batch * self.inputs * self.outputs * pixels * max(1, self.kernel) ** 2

    def module(self) -> nn.Module:
        """The dense layer."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs)
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2)

    def x(self) -> torch.Tensor:
        """An input that wants its gradient."""
        sizes = (self.batch, self.inputs, *([self.size] * 2 if self.kernel else ()))
        return torch.randn(sizes, requires_grad=True)


def drawn(count: int, seed: int) -> list[tuple[Shape, float]]:
    """Held-out shapes, each with a density; linear layers and convolutions by turns."""
    source, found = random.Random(seed), dict[Shape, float]()
    while len(found) < count:
        shape = _conv(source) if len(found) % 2 else _linear(source)
        if shape.flops <= MOST_FLOPS and shape not in found:
            found[shape] = DENSITIES[len(found) // 2 % len(DENSITIES)]
    return list(found.items())


# widths and images that `benchmarks.suite` has no layer of


def _linear(source: random.Random) -> Shape:
    widths = (48, 96, 128, 192, 256, 384, 512, 768, 1280, 1536)
    return Shape(source.choice((16, 64, 256, 1024)), source.choice(widths), source.choice(widths))


def _conv(source: random.Random) -> Shape:
    channels = (16, 24, 48, 64, 96, 160, 256)
    return Shape(
        source.choice((4, 8, 32)),
        *(source.choice(channels), source.choice(channels)),
        source.choice((7, 10, 20, 28)),
        source.choice((1, 3, 5)),
        source.choice((1, 1, 2)),
    )


def exhaustive(shape: Shape, density: float, budget_s: float) -> dict[str, dict[str, float]]:
    """Step time and its ratio to dense, of dense and every block that fits."""
    dense, x = shape.module(), shape.x()
    dy = torch.randn_like(dense(x))
    layers = {"dense": dense}
    for block in BLOCKS:
        if isinstance(block, int) and block <= min(shape.inputs, shape.outputs):
            model = nn.Sequential(shape.module())
            sk.sparsify_(model, 1 - density, block=block, distribution="uniform", filter_fn=_every)
            layers[str(block)] = model[0]
    steps = {name: step(layer, x, dy).run for name, layer in layers.items()}
    for run in steps.values():
        run.call()
    once = sum(run.seconds() for run in steps.values())
    burst = max(1, round(0.005 * len(steps) / once))
    rounds = rounds_in(budget_s, once * burst, LEAST_ROUNDS, MOST_ROUNDS)
    calls = {name: run.call for name, run in steps.items()}
    times = paired_step_times(calls, "dense", device=x.device, rounds=rounds, burst=burst)
    return {name: asdict(time) for name, time in times.items()}


def _every(_module: nn.Module, _name: str) -> bool:
    return True


def choice(shape: Shape, density: float, **options: Any) -> str:
    """The planner's fastest choice for the shape as a model's only layer."""
    model = nn.Sequential(shape.module())
    plan = sk.plan(
        model,
        shape.x(),
        sparsity=1 - density,
        blocks=BLOCKS,
        distribution="uniform",
        filter_fn=_every,
        **options,
    )
    fastest = plan.rows[0].fastest
    return "dense" if fastest is None else str(fastest)


def judge(shape: Shape, density: float, plan_s: float, budget_s: float) -> dict[str, Any]:
    """One shape: both choices, and the times of all."""
    torch.manual_seed(0)
    measured = choice(shape, density, measure=True, seconds=plan_s)
    predicted = choice(shape, density)
    times = exhaustive(shape, density, budget_s)
    best = min(times, key=lambda name: times[name]["ratio"])

    def above(name: str) -> float:
        return times[name]["ratio"] / times[best]["ratio"]

    return {
        **shape._asdict(),
        "density": density,
        "best": best,
        "measured": measured,
        "measured_above_best": above(measured),
        "predicted": predicted,
        "predicted_above_best": above(predicted),
        "times": times,
    }


def main() -> None:
    """Judge all shapes, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", type=int, default=10)
    parser.add_argument("--plan-seconds", type=float, default=5.0, help="for the planner, a shape")
    parser.add_argument("--seconds", type=float, default=8.0, help="for all choices of a shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="save nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.stdout.write("batch   in  out size k/s density  best  measured above  predicted above\n")
    rows = []
    for shape, density in drawn(args.shapes, args.seed):
        row = judge(shape, density, args.plan_seconds, args.seconds)
        rows.append(row)
        sys.stdout.write(
            f"{shape.batch:>5} {shape.inputs:>4} {shape.outputs:>4} {shape.size:>4} "
            f"{shape.kernel}/{shape.stride} {density:>7} {row['best']:>5} {row['measured']:>9} "
            f"{row['measured_above_best']:>5.2f} {row['predicted']:>10} "
            f"{row['predicted_above_best']:>5.2f}\n"
        )
        sys.stdout.flush()
    good = {
        name: sum(row[f"{name}_above_best"] <= WITHIN for row in rows) / len(rows)
        for name in ("measured", "predicted")
    }
    sys.stdout.write(
        f"within {WITHIN - 1:.0%} of the best: {good['measured']:.0%} measured "
        f"(asked: {ASKED:.0%}), {good['predicted']:.0%} predicted\n"
    )
    if not args.dry:
        facts = {"seed": args.seed, "within": WITHIN, "asked": ASKED, "good": good}
        sys.stdout.write(f"saved {save('planner', facts | {'shapes': rows})}\n")


if __name__ == "__main__":
    main()
