"""What is no topology, no tensor or no plain layer ends in a typed error that names it."""

import copy
import re

import pytest
import torch
from call_cases import LAYERS, made, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sparsekern as sk
from sparsekern.errors import ShapeError, SparseKernError, TopologyError, WeightError
from sparsekern.topology import ARRAY_NAMES, Topology

every = pytest.mark.parametrize("name", LAYERS)


def held(layer):
    """The part of a layer that has index arrays of its own."""
    return layer if hasattr(layer, "col") else layer.hh_l0


# ---- parts of a layer


@every
@pytest.mark.parametrize("array", ARRAY_NAMES)
def test_index_arrays_can_not_be_taken_away(name, array):
    layer, x = made(name)
    want = step(layer, x)
    with pytest.raises(TopologyError, match=f"`{array}` can't be deleted.*part of the layer's top"):
        delattr(held(layer), array)
    with pytest.raises(TopologyError, match=f"`{array}` can't be .*parametrized"):
        parametrize.register_parametrization(held(layer), array, nn.Identity())
    assert all(map(torch.equal, step(layer, x), want))


PARAMETRIZED = {
    "own": lambda part: parametrize.register_parametrization(part, "values", nn.Identity()),
    "weight-norm": lambda part: parametrizations.weight_norm(part, "values"),
    "spectral-norm": lambda part: parametrizations.spectral_norm(part, "values"),
}


@every
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_values_can_not_be_parametrized(name, kind):
    layer, x = made(name)
    want, names = step(layer, x), dict(layer.named_parameters()).keys()
    with pytest.raises(WeightError, match="`values` of a sparse layer can't be parametrized"):
        PARAMETRIZED[kind](held(layer))
    assert dict(layer.named_parameters()).keys() == names
    assert all(map(torch.equal, step(layer, x), want))


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_bias_can():
    layer = sk.SparseLinear(8, 4, sparsity=0.5)
    x = torch.randn(2, 8)
    twin = copy.deepcopy(layer)
    twin.bias.data.mul_(2)
    parametrize.register_parametrization(layer, "bias", Double())
    assert torch.equal(layer(x), twin(x))


# ---- topologies


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (1, 10**6, "must not decrease"),
        (1, -5, "must not decrease"),
        (0, -5, "must run from 0 to 128; got -5 to 128"),
        (-1, 10**6, "must run from 0 to 128; got 0 to 1000000"),
    ],
)
def test_block_rows_of_offsets_that_lead_nowhere(at, value, told):
    made = Topology.random((16, 16), sparsity=0.5)
    crow = made.crow.clone()
    crow[at] = value
    topology = made.with_arrays([crow, *made.arrays[1:]])
    with pytest.raises(TopologyError, match=re.escape(f"`crow` {told}")):
        topology.slot_rows()
    with pytest.raises(TopologyError, match="`crow`"):
        topology.positions()


GARBAGE = [None, 5, "x", [1, 2], {"a": 1}, float("nan"), object()]
CALLS = {
    # call: (what is given, which of the garbage means something there)
    "mask": (lambda g: Topology.from_mask(g), ()),
    "positions": (lambda g: Topology.from_positions(g, (4, 4)), ()),
    "positions-shape": (lambda g: Topology.from_positions(torch.tensor([1]), g), (3,)),
    "torch": (lambda g: Topology.from_torch(g), ()),
    "random-shape": (lambda g: Topology.random(g, sparsity=0.5), (3,)),
    "random-block": (lambda g: Topology.random((8, 8), g, sparsity=0.5), (1, 3)),
    "random-sparsity": (lambda g: Topology.random((8, 8), sparsity=g), ()),
    "linear-inputs": (lambda g: sk.SparseLinear(g, 8, sparsity=0.5), (1,)),
    "linear-outputs": (lambda g: sk.SparseLinear(8, g, sparsity=0.5), (1,)),
    "linear-block": (lambda g: sk.SparseLinear(8, 8, sparsity=0.5, block=g), (1, 3)),
    "linear-sparsity": (lambda g: sk.SparseLinear(8, 8, sparsity=g), ()),
    "linear-dtype": (lambda g: sk.SparseLinear(8, 8, sparsity=0.5, dtype=g), (0,)),
    "linear-impl": (lambda g: sk.SparseLinear(8, 8, sparsity=0.5, impl=g), (0,)),
    "conv-kernel": (lambda g: sk.SparseConv2d(8, 8, g, sparsity=0.5), (1, 3)),
    "conv-stride": (lambda g: sk.SparseConv2d(8, 8, 3, stride=g, sparsity=0.5), (1, 3)),
    "conv-groups": (lambda g: sk.SparseConv2d(8, 8, 3, groups=g, sparsity=0.5), ()),
    "gru-hidden": (lambda g: sk.SparseGRU(8, g, sparsity=0.5), (1,)),
    "gru-layers": (lambda g: sk.SparseGRU(8, 8, num_layers=g, sparsity=0.5), (1,)),
    "from-dense": (lambda g: sk.SparseLinear.from_dense(g), ()),
    "sparsify": (lambda g: sk.sparsify_(g, 0.5), ()),
    "sparsify-sparsity": (lambda g: sk.sparsify_(nn.Sequential(nn.Linear(8, 8)), g), ()),
    "sparsify-block": (
        lambda g: sk.sparsify_(nn.Sequential(nn.Linear(8, 8)), 0.5, block=g),
        (1, 3),
    ),
    "densify": (lambda g: sk.densify_(g), ()),
    "values": (lambda g: sk.SparseLinear(8, 8, sparsity=0.5).set_active_values(g), ()),
    "rigl-model": (lambda g: sk.RigL(g, torch.optim.SGD([torch.ones(1)]), t_end=5), ()),
    "rigl-optimizer": (
        lambda g: sk.RigL(nn.Sequential(sk.SparseLinear(8, 8, sparsity=0.5)), g, t_end=5),
        (),
    ),
}


@pytest.mark.parametrize("at", range(len(GARBAGE)))
@pytest.mark.parametrize("call", CALLS)
def test_garbage_is_refused_with_a_typed_error(call, at):
    make, meant = CALLS[call]
    if at in meant:
        make(GARBAGE[at])
        return
    with pytest.raises(SparseKernError, match=r"`\w+`|must"):
        make(GARBAGE[at])


@every
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1)])
def test_values_of_another_shape_are_not_spread(name, shape):
    layer = held(made(name)[0])
    before = layer.values.detach().clone()
    with pytest.raises(ShapeError, match="`blocks` must have shape"):
        layer.set_active_values(torch.zeros(shape))
    assert torch.equal(layer.values, before)
