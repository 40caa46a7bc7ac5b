"""Files that a command writes its result to: options, and writing each whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

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
        with explained(name, path):
            if path.is_dir() or not path.parent.is_dir():
                raise ConfigError(
                    f"`{name}` must be a file in an existing folder; got {str(path)!r}"
                )
            if not _is_special(path):
                tempfile.TemporaryFile(dir=_target_of(path).parent).close()


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
            with explained(name, path):
                write_whole(path, getattr(report, f"to_{name}")())
            written.append(path)
    return written


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step, text as UTF-8: a reader finds the old content or the new one.

    What must not be replaced by a file, like a pipe, is written to as it is.

    Raises:
        OSError: it can't be written, or not safely; see `replacing`.
    """
    data = content.encode() if isinstance(content, str) else content
    if _is_special(path):
        path.write_bytes(data)
        return
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; else nothing changes.

    After that the new file survives a loss of power: its content and its name are on the disk.

    Until then it lies beside the old one under a name that nobody can guess, and is opened only if
    that name is free, so that no link is followed. It gets the old file's permissions, or those
    that the umask leaves. A link at `path` stays one: what it names is replaced.

    Raises:
        OSError: it can't be written; the old file is read-only; or the link lies in a folder that
            all may write to, and somebody else put it there.
    """
    target = _target_of(path)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    fresh = target.with_name(f".{secrets.token_hex(16)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(fresh, flags, 0o666 if mode is None else 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                fresh.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
        _sync_folder(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the file system can be asked to."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue())


def _target_of(path: Path) -> Path:
    """The file that `path` names, behind links; `replacing` says what is raised.

    Links are followed by the rule of Linux's fs.protected_symlinks, which looking at where one
    leads escapes.
    """
    target = Path(os.path.realpath(path))
    if path.is_symlink():
        folder, owner = path.parent.stat(), path.lstat().st_uid
        shared = stat.S_ISVTX | stat.S_IWOTH
        if folder.st_mode & shared == shared and owner not in (os.geteuid(), folder.st_uid):
            raise PermissionError(
                errno.EACCES, "somebody else's link in a shared folder", str(path)
            )
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", str(target))
    return target


def _is_special(path: Path) -> bool:
    """Whether it is something that must not be replaced by a file, like /dev/null or a pipe."""
    return path.exists() and not path.is_file()


@contextlib.contextmanager
def explained(name: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing `path` into a `ConfigError` about the option `name`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"`{name}` must be a file that can be written; got {str(path)!r}: {error.strerror}"
        ) from error
