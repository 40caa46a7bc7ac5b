"""`sparsekern train --model`: which function a name leads to, conv nets and text, FLOPs by hand."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nets import conv
from torch import nn

from sparsekern.cli.main import main
from sparsekern.cost.run_flops import forward_flops
from sparsekern.errors import ConfigError
from sparsekern.training import data, report, zoo
from sparsekern.training.config import PRESETS, TrainConfig
from sparsekern.training.network import build, first_layer_connections, shaped
from sparsekern.training.trainer import Trainer, run

ROOT = Path(__file__).resolve().parent.parent
STEPS = 14


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"the cat sat on the mat; " * 120)
    return path


@pytest.fixture(scope="module")
def text(text_file):
    return data.load("text", text_file, 10)


def config(**changes):
    given = {"model": "nets:conv", "epochs": 1, "update_freq": 5, "sparsity": 0.8}
    return TrainConfig(**(given | changes))


def text_config(**changes):
    given = {"data": "text", "model": "nets:gru", "seq_len": 10, "epochs": 1, "sparsity": 0.5}
    given |= {"update_freq": 3, "optimizer": "adamw", "lr": 0.01, "batch_size": 16}
    return TrainConfig(**(given | changes))


# ---- convolutions

PIXELS = {"0": 64, "3": 16, "5": 16, "9": 1, "11": 1}
WEIGHTS = {"0": 8 * 9, "3": 16 * 36, "5": 16 * 9, "9": 64 * 32, "11": 320}
CONV_F = 2 * sum(PIXELS[n] * WEIGHTS[n] for n in PIXELS)


def test_dense_conv_net_by_hand(digits):
    result = run(config(), digits, "dense", 0)
    assert result.weight_steps == STEPS
    assert result.flops.inference == result.flops.dense_equivalent == CONV_F
    assert result.flops.training == 3 * CONV_F * 100 * STEPS
    assert result.connections is None
    assert result.held.index == 0
    trained = sum(p.numel() for p in conv(10, 1).parameters())
    assert result.held.gradients == 4 * trained
    # two running statistics of 8 channels, and a count in int64
    assert result.held.weights == 4 * (trained + 16) + 8


@pytest.mark.parametrize("impl", [None, "masked", "dense"])
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_sparse_conv_net_by_hand(digits, method, impl):
    result = run(config(impl=impl), digits, method, 0)
    nnz = {layer.name: layer.nnz for layer in result.layers}
    assert set(nnz) <= {"0", "3", "9"}  # neither depthwise nor output
    held = WEIGHTS | nnz
    sparse_f = 2 * sum(PIXELS[n] * held[n] for n in PIXELS)
    assert sum(nnz.values()) < sum(WEIGHTS[n] for n in nnz)
    assert result.flops.inference == (sparse_f if impl is None else CONV_F)
    assert result.flops.dense_equivalent == CONV_F
    assert result.updates == {"static": 0, "set": 2, "rigl": 2}[method]  # at weight steps 0 and 5
    assert result.update_batches == (2 if method == "rigl" else 0)


def test_first_convolution_stays_dense_under_uniform(digits):
    names = [layer.name for layer in run(config(distribution="uniform"), digits, "set", 0).layers]
    assert names == ["3", "9"]


def test_conv_training_repeats(digits):
    one, two = (run(config(), digits, "rigl", 1) for _ in range(2))
    assert (one.losses, one.accuracy) == (two.losses, two.accuracy)


def test_testing_and_counting_change_nothing(digits):
    trainer = Trainer(config(), digits, "rigl", 0)
    trainer.step()
    trainer.model[1].eval()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    modes = [m.training for m in trainer.model.modules()]
    trainer.score()
    forward_flops(trainer.model, trainer.data.test_x[:1])
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert [m.training for m in trainer.model.modules()] == modes
    assert not trainer.model[1].training


def test_images_go_in_as_the_function_asks(digits):
    assert shaped(config(), digits).train_x.shape[1:] == (1, 8, 8)
    assert shaped(config(model="nets:flat"), digits).train_x.shape[1:] == (64,)
    assert shaped(config(model=None), digits) is digits
    assert shaped(config(model=None, augment=True), digits).augmented


# ---- text


@pytest.mark.parametrize(("model", "gates"), [("nets:gru", 3), ("nets:lstm", 4)])
def test_dense_recurrent_net_by_hand(text, model, gates):
    result = run(text_config(model=model), text, "dense", 0)
    per_character = gates * 20 * (12 + 20) + 20 * 256
    assert result.flops.inference == result.flops.dense_equivalent == 2 * 10 * per_character


@pytest.mark.parametrize("model", ["nets:gru", "nets:lstm"])
@pytest.mark.parametrize("method", ["static", "rigl"])
def test_sparse_recurrent_net_by_hand(text, model, method):
    result = run(text_config(model=model), text, method, 0)
    dense = run(text_config(model=model), text, "dense", 0)
    nnz = {layer.name: layer.nnz for layer in result.layers}
    assert set(nnz) == {"recurrent.ih_l0", "recurrent.hh_l0"}
    assert result.flops.inference == 2 * 10 * (sum(nnz.values()) + 20 * 256)
    assert result.flops.dense_equivalent == dense.flops.inference
    assert result.updates == (0 if method == "static" else result.update_batches)


def test_bits_per_character(text):
    trainer = Trainer(text_config(), text, "dense", 0)
    for parameter in trainer.model.parameters():
        nn.init.zeros_(parameter)
    # equal scores: 8 bits, and the first class, which the text does not hold, is guessed
    rounding = 2.0**-23 * text.test_y.numel()
    assert trainer.score().bits == pytest.approx(8, rel=rounding)
    assert trainer.score().accuracy == 0
    learned = run(text_config(epochs=8), text, "dense", 0)
    assert learned.bits_per_character < text.unigram_entropy < 8
    assert learned.accuracy > 0.5


def test_text_on_the_command_line(text_file, tmp_path, capsys):
    out = tmp_path / "r.json"
    line = ["train", "--data", "text", "--data-dir", str(text_file), "--model", "nets:gru"]
    line += ["--seq-len", "10", "--method", "static", "--seeds", "2", "--json", str(out)]
    assert main([*line, "--batch-size", "16", "--epochs", "1"]) == 0
    printed, log = capsys.readouterr()
    results = json.loads(out.read_text())
    static = report.rows(results)[1]
    shown = f"{static.validation:.3f}  {static.test:.3f} ± {static.spread:.3f}"
    assert re.search(rf"(?m)^static  +{shown}", printed)
    lines = printed.split("\n\n", 1)[1]
    assert max(map(len, lines.splitlines()[:-1])) <= 80
    text = " ".join(lines.split())
    assert "FLOPs per sequence of 10 bytes" in text
    entropy = results["data"]["unigram_entropy"]
    assert f"Unigram entropy of the test text: {entropy:.3f}" in text
    assert "bits per character in" in log


# ---- the networks of the papers


@pytest.fixture
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_at_the_root")
@pytest.mark.parametrize("name", ["small_gpt", "char_gru", "wide_resnet_22_2"])
def test_papers_networks_count_as_without_sparsekern(digits, text, name):
    wanted = config(model=name) if name == "wide_resnet_22_2" else text_config(model=name)
    source = digits if name == "wide_resnet_22_2" else text
    shown = shaped(wanted, source)
    sample = data.for_model(shown.test_x[:1])
    dense = forward_flops(build(wanted, shown, "dense", 0), sample)
    sparse = forward_flops(build(wanted, shown, "static", 0), sample)
    from sparsekern.models.flops import forward_flops as counted

    made = zoo.make(name, shown)
    expected = counted(lambda: made.to("meta"), *sample.shape, dtype=sample.dtype)
    assert dense.executed == dense.dense_equivalent == sparse.dense_equivalent == expected
    assert sparse.executed < dense.executed


@pytest.mark.usefixtures("_at_the_root")
def test_picture_of_a_named_fully_connected_model(digits, tmp_path, capsys):
    line = ["train", "--model", "lenet_300_100", "--epochs", "1", "--seeds", "1", "--quiet"]
    line += ["--method", "rigl", "--picture", str(tmp_path / "p.png")]
    assert main(line) == 0
    assert "lenet_300_100 (1x8x8 to 10)" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10_000
    wanted = config(model="lenet_300_100")
    shown = shaped(wanted, digits)
    model = build(wanted, shown, "static", 0)
    counted = first_layer_connections(model, shown)
    assert torch.equal(counted, model.classifier.fc1.mask().sum(0))


def test_a_named_module_is_found_in_the_current_directory(tmp_path, monkeypatch, digits):
    source = "from torch import nn\ndef net(classes, **rest):\n    return nn.Linear(64, classes)\n"
    (tmp_path / "a_module_of_mine.py").write_text(source)
    with pytest.raises(ConfigError, match="a_module_of_mine"):
        zoo.find("a_module_of_mine:net")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(zoo.make("a_module_of_mine:net", digits), nn.Linear)
    assert sys.path == before


BAD = {
    # model: (data, what the message says)
    "nope": ("digits", ["sparsekern.models:nope", "to import", "lenet_5"]),
    "no.such:net": ("digits", ["no.such:net", "No module named", "current directory"]),
    "nets:nope": ("digits", ["nets:nope", "AttributeError"]),
    "nets:number": ("digits", ["function that makes an nn.Module", "nets:number is float"]),
    "nets:no_module": ("digits", ["nets:no_module(classes=10)", "must return", "int"]),
    "nets:fails": ("digits", ["nets:fails() failed", "RuntimeError: out of memory"]),
    "nets:flat_features": ("digits", ["(1, 64) to (1, 10)", "got (1, 7)"]),
    "nets:no_tensor": ("digits", ["(1, 64) to (1, 10)", "got tuple"]),
    "nets:gru": ("digits", ["must take torch.float32", "(1, 64)", "image of digits"]),
    "nets:everything_dense": ("digits", ["no", "left to make sparse"]),
    "lenet_5": ("digits", ["image_size=8", "at least 12"]),
    "vgg_16": ("digits", ["image_size=8", "at least 32"]),
    "char_gru": ("digits", ["must take", "tokens must be integers"]),
    "nets:conv": ("text", ["conv", "missing 2 required", "failed"]),
    "wide_resnet_22_2": ("text", ["must take torch.int64", "(1, 10)", "sequence of 10 bytes"]),
}


@pytest.mark.usefixtures("_at_the_root")
@pytest.mark.parametrize("model", BAD)
def test_bad_model_is_named_in_one_line(model, text_file, capsys):
    name, fragments = BAD[model]
    line = ["train", "--data", name, "--model", model]
    if name == "text":
        line += ["--data-dir", str(text_file), "--seq-len", "10", "--batch-size", "4"]
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err


def test_options_that_do_not_go_together(capsys, tmp_path):
    assert main(["train", "--model", "nets:conv", "--hidden", "3"]) == 2
    assert "`hidden` or `model`" in capsys.readouterr().err
    assert main(["train", "--model", "nets:conv", "--picture", str(tmp_path / "p.png")]) == 2
    assert "fully connected first layer; got model 'nets:conv'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="data 'text' needs a `model`"):
        replace(PRESETS["text"], model=None)
