"""Fill the README's tables from benchmarks/results/cpu/*.json.

    python -m benchmarks.readme

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cpu_speed import CASES
from benchmarks.environment import RESULTS

README = Path(__file__).parent.parent / "README.md"


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


TABLES = {"speed": speed, "scale": scale, "accuracy": accuracy}


def filled(text: str) -> str:
    """The README's text with every table made anew from its results."""
    for name, table in TABLES.items():
        results = json.loads((RESULTS / "cpu" / f"{name}.json").read_text())
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, tail = rest.partition(f"\n<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{table(results)}\n<!-- /{name} -->{tail}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
