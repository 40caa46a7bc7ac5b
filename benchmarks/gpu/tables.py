"""The report of a result file in Markdown: what decides first, and what was left out last."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import CHECKS, densities, line, measured, wrong_checks
from benchmarks.gpu.store import Content, rows_of
from sparsekern.cost.roofline import Device, Problem, device_named
from sparsekern.show.tables import markdown as table

GAIN = 1.03  # an entry that is faster by less stays as it is
MOST_LINES = 30

Row = dict[str, Any]


def markdown(content: Content) -> str:
    """The whole report."""
    key, runs = content["key"], content["runs"]
    lines = [f"# {key['device']}", ""]
    if content["dry"]:
        lines += ["Dry run: nothing here is a measurement.", ""]
    lines += [f"torch {key['torch']}, triton {key['triton']}, launch table {key['launch_table']}."]
    lines += [_run(run) for run in runs]
    for title, body in (
        ("Correctness", _correctness(content)),
        ("8192 x 4096 x 4096 at density 0.1", headline(content)),
        ("Training steps", steps(content)),
        ("What a call costs the host", _host(content)),
        ("Launch table", list(entries(content))),
        ("Times dense: forward / forward + dX + dW", _by_density(content)),
        ("Convolutions, times dense", _conv(content)),
        ("Failed", _failed(content)),
        ("Parts", _parts(content)),
        ("Left out", _left_out(content)),
    ):
        lines += ["", f"## {title}", "", *(body or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _run(run: Row) -> str:
    told = f"- {run['date']}, commit {run['commit']}, {run.get('seconds', '?')} s"
    kernels = run.get("kernels")
    if kernels:
        told += f"; kernels: {kernels['found']:.0f} found compiled, {kernels['made']:.0f} compiled"
        told += f" in {kernels['seconds']:.0f} s"
    return told


def _correctness(content: Content) -> list[str]:
    checks, wrong = list(rows_of(content, *CHECKS)), wrong_checks(content)
    found = [f"{len(checks)} checks, {len(wrong)} wrong."]
    return found + _listed(f"- {line(row)}" for row in wrong)


def headline(content: Content) -> list[str]:
    """What decides: a line per block and product."""
    device, rows = device_named(content["key"]["device"]), list(rows_of(content, "headline"))
    peers = [row for row in rows if "peer" in row]
    lines = []
    for row in rows:
        if "operation" not in row or "peer" in row:
            continue
        beside = [
            f"{peer['ours_is_faster_by']:.1f}x {peer['peer']}"
            for peer in peers
            if (peer["block"], peer["operation"]) == (row["block"], row["operation"])
            and peer.get("ours_is_faster_by")
        ]
        times = [_number(row, name, scale) for name, scale in (("ms", 1e3), ("ratio", 1))]
        share = _number(row, "percent_of_ceiling", 1)
        status = row["status"] if row["status"] != "ok" else ", ".join(beside)
        lines.append(
            [str(row["block"][0]), row["operation"], *times, share, *expected(row, device), status]
        )
    head = ["block", "product", "us", "x dense", "% of ceiling"]
    head += ["modelled us", "modelled %", "against others"]
    return _table(head, lines)


def expected(row: Row, device: Device | None) -> tuple[str, str]:
    """Modelled microseconds and percent of the ceiling, as ranges; "-" where there are none."""
    if device is None or row["operation"] == "three":
        return "-", "-"
    from benchmarks.gpu import model  # noqa: PLC0415  needs triton

    sizes = (row["M"], row["K"], row["N"])
    problem = Problem(*sizes, (row["block"][0], row["block"][1]), row["density"])
    try:
        found = model.answer(model.shipped(row["operation"], row["block"][0], problem), device)
    except KeyError:  # no compiled figures of this entry
        return "-", "-"
    (fast, slow), (high, low) = found.us, found.ceiling
    return f"{fast:.0f}-{slow:.0f}", f"{100 * low:.0f}-{100 * high:.0f}"


def steps(content: Content) -> list[str]:
    """A line per model, block and mode; memory as measured / predicted."""
    lines = []
    for row in rows_of(content, "steps"):
        if row["status"] != "ok":
            continue
        memory = [
            f"{_number(row, f'{who}peak_mib', 1)} / {_number(row, f'{who}predicted_peak_mib', 1)}"
            for who in ("", "dense_")
        ]
        times = [_number(row, name, 1) for name in ("ms", "dense_ms", "ratio")]
        lines.append([row["what"], str(row["block"][0]), row["mode"], *times, *memory])
    head = ["step", "block", "mode", "ms", "dense ms", "x dense", "peak MiB", "dense peak MiB"]
    return _table(head, lines)


def _host(content: Content) -> list[str]:
    names = ("forward_us", "forward_backward_us")
    head = ["block", "forward us", "forward + backward us", "dense forward", "dense both"]
    lines = [
        [str(row["block"][0])]
        + [_number(row, f"{who}{name}", 1) for who in ("", "dense_") for name in names]
        for row in rows_of(content, "headline")
        if row.get("what") == "host time of a call" and row["status"] == "ok"
    ]
    return _table(head, lines)


def entries(content: Content) -> Iterator[str]:
    """Which entries should change: the best trial of each, if it is faster by enough."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows_of(content, "variants"):
        if row["status"] == "ok" and row.get("key"):
            at = row["operation"], row["block"][0]
            if at not in best or row["ratio"] > best[at]["ratio"]:
                best[at] = row
    for (operation, block), row in best.items():
        if row["ratio"] >= GAIN and row["ratio_low"] > 1:
            yield (
                f"- {operation} of block {block}: {row['ratio']:.2f}x with "
                f'`"{row["key"]}": {row["config"]}`'
            )
        else:
            yield f"- {operation} of block {block}: stays; the best other is {row['ratio']:.2f}x"


def _by_density(content: Content) -> list[str]:
    found = densities(content)
    every = sorted({d for each in found.values() for d in each}, reverse=True)
    lines = []
    for block in found:
        forward, three = (measured(content, block, op) for op in ("forward", "three"))
        cells = [f"{_cell(forward, d)} / {_cell(three, d)}" for d in every]
        lines.append([str(block), *cells])
    return _table(["block", *map(str, every)], lines)


def _cell(found: dict[float, float], density: float) -> str:
    return f"{found[density]:.2f}" if density in found else "-"


def _conv(content: Content) -> list[str]:
    lines: dict[str, list[str]] = {}
    for name, case in content["cases"].items():
        if case["part"] == "conv" and case["error"] is None:
            ratios = {row["operation"]: _number(row, "ratio", 1) for row in case["rows"]}
            lines[name] = [ratios.get(op, "-") for op in ("forward", "dx", "dw", "three")]
    head = ["layer", "forward", "dX", "dW", "together"]
    return _table(head, [[name.removeprefix("conv "), *cells] for name, cells in lines.items()])


def _failed(content: Content) -> list[str]:
    return _listed(
        f"- {name}: {case['error']}"
        for name, case in content["cases"].items()
        if case["error"] is not None
    )


def _parts(content: Content) -> list[str]:
    """Time, and the SM clock beside each part."""
    taken: dict[str, float] = {}
    for run in content["runs"]:
        for name, seconds in run.get("taken", {}).items():
            taken[name] = taken.get(name, 0.0) + seconds
    left, lines = _left(content), []
    for name, part in PARTS.items():
        cases = [c for c in content["cases"].values() if c["part"] == name and not c["error"]]
        clocks = [c["clocks"]["sm_mhz"] for c in cases if c["clocks"]["sm_mhz"] is not None]
        least = [c["clocks"]["sm_mhz_least"] for c in cases if c["clocks"]["sm_mhz"] is not None]
        speed = f"{statistics.median(clocks):.0f} (least {min(least):.0f})" if clocks else "-"
        done = f"{len(cases)} of {len(cases) + len(left.get(name, []))}"
        lines.append([name, done, f"{taken.get(name, 0):.0f}", str(part.seconds), speed])
    return _table(["part", "cases", "s", "share of a run", "SM MHz"], lines)


def _left_out(content: Content) -> list[str]:
    return _listed(
        f"- {part}: {', '.join(names)}" for part, names in _left(content).items() if names
    )


def _left(content: Content) -> dict[str, list[str]]:
    """Cases that the last run did not come to, by part."""
    left: dict[str, list[str]] = content["runs"][-1].get("left", {}) if content["runs"] else {}
    return left


def _number(row: Row, name: str, scale: float) -> str:
    value = row.get(name)
    return "-" if value is None else f"{scale * value:.3g}"


def _listed(lines: Iterable[str]) -> list[str]:
    found = list(lines)
    more = len(found) - MOST_LINES
    return found[:MOST_LINES] + ([f"- and {more} more"] if more > 0 else [])


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    return table([head, *lines]) if lines else []
