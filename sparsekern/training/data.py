"""Data held in memory as tensors: scikit-learn's digits, IDX files of images, and plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DataError, UnavailableError
from sparsekern.training.idx import read_at_most, read_idx

DATASETS = ("digits", "fashion-mnist", "text")
"""Names that `load` knows."""

DEMO_EXTRA = 'pip install "sparsekern[cpu,demo]"'
CLASSES = 10
BYTES = 256
"""Tokens that a text can hold."""

HELD_OUT_SHARE = 0.1
"""Of a text: its end."""

MOST_TEXT = 1 << 31
"""Bytes of a text, which is held in memory."""

_IDX_FILES = {
    "train_images": ("train-images-idx3-ubyte", 3),
    "train_labels": ("train-labels-idx1-ubyte", 1),
    "test_images": ("t10k-images-idx3-ubyte", 3),
    "test_labels": ("t10k-labels-idx1-ubyte", 1),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Samples and what to predict of them.

    Attributes:
        name: as in `DATASETS`.
        classes: how many a prediction chooses from.
        train_x: (n, ...), a sample in each row.
        train_y: (n,) or (n, t), in [0, `classes`).
        test_x: held out, like `train_x`.
        test_y: like `train_y`.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def sample(self) -> str:
        """What a row is, in words."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """The same data on `device`."""
        names = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Dataset):
    """Images as rows of pixels, or (n, 1, height, width), and their classes.

    Attributes:
        image_shape: (height, width) in pixels.
        average: mean training image, (height, width) float32, brightness in [0, 1].
        train_x: (n, height * width) float32, less the average image and divided by the standard
            deviation of all pixels together: a pixel that is always empty is 0.
        train_y: (n,) int64.
        test_x: held out, scaled by the training images' numbers.
    """

    image_shape: tuple[int, int]
    average: Tensor

    @property
    def sample(self) -> str:
        """What a row is, in words."""
        return "image"

    @property
    def pixels(self) -> int:
        """Pixels per image: the number of inputs of a fully connected network."""
        return math.prod(self.image_shape)

    def with_channel(self) -> Images:
        """The same images as (n, 1, height, width)."""
        train_x, test_x = (x.view(-1, 1, *self.image_shape) for x in (self.train_x, self.test_x))
        return replace(self, train_x=train_x, test_x=test_x)


@dataclass(frozen=True, eq=False, kw_only=True)
class Text(Dataset):
    """A text as sequences of bytes; the byte after each is to be predicted.

    Attributes:
        unigram_entropy: of the held-out bytes, in bits per character: no model that ignores the
            characters before does better.
        train_x: (n, t) uint8, sequences that follow each other.
        train_y: (n, t) uint8, one byte further; it shares memory with `train_x`.
    """

    unigram_entropy: float

    @property
    def sample(self) -> str:
        """What a row is, in words."""
        return f"sequence of {self.train_x.shape[1]} bytes"


def load(name: str, data_dir: str | Path | None = None, seq_len: int = 128) -> Dataset:
    """Load a dataset by name, on the CPU.

    Args:
        name: "digits" (embedded in scikit-learn), "fashion-mnist" or "text".
        data_dir: folder of the four IDX files, .gz or plain, for "fashion-mnist"; the file for
            "text".
        seq_len: bytes in a sequence of "text".

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
    if name == "text":
        if data_dir is None:
            raise ConfigError("data 'text' needs a file, given as data directory; got none")
        return load_text(Path(data_dir), seq_len)
    if data_dir is None:
        raise ConfigError(
            f"data {name!r} needs a data directory, the folder that holds "
            f"{_IDX_FILES['train_images'][0]}.gz and its three companions; got none"
        )
    return load_idx(name, Path(data_dir))


def load_digits(test_share: float = 0.2, seed: int = 0) -> Images:
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
    held_out = torch.zeros(len(y), dtype=torch.bool, device="cpu")
    for label in range(CLASSES):
        members = (y == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator, device="cpu")]
        held_out[shuffled[: round(test_share * len(members))]] = True
    x = x.view(-1, 8, 8)
    return _images("digits", (x[~held_out], x[held_out]), (y[~held_out], y[held_out]))


def load_idx(name: str, folder: Path) -> Images:
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
    return _images(name, (x[0] / 255, x[1] / 255), (y[0].long(), y[1].long()))


def load_text(path: Path, seq_len: int) -> Text:
    """Read a file as bytes; its end, `HELD_OUT_SHARE` of it, is held out.

    Raises:
        DataError: it can't be read, is too short for a sequence of each part, or longer than
            `MOST_TEXT`.
    """
    try:
        with path.open("rb") as file:
            content = read_at_most(file, MOST_TEXT + 1)
    except OSError as error:
        raise DataError(f"{path}: expected a readable text file; got: {error}") from error
    if len(content) > MOST_TEXT:
        raise DataError(f"{path}: expected at most {MOST_TEXT:,} bytes; got more")
    held_out = int(HELD_OUT_SHARE * len(content))
    if held_out < seq_len + 1:
        needed = math.ceil((seq_len + 1) / HELD_OUT_SHARE)
        raise DataError(
            f"{path}: expected at least {needed:,} bytes for sequences of {seq_len}; "
            f"got {len(content):,}"
        )
    text = torch.frombuffer(content, dtype=torch.uint8)
    parts = text[: len(text) - held_out], text[len(text) - held_out :]
    (train_x, train_y), (test_x, test_y) = (_sequences(part, seq_len) for part in parts)
    return Text(
        name="text",
        classes=BYTES,
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        unigram_entropy=_entropy(test_y),
    )


def batches(data: Dataset, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `size` samples; each epoch is a new order, its rest is dropped."""
    generator = torch.Generator().manual_seed(seed)
    samples = len(data.train_y)
    while True:
        order = torch.randperm(samples, generator=generator, device="cpu").to(data.train_y.device)
        for chosen in torch.split(order[: samples // size * size], size):
            yield for_model(data.train_x[chosen]), for_model(data.train_y[chosen])


def for_model(batch: Tensor) -> Tensor:
    """Bytes as int64, which embeddings and losses take; anything else as it is."""
    return batch.long() if batch.dtype == torch.uint8 else batch


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise DataError(f"{folder}: expected a file {stem}.gz or {stem}; got neither")


def _images(name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Images:
    """Scale images (n, height, width) in [0, 1], training and held out, and flatten them."""
    average = x[0].mean(0)
    # centred inputs train faster, and a gradient that is common to all pixels would draw the
    # connections of all neurons to the same bright ones
    spread = (x[0] - average).std().clamp(min=1e-6)
    train_x, test_x = (((part - average) / spread).flatten(1) for part in x)
    height, width = average.shape
    return Images(
        name=name,
        classes=CLASSES,
        train_x=train_x,
        train_y=y[0],
        test_x=test_x,
        test_y=y[1],
        image_shape=(height, width),
        average=average,
    )


def _sequences(text: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Views of whole sequences, (n, seq_len) each: bytes, and the byte after each."""
    whole = (len(text) - 1) // seq_len * seq_len
    return text[:whole].view(-1, seq_len), text[1 : whole + 1].view(-1, seq_len)


def _entropy(symbols: Tensor) -> float:
    """Bits per symbol of the frequencies of uint8 symbols."""
    shares = torch.bincount(symbols.flatten(), minlength=BYTES).double() / symbols.numel()
    return float(torch.special.entr(shares).sum() / math.log(2))
