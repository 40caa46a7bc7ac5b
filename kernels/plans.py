"""Launches without Triton's own decisions, for calls that differ from an earlier one in data alone.

`kernel[grid](...)` binds and types every argument, looks the compiled kernel up and makes tensor
descriptors anew: 20 to 40 us of host time, more than a small layer computes. A `Plan` holds what a
launcher decided for its key (shapes, strides, types, device, precision) and, for each launch, the
compiled kernel with its arguments; a call brings data pointers, from which new tensor maps are
made. Nothing in a plan depends on the contents of a tensor, and it keeps none alive.

Only Triton releases whose launcher is known (`_RELEASES`) are short-cut. Elsewhere, in the
interpreter, while a hook or a profiler watches launches, for a first call and for pointers that 16
bytes don't divide, the launcher gets the kernel itself and launches as usual.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tables
from .launch import is_interpreted

__all__ = ["LIMIT", "Plan", "clear", "find"]

LIMIT = 1024  # plans held; then all are dropped, and those in use are made anew

# 3.6 builds a C function for each signature; later ones share one that is told the signature
_RELEASES: dict[tuple[int, ...], str] = {
    (3, 6): "built",
    (3, 7): "shared",
    (3, 8): "shared",
    (3, 9): "shared",
}
_KNOWN = _RELEASES.get(tuple(map(int, triton.__version__.split(".")[:2])))
_DRIVER = "triton.backends.nvidia.driver"

_plans: dict[tuple[Any, ...], "Plan"] = {}


class Plan:
    """What all calls of one key share: what their launcher decided, and its launches."""

    __slots__ = ("_cut", "_device", "_launches")

    def __init__(self, device: int, *, kept: bool) -> None:
        self._cut: Any = None
        self._device = device
        self._launches: dict[Any, Callable[[Sequence[int]], None]] | None = {} if kept else None

    def decide(self, make: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """What `make` returns, asked once."""
        if self._cut is None:
            self._cut = make(*args, **more)
        return self._cut

    def start(self, kernel: Any, tensors: tuple[torch.Tensor, ...], variant: Any = None) -> Any:
        """Launch as before, with these tensors.

        Args:
            kernel: what the launcher would launch.
            tensors: of its first parameters in order, pointers or tensor descriptors.
            variant: what tells launches of one call apart.

        Returns:
            None if it is launched; else what to launch with, as `[grid](...)`.
        """
        if self._launches is None:
            return kernel
        pointers = [a.data_ptr() for a in tensors]
        together = 0
        for pointer in pointers:
            together |= pointer
        if together % 16 or _is_watched(kernel):
            return kernel
        launch = self._launches.get(variant)
        if launch is None:
            return _Recorder(self._launches, variant, kernel, pointers, self._device)
        launch(pointers)
        return None


def find(kernel: Any, tensor: torch.Tensor, key: tuple[Any, ...]) -> Plan:
    """The plan of a launcher for a key, on the device of `tensor`; a new one at first.

    Args:
        kernel: one of the launcher's kernels.
        tensor: an operand that is on the device of the launch.
        key: all that the launcher's decisions and its launches depend on, pointers apart.
    """
    if _KNOWN is None or is_interpreted(kernel):
        return Plan(-1, kept=False)
    device = tensor.get_device()
    plan = _plans.get((device, key))
    if plan is None:
        if len(_plans) >= LIMIT:
            _plans.clear()
        plan = _plans[device, key] = Plan(device, kept=True)
    return plan


def clear() -> None:
    """Forget all plans."""
    _plans.clear()


tables.also_forget(clear)


def _is_watched(kernel: Any) -> bool:
    """Whether someone must see each launch, or wants kernels compiled in another way."""
    runtime = knobs.runtime
    return bool(
        runtime.debug
        or kernel.pre_run_hooks
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def _is_set(hook: Any) -> bool:
    # a chain of hooks stands there even when it is empty
    return hook is not None and bool(getattr(hook, "calls", True))


class _Recorder:
    """Stands for a kernel in its first launch, and keeps what the next ones need."""

    def __init__(
        self,
        launches: dict[Any, Callable[[Sequence[int]], None]],
        variant: Any,
        kernel: Any,
        pointers: list[int],
        device: int,
    ) -> None:
        self._keep = launches, variant
        self._kernel = kernel
        self._pointers = pointers
        self._device = device

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """As a kernel's."""

        def launch(*args: Any, **options: Any) -> None:
            compiled = self._kernel[grid](*args, **options)
            names = self._kernel.arg_names
            values = [*args, *(options[name] for name in names[len(args) :])]
            again = _relaunch(compiled, (*grid, 1, 1)[:3], values, self._pointers, self._device)
            launches, variant = self._keep
            if again is not None:
                launches[variant] = again

        return launch


def _relaunch(
    compiled: Any,
    grid: tuple[int, ...],
    values: list[Any],
    pointers: list[int],
    device: int,
) -> Callable[[Sequence[int]], None] | None:
    """A function that launches a compiled kernel with other pointers; None if it needs more."""
    run = compiled.run
    if type(run).__module__ != _DRIVER or getattr(run, "gsan_enabled", False):
        return None
    if run.global_scratch_size or run.profile_scratch_size:  # memory that each launch must be given
        return None
    given = _arguments(compiled, values, pointers)
    if given is None:
        return None
    template, places, boxes = given
    raw, last = _raw(compiled)
    active, utils = driver.active, driver.active.utils
    current_device, current_stream = active.get_current_device, active.get_current_stream
    fill = utils.fill_tma_descriptor if _KNOWN == "built" else utils.fill_tma_descriptor_tiled
    nested = _KNOWN == "shared"
    gx, gy, gz = grid

    def launch(pointers: Sequence[int]) -> None:
        arguments = template.copy()
        for at, place in places:
            arguments[at] = pointers[place]
        for at, place, box in boxes:
            arguments[at] = fill(pointers[place], *box)
        here = current_device()
        if device in (here, -1):  # -1 is the CPU, where only a stand-in driver launches
            stream = current_stream(here)
            raw(gx, gy, gz, stream, *last, *((arguments,) if nested else arguments))
        else:
            with torch.cuda.device(device):
                launch(pointers)

    return launch


def _raw(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """The C function that launches, and what it is given between the stream and the arguments."""
    run = compiled.run
    flags = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    if _KNOWN == "shared":
        # metadata of the launch, hooks before and after it, two scratch buffers: none
        told = compiled.packed_metadata, *(None,) * 5, run.arg_annotations, run.kernel_signature
        return driver.active.utils.launch, (*flags, *told)
    raw = run.launch
    if (code := getattr(raw, "__code__", None)) is not None:  # makes tensor maps, then launches
        raw = raw.__closure__[code.co_freevars.index("launcher")].cell_contents
    return raw, (*flags, None, None, compiled.packed_metadata, None, None, None)


def _arguments(compiled: Any, values: list[Any], pointers: list[int]) -> Any:
    """(arguments as the C function takes them, places of pointers, places of tensor maps).

    A descriptor becomes a tensor map, its shape and its strides. None if a tensor or descriptor is
    not what stands at its place in `pointers`, or a descriptor is of an unknown kind.
    """
    template: list[Any] = []
    places: list[tuple[int, int]] = []
    boxes: list[tuple[int, int, tuple[Any, ...]]] = []
    layouts = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for place, value in enumerate(values):
        base = value.base if _is_descriptor(value) else value
        if (place < len(pointers)) != isinstance(base, torch.Tensor):
            return None
        if base is not value:
            box = _box(value, next(layouts, None))
            if box is None:
                return None
            boxes.append((len(template), place, box))
            template += [None, *value.shape, *value.strides]
            continue
        if isinstance(base, torch.Tensor):
            places.append((len(template), place))
            value = None  # noqa: PLW2901  a plan keeps no tensor
        template.append(value)
    used = [v.base if _is_descriptor(v) else v for v in values[: len(pointers)]]
    return (template, places, boxes) if [a.data_ptr() for a in used] == pointers else None


def _is_descriptor(value: Any) -> bool:
    """Triton's or Gluon's, which has a class of its own."""
    return isinstance(value, TensorDescriptor) or type(value).__name__ == TensorDescriptor.__name__


def _box(descriptor: TensorDescriptor, layout: dict[str, Any] | None) -> tuple[Any, ...] | None:
    """What a tensor map is made of, its address apart."""
    if layout is None or layout["fp4_padded"] or layout.get("is_im2col", False):
        return None
    if descriptor.padding != "zero" or getattr(descriptor, "round_f32_to_tf32", False):
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST  # noqa: PLC0415

    return (
        layout["swizzle"],
        layout["elem_size"],
        TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]],
        layout["block_size"],
        tuple(descriptor.shape),
        tuple(descriptor.strides),
        0,  # filled with zeros beyond the edges
    )
