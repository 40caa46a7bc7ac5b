"""What the sanitizer knows of a launch: its memory, as fake addresses, and who touched what."""

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_RANGE = 48  # bits of address that each storage has to itself; its data begins in the middle
_NOBODY = -1


class SanitizerError(Exception):
    """A launch did what a GPU would not forgive."""


class Region:
    """The tensors of a launch that share one storage: their address range, who touched what."""

    def __init__(self, number, tensor, name):
        self.virtual = tensor.is_meta
        real = 0 if self.virtual else tensor.untyped_storage().data_ptr()
        # descriptors care about alignment: keep it
        self.shift = ((number + 1 << _RANGE) | (1 << _RANGE - 1) | real % 4096) - real
        self.names = {name}
        self.unit = tensor.element_size()
        self.first, self.end = self._span(tensor)
        self.touched = {}  # "load" or "store" -> lowest and highest address
        # program that last read and that wrote each element
        self.reader = self.writer = None

    def _span(self, tensor):
        first = self.address(tensor)
        if not tensor.numel():
            return first, first
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return first, first + (reach + 1) * tensor.element_size()

    def address(self, tensor):
        """What a kernel sees as the tensor's data pointer."""
        if self.virtual:
            return self.shift + tensor.storage_offset() * tensor.element_size()
        return self.shift + tensor.data_ptr()

    def add(self, tensor, name):
        """Another argument in the same storage."""
        self.names.add(name)
        self.unit = min(self.unit, tensor.element_size())
        first, end = self._span(tensor)
        self.first, self.end = min(self.first, first), max(self.end, end)

    def holds(self, low, high, size):
        """Whether accesses of `size` bytes between two addresses stay inside."""
        return self.first <= low and high + size <= self.end

    def marks(self):
        """An empty record of one program for each element."""
        return np.full(-((self.first - self.end) // self.unit), _NOBODY, dtype=np.int32)

    def slots(self, addresses):
        """Index in `marks` of each address."""
        return (addresses - np.uint64(self.first)).view(np.int64) // self.unit

    def covered(self, kind):
        """(lowest, highest) byte offsets that were touched, and the number of bytes there are."""
        low, high = self.touched[kind]
        return low - self.first, high - self.first, self.end - self.first


class Launch:
    """One launch: its regions, the order of its programs, and the program that runs now."""

    def __init__(self, name, arguments):
        self.name = name
        self.regions, self.by_range = {}, {}
        self.program, self.me, self.ran, self.loads = (), 0, 0, 0
        self.grid, self.order = (), ()
        self.patched = set()  # language modules that the interpreter has taken over
        for argument, value in arguments.items():
            for tensor in _tensors(value):
                self._register(tensor, argument)

    def _register(self, tensor, name):
        key = tensor.untyped_storage()._cdata
        if key in self.regions:
            self.regions[key].add(tensor, name)
        else:
            region = self.regions[key] = Region(len(self.regions), tensor, name)
            self.by_range[region.first >> _RANGE] = region

    def address(self, tensor):
        return self.regions[tensor.untyped_storage()._cdata].address(tensor)

    def argument(self, name):
        """The region of a named argument."""
        return next(r for r in self.regions.values() if name in r.names)

    def shuffle(self, grid, seed):
        """Run all programs, in an order that only the seed and their number decide."""
        self.grid = grid
        self.order = np.random.default_rng(seed).permutation(int(np.prod(grid)))

    def choose(self, grid, programs):
        """Run these programs of a larger grid, in this order."""
        self.grid = grid
        self.order = np.array([np.ravel_multi_index(p, grid) for p in programs])

    def step(self):
        """Go on to the next program of the order."""
        self.me = int(self.order[self.ran])
        self.program = tuple(map(int, np.unravel_index(self.me, self.grid)))
        self.ran += 1

    def count(self, limit):
        """One more load."""
        self.loads += 1
        if limit is not None and self.loads > limit:
            self.fail(f"more than {limit} loads")

    def fail(self, what):
        raise SanitizerError(f"{self.name}, program {self.program}: {what}")

    def locate(self, kind, addresses, size):
        """The region that all addresses are in; raises if there is none."""
        low, high = int(addresses.min()), int(addresses.max())
        region = self.by_range.get(low >> _RANGE)
        if region is None or not region.holds(low, high, size):
            self._out_of_bounds(kind, addresses, size, region)
        was = region.touched.get(kind, (low, high))
        region.touched[kind] = min(was[0], low), max(was[1], high)
        return region

    def _out_of_bounds(self, kind, addresses, size, region):
        if region is None:
            low = int(addresses.min())
            region = min(self.regions.values(), key=lambda r: abs(r.first - low))
        offsets = addresses.astype(object) - region.first  # exact, however far off
        length = region.end - region.first
        wrong = [o for o in offsets if not 0 <= o <= length - size]
        self.fail(
            f"{kind} out of bounds: {len(wrong)} of {len(offsets)} lanes, the first at byte "
            f"{wrong[0]} of `{'/'.join(sorted(region.names))}`, which has {length}"
        )

    def note_load(self, region, addresses):
        if region.virtual:
            return
        at = region.slots(addresses)
        if region.reader is None:
            region.reader = region.marks()
        region.reader[at] = self.me
        if region.writer is not None:
            self._refuse_others(region, region.writer[at], "reads what it writes: program")

    def note_store(self, region, addresses):
        if region.virtual:
            return
        at = region.slots(addresses)
        if region.writer is None:
            region.writer = region.marks()
        self._refuse_others(region, region.writer[at], "race: also written by program")
        lanes = np.arange(at.size, dtype=np.int32)
        region.writer[at] = lanes
        if (region.writer[at] != lanes).any():
            self.fail(f"race: two lanes of a store write one element of {sorted(region.names)}")
        region.writer[at] = self.me
        if region.reader is not None:
            self._refuse_others(region, region.reader[at], "writes what it reads: program")

    def _refuse_others(self, region, marks, what):
        others = marks[(marks != _NOBODY) & (marks != self.me)]
        if others.size:
            who = tuple(map(int, np.unravel_index(int(others[0]), self.grid)))
            self.fail(f"`{'/'.join(sorted(region.names))}` {what} {who}, {others.size} elements")


def _tensors(value):
    if isinstance(value, TensorDescriptor):
        return [value.base]
    if isinstance(value, tuple):
        return [t for item in value for t in _tensors(item)]
    return [value] if hasattr(value, "data_ptr") else []


def garbage(dtype):
    """What memory that nobody wrote holds: NaN, or the largest integer of a numpy or torch type."""
    if isinstance(dtype, torch.dtype):
        if dtype.is_floating_point:
            return float("nan")
        return True if dtype is torch.bool else torch.iinfo(dtype).max
    if dtype.kind == "f":
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max
