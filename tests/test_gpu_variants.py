"""Parts `variants` and `resident` of `benchmarks.gpu` without a GPU: what they try and refuse."""

import importlib.util
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
from sparsekern.tuning import trial as kit  # noqa: E402

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter in this process",
)


def bench_of(plan):
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.correctness import Gate

    return Bench(plan, torch.device("cpu"), Gate([]))


@interpreted
@pytest.mark.slow
def test_a_variant_that_is_wrong_or_has_no_room_gets_no_number(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from benchmarks.gpu.variants import variants
    from sparsekern.kernels import bsr_spmm, tables
    from sparsekern.ops import triton as backend

    def full(*_args):
        raise OutOfResources(300_000, 232_448, "shared memory")

    def wrong_by_twos(dy, *args, out=None):
        found = right(dy, *args, out=out)
        return found * 2 if tables.find("sm90", *key, tma=False)[0].LANES == 32 else found

    key, right = ("sddmm", "half", 16, "any"), backend.bsr_sddmm
    before = dict(tables.table("sm90"))
    monkeypatch.setattr(bsr_spmm, "_launch_pointer", full)
    monkeypatch.setattr(backend, "bsr_sddmm", wrong_by_twos)
    bench = bench_of(cases.DRY)
    asked = [c for c in variants(bench.plan, bench.device) if "resident" not in c.name]
    found = [row for case in asked if "persistent" not in case.name for row in case.run(bench)]
    rows = {row["what"]: row for row in found}
    assert rows["forward pointer"]["status"] == "out of resources"
    assert "Required: 300000" in report.line(rows["forward pointer"])
    assert rows["dw G=2"]["status"] == "incorrect"
    assert "differ" in rows["dw G=2"]["detail"]
    for name in ("forward pointer", "dw G=2"):
        assert rows[name]["ms"] is rows[name]["ratio"] is None
        assert "tflops" not in rows[name]
    for name in ("forward num_stages=2", "dw G=1", "grow kernel"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["ms"] > 0
    assert tables.table("sm90") == before  # what was taken away is back


@interpreted
def test_a_variant_must_be_what_is_launched():
    from benchmarks.gpu import variants
    from sparsekern.kernels.tables import Key, SddmmConfig

    o = bench_of(cases.DRY).operands(kit.Shape(16, 32, 32), (16, 16), 0.5, "bf16")
    run = variants.products(o, "triton")["dw"]
    trial = variants.Trial(
        "other", Key("sddmm", "half", "32", "any", "pointer"), SddmmConfig(64, 128, 4, 3)
    )
    status, _ = variants._verdict("sm90", trial, run, torch.zeros(()))
    assert status == "not run: the launch does not read sddmm/half/32/any/pointer"


def test_all_variants_of_a_full_run():
    pytest.importorskip("triton")
    from benchmarks.gpu import variants

    shape, found = cases.FULL.variant_shape, {}
    for edge in (128, 64, 32, 16):
        forward = variants._forward_trials("sm90", shape, edge, 0.1, few=False)
        dw = variants._dw_trials("sm90", edge, few=False)
        found |= {(edge, t.name): t for t in [*(forward if edge >= 64 else []), *dw]}
    names = {name for edge, name in found if edge == 64}
    changed = {f"{field}={v}" for field, values in variants.FORWARD.items() for v in values}
    assert names <= {*changed, "as long rows", "pointer", *(f"G={g}" for g in variants.GROUPS)}
    assert {"pointer", "as long rows", "G=1", "G=8"} <= names
    assert found[64, "G=8"].config.LANES == 512
    assert found[64, "G=8"].config.num_warps == 8
    assert found[64, "pointer"].key.loads == "pointer"
    assert found[64, "G=8"].key.loads == "tma"


def test_every_optional_entry_is_tried():
    pytest.importorskip("triton")
    from benchmarks.gpu.variants import _entries
    from sparsekern.kernels import tables

    tried = {trial.key.op for op in ("forward", "dx") for trial in _entries(op, 64)}
    assert tried == set(tables.OPTIONAL)


@interpreted
@pytest.mark.parametrize("operation", ["forward", "dx"])
def test_the_resident_kernel_gets_a_number_only_if_right(operation, monkeypatch):
    from benchmarks.gpu import resident
    from sparsekern.cost.timing import HostClock
    from sparsekern.tuning.trial import products

    monkeypatch.setattr(resident, "DENSITY", 0.5)
    case = resident.Product(
        operation, (16, 16), 16, 32, 32, bias=operation == "forward", timed=True
    )
    calls = 0

    def right(operation, o, bias):
        return products(o, "triton", bias)[operation]()

    def unsteady(*args):
        nonlocal calls
        calls += 1
        return right(*args) + (calls == 3)

    def judged(launch):
        found = resident.judge(case, torch.device("cpu"), HostClock(), launch, 2)
        return {"ms": None} | found

    row = judged(right)
    assert row["status"] == "ok"
    assert row["ms"] > 0
    assert row["ratio_to_general"] > 0
    row = judged(lambda *args: right(*args) + 1)
    assert (row["status"], row["ms"]) == ("incorrect", None)
    assert "differ, first at" in row["detail"]
    row = judged(unsteady)
    assert (row["status"], row["ms"]) == ("incorrect", None)
    assert row["detail"] == "1 of 2 repeats differ from the first run"


MISFITS = """
from benchmarks.gpu import resident
from sparsekern.tuning import trial as kit
from sparsekern.kernels.bsr_spmm_resident import resident_fits

print([
    case
    for case in resident.CASES
    if not resident_fits(
        "sm90", kit.DTYPES[case.kind], case.block, case.held, case.operation == "dx"
    )
])
"""


def test_the_resident_cases_fit_and_come_in_order():
    pytest.importorskip("triton.experimental.gluon")
    from benchmarks.gpu import resident

    done = subprocess.run(
        [sys.executable, "-c", MISFITS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},  # Gluon can't be interpreted
    )
    assert done.stdout.strip() == "[]"
    first = resident.CASES[0]
    assert (first.operation, first.block, first.held) == ("forward", (32, 32), 256)
    assert [case.timed for case in resident.CASES] == sorted(c.timed for c in resident.CASES)
