"""Runs of `sparsekern train` that break off, fail or go side by side lose themselves alone."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.cli.main import main
from sparsekern.show.progress import Progress, span
from sparsekern.training import data, report, results, runs
from sparsekern.training.config import PRESETS, TrainConfig
from sparsekern.training.grid import Grid, Spec
from sparsekern.training.network import build
from sparsekern.training.runs import Task, side_by_side
from sparsekern.training.trainer import Trainer

TESTS = Path(__file__).resolve().parent
LINE = ["train", "--hidden", "16", "--epochs", "1", "--update-freq", "4", "--seeds", "2"]
LINE += ["--method", "static", "rigl", "pruning", "--quiet"]
TIMES = ("seconds", "step_seconds", "update_seconds")


def bits(path):
    """A result file without what a clock or a commit says."""
    content = json.loads(path.read_text())
    del content["environment"]
    for run in content["runs"]:
        forget_times(run)
    return content


def forget_times(run):
    for name in TIMES:
        del run[name]
    for point in run["curve"]:
        del point["seconds"]
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the line gives in one go."""
    path = tmp_path_factory.mktemp("whole") / "r.json"
    assert main([*LINE, "--json", str(path)]) == 0
    return bits(path)


def interrupt_in_the_middle(monkeypatch, number, run):
    """Raise a signal in the middle of the run with this index."""
    monkeypatch.setattr(runs, "TELL_SECONDS", 0)
    real = Progress.step

    def step(self, done, label=None):
        real(self, done, label)
        if self.ended == run and done == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "step", step)


@pytest.fixture(autouse=True)
def _interrupts_interrupt():
    """What a shell starts in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_loses_its_run_alone(number, whole, tmp_path, capsys):
    path = tmp_path / "r.json"
    line = [*LINE, "--json", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in_the_middle(patch, number, 2)
        assert main(line) == 130
    out, err = capsys.readouterr()
    assert "interrupted: 6 of 8 runs are missing; the same line with --resume goes on" in err
    assert re.search(r"(?m)^static ", out)  # the table of what is done
    assert [run["method"] for run in json.loads(path.read_text())["runs"]] == ["dense", "static"]
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        real = runs.perform
        patch.setattr(runs, "perform", lambda *a: trained.append(a[2]) or real(*a))
        assert main([*line, "--resume"]) == 0
    assert len(trained) == 6
    assert bits(path) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="kill")
def test_what_is_killed_goes_on_side_by_side_to_the_same_bits(whole, tmp_path):
    path = tmp_path / "r.json"
    line = [*LINE, "--json", str(path), "--jobs", "2"]
    paths = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsekern", *line],
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    )
    while not path.exists():  # one run is done, others are not
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 1 <= len(json.loads(path.read_text())["runs"]) <= 8
    while group_lives(process.pid):  # its processes notice that nobody waits for them
        time.sleep(0.05)
    assert main([*LINE, "--json", str(path), "--resume"]) == 0
    assert bits(path) == whole


def test_a_resume_says_what_earlier_runs_lack(tmp_path, capsys):
    path, nets = tmp_path / "r.json", tmp_path / "nets"
    line = [*LINE, "--method", "static", "--seeds", "1", "--json", str(path), "--resume"]
    assert main(line) == 0
    assert main([*line, "--save", str(nets), "--frames"]) == 0
    err = capsys.readouterr().err
    assert "2 runs that were done before have no saved network" in err
    assert "2 runs that were done before have no frames" in err
    assert main(line) == 0
    assert "done before" not in capsys.readouterr().err


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_that_breaks_or_diverges_is_told_and_tried_again(tmp_path, capsys):
    path = tmp_path / "r.json"
    line = [*LINE, "--json", str(path)]
    line[line.index("pruning")] = "nets:Breaks"
    assert main([*line, "--lr", "0.1", "1e30"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "nets:Breaks 0.95, lr 0.1, seed 1 failed: RuntimeError: out of luck" in text
    assert "dense, lr 1e+30, seed 0 failed: TrainingLoopError: the loss must stay finite" in text
    assert "Learning rates, the best in validation of [0.1, 1e+30]: dense 0.1" in text
    assert "± standard deviation of 2 seeds" in text
    states = {Spec.of_json(run): run["state"] for run in json.loads(path.read_text())["runs"]}
    assert len(states) == 2 * 2 * 4
    for (cell, seed), state in states.items():
        breaks = cell.lr > 1 or (cell.method == "nets:Breaks" and seed == 1)
        assert state == ("failed" if breaks else "done")
    again = []
    with pytest.MonkeyPatch.context() as patch:
        real = runs.perform
        patch.setattr(runs, "perform", lambda *a: again.append(a[2]) or real(*a))
        assert main([*line, "--resume"]) == 0
    assert [(s.cell.method, s.seed) for s in again] == [("nets:Breaks", 1)]


@pytest.mark.parametrize("fails", [2, 99])
def test_a_disk_that_is_full_costs_no_result(fails, whole, tmp_path, capsys, monkeypatch):
    """For a while, or to the end; what is told is told on the screen at least."""
    tries = []

    def write_whole(path, content):
        tries.append(path)
        if len(tries) <= fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(content)

    def save(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results, "write_whole", write_whole)
    monkeypatch.setattr(sk, "save", save)
    path = tmp_path / "r.json"
    status = main([*LINE, "--json", str(path), "--save", str(tmp_path / "nets")])
    assert status == (0 if fails == 2 else 2)
    out, err = capsys.readouterr()
    text = " ".join(out.split())
    assert "Mean ± standard deviation of 2 seeds" in text
    assert "rigl 0.95, seed 1: weights were not saved: OSError: [Errno 28] No space" in text
    assert path.is_file() is (fails == 2)
    assert ("can be written; got" in err) is (fails == 99)
    assert ("Results as JSON" in text) is (fails == 2)
    if fails == 2:
        content = bits(path)
        assert all("No space" in run.pop("unsaved") for run in content["runs"])
        assert content == whole


def test_a_process_that_dies_loses_its_run_alone_and_others_have_the_same_bits(whole):
    given = {"hidden": (16,), "epochs": 1, "update_freq": 4, "seeds": 2, "validation": 0.1}
    config = replace(PRESETS["digits"], methods=("rigl", "nets:Dies"), **given)
    grid = Grid(config, (0.95,), (1,), (1.0,), (0.1,))
    task = Task(config, None, whole["dense"])
    told = []
    with closing(side_by_side(task, grid.specs(), 2, lambda s, n: told.append(s))) as outcomes:
        found = dict(outcomes)
    assert set(found) == set(told) == set(grid.specs())
    states = {(s.cell.method, s.seed): run["state"] for s, run in found.items()}
    assert states.pop(("nets:Dies", 1)) == "failed"
    assert set(states.values()) == {"done"}
    assert "its process ended with status -9" in [run["error"] for run in found.values()]
    alike = [run for run in whole["runs"] if run["method"] in ("dense", "rigl")]
    assert len(alike) == 4
    for run in alike:
        own = json.loads(json.dumps(found[Spec.of_json(run)]))
        assert forget_times(own) == run


def test_another_configuration_is_refused_by_name(whole, tmp_path, capsys):
    path = tmp_path / "r.json"
    whole = with_times(whole)
    path.write_text(json.dumps(whole))
    line = [*LINE, "--json", str(path), "--resume"]
    for extra, text in (
        (["--weight-decay", "0.5"], "made with weight_decay 0.002; got 0.5"),
        (["--validation", "0.2"], "made with train 1294; got 1150"),
        (["--epochs", "2"], "made with epochs 1; got 2"),
    ):
        assert main([*line, *extra]) == 2
        assert text in capsys.readouterr().err
    assert json.loads(path.read_text()) == whole
    path.write_text("{}")
    assert main(line) == 2
    assert "expected a result file of sparsekern train in format 2" in capsys.readouterr().err


def test_what_a_file_held_is_kept_beside_the_new_one(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("a night's work")
    line = [*LINE, "--method", "dense", "--seeds", "1", "--json", str(path)]
    assert main([*line, "--sparsity", "2"]) == 2
    assert path.read_text() == "a night's work"
    assert main(line) == 0
    assert (tmp_path / "r.json~").read_text() == "a night's work"
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_validation_is_apart_from_training_and_is_what_chooses():
    digits = data.load_digits()
    config = TrainConfig(hidden=(16,), epochs=1, validation=0.1)
    trainer = Trainer(config, digits, "dense", 0)
    parts = trainer.data.train_x, trainer.validation.x
    assert [len(part) for part in parts] == [1294, 144]
    whole = {tuple(x.tolist()) for x in digits.train_x}
    kept, held_out = ({tuple(x.tolist()) for x in part} for part in parts)
    assert kept | held_out == whole
    assert len(kept) + len(held_out) == len(whole)  # no digit occurs twice
    other = Trainer(config, digits, "dense", 1)
    assert torch.equal(other.validation.x, trainer.validation.x)
    assert torch.equal(trainer.test.x, digits.test_x)
    for parameter in trainer.model.parameters():
        torch.nn.init.zeros_(parameter)  # the first class is guessed
    assert trainer.validate().accuracy == float((trainer.validation.y == 0).double().mean())
    assert trainer.score().accuracy == float((digits.test_y == 0).double().mean())


def test_weights_and_topology_are_saved(tmp_path):
    line = [*LINE, "--save", str(tmp_path / "runs"), "--seeds", "1", "--sparsity", "0.9", "0.8"]
    assert main(line) == 0
    files = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(files) == 1 + 2 * 3
    assert "rigl-s0.8-b1x1-1x-lr0.1-seed0.safetensors" in files
    config = TrainConfig(hidden=(16,), sparsity=0.8, epochs=1, update_freq=4, validation=0.1)
    config = replace(config, weight_decay=PRESETS["digits"].weight_decay)
    trainer = Trainer(config, data.load_digits(), "rigl", 0)
    trainer.train()
    model = build(config, data.load_digits(), "rigl", 5)
    sk.load(tmp_path / "runs" / "rigl-s0.8-b1x1-1x-lr0.1-seed0.safetensors", model)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_did_not_learn_is_called_that(capsys):
    assert main([*LINE, "--lr", "1e-9", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"(?m)^(dense|static|rigl|pruning) .* \*  ", out)) == 4
    assert "* did not learn: dense (1 of 1), static (1 of 1)" in out


def test_the_table_has_80_columns_whatever_is_in_it(capsys):
    line = [*LINE, "--sparsity", "0.9", "0.95", "--block", "1", "4x2", "--multiplier", "1", "0.5"]
    line = [*line, "--method", "nets:DropAtRandom", "--seeds", "1"]
    assert main(line) == 0
    lines = capsys.readouterr().out.split("\n\n", 1)[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("DropAtRandom") for line in lines) == 8
    assert sum(line.startswith("DropAtRandom, b4x2, 0.5x ") for line in lines) == 2
    assert sum(line.startswith("dense") for line in lines) == 1


def test_why_steps_are_slower_is_said_of_each_method(whole):
    content = with_times(whole)
    (rigl,) = [r for r in content["runs"] if r["method"] == "rigl" and r["seed"] == 0]
    assert rigl["dense_at"] == "updates"
    rigl["step_seconds"] = 20 * rigl["step_seconds"]
    snfs = {**rigl, "method": "snfs", "dense_at": "steps"}
    own = {**rigl, "method": "nets:Own", "dense_at": "steps"}
    content["runs"] += [snfs, own, {**snfs, "multiplier": 2.0}]
    del content["runs"][-1]["dense_at"]  # as in files of before
    text = " ".join(report.table(content).split())
    assert re.search(r"Steps of rigl take \S+ times [^:]*: the largest sparse layer", text)
    assert re.search(r"Steps of snfs, Own, snfs, 2x take \S+ times [^:]*: each computes", text)


DAMAGES = {
    "data": (("data",), None, "it: `data` must be dict"),
    "task": (("task",), 3, "it: `task` must be dict"),
    "dense": (("dense", "training"), "x", "dense: `training` must be int or float"),
    "run": (("runs", 1), [], "run 1: expected an object"),
    "method": (("runs", 1, "method"), None, "run 1: `method` must be str"),
    "block": (("runs", 1, "block"), [1], "run 1, block: expected two positive ints"),
    "curve": (("runs", 1, "curve"), [], "run 1: `curve` must have a point"),
    "score": (("runs", 1, "test"), {"bits": None}, "run 1, test: `accuracy` is missing"),
    "held": (("runs", 1, "held", "index"), True, "run 1, held: `index` must be int or float"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_with_what_it_lacks(name, whole, tmp_path, capsys):
    *keys, last = DAMAGES[name][0]
    content = with_times(whole)
    part = content
    for key in keys:
        part = part[key]
    part[last] = DAMAGES[name][1]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    for line in (["compare"], [*LINE, "--resume", "--json"]):
        assert main([*line, str(path)]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert f"{path}: expected a result file of sparsekern train: {DAMAGES[name][2]}" in told


def test_compare_joins_what_was_tested_on_the_same(whole, tmp_path, capsys):
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(json.dumps(with_times(whole)))
    content = with_times(whole)
    content["task"]["epochs"] = 7
    content["runs"] = [run for run in content["runs"] if run["method"] != "static"]
    (tmp_path / "1.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{i}.json") for i in range(2)]
    assert main(["compare", *files]) == 0
    out = capsys.readouterr().out
    names = [line.split("  ")[0] for line in out.splitlines()[3:10]]
    assert names == [
        *("dense [1]", "static", "rigl [1]", "pruning [1]"),
        *("dense [2]", "rigl [2]", "pruning [2]"),
    ]
    assert "epochs 7" in out
    content["data"]["test_digest"] = "0"
    (tmp_path / "1.json").write_text(json.dumps(content))
    assert main(["compare", *files]) == 2
    assert "`test_digest`" in capsys.readouterr().err
    (tmp_path / "1.json").write_text('{"format": 1}')
    assert main(["compare", *files]) == 2
    err = capsys.readouterr().err
    assert f"{files[1]}: expected a result file" in err
    assert "format 1, of an older release" in err


def with_times(content):
    content = json.loads(json.dumps(content))
    content["environment"] = {"numba": "0"}
    for run in content["runs"]:
        run.update(dict.fromkeys(TIMES, 0.001))
    return content


def test_the_time_that_is_left_leaves_out_how_long_processes_took_to_start(monkeypatch, capsys):
    clock = iter([0, 40, 40, 40, 40, 41, 41])
    monkeypatch.setattr("sparsekern.show.progress.time.monotonic", lambda: next(clock))
    progress = Progress(10, 2)  # 0
    progress.begin("a")
    progress.step(1)  # 40: the first step, after which nothing is known yet
    progress.end("good")  # 9 steps in a second, 10 are left
    assert "41 s so far, about 1 s left" in capsys.readouterr().err


def test_spans_are_read_by_people():
    assert [span(s) for s in (3.4, 99, 100, 5900, 11_100)] == [
        *("3 s", "99 s", "2 min", "98 min", "3 h 05 min"),
    ]
