"""Compiled kernels on disk: what is damaged is compiled again, with a warning, and never run."""

import importlib.util
import itertools
import logging

import pytest

numba = pytest.importorskip("numba")

PROGRAM = """
from {place} import jit

@jit
def total(n):
    s = 0
    for i in range(n):
        s += i
    return s
"""


@pytest.fixture(params=["sparsekern.ops.cpu.jit.simd", "sparsekern.topology.compiled"])
def run(request, tmp_path, monkeypatch, caplog):
    """Load a file with one kernel, as a new process would; (sum, whether it was kept, warnings)."""
    program, folder, count = tmp_path / "program.py", tmp_path / "kept", itertools.count()
    program.write_text(PROGRAM.format(place=request.param))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    # the next best place; numba would write beside any user's files
    monkeypatch.setattr("numba.core.caching.UserWideCacheLocator.from_function", lambda *_: None)
    monkeypatch.setattr("numba.core.caching.InTreeCacheLocator.from_function", lambda *_: None)

    def go():
        caplog.clear()
        spec = importlib.util.spec_from_file_location(f"program{next(count)}", program)
        module = importlib.util.module_from_spec(spec)
        with caplog.at_level(logging.WARNING):
            spec.loader.exec_module(module)
            found = module.total(5)
        kept = sum(module.total.stats.cache_hits.values())
        return found, kept, [record.getMessage() for record in caplog.records]

    return go, folder


def _cut(content):
    return content[: len(content) // 2]


def _flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"cut": _cut, "empty": lambda _: b"", "garbage": lambda _: b"\x80\x05" * 99}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), _flipped], ids=[*DAMAGES, "a bit"])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_are_made_anew(run, kind, damage):
    go, folder = run
    assert go() == (10, 0, [])
    (path,) = (p for p in folder.rglob(f"*.{kind}") if ".total" in p.name)
    whole = path.read_bytes()
    assert go() == (10, 1, [])
    path.write_bytes(damage(whole))
    found, kept, warnings = go()
    assert (found, kept) == (10, 0)
    assert str(path) in warnings[0]
    assert "is damaged" in warnings[0]
    assert go() == (10, 1, [])


def test_code_of_an_older_file_under_a_new_index_is_not_run(run, tmp_path):
    go, folder = run
    go()
    (path,) = (p for p in folder.rglob("*.nbc") if ".total" in p.name)
    older, program = path.read_bytes(), tmp_path / "program.py"
    program.write_text(program.read_text().replace("s += i", "s += i + 1"))
    assert go() == (15, 0, [])
    path.write_bytes(older)
    found, kept, warnings = go()
    assert (found, kept) == (15, 0)
    assert "is damaged" in warnings[0]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_files_that_can_not_be_read_are_made_anew(run, kind):
    go, folder = run
    go()
    (path,) = (p for p in folder.rglob(f"*.{kind}") if ".total" in p.name)
    path.unlink()
    path.mkdir()  # neither read nor replaced, by root either
    found, kept, warnings = go()
    assert (found, kept) == (10, 0)
    assert "can't be read" in warnings[0]
    assert "can't be written to" in warnings[-1]


def test_without_a_folder_to_write_to_kernels_are_compiled_and_run(run, tmp_path, monkeypatch):
    go, _ = run
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "kept"))
    assert go()[:2] == (10, 0)
