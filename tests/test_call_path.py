"""The short way to a kernel: the operators' results, and taken where nothing watches alone."""

from contextlib import nullcontext

import pytest
import torch
from call_cases import LAYERS, Watching, changed, made, step
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import Topology, ops
from sparsekern.ops import conv_library, direct, library

every = pytest.mark.parametrize("name", LAYERS)


class FunctionWatching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor of another type, such as DTensor."""


@pytest.fixture
def routes(monkeypatch):
    """By which way each call reaches a backend."""
    found = []

    def counted(way, original):
        return lambda impl: found.append(way) or original(impl)

    for way, module in (("direct", direct), ("library", library), ("library", conv_library)):
        monkeypatch.setattr(module, "backend", counted(way, module.backend))
    return found


# ---- the same bits


@every
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_both_ways_give_the_same_bits(name, block, dtype):
    layer, x = made(name, block=block, dtype=dtype)
    assert all(map(torch.equal, step(layer, x), step(layer, x, Watching)))
    with torch.no_grad():
        y = layer(x)
        with Watching():
            other = layer(x)
    first = y[0] if isinstance(y, tuple) else y
    assert torch.equal(first, other[0] if isinstance(other, tuple) else other)
    assert torch.equal(first, step(layer, x)[0])


@every
@pytest.mark.parametrize("impl", ["dense", "masked"])
def test_other_implementations_too(name, impl):
    layer, x = made(name, block=4, impl=impl)
    assert all(map(torch.equal, step(layer, x), step(layer, x, Watching)))


@pytest.mark.parametrize("frozen", ["x", "values", "bias", "x and values"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_only_what_is_asked_for_is_computed(name, frozen):
    layer, x = made(name)
    operands = {"x": x, "values": layer.values, "bias": layer.bias}
    wanted = [t.requires_grad_(n not in frozen) for n, t in operands.items()]
    wanted = [t for t in wanted if t.requires_grad]
    grads = []
    for watcher in (nullcontext, Watching):
        with watcher():
            grads.append(torch.autograd.grad(layer(x).sum(), wanted))
    assert all(map(torch.equal, *grads))


def test_relu_and_leading_sizes_by_both_ways():
    t = Topology.random((12, 9), 4, sparsity=0.5)
    values = torch.randn(t.values_shape, requires_grad=True)
    x = torch.randn(2, 3, 9, requires_grad=True)
    found = []
    for watcher in (nullcontext, Watching):
        with watcher():
            y = ops.spmm(x, values, t, activation="relu")
            found.append((y, *torch.autograd.grad(y.sum(), [x, values])))
    assert all(map(torch.equal, *found))


# ---- who watches


def counted(layer, x):
    with FlopCounterMode(display=False):
        layer(x).sum().backward()


WATCHERS = {
    "dispatch mode": lambda layer, x: step(layer, x, Watching),
    "flop counter": counted,
    "function mode": lambda layer, x: step(layer, x, FunctionWatching),
    "profiler": lambda layer, x: step(layer, x, torch.autograd.profiler.profile),
    "autocast": lambda layer, x: step(
        layer, x, lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    ),
    "compiler": lambda layer, x: step(torch.compile(layer, fullgraph=True, backend="aot_eager"), x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "make_fx": lambda layer, x: make_fx(layer)(x)(x),
    "subclass": lambda layer, x: layer(x.as_subclass(Subclass)),
    "vmap": lambda layer, x: torch.vmap(layer)(x.unsqueeze(0)),
}


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_sees_operators(name, watcher, routes):
    layer, x = made(name)
    WATCHERS[watcher](layer, x)
    assert routes
    assert set(routes) == {"library"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_tracer_sees_operators(routes):
    layer, x = made("linear")
    graph = str(torch.jit.trace(layer, x, check_trace=False).graph)
    assert "sparsekern::spmm" in graph
    assert set(routes) == {"library"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_a_forward_derivative_is_not_lost():
    layer, x = made("linear")
    layer.requires_grad_(requires_grad=False)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
    assert torch.equal(tangent, ops.spmm(torch.ones_like(x), layer.values, layer.topology))


def default_device(layer, x):
    torch.set_default_device("cpu")
    try:
        step(layer, x)
    finally:
        torch.set_default_device(None)


NOBODY = {
    "nothing": step,
    "no_grad": lambda layer, x: torch.no_grad()(layer)(x),
    "inference_mode": lambda layer, x: torch.inference_mode()(layer)(x),
    "a device": lambda layer, x: step(layer, x, lambda: torch.device("cpu")),
    "default device": default_device,
    "functional_call": lambda layer, x: torch.func.functional_call(
        layer, dict(layer.named_parameters()) | dict(layer.named_buffers()), (x,)
    ),
    "hooks on saved tensors": lambda layer, x: step(
        layer, x, lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
    ),
    "autograd's anomaly mode": lambda layer, x: step(
        layer, x, lambda: torch.autograd.set_detect_anomaly(True)
    ),
}


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("case", NOBODY)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_elsewhere_nothing_passes_the_dispatcher(name, case, routes):
    layer, x = made(name)
    NOBODY[case](layer, x)
    assert routes
    assert set(routes) == {"direct"}


def test_without_a_gradient_there_is_no_autograd_function(monkeypatch):
    monkeypatch.setattr(direct, "_apply_linear", None)
    layer, x = made("linear")
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(requires_grad=False)(x)


def test_lazy_negation_and_lazy_zeros_are_computed():
    layer, x = made("linear", dtype=torch.float64)
    negated = torch.view_as_complex(torch.stack([x, x], -1)).conj().imag
    assert negated.is_neg()
    assert torch.equal(layer(negated), layer(-x))
    assert torch.equal(layer(torch._efficientzerotensor(x.shape, dtype=x.dtype)), layer(0 * x))
    x.requires_grad_()
    dy = torch.randn(5, 50, dtype=torch.float64)
    z = torch.complex(torch.zeros_like(dy), layer(x))
    (got,) = torch.autograd.grad((z.conj() * dy).imag.sum(), x)  # its dy is negated lazily
    (want,) = torch.autograd.grad(layer(x), x, -dy)
    assert torch.equal(got, want)


def test_an_observed_layer_keeps_its_way():
    layer, x = made("linear")
    pairs = []

    class Sink:
        def expect(self):
            pairs.append("expected")

        def receive(self, dy, x):
            pairs.append((dy, x))

    sink = Sink()
    layer.observe(ops.capture.register(sink))
    dx = step(layer, x)[1]
    assert pairs[0] == "expected"
    assert torch.equal(pairs[1][1], x)
    layer.observe(0)
    assert torch.equal(step(layer, x)[1], dx)


# ---- backward


@every
@pytest.mark.parametrize("watcher", [nullcontext, Watching])
def test_backward_refuses_a_topology_that_changed(name, watcher):
    layer, x = made(name)
    with watcher():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        changed(layer)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*col changed"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
@pytest.mark.parametrize("which", ["x", "values"])
def test_backward_refuses_operands_that_changed(name, which):
    layer, x = made(name)
    x.requires_grad_()
    y = layer(x)
    with torch.no_grad():
        (x if which == "x" else layer.values).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_goes_on_after_the_topology_was_replaced():
    layer, x = made("linear")
    want = step(layer, x)[2]
    y = layer(x)
    layer.load_state_dict(sk.SparseLinear(33, 50, sparsity=0.6).state_dict(), assign=True)
    values = y.grad_fn.next_functions[1][0].variable
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    assert torch.equal(torch.autograd.grad(y, values, dy)[0], want)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
def test_second_derivatives(name, block):
    make = {
        "linear": (sk.SparseLinear(5, 6, sparsity=0.5, block=block).double(), (3, 5)),
        "conv2d": (sk.SparseConv2d(4, 4, 2, sparsity=0.5, block=block).double(), (1, 4, 3, 3)),
        "conv1d": (sk.SparseConv1d(4, 4, 2, sparsity=0.5, block=block).double(), (1, 4, 3)),
    }
    layer, shape = make[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    operands = x, layer.values, layer.bias
    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)


def test_gradients_of_gradients_by_both_ways():
    layer, x = made("linear", dtype=torch.float64)
    found = []
    for watcher in (nullcontext, Watching):
        leaf = x.clone().requires_grad_()
        with watcher():
            (dx,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), [leaf, layer.values]))
    assert all(map(torch.equal, *found))


def test_saved_are_the_operands_and_no_index_array():
    layer, x = made("linear")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert [t.dtype for t in packed] == [torch.float32] * 2
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@every
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("watcher", [nullcontext, Watching])
def test_checkpointing_gives_the_same(name, reentrant, watcher):
    """Also where forward was watched and its repetition in backward is not."""
    layer, x = made(name)
    want = step(layer, x)[1]
    x.requires_grad_()
    with watcher():
        y = checkpoint(layer, x, use_reentrant=reentrant)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    y.backward(dy)
    assert torch.equal(x.grad, want)


def test_undefined_gradients_are_none():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.set_materialize_grads(False)
            return y.clone()

        @staticmethod
        def backward(_ctx, _dy):
            return None

    for name in ("linear", "conv2d"):
        layer, x = made(name)
        Drop.apply(layer(x.requires_grad_())).sum().backward()
        assert layer.values.grad is None
