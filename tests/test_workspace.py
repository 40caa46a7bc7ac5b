"""Workspace formulas: what an operator really asks torch's allocator for, beside its results."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekern import SparseConv2d, SparseLinear
from sparsekern.cost.memory import peak_bytes
from sparsekern.ops.cpu import choice
from sparsekern.ops.workspace import workspace_bytes


class Calls(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparsekern":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def calls(layer, x, input_gradient=True):
    """Calls of a forward and backward."""
    x.requires_grad_(input_gradient)
    with Calls() as recorder:
        y = layer(x)
        y.backward(torch.ones_like(y))
    return recorder.made


def beside_results(func, args):
    """Most bytes that are held during a call, less what it returns."""
    kept = []
    with torch.no_grad():
        func(*args)  # compiles
        peak = peak_bytes(lambda: kept.append(func(*args)))
    return peak - sum(t.numel() * t.element_size() for t in tree_leaves(kept))


LINEAR = [(block, tokens) for block in (1, (4, 8), 16, 32, (64, 32)) for tokens in (1, 70, 300)]
CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": 2, "padding": (0, 1)},
    {"kernel_size": 3, "dilation": 2, "groups": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


numba = pytest.mark.skipif(not choice.has_numba(), reason="numba is not installed")


@numba
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("input_gradient", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize(("block", "tokens"), LINEAR)
def test_linear_products_with_numba_are_exact(block, tokens, input_gradient):
    layer = SparseLinear(128, 192, sparsity=0.5, block=block)
    made = calls(layer, torch.randn(tokens, 128), input_gradient)
    assert len(made) == 2
    for func, args in made:
        assert beside_results(func, args) == workspace_bytes(func, args), func


@numba
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 16, (8, 32)])
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolutions_with_numba_are_exact(geometry, block, layout):
    layer = SparseConv2d(64, 96, sparsity=0.5, block=block, **geometry)
    x = torch.randn(6, 64, 17, 15).contiguous(memory_format=layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for func, args in calls(layer, x):
            assert beside_results(func, args) == workspace_bytes(func, args), func
        torch.set_num_threads(2)  # which may, or may not, be at work at the same time
        for func, args in calls(layer, x):
            assert beside_results(func, args) <= workspace_bytes(func, args), func
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["blas", "csr"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: SparseLinear(128, 192, sparsity=0.5, block=32),
        lambda: SparseConv2d(64, 96, 3, padding=1, sparsity=0.5, block=32),
        lambda: SparseConv2d(64, 96, 3, stride=2, sparsity=0.5, block=(32, 64)),
    ],
    ids=["linear", "conv", "strided"],
)
def test_without_numba_they_are_upper_bounds(name, layer):
    made = layer()
    x = torch.randn(300, 128) if isinstance(made, SparseLinear) else torch.randn(6, 64, 17, 15)
    with choice.force(name):
        for func, args in calls(made, x):
            assert beside_results(func, args) <= workspace_bytes(func, args), func


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_are_held_once_more_in_float32(dtype, block):
    layer = SparseLinear(128, 192, sparsity=0.5, block=block, dtype=dtype)
    for func, args in calls(layer, torch.randn(70, 128, dtype=dtype)):
        assert workspace_bytes(func, args) >= 4 * 70 * (128 + 192)
        assert beside_results(func, args) <= workspace_bytes(func, args)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SparseLinear(128, 192, sparsity=0.5, block=16, impl="dense"),
        lambda: SparseConv2d(64, 96, 3, sparsity=0.5, block=16, impl="dense"),
    ],
    ids=["linear", "conv"],
)
def test_the_dense_mode_holds_a_dense_weight(layer):
    made = layer()
    x = torch.randn(70, 128) if isinstance(made, SparseLinear) else torch.randn(6, 64, 17, 15)
    for func, args in calls(made, x):
        assert workspace_bytes(func, args) >= 4 * made.weight.shape.numel()


def test_operators_of_others_need_none():
    assert workspace_bytes(torch.ops.aten.mm.default, (torch.ones(2, 2), torch.ones(2, 2))) == 0
