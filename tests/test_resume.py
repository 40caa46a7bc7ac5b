"""Whoever saves the optimizer has saved the method: resumes, copies and pickles."""

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loops import METHODS, adam, digests, net, same, sgd, train
from torch.distributed.checkpoint import state_dict as dcp_state

from sparsekern import RigL, sparse_layers
from sparsekern.errors import ConfigError, OptimizerError

ARGUMENTS = {"t_end": 100, "update_freq": 3}


def build(method="rigl", optimizer=adam, family="linear", **kwargs):
    model = net(family)
    optimizer = optimizer(model)
    return model, optimizer, METHODS[method](model, optimizer, **ARGUMENTS | kwargs)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", [4, 5, 8])  # 4 and 8: the next batch is an update's
@pytest.mark.parametrize("optimizer", [adam, sgd])
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_that_never_mentions_the_method_resumes_bit_for_bit(method, optimizer, cut):
    straight = build(method, optimizer)
    train(straight[0], [straight[1]], range(14))
    first = build(method, optimizer)
    train(first[0], [first[1]], range(cut))
    saved = through_a_file([first[0].state_dict(), first[1].state_dict()])
    del first

    model = net()
    opt = optimizer(model)
    late = cut == 5  # attached before the load, or after
    attached = None if late else METHODS[method](model, opt, **ARGUMENTS)
    opt.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    attached = attached or METHODS[method](model, opt, **ARGUMENTS)
    train(model, [opt], range(cut, 14))
    assert same(model, straight[0])
    assert attached.state_dict() == straight[2].state_dict()
    assert attached.history == straight[2].history


@pytest.mark.parametrize("family", ["conv1d", "conv2d", "gru"])
def test_every_family_resumes(family):
    straight, first, second = (build(family=family) for _ in range(3))
    train(straight[0], [straight[1]], range(10))
    train(first[0], [first[1]], range(6))
    for a, b in zip(first[:2], second[:2], strict=True):
        b.load_state_dict(through_a_file(a.state_dict()))
    train(second[0], [second[1]], range(6, 10))
    assert same(second[0], straight[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_distributed_checkpoints_carry_it(method, flat, tmp_path):
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, first, second = (build(method) for _ in range(3))
    train(straight[0], [straight[1]], range(10))
    train(first[0], [first[1]], range(6))
    state = dict(zip("mo", dcp_state.get_state_dict(*first[:2], options=options), strict=True))
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    fresh = digests(second[0])
    state = dict(zip("mo", dcp_state.get_state_dict(*second[:2], options=options), strict=True))
    # the step with which a fresh optimizer's state is made counts for nothing
    assert digests(second[0]) == fresh
    assert second[2].weight_steps == 0
    assert not second[2].history
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    dcp_state.set_state_dict(
        *second[:2], model_state_dict=state["m"], optim_state_dict=state["o"], options=options
    )
    assert second[2].state_dict() == first[2].state_dict()
    train(second[0], [second[1]], range(6, 10))
    assert same(second[0], straight[0])


def test_what_is_read_from_a_stateless_optimizer_counts_nothing():
    model, optimizer, method = build("set", lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    for i in range(3):
        train(model, [optimizer], [i])
        optimizer.zero_grad()
        before = digests(model), method.state_dict()
        dcp_state.get_state_dict(model, optimizer)
        assert (digests(model), method.state_dict()) == before


def test_a_resume_that_finds_nothing_says_so(caplog):
    model = net()
    optimizer = adam(model)
    train(model, [optimizer], range(2))
    plain = through_a_file(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, "sparsekern"):
        method = RigL(model, optimizer, t_end=10)
        assert caplog.text.count("the optimizer has taken steps") == 1
        caplog.clear()
        optimizer.load_state_dict(plain)
        assert caplog.text.count("holds no method's state: the schedule of RigL goes on") == 1
        caplog.clear()
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        for made in (adam, lambda m: torch.optim.Adagrad(m.parameters())):
            RigL(model, made(model), t_end=10)
    assert not caplog.text
    assert method.attached


def test_a_schedule_that_is_over_says_so(caplog):
    model, optimizer, method = build()
    train(model, [optimizer], range(6))
    saved = optimizer.state_dict()
    method.detach()
    optimizer.load_state_dict(saved)
    with caplog.at_level(logging.WARNING, "sparsekern"):
        method = RigL(model, optimizer, t_end=2)
    assert "goes on at weight step 4" in caplog.text
    method.load_state_dict({"weight_steps": 0, "last_update": None})
    assert method.due


def test_the_entry_comes_and_goes_with_the_method():
    model, optimizer, method = build()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    train(model, [optimizer], range(5), lambda i: scheduler.step())
    groups = optimizer.state_dict()["param_groups"]
    assert groups[0]["sparsekern"]["weight_steps"] == method.weight_steps == 3
    assert "sparsekern" not in groups[1]
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, [optimizer], range(5, 7))
    assert saved["param_groups"][0]["sparsekern"]["weight_steps"] == 3
    optimizer.load_state_dict(saved)
    assert method.weight_steps == 3
    method.detach()
    assert all("sparsekern" not in group for group in optimizer.state_dict()["param_groups"])
    RigL(model, optimizer, t_end=10)


def test_states_of_before_are_read():
    _, _, method = build()
    method.load_state_dict({"weight_steps": 7, "last_update": 6})
    assert (method.weight_steps, method.last_update, method.history) == (7, 6, [])


BAD = [
    5,
    {"weight_steps": 1},
    {"weight_steps": 1, "last_update": 2},
    {"weight_steps": 1.0, "last_update": None},
    {"weight_steps": True, "last_update": None},
    {"weight_steps": 1, "last_update": -1},
    {"weight_steps": 1, "last_update": 0, "history": "["},
    {"weight_steps": 1, "last_update": 0, "history": "[" * 100_000},
    {"weight_steps": 1, "last_update": 0, "history": 3},
    {"weight_steps": 1, "last_update": 0, "history": [[0, 0.3]]},
    {"weight_steps": 1, "last_update": 0, "history": [[0, float("nan"), {}]]},
    {"weight_steps": 1, "last_update": 0, "history": [[0, 0.3, {"0": [1, -1]}]]},
    {"weight_steps": 1, "last_update": 0, "history": [[0, 0.3, {"0": [1]}]]},
    {"weight_steps": 1, "last_update": 0, "more": 3},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad)[:60])
def test_a_bad_state_raises_before_anything_changes(bad):
    model, optimizer, method = build()
    train(model, [optimizer], range(6))
    before, state = method.state_dict(), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match="method state"):
        method.load_state_dict(bad)
    hostile = copy.deepcopy(state)
    hostile["param_groups"][0]["sparsekern"] = bad
    hostile["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ConfigError, match="method state"):
        optimizer.load_state_dict(hostile)
    assert method.state_dict() == before
    assert optimizer.param_groups[0]["lr"] == 0.01


# ---- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda trio: pickle.loads(pickle.dumps(trio))])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0, 4, 6])
def test_a_copied_trio_goes_on_by_itself(method, copied, at):
    straight = build(method)
    train(straight[0], [straight[1]], range(12))
    one = build(method)
    train(one[0], [one[1]], range(at))
    two = copied(one)
    assert two[2].optimizer is two[1]
    for model, optimizer, attached in (two, one):
        train(model, [optimizer], range(at, 12))
        assert same(model, straight[0])
        assert attached.state_dict() == straight[2].state_dict()
    two[2].detach()
    assert one[2].attached


def test_copies_of_a_part():
    model, optimizer, method = build()
    train(model, [optimizer], range(2))
    alone = copy.deepcopy(method)  # with a model and an optimizer of its own
    assert alone.attached
    assert alone.optimizer is not optimizer
    assert not copy.deepcopy(optimizer)._optimizer_step_pre_hooks
    with pytest.raises(ConfigError, match="attached already"):
        copy.copy(method)
    assert copy.deepcopy(model)[0]._capture_key == 0
    method.detach()
    assert not copy.copy(method).attached


# ---- layers that are frozen, and unfrozen


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_layer_that_is_unfrozen_takes_part_from_then_on(method):
    model = net()
    model[0].values.requires_grad_(False)
    optimizer = sgd(model)
    attached = METHODS[method](model, optimizer, t_end=100, update_freq=1)
    before = digests(model)
    train(model, [optimizer], range(4))
    assert {n for record in attached.history for n in record.layers} == {"2"}
    assert digests(model)[0] == before[0]
    model[0].values.requires_grad_(True)
    train(model, [optimizer], range(4, 8))
    assert set(attached.history[-1].layers) == {"0", "2"}


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_an_unfrozen_layer_that_no_optimizer_holds_is_named(method):
    model = net()
    model[0].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    METHODS[method](model, optimizer, t_end=100, update_freq=1)
    train(model, [optimizer], range(2))
    model[0].values.requires_grad_(True)
    with pytest.raises(OptimizerError, match="hold `values` of layer '0'"):
        train(model, [optimizer], range(2, 5))
    optimizer.add_param_group({"params": [model[0].values]})
    train(model, [optimizer], range(5, 7))


def test_random_streams_do_not_depend_on_what_is_frozen_when():
    found = []
    for before in (True, False):
        model = net()
        model[0].values.requires_grad_(not before)
        optimizer = sgd(model, lr=0.0)
        METHODS["set"](model, optimizer, t_end=100, update_freq=1)
        model[0].values.requires_grad_(False)
        train(model, [optimizer], range(1))
        found.append(digests(model))
    assert found[0] == found[1]


def test_a_method_may_wait_until_all_layers_are_unfrozen():
    model = net()
    for layer in sparse_layers(model).values():
        layer.values.requires_grad_(False)
    optimizer = sgd(model)
    method = METHODS["set"](model, optimizer, t_end=100, update_freq=2, step_on_update=False)
    train(model, [optimizer], range(3))
    assert method.weight_steps == 3
    assert not method.history
    for layer in sparse_layers(model).values():
        layer.values.requires_grad_(True)
    train(model, [optimizer], range(3, 5))
    assert [record.step for record in method.history] == [3]
