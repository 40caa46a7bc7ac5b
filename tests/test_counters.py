"""fvcore, thop and ptflops count sparse layers by their stored weights, dense twins as before."""

import contextlib
import importlib
import importlib.util
import io
import warnings

import pytest
import torch
from support import integers
from test_recurrent import assert_close, tensors_in
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import counters, ops
from sparsekern.nn import SparseLayer
from sparsekern.ops.library import parts
from sparsekern.topology import Topology

# all three are old: they use what Python and torch would rather have replaced
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def package(name):
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def by_fvcore(model, x):
    analysis = package("fvcore.nn").FlopCountAnalysis(model, (x,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.set_op_handle(**counters.fvcore_handles()).total()


def by_thop(model, x):
    rules = counters.thop_ops()
    return package("thop").profile(model, (x,), custom_ops=rules, verbose=False)[0]


def by_ptflops(backend, count_functional=False):
    def count(model, x):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            macs, _ = package("ptflops").get_model_complexity_info(
                model,
                (1,),
                input_constructor=lambda _: {"input": x},
                as_strings=False,
                print_per_layer_stat=False,
                custom_modules_hooks=counters.ptflops_hooks(),
                backend=backend,
                backend_specific_config={"count_functional": count_functional},
            )
        assert macs is not None, printed.getvalue()
        return macs

    return count


TOOLS = {
    "fvcore": by_fvcore,
    "thop": by_thop,
    "ptflops": by_ptflops("pytorch"),
    "ptflops-aten": by_ptflops("aten"),
}
every_tool = pytest.mark.parametrize("tool", TOOLS)


class Images(nn.Module):
    """A pointwise, a strided and a grouped convolution, a 1-D one and linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(6, 8, 1, bias=False)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.groups = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
        self.line = nn.Conv1d(16, 12, 3, dilation=2, bias=False)
        self.linear = nn.Linear(12, 10, bias=False)
        self.head = nn.Linear(50, 5, bias=False)

    def forward(self, input):
        y = self.groups(self.down(self.stem(input)))
        return self.head(self.linear(self.line(y.flatten(2)).transpose(1, 2)).flatten(1))

    def outputs(self):
        """Times that each weight is applied to an image of 6 x 6 pixels."""
        counts = {"stem": 36, "down": 9, "groups": 9, "line": 5, "linear": 5, "head": 1}
        return {getattr(self, name): n for name, n in counts.items()}


class Sequences(nn.Module):
    """Recurrent layers with every kind of matrix, and a cell that is called twice."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, bias=False, bidirectional=True, proj_size=4, batch_first=True)
        self.gru = nn.GRU(8, 6, bias=False, batch_first=True)
        self.rnn = nn.RNN(6, 6, bias=False, batch_first=True)
        self.cell = nn.GRUCell(6, 6, bias=False)

    def forward(self, input):
        y = self.rnn(self.gru(self.lstm(input)[0])[0])[0]
        return self.cell(y[:, 0], self.cell(y[:, 1]))

    def outputs(self):
        """Times that each matrix is applied to a sequence of 5 steps."""
        layers = {self.lstm: 5, self.gru: 5, self.rnn: 5, self.cell: 2}
        return {matrix: n for layer, n in layers.items() for matrix in layer.children()}


def image(batch=1):
    return torch.randn(batch, 6, 6, 6)


def stored(layer):
    return layer.values.numel() if isinstance(layer, SparseLayer) else layer.weight.numel()


@every_tool
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("impl", [None, "dense"])
def test_a_sparse_model_costs_its_stored_weights(tool, block, impl):
    model = Images()
    model = sk.sparsify_(model, 0.5, block=block, impl=impl, distribution={"*": 0.5}, exclude=())
    held = model.outputs()
    assert all(isinstance(layer, SparseLayer) for layer in held)
    of = stored if impl is None else lambda layer: layer.dense_weight().numel()
    assert TOOLS[tool](model, image()) == sum(n * of(layer) for layer, n in held.items())


@every_tool
def test_its_dense_twin_costs_all_weights(tool):
    model = sk.densify_(sk.sparsify_(Images(), 0.5, distribution={"*": 0.5}))
    wanted = sum(n * layer.weight.numel() for layer, n in model.outputs().items())
    assert TOOLS[tool](model, image()) == wanted


@every_tool
@pytest.mark.parametrize("impl", [None, "dense", "masked"])
def test_all_tools_agree_with_torch(tool, impl):
    dense = ("lstm.hh_l0", "lstm.hr_l1_reverse", "gru.ih_l0", "cell.hh")
    model = sk.sparsify_(
        Sequences(), 0.5, block=2, impl=impl, distribution={"*": 0.5}, exclude=dense
    )
    kinds = [isinstance(matrix, SparseLayer) for matrix in model.outputs()]
    assert kinds.count(False) == len(dense)
    x = torch.randn(1, 5, 6)
    with FlopCounterMode(display=False) as counter:
        model(x)
    flops = counter.get_total_flops()
    if impl is None:
        assert flops == sum(2 * n * stored(matrix) for matrix, n in model.outputs().items())
    assert 2 * TOOLS[tool](model, x) == flops


@every_tool
def test_ragged_blocks_count_whole_and_biases_not_at_all(tool):
    layer = sk.SparseLinear(10, 7, block=4, sparsity=0.0)
    assert TOOLS[tool](nn.Sequential(layer), torch.randn(1, 10)) == 8 * 12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("backend", "count_functional", "relus"),
    [("pytorch", True, 2), ("pytorch", False, 1), ("aten", False, 0)],
)
def test_what_ptflops_adds_is_the_activation_alone(backend, count_functional, relus, bias):
    first, second = (sk.SparseLinear(*size, sparsity=0.5, bias=bias) for size in ((8, 6), (6, 4)))
    products = stored(first) + stored(second)
    count = by_ptflops(backend, count_functional)
    assert count(nn.Sequential(first, nn.Identity(), second), torch.randn(1, 8)) == products
    assert count(nn.Sequential(first, nn.ReLU(), second), torch.randn(1, 8)) == (
        products + relus * 6
    )


@every_tool
def test_a_layer_by_itself_is_a_model(tool):
    x = torch.randn(5, 1, 6)
    layer = sk.SparseGRU(6, 8, sparsity=0.5)
    assert TOOLS[tool](layer, x) == 5 * sum(stored(matrix) for matrix in layer.children())


def test_packed_sequences_count_their_tokens():
    layer = sk.SparseLSTM(6, 8, sparsity=0.5)
    x = pack_sequence([torch.randn(n, 6) for n in (5, 3, 1)])
    macs = counters.layer_macs(layer, layer(x))
    assert macs == 9 * sum(stored(matrix) for matrix in layer.children())
    assert by_thop(layer, x) == macs


def test_operators_outside_of_a_layer_are_seen_by_fvcore():
    topology = Topology.random((8, 12), 2, sparsity=0.5)
    values, arrays = torch.randn(topology.values_shape), parts(topology)

    class Products(nn.Module):
        def forward(self, x, dy):
            library = torch.ops.sparsekern
            return (
                ops.spmm_t(dy, values, topology),
                ops.sddmm(dy, x, topology),
                library.spmm_backward(dy, x, values, *arrays, "cpu"),
                library.grow_scores([dy, dy], [x, x], *arrays, 2, "l1", "cpu"),
            )

    analysis = package("fvcore.nn").FlopCountAnalysis(
        Products(), (torch.randn(3, 12), torch.randn(3, 8))
    )
    analysis.unsupported_ops_warnings(False).set_op_handle(**counters.fvcore_handles())
    assert analysis.by_operator() == {
        "spmm_t": 3 * values.numel(),
        "sddmm": 3 * values.numel(),
        "spmm_backward": 6 * values.numel(),
        "grow_scores": 2 * 3 * 8 * 12,
    }


# ---- torch.jit.trace, which fvcore is made of


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (sk.SparseLinear(6, 8, sparsity=0.5), (2, 3, 6)),
        (sk.SparseConv2d(6, 8, 3, padding=1, sparsity=0.5, block=2), (2, 6, 5, 4)),
        (sk.SparseConv1d(6, 8, 3, stride=2, sparsity=0.5), (2, 6, 9)),
        (sk.SparseLSTM(6, 8, 2, sparsity=0.5, proj_size=4, bidirectional=True), (5, 2, 6)),
        (sk.SparseGRUCell(6, 8, sparsity=0.5), (2, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_traced_layer_computes_the_same(layer, shape):
    """Of recurrent layers, whose trace is one of torch's own operators, to rounding."""
    layer, (x, other) = layer.double(), integers(2, *shape, dtype=torch.float64)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    for one, same in zip(tensors_in(traced(other)), tensors_in(layer(other)), strict=True):
        if isinstance(layer, sk.nn.SparseLayer):
            assert torch.equal(one, same)
        else:
            assert_close(one, same, type(layer).__name__)
