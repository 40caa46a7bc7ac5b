"""`t_end`: in weight steps, or as a share of the trainer's steps."""

import pytest
from loops import METHODS, net, sgd, train

from sparsekern import SET, RigL
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.methods.schedule import UpdateSchedule, share_in_weight_steps


@pytest.mark.parametrize("spends", [True, False])
@pytest.mark.parametrize("first", [0, 3, 12])
@pytest.mark.parametrize("freq", [1, 2, 5])
def test_updates_come_on_exactly_the_steps_of_the_share(freq, first, spends):
    def updates(t_end, steps):
        """The trainer steps on which the schedule makes an update."""
        schedule = UpdateSchedule(t_end, freq, first=first)
        weight_steps, last, found = 0, None, []
        for n in range(steps):
            due = schedule.is_due(weight_steps, last)
            if due:
                found.append(n)
                last = weight_steps
            weight_steps += not (due and spends)
        return found

    endless = updates(10**6, 40)
    for end in range(1, 41):
        t_end = share_in_weight_steps(end / 40, 40, freq, first, spends)
        assert updates(t_end, 40) == [n for n in endless if n < end]


@pytest.mark.parametrize(("share", "total", "end"), [(0.1, 30, 3), (0.29, 100, 29), (0.75, 10, 8)])
def test_a_share_is_the_decimal_that_was_written(share, total, end):
    assert share_in_weight_steps(share, total, 100, 0, False) == end


@pytest.mark.parametrize("method", METHODS)
def test_a_real_loop_ends_its_updates_there(method):
    model = net()
    optimizer = sgd(model)
    attached = METHODS[method](model, optimizer, t_end=0.5, total_steps=20, update_freq=2)
    done = []
    train(model, [optimizer], range(20), lambda _: done.append(len(attached.history)))
    # RigL spends steps 0, 3, 6 and 9; SET updates after 0, 2, 4, 6 and 8
    assert done[9] == done[19] == {"rigl": 4, "set": 5, "static": 0}[method]
    assert done[8] == {"rigl": 3, "set": 5, "static": 0}[method]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ConfigError, "`t_end` must be given.*weight steps.*t_end=0.75 with total_steps="),
        ({"total_steps": 10}, ConfigError, "`t_end` must be given"),
        ({"t_end": 0.75}, ConfigError, "`t_end` is a share, 0.75: `total_steps` must say"),
        ({"t_end": 75, "total_steps": 100}, ConfigError, "`total_steps` goes with .* got 75"),
        ({"t_end": 0.0, "total_steps": 100}, ConfigError, r"lie in \(0, 1\].*got 0.0"),
        ({"t_end": 75.0}, ConfigError, r"lie in \(0, 1\].*weight steps; got 75.0"),
        ({"t_end": float("nan"), "total_steps": 9}, ConfigError, "got nan"),
        ({"t_end": True}, DtypeError, "`t_end` must be an int"),
        ({"t_end": "5"}, DtypeError, "`t_end` must be an int"),
        ({"t_end": 0.5, "total_steps": 10.0}, DtypeError, "`total_steps` must be an int, in opti"),
        ({"t_end": 0.5, "total_steps": 0}, ConfigError, "`total_steps` must be at least 1"),
    ],
)
@pytest.mark.parametrize("method", [RigL, SET])
def test_what_is_missing_or_wrong_is_told(method, arguments, error, text):
    model = net()
    with pytest.raises(error, match=text):
        method(model, sgd(model), **arguments)
