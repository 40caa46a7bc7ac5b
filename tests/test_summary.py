"""`summary`: what each layer became, why it is dense, and how sparse the whole model is."""

import copy
import json
import logging
import pickle

import pytest
import torch
from test_swap import Everything, TinyLM, mlp
from torch import nn

import sparsekern as sk


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 8, 8))
        self.gate = nn.Linear(8, 4)


class Own(nn.Linear):
    pass


def reasons(model):
    return sk.summary(model).dense


def test_counts_are_those_of_the_whole_model():
    model = sk.sparsify_(mlp(), 0.9, distribution="uniform")
    made = sk.summary(model)
    every = 784 * 300 + 300 * 100 + 100 * 10
    biases = 300 + 100 + 10
    assert made.weights == every + biases
    assert made.active == sum(p.numel() for p in model.parameters())
    assert made.sparsity == 1 - made.active / made.weights
    assert made.asked == 0.9
    assert [row.name for row in made.rows] == ["0", "2", "4"]
    assert [row.shape for row in made.rows] == [(300, 784), (100, 300), (10, 100)]
    assert all(row.asked == 0.9 and row.block == (1, 1) and not row.why for row in made.rows)
    assert all(row.sparsity == model.get_submodule(row.name).sparsity for row in made.rows)


def test_every_family_is_listed_and_padding_is_not_counted():
    model = sk.sparsify_(Everything(), 0.5, distribution="er", block=4)
    made = sk.summary(model)
    dense = sum(p.numel() for p in Everything().parameters())
    assert made.weights == dense
    nnz = {name: layer.nnz for name, layer in sk.sparse_layers(model).items()}
    assert {r.name: r.active for r in made.rows if r.block} == nnz
    assert reasons(model)["depthwise"] == "it is a depthwise convolution"
    assert reasons(model)["up"] == "it is a transposed convolution"
    assert "larger than its" in reasons(model)["stem"]


def test_why_each_layer_is_dense():
    model = nn.Sequential(TinyLM(), Experts(), Own(8, 8), nn.Linear(8, 8))
    sk.sparsify_(model, 0.5, distribution="uniform", exclude=("3",))
    found = reasons(model)
    assert found["0.embed"] == "it shares a parameter with another module"
    assert found["0.lm_head"] == "it is the output head of a language model"
    assert not any("attention" in name for name in found)
    assert "3 dimensions, as experts have" in found["1.up"]
    assert found["2"] == "Own is a subclass of nn.Linear"
    assert found["3"] == "`exclude` names it"
    low = sk.sparsify_(mlp(), 0.1)
    assert "its share of the sparsity is 0, and dense is faster" in reasons(low).values()
    plain = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    assert reasons(plain) == {
        "0": "it is an embedding",
        "1": "`sparsify_` has not been called for it",
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_something_else_makes():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.weight_norm(nn.Linear(4, 4)),
    )
    assert all("something else makes its weight" in why for why in reasons(model).values())
    assert sk.summary(nn.Sequential(nn.LazyLinear(4))).weights == 0


def test_what_was_asked_survives_copies_pickles_and_parts():
    model = sk.sparsify_(mlp(), 0.9, exclude=("4",), distribution={"2": 0.5})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sk.summary(twin) == sk.summary(model)
    assert sk.summary(model).asked is None
    outer = nn.Sequential(model, nn.Linear(4, 4))
    asked = {row.name: row.asked for row in sk.summary(outer).rows}
    assert asked == {"0.0": 0.9, "0.2": 0.5, "0.4": 0.0, "1": None}
    sk.sparsify_(model, 0.95, distribution={"2": 0.75}, exclude=("0", "4"), init="keep")
    asked = {row.name: row.asked for row in sk.summary(model).rows}
    assert asked == {"0": 0.9, "2": 0.75, "4": 0.0}
    assert all(row.asked is None for row in sk.summary(sk.densify_(model)).rows)


def test_as_text_and_as_dict():
    model = nn.Sequential()
    model.add_module("a_rather_long_name_of_a_module_that_must_be_cut", Everything())
    model.add_module("big", nn.Linear(1024, 1024))
    made = sk.summary(sk.sparsify_(model, 0.9, block=(16, 32)))
    text = str(made)
    assert max(map(len, text.splitlines())) <= 80
    assert "whole model" in text
    assert "dense, it is a depthwise convolution:" in text
    loaded = json.loads(json.dumps(made.to_dict()))
    assert loaded["sparsity"] == made.sparsity
    assert len(loaded["rows"]) == len(made.rows)
    assert loaded["rows"][0]["name"] == made.rows[0].name


def test_it_is_logged_and_half_of_what_was_asked_is_warned_of(caplog):
    with caplog.at_level(logging.INFO, "sparsekern"):
        sk.sparsify_(mlp(), 0.9)
    assert "whole model" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64))
    with caplog.at_level(logging.WARNING, "sparsekern"):
        sk.sparsify_(model, 0.9)
    assert "less than half of the 90.0 % that were asked for" in caplog.text


def test_a_layer_that_its_block_does_not_fit_shows_the_share_it_was_to_have():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    sk.sparsify_(model, 0.5, block=16, distribution="uniform")
    rows = {row.name: row for row in sk.summary(model).rows}
    assert rows["1"].block is None
    assert rows["1"].asked == 0.5
    assert rows["1"].sparsity == 0.0
    assert "larger than" in rows["1"].why
