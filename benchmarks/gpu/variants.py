"""Part `variants`: what each choice in a launch table is worth, one change at a time.

Forward by pipeline depth, orientation, tile, order of the grid and kind of load; dW by the blocks
that share a tile of dY; the grow kernel against the dense gradient that it never stores. A variant
that is not exact on integers, or that the device has no room for, gets no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.correctness import Row
from sparsekern.errors import told
from sparsekern.kernels import tables
from sparsekern.kernels.bsr_grow import bsr_grow
from sparsekern.kernels.launch import arch_class, compute_kind, rows_class
from sparsekern.kernels.tables import Config, Key
from sparsekern.tuning.entries import is_read, launching
from sparsekern.tuning.trial import (
    Operands,
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
MOST_SUMS = 128  # fp32 accumulators of a thread; more would spill


class Trial(NamedTuple):
    """One entry of a launch table, to be tried in place of the one that is there."""

    name: str
    key: Key
    config: Config


def variants(bench: Bench) -> Iterator[Row]:
    """One row per trial; those of one block take turns, so their times can be compared."""
    with precision(KIND), torch.no_grad():
        for edge in bench.plan.variant_blocks:
            o = _operands(bench, edge)
            yield from _rows(bench, "forward", o, _forward_trials(o, few=bench.plan.dry))
        for edge in bench.plan.group_blocks:
            o = _operands(bench, edge)
            yield from _rows(bench, "dw", o, _dw_trials(o, few=bench.plan.dry))
        for edge in bench.plan.group_blocks:
            yield _grow(bench, _operands(bench, edge))


def _operands(bench: Bench, edge: int) -> Operands:
    plan = bench.plan
    # a single block is all that a dry shape holds
    density = 1.0 if plan.dry else plan.other_density
    return bench.operands(plan.variant_shape, (edge, edge), density, KIND)


def _forward_trials(o: Operands, *, few: bool) -> list[Trial]:
    """The shipped entry first, then all that differ from it by one field, then other entries."""
    topology, arch = o.topology, arch_class(o.x.device)
    (bh, bw), kind = topology.block, compute_kind(o.x.dtype)
    rows = rows_class(topology.nnzb, topology.block_rows, bw)
    base, tma = tables.find(arch, "spmm", kind, bh, rows, tma=True)
    key = Key("spmm", kind, str(bh), rows, "tma" if tma else "pointer")
    trials = [Trial("shipped", key, base)]
    for field, values in FORWARD.items():
        if field != "SWAP" or tma:  # the pointer kernel knows one orientation
            others = [value for value in values if value != getattr(base, field)]
            trials += [Trial(f"{field}={v}", key, base._replace(**{field: v})) for v in others]
    other = "long" if rows == "short" else "short"
    trials.append(
        Trial(f"as {other} rows", key, tables.find(arch, "spmm", kind, bh, other, tma=tma)[0])
    )
    if tma:
        pointer = tables.find(arch, "spmm", kind, bh, rows, tma=False)[0]
        trials.append(Trial("pointer", key._replace(loads="pointer"), pointer))
    return [*trials[:2], trials[-1]] if few else trials


def _dw_trials(o: Operands, *, few: bool) -> list[Trial]:
    """The shipped entry, with 1, 2, 4 and 8 blocks to a program."""
    (bh, bw), arch = o.topology.block, arch_class(o.x.device)
    edge, kind = max(bh, bw), compute_kind(o.x.dtype)
    base, tma = tables.find(arch, "sddmm", kind, edge, "any", tma=min(bh, bw) >= 64)
    key = Key("sddmm", kind, str(edge), "any", "tma" if tma else "pointer")
    trials = [Trial("shipped", key, base)]
    for G in GROUPS[:2] if few else GROUPS:
        warps = base.num_warps
        while bh * bw * G > MOST_SUMS * 32 * warps and warps < 8:
            warps *= 2
        config = base._replace(LANES=G * bw, num_warps=warps)
        if config != base:
            trials.append(Trial(f"G={G}", key, config))
    return trials


def _rows(bench: Bench, operation: str, o: Operands, trials: list[Trial]) -> Iterator[Row]:
    """Check all, then time the right ones in turns; `ratio` is the shipped time over theirs."""
    integers = o.with_integers(bench.generator(1))
    want = expected(operation, integers).value
    check, run = products(integers, "triton")[operation], products(o, "triton")[operation]
    arch = arch_class(bench.device)
    found = {
        t.name: ("not run: out of time", "") if bench.late else _verdict(arch, t, check, want)
        for t in trials
    }
    runs = {t.name: _with(arch, t, run) for t in trials if found[t.name][0] == "ok"}
    timing = bench.time(runs) if runs else None
    for trial in trials:
        status, detail = found[trial.name]
        row: Row = {"what": f"{operation} {trial.name}", "operation": operation} | describe(o)
        row |= {"loads": trial.key.loads, "config": trial.config._asdict()}
        row |= {"status": status, "detail": detail, "ms": None, "ratio": None}
        if timing is not None and trial.name in runs:
            ms = timing.ms(trial.name)
            row |= {"ms": ms, "tflops": o.flops / ms / 1e9}
            if "shipped" in runs:
                row["ratio"] = timing.ms("shipped") / ms
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


def _grow(bench: Bench, o: Operands) -> Row:
    """The kernel alone, in turns with the dense product in cuBLAS; `ratio` is dense over ours."""
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
