"""`ConvGeometry`: how a convolution walks its input, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsekern.errors import ConfigError, DtypeError, ShapeError

Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding, dilation and groups of a 2-D convolution; heights come first.

    `y[n, o, p, q] = sum w[o, r, s, c] x[n, c', p sh - ph + r dh, q sw - pw + s dw]`, x being zero
    outside, over all taps (r, s) and the input channels c' of o's group. A 1-D convolution is one
    of height 1.

    Attributes:
        kernel: (kh, kw) taps.
        stride: (sh, sw) pixels between outputs.
        padding: (ph, pw) rows and columns of zeros on either side.
        dilation: (dh, dw) pixels between taps.
        groups: equal parts of the channels that do not mix.

    Raises:
        DtypeError: a size is not an int.
        ConfigError: a size is below 1, or a padding below 0.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            value = getattr(self, name)
            if len(value) != 2 or not all(type(size) is int for size in value):
                raise DtypeError(f"`{name}` must be a pair of ints; got {value!r}")
            least = 0 if name == "padding" else 1
            if min(value) < least:
                raise ConfigError(f"`{name}` must be at least {least}; got {value}")
        if type(self.groups) is not int:
            raise DtypeError(f"`groups` must be an int; got {self.groups!r}")
        if self.groups < 1:
            raise ConfigError(f"`groups` must be at least 1; got {self.groups}")

    @property
    def taps(self) -> int:
        """Kernel positions, kh kw."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear map of each pixel: 1x1, no stride, padding or groups."""
        return (
            self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        )

    def output_size(self, height: int, width: int) -> Pair:
        """(P, Q) for an input of (H, W).

        Raises:
            ShapeError: the kernel does not fit into the padded input.
        """
        sizes = []
        for i, size in enumerate((height, width)):
            reach = self.dilation[i] * (self.kernel[i] - 1) + 1
            room = size + 2 * self.padding[i] - reach
            if room < 0:
                raise ShapeError(
                    f"the padded input must be at least as large as the dilated kernel, {reach} "
                    f"along axis {'HW'[i]}; got {size} + 2 * {self.padding[i]}"
                )
            sizes.append(room // self.stride[i] + 1)
        return sizes[0], sizes[1]

    def as_ints(self) -> list[int]:
        """All fields in one list, as operator schemas take them."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    @staticmethod
    def from_ints(sizes: Sequence[int]) -> ConvGeometry:
        """Inverse of `as_ints`."""
        # under torch.compile they come as symbols: each geometry is a graph of its own
        kh, kw, sh, sw, ph, pw, dh, dw, groups = map(int, sizes)
        return ConvGeometry((kh, kw), (sh, sw), (ph, pw), (dh, dw), groups)
