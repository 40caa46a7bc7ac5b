"""ResNet-50 and the Wide ResNet of the CIFAR-10 experiments."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from sparsekern.models.inputs import check_images

EXPANSION = 4
"""Channels a bottleneck gives, as a multiple of those inside."""


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution beside a shortcut (He et al. 2016)."""

    def __init__(self, before: int, inside: int, stride: int) -> None:
        super().__init__()
        after = EXPANSION * inside
        self.conv1, self.bn1 = _conv(before, inside, 1), nn.BatchNorm2d(inside)
        # v1.5: the 3 x 3 convolution strides, not the 1 x 1 before it
        self.conv2, self.bn2 = _conv(inside, inside, 3, stride), nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = _conv(inside, after, 1), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(_conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(n, before, h, w) to (n, 4 inside, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """Stem, four stages of bottlenecks, mean over pixels, linear classifier."""

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        before, stages = 64, []
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inside, made = 64 << stage, []
            for i in range(blocks):
                made.append(Bottleneck(before, inside, 2 if stage and i == 0 else 1))
                before = EXPANSION * inside
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.output = nn.Linear(before, classes)
        _init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, classes)."""
        check_images(x, self.in_channels)
        y = self.pool(functional.relu(self.bn1(self.conv1(x))))
        return cast(Tensor, self.output(self.stages(y).mean((2, 3))))


class WideBlock(nn.Module):
    """Norm and ReLU before each of two 3 x 3 convolutions (Zagoruyko & Komodakis 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), _conv(before, after, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), _conv(after, after, 3)
        self.shortcut = _conv(before, after, 1, stride) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, before, h, w) to (n, after, h / stride, w / stride)."""
        y = functional.relu(self.bn1(x))
        # where the shape changes, the shortcut too starts from the normalised input
        short = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(functional.relu(self.bn2(self.conv1(y))))
        return cast(Tensor, y + short)


class WideResNet(nn.Module):
    """First convolution, three stages of wide blocks, mean over pixels, linear classifier."""

    def __init__(self, classes: int, in_channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv1 = _conv(in_channels, 16, 3)
        before, stages = 16, []
        for stage in range(3):
            after, made = (16 << stage) * width, []
            for i in range(blocks):
                made.append(WideBlock(before, after, 2 if stage and i == 0 else 1))
                before = after
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(before)
        self.output = nn.Linear(before, classes)
        _init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, classes)."""
        check_images(x, self.in_channels)
        y = functional.relu(self.bn(self.stages(self.conv1(x))))
        return cast(Tensor, self.output(y.mean((2, 3))))


def _init_convs(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet_50(classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-50 v1.5 (He et al. 2016), the ImageNet network of RigL.

    v1.5: the stride is on the 3 x 3 convolution.

    At the defaults: 54 weight tensors (53 convolutions and the output layer) with 25,502,912
    weights, 25,557,032 parameters, 8,178,368,512 FLOPs per 224 x 224 image. Any image size.
    """
    return ResNet50(classes, in_channels)


def wide_resnet_22_2(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """WRN-22-2 (Zagoruyko & Komodakis 2016), the CIFAR-10 network of RigL.

    6 n + 4 = 22 layers, so n = 3 blocks a stage; 2: channels are twice those of a plain ResNet.

    At the defaults: 23 weight tensors (22 convolutions, three of them 1 x 1 shortcuts, and the
    output layer) with 1,076,912 weights, 1,079,642 parameters, 315,460,096 FLOPs per 32 x 32 image.
    Any image size, digits' 1 x 8 x 8 among them.
    """
    return WideResNet(classes, in_channels, blocks=3, width=2)
