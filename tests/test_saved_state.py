"""What a state_dict holds, and what layers take from one."""

import copy
import io
import logging
import pickle

import pytest
import torch
from support import integers
from torch import nn

import sparsekern as sk
from sparsekern.topology import ARRAY_NAMES, DERIVED_NAMES, STORED_NAMES

MAKERS = {
    "linear": (lambda **k: sk.SparseLinear(33, 50, **k), nn.Linear(33, 50), (3, 33)),
    "conv1d": (lambda **k: sk.SparseConv1d(6, 10, 3, **k), nn.Conv1d(6, 10, 3), (2, 6, 9)),
    "conv2d": (
        lambda **k: sk.SparseConv2d(6, 10, 3, groups=2, **k),
        nn.Conv2d(6, 10, 3, groups=2),
        (2, 6, 5, 5),
    ),
    "gru": (lambda **k: sk.SparseGRU(5, 8, 2, **k), nn.GRU(5, 8, 2), (4, 2, 5)),
    "lstm": (
        lambda **k: sk.SparseLSTM(5, 8, bidirectional=True, **k),
        nn.LSTM(5, 8, bidirectional=True),
        (4, 2, 5),
    ),
    "cell": (lambda **k: sk.SparseGRUCell(5, 8, **k), nn.GRUCell(5, 8), (2, 5)),
}
every = pytest.mark.parametrize("name", MAKERS)


def outputs(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def sparse_parts(module):
    return {f"{n}." if n else "": m for n, m in sk.sparse_layers(module).items()}


def cloned(state):
    return {key: value.clone() for key, value in state.items()}


@every
def test_a_state_holds_values_and_two_index_arrays(name):
    layer = MAKERS[name][0](block=2, sparsity=0.5)
    parts = sparse_parts(layer)
    for prefix, part in parts.items():
        held = {k.removeprefix(prefix) for k in layer.state_dict() if k.startswith(prefix)}
        assert held == {"values", "crow", "col", "bias"}
        assert {n for n, _ in part.named_buffers()} >= set(ARRAY_NAMES)
    part = next(iter(parts.values()))
    t, state = part.topology, part.state_dict()
    indices = sum(state[n].numel() * state[n].element_size() for n in STORED_NAMES)
    assert indices == 4 * t.nnzb + 4 * (t.block_rows + 1)


@every
@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("seven", [False, True])
def test_states_of_two_and_of_seven_arrays_load(name, impl, assign, seven):
    make, _, shape = MAKERS[name]
    source, target = (make(block=2, sparsity=0.5, impl=impl) for _ in range(2))
    state = cloned(source.state_dict())
    if seven:
        for prefix, part in sparse_parts(source).items():
            state |= {prefix + n: getattr(part, n).clone() for n in DERIVED_NAMES}
    before = {n: (p, p.data_ptr()) for n, p in target.named_parameters()}
    buffers = {n: b.data_ptr() for n, b in target.named_buffers()}
    target.load_state_dict(state, assign=assign)
    for prefix, part in sparse_parts(target).items():
        part.topology.validate()
        assert part.topology == sparse_parts(source)[prefix].topology
    assert torch.equal(outputs(target, shape), outputs(source, shape))
    if not assign:
        assert all(before[n] == (p, p.data_ptr()) for n, p in target.named_parameters())
        assert buffers == {n: b.data_ptr() for n, b in target.named_buffers()}


@every
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("array", ARRAY_NAMES)
def test_a_wrong_array_is_refused_before_anything_changes(name, assign, array):
    layer = MAKERS[name][0](block=2, sparsity=0.5)
    part = list(sparse_parts(layer).values())[-1]
    state = cloned(part.state_dict())
    state |= {n: getattr(part, n).clone() for n in DERIVED_NAMES}
    state["values"] += 1
    before = cloned(part.state_dict())
    for wrong in (
        state[array].roll(1),
        torch.full_like(state[array], 10**6),
        state[array][:-1],
        state[array].long(),
        state[array].float(),
        "no tensor",
        state[array].to("meta"),
    ):
        same = isinstance(wrong, torch.Tensor) and not wrong.is_meta
        if same and torch.equal(wrong, state[array]):
            continue  # rolled, but all entries are equal
        with pytest.raises(sk.SparseKernError):
            part.load_state_dict(state | {array: wrong}, assign=assign)
        assert all(torch.equal(v, before[k]) for k, v in part.state_dict().items())
        part.topology.validate()


@every
def test_masked_and_sparse_states_load_into_each_other(name):
    make = MAKERS[name][0]
    sparse = make(block=2, sparsity=0.5)
    masked = make(block=2, sparsity=0.5, impl="masked")
    masked.load_state_dict(sparse.state_dict())
    back = make(block=2, sparsity=0.5)
    back.load_state_dict(masked.state_dict())
    assert all(map(torch.equal, back.state_dict().values(), sparse.state_dict().values()))
    for prefix, part in sparse_parts(masked).items():
        assert torch.equal(part.dense_weight(), sparse_parts(sparse)[prefix].dense_weight())


@every
@pytest.mark.parametrize("impl", [None, "masked"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_is_taken_at_the_layers_connections(name, impl, strict, assign, caplog):
    make, dense, _ = MAKERS[name]
    layer = make(block=2, sparsity=0.5, impl=impl)
    masks = {prefix: part.topology.clone() for prefix, part in sparse_parts(layer).items()}
    with caplog.at_level(logging.INFO):
        layer.load_state_dict(cloned(dense.state_dict()), strict=strict, assign=assign)
    assert caplog.text.count("takes a dense weight at its own connections") == len(masks)
    weights = {k: v for k, v in dense.state_dict().items() if "weight" in k}
    for (prefix, part), weight in zip(sparse_parts(layer).items(), weights.values(), strict=True):
        assert part.topology == masks[prefix]
        assert torch.equal(part.weight.to_dense(), weight * part.mask())
    biases = [v for k, v in dense.state_dict().items() if "bias" in k]
    own = [v for k, v in layer.state_dict().items() if k.endswith("bias")]
    assert len(biases) == len(own)
    assert all(map(torch.equal, own, biases))


@pytest.mark.parametrize("strict", [False, True])
def test_a_dense_weight_that_does_not_fit(strict):
    layer = sk.SparseLinear(8, 6, sparsity=0.5)
    before = cloned(layer.state_dict())
    wrong = [torch.zeros(6, 9), torch.zeros(6, 8, dtype=torch.int64), "text"]
    for weight in (*wrong, torch.zeros(6, 8).to_sparse()):
        with pytest.raises(sk.SparseKernError, match="`weight` of '' must"):
            layer.load_state_dict({"weight": weight, "bias": torch.zeros(6)}, strict=strict)
    blank = sk.SparseLinear(8, 6, sparsity=0.5, device="meta").to_empty(device="cpu")
    with pytest.raises(sk.TopologyError, match="no connections yet"):
        blank.load_state_dict(nn.Linear(8, 6).state_dict())
    assert all(map(torch.equal, layer.state_dict().values(), before.values()))


def test_nothing_is_not_loaded_without_a_word(caplog):
    model = nn.Sequential(sk.SparseLinear(8, 8), nn.Linear(8, 8))
    model.load_state_dict({"1.weight": torch.zeros(8, 8)}, strict=False)
    assert "nothing is loaded into sparse layer '0'" in caplog.text


def test_a_state_of_another_density_names_the_way():
    state = sk.SparseLinear(8, 8, sparsity=0.5).state_dict()
    for impl in (None, "masked"):
        layer = sk.SparseLinear(8, 8, sparsity=0.75, impl=impl)
        with pytest.raises(sk.ShapeError, match="must have 16 active .*got 32 .sparsekern.load"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_what_lies_beyond_the_matrix_is_cleared(assign):
    layer = sk.SparseLinear(5, 7, block=4, sparsity=0.0)
    state = cloned(layer.state_dict())
    state["values"] = torch.full_like(state["values"], float("nan"))
    state["values"][0] = 1
    kept = state["values"].clone()
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(state["values"].isnan(), kept.isnan())
    full = layer.topology.unpack(layer.values.detach())
    assert torch.equal(layer.topology.pack(full).nan_to_num(7), layer.values.nan_to_num(7))


@every
@pytest.mark.parametrize("impl", [None, "masked"])
def test_from_the_meta_device(name, impl):
    make, _, shape = MAKERS[name]
    source = make(block=2, sparsity=0.5, impl=impl)
    assigned = make(block=2, sparsity=0.5, impl=impl, device="meta")
    assigned.load_state_dict(source.state_dict(), assign=True)
    filled = make(block=2, sparsity=0.5, impl=impl, device="meta").to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    for layer in (assigned, filled, copy.deepcopy(assigned), pickle.loads(pickle.dumps(filled))):
        assert torch.equal(outputs(layer, shape), outputs(source, shape))
        for part in sparse_parts(layer).values():
            part.topology.validate()


def test_an_older_pickle_saves_two_arrays_from_now_on():
    layer = sk.SparseLinear(8, 8, sparsity=0.5)
    layer._non_persistent_buffers_set -= set(DERIVED_NAMES)  # as it was once
    assert len(layer.state_dict()) == 9
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    found = torch.load(buffer, weights_only=False)
    assert set(found.state_dict()) == {"values", "crow", "col", "bias"}


@pytest.mark.parametrize("looked", [True, False])
@pytest.mark.parametrize("impl", [None, "masked"])
def test_a_state_written_in_place_takes_the_other_arrays_along(impl, looked):
    """As distributed checkpoints do: into the tensors of the state_dict, then perhaps load it."""
    source, layer = (sk.SparseLinear(8, 8, sparsity=0.5, impl=impl) for _ in range(2))
    layer(integers(2, 8)).sum().backward()
    state = layer.state_dict()
    for key, value in source.state_dict().items():
        state[key].copy_(value)
    x = integers(2, 8)
    if looked:
        assert torch.equal(layer(x), source(x))
        assert layer.topology == source.topology.validate()
        assert layer.values.grad is None  # it was of the old connections
    layer.load_state_dict(state)
    assert layer.values.grad is None
    assert layer.topology == source.topology.validate()
    assert torch.equal(layer(x), source(x))


def test_a_state_written_in_place_that_is_no_topology_is_refused():
    layer = sk.SparseLinear(8, 8, sparsity=0.5)
    layer.state_dict()["col"].fill_(9)
    with pytest.raises(sk.TopologyError, match="col"):
        layer(integers(2, 8))


def test_training_goes_on_after_a_load():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    sk.sparsify_(model, 0.5, distribution="uniform")
    optimizer = torch.optim.Adam(model.parameters())
    method = sk.SET(model, optimizer, t_end=50, update_freq=2)
    state = cloned(model.state_dict())
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        if step == 4:
            model.load_state_dict(state)
    assert len(method.history) > 2
    for layer in sk.sparse_layers(model).values():
        layer.topology.validate()
