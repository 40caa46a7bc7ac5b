"""Displacements and receptive fields of masks over images: hand-made ones, and chance."""

import itertools
import math

import pytest
import torch

from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.study import (
    composed,
    displacements,
    expected_locality,
    receptive_fields,
)


def one_neuron(image, pixels):
    mask = torch.zeros(image, dtype=torch.bool)
    for channel, x, y in pixels:
        mask[channel, y, x] = True
    return mask.view(1, -1)


def test_the_worked_example():
    # pixels (0, 0), (1, 0), (0, 2): six entries of 1 at +-(1, 0), +-(0, 2), +-(1, -2)
    mask = one_neuron((1, 4, 5), [(0, 0, 0), (0, 1, 0), (0, 0, 2)])
    found = displacements(mask, (1, 4, 5))
    at = {(int(x) - 4, int(y) - 3): int(found.same[y, x]) for y, x in found.same.nonzero()}
    assert at == dict.fromkeys([(1, 0), (-1, 0), (0, 2), (0, -2), (1, -2), (-1, 2)], 1)
    assert not found.different.any()
    assert found.pairs == 3
    assert found.near(1) == 1 / 3
    assert found.near(2) == 1
    assert found.mean_distance() == 5 / 3


def test_channels_are_told_apart():
    mask = one_neuron((3, 2, 2), [(0, 0, 0), (1, 0, 0), (2, 1, 1)])
    found = displacements(mask, (3, 2, 2))
    assert not found.same.any()
    assert found.different[1, 1] == 2  # one pixel in two colours, both ways
    assert found.different[0, 0] == found.different[2, 2] == 2
    assert found.near(0) == 1 / 3


def test_counts_are_those_of_every_pair():
    torch.manual_seed(0)
    image = (2, 5, 3)
    mask = torch.rand(7, 30) < 0.3
    found = displacements(mask, image)
    same, different = torch.zeros(9, 5).long(), torch.zeros(9, 5).long()
    places = list(itertools.product(range(2), range(5), range(3)))
    for row in mask:
        on = [p for p, active in zip(places, row.tolist(), strict=True) if active]
        for (c1, y1, x1), (c2, y2, x2) in itertools.permutations(on, 2):
            (same if c1 == c2 else different)[y1 - y2 + 4, x1 - x2 + 2] += 1
    assert torch.equal(found.same, same)
    assert torch.equal(found.different, different)
    counts = mask.sum(1)
    assert found.pairs == int((counts * (counts - 1)).sum()) // 2


@pytest.mark.parametrize("image", [(1, 28, 28), (3, 6, 5), (1, 1, 1)])
def test_chance_is_a_neuron_that_reads_everything(image):
    whole = displacements(torch.ones(1, image[0] * image[1] * image[2]), image)
    share, mean = expected_locality(image)
    if whole.pairs:
        assert (share, mean) == (whole.near(), whole.mean_distance())
    else:
        assert math.isnan(share)
        assert math.isnan(mean)


def test_chance_on_mnist_is_as_published_and_a_random_mask_has_it():
    share, mean = expected_locality((1, 28, 28))
    assert share == 33072 / 613872  # (28 + 2 (27 + 26 + 25))^2 - 784 of 784^2 - 784
    assert f"{share:.1%}" == "5.4%"
    assert f"{mean:.1f}" == "13.1"
    torch.manual_seed(0)
    mask = torch.zeros(300, 784, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(784)[:50]] = True
    found = displacements(mask, (1, 28, 28))
    assert found.pairs == 300 * 50 * 49 // 2
    # Pairs of a neuron that share no pixel are all but independent, and those that share one are
    # positively correlated by at most the variance: sum over pairs <= pairs (1 + 2 * 48) variances.
    deviation = (share * (1 - share) * 97 / found.pairs) ** 0.5
    assert abs(found.near() - share) < 5 * deviation


def test_receptive_fields_are_images_the_most_connected_first():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]])
    assert receptive_fields(mask, (1, 2, 2)).shape == (4, 1, 2, 2)
    first = receptive_fields(mask, (1, 2, 2), most=2)
    assert torch.equal(first.view(2, 4), mask[[1, 2]])


def test_masks_of_layers_are_composed():
    one = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    two = torch.tensor([[0, 1], [1, 1], [0, 0]]).bool()
    expected = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    assert torch.equal(composed(one, two), expected)
    assert torch.equal(composed(one), one)


def test_bad_input():
    with pytest.raises(ShapeError, match="4 inputs"):
        displacements(torch.ones(2, 5), (1, 2, 2))
    with pytest.raises(DtypeError, match="matrix"):
        displacements(torch.ones(4), (1, 2, 2))
    with pytest.raises(ConfigError, match="image"):
        expected_locality((1, 0, 2))
    with pytest.raises(ConfigError, match="most"):
        receptive_fields(torch.ones(2, 4), (1, 2, 2), most=0)
    with pytest.raises(ShapeError, match="can't follow"):
        composed(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ConfigError, match="at least one"):
        composed()
