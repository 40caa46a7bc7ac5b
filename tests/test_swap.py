"""`sparsify_`, `densify_` and the distributions."""

import re

import pytest
import torch
from support import integer_values, integers
from torch import nn

from sparsekern import SparseLinear, densify_, sparse_layers, sparsify_
from sparsekern.distribution import DISTRIBUTIONS, distribute
from sparsekern.errors import ConfigError, DtypeError, ShapeError, SparseKernError


def mlp():
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.tied = nn.Linear(16, 50, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(16, 50)


RESNET_LIKE = {
    "conv1": (64, 3, 7, 7),
    "block.conv1": (64, 64, 1, 1),
    "block.conv2": (64, 64, 3, 3),
    "block.conv3": (256, 64, 1, 1),
    "late": (512, 512, 3, 3),
    "fc": (1000, 2048),
}


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.98])
def test_every_distribution_spends_the_same_number_of_weights(name, sparsity):
    shares = distribute(RESNET_LIKE, sparsity, name)
    sizes = {n: torch.Size(s).numel() for n, s in RESNET_LIKE.items()}
    active = sum((1 - shares[n]) * sizes[n] for n in sizes)
    assert abs(active - (1 - sparsity) * sum(sizes.values())) <= len(sizes)
    assert all(0 <= share < 1 for share in shares.values())


def test_erk_by_hand():
    # two layers 8x8 and 4x16 at S = 0.5: raw 16/64 and 20/64; eps = 64 / (16 + 20)
    shares = distribute({"a": (8, 8), "b": (4, 16)}, 0.5, "erk")
    eps = 64 / 36
    assert shares == pytest.approx({"a": 1 - eps * 16 / 64, "b": 1 - eps * 20 / 64})


def test_erk_makes_overfull_layers_dense_and_charges_the_others():
    shares = distribute({"wide": (1000, 1000), "tiny": (4, 4)}, 0.5, "erk")
    assert shares["tiny"] == 0.0
    assert (1 - shares["wide"]) * 1_000_000 == pytest.approx(500_000 - 8)


def test_er_leaves_kernel_sizes_out():
    shapes = {"conv": (64, 64, 3, 3), "one": (64, 64, 1, 1)}
    er, erk = distribute(shapes, 0.9, "er"), distribute(shapes, 0.9, "erk")
    assert er["conv"] == pytest.approx(er["one"])
    assert erk["conv"] > erk["one"]


def test_model_gets_the_exact_number_of_weights():
    model = sparsify_(mlp(), 0.98, distribution="uniform", exclude=("4",))
    assert model[0].nnz == 235_200 - 230_496
    assert model[2].nnz == 30_000 - 29_400
    assert type(model[4]) is nn.Linear
    model = sparsify_(mlp(), 0.9, distribution="erk")
    layers = sparse_layers(model).values()
    dense_part = sum(m.weight.numel() for m in model if type(m) is nn.Linear)
    total = sum(layer.nnz for layer in layers) + dense_part
    assert abs(total - 0.1 * 266_200) <= 3


def test_defaults_leave_alone_what_the_field_leaves_alone():
    model = sparsify_(TinyLM(), 0.5, distribution="uniform")
    assert set(sparse_layers(model)) == {"up", "down"}
    assert model.tied.weight is model.embed.weight
    everything = sparsify_(TinyLM(), 0.5, distribution="uniform", filter_fn=lambda m, n: True)
    assert set(sparse_layers(everything)) == {"up", "down", "tied", "lm_head"}


def test_patterns_and_distributions_by_name():
    model = sparsify_(TinyLM(), 0.5, distribution={"u*": 0.75, re.compile("^down$"): 0.25})
    assert model.up.sparsity == 0.75
    assert model.down.sparsity == 0.25
    model = sparsify_(TinyLM(), 0.5, exclude=[re.compile("^d")], distribution=lambda n, m: 0.625)
    assert model.up.sparsity == 0.625
    assert type(model.down) is nn.Linear
    model = sparsify_(TinyLM(), 0.5, distribution=lambda n, m: 0.0 if n == "up" else 0.5)
    assert type(model.up) is nn.Linear


def test_init_keep_prunes_and_none_leaves_values():
    dense = mlp()
    weight = dense[0].weight.detach().clone()
    kept = sparsify_(dense, 0.9, init="keep", distribution="uniform")
    assert torch.equal(kept[0].dense_weight(), weight * kept[0].mask())
    assert kept[0].active_values().abs().min() >= (weight * ~kept[0].mask()).abs().max()
    dense = mlp()
    weight = dense[0].weight.detach().clone()
    plain = sparsify_(dense, 0.9, init=None, distribution="uniform")
    assert torch.equal(plain[0].dense_weight(), weight * plain[0].mask())


def test_a_layer_under_two_names_stays_one():
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    sparsify_(model, 0.5)
    assert isinstance(model.a, SparseLinear)
    assert model.a is model.b
    densify_(model)
    assert type(model.a) is nn.Linear
    assert model.a is model.b


def test_exclude_covers_what_a_module_contains():
    model = nn.Sequential()
    model.body, model.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
    sparsify_(model, 0.5, exclude=("head",), distribution="uniform")
    assert set(sparse_layers(model)) == {"body"}


def test_densify_turns_it_back():
    model = sparsify_(mlp(), 0.9, block=(4, 2))
    for layer in sparse_layers(model).values():
        layer.set_active_values(integer_values(layer.topology))
        layer.bias.data.zero_()
    model = model[:3]
    x = integers(3, 784, low=0, high=1)
    before, weight = model(x), model[0].dense_weight()
    densify_(model)
    assert not sparse_layers(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), before)


def test_a_generator_leaves_the_global_one_alone():
    model, state = mlp(), torch.get_rng_state()
    sparsify_(model, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_one_generator_reproduces_a_model():
    a, b = (sparsify_(mlp(), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for name, layer in sparse_layers(a).items():
        twin = b.get_submodule(name)
        assert all(map(torch.equal, layer.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"sparsity": 1.0}, ConfigError, r"in \[0, 1\); got 1.0"),
        ({"sparsity": "0.9"}, DtypeError, "must be a number"),
        (
            {"block": 64, "distribution": "uniform"},
            ShapeError,
            r"\(64, 64\) is larger than layer '4' .*\(10, 100\)",
        ),
        ({"block": 0}, ConfigError, "at least 1"),
        ({"distribution": "erdos"}, ConfigError, r"one of \['er', 'erk', 'uniform'\].*'erdos'"),
        ({"distribution": 3}, DtypeError, "name, a dict or a callable; got 3"),
        ({"distribution": {"fc*": 0.5}}, ConfigError, r"'fc\*' matches none of \['0', '2', '4'\]"),
        ({"distribution": lambda n, m: 1.5}, ConfigError, "sparsity of layer '0'.*got 1.5"),
        ({"exclude": ("head",)}, ConfigError, "'head' matches no module"),
        ({"init": "zero"}, ConfigError, "got 'zero'"),
        ({"impl": "cublas"}, ConfigError, "got 'cublas'"),
        ({"filter_fn": lambda m, n: False}, ConfigError, "no layer left to make sparse"),
    ],
)
def test_bad_input_changes_nothing(kwargs, error, text):
    model = mlp()
    modules = list(model.modules())
    with pytest.raises(error, match=text) as info:
        sparsify_(model, **kwargs)
    assert isinstance(info.value, SparseKernError)
    assert list(model.modules()) == modules


def test_a_bare_layer_cannot_be_replaced_in_place():
    with pytest.raises(DtypeError, match=r"SparseLinear\.from_dense"):
        sparsify_(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="no layer left to make sparse"):
        sparsify_(nn.Sequential(nn.ReLU()))
    assert isinstance(sparsify_(nn.Sequential(nn.Linear(9, 9)), 0.5)[0], SparseLinear)
