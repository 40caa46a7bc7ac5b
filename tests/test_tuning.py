"""`sparsekern tune`: what it tries, on what, and what it believes."""

import importlib.util

import pytest
import torch

from sparsekern.errors import ConfigError
from sparsekern.kernels import tables
from sparsekern.kernels.tables import CsrConfig, GrowConfig, Key, SddmmConfig, SpmmConfig
from sparsekern.topology import Topology
from sparsekern.tuning.candidates import LIMIT, candidates, is_legal
from sparsekern.tuning.job import Job
from sparsekern.tuning.problems import Problem, Request, keys, problems
from sparsekern.tuning.verdict import LEAST_NOISE, judge

SHARED = 232_448
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


# ---- what is tried, and on what


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_candidates_are_few_legal_and_include_the_current(arch):
    for key, current in tables.table(arch).items():
        found = candidates(key, current, SHARED)
        assert found[0] == current
        assert 3 <= len(found) == len(set(found)) <= LIMIT, key
        assert all(type(c) is type(current) and is_legal(key, c, SHARED) for c in found[1:])
        assert candidates(key, current, shared=0)[1:] == [] or key.op.startswith("csr")


ILLEGAL = {
    "shared": ("spmm/half/128/long/tma", SpmmConfig(256, 128, 8, False, 8, 3)),
    "registers": ("spmm/half/128/long/tma", SpmmConfig(256, 64, 8, False, 4, 2)),
    "cut": ("spmm/half/64/long/tma", SpmmConfig(128, 128, 8, False, 4, 2)),
    "swap-pointer": ("spmm/half/64/long/pointer", SpmmConfig(128, 64, 8, True, 4, 3)),
    "swap-small": ("spmm/half/32/long/tma", SpmmConfig(128, 32, 8, True, 4, 3)),
    "power": ("spmm/half/64/long/tma", SpmmConfig(96, 64, 8, False, 4, 3)),
    "warps": ("spmm/half/64/long/tma", SpmmConfig(128, 64, 8, False, 2, 3)),
    "lanes": ("sddmm/half/64/any/tma", SddmmConfig(64, 32, 4, 3)),
    "narrow": ("grow/half/any/any/tma", GrowConfig(64, 256, 64, 8, 3)),
    "box": ("grow/half/any/any/tma", GrowConfig(128, 512, 16, 8, 2)),
    "unroll": ("csr_spmm/half/any/any/pointer", CsrConfig(128, 16, 16, 4)),
    "csr-registers": ("csr_spmm/half/any/any/pointer", CsrConfig(512, 128, 1, 4)),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal(case):
    text, config = ILLEGAL[case]
    assert not is_legal(Key.parse(text), config, SHARED)


@needs_triton
def test_problems_make_the_rows_of_their_key():
    from sparsekern.kernels.launch import rows_class

    request = Request(dtypes=("bf16", "fp32"), shape=(2048, 4096), densities=(0.1, 0.5))
    asked = keys(request, tables.table("sm90"))
    assert {key.op for key in asked} == set(tables.CONFIGS)
    assert asked.index(Key.parse("sddmm/half/64/any/tma")) < asked.index(
        Key.parse("spmm/half/64/short/pointer")
    )
    for key in asked:
        found = problems(key, request)
        assert found, key
        for p in found:
            assert p.dtype == {"half": "bf16", "ieee": "fp32"}[key.kind]
            if key.rows != "any":
                shape = (p.rows, p.cols)
                t = Topology.random(shape, p.block, sparsity=1 - p.density)
                r = t.block_cols if key.op == "spmm_t" else t.block_rows
                assert rows_class(t.nnzb, r, p.block) == key.rows, (key, p)
    small = Request(shape=(256, 256))
    assert problems(Key.parse("spmm/half/64/long/tma"), small) == []


BAD_REQUESTS = {
    "op": ({"ops": ("gemm",)}, ["`ops`", "spmm_t", "gemm"]),
    "block": ({"blocks": (8,)}, ["`blocks`", "128", "8"]),
    "dtype": ({"dtypes": ()}, ["`dtypes`", "bf16", "()"]),
    "tokens": ({"tokens": 0}, ["`tokens`", "at least 1", "0"]),
    "shape": ({"shape": (64, 4096)}, ["`shape`", "128", "64 x 4096"]),
    "density": ({"densities": (0.1, 1.5)}, ["`densities`", "(0, 1]", "1.5"]),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request(case):
    fields, fragments = BAD_REQUESTS[case]
    with pytest.raises(ConfigError) as caught:
        Request(**fields)
    assert all(fragment in str(caught.value) for fragment in fragments)


def test_faster_means_by_more_than_the_noise():
    base = [[1.0, 2.0, 1.0, 4.0]]  # clocks change; ratios do not
    quiet, loud = [[1.0, 2.0, 1.0, 4.0]], [[1.3, 1.4, 0.7, 5.0]]
    faster, level = [[0.8, 1.6, 0.8, 3.2]], [[0.995, 1.99, 0.995, 3.98]]
    verdict = judge(0, quiet, {0: base, 3: faster, 5: level})
    assert (verdict.best, verdict.is_faster, verdict.noise) == (3, True, LEAST_NOISE)
    assert verdict.ratio == pytest.approx(0.8)
    assert not judge(0, quiet, {0: base, 5: level}).is_faster
    assert not judge(0, loud, {0: base, 3: faster}).is_faster
    # two problems count alike
    both = judge(1, quiet * 2, {1: base * 2, 2: [faster[0], [2.0, 4.0, 2.0, 8.0]]})
    assert both.ratios[2] == pytest.approx(1.6**0.5)


# ---- what is believed: the measuring process, run here

KEY = Key.parse("spmm/ieee/16/short/pointer")
GOOD, BAD, RAISES = (SpmmConfig(32, 16, 8, False, 4, stages) for stages in (3, 4, 5))
SMALL = Problem("fp32", 16, 32, 32, 48, 0.5)


def events_of(job):
    from sparsekern.tuning import measure

    return list(measure.run(job))


@needs_triton
def test_wrong_and_raising_candidates_are_never_timed(monkeypatch):
    from sparsekern.tuning import measure

    run = measure.Case.run

    def broken(case, o):
        config = tables._overrides["sm90", KEY]
        if config == RAISES:
            raise RuntimeError("out of resource: shared memory\nand more")
        y = run(case, o)
        if config == BAD:
            y[3, 5] += 1
        return y

    monkeypatch.setattr(measure.Case, "run", broken)
    job = Job(KEY, (SMALL,), {0: BAD, 1: GOOD, 2: RAISES}, 2, dry_run=True)
    events = events_of(job)
    checked = {e["index"]: e["error"] for e in events if e["event"] == "checked"}
    assert checked[0] == f"wrong result: 1 of {32 * 32} differ, first at [3, 5]"
    assert checked[1] is None
    assert checked[2] == "RuntimeError: out of resource: shared memory and more"
    times = next(e for e in events if e["event"] == "times")
    assert times["reference"] == 1
    assert list(times["times"]) == [1]
    assert [len(rounds) for rounds in times["times"][1] + times["twin"]] == [2, 2]
    assert events[-1] == {"event": "done"}


@needs_triton
def test_what_is_not_written_is_wrong(monkeypatch):
    from sparsekern.tuning import measure

    case = measure.Case("spmm", SMALL, torch.device("cpu"))
    assert case.check() is None
    monkeypatch.setattr(measure.triton, "spmm", lambda x, v, t, b: x.new_empty(32, 32))
    assert "1024 of 1024 differ" in case.check()


@needs_triton
def test_every_operation_is_right_through_its_own_entry():
    before = dict(tables.table("sm90"))
    for text, dtype, block in (
        ("grow/ieee/any/any/pointer", "fp32", 64),
        ("sddmm/tf32/64/any/pointer", "tf32", 64),
        ("csr_spmm_t/half/any/any/pointer", "bf16", 1),
    ):
        key, problem = Key.parse(text), Problem(dtype, block, 16, block * 16, 64, 0.5)
        if block > 1:
            problem = problem._replace(rows=64)
        job = Job(key, (problem,), {0: before[key]}, 1, dry_run=True)
        checked = [e for e in events_of(job) if e["event"] == "checked"]
        assert [e["error"] for e in checked] == [None], key
        assert tables.table("sm90") == before  # also the tma entry that was in the way


@needs_triton
def test_problems_of_another_entry_are_refused():
    key = Key.parse("spmm/half/64/short/tma")
    ragged = Problem("bf16", 64, 32, 128, 120, 0.5)
    with pytest.raises(ConfigError, match=r"spmm/half/64/short/tma; got .*cols=120"):
        events_of(Job(key, (ragged,), {0: tables.table("sm90")[key]}, 1, True))
