"""`FlopCounterMode` counts what sparse layers execute, and changes nothing that they do."""

import math
import os
import shutil

import pytest
import torch
from support import integers
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sparsekern as sk
from sparsekern import ops
from sparsekern.ops import flops, library
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = [
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="not interpreted")),
    "dense",
]
# layer, input, how often each weight is applied
LAYERS = {
    "linear-blocks": (lambda **k: sk.SparseLinear(48, 32, block=16, **k), (2, 3, 48), 6),
    "linear-ragged": (lambda **k: sk.SparseLinear(40, 20, block=16, **k), (9, 40), 9),
    "linear-csr": (lambda **k: sk.SparseLinear(12, 9, **k), (5, 12), 5),
    "conv1d-csr": (lambda **k: sk.SparseConv1d(4, 6, 3, padding=1, **k), (2, 4, 3), 6),
    "conv2d-blocks": (
        lambda **k: sk.SparseConv2d(16, 16, 3, stride=2, padding=1, block=16, **k),
        (1, 16, 4, 3),
        4,
    ),
    "conv2d-groups": (lambda **k: sk.SparseConv2d(4, 6, 3, groups=2, **k), (2, 4, 4, 3), 4),
}
RECURRENT = {
    "lstm": lambda **k: sk.SparseLSTM(32, 32, proj_size=16, bidirectional=True, **k),
    "gru": lambda **k: sk.SparseGRU(32, 16, **k),
    "rnn": lambda **k: sk.SparseRNN(32, 16, **k),
}


def launches():
    """Triton kernels started so far."""
    if not INTERPRETED:
        return 0
    import sanitizer

    return sanitizer.counts.started


def weights(layer):
    """Weights that one application multiplies by."""
    rows, cols = layer.matrix_shape
    return rows * cols if layer.impl == "dense" else layer.values.numel()


def trained(run, layer, x):
    """Output, input gradient and parameter gradients; kernels launched."""
    layer.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    before = launches()
    y = run(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())], launches() - before


def assert_same(got, wanted):
    for a, b in zip(got[0], wanted[0], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert got[1] == wanted[1], "counting left out, or added, a launch"


def counted(run, *args):
    with FlopCounterMode(display=False) as counter:
        result = run(*args)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_costs_six_flops_for_each_weight_and_token(name, impl, needs_x):
    make, shape, tokens = LAYERS[name]
    layer, x = make(sparsity=0.5, impl=impl), torch.randn(shape, requires_grad=needs_x)
    once = 2 * tokens * weights(layer)
    alone = trained(layer, layer, x)
    assert (alone[1] > 0) == (impl == "triton")
    total, watched = counted(trained, layer, layer, x)
    assert total == (3 if needs_x else 2) * once
    assert_same(watched, alone)
    with torch.no_grad():
        assert counted(layer, x)[0] == once
    layer.values.requires_grad_(False)
    if needs_x:
        assert counted(trained, layer, layer, x)[0] == 2 * once


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, impl):
    layer = RECURRENT[name](sparsity=0.5, block=16, impl=impl)
    x = torch.randn(2, 2, 32, requires_grad=True)
    alone = trained(layer, layer, x)
    assert (alone[1] > 0) == (impl == "triton")
    total, watched = counted(trained, layer, layer, x)
    assert total == 6 * 4 * sum(weights(matrix) for matrix in layer.children())
    assert_same(watched, alone)


def test_the_counter_names_the_layer():
    model = nn.Sequential(sk.SparseLinear(8, 8, sparsity=0.5), nn.ReLU(), nn.Linear(8, 4))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 8)).sum().backward()
    of = counter.get_flop_counts()
    assert sum(of["Sequential.0"].values()) == 2 * 2 * 3 * model[0].nnz
    assert sum(of["Global"].values()) == 2 * 2 * 3 * model[0].nnz + 3 * 2 * 3 * 32


# ---- torch.compile


class CompiledCount:
    """Backends that run what `torch.compile` made of a model under a counter.

    A counter around the compiled model would see nothing of it: torch leaves a model that is called
    under any dispatch mode uncompiled, and refuses to under fullgraph=True, dense or sparse.
    """

    def __init__(self):
        self.total = 0
        self.graphs = 0

    def around(self, compiler):
        def compiled(graph, inputs, **options):
            self.graphs += 1
            targets = {node.target for node in graph.graph.nodes}
            assert not any(isinstance(t, torch._ops.HigherOrderOperator) for t in targets)
            run = compiler(graph, inputs, **options)

            def call(args):
                with FlopCounterMode(display=False) as counter:
                    result = run(args)
                self.total += counter.get_total_flops()
                return result

            call._boxed_call = True
            return call

        return compiled

    def aot_eager(self):
        def interpret(graph, _inputs):
            # called as a module it would meet the counter's module hooks
            return lambda args: fx.Interpreter(graph).boxed_run(args)

        compiler = self.around(interpret)
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)

    def inductor(self):
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        inner = self.around(compile_fx_inner)
        return lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)


def assert_compiled_counts(name, impl, needs_x, backend, **options):
    make, shape, tokens = LAYERS[name]
    layer, x = make(sparsity=0.5, impl=impl, **options), torch.randn(shape, requires_grad=needs_x)
    alone, count = trained(layer, layer, x), CompiledCount()
    run = torch.compile(layer, fullgraph=True, backend=getattr(count, backend)())
    assert_same(trained(run, layer, x), alone)
    assert count.graphs == 2
    assert count.total == (6 if needs_x else 4) * tokens * weights(layer)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_forward_and_backward_graphs(name, impl):
    assert_compiled_counts(name, impl, impl != "dense", "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("linear-blocks", "cpu"),
        ("conv2d-groups", "cpu"),
        pytest.param("linear-csr", *IMPLS[1].values, marks=IMPLS[1].marks),
    ],
)
def test_inductor_code(name, impl):
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    # code from a cache would not pass through the compiler that counts
    with inductor.patch(force_disable_caches=True), functorch.patch(enable_autograd_cache=False):
        # the bias gradient is a sum that inductor makes itself, in its own order
        assert_compiled_counts(name, impl, True, "inductor", bias=False)


def test_a_compiled_layer_is_counted_as_torch_runs_it_then():
    make, shape, tokens = LAYERS["linear-csr"]
    layer, x = make(sparsity=0.5), torch.randn(shape, requires_grad=True)
    run = torch.compile(lambda x: layer(x), backend="aot_eager")
    alone = trained(run, layer, x)
    total, watched = counted(trained, run, layer, x)
    assert total == 6 * tokens * layer.nnz
    assert_same(watched, alone)


# ---- operator by operator


def test_every_operator_has_a_formula():
    defined = {
        name.removeprefix("sparsekern::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sparsekern::")
    }
    assert defined == {*flops.OPERATORS, "capture", "capture_backward"}
    assert all(getattr(torch.ops.sparsekern, name) in flop_registry for name in flops.OPERATORS)


TOKENS, ROWS, COLS = 5, 32, 48
LINEAR = {
    "spmm": lambda x, dy, v, t, i: ops.spmm(x, v, t, impl=i),
    "relu": lambda x, dy, v, t, i: ops.spmm(x, v, t, activation="relu", impl=i),
    "spmm_t": lambda x, dy, v, t, i: ops.spmm_t(dy, v, t, impl=i),
    "sddmm": lambda x, dy, v, t, i: ops.sddmm(dy, x, t, impl=i),
    "sddmm_add": lambda x, dy, v, t, i: ops.sddmm(dy, x, t, out=v.clone(), impl=i),
}


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*LINEAR, "spmm_backward"])
def test_linear_operators(name, impl, block):
    rows, cols = 2 * max(block, 4), 3 * max(block, 4)
    t = Topology.random((rows, cols), block, sparsity=0.6)
    values, x, dy = integers(*t.values_shape), integers(TOKENS, cols), integers(TOKENS, rows)
    once = 2 * TOKENS * (rows * cols if impl == "dense" else values.numel())
    if name == "spmm_backward":
        operator = torch.ops.sparsekern.spmm_backward
        total, _ = counted(operator, dy, x, values, *library.parts(t), impl)
        assert total == 2 * once
        return
    total, result = counted(LINEAR[name], x, dy, values, t, impl)
    assert total == once
    assert torch.equal(result, LINEAR[name](x, dy, values, t, impl))


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("impl", IMPLS)
def test_convolution_operators(impl, block):
    g, channels = ConvGeometry((3, 2), stride=(2, 1), padding=(1, 0), groups=2), 2 * max(block, 4)
    shape = channels, 6 * channels // 2
    t = Topology.random(shape, block, sparsity=0.6, groups=2, taps=6)
    values, x = integers(*t.values_shape), integers(2, channels, 4, 3)
    dy = integers(2, channels, *g.output_size(4, 3))
    once = 2 * dy[:, 0].numel() * (math.prod(shape) if impl == "dense" else values.numel())
    assert counted(lambda: ops.conv2d(x, values, t, g, impl=impl))[0] == once
    assert counted(lambda: ops.conv2d_dgrad(dy, values, t, g, size=(4, 3), impl=impl))[0] == once
    assert counted(lambda: ops.conv2d_wgrad(dy, x, t, g, impl=impl))[0] == once


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduce", [None, lambda slab: None])
def test_grow_scores_cost_the_dense_gradient(impl, block, reduce, monkeypatch):
    monkeypatch.setattr(ops.grow, "SLAB_ELEMENTS", 16 * COLS)  # several slabs
    t = Topology.random((ROWS, COLS), block, sparsity=0.6)
    pairs = [(integers(n, ROWS), integers(n, COLS)) for n in (TOKENS, 4)]
    for some in (pairs[:1], pairs):
        dys, xs = zip(*some, strict=True)
        total, scores = counted(
            lambda: ops.grow_scores(dys, xs, t, 3, reduce=reduce, impl=impl)  # noqa: B023
        )
        assert total == 2 * sum(map(len, xs)) * ROWS * COLS
        alone = ops.grow_scores(dys, xs, t, 3, reduce=reduce, impl=impl)
        assert all(map(torch.equal, scores, alone))


def test_grow_scores_of_a_convolution_cost_its_dense_gradient(monkeypatch):
    g = ConvGeometry((3, 3), stride=(2, 2), padding=(1, 1), groups=2)
    t = Topology.random((8, 9 * 4), 2, sparsity=0.6, groups=2, taps=9)
    monkeypatch.setattr(ops.grow, "SLAB_ELEMENTS", 2 * 36)
    x, dy = integers(3, 8, 6, 5), integers(3, 8, *g.output_size(6, 5))
    total, _ = counted(lambda: ops.conv2d_grow_scores(dy, x, t, g, 3))
    assert total == 2 * dy[:, 0].numel() * 8 * 36


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["linear-blocks", "linear-csr", "conv2d-blocks"])
def test_second_derivatives(name, impl):
    make, shape, tokens = LAYERS[name]
    layer, x = make(sparsity=0.5, impl=impl), torch.randn(shape, requires_grad=True)
    once = 2 * tokens * weights(layer)

    def second(dy=None):
        y = layer.forward(x)  # the counter's module hooks can't follow autograd.grad
        leaves = x, layer.values
        first = torch.autograd.grad(y, leaves, y if dy is None else dy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    dy = torch.ones_like(layer(x))
    total, result = counted(second, dy)
    assert total == (1 + 2 + 2) * once
    assert all(map(torch.equal, result, second(dy)))
    # dy = y: its gradient is two products more, and that of y two again
    total, result = counted(second)
    assert total == (1 + 2 + 4 + 2) * once
    assert all(map(torch.equal, result, second()))
