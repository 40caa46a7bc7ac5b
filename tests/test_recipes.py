"""What each recipe trains: active weights and FLOPs against counts by hand, for 64-32-10."""

import math

import pytest
import torch
from torch import nn

from sparsekern import tickets
from sparsekern.cost.run_flops import ForwardFlops, Segment, run_flops
from sparsekern.errors import ConfigError
from sparsekern.methods import METHODS
from sparsekern.swap import sparse_layers
from sparsekern.training import data, recipes
from sparsekern.training.config import TrainConfig
from sparsekern.training.meter import Meter
from sparsekern.training.trainer import Trainer, run

HIDDEN, OUTPUT, STEPS, BATCH = 64 * 32, 320, 14, 100
BIASES = 42
ACTIVE = 205  # of 2,048 at 90 %
DENSE_F, SPARSE_F = 2 * (HIDDEN + OUTPUT), 2 * (ACTIVE + OUTPUT)
TICKETS = ("random", "snip", "grasp", "synflow")
CONTROLS = ("", "-shuffled", "-fresh")


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


def config(**changes):
    given = {"hidden": (32,), "epochs": 1, "update_freq": 5, "sparsity": 0.9}
    return TrainConfig(**(given | changes))


def test_names_are_methods_and_recipes():
    names = recipes.names()
    assert len(names) == len(set(names))
    assert set(METHODS) < set(names)
    assert {f"{t}{c}" for t in TICKETS for c in CONTROLS} < set(names)
    assert {"dense", "pruning", "small-dense", "big-sparse"} < set(names)


@pytest.mark.parametrize("name", [f"{t}{c}" for t in TICKETS for c in CONTROLS])
def test_tickets_train_as_many_weights_as_are_asked_for(digits, name):
    result = run(config(), digits, name, 0)
    assert [layer.nnz for layer in result.layers] == [ACTIVE]
    assert result.flops.inference == SPARSE_F
    assert result.flops.training == 3 * SPARSE_F * BATCH * STEPS
    assert result.updates == 0


@pytest.mark.parametrize("ticket", TICKETS)
def test_controls_keep_what_they_say(digits, ticket):
    layers, mask, values = {}, {}, {}
    for control in CONTROLS:
        layer = Trainer(config(hidden=(32, 16)), digits, ticket + control, 0).model.hidden1
        layers[control], mask[control] = layer, layer.mask()
        values[control] = layer.weight.to_dense()
    own = Trainer(config(hidden=(32, 16)), digits, "dense", 0).model.hidden1.weight
    assert torch.equal(values[""], own * mask[""])
    assert not torch.equal(mask["-shuffled"], mask[""])
    assert layers["-shuffled"].nnz == layers[""].nnz
    assert torch.equal(values["-shuffled"], own * mask["-shuffled"])
    assert torch.equal(mask["-fresh"], mask[""])
    assert not torch.equal(values["-fresh"], values[""])


def test_random_is_static_with_the_density_of_each_layer(digits):
    wanted = config(hidden=(32, 16))
    ours, static = (Trainer(wanted, digits, m, 0).model for m in ("random", "static"))
    densities = [{n: layer.nnz for n, layer in sparse_layers(m).items()} for m in (ours, static)]
    assert densities[0] == densities[1]


def test_pruning_is_counted_by_the_weights_that_are_left(digits):
    # updates follow weight steps 0, 5 and 10, t_end, of 14
    left = [HIDDEN - math.floor(HIDDEN * 0.9 * (1 - (1 - t / 10) ** 3)) for t in (0, 5, 10)]
    result = run(config(), digits, "pruning", 0)
    nnz = [
        HIDDEN - sum(r.layers["hidden1"].dropped for r in result.history[: n + 1]) for n in range(3)
    ]
    assert nnz == left
    assert left[2] == ACTIVE
    steps = {2 * (left[0] + OUTPUT): 6, 2 * (left[1] + OUTPUT): 5, SPARSE_F: 3}
    assert sum(steps.values()) == STEPS
    assert result.flops.training == 3 * BATCH * sum(f * n for f, n in steps.items())
    assert result.flops.inference == SPARSE_F
    assert [layer.nnz for layer in result.layers] == [ACTIVE]
    assert result.held.weights == 4 * (ACTIVE + OUTPUT + BIASES)
    assert result.weight_steps == STEPS


def test_a_network_that_is_pruned_in_blocks_is_counted(digits):
    result = run(config(model="nets:flat", block=2), digits, "pruning", 0)
    first, *_, last = result.history
    assert last.fraction == 0.9
    dense = run(config(model="nets:flat"), digits, "dense", 0)
    assert first.step == 0
    assert result.flops.inference < dense.flops.inference
    assert result.flops.training < dense.flops.training


def test_small_dense_has_no_more_weights_than_the_sparse_net(digits):
    result = run(config(), digits, "small-dense", 0)
    sparse = ACTIVE + OUTPUT + BIASES
    width = max(w for w in range(1, 33) if 64 * w + w + 10 * w + 10 <= sparse)
    assert result.flops.inference == 2 * (64 + 10) * width
    assert result.flops.training == 3 * result.flops.inference * BATCH * STEPS
    assert result.layers == ()
    # 8 and 8 hidden units beside 784-300-100-10 at 98 %
    net = Trainer(config(hidden=(300, 100), sparsity=0.98), digits, "small-dense", 0).model
    widths = [m.out_features for m in net if isinstance(m, nn.Linear)]
    assert widths[0] == widths[1]


def test_big_sparse_has_no_more_weights_than_the_dense_net(digits):
    trainer = Trainer(config(), digits, "big-sparse", 0)
    (layer,) = sparse_layers(trainer.model).values()
    width = layer.out_features
    assert width > 32
    assert width % 2 == 0  # sixteenths of 32
    dense = HIDDEN + OUTPUT + BIASES

    def active(w):
        return 64 * w - math.floor(64 * w * 0.9) + w + 10 * w + 10

    assert active(width) <= dense < active(width + 2)
    assert layer.nnz + 11 * width + 10 == active(width)


def test_widths_of_a_named_model_are_changed_or_refused(digits):
    wanted = config(model="lenet_300_100", sparsity=0.98)
    model = Trainer(wanted, digits, "small-dense", 0).model
    assert model.classifier.fc1.out_features == model.classifier.fc2.out_features < 100
    with pytest.raises(ConfigError, match="'conv' or 'hidden'; 'nets:flat' has none"):
        Trainer(config(model="nets:flat"), digits, "small-dense", 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_by_its_name_and_is_asked_for_its_cost(digits, name):
    trainer = Trainer(config(epochs=2, validation=0.1), digits, name, 0)
    start = [layer.nnz for layer in sparse_layers(trainer.model).values()]
    result = trainer.train()
    f_s, steps, spent = result.flops.inference, result.weight_steps, result.update_batches
    assert steps == 24
    assert result.curve[-1].training_flops == result.flops.training
    # a dense average in float32; of the weights apart, a value and an int64 place
    apart = sum(n - max(1, round(n / 2)) for n in start)
    kept = {"snfs": 4 * HIDDEN, "top-kast": (4 + 8) * apart}
    assert result.held.method == kept.get(name, 0)
    if hasattr(METHODS[name], "initial_sparsity"):
        assert start == [HIDDEN // 2]
        assert f_s == SPARSE_F
        return
    assert [layer.nnz for layer in result.layers] == start
    dense = {
        "never": 0,
        "updates": result.updates,  # of which some spend their batch
        "steps": steps + spent,
    }[trainer.method.dense_at]
    by_hand = 3 * f_s * (steps + spent - dense) + (2 * f_s + DENSE_F) * dense
    assert result.flops.training == BATCH * by_hand


def test_a_class_of_ones_own_trains_by_its_module(digits):
    result = run(config(), digits, "nets:DropAtRandom", 0)
    assert result.updates == result.update_batches == 2  # at weight steps 0 and 5
    extra = 2 * (2 * SPARSE_F + DENSE_F)
    assert result.flops.training == BATCH * (3 * SPARSE_F * STEPS + extra)


def test_a_longer_run_stretches_its_schedules(digits):
    trainer = Trainer(config(multiplier=2.5), digits, "rigl", 0)
    assert trainer.steps == 35
    assert trainer.method.schedule.t_end == 26
    assert len(trainer.train().curve) == 3  # two passes, and the end


def test_segments_by_hand():
    thin, thick = ForwardFlops(10, 100), ForwardFlops(30, 100)
    segments = [Segment(thick, 5, dense_steps=2), Segment(thin, 7, update_batches=3)]
    found = run_flops(segments, 4)
    assert found.inference == 10
    assert found.dense_equivalent == 100
    assert found.training == 4 * (3 * 30 * 3 + 2 * 160 + 3 * 10 * 7 + 3 * 120)


def test_counting_changes_nothing(digits):
    trainer = Trainer(config(), digits, "pruning", 0)
    for _ in range(7):
        trainer.step()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    meter = Meter(trainer.model, trainer.method, trainer.test.x[:1], BATCH)
    assert meter.segments[0].forward.executed == 2 * (meter.nnz["hidden1"] + OUTPUT)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert not sparse_layers(trainer.model)
    assert isinstance(trainer.method, tickets.Pruning)
