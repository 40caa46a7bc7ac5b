"""What a captured CUDA graph and an asynchronous GPU ask of the launchers, seen on the CPU.

Kernels are replaced by recorders, so what is left is what the host does: which grid it asks for,
which addresses it passes, and whether it looks at the contents of a tensor.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from sparsekern.ops import dispatch

pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="triton is not installed")

# operators that wait for the device, or whose result has a shape that depends on values
ASKS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim",
    "_unique2", "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.name, grid, args, kwargs))


class NoQuestions(TorchDispatchMode):
    """Fails when the host asks for the contents of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ASKS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    from sparsekern.kernels import bsr_sddmm, bsr_spmm, csr_sddmm, csr_spmm

    found = []
    for module in (bsr_sddmm, bsr_spmm, csr_sddmm, csr_spmm):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, found))
    return found


def trained_step(layer, x):
    layer.zero_grad(set_to_none=True)
    layer(x).backward(torch.ones(*x.shape[:-1], layer.out_features))


def seen(layer, calls):
    """What a graph would have frozen: names, grids, numbers and the layer's own addresses."""
    own = {t.data_ptr(): n for n, t in [*layer.named_buffers(), *layer.named_parameters()]}
    record = []
    for name, grid, args, kwargs in calls:
        tensors = [getattr(a, "base", a) for a in args]
        kept = [
            own.get(a.data_ptr(), "fresh") if isinstance(a, torch.Tensor) else a for a in tensors
        ]
        shapes = [getattr(a, "shape", None) for a in args]
        record.append((name, grid, kept, shapes, kwargs))
    calls.clear()
    return record


@pytest.mark.parametrize(
    ("block", "dtype", "kernel"),
    [
        (64, torch.float16, "_bsr_spmm_tma_kernel"),
        (16, torch.float32, "_bsr_spmm_kernel"),
        (1, torch.float32, "_csr_spmm_kernel"),
    ],
)
def test_a_captured_graph_survives_topology_updates(block, dtype, kernel, calls):
    layer = sk.SparseLinear(256, 128, sparsity=0.5, block=block, impl="triton", dtype=dtype)
    assert layer.topology.validate()
    x = torch.zeros(256, 256, dtype=dtype, requires_grad=True)
    trained_step(layer, x)
    before, old = seen(layer, calls), layer.topology.digest()
    assert before[0][0] == kernel
    named = {a for _, _, kept, _, _ in before for a in kept if isinstance(a, str)}
    unused = {"dense_mask", "fresh"}
    assert {n for n, _ in [*layer.named_buffers(), *layer.named_parameters()]} <= named | unused
    new = sk.Topology.random((128, 256), block, nnzb=layer.topology.nnzb)
    layer.rewire_(new, torch.full((new.nnzb,), -1), [layer.values])
    assert layer.topology.digest() != old
    trained_step(layer, x)
    assert seen(layer, calls) == before


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("cols", [256, 250])
def test_forward_and_backward_ask_the_device_nothing(block, cols, calls):
    layer = sk.SparseLinear(cols, 128, sparsity=0.5, block=block, impl="triton")
    x = torch.zeros(3, 40, cols, requires_grad=True)
    with NoQuestions():
        trained_step(layer, x)
    assert len(calls) == 3


def test_the_question_detector_can_fail():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoQuestions():
        float(torch.zeros(1))
