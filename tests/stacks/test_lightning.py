"""Real PyTorch Lightning: its trainer takes the same steps as a plain loop, bit for bit."""

import loops
import pytest
import torch
from loops import METHODS, digests
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sparsekern import RigL, sparse_layers
from sparsekern.errors import ConfigError

L = pytest.importorskip("lightning.pytorch")

STEPS, FREQ = 12, 3
OPTIONS = {"t_end": 9, "update_freq": FREQ}


class Batches(Dataset):
    """Whole batches, in order, the same each epoch."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return loops.batch(i)


class Module(L.LightningModule):
    def __init__(self, family="linear", block=1, automatic=True):
        super().__init__()
        self.net = loops.net(family, block)
        self.automatic_optimization = automatic

    def training_step(self, batch, i):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, i):
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return loops.adam(self)


def trainer(callbacks, steps=STEPS, **kwargs):
    known = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": steps,
    }
    return L.Trainer(callbacks=callbacks, **known | kwargs)


def data(steps=STEPS):
    return DataLoader(Batches(steps), batch_size=None)


def sparse_training(method=RigL, **options):
    from sparsekern.integrations.lightning import SparseTraining

    return SparseTraining(method, **OPTIONS | options)


def plain(family="linear", block=1, method=RigL, steps=STEPS, after=lambda i: None, **options):
    model = loops.net(family, block)
    optimizer = loops.adam(model)
    made = method(model, optimizer, **OPTIONS | options)
    loops.train(model, [optimizer], range(steps), after)
    return model, optimizer, made


def fit(module, callback, **kwargs):
    run = trainer([callback], **kwargs)
    run.fit(module, data())
    return run


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "block"), [("linear", 4), ("conv2d", 1), ("gru", 1)])
def test_equals_the_plain_loop(family, block, method, automatic):
    model, _, made = plain(family, block, METHODS[method])
    module, callback = Module(family, block, automatic), sparse_training(METHODS[method])
    fit(module, callback)
    assert loops.same(model, module.net)
    assert [r.step for r in callback.method.history] == [r.step for r in made.history]


def test_a_method_attached_in_configure_optimizers():
    class Own(Module):
        def configure_optimizers(self):
            optimizer = loops.adam(self)
            self.method = RigL(self, optimizer, **OPTIONS)
            return optimizer

    from sparsekern.integrations.lightning import SparseTraining

    module, callback = Own(), SparseTraining()
    fit(module, callback)
    assert callback.method is module.method
    assert loops.same(plain()[0], module.net)
    with pytest.raises(ConfigError, match="`method` must be given"):
        fit(Module(), SparseTraining())


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_a_share_of_the_trainers_steps(automatic):
    module, callback = Module(automatic=automatic), sparse_training(t_end=0.75)
    fit(module, callback, max_steps=-1, max_epochs=2)
    expected = RigL(module, loops.adam(module), t_end=0.75, total_steps=2 * STEPS, update_freq=FREQ)
    assert callback.method.schedule.t_end == expected.schedule.t_end
    with pytest.raises(ConfigError, match="has no end"):
        fit(Module(automatic=automatic), sparse_training(t_end=0.75), max_steps=-1, max_epochs=-1)


def test_accumulation_and_clipping():
    model = loops.net()
    optimizer = loops.adam(model)
    made = RigL(model, optimizer, grad_accumulation=2, **OPTIONS)
    for step in range(STEPS // 2):
        optimizer.zero_grad()
        for i in (2 * step, 2 * step + 1):
            (loops.loss(model, i) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    module, callback = Module(), sparse_training()
    fit(
        module,
        callback,
        steps=STEPS // 2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
    )
    assert callback.method.grad_accumulation == 2
    assert loops.same(model, module.net)
    assert len(made.history) == len(callback.method.history) == 2


def test_bfloat16_mixed_precision():
    model = loops.net()
    optimizer = loops.adam(model)
    RigL(model, optimizer, **OPTIONS)
    for i in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loops.loss(model, i)
        loss.backward()
        optimizer.step()
    module, callback = Module(), sparse_training()
    fit(module, callback, precision="bf16-mixed")
    assert loops.same(model, module.net)
    assert len(callback.method.history) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_one_left_alone(tmp_path, method):
    """At the end of an epoch: within one, Lightning begins anew with the data, sparse or dense."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    ends = {"max_steps": -1, "max_epochs": 2}
    whole, callback = Module(), sparse_training(METHODS[method])
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer([callback, keep], **ends, enable_checkpointing=True).fit(whole, data(STEPS // 2))
    again, resumed = Module(), sparse_training(METHODS[method])
    trainer([resumed], **ends).fit(again, data(STEPS // 2), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert loops.same(whole.net, again.net)
    assert digests(whole.net) == digests(again.net)
    assert resumed.method.state_dict() == callback.method.state_dict()


def test_two_optimizers_one_of_them_without_sparse_weights():
    class Two(Module):
        def __init__(self):
            super().__init__(automatic=False)
            self.other = nn.Linear(12, 1)

        def configure_optimizers(self):
            return loops.adam(self.net), loops.sgd(self.other)

        def training_step(self, batch, i):
            sparse, dense = self.optimizers()
            for optimizer, loss in (
                (sparse, F.cross_entropy(self.net(batch[0]), batch[1])),
                (dense, self.other(batch[0]).square().mean()),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    module, callback = Two(), sparse_training()
    fit(module, callback, steps=2 * STEPS)
    assert loops.same(plain()[0], module.net)
    assert len(callback.method.optimizers) == 1


# ---- what it logs


class Kept(L.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def test_logs_at_the_steps_on_which_something_happened():
    logger, module = Kept(), Module()
    callback = sparse_training(by_layer=True)
    fit(module, callback, logger=logger)
    rows = {step: row for step, row in logger.rows if "sparsity/updates" in row}
    assert sorted(rows) == [1, 5, 9]
    for step, record in zip((1, 5, 9), callback.method.history, strict=True):
        assert rows[step]["sparsity/grown"] == sum(c.grown for c in record.layers.values())
        assert rows[step]["sparsity/grown/net.2"] == record.layers["net.2"].grown
    assert rows[9]["sparsity/updates"] == 3
    layers = sparse_layers(module).values()
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    assert rows[9]["sparsity/sparsity"] == 1 - sum(layer.nnz for layer in layers) / dense


def test_tensorboard_shows_them(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(Module(), sparse_training(), logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("sparsity/grown")] == [1, 5, 9]
