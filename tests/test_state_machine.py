"""Random operations on a model in training; and what they found, each in a few lines."""

import copy
import gc
import os

import pytest
import torch
from average_cases import Run
from machine import Interrupted, interrupted
from machine_runs import violation

OPERATIONS = int(os.environ.get("SPARSEKERN_OPERATIONS", "150"))
EACH = 30


@pytest.fixture
def few_objects():
    """Averages are looked for among all objects; those of before can't be one."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_random_operations_violate_nothing():
    made, seed, told = 0, 5000, []
    while made < OPERATIONS:
        n, what = violation(seed, EACH)
        made, seed = made + max(n, 1), seed + 1
        told += [what] * bool(what)
    print(f"seeds 5000 to {seed - 1}: {made} operations, {len(told)} violations")
    assert not told, "\n".join(told)


@pytest.mark.parametrize("average_first", [False, True])
def test_a_followed_average_is_copied_in_any_order(average_first):
    run = Run()
    average = copy.deepcopy(run.model)
    run.method.follow(average)
    parts = [run.model, run.optimizer, run.method]
    parts.insert(0 if average_first else 3, average)
    copied = copy.deepcopy(parts)
    own = copied.pop(0 if average_first else 3)
    assert copied[2].followed[0].average is own


def broken_off(run):
    """A weight step whose update is interrupted after it."""
    while not run.method.due:
        run.step()
    made = type(run.method)._update

    def update(method):
        with interrupted(1):
            made(method)

    type(run.method)._update = update
    try:
        with pytest.raises(Interrupted):
            run.step()
    finally:
        del type(run.method)._update


def test_a_copy_after_an_interrupted_update_keeps_the_weight_step():
    run = Run(method="set")
    broken_off(run)
    steps = run.method.state_dict()["weight_steps"]
    model, optimizer, method = copy.deepcopy((run.model, run.optimizer, run.method))
    assert method.state_dict()["weight_steps"] == steps
    model(torch.randn(run.shape)).pow(2).mean().backward()
    optimizer.step()
    assert method.state_dict()["weight_steps"] == steps + 1


def test_the_optimizer_is_told_of_a_step_whose_update_is_interrupted():
    run = Run(method="set")
    broken_off(run)
    state = run.method.state_dict()
    # the short form that stands there between saves has neither
    for name in ("history", "trace"):
        state.pop(name)
    assert run.optimizer.param_groups[0]["sparsekern"] == state
