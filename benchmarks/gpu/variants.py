"""Part `variants`: what each choice in a launch table is worth, one change at a time.

First the kernels that no shipped table asks for, behind entries of their own. Then forward by
pipeline depth, orientation, tile, order of the grid and kind of load; dW by the blocks that share a
tile of dY; the grow kernel against the dense gradient that it never stores. Each is timed in turns
with what the tables ask for now. A variant that is not exact on integers, or that the device has no
room for, gets no number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.cases import Plan
from benchmarks.gpu.correctness import KERNELS
from sparsekern.errors import told
from sparsekern.kernels import tables
from sparsekern.kernels.bsr_grow import bsr_grow
from sparsekern.kernels.launch import arch_class, rows_class
from sparsekern.kernels.tables import Key
from sparsekern.tuning.entries import is_read, launching
from sparsekern.tuning.trial import (
    Operands,
    Shape,
    block_norms,
    difference,
    expected,
    poisoned,
    precision,
    products,
)

KIND = "bf16"
FORWARD: Mapping[str, tuple[int, ...]] = {
    "num_stages": (2, 3, 4, 5),
    "SWAP": (False, True),
    "BM": (128, 256),
    "GROUP": (1, 4, 16),
}
GROUPS = (1, 2, 4, 8)
BEHIND_ENTRIES: Mapping[str, Mapping[str, int]] = {
    "persistent": {"num_stages": 8},
    "resident": {"RING_KB": 64},
}
"""Entries of kernels that no shipped table asks for, by the end of their operations' names."""
MOST_SUMS = 128  # fp32 accumulators of a thread; more would spill


class Trial(NamedTuple):
    """One entry of a launch table, to be tried in place of the one that is there."""

    name: str
    key: Key
    config: Any


def variants(plan: Plan, device: torch.device) -> list[Case]:
    """A case per trial, so that one that hangs costs itself."""
    arch, density = arch_class(device), 1.0 if plan.dry else plan.other_density
    shape, few = plan.variant_shape, plan.dry
    found = []
    for edge in plan.blocks:
        for operation in ("forward", "dx"):
            found += [(operation, edge, trial) for trial in _entries(operation, edge)]
    for edge in plan.variant_blocks:
        trials = _forward_trials(arch, shape, edge, density, few=few)
        found += [("forward", edge, trial) for trial in trials]
    for edge in plan.group_blocks:
        found += [("dw", edge, trial) for trial in _dw_trials(arch, edge, few=few)]
    cases = [
        Case(
            f"variant {operation} {edge} {trial.name}",
            partial(_row, operation=operation, edge=edge, trial=trial),
            1.5,
            {"what": f"{operation} {trial.name}", "block": [edge, edge], "operation": operation},
        )
        for operation, edge, trial in found
    ]
    return cases + [Case(f"grow {e}", partial(_grow, edge=e), 1.5) for e in plan.group_blocks]


def _operands(bench: Bench, edge: int) -> Operands:
    plan = bench.plan
    # a single block is all that a dry shape holds
    density = 1.0 if plan.dry else plan.other_density
    return bench.operands(plan.variant_shape, (edge, edge), density, KIND)


def _entries(operation: str, edge: int) -> list[Trial]:
    """Kernels that a launch table may ask for, and that no shipped one does."""
    names = {f"{KERNELS[operation]}_{name}": fields for name, fields in BEHIND_ENTRIES.items()}
    return [
        Trial(op.rpartition("_")[2], Key(op, "half", str(edge), "any", "tma"), made(**fields))
        for op, fields in names.items()
        if (made := tables.OPTIONAL.get(op)) is not None
    ]


def _forward_trials(
    arch: str, shape: Shape, edge: int, density: float, *, few: bool
) -> list[Trial]:
    """All that differ from the shipped entry by one field, then other entries."""
    rows = rows_class(round(density * shape.K / edge), 1, edge)
    base, tma = tables.find(arch, "spmm", "half", edge, rows, tma=True)
    key, trials = Key("spmm", "half", str(edge), rows, "tma" if tma else "pointer"), []
    for field, values in FORWARD.items():
        if field != "SWAP" or tma:  # the pointer kernel knows one orientation
            others = [value for value in values if value != getattr(base, field)]
            trials += [Trial(f"{field}={v}", key, base._replace(**{field: v})) for v in others]
    other = "long" if rows == "short" else "short"
    config = tables.find(arch, "spmm", "half", edge, other, tma=tma)[0]
    trials.append(Trial(f"as {other} rows", key, config))
    if tma:
        pointer = tables.find(arch, "spmm", "half", edge, rows, tma=False)[0]
        trials.append(Trial("pointer", key._replace(loads="pointer"), pointer))
    return [trials[0], trials[-1]] if few else trials


def _dw_trials(arch: str, edge: int, *, few: bool) -> list[Trial]:
    """The shipped entry with 1, 2, 4 and 8 blocks to a program."""
    base, tma = tables.find(arch, "sddmm", "half", edge, "any", tma=edge >= 64)
    key, trials = Key("sddmm", "half", str(edge), "any", "tma" if tma else "pointer"), []
    for G in GROUPS[:2] if few else GROUPS:
        warps = base.num_warps
        while edge * edge * G > MOST_SUMS * 32 * warps and warps < 8:
            warps *= 2
        config = base._replace(LANES=G * edge, num_warps=warps)
        if config != base:
            trials.append(Trial(f"G={G}", key, config))
    return trials


def _row(bench: Bench, operation: str, edge: int, trial: Trial) -> Iterator[Row]:
    """Check it, then time it in turns with the shipped entry; `ratio` is their time over its."""
    arch = arch_class(bench.device)
    with precision(KIND), torch.no_grad():
        o = _operands(bench, edge)
        integers = o.with_integers(bench.generator(1))
        want = expected(operation, integers).value
        check, run = products(integers, "triton")[operation], products(o, "triton")[operation]
        status, detail = _verdict(arch, trial, check, want)
        row: Row = {"what": f"{operation} {trial.name}", "operation": operation} | describe(o)
        row |= {"key": str(trial.key), "loads": trial.key.loads, "config": trial.config._asdict()}
        row |= {"status": status, "detail": detail, "ms": None, "shipped_ms": None, "ratio": None}
        if status == "ok":
            runs = {"trial": _with(arch, trial, run), "shipped": run}
            timing = bench.time(runs)
            ratios = timing.ratios("shipped", "trial")
            ms = timing.ms("trial")
            row |= {"ms": ms, "tflops": o.flops / ms / 1e9, "shipped_ms": timing.ms("shipped")}
            row |= {"ratio": statistics.median(ratios), "ratio_low": ratios[len(ratios) // 4]}
        yield row


def _with(arch: str, trial: Trial, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def launch() -> Tensor:
        with launching(arch, trial.key, trial.config):
            return run()

    return launch


def _verdict(arch: str, trial: Trial, check: Callable[[], Tensor], want: Tensor) -> tuple[str, str]:
    """Status, and what is wrong in detail."""
    if not is_read(arch, trial.key, check):
        return f"not run: the launch does not read {trial.key}", ""
    try:
        with poisoned():
            got = _with(arch, trial, check)()
        wrong = difference(got, want.to(got.dtype))
    except OutOfResources as error:
        return "out of resources", str(error)
    except Exception as error:  # reported, and the next trial goes on
        if want.is_cuda:
            torch.cuda.synchronize()  # raises if the device is lost to this process
        return f"failed: {told(error)[:300]}", ""
    return ("incorrect", wrong) if wrong else ("ok", "")


def _grow(bench: Bench, edge: int) -> Iterator[Row]:
    """The kernel alone, in turns with the dense product in cuBLAS; `ratio` is dense over ours."""
    with precision(KIND), torch.no_grad():
        yield _grown(bench, _operands(bench, edge))


def _grown(bench: Bench, o: Operands) -> Row:
    block = o.topology.block
    row: Row = {"what": "grow kernel", "operation": "grow"} | describe(o)
    row |= {"status": "ok", "detail": "", "ms": None, "dense_ms": None, "ratio": None}
    integers = o.with_integers(bench.generator(1))
    try:
        with poisoned():
            got = bsr_grow(integers.dy, integers.x, block, "l1")
        # such sums stay below 2**24 with room to spare, so float32 holds them exactly
        want = block_norms(integers.dy.double().t() @ integers.x.double(), block, "l1")
        wrong = difference(got.flatten(), want.float())
    except Exception as error:  # reported
        return row | {"status": f"failed: {told(error)[:300]}"}
    if wrong:
        return row | {"status": "incorrect", "detail": wrong}
    dy = o.dy.t()
    runs = {"grow": lambda: bsr_grow(o.dy, o.x, block, "l1"), "dense": lambda: dy @ o.x}
    timing = bench.time(runs)
    ms, dense_ms = timing.ms("grow"), timing.ms("dense")
    return row | {"ms": ms, "dense_ms": dense_ms, "ratio": dense_ms / ms}
