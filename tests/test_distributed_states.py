"""States of `torch.distributed.checkpoint`, in all options: a run goes on with the same bits."""

import pytest
import torch
from processes import DiedError, FailedError, failure, ranks
from test_distributed_flips import copied
from test_distributed_saves import Sharded

OPTIONS = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
}


def load(run, state, options):
    from torch.distributed.checkpoint import state_dict as api

    if options.get("cpu_offload"):
        # rank 0 alone has a state; of one without a model `set_state_dict` loads the optimizer only
        options = options | {"broadcast_from_rank0": True}
    model, optimizer = copied(state)
    options = api.StateDictOptions(**options)
    api.set_model_state_dict(run.model, model, options=options)
    api.set_optimizer_state_dict(run.model, run.optimizer, optimizer, options=options)


def resumed(rank, world, options):
    """What a run ends with, one that loads its state, and the first one rolled back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = Sharded()
    whole.train(range(5), rank, world)
    state = get_state_dict(whole.model, whole.optimizer, options=StateDictOptions(**options))
    state = copied(state)
    found = [whole.train(range(5, 9), rank, world)]
    fresh = Sharded()
    for run in (fresh, whole):
        load(run, state, options)
        found.append(run.train(range(5, 9), rank, world))
    return found


def worker(rank, world):
    found = {}
    for name, options in OPTIONS.items():
        try:
            found[name] = resumed(rank, world, options)
        except Exception as error:
            found[name] = failure(error)
    return found


@pytest.fixture(scope="module")
def found():
    return ranks(worker, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_loaded_state_goes_on_with_the_same_bits(found, name):
    for told in found.values():
        assert not isinstance(told, DiedError | FailedError), told
        assert not isinstance(told[name], FailedError), told[name]
        expected, *others = told[name]
        for other in others:
            assert other["digests"] == expected["digests"]
            assert other["history"] == expected["history"]
            for key in ("weights", "state"):
                for one, right in zip(other[key], expected[key], strict=True):
                    assert torch.equal(one, right)
