"""Averages of weights follow topology updates, and no index array is ever averaged."""

import copy

import pytest
import torch
from average_cases import DECAY, FAMILIES, METHODS, Run, averaged_like, dense, masks
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from sparsekern.nn import averaged
from sparsekern.swap import sparse_layers

every = pytest.mark.parametrize("family", FAMILIES)
AVERAGES = {"ema": get_ema_avg_fn(DECAY), "swa": None}


def combined(kind, old, new, n):
    """Torch's two averages, in the same order of operations, so in the same bits."""
    return DECAY * old + (1 - DECAY) * new if kind == "ema" else old + (new - old) / (n + 1)


# ---- what an average must be


@every
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_is_that_of_the_dense_weights(family, method, kind, use_buffers):
    run = Run(family, method)
    average = AveragedModel(run.model, avg_fn=AVERAGES[kind], use_buffers=use_buffers)
    want, floats, before = None, None, masks(run.model)
    for n in range(10):
        run.step()
        average.update_parameters(run.model)
        now, stats = dense(run.model), [b for b in run.model.buffers() if b.is_floating_point()]
        if want is None:
            want, floats = now, [b.clone() for b in stats]
        # what was dropped leaves the average: grown again later, it begins at 0
        kept = {
            name: w * mask
            for (name, w), mask in zip(want.items(), masks(run.model).values(), strict=True)
        }
        want = {
            name: combined(kind, kept[name], now[name], torch.tensor(n)) if n else now[name]
            for name in now
        }
        if use_buffers and n:
            floats = [
                combined(kind, a, b, torch.tensor(n)) for a, b in zip(floats, stats, strict=True)
            ]
        elif not use_buffers:
            floats = [b.clone() for b in stats]
    assert len(run.method.history) >= (0 if method == "static" else 3)
    if method != "static":
        assert any(
            not torch.equal(a, b)
            for a, b in zip(before.values(), masks(run.model).values(), strict=True)
        )
    assert averaged_like(run.model, average)
    got = dense(average.module)
    assert all(torch.equal(got[name], want[name]) for name in want)
    stats = [b for b in average.module.buffers() if b.is_floating_point()]
    assert all(map(torch.equal, stats, floats))


def test_the_masked_twin_has_the_same_average():
    runs = [Run(impl=impl) for impl in (None, "masked")]
    found = []
    for run in runs:
        torch.manual_seed(5)
        found.append(dense(run.train(AveragedModel(run.model, avg_fn=AVERAGES["ema"]), 4).module))
    (a, b) = found
    # one update of the topology was made, with history before: both have lost what was dropped
    assert all(torch.allclose(a[name], b[name]) for name in a)


@every
def test_averaged_index_arrays_are_the_models(family):
    """.9 * 7 + .1 * 7 rounds down to 6: nothing was trained, so the average is the model."""
    model = Run(family, "static").model.eval()
    average = AveragedModel(
        model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(DECAY)
    ).eval()
    spoiled = 0
    for _ in range(6):
        average.update_parameters(model)
        layers = zip(sparse_layers(model).values(), averaged.held_layers(average), strict=True)
        spoiled += sum(not torch.equal(a.perm, b.perm) for a, b in layers)
    assert spoiled
    x = torch.randn(FAMILIES[family][1])
    assert torch.equal(average(x), model(x))
    average.update_parameters(model)
    state = average.state_dict()  # mended before anyone reads them
    assert all(
        torch.equal(state[f"module.{k}"], v)
        for k, v in model.state_dict().items()
        if not v.is_floating_point()
    )


def swap_by_data(average, model):
    """As Lightning's callback does around a validation, unseen by the tensors' versions."""
    mine = [*average.module.parameters(), *average.module.buffers()]
    for a, b in zip(mine, [*model.parameters(), *model.buffers()], strict=True):
        kept = a.data.clone()
        a.data.copy_(b.data)
        b.data.copy_(kept)


@every
def test_averages_swapped_in_and_out(family):
    run = Run(family)
    average = AveragedModel(run.model, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
    for _ in range(3):
        run.train(average, 3)
        weights = dense(run.model)
        averages = [layer.values.clone() for layer in averaged.held_layers(average)]  # mends none
        swap_by_data(average, run.model)
        run.model(torch.randn(run.shape))
        assert averaged_like(run.model, average)
        now = [layer.values for layer in sparse_layers(run.model).values()]
        assert all(map(torch.equal, now, averages))
        swap_by_data(average, run.model)
        assert all(map(torch.equal, dense(run.model).values(), weights.values()))
    update_bn([torch.randn(run.shape)], average)
    assert len(run.method.history) == 3


def test_an_average_loads_back_with_its_topology_and_follows_on():
    run = Run()
    average = run.train(AveragedModel(run.model, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY)), 5)
    saved = copy.deepcopy((run.model.state_dict(), average.state_dict()))
    for order in (0, 1):
        other = Run(seed=1)
        again = AveragedModel(other.model, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))
        loads = [(other.model, saved[0]), (again, saved[1])]
        for module, state in loads[::-1] if order else loads:
            module.load_state_dict(state)
        assert all(map(torch.equal, dense(again).values(), dense(average).values()))
        for _ in range(3):
            again.update_parameters(other.model)
            assert averaged_like(other.model, again)
        other.train(again, 6)
        assert averaged_like(other.model, again)
