"""Warp groups of a Gluon kernel in numpy, in any order: each partition is a thread, and a seed says
whose turn it is after every step.

Memory shows what a GPU would hide. A copy poisons its target when it starts and lands any time
before its barrier completes. A product reads its operands when it's issued and again when it's
retired, and until a thread barrier follows no warp may take it for done. A tile that goes to memory
is read when that is asked for and again when it's waited for. If nobody can go on, it hangs.
"""

import random
import threading
import types

import numpy as np
import torch
from aot.emulated import Descriptor, Num, Pointer, Shared


class Turns:
    """Threads that run one at a time."""

    def __init__(self, seed):
        self.draw, self.pending = random.Random(seed), []
        self.control, self.until, self.error = threading.Semaphore(0), {}, None
        self.me = threading.local()

    def run(self, functions):
        """All of them to their ends."""
        gates = [threading.Semaphore(0) for _ in functions]
        self.until = dict.fromkeys(range(len(functions)))

        def body(number, function):
            self.me.number, self.me.gate = number, gates[number]
            gates[number].acquire()
            try:
                function()
            except BaseException as error:  # told by the thread that started them
                self.error = self.error or error
            del self.until[number]
            self.control.release()

        threads = [
            threading.Thread(target=body, args=pair, daemon=True) for pair in enumerate(functions)
        ]
        for thread in threads:
            thread.start()
        while self.until:
            ready = [n for n, until in self.until.items() if until is None or until()]
            if not self.error and (self.pending and (not ready or self.draw.random() < 0.2)):
                self.pending.pop(self.draw.randrange(len(self.pending)))()
                continue
            if not ready or self.error:
                break
            gates[self.draw.choice(ready)].release()
            self.control.acquire()
        if self.error:
            raise self.error
        assert not self.until, "hangs"
        for landing in self.pending:
            landing()

    def pause(self, until=None):
        """Let others go on; come back when `until` holds."""
        self.until[self.me.number] = until
        self.control.release()
        self.me.gate.acquire()
        self.until[self.me.number] = None

    @property
    def number(self):
        """Of the partition whose turn it is."""
        return getattr(self.me, "number", None)


class Barrier:
    """An mbarrier."""

    def __init__(self, count):
        self.count = self.missing = count
        self.phase = self.bytes = 0

    def settle(self, arrivals, size):
        self.missing -= arrivals
        self.bytes += size
        assert self.missing >= 0, "two arrivals in a phase"
        if not self.missing and not self.bytes:
            self.phase, self.missing = self.phase + 1, self.count


class Machine:
    """What a kernel calls, for one program."""

    def __init__(self, program, programs, seed, faults=()):
        self.turns, self.faults, self.tiles = Turns(seed), faults, {}
        self.flight, self.unseen, self.waits, self.leaving = {}, {}, {}, {}
        self.gl = types.SimpleNamespace(
            program_id=lambda _axis: program,
            num_programs=lambda _axis: programs,
            arange=lambda lo, hi, _layout: np.arange(lo, hi).view(Num),
            zeros=lambda shape, _dtype, _layout: np.zeros(shape, np.float32).view(Num),
            load=lambda pointer, mask=True, other=None: pointer.load(mask, other),
            where=lambda c, a, b: np.where(c, a, b).view(Num) if np.ndim(c) else (a if c else b),
            NVMMADistributedLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            minimum=min,
            static_range=range,
            int64="int64",
            float32="float32",
        )
        self.mbarrier = types.SimpleNamespace(
            init=self.init,
            expect=self.expect,
            wait=self.wait,
            arrive=self.arrive,
            MBarrierLayout=lambda: None,
        )

    def names(self):
        return {
            "gl": self.gl,
            "mbarrier": self.mbarrier,
            "tma": types.SimpleNamespace(store_wait=self.store_wait),
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.retire,
            "fence_async_shared": self.fence,
            "_barrier": self.barrier,
            "_copy": self.copy,
            "_store": self.store,
        }

    def allocate(self, dtype, shape, _layout):
        if dtype == "int64":
            return Shared(np.empty(shape, object))
        return Tile(np.full(shape, np.nan, np.float32), self)

    def warp_specialize(self, partitions, warps, _registers):
        assert len(partitions) == len(warps) + 1
        self.turns.run([lambda f=f, a=a: f(*a) for f, a in partitions])
        assert not any(self.flight.values()), "a product that nobody waits for"
        assert not any(self.leaving.values()), "a tile leaves after its program"

    def init(self, ready, count):
        ready.array[0] = Barrier(count)

    def expect(self, ready, size):
        ready.array[0].settle(1, size)

    def arrive(self, ready, count, pred):
        self.turns.pause()
        if pred:
            assert not self.unseen.get(self.turns.number), "other warps may still read"
            ready.array[0].settle(count, 0)

    def wait(self, ready, parity):
        state = ready.array[0]
        key = self.turns.number, id(state)
        first, waits = self.waits.setdefault(key, [parity, 0])
        self.waits[key][1] += 1
        self.turns.pause(lambda: state.phase & 1 != parity)
        assert state.phase == waits + 1 - first, "a phase was missed"

    def copy(self, descriptor, place, ready, memory):
        self.turns.pause()
        for held in (*self.flight.values(), *self.unseen.values()):
            for a, b, *_ in held:
                assert not np.shares_memory(a, memory.array), "overwritten while read"
                assert not np.shares_memory(b, memory.array), "overwritten while read"
        memory.array[...] = np.nan
        data = descriptor.box(*place)

        def land():
            memory.array[...] = data
            ready.array[0].settle(0, -2 * data.size)

        self.turns.pending.append(land)

    def product(self, a, b, acc, is_async):
        assert is_async
        value = a.array @ b.array
        assert not np.isnan(value).any(), "read before it arrived"
        self.flight.setdefault(self.turns.number, []).append((a.array, b.array, value))
        self.turns.pause()
        return acc + value

    def retire(self, left, deps):
        self.turns.pause()
        mine = self.flight.setdefault(self.turns.number, [])
        while len(mine) > left:
            a, b, value = mine.pop(0)
            assert np.array_equal(a @ b, value), "overwritten while read"
            self.unseen.setdefault(self.turns.number, []).append((a, b))
        return deps[0]

    def fence(self):
        if "fence" not in self.faults:
            self._all("written", "fenced")

    def barrier(self):
        if "barrier" not in self.faults:
            self.unseen[self.turns.number] = []
            self._all("fenced", "ready")
            self._all("read", "free")

    def _all(self, before, after):
        for key, (number, state) in self.tiles.items():
            if (number, state) == (self.turns.number, before):
                self.tiles[key] = number, after

    def store(self, descriptor, place, tile):
        key = tile.array.__array_interface__["data"]
        assert self.tiles[key] == (self.turns.number, "ready"), "leaves before it's written"
        self.tiles[key] = self.turns.number, "leaving"
        mine = self.leaving.setdefault(self.turns.number, [])
        mine.append((tile.array, tile.array.copy(), descriptor, place, key))
        self.turns.pause()

    def store_wait(self, left):
        assert left == 0
        for array, then, descriptor, place, key in self.leaving.pop(self.turns.number, []):
            assert np.array_equal(array, then), "written while it leaves"
            descriptor.write(*place, array)
            self.tiles[key] = self.turns.number, "read"


class Tile(Shared):
    """Shared memory that a warp group writes itself."""

    def __init__(self, array, machine):
        super().__init__(array)
        self.machine = machine

    def index(self, i):
        return Tile(super().index(i).array, self.machine)

    def permute(self, order):
        return Tile(super().permute(order).array, self.machine)

    def store(self, values):
        key = self.array.__array_interface__["data"]
        number = self.machine.turns.number
        assert self.machine.tiles.get(key, (number, "free")) == (number, "free"), "still leaving"
        self.machine.tiles[key] = number, "written"
        self.array[...] = values


class Emulated:
    """Takes a kernel's place under its launcher: every program, each in its own random order."""

    def __init__(self, module, kernel, helpers, seed=0, faults=()):
        self.module, self.kernel, self.helpers = module, kernel, helpers
        self.seed, self.faults, self.programs = seed, faults, 0

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launch(grid, args, constants)

    def launch(self, grid, args, constants):
        assert (constants.pop("num_warps"), constants.pop("enable_fp_fusion")) == (4, True)
        given = [
            Pointer(a)
            if isinstance(a, torch.Tensor)
            else Matrix(a)
            if isinstance(a, self.module.TensorDescriptor)
            else a
            for a in args
        ]
        for program in range(grid[0]):
            machine = Machine(program, grid[0], self.seed + program, self.faults)
            namespace = vars(self.module) | machine.names()
            for name in self.helpers:
                code = getattr(self.module, name).fn.__code__
                namespace[name] = types.FunctionType(code, namespace)
            types.FunctionType(self.kernel.fn.__code__, namespace)(*given, **constants)
            self.programs += 1


class Matrix(Descriptor):
    """A descriptor that is written through as well: every element once."""

    def __init__(self, real):
        super().__init__(real)
        self.base = torch.as_strided(
            real.base, real.shape, real.strides, real.base.storage_offset()
        )

    def write(self, row, column, values):
        at = self.base[row : row + values.shape[0], column : column + values.shape[1]]
        assert bool(torch.isnan(at).all()), "stored twice"
        at.copy_(torch.from_numpy(np.array(values[: at.shape[0], : at.shape[1]])))
