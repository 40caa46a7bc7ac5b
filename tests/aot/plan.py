"""Everything that the launch tables can ask for, as compile cases."""

import itertools
from typing import Any, NamedTuple

from aot.compiler import Built, build, instructions

from sparsekern.kernels import tables
from sparsekern.kernels.bsr_conv2d import _bsr_conv2d_kernel
from sparsekern.kernels.bsr_conv2d_dgrad import TAPS_AT_ONCE, _bsr_conv2d_dgrad_kernel
from sparsekern.kernels.bsr_conv2d_wgrad import _bsr_conv2d_wgrad_kernel
from sparsekern.kernels.bsr_grow import _bsr_grow_kernel
from sparsekern.kernels.bsr_sddmm import _TMA_EDGE as TMA_EDGE
from sparsekern.kernels.bsr_sddmm import _bsr_sddmm_kernel, _bsr_sddmm_tma_kernel
from sparsekern.kernels.bsr_spmm import _TMA_ROW_BYTES as TMA_ROW_BYTES
from sparsekern.kernels.bsr_spmm import _bsr_spmm_kernel, _bsr_spmm_tma_kernel
from sparsekern.kernels.csr_conv2d import _csr_conv2d_dgrad_kernel, _csr_conv2d_kernel
from sparsekern.kernels.csr_conv2d_wgrad import _csr_conv2d_wgrad_kernel
from sparsekern.kernels.csr_sddmm import _csr_sddmm_kernel
from sparsekern.kernels.csr_spmm import _csr_spmm_kernel
from sparsekern.kernels.launch import BLOCK_EDGES
from sparsekern.kernels.window import Window, window_options

ARCHES = {"sm80": 80, "sm90": 90, "sm100": 100}
DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
RECTANGLES = ((16, 128), (128, 16), (64, 32), (128, 32), (128, 64), (64, 128))


# of a convolution, by variant: the geometry is compiled in, so most cases share the commonest
WINDOWS = {
    "": Window(1, (3, 3), (1, 1), (1, 1), (1, 1)),
    "7x7/2": Window(1, (7, 7), (2, 2), (3, 3), (1, 1)),
}
WINDOWS["add"] = WINDOWS[""]
CONV_RECTANGLES = ((16, 128), (128, 16))


# what sizes are multiples of, the first that of strides, always
UNITS = ("UNIT", "K_UNIT", "N_UNIT", "C_UNIT", "O_UNIT")


class Case(NamedTuple):
    """One kernel at one configuration, for one dtype and architecture."""

    arch: str
    key: tables.Key
    config: Any
    dtype: str
    block: tuple[int, int]  # (outputs, reduction), or (BH, BW) of the sampled products and grow
    # norm of a grow kernel, "add" for an sddmm into what is there, geometry of a convolution
    variant: str = ""

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
                plain = block[0] == block[1] and variant in {"", "l1"}
                if dtype != "fp16" or (plain and (key.op not in tables.CONV or arch == "sm90")):
                    yield Case(arch, key, config, dtype, block, variant)


def shapes(key, arch):
    """(block, variant) pairs that an entry serves; rectangles and variants on one architecture."""
    if key.op == "grow":
        yield from (((e, e), "l1") for e in BLOCK_EDGES)
        if arch == "sm90":
            yield from (((16, 16), norm) for norm in ("l2", "max"))
    elif key.op.startswith("csr"):
        yield (1, 1), ""
        if key.op in tables.CONV and arch == "sm90":
            yield (1, 1), "7x7/2"
    elif key.op in tables.CONV:
        yield from conv_shapes(key, arch)
    else:
        yield (int(key.edge),) * 2, ""
        if arch == "sm90":
            yield from ((b, "") for b in RECTANGLES if serves(key, b))
            if key.op == "sddmm":
                yield (int(key.edge),) * 2, "add"


def conv_shapes(key, arch):
    """The same of a convolution: rectangles and other geometries for 16-bit operands alone."""
    square = (int(key.edge),) * 2
    yield square, ""
    if arch == "sm90" and key.kind == "half":
        yield from ((b, "") for b in CONV_RECTANGLES if serves(key, b))
        if key.edge in {"16", "64"}:
            yield square, "7x7/2"
        if (key.op, key.edge) == ("conv2d_wgrad", "32"):
            yield square, "add"


def serves(key, block):
    """Whether the launchers look a rectangle up under this entry, and load it as the entry says."""
    if key.op in {"sddmm", "conv2d_wgrad"}:
        narrow = min(block) < TMA_EDGE
        return str(max(block)) == key.edge and not (key.loads == "tma" and narrow)
    narrow = block[1] * (2 if key.kind == "half" else 4) < TMA_ROW_BYTES
    return str(block[0]) == key.edge and not (key.loads == "tma" and narrow)


def compiled(case: Case, divisor: int = 16) -> Built:
    """Compile a case as its launcher would start it."""
    fn, constants, descriptors = PLANS[case.key.op](case)
    if divisor == 1:  # sizes that no 16-byte load divides
        constants |= dict.fromkeys(UNITS[1:], 1)
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
    unit |= dict.fromkeys(UNITS, 4 if case.dtype == "fp32" else 8)
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
        "UNIT": 4 if case.dtype == "fp32" else 8,
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


def conv_plan(case):
    out, reduce = case.block
    c, taps = case.config, WINDOWS[case.variant].kernel[0] * WINDOWS[case.variant].kernel[1]
    constants = common(case) | window_options(WINDOWS[case.variant])
    del constants["syn"]  # here the stride of an image
    if case.key.op == "conv2d_wgrad":
        blocks = {"BH": out, "BW": reduce, "G": max(1, c.LANES // reduce)}
        blocks |= {"ADD": case.variant == "add", "UNIT": 4 if case.dtype == "fp32" else 8}
        return _bsr_conv2d_wgrad_kernel, constants | blocks, {}
    constants |= {"IN": reduce, "OUT": out, "BK": c.BK, "GROUP": c.GROUP}
    if case.key.op == "conv2d":
        return _bsr_conv2d_kernel, constants | {"HAS_BIAS": True}, {}
    return _bsr_conv2d_dgrad_kernel, constants | {"TAPS": taps, "U": min(taps, TAPS_AT_ONCE)}, {}


def csr_conv_plan(case):
    fn = CSR_CONV[case.key.op]
    taps = WINDOWS[case.variant].kernel[0] * WINDOWS[case.variant].kernel[1]
    constants = case.config._asdict() | window_options(WINDOWS[case.variant])
    constants |= {"TAPS": taps, "HAS_BIAS": True, "ADD": False, "sb": 1, "sxw": 1, "syw": 1}
    del constants["num_warps"]
    return fn, constants, {}


CSR_CONV = {
    "csr_conv2d": _csr_conv2d_kernel,
    "csr_conv2d_dgrad": _csr_conv2d_dgrad_kernel,
    "csr_conv2d_wgrad": _csr_conv2d_wgrad_kernel,
}

PLANS = {
    "spmm": spmm_plan,
    "spmm_t": spmm_plan,
    "sddmm": sddmm_plan,
    "grow": grow_plan,
    "csr_spmm": csr_plan,
    "csr_spmm_t": csr_plan,
    "csr_sddmm": csr_plan,
    **{op: csr_conv_plan if op in CSR_CONV else conv_plan for op in tables.CONV},
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
