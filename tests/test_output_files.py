"""Files that commands write: checked first, written whole."""

import argparse
import ast
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekern.errors import ConfigError, told
from sparsekern.show import output_files


class Result:
    def to_json(self):
        return "{}\n"

    def to_csv(self):
        return "ä\n"

    def to_markdown(self):
        raise RuntimeError("out of luck")


def files_of(*options):
    parser = argparse.ArgumentParser()
    output_files.add_options(parser)
    return output_files.files_of(parser.parse_args(options))


def test_only_what_was_asked_for_is_written(tmp_path):
    files = files_of("--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"))
    assert list(tmp_path.iterdir()) == []
    assert output_files.write(Result(), files) == [tmp_path / "r.json", tmp_path / "r.csv"]
    assert (tmp_path / "r.csv").read_bytes() == "ä\n".encode()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_stays_as_it_was_where_the_new_one_fails(tmp_path):
    path = tmp_path / "r.md"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="out of luck"):
        output_files.write(Result(), files_of("--markdown", str(path)))
    assert [found.read_text() for found in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("path", ["no/r.json", ".", "/proc/r.json", "a" * 300])
def test_paths_that_can_not_be_written_are_refused_before(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`json` must be a file .*; got ") as caught:
        files_of("--json", path)
    assert path in str(caught.value)


def test_a_folder_that_is_gone_when_the_result_comes(tmp_path):
    with pytest.raises(
        ConfigError, match="`csv` must be a file that can be written; got .*No such"
    ):
        output_files.write(Result(), {"csv": tmp_path / "no" / "r.csv"})


def test_what_is_no_file_is_written_to_and_not_replaced():
    null = Path("/dev/null")
    assert output_files.write(Result(), files_of("--csv", str(null))) == [null]
    assert null.is_char_device()


@pytest.mark.parametrize("content", ["text\n", b"\x89PNG"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, content):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    link.symlink_to(path)
    output_files.write_whole(path, "old")
    output_files.write_whole(link, content)
    assert link.is_symlink()
    data = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == data

    def full(_descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(output_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        output_files.write_whole(path, "new")
    assert path.read_bytes() == data
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.json", "link.json"}


def test_a_link_laid_at_the_name_of_the_new_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(output_files.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / ".guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        output_files.write_whole(tmp_path / "a.json", "new")
    assert victim.read_text() == "precious"
    assert {entry.name for entry in tmp_path.iterdir()} == {"victim", ".guessed.part"}


def test_names_of_new_files_are_drawn_at_random(tmp_path):
    seen = set()
    for _ in range(3):
        with output_files.replacing(tmp_path / "a.json"):
            seen |= {entry.name for entry in tmp_path.iterdir()} - {"a.json"}
    assert len(seen) == 3
    assert all(len(name) >= 32 for name in seen)  # 128 bits, in hexadecimal


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(mode)
    with output_files.replacing(path):
        (fresh,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(fresh.stat().st_mode) == mode  # before anything is in it
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_permissions_that_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        output_files.write_whole(tmp_path / "a.json", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_a_link_of_somebody_else_in_a_shared_folder_is_refused(tmp_path, monkeypatch):
    folder, victim = tmp_path / "shared", tmp_path / "victim"
    folder.mkdir()
    folder.chmod(0o1777)
    victim.write_text("precious")
    link = folder / "a.json"
    link.symlink_to(victim)
    output_files.write_whole(link, "mine")
    assert victim.read_text() == "mine"  # one's own link is followed

    me = os.geteuid()
    stranger = SimpleNamespace(st_uid=me + 1, st_mode=stat.S_IFLNK | 0o777)
    monkeypatch.setattr(Path, "lstat", lambda _: stranger)
    monkeypatch.setattr(
        Path, "stat", lambda self, **_: os.stat_result((0o41777, *[0] * 3, me + 2, *[0] * 5))
    )
    with pytest.raises(PermissionError, match="somebody else's link in a shared folder"):
        output_files._target_of(link)


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="`json` must be a file that can be written; got "):
        files_of("--json", str(loop))


def test_a_read_only_file_is_refused_before(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(output_files.os, "access", lambda *_: False)  # root may write to it
    with pytest.raises(ConfigError, match="the file is read-only"):
        files_of("--json", str(path))
    with pytest.raises(PermissionError, match="the file is read-only"):
        output_files.write_whole(path, "new")
    assert path.read_text() == "old"


ROOT = Path(output_files.__file__).resolve().parents[2]
LOGS = {"benchmarks/suite/__main__.py", "benchmarks/suite/conftest.py"}
"""What grows while it is followed, in a folder that was made for it."""


def opened_to_write(source):
    """Lines of code that write to a file by themselves."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        modes += [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
        writes = any(isinstance(m, str) and set("wax+") & set(m) and len(m) < 4 for m in modes)
        if name in {"write_text", "write_bytes", "savefig"} or (name == "open" and writes):
            yield node.lineno


def test_nothing_else_writes_files():
    assert list(opened_to_write("open('a', 'w')\np.open(mode='wb')\np.open('rb')")) == [1, 2]
    writers = {
        str(path.relative_to(ROOT))
        for folder in ("sparsekern", "benchmarks", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if any(opened_to_write(path.read_text()))
    }
    assert writers == LOGS | {"sparsekern/show/output_files.py"}


def test_an_error_is_told_on_one_line():
    assert told(ValueError("two\n  lines")) == "ValueError: two lines"
