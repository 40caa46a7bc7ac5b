"""What the public operators check before anything runs: shapes, dtypes and devices."""

from __future__ import annotations

from torch import Tensor

from sparsekern.errors import DeviceError, DtypeError, ShapeError
from sparsekern.ops.dispatch import resolve
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology
from sparsekern.topology.known import Known


def implementation(
    impl: str | None, like: Tensor, topology: Topology, *, conv: bool = False
) -> str:
    """The implementation that runs, from `impl`, device, dtype, block, density and kind."""
    if impl is None and like.is_cpu:  # what `resolve` says, at once
        return "cpu"
    block, density = topology.block, topology.block_density
    return resolve(impl, like.device, like.dtype, block, density, conv=conv)


def check_values(values: Tensor, topology: Topology) -> None:
    """`values` are the blocks of `topology`."""
    if tuple(values.shape) != topology.values_shape:
        raise ShapeError(
            f"`values` must have shape {topology.values_shape}; got {tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise DtypeError(f"`values` must be floating point; got {values.dtype}")
    check_device(topology, values)


def fits(
    x: Tensor, inputs: int, axis: int, values: Tensor, bias: Tensor | None, known: Known
) -> bool:
    """Whether a product's operands pass the checks of this module, which say what does not.

    Args:
        x: activations, with `inputs` features along `axis`.
        inputs: of the weight.
        axis: -1, or 1 for images.
        values: the weight's blocks.
        bias: None, or one for each output.
        known: of the topology.
    """
    dtype, device = values.dtype, known.device
    if bias is not None and not (
        bias.dtype is dtype and bias.device == device and bias.shape == known.outputs
    ):
        return False
    return (
        x.dim() > 0
        and x.shape[axis] == inputs
        and x.dtype is dtype
        and x.device == device
        and values.shape == known.values_shape
        and values.device == device
        and values.is_floating_point()
    )


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Same floating dtype and device as `like`."""
    if tensor.dtype != like.dtype or not tensor.is_floating_point():
        raise DtypeError(f"`{name}` must have dtype {like.dtype}; got {tensor.dtype}")
    if tensor.device != like.device:
        raise DeviceError(f"`{name}` must be on {like.device}; got {tensor.device}")


def check_operand(name: str, tensor: Tensor, size: int, like: Tensor) -> None:
    """(..., size), of the dtype and device of `like`."""
    if tensor.dim() < 1 or tensor.shape[-1] != size:
        raise ShapeError(f"`{name}` must have shape (..., {size}); got {tuple(tensor.shape)}")
    check_like(name, tensor, like)


def check_bias(bias: Tensor | None, rows: int, like: Tensor) -> None:
    """None, or (rows,)."""
    if bias is not None:
        check_operand("bias", bias, rows, like)
        if bias.dim() != 1:
            raise ShapeError(f"`bias` must have shape ({rows},); got {tuple(bias.shape)}")


def check_tokens(dy: Tensor, x: Tensor) -> None:
    """`dy` and `x` share their leading sizes."""
    if dy.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            "`dy` and `x` must share their leading sizes; "
            f"got {tuple(dy.shape[:-1])} and {tuple(x.shape[:-1])}"
        )


def check_device(topology: Topology, like: Tensor) -> None:
    """The index arrays are where `like` is."""
    if topology.device != like.device:
        raise DeviceError(f"topology must be on {like.device}; got {topology.device}")


def check_whole(topology: Topology) -> None:
    """A matrix in one part: the weight of a linear map."""
    if topology.groups != 1 or topology.taps != 1:
        raise ShapeError(
            "`topology` must have one group and one tap; got that of a convolution with "
            f"{topology.groups} and {topology.taps}: use the conv2d operators"
        )


def check_geometry(topology: Topology, geometry: ConvGeometry) -> None:
    """`topology` is cut as the weight of a convolution of this geometry."""
    if (topology.groups, topology.taps) != (geometry.groups, geometry.taps):
        raise ShapeError(
            f"`topology` must have {geometry.groups} groups and {geometry.taps} taps, as the "
            f"geometry does; got {topology.groups} and {topology.taps}"
        )


def check_image(name: str, image: Tensor, channels: int, like: Tensor) -> None:
    """(N, channels, height, width), of the dtype and device of `like`."""
    if image.dim() != 4 or image.shape[1] != channels:
        raise ShapeError(
            f"`{name}` must have shape (N, {channels}, height, width); got {tuple(image.shape)}"
        )
    check_like(name, image, like)


def check_outputs(dy: Tensor, geometry: ConvGeometry, batch: int, size: tuple[int, int]) -> None:
    """`dy` has the batch and the pixels that inputs of `size` give."""
    expected = geometry.output_size(*size)
    if dy.shape[0] != batch or tuple(dy.shape[2:]) != expected:
        raise ShapeError(
            f"`dy` must have shape ({batch}, {dy.shape[1]}, {expected[0]}, {expected[1]}) for an "
            f"input of {size[0]} x {size[1]} pixels; got {tuple(dy.shape)}"
        )
