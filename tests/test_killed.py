"""A run that is killed at any moment, in a step, an update or a save, goes on to the same bits."""

import os
import random
import signal
import time
import traceback

import pytest
import torch
from checkpoint_models import dense
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk
from sparsekern.checkpoint import file

RUNS = int(os.environ.get("SPARSEKERN_KILLS", "2"))
STEPS = 24

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def sparse_pair():
    """A model and its average, as one module, so that one file holds both."""
    model = sk.sparsify_(dense(), 0.5, block=2, distribution="uniform", exclude=("conv",))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return nn.ModuleDict({"model": model, "average": average})


def attached(both, method):
    optimizer = torch.optim.Adam(both["model"].parameters(), lr=1e-2)
    return optimizer, method(both["model"], optimizer, t_end=100, update_freq=2)


def train(path, method):
    """Train to the end, saving after every step, from where the file says."""
    both, losses, first = sparse_pair(), [], 0
    torch.manual_seed(1)
    if path.exists():
        sk.load(path, both)
        optimizer, made = attached(both, method)
        extra = sk.load(path, both, optimizer, made)
        first, losses = extra["step"], extra["losses"]
        torch.set_rng_state(extra["rng"])
    else:
        optimizer, made = attached(both, method)
    for step in range(first, STEPS):
        optimizer.zero_grad()
        loss = both["model"](torch.randn(4, 2, 3, 3)).square().mean()
        loss.backward()
        optimizer.step()
        both["average"].update_parameters(both["model"])
        losses.append(loss.item())
        extra = {"step": step + 1, "losses": losses, "rng": torch.get_rng_state()}
        sk.save(path, both, optimizer, made, extra=extra)
    assert len(made.history) > 5 or method is sk.Static


def forked(path, method):
    pid = os.fork()
    if pid:
        return pid
    try:
        train(path, method)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def content(path):
    """All that a file holds, to the bit; the order of its header is by chance."""
    tensors, head = file.read(path)
    return {n: (str(t.dtype), t.shape, t.numpy().tobytes()) for n, t in tensors.items()}, head


def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("method", [sk.RigL, sk.SET])
def test_a_killed_run_ends_as_one_that_was_left_alone(method, tmp_path):
    seed = random.randrange(2**32)
    g = random.Random(seed)
    straight = tmp_path / "straight.safetensors"
    train(straight, method)  # compiles what there is to compile
    straight.unlink()
    began = time.monotonic()
    assert finished(forked(straight, method)) == 0
    want = content(straight)
    length, killed = time.monotonic() - began, 0
    for run in range(RUNS):
        path = tmp_path / f"{run}.safetensors"
        for _ in range(3):
            pid = forked(path, method)
            time.sleep(g.random() * length)
            os.kill(pid, signal.SIGKILL)
            killed += finished(pid) == -signal.SIGKILL
        assert finished(forked(path, method)) == 0, f"seed {seed}, run {run}"
        assert content(path) == want, f"seed {seed}, run {run}"
    print(f"{killed} kills in {RUNS} runs, seed {seed}")
    assert killed
