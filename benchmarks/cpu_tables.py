"""The README's tables and figures of the CPU, from suite.json and end_to_end.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparing import plot
from benchmarks.comparing.curves import digest
from benchmarks.comparing.results import Results, Row, read
from benchmarks.end_to_end import VARIANTS
from benchmarks.end_to_end_networks import NETWORKS
from benchmarks.result_files import RESULTS
from benchmarks.suite import bench_conv2d, bench_linear, bench_recurrent

CPU = RESULTS / "cpu"
SUITE = CPU / "suite.json"
UNMEASURED = "not yet measured"

CONVOLUTIONS = {
    "3x3-256-14": "3x3, 256, 14x14",
    "3x3s2-128-56": "3x3/2, 128, 56x56",
    "1x1-256to64-56": "1x1, 256 to 64, 56x56",
    "3x3-32-32": "3x3, 32, 32x32",
    "3x3-64-16": "3x3, 64, 16x16",
    "3x3-128-8": "3x3, 128, 8x8",
    "1x1-16to32-32": "1x1, 16 to 32, 32x32",
    "3x3-3to16-32": "3x3, 3 to 16, 32x32",
}
"""Rows of the table of convolutions, by the suite's names."""

ALT = {
    "speedup.png": "Speed-up of a training step over dense against density, by block, with the "
    "ideal line and the break-even points",
    "memory.png": "Memory of training as a share of dense against density, by block",
}


def from_suite(table: Callable[[Results], str]) -> Callable[[], str]:
    """A table of the suite's results, once there are any."""
    return lambda: table(read(SUITE)) if SUITE.exists() else UNMEASURED


def from_json(name: str, table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A table of benchmarks/results/cpu/NAME.json, once there is one."""
    path = CPU / f"{name}.json"
    return lambda: table(json.loads(path.read_text())) if path.exists() else UNMEASURED


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def weights(block: int) -> str:
    """A block in words."""
    return f"block {block}" if block > 1 else "unstructured"


def linear(results: Results) -> str:
    """A row for each block and density: memory, and speed against dense and its rivals."""
    head = ["weights", "density", "held in training", "1024 x 1024", "4096 x 1024"]
    rows = []
    for block, density in bench_linear.KINDS:
        kind = f"block {block}/{density:g}"
        small, large = (f"linear/step/{n}x1024/{kind}" for n in (1024, 4096))
        cells = [weights(block), f"{density:g}", _held(results, f"linear/memory/1024x1024/{kind}")]
        cells += [_ratio(results, small, "dense"), _ratio(results, large, "dense")]
        peer = "torch csr" if block == 1 else "torch bsr"
        rows.append([*cells, *(_ratio(results, large, other) for other in ("masked", peer))])
    made = table([*head, "against masked", "against torch.sparse"], rows)
    return f"{made}\n\n{measured_on(results.environment)}"


def conv(results: Results) -> str:
    """A row per layer, a column per block and density."""
    kinds = bench_conv2d.KINDS
    rows = []
    for name, shown in CONVOLUTIONS.items():
        cases = [f"conv2d/step/{name}/block {block}/{density:g}" for block, density in kinds]
        rows.append([shown, *(_ratio(results, case, "dense") for case in cases)])
    heads = [f"{weights(block)}, {density:g}" for block, density in kinds]
    return table(["kernel, channels, image", *heads], rows)


def recurrent(results: Results) -> str:
    """A row per block and density, a column per kind of layer."""
    rows = []
    for block, density in bench_recurrent.KINDS:
        cases = [
            f"recurrent/step/{name}/block {block}/{density:g}" for name in bench_recurrent.LAYERS
        ]
        ratios = [_ratio(results, case, "dense") for case in cases]
        rows.append([weights(block), f"{density:g}", *ratios])
    return table(["weights", "density", "GRU", "LSTM", "RNN"], rows)


def end_to_end(content: dict[str, Any]) -> str:
    """Three rows for each network."""
    lines = [
        "| | | step | dense / own | with updates | update | peak of a step | held | GFLOP a step "
        "| loss: mean, at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        one = content["networks"].get(name)
        if one is None or "failed" in one:
            why = UNMEASURED if one is None else f"failed: {one['failed']}"
            lines.append(f"| {NETWORKS[name].title} | {why} |" + " |" * 8)
            continue
        for variant in VARIANTS:
            title = one["title"] if variant == VARIANTS[0] else ""
            cells = [title, variant, *_variant(one["variants"], variant)]
            lines.append(f"| {' | '.join(cells)} |")
    known = [one for one in content["networks"].values() if "environment" in one]
    return "\n".join([*lines, "", measured_on(known[-1]["environment"])] if known else lines)


def _variant(variants: Mapping[str, Any], name: str) -> list[str]:
    own, dense = variants[name], variants["dense"]
    update, with_updates = own["update_seconds"], own["seconds_a_step_with_updates"]
    amortised = dense["seconds_a_step_with_updates"]
    return [
        _milliseconds(own["step_seconds"]),
        f"{own['dense_over_own']['ratio']:.2f}x",
        UNMEASURED if with_updates is None else f"{amortised / with_updates:.2f}x",
        "-" if own["updates"] == 0 else _milliseconds(update),
        f"{own['peak_bytes']['step'] / 2**20:.1f} MiB",
        f"{sum(own['held_bytes'].values()) / 2**20:.1f} MiB",
        f"{own['step_flops'] / 1e9:.2f}",
        f"{own['loss_mean']:.3f}, {own['loss_last']:.3f}",
    ]


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return UNMEASURED
    ms = 1e3 * seconds
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def measured_on(environment: Mapping[str, Any]) -> str:
    """A line on where the numbers of a table come from."""
    e = environment
    return (
        f"Measured on {e['processor']}, {e['threads']} threads, torch {e['torch']}, numba "
        f"{e['numba']}, commit {e['commit']}, {e['date']}."
    )


def stale_figures() -> list[Path]:
    """Figures that are missing, or drawn from other data than the suite's."""
    if not SUITE.exists():
        return []
    results = read(SUITE)
    wanted = {CPU / name: digest(panels(results)) for name, (panels, _) in plot.FIGURES.items()}
    return [p for p, data in wanted.items() if not p.exists() or plot.drawn_from(p) != data]


def draw_figures() -> None:
    """Draw those that are stale, with their sisters."""
    if stale_figures():
        plot.plot(read(SUITE), CPU)


def figures() -> str:
    """The lines that show the figures."""
    if not SUITE.exists():
        return UNMEASURED
    folder = CPU.relative_to(RESULTS.parent.parent).as_posix()
    return "\n\n".join(f"![{ALT[name]}]({folder}/{name})" for name in plot.FIGURES)


def _ratio(results: Results, case: str, other: str) -> str:
    """The other's time over ours; "-" if the case or the other can't be."""
    row: Row = results.rows.get(case, {})
    if "failed" in row:
        return "failed"
    one = row.get("against", {}).get(other, {})
    return f"{one['ratio']:.1f}x" if "ratio" in one else "-"


def _held(results: Results, case: str) -> str:
    """Bytes held in training over those of the dense layer."""
    row: Row = results.rows.get(case, {})
    if "held_bytes" not in row:
        return "failed" if "failed" in row else "-"
    return f"{row['held_bytes']['sparse'] / row['held_bytes']['dense']:.3f}x"
