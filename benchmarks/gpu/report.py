"""What people read while it runs, what is asked of a result file, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.store import Content, rows_of
from sparsekern.cost import crossing
from sparsekern.cost.roofline import Problem, Roofline, device_named
from sparsekern.show.output_files import write_figure

Row = Mapping[str, Any]

CHECKS = ("shipped", "others", "layers")
LINEAR = ("headline", "bsr", "csr")
"""Parts with products of linear layers."""

SHAPE = (8192, 4096, 4096)  # M, K, N of the README's table and of the picture


def line(row: Row) -> str:
    """One row in one line."""
    head = [
        str(row[c]) for c in ("what", "peer", "kernel", "check", "operation", "mode") if row.get(c)
    ]
    if row.get("M"):
        head.append("x".join(str(row[c]) for c in "MKN"))
    if row.get("block"):
        head.append("block " + "x".join(map(str, row["block"])))
    head += [f"{c} {row[c]}" for c in ("shape", "kind", "density", "impl") if c in row]
    head += ["graph"] if row.get("graph") else []
    return f"{', '.join(head)}: {_outcome(row)}"


def _outcome(row: Row) -> str:
    if "ok" in row:
        return "ok" if row["ok"] else f"{'WRONG ' if row['ok'] is False else ''}{row['detail']}"
    if row["status"] != "ok":
        detail = row.get("detail") or ""
        return row["status"] if detail in row["status"] else f"{row['status']} {detail}"
    hidden = ("M", "K", "N", "nnzb", "density", "rounds", "bytes", "edge")
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in hidden}
    numbers |= row["ms"] if isinstance(row.get("ms"), dict) else {}
    return ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if not isinstance(v, bool))


def wrong_checks(content: Content) -> list[Row]:
    """The checks that found a fault, or did not come to their end."""
    return [row for row in rows_of(content, *CHECKS) if row.get("ok") is False]


def measured(content: Content, block: int, op: str) -> dict[float, float]:
    """Speed against dense by density, for `SHAPE` in bf16; only what is correct and finished."""
    found = {}
    for row in rows_of(content, *LINEAR):
        plain = row.get("kind") == "bf16" and not row.get("graph") and row.get("impl") == "triton"
        if not plain or row["block"] != [block, block] or row["operation"] != op:
            continue
        if (row["M"], row["K"], row["N"]) == SHAPE and row["status"] == "ok":
            found[row["density"]] = row["ratio"]
    return found


def densities(content: Content) -> dict[int, list[float]]:
    """By block, largest first: those that `SHAPE` or its like was timed at, ascending."""
    found: dict[int, set[float]] = {}
    for row in rows_of(content, *LINEAR):
        if row.get("kind") == "bf16" and not row.get("graph") and "peer" not in row:
            found.setdefault(row["block"][0], set()).add(row["density"])
    return {block: sorted(found[block]) for block in sorted(found, reverse=True)}


def break_even(speeds: Mapping[float, float]) -> str:
    """The density at which speed against dense is 1, interpolated between measured ones.

    Beyond the measured densities only a bound can be told; an empty string if nothing was measured.
    """
    found = crossing.break_even(speeds.items())
    if found is None:
        return ""
    return f"{ {'': '', '<=': 'below ', '>=': 'above '}[found.bound] }{found.density:.2g}"


def picture(content: Content, path: Path) -> str:
    """Speed against dense by density, the model's ceiling dashed; returns what it did."""
    try:
        # a Figure instead of pyplot: no global state, and no window system is asked for
        from matplotlib.figure import Figure  # noqa: PLC0415  not on every machine
    except ImportError:
        return "no picture: matplotlib is not installed"
    device = device_named(content["key"]["device"])
    model = Roofline(device) if device else None
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    title = f"{content['key']['device']}, bf16, times cuBLAS"
    figure.suptitle("dry run: nothing here is a measurement" if content["dry"] else title)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, content, "forward", "forward", model)
    _panel(right, content, "three", "forward + dX + dW", model)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        about = "dashed: model's ceiling" if model else None
        figure.legend(handles, labels, title=about, fontsize=8, loc="outside right center")
    write_figure(figure, path)
    return f"saved {path}"


def _panel(axes: Any, content: Content, op: str, title: str, model: Roofline | None) -> None:
    """One product: a line per block, and the model's."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415  not on every machine

    ticks = set()
    for index, (block, asked) in enumerate(densities(content).items()):
        color, found = f"C{index}", measured(content, block, op)
        ticks |= set(asked)
        timed = {d: found[d] for d in asked if d in found}
        name = f"block {block}" if block > 1 else "unstructured"
        axes.plot(list(timed), list(timed.values()), "o-", color=color, label=name)
        if model is not None:
            problems = [Problem(*SHAPE, (block, block), d) for d in asked]
            ceilings = [model.speedup(op, problem) for problem in problems]
            axes.plot(asked, ceilings, "--", color=color, linewidth=0.9)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(title=title, xlabel="density", xscale="log", yscale="log")
    axes.set_xticks(sorted(ticks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.grid(visible=True, color="0.92")
