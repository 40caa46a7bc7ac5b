"""`benchmarks.gpu` without a GPU: a dry run, going on after a stop, and what withholds a number."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.gpu import cases, report, tables  # noqa: E402
from benchmarks.gpu.store import SCHEMA, rows_of  # noqa: E402
from sparsekern.tuning import trial as kit  # noqa: E402

command = importlib.import_module("benchmarks.gpu.__main__")

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter in this process",
)
KEY = {"device": "cpu", "torch": "x", "triton": "y", "launch_table": "shipped"}


def content_of(**parts):
    """A result file's content with rows by part."""
    cases = {
        f"{part} {n}": {"part": part, "rows": [row], "error": None, "digest": "d", "run": 0}
        | {"clocks": {"sm_mhz": None, "sm_mhz_least": None}}
        for part, rows in parts.items()
        for n, row in enumerate(rows)
    }
    run = {"commit": "abc", "date": "2026-01-02", "left": {}}
    return {"key": KEY | {"device": "NVIDIA H200"}, "dry": False, "runs": [run], "cases": cases}


@pytest.fixture(autouse=True)
def _environment_is_restored(monkeypatch):
    """The command sets this one for its own process."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))


def dry(out, *more):
    """The command in its own process, whose kernels nothing else has touched."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--dry", "--out", out, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_dry_run_of_all_parts_then_nothing_is_left_to_do(tmp_path):
    first = dry(tmp_path, "--carry")
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((tmp_path / "cpu.json").read_text())
    check_schema(content)
    assert "nothing here is a measurement" in first.stdout
    allowed = {"cpu.json", "cpu.md", "cpu.png"}
    assert {path.name for path in tmp_path.iterdir()} <= allowed  # nothing is left lying about
    if importlib.util.find_spec("matplotlib") is None:
        assert "no picture: matplotlib is not installed" in first.stdout
    else:
        assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")

    other = tmp_path / "fresh machine"
    second = dry(other, "--carry", str(tmp_path / "cpu.json"))
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{len(content['cases'])} cases are done already" in second.stdout
    again = json.loads((other / "cpu.json").read_text())
    assert again["cases"] == content["cases"]
    assert len(again["runs"]) == 2


def check_schema(content):
    from benchmarks.gpu.parts import PARTS

    assert content["schema"] == SCHEMA
    assert content["dry"] is True
    assert set(content["key"]) == set(KEY)
    run = content["runs"][0]
    assert {"date", "python", "commit", "nvidia_smi", "seconds", "kernels"} <= set(run)
    assert set(run["taken"]) == set(run["left"]) == set(PARTS)
    assert not any(run["left"].values())
    assert {case["part"] for case in content["cases"].values()} == set(PARTS)
    for case in content["cases"].values():
        assert case["error"] is None
        assert case["rows"]
        assert case["clocks"].keys() == {
            *("sm_mhz", "sm_mhz_least", "memory_mhz", "celsius", "watts")
        }
    rows = {name: list(rows_of(content, name)) for name in PARTS}
    assert all(row["ok"] for row in rows["shipped"] + rows["others"])
    checked = {(row["kernel"], row["check"]) for row in rows["shipped"]}
    assert {("spmm", "exact"), ("spmm_t", "bound"), ("sddmm", "deterministic")} <= checked
    layers = {(row["kernel"], row["check"]) for row in rows["layers"]}
    assert layers == {("layer", "no host sync"), ("layer", "graph after update")}
    ours = [row for row in rows["headline"] if "impl" in row]
    for row in ours + rows["bsr"] + rows["csr"]:
        assert row["status"] == "ok"
        assert row["ms"] > 0
        assert row["ratio"] > 0
        assert {"M", "K", "N", "block", "kind", "density", "operation", "graph"} <= set(row)
    assert [row["operation"] for row in ours] == ["forward", "dx", "dw", "three"]
    assert rows["headline"][-1]["forward_backward_us"] > 0
    assert any(row["graph"] for row in rows["bsr"])
    assert all(
        row["status"] == "ok" or row["status"].startswith("failed: ") for row in rows["peers"]
    )
    assert any(row["status"] == "ok" for row in rows["peers"])
    assert {row["mode"] for row in rows["steps"]} == {"eager", "graph"}
    assert all(row["status"] == "ok" and row["ratio"] > 0 for row in rows["steps"])
    assert all(row["predicted_peak_mib"] > 0 for row in rows["steps"] if row["mode"] == "eager")
    tried = [row for row in rows["variants"] if row["status"] == "ok"]
    assert {row["what"] for row in tried} == {
        *("forward num_stages=2", "forward pointer", "dw G=1", "dw G=2", "grow kernel"),
    }
    assert all(row["ratio"] > 0 for row in tried)
    left = [row["status"] for row in rows["variants"] if row["status"] != "ok"]
    assert all(status.startswith("not run: the launch does not read spmm") for status in left)
    assert all(row["status"].startswith("not run: interpreted") for row in rows["resident"])
    assert all(row["ms"] is row["ratio_to_general"] is None for row in rows["resident"])


SMALL = dataclasses.replace(
    cases.DRY, checked_kinds=("bf16",), checked_blocks=((16, 16),), kinds=(), layer_edge=16
)


@interpreted
@pytest.mark.slow
def test_a_wrong_kernel_gets_no_number(tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import parts, turns
    from sparsekern.ops import triton as backend

    right = backend.bsr_spmm
    monkeypatch.setattr(backend, "bsr_spmm", lambda *a, **k: right(*a, **k) + 1)
    monkeypatch.setattr(parts, "DRY", SMALL)
    monkeypatch.setattr(turns, "DRY", SMALL)
    asked = ["--parts", "shipped", "headline", "bsr"]
    code = command.main(["--dry", "--carry", "--out", str(tmp_path), *asked])
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert code == 1
    assert {row["kernel"] for row in report.wrong_checks(content)} == {"spmm"}
    rows = [row for row in rows_of(content, "headline", "bsr") if "impl" in row]
    wrong = [row for row in rows if row["status"] == "incorrect"]
    assert {row["operation"] for row in wrong} == {"forward", "three"}
    for row in wrong:
        assert row["ms"] is row["ratio"] is None
        assert not {"tflops", "percent_of_ceiling", "eager_sparse_ms"} & set(row)
    assert all(row["ms"] > 0 for row in rows if row not in wrong)
    assert report.measured(content, 16, "forward") == {}
    assert "WRONG" in capsys.readouterr().out


@interpreted
def test_a_case_that_is_wrong_only_at_its_own_size_gets_no_number(monkeypatch):
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.correctness import Gate
    from sparsekern.ops import triton as backend

    passed = [
        {"kernel": kernel, "block": [16, 16], "kind": "bf16", "ok": True}
        for kernel in ("spmm", "spmm_t", "sddmm")
    ]
    bench = Bench(SMALL, torch.device("cpu"), Gate(passed))
    o = bench.operands(kit.Shape(16, 32, 32), (16, 16), 0.5, "bf16")
    assert set(bench.verdicts(o).values()) == {"ok"}
    right = backend.bsr_sddmm
    monkeypatch.setattr(backend, "bsr_sddmm", lambda *a, **k: right(*a, **k) * 2)
    found = bench.verdicts(o)
    assert found["forward"] == "ok"
    assert found["dw"] == found["three"] == "incorrect"


def test_what_was_not_checked_gets_no_number():
    from benchmarks.gpu.correctness import Gate

    row = {"kernel": "spmm", "block": [16, 16], "kind": "bf16", "ok": True}
    gate = Gate([row])
    assert gate.verdict("forward", (16, 16), "bf16") == "ok"
    assert gate.verdict("forward", (16, 16), "fp16") == "not checked"
    assert gate.verdict("three", (16, 16), "bf16") == "not checked"
    assert Gate([row, row | {"ok": False}]).verdict("forward", (16, 16), "bf16") == "incorrect"


def test_the_bound_and_the_comparison_can_fail():
    from benchmarks.gpu.correctness import beyond_bound
    from sparsekern.tuning.trial import Sum, difference

    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    want = Sum(exact, exact, 4)
    assert beyond_bound(exact.float(), want, "fp32") == ""
    assert beyond_bound(exact.float() + 1e-5, want, "fp32") == "2 of 2 outside the bound"
    assert beyond_bound(exact.float() + 1e-5, want, "tf32") == ""
    assert beyond_bound(torch.tensor([1.0, torch.nan]), want, "fp32") == "1 of 2 outside the bound"
    assert "expected (2,)" in beyond_bound(exact.half(), want, "fp32")
    assert difference(exact, exact) == ""
    assert difference(exact, exact.flip(0)) == "2 of 2 differ, first at [0]"
    assert "got (1,)" in difference(exact[:1], exact)


def test_dry_runs_stay_out_of_the_results(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--dry", "--out", str(ROOT / "benchmarks" / "results" / "gpu")])
    assert "this measures nothing; got --out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "there is none (--dry runs on the CPU)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ({}, ""),
        ({0.1: 4.0, 0.4: 0.25}, "0.2"),
        ({0.1: 0.9, 0.2: 0.5}, "below 0.1"),
        ({0.1: 5.0, 0.5: 1.2}, "above 0.5"),
    ],
)
def test_break_even(speeds, said):
    assert report.break_even(speeds) == said


def test_readme_table_of_measured_results():
    from benchmarks import readme

    row = {"kind": "bf16", "graph": False, "impl": "triton", "block": [64, 64], "status": "ok"}
    row |= dict(zip("MKN", report.SHAPE, strict=True))
    rows = [
        row | {"operation": "three", "density": 0.4, "ratio": 0.25},
        row | {"operation": "forward", "density": 0.1, "ratio": 9.0, "graph": True},
        {"what": "bsr 32", "status": "failed: died of it", "ms": None},
    ]
    first = [
        row | {"operation": "three", "density": 0.1, "ratio": 4.0},
        row | {"operation": "forward", "density": 0.1, "ratio": 3.25, "ms": 0.1},
        {"peer": "bsr_dense_addmm", "operation": "forward", "block": [64, 64], "status": "ok"}
        | {"ours_is_faster_by": 2.5},
    ]
    content = content_of(headline=first, bsr=rows)
    found = [(ROOT / "benchmarks/results/gpu/nvidia-h200.json", content)]
    table = readme.gpu(found)
    assert "| block 64 | 6.3x | 3.2x | 6.3x | 4x | 0.63 | 0.2 |" in table
    assert "| block 16 | 1.8x | not yet measured |" in table
    assert "Measured on NVIDIA H200" in table
    assert "(../benchmarks/results/gpu/nvidia-h200.json)" in table  # from docs/
    headline = readme.gpu_headline(found)
    assert "| 64 | forward | 100 | 3.25 |" in headline
    assert "2.5x bsr_dense_addmm" in headline
    assert readme.gpu_headline([]) == readme.gpu_steps([]) == "Not yet measured."


def test_the_report_says_which_entry_should_change():
    row = {"operation": "forward", "block": [64, 64], "status": "ok", "config": {"BM": 256}}
    rows = [
        row | {"key": "spmm/half/64/short/tma", "ratio": 1.2, "ratio_low": 1.1},
        row | {"key": "spmm/half/64/short/tma", "ratio": 1.5, "ratio_low": 0.9, "block": [32, 32]},
        row | {"key": "other", "ratio": 1.1, "ratio_low": 1.05},
        row | {"key": "x", "status": "incorrect", "ratio": None},
        {"what": "forward died", "status": "failed: died", "ms": None},
    ]
    assert list(tables.entries(content_of(variants=rows))) == [
        "- forward of block 64: 1.20x with `\"spmm/half/64/short/tma\": {'BM': 256}`",
        "- forward of block 32: stays; the best other is 1.50x",
    ]


def test_picture_of_measured_results(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"kind": "bf16", "graph": False, "impl": "triton", "block": [64, 64]}
    row |= dict(zip("MKN", report.SHAPE, strict=True))
    rows = [
        row | {"operation": op, "density": d, "ratio": r, "status": "ok" if r else "incorrect"}
        for op in ("forward", "three")
        for d, r in ((0.5, 1.0), (0.1, 4.0), (0.05, None))
    ]
    path = tmp_path / "speed.png"
    assert report.picture(content_of(bsr=rows), path) == f"saved {path}"


def test_make_gpu_uses_the_python_it_is_given(tmp_path):
    def asked(*more):
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", *more, "PYTHON=some-python"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return " ".join(done.stdout.replace("\\\n", " ").split())

    plain = "some-python -m benchmarks.gpu --out somewhere"
    nowhere = f"GPU_KERNELS={tmp_path}"
    assert asked("gpu", "GPU_OUT=somewhere", nowhere) == plain
    archive = tmp_path / "compiled.tar.xz"
    archive.touch()
    assert asked("gpu", "GPU_OUT=somewhere", nowhere) == f"{plain} --compiled {archive}"
    assert "some-python -m benchmarks.gpu --rehearse" in asked("gpu-kernels")
    assert "some-python -m sparsekern tune --out runs/gpu/table.json" in asked("gpu-tune")
