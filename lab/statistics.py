"""Is a difference there? One rule for every claim of the lab.

A claim is a paired difference that is positive if the claim is true: over seeds, or, where there is
one seed only, over blocks of validation text. Its 90% t-interval gives one of four outcomes:

    no difference   the interval lies within the margin on both sides of zero
    holds           it lies above zero
    opposite        it lies below zero
    cannot tell     anything else; the interval's width says what it would take

A difference that is not there is called "holds" in at most 5% of the cases, whatever the number of
seeds, and power grows with them; tests/test_statistics.py simulates both. The paper's primary
claims are judged together, by Holm's method (Scandinavian Journal of Statistics 6, 1979).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lawa_core import LawaError

LEVEL = 0.9  # of the intervals: 5% on either side
MARGIN = 0.005  # nats: how precisely values were read off the paper's plots
OUTCOMES = ("holds", "opposite", "no difference", "cannot tell")


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its interval; positive speaks for the claim."""
    mean: float
    low: float
    high: float
    p: float  # two-sided, of no difference
    n: int  # pairs: seeds, or blocks of text
    over: str  # "seeds" or "blocks"
    margin: float
    unit: str
    # (seed or block, what the claim favours, what it is compared with) of every pair
    pairs: tuple = field(default=(), repr=False)

    @property
    def outcome(self) -> str:
        if -self.margin <= self.low and self.high <= self.margin:
            return "no difference"
        if self.low > 0:
            return "holds"
        return "opposite" if self.high < 0 else "cannot tell"

    def __str__(self) -> str:
        """+0.041 [+0.035, +0.047] nats (90% interval, 5 seeds)"""
        digits = 3 if self.unit == "nats" else 1
        ends = f"{self.low:+.{digits}f}, {self.high:+.{digits}f}"
        if not math.isfinite(self.low):
            ends = "no interval"
        over = self.over if self.n > 1 else self.over.removesuffix("s")
        return (f"{self.mean:+.{digits}f} [{ends}] {self.unit} "
                f"({LEVEL:.0%} interval, {self.n} {over})")


def difference(values, *, margin: float = MARGIN, unit: str = "nats", over: str = "seeds",
               pairs=()) -> Difference:
    """The interval of paired differences, positive where they speak for the claim.

    values: (n,); with one value, or one that is not finite, there is no interval, and the outcome
    is "cannot tell".
    """
    from scipy.special import stdtr, stdtrit  # Student's t: its distribution and its quantiles
    values = np.asarray(values, float)
    n = len(values)
    if not n:
        raise LawaError("expected at least one paired difference, got none")
    low, high, p = -math.inf, math.inf, 1.0
    if not np.isfinite(values).all():
        return Difference(math.nan, low, high, p, n, over, margin, unit, tuple(pairs))
    mean = float(values.mean())
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    if error == 0:
        low, high, p = mean, mean, float(mean == 0)
    elif n > 1:
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * error)
        low, high = mean - half, mean + half
        p = float(2 * stdtr(n - 1, -abs(mean) / error))
    return Difference(mean, low, high, p, n, over, margin, unit, tuple(pairs))


def compare(rows: list[dict], one, other, *, column: str = "loss", margin: float = MARGIN,
            **where) -> Difference:
    """By how much `one` is better than `other`: paired by seed, by block where there is one seed.

    Args: rows: of `Lab.evaluate`; one, other: what tells the two apart, such as {"scheme": "lawa",
    "lr": 1e-2}, or the label of a scheme alone; where: what they share, such as step=4000. A value
    that differs from seed to seed is {seed: value}, for what `chosen_elsewhere` chose.
    column: "loss", of which less is better, or "gain", of which more is.
    Errors: LawaError where the rows do not have the same seeds for both, each once.
    """
    sides = []
    for side in (one, other):
        wanted = where | (side if isinstance(side, dict) else {"scheme": side})
        chosen = [row for row in rows if _matches(row, wanted)]
        by_seed = {row["seed"]: row for row in chosen}
        if not chosen or len(by_seed) < len(chosen):
            raise LawaError(f"expected one row per seed for {wanted}, got {len(chosen)} of "
                            f"{len(by_seed)} seeds")
        sides.append(by_seed)
    ours, theirs = sides
    if set(ours) != set(theirs):
        raise LawaError(f"expected the same seeds on both sides of a comparison, got "
                        f"{sorted(ours)} for {one} and {sorted(theirs)} for {other}")
    if len(ours) > 1:
        pairs = [(seed, ours[seed][column], theirs[seed][column]) for seed in sorted(ours)]
        over = "seeds"
    else:
        (mine,), (its,) = ours.values(), theirs.values()
        blocks = {"loss": "losses", "gain": "gains"}[column]
        pairs = [(i, float(a), float(b))
                 for i, (a, b) in enumerate(zip(mine[blocks], its[blocks], strict=True))]
        over = "blocks"
    sign = {"loss": -1, "gain": 1}[column]
    values = [sign * (a - b) for _, a, b in pairs]
    return difference(values, margin=margin, over=over, pairs=pairs)


def _matches(row: dict, wanted: dict) -> bool:
    for name, value in wanted.items():
        if isinstance(value, dict):
            value = value.get(row["seed"])
        if row[name] != value:
            return False
    return True


def least_clear(differences) -> Difference:
    """Of differences that must all be there, the one whose interval reaches lowest.

    It is above zero only if all are, so that "at every size" holds without a correction for their
    number; "opposite", which one of them suffices for, is that many times as likely by chance.
    """
    return min(differences, key=lambda found: found.low)


def pm(values, digits: int = 3) -> str:
    """"+0.041 ± 0.006": the mean of a few differences and half of its 90% interval."""
    found = difference(values)
    half = (found.high - found.low) / 2
    spread = f" ± {half:.{digits}f}" if math.isfinite(half) else " (one seed)"
    return f"{found.mean:+.{digits}f}{spread}"


def chosen_elsewhere(values) -> list[int]:
    """For each seed the candidate that is best on the mean of the *other* seeds.

    So no run chooses for itself; only a single seed does. values: (candidates, seeds), higher is
    better, nan where a candidate does not exist.
    """
    values = np.asarray(values, float)
    n = values.shape[1]
    chosen = []
    for seed in range(n):
        others = np.delete(values, seed, axis=1) if n > 1 else values
        there = np.where(np.isnan(values[:, seed]), np.nan, others.mean(1))
        chosen.append(int(np.nanargmax(there)))
    return chosen


def steps_later(steps, loss, averaged) -> tuple[np.ndarray, np.ndarray]:
    """How many steps after each point the run first has an average's loss, both at their best so
    far, and where that is only a lower bound.

    The run is read between points along a straight line. Where it never has the loss within the
    points, what is left of them counts.
    steps, loss, averaged: (points,) each, of one seed. Returns ((points,) steps, (points,) bool).
    """
    lowest = np.minimum.accumulate(loss)
    later = np.zeros(len(steps))
    bound = np.zeros(len(steps), bool)
    for i, level in enumerate(np.minimum.accumulate(averaged)):
        there = np.flatnonzero(lowest <= level)
        reached = steps[-1]
        if len(there):
            j = there[0]
            reached = steps[j]
            if j > 0:
                share = (lowest[j - 1] - level) / (lowest[j - 1] - lowest[j])
                reached = steps[j - 1] + share * (steps[j] - steps[j - 1])
        later[i], bound[i] = reached - steps[i], not len(there)
    return later, bound


def steps_saved(steps, loss, averaged) -> tuple[np.ndarray, np.ndarray]:
    """`steps_later` less the same for the run against itself, so that a run saves nothing over
    itself; and where that is only a lower bound."""
    later, bound = steps_later(steps, loss, averaged)
    return later - steps_later(steps, loss, loss)[0], bound


def holm(ps) -> list[float]:
    """The p-values of tests judged together, each adjusted by Holm's method."""
    ps = np.asarray(ps, float)
    adjusted = np.empty_like(ps)
    highest = 0.0
    for rank, i in enumerate(np.argsort(ps)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted.tolist()
