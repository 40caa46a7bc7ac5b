"""What a convolution is asked for: padding, channels and groups, checked and put in one form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn.connections import check_topology
from sparsekern.ops.layout import format_of
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Grid

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_REACH = {"reflect": 1, "circular": 0}  # pixels that a side needs besides those that it copies


class Padding(NamedTuple):
    """How to pad.

    Attributes:
        zeros: zeros on either side of each dimension, left to the operator.
        before: pixels to add to the image first, as `functional.pad` takes them; or none.
        mode: how `before` is filled, as `functional.pad` calls it.
    """

    zeros: tuple[int, ...]
    before: tuple[int, ...] = ()
    mode: str = "constant"

    def apply(self, x: Tensor) -> Tensor:
        """Pad the image by what the operator does not do itself, in its memory format."""
        if not self.before:
            return x
        self._check_reach(x)
        padded = functional.pad(x, self.before, self.mode)
        return padded.contiguous(memory_format=format_of(x)) if x.dim() == 4 else padded

    def _check_reach(self, x: Tensor) -> None:
        """Raise `ShapeError` where there are fewer pixels than the mode copies to one side."""
        if self.mode not in _REACH:
            return
        for i, side in enumerate(self.before):
            size = x.shape[-1 - i // 2]
            if side > size - _REACH[self.mode]:
                raise ShapeError(
                    f"`padding_mode` {self.mode!r} needs an input of at least "
                    f"{side + _REACH[self.mode]} pixels for a padding of {side}; got {size}"
                )


def padding_of(
    padding: tuple[int, ...] | str,
    mode: str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Padding:
    """The padding of a convolution.

    The operator pads by zeros, equally on both sides. All else is added to the image: other modes,
    and the odd pixel of "same" with an even kernel, which torch puts last.

    Raises:
        ConfigError: the mode or the word is unknown, or "same" comes with a stride.
    """
    if mode not in PADDING_MODES:
        raise ConfigError(f"`padding_mode` must be one of {PADDING_MODES}; got {mode!r}")
    none = (0,) * len(kernel)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ConfigError(f"`padding` must be a size, 'same' or 'valid'; got {padding!r}")
        if padding == "same" and any(s != 1 for s in stride):
            raise ConfigError(f"`padding` 'same' needs a stride of 1; got {stride}")
        totals = none if padding == "valid" else _same(kernel, dilation)
    else:
        totals = tuple(2 * p for p in padding)
    even = all(total % 2 == 0 for total in totals)
    if mode == "zeros" and even:
        return Padding(tuple(total // 2 for total in totals))
    # functional.pad begins with the last dimension
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return Padding(none, tuple(sides), "constant" if mode == "zeros" else mode)


def _same(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Raise unless the channels fall into `groups` of at least two inputs each (or one in all)."""
    for name, size in (
        ("in_channels", in_channels),
        ("out_channels", out_channels),
        ("groups", groups),
    ):
        if type(size) is not int:
            raise DtypeError(f"`{name}` must be an int; got {size!r}")
        if size < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {size}")
    if in_channels % groups or out_channels % groups:
        raise ConfigError(
            f"`groups` must divide in_channels {in_channels} and out_channels {out_channels}; "
            f"got {groups}"
        )
    if groups > 1 and in_channels == groups:
        raise ConfigError(
            f"`groups` must leave each group two input channels or more; got {groups} for "
            f"{in_channels} channels: this is a depthwise convolution, leave it dense"
        )


def check_groups(blocks: int, groups: int) -> None:
    """Raise `ConfigError` if `blocks` active ones can't reach every group."""
    if groups > 1 and blocks < groups:
        raise ConfigError(
            f"each of {groups} groups needs an active block; got {blocks} in all: leave such a "
            "convolution dense, or ask for less sparsity"
        )


def check_cut(topology: Topology, shape: tuple[int, int], groups: int, taps: int) -> None:
    """Raise unless `topology` is one of a convolution's matrix, cut in the same parts."""
    check_topology(topology)
    if topology.grid != Grid.of(shape, topology.block, groups, taps):
        raise ShapeError(
            f"`topology` must have shape {shape}, {groups} groups and {taps} taps; "
            f"got {topology.shape}, {topology.groups} and {topology.taps}"
        )
