"""Hugging Face's real `Trainer`: the steps of a plain loop, and a resume that changes nothing."""

import loops
import pytest
import torch
from loops import METHODS, digests
from torch import nn
from torch.nn import functional as F

from sparsekern import RigL

transformers = pytest.importorskip("transformers")

STEPS = 12
OPTIONS = {"t_end": 9, "update_freq": 3}


class Model(nn.Module):
    """As Trainer wants it: takes labels, returns a loss; a batch is one long row."""

    def __init__(self, family="linear", block=1):
        super().__init__()
        self.net = loops.net(family, block)

    def forward(self, x=None, labels=None):
        logits = self.net(x.flatten(0, 1))
        return {"loss": F.cross_entropy(logits, labels.flatten()), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        x, labels = loops.batch(i)
        return {"x": x, "labels": labels}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, folder, **kwargs):
    known = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **known | kwargs)
    optimizer = loops.adam(model)
    return InOrder(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))


def sparse_training(method=RigL, **options):
    from sparsekern.integrations.trainer import SparseTraining

    return SparseTraining(method, **OPTIONS | options)


def plain(family="linear", block=1, method=RigL, passes=1, clip=0.0):
    model = loops.net(family, block)
    optimizer = loops.adam(model)
    made = method(model, optimizer, grad_accumulation=passes, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in range(step * passes, step * passes + passes):
            (loops.loss(model, i % STEPS) / passes).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, made


def steps_and_counts(method):
    return [(r.step, r.fraction, list(r.layers.values())) for r in method.history]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "block"), [("linear", 4), ("conv1d", 1)])
def test_equals_the_plain_loop(tmp_path, family, block, method):
    expected, made = plain(family, block, METHODS[method])
    model, callback = Model(family, block), sparse_training(METHODS[method])
    run = trainer(model, tmp_path)
    callback.add_to(run)
    run.train()
    assert loops.same(expected, model.net)
    assert steps_and_counts(callback.method) == steps_and_counts(made)


def test_accumulation_and_clipping(tmp_path):
    expected, made = plain(passes=2, clip=0.1)
    model, callback = Model(), sparse_training()
    run = trainer(model, tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    callback.add_to(run)
    run.train()
    assert callback.method.grad_accumulation == 2
    assert [r.step for r in callback.method.history] == [r.step for r in made.history] == [0, 3, 6]
    assert digests(expected) == digests(model.net)
    for mine, theirs in zip(expected.parameters(), model.net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)  # Trainer divides the loss elsewhere


def test_bfloat16(tmp_path):
    expected = loops.net()
    optimizer = loops.adam(expected)
    RigL(expected, optimizer, **OPTIONS)
    for i in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loops.loss(expected, i)
        loss.backward()
        optimizer.step()
    model, callback = Model(), sparse_training()
    run = trainer(model, tmp_path, bf16=True)
    callback.add_to(run)
    run.train()
    assert len(callback.method.history) == 3
    assert loops.same(expected, model.net)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_one_left_alone(tmp_path, method):
    method = METHODS[method]
    saves = {"save_strategy": "steps", "save_steps": 5}
    whole, callback = Model(), sparse_training(method)
    run = trainer(whole, tmp_path, **saves)
    callback.add_to(run)
    run.train()
    again, resumed = Model(), sparse_training(method)
    second = trainer(again, tmp_path, **saves)
    resumed.add_to(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert loops.same(whole.net, again.net)
    assert resumed.method.state_dict() == callback.method.state_dict()
    # and in the process that made it
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert loops.same(whole.net, again.net)
    assert resumed.method.state_dict() == callback.method.state_dict()


def test_a_share_of_the_trainers_steps(tmp_path):
    model, callback = Model(), sparse_training(t_end=0.5)
    run = trainer(model, tmp_path, max_steps=-1, num_train_epochs=2)
    callback.add_to(run)
    run.train()
    expected = RigL(model, loops.adam(model), t_end=0.5, total_steps=2 * STEPS, update_freq=3)
    assert callback.method.schedule.t_end == expected.schedule.t_end


def test_logs_with_every_reporter(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, callback = Model(), sparse_training(by_layer=True)
    folder = str(tmp_path / "logs")
    run = trainer(model, tmp_path, report_to=["tensorboard"], logging_steps=1)
    board = next(c for c in run.callback_handler.callbacks if "TensorBoard" in type(c).__name__)
    board.logging_dir = folder
    callback.add_to(run)
    run.train()
    rows = {r["step"]: r for r in run.state.log_history if "sparsity/grown" in r}
    assert sorted(rows) == [1, 5, 9]
    for step, record in zip((1, 5, 9), callback.method.history, strict=True):
        assert rows[step]["sparsity/grown/net.0"] == record.layers["net.0"].grown
        assert rows[step]["sparsity/dropped"] == sum(c.dropped for c in record.layers.values())
    assert sum("loss" in r for r in run.state.log_history) == STEPS  # what it logs else, it logs
    events = EventAccumulator(folder)
    events.Reload()
    tag = next(t for t in events.Tags()["scalars"] if t.endswith("sparsity/grown"))
    assert [e.step for e in events.Scalars(tag)] == [1, 5, 9]


def test_in_the_list_of_callbacks_the_figures_go_along_with_the_trainers(tmp_path):
    model, callback = Model(), sparse_training()
    run = trainer(model, tmp_path, logging_steps=2)
    run.callback_handler.add_callback(callback)  # as `Trainer(callbacks=[...])` does
    run.train()
    rows = [r for r in run.state.log_history if "sparsity/updates" in r]
    assert [(r["step"], r["sparsity/updates"]) for r in rows] == [(2, 1), (6, 2), (10, 3)]
    assert all("loss" in r for r in rows)
