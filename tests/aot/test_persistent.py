"""`bsr_spmm_persistent` without the GPU it has never run on: dealt, emulated, and compiled.

Dealt: every tile once, and evenly. Emulated: the kernel's own source in numpy, its warp groups in
random orders (`warps`). Compiled for sm_90: wgmma of the right shape that stays asynchronous,
nothing spilled, no more registers than a warp group has, shared memory within the limit, no global
atomics.
"""

import itertools
import os
import types

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="no Gluon")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "kernels are interpreted in this process: run `pytest tests/aot` by itself",
        allow_module_level=True,
    )

from aot import gluon_build
from aot.emulated import sparse
from aot.warps import Emulated
from support import integers

from sparsekern.kernels import bsr_spmm_persistent as module
from sparsekern.kernels.dealing import Deal, deal, shares, usual_lengths

KERNEL = module._bsr_spmm_persistent_kernel
HELPERS = ("_place", "_count", "_tile", "_produce", "_consume")
EVERY = os.environ.get("SPARSEKERN_AOT") == "all"
BLOCKS = [(64, 64), (128, 128), (16, 16), (32, 32), (16, 128), (128, 16), (64, 32)]


# ---- dealt


def walked(how, T, R, programs):
    """(rank, token tile) of every program, by the kernel's own functions."""
    for program in range(programs):
        gl = types.SimpleNamespace(
            program_id=lambda _axis, program=program: program,
            num_programs=lambda _axis: programs,
            where=lambda c, a, b: a if c else b,
            minimum=min,
        )
        names = vars(module) | {"gl": gl}
        for name in HELPERS[:3]:
            names[name] = types.FunctionType(getattr(module, name).fn.__code__, names)
        sizes = T, R, how.group, int(how.back)
        count = names["_count"](sizes)
        yield [names["_tile"](turn, count, sizes) for turn in range(count)]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("T", "R", "programs"), [(1, 1, 1), (5, 7, 4), (3, 8, 24), (32, 32, 132), (7, 20, 132)]
)
def test_every_tile_once_and_as_heavy_as_planned(T, R, programs, back):
    lengths = usual_lengths(R, 40, 4 * R)
    for group in (1, 2, 3, 8, 16):
        how = Deal(group, back)
        tiles = list(walked(how, T, R, programs))
        assert sorted(itertools.chain(*tiles)) == list(itertools.product(range(R), range(T)))
        work = [sum(lengths[rank] + 1.5 for rank, _ in mine) for mine in tiles]
        torch.testing.assert_close(
            torch.tensor(work, dtype=torch.float64), shares(how, lengths, T, programs)
        )


def test_the_first_and_the_last_group_start_as_they_should():
    (tiles,) = walked(Deal(2, False), 5, 3, 1)
    assert [rank for rank, _ in tiles[-3:]] == [0, 1, 2]
    assert [rank for rank, _ in tiles[:6]] == [0, 0, 1, 1, 2, 2]
    assert [rank for rank, _ in tiles[6:12]] == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(("edge", "most"), [(128, 1.12), (64, 1.03), (32, 1.02), (16, 1.01)])
def test_the_deal_of_a_layer_is_even(edge, most):
    blocks = 4096 // edge
    how = deal(blocks, blocks, blocks**2 // 10, 32, 132, 256 * 4096 * 2)
    work = shares(how, usual_lengths(blocks, blocks, blocks**2 // 10), 32, 132)
    assert float(work.max() / work.mean()) <= most


def test_usual_lengths():
    lengths = usual_lengths(64, 64, 410)
    assert list(lengths) == sorted(lengths, reverse=True)
    assert sum(lengths) == pytest.approx(410, rel=1e-6)
    assert usual_lengths(4, 8, 32) == (8.0,) * 4
    assert usual_lengths(4, 8, 0) == (0.0,) * 4


# ---- emulated


def product(kernel, block, *, trans, tokens=300, dtype=torch.bfloat16, relu=False, stages=8):
    """(what the kernel gives, what it must)."""
    reduce, out = block if trans else block[::-1]
    rows, columns = (4, 7) if trans else (7, 4)
    values, (crow, ccol), col, row, perm, w = sparse(block, rows, columns, 0.6, dtype)
    x = integers(tokens, 4 * reduce, dtype=dtype)
    n_out = 7 * out - 8
    start, index, slots = (ccol, row, perm) if trans else (crow, col, col)
    order = (start[1:] - start[:-1]).argsort(descending=True, stable=True).int()
    bias = None if trans else integers(2 * n_out, dtype=dtype)[::2]
    y = torch.full((tokens, n_out), torch.nan, dtype=dtype)
    options = {"IN": reduce, "OUT": out, "TRANS": trans, "HAS_BIAS": not trans, "RELU": relu}
    tensors = x, values, start, index, slots, order, x if bias is None else bias, y
    module.launch_persistent(kernel, tensors, options, stages, 0 if bias is None else 2)
    exact = x.float() @ (w.float() if trans else w.float().T)[:, :n_out]
    exact = exact if bias is None else exact + bias.float()
    return y, (exact.relu() if relu else exact).to(dtype)


@pytest.mark.parametrize("trans", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_emulated(block, trans, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 4)
    for seed in range(2):
        kernel = Emulated(module, KERNEL, HELPERS, seed)
        got, exact = product(kernel, block, trans=trans)
        assert torch.equal(got, exact)
        assert kernel.programs == 4


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("tokens", [1, 128, 129, 513])
def test_emulated_rings_and_edges(stages, tokens, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 3)
    kernel = Emulated(module, KERNEL, HELPERS, tokens)
    got, exact = product(
        kernel, (16, 32), trans=False, tokens=tokens, dtype=torch.float16, relu=True, stages=stages
    )
    assert torch.equal(got, exact)


def test_a_ring_of_one_step_hangs_so_there_is_none(monkeypatch):
    kernel = Emulated(module, KERNEL, HELPERS)
    got, exact = product(kernel, (16, 16), trans=False, stages=1)
    assert torch.equal(got, exact)
    monkeypatch.setattr(module, "LEAST_STAGES", 1)
    with pytest.raises(AssertionError, match="hangs"):
        product(kernel, (16, 16), trans=False, stages=1)


@pytest.mark.parametrize(
    ("fault", "says"),
    [("barrier", "other warps|before it's written"), ("fence", "before it's written")],
)
def test_the_emulation_can_fail(fault, says, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 2)
    with pytest.raises(AssertionError, match=says):
        product(Emulated(module, KERNEL, HELPERS, 0, (fault,)), (16, 16), trans=False)


def test_the_emulation_sees_a_wrong_phase(monkeypatch):
    from aot import warps

    monkeypatch.setattr(module, "PROGRAMS", 2)
    wait = warps.Machine.wait
    for wrong in (lambda *_: None, lambda self, ready, parity: wait(self, ready, 1 - parity)):
        monkeypatch.setattr(warps.Machine, "wait", wrong)
        with pytest.raises(AssertionError, match="hangs|phase|arriv|overwritten"):
            product(Emulated(module, KERNEL, HELPERS, 0), (16, 16), trans=False, stages=2)


# ---- compiled


def built(block, trans, dtype="bf16"):
    """What the compiler makes of it."""
    reduce, out = block if trans else block[::-1]
    BK = min(reduce, module.STEP)

    def described(rows, columns):
        return f"tensordesc<{dtype}[{rows},{columns}],{module.shared_layout(columns)!r}>"

    constants = {"sb": 1, "IN": reduce, "OUT": out, "BK": BK, "TRANS": trans}
    constants |= {"STAGES": module.persistent_stages(reduce, out)}
    constants |= {"HAS_BIAS": not trans, "RELU": not trans}
    types_ = {
        "x_desc": described(128, BK),
        "w_desc": described(*((BK, out) if trans else (out, BK))),
        "y_desc": described(128, out),
        **dict.fromkeys(("start_ptr", "index_ptr", "perm_ptr", "order_ptr"), "*i32"),
        "bias_ptr": f"*{dtype}",
    }
    return gluon_build.build(KERNEL, types_, constants)


@pytest.mark.parametrize("trans", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("block", BLOCKS if EVERY else BLOCKS[:4], ids=str)
def test_compiles(block, trans, request):
    reduce, out = block if trans else block[::-1]
    found = built(block, trans)
    request.node.user_properties += [("registers", found.registers), ("shared", found.shared)]
    gluon_build.check(found)
    BK = min(reduce, module.STEP)
    stages = module.persistent_stages(reduce, out)
    ring = stages * (module.TOKENS + out) * BK * 2 + module.TOKENS * out * 2
    assert stages >= 3
    assert 0 < found.shared - ring <= module._SHARED_EXTRA
    # of each consumer two products of 64 tokens for 16 of the sum each; one wait that leaves the
    # last in flight, one at the end of a tile
    shape = f"m64n{out}k16.f32.bf16.bf16"
    assert found.products == [shape] * (2 * 2 * BK // 16)
    assert sorted(found.waits) == [0, 0, 1, 1]
    # a step of each consumer: products, the wait, a barrier, and only then the arrival
    assert len(gluon_build.steps(found.ptx, "p+wb+a")) == 2
    assert found.most_registers(holding="UTMALDG") <= 24
    assert found.most_registers(holding="HGMMA") <= 240


def test_fp16_compiles():
    found = built((64, 64), False, "fp16")
    gluon_build.check(found)
    assert set(found.products) == {"m64n64k16.f32.f16.f16"}


def test_what_fits():
    fits, half = module.persistent_fits, torch.bfloat16
    assert fits("sm90", half, (64, 64))
    assert fits("sm90", torch.float16, (16, 128))
    assert not fits("sm90", torch.float32, (64, 64))
    assert not fits("sm100", half, (64, 64))
    assert not fits("sm90", half, (8, 64))
