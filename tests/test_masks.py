"""Connections that are given: masks by name, plans, torch's pruning, the largest of all layers."""

import logging
from types import SimpleNamespace

import pytest
import torch
from test_swap import Everything, mlp
from torch import nn
from torch.nn.utils import prune

import sparsekern as sk
from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.nn.init import TORCH_GAIN, bounds
from sparsekern.swap.shares import Planned


def random_mask(shape, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) < density


def every_weight(model):
    """Names and weights that can be sparse, of a dense model."""
    return {
        f"{name}.{own}": weight
        for name, module in model.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if own.startswith("weight") and name not in ("depthwise", "up", "body.1")
    }


def our_name(name):
    owner, _, own = name.rpartition(".")
    return owner if own == "weight" else f"{owner}.{own.removeprefix('weight_')}"


@pytest.mark.parametrize("naming", ["torch's", "ours"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_every_family_gets_the_masks_it_is_given(naming, dtype):
    model = Everything()
    weights = {name: w.detach().clone() for name, w in every_weight(model).items()}
    masks = {name: random_mask(w.shape).to(dtype) for name, w in weights.items()}
    given = masks if naming == "torch's" else {our_name(n): m for n, m in masks.items()}
    sk.sparsify_(model, masks=given, init="keep")
    layers = sk.sparse_layers(model)
    assert set(layers) == {our_name(name) for name in masks}
    for name, mask in masks.items():
        layer = layers[our_name(name)]
        assert torch.equal(layer.mask(), mask.bool())
        assert torch.equal(layer.dense_weight(), weights[name] * mask)


def test_layers_without_a_mask_or_with_a_full_one_stay_dense():
    model = sk.sparsify_(
        mlp(), masks={"0": random_mask((300, 784)), "2": torch.ones(100, 300, dtype=torch.bool)}
    )
    assert set(sk.sparse_layers(model)) == {"0"}
    assert sk.summary(model).dense == {
        "2": "its mask leaves nothing out, and dense is faster",
        "4": "`masks` does not name it",
    }


def test_a_mask_counts_for_what_the_defaults_leave_dense():
    model = nn.Sequential()
    model.lm_head = nn.Linear(8, 8)
    sk.sparsify_(model, masks={"lm_head": random_mask((8, 8))})
    assert torch.equal(model.lm_head.mask(), random_mask((8, 8)))


def test_block_masks():
    blocks = random_mask((25, 75))
    mask = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    model = sk.sparsify_(mlp(), masks={"2.weight": mask}, block=4)
    assert torch.equal(model[2].mask(), mask)
    assert model[2].topology.nnzb == int(blocks.sum())


MASK = random_mask((100, 300))
BAD = [
    ({"masks": {"2": MASK}, "block": 4}, TopologyError, "layer '2'.*whole .4, 4. blocks"),
    ({"masks": {"7": MASK}}, ConfigError, "`masks` names '7'.*0, 2, 4"),
    ({"masks": {"2": MASK[:50]}}, ShapeError, r"'2'.*\(100, 300\); got \(50, 300\)"),
    ({"masks": {"2": MASK * 0.5}}, ConfigError, "'2'.*0 and 1 only"),
    ({"masks": {"2": MASK.tolist()}}, DtypeError, "'2'.*tensor; got list"),
    ({"masks": [MASK]}, DtypeError, "must map names to tensors; got list"),
    ({"masks": {"2": MASK, "2.weight": MASK}}, ConfigError, "'2' twice"),
    ({"masks": {"2": MASK}, "exclude": ("2",)}, ConfigError, "'2' sparse, but `exclude`"),
    ({"masks": {"2": MASK}, "sparsity": 0.5}, ConfigError, "exclude each other"),
    ({"masks": {"2": MASK}, "sparsity": 0.9}, ConfigError, "exclude each other"),
    ({"masks": {"2": MASK}, "plan": object()}, ConfigError, "exclude each other"),
    ({"masks": {"2": MASK}, "distribution": "er"}, ConfigError, "nothing to share out"),
    ({"plan": object()}, DtypeError, r"must be a sparsekern\.Plan; got object"),
    ({"distribution": "global"}, ConfigError, "needs init='keep'; got init='sparse'"),
    ({"init": "keep", "gain": 1.0}, ConfigError, "`gain` is of values.*got init='keep'"),
    ({"gain": -1.0}, ConfigError, "positive and finite; got -1.0"),
    ({"gain": "he"}, ConfigError, "a number or one of.*got 'he'"),
]


@pytest.mark.parametrize(("kwargs", "error", "text"), BAD)
def test_bad_input_changes_nothing(kwargs, error, text):
    model = mlp()
    modules = list(model.modules())
    with pytest.raises(error, match=text) as info:
        sk.sparsify_(model, **kwargs)
    assert isinstance(info.value, sk.SparseKernError)
    assert list(model.modules()) == modules
    assert "_sparsekern_asked" not in vars(model)


def test_a_mask_that_empties_a_layer_is_told(caplog):
    model = mlp()
    with caplog.at_level(logging.WARNING, "sparsekern"):
        sk.sparsify_(model, masks={"2": torch.zeros(100, 300)}, init="keep")
    assert "the mask of layer '2' is empty" in caplog.text
    bias = model[2].bias.detach()
    assert torch.equal(model[2](torch.randn(3, 300)), bias.expand(3, -1))


# ---- sparse layers become sparser


@pytest.mark.parametrize("init", ["sparse", "keep", None])
@pytest.mark.parametrize("impl", [None, "masked"])
def test_sparse_layers_of_every_family_become_sparser(init, impl):
    model = sk.sparsify_(Everything(), 0.5, distribution="er", init="keep", impl=impl)
    before = {n: m.dense_weight() for n, m in sk.sparse_layers(model).items()}
    masks = {n: m.mask() for n, m in sk.sparse_layers(model).items()}
    if init == "keep":
        sk.sparsify_(model, 0.8, distribution="er", init=init)
    else:  # without "keep", those that are named
        planned = {
            n: Planned(m.weight_shape, (1 + m.sparsity) / 2, m.block)
            for n, m in sk.sparse_layers(model).items()
        }
        sk.sparsify_(model, plan=SimpleNamespace(sparsity=0.8, planned=planned), init=init)
    layers = sk.sparse_layers(model)
    assert set(layers) == set(before)
    assert model.rnn.hh_l0 is layers["rnn.hh_l0"]
    for name, layer in layers.items():
        assert int(layer.mask().sum()) < int(masks[name].sum())
        assert not bool((layer.mask() & ~masks[name]).any())
        assert layer.impl == impl
        if init != "sparse":
            assert torch.equal(layer.dense_weight(), before[name] * layer.mask())
        if init == "keep":
            left = (before[name] * ~layer.mask()).abs().max()
            assert layer.active_values().abs().min() >= left


def test_sparse_layers_stay_where_their_share_is_no_more():
    model = sk.sparsify_(mlp(), 0.9, distribution="uniform")
    before = list(model)
    sk.sparsify_(model, 0.9, distribution="uniform", init="keep")
    sk.sparsify_(model, 0.5, distribution="uniform", init="keep")
    assert list(model) == before


def test_a_mask_of_a_sparse_layer_can_only_leave_out_more():
    model = sk.sparsify_(mlp(), 0.5, distribution="uniform")
    own = model[2].mask()
    with pytest.raises(TopologyError, match="'2'.*can only leave out more"):
        sk.sparsify_(model, masks={"2": ~own})
    weight = model[2].dense_weight()
    sk.sparsify_(model, masks={"2": own & MASK}, init="keep")
    assert torch.equal(model[2].dense_weight(), weight * MASK)


# ---- the largest of all layers


def test_global_keeps_the_largest_of_all_layers():
    model = mlp()
    every = torch.cat([w.detach().abs().flatten() for w in (m.weight for m in model[::2])])
    sk.sparsify_(model, 0.9, distribution="global", init="keep")
    layers = sk.sparse_layers(model).values()
    kept = torch.cat([layer.active_values().abs().flatten() for layer in layers])
    assert len(kept) == len(every) - 239_580
    assert torch.equal(
        kept.sort(descending=True).values, every.sort(descending=True).values[: len(kept)]
    )


def test_global_ties_go_to_the_earlier_layer_and_position():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.ones_(layer.weight)
    sk.sparsify_(model, 0.5, distribution="global", init="keep")
    # one block is each layer's own; the other 15 are the first in order
    assert type(model[0]) is nn.Linear or model[0].nnz == 15
    assert model[1].nnz == 16 - (16 if type(model[0]) is nn.Linear else model[0].nnz)
    assert model[1].mask().flatten()[: model[1].nnz].all()


def test_global_with_blocks_is_exact_to_within_one_block():
    model = sk.sparsify_(mlp(), 0.8, distribution="global", init="keep", block=8)
    total = sum(
        layer.nnz if isinstance(layer, sk.SparseLinear) else layer.weight.numel()
        for layer in model[::2]
    )
    assert abs(total - 0.2 * 266_200) <= 64


# ---- blocks that do not fit, sizes of zero


def test_a_block_that_does_not_fit_leaves_its_layer_dense_and_the_others_as_they_were():
    model = sk.sparsify_(mlp(), 0.9, distribution="uniform", block=64)
    assert type(model[4]) is nn.Linear
    assert "larger than its 10 by 100" in sk.summary(model).dense["4"]
    for i in (0, 2):
        assert abs(model[i].nnz - model[i].mask().numel() * 0.1) <= 64 * 64


def test_layers_without_weights_stay_dense():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="zero-element"):
        model.append(nn.Linear(0, 8))
    sk.sparsify_(model, 0.5)
    assert set(sk.sparse_layers(model)) == {"0"}
    assert sk.summary(model).dense["1"] == "it has no weights"


# ---- torch's pruning


PRUNED = {
    "linear": (lambda: nn.Linear(12, 8), "weight", ""),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), "weight", ""),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=2), "weight", ""),
    "gru": (lambda: nn.GRU(6, 6), "weight_hh_l0", ".hh_l0"),
    "lstm cell": (lambda: nn.LSTMCell(6, 6), "weight_ih", ".ih"),
}


@pytest.mark.parametrize("family", PRUNED)
def test_pruned_layers_are_taken_over_with_their_masks(family):
    make, attribute, own = PRUNED[family]
    layer = make()
    prune.l1_unstructured(layer, attribute, 0.5)
    prune.random_unstructured(layer, attribute, 0.2)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("mine"))
    mask = layer._buffers[f"{attribute}_mask"].clone()
    weight = getattr(layer, attribute).detach().clone()
    model = nn.Sequential(layer, nn.Linear(8, 8))
    sk.sparsify_(model, 0.75, distribution="uniform", init="sparse")
    sparse = sk.sparse_layers(model)[f"0{own}"]
    assert torch.equal(sparse.mask(), mask.bool())
    assert torch.equal(sparse.dense_weight(), weight * mask)
    assert (
        list(model[0]._forward_pre_hooks.values()) == list(layer._forward_pre_hooks.values())[-1:]
    )
    assert not any("_mask" in key or "_orig" in key for key in model.state_dict())
    assert model[1].sparsity == 0.75


def test_the_mask_of_a_pruned_layer_must_be_made_of_blocks():
    model = mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(TopologyError, match="'2'.*whole"):
        sk.sparsify_(model, 0.5, block=4)
    with pytest.raises(ConfigError, match="pruned by torch"):
        sk.sparsify_(model, masks={"2": MASK})
    assert prune.is_pruned(model[2])


# ---- values and plans


def test_gain_scales_what_is_drawn():
    one, two = (
        sk.sparsify_(mlp(), 0.5, gain=gain, generator=torch.Generator().manual_seed(3))
        for gain in (None, 4 * TORCH_GAIN)
    )
    for a, b in zip(sk.sparse_layers(one).values(), sk.sparse_layers(two).values(), strict=True):
        assert torch.equal(4 * a.values, b.values)
        assert bool((b.values.abs() <= bounds(b.topology, 4 * TORCH_GAIN)).all())


def test_a_plan_is_made_to_the_letter():
    model = mlp()
    plan = sk.plan(model, torch.randn(2, 784), sparsity=0.9, device="cpu")
    twin = sk.sparsify_(mlp(), **plan.arguments)
    sk.sparsify_(model, plan=plan)
    planned = plan.planned
    layers = sk.sparse_layers(model)
    assert set(layers) == set(planned) == set(sk.sparse_layers(twin))
    for name, layer in layers.items():
        assert layer.block == sk.sparse_layers(twin)[name].block
        assert layer.nnz == sk.sparse_layers(twin)[name].nnz
    assert sk.summary(model).asked == plan.sparsity
    with pytest.raises(ConfigError, match="blocks of its own"):
        sk.sparsify_(mlp(), plan=plan, block=4)
    if planned:
        with pytest.raises(ConfigError, match="which `model` does not have"):
            sk.sparsify_(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), plan=plan)


@pytest.mark.parametrize("init", ["sparse", None])
def test_a_sparsity_without_keep_leaves_sparse_layers_alone(init):
    model = sk.sparsify_(Everything(), distribution=lambda *_: 0.4, exclude=("head",))
    before = {n: (m, m.values, m.values.clone()) for n, m in sk.sparse_layers(model).items()}
    sk.sparsify_(model, distribution=lambda *_: 0.9, init=init)
    after = sk.sparse_layers(model)
    assert set(after) == {*before, "head"}
    for name, (layer, parameter, values) in before.items():
        assert after[name] is layer
        assert layer.values is parameter
        assert torch.equal(parameter, values)
    assert after["head"].sparsity == pytest.approx(0.9, abs=0.01)
    with pytest.raises(ConfigError, match="no layer left to make sparse"):
        sk.sparsify_(model, init=init)


def test_masks_keep_values_unless_an_init_is_given():
    mask = random_mask((300, 784))
    for given, kept in (({}, True), ({"init": "keep"}, True), ({"init": "sparse"}, False)):
        model = mlp()
        before = model[0].weight.detach().clone() * mask
        sk.sparsify_(model, masks={"0": mask}, **given)
        assert torch.equal(model[0].mask(), mask)
        assert torch.equal(model[0].dense_weight(), before) == kept
