"""`torch.export`, `torch.compile`, `torch.fx` and `torch.jit.trace` of sparse layers.

Layers of products give the same bits either way. Recurrent layers become operators of torch's,
which round otherwise: see `test_recurrent` for how close they must be.
"""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from test_recurrent import assert_close
from torch import nn
from torch.func import functional_call, grad, vmap

import sparsekern as sk
from sparsekern.errors import ConfigError, UnavailableError
from sparsekern.integrations.onnx import export_onnx
from sparsekern.ops.capture import capture, capture_backward, register

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layer = sk.SparseMultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


FAMILIES = {
    "linear": (lambda **k: sk.SparseLinear(8, 12, **k), (8,)),
    "conv1d": (lambda **k: sk.SparseConv1d(4, 8, 3, padding="same", **k), (4, 9)),
    "conv2d": (lambda **k: sk.SparseConv2d(4, 8, 3, stride=2, groups=2, **k), (4, 7, 6)),
    "gru": (lambda **k: sk.SparseGRU(8, 6, batch_first=True, **k), (3, 8)),
    "lstm": (lambda **k: sk.SparseLSTM(8, 6, bidirectional=True, batch_first=True, **k), (3, 8)),
    "cell": (lambda **k: sk.SparseGRUCell(8, 6, **k), (8,)),
    "attention": (Attention, (3, 8)),
}


RECURRENT = ("gru", "lstm", "cell")


def made(name, block=1, batch=3):
    build, size = FAMILIES[name]
    layer = build(sparsity=0.5, block=block, dtype=F64)
    return layer, torch.randn(batch, *size, dtype=F64)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def assert_same(got, want, name):
    if name in RECURRENT:
        assert_close(got, want, name)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "block"), [*((name, 1) for name in FAMILIES), ("linear", 2), ("conv2d", 2)]
)
def test_an_exported_program_takes_any_batch(name, block):
    layer, x = made(name, block)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 3, 8):
        x = made(name, block, batch)[1]
        assert_same(first(program.module()(x)), first(layer(x)), name)
        assert torch.equal(first(loaded(x)), first(program.module()(x)))


def test_an_armed_layer_is_exported_without_its_method():
    model = nn.Sequential(sk.SparseLinear(8, 12, sparsity=0.5))
    sk.RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=10)
    assert model[0]._capture_key
    program = torch.export.export(model, (torch.randn(3, 8),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "sparsekern.spmm.default" in targets
    assert not any("capture" in target for target in targets)


def test_an_onnx_file_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UnavailableError, match="onnxscript"):
        export_onnx(made("linear")[0], (made("linear")[1],))
    with pytest.raises(ConfigError, match="dynamo"):
        export_onnx(made("linear")[0], (made("linear")[1],), dynamo=True)


@pytest.mark.parametrize("block", range(2))
def test_what_the_docs_say_runs(block):
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[block], {})  # the page's own text


# ---- operators


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck_of_capture(requires_grad):
    class Sink:
        def expect(self):
            pass

        receive = staticmethod(lambda dy, x: None)

    y, x, values = (
        torch.randn(*size, requires_grad=requires_grad) for size in ((3, 4), (3, 5), (6, 1, 1))
    )
    sink = Sink()
    key = register(sink)
    for op, args in ((capture, (y, x, values, key)), (capture_backward, (y, x, key))):
        verdict = torch.library.opcheck(op, args)
        assert set(verdict.values()) == {"SUCCESS"}
        assert len(verdict) == 4


def test_every_operator_is_checked():
    """By `opcheck`: here, in test_ops.py or in test_conv_ops.py; a new one has to join them."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if "sparsekern::" in name}
    assert names == {
        f"sparsekern::{name}"
        for name in (
            *("spmm", "spmm_t", "sddmm", "sddmm_add", "spmm_backward", "grow_scores"),
            *("conv2d", "conv2d_dgrad", "conv2d_wgrad", "conv2d_backward"),
            *("capture", "capture_backward"),
        )
    }


# ---- torch.compile


def net():
    return nn.Sequential(
        sk.SparseConv2d(3, 4, 3, sparsity=0.5),
        nn.ReLU(),
        nn.Flatten(),
        sk.SparseLinear(64, 16, sparsity=0.5, block=2),
        nn.ReLU(),
        sk.SparseLinear(16, 5, sparsity=0.5),
    )


@pytest.mark.parametrize("make_method", [sk.RigL, sk.SET])
def test_fifty_updates_recompile_nothing(make_method):
    """Two graphs: of steps that are observed and of those that are not."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    method = make_method(model, optimizer, t_end=1000, update_freq=2)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, fullgraph=True, backend=count)
    x = torch.randn(4, 3, 6, 6)
    warm = 0
    while len(method.history) < 50:
        run(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        warm = warm or len(graphs) * (len(method.history) == 2)
    assert len(graphs) == warm <= 2


def test_a_compiled_transform():
    layer, x = made("linear")
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    one = grad(lambda p, x: functional_call(layer, p, (x[None],)).square().sum())
    run = vmap(one, (None, 0))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(parameters, x).values(), run(parameters, x).values(), strict=True
    ):
        assert_close(got, want, "per-sample gradient")


# ---- torch.fx


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_is_a_node_of_a_symbolic_graph(name):
    layer, x = made(name)
    model = nn.Sequential(layer)
    graph = torch.fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["0.layer" if name == "attention" else "0"]
    assert torch.equal(first(graph(x)), first(model(x)))
    first(graph(x)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_what_is_traced_can_not_be_the_layer():
    for layer in (made("conv2d")[0], made("lstm")[0], sk.SparseMultiheadAttention(8, 2)):
        with pytest.raises(UnavailableError, match="one node of a graph"):
            torch.fx.symbolic_trace(layer)


def test_inputs_may_be_named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = sk.SparseGRUCell(8, 6, sparsity=0.5)

        def forward(self, x, h):
            return self.cell(input=x, hx=h)

    model, x, h = Named(), torch.randn(3, 8), torch.randn(3, 6)
    assert torch.equal(torch.fx.symbolic_trace(model)(x, h), model(x, h))


# ---- torch.jit.trace


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_while_a_method_is_armed(name):
    layer, x = made(name)
    model = nn.Sequential(layer)
    sk.RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=10)
    traced = torch.jit.trace(model, x)  # which checks the trace by another one
    assert_same(first(traced(x)), first(model(x)), name)
