"""What the notebooks' figures and verdicts are computed with."""

import json
import math

import numpy as np
import pytest

from lab import Lab, beyond_spread, chosen_elsewhere, grid, in_favour, mean_se, numbers, pm
from lawa_core import LawaError
from model import ROOT

ROWS = [
    {"lr": lr, "seed": seed, "scheme": scheme, "loss": lr * 10 + seed + (scheme == "lawa") / 2}
    for seed in (1, 0)
    for lr in (2, 1)
    for scheme in ("run", "lawa")
]


def test_grid_does_not_depend_on_the_order_of_rows():
    assert grid(ROWS, "loss", lr=[1, 2], seed=[0, 1], scheme="run").tolist() == [[10, 11], [20, 21]]
    assert grid(ROWS, "loss", scheme=["run", "lawa"], seed=1, lr=[2]).tolist() == [[21], [21.5]]


def test_grid_leaves_nan_where_there_is_no_row():
    assert np.isnan(grid(ROWS, "loss", lr=[1, 3], seed=0, scheme="run")).tolist() == [False, True]


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([0.1, 0.2, 0.15], True),
        ([0.1, -0.2, 0.15], False),
        ([0.01, 0.5, 0.02], False),
        ([-0.1, -0.2], False),
        ([0.1], None),
    ],
)
def test_beyond_spread(differences, verdict):
    assert beyond_spread(differences) is verdict


def test_no_seed_chooses_for_itself():
    """Candidate 0 is best only for seed 2, by so much that it has the best mean: the other seeds
    take it, seed 2 itself does not."""
    assert chosen_elsewhere([[0.0, 0.0, 9.0], [1.0, 1.0, 1.0]]) == [0, 0, 1]
    assert chosen_elsewhere([[math.nan, 0.3], [0.2, 0.1]]) == [0, 1]
    assert chosen_elsewhere([[0.1], [0.2]]) == [1]


def test_results_go_beside_the_code_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, folder in (
        (None, ROOT / "results" / "scale-smoke"),
        (str(tmp_path / "x y"), tmp_path / "x y"),
    ):
        settings = {"__annotations__": {"scale": str, "out": str}, "scale": "smoke", "out": given}
        assert Lab("some", "Where to?", settings).folder == folder / "some"


def test_words():
    assert pm([0.04, 0.05, 0.06]) == "+0.050 ± 0.006" and pm([-0.5], 1) == "-0.5 (one seed)"
    assert in_favour([1, -1, 2]) == "2 of 3 seeds"
    assert mean_se([1, 3]) == (2, 1)


@pytest.mark.parametrize(
    "given, found",
    [("1,3,10", [1, 3, 10]), ("1 3", [1, 3]), (3, [3]), ([1, 2], [1, 2]), ("6e-4", [6e-4])],
)
def test_numbers(given, found):
    assert numbers("rates", given) == found


@pytest.mark.parametrize("given", ["", "a,b", "1,1", None, []])
def test_what_are_no_numbers(given):
    with pytest.raises(LawaError, match="rates"):
        numbers("rates", given)


def settings(**changes):
    """A notebook's globals after its parameters cell."""
    given = {"scale": "smoke", "lr": None, "out": None} | changes
    return {"__annotations__": {"scale": str, "lr": float, "out": str}} | given


def test_a_verdict_is_said_in_a_line_and_kept(tmp_path, capsys):
    lab = Lab("some", "What?", settings(out=str(tmp_path)))
    words = {"ours": "o", "evidence": "e", "paper": "p", "source": "[S] s", "n": 2, "figure": "f"}
    for holds in (True, False, None):
        lab.verdict("It is so", holds=holds, **words)
    said = ("holds", "does not hold", "undecided")
    assert capsys.readouterr().out.splitlines() == [
        f"It is so: {word} at scale smoke (e). Here: o. Paper: p." for word in said
    ]
    kept = {"claim": "It is so", "paper": "p", "paper_source": "[S] s", "ours": "o"}
    kept |= {"evidence": "e", "n": 2, "figure": "f.png"}
    assert lab.verdicts == [kept | {"holds": holds} for holds in (True, False, None)]


def test_every_bad_parameter_is_named_at_once():
    with pytest.raises(LawaError) as caught:
        Lab("some", "What?", settings(scale="huge", lr=True) | {"rate": 1.0})
    for word in ("'rate'", "scale, lr, out", "lr must be a number, got True", "'huge'"):
        assert word in str(caught.value)


def test_a_record_holds_what_the_page_needs(tmp_path):
    lab = Lab("some", "What?", settings(lr=2e-3, out=str(tmp_path)))
    lab.record([{"step": 1, "loss": 0.5}])
    record = json.loads((tmp_path / "some" / "record.json").read_text())
    assert (
        record["command"] == "papermill notebooks/some.ipynb out.ipynb -p scale smoke -p lr 0.002"
    )
    assert record["params"]["lr"] == 0.002 and "out" not in record["params"]
    assert (tmp_path / "some" / record["rows"]).read_text().splitlines() == ["step,loss", "1,0.5"]


def test_points_are_checkpoints_spread_over_the_run():
    lab = Lab("some", "Where?", settings())
    points = lab.points(4)
    assert points == [100, 200, 300, 400] and set(points) <= set(lab.config.checkpoint_steps)
