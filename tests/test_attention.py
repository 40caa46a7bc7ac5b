"""Sparse attention is torch's attention with weights left out; GPT-2's layer; what stays dense."""

import copy
import itertools
import sys
import types

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn import SparseMultiheadAttention, SparseTransposedLinear

LIMIT = 2.0**-44  # of sums of at most 64 products of numbers near 1, in float64


def holding(layer):
    return nn.ModuleDict({"attn": layer})


def attention(**settings):
    return nn.MultiheadAttention(16, 4, dtype=torch.float64, **settings)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize(("bias", "kv", "zero"), list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize(("kdim", "first"), [(None, True), (12, False)])
def test_outputs_and_weights_are_torchs(impl, bias, kv, zero, kdim, first):
    layer = attention(
        bias=bias, add_bias_kv=kv, add_zero_attn=zero, kdim=kdim, vdim=kdim, batch_first=first
    )
    model = sk.sparsify_(holding(layer), 0.5, init="keep", block=2, impl=impl)
    sparse = model["attn"]
    dense = sparse.to_dense()
    q, k = (torch.randn(3, n, size, dtype=torch.float64) for n, size in ((5, 16), (7, kdim or 16)))
    q, k = (q, k) if first else (q.transpose(0, 1), k.transpose(0, 1))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    added = torch.randn(12, 5, 7, dtype=torch.float64)
    pairs = (None, torch.ones(5, 7, dtype=torch.bool).triu(3), added)
    for pad, mask, need in itertools.product((None, padding), pairs, (True, False)):
        settings = {"key_padding_mask": pad, "attn_mask": mask, "need_weights": need}
        got, weights = sparse(q, k, k, **settings)
        wanted, others = dense(q, k, k, **settings)
        assert bool(((got - wanted).abs() <= LIMIT).all())
        assert (weights is None) is (others is None)
        if weights is not None:
            assert weights.shape == others.shape
            assert bool(((weights - others).abs() <= LIMIT).all())
    sk.densify_(model)
    assert type(model["attn"]) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_steps_aside():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2)
    sk.sparsify_(model, 0.5, init="keep")
    dense = sk.densify_(copy.deepcopy(model))
    x, padding = torch.randn(3, 6, 16, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for one in (model, dense):
        one.eval()
    with torch.no_grad():
        for pad in (None, padding):
            got, wanted = (one(x, src_key_padding_mask=pad) for one in (model, dense))
            inside = ~padding if pad is not None else slice(None)
            assert bool(((got - wanted)[inside].abs() <= LIMIT).all())


def test_nested_tensors_and_misfits_are_refused():
    layer = SparseMultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 3, 16)
    with pytest.raises(sk.ShapeError, match="`query` must have shape"):
        layer(torch.randn(2, 3, 8), x, x)
    with pytest.raises(sk.ShapeError, match="`attn_mask` must have shape"):
        layer(x, x, x, attn_mask=torch.zeros(2, 2))
    with pytest.raises(sk.ConfigError, match="`num_heads` must divide"):
        SparseMultiheadAttention(16, 3)
    with pytest.raises(sk.WeightError):
        layer.in_proj_weight.t()
    assert layer.in_proj_weight.shape == (48, 16)


def test_a_dense_state_loads_and_names_are_summed_up():
    source = attention()
    model = sk.sparsify_(holding(attention()), 0.5, exclude=("attn.k_proj",))
    layer = model["attn"]
    assert set(sk.sparse_layers(model)) == {"attn.q_proj", "attn.v_proj", "attn.out_proj"}
    layer.load_state_dict(source.state_dict())
    q, k, v = source.in_proj_weight.detach().chunk(3)
    assert torch.equal(layer.q_proj.dense_weight(), q * layer.q_proj.mask())
    assert torch.equal(layer.k_proj.weight, k)
    assert torch.equal(layer.v_proj.dense_weight(), v * layer.v_proj.mask())
    assert torch.equal(layer.in_proj_bias, source.in_proj_bias)
    rows = sk.summary(holding(attention())).rows
    assert [row.name for row in rows] == [f"attn.{name}_proj" for name in ("q", "k", "v", "out")]
    assert sum(row.weights for row in rows) == 4 * 16 * 16


@pytest.mark.parametrize("method", [sk.RigL, sk.SET, sk.Static])
def test_an_optimizer_goes_on_and_training_is_that_of_the_masked_twin(method):
    def run(impl):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, dtype=torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(4, 5, 16, dtype=torch.float64)

        def step():
            optimizer.zero_grad()
            (model(x) * x.flip(0)).sum().backward()
            optimizer.step()

        step()
        optimizer.zero_grad()
        held = len(optimizer.state)
        sk.sparsify_(model, 0.5, init="keep", optimizer=optimizer, impl=impl)
        assert len(optimizer.state) == held + 2  # one packed matrix became three
        settings = {"seed": 3} if method is sk.SET else {}
        method(model, optimizer, t_end=9, update_freq=3, **settings)
        for _ in range(12):
            step()
        return model

    model, twin = run("cpu"), run("masked")
    for name, layer in sk.sparse_layers(model).items():
        other = twin.get_submodule(name)
        assert layer.topology.digest() == other.topology.digest()
        scale = other.dense_weight().abs().max()
        gap = (layer.dense_weight() - other.dense_weight()).abs()
        assert bool((gap <= 2.0**-30 * scale).all())


def test_hooks_on_the_output_projection_go_on():
    layer, calls = attention(), []
    layer.out_proj.mark = 3
    layer.out_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    layer.register_forward_hook(lambda *_: calls.append(2))
    model = sk.sparsify_(holding(layer), 0.5)
    x = torch.randn(3, 2, 16, dtype=torch.float64)
    model["attn"](x, x, x)
    assert calls == [1, 2]
    assert model["attn"].out_proj.mark == 3
    assert sk.densify_(model)["attn"].out_proj.mark == 3


def test_a_file_takes_attention_along(tmp_path):
    model = sk.sparsify_(holding(attention()), 0.5)
    sk.save(tmp_path / "a.safetensors", model)
    other = holding(attention())
    sk.load(tmp_path / "a.safetensors", other)
    x = torch.randn(3, 2, 16, dtype=torch.float64)
    assert torch.equal(other["attn"](x, x, x)[0], model["attn"](x, x, x)[0])


@pytest.fixture
def transposed(monkeypatch):
    """A module that stands for transformers', with its layer."""

    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    home = types.ModuleType("transformers.pytorch_utils")
    home.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", home)
    return Conv1D


@pytest.mark.parametrize("block", [1, (4, 2)])
def test_a_transposed_layer_is_swapped_and_comes_back(transposed, block):
    model = nn.Sequential(transposed(12, 8)).double()
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before, state = model[0].weight.detach().clone(), optimizer.state[model[0].weight]["exp_avg"]
    sk.sparsify_(model, 0.5, init="keep", block=block, optimizer=optimizer)
    layer = model[0]
    assert type(layer) is SparseTransposedLinear
    assert layer.weight.shape == layer.mask().shape == (8, 12)
    assert torch.equal(layer.dense_weight(), before * layer.mask())
    moved = layer.topology.unpack(optimizer.state[layer.values]["exp_avg"]).t()
    assert torch.equal(moved, state * layer.mask())
    got = layer(x)
    sk.densify_(model)
    assert type(model[0]) is transposed
    assert bool(((model(x) - got).abs() <= LIMIT).all())
    other = nn.Sequential(transposed(12, 8)).double()
    sk.sparsify_(other, masks={"0": before > 0})
    assert torch.equal(other[0].mask(), before > 0)
    other[0].load_state_dict({"weight": before, "bias": other[0].bias.detach()})
    assert torch.equal(other[0].dense_weight(), before * (before > 0))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.taken, self.called = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lora_A = nn.Linear(8, 8)

    def forward(self, x):
        x = x.to(self.called.weight.dtype)
        return self.called(x) @ self.taken.weight.t() + self.lora_A(x)


def test_weights_that_a_model_takes_and_adapters_stay_dense():
    model = sk.sparsify_(nn.Sequential(Mixer()), 0.5)
    assert list(sk.sparse_layers(model)) == ["0.called"]
    told = sk.summary(model).dense
    assert told["0.taken"] == "Mixer multiplies by its weight itself"
    assert told["0.lora_A"] == "it is a part of a low-rank adapter"
    model(torch.randn(2, 8)).sum().backward()
    forced = sk.sparsify_(nn.Sequential(Mixer()), 0.5, filter_fn=lambda _, name: "taken" in name)
    with pytest.raises(sk.SparseKernError):
        forced(torch.randn(2, 8))


def test_a_plan_names_the_projections_that_it_leaves_dense():
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    plan = sk.plan(model, torch.randn(2, 5, 32), sparsity=0.5)
    names = [f"0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    assert list(plan.unplanned) == names
    line = next(line for line in str(plan).splitlines() if line.startswith(names[0]))
    assert line.startswith(f"{', '.join(names)}: not planned and left dense, because no cost")
    assert plan.to_dict()["unplanned"] == plan.unplanned
    sk.sparsify_(model, plan=plan)
    assert not any("self_attn" in name for name in sk.sparse_layers(model))
    alone = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(sk.ConfigError, match="0.v_proj, 0.out_proj: no cost is known"):
        sk.plan(alone, torch.randn(2, 5, 8), sparsity=0.5)
