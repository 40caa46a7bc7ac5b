"""The parts of a run in order of worth, what each may take at first, and what it depends on."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from benchmarks.gpu.agenda import Case, Part
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import DRY, FULL, Plan
from benchmarks.gpu.correctness import Gate
from benchmarks.gpu.store import Store

CHECKS = ("shipped", "others", "layers")
LINEAR = (
    *("kernels/launch.py", "kernels/plans.py", "kernels/tables.py", "kernels/bsr_spmm.py"),
    *("kernels/bsr_sddmm.py", "sparsekern/ops/triton.py", "sparsekern/ops/library.py"),
    *("sparsekern/ops/direct.py", "sparsekern/tuning/trial.py", "sparsekern/cost/timing.py"),
    *("benchmarks/gpu/bench.py", "benchmarks/gpu/cases.py", "benchmarks/gpu/speed.py"),
    "benchmarks/gpu/correctness.py",
)
UNSTRUCTURED = (*LINEAR, "kernels/csr_spmm.py", "kernels/csr_sddmm.py")
GROW = ("kernels/bsr_grow.py", "sparsekern/ops/grow.py")
CONV = (
    *("kernels/*conv2d*.py", "kernels/launch.py", "kernels/pixels.py", "kernels/plans.py"),
    *("kernels/tables.py", "kernels/window.py", "sparsekern/ops/conv*.py"),
    *("sparsekern/cost/timing.py", "benchmarks/gpu/bench.py"),
)
LAYER = (*LINEAR, "sparsekern/nn/linear.py", "sparsekern/nn/base.py")
RESIDENT = ("kernels/*resident*.py", "kernels/optional.py")
GLUON = (*RESIDENT, "kernels/*persistent*.py", "kernels/dealing.py")
SPMM = ("spmm", "sddmm/")


def _own(module: str) -> str:
    return f"benchmarks/gpu/{module}.py"


def _of(module: str, name: str) -> Callable[[Plan, torch.device], list[Case]]:
    """The cases that a module makes, which may need triton: the other parts do without it."""

    def cases(plan: Plan, device: torch.device) -> list[Case]:
        made: list[Case] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(
            plan, device
        )
        return made

    return cases


PARTS = {
    "shipped": Part(_of("correctness", "shipped"), 45, (*LINEAR, *GROW), (*SPMM, "grow/"), 8),
    "headline": Part(_of("headline", "headline"), 80, (*LINEAR, _own("headline")), SPMM),
    "steps": Part(_of("steps", "steps"), 55, (*LAYER, _own("steps")), SPMM),
    "layers": Part(_of("layers", "layers"), 12, (*LAYER, _own("layers")), SPMM),
    "variants": Part(
        _of("variants", "variants"), 55, (*LINEAR, *GLUON, _own("variants")), (*SPMM, "grow/")
    ),
    "conv": Part(_of("conv", "conv"), 45, (*CONV, _own("conv")), ("conv2d", "csr_conv2d")),
    "others": Part(
        _of("correctness", "others"), 40, (*UNSTRUCTURED, *GROW), (*SPMM, "csr_", "grow/"), 8
    ),
    "bsr": Part(_of("speed", "bsr"), 55, LINEAR, SPMM),
    "resident": Part(_of("resident", "resident"), 35, (*LINEAR, *RESIDENT, _own("resident")), SPMM),
    "update": Part(_of("update", "update"), 28, (*LAYER, *GROW, _own("update")), (*SPMM, "grow/")),
    "dense": Part(_of("speed", "dense"), 6, LINEAR),
    "probe": Part(_of("probe", "probe"), 7, (*LINEAR, _own("probe")), SPMM),
    "peers": Part(_of("peers", "peers"), 25, (*LINEAR, _own("peers")), SPMM),
    "csr": Part(_of("speed", "csr"), 12, UNSTRUCTURED, ("csr_",)),
}
"""Together less than what one run has: estimates, with kernels compiled before."""


def every_case(*, dry: bool) -> dict[str, Case]:
    """All cases by name."""
    device = default_device(dry=dry)
    plan = DRY if dry else FULL
    return {case.name: case for part in PARTS.values() for case in part.cases(plan, device)}


def bench_for(store: Store, until: float, *, dry: bool) -> Bench:
    """Surroundings of a case, with what is known to be right by now."""
    return Bench(DRY if dry else FULL, default_device(dry=dry), gate_of(store), until)


def gate_of(store: Store) -> Gate:
    """What the checks found, those included that did not come to their end."""
    return Gate(row for row in store.rows(*CHECKS) if "kernel" in row)


def default_device(*, dry: bool) -> torch.device:
    """The first GPU, or the CPU in a dry run."""
    return torch.device("cpu") if dry else torch.device("cuda", 0)
