"""Criteria and actions of Zhou et al. 2019: worked vectors, an independent oracle, bad input."""

import pytest
import torch

from sparsekern import tickets
from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.tickets.deconstruct import PRUNED, SURVIVORS
from tests.support import integers

INITIAL = {"fc": torch.tensor([0.5, -0.4, 0.3, -0.2, 0.1, -0.6, 0.05, 0.7])}
FINAL = {"fc": torch.tensor([0.6, 0.1, -0.5, -0.25, 0.02, -0.3, 0.4, 0.65])}
KEPT = {
    "large_final": {0, 2, 6, 7},
    "small_final": {1, 3, 4, 5},
    "large_init": {0, 1, 5, 7},
    "small_init": {2, 3, 4, 6},
    "large_init_large_final": {0, 2, 5, 7},
    "small_init_small_final": {1, 3, 4, 6},
    "magnitude_increase": {0, 2, 3, 6},
    "movement": {1, 2, 5, 6},
    "large_final_same_sign": {0, 5, 6, 7},
}
TIED = {  # sure ones, and those among which chance decides
    "large_final_diff_sign": ({1, 2}, {0, 3, 4, 5, 6, 7}),
    "magnitude_increase_same_sign": ({0, 3, 6}, {1, 2}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chosen(masks):
    return set(masks["fc"].nonzero()[:, 0].tolist())


def mask_of(*kept, size=8):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return {"fc": mask}


# ---- criteria


@pytest.mark.parametrize("name", KEPT)
def test_a_criterion_keeps_what_the_worked_vector_says(name):
    scores = tickets.CRITERIA[name](INITIAL, FINAL)
    for generator in (None, seeded()):  # there are no ties
        assert chosen(tickets.top(scores, 0.5, generator=generator)) == KEPT[name]


@pytest.mark.parametrize("name", TIED)
def test_equal_scores_are_decided_by_chance_with_a_generator(name):
    scores = tickets.CRITERIA[name](INITIAL, FINAL)
    sure, tied = TIED[name]
    seen = set()
    for seed in range(30):
        kept = chosen(tickets.top(scores, 0.5, "layer", generator=seeded(seed)))
        assert sure <= kept
        assert len(kept) == 4
        seen |= kept
    assert seen == sure | tied
    first = sorted(tied)[: 4 - len(sure)]
    assert chosen(tickets.top(scores, 0.5)) == sure | set(first)


def test_magnitude_increase_of_changed_signs():
    scores = tickets.CRITERIA["magnitude_increase_diff_sign"](INITIAL, FINAL)["fc"]
    expected = torch.zeros(8)
    for i in (1, 2):
        expected[i] = FINAL["fc"][i].abs() - INITIAL["fc"][i].abs()
    assert torch.equal(scores, expected)


def _both_above(a, b, kept):
    """The mask of those that reach one percentile of both, if one keeps so many."""
    for percentile in range(len(a)):
        low = [sorted(v)[percentile] for v in (a, b)]
        mask = [x >= low[0] and y >= low[1] for x, y in zip(a, b, strict=True)]
        if sum(mask) == kept:
            return mask
    return None


@pytest.mark.parametrize("sign", [1, -1])
def test_two_sided_criteria_have_one_percentile(sign):
    name = "large_init_large_final" if sign == 1 else "small_init_small_final"
    found = 0
    for seed in range(20):
        w_i, w_f = torch.randn(2, 11, generator=seeded(seed), dtype=torch.float64)
        scores = tickets.CRITERIA[name]({"fc": w_i}, {"fc": w_f})
        for kept in range(1, 11):
            mask = _both_above((sign * w_i.abs()).tolist(), (sign * w_f.abs()).tolist(), kept)
            if mask is not None:
                found += 1
                assert tickets.top(scores, 1 - kept / 11)["fc"].tolist() == mask
    assert found > 100


@pytest.mark.parametrize("name", [*KEPT, "random", "magnitude_increase_diff_sign"])
def test_what_went_before_is_not_seen_again(name):
    mask = mask_of(0, 1, 4, 6, 7)
    left = {side: {"fc": w["fc"][mask["fc"]]} for side, w in (("i", INITIAL), ("f", FINAL))}
    arguments = {"generator": seeded()} if name == "random" else {}
    scores = tickets.CRITERIA[name](INITIAL, FINAL, masks=mask, **arguments)["fc"]
    arguments = {"generator": seeded()} if name == "random" else {}
    alone = tickets.CRITERIA[name](left["i"], left["f"], **arguments)["fc"]
    assert torch.equal(scores[mask["fc"]], alone)
    assert bool((scores[~mask["fc"]] == -torch.inf).all())


def test_criteria_take_what_they_need():
    assert torch.equal(tickets.CRITERIA["large_final"](None, FINAL)["fc"], FINAL["fc"].abs())
    assert torch.equal(tickets.CRITERIA["large_init"](INITIAL)["fc"], INITIAL["fc"].abs())
    drawn = [tickets.CRITERIA["random"](INITIAL, generator=seeded(3))["fc"] for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (8,)


# ---- kept weights


@pytest.mark.parametrize("sign", ["kept", "random"])
@pytest.mark.parametrize("action", SURVIVORS)
def test_kept_weights_have_the_sign_and_the_rest_is_zero(action, sign):
    w = {"fc": torch.randn(40, 30, generator=seeded()), "conv": torch.randn(8, 3, 3, 3)}
    masks = {name: torch.rand(t.shape, generator=seeded(1)) < 0.3 for name, t in w.items()}
    start = tickets.survivors(action, w, masks, sign=sign, generator=seeded(2))
    again = tickets.survivors(action, w, masks, sign=sign, generator=seeded(2))
    for name, values in start.items():
        assert torch.equal(values, again[name])
        kept, before = values[masks[name]], w[name][masks[name]]
        assert bool((values[~masks[name]] == 0).all())
        agree = int((kept.sign() == before.sign()).sum())
        # four deviations of a fair coin
        off = abs(agree - kept.numel() / 2)
        assert agree == kept.numel() if sign == "kept" else off <= 2 * kept.numel() ** 0.5
        if action == "rewind":
            assert torch.equal(kept.abs(), before.abs())
        if action == "reshuffle":
            assert torch.equal(kept.abs().sort().values, before.abs().sort().values)
            assert not torch.equal(kept.abs(), before.abs())
        if action == "constant":
            assert torch.equal(kept.abs(), w[name].std(correction=0).expand_as(kept))


def test_a_constant_is_the_deviation_of_the_whole_layer():
    w = {"fc": torch.tensor([1.0, -3.0, 5.0, -3.0, 1.0, -1.0])}  # mean 0
    w["fc"] = torch.tensor([2.0, -2.0, 4.0, -4.0, 0.0, -0.0])  # mean 0, mean square 40 / 6
    start = tickets.survivors("constant", w, mask_of(0, 1, 4, 5, size=6))["fc"]
    a = w["fc"].std(correction=0)
    assert torch.equal(start, torch.stack([a, -a, 0 * a, 0 * a, a, a]))  # 0 counts as positive


def test_fresh_weights_are_taken_with_the_old_signs():
    fresh = {"fc": torch.arange(-4.0, 4.0)}
    start = tickets.survivors("reinit", INITIAL, mask_of(0, 1, 7), fresh=fresh)["fc"]
    assert torch.equal(start, torch.tensor([4.0, -3.0, 0, 0, 0, 0, 0, 3.0]))


# ---- weights left out


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("zero", [0.5, 0, 0.3, 0, 0, 0, 0.05, 0.7]),
        ("freeze", [0.5, -0.4, 0.3, -0.2, 0.1, -0.6, 0.05, 0.7]),
        ("freeze_init_zero_mask", [0.5, 0, 0.3, -0.2, 0, 0, 0.05, 0.7]),
        ("freeze_init_zero_all", [0.5, 0, 0.3, -0.2, 0, 0, 0.05, 0]),
        ("freeze_init_zero_mask_rev", [0.5, -0.4, 0.3, 0, 0.1, -0.6, 0.05, 0.7]),
    ],
)
def test_left_out_weights_are_frozen_where_the_worked_vector_says(action, expected):
    masks = mask_of(*KEPT["large_final"])
    start = tickets.survivors("rewind", INITIAL, masks)
    got = tickets.pruned(action, start, INITIAL, masks, FINAL)["fc"]
    assert torch.equal(got, torch.tensor(expected))


def test_the_control_has_as_many_zeros_in_other_places():
    masks = mask_of(*KEPT["large_final"])
    start = tickets.survivors("rewind", INITIAL, masks)
    zeros = set()
    for seed in range(20):
        action = "freeze_init_zero_mask_reshuffle"
        got = tickets.pruned(action, start, INITIAL, masks, FINAL, generator=seeded(seed))["fc"]
        zero = got == 0
        assert int(zero.sum()) == 3
        assert torch.equal(got[~zero], INITIAL["fc"][~zero])
        assert torch.equal(got[masks["fc"]], INITIAL["fc"][masks["fc"]])
        zeros |= set(zero.nonzero()[:, 0].tolist())
    assert zeros == {1, 3, 4, 5}
    assert set(PRUNED) > {"zero", action}


def test_rescaling_changes_no_prediction_of_a_relu_net_without_biases():
    # kept 1/2, 1/4 and 1/2 of integers: each product is exact, and the rates are powers of 2
    torch.manual_seed(0)
    shapes = {"a": (32, 16), "b": (32, 32), "c": (5, 32)}
    w = {name: integers(*shape) for name, shape in shapes.items()}
    scores = tickets.CRITERIA["random"](w, generator=seeded())
    masks = tickets.top(scores, 0.5, {"a": 0.5, "b": 0.75, "c": 0.5})

    def run(weights):
        x = integers(64, 16)
        for name in ("a", "b"):
            x = (x @ weights[name].t()).relu()
        return x @ weights["c"].t()

    ticket = tickets.survivors("rewind", w, masks)
    torch.manual_seed(1)
    plain = run(ticket)
    torch.manual_seed(1)
    scaled = run(tickets.rescaled(ticket, masks))
    assert torch.equal(scaled, 2 * 4 * 2 * plain)
    assert torch.equal(scaled.argmax(1), plain.argmax(1))
    assert len(plain.argmax(1).unique()) > 1


def test_rescaling_leaves_an_empty_layer_at_zero():
    start = {"fc": torch.zeros(8)}
    assert torch.equal(tickets.rescaled(start, mask_of())["fc"], start["fc"])


# ---- bad input

ODD = {"fc": torch.zeros(7)}
BAD = [
    (lambda: tickets.CRITERIA["large_finale"], ConfigError, "did you mean 'large_final'"),
    (lambda: tickets.CRITERIA[3], ConfigError, "criterion must be one of"),
    (lambda: tickets.CRITERIA["movement"](None, FINAL), ConfigError, "before training"),
    (lambda: tickets.CRITERIA["large_final"](INITIAL), ConfigError, "after training"),
    (lambda: tickets.CRITERIA["random"](None), ConfigError, "for shapes"),
    (lambda: tickets.CRITERIA["movement"](INITIAL, ODD), ShapeError, "(8,)"),
    (lambda: tickets.CRITERIA["movement"](INITIAL, {"out": FINAL["fc"]}), ConfigError, "'out'"),
    (lambda: tickets.CRITERIA["movement"](INITIAL, FINAL["fc"]), DtypeError, "`final` must map"),
    (lambda: tickets.CRITERIA["large_init"]({"fc": torch.arange(3)}), DtypeError, "floating"),
    (lambda: tickets.CRITERIA["large_init"]({"fc": torch.tensor([torch.nan])}), ConfigError, "fin"),
    (
        lambda: tickets.CRITERIA["movement"](INITIAL, FINAL, generator=seeded()),
        ConfigError,
        "draws nothing",
    ),
    (lambda: tickets.CRITERIA["random"](INITIAL, generator=3), DtypeError, "torch.Generator"),
    (lambda: tickets.CRITERIA["movement"](INITIAL, FINAL, masks=FINAL), DtypeError, "bool"),
    (lambda: tickets.top(FINAL, 0.5, generator=3), DtypeError, "torch.Generator"),
    (lambda: tickets.survivors("rewound", INITIAL, mask_of(1)), ConfigError, "mean 'rewind'"),
    (lambda: tickets.survivors("rewind", INITIAL, mask_of(1), sign="keep"), ConfigError, "kept"),
    (lambda: tickets.survivors("rewind", INITIAL, mask_of(size=9)), ShapeError, "(9,)"),
    (
        lambda: tickets.survivors("rewind", INITIAL, mask_of(1), fresh=FINAL),
        ConfigError,
        "'reinit'",
    ),
    (lambda: tickets.survivors("reinit", INITIAL, mask_of(1), fresh=ODD), ShapeError, "fresh"),
    (lambda: tickets.pruned("zeros", INITIAL, INITIAL, mask_of(1)), ConfigError, "mean 'zero'"),
    (
        lambda: tickets.pruned("freeze_init_zero_all", INITIAL, INITIAL, mask_of(1)),
        ConfigError,
        "needs `final`",
    ),
    (lambda: tickets.pruned("zero", ODD, INITIAL, mask_of(1)), ShapeError, "(7,)"),
    (lambda: tickets.rescaled(INITIAL, {}), DtypeError, "`masks` must map"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
