"""Whole networks trained dense, masked and sparse, side by side.

    python -m benchmarks.end_to_end [--data-dir DIR] [--text FILE] [--only mlp gpt]

A fully connected net, WRN-22-2 and a small GPT at 90 % sparsity. Masked and sparse run the same
RigL, with the same seeds, so they are the same training twice; dense sees the same batches. The
three take their steps in turns, each round another first, and a ratio is taken round by round. A
topology update spends a batch besides and is timed apart. The file is written after each network,
and those that are not asked for keep their numbers.

Images are Fashion-MNIST from `--data-dir`, padded to 32 x 32 for the convolutions; without it they
are made: ten patterns and noise. The text is the documentation that comes with Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.end_to_end_data import images, text
from benchmarks.end_to_end_networks import NETWORKS, Network
from benchmarks.paired import ratios
from benchmarks.result_files import RESULTS
from benchmarks.suite.convert import unwritable
from sparsekern.cost.flops import as_products
from sparsekern.cost.held import held_bytes
from sparsekern.cost.memory import peak_bytes
from sparsekern.cost.timing import turns
from sparsekern.errors import told
from sparsekern.show.environment import environment
from sparsekern.show.output_files import write_whole
from sparsekern.show.progress import Progress
from sparsekern.swap import sparse_layers
from sparsekern.training.data import Dataset
from sparsekern.training.trainer import Trainer, total_steps

VARIANTS = ("dense", "masked", "sparse")
LAST_SHARE = 0.1
"""Of the steps: the loss at the end is their mean."""

OUT = RESULTS / "cpu" / "end_to_end.json"


# ---- training


@dataclass
class Course:
    """One variant in training.

    Attributes:
        trainer: takes its steps.
        times: of weight steps in seconds, one a round.
        update_times: of topology updates.
        losses: of weight steps.
        peaks: most bytes allocated by a weight step, and by an update.
    """

    trainer: Trainer
    times: list[float]
    update_times: list[float]
    losses: list[float]
    peaks: dict[str, int]

    def round(self) -> None:
        """A weight step, and before it the update if one is due."""
        method = self.trainer.method
        if method is not None and method.due:
            if len(method.history) == 1:  # the second: by now there is optimizer state
                self.peaks["update"] = peak_bytes(self.trainer.step)
            else:
                self.update_times.append(self._timed()[0])
        seconds, loss = self._timed()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss must stay finite; got {loss}")
        self.times.append(seconds)
        self.losses.append(loss)

    def _timed(self) -> tuple[float, float]:
        start = time.perf_counter()
        loss = self.trainer.step()
        return time.perf_counter() - start, float(loss)


def course(variant: str, network: Network, found: Dataset) -> Course:
    """Ready to train; seeds are the same for all."""
    impl = "masked" if variant == "masked" else None
    method = "dense" if variant == "dense" else "rigl"
    config = replace(network.config, impl=impl, epochs=epochs(network, found))
    return Course(Trainer(config, found, method, seed=0), [], [], [], {})


def epochs(network: Network, found: Dataset) -> int:
    """Passes over the data that the steps take."""
    return math.ceil(network.steps / (len(found.train_y) // network.config.batch_size))


def train(network: Network, found: Dataset, progress: Progress) -> dict[str, Course]:
    """All variants in turns; the first round warms up and is not counted."""
    courses = {variant: course(variant, network, found) for variant in VARIANTS}
    steps = total_steps(courses["dense"].trainer.config, found)
    for i, name in turns(VARIANTS, min(network.steps, steps)):
        courses[name].round()
        progress.step(i + 1)
    for one in courses.values():
        del one.times[:1], one.update_times[:1]
    return courses


# ---- what came of it


def summary(courses: dict[str, Course]) -> dict[str, Any]:
    """Numbers of each variant."""
    dense = courses["dense"]
    rows = {}
    for name, one in courses.items():
        last = one.losses[-max(1, int(LAST_SHARE * len(one.losses))) :]
        one.peaks["step"] = peak_bytes(one.trainer.step)
        rows[name] = {
            "step_seconds": statistics.median(one.times),
            "dense_over_own": ratios(dense.times, one.times),
            "seconds_a_step_with_updates": _amortised(one),
            "update_seconds": statistics.median(one.update_times) if one.update_times else None,
            "updates": _updates(one),
            "peak_bytes": one.peaks,
            "held_bytes": asdict(held_bytes(one.trainer.model, one.trainer.optimizer)),
            "step_flops": step_flops(one.trainer),
            "loss_mean": statistics.mean(one.losses),
            "loss_last": statistics.mean(last),
            "weights": sum(layer.nnz for layer in sparse_layers(one.trainer.model).values()),
        }
    return rows


def step_flops(trainer: Trainer) -> int:
    """FLOPs that a training step executes, as FlopCounterMode sees it; dense is the equivalent."""
    with as_products(recurrent=False), FlopCounterMode(display=False) as counter:
        trainer.step()
    return int(counter.get_total_flops())


def _amortised(one: Course) -> float | None:
    """Seconds of a step with its share of the updates; None if there were, and none was timed."""
    if _updates(one) == 0:
        return statistics.mean(one.times)
    if not one.update_times:
        return None
    updates = statistics.mean(one.update_times) * _updates(one)
    return (sum(one.times) + updates) / len(one.times)


def _updates(one: Course) -> int:
    return len(one.trainer.method.history) if one.trainer.method else 0


@contextlib.contextmanager
def _no_failure_of(name: str, rows: dict[str, Any]) -> Iterator[None]:
    """A network that fails leaves the others their results, and a line that tells why."""
    try:
        yield
    except Exception as error:
        why = told(error)
        rows[name] = {"failed": why}
        sys.stdout.write(f"{name}: failed: {why}\n")


def measured_before(path: Path) -> dict[str, Any]:
    """Networks of the file that is there, if there is one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return dict(content.get("networks", {}))


def write(path: Path, rows: dict[str, Any]) -> None:
    """Write the networks that there are."""
    ordered = {name: rows[name] for name in NETWORKS if name in rows}
    write_whole(path, json.dumps({"networks": ordered}, indent=1) + "\n")


def shortened(network: Network, steps: int | None) -> Network:
    """The same with fewer steps, and some updates among them all the same."""
    if steps is None:
        return network
    freq = min(network.config.update_freq, max(1, steps // 4))
    return replace(network, steps=steps, config=replace(network.config, update_freq=freq))


def run(network: Network, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one network in all variants."""
    network = shortened(network, arguments.steps)
    samples = network.steps * network.config.batch_size
    if network.edge is None:
        found = text(samples, network.config.seq_len, arguments.text)
    else:
        found = images(samples, network.edge, arguments.data_dir)
    with Progress(network.steps, 1) as progress:
        progress.begin(network.title)
        variants = summary(train(network, found, progress))
        progress.end(f"{variants['sparse']['dense_over_own']['ratio']:.2f}x")
    facts = {"title": network.title, "data": found.name, "steps": network.steps}
    settings = {**asdict(network.config), "impl": None, "epochs": None}
    return {**facts, "environment": environment(), "config": settings, "variants": variants}


def line(name: str, one: dict[str, Any]) -> str:
    """A variant in a line."""
    update, amortised = one["update_seconds"], one["seconds_a_step_with_updates"]
    return (
        f"  {name:<7} step {_milliseconds(one['step_seconds'])}  "
        f"{one['dense_over_own']['ratio']:.2f}x  with updates {_milliseconds(amortised)}  update "
        f"{'-' if one['updates'] == 0 else _milliseconds(update)}  peak "
        f"{one['peak_bytes']['step'] / 2**20:.1f} MiB  {one['step_flops'] / 1e9:.2f} GFLOP  loss "
        f"{one['loss_mean']:.3f}, at the end {one['loss_last']:.3f}\n"
    )


def _milliseconds(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{1e3 * seconds:8.1f} ms"


def main() -> int:
    """Train the networks asked for; returns 1 if one failed."""
    parser = _parser()
    arguments = parser.parse_args()
    if why := unwritable(arguments.out):
        parser.error(why)
    torch.set_num_threads(arguments.threads)
    rows, failed = measured_before(arguments.out), False
    for name in arguments.only:
        with _no_failure_of(name, rows):
            rows[name] = run(NETWORKS[name], arguments)
        write(arguments.out, rows)
        failed |= "failed" in rows[name]
        sys.stdout.write(f"{NETWORKS[name].title}\n")
        for variant, one in rows[name].get("variants", {}).items():
            sys.stdout.write(line(variant, one))
        sys.stdout.flush()
    sys.stdout.write(f"saved {arguments.out}\n")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="the folder of Fashion-MNIST's files; default: made")
    parser.add_argument("--text", type=Path, help="default: the topics of Python's pydoc")
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=int, help="fewer, to try it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser


if __name__ == "__main__":
    sys.exit(main())
