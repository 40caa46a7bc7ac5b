"""`bsr_spmm_resident` without the GPU it has never run on: compiled for sm_90, and emulated.

Compiled, the machine code is looked at: wgmma of the right shape that stays asynchronous, nothing
spilled, shared memory within the limit, no global atomics, a thread barrier between the last
product that read a slot and the copy that refills it.

Emulated, the kernel's own source runs in numpy on a memory that shows missing waits: copies arrive
no sooner than they're waited for, slots are poisoned when a copy into them starts, and products
read their operands both when they're issued and when they're retired.
"""

import math
import os
import re
import types

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="no Gluon")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "kernels are interpreted in this process: run `pytest tests/aot` by itself",
        allow_module_level=True,
    )

from aot import gluon_build
from aot.emulated import Descriptor, Num, Pointer, Shared, sparse
from support import integers

from sparsekern.kernels import bsr_spmm_resident as module

KERNEL = module._bsr_spmm_resident_kernel

# block, columns held, transposed; the last two fill shared memory
SHAPES = [
    *(((e, e), 1024, trans) for e in (16, 32, 64) for trans in (False, True)),
    ((8, 64), 1024, False),
    *(((e, 64), 768, trans) for e in (16, 32) for trans in (False, True)),
    ((16, 16), 1536, True),
    ((32, 32), 1536, False),
]


def edges(block, trans):
    """The block's edges along the sum and along the output."""
    return block if trans else block[::-1]


def build(block, K, trans, dtype):
    """What the compiler makes of it."""
    config = module.resident_config(block, K)
    reduce, out = edges(block, trans)

    def descriptor(rows, columns):
        return f"tensordesc<{dtype}[{rows},{columns}],{module.shared_layout(columns)!r}>"

    constants = {"sb": 1, "SLICES": K // reduce, "IN": reduce, "OUT": out, "TRANS": trans}
    constants |= {"G": config.G, "STAGES": config.STAGES, "HAS_BIAS": not trans}
    known = {
        "x_desc": descriptor(module.TOKENS, reduce),
        "w_desc": descriptor(block[0] if trans else config.G * block[0], block[1]),
        **dict.fromkeys(("start_ptr", "index_ptr", "perm_ptr"), "*i32"),
        **dict.fromkeys(("bias_ptr", "y_ptr"), f"*{dtype}"),
    }
    return gluon_build.build(KERNEL, known, constants, divided=("N",))


def events(ptx):
    """In order: w(ait that leaves a product in flight), b(arrier), c(opy), p(roduct)."""
    kinds = {
        "wgmma.wait_group.sync.aligned 1": "w",
        "bar.sync": "b",
        "cp.async.bulk.tensor": "c",
        "wgmma.mma_async": "p",
    }
    found = re.findall("|".join(re.escape(k) for k in kinds), ptx)
    return "".join(kinds[f] for f in found)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("block", "K", "trans"), SHAPES)
def test_compiles(block, K, trans, dtype, request):
    if dtype == "fp16" and block != (16, 16):
        pytest.skip("one block stands for fp16")
    reduce, out = edges(block, trans)
    found = build(block, K, trans, dtype)
    ptx, sass, shared = found.ptx, found.sass, found.shared
    request.node.user_properties += [("registers", found.registers), ("shared", shared)]
    gluon_build.check(found)
    size = module.WALKERS * math.prod(module.resident_config(block, K)) * math.prod(block) * 2
    assert 0 < shared - size - module.TOKENS * K * 2 <= module._SHARED_EXTRA

    shape = {"bf16": "f32.bf16.bf16", "fp16": "f32.f16.f16"}[dtype]
    assert found.products == [f"m64n{out}k16.{shape}"] * (module.WALKERS * reduce // 16)
    # had ptxas serialised them, it would wait for all of them at once, after each
    assert len(re.findall(r"HGMMA.*gsb0", sass)) == module.WALKERS
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", sass)) == module.WALKERS
    # by each walker: products, the wait, a barrier, and only then the copy
    assert len(re.findall(r"p+wb+(?:cb*)+", events(ptx))) == module.WALKERS


def test_what_fits():
    half = torch.bfloat16
    fits = module.resident_fits
    assert fits("sm90", half, (16, 16), 1536, False)
    assert fits("sm90", torch.float16, (8, 64), 1024, False)
    assert not fits("sm90", half, (8, 64), 1024, True)  # sums of 8 are too short for wgmma
    assert not fits("sm90", half, (16, 16), 1792, False)
    assert not fits("sm90", half, (64, 64), 1536, False)
    assert not fits("sm90", half, (64, 64), 96, False)
    assert not fits("sm90", half, (128, 128), 1024, False)
    assert not fits("sm90", torch.float32, (16, 16), 1024, False)
    assert not fits("sm100", half, (16, 16), 1024, False)
    x, index = torch.zeros(4, 16), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="not held"):
        module.bsr_spmm_resident(x, torch.zeros(1, 16, 16), index, index, None, 16)


class Machine:
    """What the kernel calls. One walker after another, each with its own copies and products."""

    def __init__(self, programs, *, barriers=True):
        self.program, self.barriers, self.memory = programs, barriers, []
        self.in_flight, self.unseen, self.waited = [], [], []
        self.gl = types.SimpleNamespace(
            program_id=lambda axis: self.program[axis],
            arange=lambda lo, hi, _layout: np.arange(lo, hi).view(Num),
            zeros=lambda shape, _dtype, _layout: np.zeros(shape, np.float32).view(Num),
            load=lambda pointer, mask=True, other=None: pointer.load(mask, other),
            store=lambda pointer, values, mask: pointer.store(values, mask),
            NVMMADistributedLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            minimum=min,
            static_range=range,
            int64="int64",
            float32="float32",
        )
        self.mbarrier = types.SimpleNamespace(
            init=self.init, expect=self.expect, wait=self.wait, MBarrierLayout=lambda: None
        )

    def names(self):
        return {
            "gl": self.gl,
            "mbarrier": self.mbarrier,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.retire,
            "fence_async_shared": lambda: None,
            "_barrier": self.barrier,
            "_copy": self.copy,
            "_view": lambda memory, _dtype, shape, _layout: Shared(memory.array.reshape(shape)),
        }

    def allocate(self, dtype, shape, _layout):
        empty = np.empty(shape, object) if dtype == "int64" else np.full(shape, np.nan, np.float32)
        self.memory.append(empty)
        return Shared(empty)

    def warp_specialize(self, partitions, warps, _registers):
        assert len(partitions) == len(warps) + 1
        for function, arguments in partitions:
            function(*arguments)
            assert not self.in_flight
            self.barrier()

    def init(self, ready, count):
        assert (count, ready.shape) == (1, (1,))
        ready.array[0] = types.SimpleNamespace(phase=0, expected=None, copies=[])

    def expect(self, ready, size, live=True):
        if live:
            state = ready.array[0]
            assert state.expected is None, "two arrivals in a phase"
            assert not any(state is w for w in self.waited), "a thread may still wait"
            state.expected = size

    def copy(self, descriptor, place, ready, memory, live=True):
        if live:
            for operand in (*self.in_flight, *self.unseen):
                assert not np.shares_memory(operand[0], memory.array), "overwritten while read"
            memory.array[...] = np.nan
            ready.array[0].copies.append((memory.array, descriptor.box(*place)))

    def wait(self, ready, parity):
        state = ready.array[0]
        self.waited.append(state)
        if state.phase & 1 == parity:
            assert state.expected == sum(2 * data.size for _, data in state.copies), "hangs"
            for memory, data in state.copies:
                memory[...] = data
            state.phase, state.expected, state.copies = state.phase + 1, None, []

    def product(self, a, b, acc, is_async):
        assert is_async
        value = a.array.astype(np.float32) @ b.array
        assert not np.isnan(value).any(), "read before it arrived"
        self.in_flight.append((b.array, a.array, value))
        return acc + value

    def retire(self, left, deps):
        while len(self.in_flight) > left:
            b, a, value = self.in_flight.pop(0)
            assert np.array_equal(a @ b, value), "overwritten while read"
            self.unseen.append((b,))
        return deps[0]

    def barrier(self):
        if self.barriers:
            self.unseen, self.waited = [], []

    def check_left(self):
        for memory in self.memory:
            for state in memory.flat if memory.dtype == object else ():
                assert state.expected is None, "a copy outlives its program"


class Emulated:
    """Takes the kernel's place under the launcher."""

    def __init__(self, **machine):
        self.machine, self.programs = machine, 0

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launch(grid, args, constants)

    def launch(self, grid, args, constants):
        assert (constants.pop("num_warps"), constants.pop("enable_fp_fusion")) == (4, True)
        args = [
            Pointer(a)
            if isinstance(a, torch.Tensor)
            else Descriptor(a)
            if isinstance(a, module.TensorDescriptor)
            else a
            for a in args
        ]
        args[KERNEL.arg_names.index("y_ptr")].tensor.fill_(torch.nan)
        for programs in np.ndindex(*grid):
            machine = Machine(programs, **self.machine)
            namespace = vars(module) | machine.names()
            for name in ("_fetch", "_walk"):
                code = getattr(module, name).fn.__code__
                namespace[name] = types.FunctionType(code, namespace)
            types.FunctionType(KERNEL.fn.__code__, namespace)(*args, **constants)
            machine.check_left()
            self.programs += 1


@pytest.mark.parametrize("ring", [64, 16], ids=["deep", "shallow"])
@pytest.mark.parametrize("trans", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (16, 64), (64, 16), (8, 64)])
def test_emulated(block, trans, ring, monkeypatch):
    if block == (8, 64) and trans:
        pytest.skip("no such product")
    reduce, out = edges(block, trans)
    size = module.WALKERS * max(module._CHUNK_BYTES, 2 * math.prod(block))
    ring_kb = max(ring, 2 * size // 1024)
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    kernel = Emulated()
    monkeypatch.setattr(module, "_bsr_spmm_resident_kernel", kernel)
    rows, columns, tokens = (8, 39, 70) if trans else (39, 8, 70)
    values, (crow, ccol), col, row, perm, w = sparse(block, rows, columns, 0.6, torch.bfloat16)
    x = integers(tokens, (rows if trans else columns) * reduce, dtype=torch.bfloat16)
    n_out = 39 * out - 3
    if trans:
        got = module.bsr_spmm_t_resident(x, values, ccol, row, perm, n_out, ring_kb=ring_kb)
        exact = x.float() @ w.float()[:, :n_out]
    else:
        bias = integers(2 * n_out, dtype=torch.bfloat16)[::2]
        got = module.bsr_spmm_resident(x, values, crow, col, bias, n_out, ring_kb=ring_kb)
        exact = x.float() @ w.float()[:n_out].T + bias.float()
    assert torch.equal(got, exact.to(torch.bfloat16))
    assert kernel.programs == 4  # two token tiles, each shared by two programs


def test_emulated_odd_inputs(monkeypatch):
    kernel = Emulated()
    monkeypatch.setattr(module, "_bsr_spmm_resident_kernel", kernel)
    values, (crow, _), col, _, _, w = sparse((16, 16), 9, 4, 0.5, torch.float16)
    wide = integers(130, 80, dtype=torch.float16)
    for x in (wide[:, 3:67], wide.t()[:64].t()[:64], wide[::2, 8:72], wide[:1, :64]):
        got = module.bsr_spmm_resident(x, values, crow, col, None, 144)
        assert torch.equal(got, (x.float() @ w.float().T).half())
    ran = kernel.programs
    bias, x = integers(144, dtype=torch.float16), wide[:, :64]
    empty = module.bsr_spmm_resident(x, values[:0], crow * 0, col[:0], bias, 144)
    assert torch.equal(empty, bias.expand(130, 144))
    assert module.bsr_spmm_resident(x[:0], values, crow, col, bias, 144).shape == (0, 144)
    assert kernel.programs == ran


def test_the_emulation_can_fail(monkeypatch):
    values, (crow, _), col, _, _, _ = sparse((16, 16), 40, 4, 0.8, torch.float16)
    call = (integers(64, 64, dtype=torch.float16), values, crow, col, None, 640)
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    monkeypatch.setattr(module, "_bsr_spmm_resident_kernel", Emulated(barriers=False))
    with pytest.raises(AssertionError, match=r"overwritten|may still wait"):
        module.bsr_spmm_resident(*call, ring_kb=32)
    monkeypatch.setattr(module, "_bsr_spmm_resident_kernel", Emulated())
    monkeypatch.setattr(Machine, "wait", lambda *_: None)
    with pytest.raises(AssertionError, match="before it arrived"):
        module.bsr_spmm_resident(*call, ring_kb=32)
