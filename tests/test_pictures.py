"""Pictures of a result file hold its numbers; what it lacks, and what is broken, is named."""

import json
import math

import numpy as np
import pytest
from result_files import content, frames_of, grid, of, run

import sparsekern as sk
from sparsekern.cli.main import main
from sparsekern.errors import ConfigError, UnavailableError
from sparsekern.training.pictures import cost, curves, gallery, layers, runs, style

pytest.importorskip("matplotlib")


def lines_of(axes):
    """Label of each line with error bars, and its points."""
    found = {}
    for line in axes.containers:
        xs, ys = line.lines[0].get_data()
        found[line.get_label().removeprefix("_")] = np.stack([xs, ys], 1)
    return found


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_cost_has_each_method_at_its_flops_and_its_mean():
    made = cost.draw_cost(of(*grid(), *grid(("static", "rigl"), sparsity=0.98)))
    axes = made.axes[0]
    lines = lines_of(axes)
    assert set(lines) == {"Static", "SET", "RigL"}
    mean = 100 * (0.80 + 0.81) / 2
    assert lines["RigL"] == pytest.approx(
        np.array([(1.2 * 0.02, mean), (1.2 * 0.1, mean)]), rel=1e-9
    )
    assert lines["SET"] == pytest.approx(np.array([(1.2 * 0.1, mean)]), rel=1e-9)
    (bars,) = axes.containers[0].lines[2]
    low, high = bars.get_segments()[-1][:, 1]
    assert high - low == pytest.approx(2 * 100 * 0.01 / math.sqrt(2), rel=1e-9)
    (level,) = [line for line in axes.lines if line.get_label() == "dense, 1x"]
    assert level.get_ydata()[0] == pytest.approx(mean + 5, rel=1e-9)
    assert legend_of(made) == ["Static", "SET", "RigL", "dense, 1x"]
    assert axes.get_xscale() == "log"


def test_length_has_each_length():
    every = [r for m in (1.0, 2.0, 5.0) for r in grid(("dense", "rigl"), multiplier=m)]
    made = cost.draw_length(of(*every))
    line = lines_of(made.axes[0])["RigL"]
    wanted = np.array([(m, 80.5 + 2 * math.log2(m)) for m in (1.0, 2.0, 5.0)])
    assert line == pytest.approx(wanted, rel=1e-9)
    assert [t.get_text() for t in made.axes[0].get_xticklabels()] == ["1x", "2x", "5x"]
    with pytest.raises(ConfigError, match="several lengths; all have 1x"):
        cost.draw_length(of(*grid()))


def test_what_differs_besides_is_in_the_legend_and_the_rest_in_the_title():
    made = cost.draw_cost(of(*grid(), *grid(("rigl",), block=(4, 16))))
    assert set(lines_of(made.axes[0])) == {
        "Static, block 1",
        "SET, block 1",
        "RigL, block 1",
        "RigL, block 4x16",
    }
    assert legend_of(made)[-3:] == ["block 1", "block 4x16", "dense, 1x"]
    assert made.get_suptitle().endswith("digits, fully connected 12, sparsity 0.9")
    assert cost.draw_cost(of(*grid(block=(4, 4)))).get_suptitle().endswith("sparsity 0.9, block 4")


def test_curves_are_means_of_seeds():
    made = curves.draw_curves(of(*grid(("dense", "rigl"), seeds=3)))
    loss, loss_by_time, accuracy, _ = made.axes
    rigl = loss.lines[1]
    assert list(rigl.get_xdata()) == [50, 100]
    assert list(rigl.get_ydata()) == pytest.approx([1.75, 1.5])
    assert list(loss_by_time.lines[1].get_xdata()) == pytest.approx([2.0, 3.0])
    assert list(accuracy.lines[1].get_ydata()) == pytest.approx([76.0, 81.0])
    assert legend_of(made) == ["dense", "RigL"]


def test_curves_without_a_validation_split_have_the_loss_and_say_so():
    plain = run("rigl")
    plain["curve"] = [{**point, "validation": None} for point in plain["curve"]]
    made = curves.draw_curves(of(plain))
    assert len(made.axes) == 2
    assert "no validation split" in made.get_supxlabel()
    plain["curve"] = plain["curve"][:1]
    with pytest.raises(ConfigError, match="two points"):
        curves.draw_curves(of(plain))


@pytest.mark.parametrize("named", [False, True])
def test_layers_over_updates(named):
    made = layers.draw_layers(
        of(*(run(m, named=named) for m in ("dense", "static", "rigl", "set")))
    )
    rows = {axes.get_ylabel(): axes for axes in made.axes if axes.get_ylabel()}
    wanted = {
        "median fan-in": [6, 5, 4],
        "largest fan-in": [9, 10, 11],
        "live outputs, share": [1, 11 / 12, 10 / 12],
        "live inputs, share": [20 / 30] * 3,
    }
    if named:  # the number of weights is in newer files alone
        wanted["density"] = [70 / 360, 69 / 360, 68 / 360]
    assert set(rows) == set(wanted)
    assert ("not in the file: density" in made.get_supxlabel()) is not named
    for name, values in wanted.items():
        (line,) = rows[name].lines
        assert list(line.get_xdata()) == [0, 20, 40]
        assert list(line.get_ydata()) == pytest.approx(values)
    assert [axes.get_title() for axes in made.axes[:2]] == ["RigL", "SET"]
    assert legend_of(made) == ["fc1"]
    with pytest.raises(ConfigError, match="a method that updates a topology"):
        layers.draw_layers(of(run("static")))
    old = run("rigl")
    for update in old["updates"]:
        update["layers"]["fc1"]["facts"] = None
    with pytest.raises(ConfigError, match="written before they were kept"):
        layers.draw_layers(of(run("dense"), old))


# ---- which runs


def test_runs_that_failed_or_did_not_learn_are_left_out_and_named():
    lost = {"method": "snip", "state": "failed", "error": "x"}
    made = cost.draw_cost(of(*grid(), run("grasp", learned=False), lost))
    assert set(lines_of(made.axes[0])) == {"Static", "SET", "RigL"}
    assert made.get_supxlabel().endswith("left out: grasp (learned nothing), snip (failed)")
    with pytest.raises(ConfigError, match="besides dense"):
        cost.draw_cost(of(run("dense"), lost))


def test_the_validation_split_chooses_among_learning_rates():
    good, bad = run("rigl", lr=0.1), run("rigl", lr=0.5)
    good["validation"], bad["validation"] = ({"accuracy": a, "bits": None} for a in (0.9, 0.7))
    good["test"], bad["test"] = ({"accuracy": a, "bits": None} for a in (0.6, 0.8))
    assert [c.lr for c in runs.best_rates(of(bad, good)).groups] == [0.1]
    assert lines_of(cost.draw_cost(of(bad, good)).axes[0])["RigL"][0][1] == pytest.approx(60)
    bad["validation"] = None  # nothing but the test split could choose
    assert set(lines_of(cost.draw_cost(of(bad, good)).axes[0])) == {"RigL, lr 0.1", "RigL, lr 0.5"}


def test_only_some_runs():
    whole = of(*grid(), *grid(("static", "rigl"), sparsity=0.98))
    cells = list(runs.chosen(whole, methods=["rigl"], sparsity=0.98).groups)
    assert [(c.method, c.sparsity) for c in cells] == [("dense", 0.0), ("rigl", 0.98)]
    with pytest.raises(ConfigError, match="`method` must be one of .*'rigl'.*; got 'snfs'"):
        runs.chosen(whole, methods=["snfs"])
    with pytest.raises(ConfigError, match="no run that learned is left to draw of 6"):
        runs.chosen(whole, multiplier=5.0)
    with pytest.raises(ConfigError, match=r"left out: rigl \(learned nothing\)"):
        runs.chosen(of(run("rigl", learned=False)))


def test_curves_and_layers_show_one_setting():
    every = [run("dense", multiplier=2.0), *grid(seeds=1), *grid(("rigl",), 1, sparsity=0.98)]
    made = curves.draw_curves(of(*every))
    assert len(made.axes[0].lines) == 4  # dense of the same length, and three methods at 0.9
    assert made.get_suptitle().endswith("sparsity 0.9")
    assert "the first of 2 settings; --sparsity" in made.get_supxlabel()
    made = layers.draw_layers(of(*every))
    assert [a.get_title() for a in made.axes if a.get_title()] == ["SET", "RigL"]
    assert "the first of 2 settings" in made.get_supxlabel()


def test_more_settings_than_dashes_are_refused():
    every = [run("rigl", block=(1, b), lr=lr) for b in (1, 2, 4) for lr in (0.1, 0.2, 0.3)]
    for one in every:
        one["validation"] = None  # else one rate is chosen
    with pytest.raises(ConfigError, match="at most 8 settings apart, by dashes; got 9"):
        cost.draw_cost(of(*every))


def test_text_is_measured_in_bits():
    text = run("rigl", test={"accuracy": 0.4, "bits": 2.5})
    made = cost.draw_cost(of(text))
    assert made.axes[0].get_ylabel() == "test bits per character"
    assert lines_of(made.axes[0])["RigL"][0][1] == 2.5


def test_no_two_methods_look_alike():
    looks = list(style.LOOKS.values())
    assert len({look.marker for look in looks}) == len(looks)
    assert len({look.color for look in looks}) == len(looks)
    assert set(sk.methods.METHODS) <= set(style.LOOKS)
    control = style.look("snip-shuffled")
    assert (control.label, control.color) == ("SNIP, shuffled", style.LOOKS["snip"].color)
    own = [style.look(name, ["m:A", "m:B"]) for name in ("m:A", "m:B")]
    assert own[0].label == "A"
    assert own[0].color != own[1].color
    assert own[0].marker != own[1].marker
    made = cost.draw_cost(of(run("m:A"), run("m:B")))
    assert set(lines_of(made.axes[0])) == {"A", "B"}


# ---- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r.json"
    frames = frames_of(1).to_json()
    path.write_text(json.dumps(content(*grid(), run("rigl", 7, frames=frames))))
    return path


def test_the_command_draws_what_the_file_holds(saved, tmp_path, capsys):
    assert main(["picture", str(saved), "--out", str(tmp_path / "new")]) == 0
    names = ["cost.png", "curves.png", "layers.png", "movie.gif"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == names
    assert all(p.read_bytes()[:4] in (b"\x89PNG", b"GIF8") for p in (tmp_path / "new").iterdir())
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [str(tmp_path / "new" / name) for name in names]
    assert out[4:] == [
        "no length: accuracy against training length needs runs of several lengths; all have 1x"
    ]


REFUSED = {
    "lacking": (["--only", "cost", "length"], "several lengths; all have 1x"),
    "method": (["--method", "rigle"], "`method` must be one of"),
    "sparsity": (["--sparsity", "0.5", "--method", "rigl", "--multiplier", "3"], "no run"),
    "folder": (["--only", "cost", "--out", "/no/such/folder"], "`out` must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_write_nothing(saved, tmp_path, capsys, what):
    options, told = REFUSED[what]
    assert main(["picture", str(saved), "--out", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def changed(field, value):
    made = run("rigl")
    made[field] = value
    return json.dumps(content(made))


BROKEN = {
    "no JSON": ("{", "expected a result file"),
    "a list": ("[]", "expected a result file"),
    "format": (json.dumps(content() | {"format": 1}), "format 2; got format 1"),
    "data": (json.dumps(content() | {"data": 3}), "must be objects"),
    "no runs": (json.dumps({"format": 2, "data": {}, "task": {}, "dense": {}}), "runs"),
    "a field": (json.dumps(content({"state": "done"})), "run 0: expected a run"),
    "a score": (changed("test", 0.9), "run 0: expected a run"),
    "a block": (changed("block", 4), "run 0: expected a run"),
    "a curve": (changed("curve", [{}]), "run 0: expected a run"),
    "updates": (changed("updates", [{"step": 1, "layers": {"a": 3}}]), "run 0: expected a run"),
    "a run": (json.dumps(content(3)), "run 0: expected a run"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_named(tmp_path, capsys, what):
    text, told = BROKEN[what]
    path = tmp_path / "broken.json"
    path.write_text(text)
    assert main(["picture", str(path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "broken.json" in error


def test_pictures_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match="needs matplotlib: pip install"):
        gallery.draw(of(run("rigl")), tmp_path)
    with pytest.raises(UnavailableError):
        gallery.draw(of(run("rigl")), tmp_path, ["cost"])


def test_settings_that_no_run_has_are_refused():
    whole = of(*grid(), *grid(("static", "rigl"), sparsity=0.98))
    for setting in ({"sparsity": 0.95}, {"block": (16, 16)}):
        with pytest.raises(ConfigError, match="there are sparsity 0.9, 0.98, block 1x1, mult"):
            runs.chosen(whole, **setting)
    assert {cell.method for cell in runs.chosen(whole, methods=["dense"]).groups} == {"dense"}


def test_a_title_stays_inside_a_narrow_picture():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    made = style.figure(4.7, 3.0, "Layers over topology updates: " + "fully connected 300-100 " * 3)
    made.subplots()
    canvas = FigureCanvasAgg(made)
    canvas.draw()
    box = made._suptitle.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= made.bbox.width


def test_layers_of_a_single_update_are_points():
    one = run("rigl")
    one["updates"] = one["updates"][:1]
    lines = [line for axes in layers.draw_layers(of(one)).axes for line in axes.lines]
    assert lines
    assert all(line.get_marker() == "o" for line in lines)
