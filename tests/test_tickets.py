"""Scores and masks over dense layers: worked vectors, conservation, controls, bad input."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import tickets
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn.kinds import Weight
from sparsekern.swap import Target, candidates
from sparsekern.tickets.masks import block_masks


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    )


def batch(seed=1, n=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, generator=g), torch.randint(5, (n,), generator=g)


def every(_module, _name):
    """Also what a module multiplies by itself."""
    return True


class Quadratic(nn.Module):
    """L = theta' A theta / 2, with theta the weight of a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, -2.0]])

    def forward(self, a):
        theta = self.layer.weight[0]
        return theta @ a @ theta / 2


def test_grasp_has_the_sign_of_the_paper():
    # g = A theta = (0, -5); H g = (-5, -15); the paper's S = -theta (H g) = (5, -30)
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    scores = tickets.grasp(Quadratic(), [(a, a)], lambda y, _: y, temperature=1.0, filter_fn=every)
    assert torch.equal(scores["layer"], torch.tensor([[-5.0, 30.0]]))
    assert torch.equal(tickets.top(scores, 0.5)["layer"], torch.tensor([[False, True]]))


def test_grasp_sums_gradients_before_it_multiplies():
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    halves = [(a / 2, a), (a / 2, a)]
    whole = tickets.grasp(Quadratic(), [(a, a)], lambda y, _: y, temperature=1.0, filter_fn=every)
    parts = tickets.grasp(Quadratic(), halves, lambda y, _: y, temperature=1.0, filter_fn=every)
    assert torch.equal(whole["layer"], parts["layer"])


def test_snip_is_gradient_times_weight():
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    scores = tickets.snip(Quadratic(), [(a, a)], lambda y, _: y, filter_fn=every)
    assert torch.equal(scores["layer"], torch.tensor([[0.0, 10.0]]))


def test_synflow_is_the_worked_example():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[1].weight.data = torch.tensor([[1.0, -1.0]])
    scores = tickets.synflow(model, torch.zeros(1, 2), 0.0, rounds=1)
    assert torch.equal(scores["0"], torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert torch.equal(scores["1"], torch.tensor([[3.0, 7.0]], dtype=torch.float64))


@pytest.mark.parametrize("rounds", [1, 10])
def test_synflow_conserves_what_flows_through_each_layer(rounds):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    scores = tickets.synflow(model, torch.zeros(1, 16), 0.8, rounds=rounds)
    sums = [s[s >= 0].sum() for s in scores.values()]
    for one in sums[1:]:
        # sums of 256 products of four numbers each, all positive, in float64
        assert abs(one - sums[0]) <= 2 * 16 * 16 * 4 * 2**-53 * sums[0]


def test_synflow_empties_no_layer_where_one_round_does():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, n, bias=False) for n in (64, 64, 4)))
    x = torch.zeros(1, 64)
    kept = {}
    for rounds in (1, 100):
        masks = tickets.top(tickets.synflow(model, x, 0.99, rounds=rounds), 0.99)
        kept[rounds] = min(int(mask.sum()) for mask in masks.values())
        assert sum(int(m.sum()) for m in masks.values()) == 8448 - int(0.99 * 8448)
    assert kept[1] == 0 < kept[100]


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "random"])
def test_the_model_is_left_as_it_was(score):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    made = {
        "snip": lambda: tickets.snip(model, [(x, y)], nn.functional.cross_entropy),
        "grasp": lambda: tickets.grasp(model, [(x, y)], nn.functional.cross_entropy),
        "synflow": lambda: tickets.synflow(model, x, 0.5, rounds=3),
        "random": lambda: tickets.random(model, generator=torch.Generator().manual_seed(0)),
    }[score]()
    assert list(made) == ["0", "4", "6"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    masks = tickets.top(made, 0.7)
    sk.sparsify_(model, masks=masks)
    for name, layer in sk.sparse_layers(model).items():
        assert torch.equal(layer.to_dense().weight != 0, masks[name])


def test_top_is_exact_and_takes_the_first_of_equal_scores():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 5.0])}
    masks = tickets.top(scores, 0.5)
    assert masks["a"].tolist() == [[True, False], [True, False]]
    assert masks["b"].tolist() == [False, True]
    layers = tickets.top(scores, 0.5, "layer")
    assert layers["a"].tolist() == [[True, False], [True, False]]
    assert layers["b"].tolist() == [False, True]
    own = tickets.top(scores, 0.5, {"a": 0.75, "b": 0.0})
    assert [int(m.sum()) for m in own.values()] == [1, 2]


@pytest.mark.parametrize("scope", ["erk", "er", "layer"])
def test_shares_are_those_of_sparsify(scope):
    name = "uniform" if scope == "layer" else scope
    scores = tickets.random(small(), generator=torch.Generator().manual_seed(1))
    counts = {n: int(m.sum()) for n, m in tickets.top(scores, 0.8, scope).items()}
    model = sk.sparsify_(small(), 0.8, distribution=name, exclude=())
    for layer_name, layer in sk.sparse_layers(model).items():
        if scope != "layer" or layer_name != "0":
            assert counts[layer_name] == layer.nnz


def test_shuffled_masks_keep_their_counts_and_nothing_else():
    masks = tickets.top(tickets.random(small()), 0.8)
    g = torch.Generator().manual_seed(3)
    other = tickets.shuffled(masks, g)
    assert all(int(other[n].sum()) == int(m.sum()) for n, m in masks.items())
    assert any(not torch.equal(other[n], m) for n, m in masks.items())
    again = tickets.shuffled(masks, torch.Generator().manual_seed(3))
    assert all(torch.equal(other[n], again[n]) for n in masks)


def test_block_masks_are_whole_blocks_and_the_largest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(4, 8, 3))
    targets = {t.name: t for t in candidates(model, None, (), first_conv_stays=False)}
    for scope in ("global", "erk"):
        masks = block_masks(targets, 0.6, scope, (4, 4))
        twin = copy.deepcopy(model)
        sk.sparsify_(twin, masks=masks, block=4)  # which refuses partial blocks
        asked = {"distribution": scope, "init": "keep", "block": 4}
        kept = sk.sparsify_(copy.deepcopy(model), 0.6, **asked)
        for name, layer in sk.sparse_layers(kept).items():
            assert torch.equal(layer.to_dense().weight != 0, masks[name])


def test_bad_input_is_refused():
    model, (x, y) = small(), batch()
    ce = nn.functional.cross_entropy
    scores = tickets.random(model)
    for call, kind, text in [
        (lambda: tickets.top(scores, 0.5, "globl"), ConfigError, "scope"),
        (lambda: tickets.top(scores, 1.0), ConfigError, "sparsity"),
        (lambda: tickets.top({"0": torch.full((2,), torch.nan)}, 0.5), ConfigError, "NaN"),
        (lambda: tickets.top({}, 0.5), DtypeError, "scores"),
        (lambda: tickets.top(scores, 0.5, {"0": 0.5}), ConfigError, "scope"),
        (lambda: tickets.snip(model, [], ce), ConfigError, "batches"),
        (lambda: tickets.snip(model, (x, y), ce), ConfigError, r"\[\(x, y\)\]; got .*Tensor"),
        (lambda: tickets.snip(model, [(x, y)], lambda a, _: a), ConfigError, "scalar"),
        (lambda: tickets.snip(model, [(x * torch.inf, y)], ce), ConfigError, "finite"),
        (lambda: tickets.grasp(model, [(x, y)], ce, temperature=0), ConfigError, "temperature"),
        (lambda: tickets.synflow(model, x, 0.5, rounds=0), ConfigError, "rounds"),
        (lambda: tickets.synflow(model, y, 0.5), DtypeError, "example"),
        (lambda: tickets.weights(nn.TransformerEncoderLayer(8, 2)), ConfigError, "q_proj"),
        (lambda: tickets.weights(nn.ReLU()), ConfigError, "no dense weight"),
        (lambda: tickets.weights(3), DtypeError, "nn.Module"),
        (lambda: tickets.random(model, generator=3), DtypeError, "Generator"),
        (lambda: tickets.snip(sk.sparsify_(small(), 0.9), [(x, y)], ce), ConfigError, "no dense"),
    ]:
        with pytest.raises(kind, match=text):
            call()


def test_block_masks_of_a_transposed_weight_have_its_shape():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(8, 8))
    masks = {}
    for transposed, parameter in ((False, nn.Parameter(w.detach().t().clone())), (True, w)):
        target = Target("a", "a", nn.Linear(8, 8), Weight("", parameter, transposed=transposed))
        masks[transposed] = block_masks({"a": target}, 0.5, "layer", (4, 2))["a"]
    assert torch.equal(masks[True], masks[False].t())
    assert not torch.equal(masks[True], masks[False])
