"""The persistent product over the stand-in driver: when it's taken, what it's handed."""

import pytest

pytest.importorskip("launch.standin", exc_type=ImportError)  # before triton
pytest.importorskip("triton.experimental.gluon", reason="no Gluon")

import torch
from launch import cases, standin

from sparsekern.kernels import plans, tables

ENTRIES = {
    tables.Key(op, "half", edge, "any", "tma"): tables.PersistentConfig(8)
    for op in ("spmm_persistent", "spmm_t_persistent")
    for edge in ("16", "32", "64", "128")
}
PERSISTENT = "_bsr_spmm_persistent_kernel"


@pytest.fixture(autouse=True)
def _entries():
    plans.clear()
    with tables.overridden("sm90", ENTRIES):
        yield
    plans.clear()


def launched(call):
    """(result, what was launched)."""
    before = standin.launches()
    result = call.run()
    assert standin.launches() == before + 1
    return result, standin.last()


def products(case):
    calls = cases.linear_calls(case)
    return [calls[name] for name in ("spmm", "spmm_t")]


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (16, 16)])
def test_the_driver_takes_it_and_a_plan_hands_it_the_same(block):
    case = cases.Linear(block, M=1100, N=512, K=384)
    for call, columns in zip(products(case), (512, 384), strict=True):
        y, first = launched(call)
        assert first.kernel == PERSISTENT
        edge = block[0] if columns == 512 else block[1]
        # 5 tiles of 256 tokens for each block row, on as many programs as there are processors
        assert first.grid == (min(132, 5 * columns // edge), 1, 1)
        assert first.block == (384, 1, 1)
        assert y.shape == (1100, columns)
        _, second = launched(call)
        maps = [[p[8:] for p in launch.parameters if len(p) == 128] for launch in (first, second)]
        assert len(maps[0]) == 3
        assert maps[0] == maps[1]
        sizes = [[p for p in launch.parameters if len(p) == 4] for launch in (first, second)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "case",
    [
        cases.Linear((64, 64), torch.float32),
        cases.Linear((64, 64), layout="shifted"),
        cases.Linear((64, 64), layout="column"),
        cases.Linear((64, 64), N=259, K=263),
        cases.Linear((64, 64), nnzb=0),
    ],
    ids=str,
)
def test_what_tma_does_not_take_goes_the_usual_way(case):
    for call in products(case):
        assert launched(call)[1].kernel != PERSISTENT
