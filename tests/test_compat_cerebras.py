"""Cerebras' dictionary: what it says is what is done, and what has no counterpart is refused."""

import math

import pytest
import torch
from test_compat import batch, net, sgd
from torch.nn import functional as F

import sparsekern as sk
from sparsekern.compat.cerebras import configure_
from sparsekern.errors import ConfigError, DtypeError

RIGL = {
    "algorithm": "rigl",
    "sparsity": 0.75,
    "init_method": "random",
    "param_filter": ["0.weight", "[24].weight"],
    "drop_fraction": {"type": "cosine", "init": 0.4, "half_period": 9},
    "update": {"freq": 3, "start": 2, "stop": 9},
}


def train(model, optimizer, steps=12):
    for i in range(steps):
        x, target = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def test_the_schedule_is_theirs():
    model = net()
    optimizer = sgd(model)
    method = configure_(model, optimizer, RIGL)
    assert type(method) is sk.RigL
    train(model, optimizer)
    # is_update_step: (step - start) % freq == 0, start <= step < stop, after each weight step
    wanted = [t for t in range(12) if (t - 2) % 3 == 0 and 2 <= t < 9]
    assert [r.step for r in method.history] == wanted == [2, 5, 8]
    assert method.weight_steps == 12
    for record in method.history:
        fraction = 0.2 * math.cos(record.step * math.pi / 9) + 0.2
        assert record.fraction == pytest.approx(fraction)


def test_each_layer_gets_the_sparsity_and_keeps_its_values():
    model = net()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    configure_(model, sgd(model), RIGL)
    layers = sk.sparse_layers(model)
    assert set(layers) == {"0", "2", "4"}
    for name, layer in layers.items():
        total = layer.in_features * layer.out_features
        assert layer.nnz == total - math.floor(0.75 * total)
        kept = dense[f"{name}.weight"] * layer.mask()
        assert torch.equal(layer.dense_weight(), kept)


@pytest.mark.parametrize(("name", "kind"), [("static", sk.Static), ("set", sk.SET)])
def test_other_algorithms(name, kind):
    model = net()
    optimizer = sgd(model)
    method = configure_(model, optimizer, RIGL | {"algorithm": name, "init_method": "topk"})
    assert type(method) is kind
    first = next(iter(sk.sparse_layers(model).values()))
    largest = net()[0].weight.detach().abs().flatten().topk(first.nnz).values
    assert torch.equal(first.values.detach().abs().flatten().sort(descending=True).values, largest)
    train(model, optimizer)
    assert len(method.history) == (0 if name == "static" else 3)


def test_a_number_is_static():
    model = net()
    assert type(configure_(model, sgd(model), 0.5)) is sk.Static


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"algorithm": "gmp"}, "`algorithm` must be one of"),
        ({"sparsity": {"type": "linear"}}, "`sparsity` must be a number"),
        ({"sparsity": True}, "`sparsity` must be a number"),
        ({"init_method": "checkerboard"}, "`init_method` must be one of"),
        ({"param_filter": ["*proj*"]}, r"\['\*proj\*'\] finds no weight"),
        ({"param_filter": []}, "finds no weight"),
        ({"param_filter": print}, "must be a glob"),
        ({"drop_fraction": {"type": "exp", "init": 0.3}}, "`drop_fraction` must be"),
        ({"drop_fraction": RIGL["drop_fraction"] | {"half_period": 8}}, "`half_period` of `stop`"),
        ({"drop_fraction": RIGL["drop_fraction"] | {"minimum": 0.1}}, "no `minimum`"),
        ({"update": {"steps": [1, 5]}}, "`update` must have `freq` and `stop`"),
        ({"update": {"freq": 3}}, "`update` must have `freq` and `stop`"),
        ({"drop_fraction": 2.0}, "drop_fraction"),
        ({"update": {"freq": 0, "stop": 9}, "drop_fraction": 0.3}, "freq"),
        ({"balance_in_groups": 2}, "no counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused_before_anything_changes(change, text):
    model = net()
    with pytest.raises(ConfigError, match=text):
        configure_(model, sgd(model), RIGL | change)
    assert not sk.sparse_layers(model)


def test_a_list_of_groups_is_refused():
    model = net()
    with pytest.raises(DtypeError, match="a sparsity or a dictionary"):
        configure_(model, sgd(model), [RIGL])
