"""Every keyword that torch's layer takes, in constructor and forward, the sparse one takes."""

import inspect

import pytest
import torch
from torch import nn

import sparsekern as sk

PAIRS = [
    (nn.Linear, sk.SparseLinear, (3, 8)),
    (nn.Conv1d, sk.SparseConv1d, (2, 8, 9)),
    (nn.Conv2d, sk.SparseConv2d, (2, 8, 9, 7)),
    (nn.RNN, sk.SparseRNN, None),
    (nn.GRU, sk.SparseGRU, None),
    (nn.LSTM, sk.SparseLSTM, None),
    (nn.RNNCell, sk.SparseRNNCell, None),
    (nn.GRUCell, sk.SparseGRUCell, None),
    (nn.LSTMCell, sk.SparseLSTMCell, None),
]
IDS = [dense.__name__ for dense, _, _ in PAIRS]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def named(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p for p in found if p.kind not in VARIADIC and p.name != "self"}


@pytest.mark.parametrize(("dense", "sparse", "_"), PAIRS[:3], ids=IDS[:3])
def test_constructors_take_torchs_arguments_in_torchs_order(dense, sparse, _):
    theirs, ours = named(dense.__init__), named(sparse.__init__)
    assert set(theirs) <= set(ours)
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name not in ("device", "dtype")]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize(("dense", "sparse", "_"), PAIRS, ids=IDS)
def test_forward_takes_torchs_arguments(dense, sparse, _):
    theirs, ours = named(dense.forward), named(sparse.forward)
    assert list(theirs) == list(ours)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize(("dense", "sparse", "shape"), PAIRS[:3], ids=IDS[:3])
def test_a_call_by_name_is_the_call_by_position(dense, sparse, shape):
    keywords = {name: 3 for name in named(dense.__init__) if name == "kernel_size"}
    channels = [name for name in named(dense.__init__) if name.startswith(("in_", "out_"))]
    x = torch.randn(shape)
    layer = sparse(**dict.fromkeys(channels, 8), **keywords, bias=True, device=None, dtype=None)
    assert torch.equal(layer(input=x), layer(x))
