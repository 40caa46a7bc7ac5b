"""A fluid model of one launch: programs flow through the multiprocessors of a GPU.

Programs (CTAs) go in grid order to the slots of all multiprocessors (SMs). Each passes a start, its
loops and a finish. Programs in a loop share what their SM has of five resources: bytes from L2,
bytes from memory, bytes through shared memory, tensor cores and issue slots. A program alone makes
a step in `Step.latency` cycles; together they slow down alike until no resource is asked for more
than it gives. Nothing else is simulated: no bank conflicts, no queues, no caches.

Every SM has the same share of L2 and memory, whatever the others do. The clock is one number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from sparsekern.cost.roofline import Device

SCHEDULERS = 4  # of an SM, one warp's instruction a cycle each (CUDA C++ guide, 9.0)
TENSOR_MACS = 2048  # of an SM and cycle in 16 bits: 989 TFLOP/s on 132 SMs at 1.83 GHz (data sheet)
SHARED_BYTES = 128  # of an SM and cycle: 32 banks of 4 bytes (CUDA C++ guide, 9.0)
SECTOR = 32  # bytes: the least that L2 hands out
STORE_BYTES = 32  # of an SM and cycle, in the finish; assumed
KERNEL_GAP = 3e-6  # seconds that a kernel after the first one adds; assumed
EMPTY_CYCLES = 1200  # of a program that finds nothing to do: launch, search, end; assumed

RESOURCES = ("L2", "HBM", "shared memory", "tensor cores", "issue")


@dataclass(frozen=True)
class Setting:
    """What nobody has measured here yet; all of it assumed.

    Attributes:
        l2: share of the device's rate from L2 that is there to be used.
        request: bytes that a request to L2 costs at least; a slice answers 64 a cycle, so that 32
            may cost as much as 64.
        start: cycles from a program's launch to its first product.
        finish: cycles from its last product to its end, stores apart.
        usable: share of any resource's cycles that can be used.
        stretch: of a step's own latency.
        load: cycles from a request to the tile's arrival, in a loaded GPU.
        elementwise: bytes a second of the kernels that add up parts of dW.
    """

    name: str
    l2: float
    request: float
    start: float
    finish: float
    usable: float
    stretch: float
    load: float
    elementwise: float


OPTIMISTIC = Setting("optimistic", 1.0, SECTOR, 2000, 900, 0.95, 1.0, 600, 3.5e12)
PESSIMISTIC = Setting("pessimistic", 0.76, 2 * SECTOR, 3200, 1800, 0.80, 1.35, 900, 2.7e12)
SETTINGS = (OPTIMISTIC, PESSIMISTIC)


class Load(NamedTuple):
    """Bytes from L2 in runs of `run` neighbouring bytes."""

    size: float
    run: float = 128

    def cost(self, request: float) -> float:
        """Bytes that the port is busy for."""
        return self.size * max(1.0, request / self.run)


class Step(NamedTuple):
    """One iteration of a program's loop.

    Attributes:
        loads: from L2.
        memory: of them, bytes from memory.
        shared: bytes through shared memory: tiles that arrive, operands of `wgmma`.
        macs: multiply-adds on tensor cores.
        instructions: issued by all warps of the program.
        latency: cycles of a program alone.
        depth: tiles that are held; `depth - 1` loads are on their way.
    """

    loads: tuple[Load, ...] = ()
    memory: float = 0.0
    shared: float = 0.0
    macs: float = 0.0
    instructions: float = 0.0
    latency: float = 0.0
    depth: int = 2


class Program(NamedTuple):
    """One CTA: loops of (steps, step) one after another, then `out` bytes written."""

    loops: tuple[tuple[float, Step], ...]
    out: float = 0.0


class Persistent(NamedTuple):
    """Programs that walk tiles: what of start and finish remains to be seen from the second on.

    Attributes:
        start: share of it, where the next tile's index and first tiles are fetched ahead.
        finish: share of it; below 1 where another warpgroup multiplies meanwhile.
        static: slot i takes tiles i, i + slots, ...; else whoever is free takes the next.
    """

    start: float = 0.2
    finish: float = 1.0
    static: bool = False


class Launch(NamedTuple):
    """Programs in grid order, `slots` of them at once on an SM."""

    programs: Sequence[Program]
    slots: int
    persistent: Persistent | None = None


class Outcome(NamedTuple):
    """Of one launch.

    Attributes:
        seconds: from the first program's start to the last one's end.
        share: of the SMs' time by what held them up: a resource, "latency" (of a step), "ends"
            (starts, finishes and empty SMs: nothing is in a loop).
        used: share of each resource that was used, over the whole time.
    """

    seconds: float
    share: dict[str, float]
    used: dict[str, float]

    @property
    def bound(self) -> str:
        """What held the SMs up longest."""
        return max(self.share, key=lambda name: self.share[name])


class _Machine(NamedTuple):
    """Rates of an SM, by resource, and how its cycles go."""

    rates: tuple[float, ...]
    setting: Setting
    device: Device

    @staticmethod
    def of(device: Device, setting: Setting) -> _Machine:
        cycles = device.processors * device.clock
        l2, hbm = setting.l2 * device.l2 / cycles, device.hbm / cycles
        return _Machine((l2, hbm, SHARED_BYTES, TENSOR_MACS, SCHEDULERS), setting, device)

    def demand(self, step: Step) -> tuple[float, ...]:
        """Cycles that a step takes of each resource, then those that it takes alone."""
        asked = (
            sum(load.cost(self.setting.request) for load in step.loads),
            *(step.memory, step.shared, step.macs, step.instructions),
        )
        alone, waited = self.setting.stretch * step.latency, self.setting.load
        if step.loads:  # they come while others are multiplied, if more than one tile is held
            ahead = step.depth - 1
            alone = max(alone, waited / ahead) if ahead > 0 else alone + waited
        alone = max(1.0, alone)
        return (*(a / rate for a, rate in zip(asked, self.rates, strict=True)), alone)


class _Running:
    """A program in a slot: the phase it is in, and what is left of it in cycles or steps."""

    __slots__ = ("demand", "finish", "left", "phase", "program", "slot")

    def __init__(self, program: Program, slot: int, start: float, finish: float) -> None:
        self.program, self.slot, self.finish = program, slot, finish
        self.phase = -1
        self.left = start
        self.demand: tuple[float, ...] | None = None  # of a step, in a loop


class _Flow:
    """The state of all SMs."""

    def __init__(self, launch: Launch, machine: _Machine) -> None:
        self.launch, self.machine, self.setting = launch, machine, machine.setting
        self.count = machine.device.processors
        steps = {step for program in launch.programs for _, step in program.loops}
        self.demands = {step: machine.demand(step) for step in steps}
        slots, walk = launch.slots * self.count, launch.persistent
        if walk is not None and walk.static:
            self.queues = [iter(launch.programs[i::slots]) for i in range(slots)]
        else:
            self.queues = [iter(launch.programs)] * slots
        self.running: list[list[_Running]] = [[] for _ in range(self.count)]
        self.clocks = [0.0] * self.count
        self.share = dict.fromkeys((*RESOURCES, "latency", "ends"), 0.0)

    def run(self) -> float:
        """Cycles until the last program ends."""
        for slot in range(self.launch.slots * self.count):
            self._start(slot, first=True)
        events = [(*self._next(sm), sm) for sm in range(self.count) if self.running[sm]]
        heapq.heapify(events)
        end = 0.0
        while events:
            end, speed, sm = heapq.heappop(events)
            self._advance(sm, end, speed)
            if self.running[sm]:
                heapq.heappush(events, (*self._next(sm), sm))
        self.share["ends"] += sum(end - clock for clock in self.clocks)
        return end

    def _start(self, slot: int, *, first: bool) -> None:
        program = next(self.queues[slot], None)
        if program is None:
            return
        start, finish = self.setting.start, self.setting.finish
        if not program.loops and not program.out:
            start = EMPTY_CYCLES
        if self.launch.persistent is not None:
            finish *= self.launch.persistent.finish
            start *= 1.0 if first else self.launch.persistent.start
        running = _Running(program, slot, start, finish + program.out / STORE_BYTES)
        self.running[slot % self.count].append(running)

    def _next(self, sm: int) -> tuple[float, float]:
        """When something ends on this SM, and how much slower than alone its loops are."""
        demands = [r.demand for r in self.running[sm] if r.demand is not None]
        loads = [sum(d[i] / d[-1] for d in demands) for i in range(len(RESOURCES))]
        worst = max(loads) / self.setting.usable
        slower = max(1.0, worst)
        wait = min(
            r.left if r.demand is None else r.left * r.demand[-1] * slower for r in self.running[sm]
        )
        name = RESOURCES[loads.index(max(loads))] if worst > 1 else "latency"
        self.share[name if demands else "ends"] += wait
        return self.clocks[sm] + wait, slower

    def _advance(self, sm: int, now: float, slower: float) -> None:
        passed, self.clocks[sm] = now - self.clocks[sm], now
        before, self.running[sm] = self.running[sm], []
        ended = []
        for r in before:
            r.left -= passed if r.demand is None else passed / (r.demand[-1] * slower)
            if r.left > 1e-6 or self._to_next_phase(r):
                self.running[sm].append(r)
            else:
                ended.append(r.slot)
        for slot in ended:
            self._start(slot, first=False)

    def _to_next_phase(self, r: _Running) -> bool:
        """Whether there is one."""
        loops = r.program.loops
        r.phase += 1
        if r.phase < len(loops):
            r.left, step = loops[r.phase]
            r.demand = self.demands[step]
            return True
        r.left, r.demand = r.finish, None
        return r.phase == len(loops) and (bool(loops) or r.program.out > 0)


def simulate(launch: Launch, device: Device, setting: Setting) -> Outcome:
    """Run a launch on a device, under the assumptions of a setting."""
    machine = _Machine.of(device, setting)
    flow = _Flow(launch, machine)
    cycles = flow.run()
    everywhere = device.processors * cycles
    used = dict.fromkeys(RESOURCES, 0.0)
    for count, step in chain.from_iterable(program.loops for program in launch.programs):
        for name, cost in zip(RESOURCES, flow.demands[step], strict=False):
            used[name] += count * cost / everywhere
    share = {name: held / everywhere for name, held in flow.share.items()}
    return Outcome(cycles / device.clock, share, used)
