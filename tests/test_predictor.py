"""One predictor: what `profile` says of a layer's time is what `plan` said, to the last bit."""

import pytest
import torch
from planning_models import Mixed
from test_planning_step import Aside, Convolutions, frozen_mlp, mlp
from torch import nn

import sparsekern as sk
from sparsekern.ops.crossover import DENSE_ABOVE, operand_kind

PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "high"),
}
MODELS = {
    "linear, first without dx": (mlp, (8, 784)),
    "frozen": (frozen_mlp, (8, 784)),
    "conv, called twice, grouped, 1-D": (Convolutions, (2, 3, 15, 15)),
    "1x1": (lambda: nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 32, 1)), (2, 64, 7, 7)),
    "no gradient comes back": (Aside, (8, 64)),
    "recurrent, stacked": (
        lambda: nn.Sequential(nn.LSTM(48, 32, 2, bidirectional=True)),
        (3, 2, 48),
    ),
    "batch first, and a cell": (Mixed, (4, 3, 15, 15)),
    "a projection": (lambda: nn.Sequential(nn.LSTM(48, 64, proj_size=32)), (3, 2, 48)),
}


@pytest.fixture(params=PRECISIONS)
def dtype(request):
    found, precision = PRECISIONS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield found
    torch.set_float32_matmul_precision(before)


def on_meta(make, dtype, shape, grad):
    with torch.device("meta"):
        return make().to(dtype), torch.empty(shape, dtype=dtype).requires_grad_(grad)


def planned_and_profiled(make, shape, dtype, device, grad=False, **options):
    """Seconds by layer: planned dense and sparse, profiled dense and sparse."""
    if device == "cuda":
        pytest.importorskip("triton")  # without it nothing runs sparse on a GPU
    model, x = on_meta(make, dtype, shape, grad)
    options = {"sparsity": 0.9, "blocks": (1, 16), "filter_fn": lambda *_: True} | options
    plan = sk.plan(model, x, device=device, **options)
    dense = sk.profile(model, x, device=device).seconds
    sk.sparsify_(model, **plan.arguments)
    sparse = sk.profile(model, x, device=device).seconds
    called = [row for row in plan.rows if row.seconds is not None]
    return (
        {row.name: row.dense_seconds for row in called},
        {row.name: row.seconds for row in called},
        {row.name: dense[row.name] for row in called},
        {row.name: sparse[row.name] for row in called},
        plan,
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", MODELS)
def test_a_profile_predicts_what_the_plan_did(name, device, dtype):
    # an input with a gradient too, once for each model and device
    found = planned_and_profiled(*MODELS[name], dtype, device, grad=dtype is torch.float16)
    planned_dense, planned, dense, sparse, _ = found
    assert dense == planned_dense
    assert sparse == planned


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("block", [1, 16, (16, 32), 64, 8])
def test_on_both_sides_of_the_crossover(block, sparsity, dtype):
    """Those that a GPU computes densely too: blocks without kernels, and high densities."""

    def wide():
        return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(2)))

    found = planned_and_profiled(
        wide, (4096, 512), dtype, "cuda", blocks=(block,), sparsity=sparsity, distribution="uniform"
    )
    planned_dense, planned, dense, sparse, plan = found
    assert (dense, sparse) == (planned_dense, planned)
    smaller = min(block) if isinstance(block, tuple) else block
    limit = DENSE_ABOVE[operand_kind(dtype)].get(smaller, 0.0)
    for row in plan.rows:
        if row.block is not None:
            assert (planned[row.name] == planned_dense[row.name]) == (1 - sparsity > limit), row


@pytest.mark.parametrize("sparsity", [0.9, 0.995])
@pytest.mark.parametrize("block", [1, 16])
def test_unstructured_convolutions_are_dense_on_a_gpu(block, sparsity, dtype):
    """Whatever their density; in time, in what a profile says runs, and in FLOPs."""

    def wide():
        return nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv1d(64, 64, 3, bias=False))

    class Flat(nn.Sequential):
        def forward(self, x):
            return self[0][1](self[0][0](x).flatten(2))

    def flat():
        return Flat(wide())

    shape, options = (4, 64, 9, 9), {"blocks": (block,), "distribution": "uniform"}
    *found, _ = planned_and_profiled(flat, shape, dtype, "cuda", sparsity=sparsity, **options)
    planned_dense, planned, dense, sparse = found
    assert (dense, sparse) == (planned_dense, planned)
    assert set(planned) == {"0.0", "0.1"}
    for name, seconds in planned.items():
        assert (seconds == planned_dense[name]) == (block == 1)
    model, x = on_meta(flat, dtype, shape, grad=False)
    sk.sparsify_(model, sparsity, block=block, distribution="uniform", filter_fn=lambda *_: True)
    for row in sk.profile(model, x, device="cuda").layers:
        assert row.impl == ("dense" if block == 1 else "triton")
        assert (row.forward_flops == row.forward_flops_dense) == (block == 1)


def test_strict_float32_takes_eight_times_as_long():
    """50 TFLOP/s against 400: once `profile` took float32 as tf32 whatever torch was told."""

    def times(precision):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
                x = torch.empty(8192, 4096, requires_grad=True)
            planned = sk.plan(model, x, device="cuda", sparsity=0.9).rows[0].dense_seconds
            assert sk.profile(model, x, device="cuda").seconds == {"0": planned}
            return planned
        finally:
            torch.set_float32_matmul_precision(before)

    assert times("highest") == 8 * times("high")


def test_the_newer_setting_of_precision_counts_and_does_not_raise():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, kind in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert operand_kind(torch.float32) == kind
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_operand_kinds_are_those_of_the_kernels(dtype, precision):
    pytest.importorskip("triton")
    from sparsekern.kernels.launch import compute_kind

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert operand_kind(dtype) == compute_kind(dtype)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("impl", ["dense", "masked"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_that_computes_densely_takes_as_long_as_dense(impl, device):
    model = mlp()
    x = torch.ones(8, 784)
    dense = sk.profile(model, x, device=device, measure=False).seconds
    sk.sparsify_(model, 0.9, impl=impl)
    assert sk.profile(model, x, device=device, measure=False).seconds == dense


def test_other_convolutions_are_predicted_dense():
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 6, 3, groups=6))
    seconds = sk.profile(model, torch.ones(2, 8, 5, 5), measure=False).seconds
    assert set(seconds) == {"0", "1"}
    assert all(value > 0 for value in seconds.values())


def test_nothing_is_predicted_of_what_is_not_known():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double())
    x = torch.ones(2, 4).double()
    assert sk.profile(model, x, device="cuda", measure=False).seconds == {}
    assert set(sk.profile(model, x, measure=False).seconds) == {"0"}
    empty = sk.profile(model, torch.ones(0, 4).double(), measure=False)
    assert empty.seconds == {}


def test_threads_may_assume_different_devices():
    """The assumed device was once a global of the module."""
    from concurrent.futures import ThreadPoolExecutor

    pytest.importorskip("triton")
    with torch.device("meta"):
        model = sk.sparsify_(mlp(), 0.99, block=1)
        x = torch.empty(8, 784)
    devices = ["cpu", "cuda"] * 8

    def impls(device):
        return {r.impl for r in sk.profile(model, x, device=device).layers if r.block}

    want = {device: impls(device) for device in ("cpu", "cuda")}
    assert want["cpu"] == {"cpu"}
    assert "cpu" not in want["cuda"]
    with ThreadPoolExecutor(4) as pool:
        for device, found in zip(devices, pool.map(impls, devices), strict=True):
            assert found == want[device]


class Packs(nn.Module):
    """Asks its input for values, so that a copy is run to count it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(32, 32)

    def forward(self, x):
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, [3, 1]))[1]


def test_a_copy_that_is_run_here_is_counted_as_elsewhere():
    """It once tried to launch GPU kernels on tensors of the CPU."""
    pytest.importorskip("triton")
    model = sk.sparsify_(nn.Sequential(Packs()), 0.99, block=1)
    x = torch.ones(3, 2, 32)
    (cpu, *_), (cuda, *_) = (
        sk.profile(model, x, device=device, measure=False).layers for device in ("cpu", "cuda")
    )
    assert (cpu.impl, cuda.impl) == ("cpu", "triton")
    assert cpu.forward_flops == cuda.forward_flops < cuda.forward_flops_dense
    dense = sk.sparsify_(nn.Sequential(Packs()), 0.5, block=1)
    (row, *_) = sk.profile(dense, x, device="cuda", measure=False).layers
    assert row.impl == "dense"
    assert row.forward_flops == row.forward_flops_dense
