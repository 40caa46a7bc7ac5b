"""Correctness and speed on a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu --out DIR [--carry FILE ...] [--compiled FILE] [--budget-s 530]

Needs torch and triton; matplotlib only for the picture. Writes DEVICE.json, and a report beside it.
What is in the file already, or in those carried along, for the same device, versions and sources is
not run again: the same command goes on where the last one stopped, on a fresh machine too. A kernel
that is not correct here gets no speed. A case that hangs or dies costs its own row.

`--dry` walks through everything on the CPU, tiny; `--rehearse` launches every kernel at full size
over the tests' stand-in for the driver, which computes nothing, and packs the compiled kernels into
DIR for `--compiled`. Neither measures anything, and both say so.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
CARRIED = RESULTS / "gpu"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, and refuse what can't be done."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", help="default: all")
    parser.add_argument("--budget-s", type=float, default=530.0, help="seconds of the whole run")
    parser.add_argument(
        "--carry",
        type=Path,
        nargs="*",
        default=sorted(CARRIED.glob("*.json")),
        help="result files to go on from; default: those in benchmarks/results/gpu",
    )
    parser.add_argument("--compiled", type=Path, help="kernels that a rehearsal has packed")
    parser.add_argument("--commit", help="to be noted, where there is no git")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry", action="store_true", help="on the CPU, tiny, measuring nothing")
    only.add_argument("--rehearse", action="store_true", help="compile and launch, without a GPU")
    args = parser.parse_args(argv)
    if (args.dry or args.rehearse) and args.out.resolve().is_relative_to(RESULTS):
        parser.error(f"this measures nothing; got --out {args.out}, among the results")
    if args.dry:
        # read when a kernel is decorated, so before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    if args.parts is not None:
        _check_parts(parser, args.parts)
    return args


def _check_parts(parser: argparse.ArgumentParser, names: list[str]) -> None:
    from benchmarks.gpu.parts import PARTS  # noqa: PLC0415  after TRITON_INTERPRET

    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--parts must be some of {', '.join(PARTS)}; got {', '.join(unknown)}")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    args = arguments(argv)
    if args.rehearse:
        from benchmarks.gpu.rehearse import rehearse  # noqa: PLC0415  installs the stand-in driver

        return rehearse(args.out, args.parts, args.budget_s)
    if not args.dry:
        import torch  # noqa: PLC0415

        if not torch.cuda.is_available():
            sys.stdout.write(
                "benchmarks.gpu needs a CUDA device; there is none (--dry runs on the CPU)\n"
            )
            return 2
    from benchmarks.gpu.conduct import run  # noqa: PLC0415  after TRITON_INTERPRET

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
