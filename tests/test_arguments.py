"""Wrong arguments end in errors of this library, before anything happens."""

import copy
import io

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import DtypeError, ShapeError, TopologyError
from sparsekern.topology import Topology

LAYERS = {
    "linear": (lambda **k: sk.SparseLinear(10, 7, **k), nn.Linear(10, 7), (3, 10)),
    "conv1d": (lambda **k: sk.SparseConv1d(10, 7, 3, **k), nn.Conv1d(10, 7, 3), (2, 10, 5)),
    "conv2d": (lambda **k: sk.SparseConv2d(10, 7, 3, **k), nn.Conv2d(10, 7, 3), (2, 10, 5, 5)),
}
RECURRENT = {
    "gru": (lambda **k: sk.SparseGRU(10, 7, **k), nn.GRU(10, 7), (4, 2, 10)),
    "cell": (lambda **k: sk.SparseLSTMCell(10, 7, **k), nn.LSTMCell(10, 7), (2, 10)),
}
EVERY = LAYERS | RECURRENT
every = pytest.mark.parametrize("name", EVERY)


@every
def test_a_topology_has_to_be_one(name):
    make, dense, _ = EVERY[name]
    if name in LAYERS:
        given = {"topology": 5}
    else:
        names = [n.removeprefix("weight_") for n, _ in dense.named_parameters() if "weight" in n]
        given = {"topologies": dict.fromkeys(names, 5)}
    with pytest.raises(DtypeError, match="must be a Topology; got int"):
        make(**given)


@every
def test_a_mask_has_to_be_a_tensor(name):
    make, dense, _ = EVERY[name]
    names = [n.removeprefix("weight_") for n, _ in dense.named_parameters() if "weight" in n]
    mask = [1] if name in LAYERS else {key: [1] for key in names}
    with pytest.raises(DtypeError, match="`mask` must be a tensor; got list"):
        type(make()).from_dense(dense, mask=mask)


@every
def test_a_generator_has_to_be_one(name):
    make, dense, _ = EVERY[name]
    with pytest.raises(DtypeError, match=r"`generator` must be None or a torch.Generator; got str"):
        make(generator="x")
    layer = make(sparsity=0.5)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(DtypeError, match="got int"):
        layer.reset_parameters(5)
    assert all(torch.equal(a, before[key]) for key, a in layer.state_dict().items())
    model = nn.Sequential(dense)
    with pytest.raises(DtypeError, match="got str"):
        sk.sparsify_(model, generator="x")
    assert model[0] is dense


def test_a_topology_has_to_fit():
    for topology in (Topology.random((8, 8), sparsity=0.5), "no topology"):
        error = ShapeError if isinstance(topology, Topology) else DtypeError
        with pytest.raises(error, match="`topology` must"):
            sk.SparseLinear(8, 9, topology=topology)
    for shape, parts in (((8, 4 * 9), {}), ((8, 9 * 8), {"taps": 9, "groups": 2})):
        with pytest.raises(ShapeError, match="`topology` must have shape"):
            sk.SparseConv2d(8, 8, 3, topology=Topology.random(shape, sparsity=0.5, **parts))


@pytest.mark.parametrize(
    ("mode", "size", "fits"),
    [
        ("reflect", 4, False),
        ("reflect", 5, True),
        ("circular", 3, False),
        ("circular", 4, True),
        ("replicate", 1, True),
    ],
)
def test_padding_beyond_the_image(mode, size, fits):
    image = sk.SparseConv2d(4, 4, 3, padding=(4, 0), padding_mode=mode, sparsity=0.5)
    line = sk.SparseConv1d(4, 4, 3, padding=4, padding_mode=mode, sparsity=0.5)
    for layer, shape in ((image, (1, 4, size, 9)), (image, (4, size, 9)), (line, (2, 4, size))):
        x = torch.randn(shape)
        if fits:
            wanted = layer.to_dense()(x)
            assert layer(x).shape == wanted.shape
        else:
            with pytest.raises(
                ShapeError, match=f"{mode!r} needs an input of at least .*got {size}"
            ):
                layer(x)


# ---- the meta device


@every
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("impl", [None, "masked"])
def test_layers_on_the_meta_device_print_themselves(name, block, impl):
    make, *_ = EVERY[name]
    layer = make(block=block, sparsity=0.5, impl=impl, device="meta")
    assert "block=" in repr(layer)
    assert ("active_blocks=" in repr(layer)) == (block == 4)
    assert "nnz=" in repr(make(block=block, sparsity=0.5, impl=impl))


@every
@pytest.mark.parametrize("impl", [None, "dense", "masked"])
def test_memory_without_connections_is_refused_until_a_state_is_loaded(name, impl):
    make, _, shape = EVERY[name]
    source = make(block=2, sparsity=0.5, impl=impl)
    layer = make(block=2, sparsity=0.5, impl=impl, device="meta").to_empty(device="cpu")
    x = torch.randn(shape)
    for layer_now in (layer, copy.deepcopy(layer), layer.double().float(), _pickled(layer)):
        with pytest.raises(TopologyError, match="has no connections yet: load a state_dict first"):
            layer_now(x)
        assert "active_blocks=" in repr(layer_now)
    with pytest.raises(TopologyError, match="no connections yet"):
        layer.reset_parameters()
    layer.load_state_dict(source.state_dict())
    assert "nnz=" in repr(layer)
    for a, b in zip(layer(x), source(x), strict=True):
        assert all(map(torch.equal, a, b))


def test_a_state_can_be_loaded_by_assignment():
    source = sk.SparseLinear(10, 7, block=2, sparsity=0.5)
    x = torch.randn(3, 10)
    layer = sk.SparseLinear(10, 7, block=2, sparsity=0.5, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(x), source(x))
    # and memory given afterwards is not memory from nowhere
    assert torch.equal(layer.double().float()(x), source(x))


def _pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
