"""What a movie of a first layer is made of: its connections by pixel and neuron, update by update.

    frames = TopologyFrames((28, 28))
    frames.see(model, step=0)                 # before training
    frames.see(model, step, accuracy=0.85)    # after each topology update
    result["frames"] = frames.to_json()       # a few hundred bytes a frame

Frames are small because a movie needs no masks: what it shows are sums over rows and columns.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, DataError
from sparsekern.nn import SparseLayer, SparseLinear

MOST_COUNTS = 1 << 24
"""Pixels or neurons of a frame that is read: a damaged file may name any number."""


class Frame(NamedTuple):
    """The first layer at one time.

    Attributes:
        step: weight steps taken.
        leaving: connections that leave each pixel, (pixels,) int64; of all channels together.
        fan_in: connections into each neuron, (neurons,) int64.
        accuracy: share of the validation or test data; None if it was not measured then.
    """

    step: int
    leaving: Tensor
    fan_in: Tensor
    accuracy: float | None


def first_layer(model: nn.Module, inputs: int) -> SparseLinear | nn.Linear | None:
    """The first layer that holds weights, if it is fully connected to `inputs` inputs."""
    weighted = (m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False)))
    first = next(weighted, None)
    if isinstance(first, SparseLinear | nn.Linear) and first.in_features == inputs:
        return first
    return None


def counts(layer: SparseLinear | nn.Linear) -> tuple[Tensor, Tensor]:
    """Connections that leave each input and that reach each neuron, int64 on the CPU."""
    if isinstance(layer, SparseLayer):
        mask = layer.mask()
        return mask.sum(0).cpu(), mask.sum(1).cpu()
    rows, cols = layer.out_features, layer.in_features
    return torch.full((cols,), rows, device="cpu"), torch.full((rows,), cols, device="cpu")


class TopologyFrames:
    """The frames of one run, in the order in which they were seen.

    Args:
        image_shape: (height, width) of the images.
        channels: that each pixel has; they come one after the other in a sample.
    """

    def __init__(self, image_shape: tuple[int, int], channels: int = 1) -> None:
        self.image_shape, self.channels = image_shape, channels
        self.frames: list[Frame] = []

    def can_see(self, model: nn.Module) -> bool:
        """Whether the model's first layer is fully connected to the images."""
        return first_layer(model, self.channels * math.prod(self.image_shape)) is not None

    def see(self, model: nn.Module, step: int, accuracy: float | None = None) -> None:
        """Keep the first layer's connections.

        Args:
            model: trained; nothing of it is held or changed.
            step: weight steps taken so far.
            accuracy: share of the held-out data, to be told beside the frame.

        Raises:
            ConfigError: its first layer is not fully connected to the images.
        """
        layer = first_layer(model, self.channels * math.prod(self.image_shape))
        if layer is None:
            raise ConfigError(
                f"a movie shows a first layer that is fully connected to images of "
                f"{self.image_shape} pixels; this model has another"
            )
        leaving, fan_in = counts(layer)
        self.frames.append(Frame(step, leaving.view(self.channels, -1).sum(0), fan_in, accuracy))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and packed counts, for `from_json`."""
        frames = [
            {
                "step": frame.step,
                "accuracy": frame.accuracy,
                "leaving": _pack(frame.leaving),
                "fan_in": _pack(frame.fan_in),
            }
            for frame in self.frames
        ]
        return {"image_shape": list(self.image_shape), "channels": self.channels, "frames": frames}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            DataError: it is something else.
        """
        try:
            height, width = map(int, saved["image_shape"])
            made = cls((height, width), int(saved["channels"]))
            for frame in saved["frames"]:
                leaving, fan_in = (_unpack(frame[name]) for name in ("leaving", "fan_in"))
                if leaving.numel() != height * width:
                    raise DataError(
                        f"frame {len(made.frames)}: expected {height * width} pixels; "
                        f"got {leaving.numel()}"
                    )
                accuracy = frame["accuracy"]
                made.frames.append(
                    Frame(
                        int(frame["step"]),
                        leaving,
                        fan_in,
                        None if accuracy is None else float(accuracy),
                    )
                )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"expected the frames of a topology; got: {error!r}") from error
        return made


def _pack(numbers: Tensor) -> str:
    return base64.b64encode(zlib.compress(numbers.numpy().astype("<i4").tobytes(), 9)).decode()


def _unpack(text: str) -> Tensor:
    packer = zlib.decompressobj()
    try:
        content = packer.decompress(base64.b64decode(text, validate=True), 4 * MOST_COUNTS)
    except (binascii.Error, zlib.error) as error:
        raise DataError(f"expected packed counts; got: {error}") from error
    if not packer.eof or len(content) % 4:
        raise DataError("expected whole packed counts; got a part, or too many")
    return torch.from_numpy(np.frombuffer(content, dtype="<i4").astype(np.int64))
