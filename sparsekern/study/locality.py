"""Which pixels the neurons of a mask over images look at, and how near to one another they are.

Pellegrini & Biroli 2021, "Sifting out the features by pruning": masks of iterative magnitude
pruning turn local, as convolutions are. A pixel is an input: channel, row, column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError

Image = tuple[int, int, int]
"""Channels, rows, columns of the images; an input is (channel * rows + row) * columns + column."""


class Displacements(NamedTuple):
    """How often two inputs of one neuron are apart by d: both ways, over all neurons.

    A neuron of n inputs adds n (n - 1). The middle is d = (0, 0).

    Attributes:
        same: both inputs of one channel; (2 rows - 1, 2 columns - 1) int64, rows first.
        different: of two channels.
    """

    same: Tensor
    different: Tensor

    @property
    def pairs(self) -> int:
        """Pairs of inputs, each counted once."""
        return int(self.same.sum() + self.different.sum()) // 2

    def near(self, distance: int = 3) -> float:
        """Share of pairs that are at most so far apart, in Chebyshev distance; NaN without any."""
        counts, far = self._counted()
        total = int(counts.sum())
        return int(counts[far <= distance].sum()) / total if total else float("nan")

    def mean_distance(self) -> float:
        """Mean Chebyshev distance of a pair, in pixels; NaN without any."""
        counts, far = self._counted()
        total = int(counts.sum())
        return int((counts * far).sum()) / total if total else float("nan")

    def _counted(self) -> tuple[Tensor, Tensor]:
        """Counts by displacement, and how far each of these is."""
        rows, columns = ((n - 1) // 2 for n in self.same.shape)
        down = torch.arange(-rows, rows + 1, device=self.same.device).abs()
        right = torch.arange(-columns, columns + 1, device=self.same.device).abs()
        return self.same + self.different, torch.maximum(down[:, None], right[None])


def displacements(mask: Tensor, image: Image) -> Displacements:
    """Count the displacements between the inputs of each neuron.

    Args:
        mask: (neurons, inputs) bool or 0-1; of a later layer, `composed` masks.
        image: what the inputs are.

    Raises:
        ConfigError: the image has no pixel.
        DtypeError, ShapeError: `mask` is no matrix of so many inputs.
    """
    active = _checked(mask, image).double()
    channels, rows, columns = image
    together = active.t() @ active  # neurons that read both; whole numbers, so exact
    together.fill_diagonal_(0)
    pixel = torch.arange(channels * rows * columns, device=mask.device)
    channel, row, column = (
        pixel // (rows * columns),
        pixel // columns % rows,
        pixel % columns,
    )
    down = row[:, None] - row + rows - 1
    right = column[:, None] - column + columns - 1
    place = (down * (2 * columns - 1) + right).flatten()
    alike = channel[:, None] == channel
    shape = (2 * rows - 1, 2 * columns - 1)
    found = []
    for chosen in (alike, ~alike):
        counts = (together * chosen).flatten().long()
        histogram = counts.new_zeros(shape[0] * shape[1]).index_add_(0, place, counts)
        found.append(histogram.view(shape))
    return Displacements(*found)


def expected_locality(image: Image, distance: int = 3) -> tuple[float, float]:
    """Share of near pairs, and mean distance, of connections drawn by chance: the control.

    Exact: those of a neuron that reads every pixel. For 28 x 28 pixels and 3, 5.39 % and 13.1.

    Raises:
        ConfigError: the image has no pixel.
    """
    channels, rows, columns = _sizes(image)
    down = torch.arange(1 - rows, rows).abs()
    right = torch.arange(1 - columns, columns).abs()
    ways = (rows - down)[:, None] * (columns - right)[None]
    same = channels * ways
    same[rows - 1, columns - 1] = 0  # a pixel is no pair
    whole = Displacements(same, channels * (channels - 1) * ways)
    return whole.near(distance), whole.mean_distance()


def receptive_fields(mask: Tensor, image: Image, most: int | None = None) -> Tensor:
    """What each neuron reads, as images (n, channels, rows, columns) of the mask's dtype.

    Args:
        mask: (neurons, inputs); of weights, their values are shown.
        image: what the inputs are.
        most: only so many, those with most connections first.

    Raises:
        ConfigError: the image has no pixel, or `most` is below 1.
        DtypeError, ShapeError: `mask` is no matrix of so many inputs.
    """
    active = _checked(mask, image)
    if most is not None:
        if type(most) is not int or most < 1:
            raise ConfigError(f"`most` must be an int of at least 1; got {most!r}")
        order = active.sum(1).argsort(descending=True, stable=True)
        mask = mask[order[:most]]
    return mask.view(-1, *image)


def composed(*masks: Tensor) -> Tensor:
    """Which pixels reach each neuron of the last of several layers: bool (neurons, inputs).

    Args:
        masks: (neurons, inputs) of each layer, first to last.

    Raises:
        ShapeError: a layer does not take what the one before gives.
        DtypeError: one is no matrix.
    """
    if not masks:
        raise ConfigError("`composed` needs at least one mask")
    reach: Tensor | None = None
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise DtypeError("a mask must be a matrix (neurons, inputs)")
        active = (mask != 0).double()
        if reach is not None and active.shape[1] != reach.shape[0]:
            raise ShapeError(
                f"a layer of {active.shape[1]} inputs can't follow one of {reach.shape[0]} neurons"
            )
        reach = active if reach is None else ((active @ reach) != 0).double()
    return reach != 0  # type: ignore[return-value]


def _sizes(image: Image) -> Image:
    if len(image) != 3 or any(type(n) is not int or n < 1 for n in image):
        raise ConfigError(f"`image` must be (channels, rows, columns); got {image!r}")
    return image


def _checked(mask: Tensor, image: Image) -> Tensor:
    """Where it is not zero."""
    channels, rows, columns = _sizes(image)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise DtypeError("`mask` must be a matrix (neurons, inputs)")
    if mask.shape[1] != channels * rows * columns:
        raise ShapeError(
            f"`mask` must have {channels * rows * columns} inputs, as images of {image} do; got "
            f"{mask.shape[1]}"
        )
    return mask != 0
