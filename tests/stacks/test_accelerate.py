"""Loops of accelerate: prepared models and optimizers, accumulation, saving and resuming."""

import loops
import pytest
import torch
from loops import METHODS, digests

from sparsekern import RigL

accelerate = pytest.importorskip("accelerate")

STEPS = 12
OPTIONS = {"t_end": 9, "update_freq": 3}


@pytest.fixture(autouse=True)
def _one_accelerator_at_a_time():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def start(method=RigL, **kwargs):
    from sparsekern.integrations.accelerate import attach

    accelerator = accelerate.Accelerator(cpu=True, **kwargs)
    model = loops.net()
    model, optimizer = accelerator.prepare(model, loops.adam(model))
    return accelerator, model, optimizer, attach(accelerator, model, optimizer, method, **OPTIONS)


def train(accelerator, model, optimizer, steps, clip=0.0):
    for i in steps:
        with accelerator.accumulate(model):
            accelerator.backward(loops.loss(model, i))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def plain(method=RigL, passes=1, clip=0.0, autocast=False):
    model = loops.net()
    optimizer = loops.adam(model)
    made = method(model, optimizer, grad_accumulation=passes, **OPTIONS)
    for step in range(STEPS // passes):
        optimizer.zero_grad()
        for i in range(step * passes, step * passes + passes):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loops.loss(model, i)
            (loss / passes).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, made


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_plain_loop(method):
    expected, made = plain(METHODS[method])
    accelerator, model, optimizer, mine = start(METHODS[method])
    train(accelerator, model, optimizer, range(STEPS))
    assert loops.same(expected, model)
    assert mine.state_dict() == made.state_dict()


def test_accumulation_and_clipping():
    expected, made = plain(passes=2, clip=0.1)
    accelerator, model, optimizer, mine = start(gradient_accumulation_steps=2)
    train(accelerator, model, optimizer, range(STEPS), clip=0.1)
    assert mine.grad_accumulation == 2
    assert loops.same(expected, model)
    assert len(mine.history) == len(made.history) == 2


def test_bfloat16():
    expected, _ = plain(autocast=True)
    accelerator, model, optimizer, _ = start(mixed_precision="bf16")
    train(accelerator, model, optimizer, range(STEPS))
    assert digests(expected) == digests(accelerator.unwrap_model(model))
    assert loops.same(expected, accelerator.unwrap_model(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_one_left_alone(tmp_path, method):
    method = METHODS[method]
    accelerator, whole, optimizer, made = start(method)
    train(accelerator, whole, optimizer, range(5))
    accelerator.save_state(str(tmp_path))
    train(accelerator, whole, optimizer, range(5, STEPS))
    accelerator, again, optimizer, resumed = start(method)
    accelerator.load_state(str(tmp_path))
    train(accelerator, again, optimizer, range(5, STEPS))
    assert loops.same(whole, again)
    assert resumed.state_dict() == made.state_dict()


def test_tensorboard_shows_what_happened(tmp_path):
    from accelerate.utils import ProjectConfiguration
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = ProjectConfiguration(project_dir=tmp_path, logging_dir=tmp_path)
    accelerator, model, optimizer, method = start(log_with="tensorboard", project_config=config)
    accelerator.init_trackers("run")
    train(accelerator, model, optimizer, range(STEPS))
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [e.step for e in events.Scalars("sparsity/grown")] == [0, 4, 8]
    assert len(method.history) == 3
