"""`sparsekern tune`: a dying candidate costs only itself, and the table it writes is used."""

import dataclasses
import importlib.util
import json
import sys

import pytest
import torch

from sparsekern.cli import tune as command
from sparsekern.cli.main import main
from sparsekern.errors import ConfigError
from sparsekern.kernels import tables
from sparsekern.kernels.tables import Key, SddmmConfig
from sparsekern.tuning import driver, processes
from sparsekern.tuning.candidates import LIMIT
from sparsekern.tuning.problems import Request

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture
def fresh_tables():
    yield
    tables.table.cache_clear()
    tables.find.cache_clear()


# ---- the driver, with a process that only pretends to measure

PRETENDS = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    def say(**event):
        print(json.dumps(event), flush=True)
    def seconds(config):
        return config["BM"] / 100
    BEHAVIOUR
    right = {}
    for i, c in job["configs"].items():
        say(event="begin", index=int(i))
        if c["num_warps"] == 8:
            sys.stderr.write("LLVM ERROR: unreachable\\n"); sys.stderr.flush()
            os.abort()
        if c["num_stages"] > 3:
            time.sleep(600)
        wrong = "wrong result" if c["BM"] < 64 else None
        say(event="checked", index=int(i), error=wrong)
        if wrong is None:
            right[i] = [[seconds(c)] * job["rounds"]]
    first = next(iter(right))
    say(event="times", reference=int(first), twin=right[first], times=right)
    say(event="done")
"""
ONE_KEY = Request(ops=("sddmm",), blocks=(16,), dtypes=("bf16",))
SDDMM = Key.parse("sddmm/half/16/any/pointer")
OLD, FAST, WRONG = (SddmmConfig(tokens, 128, 4, 3) for tokens in (128, 64, 32))
ABORTS, HANGS = OLD._replace(num_warps=8), OLD._replace(num_stages=4)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Tune on the given candidates, the first being the current one."""
    monkeypatch.setattr(driver, "_DRY_CANDIDATES", LIMIT)

    def tune(found, behaviour="pass", request=ONE_KEY, kind=processes.Runner, **fields):
        script = tmp_path / "pretends.py"
        script.write_text(PRETENDS.replace("BEHAVIOUR", behaviour))
        monkeypatch.setattr(driver, "candidates", lambda *_: found)
        plan = driver.Plan(request, tmp_path / "t.json", dry_run=True, quiet=True, **fields)
        return driver.tune(plan, kind((sys.executable, str(script)), stall=5.0))

    return tune


@needs_triton
def test_dying_hanging_and_wrong_candidates_do_not_stop_the_run(pretend):
    result = pretend([OLD, ABORTS, WRONG, HANGS, FAST])
    (tuned,) = result.tuned
    assert (tuned.old, tuned.new, tuned.ratio) == (OLD, FAST, 0.5)
    assert tuned.errors == {
        1: "the process ended with code -6: LLVM ERROR: unreachable",
        2: "wrong result",
        3: "nothing heard for 5 s",
    }
    printed = command.table(result).splitlines()
    assert printed[1].split("  ")[2:] == ["BM=64", "0.500"]
    assert printed[3] == f"{SDDMM}: BM=32 LANES=128 num_warps=4 num_stages=3: wrong result"


@needs_triton
def test_a_faster_candidate_is_confirmed_written_and_kept(pretend, tmp_path):
    (tuned,) = pretend([OLD, FAST]).tuned
    assert (tuned.old, tuned.new, tuned.ratio) == (OLD, FAST, 0.5)
    again = pretend([OLD, FAST])
    assert (again.tuned, again.left, again.kept) == ([], 0, 1)
    path = tmp_path / "t.json"
    data = json.loads(path.read_text())
    assert data["source"].startswith("dry run, its times mean nothing: sparsekern tune on the CPU")
    assert torch.__version__ in data["source"]
    assert data["measured"][str(SDDMM)]["was"] == OLD._asdict()
    assert tables.read(path) == ("sm90", {SDDMM: FAST})
    assert list(tmp_path.glob(".*")) == []


@needs_triton
def test_what_wins_in_the_crowd_must_win_alone(pretend, tmp_path):
    crowd = "if len(job['configs']) == 2: seconds = lambda config: 1.0"
    (tuned,) = pretend([OLD, OLD._replace(LANES=256), FAST], crowd).tuned
    assert (tuned.new, tuned.ratio, tuned.note) == (OLD, 1.0, "faster once, not again")
    assert tables.read(tmp_path / "t.json")[1] == {SDDMM: OLD}


@needs_triton
def test_what_does_not_work_is_replaced(pretend):
    (tuned,) = pretend([ABORTS, OLD, FAST]).tuned
    assert (tuned.new, tuned.ratio, tuned.note) == (FAST, None, "the old one does not work")
    (tuned,) = pretend([ABORTS, WRONG], again=True).tuned
    assert (tuned.new, tuned.note) == (None, "no candidate is right")


class Late(processes.Runner):
    """The budget ends while another block is measured."""

    def run(self, job, *args):
        self.deadline = float("inf") if job.key == SDDMM else -1.0
        return super().run(job, *args)


@needs_triton
def test_the_budget_ends_the_run_and_keeps_what_there_is(pretend, tmp_path):
    request = dataclasses.replace(ONE_KEY, blocks=(16, 64))
    result = pretend([OLD, FAST], request=request, kind=Late)
    assert ([t.key for t in result.tuned], result.left) == ([SDDMM], 2)
    assert tables.read(tmp_path / "t.json")[1] == {SDDMM: FAST}
    result = pretend([OLD, FAST], request=request, kind=Late)
    assert (result.tuned, result.left, result.kept) == ([], 2, 1)


@needs_triton
def test_a_process_that_cannot_begin_is_no_candidates_fault(pretend, tmp_path):
    for behaviour, note in (
        ("sys.exit('no device')", "the process ended with code 1: no device"),
        ("say(event='refused', error='ragged'); continue", "ragged"),
    ):
        (tuned,) = pretend([OLD, FAST], behaviour).tuned
        assert (tuned.new, tuned.note, tuned.errors) == (None, note, {})
    assert not (tmp_path / "t.json").exists()


@needs_triton
def test_a_table_of_another_machine_is_not_continued(pretend, tmp_path):
    path = tmp_path / "t.json"
    pretend([OLD, FAST])
    path.write_text(path.read_text().replace('"device": "the CPU"', '"device": "a GPU"'))
    with pytest.raises(ConfigError, match=r"`out`.*'the CPU'.*'a GPU'"):
        pretend([OLD, FAST])
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"`out`.* not a launch table"):
        pretend([OLD, FAST])


# ---- the command, and the table it writes


@needs_triton
@pytest.mark.usefixtures("fresh_tables")
def test_dry_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.json"
    line = ["tune", "--dry-run", "--out", str(path), "--op", "sddmm", "--block", "16"]
    assert main([*line, "--dtype", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert "sddmm/ieee/16/any/pointer  BM=16 LANES=128 num_warps=4 num_stages=3" in out
    assert f"{tables.ENVIRONMENT}={path}" in out
    assert err.startswith("[1/1] sddmm/ieee/16/any/pointer: ")
    # what the file says is what is launched
    data, other = json.loads(path.read_text()), SddmmConfig(32, 64, 8, 2)
    data["entries"]["sddmm/ieee/16/any/pointer"] = other._asdict()
    path.write_text(json.dumps(data))
    monkeypatch.setenv(tables.ENVIRONMENT, str(path))
    tables.table.cache_clear()
    tables.find.cache_clear()
    assert tables.find("sm90", "sddmm", "ieee", 16, "any", tma=False) == (other, False)
    with pytest.raises(ValueError, match=r"table\.json is a table for sm90; expected sm80"):
        tables.table("sm80")


BAD_LINES = {
    "out": (["--out", "/no/such/t.json", "--dry-run"], ["`out`", "/no/such/t.json"]),
    "rounds": (["--out", "t.json", "--rounds", "0"], ["`rounds`", "at least 1", "0"]),
    "budget": (["--out", "t.json", "--budget-s", "nan"], ["`budget_s`", "above 0", "nan"]),
    "shape": (["--out", "t.json", "--shape", "8", "8"], ["`shape`", "8 x 8"]),
    "device": (["--out", "t.json"], ["CUDA device", "got none", "--dry-run"]),
}


@needs_triton
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_one_line(case, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    extra, fragments = BAD_LINES[case]
    assert main(["tune", *extra]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("sparsekern: error: ")
    assert all(fragment in err for fragment in fragments)
