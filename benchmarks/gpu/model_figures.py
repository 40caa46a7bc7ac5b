"""What the shipped sm_90 kernels use, from compiled code: `model_figures.json`.

    python -m benchmarks.gpu.model_figures        compiles the entries of the launch tables anew

It needs triton, and no GPU. Every figure is of square blocks in bf16; `source` says which launch
table entry and which triton release it is from.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.model_launch import Kernel
from sparsekern.kernels import tables
from sparsekern.show.output_files import write_whole

FILE = Path(__file__).with_name("model_figures.json")
TESTS = Path(__file__).parents[2] / "tests"

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)([^;]*);")


class Loop(NamedTuple):
    """Innermost loop around the products: instructions of a warp in one iteration, by kind."""

    instructions: int
    products: int  # wgmma, or multiply-adds on CUDA cores
    waits: int  # for wgmma
    barriers: int


@functools.cache
def figures() -> dict[str, dict[str, Any]]:
    """Compiled figures by launch table key."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())["kernels"]
    return found


def kernel(key: str) -> Kernel:
    """Of a launch table entry, such as "spmm/half/64/short/tma"."""
    return Kernel(**figures()[key])


def loops(sass: str) -> list[Loop]:
    """Loops with products in a disassembled kernel, longest first."""
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_LINE.match, sass.splitlines()) if m]
    spans = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    counted = {span: _counted([n for a, n, _ in code if span[0] <= a <= span[1]]) for span in spans}
    busy = {span: loop for span, loop in counted.items() if loop.products}
    inner = [loop for span, loop in busy.items() if not any(_outer(span, s) for s in busy)]
    return sorted(inner, key=lambda loop: -loop.products)


def _outer(span: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a jump back is around another loop, or from behind into one: a wait that spins."""
    (low, high), (a, b) = span, other
    return span != other and ((low <= a and b <= high) or a < low <= b < high)


def _counted(names: list[str]) -> Loop:
    return Loop(
        len(names),
        sum(n.startswith(("HGMMA", "FFMA", "HFMA2")) for n in names),
        sum("WARPGROUP.DEPBAR" in n for n in names),
        sum(n.startswith(("BAR.", "SYNCS.PHASECHK")) for n in names),
    )


def row(key: str, built: Any, warps: int, triton: str) -> dict[str, Any]:
    """Figures of a compiled launch table entry."""
    loop = loops(built.sass)[0]
    tensor = "HGMMA" in built.sass
    return Kernel(
        warps,
        built.registers,
        built.shared,
        loop.instructions,
        loop.barriers,
        serial=loop.waits > 1,
        depth=built.depth,
        fma=0 if tensor else loop.products,
        source=f"{key}, triton {triton}",
    )._asdict()


def wanted(case: Any) -> bool:
    """Square blocks in bf16; unstructured weights in fp32 too."""
    square = case.block[0] == case.block[1] and not case.variant and case.key.op != "grow"
    unstructured = case.block == (1, 1) and case.dtype == "fp32"
    return case.arch == "sm90" and square and (case.dtype == "bf16" or unstructured)


def main() -> None:
    """Compile square blocks in bf16 and write the file."""
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(TESTS))
    plan = importlib.import_module("aot.plan")  # needs triton, and the lines above
    release = importlib.import_module("triton").__version__
    found = {}
    for case in plan.cases():
        if wanted(case):
            key = str(case.key)
            found[key] = row(key, plan.compiled(case), case.config.num_warps, release)
            print(found[key], flush=True)
    write(found)


def write(found: dict[str, dict[str, Any]]) -> None:
    """Write the file; entries that differ in their key alone were compiled once."""
    table = {key: (key._replace(rows=""), config) for key, config in tables.table("sm90").items()}
    for key, same in table.items():
        twin = next((str(k) for k in table if table[k] == same and str(k) in found), None)
        if twin is not None and str(key) not in found:
            source = found[twin]["source"].replace(twin, str(key))
            found[str(key)] = found[twin] | {"source": source}
    lines = [f'    "{key}": {json.dumps(found[key])}' for key in sorted(found)]
    write_whole(FILE, '{\n  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")


if __name__ == "__main__":
    main()
