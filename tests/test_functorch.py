"""Transforms of `torch.func` and forward-mode derivatives, against the masked dense reference.

Where operands are integers every sum is exact, and results must have the reference's bits. The
reference of a recurrent layer is torch's own with the zero-filled weights; see `test_recurrent`.
"""

import pytest
import torch
from support import integers
from test_recurrent import LAYERS, assert_close, make
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import sparsekern as sk
from sparsekern.errors import UnavailableError
from sparsekern.ops import library
from sparsekern.ops.capture import register

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # torch's own
SHAPES = {
    "linear": (lambda **k: sk.SparseLinear(9, 12, **k), (9,)),
    "conv1d": (lambda **k: sk.SparseConv1d(3, 8, 3, padding=1, **k), (3, 7)),
    "conv2d": (lambda **k: sk.SparseConv2d(4, 6, 3, stride=2, groups=2, **k), (4, 6, 5)),
}
FAMILIES = [(name, block) for name in SHAPES for block in (1, 2)]


def unpacked(topology, values):
    """As `topology.unpack`, which writes in place and so can't be mapped."""
    count = topology.values_shape[0] * topology.values_shape[1] * topology.values_shape[2]
    places = topology.unpack(torch.arange(1, count + 1).view(topology.values_shape))
    return torch.cat([values.new_zeros(1), values.reshape(-1)])[places]


def case(name, block, impl=None, dtype=F64):
    """A layer and an input of integers; the layer's function of (parameters, x), and the dense."""
    build, size = SHAPES[name]
    layer = build(sparsity=0.5, block=block, impl=impl, dtype=dtype)
    with torch.no_grad():
        packed = layer.topology.pack(integers(*layer.matrix_shape, dtype=dtype))
        layer.values.copy_(packed)
        layer.bias.copy_(integers(*layer.bias.shape, dtype=dtype))
    dense = layer.to_dense()

    def sparse(parameters, x):
        return functional_call(layer, parameters, (x,))

    def reference(parameters, x):
        weight = layer.as_weight(unpacked(layer.topology, parameters["values"]))
        return functional_call(dense, {"weight": weight, "bias": parameters["bias"]}, (x,))

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    return sparse, reference, parameters, integers(3, *size, dtype=dtype)


def loss(function):
    return lambda parameters, x: function(parameters, x).square().sum()


def ones_like(parameters):
    return {k: integers(*p.shape, dtype=p.dtype) for k, p in parameters.items()}


def per_sample(function):
    return vmap(grad(loss(lambda p, x: function(p, x[None]))), (None, 0))


def penalized(function):
    """The gradient of a gradient's square: backward over backward."""
    return grad(lambda p, x: grad(loss(function), 1)(p, x).square().sum())


def over_forward(function):
    """A directional derivative of the gradient: forward over backward."""
    return lambda p, x: jvp(lambda x: grad(loss(function))(p, x), (x,), (x,))[1]


TRANSFORMS = {
    "grad": lambda f: grad(loss(f), (0, 1)),
    "jvp": lambda f: lambda p, x: jvp(f, (p, x), (ones_like(p), x.roll(1, 0))),
    "jvp of x": lambda f: lambda p, x: jvp(lambda x: f(p, x), (x,), (x.roll(1, 0),)),
    "jvp of bias": lambda f: (
        lambda p, x: jvp(lambda b: f({**p, "bias": b}, x), (p["bias"],), (p["bias"],))
    ),
    "vmap": lambda f: lambda p, x: vmap(f, (None, 1), 2)(p, torch.stack([x, -x], 1)),
    "ensemble": lambda f: (
        lambda p, x: vmap(f, (0, None))({k: torch.stack([t, 2 * t]) for k, t in p.items()}, x)
    ),
    "ensemble's grad": lambda f: (
        lambda p, x: vmap(grad(loss(f)), (0, 0))(
            {k: torch.stack([t, 2 * t]) for k, t in p.items()}, torch.stack([x, x + 1])
        )
    ),
    "per-sample gradients": per_sample,
    "jacrev": lambda f: jacrev(lambda p, x: f(p, x).sum(0)),
    "jacfwd": lambda f: jacfwd(lambda p, x: f(p, x).sum(0), 1),
    "hessian": lambda f: hessian(loss(f), 1),
    "gradient penalty": penalized,
    "forward over backward": over_forward,
}


def assert_equal(got, want):
    got, want = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "block"), FAMILIES)
def test_the_reference_bits(name, block, transform):
    sparse, reference, parameters, x = case(name, block)
    torch.manual_seed(1)
    got = TRANSFORMS[transform](sparse)(parameters, x)
    torch.manual_seed(1)  # tangents are drawn
    assert_equal(got, TRANSFORMS[transform](reference)(parameters, x))


@pytest.mark.parametrize("impl", ["dense", "triton"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "per-sample gradients"])
def test_other_implementations(impl, transform):
    sparse, reference, parameters, x = case(
        "linear", 1, impl, dtype=torch.float32 if impl == "triton" else F64
    )
    torch.manual_seed(1)
    got = TRANSFORMS[transform](sparse)(parameters, x)
    torch.manual_seed(1)
    assert_equal(got, TRANSFORMS[transform](reference)(parameters, x))


@pytest.mark.parametrize("name", SHAPES)
def test_dual_tensors(name):
    sparse, reference, parameters, x = case(name, 1)
    tangent = integers(*x.shape, dtype=F64)
    with forward_ad.dual_level():
        got, want = (
            forward_ad.unpack_dual(f(parameters, forward_ad.make_dual(x, tangent)))
            for f in (sparse, reference)
        )
        assert_equal(tuple(got), tuple(want))


def test_a_clamped_product():
    t = sk.Topology.random((12, 9), 4, sparsity=0.5)
    values, x = t.pack(integers(12, 9, dtype=F64)), integers(5, 9, dtype=F64)

    def sparse(values, x):
        return sk.ops.spmm(x, values, t, activation="relu")

    def reference(values, x):
        return (x @ unpacked(t, values).t()).relu()

    for f in (
        lambda f: jvp(f, (values, x), (values, x.roll(1))),
        lambda f: grad(lambda v, x: f(v, x).square().sum(), (0, 1))(values, x),
        lambda f: vmap(grad(lambda v, x: f(v, x[None]).square().sum()), (None, 0))(values, x),
    ):
        assert_equal(f(sparse), f(reference))


def test_models_with_connections_of_their_own():
    """`stack_module_state` stacks the index arrays, too."""
    models = [sk.SparseLinear(9, 12, sparsity=0.5, dtype=F64) for _ in range(3)]
    for model in models:
        model.set_active_values(model.topology.pack(integers(12, 9, dtype=F64)))
        model.bias.data.copy_(integers(12, dtype=F64))
    x = integers(4, 9, dtype=F64)
    state = torch.func.stack_module_state(models)
    got = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(*state)
    assert torch.equal(got, torch.stack([model(x) for model in models]))
    assert torch.equal(models[0](x), models[0].to_dense()(x))  # it has its own arrays again


@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_layers(kind):
    layer = make(LAYERS, kind, num_layers=2, bidirectional=True)
    dense = layer.to_dense()
    x = torch.randn(4, 3, 5, dtype=F64)
    names = {name: f"weight_{name}" for name in layer._matrices()}
    sparse = {f"{name}.values": layer._matrices()[name].values.detach() for name in names}

    def run(values, x):
        return functional_call(layer, values, (x,))[0]

    def reference(values, x):
        held = {
            names[name]: unpacked(layer._matrices()[name].topology, values[f"{name}.values"])
            for name in names
        }
        return functional_call(dense, held, (x,))[0]

    def samples(f):
        one = grad(lambda v, x: f(v, x).square().sum())
        if f is run:
            return vmap(lambda v, x: one(v, x[:, None]), (None, 1))
        each = [one(sparse, x[:, i : i + 1]) for i in range(x.shape[1])]  # torch's can't be mapped
        return lambda *_: {name: torch.stack([g[name] for g in each]) for name in sparse}

    transforms = [
        lambda f: grad(lambda v, x: f(v, x).square().sum(), (0, 1)),
        lambda f: lambda v, x: jvp(f, (v, x), (v, x)),
        samples,
    ]
    for transform in transforms:
        got, want = (
            torch.utils._pytree.tree_leaves(transform(f)(sparse, x)) for f in (run, reference)
        )
        for mine, theirs in zip(got, want, strict=True):
            assert_close(mine, theirs, kind)


def test_attention_and_a_cell():
    x = torch.randn(5, 3, 8, dtype=F64)
    attention = sk.SparseMultiheadAttention(8, 2, sparsity=0.5, dtype=F64)
    cell = sk.SparseLSTMCell(8, 6, sparsity=0.5, dtype=F64)
    for layer, inputs in ((attention, (x, x, x)), (cell, (x[0],))):
        parameters = dict(layer.named_parameters())

        def loss(held, layer=layer, inputs=inputs):
            return functional_call(layer, held, inputs)[0].square().sum()

        want = torch.autograd.grad(loss(parameters), list(parameters.values()))
        got = grad(loss)({k: p.detach() for k, p in parameters.items()})
        for mine, theirs in zip(got.values(), want, strict=True):
            assert_close(mine, theirs, type(layer).__name__)


def test_no_warning_of_a_missing_rule():
    """torch warns, in C++ and once a process, where it falls back to a loop of its own."""
    for op in ("spmm", "spmm_t", "sddmm", "spmm_backward", "conv2d", "conv2d_dgrad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"sparsekern::{op}", "FuncTorchBatched"
        )


def test_what_is_refused():
    t = sk.Topology.random((6, 6), sparsity=0.5)
    x = torch.randn(2, 3, 6)
    with pytest.raises(UnavailableError, match="sddmm_add"):
        vmap(lambda x: sk.ops.sddmm(x, x, t, out=torch.zeros(t.values_shape)))(x)
    with pytest.raises(UnavailableError, match="grow_scores"):
        vmap(lambda x: library.grow_scores([x], [x], *library.parts(t), 2, "l1", "cpu"))(x)


# ---- observed layers


class Sink:
    """Sums what it receives, as a dense gradient, where a method's observer does."""

    def __init__(self, layer):
        self.total = 0
        self.node = torch.autograd.graph.get_gradient_edge(layer.values).node

    def expect(self):
        pass

    def receive(self, dy, x):
        try:
            counts = torch._C._will_engine_execute_node(self.node)
        except RuntimeError:
            return
        if counts:
            self.total = self.total + dy.detach().t() @ x.detach()


FORWARDS = {
    "vmap": lambda f, x: vmap(lambda x: f(x[None])[0])(x).square().sum(),
    "jvp": lambda f, x: sum(t.square().sum() for t in jvp(f, (x,), (x.roll(1, 0),))),
    "gradient penalty": lambda f, x: (
        grad(lambda x: f(x).square().sum())(x).square().sum() + f(x).sum()
    ),
    "per-sample penalty": lambda f, x: (
        vmap(grad(lambda x: f(x[None]).square().sum()))(x).square().sum()
    ),
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_an_observer_is_given_the_dense_gradient(forward):
    """Of a backward pass over transforms, exactly."""
    _, _, parameters, x = case("linear", 1)
    layer = sk.SparseLinear(9, 12, sparsity=0.5, dtype=F64)
    layer.set_active_values(layer.topology.pack(integers(12, 9, dtype=F64)))
    layer.bias.data.copy_(parameters["bias"])
    dense, sink = layer.to_dense(), Sink(layer)
    layer.observe(register(sink))
    FORWARDS[forward](layer, x).backward()
    FORWARDS[forward](dense, x).backward()
    assert torch.equal(sink.total, dense.weight.grad)
    assert torch.equal(layer.values.grad, layer.topology.pack(dense.weight.grad))


def test_an_armed_method_takes_a_transformed_gradient_for_none():
    """What counts is what torch adds to `.grad`, as with `torch.autograd.grad`."""
    model = nn.Sequential(sk.SparseLinear(9, 12, sparsity=0.5, dtype=F64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.RigL(model, optimizer, t_end=10)
    x, parameters = integers(4, 9, dtype=F64), dict(model.named_parameters())
    free = {k: p.detach() for k, p in parameters.items()}
    per_sample_loss = grad(lambda p, x: functional_call(model, p, (x[None],)).square().sum())
    got = vmap(per_sample_loss, (None, 0))(free, x)
    model(x).square().sum().backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient.sum(0), parameters[name].grad)
    optimizer.step()
    assert len(method.history) == 1
