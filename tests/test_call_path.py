"""The short way to a kernel: the operators' results, and taken where nothing watches alone."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import Topology, ops
from sparsekern.ops import conv_library, direct, library

LAYERS = {
    "linear": (lambda **k: sk.SparseLinear(33, 50, sparsity=0.6, **k), (5, 33)),
    "conv2d": (lambda **k: sk.SparseConv2d(20, 36, 3, padding=1, sparsity=0.6, **k), (2, 20, 6, 5)),
    "conv1d": (lambda **k: sk.SparseConv1d(20, 36, 3, sparsity=0.6, **k), (2, 20, 7)),
    "gru": (lambda **k: sk.SparseGRU(20, 24, sparsity=0.6, **k), (4, 3, 20)),
}
every = pytest.mark.parametrize("name", LAYERS)


class Watching(TorchDispatchMode):
    """Sees every operator, and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionWatching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor of another type, such as DTensor."""


def made(name, *, dtype=torch.float32, **settings):
    make, shape = LAYERS[name]
    return make(dtype=dtype, **settings), torch.randn(shape, dtype=dtype)


def step(layer, x, watcher=nullcontext):
    """Output, and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())
    with watcher():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return y, *torch.autograd.grad(y, [x, *parameters], dy)


@pytest.fixture
def routes(monkeypatch):
    """By which way each call reaches a backend."""
    found = []

    def counted(way, original):
        return lambda impl: found.append(way) or original(impl)

    for way, module in (("direct", direct), ("library", library), ("library", conv_library)):
        monkeypatch.setattr(module, "backend", counted(way, module.backend))
    return found


@pytest.fixture
def validations(monkeypatch):
    """Topologies that were validated."""
    found, original = [], Topology.validate
    monkeypatch.setattr(Topology, "validate", lambda t: found.append(t) or original(t))
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
@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")  # of vmap over an operator
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
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


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


def changed(layer):
    array = layer.col if hasattr(layer, "col") else layer.hh_l0.col
    array.add_(0)


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


# ---- what reaches a kernel


def every_array(change):
    """Apply a change to all index arrays of a module, in place of its buffers."""

    def run(layer):
        for module in layer.modules():
            for name in [n for n in ops.library.ARRAY_NAMES if n in module._buffers]:
                change(module, name)

    return run


def ema(layer):
    """What an average of a model with itself does to ints: it rounds down."""
    every_array(lambda m, n: m._buffers[n].copy_(m._buffers[n] * 0.9 + m._buffers[n] * 0.1))(layer)


def replaced(make):
    return every_array(lambda m, n: m._buffers.__setitem__(n, make(m._buffers[n])))


def strided(array):
    wide = torch.full((array.numel(), 2), 10**8, dtype=torch.int32)
    wide[:, 0] = array
    return wide[:, 0]


def garbage(array):
    return torch.full_like(array, 0x7F7F7F7F)


def no_storage(layer):
    """`to_empty` on memory that holds something else."""
    layer._apply(lambda t: torch.full_like(t, 0x7F7F7F7F if not t.is_floating_point() else 0))


BROKEN = {
    "averaged": ema,
    "in place": every_array(lambda m, n: m._buffers[n].copy_(m._buffers[n].flip(0).neg())),
    "one entry": every_array(lambda m, n: n == "col" and m._buffers[n][-1:].fill_(10**8)),
    "float64": replaced(lambda a: a.double()),
    "int64": replaced(lambda a: a.long()),
    "strided": replaced(strided),
    "garbage": replaced(garbage),
    "uninitialised": no_storage,
    "short": replaced(lambda a: a[:-1]),
    "a matrix": replaced(lambda a: a[None]),
}


@every
@pytest.mark.parametrize("impl", [None, "dense", "masked"])
@pytest.mark.parametrize("case", BROKEN)
def test_no_kernel_gets_what_is_no_topology(name, impl, case):
    layer, x = made(name, impl=impl)
    step(layer, x)
    BROKEN[case](layer)
    for watcher in (nullcontext, Watching):
        # arrays that are too short do not fit the values either, which operators see first
        with watcher(), pytest.raises((sk.errors.TopologyError, sk.errors.ShapeError)):
            layer(x)
    assert "no topology" in repr(layer)


@pytest.mark.parametrize("case", ["one entry", "garbage", "strided", "int64"])
def test_nor_a_compiled_one(case):
    layer, x = made("linear")
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run(x)
    BROKEN[case](layer)
    with pytest.raises(sk.errors.TopologyError):
        run(x)


@every
@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.type(torch.float64),
        lambda layer: layer._apply(lambda t: t.double()),
        lambda layer: layer.double(),
        lambda layer: layer.half().double(),
    ],
)
def test_casts_leave_index_arrays_alone(name, cast):
    layer, x = made(name)
    before = {n: b for n, b in layer.named_buffers() if b.dtype == torch.int32}
    y = cast(layer)(x.double())
    assert (y[0] if isinstance(y, tuple) else y).dtype is torch.float64
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers() if n in before)
    assert all(b.dtype == torch.int32 for n, b in layer.named_buffers() if n in before)


@pytest.mark.parametrize("change", ["shape", "dtype", "device", "no tensor"])
def test_a_topology_made_by_hand_is_validated_before_its_first_product(change):
    t = Topology.random((8, 8), sparsity=0.5)
    x, values = torch.randn(2, 8), torch.randn(t.values_shape)
    arrays = list(t.arrays)
    arrays[1] = {
        "shape": torch.full_like(t.col, 99),
        "dtype": t.col.long(),
        "device": t.col.to("meta"),
        "no tensor": t.col.tolist(),
    }[change]
    with pytest.raises((sk.errors.SparseKernError, AttributeError, TypeError)):
        ops.spmm(x, values, t.with_arrays(arrays))
    if change == "shape":
        for call in (
            lambda bad: ops.spmm(x, values, bad),
            lambda bad: ops.spmm_t(x, values, bad),
            lambda bad: ops.sddmm(x, x, bad),
            lambda bad: ops.grow_scores(x, x, bad, 2),
            lambda bad: sk.SparseLinear(8, 8, topology=bad),
            lambda bad: library.spmm(x, values, None, *library.parts(bad), False, "cpu"),
        ):
            with pytest.raises(sk.errors.TopologyError, match=r"`col` must lie in \[0, 8\)"):
                call(t.with_arrays(arrays))


def test_arrays_are_validated_once(validations):
    t = Topology.random((8, 8), sparsity=0.5)
    x, values = torch.randn(2, 8), torch.randn(t.values_shape)
    ops.spmm(x, values, t)
    assert not validations  # it made them itself
    other = t.with_arrays([a.clone() for a in t.arrays])
    for _ in range(3):
        ops.spmm(x, values, other)
        library.spmm(x, values, None, *library.parts(other), False, "cpu")
        ops.spmm(x, values, t.with_arrays(other.arrays))
    assert len(validations) == 1
    other.col.copy_(other.col.clone())
    ops.spmm(x, values, other)
    assert len(validations) == 2
    # those of a topology that is gone are still known; of tensors that are gone, nothing is
    parts = library.parts(other)
    del other
    library.spmm(x, values, None, *parts, False, "cpu")
    assert len(validations) == 2


def test_exported_programs_validate_their_arrays_once(validations):
    layer, x = made("linear")
    program = torch.export.export(layer, (x,)).module()
    want = layer(x)
    del layer
    validations.clear()
    for _ in range(3):
        assert torch.equal(program(x), want)
    assert len(validations) <= 1


@every
def test_a_layer_hands_out_one_topology_until_it_changes(name, validations):
    layer, x = made(name)
    held = layer if name != "gru" else layer.hh_l0
    first = held.topology
    step(layer, x)
    assert held.topology is first
    assert not validations
    held.rewire_(first, torch.arange(first.nnzb), [held.values.data])
    assert held.topology is not first
    assert not validations  # our own writes are trusted
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    checked = len(validations)  # what came
    step(layer, x)
    layer.load_state_dict(state, assign=True)
    step(layer, x)
    assert len(validations) == 2 * checked or name == "gru"


def test_what_is_derived_does_not_outlive_a_write():
    t = Topology.random((8, 8), sparsity=0.5)
    object.__setattr__(t, "_plan", "of the arrays as they are")
    t.known()
    assert t._plan
    t.col.copy_(t.col.clone())
    t.known()
    assert not hasattr(t, "_plan")
    assert not hasattr(pickle.loads(pickle.dumps(t)), "_plan")


@every
def test_copies_are_validated_for_themselves(name, validations):
    layer, x = made(name)
    want = step(layer, x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = len(validations)
        assert all(map(torch.equal, step(twin, x), want))
        assert len(validations) > before
        changed(twin)
    assert not any(v is layer for v in validations)
    assert all(map(torch.equal, step(layer, x), want))


def test_a_forged_pickle_is_found():
    layer, x = made("linear")
    forged = copy.deepcopy(layer)
    state = pickle.loads(pickle.dumps(layer)).__getstate__()
    state["_buffers"]["col"] = torch.full_like(layer.col, 99)
    forged.__setstate__(state)
    with pytest.raises(sk.errors.TopologyError, match="col"):
        forged(x)


@every
def test_inference_mode(name, validations):
    """Its tensors count no writes; index arrays made there do."""
    with torch.inference_mode():
        layer, x = made(name)
        y = layer(x)
        assert not any(b.is_inference() for b in layer.buffers())
        assert not validations
        copied = copy.deepcopy(layer)
        z = copied(x)
        assert not any(b.is_inference() for b in copied.buffers())
        first, second = (t[0] if isinstance(t, tuple) else t for t in (y, z))
        assert torch.equal(first, second)
        changed(copied)
        before = len(validations)
        copied(x)
        assert len(validations) == before + 1


def test_arrays_of_inference_mode_are_validated_each_time(validations):
    t = Topology.random((8, 8), sparsity=0.5)
    with torch.inference_mode():
        t = t.with_arrays([a.clone() for a in t.arrays])
        x, values = torch.randn(2, 8), torch.randn(t.values_shape)
        for n in range(1, 4):
            ops.spmm(x, values, t)
            assert len(validations) == n
        t.col.fill_(99)
        with pytest.raises(sk.errors.TopologyError):
            ops.spmm(x, values, t)


def test_a_strided_state_is_copied_but_not_taken_over():
    layer, x = made("linear")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["col"] = strided(state["col"])
    other = sk.SparseLinear(33, 50, sparsity=0.6)
    with pytest.raises(sk.errors.TopologyError, match="`col` must be contiguous; got stride 2"):
        other.load_state_dict(state, assign=True)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_shapes_are_still_checked():
    layer, x = made("linear")
    with pytest.raises(sk.errors.DtypeError, match="`x` must have dtype"):
        layer(x.double())
    layer.values = nn.Parameter(layer.values[:-1].detach())
    with pytest.raises(sk.errors.ShapeError, match="`values` must have shape"):
        layer(x)
