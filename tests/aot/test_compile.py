"""Every kernel at every configuration that its launcher uses, compiled for GPUs that are not here.

Checked in the machine code: tensor-core instructions where the operands are 16 bits wide, nothing
spilled, shared memory within the limit, no global atomics (so a result has one order of sums), and
16-byte asynchronous copies that feed the tensor cores.
"""

import importlib
import itertools
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "kernels are interpreted in this process: run `pytest tests/aot` by itself",
        allow_module_level=True,
    )

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern.kernels import launch
from sparsekern.kernels.bsr_sddmm import _bsr_sddmm_kernel
from sparsekern.kernels.bsr_spmm import _bsr_spmm_kernel
from sparsekern.kernels.csr_sddmm import _csr_sddmm_kernel
from sparsekern.kernels.csr_spmm import _csr_spmm_kernel

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# chips of the "sm80" class down to sm_86 and sm_120 have this much
SHARED_LIMIT_SMALL = 99 * 1024
ARCH = {80: "sm80", 90: "sm90", 100: "sm100"}
TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}

SQUARES = tuple((e, e) for e in launch.BLOCK_EDGES)
RECTANGLES = ((16, 128), (128, 16), (64, 32))
KINDS = {"fp32": "ieee", "tf32": "tf32", "fp16": "half", "bf16": "half"}


class Built(NamedTuple):
    """What a compiled kernel uses."""

    ptx: str
    sass: str
    shared: int
    registers: int
    stack: int
    local: int


def pointer_types(fn, dtype):
    indices = ("start_ptr", "index_ptr", "perm_ptr", "crow_ptr", "col_ptr")
    element = "fp32" if dtype == "tf32" else dtype
    return {a: "*i32" if a in indices else f"*{element}" for a in fn.arg_names if "_ptr" in a}


@cache
def cuobjdump():
    folder = Path(importlib.import_module("triton.backends.nvidia").__file__).parent
    return str(folder / "bin" / "cuobjdump")


def build(fn, cc, dtype, constants, num_warps, num_stages=3, divisor=16):
    """Compile; by default with sizes and strides that 16 divides, as training shapes are."""
    pointers = pointer_types(fn, dtype)
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in fn.arg_names}
    position = {a: (i,) for i, a in enumerate(fn.arg_names)}
    source = ASTSource(
        fn,
        signature,
        {position[a]: v for a, v in constants.items()},
        {
            position[a]: [["tt.divisibility", 16]]
            for a in fn.arg_names
            if a not in constants and (divisor == 16 or a in pointers)
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        sass, usage = (
            subprocess.run(
                [cuobjdump(), option, f.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Built(
        kernel.asm["ptx"],
        sass,
        kernel.metadata.shared,
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
    )


def instructions(ptx):
    """Tensor-core instructions and their shapes."""
    found = re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)(?:\S*?(m\d+n\d+k\d+))?", ptx)
    return sorted({" ".join(filter(None, pair)) for pair in found})


def check(built, cc, request=None, *, aligned=True):
    """Promises that hold for every kernel."""
    if request is not None:  # figures for --junitxml
        request.node.user_properties += [
            ("registers", built.registers),
            ("shared", built.shared),
            ("instruction", " ".join(instructions(built.ptx))),
        ]
    assert "EXIT" in built.sass
    assert built.registers > 0
    if aligned:
        assert (built.stack, built.local) == (0, 0), "spilled"
        assert not re.search(r"\b(STL|LDL)\b", built.sass), "spilled"
    assert not re.search(r"\b(ATOMG|ATOM|RED)\b", built.sass), "global atomics"
    assert built.shared <= min(SHARED_LIMIT[cc], SHARED_LIMIT_SMALL if cc == 80 else 1 << 30)


def check_tensor_cores(built, cc, dtype, rows):
    """The instruction of the architecture; below its 64 rows the older `mma.sync` will do."""
    if dtype == "fp32":
        assert "mma" not in built.ptx, "IEEE products asked for"
        return
    assert re.search(TENSOR_CORE[cc] if rows >= 64 else r"mma", built.ptx), "no tensor cores"
    if dtype != "tf32":
        widths = re.findall(
            r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", built.ptx
        )
        assert widths, "nothing is prefetched"
        assert {int(w, 0) for w in widths} <= {8, 16}


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# all on sm_90, where rectangles stand for every dtype in one 16-bit and one fp32 kind; on the other
# two the squares in bf16 and the smallest and largest in fp32: under four minutes on two cores
BSR = [
    *itertools.product((90,), ("fp32", "bf16"), (*SQUARES, *RECTANGLES)),
    *itertools.product((90,), ("tf32", "fp16"), SQUARES),
    *itertools.product((80, 100), ("bf16",), SQUARES),
    *itertools.product((80, 100), ("fp32",), (SQUARES[0], SQUARES[-1])),
]


@pytest.mark.parametrize("trans", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(("cc", "dtype", "block"), BSR, ids=ids)
def test_bsr_spmm(cc, dtype, block, trans, request):
    out, reduce = reversed(block) if trans else block
    tile = launch.bsr_spmm_config(ARCH[cc], KINDS[dtype], out)
    constants = {
        "sxk": 1,
        "sb": 1,
        "IN": reduce,
        "OUT": out,
        "BM": tile.BM,
        "BK": tile.BK,
        "TRANS": trans,
        "HAS_BIAS": not trans,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "INTERPRET": False,
    }
    built = build(_bsr_spmm_kernel, cc, dtype, constants, tile.num_warps, tile.num_stages)
    check(built, cc, request)
    check_tensor_cores(built, cc, dtype, tile.BM)


@pytest.mark.parametrize(("cc", "dtype", "block"), BSR, ids=ids)
def test_bsr_sddmm(cc, dtype, block, request):
    tile = launch.bsr_sddmm_config(ARCH[cc], KINDS[dtype], block)
    constants = {
        "sxk": 1,
        "syn": 1,
        "BH": block[0],
        "BW": block[1],
        "BM": tile.BM,
        "G": tile.G,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "INTERPRET": False,
    }
    built = build(_bsr_sddmm_kernel, cc, dtype, constants, tile.num_warps, tile.num_stages)
    check(built, cc, request)
    check_tensor_cores(built, cc, dtype, tile.G * block[1])


CSR = [
    *itertools.product((90,), ("fp32", "fp16", "bf16")),
    *itertools.product((80, 100), ("fp32", "bf16")),
]


@pytest.mark.parametrize("trans", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize(("cc", "dtype"), CSR)
def test_csr_spmm(cc, dtype, trans, request):
    tile = launch.csr_spmm_config(ARCH[cc])
    constants = {
        "sxm": 1,
        "sb": 1,
        "BM": tile.BM,
        "BN": tile.BN,
        "UNROLL": tile.UNROLL,
        "TRANS": trans,
        "HAS_BIAS": not trans,
    }
    check(build(_csr_spmm_kernel, cc, dtype, constants, tile.num_warps), cc, request)


@pytest.mark.parametrize(("cc", "dtype"), CSR)
def test_csr_sddmm(cc, dtype, request):
    tile = launch.csr_sddmm_config(ARCH[cc])
    constants = {"sxm": 1, "sym": 1, "BM": tile.BM, "BN": tile.BN}
    check(build(_csr_sddmm_kernel, cc, dtype, constants, tile.num_warps), cc, request)


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128)], ids=ids)
def test_ragged_sizes_and_any_stride(block, request):
    # nothing is known of sizes and strides, so loads are 2 bytes wide, go through registers and may
    # spill a few: slow, and still without atomics and within shared memory
    options = {"PRECISION": "tf32", "INTERPRET": False}
    tile = launch.bsr_spmm_config("sm90", "half", block[0])
    constants = options | {"IN": block[1], "OUT": block[0], "BM": tile.BM, "BK": tile.BK}
    for trans in (False, True):
        flags = {"TRANS": trans, "HAS_BIAS": not trans}
        built = build(
            _bsr_spmm_kernel, 90, "bf16", constants | flags, tile.num_warps, tile.num_stages, 1
        )
        check(built, 90, request, aligned=False)
    tile = launch.bsr_sddmm_config("sm90", "half", block)
    constants = options | {"BH": block[0], "BW": block[1], "BM": tile.BM, "G": tile.G}
    built = build(_bsr_sddmm_kernel, 90, "bf16", constants, tile.num_warps, tile.num_stages, 1)
    check(built, 90, request, aligned=False)


def test_the_checks_can_fail():
    tile = launch.csr_sddmm_config("sm90")
    constants = {"sxm": 1, "sym": 1, "BM": tile.BM, "BN": tile.BN}
    good = build(_csr_sddmm_kernel, 90, "fp32", constants, tile.num_warps)
    check(good, 90)
    for bad in (
        good._replace(stack=8),
        good._replace(local=8),
        good._replace(sass=good.sass + "\n STL [R1], R2 ;"),
        good._replace(sass=good.sass + "\n RED.E.ADD.F32 desc[UR4][R2.64], R5 ;"),
        good._replace(sass=good.sass + "\n ATOMG.E.ADD.F32 R1, desc[UR4][R2.64], R5 ;"),
        good._replace(shared=228 * 1024),
    ):
        with pytest.raises(AssertionError):
            check(bad, 90)
    with pytest.raises(AssertionError, match="no tensor cores"):
        check_tensor_cores(good, 90, "bf16", 64)
