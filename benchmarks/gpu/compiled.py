"""Compiled kernels that travel: made where there is no GPU, found in the cache where there is one.

Triton's cache is a folder for each kernel, named by a digest of: the kernel's source and what it
calls, the types and alignments of its arguments, its constants and options, the target, the text of
`ptxas --version`, the environment variables that change what is compiled, and Triton's own files.
Of those the last differs between builds of one release (a build for Python 3.11 has another
library than one for 3.12) and changes nothing in a compiled kernel: where release, `ptxas` and
environment agree, the builder's digest of them is taken for ours. The lists of files in the cache
hold absolute paths, which are made anew where they are unpacked.

An archive holds machine code and launchers only. Launchers belong to a Python version; Triton
builds those that don't fit anew, with the C compiler, in half a second each.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sparsekern.show.output_files import replacing, write_whole

STATED = "compiled.json"
KEPT = (".cubin", ".json", ".so")
LIST = "__grp__"


@dataclass
class Count:
    """Kernels that were asked for: found in the cache, or compiled here."""

    found: int = 0
    made: int = 0
    seconds: float = 0.0

    def heard(self, *, cache_hit: bool, times: Any = None, **_: Any) -> None:
        """As Triton's compilation listener."""
        self.found += cache_hit
        self.made += not cache_hit
        if not cache_hit and times is not None:
            self.seconds += times.total / 1e6


def facts() -> dict[str, Any]:
    """What a kernel's place in the cache depends on besides the kernel, here."""
    import triton  # noqa: PLC0415  after TRITON_INTERPRET
    from triton import knobs  # noqa: PLC0415
    from triton._C.libtriton import get_cache_invalidating_env_vars  # noqa: PLC0415
    from triton.backends.nvidia.compiler import get_ptxas_version  # noqa: PLC0415
    from triton.runtime import cache  # noqa: PLC0415

    return {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "build": cache.triton_key(),
        "ptxas": get_ptxas_version(),
        "ptxas_options": knobs.nvidia.ptxas_options,
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
    }


def pack(folder: Path, archive: Path) -> int:
    """Write what a cache holds to a .tar.xz; returns its kernels."""
    kernels = 0
    with replacing(archive) as file, tarfile.open(fileobj=file, mode="w:xz") as tar:
        _add(tar, STATED, json.dumps(facts(), indent=1).encode())
        for path in sorted(folder.glob("*/*")):
            name = path.relative_to(folder).as_posix()
            if path.name.startswith(LIST):
                files = json.loads(path.read_text())["child_paths"]
                kept = {n: "" for n in files if n.endswith(KEPT)}
                _add(tar, name, json.dumps({"child_paths": kept}).encode())
            elif path.suffix in KEPT:
                kernels += path.suffix == ".cubin"
                _add(tar, name, path.read_bytes())
    return kernels


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def unpack(archive: Path, folder: Path) -> int:
    """Make a cache of an archive; returns its kernels."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for path in folder.glob(f"*/{LIST}*"):
        files = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in files}
        write_whole(path, json.dumps({"child_paths": here}))
    return len(list(folder.glob("*/*.cubin")))


def misfits(folder: Path) -> dict[str, tuple[Any, Any]]:
    """What an unpacked cache was made with and what is here, where that loses its kernels."""
    made, here = json.loads((folder / STATED).read_text()), facts()
    names = ("triton", "ptxas", "ptxas_options", "environment")
    return {name: (made[name], here[name]) for name in names if made[name] != here[name]}


@contextmanager
def taken(folder: Path | None) -> Iterator[Count]:
    """Find kernels in an unpacked cache, whatever build of Triton filled it; and count them.

    TRITON_CACHE_DIR must name the folder already.
    """
    from triton import knobs  # noqa: PLC0415  after TRITON_INTERPRET
    from triton.runtime import cache  # noqa: PLC0415

    count, before = Count(), knobs.compilation.listener
    foreign = folder is not None and (folder / STATED).exists() and not misfits(folder)
    build = json.loads((folder / STATED).read_text())["build"] if folder and foreign else None
    knobs.compilation.listener = count.heard
    try:
        if build is None:
            yield count
        else:
            with mock.patch.object(cache, "triton_key", return_value=build):
                yield count
    finally:
        knobs.compilation.listener = before
