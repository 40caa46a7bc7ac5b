"""Gradual magnitude pruning: the schedule, what stays zero, and the hand-over to sparse layers."""

import copy
import gc
import logging

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, OptimizerError
from sparsekern.methods.schedule import CubicSchedule

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))


def net(seed=0):
    torch.manual_seed(seed)
    layers = (nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*layers).double()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def step(model, optimizer, i):
    optimizer.zero_grad()
    at = slice(i % 8 * 8, i % 8 * 8 + 8)
    loss = nn.functional.cross_entropy(model(X[at]), Y[at])
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_the_schedule_has_the_anchors_of_the_reference_code():
    schedule = CubicSchedule(0.95, 3000, 7000)
    anchors = {3000: 0.0, 4000: 0.549219, 5000: 0.83125, 6000: 0.935156, 7000: 0.95, 9000: 0.95}
    for t, s in anchors.items():
        assert abs(schedule.at(t) - s) < 5e-7  # six digits were written down


@pytest.mark.parametrize(("start", "end", "freq"), [(0, 10, 3), (2, 9, 1), (1, 5, 100), (3, 8, 5)])
def test_the_last_update_is_at_the_end(start, end, freq):
    schedule, last, made = CubicSchedule(0.9, start, end, freq), None, []
    for t in range(end + 2 * freq):
        if schedule.is_due(t, last):
            made.append(t)
            last = t
    assert made == [*range(start, end, freq), end]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_dense_training_with_the_smallest_set_to_zero(name):
    """An oracle in ten lines, bit for bit; then the layers are sparse by themselves."""
    model, twin = net(), net()
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    pruning = sk.Pruning(model, optimizer, 0.8, t_start=2, t_end=10, update_freq=3)
    weights = [m.weight for m in twin if isinstance(m, nn.Linear)]
    masks = [torch.ones_like(w) for w in weights]
    for i in range(11):
        assert torch.equal(step(model, optimizer, i), step(twin, other, i))
        with torch.no_grad():
            for w, m in zip(weights, masks, strict=True):
                w.mul_(m)
            if i in {2, 5, 8, 10}:
                share = 0.8 * (1 - (1 - (i - 2) / 8) ** 3)
                flat = torch.cat([w.abs().flatten() for w in weights])
                gone = flat.sort(stable=True).indices[: int(share * flat.numel())]
                every = torch.cat([m.flatten() for m in masks])
                every[gone] = 0
                parts = every.split([w.numel() for w in weights])
                masks = [p.view_as(w) for p, w in zip(parts, weights, strict=True)]
                for w, m in zip(weights, masks, strict=True):
                    w.mul_(m)
    layers = sk.sparse_layers(model)
    assert len(layers) == 3
    assert (pruning.done, pruning.attached) == (True, False)
    for layer, w, m in zip(layers.values(), weights, masks, strict=True):
        assert torch.equal(layer.to_dense().weight, w)
        assert layer.nnz == int(m.sum())
        held = optimizer.state[layer.values]
        for key, value in other.state[w].items():
            if value.shape == w.shape:
                packed = layer.topology.pack(value)
                assert torch.equal(held[key], packed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_it_the_training_is_static_and_sparse(name):
    model, twin = net(), net()
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    sk.Pruning(model, optimizer, 0.8, t_end=5, update_freq=2)
    masked = sk.Pruning(twin, other, 0.8, t_end=5, update_freq=2)
    masked._hand_over = lambda: None  # the oracle stays masked
    for i in range(20):
        step(model, optimizer, i)
        step(twin, other, i)
    for layer, w in zip(sk.sparse_layers(model).values(), masked.weights.values(), strict=True):
        dense = layer.to_dense().weight
        assert torch.equal(dense != 0, w != 0)
        # rounding errors of 2^-53 grow over 20 steps by far less than the 2^23 that is left
        assert bool(((dense - w).abs() <= 2.0**-30 * w.abs().max()).all())


@pytest.mark.parametrize("when", [1, 4, 8])
def test_a_training_that_goes_on_is_the_same(when):
    def run(upto, state=None):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if state is not None:
            model.load_state_dict(state[0])
        pruning = sk.Pruning(model, optimizer, 0.8, t_start=1, t_end=10, update_freq=2)
        if state is not None:
            optimizer.load_state_dict(state[1])
        losses = [step(model, optimizer, i) for i in range(when if state else 0, upto)]
        return model, optimizer, pruning, losses

    whole = run(16)
    first = run(when)
    saved = copy.deepcopy((first[0].state_dict(), first[1].state_dict()))
    second = run(16, saved)
    assert second[3] == whole[3][when:]
    assert second[2].history == whole[2].history
    for a, b in zip(
        sk.sparse_layers(whole[0]).values(), sk.sparse_layers(second[0]).values(), strict=True
    ):
        assert torch.equal(a.values, b.values)
        assert a.topology.digest() == b.topology.digest()


def test_an_active_zero_is_found_again():
    model = net()
    with torch.no_grad():
        model[2].weight[3] = 0  # a dead row
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruning = sk.Pruning(model, optimizer, 0.5, t_end=100, update_freq=50)
    step(model, optimizer, 0)
    kept = {n: int(m.sum()) for n, m in pruning.masks.items()}
    other = copy.deepcopy((model, optimizer, pruning))[2]
    other._masks = None
    assert {n: int(m.sum()) for n, m in other.masks.items()} == kept


def test_an_optimizer_that_misses_a_step_moves_nothing_that_is_pruned(caplog):
    model = net()
    optimizers = [OPTIMIZERS["sgd"](half.parameters()) for half in (model[:2], model[2:])]
    method = sk.tickets.Pruning(model, optimizers, 0.8, t_end=10, update_freq=3)
    for i in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        for optimizer in optimizers[: 1 if i % 3 == 1 else 2]:  # as GradScaler skips it
            optimizer.step()
        for name, mask in method.masks.items():
            assert not method.weights[name][~mask].any()
    with caplog.at_level(logging.WARNING):
        step(model, optimizers[0], 0)
        optimizers[1].step()
    assert method.done
    assert len(sk.sparse_layers(model)) == 3
    assert "not carried over" not in caplog.text


def test_blocks_go_as_a_whole():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sk.Pruning(model, optimizer, 0.7, t_end=6, update_freq=2, block=4)
    for i in range(9):
        step(model, optimizer, i)
    layers = sk.sparse_layers(model)
    assert [layer.block for layer in layers.values()] == [(4, 4)] * len(layers) != []
    size = sum(m.topology.shape[0] * m.topology.shape[1] for m in layers.values())
    active = sum(layer.nnz for layer in layers.values())
    assert abs(active - 0.3 * size) <= 16


def test_copies_go_on_apart():
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruning = sk.Pruning(model, optimizer, 0.8, t_end=6, update_freq=2)
    for i in range(3):
        step(model, optimizer, i)
    twin, other, copied = copy.deepcopy((model, optimizer, pruning))
    for i in range(3, 9):
        assert torch.equal(step(model, optimizer, i), step(twin, other, i))
    assert copied.history == pruning.history
    assert len(sk.sparse_layers(twin)) == len(sk.sparse_layers(model)) == 3


def test_a_method_can_follow_it():
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    sk.Pruning(model, optimizer, 0.8, t_end=3, update_freq=2)
    for i in range(5):
        step(model, optimizer, i)
    rigl = sk.RigL(model, optimizer, t_end=10, update_freq=2)
    assert rigl.weight_steps == 0  # pruning has left nothing in the optimizer
    for i in range(5, 12):
        step(model, optimizer, i)
    assert rigl.history


def test_a_compiled_model_stays_masked_until_finish(caplog):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruning = sk.Pruning(model, optimizer, 0.8, t_end=3, update_freq=2)
    run = torch.compile(model, backend="eager")
    with caplog.at_level(logging.WARNING):
        for i in range(6):
            step(run, optimizer, i)
    assert "compiled module" in caplog.text
    assert (pruning.done, pruning.attached) == (True, True)
    assert not sk.sparse_layers(model)
    assert sum(int((w == 0).sum()) for w in pruning.weights.values()) == int(0.8 * 624)
    with pytest.raises(ConfigError, match="compiled module"):
        pruning.finish()
    del run
    torch._dynamo.reset()
    gc.collect()
    assert pruning.finish() is model
    assert len(sk.sparse_layers(model)) == 3
    with pytest.raises(ConfigError, match="already"):
        pruning.finish()


def test_finish_by_hand_before_the_end():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruning = sk.Pruning(model, optimizer, 0.8, t_end=100, update_freq=2)
    for i in range(40):
        step(model, optimizer, i)
    masks = pruning.masks
    pruning.finish()
    assert not pruning.attached
    for name, layer in sk.sparse_layers(model).items():
        assert torch.equal(layer.to_dense().weight != 0, masks[name])
    step(model, optimizer, 41)


def test_bad_input_is_refused_before_anything_changes():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    good = {"sparsity": 0.5, "t_end": 10}
    for change, kind, text in [
        ({"t_start": 10}, ConfigError, "t_start"),
        ({"sparsity": 0.0}, ConfigError, "sparsity"),
        ({"sparsity": 1.0}, ConfigError, "sparsity"),
        ({"initial_sparsity": 0.6}, ConfigError, "initial_sparsity"),
        ({"t_end": None}, ConfigError, "t_end"),
        ({"t_end": 0.5}, ConfigError, "total_steps"),
        ({"update_freq": 0}, ConfigError, "update_freq"),
        ({"scope": "globl"}, ConfigError, "scope"),
        ({"exclude": ("nothing",)}, ConfigError, "exclude"),
        ({"grad_accumulation": 1.5}, DtypeError, "grad_accumulation"),
        ({"block": 64}, sk.ShapeError, "block"),
    ]:
        with pytest.raises(kind, match=text):
            sk.Pruning(model, optimizer, **(good | change))
    with pytest.raises(ConfigError, match="dense phase"):
        sk.Pruning(sk.sparsify_(net(), 0.5), optimizer, **good)
    with pytest.raises(OptimizerError):
        sk.Pruning(net(), optimizer, **good)
    assert "sparsekern" not in optimizer.param_groups[0]
    assert not optimizer._optimizer_step_post_hooks


def test_it_shows_how_far_it_is():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.Pruning(model, optimizer, 0.5, t_end=0.6, total_steps=100, update_freq=20)
    step(model, optimizer, 0)
    assert repr(method).endswith(
        "sparsity=0.5, t_end=60, update_freq=20, weight_steps=1, updates=1)"
    )
