"""Every launcher over the stand-in driver: what the driver would refuse, and what plans change.

SPARSEKERN_LAUNCH=all runs a few hundred cases more.
"""

import gc
import inspect
import weakref

import pytest

pytest.importorskip("launch.standin", exc_type=ImportError)  # before triton

import torch
import triton
import triton.language as tl
from launch import cases, standin
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsekern.kernels import bsr_spmm, plans, tables

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _no_plans():
    plans.clear()
    yield
    plans.clear()


@pytest.fixture
def jitted(monkeypatch):
    """Names of the kernels that went through Triton's own launch, in order."""
    names, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


def relative(parameters, tensors):
    """Parameters, addresses told by the tensor that holds them; what a call made is all alike."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]

    def told(word):
        for number, (first, length) in enumerate(spans):
            if first and first <= word < first + length:
                return number, word - first
        return "made" if word >= 2**40 else word

    return [
        (told(int.from_bytes(p[:8], "little")), p[8:]) if len(p) >= 8 else p for p in parameters
    ]


def watched(call):
    """(result, the last launch) of a call; no launch if it made none."""
    before = standin.launches()
    result = call.run()
    if standin.launches() == before:
        return result, None
    last = standin.last()
    return result, last._replace(parameters=relative(last.parameters, call.tensors))


PRODUCTS = [
    pytest.param(case, name, id=f"{name}-{case}")
    for case in cases.CASES
    for name in cases.calls(case)
]


@pytest.mark.parametrize(("case", "name"), PRODUCTS)
def test_the_driver_takes_it_and_a_plan_hands_it_the_same(case, name, jitted):
    call = cases.calls(case)[name]
    first, ordinary = watched(call)
    launched = len(jitted)
    assert (launched == 0) == (ordinary is None)
    for _ in range(2):
        again, planned = watched(call)
        assert planned == ordinary
        assert (again.shape, again.stride(), again.dtype) == (
            first.shape,
            first.stride(),
            first.dtype,
        )
    # what is shifted is copied
    planned_for = name != "grow"
    assert len(jitted) == (launched if planned_for else 3 * launched)


# ---- what a plan depends on


def forward(x):
    """The forward product of one layer, of 256 x 256 in blocks of 64, in the type of x."""
    t = cases.Topology.random((256, 256), 64, sparsity=0.5)
    values = torch.zeros(t.values_shape, dtype=x.dtype)
    return lambda x: cases.backend.spmm(x, values, t, None)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(200, 256, dtype=BF16),
        torch.zeros(300, 264, dtype=BF16)[:, :256],
        torch.zeros(256, 300, dtype=BF16).t(),
        torch.zeros(300, 257, dtype=BF16)[:, 1:],
        torch.zeros(300 * 256 + 1, dtype=BF16)[1:].view(300, 256),
    ],
    ids=["tokens", "stride", "column", "alignment and stride", "alignment"],
)
def test_another_shape_stride_or_alignment_is_another_plan(other, jitted):
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    product(torch.zeros_like(x))
    assert len(jitted) == 1
    product(other)
    assert len(jitted) == 2
    product(x)
    assert len(jitted) == 2


def test_another_dtype_is_another_plan(jitted):
    for count, dtype in enumerate((BF16, torch.float16, torch.float32), 1):
        x = torch.zeros(300, 256, dtype=dtype)
        product = forward(x)
        product(x)
        product(x)
        assert len(jitted) == count


def test_another_precision_is_another_plan(jitted):
    x, matmul = torch.zeros(300, 256), torch.backends.cuda.matmul
    product, before = forward(x), matmul.fp32_precision
    product(x)
    try:
        matmul.fp32_precision = "tf32"
        for _ in range(2):
            product(x)
            assert len(jitted) == 2
    finally:
        matmul.fp32_precision = before


def test_pointers_are_those_of_the_call(jitted):
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    for other in (torch.zeros_like(x), torch.zeros_like(x)):
        y = product(other)
        maps = [p for p in standin.last().parameters if len(p) == 128]
        addresses = [int.from_bytes(p[:8], "little") for p in maps]
        assert [addresses[0], addresses[-1]] == [other.data_ptr(), y.data_ptr()]
    assert len(jitted) == 1


def test_the_stream_is_that_of_the_call(jitted, monkeypatch):
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    monkeypatch.setattr(standin.DRIVER, "stream", 7)
    product(x)
    assert standin.last().stream == 7
    assert len(jitted) == 1


def test_a_plan_keeps_no_tensor_alive():
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    held = weakref.ref(x)
    product(x)
    product(x)
    del x
    gc.collect()
    assert held() is None


def test_a_hook_sees_every_launch(jitted):
    runtime, seen = knobs.runtime, []
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    product(x)
    assert len(jitted) == 1
    runtime.launch_enter_hook.add(seen.append)
    try:
        product(x)
        product(x)
    finally:
        runtime.launch_enter_hook.remove(seen.append)
    assert [entry.get()["name"] for entry in seen] == ["_bsr_spmm_tma_kernel"] * 2
    product(x)
    assert len(jitted) == 3


@pytest.mark.parametrize("name", ["launch_exit_hook", "debug", "pre_run_hooks"])
def test_whatever_watches_gets_an_ordinary_launch(name, jitted, monkeypatch):
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    kernel = bsr_spmm._bsr_spmm_tma_kernel
    owner = kernel if name == "pre_run_hooks" else knobs.runtime
    value = {"launch_exit_hook": lambda _: None, "debug": True}.get(name, [lambda *_, **__: None])
    monkeypatch.setattr(owner, name, value)
    product(x)
    assert len(jitted) == 2


def test_other_entries_of_a_table_are_other_plans(jitted):
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    grid = standin.last().grid
    key = tables.Key("spmm", "half", "64", "short", "tma")
    with tables.overridden("sm90", {key: tables.SpmmConfig(64, 64, 8, False, 4, 3)}):
        product(x)
        assert standin.last().grid != grid
    product(x)
    assert standin.last().grid == grid
    assert len(jitted) == 3


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 3)
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    for tokens in range(290, 300):
        product(x[:tokens])
        assert len(plans._plans) <= 3


def test_threads_do_not_mix_their_tensors():
    x = torch.zeros(300, 256, dtype=BF16)
    product = forward(x)
    product(x)
    plan = next(iter(plans._plans.values()))
    start = next(iter(plan._launches.values()))
    given = inspect.getclosurevars(start).nonlocals["template"]
    before = list(given)
    product(torch.zeros_like(x))
    assert given == before, "a launch wrote into what all launches share"


# ---- the stand-in refuses


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def copying():
    """A compiled kernel, and what the driver's C function is given between grid and arguments."""
    x, y = torch.zeros(128), torch.zeros(128)
    compiled = _copy_kernel[(1,)](x, y, 128, enable_fp_fusion=True)
    return compiled, (x, y, 128)


@pytest.mark.parametrize("grid", [(1, 70000, 1), (1, 1, 65536)])
def test_a_grid_too_large_is_refused(grid):
    x = torch.zeros(128)
    with pytest.raises(RuntimeError, match=r"launch: gridDim\[\d\] must be 1 to 65535; got"):
        _copy_kernel[grid](x, x, 128, enable_fp_fusion=True)


@pytest.mark.parametrize(
    ("shared", "says"),
    [(50000, "may use 49152 bytes of shared memory; asked for 50000")],
)
def test_too_much_shared_memory_is_refused(shared, says):
    compiled, arguments = copying()
    told = (compiled.metadata.num_warps, 1, shared)
    with pytest.raises(RuntimeError, match=says):
        compiled.run(1, 1, 1, 0, compiled.function, told, None, None, None, *arguments)


def test_too_many_threads_are_refused():
    compiled, arguments = copying()
    told = (compiled.metadata.num_warps * 2, 1, 0)
    with pytest.raises(RuntimeError, match="takes 1 to 128 threads a block; got 256 x 1 x 1"):
        compiled.run(1, 1, 1, 0, compiled.function, told, None, None, None, *arguments)


GOOD_MAP = {
    "address": 0x1000,
    "swizzle": 3,
    "element": 2,
    "type": 9,
    "box": [64, 64],
    "shape": [300, 256],
    "strides": [256, 1],
}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"address": 0x1008}, "globalAddress must be aligned to 16 bytes"),
        ({"shape": [300, 0]}, r"globalDim\[0\] must be 1 to 2\*\*32; got 0"),
        ({"strides": [250, 1]}, r"globalStrides\[0\] must be a multiple of 16"),
        ({"strides": [128, 1]}, r"globalStrides\[0\] must be at least 512 bytes; got 256"),
        ({"box": [512, 64]}, r"boxDim\[1\] must be 1 to 256; got 512"),
        ({"box": [64, 128]}, r"boxDim\[0\] must fit the swizzle of 128 bytes; got 256"),
        ({"box": [64, 4]}, r"boxDim\[0\] must be a multiple of 16 bytes; got 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_tensor_map_is_refused(wrong, says):
    utils = standin.DRIVER.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor

    def made(address, swizzle, element, type, box, shape, strides):
        return fill(address, swizzle, element, type, box, shape, strides, 0)

    made(**GOOD_MAP)
    with pytest.raises(RuntimeError, match=f"tensor map: {says}"):
        made(**GOOD_MAP | wrong)


def test_a_launcher_without_its_check_would_be_refused(monkeypatch):
    """The net holds: with the wrong answer of `tma_fits` the driver is handed what it refuses."""
    for check in ("tma_fits", "has_aligned_rows"):
        monkeypatch.setattr(bsr_spmm, check, lambda *_: True)
    x = torch.zeros(300, 260, dtype=BF16)[:, :256]
    monkeypatch.setattr(TensorDescriptor, "__post_init__", lambda _: None)
    with pytest.raises(RuntimeError, match=r"globalStrides\[0\] must be a multiple of 16"):
        forward(x)(x)
