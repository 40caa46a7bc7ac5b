"""How `benchmarks.gpu` spends its time, and what it loses when something dies; without kernels."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.gpu import clocks, hands, parts, turns  # noqa: E402
from benchmarks.gpu.agenda import Case, Part  # noqa: E402
from benchmarks.gpu.conduct import opened  # noqa: E402
from benchmarks.gpu.store import Store, file_name  # noqa: E402

KEY = {"device": "NVIDIA H200", "torch": "x", "triton": "y", "launch_table": "shipped"}
DEVICE = torch.device("cpu")


def test_file_names_tell_devices_and_tables_apart():
    assert file_name(KEY) == "nvidia-h200.json"
    assert file_name(KEY | {"launch_table": "abc"}) == "nvidia-h200-table-abc.json"


# ---- processes


SERVER = """
import json, os, sys, time
for line in sys.stdin:
    name = json.loads(line)["case"]
    def say(**event):
        print(json.dumps(event), flush=True)
    say(row={"n": name})
    if name == "dies":
        print("died of it", file=sys.stderr, flush=True)
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    print("a warning")
    error = "RuntimeError: no" if name in ("fails", "loses the device") else None
    say(error=error, lost=name == "loses the device", compiled={"pid": os.getpid()})
"""


def test_a_case_that_dies_or_hangs_costs_itself_alone():
    hand = hands.Apart([sys.executable, "-c", SERVER])
    until = time.monotonic() + 300

    def do(name, silence=60.0):
        return hand.do(Case(name, lambda _: []), silence, until)

    first = do("well")
    assert (first.rows, first.error) == ([{"n": "well"}], None)
    fails = do("fails")
    assert (fails.rows, fails.error) == ([{"n": "fails"}], "RuntimeError: no")
    assert fails.compiled == first.compiled  # by the same process
    dies = do("dies")
    assert dies.rows == [{"n": "dies"}]
    assert dies.error == "the process ended with code 9: died of it"
    assert do("well").error is None
    hangs = do("hangs", 1.0)
    assert (hangs.rows, hangs.error) == ([{"n": "hangs"}], "no answer for 1 s")
    lost, after = do("loses the device"), do("well")
    assert after.error is None
    assert lost.compiled != after.compiled  # by a fresh process
    until = time.monotonic() + 1
    assert do("hangs").error == "the time was up"
    hand.close()


def test_the_real_worker_answers(tmp_path):
    store = Store(tmp_path / "cpu.json", KEY, dry=True)
    store.save()
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--dry", "--store", str(store.path)]
    pytest.importorskip("triton")
    hand = hands.Apart(command)
    until = time.monotonic() + 300
    answer = hand.do(parts.every_case(dry=True)["dense 32x64x48 bf16"], 120.0, until)
    hand.close()
    assert answer.error is None
    assert [row["operation"] for row in answer.rows] == ["forward", "dx", "dw", "three"]
    assert answer.compiled == {"found": 0, "made": 0, "seconds": 0.0}


# ---- turns


class Hand:
    """Does cases at once; `broken` names those that fail, `slow` the seconds they take."""

    def __init__(self, clock, broken=(), seconds=1.0, status="ok"):
        self.clock, self.broken, self.seconds, self.status = clock, broken, seconds, status
        self.did = []

    def do(self, case, _silence, _until):
        self.did.append(case.name)
        self.clock[0] += self.seconds
        error = "died of it" if case.name in self.broken else None
        return hands.Answer([{"what": case.name, "status": self.status}], error, self.seconds)

    def close(self):
        pass


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """A run of two parts of four cases each, over a clock that only work moves."""
    clock = [1000.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])

    def part(letter, seconds):
        made = [Case(f"{letter}{n}", lambda _: [], 1.0) for n in range(4)]
        return Part(lambda _plan, _device: made, seconds, ())

    monkeypatch.setattr(turns, "PARTS", {"a": part("a", 2), "b": part("b", 3)})

    def make(budget, digest="d", path="r.json", **hand):
        store = Store(tmp_path / path, KEY, dry=False)
        store.take([store.path])
        store.runs.append({})
        worker = Hand(clock, **hand)
        watch = clocks.Clocks()
        digests = {"a": digest, "b": "same"}
        one = turns.Run(store, DEVICE, False, clock[0] + budget, lambda: worker, watch, digests)
        for first in (True, False):
            one.turn(["a", "b"], first=first)
        one.note(["a", "b"])
        return worker.did, store

    return make


def test_each_part_has_its_share_then_what_is_left_in_order_of_worth(run_of):
    did, store = run_of(7)
    assert did == ["a0", "a1", "b0", "b1", "b2", "a2", "a3"]
    assert store.runs[-1]["left"] == {"a": [], "b": ["b3"]}
    assert store.runs[-1]["taken"] == {"a": 4.0, "b": 3.0}


def test_the_next_run_goes_on_where_the_last_one_stopped(run_of):
    run_of(7)
    did, store = run_of(100)
    assert did == ["b3"]
    assert [case["run"] for case in store.cases.values()] == [0] * 7 + [1]


def test_other_sources_of_a_part_make_it_pending_again(run_of):
    run_of(100)
    did, _ = run_of(100, digest="other")
    assert did == ["a0", "a1", "a2", "a3"]


def test_what_failed_is_kept_and_tried_again_by_another_run_after_all_else(run_of):
    did, store = run_of(8, broken=("a0",))
    assert did.count("a0") == 1  # not twice in one run
    case = store.cases["a0"]
    assert case["error"] == "died of it"
    assert case["rows"][-1]["status"] == "failed: died of it"
    assert store.runs[-1]["left"] == {"a": ["a0"], "b": []}
    did, store = run_of(8)
    assert did == ["a0"]
    assert store.cases["a0"]["error"] is None


def test_a_row_that_was_not_checked_waits_for_its_turn(run_of):
    did, store = run_of(100, status="not checked")
    first, second = did[:5], did[5:]
    assert first == ["a0", "a1", "b0", "b1", "b2"]
    assert second == ["a2", "a3", "a0", "a1", "b3", "b0", "b1", "b2"]
    assert all(case["error"] == "not checked" for case in store.cases.values())


def test_a_lost_check_withholds_what_depends_on_it(run_of, monkeypatch):
    lost = {"kernel": "spmm", "block": [16, 16], "kind": "bf16", "check": "runs", "ok": False}
    case = Case("check", lambda _: [], 1.0, lost)
    monkeypatch.setattr(
        turns, "PARTS", {"a": Part(lambda *_: [case], 5, ()), "b": turns.PARTS["b"]}
    )
    _, store = run_of(3, broken=("check",))
    store.cases["check"]["part"] = "shipped"
    assert parts.gate_of(store).verdict("forward", (16, 16), "bf16") == "incorrect"


def test_results_travel_and_other_versions_stay_behind(tmp_path):
    first = Store(tmp_path / "one" / "r.json", KEY, dry=False)
    case = {"part": "a", "digest": "d", "run": 0, "error": None, "rows": [{"n": 1}]}
    first.runs.append({"date": "then"})
    first.put("a0", case)
    first.save()
    here = tmp_path / "two" / "r.json"
    store = opened(here, KEY, [first.path, tmp_path / "none.json"], dry=False)
    assert store.cases == {"a0": case}
    assert store.runs == [{"date": "then"}]
    assert opened(here, KEY | {"torch": "z"}, [first.path], dry=False).cases == {}
    store.save()
    assert not here.with_name("r-older.json").exists()
    assert opened(here, KEY | {"torch": "z"}, [], dry=False).cases == {}
    assert json.loads(here.with_name("r-older.json").read_text())["cases"] == {"a0": case}


def test_the_shares_fit_a_run():
    assert sum(part.seconds for part in parts.PARTS.values()) <= 510


@pytest.mark.parametrize("name", list(parts.PARTS))
def test_the_cases_of_a_full_run_have_names_of_their_own(name):
    pytest.importorskip("triton")
    from benchmarks.gpu.cases import FULL

    part = parts.PARTS[name]
    found = part.cases(FULL, DEVICE)
    assert len({case.name for case in found}) == len(found) > 0
    for pattern in part.sources:
        if "persistent" not in pattern and "dealing" not in pattern:
            assert list(ROOT.glob(pattern)), f"{pattern} names no file"


def test_clocks_are_read_beside(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nwhile true; do echo '1500, 2600, 41, [N/A]'; sleep 0.05; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.monotonic()
    with clocks.Clocks() as watch:
        while watch.since(begin)["sm_mhz"] is None and time.monotonic() < begin + 30:
            time.sleep(0.02)
        found = watch.since(begin)
    assert (found["sm_mhz"], found["sm_mhz_least"], found["memory_mhz"]) == (1500, 1500, 2600)
    assert (found["celsius"], found["watts"]) == (41, None)


def test_without_nvidia_smi_clocks_are_unknown(monkeypatch):
    monkeypatch.setattr(clocks.shutil, "which", lambda _: None)
    with clocks.Clocks() as watch:
        assert set(watch.since(0.0).values()) == {None}


# ---- rehearsals


def test_large_products_are_left_out_of_a_rehearsal():
    from benchmarks.gpu.rehearse import LARGE, Untouched

    edge = int(LARGE**0.5) + 1
    small = torch.arange(4.0).view(2, 2)
    with Untouched():
        x = torch.randn(edge, edge, generator=torch.Generator()).bfloat16()
        y = x @ x.t()
        x.normal_().add_(1)
        different = x != torch.zeros_like(x)
        draws = torch.randint(-3, 4, (edge, edge), generator=torch.Generator()).to(torch.float16)
        assert torch.equal(small @ small, torch.tensor([[2.0, 3.0], [6.0, 11.0]]))
        order = torch.rand(LARGE + 2).argsort()
    assert (y.shape, y.dtype) == ((edge, edge), torch.bfloat16)
    assert draws.dtype == torch.float16
    assert not different.any()
    assert torch.equal(order.sort().values, torch.arange(LARGE + 2))  # topologies are drawn
