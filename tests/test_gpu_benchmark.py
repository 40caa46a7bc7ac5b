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

from benchmarks.gpu import cases, report  # noqa: E402
from benchmarks.gpu.store import SCHEMA, Store  # noqa: E402
from sparsekern.tuning import trial as kit  # noqa: E402

command = importlib.import_module("benchmarks.gpu.__main__")

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter in this process",
)
PARTS = (
    *("correctness", "dense", "bsr", "csr", "conv", "update", "peers", "probe"),
    *("variants", "resident"),
)
KEY = {"device": "cpu", "torch": "x", "triton": "y", "sources": "z", "launch_table": "shipped"}


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
def test_dry_run_of_all_parts_then_nothing_is_left_to_do(tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import environment

    first = dry(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((tmp_path / "speed.json").read_text())
    check_schema(content)
    assert "dry run: nothing here is a measurement" in first.stdout
    allowed = {"speed.json", "speed.png"}
    assert {path.name for path in tmp_path.iterdir()} <= allowed  # nothing is left lying about
    if importlib.util.find_spec("matplotlib") is None:
        assert "no picture: matplotlib is not installed" in first.stdout
    else:
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(environment, "key", lambda _device: content["key"])
    assert command.main(["--dry", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done before") == len(PARTS)
    assert json.loads((tmp_path / "speed.json").read_text())["parts"] == content["parts"]


def check_schema(content):
    assert content["schema"] == SCHEMA
    assert content["dry"] is True
    assert content["complete"] is True
    assert set(content["key"]) == set(KEY)
    assert {"date", "python", "commit", "nvidia_smi"} <= set(content["environment"])
    assert tuple(content["parts"]) == PARTS
    for part in content["parts"].values():
        assert part["complete"]
        assert part["key"] == content["key"]
        assert part["rows"]
    rows = {name: part["rows"] for name, part in content["parts"].items()}
    assert all(row["ok"] is not False for row in rows["correctness"])
    checked = {(row["kernel"], row["check"]) for row in rows["correctness"]}
    assert {("spmm", "exact"), ("spmm_t", "bound"), ("sddmm", "deterministic")} <= checked
    assert {("layer", "no host sync"), ("layer", "graph after update")} <= checked
    for row in rows["bsr"] + rows["csr"]:
        assert row["status"] == "ok"
        assert row["ms"] > 0
        assert row["ratio"] > 0
        assert {"M", "K", "N", "block", "kind", "density", "operation", "graph"} <= set(row)
    assert {row["operation"] for row in rows["bsr"]} == {"forward", "dx", "dw", "three"}
    assert any(row["graph"] for row in rows["bsr"])
    assert all(
        row["status"] == "ok" or row["status"].startswith("failed: ") for row in rows["peers"]
    )
    assert any(row["status"] == "ok" for row in rows["peers"])
    assert {row["what"] for row in rows["variants"]} == {
        *("forward shipped", "forward num_stages=2", "forward pointer"),
        *("dw shipped", "dw G=1", "dw G=2", "grow kernel"),
    }
    assert all(row["status"] == "ok" and row["ratio"] > 0 for row in rows["variants"])
    assert {row.get("loads") for row in rows["variants"]} == {"tma", "pointer", None}
    assert all(row["status"].startswith("not run: interpreted") for row in rows["resident"])
    assert all(row["ms"] is row["ratio_to_general"] is None for row in rows["resident"])


SMALL = dataclasses.replace(
    cases.DRY, checked_kinds=("bf16",), checked_blocks=((16, 16),), kinds=(), layer_edge=16
)


@interpreted
@pytest.mark.slow
def test_a_wrong_kernel_gets_no_number(tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import parts
    from sparsekern.ops import triton as backend

    right = backend.bsr_spmm
    monkeypatch.setattr(backend, "bsr_spmm", lambda *a, **k: right(*a, **k) + 1)
    monkeypatch.setattr(cases, "DRY", SMALL)
    monkeypatch.setattr(parts, "check_layers", lambda *_: iter(()))
    code = command.main(["--dry", "--out", str(tmp_path), "--parts", "bsr"])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert code == 1
    assert tuple(content["parts"]) == ("correctness", "bsr")  # correctness comes unasked
    wrong = {row["kernel"] for row in report.wrong_checks(content)}
    assert wrong == {"spmm"}
    rows = content["parts"]["bsr"]["rows"]
    assert {row["operation"] for row in rows if row["status"] == "incorrect"} == {
        "forward",
        "three",
    }
    for row in rows:
        if row["status"] == "incorrect":
            assert row["ms"] is row["ratio"] is None
            assert not {"tflops", "percent_of_ceiling", "eager_sparse_ms"} & set(row)
        else:
            assert row["ms"] > 0
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


def test_extra_parts_are_left_out_first(tmp_path, monkeypatch, capsys):
    from benchmarks.gpu import parts

    core = sum(parts.PARTS[name].seconds for name in parts.DEFAULT if not parts.PARTS[name].extra)
    assert core <= 570
    assert [name for name in parts.DEFAULT if parts.PARTS[name].extra] == ["variants", "resident"]
    long = parts.PARTS["variants"]._replace(seconds=10**6)
    monkeypatch.setitem(parts.PARTS, "variants", long)
    monkeypatch.setattr(command, "isolated", lambda *_: None)
    monkeypatch.setattr(Store, "take_in", lambda *_: {})
    monkeypatch.setattr(command, "_finish", lambda *_: None)
    args = command.arguments(
        ["--out", str(tmp_path), "--parts", "variants", "resident", "correctness"]
    )
    monkeypatch.setattr(Store, "part", lambda _self, name: {} if name == "correctness" else None)
    monkeypatch.setattr(parts, "default_device", lambda _dry: torch.device("cpu"))
    assert command.run(args) == 0
    said = capsys.readouterr().out
    assert "left out variants: it may take 1000000 s" in said
    assert "left out resident" not in said


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_group_whose_process_dies_fails_as_a_whole():
    from benchmarks.gpu.parts import check_in_own_process

    rows = check_in_own_process((16, 16), "bf16")
    assert {row["kernel"] for row in rows} == {"spmm", "spmm_t", "sddmm", "grow_scores"}
    assert all(row["ok"] is False and row["detail"].startswith("exit 1: ") for row in rows)


@interpreted
@pytest.mark.slow
def test_a_group_in_its_own_process():
    from benchmarks.gpu.parts import check_in_own_process

    rows = check_in_own_process((16, 16), "fp32", "--dry")
    assert {row["kernel"] for row in rows} == {"spmm", "spmm_t", "sddmm", "grow_scores"}
    assert all(row["ok"] for row in rows)


def test_a_part_in_its_own_process(tmp_path):
    args = command.arguments(["--dry", "--out", str(tmp_path), "--commit", "abc"])
    command.isolated("dense", args, 60.0)
    part = json.loads((tmp_path / "part-dense.json").read_text())
    assert part["complete"]
    assert part["environment"]["commit"] == "abc"


def test_a_budget_stops_before_a_part(tmp_path, capsys):
    assert command.main(["--dry", "--out", str(tmp_path), "--budget-s", "0.5"]) == 0
    assert "stopped before correctness: it may take" in capsys.readouterr().out
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["parts"] == {}
    assert content["complete"] is False


def test_dry_runs_stay_out_of_the_results(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--dry", "--out", str(ROOT / "benchmarks" / "results" / "h200")])
    assert "a dry run measures nothing; got --out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "there is none (--dry runs on the CPU)" in capsys.readouterr().out


def test_results_of_other_sources_are_set_aside(tmp_path):
    old = Store(tmp_path, KEY, dry=False)
    part = {"key": KEY, "complete": True, "rows": []}
    old.write_part("bsr", part)
    assert old.take_in("bsr") == part
    assert old.part("bsr") == part
    assert old.set_aside() is None
    new = Store(tmp_path, KEY | {"sources": "other"}, dry=False)
    assert new.set_aside() == tmp_path / "speed-older.json"
    assert new.part("bsr") is None
    new.write_part("bsr", part)  # made by sources that are not ours
    assert new.take_in("bsr") is None


def test_an_unfinished_part_is_kept_but_not_done(tmp_path):
    store = Store(tmp_path, KEY, dry=False)
    store.write_part("bsr", {"key": KEY, "complete": False, "rows": [1]})
    store.take_in("bsr")
    assert store.part("bsr") is None
    assert store.load()["parts"]["bsr"]["rows"] == [1]


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
        row | {"operation": "three", "density": 0.1, "ratio": 4.0},
        row | {"operation": "three", "density": 0.4, "ratio": 0.25},
        row | {"operation": "forward", "density": 0.1, "ratio": 3.25},
        row | {"operation": "forward", "density": 0.1, "ratio": 9.0, "graph": True},
    ]
    content = {
        "key": KEY | {"device": "NVIDIA H200"},
        "environment": {"commit": "abc", "date": "2026-01-02 03:04:05"},
        "parts": {"bsr": {"rows": rows}},
    }
    table = readme.gpu([(ROOT / "benchmarks/results/h200/speed.json", content)])
    assert "| block 64 | 6.3x | 3.2x | 6.3x | 4x | 0.63 | 0.2 |" in table
    assert "| block 16 | 1.8x | not yet measured |" in table
    assert "Measured on NVIDIA H200" in table
    assert "(../benchmarks/results/h200/speed.json)" in table  # from docs/


def test_picture_of_measured_results(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"kind": "bf16", "graph": False, "impl": "triton", "block": [64, 64]}
    rows = [
        row | {"operation": operation, "density": d, "ratio": r}
        for operation in ("forward", "three")
        for d, r in ((0.5, 1.0), (0.1, 4.0), (0.05, None))
    ]
    key = KEY | {"device": "NVIDIA H200"}
    content = {"key": key, "dry": False, "parts": {"bsr": {"rows": rows}}}
    assert report.picture(content, tmp_path / "speed.png") == f"saved {tmp_path / 'speed.png'}"


def test_make_gpu_uses_the_python_it_is_given():
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", "PYTHON=some-python", "GPU_OUT=somewhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "some-python -m benchmarks.gpu --out somewhere"
