"""Fill the README's tables from benchmarks/results/cpu/*.json and, if any, a GPU's speed.json.

    python -m benchmarks.readme

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cpu_speed import CASES
from benchmarks.environment import RESULTS
from benchmarks.gpu.report import SHAPE, break_even, measured
from benchmarks.roofline import H200, Device, Problem, Roofline, device_named

README = Path(__file__).parent.parent / "README.md"
GPU_BLOCKS = (128, 64, 32, 16, 1)
GPU_DENSITY = 0.1


def speed(results: dict[str, Any]) -> str:
    """A row per block and density, a column per layer."""
    cases: dict[tuple[int, float], dict[int, dict[str, Any]]] = {}
    for case in results["cases"]:
        # whole blocks miss the density asked for by a little
        asked = min({density for _, density, _ in CASES}, key=lambda d: abs(d - case["density"]))
        key = case["block"], asked
        cases.setdefault(key, {})[case["shape"][0]] = case
    lines = [
        "| weights | density | weights, gradient, AdamW, indices | 1024 x 1024 | 4096 x 1024 |",
        "|---|---|---|---|---|",
    ]
    for (block, density), by_rows in cases.items():
        name = f"block {block}" if block > 1 else "unstructured"
        held = density * (16 + 12 / block**2) / 16
        times = [f"{by_rows[n]['forward_backward']['ratio']:.1f}x" for n in (1024, 4096)]
        lines.append(f"| {name} | {density} | {held:.3f}x | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def scale(results: dict[str, Any]) -> str:
    """The stages of the large layer."""
    lines = ["| stage | seconds | peak memory of the process |", "|---|---|---|"]
    lines += [
        f"| {row['stage']} | {row['seconds']:.0f} | {row['peak_gib']:.1f} GiB |"
        for row in results["stages"]
    ]
    return "\n".join(lines)


def accuracy(results: dict[str, Any]) -> str:
    """A row per method and block."""
    lines = ["| method | block | weight decay | test accuracy |", "|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['block'] if row['method'] != 'dense' else '-'} | "
        f"{row['weight_decay']:g} | {row['mean']:.2f} ± {row['std']:.2f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines)


def gpu(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """A row per block for each GPU with results, or for the model's GPU if there are none."""
    if not found:
        return _gpu_table(H200, None)
    tables = []
    for path, content in found:
        key, facts = content["key"], content["environment"]
        place = path.relative_to(README.parent).as_posix()
        tables.append(
            f"{_gpu_table(device_named(key['device']), content)}\n\n"
            f"Measured on {key['device']}, torch {key['torch']}, triton {key['triton']}, "
            f"commit {facts['commit']}, {facts['date'][:10]} ([`{path.name}`]({place}))."
        )
    return "\n\n".join(tables)


def _gpu_table(device: Device | None, content: dict[str, Any] | None) -> str:
    lines = [
        "| weights | forward: model's ceiling | measured | forward + dX + dW: model's ceiling "
        "| measured | break-even density: model | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for block in GPU_BLOCKS:
        cells = [f"block {block}" if block > 1 else "unstructured"]
        for operation in ("forward", "three"):
            problem = Problem(*SHAPE, (block, block), GPU_DENSITY)
            known = device and f"{Roofline(device).speedup(operation, problem):.2g}x"
            speeds = measured(content, block, operation) if content else {}
            got = f"{speeds[GPU_DENSITY]:.2g}x" if GPU_DENSITY in speeds else "not yet measured"
            cells += [known or "-", got]
        point = device and f"{Roofline(device).break_even('three', problem):.2g}"
        cells += [point or "-", break_even(speeds) or "not yet measured"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_results() -> list[tuple[Path, dict[str, Any]]]:
    """Result files of GPUs, by folder; none of a dry run."""
    paths = sorted(p for p in RESULTS.glob("*/speed.json") if p.parent.name != "cpu")
    contents = [(path, json.loads(path.read_text())) for path in paths]
    return [(path, content) for path, content in contents if not content["dry"]]


def _from_cpu(name: str, table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    return lambda: table(json.loads((RESULTS / "cpu" / f"{name}.json").read_text()))


TABLES: dict[str, Callable[[], str]] = {
    "speed": _from_cpu("speed", speed),
    "gpu": lambda: gpu(gpu_results()),
    "scale": _from_cpu("scale", scale),
    "accuracy": _from_cpu("accuracy", accuracy),
}


def filled(text: str) -> str:
    """The README's text with every table made anew from its results."""
    for name, table in TABLES.items():
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, tail = rest.partition(f"\n<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{table()}\n<!-- /{name} -->{tail}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
