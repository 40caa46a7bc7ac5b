"""FLOPs and bytes against formulas written out by hand for a 64-32-10 network."""

import pytest
import torch

from sparsekern.cost.timing import paired_step_times, rounds_in, take_turns, turns
from sparsekern.training import data
from sparsekern.training.config import TrainConfig
from sparsekern.training.trainer import Trainer, run

DENSE_F = 2 * (64 * 32 + 32 * 10)
BIASES = 32 + 10
STEPS, BATCH = 28, 50


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


def config(**changes):
    given = {"hidden": (32,), "epochs": 1, "batch_size": BATCH, "update_freq": 5}
    return TrainConfig(**(given | changes))


def test_dense_by_hand(digits):
    result = run(config(), digits, "dense", 0)
    assert result.weight_steps == STEPS == len(digits.train_y) // BATCH
    assert result.flops.inference == result.flops.dense_equivalent == DENSE_F
    assert result.flops.training == 3 * DENSE_F * BATCH * STEPS
    parameters = 4 * (64 * 32 + 32 * 10 + BIASES)
    held = result.held
    assert (held.weights, held.gradients, held.optimizer, held.index) == (*[parameters] * 3, 0)


@pytest.mark.parametrize(
    ("block", "blocks", "edges"),
    # 10 % of 2,048 weights are 205; 6 blocks of 32 come closest
    [(1, 205, (32, 64)), ((4, 8), 6, (8, 8))],
)
@pytest.mark.parametrize("method", ["static", "set", "rigl"])
def test_sparse_by_hand(digits, method, block, blocks, edges):
    result = run(config(block=block), digits, method, 0)
    bh, bw = (1, 1) if block == 1 else block
    weights = result.layers[0].nnz
    assert weights == blocks * bh * bw
    sparse_f = 2 * (weights + 320)
    updates = {"static": 0, "set": 5, "rigl": 5}[method]  # at weight steps 0, 5, ... 20 < 21
    assert result.updates == updates
    assert result.update_batches == (5 if method == "rigl" else 0)
    assert result.flops.inference == sparse_f
    assert result.flops.dense_equivalent == DENSE_F
    extra = (2 * sparse_f + DENSE_F) * BATCH * result.update_batches
    assert result.flops.training == 3 * sparse_f * BATCH * STEPS + extra
    trained = 4 * (weights + 320 + BIASES)
    held = result.held
    assert (held.weights, held.gradients, held.optimizer) == (trained,) * 3
    assert held.index == 4 * (2 * sum(edges) + 2 + 3 * blocks)


def test_adamw_holds_two_states_and_a_step_count(digits):
    result = run(config(optimizer="adamw", lr=1e-3), digits, "static", 0)
    assert result.held.optimizer == 2 * result.held.weights + 4 * 4  # four parameters


def test_dense_products_are_counted_as_dense(digits):
    flops = run(config(impl="dense"), digits, "static", 0).flops
    assert flops.inference == flops.dense_equivalent == DENSE_F


def test_paired_times_divide_neighbours(digits):
    trainer = Trainer(config(), digits, "dense", 0)
    steps = {"dense": trainer.step, "twice": lambda: (trainer.step(), trainer.step())}
    times = paired_step_times(steps, "dense", device=torch.device("cpu"), rounds=10)
    assert times["dense"].ratio == 1
    assert times["twice"].ratio > 1.2
    assert times["dense"].seconds > 0


def test_nobody_is_always_first():
    expected = [(-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert list(turns("ab", 2, warm_up=1)) == expected
    assert list(turns("", 3)) == []


def test_rounds_are_shared_and_warming_up_is_dropped():
    ticks = iter(range(1, 100))
    timing = take_turns(lambda run: run() * next(ticks), {"a": lambda: 1, "b": lambda: 2}, 2)
    assert timing.rounds == {"a": [3, 6], "b": [8, 10]}
    assert timing.ratios("b", "a") == [10 / 6, 8 / 3]
    assert timing.seconds("a") == 4.5
    assert rounds_in(1.0, 0.3, 2, 9) == 3
    assert [rounds_in(seconds, 1.0, 2, 9) for seconds in (0.0, 100.0)] == [2, 9]
