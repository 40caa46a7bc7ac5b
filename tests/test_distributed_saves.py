"""Sharded models: what is saved, what is refused, mixed precision; ranks that die or don't come."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from processes import DiedError, FailedError, failure, ranks
from test_distributed import Run, part_of
from test_distributed_sharded import ALL, BOUND, Case, result
from torch import nn

from sparsekern import RigL, Static, save, sparse_layers, sparsify_
from sparsekern.errors import ConfigError

CASE = Case(block=4)


def states(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    states = get_state_dict(model, optimizer)
    return dict(zip(("model", "optimizer"), states, strict=True))


class Sharded:
    """A sharded model with its optimizer and method."""

    def __init__(self):
        self.model = CASE.cut(CASE.model())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.method = RigL(self.model, self.optimizer, t_end=100, update_freq=2)

    def train(self, steps, rank, world):
        for i in steps:
            self.optimizer.zero_grad()
            CASE.backward(self.model, i, 0, rank, world)
            self.optimizer.step()
        return result(self.model, self.optimizer, self.method)


def saving(rank, world, path):
    """Train, save in the middle, and train on."""
    import torch.distributed.checkpoint as dcp

    run = Sharded()
    run.train(range(5), rank, world)
    dcp.save(states(run.model, run.optimizer), checkpoint_id=path)
    return run.train(range(5, 9), rank, world)


def resuming(rank, world, path):
    """Load on another number of ranks, and train on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    run = Sharded()
    found = states(run.model, run.optimizer)  # by a step that counts for nothing
    assert run.method.weight_steps == len(run.method.history) == 0
    dcp.load(found, checkpoint_id=path)
    loaded = {"model_state_dict": found["model"], "optim_state_dict": found["optimizer"]}
    set_state_dict(run.model, run.optimizer, **loaded)
    return run.train(range(5, 9), rank, world)


@pytest.mark.skipif(not ALL, reason="SPARSEKERN_RANKS=all runs it")
@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_on_one_and_on_four():
    with tempfile.TemporaryDirectory() as path:
        expected = ranks(saving, 2, path)
        found = [one for world in (1, 4) for one in ranks(resuming, world, path).values()]
    for one in (expected[1], *found):
        assert not isinstance(one, DiedError | FailedError), one
        assert one["digests"] == expected[0]["digests"]
        assert one["history"] == expected[0]["history"]
        for key in ("weights", "state"):
            for a, b in zip(one[key], expected[0][key], strict=True):
                torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)


# ---- what is refused, and mixed precision


def rounded(rank, world):
    """bfloat16 products, float32 weights: the ranks' topologies."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = CASE.model().float()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = RigL(model, optimizer, t_end=100, update_freq=2, grad_accumulation=2)
    for i in range(9):
        optimizer.zero_grad()
        for part in range(2):  # gradients are summed in another place then
            model.set_requires_gradient_sync(part == 1)
            x, target = part_of(i, rank, world)
            nn.functional.cross_entropy(model(x.float()).float(), target).backward()
        optimizer.step()
    digests = [layer.topology.digest() for layer in sparse_layers(model).values()]
    return digests, len(method.history)


def shard_columns(*_):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = Case(block=4).model()
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else Shard(0))
    RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def offloaded(*_):
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = fully_shard(CASE.model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def on_a_part_of_the_ranks(*_):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    model = fully_shard(CASE.model(), mesh=mesh["dp"])
    Static(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def a_part_of_the_model(*_):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(CASE.model())
    RigL(model[0], torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def fsdp1(*_):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(CASE.model(), device_id=torch.device("cpu"))
    RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def fsdp1_inside(*_):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = CASE.model()
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=9)


def sparsified_late(*_):
    from torch.distributed.fsdp import fully_shard

    sparsify_(fully_shard(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))), 0.5)


def tensor_parallel(_, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    mesh = init_device_mesh("cpu", (world,))
    sparsify_(parallelize_module(model, mesh, {"0": ColwiseParallel()}), 0.5)


def saved(*_):
    save(f"{tempfile.gettempdir()}/never.safetensors", CASE.cut(CASE.model()))


def resized(*_):
    layer = sparse_layers(CASE.cut(CASE.model()))["0"]
    layer.resize_(layer.topology.with_positions(layer.topology.positions()[1:]))


REFUSED = {
    shard_columns: ("ConfigError", "not along its first dimension alone"),
    offloaded: ("ConfigError", "CPUOffloadPolicy"),
    on_a_part_of_the_ranks: ("ConfigError", "tensor or pipeline parallelism"),
    a_part_of_the_model: ("ConfigError", "give the whole model"),
    fsdp1: ("ConfigError", "FullyShardedDataParallel: FSDP1"),
    fsdp1_inside: ("ConfigError", "FSDP2"),
    sparsified_late: ("ConfigError", "FSDPModule"),
    tensor_parallel: ("ConfigError", "tensor parallelism"),
    saved: ("CheckpointError", "torch.distributed.checkpoint"),
    resized: ("ConfigError", "sharded over ranks"),
}


def refusals(rank, world):
    found = {}
    for case in (rounded, *REFUSED):
        try:
            found[case.__name__] = case(rank, world)
        except Exception as error:
            found[case.__name__] = failure(error)
    return found


@pytest.fixture(scope="module")
def refused():
    return ranks(refusals, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_a_method_can_not_follow_is_refused_by_name(refused, case):
    kind, text = REFUSED[case]
    for found in refused.values():
        assert not isinstance(found, DiedError | FailedError), found
        error = found[case.__name__]
        assert isinstance(error, FailedError)
        assert error.kind == kind, error
        assert text in error.text


@pytest.mark.parametrize("inside", [False, True])
def test_deepspeed_is_refused_by_name(inside):
    """By the names of its classes: it is not installed."""
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    sgd = type("ZeroOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero"})
    model = CASE.model()
    kind = torch.optim.SGD if inside else sgd
    with pytest.raises(ConfigError, match="DeepSpeed keeps its parameters in flat buffers"):
        RigL(engine(model) if inside else model, kind(model.parameters(), lr=0.1), t_end=9)


@pytest.mark.slow
def test_mixed_precision_leaves_the_ranks_equal(refused):
    first, second = (refused[rank]["rounded"] for rank in (0, 1))
    assert not isinstance(first, FailedError), first
    assert first == second
    assert first[1] >= 3


# ---- a rank that dies, one that does not come, one that comes again


def dying(rank, world, sharded):
    """Rank 1 is killed while it decides an update."""
    run = Sharded() if sharded else Run()
    if rank == 1:
        run.method.survivors = lambda *_: os._exit(9)
    run.train(range(3), rank, world) if sharded else run.train(rank, world)


def staying_away(rank, world):
    """Rank 1 leaves out the step of an update."""
    run = Run()
    if rank == 1:
        run.optimizer.step = lambda: None
    run.train(rank, world, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_dead_rank_the_collective_tells_and_what_it_was_for(sharded):
    found = ranks(dying, 2, sharded, timeout=60)
    assert isinstance(found[1], DiedError)
    assert found[1].status == 9
    assert isinstance(found[0], FailedError), found[0]
    assert "on rank 0" in found[0].text
    assert "topology update" in found[0].text


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named():
    found = ranks(staying_away, 2, timeout=8)
    assert isinstance(found[0], FailedError), found[0]
    assert found[0].kind == "RankMismatchError"
    assert "ranks [1] did not come" in found[0].text
    assert isinstance(found[1], FailedError), found[1]  # the collective's own; no signal


@pytest.mark.skipif(not ALL, reason="SPARSEKERN_RANKS=all runs it")
@pytest.mark.slow
def test_a_run_that_torchrun_restarts_ends_as_one_that_nothing_broke_off(tmp_path):
    found = []
    for how in ("dies", "lives"):
        folder = tmp_path / how
        folder.mkdir()
        launch = ["torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
        launch += ["--standalone", "--monitor-interval=0.1"]  # a store of its own each time
        script = str(Path(__file__).with_name("restarted.py"))
        command = [sys.executable, "-m", *launch, script, str(folder), how]
        own = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # no addresses of the dead
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
        assert done.returncode == 0, done.stderr
        assert (folder / "died").exists() == (how == "dies")
        found.append(torch.load(folder / "result.pt"))
    first, second = found
    assert first["updates"] == second["updates"] >= 3
    assert first["digests"] == second["digests"]
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
