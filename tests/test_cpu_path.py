import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekern.errors import ConfigError, DtypeError, UnavailableError
from sparsekern.ops.cpu import backend, choice
from sparsekern.ops.cpu.pages import LARGE, fresh
from sparsekern.topology import Topology

NAMES = ("jit", "blas", "csr") if choice.has_numba() else ("blas", "csr")
TOKENS = (0, 1, 2, 7, 64, 65, 513)

# shape, block, sparsity: every block family, ragged edges, empty rows, full
MATRICES = [
    ((33, 47), (1, 1), 0.9),
    ((130, 70), (1, 1), 0.5),
    ((16, 16), (1, 1), 0.0),
    ((37, 50), (4, 4), 0.7),
    ((20, 100), (1, 16), 0.6),
    ((31, 29), (3, 5), 0.5),
    ((50, 70), (16, 16), 0.5),
    ((96, 128), (32, 32), 0.6),
    ((100, 75), (32, 32), 0.3),
    ((150, 70), (64, 32), 0.0),
    ((130, 200), (64, 64), 0.5),
    ((200, 140), (128, 128), 0.2),
    ((90, 60), (24, 40), 0.4),
]
LAYOUTS = ("rows", "columns", "expanded", "strided")
CASES = [
    (*matrix, m, LAYOUTS[(i + j) % len(LAYOUTS)])
    for i, matrix in enumerate(MATRICES)
    for j, m in enumerate(TOKENS)
]
# one BLAS call per entry is right but hopeless: small blocks go through it a few times only
RUNS = [(c, n) for c in CASES for n in NAMES if n != "blas" or min(c[1]) >= 16 or c[3] == 2]


def each(*blocks):
    """Cases (block, name) of the tests that follow, without BLAS on small blocks."""
    pairs = [(b, n) for b in blocks for n in NAMES if n != "blas" or b >= 16]
    return pytest.mark.parametrize(("block", "name"), pairs)


def case_id(case):
    if isinstance(case, str):
        return case
    (rows, cols), (bh, bw), sparsity, m, layout = case
    return f"m{m}-{rows}x{cols}-b{bh}x{bw}-s{sparsity}-{layout}"


@pytest.fixture(autouse=True)
def _fine_grained(monkeypatch):
    # tiny cases are otherwise left to one thread
    if "jit" in NAMES:
        monkeypatch.setattr(importlib.import_module("sparsekern.ops.cpu.jit.linear"), "GRAIN", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)


def laid_out(m, n, layout, dtype=torch.float32):
    if layout == "columns":
        return integers(n, m, dtype=dtype).t()
    if layout == "expanded":
        return integers(1, 1, dtype=dtype).expand(m, n)
    if layout == "strided":
        return integers(2 * m, 3 * n, dtype=dtype)[::2, ::3]
    return integers(m, n, dtype=dtype)


def dense(t, values):
    """float64 matrix, built block by block: independent of the library's own unpack."""
    full = torch.zeros(t.shape, dtype=torch.float64)
    for slot, home in homes(t, full):
        home.copy_(values[slot, : home.shape[0], : home.shape[1]])
    return full


def sampled(t, gradient):
    out = torch.zeros(t.nnzb, *t.block, dtype=gradient.dtype)
    for slot, home in homes(t, gradient):
        out[slot, : home.shape[0], : home.shape[1]] = home
    return out


def homes(t, full):
    bh, bw = t.block
    columns = torch.repeat_interleave(torch.arange(t.block_cols), t.ccol.diff()).tolist()
    for i, j, slot in zip(t.row.tolist(), columns, t.perm.tolist(), strict=True):
        yield slot, full[i * bh : (i + 1) * bh, j * bw : (j + 1) * bw]


def draw(shape, block, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Topology.random(shape, block, sparsity=sparsity, generator=generator)


def products(x, dy, values, t, bias=None):
    dx, dw = backend.backward(dy, x, values, t)
    return (
        backend.spmm(x, values, t, bias),
        dx,
        dw,
        backend.spmm_t(dy, values, t),
        backend.sddmm(dy, x, t),
    )


@pytest.mark.parametrize(("case", "name"), RUNS, ids=case_id)
def test_exact_on_integers(case, name):
    shape, block, sparsity, m, layout = case
    torch.manual_seed(m)
    dtype = torch.float64 if m == 7 else torch.float32
    t = draw(shape, block, sparsity)
    x, dy = laid_out(m, shape[1], layout, dtype), laid_out(m, shape[0], layout, dtype)
    values, bias = integers(t.nnzb, *block, dtype=dtype), integers(shape[0], dtype=dtype)
    bias = bias if m % 2 else None
    kept = [a.clone() for a in (x, dy, values)]
    with choice.force(name):
        y, dx, dw, dx2, dw2 = products(x, dy, values, t, bias)
    w = dense(t, values)
    want = x.double() @ w.t() + (0 if bias is None else bias)
    assert torch.equal(y.double(), want)
    assert torch.equal(dx.double(), dy.double() @ w)
    assert torch.equal(dw.double(), sampled(t, dy.double().t() @ x.double()))
    assert torch.equal(dx, dx2)
    assert torch.equal(dw, dw2)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, dy, values), strict=True))


@each(1, 4, 32)
def test_no_active_block(block, name):
    t = Topology.from_positions(torch.zeros(0, dtype=torch.int64), (40, 70), block)
    values, bias = torch.zeros(0, *t.block), integers(40)
    with choice.force(name):
        y, dx, dw, *_ = products(integers(9, 70), integers(9, 40), values, t, bias)
    assert torch.equal(y, bias.expand(9, 40))
    assert torch.equal(dx, torch.zeros(9, 70))
    assert dw.shape == (0, *t.block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each(1, 4, 16, 32, 64)
def test_within_the_a_priori_bound(block, dtype, name):
    torch.manual_seed(block)
    t = draw((150, 203), block, 0.5)
    x, dy = torch.randn(130, 203).to(dtype), torch.randn(130, 150).to(dtype)
    values, bias = torch.randn(t.nnzb, *t.block).to(dtype), torch.randn(150).to(dtype)
    with choice.force(name):
        y, dx, dw, *_ = products(x, dy, values, t, bias)
    w, x, dy, bias = dense(t, values), x.double(), dy.double(), bias.double()
    within(y, x @ w.t() + bias, x.abs() @ w.abs().t() + bias.abs(), 203 + 1)
    within(dx, dy @ w, dy.abs() @ w.abs(), 150)
    within(dw, sampled(t, dy.t() @ x), sampled(t, dy.abs().t() @ x.abs()), 130)


def within(got, want, magnitude, terms):
    """reliability.md B2: gamma_K times the sum of magnitudes, then one rounding to the output."""
    unit = 2.0**-24
    gamma = terms * unit / (1 - terms * unit)
    out = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    bound = gamma * magnitude + out * (want.abs() + gamma * magnitude)
    assert bool(((got.double() - want).abs() <= bound).all())


@each(1, 4, 32)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_stays_where_it_belongs(bad, block, name):
    t = draw((70, 90), block, 0.6)
    x, dy, values = torch.ones(66, 90), torch.ones(66, 70), torch.ones(t.nnzb, *t.block)
    x[3, 89], dy[3, 69] = bad, bad
    with choice.force(name):
        y, dx, dw, *_ = products(x, dy, values, t)
    w = dense(t, values)
    reached = [w[:, 89] != 0, w[69] != 0]
    for out, columns in zip((y, dx), reached, strict=True):
        assert torch.equal(out.isfinite().logical_not()[3], columns)
        assert bool(out.isfinite()[[i for i in range(66) if i != 3]].all())
    hit = torch.zeros(70, 90)
    hit[69], hit[:, 89] = 1, 1
    assert torch.equal(dw.isfinite().logical_not(), sampled(t, hit) != 0)


@each(4, 32)
def test_garbage_in_the_padding_of_values_is_never_read(block, name):
    t = draw((70, 90), block, 0.0)
    values = integers(t.nnzb, *t.block)
    clean = sampled(t, dense(t, values)).float()
    dirty = torch.where(sampled(t, torch.ones(70, 90)) != 0, values, float("nan"))
    x, dy = integers(9, 90), integers(9, 70)
    with choice.force(name):
        for a, b in zip(products(x, dy, clean, t), products(x, dy, dirty, t), strict=True):
            assert torch.equal(a, b)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor)]
        self.numel = max([self.numel, *(a.numel() for a in tensors)])
        return out


@each(1, 4, 32, 64)
def test_nothing_dense_is_allocated(block, name):
    t = draw((512, 640), block, 0.95)
    x, dy, values = torch.ones(48, 640), torch.ones(48, 512), torch.ones(t.nnzb, *t.block)
    with choice.force(name), Largest() as largest:
        products(x, dy, values, t, torch.ones(512))
    assert 0 < largest.numel < 512 * 640 // 4


@each(1, 4, 32)
def test_same_bits_again_and_for_any_number_of_threads(block, name):
    torch.manual_seed(1)
    t = draw((200, 300), block, 0.6)
    x, dy, values = torch.randn(333, 300), torch.randn(333, 200), torch.randn(t.nnzb, *t.block)
    outs = []
    with choice.force(name):
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            outs.append(products(x, dy, values, t))
    # BLAS promises no such thing across thread counts, only from run to run
    for other in [outs[1]] if name == "blas" else outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
@pytest.mark.parametrize("block", [1, 4, (4, 64), 16, 32, 64])
def test_a_tokens_result_does_not_depend_on_the_other_tokens(block):
    torch.manual_seed(2)
    t = draw((200, 300), block, 0.6)
    x, dy, values = torch.randn(333, 300), torch.randn(333, 200), torch.randn(t.nnzb, *t.block)
    bias = torch.randn(200)
    y, dx = backend.spmm(x, values, t, bias), backend.spmm_t(dy, values, t)
    for m in (1, 2, 3, 7, 8, 40, 100):
        assert torch.equal(backend.spmm(x[:m], values, t, bias), y[:m])
        assert torch.equal(backend.spmm_t(dy[-m:], values, t), dx[-m:])


@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
@pytest.mark.parametrize("block", [1, 4, 32])
def test_what_is_kept_of_a_product_holds_no_connections(block):
    t, other = draw((96, 128), block, 0.6), draw((96, 128), block, 0.6, seed=1)
    x, dy, values = integers(70, 128), integers(70, 96), integers(t.nnzb, *t.block)
    products(x, dy, values, t)
    for mine, theirs in zip(t.arrays, other.arrays, strict=True):
        mine.copy_(theirs)
    for a, b in zip(products(x, dy, values, t), products(x, dy, values, other), strict=True):
        assert torch.equal(a, b)


def test_large_results_are_like_all_others():
    out = fresh(1030, 8190, torch.float32)
    assert out.shape == (1030, 8190)
    assert out.nbytes >= LARGE
    assert out.is_contiguous()
    assert int(out.fill_(1).sum(dtype=torch.float64)) == out.numel()
    assert fresh(3, 5, torch.float64).dtype is torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_callers_in_several_threads(name):
    t = draw((128, 128), 32, 0.5)
    x, dy, values = integers(200, 128), integers(200, 128), integers(t.nnzb, 32, 32)
    with choice.force(name):
        want = products(x, dy, values, t)
    wrong = []

    def call():
        with choice.force(name):
            for _ in range(20):
                got = products(x, dy, values, t)
                wrong.extend(a for a, b in zip(got, want, strict=True) if not torch.equal(a, b))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for caller in callers:
            step(caller)
    assert not wrong


def test_the_rule_can_be_asked_and_overridden(monkeypatch):
    small, large = draw((64, 64), 4, 0.5), draw((64, 64), 32, 0.5)
    usual = ("jit", "jit") if "jit" in NAMES else ("csr", "blas")
    assert (
        choice.backend_for(small, torch.float32),
        choice.backend_for(large, torch.bfloat16),
    ) == usual
    monkeypatch.setattr(choice, "has_numba", lambda: False)
    assert choice.backend_for(small, torch.float32) == "csr"
    assert choice.backend_for(large, torch.float64) == "blas"
    monkeypatch.setenv("SPARSEKERN_CPU", "blas")
    assert choice.backend_for(small, torch.float32) == "blas"
    with choice.force("csr"):
        assert choice.backend_for(small, torch.float32) == "csr"
    with pytest.raises(DtypeError, match="int32"):
        choice.backend_for(small, torch.int32)
    with pytest.raises(ConfigError, match="got 'mkl'"), choice.force("mkl"):
        pass
    with pytest.raises(UnavailableError, match="needs numba"), choice.force("jit"):
        pass


HEAD = """
import os, sys, torch
if {block_numba}: sys.modules["numba"] = None
from sparsekern.ops.cpu import backend, choice
from sparsekern.topology import Topology
t = Topology.random((64, 64), {block}, sparsity=0.5)
x, v = torch.ones(128, 64), torch.ones(t.nnzb, *t.block)
def go(): return backend.spmm(x, v, t, None), *backend.backward(x, x, v, t)
"""


def run_python(code, **fields):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", HEAD.format(**fields) + code]
    done = subprocess.run(
        command, check=False, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("block", "name"), [(1, "csr"), (32, "blas")])
def test_runs_without_numba(block, name):
    code = "go(); print(choice.backend_for(t, x.dtype))"
    assert run_python(code, block_numba=True, block=block) == name


@pytest.mark.skipif("jit" not in NAMES, reason="needs numba")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_threads():
    code = (
        "from sparsekern.ops.cpu.jit import linear; linear.GRAIN = 1; torch.set_num_threads(2)\n"
        "want = go(); pid = os.fork()\n"
        "same = all(torch.equal(a, b) for a, b in zip(want, go()))\n"
        "if pid == 0: os._exit(0 if same else 1)\n"
        "print(os.waitpid(pid, 0)[1], same)"
    )
    assert run_python(code, block_numba=False, block=32) == "0 True"
