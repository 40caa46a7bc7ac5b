"""Fill the tables of README.md and docs/ from benchmarks/results/, and draw the figures.

    python -m benchmarks.readme

Each table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cpu_tables
from benchmarks.cpu_tables import from_json, from_suite, table, weights
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.conv import FULL as CONV_CASES
from benchmarks.gpu.report import SHAPE, break_even, measured
from benchmarks.gpu.store import rows_of
from benchmarks.result_files import RESULTS
from sparsekern.cost.roofline import H200, Device, Problem, Roofline, device_named
from sparsekern.show.output_files import write_whole
from sparsekern.training import report

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
GPU_BLOCKS = (128, 64, 32, 16, 1)
GPU_DENSITY = 0.1
GPU_HEAD = [
    *("weights", "forward: model's ceiling", "measured"),
    *("forward + dX + dW: model's ceiling", "measured"),
]


def scale(results: dict[str, Any]) -> str:
    """The stages of the large layer."""
    return table(
        ["stage", "seconds", "peak memory of the process"],
        (
            [row["stage"], f"{row['seconds']:.0f}", f"{row['peak_gib']:.1f} GiB"]
            for row in results["stages"]
        ),
    )


def accuracy(results: dict[str, Any]) -> str:
    """A row per method and block."""
    return table(
        ["method", "block", "weight decay", "test accuracy"],
        (
            [
                row["method"],
                "-" if row["method"] == "dense" else str(row["block"]),
                f"{row['weight_decay']:g}",
                f"{row['mean']:.2f} ± {row['std']:.2f}",
            ]
            for row in results["rows"]
        ),
    )


def conv_accuracy(results: dict[str, Any]) -> str:
    """A row per method."""
    dense = results["rows"][0]["flops"]["training"]
    return table(
        ["method", "test accuracy", "training FLOPs"],
        (
            [
                row["method"],
                f"{row['mean']:.2f} ± {row['std']:.2f}",
                f"{row['flops']['training'] / dense:.2f}x",
            ]
            for row in results["rows"]
        ),
    )


def methods(results: dict[str, Any]) -> str:
    """What `sparsekern train` prints, and what it was made with."""
    rows, task, made = report.rows(results), results["task"], results["environment"]
    how = (
        f"{task['epochs']} epochs of {results['data']['train']:,} samples, {rows[-1].runs} seeds, "
        f"{task['threads']} thread; {made['processor']}, commit {made['commit']}, {made['date']}."
    )
    return "\n".join([*report.as_markdown(rows, bits=report.in_bits(results)), "", how])


def char_lm(results: dict[str, Any]) -> str:
    """A row per method, and the entropy that a model of single characters reaches."""
    rows = [[row["method"], f"{row['mean']:.2f}"] for row in results["rows"]]
    entropy = f"{results['text']['unigram_entropy']:.2f}"
    rows.append(["unigram entropy of the text", entropy])
    return table(["method", "bits per character, held out"], rows)


def gpu_conv(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """The 3x3 layer of 256 channels: what the model allows, and what each GPU's run found."""
    lines = []
    rows = [row for _, content in found for row in rows_of(content, "conv")]
    for case in CONV_CASES:
        if case.shape != CONV_CASES[0].shape or case.density != GPU_DENSITY:
            continue
        problem, cells = case.shape.problem(case.block, case.density, "bf16"), []
        for operation in ("forward", "three"):
            cells.append(f"{Roofline(H200).speedup(operation, problem):.2g}x")
            measured_ones = [
                f"{row['ratio']:.2g}x"
                for row in rows
                if row["status"] == "ok"  # a failed row has no more
                and row["operation"] == operation
                and (row["K"], row["N"], row["edge"]) == (problem.K, problem.N, case.shape.edge)
                and row["block"] == list(case.block)
                and row["density"] == case.density
            ]
            cells.append(", ".join(measured_ones) or "not yet measured")
        lines.append([weights(case.block[0]), *cells])
    return table(GPU_HEAD, lines)


def gpu(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """A row per block for each GPU with results, or for the model's GPU if there are none."""
    if not found:
        return _gpu_table(H200, None)
    tables = []
    for path, content in found:
        key, facts = content["key"], content["runs"][-1]
        place = f"../{path.relative_to(ROOT).as_posix()}"  # from docs/
        tables.append(
            f"{_gpu_table(device_named(key['device']), content)}\n\n"
            f"Measured on {key['device']}, torch {key['torch']}, triton {key['triton']}, "
            f"commit {facts['commit']}, {facts['date'][:10]} ([`{path.name}`]({place}))."
        )
    return "\n\n".join(tables)


def _gpu_table(device: Device | None, content: dict[str, Any] | None) -> str:
    lines = []
    for block in GPU_BLOCKS:
        cells = [weights(block)]
        for operation in ("forward", "three"):
            problem = Problem(*SHAPE, (block, block), GPU_DENSITY)
            known = device and f"{Roofline(device).speedup(operation, problem):.2g}x"
            speeds = measured(content, block, operation) if content else {}
            got = f"{speeds[GPU_DENSITY]:.2g}x" if GPU_DENSITY in speeds else "not yet measured"
            cells += [known or "-", got]
        point = device and f"{Roofline(device).break_even('three', problem):.2g}"
        cells += [point or "-", break_even(speeds) or "not yet measured"]
        lines.append(cells)
    return table([*GPU_HEAD, "break-even density: model", "measured"], lines)


def gpu_headline(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """The numbers that decide, of each GPU with results, beside what was modelled."""
    return _of_each(found, gpu_tables.headline)


def gpu_steps(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """Training steps of each GPU with results."""
    return _of_each(found, gpu_tables.steps)


def _of_each(
    found: list[tuple[Path, dict[str, Any]]], lines: Callable[[dict[str, Any]], list[str]]
) -> str:
    tables = [
        "\n".join([f"{content['key']['device']}:", "", *lines(content)]) for _, content in found
    ]
    return "\n\n".join(tables) or "Not yet measured."


def gpu_results() -> list[tuple[Path, dict[str, Any]]]:
    """Result files of GPUs, by name; none of a dry run."""
    contents = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu/*.json"))]
    return [(path, content) for path, content in contents if not content["dry"]]


TABLES: dict[str, Callable[[], str]] = {
    "figures": cpu_tables.figures,
    "speed": from_suite(cpu_tables.linear),
    "conv": from_suite(cpu_tables.conv),
    "recurrent": from_suite(cpu_tables.recurrent),
    "end-to-end": from_json("end_to_end", cpu_tables.end_to_end),
    "gpu": lambda: gpu(gpu_results()),
    "gpu-conv": lambda: gpu_conv(gpu_results()),
    "gpu-headline": lambda: gpu_headline(gpu_results()),
    "gpu-steps": lambda: gpu_steps(gpu_results()),
    "scale": from_json("scale", scale),
    "accuracy": from_json("accuracy", accuracy),
    "conv-accuracy": from_json("conv_accuracy", conv_accuracy),
    "char-lm": from_json("char_lm", char_lm),
    "methods-mnist": from_json("methods_mnist", methods),
    "methods-fashion-mnist": from_json("methods_fashion_mnist", methods),
}


def filled(text: str) -> str:
    """A page's text with its tables made anew from their results.

    Raises:
        ValueError: a table begins and does not end.
    """
    for name in marked(text):
        head, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"\n<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"a page has no lines for a table between the marks of {name!r}")
        text = f"{head}<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->{tail}"
    return text


def marked(text: str) -> list[str]:
    """The tables that a page has marks for."""
    return [name for name in TABLES if f"<!-- {name} -->" in text]


if __name__ == "__main__":
    cpu_tables.draw_figures()
    for page in PAGES:
        write_whole(page, filled(page.read_text()))
