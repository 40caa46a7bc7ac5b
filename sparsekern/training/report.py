"""The results of a comparison: a row per method, as a table for people and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.cost.run_flops import FLOP_CONVENTION
from sparsekern.cost.timing import StepTime
from sparsekern.show.environment import environment
from sparsekern.show.output_files import write_whole
from sparsekern.show.tables import aligned
from sparsekern.training.config import DENSE, TrainConfig
from sparsekern.training.trainer import RunResult

FORMAT = 1
_HEAD = ("test", "training", "inference", "weights, grads,", "", "with", "", "", "")
_HEAD_2 = ("FLOPs x", "FLOPs x", "optimizer", "x", "indices", "x", "step ms", "x")


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs of a configuration.

    Attributes:
        config: what was run.
        results: by method, one per seed; "dense" is among them.
        times: of a training step, by method.
        sample: what FLOPs of inference are for, in words.
        unigram_entropy: of the held-out text, bits per character; None for images.
    """

    config: TrainConfig
    results: Mapping[str, Sequence[RunResult]]
    times: Mapping[str, StepTime]
    sample: str = "image"
    unigram_entropy: float | None = None


@dataclass(frozen=True)
class Row:
    """One method against dense, means over seeds.

    Attributes:
        method: its name.
        accuracy: mean share of held-out images classified rightly, or characters guessed rightly.
        spread: sample standard deviation over seeds; None for one seed.
        bits_per_character: mean, of the held-out text; None for images.
        bits_spread: its sample standard deviation; None for one seed.
        training_flops: of a run.
        training_ratio: to dense.
        inference_flops: per sample.
        inference_ratio: to dense.
        trained_bytes: weights, gradients and optimizer state.
        trained_ratio: to dense.
        held_bytes: the same with index arrays.
        held_ratio: to dense.
        step_seconds: median of a training step.
        step_ratio: to dense, median of paired ratios.
        updates: topology updates of a run.
        update_seconds: median of a step that updates the topology; None without.
    """

    method: str
    accuracy: float
    spread: float | None
    bits_per_character: float | None
    bits_spread: float | None
    training_flops: float
    training_ratio: float
    inference_flops: float
    inference_ratio: float
    trained_bytes: float
    trained_ratio: float
    held_bytes: float
    held_ratio: float
    step_seconds: float
    step_ratio: float
    updates: float
    update_seconds: float | None


def rows(comparison: Comparison) -> list[Row]:
    """A row per method, in the order of the results."""
    dense = comparison.results[DENSE]
    return [
        _row(method, results, dense, comparison.times[method])
        for method, results in comparison.results.items()
    ]


def _row(
    method: str, results: Sequence[RunResult], dense: Sequence[RunResult], time: StepTime
) -> Row:
    accuracies = [r.accuracy for r in results]
    bits = [r.bits_per_character for r in results if r.bits_per_character is not None]
    training, inference, trained, held = (
        (_mean(mine), _mean(mine) / _mean(theirs))
        for mine, theirs in zip(_costs(results), _costs(dense), strict=True)
    )
    seconds = [r.update_seconds for r in results if r.update_seconds is not None]
    return Row(
        method=method,
        accuracy=_mean(accuracies),
        spread=_spread(accuracies),
        bits_per_character=_mean(bits) if bits else None,
        bits_spread=_spread(bits),
        training_flops=training[0],
        training_ratio=training[1],
        inference_flops=inference[0],
        inference_ratio=inference[1],
        trained_bytes=trained[0],
        trained_ratio=trained[1],
        held_bytes=held[0],
        held_ratio=held[1],
        step_seconds=time.seconds,
        step_ratio=time.ratio,
        updates=_mean([r.updates for r in results]),
        update_seconds=statistics.median(seconds) if seconds else None,
    )


def _costs(results: Sequence[RunResult]) -> tuple[list[int], ...]:
    return (
        [r.flops.training for r in results],
        [r.flops.inference for r in results],
        [r.held.trained for r in results],
        [r.held.total for r in results],
    )


def table(comparison: Comparison) -> str:
    """The rows as aligned text of at most 100 columns, with notes below."""
    measure = "accuracy %" if comparison.unigram_entropy is None else "bits/char"
    head = [("", *_HEAD), ("method", measure, *_HEAD_2)]
    lines = [*head, *(_cells(row) for row in rows(comparison))]
    text = aligned(lines)
    rule = "-" * max(len(line) for line in text)
    return "\n".join([*text[:2], rule, *text[2:], "", *_notes(comparison)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        _measured(row),
        f"{row.training_ratio:.4f}",
        f"{row.inference_ratio:.4f}",
        size(row.trained_bytes),
        f"{row.trained_ratio:.3f}",
        size(row.held_bytes),
        f"{row.held_ratio:.3f}",
        f"{1000 * row.step_seconds:.2f}",
        f"{row.step_ratio:.2f}",
    )


def _measured(row: Row) -> str:
    """Bits per character of a text, else the accuracy in percent."""
    if row.bits_per_character is None:
        spread = "" if row.spread is None else f" ± {100 * row.spread:.2f}"
        return f"{100 * row.accuracy:.2f}{spread}"
    spread = "" if row.bits_spread is None else f" ± {row.bits_spread:.3f}"
    return f"{row.bits_per_character:.3f}{spread}"


def _notes(comparison: Comparison) -> list[str]:
    config, every = comparison.config, rows(comparison)
    dense = next(row for row in every if row.method == DENSE)
    runs = "One seed" if config.seeds == 1 else f"Mean ± standard deviation of {config.seeds} seeds"
    notes = [
        f"{runs}; x: against dense in this run.",
        f"{FLOP_CONVENTION}.",
        f"Dense: {dense.inference_flops:,.0f} FLOPs per {comparison.sample} in inference, "
        f"{dense.training_flops:.3g} in training.",
    ]
    if comparison.unigram_entropy is not None:
        notes.append(
            f"Unigram entropy of the held-out text: {comparison.unigram_entropy:.3f} bits per "
            "character, the best that a model without context can do."
        )
    notes += [
        f"{row.method}: {row.updates:.0f} topology updates, "
        f"{1000 * row.update_seconds:.2f} ms per step with one (median)."
        for row in every
        if row.update_seconds is not None
    ]
    return notes


def size(count: float) -> str:
    """Bytes as text with a decimal unit: 3.20 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, with what it takes to measure it again."""
    methods = {
        row.method: {
            "summary": {k: v for k, v in asdict(row).items() if k != "method"},
            "runs": [result.to_json() for result in comparison.results[row.method]],
        }
        for row in rows(comparison)
    }
    return {
        "format": FORMAT,
        "flops": FLOP_CONVENTION,
        "config": asdict(comparison.config),
        "unigram_entropy": comparison.unigram_entropy,
        "environment": environment(torch.device(comparison.config.device)),
        "methods": methods,
    }


def write_json(comparison: Comparison, path: Path) -> None:
    """Write `to_json` to a file; numbers that JSON does not know can't occur in it."""
    text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
    write_whole(path, text + "\n")


def _spread(numbers: Sequence[float]) -> float | None:
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)
