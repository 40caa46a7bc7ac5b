"""What pictures take from a result file: runs that are done, in groups that differ by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsekern.errors import ConfigError, DataError
from sparsekern.training.config import DENSE
from sparsekern.training.results import DONE, content_of


class Point(NamedTuple):
    """A run so far.

    Attributes:
        step: weight steps.
        seconds: of training.
        loss: mean training loss since the point before, nats.
        accuracy: share of the validation samples; None without a validation split.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float | None


class Update(NamedTuple):
    """What one topology update left: by layer, facts by name.

    Facts are `live_outputs`, `fan_in_median`, `fan_in_max`, and where they were kept `nnz`.
    """

    step: int
    layers: Mapping[str, Mapping[str, int]]


class Layer(NamedTuple):
    """A sparse layer at the end of a run."""

    name: str
    shape: tuple[int, int]
    nnz: int


class Cell(NamedTuple):
    """What the seeds of a group share.

    Attributes:
        method: as in the file.
        sparsity: 0 for dense.
        block: (outputs, inputs).
        multiplier: of the training's length.
        lr: learning rate at the start.
    """

    method: str
    sparsity: float
    block: tuple[int, int]
    multiplier: float
    lr: float


class Run(NamedTuple):
    """One run that is done.

    Attributes:
        cell: what it has in common with other seeds.
        seed: of it.
        learned: whether it is better than guessing.
        accuracy: share of the test samples.
        bits: per character of the test text; None for images.
        validation: accuracy on the validation split; None without one.
        training_ratio: its training FLOPs over those of dense training at length 1.
        curve: over time.
        updated: whether its topology ever was.
        updates: those that told of the topology.
        layers: the sparse ones, at the end.
        frames: of the first layer, as `TopologyFrames` wrote them; None if they were not kept.
    """

    cell: Cell
    seed: int
    learned: bool
    accuracy: float
    bits: float | None
    validation: float | None
    training_ratio: float
    curve: tuple[Point, ...]
    updated: bool
    updates: tuple[Update, ...]
    layers: tuple[Layer, ...]
    frames: Mapping[str, Any] | None


Groups = dict[Cell, list[Run]]
"""The runs of each cell, in the order of the file."""


class Runs(NamedTuple):
    """What is drawn.

    Attributes:
        title: the data and the network, in words.
        groups: of the runs that learned.
        failed: cells whose runs all failed or learned nothing, in words.
    """

    title: str
    groups: Groups
    failed: list[str]


class Score(NamedTuple):
    """How good runs are: mean over seeds, and the sample standard deviation (0 for one)."""

    mean: float
    spread: float


def runs_of(path: Path) -> Runs:
    """The runs of a result file.

    Raises:
        DataError: it can't be read, or is no result file of training of this format.
    """
    content = content_of(path)
    try:
        return runs_in(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def runs_in(content: Mapping[str, Any]) -> Runs:
    """Read a result file's content.

    Raises:
        DataError: a field is missing or something else than a result file has there.
    """
    groups: Groups = {}
    failed: dict[str, None] = {}
    for i, saved in enumerate(_field(content, "runs", "the file")):
        try:
            if saved["state"] != DONE:
                failed[f"{saved['method']} (failed)"] = None
                continue
            run = _run(saved)
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"run {i}: expected a run of a result file; got: {error!r}") from error
        if run.learned:
            groups.setdefault(run.cell, []).append(run)
        else:
            failed[f"{run.cell.method} (learned nothing)"] = None
    data, task = (_field(content, name, "the file") for name in ("data", "task"))
    if not (isinstance(data, Mapping) and isinstance(task, Mapping)):
        raise DataError(
            "`data` and `task` must be objects, as `sparsekern train --json` writes them"
        )
    widths = "-".join(map(str, task.get("hidden", ())))
    title = f"{data.get('name')}, {task.get('model') or f'fully connected {widths}'}"
    return Runs(title, groups, list(failed))


def _field(content: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in content:
        raise DataError(f"{what} must have {name!r}, as `sparsekern train --json` writes it")
    return content[name]


def _run(saved: Mapping[str, Any]) -> Run:
    height, width = map(int, saved["block"])
    cell = Cell(
        str(saved["method"]),
        float(saved["sparsity"]),
        (height, width),
        float(saved["multiplier"]),
        float(saved["lr"]),
    )
    test, validation = saved["test"], saved["validation"]
    return Run(
        cell=cell,
        seed=int(saved["seed"]),
        learned=bool(saved["learned"]),
        accuracy=float(test["accuracy"]),
        bits=None if test["bits"] is None else float(test["bits"]),
        validation=None if validation is None else float(validation["accuracy"]),
        training_ratio=float(saved["flops"]["training_ratio"]),
        curve=tuple(map(_point, saved["curve"])),
        updated=bool(saved["updates"]),
        updates=tuple(u for u in map(_update, saved["updates"]) if u.layers),
        layers=tuple(
            Layer(str(layer["name"]), (layer["shape"][0], layer["shape"][1]), int(layer["nnz"]))
            for layer in saved["layers"]
        ),
        frames=saved["frames"],
    )


def _point(saved: Mapping[str, Any]) -> Point:
    held_out = saved["validation"]
    accuracy = None if held_out is None else float(held_out["accuracy"])
    return Point(int(saved["step"]), float(saved["seconds"]), float(saved["loss"]), accuracy)


FACTS = ("outputs", "live_outputs", "inputs", "live_inputs", "fan_in_median", "fan_in_max", "nnz")
"""The fields of `TopologyFacts`, which JSON may hold as a list; the last may be missing."""


def _update(saved: Mapping[str, Any]) -> Update:
    layers = {}
    for name, change in saved["layers"].items():
        facts = change.get("facts")
        if facts is not None:
            named = facts if isinstance(facts, Mapping) else dict(zip(FACTS, facts, strict=False))
            layers[name] = {k: int(v) for k, v in {**change, **named}.items() if type(v) is int}
    return Update(int(saved["step"]), layers)


# ---- choosing among runs


def chosen(
    runs: Runs,
    methods: Sequence[str] = (),
    sparsity: float | None = None,
    block: tuple[int, int] | None = None,
    multiplier: float | None = None,
) -> Runs:
    """Only some of the runs; dense ones have no sparsity and no block, so they stay.

    Raises:
        ConfigError: the file has none that fit.
    """
    known = list(dict.fromkeys(cell.method for cell in runs.groups))
    for method in methods:
        if method not in known:
            raise ConfigError(f"`method` must be one of {known}, which learned; got {method!r}")

    def fits(cell: Cell) -> bool:
        dense = cell.method == DENSE
        return (
            (not methods or cell.method in methods or dense)
            and (dense or sparsity in (None, cell.sparsity))
            and (dense or block in (None, cell.block))
            and multiplier in (None, cell.multiplier)
        )

    groups = {cell: group for cell, group in runs.groups.items() if fits(cell)}
    wanted = sparsity is not None or block is not None
    if not groups or (wanted and all(cell.method == DENSE for cell in groups)):
        lost = f"; left out: {', '.join(runs.failed)}" if runs.failed else ""
        raise ConfigError(
            f"no run that learned is left to draw of {len(runs.groups)}{_settings(runs)}{lost}"
        )
    return runs._replace(groups=groups)


def _settings(runs: Runs) -> str:
    """What the options can choose among, in words."""
    cells = [cell for cell in runs.groups if cell.method != DENSE]
    if not cells:
        return ""
    sparsities = ", ".join(f"{s:g}" for s in sorted({cell.sparsity for cell in cells}))
    blocks = ", ".join(f"{h}x{w}" for h, w in sorted({cell.block for cell in cells}))
    lengths = ", ".join(f"{x:g}" for x in sorted({cell.multiplier for cell in cells}))
    return f"; there are sparsity {sparsities}, block {blocks}, multiplier {lengths}"


def one_setting(runs: Runs) -> tuple[Runs, str]:
    """The runs of the first sparsity, block and length, and in words what is left out.

    Methods can be told apart by colour then; dense runs of another length are left out too.
    """

    def setting(cell: Cell) -> tuple[Any, ...]:
        return (cell.sparsity, cell.block, cell.multiplier)

    sparse = dict.fromkeys(setting(cell) for cell in runs.groups if cell.method != DENSE)
    if len(sparse) < 2:
        return runs, ""
    first = next(iter(sparse))
    kept = {
        cell: group
        for cell, group in runs.groups.items()
        if setting(cell) == first or (cell.method == DENSE and cell.multiplier == first[2])
    }
    told = f"the first of {len(sparse)} settings; --sparsity, --block and --multiplier choose"
    return runs._replace(groups=kept), told


def best_rates(runs: Runs) -> Runs:
    """Of several learning rates the one that is best on the validation split.

    Without a validation split all stay: choosing by test accuracy would flatter.
    """
    rivals: dict[Cell, list[Cell]] = {}
    for cell in runs.groups:
        rivals.setdefault(cell._replace(lr=0.0), []).append(cell)
    kept: Groups = {}
    for cells in rivals.values():
        scores = {cell: [run.validation for run in runs.groups[cell]] for cell in cells}
        known = {c: [v for v in values if v is not None] for c, values in scores.items()}
        if all(len(known[c]) == len(scores[c]) for c in cells):
            best = max(cells, key=lambda cell: statistics.fmean(known[cell]))
            kept[best] = runs.groups[best]
        else:
            kept |= {cell: runs.groups[cell] for cell in cells}
    return runs._replace(groups=kept)


def measure(runs: Runs) -> tuple[str, Callable[[Run], float]]:
    """What is good, in words, and of a run: accuracy in percent, or bits per character."""
    if any(run.bits is not None for group in runs.groups.values() for run in group):
        return "test bits per character", lambda run: float("nan") if run.bits is None else run.bits
    return "test accuracy, %", lambda run: 100 * run.accuracy


def score(group: Sequence[Run], of: Callable[[Run], float]) -> Score:
    """Of the seeds of a cell."""
    values = [of(run) for run in group]
    return Score(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
