"""The runs of a comparison, one after another or in processes side by side, each for itself.

A run gives the same bits in either way: it depends on its configuration and seed, and takes the
same number of threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import sparsekern
from sparsekern.errors import told
from sparsekern.methods import Method
from sparsekern.training import data as datasets
from sparsekern.training.config import TrainConfig
from sparsekern.training.data import Dataset, Images
from sparsekern.training.grid import Spec
from sparsekern.training.results import entry, failure
from sparsekern.training.score import most_common
from sparsekern.training.topology_frames import TopologyFrames
from sparsekern.training.trainer import Trainer, total_steps

TELL_SECONDS = 0.5
"""A process says how far it is about as often."""
END_SECONDS = 10.0
"""So long a process may take to end after it was asked to."""
WARM_UP = 3
"""Steps that nothing is kept of: they load what a method needs, so that the others can be timed."""

_warm: set[tuple[str, tuple[int, int]]] = set()

Tell = Callable[[Spec, int], None]
"""Called with a run and the weight steps that it has taken."""


class Task(NamedTuple):
    """What all runs share, in a form that goes to another process.

    Attributes:
        config: of the runs, but for what their cells say.
        data_dir: see `sparsekern.training.data.load`.
        dense: FLOPs of dense training, see `results`.
        threads: of the CPU, in each run.
        save: folder for weights and topologies; None saves none.
        frames: whether to keep a frame of the first layer after each update.
    """

    config: TrainConfig
    data_dir: str | None
    dense: dict[str, int]
    threads: int = 1
    save: Path | None = None
    frames: bool = False

    def load(self) -> Dataset:
        """Its data, on the CPU."""
        return datasets.load(self.config.data, self.data_dir, self.config.seq_len)

    def steps(self, spec: Spec, data: Dataset) -> int:
        """Weight steps of a run."""
        return total_steps(spec.cell.of(self.config), data)


def perform(task: Task, data: Dataset, spec: Spec, tell: Tell) -> dict[str, Any]:
    """One run; what it raises is a part of its entry.

    Args:
        task: see there.
        data: on the CPU.
        spec: which run.
        tell: called about every `TELL_SECONDS`.
    """
    said = time.monotonic()

    def on_step(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= TELL_SECONDS:
            said = time.monotonic()
            tell(spec, done)

    try:
        _warm_up(task, data, spec)
        trainer = Trainer(spec.cell.of(task.config), data, spec.cell.method, spec.seed)
        if task.frames and isinstance(trainer.data, Images):
            trainer.frames = _frames(trainer)
        result = trainer.train(on_step)
        if task.save is not None:
            method = trainer.method if isinstance(trainer.method, Method) else None
            path = task.save / file_name(spec)
            sparsekern.save(path, trainer.model, trainer.optimizer, method, extra=spec.to_json())
    except Exception as error:  # whatever a method of the user's raises, it is this run's alone
        return failure(spec, told(error))
    facts = result.to_json()
    flops = facts["flops"]
    flops |= {f"{name}_ratio": flops[name] / task.dense[name] for name in task.dense}
    learned = result.learned(most_common(data), len(data.test_y))
    return entry(spec, {"learned": learned, **facts})


def file_name(spec: Spec) -> str:
    """Of the weights and the topology of a run."""
    cell, (bh, bw) = spec.cell, spec.cell.block
    method = "".join(c if c.isalnum() or c in "-_" else "." for c in cell.method)
    axes = f"s{cell.sparsity:g}-b{bh}x{bw}-{cell.multiplier:g}x-lr{cell.lr:g}"
    return f"{method}-{axes}-seed{spec.seed}.safetensors"


def _warm_up(task: Task, data: Dataset, spec: Spec) -> None:
    """Take some steps of a method that this process has not run yet, and forget them."""
    kind = (spec.cell.method, spec.cell.block)
    if kind in _warm:
        return
    _warm.add(kind)
    trainer = Trainer(spec.cell.of(task.config), data, spec.cell.method, spec.seed)
    with torch.random.fork_rng():
        for _ in range(WARM_UP):
            trainer.step()


def _frames(trainer: Trainer) -> TopologyFrames | None:
    data = trainer.data
    if not isinstance(data, Images):
        return None
    frames = TopologyFrames(data.image_shape, data.channels)
    return frames if frames.can_see(trainer.model) else None


# ---- all of them


def in_turn(
    task: Task, data: Dataset, specs: Sequence[Spec], tell: Tell
) -> Generator[tuple[Spec, dict[str, Any]]]:
    """Each run and what it gave, one after another in this process."""
    for spec in specs:
        tell(spec, 0)
        yield spec, perform(task, data, spec, tell)


def side_by_side(
    task: Task, specs: Sequence[Spec], jobs: int, tell: Tell
) -> Generator[tuple[Spec, dict[str, Any]]]:
    """Each run and what it gave, in the order in which they end, from `jobs` processes.

    A process that dies loses its run alone. All end with this generator.
    """
    waiting = list(reversed(specs))
    workers: dict[Connection, _Worker] = {}
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                worker = _Worker(task)
                workers[worker.pipe] = worker
                worker.give(waiting.pop(), tell)
            for pipe in wait(list(workers)):
                worker = workers[pipe]  # type: ignore[index]  # only connections were waited for
                spec = worker.spec
                message = worker.receive()
                if isinstance(message, int):
                    tell(spec, message)
                    continue
                if isinstance(message, str) or not waiting:
                    workers.pop(worker.pipe).end()
                else:
                    worker.give(waiting.pop(), tell)
                yield spec, failure(spec, message) if isinstance(message, str) else message
    finally:
        for worker in workers.values():
            worker.process.kill()
        for worker in workers.values():
            worker.end()


class _Worker:
    """A process that takes runs, and the end of its pipe."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.spec: Spec

    def give(self, spec: Spec, tell: Tell) -> None:
        """Start a run."""
        self.spec = spec
        tell(spec, 0)
        with contextlib.suppress(BrokenPipeError):  # it has died: `receive` says so
            self.pipe.send(spec)

    def receive(self) -> Any:
        """Steps taken, or an entry; in words if the process has died."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(END_SECONDS)
            return f"its process ended with status {self.process.exitcode}"

    def end(self) -> None:
        """Wait for its end."""
        self.pipe.close()
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(task: Task, pipe: Connection) -> None:
    """In a process of its own: runs, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first one ends us
    torch.set_num_threads(task.threads)
    # a pipe that is closed: nobody waits for the run any more
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        data = task.load()
        while True:
            spec: Spec = pipe.recv()
            pipe.send(perform(task, data, spec, lambda _spec, done: pipe.send(done)))
