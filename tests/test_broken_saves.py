"""A save that breaks off anywhere leaves the old file or the new one."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_models import dense, same, sparse, states
from torch import nn

import sparsekern as sk

ROOT = Path(sk.__file__).resolve().parent.parent

FAILURES = (OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), KeyboardInterrupt())


class Calls:
    """Stands in for the calls that a save makes to the system; one of them fails."""

    def __init__(self, monkeypatch, at, error, short=False):
        self.at, self.error, self.short, self.made = at, error, short, []
        for owner, name in (
            (os, "open"),
            (os, "fdopen"),
            (os, "fsync"),
            (os, "close"),
            (Path, "replace"),
            (Path, "chmod"),
        ):
            monkeypatch.setattr(owner, name, self.wrapped(name, getattr(owner, name)))

    def wrapped(self, name, call):
        def wrapper(*args, **kwargs):
            self.made.append(name)
            fails = len(self.made) == self.at
            if fails and not (self.short and name == "fdopen"):
                raise self.error
            result = call(*args, **kwargs)
            if fails:
                return _Short(result, self.error)
            return _File(result, self) if name == "fdopen" else result

        return wrapper


class _File:
    """A file whose writes and flushes count too."""

    def __init__(self, file, calls):
        self.file, self.calls = file, calls
        self.write = calls.wrapped("write", file.write)
        self.flush = calls.wrapped("flush", file.flush)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def fileno(self):
        return self.file.fileno()


class _Short(_File):
    """A file that takes half of what is written and then fails."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise self.error

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("error", FAILURES, ids=["ENOSPC", "EIO", "KeyboardInterrupt"])
@pytest.mark.parametrize("short", [False, True])
def test_every_call_of_a_save_made_to_fail(tmp_path, error, short):
    path, old, new = tmp_path / "c", sparse(), sparse(seed=1)
    optimizer = torch.optim.Adam(old.parameters())
    failed = 0
    for at in range(1, 100):
        sk.save(path, old, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, at, error, short)
            try:
                sk.save(path, new)
            except (OSError, KeyboardInterrupt):
                failed += 1
            done = len(calls.made) < at
        assert os.listdir(tmp_path) == ["c"], calls.made
        target = dense(seed=2)
        sk.load(path, target)
        assert same(states(target), states(old)) or same(states(target), states(new))
        if done:
            break
    assert {"open", "write", "flush", "fsync", "replace"} <= set(calls.made)
    assert calls.made.count("fsync") == 2  # the file, then its folder
    assert failed == len(calls.made)


SAVER = """
import sys, torch, sparsekern as sk
path = sys.argv[1]
model = torch.nn.Sequential(sk.SparseLinear(256, 256, sparsity=.5))
print("ready", flush=True)
n = 0
while True:
    n += 1
    with torch.no_grad(): model[0].values.fill_(n)
    sk.save(path, model, extra=n)
"""


def test_kill_9_during_saves_loses_nothing(tmp_path):
    path = tmp_path / "c"
    kills = int(os.environ.get("SPARSEKERN_KILLS", "3"))
    model = nn.Sequential(sk.SparseLinear(256, 256, sparsity=0.5))
    for kill in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        ) as child:
            child.stdout.readline()
            while not path.exists() and child.poll() is None:
                time.sleep(0.001)
            time.sleep(0.001 * (7 * kill % 50))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        n = sk.load(path, model)
        assert torch.equal(model[0].values, torch.full_like(model[0].values, n))
