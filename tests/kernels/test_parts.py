"""How sums over tokens are cut into parts, and the pass that adds them."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_exact

from sparsekern.kernels import launch, plans
from sparsekern.kernels.launch import most_groups, parts_of_sum, usual_groups
from sparsekern.kernels.parts import add_parts

CPU = torch.device("cpu")
STEPS = 128


def headline(edge, group):
    """(groups, steps, bytes of a step, numbers) of 8192 x 4096 x 4096 at a density of a tenth."""
    rows, nnzb = 4096 // edge, round(0.1 * (4096 // edge) ** 2)
    loads = (1 + group) * edge * 64 * 2
    return usual_groups(nnzb, rows, group), STEPS, loads, nnzb * edge**2


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("mean", [0.3, 1, 3.2, 12.8])
def test_the_usual_number_of_groups_is_that_of_a_random_topology(mean, group):
    rows, g = 4096, torch.Generator().manual_seed(0)
    lengths = torch.poisson(torch.full((rows,), float(mean)), generator=g).int()
    nnzb, groups = int(lengths.sum()), int((-(-lengths // group)).sum())
    assert groups <= most_groups(nnzb, rows, group)
    if mean >= group / 2:  # else rows are mostly shorter than a group
        assert 0.9 * groups <= usual_groups(nnzb, rows, group) <= 1.15 * groups


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_no_topology_has_more_groups_than_the_most(group):
    for rows, nnzb in ((3, 0), (3, 2), (3, 7), (5, 40)):
        # one block in as many rows as there are, the rest in one: the most remainders
        lengths = [0] * rows
        for i in range(nnzb):
            lengths[i if i < rows else rows - 1] += 1
        assert sum(-(-n // group) for n in lengths) <= most_groups(nnzb, rows, group)


def test_groups_that_fill_the_gpu_are_not_cut():
    assert [parts_of_sum(CPU, *headline(*cut)) for cut in ((128, 2), (64, 4))] == [2, 1]


def test_few_groups_are_cut_until_the_gpu_is_full():
    many = launch.multiprocessors(CPU)
    for groups in (1, 5, 30):
        parts = parts_of_sum(CPU, groups, 100_000, 40_960, groups << 14)
        dealt = groups * parts  # to so many, of whom the busiest has little more than the others
        assert dealt >= 0.6 * many
        assert -(-dealt // many) * many <= 1.5 * dealt


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 15, 16])
def test_a_part_has_a_few_steps_at_least(steps):
    assert 1 <= parts_of_sum(CPU, 1, steps, 40_960, 1 << 12) <= max(1, steps // 8)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 7])
@pytest.mark.parametrize("numbers", [5, 512, 1300])
def test_parts_are_added(numbers, parts, added):
    g = torch.Generator().manual_seed(1)
    sums = torch.randint(-9, 10, (parts, numbers), generator=g).float().to(DEVICE)
    out = torch.full((numbers,), 3.0 if added else float("nan"), device=DEVICE)
    add_parts(plans.find(add_parts.__globals__["_add_parts_kernel"], out, ()), sums, out, ADD=added)
    assert_exact(out, sums.double().cpu().sum(0) + 3 * added, DTYPES["fp32"])
