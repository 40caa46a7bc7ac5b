"""The sanitizer sees seeded faults, lets right kernels pass, and watches every launch."""

# ruff: noqa: ARG001  (all kernels of a table are launched with the same arguments)
import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels run compiled here, not interpreted", allow_module_level=True)

import sanitizer  # noqa: E402
import triton.language as tl  # noqa: E402
from shadow import SanitizerError  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from sparsekern import ops  # noqa: E402
from sparsekern.topology import Topology  # noqa: E402

N, B = 40, 16  # elements, lanes of a program: the last program is ragged


@triton.jit
def _copy(x_ptr, y_ptr, n, shift, step, B: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, B)
    x = tl.load(x_ptr + i + shift, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x, mask=i < n)


@triton.jit
def _copy_unmasked_store(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0))


@triton.jit
def _store_below(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i - 1, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _sum_without_other(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + i, mask=i < n)))


@triton.jit
def _gather_without_other(x_ptr, index_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    at = tl.load(index_ptr + i, mask=i < n)
    tl.store(y_ptr + i, tl.load(x_ptr + at), mask=i < n)


@triton.jit
def _overlapping_lanes(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i // 2, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _prefix(x_ptr, y_ptr, n, B: tl.constexpr):
    p = tl.program_id(0)
    before = tl.load(y_ptr + p - 1, mask=p > 0, other=0.0)
    tl.store(y_ptr + p, before + tl.load(x_ptr + p))


@triton.jit
def _rotate(x_ptr, y_ptr, n, B: tl.constexpr):
    p = tl.program_id(0)
    tl.store(y_ptr + p, tl.load(y_ptr + (p + 1) % n))


@triton.jit
def _total(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y_ptr + i * 0, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _swap(x_ptr, y_ptr, n, B: tl.constexpr):
    tl.atomic_cas(y_ptr, 0, 1)


@triton.jit
def _narrow_rows(x_ptr, y_ptr, rows, width, stride, B: tl.constexpr):
    r, i = tl.program_id(0), tl.arange(0, B)
    x = tl.load(x_ptr + r * width + i, mask=i < width, other=0.0)
    tl.store(y_ptr + r * stride + i, x, mask=i < width)


@triton.jit
def _tiles(x, y, B: tl.constexpr):
    r, c = tl.program_id(0) * B, tl.program_id(1) * B
    y.store([r, c], x.load([r, c]))


@triton.jit
def _wrapping(x_ptr, y_ptr, n, stride, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y_ptr + i * stride, tl.load(x_ptr + i * stride, mask=i < n, other=0.0), mask=i < n)


def vectors(n=N, spare=0):
    """An input and an output inside larger storages, as launchers get them."""
    x = torch.arange(n + 2 * spare, dtype=torch.float32)[spare : n + spare]
    return x, torch.full((n + 2 * spare,), float("nan"))[spare : n + spare]


def copy(n=N, shift=0, step=B, spare=0, length=N):
    x, y = vectors(length, spare)
    _copy[(triton.cdiv(n, step),)](x, y, n, shift, step, B=B)
    return x, y


def simple(kernel, programs=3, dtype=torch.float32):
    x, y = (t.to(dtype) for t in vectors())
    kernel[(programs,)](x, y, N, B=B)
    return y


def gather():
    index = torch.arange(N, dtype=torch.int32)
    _gather_without_other[(3,)](*vectors()[:1], index, vectors()[1], N, B=B)


def rows(stride):
    x, y = torch.ones(4, 10), torch.ones(4, 12)
    _narrow_rows[(4,)](x, y, 4, 10, stride, B=B)
    return y


def tiles(shape=(24, 32), strides=(32, 1)):
    x, y = torch.arange(24.0 * 32).view(24, 32), torch.full((24, 32), float("nan"))
    xd, yd = (TensorDescriptor(t, list(shape), list(strides), [B, B]) for t in (x, y))
    _tiles[tuple(triton.cdiv(n, B) for n in shape)](xd, yd, B=B)
    return x, y


def far(kernel_elements, stride):
    x, y = (torch.empty(kernel_elements, device="meta") for _ in range(2))
    with sanitizer.only_programs(lambda grid: [(grid[0] - 1, 0, 0)]):
        n = triton.cdiv(kernel_elements, stride)
        _wrapping[(triton.cdiv(n, B),)](x, y, n, stride, B=B)


FAULTS = {
    "load above": (lambda: copy(shift=1), "load out of bounds.*1 of 8.*byte 160 of `x_ptr`"),
    "load below": (lambda: copy(shift=-1), "load out of bounds.*byte -4 of `x_ptr`"),
    "load far off": (lambda: copy(shift=2**40), "load out of bounds.*`x_ptr`"),
    "load next to a view": (lambda: copy(shift=1, spare=8), "load out of bounds.*`x_ptr`"),
    "mask too wide": (lambda: copy(n=N + 1), "load out of bounds.*byte 160"),
    "empty tensor": (lambda: copy(n=1, length=0), "load out of bounds.*which has 0"),
    "store above": (lambda: simple(_copy_unmasked_store), "store out of bounds.*8 of 16.*`y_ptr`"),
    "store below": (lambda: simple(_store_below), "store out of bounds.*byte -4 of `y_ptr`"),
    "garbage as an index": (gather, "load out of bounds.*`x_ptr`"),
    "programs overlap": (lambda: copy(step=B - 1), "`y_ptr` race: also written by program"),
    "rows overlap": (lambda: rows(9), "`y_ptr` race: also written by program"),
    "lanes overlap": (lambda: simple(_overlapping_lanes), "race: two lanes"),
    "program order": (lambda: simple(_prefix, N), "`y_ptr` (reads|writes) what it"),
    "read of another's output": (lambda: simple(_rotate, N), "`y_ptr` (reads|writes) what it"),
    "atomic sum": (lambda: simple(_total), "atomic rmw"),
    "atomic swap": (lambda: simple(_swap, dtype=torch.int32), "atomic cas"),
    "descriptor too long": (lambda: tiles((40, 32)), "out of bounds.*`x`"),
    "descriptor stride": (lambda: tiles(strides=(48, 1)), "out of bounds.*`x`"),
    "int32 wraps": (lambda: far(2**31 + 2**20, 2**16), "out of bounds.*byte -"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_refused(fault):
    run, message = FAULTS[fault]
    refused = sanitizer.counts.refused
    with pytest.raises(SanitizerError, match=message):
        run()
    assert sanitizer.counts.refused == refused + 1


def test_the_error_names_kernel_and_program():
    with pytest.raises(SanitizerError, match=r"_copy_unmasked_store, program \(2, 0, 0\): store"):
        simple(_copy_unmasked_store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_masked_lanes_without_other_are_nan(dtype):
    sums = simple(_sum_without_other, dtype=dtype)
    assert sums[:2].isfinite().all()
    assert sums[2].isnan()


def test_fresh_memory_of_the_kernels_is_poisoned():
    ways = "x.new_empty(3, dtype=d), torch.empty(3, dtype=d), torch.empty_like(x, dtype=d)"
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.bool):
        kernels = {"__package__": "sparsekern.kernels", "torch": torch, "d": dtype}
        for made in eval(ways, kernels, {"x": torch.ones(3)}):
            bad = made.isnan() if dtype.is_floating_point else made == sanitizer.garbage(dtype)
            assert bad.all(), f"{dtype}: {made}"


def test_an_output_never_written_is_seen():
    topology = Topology.random((32, 32), 16, nnzb=4)
    x, w = torch.ones(3, 32), torch.ones(topology.values_shape)
    # one program fewer than the launcher asked for
    with sanitizer.only_programs(lambda grid: list(np.ndindex(grid))[:-1]):
        y = ops.spmm(x, w, topology, impl="triton")
    assert y.isnan().any()
    assert not ops.spmm(x, w, topology, impl="triton").isnan().any()


def test_right_kernels_pass():
    before = sanitizer.counts.sanitized
    for spare in (0, 8):
        x, y = copy(spare=spare)
        assert torch.equal(x, y)
    assert torch.equal(*tiles())
    assert rows(12).shape == (4, 12)
    x = torch.ones(1).expand(N)  # stride 0: all lanes read one element
    y = torch.zeros(N)
    _wrapping[(1,)](x, y, 1, 0, B=B)
    far(2**29, 2**16)
    assert sanitizer.counts.sanitized == before + 6


def test_programs_run_in_a_shuffled_order_that_repeats():
    def order(seed):
        with sanitizer.order(seed):
            copy(n=N * 10, length=N * 10)
        return sanitizer.last.order.tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(25)) not in (order(1), order(2))


def test_every_launch_is_sanitized():
    assert interpreter.InterpreterBuilder.create_masked_load is sanitizer._load
    before = vars(sanitizer.counts).copy()
    topology = Topology.random((40, 50), 16, sparsity=0.5)
    x, dy, w = torch.ones(3, 50), torch.ones(3, 40), torch.ones(topology.values_shape)
    ops.spmm(x, w, topology, impl="triton")
    ops.spmm_t(dy, w, topology, impl="triton")
    ops.sddmm(dy, x, topology, impl="triton")
    made = {k: v - before[k] for k, v in vars(sanitizer.counts).items()}
    assert made["started"] == made["sanitized"] >= 3


def test_the_sanitizer_covers_every_memory_access_of_the_interpreter():
    # whatever else reads or writes memory would go round the checks: a new triton may add it
    tree = ast.parse(Path(inspect.getsourcefile(interpreter)).read_text())
    users = {
        f.name
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for call in ast.walk(f)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func).startswith(("_interpreter.load", "_interpreter.store"))
    }
    assert users == {"create_masked_load", "create_masked_store"}
