"""Correctness and speed on a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu --out DIR [--parts correctness bsr ...] [--budget-s 570] [--dry]

Needs torch and triton; matplotlib only for the picture. A part that is finished for the same
device, versions and sources is not run again, so the same command goes on after a stop. A kernel
that is not correct here gets no speed. `--dry` walks through everything on the CPU with tiny sizes:
its times mean nothing and say so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.store import Store

RESULTS = Path(__file__).resolve().parent.parent / "results"
GRACE_SECONDS = 20  # for a part that is past its deadline in the middle of a case
START_SECONDS = 15  # of a part's process, until its own clock runs
SAVE_SECONDS = 2.0  # between two writes of a part's rows
NAMES = (
    *("correctness", "dense", "bsr", "csr", "conv", "update", "peers", "probe"),
    *("variants", "resident", "pytest"),
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and refuse what can't be done."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=NAMES, help="default: all but pytest")
    parser.add_argument("--budget-s", type=float, default=530.0, help="start nothing beyond this")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, measuring nothing")
    parser.add_argument("--commit", help="to be noted, where there is no git")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.dry and args.out.resolve().is_relative_to(RESULTS):
        parser.error(f"a dry run measures nothing; got --out {args.out}, among the results")
    if args.dry:
        # read when a kernel is decorated, so before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    return args


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def work(name: str, args: argparse.Namespace) -> None:
    """Run one part in this process; rows are saved as they come."""
    from benchmarks.gpu import cases, environment, report  # noqa: PLC0415  after TRITON_INTERPRET
    from benchmarks.gpu.bench import Bench  # noqa: PLC0415
    from benchmarks.gpu.correctness import Gate  # noqa: PLC0415
    from sparsekern.tuning.interpreter import steady_dots  # noqa: PLC0415

    if args.dry:
        steady_dots()
    from benchmarks.gpu.parts import PARTS, default_device  # noqa: PLC0415
    from sparsekern.errors import told  # noqa: PLC0415

    device, begin = default_device(args.dry), time.monotonic()
    store = _store(args)
    checked = store.part("correctness")
    if PARTS[name].gated and checked is None:
        raise RuntimeError(f"{name} needs a finished correctness part in {store.path}")
    gate = Gate(checked["rows"] if checked else [])
    bench = Bench(cases.DRY if args.dry else cases.FULL, device, gate, begin + args.budget_s)
    rows: list[dict[str, Any]] = []
    part: dict[str, Any] = {"key": dict(store.key), "complete": False, "rows": rows}
    part |= {"environment": environment.facts(device, args.commit)}
    saved = begin
    try:
        for row in PARTS[name].run(bench):
            rows.append(row)
            if row.get("ok") is not True or len(rows) % 50 == 0:
                say(f"[{name} {time.monotonic() - begin:4.0f} s] {len(rows)}: {report.line(row)}")
            if time.monotonic() - saved > SAVE_SECONDS:
                store.write_part(name, part)
                saved = time.monotonic()
            if bench.late:
                break
        else:
            part["complete"] = True
    except Exception as error:
        part["error"] = told(error)[:500]
        raise
    finally:
        part["seconds"] = time.monotonic() - begin
        part["nvidia_smi_after"] = environment.smi() if device.type == "cuda" else None
        store.write_part(name, part)


def _store(args: argparse.Namespace) -> Store:
    from benchmarks.gpu import environment  # noqa: PLC0415
    from benchmarks.gpu.parts import default_device  # noqa: PLC0415
    from benchmarks.gpu.store import Store  # noqa: PLC0415

    return Store(args.out, environment.key(default_device(args.dry)), args.dry)


def isolated(name: str, args: argparse.Namespace, left: float) -> None:
    """Run one part in a process of its own: a fault on the GPU ends that process only."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name, "--out", str(args.out)]
    own = max(1.0, left - START_SECONDS)
    command += ["--budget-s", str(own)] + (["--commit", args.commit] if args.commit else [])
    command += ["--dry"] if args.dry else []
    limit = left + GRACE_SECONDS
    try:
        code = subprocess.run(command, check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        say(f"[{name}] stopped after {limit:.0f} s")
    else:
        if code:
            say(f"[{name}] failed with exit code {code}; the other parts go on")


def run(args: argparse.Namespace) -> int:
    """All parts that are not done, as far as the budget goes."""
    from benchmarks.gpu import report  # noqa: PLC0415
    from benchmarks.gpu.parts import PARTS, ordered  # noqa: PLC0415

    begin, store, names = time.monotonic(), _store(args), ordered(args.parts)
    say(f"{store.key['device']}, torch {store.key['torch']}, triton {store.key['triton']}")
    older = store.set_aside()
    if older is not None:
        say(f"another device, version or source: the results so far are now in {older}")
    _note(args, store)
    stopped = False
    for name in names:
        if store.part(name) is not None:
            say(f"[{name}] done before")
            continue
        left, needed = args.budget_s - (time.monotonic() - begin), PARTS[name].seconds
        if left < (1 if args.dry else needed):
            what, stopped = "left out" if PARTS[name].extra else "stopped before", True
            say(f"{what} {name}: it may take {needed} s, {left:.0f} s are left; run again")
            if PARTS[name].extra:
                continue
            break
        if args.dry:
            work(name, argparse.Namespace(**vars(args) | {"budget_s": left}))
        else:
            isolated(name, args, left)
        if store.take_in(name) is None:
            say(f"[{name}] left no result")
        if name == "correctness" and store.part(name) is None:
            say("stopped: without a finished correctness part nothing else may be timed")
            break
    complete = all(store.part(name) is not None for name in names)
    _finish(args, store)
    say(report.summary(store.load()))
    wrong = report.wrong_checks(store.load())
    return 0 if (complete or stopped) and not wrong else 1


def _note(args: argparse.Namespace, store: Store) -> dict[str, Any]:
    """Write down what the file is: at once, as a run may be killed."""
    from benchmarks.gpu import environment  # noqa: PLC0415
    from benchmarks.gpu.parts import DEFAULT, default_device  # noqa: PLC0415

    content = store.load()
    content["complete"] = all(store.part(name) is not None for name in DEFAULT)
    content["environment"] = environment.facts(default_device(args.dry), args.commit)
    store.save(content)
    return content


def _finish(args: argparse.Namespace, store: Store) -> None:
    """Note what the file is now, and draw it."""
    from benchmarks.gpu import report  # noqa: PLC0415

    content = _note(args, store)
    say(report.picture(content, args.out / "speed.png"))
    say(f"saved {store.path}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    args = arguments(argv)
    if not args.dry:
        import torch  # noqa: PLC0415

        if not torch.cuda.is_available():
            say("benchmarks.gpu needs a CUDA device; there is none (--dry runs on the CPU)")
            return 2
    if args.worker:
        work(args.worker, args)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
