"""lab/statistics.py: the rule that judges every claim, against scipy, by hand and by simulation."""

import dataclasses
import itertools
import json
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from lab.statistics import (
    LEVEL,
    MARGIN,
    OUTCOMES,
    Difference,
    chosen_elsewhere,
    compare,
    difference,
    holm,
    least_clear,
    pm,
)
from lawa_core import LawaError


def between(low, high, margin=0.005):
    """A difference whose interval is this."""
    return Difference((low + high) / 2, low, high, 0.5, 5, "seeds", margin, "nats")


def reference(values):
    """(mean, low, high, two-sided p) by scipy's own t-test."""
    found = stats.ttest_1samp(values, 0)
    return np.mean(values), *found.confidence_interval(0.9), found.pvalue


# ---- The four outcomes ---------------------------------------------------------------------------


def test_the_words_and_numbers_that_claims_are_judged_by():
    assert OUTCOMES == ("holds", "opposite", "no difference", "cannot tell")
    assert (LEVEL, MARGIN) == (0.9, 0.005)


EDGE = 1e-9  # a little to the other side


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.02, 0.04, "holds"),
        (EDGE, 0.04, "holds"),
        (0.0, 0.04, "cannot tell"),
        (-EDGE, 0.04, "cannot tell"),
        (-0.04, -0.02, "opposite"),
        (-0.04, -EDGE, "opposite"),
        (-0.04, 0.0, "cannot tell"),
        (-0.04, EDGE, "cannot tell"),
        (-0.005, 0.005, "no difference"),
        (-0.005 - EDGE, 0.005, "cannot tell"),
        (-0.005, 0.005 + EDGE, "cannot tell"),
        (0.0, 0.0, "no difference"),
        # there, but too small to matter
        (0.001, 0.005, "no difference"),
        (0.001, 0.005 + EDGE, "holds"),
        (-0.005, -0.001, "no difference"),
        (-0.005 - EDGE, -0.001, "opposite"),
        # wider than any margin
        (-0.3, 0.5, "cannot tell"),
        (-math.inf, math.inf, "cannot tell"),
    ],
)
def test_outcomes_at_their_edges(low, high, outcome):
    assert between(low, high).outcome == outcome


def test_without_a_margin_nothing_is_without_difference_but_zero():
    assert between(-EDGE, EDGE, margin=0.0).outcome == "cannot tell"
    assert between(EDGE, 2 * EDGE, margin=0.0).outcome == "holds"
    assert between(0.0, 0.0, margin=0.0).outcome == "no difference"


def test_the_claim_turned_round_has_the_opposite_outcome():
    turned = {"holds": "opposite", "opposite": "holds"}
    rng = np.random.default_rng(1)
    seen = set()
    for scale in (0.001, 0.01):
        for center in (-0.02, 0, 0.02):
            values = rng.normal(center, scale, 4)
            there, back = difference(values), difference(-values)
            seen.add(there.outcome)
            assert back.outcome == turned.get(there.outcome, there.outcome)
            assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
            assert back.p == pytest.approx(there.p)
    assert seen == set(OUTCOMES)


def test_another_unit_with_its_margin_has_the_same_outcome():
    rng = np.random.default_rng(2)
    for scale in (0.001, 0.004, 0.02):
        values = rng.normal(0.004, scale, 5)
        nats = difference(values)
        steps = difference(values * 1e4, margin=MARGIN * 1e4, unit="steps")
        assert (steps.outcome, steps.unit) == (nats.outcome, "steps")
        assert steps.p == pytest.approx(nats.p)


# ---- The interval --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10, 512])
@pytest.mark.parametrize("center", [0, 0.03])
def test_the_interval_is_scipys(n, center):
    values = np.random.default_rng(n).normal(center, 0.02, n)
    found = difference(values)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(reference(values))
    assert (found.n, found.margin, found.unit, found.over) == (n, MARGIN, "nats", "seeds")


def test_the_interval_by_hand():
    """Mean 2, standard error 1/sqrt(3), t quantile 2.91999 (2 degrees of freedom, 95%)."""
    found = difference([1, 2, 3], unit="steps", margin=0.5)
    half = 2.91999 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)
    assert found.p == pytest.approx(0.0742, abs=5e-5)
    assert found.outcome == "holds"


def test_equal_differences_have_an_interval_without_width():
    found = difference([0.25, 0.25, 0.25])
    assert (found.low, found.high, found.p) == (0.25, 0.25, 0.0)
    assert found.outcome == "holds" and difference([-0.25] * 2).outcome == "opposite"
    assert (difference([0.0] * 5).p, difference([0.0] * 5).outcome) == (1.0, "no difference")


@pytest.mark.parametrize(
    "values", [[0.3], [0.0], [0.1, math.nan, 0.1], [math.nan], [math.inf, 0.1], [math.inf] * 3]
)
def test_what_has_no_interval_cannot_be_told(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a notebook would show it
        found = difference(values)
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
    assert (found.outcome, found.n) == ("cannot tell", len(values))
    assert "no interval" in str(found)


def test_no_differences_are_refused():
    with pytest.raises(LawaError, match="none"):
        difference([])


def test_words_of_a_difference():
    found = difference([0.036, 0.04, 0.041, 0.044, 0.044])
    _, low, high, _ = reference([0.036, 0.04, 0.041, 0.044, 0.044])
    assert str(found) == f"+0.041 [{low:+.3f}, {high:+.3f}] nats (90% interval, 5 seeds)"
    assert "steps (90% interval, 2 blocks)" in str(difference([1, 2], unit="steps", over="blocks"))
    assert str(difference([0.5])) == "+0.500 [no interval] nats (90% interval, 1 seed)"


def test_plus_minus_is_half_of_the_interval():
    values = [0.04, 0.05, 0.06]
    mean, low, high, _ = reference(values)
    assert pm(values) == f"{mean:+.3f} ± {(high - low) / 2:.3f}" == "+0.050 ± 0.017"
    assert pm([-3, -4], 1) == "-3.5 ± 3.2"
    assert pm([-0.5], 1) == "-0.5 (one seed)"


# ---- compare -------------------------------------------------------------------------------------

N_BLOCKS = 6


def row(scheme, seed, lr=1e-2, step=400, run=4.0, gain=0.0):
    """A row as of Lab.evaluate: an average with this mean gain, other on every block."""
    blocks = np.random.default_rng([seed, step]).normal(0, 0.5, N_BLOCKS)
    own = run + blocks - blocks.mean()
    noise = np.random.default_rng([seed, step, len(scheme)]).normal(0, 0.1, N_BLOCKS)
    gains = gain * (1 + noise - noise.mean())
    losses = own - gains
    return {
        "lr": lr, "seed": seed, "run": "a-run", "step": step, "scheme": scheme,
        "loss": float(losses.mean()), "gain": float(gains.mean()), "n_blocks": N_BLOCKS,
        "losses": losses, "gains": gains}


def sweep(seeds=(0, 1, 2)):
    """Runs and two averages at two rates and steps; LAWA gains 0.1 and more, by seed."""
    found = []
    for lr, step, seed in itertools.product((1e-3, 1e-2), (200, 400), seeds):
        at = {"lr": lr, "step": step, "run": 4 + 100 * lr + step / 1e4 + seed / 10}
        gain = 0.1 + lr + seed / 100
        found.append(row("run", seed, **at))
        found.append(row("lawa", seed, gain=gain, **at))
        found.append(row("ema(0.9)", seed, gain=gain / 2, **at))
    return found


def pick(rows, **wanted):
    """{seed: row} of the rows that are as wanted."""
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return {row["seed"]: row for row in chosen}


def test_compare_pairs_by_seed_whatever_the_order_of_rows():
    rows = sweep()
    ours = pick(rows, scheme="lawa", lr=1e-2, step=400)
    theirs = pick(rows, scheme="ema(0.9)", lr=1e-2, step=400)
    values = [theirs[seed]["loss"] - ours[seed]["loss"] for seed in (0, 1, 2)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    for given in (rows, rows[::-1], shuffled):
        found = compare(given, "lawa", "ema(0.9)", lr=1e-2, step=400)
        assert (found.mean, found.low, found.high, found.p) == pytest.approx(reference(values))
        assert (found.n, found.over, found.unit, found.margin) == (3, "seeds", "nats", MARGIN)
        assert [seed for seed, _, _ in found.pairs] == [0, 1, 2]
    assert found.pairs == tuple((seed, ours[seed]["loss"], theirs[seed]["loss"]) for seed in ours)


def test_pairing_is_what_makes_a_difference_clear():
    """Seeds differ by 0.1 nats, their gains by 0.01: only paired, the gain stands out."""
    rows = sweep()
    found = compare(rows, "lawa", "run", lr=1e-2, step=400)
    unpaired = [row["loss"] for row in pick(rows, scheme="lawa", lr=1e-2, step=400).values()]
    assert found.high - found.low < np.std(unpaired, ddof=1)
    assert found.outcome == "holds"


def test_less_loss_is_better_and_more_gain_is():
    """`one` has 0.05 more gain, that is less loss: both columns speak for it."""
    rows = [
        row(scheme, seed, gain=gain + seed / 1000)
        for seed in range(5)
        for scheme, gain in (("good", 0.15), ("weak", 0.10))]
    for one in rows:
        one["loss"] = 4 - one["gain"]
    for column in ("loss", "gain"):
        found = compare(rows, "good", "weak", column=column)
        assert found.mean == pytest.approx(0.05) and found.outcome == "holds"
        back = compare(rows, "weak", "good", column=column)
        assert back.mean == pytest.approx(-0.05) and back.outcome == "opposite"


def test_sides_may_differ_in_anything():
    rows = sweep()
    high, low = {"scheme": "lawa", "lr": 1e-2}, {"scheme": "lawa", "lr": 1e-3}
    found = compare(rows, high, low, column="gain", step=400)
    assert found.mean == pytest.approx(1e-2 - 1e-3)
    late, early = {"step": 400}, {"step": 200}
    found = compare(rows, late, early, scheme="run", lr=1e-3)
    ours, theirs = (pick(rows, scheme="run", lr=1e-3, **side) for side in (late, early))
    assert found.mean == pytest.approx(np.mean([theirs[s]["loss"] - ours[s]["loss"] for s in ours]))
    # a side's own word counts more than what both share
    same = compare(rows, {"scheme": "lawa", "step": 200}, {"scheme": "run", "step": 200},
                   step=400, lr=1e-3)
    assert same == compare(rows, "lawa", "run", step=200, lr=1e-3)


def test_what_was_chosen_differs_from_seed_to_seed():
    """{seed: value} on either side, or in what both share."""
    rows = sweep()
    chosen = {0: "lawa", 1: "ema(0.9)", 2: "lawa"}
    found = compare(rows, {"scheme": chosen}, "run", lr=1e-2, step=400)
    ours = {seed: pick(rows, scheme=chosen[seed], lr=1e-2, step=400)[seed] for seed in chosen}
    theirs = pick(rows, scheme="run", lr=1e-2, step=400)
    assert found.pairs == tuple((s, ours[s]["loss"], theirs[s]["loss"]) for s in chosen)
    found = compare(rows, "lawa", "run", lr={0: 1e-3, 1: 1e-2, 2: 1e-3}, step=400)
    lower, higher = (compare(rows, "lawa", "run", lr=lr, step=400) for lr in (1e-3, 1e-2))
    assert found.pairs == (lower.pairs[0], higher.pairs[1], lower.pairs[2])
    with pytest.raises(LawaError, match="same seeds"):
        compare(rows, {"scheme": {0: "lawa", 1: "lawa"}}, "run", lr=1e-2, step=400)


def test_one_seed_is_paired_by_block():
    rows = sweep(seeds=(3,))
    ours = pick(rows, scheme="lawa", lr=1e-2, step=400)[3]
    theirs = pick(rows, scheme="run", lr=1e-2, step=400)[3]
    found = compare(rows, "lawa", "run", lr=1e-2, step=400)
    expected = reference(theirs["losses"] - ours["losses"])
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(expected)
    assert (found.n, found.over) == (N_BLOCKS, "blocks") and "6 blocks" in str(found)
    assert found.mean == pytest.approx(theirs["loss"] - ours["loss"])
    assert [i for i, _, _ in found.pairs] == list(range(N_BLOCKS))
    assert [a for _, a, _ in found.pairs] == ours["losses"].tolist()
    gains = compare(rows, "lawa", "ema(0.9)", column="gain", lr=1e-2, step=400)
    other = pick(rows, scheme="ema(0.9)", lr=1e-2, step=400)[3]
    assert gains.mean == pytest.approx((ours["gains"] - other["gains"]).mean())
    assert gains.over == "blocks"


def test_the_margin_of_a_comparison_is_given():
    rows = sweep()
    wide = compare(rows, "lawa", "run", lr=1e-2, step=400, margin=1.0)
    assert (wide.margin, wide.outcome) == (1.0, "no difference")


def test_a_run_that_diverged_cannot_be_told():
    rows = sweep()
    pick(rows, scheme="lawa", lr=1e-2, step=400)[1]["loss"] = math.nan
    assert compare(rows, "lawa", "run", lr=1e-2, step=400).outcome == "cannot tell"


def without(rows, **wanted):
    return [row for row in rows if any(row[name] != value for name, value in wanted.items())]


@pytest.mark.parametrize(
    ("rows", "one", "words"),
    [
        (without(sweep(), scheme="lawa", seed=1), "lawa", r"\[0, 2\].*\[0, 1, 2\]"),
        (without(sweep(), scheme="run", seed=1), "lawa", r"\[0, 1, 2\].*\[0, 2\]"),
        ([*sweep(), row("lawa", 0)], "lawa", "one row per seed.*4 of 3"),
        (sweep(), "lawa(9)", r"lawa\(9\)"),
        (sweep(), {"scheme": "lawa", "lr": 3.0}, "3.0.*got 0"),
        ([], "lawa", "lawa"),
    ],
    ids=["seed missing", "seed missing there", "twice", "no scheme", "no rate", "no rows"],
)
def test_rows_that_cannot_be_paired_are_refused(rows, one, words):
    with pytest.raises(LawaError, match=words) as caught:
        compare(rows, one, {"scheme": "run", "lr": 1e-2}, **{"step": 400, "lr": 1e-2})
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_one_per_seed_are_refused():
    """Where a rate is left open, a seed has a row for each."""
    with pytest.raises(LawaError, match="one row per seed"):
        compare(sweep(), "lawa", "run", step=400)


# ---- Many differences ----------------------------------------------------------------------------


def test_the_least_clear_reaches_lowest():
    sharp, vague, against = between(0.01, 0.02), between(0.001, 0.2), between(-0.03, 0.5)
    assert least_clear([sharp, vague]) is vague
    assert least_clear(iter([sharp, against, vague])) is against
    assert least_clear([sharp]) is sharp
    assert least_clear([sharp, difference([0.5])]).outcome == "cannot tell"


def test_every_size_holds_only_if_each_does():
    rng = np.random.default_rng(5)
    for _ in range(200):
        found = [difference(rng.normal(0.01, 0.01, 3), margin=0) for _ in range(3)]
        every = all(one.outcome == "holds" for one in found)
        assert (least_clear(found).outcome == "holds") == every


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02] and holm([]) == []
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])


def test_holm_keeps_the_order_and_never_helps():
    rng = np.random.default_rng(6)
    for n in (2, 6, 20):
        ps = rng.uniform(0, 1, n) ** 3
        adjusted = np.array(holm(ps))
        assert (np.diff(adjusted[np.argsort(ps)]) >= 0).all()
        assert (adjusted >= ps).all() and (adjusted <= np.minimum(1, n * ps)).all()
        order = rng.permutation(n)
        assert holm(ps[order]) == pytest.approx(adjusted[order].tolist())


def test_chosen_elsewhere_is_the_slow_choice():
    values = np.random.default_rng(7).normal(size=(4, 5))
    for seed, chosen in enumerate(chosen_elsewhere(values)):
        others = [other for other in range(5) if other != seed]
        means = [sum(line[other] for other in others) / 4 for line in values]
        assert chosen == means.index(max(means))


def test_no_seed_chooses_for_itself():
    """Candidate 0 is best only for seed 2, by so much that it has the best mean: the other seeds
    take it, seed 2 itself does not."""
    assert chosen_elsewhere([[0.0, 0.0, 9.0], [1.0, 1.0, 1.0]]) == [0, 0, 1]
    assert chosen_elsewhere([[0.1], [0.2]]) == [1]  # a single seed does


def test_a_candidate_that_does_not_exist_is_not_chosen():
    nothing = [math.nan] * 3
    assert chosen_elsewhere([nothing, [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]]) == [1, 1, 1]
    assert chosen_elsewhere([[math.nan], [0.2]]) == [1]


# ---- For a record --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        difference(np.array([0.1, 0.2, 0.3])),
        difference(np.float32([0.1, 0.2])),
        difference([1, 2, 3], margin=1, unit="steps"),
        difference([0.25, 0.25]),
        difference([0, 0]),
        compare(sweep(), "lawa", "run", lr=1e-2, step=400),
        compare(sweep(seeds=(0,)), "lawa", "run", lr=1e-2, step=400),
    ],
    ids=["seeds", "float32", "steps", "equal", "zero", "rows", "blocks"],
)
def test_a_difference_is_plain_json(found):
    """Numbers of Python, so that a record can hold them."""
    for value in (found.mean, found.low, found.high, found.p):
        assert type(value) is float
    assert type(found.n) is int
    kept = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert (kept["mean"], kept["n"]) == (found.mean, found.n)
    assert [tuple(pair) for pair in kept["pairs"]] == list(found.pairs)
    assert all(type(value) is float for value in holm([found.p, 0.5]))
    assert all(type(chosen) is int for chosen in chosen_elsewhere([[0.1, 0.2], [0.3, 0.1]]))


# ---- How often the rule errs: simulated ----------------------------------------------------------

DRAWS = 40_000
SEEDS = (3, 5, 10)
ALLOWED = 5 * math.sqrt(0.05 * 0.95 / DRAWS)  # five standard errors of a rate of 5%


def drawn(n, mean=0.0, sd=1.0):
    """(DRAWS, n) differences, the same for every call: no luck decides a test."""
    return np.random.default_rng(n).normal(mean, sd, (DRAWS, n))


def intervals(values):
    """Ends of the 90% interval of every row."""
    n = values.shape[1]
    half = stats.t.ppf(0.95, n - 1) * values.std(1, ddof=1) / math.sqrt(n)
    mean = values.mean(1)
    return mean - half, mean + half


def rates(values, margin=MARGIN):
    """{outcome: how often}, by the words of the module's docstring."""
    low, high = intervals(values)
    alike = (low >= -margin) & (high <= margin)
    return {
        "no difference": alike.mean(),
        "holds": ((low > 0) & ~alike).mean(),
        "opposite": ((high < 0) & ~alike).mean()}


def former_rule(values):
    """How often all seeds agree and the mean exceeds their standard deviation."""
    agree = (values > 0).all(1)
    return (agree & (values.mean(1) > values.std(1, ddof=1))).mean()


@pytest.mark.parametrize("n", SEEDS)
def test_the_simulated_rule_is_the_rule(n):
    """What the simulations below count is what `difference` says."""
    counted = dict.fromkeys(OUTCOMES, 0)
    for sd, mean in ((0.1, 0), (0.004, 0.004), (0.001, 0), (0.01, 0.01), (0.01, -0.01)):
        values = drawn(n, mean, sd)[:60]
        outcomes = [difference(one).outcome for one in values]
        for outcome, rate in rates(values).items():
            assert outcomes.count(outcome) == round(60 * rate), (sd, outcome)
        for outcome in outcomes:
            counted[outcome] += 1
    assert min(counted.values()) > 0


@pytest.mark.parametrize("n", SEEDS)
@pytest.mark.parametrize("sd", [0.003, 0.01, 1.0])
def test_what_is_not_there_is_seldom_found(n, sd):
    found = rates(drawn(n, 0, sd))
    assert found["holds"] <= 0.05 + ALLOWED and found["opposite"] <= 0.05 + ALLOWED
    if sd == 1.0:  # nothing lies within the margin: the 5% are used, none given away
        assert min(found["holds"], found["opposite"]) >= 0.05 - ALLOWED


@pytest.mark.parametrize("n", SEEDS)
def test_the_interval_covers_the_truth_in_ninety_percent(n):
    low, high = intervals(drawn(n, 0.7, 2.0))
    covered = ((low <= 0.7) & (high >= 0.7)).mean()
    assert covered == pytest.approx(LEVEL, abs=5 * math.sqrt(0.09 / DRAWS))


def test_power_grows_with_seeds_and_that_of_the_former_rule_fell():
    """A true difference of one standard deviation."""
    now = [rates(drawn(n, 1.0))["holds"] for n in SEEDS]
    before = [former_rule(drawn(n, 1.0)) for n in SEEDS]
    assert now[0] < now[1] < now[2] and before[0] > before[1] > before[2]
    # exact: from the noncentral t
    exact = [stats.nct.sf(stats.t.ppf(0.95, n - 1), n - 1, math.sqrt(n)) for n in SEEDS]
    assert now == pytest.approx(exact, abs=0.02)
    assert now[2] > 0.85 and before[2] < 0.25


def test_the_former_rule_found_what_is_not_there_too_often():
    assert former_rule(drawn(3)) == pytest.approx(0.104, abs=0.01)


@pytest.mark.parametrize("n", SEEDS)
def test_no_difference_is_said_where_there_is_none(n):
    """If seeds differ by a fifth of the margin; if by twice the margin, it is not said."""
    assert rates(drawn(n, 0, MARGIN / 5))["no difference"] > 0.9
    assert rates(drawn(n, 0, MARGIN * 2))["no difference"] < 0.5


@pytest.mark.parametrize("n", SEEDS)
@pytest.mark.parametrize("sd", [0.001, 0.003, 0.01])
def test_a_difference_of_the_margin_is_seldom_called_none(n, sd):
    assert rates(drawn(n, MARGIN, sd))["no difference"] <= 0.05 + ALLOWED


def test_holm_errs_in_at_most_five_percent_of_the_families():
    """Six claims, none of which is true, judged together: any "found" is an error."""
    trials = 4000
    ps = np.random.default_rng(8).uniform(0, 1, (trials, 6))
    wrong = sum(min(holm(family)) <= 0.05 for family in ps)
    assert wrong / trials <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / trials)
