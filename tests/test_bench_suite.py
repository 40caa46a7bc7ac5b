"""The benchmark suite: that it works, and that nothing is lost. No time is asserted."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cpu_tables, end_to_end, end_to_end_data  # noqa: E402
from benchmarks.comparing.results import read  # noqa: E402
from benchmarks.paired import Beside, Run, quartiles, ratios  # noqa: E402
from benchmarks.suite import __main__ as driver  # noqa: E402
from benchmarks.suite import (  # noqa: E402
    bench_conv2d,
    bench_linear,
    bench_recurrent,
    bench_update,
    convert,
    problem,
)
from sparsekern.cost.memory import peak_bytes  # noqa: E402

FAMILIES = {
    "linear": bench_linear,
    "conv2d": bench_conv2d,
    "recurrent": bench_recurrent,
    "update": bench_update,
}


# ---- the whole, small


@pytest.mark.slow
def test_the_quick_suite_measures_every_family(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, "-m", "benchmarks.suite", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", out], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = read(out)
    expected = [len(m.QUICK) + len(m.QUICK_MEMORY) for m in FAMILIES.values()]
    assert len(results.rows) == sum(expected)
    assert {row["family"] for row in results.rows.values()} == set(FAMILIES)
    row = results.rows["linear/step/64x32/block 16/0.25"]
    assert row["against"]["torch bsr"]["cannot"].startswith("RuntimeError: addmm")
    assert {"dense", "masked"} <= {n for n, one in row["against"].items() if "ratio" in one}
    assert row["flops"] == row["dense_flops"] / 4 == 3 * 2 * 8 * 64 * 32 / 4
    assert set(row["seconds"]) == {"median", "iqr", "min", "rounds"}
    held = results.rows["linear/memory/64x32/block 16/0.25"]["held_bytes"]
    # 4 tensors of 4 bytes a number, bias included; index arrays of the sparse layer besides
    assert held["dense"] == 16 * (64 * 32 + 64) + 2 * 4  # AdamW counts its steps, 4 bytes each
    assert not out.with_name("quick.partial.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_case_ids_are_unique_and_readable_by_the_tables(family):
    module = FAMILIES[family]
    for cases in (module.SPEED, module.MEMORY, module.QUICK, module.QUICK_MEMORY):
        assert len(set(cases)) == len(cases) > 0


def test_the_tables_ask_for_cases_that_the_suite_has(monkeypatch):
    speed, memory = set(), set()
    for case in bench_linear.SPEED:
        size = f"{case.rows}x{case.cols}/block {case.block}/{case.density:g}"
        speed.add(f"linear/{case.operation}/{size}")
    memory = {
        f"linear/memory/{c.rows}x{c.cols}/block {c.block}/{c.density:g}"
        for c in bench_linear.MEMORY
    }
    for case in bench_conv2d.SPEED:
        speed.add(f"conv2d/{case.operation}/{case.layer}/block {case.block}/{case.density:g}")
    for case in bench_recurrent.SPEED:
        speed.add(f"recurrent/step/{case.layer}/block {case.block}/{case.density:g}")
    asked = {"ratio": set(), "held": set()}
    monkeypatch.setattr(cpu_tables, "_ratio", lambda _, case, __: asked["ratio"].add(case) or "-")
    monkeypatch.setattr(cpu_tables, "_held", lambda _, case: asked["held"].add(case) or "-")
    monkeypatch.setattr(cpu_tables, "measured_on", lambda _: "")
    results = argparse.Namespace(rows={}, environment={})
    for table in (cpu_tables.linear, cpu_tables.conv, cpu_tables.recurrent):
        assert table(results).count("\n") > 3
    too_large = {  # for the channels of the layer
        f"conv2d/step/{name}/block {block}/{density:g}"
        for name in cpu_tables.CONVOLUTIONS
        for block, density in bench_conv2d.KINDS
        if block > min(bench_conv2d.LAYERS[name].inputs, bench_conv2d.LAYERS[name].outputs)
    }
    assert asked["ratio"] - speed == too_large
    assert asked["held"] <= memory


def test_facts_give_the_ids():
    made = bench_linear.setup(bench_linear.QUICK[0])
    assert made.facts.id() == "linear/forward/64x32/block 16/0.25"
    assert made.facts.id("memory") == "linear/memory/64x32/block 16/0.25"


# ---- a wrong kernel gets no time


@pytest.mark.parametrize(
    "case", [bench_linear.QUICK[i] for i in (0, 2, 4, 6)] + bench_conv2d.QUICK[::2], ids=str
)
def test_the_gate_sees_one_wrong_number(case):
    module = bench_conv2d if isinstance(case, bench_conv2d.Case) else bench_linear
    made = module.setup(case)
    problem.check(made.sparse, made.expected, "right")
    for i in range(len(made.expected)):
        wrong = [tensor.clone() for tensor in made.expected]
        wrong[i].view(-1)[-1] += 1
        with pytest.raises(problem.WrongResultError, match=f"result {i} differs"):
            problem.check(made.sparse, tuple(wrong), "wrong")


def test_a_result_too_few_is_no_match():
    made = bench_linear.setup(bench_linear.QUICK[0])
    with pytest.raises(ValueError, match="zip"):
        problem.check(made.sparse, made.expected * 2, "longer")


def test_others_that_fail_or_are_wrong_are_told_apart():
    made = bench_linear.setup(bench_linear.QUICK[0])

    def broken():
        raise RuntimeError("not\nhere")

    wrong = problem.Contender(Run(lambda: 0), lambda _: (made.expected[0] + 1,))
    fails = problem.Contender(Run(broken), lambda y: (y,))
    others = {"wrong": wrong, "fails": fails, "text": "has none", "sparse": made.sparse}
    good, cannot = problem.able(problem.Problem(made.facts, made.sparse, others, made.expected))
    assert list(good) == ["sparse"]
    assert cannot["fails"] == "RuntimeError: not here"
    assert cannot["text"] == "has none"
    assert "differs from the reference" in cannot["wrong"]


def test_every_contender_of_an_update_chooses_the_same():
    for case in bench_update.QUICK:
        made = bench_update.setup(case)
        problem.check(made.sparse, made.expected, str(case))
        good, _ = problem.able(made)
        assert set(good) == {"masked", "plain step"}
    made.sparse.run.prepare()
    before = made.sparse.read(None)[0]
    made.sparse.run.call()  # the next timed call is an update too
    assert not torch.equal(before, made.sparse.read(None)[0])


def test_a_wrong_recurrent_layer_is_found(monkeypatch):
    sparse = bench_recurrent.SparseGRU(32, 32, sparsity=0.75, block=16)
    bench_recurrent.check_module(sparse, torch.randn(3, 2, 32))
    monkeypatch.setattr(
        type(sparse), "to_dense", lambda self: torch.nn.GRU(32, 32, dtype=torch.float64)
    )
    with pytest.raises(problem.WrongResultError, match="differs from torch's"):
        bench_recurrent.check_module(sparse, torch.randn(3, 2, 32))


# ---- nothing is lost

WORKER = """
import json, os, signal, sys
journal, *left = sys.argv[1:]
nodes = left or ["a", "b", "c", "d"]
def note(**event):
    with open(journal, "a") as file:
        file.write(json.dumps(event) + "\\n")
note(nodes=nodes, environment={"threads": 1})
for node in nodes:
    note(begins=node)
    if node == "b":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if node == "c":
        import time
        time.sleep(60)
    note(node=node, entry={"extra_info": {"id": node, "kind": "memory", "peak_bytes": {}}})
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def command(_arguments, left, journal):
        return [sys.executable, str(script), str(journal), *left]

    monkeypatch.setattr(driver, "_command", command)
    return driver.Record(tmp_path / "out.json")


def test_a_crash_and_a_hang_cost_only_themselves(record, capsys):
    driver.run(argparse.Namespace(case_limit=2.0), record)
    rows = json.loads(record.out.read_text())["rows"]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[1]["failed"] == "the process ended with -9: last words"
    assert rows[2]["failed"] == "no end after 2 s"
    assert "failed" not in rows[0]
    assert "failed" not in rows[3]
    assert "[  2/4] b: FAILED" in capsys.readouterr().out.replace("[  2/4] :", "[  2/4] b:")


def test_processes_that_die_at_once_end_the_run(record, monkeypatch, capsys):
    monkeypatch.setattr(
        driver, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"]
    )
    driver.run(argparse.Namespace(case_limit=2.0), record)
    assert not record.rows
    assert "gave up: the process ended with 3" in capsys.readouterr().out


def test_a_failure_takes_the_numbers_away(tmp_path):
    record = driver.Record(tmp_path / "out.json", nodes=["x::a"])
    entry = {"extra_info": {"id": "a", "kind": "memory", "peak_bytes": {}}}
    record.take({"node": "x::a", "entry": entry})
    record.take({"failed": "x::a", "reason": "teardown"})
    record.take({"failed": "x::a", "reason": "again"})
    assert json.loads(record.out.read_text())["rows"] == [{"id": "x::a", "failed": "teardown"}]


def test_a_part_does_not_replace_the_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "run", lambda _arguments, record: outs.append(record.out))
    monkeypatch.setattr(driver, "WHOLE", tmp_path / "suite.json")
    monkeypatch.setattr(driver, "PART", tmp_path / "bench.json")
    outs = []
    for arguments in ([], ["--quick"], ["-k", "dw"], ["--only", "linear"]):
        monkeypatch.setattr(sys, "argv", ["suite", *arguments])
        assert driver.main() == 1  # nothing was measured
    assert [out.name for out in outs] == ["suite.partial.json"] + 3 * ["bench.partial.json"]


def test_pytest_benchmarks_entries_become_small_rows():
    stats = {"median": 0.123456789, "iqr": 1e-9, "min": 0.1, "max": 1.0, "rounds": 7, "data": [1]}
    info = {"id": "a", "kind": "speed", "flops": 10**12, "against": {"dense": {"ratio": 1 / 3}}}
    row = convert.row({"extra_info": info, "stats": stats, "fullname": "f"})
    assert row["seconds"] == {"median": 0.12346, "iqr": 1e-9, "min": 0.1, "rounds": 7}
    assert row["flops"] == 10**12
    assert row["against"]["dense"]["ratio"] == 0.33333
    with pytest.raises(ValueError, match="'f' was not written by"):
        convert.row({"extra_info": {}, "stats": stats, "fullname": "f"})


# ---- what it measures with


def test_peak_bytes_counts_what_is_alive_at_once():
    kept = []

    def work():
        first = torch.empty(1000)
        second = torch.empty(500)
        del second
        kept.append(torch.empty(300))
        del first

    assert peak_bytes(work) == 6000
    assert peak_bytes(work) == 6000  # what an earlier record saw made is not taken off
    assert peak_bytes(kept.clear) == 0


def test_peak_bytes_sees_into_operators():
    x, w = torch.ones(100, 200), torch.ones(300, 200)
    assert peak_bytes(lambda: (x @ w.t()).relu()) == 2 * 4 * 100 * 300


def test_others_take_turns_and_what_prepares_is_called():
    order = []
    runs = {
        name: Run(lambda name=name: order.append(name), lambda name=name: order.append(f"{name}0"))
        for name in "ab"
    }
    beside = Beside(runs, lambda: order.append("own"))
    beside()
    beside()
    assert order == ["a0", "a", "b0", "b", "own", "b0", "b", "a0", "a", "own"]
    assert {name: len(times) for name, times in beside.times.items()} == {"a": 2, "b": 2}
    Beside({})()


def test_ratios_are_of_the_same_rounds():
    found = ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert found == {"ratio": 3.0, "q1": 2.5, "q3": 3.5, "low": 2.0, "high": 4.0}
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        quartiles([])


# ---- whole networks


@pytest.mark.slow
def test_end_to_end_fills_its_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "end_to_end.json"
    arguments = ["--only", "mlp", "--steps", "8", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    assert end_to_end.main() == 0
    capsys.readouterr()
    variants = json.loads(out.read_text())["networks"]["mlp"]["variants"]
    assert set(variants) == set(end_to_end.VARIANTS)
    masked, sparse, dense = (variants[name] for name in ("masked", "sparse", "dense"))
    assert masked["updates"] == sparse["updates"] > 1
    assert masked["weights"] == sparse["weights"]
    assert masked["step_flops"] == dense["step_flops"] > sparse["step_flops"]
    assert sparse["peak_bytes"].keys() == {"step", "update"}
    table = cpu_tables.end_to_end(json.loads(out.read_text()))
    assert "| masked |" in table
    assert table.count("not yet measured") == 2


def test_updates_that_were_not_timed_are_not_free():
    def course(updates, update_times):
        method = argparse.Namespace(history=[None] * updates)
        trainer = argparse.Namespace(method=method if updates else None)
        return end_to_end.Course(trainer, [1.0, 2.0], update_times, [], {})

    assert end_to_end._amortised(course(0, [])) == 1.5
    assert end_to_end._amortised(course(4, [0.5, 1.5])) == 3.5
    assert end_to_end._amortised(course(2, [])) is None


def test_one_timed_update_is_told_as_unmeasured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "end_to_end.json"
    # an update before the steps 1 and 2: the first warms up, the second gives the peak
    arguments = ["--only", "mlp", "--steps", "2", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    assert end_to_end.main() == 0
    assert "with updates not measured  update not measured" in capsys.readouterr().out
    content = json.loads(out.read_text())
    variants = content["networks"]["mlp"]["variants"]
    assert variants["sparse"]["updates"] > 0
    assert variants["sparse"]["seconds_a_step_with_updates"] is None
    assert variants["dense"]["seconds_a_step_with_updates"] is not None
    assert "| sparse |" in cpu_tables.end_to_end(content)
    assert f"| {cpu_tables.UNMEASURED} | {cpu_tables.UNMEASURED} |" in (
        cpu_tables.end_to_end(content)
    )


@pytest.mark.parametrize("name", ["suite", "end_to_end"])
def test_results_that_could_not_be_written_are_not_measured(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    module = {"suite": driver, "end_to_end": end_to_end}[name]
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("measured"))
    for out in (tmp_path / "file" / "out.json", tmp_path):
        monkeypatch.setattr(sys, "argv", [name, "--out", str(out)])
        with pytest.raises(SystemExit) as error:
            module.main()
        assert error.value.code == 2
        assert f"--out must be a file that can be written; got {out}" in capsys.readouterr().err


def test_a_network_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    out = tmp_path / "end_to_end.json"
    end_to_end.write(out, {"gpt": {"title": "before"}})

    def fails(*_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(end_to_end, "run", fails)
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--only", "mlp", "--out", str(out)])
    assert end_to_end.main() == 1
    networks = json.loads(out.read_text())["networks"]
    assert networks == {"mlp": {"failed": "RuntimeError: no luck"}, "gpt": {"title": "before"}}
    assert "failed: RuntimeError: no luck" in capsys.readouterr().out


def test_made_images_can_be_learned_and_padding_keeps_the_middle():
    images = end_to_end_data.made_images(200, 28)
    assert images.train_x.shape == (200, 784)
    wide = end_to_end_data.padded(images, 32)
    assert wide.image_shape == (32, 32)
    middle = wide.train_x.view(-1, 32, 32)[:, 2:-2, 2:-2]
    assert torch.equal(middle.flatten(1), images.train_x)


# ---- the README's side


def test_figures_are_drawn_when_the_data_changed(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu_tables, "CPU", tmp_path)
    monkeypatch.setattr(cpu_tables, "SUITE", tmp_path / "suite.json")
    assert cpu_tables.stale_figures() == []
    assert cpu_tables.figures() == cpu_tables.UNMEASURED
    rows = [row(density, kind) for density in (0.1, 0.2, 0.4, 0.8) for kind in ("speed", "memory")]
    convert.write(tmp_path / "suite.json", {"commit": "c"}, rows)
    assert [path.name for path in cpu_tables.stale_figures()] == ["speedup.png", "memory.png"]
    cpu_tables.draw_figures()
    assert cpu_tables.stale_figures() == []
    convert.write(tmp_path / "suite.json", {"commit": "another"}, rows)
    assert cpu_tables.stale_figures() == []
    rows[0]["against"]["dense"].update(ratio=2.5, q1=2.5)
    convert.write(tmp_path / "suite.json", {"commit": "c"}, rows)
    assert [path.name for path in cpu_tables.stale_figures()] == ["speedup.png"]


def row(density, kind):
    facts = {"family": "linear", "operation": "step", "name": "8x8", "block": 1}
    found = {"id": f"{kind} {density}", "kind": kind, "density": density, **facts}
    if kind == "memory":
        sizes = {"sparse": int(100 * density), "dense": 100}
        return {**found, "peak_bytes": sizes, "held_bytes": sizes}
    ratio = {"ratio": 1 / density, "q1": 1.0, "q3": 1 / density}
    seconds = {"median": 1.0, "iqr": 0.1, "min": 1.0, "rounds": 5}
    return {**found, "seconds": seconds, "against": {"dense": ratio}}


def test_a_table_shows_what_failed_and_what_can_not_be(tmp_path):
    case = "linear/step/{}x1024/block {}/0.1"
    failed = {"id": case.format(1024, 32), "failed": "wrong"}
    others = {"dense": {"ratio": 3.14, "q1": 3.0, "q3": 3.3}, "torch bsr": {"cannot": "no"}}
    measured = {**row(0.1, "speed"), "id": case.format(4096, 32), "against": others}
    environment = dict.fromkeys(("processor", "threads", "torch", "numba", "commit", "date"), "x")
    convert.write(tmp_path / "suite.json", environment, [failed, measured])
    table = cpu_tables.linear(read(tmp_path / "suite.json"))
    assert "| block 32 | 0.1 | - | failed | 3.1x | - | - |" in table
    assert "Measured on x, x threads, torch x, numba x, commit x, x." in table
