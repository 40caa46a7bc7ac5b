"""Nothing depends on torch's defaults: dtype, device, grad mode, inference mode, determinism.

Each probe says its dtypes and devices itself and must give the same bits under every default.
"""

import contextlib
import io

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.init import fan_in
from sparsekern.ops.cpu import choice

PLAIN = {"device": "cpu", "dtype": torch.float32}
CPU_PATHS = [name for name in choice.NAMES if name != "jit" or choice.has_numba()]


@contextlib.contextmanager
def default(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


@contextlib.contextmanager
def deterministic(fill):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        with default(torch.use_deterministic_algorithms, True, False):
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled


DEFAULTS = {
    "float64": lambda: default(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: default(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: default(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: default(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": lambda: deterministic(fill=False),
    "filled": lambda: deterministic(fill=True),
}


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def numbers(*shape):
    return torch.rand(shape, generator=generator(1), **PLAIN)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24, **PLAIN), nn.ReLU(), nn.Linear(24, 12, **PLAIN))


LAYERS = {
    "csr": (lambda **kw: sk.SparseLinear(20, 12, sparsity=0.5, **kw), (5, 20)),
    "block": (lambda **kw: sk.SparseLinear(20, 12, sparsity=0.5, block=4, **kw), (5, 20)),
    "ragged": (lambda **kw: sk.SparseLinear(19, 13, sparsity=0.5, block=(4, 2), **kw), (5, 19)),
    "masked": (lambda **kw: sk.SparseLinear(20, 12, impl="masked", **kw), (5, 20)),
    "conv1d": (lambda **kw: sk.SparseConv1d(4, 8, 3, padding="same", **kw), (2, 4, 9)),
    "conv2d": (lambda **kw: sk.SparseConv2d(4, 8, 3, block=2, sparsity=0.6, **kw), (2, 4, 7, 6)),
    "gru": (lambda **kw: sk.SparseGRU(6, 8, sparsity=0.5, **kw), (3, 5, 6)),
    "lstm": (lambda **kw: sk.SparseLSTM(6, 8, sparsity=0.5, proj_size=4, **kw), (3, 5, 6)),
    "rnn": (lambda **kw: sk.SparseRNN(6, 8, sparsity=0.5, block=2, **kw), (3, 5, 6)),
    "cell": (lambda **kw: sk.SparseGRUCell(6, 8, sparsity=0.5, **kw), (5, 6)),
}


def passes(name):
    """A layer made, drawn, run and trained, saved and loaded, and made dense."""
    make, shape = LAYERS[name]
    layer = make(generator=generator(), **PLAIN)
    x = numbers(*shape)
    learns = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    x.requires_grad_(learns)
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    found = {"y": y.detach(), **layer.state_dict(), "repr": repr(layer)}
    if learns:
        y.square().sum().backward()
        found["dx"] = x.grad
        found |= {f"d{key}": p.grad for key, p in layer.named_parameters()}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))
    return found | {f"dense {key}": a for key, a in layer.to_dense().state_dict().items()}


def trained(method, block, **settings):
    """Four steps, updates among them; gradients need grad mode, whatever surrounds them."""
    with torch.inference_mode(False), torch.enable_grad():
        net = sk.sparsify_(model(), 0.7, block=block, generator=generator())
        optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
        updates = method(net, optimizer, t_end=10, update_freq=1, **settings)
        for _ in range(4):
            net(numbers(8, 20)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert updates.history
        return net.state_dict()


def changed():
    net = sk.sparsify_(model(), 0.6, init="keep", distribution="uniform")
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    return kept | {f"dense {key}": value for key, value in sk.densify_(net).state_dict().items()}


def topologies():
    found = {}
    for shape, block in (((20, 24), 4), ((19, 23), 4), ((9, 7), 1)):
        t = sk.Topology.random(shape, block, sparsity=0.6, generator=generator())
        other = sk.Topology.random(shape, block, nnzb=3, generator=generator(), device="cpu")
        values = t.clear_padding_(torch.ones(t.values_shape, **PLAIN))
        dense = t.unpack(values)
        assert sk.Topology.from_mask(dense != 0, block) == t.validate()
        if not t.grid.ragged:
            again, kept = sk.Topology.from_torch(t.to_torch(values))
            assert again == t
            assert torch.equal(kept, values)
        added, removed, kept = t.diff(other)
        mask, facts = t.to_mask(), (t.nnz, t.density, t.digest(), t.nbytes, repr(t))
        arrays = dict(
            zip(["added", "removed", "kept", "mask"], (added, removed, kept, mask), strict=True)
        )
        arrays |= {"packed": t.pack(dense), "fan_in": fan_in(t), "positions": t.positions()}
        found |= {f"{shape} {key}": value for key, value in arrays.items()}
        found[f"{shape} facts"] = facts
    return found


def accounts():
    """What a step costs and what to make sparse: the counts, which are of no machine."""
    with torch.inference_mode(False):  # a model made in it can't be trained, ever
        dense, x = model(), numbers(4, 20)
        net = sk.sparsify_(model(), 0.6, block=2, generator=generator())
    report = sk.profile(net, x, measure=False)
    found = {"rows": [(r.name, r.forward_flops, r.held_bytes) for r in report.layers]}
    return found | {"peak": report.peak_bytes, "plan": str(sk.plan(dense, x, sparsity=0.5))}


PROBES = {
    **{f"layer {name}": lambda name=name: passes(name) for name in LAYERS},
    "RigL": lambda: trained(sk.RigL, 1),
    "RigL, blocks": lambda: trained(sk.RigL, 4),
    "SET": lambda: trained(sk.SET, 2, grow_init="init"),
    "sparsify_ and densify_": changed,
    "topologies": topologies,
    "profile and plan": accounts,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a == b


@pytest.mark.filterwarnings("ignore:Sparse (BSR|CSR) tensor support is in beta")
@pytest.mark.parametrize("under", DEFAULTS)
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_gives_the_same_under_every_default(probe, under):
    want = probe()
    with DEFAULTS[under]():
        got = probe()
    # without grad mode there are no gradients
    assert set(got) == set(want) or under in ("no_grad", "inference_mode")
    for key, value in got.items():
        assert same(value, want[key]), key


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize("under", ["float64", "meta", "deterministic", "filled"])
def test_every_cpu_path_gives_the_same(path, under):
    probes = [lambda name=name: passes(name) for name in ("csr", "block", "ragged", "conv2d")]
    with choice.force(path):
        want = [probe() for probe in probes]
        with DEFAULTS[under]():
            got = [probe() for probe in probes]
    for a, b in zip(got, want, strict=True):
        assert all(same(a[key], b[key]) for key in b)


@pytest.mark.parametrize("under", ["float64", "float16", "bfloat16", "meta", "with meta"])
def test_a_layer_follows_the_defaults_as_torchs_do(under):
    with DEFAULTS[under]():
        dense = nn.Linear(10, 10)
        made = [
            sk.SparseLinear(10, 10),
            sk.SparseConv1d(4, 8, 3),
            sk.SparseConv2d(4, 8, 3),
            sk.SparseGRU(4, 8, sparsity=0.5),
            sk.SparseLSTMCell(4, 8, sparsity=0.5),
        ]
    for layer in made:
        for parameter in layer.parameters():
            assert (parameter.dtype, parameter.device) == (dense.weight.dtype, dense.weight.device)


def test_fan_in_is_exact_where_the_default_dtype_could_not_count_it():
    t = sk.Topology.from_mask(torch.ones(2, 2051))
    for under in ("float16", "bfloat16"):
        with DEFAULTS[under]():
            assert torch.equal(fan_in(t), torch.tensor([2051.0, 2051.0], dtype=torch.float32))
