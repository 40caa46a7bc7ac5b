"""MobileNet v1."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sparsekern.models.inputs import check_images

LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
"""Channels and stride of each depthwise-separable layer."""


class MobileNetV1(nn.Module):
    """A 3 x 3 convolution, 13 depthwise-separable ones, mean over pixels, linear classifier."""

    def __init__(self, classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        self.in_channels = in_channels
        before = round(32 * width)
        self.stem = _with_norm(nn.Conv2d(in_channels, before, 3, 2, padding=1, bias=False))
        layers = []
        for channels, stride in LAYERS:
            after = round(channels * width)
            depthwise = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
            pointwise = nn.Conv2d(before, after, 1, bias=False)
            layers.append(nn.Sequential(_with_norm(depthwise), _with_norm(pointwise)))
            before = after
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, classes)."""
        check_images(x, self.in_channels)
        return cast(Tensor, self.output(self.layers(self.stem(x)).mean((2, 3))))


def _with_norm(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


def mobilenet_v1(classes: int = 1000, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """MobileNet v1 (Howard et al. 2017); `width` multiplies all channels.

    At the defaults: 28 weight tensors, 13 of them depthwise, with 4,209,088 weights, 4,231,976
    parameters, 1,137,480,704 FLOPs per 224 x 224 image. Any image size.
    """
    return MobileNetV1(classes, in_channels, width)
