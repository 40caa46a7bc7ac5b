"""What people read: lines while it runs, tables at the end, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekern.cost import crossing
from sparsekern.cost.roofline import Problem, Roofline, device_named
from sparsekern.show.output_files import write_figure

Row = Mapping[str, Any]

SHAPE = (8192, 4096, 4096)  # M, K, N of the README's table and of the picture


def line(row: Row) -> str:
    """One row in one line."""
    head = [str(row[c]) for c in ("what", "peer", "kernel", "check", "operation") if row.get(c)]
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
        return f"{row['status']} {row.get('detail', '')}".strip()
    hidden = ("M", "K", "N", "nnzb", "density", "rounds", "bytes", "edge")
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in hidden}
    numbers |= row["ms"] if isinstance(row.get("ms"), dict) else {}
    return ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if not isinstance(v, bool))


def summary(content: Mapping[str, Any]) -> str:
    """The end of the output: what was wrong, and one line per case of the first shape."""
    rows = {name: part["rows"] for name, part in content["parts"].items()}
    checks, wrong = rows.get("correctness", []), wrong_checks(content)
    lines = [f"correctness: {len(checks)} checks, {len(wrong)} wrong"]
    lines += [f"  {line(row)}" for row in wrong[:20]]
    lines.append("forward | forward + dX + dW, times dense; in brackets % of the model's ceiling")
    for block, density in _cases([*rows.get("bsr", []), *rows.get("csr", [])]):
        found = [_find(rows, block, density, operation) for operation in ("forward", "three")]
        cells = ["-" if row is None else _cell(row) for row in found]
        lines.append(f"  block {block:>3}, density {density:<5} {cells[0]:>22} | {cells[1]:>22}")
    if content["dry"]:
        lines.append("dry run: nothing here is a measurement")
    unfinished = [n for n, part in content["parts"].items() if not part["complete"]]
    lines += [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
    return "\n".join(lines)


def wrong_checks(content: Mapping[str, Any]) -> list[Row]:
    """The checks that found a fault."""
    rows = content["parts"].get("correctness", {"rows": []})["rows"]
    return [row for row in rows if row["ok"] is False]


def _cell(row: Row) -> str:
    if row["ratio"] is None:
        return str(row["status"])[:22]
    percent = row.get("percent_of_ceiling")
    return f"{row['ratio']:.2f}x" + (f" ({percent:.0f} %)" if percent else "")


def _cases(rows: Iterable[Row]) -> list[tuple[int, float]]:
    """(block, density), largest first; those of square blocks in bf16."""
    return sorted({(row["block"][0], row["density"]) for row in rows}, reverse=True)


def _find(rows: Mapping[str, Sequence[Row]], block: int, density: float, op: str) -> Row | None:
    """The row of the first shape in bf16 that was timed without a graph."""
    for row in rows.get("csr" if block == 1 else "bsr", []):
        same = row["block"] == [block, block] and row["density"] == density
        plain = row["kind"] == "bf16" and not row["graph"] and row["impl"] == "triton"
        if same and plain and row["operation"] == op:
            return row
    return None


def measured(content: Mapping[str, Any], block: int, op: str) -> dict[float, float]:
    """Speed against dense by density, for `SHAPE` in bf16; only what is correct and finished."""
    part = content["parts"].get("csr" if block == 1 else "bsr", {"rows": []})
    found = {}
    for row in part["rows"]:
        plain = row["kind"] == "bf16" and not row["graph"] and row["impl"] == "triton"
        same = row["block"] == [block, block] and (row["M"], row["K"], row["N"]) == SHAPE
        if plain and same and row["operation"] == op and row["status"] == "ok":
            found[row["density"]] = row["ratio"]
    return found


def break_even(speeds: Mapping[float, float]) -> str:
    """The density at which speed against dense is 1, interpolated between measured ones.

    Beyond the measured densities only a bound can be told; an empty string if nothing was measured.
    """
    found = crossing.break_even(speeds.items())
    if found is None:
        return ""
    return f"{ {'': '', '<=': 'below ', '>=': 'above '}[found.bound] }{found.density:.2g}"


def picture(content: Mapping[str, Any], path: Path) -> str:
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
    rows = {name: part["rows"] for name, part in content["parts"].items()}
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, rows, "forward", "forward", model)
    _panel(right, rows, "three", "forward + dX + dW", model)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        about = "dashed: model's ceiling" if model else None
        figure.legend(handles, labels, title=about, fontsize=8, loc="outside right center")
    write_figure(figure, path)
    return f"saved {path}"


def _panel(
    axes: Any, rows: Mapping[str, Sequence[Row]], op: str, title: str, model: Roofline | None
) -> None:
    """One product: a line per block, and the model's."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415  not on every machine

    cases = _cases([*rows.get("bsr", []), *rows.get("csr", [])])
    for index, block in enumerate(dict.fromkeys(block for block, _ in cases)):
        densities, color = [d for b, d in cases if b == block], f"C{index}"
        found = {d: _find(rows, block, d, op) for d in densities}
        timed = {d: row["ratio"] for d, row in found.items() if row and row["ratio"] is not None}
        name = f"block {block}" if block > 1 else "unstructured"
        axes.plot(list(timed), list(timed.values()), "o-", color=color, label=name)
        if model is not None:
            problems = [Problem(*SHAPE, (block, block), d) for d in densities]
            ceilings = [model.speedup(op, problem) for problem in problems]
            axes.plot(densities, ceilings, "--", color=color, linewidth=0.9)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(title=title, xlabel="density", xscale="log", yscale="log")
    axes.set_xticks(sorted({d for _, d in cases}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.grid(visible=True, color="0.92")
