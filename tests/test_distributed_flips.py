"""One bit of one rank's topology, values, gradients, optimizer state or scores is flipped."""

import os

import pytest
import torch
from processes import DiedError, FailedError, failure, ranks
from test_distributed import Run, other_topology
from torch.utils._pytree import tree_map

from sparsekern import RigL, Static
from sparsekern.errors import RankMismatchError

FLIPS = int(os.environ.get("SPARSEKERN_FLIPS", "5"))  # of each kind; 100 takes minutes
FLIPPED = ("rigl", "set", "static")


def copied(state):
    return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)


def flipped(tensor, seed, lowest=0):
    """Change one bit of a tensor, in place, from a byte of its numbers on."""
    bits = tensor.detach().view(torch.uint8).view(-1, tensor.element_size())[:, lowest:]
    g = torch.Generator().manual_seed(seed)
    at, bit = (int(torch.randint(n, (), generator=g)) for n in (bits.numel(), 8))
    at = divmod(at, bits.shape[1])
    bits[at] ^= 1 << bit


def state_of(run, key):
    return run.optimizer.state[run.layers["2"].values][key]


def flipped_to_stay(run, tensor, seed):
    """As `flipped`; where a step comes before the comparison, in what its rounding can't take back.

    SET updates after the weight step, and Static compares then.
    """
    flat = tensor.detach().view(-1)
    if isinstance(run.method, RigL):
        flipped(flat, seed)
    else:
        flipped(flat[flat.abs().argmax() :][:1], seed, 4)


def flip_value(run, seed):
    flipped_to_stay(run, run.layers["2"].values, seed)


def flip_gradient(run, seed):
    gradient = run.layers["2"].values.grad
    if isinstance(run.method, Static):  # another batch's is there when it compares
        flipped_to_stay(run, gradient, seed)
    else:
        flipped(gradient, seed)


def flip_score(run, seed):
    """Of a layer's scores, as soon as they have been summed over the ranks."""
    growth, g = run.method.growth, torch.Generator().manual_seed(seed)
    ready = growth.ready

    def flipping(*args):
        found = ready(*args)
        if found:
            scores = growth.observers["2"].scores()
            flipped((scores.active, scores.scores)[int(torch.randint(2, (), generator=g))], seed)
            del growth.ready
        return found

    growth.ready = flipping


CHANGES = {
    "topology": other_topology,
    "values": flip_value,
    "gradient": flip_gradient,
    "state 'exp_avg'": lambda run, seed: flipped_to_stay(run, state_of(run, "exp_avg"), seed),
    "state 'exp_avg_sq'": lambda run, seed: flipped_to_stay(run, state_of(run, "exp_avg_sq"), seed),
    "score": flip_score,
}


def flips(what, method, rank, world):
    """How often a change on rank 1 was said at the next update, and what was said at last."""
    run, said, text = Run(method), 0, ""
    run.train(rank, world, range(3))
    # RigL updates by batches 0 and 3, SET by 0, 2 and 4; Static compares at 4
    first = 4 if method == "set" else 3
    saved = copied((run.model.state_dict(), run.optimizer.state_dict()))
    for seed in range(FLIPS):
        run.model.load_state_dict(saved[0])
        run.optimizer.load_state_dict(copied(saved[1]))  # which it takes over and changes
        updates = len(run.method.history)
        for i in range(3, 6):
            change = None
            if i == first and rank == 1:
                change = lambda run, seed=seed: CHANGES[what](run, seed)  # noqa: E731
            try:
                run.step(i, rank, world, change)
            except RankMismatchError as error:
                said += "layer '2'" in str(error) and "on rank 1 than on rank 0" in str(error)
                text = str(error)
                break
            if len(run.method.history) > updates and method != "static":
                break
    run.method.detach()
    return said, text


# RigL alone has scores
CASES = [(what, m) for what in CHANGES for m in FLIPPED if m == "rigl" or what != "score"]


def worker(rank, world):
    found = {}
    for what, method in CASES:
        try:
            found[what, method] = flips(what, method, rank, world)
        except Exception as error:
            found[what, method] = failure(error)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks(worker, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "method"), CASES)
def test_one_bit_of_one_rank_is_told_at_the_next_update(found, what, method):
    for by_rank in found.values():
        assert not isinstance(by_rank, DiedError | FailedError), by_rank
        told = by_rank[what, method]
        assert not isinstance(told, FailedError), told
        said, text = told
        assert said == FLIPS, text
