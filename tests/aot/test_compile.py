"""Every kernel at every configuration in the launch tables, compiled for GPUs that are not here.

16-bit ones for sm_90 all, of the others a half, and of sm_80 and sm_100 a third; on the oldest
release of triton a third of those for sm_90 alone. SPARSEKERN_AOT=all compiles every one.

Checked in the machine code: tensor-core instructions where the operands are 16 bits wide, nothing
spilled, shared memory within the limit, pipeline depth as planned, no global atomics (so a result
has one order of sums). Of products of warp groups, that an iteration waits once.
The figures are compared with the lock file of the triton release.
"""

import os
import re
from collections import Counter

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "kernels are interpreted in this process: run `pytest tests/aot` by itself",
        allow_module_level=True,
    )

from aot import lock, plan, sass
from aot.compiler import build, release

from sparsekern.kernels import parts, tables
from sparsekern.kernels.launch import BLOCK_EDGES

# bytes that a program may use; chips of the "sm80" class down to sm_86 and sm_120 have the least
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
FEW_BYTES = 32
# products that ptxas still serialises
SERIALISED = {("3.6", "sm90 sddmm/tf32/128/any/pointer 16x128 fp32")}
TENSOR_CORE = {"sm80": r"mma\.sync", "sm90": r"wgmma\.mma_async", "sm100": r"tcgen05\.mma"}
CASES = list(plan.cases())


def compiled_cases():
    """Of each operation one case in so many, always the same ones; 16-bit ones for sm_90 all."""
    seen = Counter()
    old = release() == lock.OLDEST
    for case in CASES:
        half = case.key.kind == "half"
        share = (1 if half else 2) if case.arch == "sm90" and not old else 3
        group = case.arch, case.key.op, half
        asked = seen[group] % share == 0 and not (old and case.arch != "sm90")
        if os.environ.get("SPARSEKERN_AOT") == "all" or asked:
            yield case
        seen[group] += 1


def check(built, arch, *, spills=False):
    """Promises that hold for every kernel."""
    assert "EXIT" in built.sass
    assert built.registers > 0
    if not spills:
        # ptxas sometimes keeps a few bytes that nothing uses, or that one use before the loop has
        assert built.stack <= FEW_BYTES, f"{built.stack} bytes of stack"
        assert built.local == 0, "spilled"
        assert sass.spills_in_loops(built.sass) == 0, "spilled in the loop"
    assert not re.search(r"\b(ATOMG|ATOM|RED)\b", built.sass), "global atomics"
    assert built.shared <= SHARED_LIMIT[arch], f"{built.shared} bytes of shared memory"


def check_products(built, case):
    """The tensor-core instruction of the architecture, fed by asynchronous copies."""
    if case.key.kind == "ieee" or case.key.op.startswith("csr"):
        assert "mma" not in built.ptx, "plain products asked for"
        return
    assert re.search(TENSOR_CORE[case.arch], built.ptx), "no tensor cores"
    if case.key.loads == "tma":
        assert "cp.async.bulk.tensor" in built.ptx, "no tensor memory accelerator"
        assert not re.search(r"cp\.async\.c[ag]", built.ptx), "tiles through pointers"
    elif case.key.kind == "half":
        widths = re.findall(
            r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", built.ptx
        )
        assert widths, "nothing is prefetched"
        assert {int(w, 0) for w in widths} <= {8, 16}


def check_waits(built, most=1):
    """Products of a warp group overlap with the loads: an iteration waits for them once.

    Otherwise ptxas puts a wait after each, and says so under C7514, C7515 and their like.
    """
    assert not re.search(r"\(C75\d\d\)", built.log), built.log
    if "wgmma" in built.ptx:
        loops = sass.loops(built.sass)
        assert loops, "no loop around products"
        assert {loop.waits for loop in loops} <= {*range(1, most + 1)}, loops


@pytest.mark.parametrize("case", list(compiled_cases()), ids=str)
def test_compiles_as_planned(case):
    built = plan.compiled(case)
    check(built, case.arch)
    check_products(built, case)
    assert built.depth == plan.planned_depth(case), "pipeline depth"
    # fp32 tiles that have to be transposed go through registers, a product at a time
    turned = case.key[:2] == ("sddmm", "tf32") and case.key.loads == "tma"
    if (release(), str(case)) in SERIALISED:
        assert re.search(r"\(C75\d\d\)", built.log), "no longer: take it off the list"
    else:
        check_waits(built, most=4 if turned else 1)
    locked = lock.read(release())
    if locked and lock.holds(release(), case):
        assert plan.figures(built) == locked[str(case)], "run `make lock` if this is meant"


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_a_lock_holds_every_case_and_nothing_else(version):
    assert set(lock.read(version)) == {str(case) for case in CASES if lock.holds(version, case)}


def test_every_block_dtype_and_architecture_is_compiled():
    for arch in plan.ARCHES:
        mine = [c for c in CASES if c.arch == arch]
        for op in tables.CONFIGS | tables.CONV:
            blocks = {(1, 1)} if op.startswith("csr") else {(e, e) for e in BLOCK_EDGES}
            # of convolutions fp16, which differs in the name of an instruction, on one architecture
            fp16 = ("fp16",) if op in tables.CONFIGS or arch == "sm90" else ()
            for dtype in ("bf16", "fp32", *fp16):
                found = {c.block for c in mine if c.key.op == op and c.dtype == dtype}
                assert blocks <= found, (arch, op, dtype)


RAGGED = [
    c
    for c in CASES
    if c.arch == "sm90"
    and (release() != lock.OLDEST or os.environ.get("SPARSEKERN_AOT") == "all")
    and c.dtype == "bf16"
    and c.key.loads == "pointer"
    and c.key.rows != "short"
    and (
        (c.key.op in {"spmm", "spmm_t", "sddmm"} and c.block in {(16, 16), (64, 64), (128, 128)})
        or (c.key.op in tables.CONV and not c.variant and c.block in {(16, 16), (64, 64)})
    )
]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_sizes_and_any_stride(case):
    # no load divides a size: results go out in single elements, whose addresses may spill, and
    # a product that has to mask weights takes them through registers, one buffer less
    built = plan.compiled(case, divisor=1)
    check(built, case.arch, spills=True)
    check_waits(built)
    assert built.depth >= plan.planned_depth(case) - 1, "pipeline depth"


@pytest.mark.parametrize(
    ("arch", "dtype", "added"),
    [*(("sm90", d, a) for d in ("bf16", "fp32") for a in (False, True)), ("sm80", "fp16", True)],
)
def test_parts_are_joined_by_16_byte_loads(arch, dtype, added):
    constants = {"ADD": added, "BLOCK": parts._BLOCK, "AT_ONCE": 4}
    built = build(parts._add_parts_kernel, plan.ARCHES[arch], dtype, constants, 4)
    check(built, arch)
    loads = re.findall(r"\bLDG\.E\.?(\d*)", built.sass)
    what_is_there = ["128" if dtype == "fp32" else "64"] if added else []
    assert loads == [*what_is_there, *["128"] * 4]


def _spilling(code):
    """The same code, with local memory in the place of global memory."""
    return re.sub(r"\bLDG\b", "STL", code)


def test_the_checks_can_fail():
    case = next(c for c in CASES if c.key.op == "csr_sddmm" and c.arch == "sm90")
    good = plan.compiled(case)
    check(good, case.arch)
    for bad in (
        good._replace(stack=64),
        good._replace(local=8),
        good._replace(sass=_spilling(good.sass)),
        good._replace(sass=good.sass + "\n RED.E.ADD.F32 desc[UR4][R2.64], R5 ;"),
        good._replace(sass=good.sass + "\n ATOMG.E.ADD.F32 R1, desc[UR4][R2.64], R5 ;"),
        good._replace(shared=228 * 1024),
    ):
        with pytest.raises(AssertionError):
            check(bad, case.arch)
    product = next(c for c in CASES if c.key.op == "spmm" and c.key.loads == "tma")
    with pytest.raises(AssertionError, match="no tensor cores"):
        check_products(good, product)
    with pytest.raises(AssertionError, match="no tensor memory accelerator"):
        check_products(good._replace(ptx="wgmma.mma_async tcgen05.mma"), product)


def test_the_waits_are_seen():
    ptx = "wgmma.mma_async"
    one, wait = "/*0010*/ HGMMA.64x64x16 R24 ;", "/*0020*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
    back = "/*0030*/ @!P0 BRA 0x10 ;\n /*0040*/ EXIT ;"
    detour = "/*0050*/ @!P0 BRA 0x20 ;"
    case = next(c for c in CASES if c.key.op == "csr_sddmm" and c.arch == "sm90")
    empty = plan.compiled(case)._replace(ptx=ptx, log="")

    def built(*lines):
        return empty._replace(sass="\n".join(f" {line}" for line in lines))

    good = built(one, wait, back, detour)
    check_waits(good)
    remark = "ptxas info : (C7514) Potential Performance Loss: wgmma.mma_async are serialized"
    more = "/*0028*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    for bad in (
        good._replace(log=remark),
        built(one, wait, more, back),
        built(one, back),
        built(wait, back),
    ):
        with pytest.raises(AssertionError):
            check_waits(bad)
