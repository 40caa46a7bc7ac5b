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
from benchmarks.gpu.conv import FULL as CONV_CASES
from benchmarks.gpu.report import SHAPE, break_even, measured
from sparsekern.planning.roofline import H200, Device, Problem, Roofline, device_named

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


LAYERS = {  # in the README's table of convolutions
    "3x3 256 @ 14": "3x3, 256, 14x14",
    "3x3/2 128 @ 56": "3x3/2, 128, 56x56",
    "1x1 256-64 @ 56": "1x1, 256 to 64, 56x56",
    "3x3 32 @ 32": "3x3, 32, 32x32",
    "3x3 64 @ 16": "3x3, 64, 16x16",
    "3x3 128 @ 8": "3x3, 128, 8x8",
}
KINDS = ((32, 0.1), (16, 0.1), (1, 0.1), (1, 0.05))


def conv(results: dict[str, Any]) -> str:
    """A row per layer, a column per block and density."""
    found: dict[tuple[str, int, float], float] = {}
    for case in results["cases"]:
        asked = min((0.1, 0.05), key=lambda d: abs(d - case["density"]))
        found[case["layer"], case["block"], asked] = case["forward_backward"]["ratio"]
    heads = [f"{_weights(block)}, {density}" for block, density in KINDS]
    lines = [f"| kernel, channels, image | {' | '.join(heads)} |", "|---" * 5 + "|"]
    for name, shown in LAYERS.items():
        cells = [f"{found[name, block, density]:.1f}x" for block, density in KINDS]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def network(results: dict[str, Any]) -> str:
    """A row per way of making WRN-22-2 sparse."""
    lines = ["| distribution | blocks | dense step | sparse step | |", "|---|---|---|---|---|"]
    for case in results["cases"]:
        blocks, step = " and ".join(map(str, case["blocks"])), case["step"]
        lines.append(
            f"| {case['distribution']} | {blocks} | {step['dense_ms']:.0f} ms | "
            f"{step['sparse_ms']:.0f} ms | {step['ratio']:.1f}x |"
        )
    return "\n".join(lines)


def recurrent(results: dict[str, Any]) -> str:
    """A row per block and density, a column per kind of layer."""
    found: dict[tuple[int, float], dict[str, float]] = {}
    for case in results["cases"]:
        asked = min((0.25, 0.1), key=lambda d: abs(d - case["density"]))
        ratio = case["forward_backward"]["ratio"]
        found.setdefault((case["block"], asked), {})[case["layer"]] = ratio
    lines = ["| weights | density | GRU | LSTM | RNN |", "|---|---|---|---|---|"]
    for (block, density), ratios in found.items():
        cells = [f"{ratios[name]:.1f}x" for name in ("GRU", "LSTM", "RNN")]
        lines.append(f"| {_weights(block)} | {density} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _weights(block: int) -> str:
    return f"block {block}" if block > 1 else "unstructured"


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


def conv_accuracy(results: dict[str, Any]) -> str:
    """A row per method."""
    lines = ["| method | test accuracy | training FLOPs |", "|---|---|---|"]
    dense = results["rows"][0]["flops"]["training"]
    for row in results["rows"]:
        share = row["flops"]["training"] / dense
        lines.append(f"| {row['method']} | {row['mean']:.2f} ± {row['std']:.2f} | {share:.2f}x |")
    return "\n".join(lines)


def char_lm(results: dict[str, Any]) -> str:
    """A row per method, and the entropy that a model of single characters reaches."""
    lines = ["| method | bits per character, held out |", "|---|---|"]
    lines += [f"| {row['method']} | {row['mean']:.2f} |" for row in results["rows"]]
    lines.append(f"| unigram entropy of the text | {results['text']['unigram_entropy']:.2f} |")
    return "\n".join(lines)


def gpu_conv(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """The 3x3 layer of 256 channels: what the model allows, and what each GPU's run found."""
    lines = [
        "| weights | forward: model's ceiling | measured | forward + dX + dW: model's ceiling "
        "| measured |",
        "|---|---|---|---|---|",
    ]
    rows = [row for _, content in found for row in content["parts"].get("conv", {}).get("rows", [])]
    for case in CONV_CASES:
        if case.shape != CONV_CASES[0].shape or case.density != GPU_DENSITY:
            continue
        problem, cells = case.shape.problem(case.block, case.density, "bf16"), []
        for operation in ("forward", "three"):
            cells.append(f"{Roofline(H200).speedup(operation, problem):.2g}x")
            measured_ones = [
                f"{row['ratio']:.2g}x"
                for row in rows
                if row["status"] == "ok"
                and row["operation"] == operation
                and (row["K"], row["N"], row["edge"]) == (problem.K, problem.N, case.shape.edge)
                and row["block"] == list(case.block)
                and row["density"] == case.density
            ]
            cells.append(", ".join(measured_ones) or "not yet measured")
        lines.append(f"| {_weights(case.block[0])} | {' | '.join(cells)} |")
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
    "conv": _from_cpu("conv_speed", conv),
    "network": _from_cpu("network_speed", network),
    "recurrent": _from_cpu("recurrent_speed", recurrent),
    "gpu": lambda: gpu(gpu_results()),
    "gpu-conv": lambda: gpu_conv(gpu_results()),
    "scale": _from_cpu("scale", scale),
    "accuracy": _from_cpu("accuracy", accuracy),
    "conv-accuracy": _from_cpu("conv_accuracy", conv_accuracy),
    "char-lm": _from_cpu("char_lm", char_lm),
}


def filled(text: str) -> str:
    """The README's text with every table made anew from its results."""
    for name, table in TABLES.items():
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"\n<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"the README has no lines for a table between the marks of {name!r}")
        text = f"{head}<!-- {name} -->\n{table()}\n<!-- /{name} -->{tail}"
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
