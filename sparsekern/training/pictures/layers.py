"""Density, fan-in and live neurons by layer, update by update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsekern.errors import ConfigError
from sparsekern.training.pictures.runs import Layer, Run, Runs, best_rates, one_setting
from sparsekern.training.pictures.style import INK, Series, figure, legend, log_scale, plain

MOST_METHODS, MOST_LAYERS = 4, 8
_DASHES = ("-", (0, (4, 1.5)))

Fact = Callable[[Mapping[str, int], Layer], float | None]


def draw_layers(runs: Runs) -> Any:
    """A column for each method, the first seed of each; at most `MOST_METHODS` of them.

    Raises:
        ConfigError: no run has facts of its topology.
    """
    runs, others = one_setting(best_rates(runs))
    told = {cell: min(group, key=_seed) for cell, group in runs.groups.items()}
    told = {cell: run for cell, run in told.items() if run.updates and run.layers}
    if not told:
        raise ConfigError(_why_none(runs))
    shown = list(told)[:MOST_METHODS]
    series = Series(told)
    names = _layers_of(told[cell] for cell in shown)
    rows = [row for row in _ROWS if any(_points(told[c], n, row[1]) for c in shown for n in names)]
    left = ", ".join(series.label(cell) for cell in list(told)[MOST_METHODS:])
    title = ", ".join(filter(None, (f"Layers over topology updates: {runs.title}", series.shared)))
    lacks = [name for name, *_ in _ROWS if name not in [row[0] for row in rows]]
    lacking = f"not in the file: {', '.join(lacks)}" if lacks else ""
    below = "; ".join(filter(None, (f"not shown: {left}" if left else "", lacking, others)))
    made = figure(1.8 + 2.9 * len(shown), 1.0 + 2.0 * len(rows), title, below)
    panels = made.subplots(len(rows), len(shown), sharex="col", sharey="row", squeeze=False)
    for column, cell in enumerate(shown):
        panels[0][column].set_title(series.label(cell), fontsize=11, color=INK)
        for axes, (_, of, _) in zip(panels[:, column], rows, strict=True):
            _lines(axes, told[cell], names, of)
        panels[-1][column].set_xlabel("weight steps", color=INK)
    for row, (name, _, is_log) in zip(panels, rows, strict=True):
        row[0].set_ylabel(name, color=INK)
        values = [y for axes in row for line in axes.lines for y in line.get_ydata()]
        if is_log and min(values) > 0:
            log_scale(row[0], "y", max(values) / min(values))
    made.align_ylabels(panels[:, 0])
    handles = {h.get_label(): h for axes in panels.flat for h in axes.lines}
    legend(made, [handles[name] for name in names if name in handles])
    return made


def _why_none(runs: Runs) -> str:
    """Either nothing was updated, or the file is older than the facts."""
    if any(run.updated for group in runs.groups.values() for run in group):
        return (
            "density and fan-in over updates are not in this file: it was written before they were "
            "kept; train anew"
        )
    return "density and fan-in over updates need a method that updates a topology"


def _seed(run: Run) -> int:
    return run.seed


def _layers_of(runs: Any) -> list[str]:
    """The first and the last layers, if there are many."""
    names = list(dict.fromkeys(layer.name for run in runs for layer in run.layers))
    half = MOST_LAYERS // 2
    return names if len(names) <= MOST_LAYERS else names[:half] + names[-half:]


def _lines(axes: Any, run: Run, names: list[str], of: Fact) -> None:
    plain(axes)
    for i, name in enumerate(names):
        points = _points(run, name, of)
        if points:
            steps, values = zip(*points, strict=True)
            style = {"color": _color(i, len(names)), "linestyle": _DASHES[i % len(_DASHES)]}
            marker = "o" if len(steps) == 1 else ""  # a line of one point is invisible
            axes.plot(steps, values, label=name, linewidth=1.8, marker=marker, **style)


def _points(run: Run, name: str, of: Fact) -> list[tuple[int, float]]:
    """(step, fact) of a layer after each update, where the file has it."""
    layer = next((layer for layer in run.layers if layer.name == name), None)
    if layer is None:
        return []
    found = [(u.step, of(u.layers[name], layer)) for u in run.updates if name in u.layers]
    return [(step, value) for step, value in found if value is not None]


def _color(i: int, count: int) -> Any:
    import matplotlib as mpl  # noqa: PLC0415

    return mpl.colormaps["viridis"](0.85 * i / max(1, count - 1))


def _density(facts: Mapping[str, int], layer: Layer) -> float | None:
    return facts["nnz"] / (layer.shape[0] * layer.shape[1]) if "nnz" in facts else None


def _live(which: str) -> Fact:
    def share(facts: Mapping[str, int], _: Layer) -> float | None:
        return facts[f"live_{which}"] / facts[which] if facts.get(which) else None

    return share


_ROWS: tuple[tuple[str, Fact, bool], ...] = (
    ("density", _density, True),
    ("median fan-in", lambda facts, _: facts.get("fan_in_median"), False),
    ("largest fan-in", lambda facts, _: facts.get("fan_in_max"), True),
    ("live outputs, share", _live("outputs"), False),
    ("live inputs, share", _live("inputs"), False),  # neurons of the layer before that are read
)
