"""The fluid model of the GPU kernels: limits worked out by hand, and the review's first figures."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")  # the launch tables' rules are asked

from benchmarks.gpu import model, model_csr, model_figures
from benchmarks.gpu.model_cases import CONV, LINEAR
from benchmarks.gpu.model_fluid import (
    EMPTY_CYCLES,
    OPTIMISTIC,
    PESSIMISTIC,
    SECTOR,
    SETTINGS,
    STORE_BYTES,
    Launch,
    Load,
    Persistent,
    Program,
    Step,
    simulate,
)
from benchmarks.gpu.model_launch import even_groups, row_groups
from sparsekern.cost.roofline import H100, H200
from sparsekern.kernels import tables
from sparsekern.ops.crossover import DENSE_ABOVE

SMS = H200.processors
WAITING = Step(latency=100.0)
PLAIN = OPTIMISTIC.start + OPTIMISTIC.finish  # cycles of a program around its loops


def cycles(programs, slots=1, persistent=None, setting=OPTIMISTIC):
    launch = Launch(programs, slots, persistent)
    return simulate(launch, H200, setting).seconds * H200.clock


# ---- limits


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_program_alone(setting):
    want = setting.start + 50 * setting.stretch * 100 + setting.finish + 4096 / STORE_BYTES
    assert cycles([Program(((50, WAITING),), 4096)], setting=setting) == pytest.approx(want)


def test_a_program_that_finds_nothing_ends_at_once():
    assert cycles([Program(())]) == pytest.approx(EMPTY_CYCLES)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("L2", Step((Load(5e4),), depth=100), H200.l2 / SMS / H200.clock),
        ("HBM", Step(memory=5e4), H200.hbm / SMS / H200.clock),
        ("shared memory", Step(shared=5e4), 128),
        ("tensor cores", Step(macs=5e6), 2048),
        ("issue", Step(instructions=5e4), 4),
    ],
)
def test_one_resource_alone(name, step, rate, setting):
    """Full SMs: a step of all programs takes what they ask for over what may be used."""
    slots, steps = 3, 20
    found = simulate(Launch([Program(((steps, step),))] * slots * SMS, slots), H200, setting)
    asked = sum(load.size for load in step.loads) + sum(step[1:5])
    rate *= setting.usable * (setting.l2 if name == "L2" else 1)
    want = setting.start + steps * slots * asked / rate + setting.finish
    if name == "L2":  # runs of 128 bytes: no request is too short
        assert Load(1, 128).cost(setting.request) == 1
    assert found.seconds * H200.clock == pytest.approx(want)
    assert found.bound == name
    assert max(found.used, key=found.used.get) == name


def test_memory_counts_on_its_own_device():
    """Its rate is what the two machines differ in."""
    launch = Launch([Program(((1000, Step(memory=1e4)),))] * SMS, 1)
    slow, fast = (simulate(launch, d, OPTIMISTIC).seconds * d.clock - PLAIN for d in (H100, H200))
    assert slow / fast == pytest.approx(H200.hbm / H100.hbm)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_waves(slots):
    """A program more than fit begins another wave."""
    one, full = Program(((50, WAITING),)), slots * SMS
    wave = PLAIN + 5000
    for waves, count in ((1, 1), (1, full), (2, full + 1), (2, 2 * full), (3, 2 * full + 1)):
        assert cycles([one] * count, slots) == pytest.approx(waves * wave)


def test_programs_on_an_sm_slow_down_alike():
    """Two that ask for 60 % of the issue slots each take 1.2 / usable as long as one."""
    one = Program(((50, Step(instructions=240, latency=100)),))
    want = PLAIN + 50 * 100 * 1.2 / OPTIMISTIC.usable
    assert cycles([one] * 2 * SMS, 2) == pytest.approx(want)
    assert cycles([one] * SMS, 2) == pytest.approx(PLAIN + 50 * 100)


def test_loops_follow_one_another():
    loops = (10, WAITING), (5, Step(latency=40))
    assert cycles([Program(loops)]) == pytest.approx(PLAIN + 1200)


def test_without_a_pipeline_a_step_waits_for_its_loads():
    def step(depth):
        return Program(((10, Step((Load(64),), latency=50, depth=depth)),))

    assert cycles([step(0)]) == pytest.approx(PLAIN + 10 * (50 + OPTIMISTIC.load))
    assert cycles([step(3)]) == pytest.approx(PLAIN + 10 * OPTIMISTIC.load / 2)
    assert cycles([step(100)]) == pytest.approx(PLAIN + 10 * 50)


def test_persistent_programs_start_once():
    one = Program(((50, WAITING),))
    walk = Persistent(start=0.25, finish=0.5)
    loop, tail = 5000, OPTIMISTIC.finish / 2
    want = OPTIMISTIC.start + 3 * loop + 3 * tail + 2 * OPTIMISTIC.start / 4
    assert cycles([one] * 3 * SMS, 1, walk) == pytest.approx(want)


def test_static_walks_cannot_lend_a_hand():
    """The slot with the long programs keeps them all; a free one would have taken some."""
    long, short = Program(((500, WAITING),)), Program(((1, WAITING),))
    programs = ([long] + [short] * (SMS - 1)) * 3
    fixed, free = (cycles(programs, 1, Persistent(1.0, 1.0, static)) for static in (True, False))
    assert fixed == pytest.approx(3 * (PLAIN + 50_000))
    assert free < fixed - 50_000


def test_sectors():
    """A request costs no less than the setting says, and a run of 64 bytes no more than itself."""
    assert Load(1000, 32).cost(SECTOR) == 1000
    assert Load(1000, 32).cost(64) == 2000
    assert Load(1000, 64).cost(64) == Load(1000, 128).cost(64) == 1000


# ---- launches


@pytest.mark.parametrize(
    ("kernel", "slots"),
    [
        (model.Kernel(4, 90, 73752, 0), 3),  # shared memory
        (model.Kernel(8, 94, 98328, 0), 2),
        (model.Kernel(4, 154, 123000, 0), 1),
        (model.Kernel(8, 130, 1024, 0), 1),  # registers, in steps of 8
        (model.Kernel(8, 128, 1024, 0), 2),
        (model.Kernel(4, 48, 0, 0), 10),
        (model.Kernel(16, 16, 0, 0), 4),  # threads
    ],
)
def test_programs_an_sm(kernel, slots):
    assert kernel.slots == slots


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_of_a_weight_gradient(size):
    """As `_group_of_program` finds them: row r owns the programs from crow[r] // size + r on."""
    lengths = [3, 0, 8, 1, 5, 16, 0, 2]
    crow = [sum(lengths[:r]) for r in range(len(lengths) + 1)]
    want = []
    for pid in range(crow[-1] // size + len(lengths)):
        r = max(r for r in range(len(lengths)) if crow[r] // size + r <= pid)
        low = crow[r] + (pid - crow[r] // size - r) * size
        want.append(max(0, min(size, crow[r + 1] - low)))
    assert list(row_groups(lengths, size)) == want
    assert sum(want) == crow[-1]


@pytest.mark.parametrize("operation", [*LINEAR, *CONV])
@pytest.mark.parametrize("block", [128, 16])
def test_a_launch_multiplies_what_there_is(operation, block):
    """Tensor cores get the active blocks and padding of tiles, never less."""
    case = model.shipped(operation, block)
    if case.product == "dw":
        case = replace(case, tile=case.tile._replace(tail="exact"))
    macs = sum(n * step.macs for p in case.launch().programs for n, step in p.loops)
    active = sum(case.lengths()) * block * block * case.problem.M
    assert 1 <= macs / active < (1.25 if case.product == "dw" else 1.4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_even_groups_of_a_weight_gradient(size):
    lengths = [3, 0, 8, 1, 5, 16, 0, 2]
    found = list(even_groups(lengths, size))
    for length in lengths:
        row, found = found[: -(-length // size)], found[-(-length // size) :]
        assert sum(row) == length
        assert max(row, default=0) - min(row, default=0) <= 1
    assert not any(found)  # programs for which a row might have been longer
    total = sum(lengths)
    assert len(list(even_groups(lengths, size))) <= total
    assert list(even_groups([4, 4], 4)) == [4, 4, 0]


SMALL = model.linear(64, tokens=2048, inputs=1024, outputs=1024)


@pytest.mark.parametrize("operation", LINEAR)
def test_more_work_takes_no_less_time(operation):
    case = model.shipped(operation, 64, SMALL)
    kernel = case.kernel

    def us(**changes):
        return model.answer(replace(case, kernel=kernel._replace(**changes))).us

    base = us(serial=False)
    fast, slow = base
    assert fast < slow
    for changes in ({"instructions": 2 * kernel.instructions}, {"serial": True}, {"depth": 0}):
        for more, less in zip(us(**{"serial": False} | changes), base, strict=True):
            assert more >= less * (1 - 1e-9)  # of a sum of rounded steps
    assert us(instructions=20 * kernel.instructions)[0] > 2 * fast
    more = replace(SMALL, density=0.2)
    assert model.answer(model.shipped(operation, 64, more)).us[0] > fast


def test_parts_cost_a_second_pass():
    case = replace(model.shipped("dw", 64, SMALL), parts=1)
    for parts in (2, 8):
        second = model.second_pass(SMALL, parts, 1, OPTIMISTIC)
        assert second > 0
        assert model.answer(replace(case, parts=parts)).us[0] > 1e6 * second
    assert model.second_pass(SMALL, 1, 1, OPTIMISTIC) == 0


def test_held_activations_are_read_once():
    case = model.shipped("forward", 16, model.linear(16, tokens=2048, inputs=1024, outputs=1024))
    kernel = model.Kernel(16, 128, 200_000, 40, barriers=0.25, depth=32)
    held = replace(case, held=model.Held(sharers=2), kernel=kernel)
    p = case.problem
    weights = 2 * p.K * p.N * p.density * p.M / 64
    want = 2 * 2 * p.M * p.K + weights  # x by both sharers, w for each tile of tokens
    assert model.answer(held).gigabytes == pytest.approx(want / 1e9, rel=1e-3)


# ---- the review's figures


def linear_case(operation, block, tile, kernel, parts=1):
    return model.Case(operation, model.linear(block), tile, kernel, parts=parts, passes=2)


def kernel(warps, slots, instructions, barriers=4, *, serial=False):
    """With just the shared memory that leaves so many programs an SM."""
    shared = 228 * 1024 // slots - 1024
    return model.Kernel(warps, 32, shared, instructions, barriers, serial=serial)


# microseconds in section B of the review, with its instructions a step and programs an SM
REVIEW = [
    ("forward", 128, model.Tile(128), kernel(8, 2, 105, serial=True), 1, (61, 95)),
    ("forward", 64, model.Tile(128), kernel(4, 3, 103), 1, (85, 130)),
    ("forward", 32, model.Tile(128), kernel(4, 3, 166), 1, (146, 233)),
    ("forward", 16, model.Tile(128), kernel(4, 4, 152), 1, (268, 426)),
    (
        "dw",
        128,
        model.Tile(64, group=2, tail="half", even=False),
        kernel(8, 1, 120, 6),
        5,
        (78, 115),
    ),
    (
        "dw",
        64,
        model.Tile(64, group=4, tail="half", even=False),
        kernel(4, 1, 190, 6),
        3,
        (101, 151),
    ),
    (
        "dw",
        64,
        model.Tile(64, group=4, tail="half", even=False),
        kernel(4, 1, 190, 6),
        1,
        (78, None),
    ),
    (
        "dw",
        32,
        model.Tile(64, group=8, even=False),
        kernel(4, 2, 380, 6, serial=True),
        2,
        (173, 238),
    ),
    (
        "dw",
        16,
        model.Tile(64, group=8, even=False),
        kernel(4, 4, 220, 6, serial=True),
        1,
        (273, 426),
    ),
]


@pytest.mark.parametrize(("operation", "block", "tile", "used", "parts", "want"), REVIEW)
def test_the_reviews_ranges(operation, block, tile, used, parts, want, monkeypatch):
    """Within a tenth, under its assumption that a request of 32 bytes costs no more than that."""
    whole = replace(PESSIMISTIC, request=SECTOR)
    monkeypatch.setattr(model, "SETTINGS", (OPTIMISTIC, whole))
    found = model.answer(linear_case(operation, block, tile, used, parts)).us
    for ours, theirs in zip(found, want, strict=True):
        assert theirs is None or ours == pytest.approx(theirs, rel=0.1)


# ---- compiled figures, and what rests on the model


SASS = """
        /*0010*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3] ;
        /*0040*/              @!P1 BRA 0x200 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P0 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0200*/                   NOP ;
        /*0210*/                   BRA 0x50 ;
"""


def test_a_loop_is_counted_and_a_spinning_wait_is_not():
    assert model_figures.loops(SASS) == [model_figures.Loop(6, 2, 1, 1)]


def test_figures_are_of_the_shipped_launch_table():
    """After a change of kernels or tables: python -m benchmarks.gpu.model_figures."""
    for text, config in tables.table("sm90").items():
        known = model_figures.figures().get(str(text))
        csr = text.op.startswith("csr") and text.kind == "ieee"
        if text.op in tables.OPTIONAL or text.op == "grow" or not (text.kind == "half" or csr):
            continue
        if known is None:  # compiled once: it differs from another in its rows alone
            rest = [text._replace(rows=rows) for rows in ("short", "long", "any")]
            assert any(str(key) in model_figures.figures() for key in rest), text
            continue
        assert known["warps"] == config.num_warps, text
        assert known["source"].startswith(f"{text}, triton ")


@pytest.mark.parametrize("device", [H200, H100])
def test_the_table(device, capsys):
    model.main(["--device", device.name, "--blocks", "128"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("modelled, nothing measured")
    assert device.name in head
    assert len(lines) == len(LINEAR) + len(CONV)
    assert all("us" in line and "x dense" in line for line in lines)


@pytest.mark.parametrize("kind", model_csr.KINDS)
def test_the_crossover_of_unstructured_layers_is_the_models(kind):
    """At the table's density forward alone is no slower than dense at best, to a tenth."""
    problem = model_csr.unstructured(kind, DENSE_ABOVE[kind][1])
    for setting, low, high in ((OPTIMISTIC, 0.9, 1.1), (PESSIMISTIC, 1.1, 2.0)):
        sparse = model_csr.forward_alone(problem, setting)
        assert low < sparse / model_csr.dense(problem, setting).forward < high


def test_convolutions_of_unstructured_weights_issue_too_few_multiplications():
    """Even if nothing else held them up, dense wins at densities that are of use."""
    ops = ("csr_conv2d", "csr_conv2d_dgrad", "csr_conv2d_wgrad")
    rates = [model_csr.issue_bound(f"{op}/half/any/any/pointer") for op in ops]
    together = len(rates) / sum(1 / rate for rate in rates)
    assert together < 0.01 * model.CUDNN * H200.flops["bf16"]
    assert model_csr.issue_bound("csr_spmm/half/any/any/pointer") == pytest.approx(11e12, rel=0.05)
