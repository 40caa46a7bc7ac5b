"""The pure parts of a topology update: schedule, selection, drop, grow, source map."""

import math

import pytest
import torch

from sparsekern.errors import ConfigError, DtypeError, SparseKernError
from sparsekern.methods import UpdateSchedule
from sparsekern.methods.update import (
    drop_count,
    drop_smallest,
    grow_largest,
    grow_random,
    rewire,
)
from sparsekern.ops import GrowScores, block_norm
from sparsekern.topology import Topology
from sparsekern.topology.select import StreamedTopK, top_k_mask

# algorithms: the worked update, drop fraction 1/2
W = torch.tensor([[0.5, 0, -0.02, 0], [0, 0.3, 0, -0.9], [0.04, 0, 0, 0.7]])
G = torch.tensor([[0.1, -0.2, 0.9, 0.05], [-0.8, 0, 0.3, 0.1], [-0.01, 0.6, -0.7, 0.2]])
NEW_MASK = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]])


def scores_of(topology, gradient, norm="l1"):
    full = Topology.random(topology.shape, topology.block, sparsity=0.0)
    scores = block_norm(full.pack(gradient), norm)
    active = topology.positions()
    inactive = torch.ones(len(scores), dtype=torch.bool)
    inactive[active] = False
    positions = inactive.nonzero()[:, 0]
    return GrowScores(scores[active], positions, scores[positions])


def test_the_worked_update():
    topology = Topology.from_mask(W)
    values = topology.pack(W)
    k = drop_count(6, 0.5)
    assert k == 3
    keep = drop_smallest(block_norm(values, "l1"), k)
    assert topology.positions()[keep].tolist() == [0, 7, 11]
    grown = grow_largest(topology, keep, 3, scores_of(topology, G))
    assert grown.tolist() == [2, 4, 10]
    update = rewire(topology, keep, grown)
    assert torch.equal(update.topology.to_mask().int(), NEW_MASK.int())
    # (0, 2) was dropped and grown again: traced to its old slot, not counted as new
    assert update.source.tolist() == [0, 1, -1, 3, -1, 5]
    assert update.grown == 2


def test_ties_go_to_the_lowest_position():
    assert top_k_mask(torch.tensor([1.0, 2, 1, 1, 0]), 3).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert top_k_mask(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
    topology = Topology.from_mask(torch.ones(2, 3))
    keep = drop_smallest(torch.ones(6), 2)
    assert keep.tolist() == [True] * 4 + [False] * 2
    empty = Topology.from_mask(torch.tensor([[0, 0, 1], [0, 0, 1]]))
    keep = torch.tensor([True, False])
    assert grow_largest(empty, keep, 1, scores_of(empty, torch.zeros(2, 3))).tolist() == [0]
    assert topology.nnzb == 6


@pytest.mark.parametrize("k", [0, 1, 5, 40, 200, 300])
def test_streamed_top_k_equals_a_stable_sort(k):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randint(0, 12, (200,), generator=g).float()  # many ties
        best = StreamedTopK(k, scores)
        for first in range(0, 200, 17):
            best.push(scores[first : first + 17], first)
        positions, values = best.result()
        expected = torch.sort(scores, descending=True, stable=True).indices[:k].sort().values
        assert torch.equal(positions, expected)
        assert torch.equal(values, scores[expected])


def test_streamed_top_k_keeps_only_o_of_k():
    best = StreamedTopK(10, torch.empty(0))
    for first in range(0, 100_000, 100):
        best.push(torch.arange(first, first + 100).float(), first)  # each piece beats the last
        assert best.held < 20 + 100


@pytest.mark.parametrize("block", [1, (2, 3), 4])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_random_updates_keep_every_invariant(block, fraction):
    g = torch.Generator().manual_seed(1)
    topology = Topology.random((22, 31), block, sparsity=0.7, generator=g)
    values = topology.pack(torch.randn(22, 31, generator=g))
    for step in range(60):
        n = drop_count(topology.nnzb, fraction)
        keep = drop_smallest(block_norm(values, "l2"), n)
        if step % 2:
            grown = grow_random(topology, keep, n, g)
        else:
            gradient = torch.randn(22, 31, generator=g)
            grown = grow_largest(topology, keep, n, scores_of(topology, gradient, "l2"))
        assert len(grown) == n == int((~keep).sum()) == len(set(grown.tolist()))
        update = rewire(topology, keep, grown)
        new = update.topology.validate()
        assert new.nnzb == topology.nnzb
        diff = topology.diff(new)
        assert diff.added.numel() == update.grown == diff.removed.numel()
        survivors = update.source >= 0
        assert torch.equal(
            topology.positions()[update.source[survivors]], new.positions()[survivors]
        )
        assert torch.equal(new.positions()[~survivors], diff.added)
        kept = topology.positions()[keep]
        assert set(kept.tolist()) <= set(new.positions().tolist())
        values = torch.randn(new.values_shape, generator=g)
        topology = new


def test_random_growth_is_uniform_over_non_survivors():
    topology = Topology.from_mask(torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]))
    keep = torch.tensor([True, False, True, False])
    counts = torch.zeros(8)
    for seed in range(1200):
        grown = grow_random(topology, keep, 2, torch.Generator().manual_seed(seed))
        counts[grown] += 1
    assert counts[[0, 5]].tolist() == [0, 0]  # the survivors
    # each of 6 free positions: Binomial(1200, 1/3), mean 400, standard deviation 16.3
    assert (counts[[1, 2, 3, 4, 6, 7]] - 400).abs().max() < 5 * 16.3


def test_drop_count_truncates_in_float32():
    assert [drop_count(n, 0.3) for n in (0, 1, 3, 4, 10, 4704)] == [0, 0, 0, 1, 3, 1411]
    assert drop_count(100, 0.29) == 29  # 0.29 * 100 is 28.999... in float64


@pytest.mark.parametrize(
    ("step", "share"), [(0, 1.0), (250, 0.853553), (500, 0.5), (750, 0.146447), (1000, 0.0)]
)
def test_cosine_decay_anchors(step, share):
    schedule = UpdateSchedule(1000, drop_fraction=0.3)
    assert schedule.fraction(step) == pytest.approx(0.3 * share, abs=5e-7)


def test_other_decays():
    assert UpdateSchedule(100, drop_fraction=0.4, decay="linear").fraction(25) == pytest.approx(0.3)
    assert UpdateSchedule(100, drop_fraction=0.4, decay="constant").fraction(99) == 0.4


@pytest.mark.parametrize(("t_end", "updates"), [(25_000, 250), (75_000, 750)])
def test_number_of_updates_of_the_paper(t_end, updates):
    schedule, last, n = UpdateSchedule(t_end, 100), None, 0
    for step in range(t_end + 200):
        if schedule.is_due(step, last):
            last, n = step, n + 1
    assert n == updates


def test_first_update_and_distance():
    schedule = UpdateSchedule(1000, 100, first=30)
    assert [schedule.is_due(s, None) for s in (0, 29, 30)] == [False, False, True]
    assert [schedule.is_due(s, 30) for s in (30, 129, 130)] == [False, False, True]
    assert not schedule.is_due(1000, None)
    assert math.isclose(schedule.fraction(5000), 0.0, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"t_end": 0}, ConfigError, "`t_end` must be at least 1; got 0"),
        ({"t_end": 0.75}, DtypeError, "`t_end` must be an int, in weight steps; got 0.75"),
        ({"t_end": 10, "freq": 0}, ConfigError, "`update_freq` must be at least 1"),
        ({"t_end": 10, "first": -1}, ConfigError, "`first_update` must be at least 0; got -1"),
        ({"t_end": 10, "drop_fraction": 0}, ConfigError, r"\(0, 1\]; got 0"),
        ({"t_end": 10, "drop_fraction": 1.5}, ConfigError, r"\(0, 1\]; got 1.5"),
        ({"t_end": 10, "drop_fraction": None}, DtypeError, "must be a number; got None"),
        ({"t_end": 10, "decay": "cubic"}, ConfigError, "one of .*cosine.* got 'cubic'"),
    ],
)
def test_bad_schedules(kwargs, error, text):
    with pytest.raises(error, match=text) as info:
        UpdateSchedule(**kwargs)
    assert isinstance(info.value, SparseKernError)
