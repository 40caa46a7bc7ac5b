"""Compile a Gluon kernel for a Hopper GPU that is not here, and read its machine code."""

import contextlib
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
from triton.experimental.gluon._runtime import GluonASTSource

SHARED_LIMIT = 227 * 1024


class Found(NamedTuple):
    """What a compiled kernel uses; log is what ptxas said."""

    ptx: str
    sass: str
    log: str
    shared: int
    usage: str

    @property
    def products(self):
        return re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", self.ptx)

    @property
    def waits(self):
        """Products that each wait leaves in flight; had ptxas serialised them, there were more."""
        return [int(n, 0) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", self.sass)]

    @property
    def registers(self):
        return self.most_registers(holding="")

    def most_registers(self, holding):
        """Of the parts between changes of a warp group's registers that hold an instruction."""
        parts = re.split(r"\n(?=[^\n]*USETMAXREG)", self.sass)
        found = [re.findall(r"\bR(\d+)\b", part) for part in parts if holding in part]
        return max(int(r) for some in found for r in some) + 1


def build(kernel, types, constants, divided=()):
    """Pointers that 16 divides, and sizes that it does; of others nothing is known."""
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {a: types.get(a, "i32") for a in kernel.arg_names}
    position = {a: (i,) for i, a in enumerate(kernel.arg_names)}
    aligned = [a for a in position if signature[a].startswith("*") or a in divided]
    source = GluonASTSource(
        kernel,
        signature,
        {position[a]: v for a, v in constants.items()},
        {position[a]: [["tt.divisibility", 16]] for a in aligned},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # nothing is said of what lies in the cache
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "Used" in printed.getvalue(), printed.getvalue()
    cubin = compiled.asm["cubin"]
    sass, usage = (_read(cubin, option) for option in ("-sass", "-res-usage"))
    return Found(compiled.asm["ptx"], sass, printed.getvalue(), compiled.metadata.shared, usage)


def _read(cubin, option):
    folder = Path(importlib.import_module("triton.backends.nvidia").__file__).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [folder / "bin" / "cuobjdump", option, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(found):
    """What holds for every kernel."""
    assert "EXIT" in found.sass
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", found.usage) == ["0", "0"], "spilled"
    assert not re.search(r"\b(STL|LDL)\b", found.sass), "spilled"
    assert not re.search(r"\b(ATOMG|ATOM|RED)\b", found.sass), "global atomics"
    assert not re.search(r"C75\d\d", found.log), found.log
    assert found.shared <= SHARED_LIMIT
    assert "fence.proxy.async" in found.ptx


def steps(ptx, pattern):
    """Places where, in order, stand p(roducts), w(aits that leave one in flight), b(arriers),
    a(rrivals) and c(opies)."""
    kinds = {
        r"wgmma\.wait_group\.sync\.aligned\s+1": "w",
        r"bar\.sync|barrier\.sync": "b",
        r"cp\.async\.bulk\.tensor\S*global": "c",
        r"wgmma\.mma_async": "p",
        r"mbarrier\.arrive\.shared": "a",
    }
    found = re.finditer("|".join(f"({kind})" for kind in kinds), ptx)
    letters = list(kinds.values())
    return re.findall(pattern, "".join(letters[m.lastindex - 1] for m in found))
