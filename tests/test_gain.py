"""Gain of initial values: its meaning in each layer family, its names, and what is refused."""

import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.cli.main import parser as main_parser
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn.init import NONLINEARITIES, TORCH_GAIN, as_gain, fan_in
from sparsekern.training.config import TrainConfig
from sparsekern.training.data import Images
from sparsekern.training.network import build

HE = math.sqrt(2)
FAMILIES = {
    "linear": lambda: nn.Sequential(nn.Linear(96, 80)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(16, 32, 3)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(16, 32, 3, groups=2)),
    "gru": lambda: nn.Sequential(nn.GRU(48, 32)),
    "attention": lambda: nn.Sequential(nn.MultiheadAttention(64, 4)),
}


def drawn(family, block=1, **how):
    generator = torch.Generator().manual_seed(3)
    model = FAMILIES[family]()
    sk.sparsify_(model, 0.75, block=block, distribution="er", generator=generator, **how)
    return sk.sparse_layers(model)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_gain_scales_what_is_drawn(family, block):
    plain, scaled = drawn(family, block), drawn(family, block, gain=HE)
    default = drawn(family, block, gain=TORCH_GAIN)
    for name, layer in plain.items():
        other = scaled[name]
        assert torch.equal(layer.topology.col, other.topology.col)
        assert torch.equal(layer.values, default[name].values)
        # the same draws from U(-1, 1); each bound is rounded a few times, the product once more
        wanted = layer.active_values().double() * (HE / TORCH_GAIN)
        error = (other.active_values().double() - wanted).abs()
        assert bool((error <= 8 * 2.0**-24 * wanted.abs()).all())


@pytest.mark.parametrize(("family", "block"), [("linear", 1), ("linear", 4), ("conv2d", 1)])
def test_relu_is_he_by_active_inputs(family, block):
    (layer,) = drawn(family, block, gain="relu").values()
    scale = fan_in(layer.topology).double().sqrt().unsqueeze(1)
    weights = layer.topology.unpack(layer.active_values()).double() * scale
    unit = weights[layer.topology.to_mask()]
    bound = math.sqrt(3) * HE
    assert float(unit.abs().max()) <= bound * (1 + 8 * 2.0**-24)
    # uniform on [-b, b]: the mean of n squares is b^2 / 3 = 2, of variance 4 b^4 / 45 n
    assert abs(float(unit.square().mean()) - 2) <= 5 * bound**2 * math.sqrt(4 / 45 / unit.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_take_names_themselves(family):
    module = next(iter(FAMILIES[family]().children()))
    kind = {
        "linear": sk.SparseLinear,
        "conv1d": sk.SparseConv1d,
        "conv2d": sk.SparseConv2d,
        "gru": sk.SparseGRU,
        "attention": sk.SparseMultiheadAttention,
    }[family]
    layer = kind.from_dense(module, sparsity=0.5)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for wrong, error in (("gelu", ConfigError), (True, DtypeError), (0, ConfigError)):
        with pytest.raises(error, match="`gain` must be"):
            layer.reset_parameters(torch.Generator().manual_seed(0), gain=wrong)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.reset_parameters(torch.Generator().manual_seed(0), gain="relu")
    named = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.reset_parameters(torch.Generator().manual_seed(0), gain=HE)
    assert all(torch.equal(v, named[k]) for k, v in layer.state_dict().items())


def test_names_are_torchs():
    assert as_gain(None) == TORCH_GAIN == math.sqrt(1 / 3)
    assert as_gain("relu") == HE
    assert as_gain("tanh") == 5 / 3
    for name in NONLINEARITIES:
        assert as_gain(name) == float(nn.init.calculate_gain(name))
    assert as_gain(2) == 2.0


@pytest.mark.parametrize(
    ("gain", "error", "told"),
    [
        ("gelu", ConfigError, "a number or one of .*'relu'.*; got 'gelu'"),
        (0, ConfigError, "positive and finite; got 0"),
        (-1.0, ConfigError, "positive and finite; got -1"),
        (math.nan, ConfigError, "positive and finite; got nan"),
        (math.inf, ConfigError, "positive and finite; got inf"),
        (True, DtypeError, "a number or one of .*; got True"),
        ([1], DtypeError, "a number or one of"),
    ],
)
def test_other_gains_are_refused_before_anything_changes(gain, error, told):
    model = FAMILIES["linear"]()
    first = model[0]
    with pytest.raises(error, match=told):
        sk.sparsify_(model, 0.5, gain=gain)
    assert model[0] is first
    for init in ("keep", None):
        with pytest.raises(ConfigError, match="values that init='sparse' draws"):
            sk.sparsify_(model, 0.5, init=init, gain="relu")


def test_the_command_line_hands_it_on():
    command = main_parser().parse_args
    line = ["train", "--data", "digits", "--gain"]
    assert command([*line, "relu"]).gain == "relu"
    assert command([*line, "0.5"]).gain == 0.5
    x = torch.zeros(2, 64)
    digits = Images(
        name="digits",
        classes=10,
        train_x=x,
        train_y=torch.zeros(2, dtype=torch.int64),
        test_x=x,
        test_y=torch.zeros(2, dtype=torch.int64),
        image_shape=(8, 8),
        average=torch.zeros(8, 8),
    )
    plain, scaled = (
        next(iter(sk.sparse_layers(build(TrainConfig(gain=g), digits, "rigl", 0)).values()))
        for g in (None, 4 * TORCH_GAIN)
    )
    assert torch.equal(4 * plain.values, scaled.values)
    for wrong in ("gelu", 0.0):
        with pytest.raises(ConfigError, match="`gain` must be"):
            TrainConfig(gain=wrong)
