"""Files over 400 lines and functions over 60: `python -m tests.sizes`, a part of `make check`.

A smell detector: what is longer does two things, or stands below with the reason. A function's
signature and docstring don't count: naming and explaining every argument is no smell.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = {"file": 400, "function": 60}

EXCEPTIONS = {
    "kernels/bsr_conv2d_dgrad.py:_bsr_conv2d_dgrad_kernel": "one loop over taps and strides",
    "kernels/bsr_spmm.py": "two kernels, and the choice among them and a third",
    "kernels/bsr_spmm_resident.py": "Gluon: barriers and layouts are written out",
    "sparsekern/topology/topology.py": "the one value object, with its verbs",
    "tests/mutants/equivalent.py": "an entry for each mutant that no test can tell",
    "tests/test_bench.py": "a case for each verdict of a comparison",
    "tests/test_bench_suite.py": "a suite that fails in every way",
    "tests/test_methods.py": "a section for each promise of an update",
    "tests/test_ops.py": "a section for each operator",
    "tests/test_planning.py": "a section for each question that a plan answers",
    "tests/test_planning_measure.py": "measuring that breaks off at every place",
    "tests/test_profile.py": "a section for each column of the report",
    "tests/test_recurrent.py": "a section for each promise of three layers and three cells",
}
"""What is longer, and why."""


def too_long(path: Path, name: str) -> Iterator[tuple[str, int, str]]:
    """(what, its lines, its kind) of one source file."""
    text = path.read_text()
    if (lines := text.count("\n")) > MOST_LINES["file"]:
        yield name, lines, "file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            lines = (node.end_lineno or node.lineno) - first.lineno + 1
            if lines > MOST_LINES["function"]:
                yield f"{name}:{node.name}", lines, "function"


def main() -> int:
    """Print what is too long and not an exception, and exceptions that are none any more."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {
        what: (lines, kind)
        for name in listing.stdout.split()
        if (ROOT / name).is_file()
        for what, lines, kind in too_long(ROOT / name, name)
    }
    wrong = [
        f"{what}: {lines} lines; a {kind} has at most {MOST_LINES[kind]}"
        for what, (lines, kind) in sorted(found.items())
        if what not in EXCEPTIONS
    ]
    wrong += [
        f"{what}: no longer too long; take it out of EXCEPTIONS"
        for what in EXCEPTIONS
        if what not in found
    ]
    sys.stdout.writelines(f"{line}\n" for line in wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
