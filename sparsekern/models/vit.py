"""A vision transformer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.models.inputs import check_images
from sparsekern.models.transformer import Block


class ViT(nn.Module):
    """Patches and a class token through blocks; the class token is classified."""

    def __init__(
        self,
        classes: int,
        in_channels: int,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"`image_size` must be a multiple of `patch`; got {image_size} and {patch}"
            )
        self.in_channels, self.image_size = in_channels, image_size
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, (image_size // patch) ** 2 + 1, width))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, image_size, image_size) to (n, classes)."""
        check_images(x, self.in_channels, self.image_size)
        patches = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.class_token.expand(len(x), -1, -1), patches), 1) + self.positions
        return cast(Tensor, self.output(self.norm(self.blocks(y))[:, 0]))


def vit(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
) -> nn.Module:
    """A small ViT (Dosovitskiy et al. 2021); the edge of the image is a multiple of the patch's.

    ViT-S/16 is `vit(1000, image_size=224, patch=16, width=384, depth=12, heads=6)`: 50 weight
    tensors, 22,050,664 parameters, 9,197,764,608 FLOPs per image.

    At the defaults: 26 weight tensors, 2,693,578 parameters, 365,699,328 FLOPs per image,
    attention included.
    """
    return ViT(classes, in_channels, image_size, patch, width, depth, heads)
