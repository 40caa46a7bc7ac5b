"""Sparse GRU, LSTM, RNN and their cells as drop-ins for torch's, on every implementation.

torch's module holding the zero-filled weights is the reference. In float64 both sides round at
2^-53; over the few steps taken here errors grow by far less than the 2^13 that `TIGHT` leaves, and
any real mistake is larger than it by many orders of magnitude.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from support import AllocationTracer, integers
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import RigL, SparseLinear, Topology, sparse_layers
from sparsekern.errors import (
    ConfigError,
    DtypeError,
    ShapeError,
    SparseKernError,
    TopologyError,
    UnavailableError,
)
from sparsekern.nn.recurrent import RECURRENT
from sparsekern.nn.recurrent.base import matrices
from sparsekern.nn.recurrent.gates import KINDS
from sparsekern.nn.recurrent.scan import scan
from sparsekern.ops import capture
from sparsekern.ops.cpu import choice

TIGHT = 2.0**-40
IN, H, T, B = 5, 6, 4, 3
LAYERS = {
    "gru": (sk.SparseGRU, {}),
    "lstm": (sk.SparseLSTM, {}),
    "projected": (sk.SparseLSTM, {"proj_size": 4}),
    "tanh": (sk.SparseRNN, {}),
    "relu": (sk.SparseRNN, {"nonlinearity": "relu"}),
}
CELLS = {
    "gru": (sk.SparseGRUCell, {}),
    "lstm": (sk.SparseLSTMCell, {}),
    "tanh": (sk.SparseRNNCell, {}),
    "relu": (sk.SparseRNNCell, {"nonlinearity": "relu"}),
}
FORMS = ("time first", "batch first", "unbatched", "sorted", "unsorted")
LENGTHS = {"sorted": [4, 2, 1], "unsorted": [2, 4, 1]}


def make(table, kind, **settings):
    cls, extra = table[kind]
    return cls(IN, H, **{"sparsity": 0.5, "dtype": torch.float64} | extra | settings)


def tensors_in(result):
    """All tensors of a module's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in tensors_in(part)]


def batch_of(form, layer, given_state):
    """Input and initial state for a form of input; the leaves of both."""
    x = torch.randn(T, B, IN, dtype=torch.float64)
    count = len(layer._passes)
    lead = (count,) if form == "unbatched" else (count, B)
    sizes = [layer.proj_size or H] + ([H] if KINDS[layer.kind].states == 2 else [])
    state = [torch.randn(*lead, n, dtype=torch.float64).requires_grad_() for n in sizes]
    hx = None if not given_state else tuple(state) if len(state) == 2 else state[0]
    if form == "batch first":
        x = x.transpose(0, 1)
    elif form == "unbatched":
        x = x[:, 0]
    x = x.clone().requires_grad_()
    leaves = [x, *state] if given_state else [x]
    if form in LENGTHS:
        packed = pack_padded_sequence(x, LENGTHS[form], enforce_sorted=form == "sorted")
        return packed, hx, leaves
    return x, hx, leaves


def weights_and_gradients(module, dense):
    """Pairs of (gradient of the sparse module, the dense one's where active), by name."""
    for name, layer in module.named_children():
        want = getattr(dense, f"weight_{name}").grad
        if isinstance(layer, SparseLinear):
            got = layer.pack(layer.values.grad)
            assert got.shape == layer.topology.values_shape
            yield name, got, layer.topology.pack(want)
        else:
            yield name, layer.weight.grad, want
        if layer.bias is not None:
            yield f"{name}.bias", layer.bias.grad, getattr(dense, f"bias_{name}").grad


def assert_close(got, want, what):
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    scale = want.abs().max() if want.numel() else 1
    assert bool(((got - want).abs() <= TIGHT * scale).all()), f"{what}: {(got - want).abs().max()}"


def assert_same_training(module, dense, input, hx, leaves, compare=assert_close):
    """Outputs, final states and every gradient of a sparse module are the dense one's."""
    args = (input,) if hx is None else (input, hx)
    got, want = module(*args), dense(*args)
    for part in (got, want):
        if isinstance(part, tuple) and isinstance(part[0], PackedSequence):
            assert isinstance(got[0], PackedSequence)
            for mine, theirs in zip(got[0][1:], want[0][1:], strict=True):
                assert mine is theirs is None or torch.equal(mine, theirs)
    got, want = tensors_in(got), tensors_in(want)
    upstream = [integers(*t.shape, dtype=t.dtype, low=-1, high=1) for t in want]
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        compare(mine, theirs, f"result {i}")
    mine = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
    theirs = torch.autograd.grad(want, leaves, upstream, retain_graph=True)
    for i, pair in enumerate(zip(mine, theirs, strict=True)):
        compare(*pair, f"gradient of leaf {i}")
    module.zero_grad()
    dense.zero_grad()
    torch.autograd.backward(got, upstream, retain_graph=True)  # packing is shared
    torch.autograd.backward(want, upstream)
    for name, *pair in weights_and_gradients(module, dense):
        compare(*pair, name)


def assert_equal(got, want, what):
    assert torch.equal(got, want), what


# ---- like torch's


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layers", "bidirectional"), [(1, False), (1, True), (2, False), (2, True)]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_equal_torchs(kind, layers, bidirectional, form):
    for bias, given_state in itertools.product((True, False), repeat=2):
        layer = make(
            LAYERS,
            kind,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=form == "batch first",
        )
        assert_same_training(layer, layer.to_dense(), *batch_of(form, layer, given_state))


@pytest.mark.parametrize("impl", ["masked", "dense", "cpu"])
@pytest.mark.parametrize("block", [1, (3, 2), 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_implementation_equals_torchs(kind, block, impl):
    layer = make(LAYERS, kind, block=block, impl=impl, bidirectional=True)
    for form in ("time first", "unsorted"):
        assert_same_training(layer, layer.to_dense(), *batch_of(form, layer, True))


@pytest.mark.parametrize("name", ["csr", "jit"])
@pytest.mark.parametrize("block", [1, 4])
def test_every_cpu_backend_equals_torchs(name, block):
    if name == "jit":
        pytest.importorskip("numba")
    with choice.force(name):
        layer = make(LAYERS, "gru", block=block, impl="cpu")
        assert_same_training(layer, layer.to_dense(), *batch_of("unsorted", layer, True))


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_equal_torchs(kind, impl):
    for bias, lead, given in itertools.product((True, False), [(B,), (), (0,)], (True, False)):
        cell = make(CELLS, kind, bias=bias, impl=impl)
        states = KINDS[cell.kind].states
        x = torch.randn(*lead, IN, dtype=torch.float64, requires_grad=True)
        state = [torch.randn(*lead, H, dtype=torch.float64).requires_grad_() for _ in range(states)]
        hx = None if not given else tuple(state) if states == 2 else state[0]
        leaves = [x, *state] if given else [x]
        assert_same_training(cell, cell.to_dense(), x, hx, leaves)


@pytest.mark.parametrize("impl", ["cpu", "dense", "masked", "triton"])
@pytest.mark.parametrize("block", [1, 16])
def test_an_rnn_of_integers_is_exact(impl, block):
    """All sums stay below 2^24: h grows 16-fold a step, and so does its gradient."""
    layer = sk.SparseRNN(16, 16, 1, "relu", sparsity=0.5, block=block, impl=impl)
    if block == 16:
        layer = sk.SparseRNN(
            32, 32, 1, "relu", sparsity=0.75, block=block, impl=impl, bidirectional=True
        )
    for parameter in layer.parameters():
        parameter.data.copy_(integers(*parameter.shape, low=-1, high=1))
    x = integers(3, 2, layer.input_size, low=-1, high=1).requires_grad_()
    assert_same_training(layer, layer.to_dense(), x, None, [x], compare=assert_equal)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_dropout_acts_between_layers(kind):
    layer = make(LAYERS, kind, num_layers=3, dropout=0.5, bidirectional=True)
    dense = layer.to_dense()
    assert dense.dropout == 0.5
    x = torch.randn(T, B, IN, dtype=torch.float64)

    def run(module):
        torch.manual_seed(7)
        return module(x)[0]

    assert_close(run(layer), run(dense), "training")
    assert not torch.equal(layer(x)[0], run(layer))
    assert_close(run(layer.eval()), run(dense.eval()), "evaluation")
    with pytest.warns(UserWarning, match=r"dropout=0.5 has no effect with num_layers=1"):
        single = make(LAYERS, kind, dropout=0.5)
    single.to_dense()  # and the torch module's own warning is not raised again


def test_some_matrices_may_stay_dense():
    shares = {"ih_l0": None, "hh_l0": 0.5, "hr_l0": None}
    layer = make(LAYERS, "projected", sparsity=shares)
    assert type(layer.ih_l0) is type(layer.hr_l0) is nn.Linear
    assert list(sparse_layers(layer)) == ["hh_l0"]
    assert_same_training(layer, layer.to_dense(), *batch_of("unsorted", layer, True))
    layer.hh_l0 = layer.hh_l0.to_dense()
    assert_same_training(layer, layer.to_dense(), *batch_of("unsorted", layer, True))


def test_an_empty_batch_works():
    for kind in LAYERS:
        layer = make(LAYERS, kind)
        x = torch.zeros(T, 0, IN, dtype=torch.float64, requires_grad=True)
        assert_same_training(layer, layer.to_dense(), x, None, [x])


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_right_whatever_asks_for_them(kind):
    layer = make(LAYERS, kind)
    dense = layer.to_dense()
    x, hx, leaves = batch_of("unsorted", layer, True)
    x = PackedSequence(x.data.detach(), *x[1:])
    dense_names = dict(dense.named_parameters())
    named = {f"leaf {i}": (leaf, leaf) for i, leaf in enumerate(leaves[1:])}
    for name, matrix in layer.named_children():
        named[name] = (matrix.values, dense_names[f"weight_{name}"])
        if matrix.bias is not None:
            named[f"{name} bias"] = (matrix.bias, dense_names[f"bias_{name}"])
    everyone = [p for pair in named.values() for p in pair]
    for name, (mine, theirs) in named.items():
        for p in everyone:
            p.requires_grad_(p is mine or p is theirs)
        got = torch.autograd.grad(sum(t.sum() for t in tensors_in(layer(x, hx))), mine)[0]
        want = torch.autograd.grad(sum(t.sum() for t in tensors_in(dense(x, hx))), theirs)[0]
        if mine is not theirs and mine.dim() == 3:
            want = layer.get_submodule(name).topology.pack(want)
        assert_close(got, want, name)
    for p in everyone:
        p.requires_grad_(False)
    assert not any(t.requires_grad for t in tensors_in(layer(x, hx)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, reverse):
    hidden = SparseLinear(3, KINDS[kind].gates * 3, sparsity=0.4, dtype=torch.float64)
    sizes = [2, 2, 1]
    inputs = torch.randn(5, KINDS[kind].gates * 3, dtype=torch.float64, requires_grad=True)
    state = [
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(KINDS[kind].states)
    ]

    def run(inputs, _values, _bias, *state):
        return scan(kind, inputs, state, hidden, None, sizes, reverse=reverse)

    assert torch.autograd.gradcheck(run, (inputs, hidden.values, hidden.bias, *state))


def test_it_can_not_be_differentiated_twice():
    layer = make(LAYERS, "gru")
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(UnavailableError, match="differentiated once only"):
        dx.sum().backward()


def test_what_backward_needs_can_not_change_unseen():
    layer = make(LAYERS, "lstm")
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)[0]
    hidden = layer.hh_l0
    source = torch.arange(hidden.topology.nnzb)
    hidden.rewire_(hidden.topology, source, [hidden.values.data])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_gives_the_same():
    layer = make(LAYERS, "lstm")
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)[0]
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- a good module


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_checkpoints(kind, impl):
    layer = make(LAYERS, kind, num_layers=2, impl=impl)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(LAYERS, kind, num_layers=2, impl=impl)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        for mine, theirs in zip(tensors_in(twin(x)), tensors_in(layer(x)), strict=True):
            assert torch.equal(mine, theirs)
    assert "hh_l1.values" in layer.state_dict()
    assert layer.flatten_parameters() is None


@pytest.mark.parametrize("impl", ["cpu", "masked", "dense"])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_is_the_layer_in_the_lower_precision(kind, impl):
    layer = make(LAYERS, kind, dtype=torch.float32, impl=impl)
    x = torch.randn(T, B, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tensors_in(layer(x))
    want = tensors_in(copy.deepcopy(layer).bfloat16()(x.bfloat16()))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype is torch.bfloat16
        assert torch.equal(mine, theirs)
    sum(t.float().sum() for t in got).backward()
    assert x.grad.dtype is layer.hh_l0.values.grad.dtype is torch.float32


# at any graph break behind a layer, from torch's own compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_it_gives_the_same():
    layer = make(LAYERS, "gru")
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    got = torch.compile(layer, backend="aot_eager")(x)[0]
    assert torch.equal(got, layer(x)[0])
    got.sum().backward()
    assert x.grad.isfinite().all()


def test_repr_tells_settings_and_sparsity():
    text = repr(sk.SparseLSTM(16, 32, 2, proj_size=8, batch_first=True, block=8, sparsity=0.5))
    assert "16, 32, proj_size=8, num_layers=2, batch_first=True" in text
    assert "(hr_l1): SparseLinear(in_features=32, out_features=8, bias=False, block=8" in text
    assert "nonlinearity=relu" in repr(sk.SparseRNN(4, 4, nonlinearity="relu"))
    assert "4, 5, bias=False" in repr(sk.SparseGRUCell(4, 5, False))


def test_positional_arguments_are_torchs():
    """Built from the same positional arguments, both have the same settings."""
    for made in (sk.SparseGRU, sk.SparseLSTM):
        ours = made(3, 4, 2, False, True, 0.25, True)
        theirs = made.dense_type(3, 4, 2, False, True, 0.25, True)
        assert all(getattr(ours, n) == getattr(theirs, n) for n in made.arguments)
    ours = sk.SparseRNN(3, 4, 2, "relu", False, True, 0.25, True)
    theirs = nn.RNN(3, 4, 2, "relu", False, True, 0.25, True)
    assert all(getattr(ours, n) == getattr(theirs, n) for n in ours.arguments)
    ours, theirs = sk.SparseRNNCell(3, 4, False, "relu"), nn.RNNCell(3, 4, False, "relu")
    assert all(getattr(ours, n) == getattr(theirs, n) for n in ours.arguments)
    assert sk.SparseLSTM(3, 4, 1, True, False, 0.0, False, 2).proj_size == 2


# ---- to and from torch's


def all_dense():
    yield from (cls.dense_type(IN, H, 2, bidirectional=True) for cls, _ in LAYERS.values())
    yield nn.LSTM(IN, H, proj_size=4, bias=False)
    yield from (cls.dense_type(IN, H) for cls, _ in CELLS.values())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_from_dense_and_back_is_bitwise_the_masked_module():
    for dense in all_dense():
        made = RECURRENT[type(dense)]
        sparse = made.from_dense(dense.eval(), sparsity=0.5, block=(2, 1))
        assert not sparse.training
        masks = {name: layer.mask() for name, layer in sparse.named_children()}
        assert masks.keys() == matrices(dense).keys()
        twin = copy.deepcopy(dense)
        for name, weight in matrices(twin).items():
            weight.data *= masks[name]
        back = sparse.to_dense()
        assert type(back) is type(dense)
        state = twin.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in back.state_dict().items())
        x = torch.randn(3, 2, IN) if hasattr(dense, "num_layers") else torch.randn(3, IN)
        for mine, theirs in zip(tensors_in(back(x)), tensors_in(twin(x)), strict=True):
            assert torch.equal(mine, theirs)
        for other in (made.from_dense(dense, mask=masks), made.from_dense(back, block=(2, 1))):
            assert torch.equal(
                other.hh.mask() if "hh" in masks else other.hh_l0.mask(),
                masks["hh" if "hh" in masks else "hh_l0"],
            )


def test_from_dense_takes_settings_matrix_by_matrix():
    dense = nn.GRU(8, 8, dtype=torch.float64)
    dense.weight_hh_l0.requires_grad_(False)
    dense.bias_ih_l0.requires_grad_(False)
    sparse = sk.SparseGRU.from_dense(dense, sparsity={"ih_l0": 0.75, "hh_l0": None})
    assert sparse.ih_l0.nnz == 48
    assert type(sparse.hh_l0) is nn.Linear
    assert sparse.ih_l0.values.dtype is torch.float64
    assert not sparse.hh_l0.weight.requires_grad
    assert not sparse.ih_l0.bias.requires_grad
    back = sparse.to_dense()
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in dense.parameters()
    ]
    sparse = sk.SparseGRU.from_dense(dense, mask={"ih_l0": None, "hh_l0": torch.eye(24, 8)})
    assert sparse.hh_l0.nnz == 8
    topologies = {"ih_l0": Topology.random((24, 8), 4, nnzb=3), "hh_l0": None}
    sparse = RECURRENT[type(dense)].from_topologies(dense, topologies, impl="masked")
    assert type(sparse) is sk.SparseGRU
    assert sparse.ih_l0.topology == topologies["ih_l0"]
    assert sparse.ih_l0.impl == "masked"
    assert torch.equal(sparse.ih_l0.dense_weight(), dense.weight_ih_l0 * sparse.ih_l0.mask())


# ---- initialisation


@pytest.mark.parametrize("kind", ["gru", "projected"])
def test_initial_scale_follows_each_neurons_inputs(kind):
    cls, extra = LAYERS[kind]
    layer = cls(96, 64, sparsity=0.75, **({"proj_size": 32} if extra else {}))
    for name, matrix in layer.named_children():
        fan, n = matrix.mask().sum(1).clamp(min=1), matrix.in_features
        limit = (n / (64 * fan)).sqrt()
        weight = matrix.dense_weight().abs()
        assert bool((weight <= limit[:, None] * (1 + 2**-20)).all()), name
        # 16 or more uniform draws a neuron, 192 or more neurons: some come near the bound
        assert float((weight / limit[:, None]).max().detach()) > 0.98
        if matrix.bias is not None:
            assert 0.98 / 8 < float(matrix.bias.detach().abs().max()) <= 1 / 8


def test_generator_decides_everything():
    def draw():
        shares = {"ih_l0": None, "hh_l0": 0.5}
        generator = torch.Generator().manual_seed(5)
        return sk.SparseGRU(8, 8, sparsity=shares, generator=generator).state_dict()

    assert all(map(torch.equal, draw().values(), draw().values()))


# ---- training


def language_model(impl, start=None):
    """A tiny character model, in float64."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.gru = sk.SparseGRU(8, 12, 2, sparsity=0.5, impl=impl, dropout=0.0)
            self.head = nn.Linear(12, 7)

        def forward(self, tokens):
            return self.head(self.gru(self.embed(tokens))[0])

    torch.manual_seed(3)
    model = Model().double()
    if start is not None:
        for name, layer in sparse_layers(model).items():
            other = start.get_submodule(name)
            layer.set_active_values(other.active_values())
            assert layer.topology == other.topology
    return model


def train(impl, start=None):
    model = language_model(impl, start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    rigl = RigL(model, optimizer, t_end=50, update_freq=5, drop_fraction=0.5, decay="constant")
    assert list(rigl.layers) == ["gru.ih_l0", "gru.hh_l0", "gru.ih_l1", "gru.hh_l1"]
    g = torch.Generator().manual_seed(0)
    digests = []
    while rigl.weight_steps < 55:
        tokens = torch.randint(7, (6, 4), generator=g)
        optimizer.zero_grad()
        logits = model(tokens[:-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()).backward()
        optimizer.step()
        digests.append([layer.topology.digest() for layer in sparse_layers(model).values()])
    assert len(rigl.history) == 10
    return digests, model


def test_rigl_makes_the_same_topologies_as_on_the_masked_reference():
    reference, first = train("masked")
    for before, after in zip(reference[0], reference[-1], strict=True):
        assert before != after
    for impl in ("cpu", "dense"):
        topologies, model = train(impl, language_model("masked"))
        assert topologies == reference
        for name, layer in sparse_layers(model).items():
            other = first.get_submodule(name).dense_weight()
            # 55 steps, see tests/test_equivalence.py
            assert bool(
                ((layer.dense_weight() - other).abs() <= 2.0**-30 * other.abs().max()).all()
            )


class Sink:
    def __init__(self):
        self.expected, self.pairs = 0, []

    def expect(self):
        self.expected += 1

    def receive(self, dy, x):
        self.pairs.append((dy, x))


@pytest.mark.parametrize("impl", ["cpu", "masked"])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_observed_layer_gives_one_pair_for_each_matrix_and_pass(kind, impl):
    layer = make(LAYERS, kind, num_layers=2, bidirectional=True, impl=impl)
    dense = layer.to_dense()
    sinks = {}
    for name, matrix in layer.named_children():
        sinks[name] = Sink()
        matrix.observe(capture.register(sinks[name]))
    x, hx, _ = batch_of("unsorted", layer, True)
    with torch.no_grad():
        layer(x, hx)
    assert not any(sink.expected for sink in sinks.values())
    for module in (layer, dense):
        sum(t.sum() for t in tensors_in(module(x, hx))).backward(retain_graph=True)
    for name, sink in sinks.items():
        assert sink.expected == len(sink.pairs) == 1
        dy, inputs = sink.pairs[0]
        assert dy.shape[0] == sum(LENGTHS["unsorted"])
        assert_close(dy.t() @ inputs, getattr(dense, f"weight_{name}").grad, name)
    for _ in range(2):
        sum(t.sum() for t in tensors_in(layer(x, hx))).backward(retain_graph=True)
    assert all(sink.expected == len(sink.pairs) == 3 for sink in sinks.values())


# ---- cost


@pytest.mark.parametrize("kind", ["gru", "lstm", "tanh"])
def test_memory_grows_with_tokens_and_never_with_tokens_times_weights(kind):
    cls, extra = LAYERS[kind]
    steps, batch, size = 64, 2, 32
    layer = cls(size, size, sparsity=0.5, **extra)
    x = torch.randn(steps, batch, size, requires_grad=True)
    layer(x)[0].sum().backward()  # whatever is made once
    for parameter in layer.parameters():
        parameter.grad = None
    gates = KINDS[layer.kind].gates * size
    with AllocationTracer() as trained:
        layer(x)[0].sum().backward()
    assert trained.largest <= steps * batch * 4 * size, trained.at
    assert trained.largest < steps * layer.hh_l0.nnz
    with torch.no_grad(), AllocationTracer() as inferred:
        layer(x)
    # the inputs' contribution to the gates; nothing else of all steps is as large
    assert inferred.largest == steps * batch * gates, inferred.at


@pytest.mark.parametrize("block", [1, 8])
def test_flops_are_those_of_active_weights(block):
    layer = sk.SparseLSTM(32, 32, 2, sparsity=0.75, block=block, proj_size=16)
    x = torch.randn(5, 3, 32, requires_grad=True)
    held = sum(matrix.values.numel() for matrix in layer.children())
    with FlopCounterMode(display=False) as counter:
        y = layer(x)[0]
    assert counter.get_total_flops() == 2 * 15 * held
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 15 * held


# ---- bad input

X = torch.zeros(T, B, IN)
GRU = sk.SparseGRU(IN, H)
LSTM = sk.SparseLSTM(IN, H, proj_size=2)
PACKED = pack_padded_sequence(X, [4, 2, 1])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: sk.SparseGRU(0, 4), ConfigError, "`input_size` must be at least 1; got 0"),
        (lambda: sk.SparseGRU(4, 4.0), DtypeError, "`hidden_size` must be an int; got 4.0"),
        (lambda: sk.SparseGRU(4, 4, 0), ConfigError, "`num_layers` must be at least 1; got 0"),
        (lambda: sk.SparseGRU(4, 4, 1, 1), DtypeError, "`bias` must be a bool; got 1"),
        (lambda: sk.SparseGRU(4, 4, dropout=1.5), ConfigError, r"lie in \[0, 1\]; got 1.5"),
        (lambda: sk.SparseGRU(4, 4, dropout="a"), DtypeError, "`dropout` must be a number"),
        (lambda: sk.SparseGRU(4, 4, sparsity=1.0), ConfigError, r"sparsity of ih_l0.*got 1.0"),
        (lambda: sk.SparseGRU(4, 4, impl="gpu"), ConfigError, "got 'gpu'"),
        (lambda: sk.SparseGRU(4, 4, dtype=torch.int8), DtypeError, "floating point"),
        (
            lambda: sk.SparseGRU(4, 32, block=8),
            ShapeError,
            r"matrix ih_l0: `block` \(8, 8\) is larger .* \(96, 4\)",
        ),
        (
            lambda: sk.SparseGRU(4, 4, sparsity={"hh_l0": 0.5}),
            ConfigError,
            "`sparsity` must name each of ih_l0, hh_l0; got hh_l0",
        ),
        (
            lambda: sk.SparseGRU(4, 4, topologies={"ih": None, "hh": None}),
            ConfigError,
            "`topologies` must name each of ih_l0, hh_l0; got ih, hh",
        ),
        (lambda: sk.SparseRNN(4, 4, 1, "gelu"), ConfigError, "'tanh' or 'relu'; got 'gelu'"),
        (lambda: sk.SparseRNNCell(4, 4, True, "gelu"), ConfigError, "'relu'; got 'gelu'"),
        (
            lambda: sk.SparseLSTM(4, 4, proj_size=4),
            ConfigError,
            "`proj_size` must be smaller than hidden_size = 4; got 4",
        ),
        (lambda: sk.SparseLSTM(4, 4, proj_size=-1), ConfigError, "`proj_size` .* got -1"),
        (lambda: GRU(X[0, 0]), ShapeError, r"\(time, batch, 5\) or \(time, 5\); got \(5,\)"),
        (lambda: GRU(X[..., 1:]), ShapeError, r"got \(4, 3, 4\)"),
        (lambda: GRU(X[:0]), ShapeError, r"at least one time step; got \(0, 3, 5\)"),
        (lambda: GRU(X.double()), DtypeError, "`input` must have dtype torch.float32"),
        (lambda: GRU([X]), DtypeError, "tensor or a PackedSequence; got list"),
        (lambda: GRU((X, X)), DtypeError, "tensor or a PackedSequence; got tuple"),
        (
            lambda: GRU(pack_padded_sequence(X[..., 1:], [4, 2, 1])),
            ShapeError,
            r"shape \(tokens, 5\); got \(7, 4\)",
        ),
        (lambda: GRU(X, (X, X)), DtypeError, "`h_0` must be a tensor; got tuple"),
        (
            lambda: GRU(X, torch.zeros(1, 2, H)),
            ShapeError,
            r"`h_0` must have shape \(1, 3, 6\); got \(1, 2, 6\)",
        ),
        (lambda: GRU(X[:, 0], torch.zeros(1, 1, H)), ShapeError, r"shape \(1, 6\)"),
        (lambda: GRU(PACKED, torch.zeros(1, 2, H)), ShapeError, r"shape \(1, 3, 6\)"),
        (lambda: GRU(X, torch.zeros(1, 3, H).double()), DtypeError, "`h_0` must have dtype"),
        (
            lambda: LSTM(X, torch.zeros(1, 3, 2)),
            DtypeError,
            r"pair of tensors \(h_0, c_0\); got Tensor",
        ),
        (lambda: LSTM(X, (torch.zeros(1, 3, 2),)), DtypeError, "got 1"),
        (
            lambda: LSTM(X, (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))),
            ShapeError,
            r"`c_0` must have shape \(1, 3, 6\); got \(1, 3, 2\)",
        ),
        (
            lambda: sk.SparseGRUCell(IN, H)(X),
            ShapeError,
            r"shape \(batch, 5\) or \(5,\); got \(4, 3, 5\)",
        ),
        (lambda: sk.SparseGRUCell(IN, H)(X[0], X[0]), ShapeError, r"`h_0` .* \(3, 6\); got"),
        (lambda: sk.SparseLSTMCell(IN, H)(X[0], X[0]), DtypeError, "pair of tensors"),
        (lambda: sk.SparseGRU.from_dense(nn.LSTM(2, 2)), DtypeError, "nn.GRU; got LSTM"),
        (
            lambda: sk.SparseGRU.from_dense(nn.GRU(2, 2), sparsity=0.5, mask={}),
            ConfigError,
            "not both",
        ),
        (
            lambda: sk.SparseGRU.from_dense(nn.GRU(2, 2), mask={"ih_l0": None}),
            ConfigError,
            "`mask` must name each of ih_l0, hh_l0; got ih_l0",
        ),
        (
            lambda: sk.SparseGRU.from_dense(
                nn.GRU(2, 2), mask={"ih_l0": torch.ones(2, 2), "hh_l0": None}
            ),
            ShapeError,
            r"matrix ih_l0: `mask` must have .* \(6, 2\); got \(2, 2\)",
        ),
        (
            lambda: sk.SparseGRU.from_dense(
                nn.GRU(2, 2), mask={"ih_l0": torch.eye(6, 2), "hh_l0": None}, block=2
            ),
            TopologyError,
            "whole",
        ),
        (
            lambda: sk.SparseGRU(2, 2, topologies=dict.fromkeys(("ih_l0", "hh_l0"), TOPOLOGY)),
            ShapeError,
            r"shape \(6, 2\); got \(3, 3\)",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text) as info:
        call()
    assert isinstance(info.value, SparseKernError)


TOPOLOGY = Topology.random((3, 3), nnzb=2)
