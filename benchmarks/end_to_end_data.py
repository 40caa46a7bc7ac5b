"""What the networks of `benchmarks.end_to_end` are trained on."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import pad

from sparsekern.training import data
from sparsekern.training.data import CLASSES, Dataset, Images, Text


def made_images(count: int, edge: int) -> Images:
    """Ten smooth patterns with noise of the same strength, centred: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=(edge, edge), mode="bicubic")[:, 0]
    held_out = 10 * CLASSES
    labels = torch.randint(CLASSES, (count + held_out,), generator=generator)
    noise = torch.randn(len(labels), edge, edge, generator=generator)
    x = ((patterns[labels] + noise) / math.sqrt(2)).flatten(1)
    return Images(
        name=f"made {edge}x{edge}",
        classes=CLASSES,
        train_x=x[:count],
        train_y=labels[:count],
        test_x=x[count:],
        test_y=labels[count:],
        image_shape=(edge, edge),
        average=x[:count].mean(0).view(edge, edge),
    )


def padded(found: Images, edge: int) -> Images:
    """With a rim of the background around them."""
    height, width = found.image_shape
    rim = (
        (edge - width) // 2,
        (edge - width + 1) // 2,
        (edge - height) // 2,
        (edge - height + 1) // 2,
    )
    train_x, test_x = (
        pad(x.view(-1, height, width), rim).flatten(1) for x in (found.train_x, found.test_x)
    )
    average = pad(found.average, rim)
    return replace(found, train_x=train_x, test_x=test_x, image_shape=(edge, edge), average=average)


def images(samples: int, edge: int, data_dir: str | None) -> Dataset:
    """So many images at most, `edge` pixels high and wide: Fashion-MNIST, or made ones."""
    if data_dir is None:
        return made_images(samples, edge)
    found = data.load("fashion-mnist", data_dir)
    if not isinstance(found, Images):
        raise TypeError(f"expected images; got {type(found).__name__}")
    return _first(padded(found, edge), samples)


def text(samples: int, seq_len: int, path: Path | None) -> Dataset:
    """So many sequences at most, of a file or of the documentation that comes with Python."""
    return _first(_text(path, seq_len), samples)


def _text(path: Path | None, seq_len: int) -> Text:
    if path is not None:
        return data.load_text(path, seq_len)
    with tempfile.NamedTemporaryFile() as file:
        file.write("\n".join(topics.values()).encode())
        file.flush()
        return data.load_text(Path(file.name), seq_len)


def _first(found: Dataset, samples: int) -> Dataset:
    order = torch.randperm(len(found.train_y), generator=torch.Generator().manual_seed(0))[:samples]
    return replace(found, train_x=found.train_x[order], train_y=found.train_y[order])
