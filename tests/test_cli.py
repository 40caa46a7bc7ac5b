"""The command line on tiny runs: its table, JSON, picture and determinism, and bad input."""

import json
import re
import sys

import pytest
import torch
from matplotlib.image import imread

from sparsekern.cli.main import main
from sparsekern.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    SparseKernError,
    TrainingLoopError,
    UnavailableError,
)
from sparsekern.show.environment import environment
from sparsekern.training import data, report
from sparsekern.training.config import PRESETS, TrainConfig
from sparsekern.training.grid import AXES
from sparsekern.training.network import build
from sparsekern.training.pictures import connections, style
from sparsekern.training.results import FORMAT
from sparsekern.training.trainer import run

TINY = ["train", "--hidden", "32", "--sparsity", "0.9", "--epochs", "2", "--update-freq", "5"]
TINY += ["--validation", "0", "--quiet"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One comparison of everything: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "write", printed.append)
        files = ["--json", str(folder / "r.json"), "--picture", str(folder / "p.png")]
        status = main([*TINY, "--seeds", "2", *files])
    assert status == 0
    return folder, "".join(printed)


@pytest.fixture(scope="module")
def results(compared):
    return json.loads((compared[0] / "r.json").read_text())


def test_table_has_a_row_per_method_and_fits(compared, results):
    text = compared[1]
    assert "1 multiply-add = 2 FLOPs" in " ".join(text.split())
    assert str(compared[0] / "r.json") in text
    assert max(len(line) for line in report_lines(text)) <= 80
    for made in report.rows(results):
        row = re.search(rf"^{made.name} .*$", text, flags=re.M).group()
        assert f" {made.test:.2f} ± {made.spread:.2f} " in row
        assert f" {made.training_ratio:.4f} " in row
        assert f" {made.inference_ratio:.4f} " in row
        assert row.endswith(f" {1000 * made.step_seconds:.2f}")


def report_lines(text):
    """The table and its notes, without lines that name files."""
    lines = text.split("\n\n", 1)[1].splitlines()
    return [line for line in lines if not re.match("Results|Picture", line)]


def test_json_says_everything(results):
    assert results["format"] == FORMAT
    assert set(results) == {"format", "flops", "environment", "data", "task", "dense", "runs"}
    assert results["data"]["unigram_entropy"] is None
    assert (results["data"]["train"], results["data"]["test"]) == (1438, 359)
    fields = set(TrainConfig.__dataclass_fields__) - {"methods", "seeds", *AXES}
    assert set(results["task"]) == fields | {"threads"}
    assert results["environment"] == environment(torch.device("cpu")) | {
        key: results["environment"][key] for key in ("date", "commit", "threads")
    }
    methods = ["dense", "static", "set", "rigl"]
    asked = [(r["method"], r["seed"]) for r in results["runs"]]
    assert asked == [(method, seed) for seed in (0, 1) for method in methods]
    for result in results["runs"]:
        assert result["state"] == "done"
        assert [point["step"] for point in result["curve"]] == [14, 28]
        assert result["weight_steps"] == 28
        assert len(result["updates"]) == (0 if result["method"] in ("dense", "static") else 5)
        assert result["held"]["weights"] > 0
        assert 0.1 < result["test"]["accuracy"] < 1
        assert result["validation"] is None
        assert len(result["layers"]) == (result["method"] != "dense")
        assert len(result["connections"]["end"]) == 64


def test_summary_follows_from_the_runs(results):
    dense, *_, rigl = report.rows(results)
    mine = [r for r in results["runs"] if r["method"] == "rigl"]
    a, b = (100 * r["test"]["accuracy"] for r in mine)
    assert rigl.test == pytest.approx((a + b) / 2, rel=1e-12)
    assert rigl.spread == pytest.approx(abs(a - b) / 2**0.5, rel=1e-9)
    # by hand: 205 of 64 x 32 weights, 28 weight steps of 100 images and 5 update batches
    f_s, f_d = 2 * (205 + 320), 2 * (64 * 32 + 320)
    training = 100 * (28 * 3 * f_s + 5 * (2 * f_s + f_d))
    assert [r["flops"]["training"] for r in mine] == [training] * 2
    assert [r["curve"][-1]["training_flops"] for r in mine] == [training] * 2
    assert rigl.training_ratio == training / (100 * 28 * 3 * f_d)
    assert rigl.inference_ratio == f_s / f_d
    assert dense.step_ratio == 1


def test_picture_is_a_picture(compared):
    pixels = imread(compared[0] / "p.png")
    height, width = pixels.shape[:2]
    assert width > height > 400
    colours = {tuple(colour) for colour in pixels.reshape(-1, pixels.shape[2])[::97].tolist()}
    assert len(colours) > 30


@pytest.mark.parametrize("block", [1, (4, 3)])
def test_connections_are_sums_of_the_mask(block):
    digits = data.load_digits()
    config = TrainConfig(hidden=(30,), epochs=1, update_freq=5, block=block)
    result = run(config, digits, "rigl", 0)
    mask = build(config, digits, "rigl", 0)[0].mask()
    assert torch.equal(result.connections.start, mask.sum(0))
    assert not torch.equal(result.connections.end, result.connections.start)
    if block == 1:  # a block of a ragged column may hold less
        assert result.connections.end.sum() == result.layers[0].nnz
    start, end = connections.mean_connections([result, result], (8, 8))
    assert start.shape == end.shape == (8, 8)
    assert torch.equal(start.flatten(), mask.sum(0).double())


@pytest.mark.parametrize("method", ["dense", "static", "set", "rigl"])
def test_same_seed_same_result_and_no_global_state(method):
    digits = data.load_digits()
    config = TrainConfig(hidden=(30,), epochs=1, update_freq=5)
    before = torch.random.get_rng_state()
    one = run(config, digits, method, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    two = run(config, digits, method, 1)
    assert (one.accuracy, one.losses) == (two.accuracy, two.losses)
    assert torch.equal(one.connections.end, two.connections.end)
    assert run(config, digits, method, 2).losses != one.losses


def test_sparse_methods_start_from_the_same_network():
    config, digits = TrainConfig(), data.load_digits()
    static, rigl, dense = (build(config, digits, m, 0) for m in ("static", "rigl", "dense"))
    for (name, a), b in zip(static.state_dict().items(), rigl.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(static.output.weight, dense.output.weight)


BAD_CONFIG = {
    # what is wrong: (fields, error, what the message says)
    "data": ({"data": "cifar"}, ConfigError, ["`data`", "digits", "'cifar'"]),
    "validation": ({"validation": 1.0}, ConfigError, ["`validation`", "[0, 1)", "1.0"]),
    "multiplier": ({"multiplier": 0.0}, ConfigError, ["`multiplier`", "positive", "0.0"]),
    "gain": ({"gain": -1.0}, ConfigError, ["`gain`", "positive", "-1.0"]),
    "impl": ({"impl": "cuda"}, ConfigError, ["`impl`", "masked", "'cuda'"]),
    "distribution": ({"distribution": "x"}, ConfigError, ["`distribution`", "erk", "'x'"]),
    "optimizer": ({"optimizer": "adam"}, ConfigError, ["`optimizer`", "adamw", "'adam'"]),
    "sparsity-1": ({"sparsity": 1.0}, ConfigError, ["`sparsity`", "[0, 1)", "1.0"]),
    "sparsity-low": ({"sparsity": -0.1}, ConfigError, ["`sparsity`", "[0, 1)", "-0.1"]),
    "sparsity-nan": ({"sparsity": float("nan")}, ConfigError, ["`sparsity`", "nan"]),
    "block-0": ({"block": 0}, ConfigError, ["`block`", "at least 1", "0"]),
    "hidden-none": ({"hidden": ()}, ConfigError, ["`hidden`", "at least one"]),
    "hidden-0": ({"hidden": (3, 0)}, ConfigError, ["`hidden`", "at least 1", "0"]),
    "epochs-type": ({"epochs": 1.5}, DtypeError, ["`epochs`", "int", "1.5"]),
    "seeds-0": ({"seeds": 0}, ConfigError, ["`seeds`", "at least 1", "0"]),
    "lr-0": ({"lr": 0.0}, ConfigError, ["`lr`", "positive", "0"]),
    "lr-nan": ({"lr": float("nan")}, ConfigError, ["`lr`", "nan"]),
    "momentum-1": ({"momentum": 1.0}, ConfigError, ["`momentum`", "[0, 1)", "1.0"]),
    "weight-decay": ({"weight_decay": -1e-4}, ConfigError, ["`weight_decay`", "-0.0001"]),
    "update-freq": ({"update_freq": 0}, ConfigError, ["`update_freq`", "at least 1", "0"]),
    "drop-fraction": ({"drop_fraction": 1.5}, ConfigError, ["`drop_fraction`", "(0, 1]", "1.5"]),
    "device": ({"device": "gpu"}, DeviceError, ["`device`", "'gpu'"]),
    "device-index": ({"device": "cuda:99"}, DeviceError, ["`device`", "'cuda:99'"]),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config(case):
    fields, error, fragments = BAD_CONFIG[case]
    with pytest.raises(error) as caught:
        TrainConfig(**fields)
    for fragment in fragments:
        assert fragment in str(caught.value)


BAD_RUN = {
    "method": ({}, "snap", ConfigError, ["`method`", "rigl", "'snap'", "did you mean 'snip'"]),
    "no-module": ({}, "no.such:Thing", ConfigError, ["`method`", "no.such:Thing", "No module"]),
    "no-method": ({}, "math:pi", ConfigError, ["`method`", "subclass of sparsekern.Method"]),
    "block": ({"block": 4}, "snip", ConfigError, ["single weights", "`block`", "4"]),
    "synflow": ({"block": 4}, "synflow", ConfigError, ["single weights", "`block`", "4"]),
    "held-out": ({"validation": 1e-4}, "dense", ConfigError, ["`validation`", "of 1438 are 0"]),
    "no-batch": ({"validation": 0.99}, "dense", ConfigError, ["`batch_size`", "14", "100"]),
    "batch": ({"batch_size": 5000}, "dense", ConfigError, ["`batch_size`", "1438", "5000"]),
    "sparsity": ({"sparsity": 0.0}, "rigl", ConfigError, ["`sparsity`", "0.0"]),
    "loss": ({"lr": 1e30, "hidden": (8,)}, "dense", TrainingLoopError, ["finite", "'dense'"]),
    "gradient": ({"lr": 1e30, "hidden": (8,)}, "rigl", TrainingLoopError, ["finite", "'rigl'"]),
}


@pytest.mark.parametrize("case", BAD_RUN)
def test_bad_run(case):
    fields, method, error, fragments = BAD_RUN[case]
    with pytest.raises(error) as caught:
        run(TrainConfig(**fields), data.load_digits(), method, 0)
    for fragment in fragments:
        assert fragment in str(caught.value)


BAD_LINES = {
    "sparsity": (["--sparsity", "1.5"], ["`sparsity`", "[0, 1)", "1.5"]),
    "data-dir": (["--data", "fashion-mnist", "--data-dir", "/no/such"], ["folder", "/no/such"]),
    "no-data-dir": (["--data", "fashion-mnist"], ["data directory"]),
    "threads": (["--threads", "0"], ["`threads`", "0"]),
    "json": (["--json", "/no/such/r.json"], ["`json`", "/no/such/r.json"]),
    "picture": (["--picture", "/no/such/p.png"], ["`picture`", "/no/such/p.png"]),
    "batch": (["--batch-size", "5000"], ["`batch_size`", "5000"]),
    "device": (["--device", "tpu"], ["`device`", "tpu"]),
    "method": (["--method", "rigel"], ["`method`", "'rigel'", "did you mean 'rigl'?"]),
    "second-sparsity": (["--sparsity", "0.9", "1"], ["`sparsity`", "[0, 1)", "1.0"]),
    "several-lr": (["--lr", "0.1", "0.2", "--validation", "0"], ["`lr`", "validation"]),
    "resume": (["--resume"], ["`resume`", "`json`"]),
    "block": (["--block", "300"], ["hidden1: a block of (300, 300) is larger", "hidden2"]),
    "jobs": (["--jobs", "0"], ["`jobs`", "0"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_one_line(case, capsys):
    extra, fragments = BAD_LINES[case]
    assert main(["train", *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsekern: error: ")
    assert err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err


TYPOS = {
    "data": (["--data", "emnist"], ["--data", "'emnist'", "fashion-mnist"]),
    "impl": (["--impl", "cublas"], ["--impl", "'cublas'", "triton"]),
    "block": (["--block", "16*16"], ["--block", "16x32", "'16*16'"]),
    "hidden": (["--hidden", "a"], ["--hidden", "300,100", "'a'"]),
    "seeds": (["--seeds", "two"], ["--seeds", "'two'"]),
    "option": (["--epochz", "3"], ["sparsekern train: error", "did you mean --epochs?"]),
}


@pytest.mark.parametrize("case", TYPOS)
def test_typo_names_the_choices(case, capsys):
    extra, fragments = TYPOS[case]
    with pytest.raises(SystemExit) as caught:
        main(["train", *extra])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_missing_extra_is_named(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*TINY, "--picture", str(tmp_path / "p.png")]) == 2
    assert 'pip install "sparsekern[cpu,demo]"' in capsys.readouterr().err


def test_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnavailableError, match="matplotlib"):
        style.check_available()


def test_a_log_gets_a_line_per_run(capsys):
    line = [*TINY[:-1], "--method", "static", "--seeds", "1", "--block", "4x8", "--impl", "dense"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert [text.split(":")[0] for text in err.splitlines()] == [
        "[1/2] dense, seed 0",
        "[2/2] static 0.9, b4x8, seed 0",
    ]
    assert all(re.search(r"in \d+\.\d s; \d+ s so far", text) for text in err.splitlines())
    assert "about" in err.splitlines()[0]
    assert "block 4x8), impl dense" in out
    assert "±" not in out  # one seed has no spread


def test_presets_and_errors():
    assert set(PRESETS) == set(data.DATASETS)
    assert all(name == config.data for name, config in PRESETS.items())
    assert issubclass(DeviceError, SparseKernError)
