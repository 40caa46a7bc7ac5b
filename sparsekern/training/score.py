"""How well a network predicts: its loss, and its accuracy on data that it is not trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.cost.modes import evaluating
from sparsekern.errors import ConfigError
from sparsekern.training.data import Dataset, Text, for_model

SPLIT_SEED = 20_190_926


class Score(NamedTuple):
    """How well held-out data is predicted.

    Attributes:
        accuracy: share of the images, or characters, whose most likely class is the right one.
        bits: per character, of the right one; None for images.
    """

    accuracy: float
    bits: float | None


class Samples(NamedTuple):
    """What is to be predicted from what.

    Attributes:
        x: (n, ...).
        y: (n,) or (n, t).
    """

    x: Tensor
    y: Tensor


def loss_of(scores: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of scores (..., classes) and labels (...)."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction=reduction)


def score(model: nn.Module, samples: Samples, batch: int, *, in_bits: bool) -> Score:
    """Predict the samples, in evaluation mode.

    Args:
        model: whose modes are as they were afterwards.
        samples: on its device.
        batch: how many at once.
        in_bits: whether they are characters.
    """
    right, nats = 0, 0.0
    with evaluating(model):
        for x, y in zip(*(torch.split(part, batch) for part in samples), strict=True):
            scores, labels = model(for_model(x)), for_model(y)
            right += int((scores.argmax(-1) == labels).sum())
            if in_bits:
                nats += float(loss_of(scores, labels, reduction="sum"))
    count = samples.y.numel()
    return Score(right / count, nats / count / math.log(2) if in_bits else None)


def split_off(data: Dataset, share: float) -> tuple[Dataset, Samples | None]:
    """Take a share of the training samples out, to choose by.

    Which ones depends on the data and the share alone: of images by chance, of a text its end.

    Returns:
        The data that is left to train on, and what was taken out; None for a share of 0.

    Raises:
        ConfigError: either part would be empty.
    """
    if not share:
        return data, None
    count = len(data.train_y)
    taken = round(share * count)
    if not 0 < taken < count:
        raise ConfigError(
            f"`validation` must leave samples on both sides; {share} of {count} are {taken}"
        )
    order = torch.arange(count, device="cpu")
    if not isinstance(data, Text):
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(count, generator=generator, device="cpu")
    order = order.to(data.train_y.device)
    kept, held_out = order[: count - taken].sort().values, order[count - taken :].sort().values
    left = replace(data, train_x=data.train_x[kept], train_y=data.train_y[kept])
    return left, Samples(data.train_x[held_out], data.train_y[held_out])


def most_common(data: Dataset) -> float:
    """Share of the test set's most common class: what is right by chance."""
    counts = torch.bincount(for_model(data.test_y).flatten())
    return float(counts.max() / counts.sum())
