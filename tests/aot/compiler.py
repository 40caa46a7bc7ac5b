"""Compile a kernel for a GPU that is not here, and read what the machine code uses."""

import contextlib
import functools
import importlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

INDICES = ("start_ptr", "index_ptr", "perm_ptr", "order_ptr", "crow_ptr", "col_ptr")


class Built(NamedTuple):
    """What a compiled kernel uses; depth is that of its shallowest operand buffer, 0 if none.

    log: what ptxas said of it, a line for each remark.
    """

    ptx: str
    sass: str
    log: str
    shared: int
    registers: int
    stack: int
    local: int
    depth: int


def signature(fn, dtype, constants, descriptors, scores="fp32"):
    """Types of the arguments: pointers to `dtype` or int32, descriptors with their tiles, sizes."""
    types = {}
    for name in fn.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in descriptors:
            types[name] = f"tensordesc<{dtype}{list(descriptors[name])}>"
        elif name in INDICES:
            types[name] = "*i32"
        elif name in ("scores_ptr", "parts_ptr"):
            types[name] = f"*{scores}"
        else:
            types[name] = f"*{dtype}" if name.endswith("_ptr") or name in ("dy", "x") else "i32"
    return types


def build(fn, cc, dtype, constants, num_warps, num_stages=3, *, descriptors=None, divisor=16):
    """Compile; by default with sizes and strides that 16 divides, as training shapes are."""
    types = signature(fn, dtype, constants, descriptors or {})
    position = {a: (i,) for i, a in enumerate(fn.arg_names)}
    told = {p.name for p in fn.params if not p.do_not_specialize}
    aligned = [
        a
        for a, kind in types.items()
        if a in told and (kind.startswith("*") or (kind == "i32" and divisor == 16))
    ]
    source = ASTSource(
        fn,
        types,
        {position[a]: v for a, v in constants.items()},
        {position[a]: [["tt.divisibility", 16]] for a in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel, log = compiled(source, GPUTarget("cuda", cc, 32), options)
    sass = disassembled(kernel.asm["cubin"])
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", sass)}
    return Built(
        kernel.asm["ptx"],
        sass,
        log,
        kernel.metadata.shared,
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
        depth(kernel.asm["ttgir"]),
    )


def compiled(source, target, options):
    """A kernel, and the log of ptxas: triton prints it when it compiles; here it is cached too."""
    printed = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target, options=options)
        cache = get_cache_manager(kernel.hash)
        path = cache.get_file("ptxas.log")
        if not printed.getvalue() and path is None:  # compiled before, by others
            with knobs.compilation.scope():
                knobs.compilation.always_compile = True
                kernel = triton.compile(source, target=target, options=options)
    if printed.getvalue():
        path = cache.put(printed.getvalue(), "ptxas.log", binary=False)
    return kernel, Path(path).read_text()


def disassembled(cubin):
    """SASS and resource usage of a binary."""
    folder = Path(importlib.import_module("triton.backends.nvidia").__file__).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run(
            [str(folder / "bin" / "cuobjdump"), "-sass", "-res-usage", f.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def depth(ttgir):
    """Tiles held by the shallowest multi-buffer of operands: allocations depth x rows x columns."""
    tiles = re.findall(r"local_alloc\b[^\n]*?memdesc<(\d+)x\d+x\d+x[a-z]+\d+", ttgir)
    return min(map(int, tiles), default=0)


def instructions(ptx):
    """Tensor-core instructions and their shapes."""
    found = re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)(?:\S*?(m\d+n\d+k\d+))?", ptx)
    return sorted({" ".join(filter(None, pair)) for pair in found})


@functools.cache
def release():
    """Minor release of triton, which the figures of a lock file belong to."""
    return ".".join(triton.__version__.split(".")[:2])
