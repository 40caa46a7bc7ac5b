"""Files that commands write: checked first, written whole."""

import argparse
from pathlib import Path

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


def test_an_error_is_told_on_one_line():
    assert told(ValueError("two\n  lines")) == "ValueError: two lines"
