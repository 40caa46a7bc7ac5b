"""Trained masks over frozen weights: worked gradients, conversion to sparse layers, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sparsekern as sk
from sparsekern import tickets
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.tickets import supermask as module
from tests.support import integers

KINDS = module.KINDS
W = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
S = torch.tensor([[0.9, -0.1, 0.4, -0.8]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def frozen(weight, kind, density=0.5, rescale=False):
    """One layer of this weight under a supermask."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    layer.requires_grad_(False)
    tickets.supermask_(layer, kind, density, rescale)
    return layer, layer.parametrizations.weight[0]


def net(bias=True):
    """Integer weights; every family of layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, bias=bias),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(6, 8, 5, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 12, 12, bias=bias),
        nn.ReLU(),
        nn.Linear(12, 4, bias=bias),
    )
    for parameter in model.parameters():
        parameter.data = integers(*parameter.shape)
    return model.requires_grad_(False)


# ---- forward and backward


@pytest.mark.parametrize(
    ("kind", "effective"),
    [("popup", [0.5, 0.0, 0.0, 2.0]), ("biprop", [1.25, 0.0, 0.0, 1.25])],
)
def test_the_worked_example(kind, effective):
    layer, supermask = frozen(W, kind)
    supermask.scores.data = S.clone()
    weight = layer.weight
    assert torch.equal(weight, torch.tensor([effective]))
    weight.sum().backward()
    assert torch.equal(supermask.scores.grad, torch.tensor([[0.5, 1.0, 0.25, -2.0]]))


def test_alpha_of_biprop_divides_by_the_share_and_not_by_the_number_kept():
    # 3 - int(3 / 2) = 2 are kept, and int(3 / 2) = 1 is what the paper's code divides by
    layer, supermask = frozen(torch.tensor([[1.0, -2.0, 4.0]]), "biprop")
    supermask.scores.data = torch.tensor([[0.9, -0.1, -0.8]])
    assert torch.equal(layer.weight, torch.tensor([[5.0, 0.0, 5.0]]))


def test_popup_is_rescaled_by_a_constant():
    layer, supermask = frozen(W, "popup", rescale=True)
    supermask.scores.data = S.clone()
    layer.weight.sum().backward()
    assert torch.equal(layer.weight, torch.tensor([[1.0, 0.0, 0.0, 4.0]]))
    assert torch.equal(supermask.scores.grad, torch.tensor([[1.0, 2.0, 0.5, -4.0]]))


@pytest.mark.parametrize("rescale", [False, True])
def test_bernoulli_has_the_gradient_of_the_probability(rescale):
    # L = sum g w m n / sum m, with dm/ds = 1/4 at s = 0; all numbers are exact
    torch.manual_seed(0)
    w, g = integers(4, 8), integers(4, 8)
    layer, supermask = frozen(w, "bernoulli", rescale=rescale)
    mask = torch.zeros(4, 8)
    mask.view(-1)[torch.randperm(32)[:8]] = 1
    (supermask.masked(w, mask.bool()) * g).sum().backward()
    along = g * w
    if rescale:
        along = 32 / 8 * g * w - 32 / 8**2 * (g * w * mask).sum()
    assert torch.equal(supermask.scores.grad, along / 4)
    assert torch.equal(supermask.masked(w, mask.bool()), w * mask * (4 if rescale else 1))
    assert layer.parametrizations.weight.original.grad is None


def test_bernoulli_samples_at_every_pass_in_evaluation_too():
    layer, supermask = frozen(torch.ones(20, 50), "bernoulli", 0.25)
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(1)
        first, second = layer.weight, layer.weight
        torch.manual_seed(1)
        assert torch.equal(layer.weight, first)
        assert not torch.equal(first, second)
    kept = torch.stack([supermask.mask(seeded(i)).float() for i in range(40)])
    n, p = kept.numel(), 0.25
    assert abs(int(kept.sum()) - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("kind", ["popup", "biprop"])
@pytest.mark.parametrize("density", [0.03, 0.29, 0.5, 1.0])
def test_counts_are_exact_in_each_layer(kind, density):
    model = tickets.supermask_(net(), kind, density, generator=seeded())
    for name, mask in tickets.supermasks(model).items():
        n = mask.numel()
        assert int(mask.sum()) == n - int(round((1 - density) * n, 6)), name
        scores = model.get_submodule(name).parametrizations.weight[0].scores.abs()
        assert mask.all() or scores[mask].min() >= scores[~mask].max()


def test_scores_are_drawn_by_the_generator_within_the_fan_in():
    models = [tickets.supermask_(net(), "popup", generator=seeded(7)) for _ in range(2)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
    scores = models[0][6].parametrizations.weight[0].scores.detach()
    bound = 96**-0.5
    assert 0.9 * bound < scores.abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_the_scores_and_nothing_else(kind):
    model = tickets.supermask_(net(), kind)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{n}.parametrizations.weight.0.scores" for n in ("0", "3", "6", "8")}
    assert trained == expected
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(integers(5, 4, 6, 6)), torch.arange(5) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_loads_into_another_model(kind):
    model = tickets.supermask_(net(), kind, generator=seeded(1))
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=seeded(2))
    other = net()
    for p in other.parameters():
        p.data = torch.zeros_like(p)
    tickets.supermask_(other, kind, generator=seeded(3))
    assert not other.load_state_dict(model.state_dict()).missing_keys
    x, twin = integers(3, 4, 6, 6), copy.deepcopy(model)
    outputs = []
    for one in (model, other, twin):
        torch.manual_seed(5)
        outputs.append(one(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


# ---- conversion


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_model_infers_the_same(kind, rescale):
    if kind == "biprop" and rescale:
        return
    model = tickets.supermask_(net(), kind, 0.5, rescale, generator=seeded())
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=seeded(2))
    x = integers(3, 4, 6, 6)
    torch.manual_seed(3)
    expected = {}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            expected[name] = layer.weight.detach()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    tickets.to_sparse_(model)
    assert set(sk.sparse_layers(model)) == {"0", "3", "6", "8"}
    for name, layer in sk.sparse_layers(model).items():
        assert torch.equal(layer.to_dense().weight, expected[name])  # to the last bit
        assert layer.topology.nnz < layer.to_dense().weight.numel()
        assert not layer.values.requires_grad
    if (kind, rescale) in (("popup", False), ("popup", True), ("bernoulli", False)):
        assert torch.equal(model(x), y)  # every product and sum is exact


def test_bernoulli_converts_to_the_mask_that_is_given_or_drawn():
    model = tickets.supermask_(net(), "bernoulli")
    twin, drawn = copy.deepcopy(model), tickets.supermasks(model, generator=seeded(4))
    tickets.to_sparse_(model, drawn)
    tickets.to_sparse_(twin, generator=seeded(4))
    for name, layer in sk.sparse_layers(model).items():
        dense = net().get_submodule(name).weight
        assert torch.equal(layer.to_dense().weight, dense * drawn[name])
        assert torch.equal(layer.topology.to_mask(), twin.get_submodule(name).topology.to_mask())


def test_copies_of_a_model_convert_one_by_one():
    # they share the class that torch made for their layers
    model = tickets.supermask_(net(), "popup", generator=seeded())
    twin, x = copy.deepcopy(model), integers(2, 4, 6, 6)
    y = model(x)
    tickets.to_sparse_(twin)
    assert torch.equal(model(x), y)
    tickets.to_sparse_(model)
    assert torch.equal(model(x), y)
    assert torch.equal(twin(x), y)


def test_a_mask_that_leaves_nothing_out_becomes_a_dense_layer():
    model = tickets.supermask_(net(), "popup", 1.0)
    x = integers(2, 4, 6, 6)
    y = model(x)
    tickets.to_sparse_(model)
    assert not sk.sparse_layers(model)
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), y)


def test_a_conversion_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tickets.supermask_(net(), "popup", generator=seeded())
    x = integers(2, 4, 6, 6)
    y, before, ids = model(x), copy.deepcopy(model.state_dict()), set(map(id, model.parameters()))

    def fails(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sparsify_", fails)
    with pytest.raises(KeyboardInterrupt):
        tickets.to_sparse_(model)
    assert torch.equal(model(x), y)
    assert list(model.state_dict()) == list(before)
    assert set(map(id, model.parameters())) == ids


def test_rescaling_changes_no_prediction_of_a_relu_net_without_biases():
    outputs = []
    for rescale in (False, True):
        model = tickets.supermask_(net(bias=False), "popup", 0.5, rescale, generator=seeded())
        torch.manual_seed(9)
        outputs.append(model(integers(40, 4, 6, 6)))
    assert torch.equal(outputs[1], 2**4 * outputs[0])
    assert torch.equal(outputs[0].argmax(1), outputs[1].argmax(1))


# ---- bad input


def trained():
    return net().requires_grad_(True)


def trained_bias():
    model = net()
    model[6].bias.requires_grad_(True)
    return model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4)
        self.out = nn.Linear(4, 4)


BAD = [
    (lambda: (trained(), "popup"), ConfigError, "layer '0' trains: its weight"),
    (lambda: (trained(), "bernoulli"), ConfigError, "requires_grad_(False)"),
    (lambda: (trained_bias(), "popup"), ConfigError, "layer '6' trains: its bias"),
    (lambda: (net(), "pop-up"), ConfigError, "did you mean 'popup'"),
    (lambda: (net(), None), ConfigError, "`kind` must be one of"),
    (lambda: (net(), "popup", 0.0), ConfigError, "the share that is kept"),
    (lambda: (net(), "popup", 1.5), ConfigError, "(0, 1]"),
    (lambda: (net(), "bernoulli", 1.0), ConfigError, "probability"),
    (lambda: (net(), "popup", "half"), DtypeError, "`density` must be a number"),
    (lambda: (net(), "popup", 0.5, 1), DtypeError, "`rescale` must be a bool"),
    (lambda: (net(), "biprop", 0.5, True), ConfigError, "alpha scales"),
    (lambda: (net(), "biprop", 0.01), ConfigError, "less than one of the 48"),
    (lambda: (Recurrent().requires_grad_(False), "popup"), ConfigError, "belongs to a GRU"),
    (lambda: (nn.ReLU(), "popup"), ConfigError, "no dense weight"),
    (lambda: ("net", "popup"), DtypeError, "nn.Module"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_input_is_named_and_changes_nothing(arguments, error, text):
    model, *rest = arguments()
    with pytest.raises(error) as caught:
        tickets.supermask_(model, *rest)
    assert text in str(caught.value)
    if isinstance(model, nn.Module):
        assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_a_model_without_supermasks_or_with_more_is_refused():
    with pytest.raises(ConfigError, match="no supermask"):
        tickets.to_sparse_(net())
    model = tickets.supermask_(net(), "popup")
    with pytest.raises(ConfigError, match="no dense weight"):
        tickets.supermask_(model, "popup")
    parametrizations.spectral_norm(model[6])
    with pytest.raises(ConfigError, match="another parametrization"):
        tickets.supermasks(model)


def test_what_can_not_be_converted_is_named():
    model = tickets.supermask_(net(), "popup")
    masks = tickets.supermasks(model)
    with pytest.raises(ConfigError, match="same names"):
        tickets.to_sparse_(model, {"6": masks["6"]})
    with pytest.raises(ShapeError, match="one shape"):
        tickets.to_sparse_(model, {**masks, "6": masks["8"]})
    with pytest.raises(DtypeError, match="bool"):
        tickets.to_sparse_(model, {**masks, "6": masks["6"].float()})
    layer, _ = frozen(W, "popup")
    with pytest.raises(DtypeError, match="must contain layers"):
        tickets.to_sparse_(layer)
    model[6].parametrizations.weight[0].scores.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="diverged"):
        tickets.to_sparse_(model)
