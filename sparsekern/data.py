"""Small image datasets, held in memory as tensors: scikit-learn's digits, and IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DataError, UnavailableError

DATASETS = ("digits", "fashion-mnist")
"""Names that `load` knows."""

DEMO_EXTRA = 'pip install "sparsekern[demo]"'
CLASSES = 10

_IDX_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}
_UINT8 = 0x08
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as rows of pixels, and their classes.

    Attributes:
        name: as in `DATASETS`.
        image_shape: (height, width) in pixels.
        average: mean training image, (height, width) float32, brightness in [0, 1].
        train_x: (n, height * width) float32, less the average image and divided by the standard
            deviation of all pixels together: a pixel that is always empty is 0.
        train_y: (n,) int64, in [0, `CLASSES`).
        test_x: held out, scaled by the training images' numbers.
        test_y: like `train_y`.
    """

    name: str
    image_shape: tuple[int, int]
    average: Tensor
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def pixels(self) -> int:
        """Pixels per image: the number of inputs of a network."""
        return math.prod(self.image_shape)

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        names = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Load a dataset by name, on the CPU.

    Args:
        name: "digits" (embedded in scikit-learn) or "fashion-mnist".
        data_dir: folder of the four IDX files, .gz or plain; for "fashion-mnist" only.

    Raises:
        ConfigError: the name is unknown, or `data_dir` is missing or superfluous.
        DataError: a file or folder is missing or damaged.
        UnavailableError: scikit-learn is not installed.
    """
    if name not in DATASETS:
        raise ConfigError(f"`data` must be one of {DATASETS}; got {name!r}")
    if name == "digits":
        if data_dir is not None:
            raise ConfigError(
                f"data 'digits' is part of scikit-learn and takes no data directory; "
                f"got {str(data_dir)!r}"
            )
        return load_digits()
    if data_dir is None:
        raise ConfigError(
            f"data {name!r} needs a data directory, the folder that holds "
            f"{_IDX_FILES['train_images'][0]}.gz and its three companions; got none"
        )
    return load_idx(name, Path(data_dir))


def load_digits(test_share: float = 0.2, seed: int = 0) -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; `test_share` of each class is held out.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise UnavailableError(f"data 'digits' needs scikit-learn: {DEMO_EXTRA}") from error
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(images, dtype=np.float32) / 16)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in range(CLASSES):
        members = (y == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        held_out[shuffled[: round(test_share * len(members))]] = True
    x = x.view(-1, 8, 8)
    return _dataset("digits", (x[~held_out], x[held_out]), (y[~held_out], y[held_out]))


def load_idx(name: str, folder: Path) -> Dataset:
    """Load the four files of MNIST's format from `folder`.

    Raises:
        DataError: the folder or a file is missing or damaged, or the files do not fit together.
    """
    if not folder.is_dir():
        raise DataError(f"the data directory must be a folder; got {str(folder)!r}")
    paths = {key: _find(folder, stem) for key, (stem, _) in _IDX_FILES.items()}
    arrays = {key: read_idx(paths[key], dims) for key, (_, dims) in _IDX_FILES.items()}
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
    return _dataset(name, (x[0] / 255, x[1] / 255), (y[0].long(), y[1].long()))


def batches(data: Dataset, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `size` images; each epoch is a new order, its rest is dropped."""
    generator = torch.Generator().manual_seed(seed)
    images = len(data.train_y)
    while True:
        order = torch.randperm(images, generator=generator).to(data.train_y.device)
        for chosen in torch.split(order[: images // size * size], size):
            yield data.train_x[chosen], data.train_y[chosen]


def read_idx(path: Path, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        dims: how many dimensions it must have: 3 for images (n, height, width), 1 for labels.

    Returns:
        A uint8 array, at least one element in each dimension.

    Raises:
        DataError: it can't be read, its magic number is another, or its length does not fit.
    """
    try:
        # zlib checks its sums at the end only, so a body too long or too short is named first
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            shape = _read_header(file, path, dims)
            body = _read_at_most(file, math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable IDX file; got: {error}") from error
    if len(body) != math.prod(shape):
        got = f"{len(body):,}" if len(body) < math.prod(shape) else "more"
        raise DataError(f"{path}: expected {math.prod(shape):,} bytes of data {shape}; got {got}")
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)


def _read_header(file: BinaryIO, path: Path, dims: int) -> tuple[int, ...]:
    size = 4 + 4 * dims
    header = file.read(size)
    expected = bytes((0, 0, _UINT8, dims))
    if header[:4] != expected:
        raise DataError(
            f"{path}: expected magic number 0x{expected.hex()} (unsigned bytes, {dims} "
            f"dimension{'s' * (dims > 1)}); got 0x{header[:4].hex()}"
        )
    if len(header) != size:
        raise DataError(f"{path}: expected a header of {size} bytes; got {len(header)}")
    shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4", offset=4))
    if min(shape) < 1:
        raise DataError(f"{path}: expected positive sizes; got {shape}")
    return shape


def _read_at_most(file: BinaryIO, size: int) -> bytes:
    """Read up to `size` bytes, allocating no more than what is there: headers may lie."""
    chunks, left = [], size
    while left and (chunk := file.read(min(left, _CHUNK))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected a file {stem}.gz or {stem}; got neither")


def _dataset(name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Dataset:
    """Scale images (n, height, width) in [0, 1], training and held out, and flatten them."""
    average = x[0].mean(0)
    # centred inputs train faster, and a gradient that is common to all pixels would draw the
    # connections of all neurons to the same bright ones
    spread = (x[0] - average).std().clamp(min=1e-6)
    train_x, test_x = (((part - average) / spread).flatten(1) for part in x)
    height, width = average.shape
    return Dataset(name, (height, width), average, train_x, y[0], test_x, y[1])
