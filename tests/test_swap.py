"""`sparsify_`, `densify_` and the distributions."""

import copy
import re

import pytest
import torch
from support import integer_values, integers
from torch import nn

from sparsekern import SparseLinear, densify_, sparse_layers, sparsify_
from sparsekern.distribution import DISTRIBUTIONS, distribute
from sparsekern.errors import ConfigError, DtypeError, ShapeError, SparseKernError
from sparsekern.topology.blocks import active_count


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
    attention = {f"attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert set(sparse_layers(model)) == {"up", "down"} | attention
    assert model.tied.weight is model.embed.weight
    everything = sparsify_(TinyLM(), 0.5, distribution="uniform", filter_fn=lambda m, n: True)
    assert set(sparse_layers(everything)) == {"up", "down", "tied", "lm_head"} | attention


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
            {"block": {"4": 64}, "distribution": "uniform"},
            ShapeError,
            r"\(64, 64\) is larger than layer '4' .*\(10, 100\)",
        ),
        ({"block": 0}, ConfigError, "at least 1"),
        (
            {"distribution": "erdos"},
            ConfigError,
            r"one of \['er', 'erk', 'global', 'uniform'\].*'erdos'",
        ),
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
    with pytest.raises(DtypeError, match="single sparse one"):
        sparsify_(SparseLinear(4, 4))
    with pytest.raises(ConfigError, match="no layer left to make sparse"):
        sparsify_(nn.Sequential(nn.ReLU()))
    assert isinstance(sparsify_(nn.Sequential(nn.Linear(9, 9)), 0.5)[0], SparseLinear)


# ---- convolutions and recurrent layers


class Everything(nn.Module):
    """One of each kind of layer, and what stays dense."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.signal = nn.Conv1d(4, 8, 3)
        self.rnn = nn.LSTM(8, 12, 2, bidirectional=True, proj_size=4)
        self.cell = nn.GRUCell(8, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.head = nn.Linear(16, 10)


RECURRENT = {f"rnn.{m}_l{i}{d}" for m in ("ih", "hh", "hr") for i in "01" for d in ("", "_reverse")}
SPARSE = {"stem", "body.0", "signal", "head", "cell.ih", "cell.hh", *RECURRENT}


def test_every_kind_of_layer_is_replaced_and_depthwise_stays_dense():
    model = sparsify_(Everything(), 0.5, distribution="er")
    assert set(sparse_layers(model)) == SPARSE
    assert type(model.depthwise) is nn.Conv2d
    assert type(model.up) is nn.ConvTranspose2d


def test_under_uniform_the_first_convolution_stays_dense():
    model = sparsify_(Everything(), 0.5, distribution="uniform")
    assert set(sparse_layers(model)) == SPARSE - {"stem"}
    chosen = sparsify_(
        Everything(),
        0.5,
        distribution="uniform",
        filter_fn=lambda m, _: type(m) is nn.Conv2d and m.groups < 16,
    )
    assert set(sparse_layers(chosen)) == {"stem", "body.0"}


def test_each_weight_gets_the_count_that_the_reference_code_gives_it():
    model = Everything()
    only = ("stem", "body.0", "signal", "head")
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in only}
    sparsify_(model, 0.7, filter_fn=lambda _, name: name in only)
    shares = distribute(shapes, 0.7, "erk")
    for name, layer in sparse_layers(model).items():
        size = torch.Size(shapes[name]).numel()
        assert layer.nnz == active_count(size, shares[name])
        assert layer.weight.shape == shapes[name]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_densify_gives_back_modules_that_compute_the_same_bits():
    model = sparsify_(Everything(), 0.6, init=None)
    twin = densify_(copy.deepcopy(model))
    assert not sparse_layers(twin)
    assert {type(m) for m in twin.modules()} == {type(m) for m in Everything().modules()}
    original = Everything()
    own = original.state_dict()
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in own.items()
    }
    original.load_state_dict(twin.state_dict())
    image, tokens = torch.randn(2, 3, 7, 7), torch.randn(5, 2, 8)
    for run in (
        lambda m: m.body(m.stem(image)),
        lambda m: m.rnn(tokens)[0],
        lambda m: m.cell(tokens[0]),
        lambda m: m.signal(image[:, 0, :4]),
    ):
        assert torch.equal(run(twin.eval()), run(original.eval()))
    for name, layer in sparse_layers(model).items():
        owner, _, own_name = name.rpartition(".")
        recurrent = owner in {"rnn", "cell"}
        key = f"{owner}.weight_{own_name}" if recurrent else f"{name}.weight"
        assert torch.equal(layer.weight.to_dense(), twin.state_dict()[key])


def test_blocks_by_name_and_by_function():
    model = sparsify_(Everything(), 0.5, block={"rnn.hh*": 4, re.compile("^body"): (2, 4)})
    blocks = {name: layer.block for name, layer in sparse_layers(model).items()}
    assert blocks["body.0"] == (2, 4)
    assert blocks["rnn.hh_l1_reverse"] == (4, 4)
    assert blocks["head"] == blocks["rnn.ih_l0"] == (1, 1)
    by_size = sparsify_(Everything(), 0.5, block=lambda name, m: 8 if name == "head" else 1)
    assert sparse_layers(by_size)["head"].block == (8, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (
            {"block": {"stem": 8}},
            ShapeError,
            r"\(8, 8\) is larger than layer 'stem' of shape \(8, 3, 3, 3\)",
        ),
        ({"block": {"no*": 4}}, ConfigError, "`block` pattern 'no\\*' matches none of"),
        ({"block": lambda *_: "4"}, DtypeError, "`block` must be an int or a pair"),
        ({"exclude": ["rnn.xh_l0"]}, ConfigError, "'rnn.xh_l0' matches no module"),
        (
            {"distribution": {"body*": 0.95}, "block": {"body*": (8, 4)}},
            ConfigError,
            "each of 2 groups needs an active block; got 1",
        ),
        (
            {"filter_fn": lambda m, _: getattr(m, "groups", 1) == 16},
            ConfigError,
            "'depthwise' is a depthwise convolution: leave it dense",
        ),
    ],
)
def test_bad_input_on_convolutions_changes_nothing(kwargs, error, text):
    model = Everything()
    modules = list(model.modules())
    with pytest.raises(error, match=text) as info:
        sparsify_(model, 0.9, **kwargs)
    assert isinstance(info.value, SparseKernError)
    assert list(model.modules()) == modules


def test_one_matrix_of_a_recurrent_layer_can_be_left_dense():
    model = sparsify_(Everything(), 0.5, exclude=["rnn.ih*", "cell"])
    layers = sparse_layers(model)
    assert not any(name.startswith(("rnn.ih", "cell")) for name in layers)
    assert "rnn.hh_l0" in layers
    assert type(model.rnn.ih_l0) is nn.Linear


@pytest.mark.parametrize("kind", [nn.Conv2d(4, 4, 3), nn.GRU(4, 4)], ids=["conv", "gru"])
def test_a_bare_layer_of_any_kind_is_no_model(kind):
    with pytest.raises(DtypeError, match=rf"Sparse{type(kind).__name__}\.from_dense"):
        sparsify_(kind)


def test_matrices_left_dense_keep_their_values_and_biases():
    model = Everything()
    weight, bias = model.rnn.weight_ih_l0.clone(), model.rnn.bias_ih_l0.clone()
    sparsify_(model, 0.5, exclude=["rnn.ih_l0"])
    assert torch.equal(model.rnn.ih_l0.weight, weight)
    assert torch.equal(model.rnn.ih_l0.bias, bias)
    assert not torch.equal(model.rnn.hh_l0.bias, bias)


def test_layers_that_share_a_parameter_stay_as_they_are():
    a, b, c = nn.GRU(8, 8), nn.GRU(8, 8), nn.GRU(8, 8)
    b.weight_hh_l0 = a.weight_hh_l0
    d, e = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    e.bias = d.bias
    model = nn.ModuleList([a, b, c, d, e])
    sparsify_(model, 0.5, distribution="er")
    assert [type(m).__name__ for m in model] == ["GRU", "GRU", "SparseGRU", "Conv2d", "Conv2d"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_layers_whose_weight_something_else_makes_stay_as_they_are():
    normed = nn.utils.weight_norm(nn.GRU(8, 8), "weight_hh_l0")
    tied = nn.GRU(8, 8, 2)
    tied.weight_hh_l1 = tied.weight_hh_l0
    model = nn.ModuleList([nn.Linear(8, 8), normed, tied])
    sparsify_(model, 0.5, distribution="er")
    assert [type(m).__name__ for m in model] == ["SparseLinear", "GRU", "GRU"]


def test_a_pattern_may_name_a_layer_that_stays_dense():
    model = sparsify_(Everything(), 0.5, block={"stem": 1, "*": 2}, distribution="uniform")
    assert "stem" not in sparse_layers(model)
    assert {layer.block for layer in sparse_layers(model).values()} == {(2, 2)}


def test_an_error_in_a_later_layer_replaces_no_earlier_one():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64)])
    with pytest.raises(DtypeError, match="must be a floating point type; got torch.complex64"):
        sparsify_(model, 0.5)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_densify_refuses_a_bare_layer():
    with pytest.raises(DtypeError, match="a single one has `to_dense`"):
        densify_(SparseLinear(8, 8))
