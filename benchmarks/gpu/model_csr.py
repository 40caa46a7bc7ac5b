"""Unstructured weights in the fluid model: CUDA cores, and the density where dense is as fast.

    python -m benchmarks.gpu.model_csr       products at a few densities, and the crossings

`impl=None` takes its figures for unstructured linear layers from here
(`sparsekern/ops/crossover.py`): about the crossing of the forward product alone, under the
optimistic setting. The copies that the CSR launchers make of the activations move it further down,
as the second figure tells; a measured run replaces both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.gpu import model_figures
from benchmarks.gpu.model_cases import linear
from benchmarks.gpu.model_fluid import (
    KERNEL_GAP,
    OPTIMISTIC,
    SCHEDULERS,
    SETTINGS,
    Launch,
    Load,
    Program,
    Setting,
    Step,
    simulate,
)
from benchmarks.gpu.model_launch import ISSUE_GAP, WARP, Kernel, row_groups, topology
from sparsekern.cost.crossing import last_that_holds
from sparsekern.cost.roofline import ELEMENT_BYTES, H200, Device, Problem, Roofline
from sparsekern.kernels import tables

PRODUCTS = ("forward", "dx", "dw")
KINDS = {"half": "bf16", "tf32": "tf32", "ieee": "fp32"}
"""Kinds of operand of the launch tables, and what the roofline calls them."""

UNPACKING = 5  # kernels that make a dense weight of values: zeros, rows, columns, scatter, copy
PACKING = 3  # and those that take values from a dense gradient
LOWEST, HIGHEST = 1e-3, {"half": 0.03, "tf32": 0.03, "ieee": 0.2}  # of the search for a crossing
HALVINGS = 6
DENSITIES = (0.02, 0.01, 0.005)


class Products(NamedTuple):
    """Seconds of one layer's products."""

    forward: float
    dx: float
    dw: float


def csr(problem: Problem, setting: Setting, device: Device = H200) -> Products:
    """Forward, dX and dW of the CSR kernels, transposed copies of the activations included."""
    size = ELEMENT_BYTES[problem.kind]
    # x and y, or dy and x, are read and written once more: tokens side by side
    copied = 2 * size * problem.activations / setting.elementwise
    seconds = []
    for product in PRODUCTS:
        part, launch = _launch(product, problem)
        times = math.ceil(problem.M / part.M)
        one = simulate(launch, device, setting).seconds
        seconds.append(times * (one + 2 * KERNEL_GAP) + copied)
    return Products(*seconds)


def forward_alone(problem: Problem, setting: Setting, device: Device = H200) -> float:
    """Seconds of the forward product, without copies."""
    part, launch = _launch("forward", problem)
    return math.ceil(problem.M / part.M) * simulate(launch, device, setting).seconds


def issue_bound(key: str, device: Device = H200) -> float:
    """FLOP/s of a CSR kernel if nothing but issue slots held it up: its share of multiply-adds."""
    kernel = model_figures.kernel(key)
    lanes = device.processors * device.clock * SCHEDULERS * WARP
    return 2 * lanes * kernel.fma / kernel.instructions


def dense(problem: Problem, setting: Setting, device: Device = H200) -> Products:
    """The same from a dense weight that lives as long as the product."""
    size = ELEMENT_BYTES[problem.kind]
    product = Roofline(device).dense(problem).seconds
    weight = 2 * size * problem.K * problem.N / setting.elementwise + UNPACKING * KERNEL_GAP
    return Products(product + weight, product + weight, product + PACKING * KERNEL_GAP)


def crossing(kind: str, setting: Setting, device: Device = H200) -> tuple[float, float]:
    """Densities up to which CSR takes no longer than dense: forward alone, all three with copies.

    Args:
        kind: of operand, a key of `KINDS`.
        setting: assumptions.
        device: its rates.
    """

    def alone(density: float) -> bool:
        problem = unstructured(kind, density)
        return forward_alone(problem, setting, device) <= dense(problem, setting, device).forward

    def three(density: float) -> bool:
        problem = unstructured(kind, density)
        return sum(csr(problem, setting, device)) <= sum(dense(problem, setting, device))

    bounds = LOWEST, HIGHEST[kind], HALVINGS
    return last_that_holds(alone, *bounds), last_that_holds(three, *bounds)


def unstructured(kind: str, density: float) -> Problem:
    """The linear layer of the tables."""
    return replace(linear(1, density), kind=KINDS[kind])


def _launch(product: str, problem: Problem) -> tuple[Problem, Launch]:
    """What a launcher takes at once: the tokens, and the programs."""
    t = topology(problem)
    if product == "dw":
        part = _chunk(problem, problem.K + problem.N)
        return part, gradient_launch(part, t.crow.diff().tolist())
    part = _chunk(problem, max(problem.K, problem.N))
    if product == "forward":
        return part, product_launch(part, t.crow.diff()[t.row_order.long()].tolist(), "csr_spmm")
    return part, product_launch(part, t.ccol.diff()[t.col_order.long()].tolist(), "csr_spmm_t")


def product_launch(problem: Problem, lengths: Sequence[int], op: str) -> Launch:
    """Programs of BM tokens by BN rows, UNROLL entries of each row a step, longest rows first."""
    kernel, config = _entry(op, problem.kind)
    size = ELEMENT_BYTES[problem.kind]
    index = 8 if op == "csr_spmm_t" else 4  # its own, and its place in the values
    programs = []
    for first in range(0, len(lengths), config.BN):
        rows = lengths[first : first + config.BN]
        steps = math.ceil(max(rows) / config.UNROLL)
        live = sum(rows) / max(1, steps)  # masked lanes load nothing, and are issued
        loads = Load(live * config.BM * size, config.BM * size), Load(live * (index + size))
        programs.append(Program(((steps, _step(kernel, loads)),), len(rows) * config.BM * size))
    return Launch(programs * math.ceil(problem.M / config.BM), kernel.slots)


def gradient_launch(problem: Problem, lengths: Sequence[int]) -> Launch:
    """Programs of up to BN entries of one row, BM tokens a step; too many for a sum in parts."""
    kernel, config = _entry("csr_sddmm", problem.kind)
    size = ELEMENT_BYTES[problem.kind]
    made = {0: Program(())}
    for live in range(1, config.BN + 1):
        loads = (Load((1 + live) * config.BM * size, config.BM * size),)
        steps = math.ceil(problem.M / config.BM)
        made[live] = Program(((steps, _step(kernel, loads)),), 4 * live)
    return Launch([made[live] for live in row_groups(lengths, config.BN)], kernel.slots)


def _chunk(problem: Problem, width: int) -> Problem:
    """As many tokens as a launcher takes at once."""
    from sparsekern.kernels.launch import token_chunk  # noqa: PLC0415  needs triton

    return replace(problem, M=min(problem.M, token_chunk(width, 128)))


def _entry(op: str, kind: str) -> tuple[Kernel, tables.CsrConfig]:
    """Compiled figures and tile; fp32 is one kind to CUDA cores."""
    operand = "half" if ELEMENT_BYTES[kind] == 2 else "ieee"
    key = tables.Key(op, operand, "any", "any", "pointer")
    config: tables.CsrConfig = tables.table("sm90")[key]  # type: ignore[assignment]
    return model_figures.kernel(str(key)), config


def _step(kernel: Kernel, loads: tuple[Load, ...]) -> Step:
    return Step(
        loads,
        instructions=kernel.instructions * kernel.warps,
        latency=ISSUE_GAP * kernel.instructions,
        depth=kernel.depth,
    )


def lines(device: Device = H200) -> Iterator[str]:
    """What is printed."""
    yield f"modelled, nothing measured: {device.name}, unstructured, 8192 x 4096 x 4096"
    for kind, density in itertools.product(KINDS, DENSITIES):
        problem = unstructured(kind, density)
        best, worst = (csr(problem, setting, device) for setting in SETTINGS)
        least = dense(problem, OPTIMISTIC, device)
        cells = [
            f"{name} {1e6 * a:.0f}-{1e6 * b:.0f} us ({c / b:.2f}-{c / a:.2f}x dense)"
            for name, a, b, c in zip(PRODUCTS, best, worst, least, strict=True)
        ]
        yield f"{kind:5} density {density:<6} {', '.join(cells)}"
    for kind in KINDS:
        (alone, three), (slow_alone, slow_three) = (crossing(kind, s, device) for s in SETTINGS)
        yield (
            f"{kind:5} as fast as dense at a density of {slow_alone:.4f}-{alone:.4f} (forward "
            f"alone), {slow_three:.4f}-{three:.4f} (forward + dX + dW, copies included)"
        )
    for key in (k for k in model_figures.figures() if k.startswith("csr_")):
        yield f"{key}: issue slots allow {issue_bound(key, device) / 1e12:.1f} TFLOP/s"


if __name__ == "__main__":
    print("\n".join(lines()))
