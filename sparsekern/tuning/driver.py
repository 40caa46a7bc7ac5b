"""Walks over the keys of a launch table: measure, confirm, write, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sparsekern.errors import ConfigError, DeviceError, UnavailableError
from sparsekern.kernels.tables import Config, Key, table
from sparsekern.ops.dispatch import has_triton
from sparsekern.show.progress import Progress
from sparsekern.tuning.candidates import LIMIT, candidates
from sparsekern.tuning.job import Job
from sparsekern.tuning.problems import Request, keys, problems
from sparsekern.tuning.processes import JobError, Outcome, OutOfTime, Runner
from sparsekern.tuning.tablefile import Machine, TableFile
from sparsekern.tuning.verdict import Verdict, judge

_DRY_CANDIDATES = 3
_DRY_ROUNDS = 2
_SHARED = "shared_memory_per_block_optin"  # left out of torch's type hints
_INTERPRETED_SHARED = 232_448  # bytes, of the sm90 whose table the interpreter takes


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        request: which keys, on which problems.
        out: the table to write.
        rounds: how often each candidate is timed.
        budget_s: seconds after which nothing more is begun and what runs is dropped.
        again: measure keys that `out` holds already.
        dry_run: on the CPU, in Triton's interpreter, to see that it works.
        quiet: show no progress.
    """

    request: Request
    out: Path
    rounds: int = 25
    budget_s: float = float("inf")
    again: bool = False
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check."""
        if self.rounds < 1:
            raise ConfigError(f"`rounds` must be at least 1; got {self.rounds}")
        if not self.budget_s > 0:
            raise ConfigError(f"`budget_s` must be above 0; got {self.budget_s}")


@dataclass(frozen=True)
class Tuned:
    """What came of a key.

    Attributes:
        key: of the table.
        old: its entry before.
        new: its entry now; None if nothing could be measured.
        ratio: time with the new one divided by time with the old one; None without such a pair.
        noise: what a ratio must be below 1 by, to count.
        errors: what was not timed and why, by candidate; the old configuration is candidate 0.
        note: what else there is to say.
        configs: the candidates.
    """

    key: Key
    old: Config
    new: Config | None
    ratio: float | None = None
    noise: float | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    note: str = ""
    configs: Mapping[int, Config] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """All that was measured, and how many keys are left: of the budget, and by earlier runs."""

    tuned: list[Tuned]
    left: int
    kept: int


def tune(plan: Plan, runner: Runner | None = None) -> Result:
    """Measure candidates for every key that was asked for; the table is written after each.

    Args:
        plan: what to do.
        runner: of the measuring processes; for tests.

    Raises:
        DeviceError: there is no CUDA device, and it is no dry run.
        UnavailableError: triton is not installed.
        ConfigError: `out` or SPARSEKERN_LAUNCH_TABLE can't be used, or nothing was asked for.
    """
    begin = time.monotonic()
    machine, shared = _machine(plan.dry_run)
    runner = replace(runner or Runner(), deadline=begin + plan.budget_s)
    file = TableFile.open(plan.out, machine)
    entries = _entries(machine.arch)
    asked = keys(replace(plan.request, tiny=plan.dry_run), entries)
    if not asked:
        raise ConfigError(f"the table of {machine.arch} has no entry for {plan.request}")
    todo = [key for key in asked if plan.again or key not in file.entries]
    tuned: list[Tuned] = []
    with runner, Progress(LIMIT, len(todo), quiet=plan.quiet) as progress:
        for key in todo:
            progress.begin(str(key))
            job = _job(plan, key, entries[key], shared)
            try:
                found = replace(_tune_key(job, runner, progress.step), configs=job.configs)
            except OutOfTime:
                break
            _keep(file, found, job)
            tuned.append(found)
            progress.end(_outcome(found))
    return Result(tuned, len(todo) - len(tuned), len(asked) - len(todo))


def _machine(dry_run: bool) -> tuple[Machine, int]:
    """What will be measured on, and the shared memory of a program there."""
    if not dry_run and not torch.cuda.is_available():
        raise DeviceError(
            "`sparsekern tune` measures on a CUDA device; got none (--dry-run works on the CPU)"
        )
    if not has_triton():
        raise UnavailableError("`sparsekern tune` needs the package triton: pip install triton")
    import triton  # noqa: PLC0415  optional

    from sparsekern.kernels.launch import arch_class  # noqa: PLC0415  imports triton

    device = torch.device("cpu" if dry_run else "cuda")
    name, shared = "the CPU", _INTERPRETED_SHARED
    if not dry_run:
        properties = torch.cuda.get_device_properties(device)
        name, shared = properties.name, int(getattr(properties, _SHARED))
    versions = torch.__version__, triton.__version__
    return Machine(arch_class(device), name, *versions, dry_run), shared


def _entries(arch: str) -> dict[Key, Config]:
    try:
        return dict(table(arch))
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None


def _job(plan: Plan, key: Key, old: Config, shared: int) -> Job:
    shapes = tuple(problems(key, replace(plan.request, tiny=plan.dry_run)))
    found, rounds = candidates(key, old, shared), plan.rounds
    if plan.dry_run:
        found, rounds = found[:_DRY_CANDIDATES], min(rounds, _DRY_ROUNDS)
    return Job(key, shapes, dict(enumerate(found)), rounds, plan.dry_run)


def _tune_key(job: Job, runner: Runner, on_checked: Callable[[int], None]) -> Tuned:
    key, old = job.key, job.configs[0]
    if not job.problems:
        return Tuned(key, old, None, note=f"the shape makes no {key.rows} rows")
    try:
        return _compare(job, runner, on_checked)
    except JobError as error:
        return Tuned(key, old, None, note=str(error))


def _compare(job: Job, runner: Runner, on_checked: Callable[[int], None]) -> Tuned:
    """Find the fastest candidate, and let it win once more, alone against the old one."""
    key, old = job.key, job.configs[0]
    outcome = runner.run(job, on_checked)
    first = _verdict(outcome)
    if first is None:
        return Tuned(key, old, None, errors=outcome.errors, note="no candidate is right")
    if 0 in outcome.errors:
        new = job.configs[first.best]
        return Tuned(key, old, new, errors=outcome.errors, note="the old one does not work")
    if not first.is_faster:
        return Tuned(key, old, old, 1.0, first.noise, outcome.errors)
    # the best of many owes its place partly to luck
    pair = replace(job, configs={i: job.configs[i] for i in (0, first.best)})
    again = runner.run(pair)
    second = _verdict(again)
    errors = outcome.errors | again.errors
    if second is None or again.errors or not second.is_faster:
        noise = first.noise if second is None else second.noise
        return Tuned(key, old, old, 1.0, noise, errors, "faster once, not again")
    return Tuned(key, old, job.configs[second.best], second.ratio, second.noise, errors)


def _verdict(outcome: Outcome) -> Verdict | None:
    if outcome.reference is None:
        return None
    return judge(outcome.reference, outcome.twin, outcome.times)


def _keep(file: TableFile, tuned: Tuned, job: Job) -> None:
    """Only what was measured goes into the table."""
    if tuned.new is None:
        return
    file.put(
        tuned.key,
        tuned.new,
        job.problems,
        was=tuned.old._asdict(),
        ratio=tuned.ratio,
        noise=tuned.noise,
        not_timed=[
            {"config": job.configs[i]._asdict(), "why": why}
            for i, why in sorted(tuned.errors.items())
        ],
    )


def _outcome(tuned: Tuned) -> str:
    if tuned.new is None:
        return f"not measured: {tuned.note or 'no candidate works'}"
    if tuned.new == tuned.old:
        return "kept"
    return tuned.note if tuned.ratio is None else f"{tuned.ratio:.3f}x the time"
