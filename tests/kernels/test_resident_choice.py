"""When `bsr_spmm` hands over to the kernel that holds activations in shared memory."""

import pytest
import torch
from kernel_cases import block_values, numbers, pattern

from sparsekern.kernels import bsr_spmm as module
from sparsekern.kernels import bsr_spmm_resident as resident
from sparsekern.kernels import tables

ENTRIES = {
    tables.Key(op, "half", "32", "any", "tma"): tables.RingConfig(48)
    for op in ("spmm_resident", "spmm_t_resident")
}


@pytest.fixture
def handed(monkeypatch):
    """Names of the resident launchers called, and their rings; nothing is launched."""
    calls = []
    for name in ("bsr_spmm_resident", "bsr_spmm_t_resident"):

        def stand_in(*args, ring_kb, name=name):
            calls.append((name, ring_kb))
            return torch.zeros(len(args[0]), args[-1])

        monkeypatch.setattr(resident, name, stand_in)
    real = module.is_interpreted
    monkeypatch.setattr(module, "is_interpreted", lambda kernel: bool(calls) and real(kernel))
    return calls


def product(dtype=torch.float16, cols=96, relu=False, trans=False):
    p = pattern(64, cols, (32, 32), "full")
    values = block_values(p, dtype, 1)
    if trans:
        dy = numbers((5, 64), dtype, 2)
        return module.bsr_spmm_t(dy, values, *p.transposed, cols)
    x = numbers((5, cols), dtype, 2)
    return module.bsr_spmm(x, values, *p.forward, None, 64, relu=relu)


@pytest.mark.parametrize("trans", [False, True])
def test_a_table_asks_for_it(trans, handed):
    with tables.overridden("sm90", ENTRIES):
        product(trans=trans)
    assert handed == [("bsr_spmm_t_resident" if trans else "bsr_spmm_resident", 48)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusals below then launch for real")
@pytest.mark.parametrize(
    "case",
    [{"dtype": torch.float32}, {"cols": 90}, {"cols": 3200}, {"relu": True}],
    ids=str,
)
def test_what_it_cannot_hold_goes_the_usual_way(case, handed, monkeypatch):
    monkeypatch.setattr(module, "_launch_pointer", lambda *args: handed.append("pointer"))
    monkeypatch.setattr(module, "_launch_tma", lambda *args: handed.append("tma"))
    with tables.overridden("sm90", ENTRIES):
        product(**case)
    assert handed in (["pointer"], ["tma"])


def test_no_shipped_table_asks_for_it():
    for arch in ("sm80", "sm90", "sm100"):
        assert not [key for key in tables.table(arch) if key.op in tables.OPTIONAL]
