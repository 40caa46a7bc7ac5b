"""The trainers on two processes with DDP: the topologies and weights of one process."""

import os

import loops
import pytest
import torch
from processes import DiedError, FailedError, failure, free_port, ranks
from stacks import conftest  # noqa: F401  lets lightning be imported on the ranks too
from support import UNIT_ROUNDOFF
from torch.nn import functional as F

from sparsekern import RigL

pytest.importorskip("lightning.pytorch")

STEPS = 9
OPTIONS = {"t_end": 100, "update_freq": 2}


def batch(i):
    x, target = loops.batch(i)
    return x.double(), target


def model():
    return loops.net().double()


def result(net, method):
    weights = [layer.dense_weight() for layer in loops.sparse_layers(net).values()]
    history = [(r.step, r.fraction, list(r.layers.values())) for r in method.history]
    return {"digests": loops.digests(net), "weights": weights, "history": history}


def alone():
    """Batches 2 s and 2 s + 1 in step s, of which each of two processes has one."""
    net = model()
    optimizer = loops.adam(net)
    method = RigL(net, optimizer, grad_accumulation=2, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in (2 * step, 2 * step + 1):
            x, target = batch(i)
            (F.cross_entropy(net(x), target) / 2).backward()
        optimizer.step()
    return result(net, method)


def with_accelerate(rank, _folder):
    import accelerate

    from sparsekern.integrations.accelerate import attach

    accelerator, net = accelerate.Accelerator(cpu=True), model()
    assert accelerator.num_processes == 2
    prepared, optimizer = accelerator.prepare(net, loops.adam(net))
    method = attach(accelerator, prepared, optimizer, RigL, **OPTIONS)
    for step in range(STEPS):
        x, target = batch(2 * step + rank)
        accelerator.backward(F.cross_entropy(prepared(x), target))
        optimizer.step()
        optimizer.zero_grad()
    return result(net, method)


def with_trainer(_rank, folder):
    from stacks import test_trainer as one

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2 * STEPS

        def __getitem__(self, i):
            return dict(zip(("x", "labels"), batch(i), strict=True))

    net, callback = one.Model(), one.sparse_training(**OPTIONS)
    net.double()
    run = one.trainer(net, folder, max_steps=STEPS)
    assert run.args.world_size == 2
    run.train_dataset = Rows()
    callback.add_to(run)
    run.train()
    return result(net.net, callback.method)


def with_lightning(rank, _folder):
    from lightning.pytorch.strategies import DDPStrategy
    from stacks import test_lightning as one

    class Batches(one.Batches):
        def __getitem__(self, i):
            return batch(2 * i + rank)

    module, callback = one.Module(), one.sparse_training(**OPTIONS)
    module.double()
    kwargs = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    run = one.trainer([callback], STEPS, use_distributed_sampler=False, **kwargs)
    assert run.world_size == 2
    run.fit(module, one.DataLoader(Batches(STEPS), batch_size=None))
    return result(module.net, callback.method)


TRAINERS = {"accelerate": with_accelerate, "trainer": with_trainer, "lightning": with_lightning}


def worker(rank, world, port, folder):
    # as torchrun sets them
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="none",
        ACCELERATE_USE_CPU="1",
    )
    found = {}
    for name, train in TRAINERS.items():
        try:
            found[name] = train(rank, folder)
        except Exception as error:
            found[name] = failure(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks(worker, 2, free_port(), tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_train_as_one_does(found, name):
    expected = alone()
    assert len(expected["history"]) == 3
    for told in found.values():
        assert not isinstance(told, DiedError | FailedError), told
        assert not isinstance(told[name], FailedError), told[name]
        assert told[name]["digests"] == expected["digests"]
        assert told[name]["history"] == expected["history"]
        for one, right in zip(told[name]["weights"], expected["weights"], strict=True):
            # sums over 40 samples, in another order, at each step
            bound = 40 * STEPS * 64 * UNIT_ROUNDOFF[torch.float64]
            torch.testing.assert_close(one, right, rtol=bound, atol=bound)
