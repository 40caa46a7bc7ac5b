"""The planner's benchmark: its shapes, its verdicts, and the fit of the table of rates."""

import json
import sys

import pytest

from sparsekern.cost.cpu_rates import FIXED, Work, dense_seconds, sparse_seconds
from sparsekern.cost.timing import StepTime
from sparsekern.errors import DataError


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    """The folder stands beside the package, and is not installed."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))


def test_shapes_are_drawn_alike_and_of_both_kinds():
    from benchmarks.planner import MOST_FLOPS, drawn

    shapes = drawn(10, 0)
    assert shapes == drawn(10, 0)
    assert shapes != drawn(10, 1)
    assert len({shape for shape, _ in shapes}) == 10
    assert sum(shape.kernel == 0 for shape, _ in shapes) == 5
    assert {density for _, density in shapes} == {0.1, 0.25}
    for shape, _ in shapes:
        assert shape.flops <= MOST_FLOPS
        module, x = shape.module(), shape.x()
        y = module(x)
        tokens = y.numel() // shape.outputs
        assert 6 * tokens * module.weight.numel() >= shape.flops


def test_the_whole_walk(monkeypatch, capsys, tmp_path):
    from benchmarks import planner, result_files
    from sparsekern.planning import measure

    ratios = {"dense": 1.0, "1": 0.5, "1x1": 0.5}

    def times(steps, _baseline, **_):
        for step in steps.values():
            step()
        return {n: StepTime(ratios.get(n, 0.8), ratios.get(n, 0.8)) for n in steps}

    monkeypatch.setattr(planner, "paired_step_times", times)
    monkeypatch.setattr(measure, "paired_step_times", times)
    monkeypatch.setattr(planner, "MOST_FLOPS", 1e7)
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["planner", "--shapes", "2", "--threads", "1"])
    planner.main()
    assert "within 10% of the best: 100% measured (asked: 90%)" in capsys.readouterr().out
    found = json.loads((tmp_path / "cpu" / "planner.json").read_text())
    assert [row["best"] for row in found["shapes"]] == ["1", "1"]
    assert [row["measured_above_best"] for row in found["shapes"]] == [1.0, 1.0]
    assert found["good"]["measured"] == 1


def suite_row(kind, tokens, width, block, density):
    """A row of the suite's results with times straight from the table."""
    threads, weights = 2, width * width
    dense = Work(6 * tokens * weights, 2 * tokens * width, weights)
    sparse = Work(dense.flops * density, dense.numbers, weights * density)
    seconds = dense_seconds(kind, dense, threads)
    ratio = seconds / sparse_seconds(kind, (block, block), sparse, threads)
    return {
        "id": f"{tokens} {width} {block} {density}",
        "kind": "speed",
        "family": "linear",
        "operation": "step",
        "name": f"{width}x{width}",
        "sizes": {"outputs": width, "inputs": width, "tokens": tokens},
        "block": block,
        "density": density,
        "active": density,
        "dense_flops": dense.flops,
        "seconds": {"median": 1.0, "iqr": 0.0, "rounds": 1},
        "against": {
            "dense": {"seconds": seconds, "ratio": ratio, "q1": ratio, "q3": ratio},
        },
    }


def results(path, rows, threads=2):
    environment = {"threads": threads}
    content = {"kind": "sparsekern benchmarks", "version": 1, "environment": environment}
    path.write_text(json.dumps(content | {"rows": rows}))
    from benchmarks.comparing.results import read

    return read(path)


def test_the_fit_describes_times_that_follow_the_formula(tmp_path):
    from benchmarks.cpu_rates import cases, fit

    rows = [
        suite_row("linear", tokens, width, block, density)
        for tokens in (256, 1024)
        for width in (512, 2048)
        for block in (1, 16)
        for density in (0.05, 0.2)
    ]
    found = fit("linear", cases(results(tmp_path / "suite.json", rows)))
    start = fit_of_nothing(rows, tmp_path)
    assert found["spread"] < start
    assert set(found["sparse"][0]) == {1, 16}
    assert found["sparse"][0][1] < found["sparse"][0][16] <= found["dense"][0]


def fit_of_nothing(rows, tmp_path):
    """The typical error of saying that every ratio is 1."""
    from math import log

    from benchmarks.cpu_rates import cases

    every = cases(results(tmp_path / "suite.json", rows))
    return (sum(log(case.ratio) ** 2 for case in every) / len(every)) ** 0.5


def test_results_of_other_threads_are_refused(tmp_path):
    from benchmarks.cpu_rates import cases

    with pytest.raises(DataError, match="expected 2 threads; got 8"):
        cases(results(tmp_path / "suite.json", [], threads=8))
    assert set(FIXED) == {"linear", "conv", "pointwise", "recurrent"}
