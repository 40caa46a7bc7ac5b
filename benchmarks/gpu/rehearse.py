"""Every case at its full size over the tests' stand-in for the driver: launched, never computed.

What runs on a GPU runs here up to the driver: operands, launchers, Triton's compiler and its C
launcher. Large tensors are memory that nobody touches, and torch's own products of them are left
out, so results are arbitrary and nothing is timed. What comes of it are the faults of the launch
code, and the compiled kernels. torch's own Triton kernels, the peers, ask for a real GPU and fail.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

TESTS = Path(__file__).resolve().parents[2] / "tests"
GPTS = ((256, 1, 128, 8), (2048, 1, 128, 64))
"""Launches like those of the full ones: as wide, as many tokens, one block deep."""
VALUES_DECIDE = tuple(f"update {edge}" for edge in (128, 64, 32, 16, 1))
"""Cases that do nothing with arbitrary numbers: RigL refuses what is not finite."""
LARGE = 2**16  # numbers of a tensor
ARCHIVE = "compiled.tar.xz"
DRAWS = ("aten::randn", "aten::randint", "aten::normal_functional")


def rehearse(folder: Path, parts: Sequence[str] | None, budget_s: float) -> int:
    """Launch everything, pack the kernels; 1 if a case failed.

    Args:
        folder: of the cache (`kernels/`), which a later rehearsal goes on with, and the archive.
        parts: to go through; None: all.
        budget_s: seconds after which no case is begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache, failures, late = folder / "kernels", 0, 0
    end = time.monotonic() + budget_s
    with _stand_in(cache):
        from benchmarks.gpu import compiled  # noqa: PLC0415  after the stand-in driver

        with compiled.taken(None) as count:
            for name, case, bench in _cases(parts):
                if time.monotonic() >= end:
                    late += 1
                    continue
                begin, made = time.monotonic(), count.made
                told = _walk(case, bench)
                failures += told != ""
                seconds = time.monotonic() - begin
                _say(f"[{name}] {case.name}: {count.made - made} kernels, {seconds:.0f} s{told}")
        kernels = compiled.pack(cache, folder / ARCHIVE)
    size = (folder / ARCHIVE).stat().st_size / 2**20
    _say(
        f"{failures} cases failed, {late} not begun; {count.made} kernels compiled; "
        f"{folder / ARCHIVE} holds {kernels}, {size:.1f} MiB"
    )
    return 1 if failures else 0


def _cases(parts: Sequence[str] | None) -> Iterator[tuple[str, Any, Any]]:
    """(part, case, its surroundings)."""
    from benchmarks.gpu.bench import Bench  # noqa: PLC0415  after the stand-in driver
    from benchmarks.gpu.cases import FULL  # noqa: PLC0415
    from benchmarks.gpu.correctness import Gate  # noqa: PLC0415
    from benchmarks.gpu.parts import PARTS  # noqa: PLC0415

    class Open(Gate):
        """Lets everything be timed."""

        def kernel(self, name: str, block: tuple[int, int], kind: str) -> str:
            """As if it had been right."""
            del name, block, kind
            return "ok"

    device, plan = torch.device("cpu"), replace(FULL, rounds=1, gpts=GPTS, probe_bytes=2**20)
    for name in PARTS if parts is None else parts:
        for case in PARTS[name].cases(plan, device):
            if case.name in VALUES_DECIDE:
                continue
            yield name, case, Bench(plan, device, Open([]))


def _walk(case: Any, bench: Any) -> str:
    """Run a case; what failed, if anything."""
    from sparsekern.errors import told  # noqa: PLC0415

    try:
        with Untouched():  # type: ignore[no-untyped-call]
            rows = list(case.run(bench))
    except Exception as error:  # reported, and the next case goes on
        return f"; FAILED: {told(error)[:300]}"
    # of correctness nothing can be said: what a launch raises ends up in its row all the same
    ours = [row for row in rows if "peer" not in row]
    found = [str(row.get("detail") or row.get("status", "")) for row in ours]
    failed = [text for text in found if text.startswith("failed") or "Error:" in text]
    return f"; FAILED: {failed[0][:300]}" if failed else ""


@contextmanager
def _stand_in(cache: Path) -> Iterator[None]:
    """The tests' driver in place of NVIDIA's, CPU tensors taken for CUDA tensors."""
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1",
    }
    with mock.patch.dict(os.environ, settings):
        sys.path.insert(0, str(TESTS))
        importlib.import_module("launch.standin")
        from sparsekern.ops import dispatch  # noqa: PLC0415  after the stand-in driver

        filling: Any = torch.utils.deterministic
        before = filling.fill_uninitialized_memory
        filling.fill_uninitialized_memory = False  # memory that must not be touched, with NaN
        try:
            with mock.patch.object(dispatch, "_check_triton"):
                yield
        finally:
            filling.fill_uninitialized_memory = before


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves out what torch would compute of large tensors of floats; comparisons say "equal"."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """An operator, or memory in place of its result."""
        del types
        given = dict(kwargs or {})
        if func.namespace != "aten" or not _is_large(func, args, given):
            return func(*args, **given)
        schema = func._schema
        if schema.is_mutable:  # in place, or into `out`
            return given.get("out", args[0])
        if any(r.alias_info is not None for r in schema.returns):  # a view
            return func(*args, **given)
        try:
            shapes = func(
                *tree_map(_shape, args), **tree_map(_shape, given) | _nowhere(func, given)
            )
        except Exception:  # it depends on data
            return func(*args, **given)
        if func._schema.name not in DRAWS and any(_is_index(t) for t in tree_iter(shapes)):
            return func(*args, **given)  # an order, by which a topology is drawn
        return tree_map(_memory, shapes)


def _is_large(func: Any, args: Any, kwargs: Any) -> bool:
    tensors = [a for a in tree_iter((args, kwargs)) if isinstance(a, Tensor)]
    if any(t.device.type == "meta" or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    if func._schema.name in DRAWS:
        sizes = [a for a in args if isinstance(a, list | tuple | torch.Size)]
        return any(len(s) > 1 and torch.Size(s).numel() > LARGE for s in sizes)
    return any(t.is_floating_point() and t.numel() > LARGE for t in tensors)


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None if isinstance(value, torch.Generator) else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _nowhere(func: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Where an operator is told a device, none with memory."""
    draws = func._schema.name in DRAWS
    return {"device": "meta"} if draws or kwargs.get("device") is not None else {}


def _is_index(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not value.is_floating_point()


def _memory(value: Any) -> Any:
    """What a result would take: zeros, which cost nothing until they are touched."""
    if not isinstance(value, Tensor):
        return value
    span = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)) + 1
    flat = torch.zeros(span if value.numel() else 0, dtype=value.dtype)
    return flat.as_strided(value.shape, value.stride())


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
