"""Samples held in memory as tensors, images or text, and the batches that are drawn from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

CLASSES = 10
"""Of each set of images here."""

MOST_SHIFT = 8
"""An eighth of an image's height and width is the most that augmentation shifts it."""


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
    """Images as rows of pixels, or (n, channels, height, width), and their classes.

    Attributes:
        image_shape: (height, width) in pixels.
        average: mean training image, (height, width) float32, brightness in [0, 1], of all channels
            together.
        channels: that a pixel has: 1 for grey, 3 for colours, which follow each other in a row.
        augmented: whether training batches are shifted and mirrored at random, see `augment`.
        train_x: (n, channels * height * width) float32. Grey ones less the average image and
            divided by the standard deviation of all pixels together: a pixel that is always empty
            is 0. Coloured ones less the mean of each channel, divided by its standard deviation.
        train_y: (n,) int64.
        test_x: held out, scaled by the training images' numbers.
    """

    image_shape: tuple[int, int]
    average: Tensor
    channels: int = 1
    augmented: bool = False

    @property
    def sample(self) -> str:
        """What a row is, in words."""
        return "image"

    @property
    def pixels(self) -> int:
        """Pixels per image."""
        return math.prod(self.image_shape)

    @property
    def inputs(self) -> int:
        """Numbers per image: the inputs of a fully connected network."""
        return self.channels * self.pixels

    def with_channel(self) -> Images:
        """The same images as (n, channels, height, width)."""
        shape = (-1, self.channels, *self.image_shape)
        return replace(self, train_x=self.train_x.view(shape), test_x=self.test_x.view(shape))


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


def batches(data: Dataset, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `size` samples; each epoch is a new order, its rest is dropped.

    Everything random in them, `augment` included, follows from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(data.train_y)
    while True:
        order = torch.randperm(samples, generator=generator, device="cpu").to(data.train_y.device)
        for chosen in torch.split(order[: samples // size * size], size):
            x = data.train_x[chosen]
            if isinstance(data, Images) and data.augmented:
                x = augment(x, data, generator)
            yield for_model(x), for_model(data.train_y[chosen])


def augment(x: Tensor, data: Images, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, and mirror every second one, at random.

    As crops of padded images are made for CIFAR-10 (He et al. 2016, section 4.2): 32 pixels are
    padded by 4. What comes in from outside is 0, the mean of scaled images.

    Args:
        x: images of `data`, of any shape that it has; not changed.
        data: whose images they are.
        generator: of chance, on the CPU.
    """
    height, width = data.image_shape
    up, left = height // MOST_SHIFT, width // MOST_SHIFT
    n = len(x)
    drawn = [
        torch.randint(most, (n, 1), generator=generator, device="cpu").to(x.device)
        for most in (2 * up + 1, 2 * left + 1, 2)
    ]
    rows = drawn[0] + torch.arange(height, device=x.device)
    cols = torch.arange(width, device=x.device).expand(n, -1)
    cols = drawn[1] + torch.where(drawn[2] == 1, cols.flip(1), cols)
    padded = pad(x.view(n, data.channels, height, width), (left, left, up, up))
    images = torch.arange(n, device=x.device).view(n, 1, 1)
    # an index between slices: pixels come first, then channels
    moved = padded[images, :, rows.unsqueeze(2), cols.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2).reshape(x.shape)


def for_model(batch: Tensor) -> Tensor:
    """Bytes as int64, which embeddings and losses take; anything else as it is."""
    return batch.long() if batch.dtype == torch.uint8 else batch


def grey_images(name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Images:
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


def coloured_images(name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Images:
    """Scale images (n, channels, height, width) uint8 by channel, and flatten them."""
    floats = [part.float().div_(255) for part in x]
    average = floats[0].mean((0, 1))
    spread, mean = torch.std_mean(floats[0], dim=(0, 2, 3), keepdim=True)
    for part in floats:  # in place: they fill much of a small machine's memory
        part.sub_(mean).div_(spread.clamp(min=1e-6))
    _, channels, height, width = x[0].shape
    return Images(
        name=name,
        classes=CLASSES,
        train_x=floats[0].flatten(1),
        train_y=y[0],
        test_x=floats[1].flatten(1),
        test_y=y[1],
        image_shape=(height, width),
        average=average,
        channels=channels,
    )
