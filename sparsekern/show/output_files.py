"""Files that a command writes its result to: options, and writing each whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sparsekern.errors import ConfigError

FORMATS = ("json", "csv", "markdown")

Files = Mapping[str, Path | None]
"""Where to write each of `FORMATS`; None: it isn't wanted."""


class Written(Protocol):
    """What has a method for each of `FORMATS`."""

    def to_json(self) -> str:
        """Everything."""

    def to_csv(self) -> str:
        """A line for each layer."""

    def to_markdown(self) -> str:
        """What is printed."""


def add_options(parser: argparse.ArgumentParser, json: str = "everything") -> None:
    """Add a group with --json, --csv, --markdown and --quiet; `json` is the help of the first."""
    group = parser.add_argument_group("what to write")
    for name, text in (
        ("json", json),
        ("csv", "a line for each layer"),
        ("markdown", "what is printed, as Markdown"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    group.add_argument("--quiet", action="store_true", help="no progress, only the result")


def files_of(arguments: argparse.Namespace) -> dict[str, Path | None]:
    """The files that were asked for.

    Raises:
        ConfigError: see `check`.
    """
    files = {name: getattr(arguments, name) for name in FORMATS}
    check(files)
    return files


def check(files: Files) -> None:
    """Refuse files that can't be written, before any work; none is touched.

    Raises:
        ConfigError: a path is a folder, or lies in one that does not exist or can't be written to.
    """
    for name, path in files.items():
        if path is None:
            continue
        with _explained(name, path):
            if path.is_dir() or not path.parent.is_dir():
                raise ConfigError(
                    f"`{name}` must be a file in an existing folder; got {str(path)!r}"
                )
            if not _is_special(path):
                tempfile.TemporaryFile(dir=path.parent).close()


def write(report: Written, files: Files) -> list[Path]:
    """Write the files that are wanted, as UTF-8, each whole or not at all.

    Returns:
        Their paths.

    Raises:
        ConfigError: one can't be written.
    """
    written = []
    for name, path in files.items():
        if path is not None:
            with _explained(name, path):
                write_whole(path, getattr(report, f"to_{name}")())
            written.append(path)
    return written


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text as UTF-8: a reader finds the old content or the new one.

    What must not be replaced by a file, like a pipe, is written to as it is.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_special(path):
        path.write_bytes(data)
        return
    fresh = path.resolve()  # a link stays one
    fresh = fresh.with_name(f".{fresh.name}.{os.getpid()}.part")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path.resolve())
    finally:
        fresh.unlink(missing_ok=True)


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue())


def _is_special(path: Path) -> bool:
    """Whether it is something that must not be replaced by a file, like /dev/null or a pipe."""
    return path.exists() and not path.is_file()


@contextlib.contextmanager
def _explained(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"`{name}` must be a file that can be written; got {str(path)!r}: {error.strerror}"
        ) from error
