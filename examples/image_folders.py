"""Images in folders, one folder a class, read with Pillow; no torchvision is needed.

Which images make a batch, and how each is cropped and flipped, follows from a seed and the number
of the batch alone. So a run that is resumed sees what it would have seen, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a random crop: share of the image, width / height (Szegedy et al. 2015)."""
TRIES = 10
MARGIN = 256 / 224
"""To test: the short edge, as a multiple of the square that is cut from its middle."""

Key = tuple[int, int]
"""Epoch and index of an image."""
Box = tuple[float, float, float, float]


class ImageFolders(Dataset[tuple[Tensor, int]]):
    """Images by (epoch, index): ((3, size, size) float32, normalised, and its class).

    Args:
        root: a folder of each class, with images in it or in folders of its own.
        size: edge of the square, in pixels.
        seed: of crops and flips; None for the middle of each image.

    Raises:
        FileNotFoundError: there is no image.
    """

    def __init__(self, root: Path, size: int, seed: int | None) -> None:
        self.size, self.seed = size, seed
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        self.images = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.images:
            raise FileNotFoundError(f"no images in the folders of {root}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        path, label = self.images[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if self.seed is None:
            return as_tensor(self._square(image, self._middle(image))), label
        g = torch.Generator().manual_seed(_mixed(self.seed, epoch, index))
        cut = self._square(image, random_box(image.width, image.height, g))
        if torch.rand((), generator=g) < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return as_tensor(cut), label

    def _middle(self, image: Image.Image) -> Box:
        edge = min(image.size) / MARGIN
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        return left, top, left + edge, top + edge

    def _square(self, image: Image.Image, box: Box) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


def random_box(width: int, height: int, g: torch.Generator) -> Box:
    """A part of an image, of random area and ratio: left, top, right, bottom."""
    for _ in range(TRIES):
        draw = torch.rand(4, generator=g).tolist()
        area = width * height * (AREA[0] + draw[0] * (AREA[1] - AREA[0]))
        low, high = map(math.log, RATIO)
        ratio = math.exp(low + draw[1] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw[2] * (width - w + 1)), int(draw[3] * (height - h + 1))
            return left, top, left + w, top + h
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    return left, top, left + edge, top + edge


def as_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) float32, with each channel's mean and deviation taken out."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (pixels - mean) / std


class Batches(Sampler[list[Key]]):
    """What one rank takes of each batch, without end: an epoch is all whole batches of a shuffle.

    Args:
        images: how many there are.
        batch: of all ranks together; as many as the ranks times a whole number.
        start: first batch, counted from the start of the training.
        rank: its number.
        world: number of ranks.
        seed: of the shuffles.

    Raises:
        ValueError: the batch is larger than the data set, or can't be shared out evenly.
    """

    def __init__(
        self, images: int, batch: int, start: int, rank: int, world: int, seed: int
    ) -> None:
        if not 0 < batch <= images or batch % world:
            raise ValueError(
                f"the batch must be a multiple of {world} ranks, and at most all {images} images; "
                f"got {batch}"
            )
        self.images, self.batch, self.start = images, batch, start
        self.rank, self.world, self.seed = rank, world, seed

    def __iter__(self) -> Iterator[list[Key]]:
        whole, own = self.images // self.batch, self.batch // self.world
        epoch, first = divmod(self.start, whole)
        while True:
            g = torch.Generator().manual_seed(_mixed(self.seed, epoch, 0))
            order = torch.randperm(self.images, generator=g).tolist()
            for i in range(first, whole):
                at = i * self.batch + self.rank * own
                yield [(epoch, index) for index in order[at : at + own]]
            epoch, first = epoch + 1, 0


def shares(images: int, batch: int, rank: int, world: int) -> Iterator[list[Key]]:
    """Every image once, on one of the ranks."""
    own = range(rank, images, world)
    for start in range(0, len(own), batch):
        yield [(0, index) for index in own[start : start + batch]]


def _mixed(*numbers: int) -> int:
    """A seed of several numbers."""
    words = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1]) >> 1
