"""ONNX files of sparse models, run by onnxruntime.

Where operands are integers every sum is exact, and the runtime must give the model's own bits.
Other models are run in float64; see `test_recurrent` for how close they must be.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from support import integers
from test_recurrent import assert_close
from torch import nn

import sparsekern as sk
from sparsekern.integrations.onnx import OPSET, export_onnx, translations

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

BATCH = torch.export.Dim("batch", min=1)
MODELS = {
    "linear": (lambda: sk.SparseLinear(17, 35, sparsity=0.5), (17,)),
    "blocks": (lambda: sk.SparseLinear(17, 35, sparsity=0.5, block=8, bias=False), (17,)),
    "tokens": (lambda: sk.SparseLinear(16, 32, sparsity=0.5, block=(4, 8)), (3, 16)),
    "conv1d": (lambda: sk.SparseConv1d(3, 8, 3, padding="same", sparsity=0.5), (3, 9)),
    "conv2d": (
        lambda: sk.SparseConv2d(4, 8, (3, 2), stride=(2, 1), padding=1, groups=2, sparsity=0.5),
        (4, 8, 7),
    ),
    "dilated": (
        lambda: sk.SparseConv2d(5, 7, 3, dilation=2, bias=False, sparsity=0.5, block=2),
        (5, 8, 9),
    ),
    "net": (
        lambda: nn.Sequential(
            sk.SparseConv2d(4, 8, 3, sparsity=0.5, block=2),
            nn.ReLU(),
            nn.Flatten(),
            sk.SparseLinear(8 * 16, 5, sparsity=0.5),
        ),
        (4, 6, 6),
    ),
    "unpacked": (lambda: sk.SparseLinear(17, 35, sparsity=0.5, impl="dense"), (17,)),
    "masked": (lambda: sk.SparseLinear(17, 35, sparsity=0.5, impl="masked"), (17,)),
}


def whole_numbers(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(*parameter.shape))
        for layer in sk.sparse_layers(model).values():
            if layer.impl != "masked":
                layer.topology.clear_padding_(layer.values)
    return model.eval()


def run(path, x):
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_gives_the_same_bits(name, tmp_path):
    build, size = MODELS[name]
    model = whole_numbers(build())
    path = tmp_path / "model.onnx"
    export_onnx(model, (integers(3, *size),), path, dynamic_shapes=({0: BATCH},))
    for batch in (1, 3, 8):
        x = integers(batch, *size)
        assert torch.equal(run(path, x), model(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = sk.SparseMultiheadAttention(8, 2, batch_first=True, sparsity=0.5)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda: sk.SparseGRU(8, 6, batch_first=True, sparsity=0.5),
        lambda: sk.SparseLSTM(8, 6, batch_first=True, bidirectional=True, sparsity=0.5),
        Attention,
    ],
    ids=["gru", "lstm", "attention"],
)
def test_models_that_round(build, tmp_path):
    model, path = build().double().eval(), tmp_path / "model.onnx"
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    export_onnx(model, (x,), path, dynamic_shapes=({0: BATCH},))
    for batch in (1, 3, 8):
        x = torch.randn(batch, 4, 8, dtype=torch.float64)
        want = model(x)
        assert_close(run(path, x), want[0] if isinstance(want, tuple) else want, "output")


@pytest.mark.parametrize("block", [1, 16])
def test_the_file_holds_values_and_connections(block, tmp_path):
    layer = sk.SparseLinear(1024, 1024, sparsity=0.95, block=block)
    path = tmp_path / "model.onnx"
    program = export_onnx(layer.eval(), (torch.randn(2, 1024),), path)
    held = {name: v.const_value for name, v in program.model.graph.initializers.items()}
    assert set(held) == {"values", "crow", "col", "bias"}
    tensors = (layer.values, layer.crow, layer.col, layer.bias)
    content = sum(t.nbytes for t in tensors)
    assert sum(t.nbytes for t in held.values()) == content
    graph = 16 * 1024  # of some forty nodes
    assert content <= sum(f.stat().st_size for f in tmp_path.iterdir()) <= content + graph


def test_steps_of_a_recurrent_layer_share_a_weight(tmp_path):
    layer = sk.SparseGRU(8, 6, sparsity=0.5).eval()
    program = export_onnx(layer, (torch.randn(5, 2, 8),), tmp_path / "model.onnx")
    made = [node for node in program.model.graph.all_nodes() if node.op_type == "ScatterND"]
    assert len(made) == 2


def test_an_armed_and_trained_model(tmp_path):
    model = nn.Sequential(sk.SparseLinear(8, 12, sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.RigL(model, optimizer, t_end=100, update_freq=2)
    x = torch.randn(4, 8)
    while len(method.history) < 3:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole_numbers(model).train()
    path = tmp_path / "model.onnx"
    export_onnx(model, (x,), path)
    x = integers(4, 8)
    assert torch.equal(run(path, x), model(x))


def test_a_densified_model_and_the_table(tmp_path):
    build, size = MODELS["net"]
    model = whole_numbers(build())
    x, path = integers(3, *size), tmp_path / "model.onnx"
    want = model(x)
    table = translations()
    torch.onnx.export(
        model, (x,), path, dynamo=True, custom_translation_table=table, opset_version=OPSET
    )
    assert torch.equal(run(path, x), want)
    os.remove(path)
    torch.onnx.export(sk.densify_(model), (x,), path, dynamo=True)
    assert torch.equal(run(path, x), want)


def test_what_the_docs_say_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)  # the page's own text
    assert torch.equal(run("model.onnx", torch.zeros(7, 64)), names["model"](torch.zeros(7, 64)))
