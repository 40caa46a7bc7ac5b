"""A thread that uses a model while another trains it: the two patterns of docs/limits.md."""

import copy
import threading

import pytest
import torch
from torch import nn

import sparsekern as sk

UPDATES = 6


@pytest.fixture
def training():
    """A model, its method, and a step that ends with a topology update."""
    model = sk.sparsify_(nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 8)), 0.8)
    optimizer = torch.optim.Adam(model.parameters())
    method = sk.RigL(model, optimizer, t_end=10**6, update_freq=1)
    x = torch.randn(4, 48)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    return model, method, step, x


def answering(infer):
    """Run `infer` in a thread until told to stop; (stop, its answers), which raise its errors."""
    end, answers, errors = threading.Event(), [], []

    def run():
        try:
            while not end.is_set():
                answers.append(infer())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def stop():
        end.set()
        thread.join(60)
        assert not thread.is_alive()
        assert errors == []
        return answers

    return stop


def among(answer, allowed):
    return any(torch.equal(answer, one) for one in allowed)


def test_a_lock_lets_only_whole_states_answer(training):
    model, method, step, x = training
    lock, states = threading.Lock(), []

    def infer():
        with lock, torch.no_grad():
            return model(x)

    with torch.no_grad():
        states.append(model(x))
    stop = answering(infer)
    while len(method.history) < UPDATES:
        with lock:
            step()
            with torch.no_grad():
                states.append(model(x))
    answers = stop()
    assert answers
    assert all(among(answer, states) for answer in answers)


def test_a_copy_is_handed_over(training):
    model, method, step, x = training
    served = [copy.deepcopy(model)]
    copies = list(served)

    def infer():
        with torch.no_grad():
            return served[0](x)

    stop = answering(infer)
    while len(method.history) < UPDATES:
        step()
        served[0] = copy.deepcopy(model)  # one assignment: a thread sees the old one or the new one
        copies.append(served[0])
    answers = stop()
    with torch.no_grad():
        allowed = [one(x) for one in copies]
    assert answers
    assert all(among(answer, allowed) for answer in answers)
