"""The process that carries out cases: a JSON line for each on stdin, a JSON line for each row.

{"case": name, "seconds": left}  ->  {"row": {...}} ... {"error": null, "lost": false, ...}
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.store import Store


def main() -> int:
    """Serve cases until stdin ends or the device is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="the result file")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    # compilers write to stdout too: answers get a descriptor of their own
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        return _serve(args, answers)


def _serve(args: argparse.Namespace, answers: IO[str]) -> int:
    from benchmarks.gpu import compiled  # noqa: PLC0415  after TRITON_INTERPRET
    from benchmarks.gpu.parts import bench_for, default_device, every_case  # noqa: PLC0415
    from sparsekern.errors import told  # noqa: PLC0415

    cases = every_case(dry=args.dry)
    device = default_device(dry=args.dry)
    folder = os.environ.get("TRITON_CACHE_DIR")
    store, read = Store.read(args.store), 0
    with compiled.taken(Path(folder) if folder else None) as count:
        for line in sys.stdin:
            asked, error = json.loads(line), None
            changed = args.store.stat().st_mtime_ns
            if changed != read:
                store, read = Store.read(args.store), changed
            until = time.monotonic() + asked["seconds"]
            try:
                for row in cases[asked["case"]].run(bench_for(store, until, dry=args.dry)):
                    _say(answers, {"row": row})
            except Exception as failure:  # reported, and the next case goes on
                error = told(failure)[:500]
            lost = _is_lost(device.type) if error else False
            gc.collect()  # layers and optimizers refer to each other, and hold memory
            told_of = {"compiled": vars(count)}
            _say(answers, {"error": error, "lost": lost} | told_of)
            if lost:
                return 1
    return 0


def _say(answers: IO[str], event: dict[str, Any]) -> None:
    answers.write(json.dumps(event) + "\n")
    answers.flush()


def _is_lost(device: str) -> bool:
    """Whether the device is of no more use to this process; its unused memory is given back."""
    import torch  # noqa: PLC0415

    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
