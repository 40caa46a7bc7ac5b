"""`layer.weight` answers what it can, and loses nothing that is written to it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import DtypeError, SparseKernError, WeightError

LAYERS = {
    "linear": lambda **kw: sk.SparseLinear(9, 6, sparsity=0.5, block=2, **kw),
    "conv1d": lambda **kw: sk.SparseConv1d(4, 8, 3, sparsity=0.5, **kw),
    "conv2d": lambda **kw: sk.SparseConv2d(4, 8, 3, sparsity=0.5, block=2, **kw),
    "masked": lambda **kw: sk.SparseLinear(9, 6, sparsity=0.5, impl="masked", **kw),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


def write_item(w, v):
    w[0] = v[0]


def write_data(w, v):
    w.data = v


def write_grad(w, v):
    w.grad = v


def write_flag(w, _):
    w.requires_grad = False


WRITES = {
    "data": write_data,
    "grad": write_grad,
    "requires_grad": write_flag,
    "item": write_item,
    "data[...]": lambda w, v: write_item(w.data, v),
    "copy_": lambda w, v: w.copy_(v),
    "data.copy_": lambda w, v: w.data.copy_(v),
    "zero_": lambda w, _: w.data.zero_(),
    "requires_grad_": lambda w, _: w.requires_grad_(False),
    "normal_": lambda w, _: nn.init.normal_(w),
    "uniform_": lambda w, _: nn.init.uniform_(w),
    "constant_": lambda w, _: nn.init.constant_(w, 0.5),
    "zeros_": lambda w, _: nn.init.zeros_(w),
    "xavier_uniform_": lambda w, _: nn.init.xavier_uniform_(w),
    "kaiming_normal_": lambda w, _: nn.init.kaiming_normal_(w),
    "kaiming_uniform_": lambda w, _: nn.init.kaiming_uniform_(w),
    "trunc_normal_": lambda w, _: nn.init.trunc_normal_(w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_raises_and_says_where(layer, write):
    before = layer.values.detach().clone()
    with pytest.raises(SparseKernError, match=r"`layer.values`.*set_active_values.*from_dense"):
        write(layer.weight, torch.zeros(layer.weight.shape))
    assert torch.equal(layer.values, before)


@pytest.mark.parametrize("make", [nn.Parameter, lambda w: w, lambda _: None])
def test_an_assignment_to_the_layer_raises(layer, make):
    with pytest.raises(WeightError, match=r"`weight` of a sparse layer .*`layer.values`"):
        layer.weight = make(torch.zeros(layer.weight.shape))
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("weight_ih_l0", "ih_l0.values"),
        ("weight_hh_l0", "hh_l0.values"),
        ("bias_ih_l0", "ih_l0.bias"),
    ],
)
def test_an_assignment_to_a_recurrent_layer_raises(name, place):
    layer = sk.SparseGRU(4, 6, sparsity=0.5)
    for value in (nn.Parameter(torch.zeros(18, 4)), torch.zeros(18, 4)):
        with pytest.raises(WeightError, match=f"`{name}` can't be assigned to: .*`{place}"):
            setattr(layer, name, value)
    with pytest.raises(AttributeError):
        getattr(layer, name)


def test_what_it_answers_is_what_the_dense_weight_answers(layer):
    view, dense = layer.weight, layer.to_dense().weight
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_meta", "grad"):
        assert getattr(view, name) == getattr(dense, name), name
    for name in ("dim", "ndimension", "numel", "nelement", "size", "element_size"):
        assert getattr(view, name)() == getattr(dense, name)(), name
    assert view.is_floating_point()
    assert not view.is_complex()
    assert view.size(-1) == dense.size(-1)
    assert view.size(dim=0) == len(view) == len(dense)
    assert torch.equal(view.to_dense(), dense)
    assert view.data.shape == dense.shape
    assert not view.data.requires_grad


@pytest.mark.parametrize("p", ["fro", 2, 1, 0, math.inf])
def test_norm_is_that_of_the_dense_weight(p):
    for make in LAYERS.values():
        layer = make(dtype=torch.float64)
        with torch.no_grad():  # so that every sum, and the root, is exact
            layer.set_active_values((layer.active_values() != 0).double() * 3)
        dense = layer.weight.to_dense()
        exact = torch.linalg.vector_norm(dense.flatten(), 2 if p == "fro" else p)
        assert torch.equal(layer.weight.norm(p), exact)
    with pytest.raises(WeightError, match="at least 0"):
        layer.weight.norm(-math.inf)


def test_the_gradient_is_named(layer):
    assert layer.weight.grad is None
    layer.values.grad = torch.zeros_like(layer.values)
    with pytest.raises(WeightError, match=r"`layer.values.grad`"):
        _ = layer.weight.grad
    assert layer.weight.data.grad is None


READS = {
    "T": lambda w: w.T,
    "t": lambda w: w.t(),
    "abs": lambda w: w.abs(),
    "mean": lambda w: w.data.mean(),
    "detach": lambda w: w.detach(),
    "item": lambda w: w[0],
    "product": lambda w: w * 2,
    "negative": lambda w: -w,
    "iteration": list,
    "numpy": np.asarray,
    "torch.norm": torch.norm,
    "torch.abs": torch.abs,
    "torch product": lambda w: torch.ones(3, 3) @ w,
    "linear": lambda w: nn.functional.linear(torch.ones(1, 3), w),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_needs_the_dense_weight_says_so(layer, read):
    with pytest.raises((WeightError, DtypeError), match=r"layer\.weight\.to_dense\(\)"):
        read(layer.weight)


def test_code_that_asks_first_is_answered(layer):
    assert not hasattr(layer.weight, "copy_")
    assert getattr(layer.weight, "main_grad", None) is None
    for again in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert torch.equal(again.to_dense(), layer.weight.to_dense())
