"""Tasks on torch's threads: each ends or something is raised, also across signals and forks."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from sparsekern.errors import IncompleteError
from sparsekern.ops.cpu import threads

ROOT = Path(__file__).resolve().parent.parent
PREAMBLE = """
import faulthandler, os, signal, sys, threading
import torch, sparsekern as sk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.set_num_threads(2)
layer = sk.SparseLinear(512, 512, sparsity=0.8, block=32)
x = torch.randn(1024, 512)

def step():  # products of ours and of torch, all above the size that is shared out
    t = x.clone().requires_grad_()
    y = layer(t)
    layer.values.grad = None
    (y + y @ y.t() @ y).sum().backward()
    return y.detach(), t.grad, layer.values.grad.clone()
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=70,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.fixture
def interruptible():
    """SIGINT as a terminal's programs take it; the background jobs of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["openmp", "pool"], autouse=True)
def kind(request, monkeypatch):
    if request.param == "openmp" and threads._openmp() is None:
        pytest.skip("torch has no OpenMP library with the GNU entry points")
    monkeypatch.setattr(threads._Pool, "forked", request.param == "pool")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_each_task_runs_once(count):
    ran = []
    threads.run([lambda i=i: ran.append(i) for i in range(count)])
    assert sorted(ran) == list(range(count))


def test_what_a_task_raises_reaches_the_caller():
    def fail():
        raise ZeroDivisionError("in a task")

    with pytest.raises(ZeroDivisionError, match="in a task"):
        threads.run([int, fail, int, int])


def test_runs_inside_a_task_and_from_several_threads():
    counts = [0] * 4

    def inner(i):
        for _ in range(50):
            threads.run([lambda: counts.__setitem__(i, counts[i]), int, int])
        counts[i] += 1

    callers = [
        threading.Thread(target=threads.run, args=([lambda i=i: inner(i), int],)) for i in range(4)
    ]
    for step in (threading.Thread.start, threading.Thread.join):
        for caller in callers:
            step(caller)
    assert counts == [1] * 4


class StopError(Exception):
    pass


def test_what_is_raised_before_the_first_line_of_a_share_is_not_lost(kind):
    """A signal handler's exception there would otherwise leave tasks undone and say nothing."""
    if kind == "pool":
        pytest.skip("no callback")

    def on_call(frame, event, _):
        if event == "call" and frame.f_code.co_name == "_share":
            sys.setprofile(None)
            raise StopError

    hook = sys.unraisablehook
    sys.setprofile(on_call)
    try:
        with pytest.raises(StopError):
            threads.run([int, int])
    finally:
        sys.setprofile(None)
    assert sys.unraisablehook is hook


def test_a_task_that_was_not_run_is_an_error(kind, monkeypatch):
    if kind == "openmp":
        idle = types.SimpleNamespace(GOMP_parallel=lambda *_: None)
        monkeypatch.setattr(threads, "_openmp", lambda: idle)
    else:
        monkeypatch.setattr(threads._Job, "work", lambda _: None)
    with pytest.raises(IncompleteError, match="3 parts of a product must run .* 0 did"):
        threads.run([int, int, int])


@pytest.mark.usefixtures("interruptible")
def test_after_an_interrupt_no_other_task_begins():
    ran = []

    def interrupted():
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.001)  # the other thread does not take all of them first
        ran.append(None)

    with pytest.raises(KeyboardInterrupt):
        threads.run([interrupted] * 10_000)
    assert len(ran) < 10_000


def test_ctrl_c_is_raised_and_no_wrong_product_is_returned(kind):
    if kind == "pool":
        pytest.skip("covered by the tests above")
    code = """
with torch.no_grad(): want = layer(x)
raised = wrong = 0
for k in range(40):
    fired = threading.Event()
    def interrupt():
        fired.set()
        os.kill(os.getpid(), signal.SIGINT)
    try:
        threading.Timer(0.003 + 0.0003 * k, interrupt).start()
        more = 20
        while more:
            more -= fired.is_set()
            with torch.no_grad(): wrong += not torch.equal(layer(x), want)
    except KeyboardInterrupt:
        raised += 1
print(raised, wrong)
"""
    assert run_python(code) == ["40", "0"]


CHILD = """
pid = os.fork()
if not pid: faulthandler.dump_traceback_later(40, exit=True)
same = all(torch.equal(a, b) for a, b in zip(want or step(), step()))
if not pid: os._exit(0 if same else 1)
print(os.waitpid(pid, 0)[1], same)
"""


@needs_fork
@pytest.mark.parametrize(
    "before",
    [
        "want = None",
        "want = None; x @ x.t()",  # torch has a team, the library was not used yet
        "want = step()",
        "want = step()\npid = os.fork()\nif pid: sys.exit(os.waitpid(pid, 0)[1])\nstep()",
    ],
    ids=["first", "before our first product", "after it", "grandchild"],
)
def test_a_forked_child_has_threads_of_its_own(kind, before):
    if kind == "pool":
        pytest.skip("see the test of an unclean fork")
    code = f"layer.bias = None\n{before}{CHILD}"
    assert run_python(code) in (["0", "True"], [])


@needs_fork
def test_a_fork_while_another_thread_computes(kind):
    if kind == "pool":
        pytest.skip("see the test of an unclean fork")
    code = """
want = step()
stop = threading.Event()
def work():
    with torch.no_grad():
        while not stop.is_set(): layer(x)
busy = threading.Thread(target=work); busy.start()
status = []
for _ in range(5):
    pid = os.fork()
    if not pid:
        faulthandler.dump_traceback_later(40, exit=True)
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(want, step())) else 1)
    status.append(os.waitpid(pid, 0)[1])
stop.set(); busy.join()
print(set(status))
"""
    assert run_python(code) == ["{0}"]


@needs_fork
def test_a_child_of_an_unclean_fork_takes_python_threads():
    code = """
fork = sk.ops.cpu.threads._Fork
fork.clean = False
fork.in_child()
assert sk.ops.cpu.threads._Pool.forked
with torch.no_grad(): layer(x)
assert sk.ops.cpu.threads._Pool.executor is not None
print("pool")
"""
    assert run_python(code) == ["pool"]
