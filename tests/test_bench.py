"""Result files of the benchmark suite: read, compared, drawn."""

import copy
import json
import math
import zlib

import pytest

from benchmarks.__main__ import main
from benchmarks.comparing import compare, curves, plot
from benchmarks.comparing.results import KIND, VERSION, Timing, read
from sparsekern.cost.crossing import break_even, last_that_holds
from sparsekern.errors import ConfigError, DataError

DENSITIES = (0.05, 0.1, 0.2, 0.5)


def facts(block, density, kind, name="2048x2048", family="linear"):
    return {
        "id": f"{family}/{kind}/{name}/block {block}/{density:g}",
        "kind": kind,
        "family": family,
        "operation": "step",
        "name": name,
        "block": block,
        "density": density,
    }


def speed_row(block, density, ratio, seconds=1.0, **options):
    return {
        **facts(block, density, "speed", **options),
        "seconds": {"median": seconds, "iqr": 0.01, "min": seconds, "rounds": 16},
        "against": {
            "dense": {"seconds": ratio * seconds, "ratio": ratio, "q1": ratio, "q3": ratio},
            "torch bsr": {"cannot": "no backward"},
        },
    }


def memory_row(block, density, share, **options):
    sizes = {"sparse": int(1000 * share), "dense": 1000}
    return {
        **facts(block, density, "memory", **options),
        "peak_bytes": sizes,
        "held_bytes": {**sizes},
    }


def content():
    rows = [speed_row(b, d, 0.3 / d) for b in (32, 1) for d in DENSITIES]
    rows += [memory_row(b, d, d) for b in (32, 1) for d in DENSITIES]
    environment = {"processor": "P", "threads": 2, "torch": "2", "commit": "c", "date": "d"}
    return {"kind": KIND, "version": VERSION, "environment": environment, "rows": rows}


@pytest.fixture
def saved(tmp_path):
    def save(data, name="results.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return save


# ---- reading


def test_reads_what_the_suite_writes(saved):
    results = read(saved(content()))
    assert len(results.rows) == 16
    case = "linear/speed/2048x2048/block 32/0.1"
    assert results.timing(case) == Timing(1.0, 0.01, 16)
    assert results.timing(case.replace("speed", "memory")) is None


def changed(path, value):
    data = content()
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


BAD = {
    "not JSON": ("{", "expected JSON"),
    "a list": ("[]", "kind 'list'"),
    "another kind": ({"key": {}, "parts": {}}, "got kind None"),
    "another version": (changed(["version"], 7), "expected version 1; got 7"),
    "no rows": (changed(["rows"], {}), "expected an environment and rows"),
    "no id": (changed(["rows", 0], {"kind": "speed"}), "row 0: expected an object with an id"),
    "twice": (changed(["rows", 1], content()["rows"][0]), "row 1: expected a new id"),
    "kind of row": (changed(["rows", 0, "kind"], "x"), "kind must be one of"),
    "failed": ({**content(), "rows": [{"id": "a", "failed": 3}]}, "failed must say why; got 3"),
    "failed, no reason": ({**content(), "rows": [{"id": "a", "failed": None}]}, "got None"),
    "true as version": (changed(["version"], True), "expected version 1; got True"),
    "version 1.0": (changed(["version"], 1.0), "expected version 1; got 1.0"),
    "nested deeply": ("[" * 100_000, "expected JSON of a few levels"),
    "name": (changed(["rows", 0, "name"], 3), "name must be a text; got 3"),
    "block": (changed(["rows", 0, "block"], "32"), "block must be a whole number of at least 1"),
    "block 0": (changed(["rows", 0, "block"], 0), "block must be a whole number of at least 1"),
    "block -3": (changed(["rows", 0, "block"], -3), "of at least 1; got -3"),
    "no block": (changed(["rows", 0, "block"], None), "of at least 1; got None"),
    **{
        f"density {value!r}": (
            changed(["rows", 0, "density"], value),
            f"density must be a number above 0 and at most 1; got {value!r}",
        )
        for value in (0, -1, math.nan, math.inf, 2, True)
    },
    "no seconds": (changed(["rows", 0, "seconds"], None), "expected seconds and against"),
    "NaN": (changed(["rows", 0, "seconds", "median"], math.nan), "median must be a number"),
    "huge": (changed(["rows", 0, "seconds", "median"], 10**400), "median must be a number above 0"),
    "1e400": (changed(["rows", 0, "seconds", "median"], math.inf), "above 0; got inf"),
    "zero": (changed(["rows", 0, "seconds", "rounds"], 0), "rounds must be a whole number of at"),
    "half": (changed(["rows", 0, "seconds", "rounds"], 0.5), "of at least 1; got 0.5"),
    "negative": (changed(["rows", 0, "seconds", "iqr"], -1), "iqr must be a number of at least 0"),
    "ratio": (changed(["rows", 0, "against", "dense"], {"ratio": 2}), "q1 must be a number"),
    "no ratio": (changed(["rows", 0, "against", "dense"], {}), "against 'dense'"),
    "cannot": (changed(["rows", 0, "against", "dense"], {"cannot": 1}), "or why there is none"),
    "quartiles": (
        changed(["rows", 0, "against", "dense"], {"ratio": 2, "q1": 3, "q3": 1}),
        "against 'dense': expected q1 <= ratio <= q3; got [3, 2, 1]",
    ),
    "bytes": (changed(["rows", 9, "held_bytes", "dense"], "1"), "held_bytes of dense"),
    "half bytes": (changed(["rows", 9, "held_bytes", "dense"], 0.5), "of at least 0; got 0.5"),
    "no bytes": (changed(["rows", 9, "peak_bytes"], []), "expected peak_bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_told(saved, name):
    data, text = BAD[name]
    with pytest.raises(DataError) as error:
        read(saved(data))
    assert text in str(error.value)
    assert "results.json" in str(error.value)


def test_a_failed_case_keeps_only_its_reason(saved):
    data = content()
    data["rows"][0] = {"id": "a", "failed": "why", "kind": "speed", "seconds": 3}
    results = read(saved(data))
    assert results.rows["a"] == {"id": "a", "failed": "why"}
    assert results.timing("a") is None
    assert len(curves.speedups(results)) == 1
    assert compare.compare(results, results, relative_to="dense").failed == (("a", "why"),)


def test_text_is_utf8_whatever_the_locale(saved, monkeypatch):
    data = content()
    data["environment"]["processor"] = "µ"
    path = saved("")
    path.write_bytes(json.dumps(data, ensure_ascii=False).encode())
    monkeypatch.setattr("_locale.getencoding", lambda: "ascii", raising=False)
    asked = []
    original = type(path).read_text
    monkeypatch.setattr(
        type(path), "read_text", lambda self, **k: asked.append(k) or original(self, **k)
    )
    assert read(path).environment["processor"] == "µ"
    assert asked == [{"encoding": "utf-8"}]


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(DataError, match="expected a readable result file"):
        read(tmp_path / "none.json")
    with pytest.raises(DataError, match="expected a readable result file"):
        read(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DataError, match="expected JSON"):
        read(tmp_path / "binary.json")


# ---- comparing


def pair(saved, change):
    new = content()
    change(new)
    return read(saved(content(), "old.json")), read(saved(new, "new.json"))


def seconds(data, row, **values):
    data["rows"][row]["seconds"].update(values)


def test_a_file_does_not_differ_from_itself(saved):
    found = compare.compare(*pair(saved, lambda _: None))
    assert found == compare.Comparison((), (), 24, (), (), (), {})  # 8 times, 2 x 8 bytes


@pytest.mark.parametrize(
    ("median", "iqr", "rounds", "verdict"),
    [
        (1.10, 0.01, 16, "worse"),  # notch 0.004: far outside
        (0.90, 0.01, 16, "better"),
        (1.04, 0.001, 16, "same"),  # certain, but small
        (1.10, 0.30, 16, "same"),  # large, but its notch is 0.118
        (1.10, 0.30, 64, "worse"),  # the same with more rounds: 0.059
    ],
)
def test_only_what_is_larger_than_noise_and_threshold_changed(saved, median, iqr, rounds, verdict):
    old, new = pair(saved, lambda d: seconds(d, 0, median=median, iqr=iqr, rounds=rounds))
    found = compare.compare(old, new)
    cases = {"worse": found.worse, "better": found.better, "same": ()}
    assert [c.case for c in cases[verdict]] == ([next(iter(old.rows))] if cases[verdict] else [])
    assert len(found.worse) + len(found.better) == (verdict != "same")


def test_the_interval_is_that_of_the_notches(saved):
    old, new = pair(saved, lambda d: seconds(d, 0, median=2.0, iqr=0.1, rounds=25))
    (change,) = compare.compare(old, new).worse
    half_old, half_new = 1.57 * 0.01 / 4, 1.57 * 0.1 / 5
    assert change.low == (2.0 - half_new) / (1 + half_old)
    assert change.high == (2.0 + half_new) / (1 - half_old)


def test_a_notch_that_reaches_zero_bounds_nothing(saved):
    wide = {"median": 1.0, "iqr": 100.0, "rounds": 1}
    old = read(saved(changed(["rows", 0, "seconds"], wide), "a.json"))
    assert compare.compare(old, read(saved(content()))).worse == ()


def test_relative_times_do_not_see_the_machine(saved):
    def slower_machine(data):
        for row in data["rows"]:
            if row["kind"] == "speed":
                row["seconds"]["median"] *= 2

    old, new = pair(saved, slower_machine)
    assert len(compare.compare(old, new).worse) == 8
    assert compare.compare(old, new, relative_to="dense").worse == ()

    def slower_code(data):
        slower_machine(data)
        for name in ("ratio", "q1", "q3"):
            data["rows"][0]["against"]["dense"][name] /= 2

    old, new = pair(saved, slower_code)
    (change,) = compare.compare(old, new, relative_to="dense").worse
    assert change.what == "time / dense"
    assert change.ratio == 2


def test_more_bytes_are_worse(saved):
    old, new = pair(saved, lambda d: d["rows"][9]["held_bytes"].update(sparse=200))
    (change,) = compare.compare(old, new).worse
    assert (change.what, change.old, change.new) == ("held bytes", 100, 200)


def test_new_missing_and_failed_cases_are_listed(saved):
    def change(data):
        first, second = data["rows"][0], data["rows"][1]
        data["rows"][0] = {"id": first["id"], "failed": "differs from the reference"}
        data["rows"][1] = {**second, "id": "another"}

    old, new = pair(saved, change)
    found = compare.compare(old, new)
    ids = list(old.rows)
    assert found.failed == ((ids[0], "differs from the reference"),)
    assert (found.new, found.missing) == (("another",), (ids[1],))
    text = compare.report(old, new, found)
    assert "failed: linear/speed/2048x2048/block 32/0.05: differs from the reference" in text
    assert "missing: 1" in text


FIRST = "linear/speed/2048x2048/block 32/0.05"
FIRST_MEMORY = FIRST.replace("speed", "memory")
SPEED_TO_MEMORY = {"kind": "memory", "peak_bytes": {"sparse": 1}, "held_bytes": {}}
LOST = {
    "baseline": ((0, "against", "dense"), None, "dense", f"{FIRST}: time / dense"),
    "ratio": ((0, "against", "dense"), {"cannot": "no"}, "dense", f"{FIRST}: time / dense"),
    "peak": ((8, "peak_bytes", "sparse"), None, None, f"{FIRST_MEMORY}: peak bytes"),
    "held": ((8, "held_bytes", "sparse"), None, None, f"{FIRST_MEMORY}: held bytes"),
    "kind": ((0,), SPEED_TO_MEMORY, None, f"{FIRST}: seconds"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_one_file_lost_is_missing(saved, capsys, name):
    (row, *path), value, relative_to, line = LOST[name]

    def change(data):
        at = data["rows"][row]
        for key in path[:-1]:
            at = at[key]
        if not path:
            at.update(value)
        elif value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    old, new = pair(saved, change)
    found = compare.compare(old, new, relative_to=relative_to)
    assert found.missing == (line,)
    assert found.new == ((f"{FIRST}: peak bytes",) if name == "kind" else ())
    assert compare.compare(new, old, relative_to=relative_to).new == (line,)
    options = ["--fail-on-slower"] + (["--relative-to", relative_to] if relative_to else [])
    assert main(["compare", str(old.path), str(new.path), *options]) == 1
    assert f"missing: 1\n  {line}" in capsys.readouterr().out


def test_different_environments_are_flagged_and_dates_are_not(saved):
    old, new = pair(saved, lambda d: d["environment"].update(threads=8, date="e", commit="f"))
    found = compare.compare(old, new)
    assert found.environment == {"threads": (2, 8)}
    assert "DIFFERENT ENVIRONMENTS: threads: 2 against 8" in compare.report(old, new, found)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_is_a_number(saved, threshold):
    with pytest.raises(ConfigError, match="`threshold` must be a number of at least 0"):
        compare.compare(*pair(saved, lambda _: None), threshold=threshold)


def test_an_unknown_baseline_names_the_known(saved):
    with pytest.raises(ConfigError, match=r"got 'cublas', and they have \['dense'\]"):
        compare.compare(*pair(saved, lambda _: None), relative_to="cublas")


def test_a_baseline_is_checked_without_a_common_case_too(saved):
    def rename(data):
        for row in data["rows"]:
            row["id"] += "/renamed"

    old, new = pair(saved, rename)
    with pytest.raises(ConfigError, match=r"got 'zzz', and they have \['dense'\]"):
        compare.compare(old, new, relative_to="zzz")
    found = compare.compare(old, new, relative_to="dense")
    assert len(found.missing) == len(found.new) == 16

    def rename_speed(data):
        for row in data["rows"][:8]:
            row["id"] += "/renamed"

    old, new = pair(saved, rename_speed)
    found = compare.compare(old, new, relative_to="dense")
    assert (found.same, len(found.missing), len(found.new)) == (16, 8, 8)


# ---- curves


def test_break_even_lies_on_the_straight_line_of_logarithms():
    assert break_even([(0.4, 0.25), (0.1, 4.0)]).density == pytest.approx(0.2, rel=2**-40)
    assert break_even([(0.1, 4.0), (0.4, 1.0)]) == (0.4, ">=")
    assert break_even([(0.1, 4.0), (1.0, 1.5)]) == (1.0, "")
    assert break_even([(0.1, 0.5), (0.4, 0.25)]) == (0.1, "<=")
    assert break_even([(0.1, 2.0), (0.2, 1.0), (0.4, 0.5)]) == (0.2, "")
    assert break_even([(0.1, 2.0), (0.2, 0.5), (0.4, 1.0), (0.8, 0.5)]) == (0.4, "")  # the last
    assert break_even([]) is None


@pytest.mark.parametrize("edge", [0.0, 0.3, 0.75, 1.0])
def test_halving_finds_the_last_that_holds(edge):
    assert last_that_holds(lambda x: x <= edge, 0.0, 1.0) == pytest.approx(edge, abs=2**-49)


def test_curves_are_sorted_and_need_enough_densities(saved):
    data = content()
    data["rows"].reverse()
    data["rows"] += [speed_row(16, d, 1.0, name="1024x1024") for d in DENSITIES[:3]]
    (panel,) = curves.speedups(read(saved(data)))
    assert panel.title == "linear 2048x2048"
    assert [curve.block for curve in panel.curves] == [32, 1]
    assert panel.curves[0].points == tuple((d, 0.3 / d) for d in DENSITIES)
    (memory,) = curves.memory(read(saved(data)))
    assert memory.curves[0].points == memory.others[0].points == tuple((d, d) for d in DENSITIES)


def test_no_curve_is_an_error(saved):
    data = content()
    data["rows"] = data["rows"][:3]
    with pytest.raises(DataError, match="expected a layer measured at 4 densities or more"):
        curves.speedups(read(saved(data)))


# ---- drawing


def test_figures_know_what_they_were_drawn_from(saved, tmp_path):
    pytest.importorskip("matplotlib")
    results = read(saved(content()))
    paths = plot.plot(results, tmp_path)
    assert [path.name for path in paths] == ["speedup.png", "memory.png"]
    assert plot.drawn_from(paths[0]) == curves.digest(curves.speedups(results))
    assert plot.drawn_from(paths[1]) == curves.digest(curves.memory(results))
    other = copy.deepcopy(content())
    other["rows"][0]["against"]["dense"].update(ratio=9.0, q3=9.0)
    assert curves.digest(curves.speedups(read(saved(other)))) != plot.drawn_from(paths[0])


def test_what_is_no_picture_of_ours(tmp_path):
    with pytest.raises(DataError, match="expected a readable picture"):
        plot.drawn_from(tmp_path / "none.png")
    path = tmp_path / "text.png"
    path.write_text("text")
    with pytest.raises(DataError, match="expected a PNG"):
        plot.drawn_from(path)
    end = (0).to_bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4)
    path.write_bytes(plot.PNG_MARK + end)
    assert plot.drawn_from(path) is None
    path.write_bytes(plot.PNG_MARK + (4).to_bytes(4) + b"tEXtDataXXXX")
    with pytest.raises(DataError, match="checksum"):
        plot.drawn_from(path)


def test_a_picture_that_was_cut_is_told(saved, tmp_path):
    pytest.importorskip("matplotlib")
    path, _ = plot.plot(read(saved(content())), tmp_path)
    whole = path.read_bytes()
    for length in (8, 10, 20, len(whole) // 2, len(whole) - 12, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"whole PNG; got one that is cut, of {length} bytes"):
            plot.drawn_from(path)


def test_a_folder_that_takes_no_file_is_told(saved, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "speedup.png").mkdir()  # as unwritable as it gets for whoever runs the tests
    with pytest.raises(DataError, match=r"speedup\.png: expected a file that can be written; got"):
        plot.plot(read(saved(content())), tmp_path)


def test_nothing_is_drawn_into_no_folder(saved, tmp_path):
    with pytest.raises(DataError, match="must be an existing folder"):
        plot.plot(read(saved(content())), tmp_path / "none")


# ---- the command


def test_compare_prints_and_fails_if_asked(saved, capsys):
    old, new = saved(content(), "old.json"), saved(content(), "new.json")
    assert main(["compare", str(old), str(new), "--fail-on-slower"]) == 0
    assert "24 the same within noise" in capsys.readouterr().out
    data = content()
    seconds(data, 0, median=2.0)
    new.write_text(json.dumps(data))
    assert main(["compare", str(old), str(new)]) == 0
    assert main(["compare", str(old), str(new), "--fail-on-slower"]) == 1
    assert "+100.0%  linear/speed/2048x2048/block 32/0.05: seconds 1 -> 2" in (
        capsys.readouterr().out
    )
    assert main(["compare", str(new), str(old), "--fail-on-slower"]) == 0


def test_plot_writes_beside_the_file(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(saved(content()))]) == 0
    assert (tmp_path / "speedup.png").exists()
    assert "memory.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["compare", "{bad}", "{bad}"], ["plot", "{bad}"], ["plot", "{none}"]]
)
def test_bad_files_are_one_line(saved, tmp_path, capsys, arguments):
    paths = {"bad": str(saved("{}")), "none": str(tmp_path / "none.json")}
    assert main([*(a.format(**paths) for a in arguments)]) == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks: error: ")


@pytest.mark.parametrize("arguments", [[], ["plot"], ["draw", "x"]])
def test_unknown_parts_and_options(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err
