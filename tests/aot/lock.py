"""The lock files: what every compiled case uses, so that a change shows in a diff.

    python -m tests.aot.lock        compiles everything and writes kernels-X.Y.lock of this triton

Figures belong to one minor release of triton. Of 3.6, the oldest that is supported, the file has
sm_90 alone.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
OLDEST = "3.6"


def path(release):
    """The file of a release, which need not exist."""
    return FOLDER / f"kernels-{release}.lock"


def holds(release, case):
    """Whether the file of a release has a line for a case."""
    return release != OLDEST or case.arch == "sm90"


def read(release):
    """Figures by case; none for a release without a file."""
    lines = path(release).read_text().splitlines() if path(release).exists() else []
    return dict(line.split(": ", 1) for line in lines)


def write(release, figures):
    """Write the file, sorted."""
    lines = [f"{case}: {text}" for case, text in sorted(figures.items())]
    path(release).write_text("\n".join(lines) + "\n")


def figures_of(case):
    """One line of the file."""
    from aot import plan

    return str(case), plan.figures(plan.compiled(case))


def main():
    """Compile all cases, as many at once as there are cores."""
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(FOLDER.parent))
    from aot import plan
    from aot.compiler import release

    cases = [case for case in plan.cases() if holds(release(), case)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        write(release(), dict(pool.map(figures_of, cases, chunksize=4)))


if __name__ == "__main__":
    main()
