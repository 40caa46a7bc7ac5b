"""The lock file: what every compiled case uses, so that a change shows in a diff.

    python -m tests.aot.lock        compiles everything and writes tests/aot/kernels.lock

Figures belong to one release of triton, which the first line names.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

LOCK = Path(__file__).with_name("kernels.lock")


def read():
    """(triton release, figures by case)."""
    head, *lines = LOCK.read_text().splitlines()
    return head.removeprefix("triton "), dict(line.split(": ", 1) for line in lines)


def write(version, figures):
    """Write the file, sorted."""
    lines = [f"{case}: {text}" for case, text in sorted(figures.items())]
    LOCK.write_text("\n".join([f"triton {version}", *lines]) + "\n")


def figures_of(case):
    """One line of the file."""
    from aot import plan

    return str(case), plan.figures(plan.compiled(case))


def main():
    """Compile all cases, as many at once as there are cores."""
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from aot import plan
    from aot.compiler import triton_version

    with ProcessPoolExecutor(os.cpu_count()) as pool:
        write(triton_version(), dict(pool.map(figures_of, plan.cases(), chunksize=4)))


if __name__ == "__main__":
    main()
