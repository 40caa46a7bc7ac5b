"""CIFAR-10 as it is published: pickles or records of bytes, in a folder or an archive."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

from sparsekern.errors import DataError
from sparsekern.training.data.idx import Bounded, read_at_most
from sparsekern.training.data.pickles import array_in, read_pickle
from sparsekern.training.data.samples import CLASSES, Images, coloured_images

SHAPE = (3, 32, 32)
_NUMBERS = 3 * 32 * 32
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_ZIPPED = (".gz", ".tgz")


class Part(NamedTuple):
    """One of the six files: images (n, 3, 32, 32) uint8 and labels (n,) int64."""

    x: torch.Tensor
    y: torch.Tensor


def load_cifar10(path: Path) -> Images:
    """Load CIFAR-10, of colours: 50,000 images to train with and 10,000 held out.

    Args:
        path: a folder of the six files `data_batch_1` to `data_batch_5` and `test_batch`, with or
            without .bin, or of the folder or archive that holds them; or that archive.

    Raises:
        DataError: a file is missing or damaged.
    """
    parts: dict[str, Part] = {}
    for name, where, read in _files(path):
        try:
            parts[name] = read()
        except (OSError, EOFError, zlib.error, tarfile.TarError, DataError) as error:
            raise DataError(f"{where}: expected images of CIFAR-10; got: {error}") from error
    missing = [name for name in (*TRAIN, TEST) if name not in parts]
    if missing:
        raise DataError(
            f"{path}: expected the files of CIFAR-10, {TRAIN[0]} to {TRAIN[-1]} and {TEST}, or an "
            f"archive of them; without {', '.join(missing)}. They are published at {PAGE}"
        )
    x = torch.cat([parts[name].x for name in TRAIN]), parts[TEST].x
    y = torch.cat([parts[name].y for name in TRAIN]), parts[TEST].y
    return coloured_images("cifar-10", x, y)


_Found = tuple[str, str, Callable[[], Part]]


def _files(path: Path) -> Iterator[_Found]:
    """(name without .bin, where, how to read it) of each file that is there."""
    if path.is_file():
        yield from _in_archive(path)
        return
    for folder in (path, *(path / name for name in _FOLDERS)):
        found = [(n, p) for n in (*TRAIN, TEST) for p in (folder / n, folder / f"{n}.bin")]
        there = [(n, p) for n, p in found if p.is_file()]
        for name, file in there:
            yield name, str(file), partial(_opened, file)
        if there:
            return
    for archive in (path / name for name in _ARCHIVES):
        if archive.is_file():
            yield from _in_archive(archive)
            return


def _opened(path: Path) -> Part:
    with path.open("rb") as file:
        return _part(file, path.suffix == ".bin")


def _in_archive(path: Path) -> Iterator[_Found]:
    """The members of those names, whatever their folder; nothing is written to the disk."""
    try:
        with (
            cast(BinaryIO, gzip.open(path) if path.suffix in _ZIPPED else path.open("rb")) as file,
            tarfile.open(fileobj=cast(Any, Bounded(file)), mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.rpartition("/")[2]
                stem = name.removesuffix(".bin")
                if stem not in (*TRAIN, TEST) or not member.isreg():
                    continue
                if (packed := archive.extractfile(member)) is not None:
                    content = io.BytesIO(read_at_most(cast(BinaryIO, packed), member.size))
                    yield stem, f"{path}, {name}", partial(_part, content, stem != name)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: expected an archive of CIFAR-10; got: {error}") from error
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error


def _part(file: BinaryIO, binary: bool) -> Part:
    images, labels = (_records if binary else _batch)(Bounded(file))
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"labels in [0, {CLASSES}) were expected; got {labels.max()}")
    x, y = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    return Part(x.view(-1, *SHAPE), y)


def _records(file: Bounded) -> tuple[np.ndarray, np.ndarray]:
    """A label, and three planes of pixels, one image after the other."""
    content = file.read()
    if not content or len(content) % (1 + _NUMBERS):
        raise DataError(
            f"records of {1 + _NUMBERS} bytes were expected; got {len(content):,} bytes"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + _NUMBERS)
    return records[:, 1:], records[:, 0]


def _batch(file: Bounded) -> tuple[np.ndarray, np.ndarray]:
    """A dict of an array and a list of labels."""
    saved = read_pickle(file)
    if not isinstance(saved, dict):
        raise DataError(f"a dict of data and labels was expected; got {type(saved).__name__}")
    images, labels = (saved.get(name.encode(), saved.get(name)) for name in ("data", "labels"))
    pixels = array_in(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _NUMBERS:
        raise DataError(
            f"data of shape (n, {_NUMBERS}), uint8, was expected; got {pixels.shape}, "
            f"{pixels.dtype}"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"a list of labels was expected; got {type(labels).__name__}")
    if len(labels) != len(pixels) or not labels:
        raise DataError(f"{len(pixels)} labels were expected; got {len(labels)}")
    return pixels, np.array(labels)
