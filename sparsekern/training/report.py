"""The table of a comparison: a row for each method, from the runs of a result file."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsekern.cost.run_flops import FLOP_CONVENTION
from sparsekern.methods import METHODS
from sparsekern.show.tables import aligned, markdown
from sparsekern.training.config import DENSE
from sparsekern.training.grid import Cell, Spec
from sparsekern.training.meter import EVERY_STEP
from sparsekern.training.results import DONE

WIDTH = 80
LONGEST_NAME = 40
Content = Mapping[str, Any]
"""A result file, see `results`."""


@dataclass(frozen=True)
class Row:
    """One method against dense, means over seeds.

    Attributes:
        name: of the method, with block and length if they are not plain.
        sparsity: 0 for dense.
        lr: learning rate; the best in validation, if several were tried.
        runs: how many were averaged.
        failed: what the others raised.
        learned: how many of the runs did.
        validation: mean accuracy, or bits per character; None without a validation split.
        test: the same of the test set; None if no run is done.
        spread: its sample standard deviation; None for one seed.
        training_ratio: FLOPs of training to those of dense at plain length.
        inference_ratio: FLOPs of inference to dense.
        held_bytes: weights, gradients, optimizer state, index arrays and what a method keeps
            besides, after training.
        step_seconds: of a batch in training, updates included.
        step_ratio: to dense at the same seed, median; None without a dense run.
    """

    name: str
    sparsity: float
    lr: float
    runs: int
    failed: tuple[str, ...]
    learned: int
    validation: float | None
    test: float | None
    spread: float | None
    training_ratio: float
    inference_ratio: float
    held_bytes: float
    step_seconds: float
    step_ratio: float | None


def rows(content: Content) -> list[Row]:
    """A row for each method, sparsity, block and length, in the order of the runs."""
    cells: dict[Cell, list[Mapping[str, Any]]] = {}
    for run in content["runs"]:
        cells.setdefault(Spec.of_json(run).cell, []).append(run)
    alike: dict[Cell, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell._replace(lr=0.0), []).append(cell)
    chosen = [_best(group, cells) for group in alike.values()]
    dense = next((cells[cell] for cell in chosen if cell.method == DENSE), [])
    dense_steps = {run["seed"]: run["step_seconds"] for run in dense if run["state"] == DONE}
    return [_row(cell, cells[cell], dense_steps) for cell in chosen]


def in_bits(content: Content) -> bool:
    """Whether a text is predicted, and bits per character are what counts."""
    return content["data"]["unigram_entropy"] is not None


def _best(group: Sequence[Cell], cells: Mapping[Cell, list[Mapping[str, Any]]]) -> Cell:
    """Of cells that differ in learning rate, the best in validation."""

    def merit(cell: Cell) -> float:
        found = [r["validation"] for r in cells[cell] if r["state"] == DONE and r["validation"]]
        # a rate at which a run failed is no choice while another holds
        if not found or len(found) < len(cells[cell]):
            return float("-inf")
        return statistics.fmean(s["accuracy"] if s["bits"] is None else -s["bits"] for s in found)

    return max(group, key=merit)


def _row(cell: Cell, runs: list[Mapping[str, Any]], dense_steps: Mapping[int, float]) -> Row:
    done = [run for run in runs if run["state"] == DONE]
    tests = [_measured(run["test"]) for run in done]
    checks = [_measured(run["validation"]) for run in done if run["validation"] is not None]
    pairs = [(r["step_seconds"], dense_steps[r["seed"]]) for r in done if r["seed"] in dense_steps]
    return Row(
        name=cell.name,
        sparsity=cell.sparsity,
        lr=cell.lr,
        runs=len(done),
        failed=tuple(run["error"] for run in runs if run["state"] != DONE),
        learned=sum(run["learned"] for run in done),
        validation=statistics.fmean(checks) if checks else None,
        test=statistics.fmean(tests) if tests else None,
        spread=statistics.stdev(tests) if len(tests) > 1 else None,
        training_ratio=_mean(run["flops"]["training_ratio"] for run in done),
        inference_ratio=_mean(run["flops"]["inference_ratio"] for run in done),
        held_bytes=_mean(sum(run["held"].values()) for run in done),
        step_seconds=_mean(run["step_seconds"] for run in done),
        step_ratio=statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None,
    )


def _measured(score: Mapping[str, Any]) -> float:
    """Bits per character of a text, else the accuracy in percent."""
    bits: float | None = score["bits"]
    return 100 * float(score["accuracy"]) if bits is None else bits


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return statistics.fmean(listed) if listed else float("nan")


# ---- in print


def table(content: Content) -> str:
    """The rows as aligned text, with notes below: at most 80 columns."""
    found = rows(content)
    return printed(found, notes(content, found), bits=in_bits(content))


def printed(found: Sequence[Row], below: Sequence[str], *, bits: bool) -> str:
    """Rows as aligned text and notes, at most 80 columns."""
    longest = LONGEST_NAME
    lines = aligned(cells(found, longest, bits=bits))
    excess = max(map(len, lines)) - WIDTH
    if excess > 0:
        widest = min(longest, max(len(row.name) for row in found))
        lines = aligned(cells(found, widest - excess, bits=bits))
    wrapped = [line for note in below for line in _wrapped(note)]
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *lines[2:], "", *wrapped])


def as_markdown(found: Sequence[Row], *, bits: bool) -> list[str]:
    """Rows as lines of a Markdown table."""
    first, second, *rest = cells(found, LONGEST_NAME, bits=bits)
    head = [f"{a} {b}".strip() for a, b in zip(first, second, strict=True)]
    return markdown([head, *rest])


def cells(found: Sequence[Row], longest: int, *, bits: bool) -> list[tuple[str, ...]]:
    """The table as text, two lines of head first.

    Columns that say nothing are left out: a sparsity that all share, and validation without a
    validation split.
    """
    unit = "bits" if bits else "%"
    table = [
        ("", "spar-", "valid", "test", "FLOPs", "FLOPs", "held", "step"),
        ("method", "sity", unit, unit, "train", "infer", "bytes", "ms"),
        *(_cells(row, longest, bits=bits) for row in found),
    ]
    several = len({row.sparsity for row in found if row.sparsity}) > 1
    checked = any(row.validation is not None for row in found)
    wanted = [True, several, checked, *[True] * 5]
    return [tuple(cell for cell, keep in zip(line, wanted, strict=True) if keep) for line in table]


def _cells(row: Row, longest: int, *, bits: bool) -> tuple[str, ...]:
    name = row.name if len(row.name) <= longest else row.name[: max(1, longest - 1)] + "…"
    sparsity = f"{row.sparsity:.4g}" if row.sparsity else "-"
    if row.test is None:
        return (name, sparsity, "", "failed", "", "", "", "")
    digits = 3 if bits else 2
    spread = "" if row.spread is None else f" ± {row.spread:.{digits}f}"
    return (
        name,
        sparsity,
        "" if row.validation is None else f"{row.validation:.{digits}f}",
        f"{row.test:.{digits}f}{spread}" + ("" if row.learned == row.runs else " *"),
        f"{row.training_ratio:.4f}",
        f"{row.inference_ratio:.4f}",
        size(row.held_bytes),
        f"{1000 * row.step_seconds:.2f}",
    )


def size(count: float) -> str:
    """Bytes as text with a decimal unit: 3.20 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def _wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


# ---- notes


def notes(content: Content, found: Sequence[Row]) -> list[str]:
    """What a reader of the table has to know."""
    data = content["data"]
    most = max((row.runs for row in found), default=0)
    runs = "One seed" if most == 1 else f"Mean ± standard deviation of {most} seeds"
    text = [
        f"{runs}; FLOPs against dense training at its plain length, "
        f"{content['dense']['inference']:,} FLOPs per {data['sample']} in inference, "
        f"{content['dense']['training']:.3g} in training. {FLOP_CONVENTION}.",
    ]
    if any(", b" in row.name for row in found):
        text.append("b: the edge of a block, or outputs x inputs.")
    if data["validation"]:
        text.append(
            f"valid: {data['validation']:,} training samples that no weight was trained on, to "
            "choose by; the test set is looked at once, after the last step."
        )
    if in_bits(content):
        text.append(
            f"Unigram entropy of the test text: {data['unigram_entropy']:.3f} bits per character, "
            "the best that a model without context can do."
        )
    if shrinking := _shrinking(content):
        text.append(
            f"{', '.join(shrinking)}: more weights are trained before; bytes are those held at the "
            "end."
        )
    return [*text, *_rates(content, found), *_troubles(content, found), *_speed(content, found)]


def _shrinking(content: Content) -> list[str]:
    """Methods that end with fewer active weights than they had."""
    done = [run for run in content["runs"] if run["state"] == DONE]
    found = [run["method"] for run in done if run["curve"][0]["nnz"] > run["curve"][-1]["nnz"]]
    return list(dict.fromkeys(name.rpartition(":")[2] for name in found))


def _rates(content: Content, found: Sequence[Row]) -> list[str]:
    tried = {run["lr"] for run in content["runs"]}
    if len(tried) < 2:
        return []
    chosen = ", ".join(f"{row.name} {row.lr:g}" for row in found)
    return [f"Learning rates, the best in validation of {sorted(tried)}: {chosen}."]


def _troubles(content: Content, found: Sequence[Row]) -> list[str]:
    text, data = [], content["data"]
    chance = 100 * data["most_common"]
    if idle := [row for row in found if row.learned < row.runs]:
        which = ", ".join(f"{row.name} ({row.runs - row.learned} of {row.runs})" for row in idle)
        text.append(
            f"* did not learn: {which}. Its accuracy is near chance ({chance:.1f} %), or its loss "
            "did not fall. Try another --lr, or more --epochs."
        )
    for run in content["runs"]:
        if run["state"] != DONE:
            cell, seed = Spec.of_json(run)
            text.append(f"{cell.full_name}, lr {cell.lr:g}, seed {seed} failed: {run['error']}")
        elif run.get("unsaved"):
            text.append(f"{Spec.of_json(run).label}: weights were not saved: {run['unsaved']}")
    most = max((row.runs for row in found), default=0)
    text += [
        f"{row.name}: {row.runs} of {most} seeds are done."
        for row in found
        if 0 < row.runs < most and not row.failed
    ]
    return text


def _speed(content: Content, found: Sequence[Row]) -> list[str]:
    """Says that steps of sparse layers are slower than dense ones, and why."""
    sparse = [row for row in found if row.sparsity and row.step_ratio is not None]
    slow = {row.name: row.step_ratio for row in sparse if row.step_ratio and row.step_ratio > 1}
    if not slow:
        return []
    looking = _looking(content)
    busy, others = ([n for n in slow if (n in looking) is every] for every in (True, False))
    text = []
    if others:
        which = ", ".join(others) if len(others) < len(sparse) else "sparse layers"
        text.append(f"{_longer(which, [slow[n] for n in others])}: {_why(content)}.")
    if busy:
        told = _longer(", ".join(busy), [slow[n] for n in busy])
        text.append(f"{told}: each computes a dense gradient of every sparse layer.")
    return text


def _longer(which: str, ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    times = low if low == high else f"{low} to {high}"
    return f"Steps of {which} take {times} times as long as dense ones here"


def _looking(content: Content) -> set[str]:
    """Rows whose method computes a dense gradient in every step."""
    return {Spec.of_json(r).cell.name for r in content["runs"] if _dense_at(r) == EVERY_STEP}


def _dense_at(run: Mapping[str, Any]) -> str | None:
    """When a run computed dense gradients; what older files do not say, its method does."""
    known = METHODS.get(run["method"])
    told: str | None = run.get("dense_at", known and known.source.dense_at)
    return told


def _why(content: Content) -> str:
    layers = [layer for run in content["runs"] for layer in run.get("layers", ())]
    for impl in ("masked", "dense"):
        if any(layer["impl"] == impl for layer in layers):
            return f"impl {impl!r} computes dense products, and more"
    cpu = any(layer["impl"] == "cpu" for layer in layers)
    if cpu and content["environment"].get("numba") is None:
        return 'numba is not installed, which loops on the CPU need: pip install "sparsekern[cpu]"'
    if not layers:
        return "they prune dense layers first"
    rows, cols = max((layer["shape"] for layer in layers), key=lambda s: s[0] * s[1])
    return (
        f"the largest sparse layer is {rows} x {cols}, and in small layers the fixed cost of each "
        "operation and of a topology update outweighs the products that are saved; larger layers, "
        "larger batches and larger blocks gain"
    )
