"""How many connections each layer grows: the worked vector, the authors' loop, and bad answers."""

import copy

import numpy as np
import pytest
from test_every_method import backward, batch, net, sgd, sizes

import sparsekern as sk
from sparsekern.errors import ConfigError
from sparsekern.methods.budget import FULL, proportional, shared_out


class Told:
    def __init__(self, statistics):
        self.statistic = statistics.__getitem__


class Sized:
    """A layer of which only sizes are asked."""

    def __init__(self, nnzb, total):
        self.topology = self
        self.grid = self
        self.nnzb, self.total = nnzb, total


def test_the_worked_redistribution():
    layers = dict(zip("abc", map(Sized, (50, 30, 20), (100, 200, 25)), strict=True))
    dropped = {"a": 25, "b": 15, "c": 10}
    source = Told({"a": 0.1, "b": 0.2, "c": 0.7})
    assert proportional(dropped, layers, source) == {"a": 15, "b": 21, "c": 14}
    assert proportional(dropped, layers, Told(dict.fromkeys("abc", 0.0))) == dropped


def reference_redistribution(shares, rooms, total):
    """The loop of the SNFS authors: what is above a cap is spread over all layers, many times."""
    given = np.array(shares, dtype=np.float64) / sum(shares) * total
    caps = 0.99 * np.array(rooms, dtype=np.float64)
    for _ in range(1000):
        excess = np.maximum(given - caps, 0).sum()
        given = np.minimum(given, caps) + excess / len(given)
    return np.minimum(given, caps)


@pytest.mark.parametrize("seed", range(30))
def test_redistribution_is_the_authors_in_whole_numbers(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    rooms = rng.integers(30, 400, n)
    total = int(rng.integers(0, int(0.9 * np.floor(0.99 * rooms).sum())))
    shares = rng.random(n) ** 3 + 1e-6
    names = [str(i) for i in range(n)]
    counts = shared_out(
        dict(zip(names, shares, strict=True)),
        dict(zip(names, map(int, rooms), strict=True)),
        dict.fromkeys(names, 0),
        total,
        FULL,
    )
    assert sum(counts.values()) == total
    expected = reference_redistribution(shares, rooms, total)
    # what whole caps leave over, less than one a layer, goes to the others
    off = [counts[k] - e for k, e in zip(names, expected, strict=True)]
    assert all(-1 < one < n for one in off)
    assert all(counts[k] <= 0.99 * room for k, room in zip(names, rooms, strict=True))


def test_what_does_not_fit_under_the_caps_fills_the_layers():
    room = {"a": 10, "b": 10}
    assert shared_out({"a": 1.0, "b": 9.0}, room, dict.fromkeys(room, 0), 20, FULL) == room
    assert shared_out({"a": 0.0, "b": 1.0}, room, {"a": 1, "b": 1}, 5) == {"a": 1, "b": 4}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda d: d | {"0": d["0"] + 1}, "must let 153 blocks grow in all.*; got 154"),
        (lambda d: d | {"0": d["0"] - 500, "2": d["2"] + 500}, r"layer '0' grow an int in \[0, "),
        (lambda d: {"0": d["0"]}, r"what grows in each of \['0', '2', '4'\]; got {'0': "),
        (lambda d: d | {"0": float(d["0"])}, "layer '0' grow an int in"),
    ],
)
def test_a_budget_is_held_to_its_word(answer, text):
    bad = type("Bad", (sk.SET,), {"budget": lambda d, _l, _s: answer(d), "resizes": True})
    model = net("set")
    optimizer = sgd(model)
    bad(model, optimizer, t_end=5, drop_fraction=0.5)
    before = copy.deepcopy(model.state_dict())
    backward(model, batch(0))
    with pytest.raises(ConfigError, match=text):
        optimizer.step()
    assert sizes(model) == {k: before[f"{k}.values"].shape[0] for k in sizes(model)}
