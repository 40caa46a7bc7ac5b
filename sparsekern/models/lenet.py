"""The small networks of the MNIST experiments."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from sparsekern.models.inputs import check_images


class LeNet(nn.Module):
    """Convolutions with pooling, if any, then a fully connected network."""

    def __init__(
        self,
        classes: int,
        in_channels: int,
        image_size: int,
        conv: Sequence[int],
        hidden: Sequence[int],
    ) -> None:
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size
        features, edge = OrderedDict[str, nn.Module](), image_size
        for i, (before, after) in enumerate(itertools.pairwise((in_channels, *conv)), 1):
            # the first convolution keeps the edge, as if 28 x 28 pixels were LeCun's 32 x 32
            padding = 2 if i == 1 else 0
            features[f"conv{i}"] = nn.Conv2d(before, after, 5, padding=padding)
            features[f"relu{i}"] = nn.ReLU()
            features[f"pool{i}"] = nn.MaxPool2d(2)
            edge = (edge + 2 * padding - 4) // 2
        if edge < 1:
            raise ValueError(f"`image_size` must be at least 12; got {image_size}")
        self.features = nn.Sequential(features)
        widths = ((conv[-1] if conv else in_channels) * edge**2, *hidden)
        layers = OrderedDict[str, nn.Module]()
        for i, (before, after) in enumerate(itertools.pairwise(widths), 1):
            layers[f"fc{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["output"] = nn.Linear(widths[-1], classes)
        self.classifier = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) to (n, classes)."""
        check_images(x, self.in_channels, self.image_size)
        y: Tensor = self.classifier(self.features(x).flatten(1))
        return y


def lenet_300_100(
    classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    hidden: Sequence[int] = (300, 100),
) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998), the MNIST network of Frankle & Carbin 2019 and RigL.

    At the defaults: 3 weight tensors with 266,200 weights, 266,610 parameters, 532,400 FLOPs per
    image. Any image size, digits' 1 x 8 x 8 among them.
    """
    return LeNet(classes, in_channels, image_size, (), hidden)


def lenet_5(
    classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    conv: Sequence[int] = (6, 16),
    hidden: Sequence[int] = (120, 84),
) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, as in Evci et al. 2022, Gradient Flow.

    Frankle & Carbin 2019 use LeNet-300-100 only. Caffe's LeNet-5 of the pruning papers (SNIP) is
    `conv=(20, 50), hidden=(500,)`; its first convolution is not padded there.

    At the defaults: 5 weight tensors with 61,470 weights, 61,706 parameters, 833,040 FLOPs per
    image. Images of 12 x 12 pixels and larger.
    """
    return LeNet(classes, in_channels, image_size, conv, hidden)
