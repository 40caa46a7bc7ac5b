"""Everything that the launch tables can ask for, as compile cases."""

import itertools
from typing import Any, NamedTuple

from aot.compiler import Built, build, instructions

from sparsekern.kernels import tables
from sparsekern.kernels.bsr_grow import _bsr_grow_kernel
from sparsekern.kernels.bsr_sddmm import _TMA_EDGE as TMA_EDGE
from sparsekern.kernels.bsr_sddmm import _bsr_sddmm_kernel, _bsr_sddmm_tma_kernel
from sparsekern.kernels.bsr_spmm import _TMA_ROW_BYTES as TMA_ROW_BYTES
from sparsekern.kernels.bsr_spmm import _bsr_spmm_kernel, _bsr_spmm_tma_kernel
from sparsekern.kernels.csr_sddmm import _csr_sddmm_kernel
from sparsekern.kernels.csr_spmm import _csr_spmm_kernel
from sparsekern.kernels.launch import BLOCK_EDGES

ARCHES = {"sm80": 80, "sm90": 90, "sm100": 100}
DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
RECTANGLES = ((16, 128), (128, 16), (64, 32), (128, 32), (128, 64), (64, 128))


class Case(NamedTuple):
    """One kernel at one configuration, for one dtype and architecture."""

    arch: str
    key: tables.Key
    config: Any
    dtype: str
    block: tuple[int, int]  # (outputs, reduction) for spmm and spmm_t, else (BH, BW)
    variant: str = ""  # norm of a grow kernel, "add" for an sddmm into what is there

    def __str__(self):
        block = "x".join(map(str, self.block))
        return " ".join(filter(None, (self.arch, str(self.key), block, self.dtype, self.variant)))


def cases():
    """All cases; entries that differ in their key alone are compiled once."""
    for arch in ARCHES:
        seen = set()
        for key, config in tables.table(arch).items():
            csr = key.op.startswith("csr")  # no tensor cores, so all fp32 is one kind
            kind = "fp32" if csr and key.kind != "half" else key.kind
            same = (key._replace(rows="", kind=kind), config)
            if same in seen:
                continue
            seen.add(same)
            for dtype, (block, variant) in itertools.product(DTYPES[key.kind], shapes(key, arch)):
                # fp16 differs from bf16 in the name of an instruction: its squares are enough
                if dtype != "fp16" or (block[0] == block[1] and variant in {"", "l1"}):
                    yield Case(arch, key, config, dtype, block, variant)


def shapes(key, arch):
    """(block, variant) pairs that an entry serves; rectangles and variants on one architecture."""
    if key.op == "grow":
        yield from (((e, e), "l1") for e in BLOCK_EDGES)
        if arch == "sm90":
            yield from (((16, 16), norm) for norm in ("l2", "max"))
    elif key.op.startswith("csr"):
        yield (1, 1), ""
    else:
        yield (int(key.edge),) * 2, ""
        if arch == "sm90":
            yield from ((b, "") for b in RECTANGLES if serves(key, b))
            if key.op == "sddmm":
                yield (int(key.edge),) * 2, "add"


def serves(key, block):
    """Whether the launchers look a rectangle up under this entry, and load it as the entry says."""
    if key.op == "sddmm":
        narrow = min(block) < TMA_EDGE
        return str(max(block)) == key.edge and not (key.loads == "tma" and narrow)
    narrow = block[1] * (2 if key.kind == "half" else 4) < TMA_ROW_BYTES
    return str(block[0]) == key.edge and not (key.loads == "tma" and narrow)


def compiled(case: Case, divisor: int = 16) -> Built:
    """Compile a case as its launcher would start it."""
    fn, constants, descriptors = PLANS[case.key.op](case)
    if divisor == 1:  # nothing is known of strides
        constants = {n: v for n, v in constants.items() if not n.startswith("s")}
    constants = {n: v for n, v in constants.items() if n in fn.arg_names}
    stages = getattr(case.config, "num_stages", 3)
    return build(
        fn,
        ARCHES[case.arch],
        case.dtype,
        constants,
        case.config.num_warps,
        stages,
        descriptors=descriptors,
        divisor=divisor,
    )


def common(case):
    """Constants that every kernel may take."""
    precision = "ieee" if case.key.kind == "ieee" else "tf32"
    unit = {"sb": 1, "sxk": 1, "syn": 1}
    return unit | {"PRECISION": precision, "INTERPRET": False, "BM": case.config.BM}


def spmm_plan(case):
    out, reduce = case.block
    c, trans = case.config, case.key.op == "spmm_t"
    constants = common(case) | {
        "IN": reduce,
        "OUT": out,
        "BK": c.BK,
        "GROUP": c.GROUP,
        "TRANS": trans,
        "HAS_BIAS": not trans,
        "RELU": not trans,
        "SWAP": c.SWAP,
    }
    if case.key.loads == "pointer":
        return _bsr_spmm_kernel, constants, {}
    BK = min(c.BK, reduce)
    tiles = {
        "x_desc": (c.BM, BK),
        "w_desc": (BK, out) if trans else (out, BK),
        "y_desc": (c.BM, out),
    }
    return _bsr_spmm_tma_kernel, constants | {"BK": BK}, tiles


def sddmm_plan(case):
    bh, bw = case.block
    c = case.config
    constants = common(case) | {
        "BH": bh,
        "BW": bw,
        "G": max(1, c.LANES // bw),
        "ADD": case.variant == "add",
    }
    if case.key.loads == "pointer":
        return _bsr_sddmm_kernel, constants, {}
    return _bsr_sddmm_tma_kernel, constants, {"dy_desc": (c.BM, bh), "x_desc": (c.BM, bw)}


def grow_plan(case):
    bh, bw = case.block
    c, tma = case.config, case.key.loads == "tma"
    constants = common(case) | {
        "BH": bh,
        "BW": bw,
        "TN": c.TN,
        "TK": c.TK,
        "GROUP": 8,
        "NORM": case.variant,
        "TMA": tma,
    }
    return _bsr_grow_kernel, constants, {"dy": (c.BM, c.TN), "x": (c.BM, c.TK)} if tma else {}


def csr_plan(case):
    c, trans = case.config, case.key.op == "csr_spmm_t"
    constants = c._asdict() | {"TRANS": trans, "HAS_BIAS": not trans, "RELU": not trans}
    constants |= {"sb": 1, "sxm": 1, "sym": 1, "ADD": False}
    del constants["num_warps"]
    return (_csr_sddmm_kernel if case.key.op == "csr_sddmm" else _csr_spmm_kernel), constants, {}


PLANS = {
    "spmm": spmm_plan,
    "spmm_t": spmm_plan,
    "sddmm": sddmm_plan,
    "grow": grow_plan,
    "csr_spmm": csr_plan,
    "csr_spmm_t": csr_plan,
    "csr_sddmm": csr_plan,
}


def planned_depth(case: Case) -> int:
    """Buffers that `num_stages` should give: `wgmma` and `tcgen05` read them in place.

    `mma.sync` and plain products take a tile to registers one iteration ahead, and so does `wgmma`
    with an operand of four bytes that has to be transposed first.
    """
    if case.key.op.startswith("csr"):
        return 0
    in_registers = case.arch == "sm80" or case.key.kind == "ieee"
    turned = (
        case.arch == "sm90"
        and (case.key.kind, case.key.loads) == ("tf32", "tma")
        and case.key.op != "spmm"
    )
    return int(case.config.num_stages) - (in_registers or turned)


def figures(built: Built) -> str:
    """One line of the lock file."""
    return ", ".join(
        (
            f"{built.registers} registers",
            f"{built.shared} B shared",
            f"depth {built.depth}",
            " + ".join(instructions(built.ptx)) or "no tensor cores",
            f"{built.stack + built.local} B spilled",
        )
    )
