"""One run from beginning to end: what is known already, the parts, the report."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu import compiled, environment, report, tables
from benchmarks.gpu.clocks import Clocks
from benchmarks.gpu.hands import Apart, Here
from benchmarks.gpu.parts import PARTS, bench_for, default_device
from benchmarks.gpu.store import Store, file_name
from benchmarks.gpu.turns import Run, say
from sparsekern.show.output_files import write_whole
from sparsekern.tuning.interpreter import steady_dots

SPARE = 20.0  # seconds of the budget in which nothing is begun: for ending, report and picture


def run(args: argparse.Namespace) -> int:
    """All that is pending, as far as the time goes; 1 if a kernel is wrong or nothing was left."""
    names = list(PARTS) if args.parts is None else [n for n in PARTS if n in args.parts]
    with begun(args) as one:
        known = sum(len(one.cases(n)) - len(one.pending(n)) for n in names)
        say(f"{one.store.key}; {known} cases are done already")
        one.turn(names, first=True)
        one.turn(names, first=False)
        one.note(names)
    finish(one.store, args.out)
    return 1 if report.wrong_checks(one.store.content) else 0


@contextmanager
def begun(args: argparse.Namespace) -> Iterator[Run]:
    """A run with its store, clocks, cache and processes."""
    end = time.monotonic() + args.budget_s - (0 if args.dry else SPARE)
    device = default_device(dry=args.dry)
    key = environment.key(device)
    store = opened(args.out / file_name(key), key, args.carry, dry=args.dry)
    with ExitStack() as stack:
        facts: dict[str, Any] = environment.facts(device, args.commit)
        if args.compiled is not None:
            facts["compiled"] = _with_kernels(args.compiled, stack)
        store.runs.append(facts)
        store.save()
        clocks = stack.enter_context(Clocks())
        digests = environment.digests(PARTS, device)
        one = Run(store, device, args.dry, end, _hands(store, dry=args.dry), clocks, digests)
        stack.callback(one.close)
        yield one


def opened(path: Path, key: Mapping[str, str], carried: Iterable[Path], *, dry: bool) -> Store:
    """The store of a key, with what is known; a file of other versions is moved out of the way."""
    store = Store(path, key, dry)
    store.take([path, *carried])
    if path.exists() and Store.read(path).key != dict(key):
        older = path.with_name(f"{path.stem}-older.json")
        path.replace(older)
        say(f"other versions: the results so far are now in {older}")
    return store


def _with_kernels(archive: Path, stack: ExitStack) -> dict[str, Any]:
    """Let this run find kernels that were compiled elsewhere; says how far they fit."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparsekern-kernels-")))
    kernels = compiled.unpack(archive, folder)
    misfits = compiled.misfits(folder)
    stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(folder)}))
    for name, (made, here) in misfits.items():
        say(f"{archive} does not fit: {name} is {here}, was {made}; kernels are compiled anew")
    return {"kernels": kernels, "misfits": sorted(misfits)}


def _hands(store: Store, *, dry: bool) -> Callable[[], Here | Apart]:
    """What makes those that carry out cases: processes, but for a dry run."""
    if dry:
        steady_dots()
        return lambda: Here(lambda until: bench_for(store, until, dry=True))
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--store", str(store.path)]
    return lambda: Apart(command)


def finish(store: Store, folder: Path) -> None:
    """Tell what was found, and write it down for people."""
    text = tables.markdown(store.content)
    write_whole(store.path.with_suffix(".md"), text)
    say(text)
    say(report.picture(store.content, store.path.with_suffix(".png")))
    say(f"saved {store.path} and, for people, {store.path.with_suffix('.md')} in {folder}")
