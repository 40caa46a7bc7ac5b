"""VGG-16, in the forms of CIFAR-10 and ImageNet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from sparsekern.models.inputs import check_images

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each stage; a stage ends with 2 x 2 max pooling."""


class VGG16(nn.Module):
    """Five stages of 3 x 3 convolutions, then a fully connected network."""

    def __init__(
        self,
        classes: int,
        in_channels: int,
        image_size: int,
        batch_norm: bool,
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size
        edge = image_size // 2 ** len(STAGES)
        if edge < 1:
            raise ValueError(f"`image_size` must be at least 32; got {image_size}")
        before, features = in_channels, list[nn.Module]()
        for channels, convolutions in STAGES:
            for _ in range(convolutions):
                features.append(nn.Conv2d(before, channels, 3, padding=1, bias=not batch_norm))
                features += [nn.BatchNorm2d(channels)] if batch_norm else []
                features.append(nn.ReLU())
                before = channels
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        widths = (before * edge**2, *hidden)
        layers = list[nn.Module]()
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout()]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) to (n, classes)."""
        check_images(x, self.in_channels, self.image_size)
        return cast(Tensor, self.output(self.hidden(self.features(x).flatten(1))))


def vgg_16(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    batch_norm: bool = True,
    hidden: Sequence[int] = (),
) -> nn.Module:
    """VGG-16 (Simonyan & Zisserman 2015) as for CIFAR-10: batch norm and no hidden linear layer.

    The ImageNet form is `vgg_16(1000, image_size=224, batch_norm=False, hidden=(4096, 4096))`: 16
    weight tensors, 138,357,544 parameters, 30,940,528,640 FLOPs per image.

    At the defaults: 14 weight tensors with 14,715,584 weights, 14,724,042 parameters, 626,403,328
    FLOPs per image. Images of 32 x 32 pixels and larger.
    """
    return VGG16(classes, in_channels, image_size, batch_norm, hidden)
