"""Options that name a model and its example inputs, as the commands that look at both take them."""

import argparse
import sys

import pytest
import torch
from torch import nn

from sparsekern.cli import options as example_options
from sparsekern.errors import ConfigError

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 4))

def both():
    return nn.Linear(8, 4), {"input": torch.ones(3, 8)}

def nested():
    return nn.Identity(), (torch.ones(2), [torch.ones(1), 5])

def tokens():
    return nn.Embedding(10, 4)

def words():
    return "no model"

def fails():
    raise RuntimeError("out of luck")
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Parse the options and make the model and its inputs."""
    (tmp_path / "example_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "example_nets", raising=False)
    parser = argparse.ArgumentParser()
    example_options.add_options(parser)

    def make(name, *options):
        spec = f"example_nets:{name}"
        return example_options.model_and_examples(parser.parse_args([spec, *options]))

    return make


def test_a_function_that_makes_a_module_and_shapes(made):
    model, (x,) = made("net", "--input", "5x8")
    assert isinstance(model[0], nn.Linear)
    assert x.shape == (5, 8)
    assert x.dtype is torch.float32
    again, (same,) = made("net", "--input", "5x8")
    assert torch.equal(x, same)
    assert torch.equal(model[0].weight, again[0].weight)
    _, (other,) = made("net", "--input", "5x8", "--seed", "1")
    assert not torch.equal(x, other)


def test_a_function_that_brings_its_inputs(made):
    model, examples = made("both")
    assert model(**examples).shape == (3, 4)
    _, examples = made("both", "--input", "2x8")
    assert [x.shape for x in examples] == [(2, 8)]


def test_tokens(made):
    model, (tokens,) = made("tokens", "--input", "3x6", "--vocab", "10")
    assert tokens.dtype is torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < 10
    assert model(tokens).shape == (3, 6, 4)
    _, (tokens,) = made("tokens", "--input", "3", "--vocab", "10", "--input-dtype", "int32")
    assert tokens.dtype is torch.int32


def test_shapes_alone(made):
    model, (x,) = made("net", "--input", "100000x100000x8", "--meta")
    assert x.is_meta
    assert model[0].weight.is_meta
    assert model(x).shape == (100_000, 100_000, 4)
    _, (first, (second, number)) = made("nested", "--meta")
    assert first.is_meta
    assert second.is_meta
    assert number == 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("net",), r"brings no example inputs: give --input"),
        (("words", "--input", "2"), r"must return an nn.Module, or one and its .*; got str"),
        (("fails", "--input", "2"), r"failed: RuntimeError: out of luck"),
        (("missing", "--input", "2"), r"expected example_nets:missing to import"),
        (("net", "--input", "2", "--threads", "0"), r"`threads` must lie in .1, 1024.; got 0"),
        (
            ("net", "--input", "2", "--threads", "9" * 11),
            r"`threads` must lie in .*; got 99999999999",
        ),
        (("net", "--input", "2", "--seed", "9" * 23), r"`seed` must lie in .*; got 9{23}"),
        (("net", "--input", "2", "--vocab", "0"), r"`vocab` must lie in .1, \d+.; got 0"),
        (("net", "--input", "x".join(["99999"] * 4)), r"`input` 99999x99999x99999x99999 must fit"),
        (("net", "--input", "x".join(["99999"] * 4), "--meta"), r"`input` 99999x.* must fit"),
        (("net", "--input", "9" * 30), r"`input` 9{30} must fit"),
        (("net", "--input", "2", "--input-dtype", "int64"), r"got int64 and vocab None"),
        (("net", "--input", "2", "--input-dtype", "float16", "--vocab", "3"), r"float16 and vocab"),
        (("both", "--vocab", "3"), r"describe `input`; got no `input`"),
        (
            ("net", "--input", "2", "--device", "nowhere"),
            r"`device` must be one of .* got 'nowhere'",
        ),
        (("net", "--input", "2", "--device", "cuda:99"), r"`device` 'cuda:99' can't be used here"),
        (("net", "--input", "2", "--meta", "--device", "odd"), r"`device` must be one of"),
    ],
)
def test_bad_options(made, arguments, text):
    with pytest.raises(ConfigError, match=text):
        made(*arguments)


@pytest.mark.parametrize("text", ["", "3x", "axb", "0x3", "-1"])
def test_bad_shapes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a shape like 64x3x32x32"):
        example_options.shape(text)
