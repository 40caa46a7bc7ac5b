"""Geometry of a convolution as its kernels take it, and activations in the layout they want.

The BSR kernels want the channels of a pixel side by side, the CSR kernels the pixels of an image's
row. Other activations are copied, some images at a time: the copies stay small beside a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import launch
from .tables import find

__all__ = [
    "COLUMNS",
    "Window",
    "block_options",
    "by_images",
    "channels_adjacent",
    "channels_layout",
    "columns_adjacent",
    "empty_images",
    "entry_options",
    "has_adjacent_channels",
    "has_adjacent_columns",
    "has_pixel_rows",
    "images_at_once",
    "output_size",
    "pixel_rows",
    "pixel_stride",
    "pixel_strides",
    "wanted_format",
    "window_options",
]


class Window(NamedTuple):
    """What a convolution reads: `x[p * stride - padding + r * dilation]` for r in range(kernel)."""

    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def output_size(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    """(P, Q) of the output for an input of (H, W)."""
    P, Q = (
        (size[i] + 2 * window.padding[i] - window.dilation[i] * (window.kernel[i] - 1) - 1)
        // window.stride[i]
        + 1
        for i in (0, 1)
    )
    return P, Q


def wanted_format(a: torch.Tensor) -> torch.memory_format:
    """Memory format of what is computed from `a`: channels-last if `a` is that and no other."""
    if a.is_contiguous(memory_format=torch.channels_last) and not a.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def empty_images(
    a: torch.Tensor, size: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> torch.Tensor:
    """Memory for a 4-D result on `a`'s device."""
    return torch.empty(size, dtype=dtype, device=a.device, memory_format=memory_format)


def has_adjacent_channels(a: torch.Tensor) -> bool:
    """Whether the BSR kernels can read images as they lie."""
    return a.shape[1] == 1 or a.stride(1) == 1


def channels_adjacent(a: torch.Tensor) -> torch.Tensor:
    """The same images with a pixel's channels side by side; a copy unless they are."""
    if has_adjacent_channels(a):
        return a
    return a.contiguous(memory_format=torch.channels_last)


def has_adjacent_columns(a: torch.Tensor) -> bool:
    """Whether the CSR kernels can read images as they lie."""
    return a.shape[3] == 1 or a.stride(3) <= 1


def columns_adjacent(a: torch.Tensor) -> torch.Tensor:
    """The same images with a row's pixels side by side; a copy unless they are."""
    return a if has_adjacent_columns(a) else a.contiguous()


def pixel_stride(a: torch.Tensor) -> int | None:
    """Elements from one pixel to the next, through rows and images; None if that is no one number.

    Args:
        a: images, or what `pixel_rows` made of them.
    """
    sizes, strides = a.shape, a.stride()
    if a.dim() == 2:
        return strides[0]
    step = None
    for dim in (3, 2, 0):
        if sizes[dim] == 1:
            continue
        if step is None:
            step = reach = strides[dim]
        elif strides[dim] != reach:
            return None
        reach *= sizes[dim]
    return sizes[1] if step is None else step


def has_pixel_rows(a: torch.Tensor, groups: int) -> bool:
    """Whether images are evenly spaced pixels, whose groups of channels are whole 16-byte loads."""
    unit, step = launch.load_unit(a.dtype), pixel_stride(a)
    return (
        a.stride(1) == 1
        and a.shape[1] // groups % unit == 0
        and step is not None
        and step % unit == 0
        and a.data_ptr() % 16 == 0
    )


def pixel_rows(a: torch.Tensor, groups: int) -> torch.Tensor:
    """The same images if `has_pixel_rows`, else a copy as (N * H * W, channels).

    In the copy each group of channels is followed by zeros up to the next whole 16-byte load.
    """
    if has_pixel_rows(a, groups):
        return a
    (N, C, H, W), unit = a.shape, launch.load_unit(a.dtype)
    channels = C // groups
    rows = a.new_empty(N, H, W, groups, -(-channels // unit) * unit)
    rows[..., :channels] = a.permute(0, 2, 3, 1).reshape(N, H, W, groups, channels)
    rows[..., channels:] = 0
    return rows.view(N * H * W, -1)


def images_at_once(batch: int, *, copied: int) -> int:
    """Images of one launch: all, or so few that `copied` elements of each keep to the bound."""
    if copied == 0:
        return max(batch, 1)
    return max(1, min(batch, launch.CHUNK_ELEMENTS // copied))


class Layout(NamedTuple):
    """How a kernel wants images to lie: the test, the copy, and what to allocate."""

    fits: Callable[[torch.Tensor], bool]
    copied: Callable[[torch.Tensor], torch.Tensor]
    memory_format: torch.memory_format


COLUMNS = Layout(has_adjacent_columns, columns_adjacent, torch.contiguous_format)


def channels_layout(groups: int) -> Layout:
    """How images must lie for the BSR kernels to load 16 bytes at once: see `pixel_rows`."""

    def fits(a: torch.Tensor) -> bool:
        unit, strides = launch.load_unit(a.dtype), a.stride()
        return (
            strides[1] == 1
            and a.shape[1] // groups % unit == 0
            and all(strides[dim] % unit == 0 for dim in (0, 2, 3))
            and a.data_ptr() % 16 == 0
        )

    def copied(a: torch.Tensor) -> torch.Tensor:
        return a if fits(a) else pixel_rows(a, groups)

    return Layout(fits, copied, torch.channels_last)


def pixel_strides(a: torch.Tensor, size: tuple[int, int]) -> tuple[int, int, int]:
    """Elements between images, rows and pixels of (H, W) images, or of what `pixel_rows` made."""
    if a.dim() == 2:
        step, (H, W) = a.stride(0), size
        return H * W * step, W * step, step
    return a.stride(0), a.stride(2), a.stride(3)


def by_images(
    a: torch.Tensor,
    out: torch.Tensor,
    layout: Layout,
    launch: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """`launch(a, out)`, both as the layout wants: copied there and back where they are not."""
    direct = out.is_contiguous(memory_format=layout.memory_format)
    copied = 0 if layout.fits(a) else a.shape[1:].numel()
    copied += 0 if direct else out.shape[1:].numel()
    step = images_at_once(len(a), copied=copied)
    for n in range(0, len(a), step):
        some, there = (a, out) if step >= len(a) else (a[n : n + step], out[n : n + step])
        made = there if direct else torch.empty_like(there, memory_format=layout.memory_format)
        with torch.cuda.device_of(a):  # type: ignore[no-untyped-call]
            launch(layout.copied(some), made)
        if not direct:
            there.copy_(made)


def window_options(window: Window) -> dict[str, int]:
    """The constants that a geometry sets in a kernel, one compilation for each geometry."""
    (SH, SW), (PH, PW), (DH, DW) = window.stride, window.padding, window.dilation
    shifts = {"SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH, "DW": DW}
    return {"KW": window.kernel[1]} | shifts


def block_options(
    op: str, a: torch.Tensor, edges: tuple[int, int], window: Window, interpreted: bool
) -> dict[str, Any]:
    """Options of a product whose blocks have these edges along the sum and the output."""
    arch, kind = launch.arch_class(a.device), launch.compute_kind(a.dtype)
    tile, _ = find(arch, op, kind, edges[1], "any", tma=False)
    return {
        "IN": edges[0],
        "OUT": edges[1],
        "BM": tile.BM,
        "BK": tile.BK,
        "GROUP": tile.GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "PRECISION": launch.input_precision(a.dtype),
        "INTERPRET": interpreted,
        "enable_fp_fusion": True,
        **window_options(window),
    }


def entry_options(op: str, a: torch.Tensor, window: Window) -> dict[str, Any]:
    """The same for a product without blocks."""
    arch, kind = launch.arch_class(a.device), launch.compute_kind(a.dtype)
    tile, _ = find(arch, op, kind, "any", "any", tma=False)
    return {**tile._asdict(), "enable_fp_fusion": True, **window_options(window)}
