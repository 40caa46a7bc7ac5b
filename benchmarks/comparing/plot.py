"""Pictures of a result file: speed-up against density, and memory against density."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparing.curves import Curve, Panel, digest, memory, speedups
from benchmarks.comparing.results import Results
from sparsekern.cost.crossing import break_even
from sparsekern.errors import DataError
from sparsekern.show.output_files import write_figure
from sparsekern.training.pictures.style import check_available

COLORS = {128: "#08306b", 64: "#2171b5", 32: "#238b45", 16: "#e6850e", 4: "#9e6dc9", 1: "#c0392b"}
"""By block; the one of the picture that is the same in every panel."""

INK, FAINT = "0.15", "0.55"
DATA_KEY = "Data"
"""The PNG's text field that holds the hash of what was drawn."""

PNG_MARK = b"\x89PNG\r\n\x1a\n"


def plot(results: Results, out: Path) -> list[Path]:
    """Write speedup.png and memory.png.

    Args:
        results: with a layer measured at several densities.
        out: an existing folder.

    Returns:
        The files written.

    Raises:
        DataError: the results hold no curve, or `out` is no folder that can be written to.
        UnavailableError: matplotlib is not installed.
    """
    if not out.is_dir():
        raise DataError(f"`out` must be an existing folder; got {str(out)!r}")
    check_available()
    # all that can fail comes before the first file is written
    drawings = [(out / name, panels(results), draw) for name, (panels, draw) in FIGURES.items()]
    for path, panels, draw in drawings:
        try:
            draw(panels, path, _source(results))
        except OSError as error:
            raise DataError(f"{path}: expected a file that can be written; got: {error}") from error
    return [path for path, _, _ in drawings]


def drawn_from(path: Path) -> str | None:
    """The hash of the data that a picture was drawn from; None if it has none.

    Raises:
        DataError: the file is missing, no PNG, or a damaged one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable picture; got: {error}") from error
    if not content.startswith(PNG_MARK):
        raise DataError(f"{path}: expected a PNG; got something else")
    found = None
    at = len(PNG_MARK)
    while (head := content[at : at + 8]) and len(head) == 8:  # length, type, data, checksum
        kind, end = head[4:], at + 12 + int.from_bytes(head[:4])
        data, check = content[at + 8 : end - 4], content[end - 4 : end]
        if end > len(content):
            break
        if zlib.crc32(kind + data) != int.from_bytes(check):
            raise DataError(f"{path}: expected a whole PNG; a checksum is wrong")
        key, _, text = data.partition(b"\0")
        if kind == b"tEXt" and key.decode("latin-1") == DATA_KEY:
            found = text.decode("latin-1")
        if kind == b"IEND":
            return found
        at = end
    raise DataError(f"{path}: expected a whole PNG; got one that is cut, of {len(content)} bytes")


def _draw_speed(panels: Sequence[Panel], path: Path, source: str) -> None:
    figure, axes = _figure(panels, "Training step: times faster than dense", source)
    for axis, panel in zip(axes, panels, strict=True):
        densities = sorted({d for curve in panel.curves for d, _ in curve.points})
        ideal = [(d, 1 / d) for d in (densities[0], min(1.0, densities[-1]))]
        axis.plot(*zip(*ideal, strict=True), color=FAINT, ls="--", lw=1.2, zorder=1)
        axis.axhline(1, color=INK, lw=1, zorder=1)
        axis.annotate(
            "dense", (densities[0], 1), (2, -4), textcoords="offset points", va="top", color=INK
        )
        for curve in panel.curves:
            _line(axis, curve)
            even = break_even(curve.points)
            if even is not None and not even.bound:
                dot = {"ms": 9, "mfc": "white", "mec": _color(curve), "mew": 2, "zorder": 5}
                axis.plot([even.density], [1], "o", **dot)
        axis.set_title(panel.title, fontsize=12, color=INK)
        axis.set_ylabel("speed-up over dense")
        _log_axes(axis, densities, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50), "{:g}x")
        _legend(axis, panel, "ideal: 1 / density", _crossing)
    write_figure(figure, path, metadata={DATA_KEY: digest(panels)})


def _draw_memory(panels: Sequence[Panel], path: Path, source: str) -> None:
    figure, axes = _figure(panels, "Memory of training, as a share of dense", source)
    for axis, panel in zip(axes, panels, strict=True):
        densities = sorted({d for curve in panel.curves for d, _ in curve.points})
        ends = [(d, d) for d in (densities[0], densities[-1])]
        axis.plot(*zip(*ends, strict=True), color=FAINT, ls="--", lw=1.2, zorder=4)
        axis.axhline(1, color=INK, lw=1, zorder=1)
        for curve in panel.curves:
            _line(axis, curve)
        for curve in panel.others:
            axis.plot(*zip(*curve.points, strict=True), color=_color(curve), ls=":", lw=1.3)
        axis.set_title(panel.title, fontsize=12, color=INK)
        axis.set_ylabel("bytes, times dense")
        _log_axes(axis, densities, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), "{:g}x")
        _legend(axis, panel, "ideal: density", lambda _: "", dotted="peak of a step")
    write_figure(figure, path, metadata={DATA_KEY: digest(panels)})


FIGURES: dict[
    str,
    tuple[Callable[[Results], tuple[Panel, ...]], Callable[[Sequence[Panel], Path, str], None]],
] = {"speedup.png": (speedups, _draw_speed), "memory.png": (memory, _draw_memory)}
"""By file name: what is drawn, and how."""


def _figure(panels: Sequence[Panel], title: str, source: str) -> tuple[Any, list[Any]]:
    # Figure objects instead of pyplot: no global state, and no window system is asked for
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(5.6 * len(panels), 4.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=14, color=INK)
    figure.supxlabel(source, fontsize=8, color=FAINT)
    return figure, list(figure.subplots(1, len(panels), squeeze=False)[0])


def _line(axis: Any, curve: Curve) -> None:
    axis.plot(*zip(*curve.points, strict=True), "o-", color=_color(curve), lw=2, ms=4.5, zorder=3)


def _log_axes(axis: Any, densities: Sequence[float], ticks: Sequence[float], form: str) -> None:
    """Logarithmic both ways, with a tick at every measured density."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("density")
    axis.set_xticks(densities, [f"{d:g}" for d in densities])
    low, high = axis.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(shown, [form.format(tick) for tick in shown])
    axis.minorticks_off()
    axis.grid(color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(
    axis: Any,
    panel: Panel,
    ideal: str,
    note: Callable[[Curve], str],
    dotted: str | None = None,
) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D(
            [], [], color=_color(curve), lw=2, marker="o", ms=4.5, label=_name(curve) + note(curve)
        )
        for curve in panel.curves
    ]
    handles.append(Line2D([], [], color=FAINT, ls="--", lw=1.2, label=ideal))
    if dotted is not None:
        handles.append(Line2D([], [], color=INK, ls=":", lw=1.3, label=dotted))
    axis.legend(handles=handles, frameon=False, fontsize=9)


def _crossing(curve: Curve) -> str:
    """Where it breaks even, or that it does not among the measured densities."""
    even = break_even(curve.points)
    words = {"": "breaks even at", ">=": "faster up to", "<=": "slower from"}
    return f": {words[even.bound]} {even.density:.2g}" if even else ""


def _color(curve: Curve) -> str:
    return COLORS.get(curve.block, INK)


def _name(curve: Curve) -> str:
    return f"block {curve.block}" if curve.block > 1 else "unstructured"


def _source(results: Results) -> str:
    """A line on where it was measured."""
    facts = results.environment
    return (
        f"{facts.get('processor')}, {facts.get('threads')} threads, float32, "
        f"torch {facts.get('torch')}, commit {facts.get('commit')}"
    )
