"""What the notebooks' figures and claims are computed with, and what is kept of them."""

import argparse
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import model
from lab import Lab, compare, difference, grid, nearest, numbers
from lawa_core import LawaError, lawa
from model import ROOT

ROWS = [
    {"lr": lr, "seed": seed, "scheme": scheme, "loss": lr * 10 + seed + (scheme == "lawa") / 2}
    for seed in (1, 0)
    for lr in (2, 1)
    for scheme in ("run", "lawa")
]


def settings(**changes):
    """A notebook's globals after its parameters cell."""
    kinds = {
        "scale": str, "lrs": str, "lr": float, "seeds": str, "k": int, "spacing": int,
        "max_iters": int, "corpus": str, "disk_budget": float, "force": bool, "out": str}
    given = dict.fromkeys(kinds) | {"scale": "smoke"} | changes
    return {"__annotations__": kinds} | given


def a_lab(name="some", **changes):
    return Lab(name, "What?", settings(**changes))


# ---- Rows and numbers ----------------------------------------------------------------------------


def test_grid_does_not_depend_on_the_order_of_rows():
    assert grid(ROWS, "loss", lr=[1, 2], seed=[0, 1], scheme="run").tolist() == [[10, 11], [20, 21]]
    assert grid(ROWS, "loss", scheme=["run", "lawa"], seed=1, lr=[2]).tolist() == [[21], [21.5]]


def test_grid_leaves_nan_where_there_is_no_row():
    assert np.isnan(grid(ROWS, "loss", lr=[1, 3], seed=0, scheme="run")).tolist() == [False, True]


def test_nearest_is_the_first_of_two_that_are_as_near():
    assert [nearest([10, 20, 30], wanted) for wanted in (-5, 14, 15, 16, 99)] == [0, 0, 0, 1, 2]


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


# ---- Settings ------------------------------------------------------------------------------------


def test_every_bad_parameter_is_named_at_once():
    with pytest.raises(LawaError) as caught:
        Lab("some", "What?", settings(scale="huge", lr=True) | {"rate": 1.0})
    for word in ("'rate'", "scale, lrs, lr, seeds", "lr must be a number, got True", "'huge'"):
        assert word in str(caught.value)


def test_the_first_line_says_the_scale_and_that_smoke_is_a_check(capsys):
    a_lab()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("scale smoke:") and "check" in first and "-p scale laptop" in first
    a_lab(scale="laptop")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("scale laptop:") and "check" not in first
    assert "10,000 steps" in first and "[0, 1, 2, 3, 4]" in first


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpt2-small"])
def test_a_lab_has_the_scales_values(scale):
    corpus = "stdlib" if scale == "gpt2-small" else None  # openwebtext is not prepared here
    lab = a_lab(scale=scale, corpus=corpus)
    values = model.SCALES[scale]
    assert lab.rates == [float(rate) for rate in values["lrs"].split(",")]
    assert (lab.k, lab.spacing, lab.wide) == (values["k"], values["spacing"], values["wide"])
    assert lab.seeds == [int(seed) for seed in values["seeds"].split(",")]
    assert lab.lr in lab.rates and lab.config.lr == lab.lr
    expected = model.scale_config(model.scale_values(scale), lr=lab.lr)
    assert lab.config == dataclasses.replace(expected, corpus="stdlib")


def test_the_rate_between():
    assert a_lab(scale="laptop").lr == 3e-3
    assert a_lab(lrs="3,1,2").rates == [1, 2, 3] and a_lab(lrs="3,1,2").lr == 2
    assert a_lab(lrs="4e-3").lr == 4e-3


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 6e-3},
        {"lr": "6e-3"},
        {"lr": 6e-4 * 10},  # 0.005999999999999999
        {"lrs": "6e-3"},
        {"lrs": ".006"},
        {"lrs": [0.006]},
        {"lrs": "6e-3,6e-4"},
        {"lrs": "6e-4", "lr": 6e-3},
    ],
    ids=str,
)
def test_a_rate_means_what_is_typed(given, tmp_path):
    """Exactly 0.006, and the run that `model.py train --lr 6e-3` trains."""
    namespace = settings(**given)
    if isinstance(given.get("lr"), str):
        namespace["__annotations__"]["lr"] = str
    lab = Lab("some", "What?", namespace)
    assert lab.rates[-1] == 0.006
    parser = argparse.ArgumentParser()
    model.add_config_flags(parser)
    typed = model.take_config(vars(parser.parse_args(["--scale", "smoke", "--lr", "6e-3"])))
    assert typed.lr == 0.006
    (ours,) = [config for config in lab.configs() if (config.lr, config.seed) == (0.006, 0)]
    assert model.run_dir(ours, tmp_path) == model.run_dir(typed, tmp_path)


def test_one_rate_alone_is_one_rate():
    """`-p lr 6e-4`, as a user types it: not a sweep of multiples of it."""
    lab = a_lab(lr=6e-4)
    assert lab.rates == [6e-4] and lab.lr == 6e-4
    assert {config.lr for config in lab.configs()} == {6e-4}


def test_configs_are_every_rate_and_seed():
    lab = a_lab()
    configs = lab.configs()
    assert [(c.lr, c.seed) for c in configs] == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    assert len({model.run_dir(config) for config in configs}) == 4
    held = lab.configs([0.5], hold_frac=0.75, averages="")
    assert [(c.lr, c.seed, c.hold_frac, c.averages) for c in held] == [
        (0.5, 0, 0.75, ""), (0.5, 1, 0.75, "")]
    assert a_lab(max_iters=120, seeds="4").configs()[0] == dataclasses.replace(
        configs[0], max_iters=120, seed=4)


# ---- Steps ---------------------------------------------------------------------------------------

LABS = {
    "smoke": {},
    "laptop": {"scale": "laptop"},
    "gpt2-small": {"scale": "gpt2-small", "corpus": "stdlib"},
    "gpt2-medium": {"scale": "gpt2-medium", "corpus": "stdlib"},
    "odd": {"max_iters": 137},
}


@pytest.mark.parametrize("given", LABS.values(), ids=LABS)
def test_points_and_shares_are_checkpoints_with_averages(given):
    """Steps at which the run and all averages kept while training have files."""
    lab = a_lab(**given)
    config = lab.config
    steps = [*lab.points(20), *lab.at.values(), lab.end]
    assert set(steps) <= set(config.checkpoint_steps)
    apart = config.averages_interval or config.ckpt_interval
    assert {step % apart for step in steps} == {0}
    assert lab.points(20) == sorted(set(lab.points(20)))
    assert {*lab.at.values(), lab.end} <= set(lab.points(20))
    # as near as such a step can be
    for share, step in lab.at.items():
        assert abs(step - share * config.max_iters) <= apart / 2
    assert config.max_iters - apart < lab.end <= config.max_iters


def test_points_of_the_laptop():
    lab = a_lab(scale="laptop")
    assert lab.at == {0.1: 1000, 0.2: 2000, 0.4: 4000, 0.6: 6000, 0.77: 7700}
    assert lab.end == 10_000
    assert lab.points(4) == [1000, 2000, 2500, 4000, 5000, 6000, 7500, 7700, 10_000]
    assert set(lab.points(20)) == {*range(500, 10_001, 500), 7700}


def test_points_of_another_configuration():
    lab = a_lab(scale="laptop")
    short = dataclasses.replace(
        lab.config, max_iters=2000, warmup_iters=60, ckpt_interval=5, averages_interval=20)
    assert lab.step(0.4, short) == 800 and lab.step(1, short) == 2000
    assert set(lab.points(4, short)) == {200, 400, 500, 800, 1000, 1200, 1500, 1540, 2000}
    alone = dataclasses.replace(short, averages="", averages_interval=0)
    assert lab.step(0.333, alone) == 665


def test_the_middle_of_a_window():
    lab = a_lab(scale="laptop")  # checkpoints every 25 steps, k = 5
    assert lab.middle(4000) == 3950
    assert lab.middle(4000, spacing=100) == 3800
    assert lab.middle(4000, k=3) == 3975
    assert lab.middle(4000, k=1) == 4000
    # the steps of a window and its middle have the same mean
    for k, spacing in ((5, 25), (3, 50), (9, 100)):
        window = [4000 - i * spacing for i in range(k)]
        assert lab.middle(4000, k, spacing) == sum(window) / k
    assert lab.middle(4000, k=4) in (3950, 3975)  # 3962.5 lies between two checkpoints


@pytest.mark.parametrize("given", [{"spacing": 15}, {"k": 0}, {"spacing": 0}])
def test_windows_that_are_none(given):
    with pytest.raises(LawaError, match=next(iter(given))):
        a_lab(**given)


# ---- Results folder ------------------------------------------------------------------------------


def test_results_go_beside_the_code_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, folder in (
        (None, ROOT / "results" / "scale-smoke"),
        (str(tmp_path / "x y"), tmp_path / "x y"),
    ):
        assert a_lab(out=given).folder == folder / "some"


def write_notebook(folder, name, code):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": code}
    (folder / "notebooks").mkdir(exist_ok=True)
    text = json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": "#"}, cell]})
    (folder / "notebooks" / f"{name}.ipynb").write_text(text)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder that the lab takes for the project's, with one notebook."""
    write_notebook(tmp_path, "sweep", """
scale: str = "smoke"  # size
lrs: str = None  # rates
lr: float = None  # one rate
seeds: str = "0,1"  # seeds
out: str = None  # results
""")
    monkeypatch.setattr(model, "ROOT", tmp_path)
    return tmp_path


def test_the_results_folder_is_named_by_what_was_changed(house):
    def folder(**given):
        return a_lab("sweep", **{"seeds": "0,1"} | given).folder.relative_to(house).as_posix()

    assert folder() == "results/scale-smoke/sweep"
    assert folder(scale="laptop") == "results/scale-laptop/sweep"
    assert folder(lr=6e-4) == "results/scale-smoke/sweep-lr=0.0006"
    assert folder(lrs="6e-4,6e-3") == "results/scale-smoke/sweep-lrs=6e-4,6e-3"
    assert folder(seeds="0") == "results/scale-smoke/sweep-seeds=0"
    assert folder(seeds="0", lr=6e-4) == "results/scale-smoke/sweep-lr=0.0006-seeds=0"
    assert folder(out=str(house / "there")) == "there/sweep"


@pytest.mark.parametrize("corpus", ["a/b", "../up", "x y", "a\\b", "é"])
def test_a_results_folder_is_one_folder(corpus, house, monkeypatch):
    """Whatever a parameter holds, results stay in one folder beside the others."""
    monkeypatch.setattr(model, "open_corpus", lambda name: None)
    lab = a_lab("sweep", corpus=corpus, seeds="0,1")
    assert lab.folder.parent == house / "results" / "scale-smoke"
    assert lab.folder.name.startswith("sweep-corpus=") and ".." not in lab.folder.parts


def test_different_parameters_never_share_a_folder(house):
    given = [{}, {"lr": 6e-4}, {"lrs": "6e-4"}, {"lrs": "6e-4,6e-3"}, {"seeds": "1"}, {"k": 2}]
    folders = [a_lab("sweep", **{"seeds": "0,1"} | one).folder for one in given]
    assert len(set(folders)) == len(folders)


# ---- Claims --------------------------------------------------------------------------------------

ABOUT = {"at": "lr 1e-2, 40%", "published": "+0.12", "source": "[P] figure 2", "figure": "gain"}


def kept(lab):
    """The claims as the record has them: strict JSON, without NaN and infinity."""
    lab.record([{"step": 1, "loss": 0.5}])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = (lab.folder / "record.json").read_text()
    return json.loads(text, parse_constant=refuse)["claims"]


OUTCOMES = {
    "holds": [0.1, 0.11, 0.12],
    "opposite": [-0.1, -0.11, -0.12],
    "no difference": [0.001, 0.0, -0.001],
    "cannot tell": [0.1, -0.1, 0.2],
}


def laptop(tmp_path, **more):
    return a_lab(scale="laptop", out=str(tmp_path), **more)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_claim_is_said_and_kept(outcome, tmp_path, capsys):
    lab = laptop(tmp_path)
    capsys.readouterr()
    found = difference(OUTCOMES[outcome], pairs=[(0, 3.9, 4.0), (1, 3.8, 3.9), (2, 3.7, 3.8)])
    assert lab.claim("LAWA gains", found, **ABOUT) == outcome
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"LAWA gains: {outcome.upper()}"
    for words in ("lr 1e-2, 40%", str(found), "the paper", "+0.12 [P] figure 2"):
        assert words in out
    assert "later work" not in out and "note" not in out
    (claim,) = kept(lab)
    expected = {
        "claim": "LAWA gains", "outcome": outcome, "at": "lr 1e-2, 40%", "published": "+0.12",
        "source": "[P] figure 2", "later": False, "primary": "", "value": None, "note": "",
        "figure": "gain.png", "mean": found.mean, "low": found.low, "high": found.high,
        "p": found.p, "n": 3, "over": "seeds", "margin": 0.005, "unit": "nats",
        "pairs": [[0, 3.9, 4.0], [1, 3.8, 3.9], [2, 3.7, 3.8]]}
    assert claim == expected


def test_a_claim_of_later_work_is_not_the_papers(tmp_path, capsys):
    lab = laptop(tmp_path)
    capsys.readouterr()
    lab.claim("So it is", difference([1, 2]), later=True, **ABOUT)
    out = capsys.readouterr().out
    assert "later work" in out and "the paper" not in out.lower()
    assert kept(lab)[0]["later"] is True


def test_a_primary_claim_with_its_published_value(tmp_path):
    lab = laptop(tmp_path)
    lab.claim("LAWA gains early", difference([1, 2]), primary="early", value=0.12, **ABOUT)
    (claim,) = kept(lab)
    assert (claim["primary"], claim["value"]) == ("early", 0.12)


def test_a_gain_in_its_two_parts(tmp_path, capsys):
    lab = laptop(tmp_path)
    capsys.readouterr()
    noise, lag = difference([0.2, 0.22]), difference([0.05, 0.07])
    lab.claim("LAWA gains", difference([0.15, 0.15]), split=(noise, lag), **ABOUT)
    out = capsys.readouterr().out
    assert "noise removed +0.210" in out and "lag +0.060" in out
    (claim,) = kept(lab)
    assert (claim["noise_removed"], claim["lag"]) == pytest.approx((0.21, 0.06))
    assert claim["mean"] == pytest.approx(claim["noise_removed"] - claim["lag"])


def test_what_is_not_tested_here(tmp_path, capsys):
    lab = laptop(tmp_path)
    capsys.readouterr()
    assert lab.claim("Pythia gains", None, note="a stand-in", **ABOUT) == "not tested here"
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "Pythia gains: NOT TESTED HERE" and "a stand-in" in out
    (claim,) = kept(lab)
    assert (claim["outcome"], claim["note"]) == ("not tested here", "a stand-in")
    assert not {"mean", "low", "p"} & claim.keys()


@pytest.mark.parametrize("values", [[0.5], [0.1, math.nan]], ids=["one seed", "diverged"])
def test_a_claim_without_interval_is_kept_as_json(values, tmp_path):
    lab = laptop(tmp_path)
    pairs = [(seed, value, 4.0) for seed, value in enumerate(values)]
    assert lab.claim("LAWA gains", difference(values, pairs=pairs), **ABOUT) == "cannot tell"
    (claim,) = kept(lab)
    assert claim["low"] is None and claim["high"] is None


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_smoke_checks_and_judges_nothing(outcome, tmp_path, capsys):
    lab = a_lab(out=str(tmp_path))
    capsys.readouterr()
    assert lab.claim("LAWA gains", difference(OUTCOMES[outcome]), **ABOUT) == "check"
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "check: LAWA gains"
    assert not any(word in out for word in ("HOLDS", "OPPOSITE", "NO DIFFERENCE", "CANNOT TELL"))
    assert kept(lab)[0]["outcome"] == "check"
    assert lab.claim("Pythia gains", None, note="a stand-in", **ABOUT) == "check"


def test_a_table_is_printed_and_kept_with_a_csv(tmp_path, capsys):
    lab = a_lab(out=str(tmp_path))
    capsys.readouterr()
    rows = [
        {"model": "a", "step": 143_000, "accuracy": 0.57555, "gain": np.float32(-0.25)},
        {"model": "b-c", "step": np.int64(9), "accuracy": 0.5, "gain": None}]
    assert lab.table("tasks", "Accuracy", rows, "Higher is better.") is None
    assert capsys.readouterr().out == """Accuracy
model     step  accuracy   gain
a      143,000    0.5756  −0.25
b-c          9    0.5000      —
"""
    with open(lab.folder / "tasks.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["model", "step", "accuracy", "gain"], ["a", "143000", "0.57555", "-0.25"],
            ["b-c", "9", "0.5", ""]]
    kept(lab)
    (found,) = json.loads((lab.folder / "record.json").read_text())["tables"]
    assert found == {
        "file": "tasks.csv", "title": "Accuracy", "caption": "Higher is better.",
        "columns": ["model", "step", "accuracy", "gain"],
        "rows": [["a", "143,000", "0.5756", "−0.25"], ["b-c", "9", "0.5000", "—"]]}


@pytest.mark.parametrize(
    "values, shown",
    [
        ([3.14149, 10.0], ["3.1415", "10.0000"]),
        ([2.0, 1e-3, 0.0], ["2.000", "0.001", "0.000"]),  # what the column needs
        ([1234.5, 0.00002], ["1,234.5", "2e−05"]),
        ([math.nan, None, -math.inf, 2], ["—", "—", "−inf", "2"]),
        ([-1234, True, "a-b", ""], ["−1,234", "True", "a-b", ""]),
    ],
    ids=str,
)
def test_how_a_column_is_shown(values, shown, tmp_path):
    lab = a_lab(out=str(tmp_path))
    lab.table("some", "Some", [{"x": value} for value in values], "All.")
    assert [text for text, in lab.tables[0]["rows"]] == shown


def test_a_record_holds_what_the_page_needs(tmp_path):
    lab = a_lab(lr=2e-3, out=str(tmp_path))
    losses = np.array([0.4, 0.6])
    row = {"step": 1, "loss": 0.5, "losses": losses, "gains": losses}
    lab.record([row, row | {"step": 2, "more": 3}])
    record = json.loads((tmp_path / "some" / "record.json").read_text())
    command = "papermill notebooks/some.ipynb out.ipynb -p scale smoke -p lr 0.002"
    assert record["command"] == command
    assert record["params"]["lr"] == 0.002 and "out" not in record["params"]
    assert (record["scale"], record["question"], record["claims"]) == ("smoke", "What?", [])
    assert record["tables"] == []
    with open(tmp_path / "some" / record["rows"], newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["1", "0.5"], ["2", "0.5"]]


# ---- From training to a claim --------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs go to a folder of the test, and are trained in this process."""
    monkeypatch.setattr(model, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def test_from_training_to_a_claim(runs, tmp_path):
    """Two seeds are paired by seed, one by block; what is evaluated once is not again."""
    lab = a_lab(lr=3e-3, max_iters=40, out=str(tmp_path / "results"))
    configs = [dataclasses.replace(config, averages="ema(0.5)") for config in lab.configs()]
    for config in configs:
        model.train(config, threads=1)
    schemes = {"lawa": lawa(2, 10), "ema": "ema(0.5)"}
    rows = lab.evaluate(configs, schemes, [30, 40])
    assert [(row["lr"], row["seed"], row["step"], row["scheme"]) for row in rows] == [
        (3e-3, seed, step, scheme)
        for seed in (0, 1) for step in (30, 40) for scheme in ("run", "lawa", "ema")]
    found = compare(rows, "lawa", "ema", step=40)
    table = grid(rows, "loss", scheme=["ema", "lawa"], seed=[0, 1], step=40)
    assert found.mean == pytest.approx((table[0] - table[1]).mean()) and found.n == 2
    alone = [row for row in rows if row["seed"] == 1]
    found = compare(alone, "lawa", "ema", step=40)
    assert (found.over, found.n) == ("blocks", lab.values["n_blocks"])
    assert found.mean == pytest.approx(table[0, 1] - table[1, 1])
    gain = compare(alone, "lawa", "run", column="gain", step=40)
    assert gain.mean == pytest.approx(grid(alone, "gain", scheme="lawa", step=[40])[0])
    # the same by functions of the configuration, from files alone
    for run in runs.iterdir():
        for path in run.rglob("*.safetensors"):
            path.write_bytes(b"")
    again = lab.evaluate(configs, lambda config: schemes, lambda config: [30, 40])
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    lab.claim("LAWA gains", found, **ABOUT)
    assert len(kept(lab)[0]["pairs"]) == lab.values["n_blocks"]


@pytest.fixture
def asked(runs, monkeypatch):
    """What the lab asks `train_all` for, which trains nothing."""
    found = []
    monkeypatch.setattr(
        "lab.runs.train_all", lambda configs, **options: found.append(options) or [])
    return found


def test_states_of_the_branches_are_kept(asked):
    """Half and three quarters of the run, beside those that are asked for."""
    lab = a_lab()
    lab.train(lab.configs(), state_at=[40])
    lab.train(lab.configs(), resume_from=["there"] * 4)
    assert [one["state_at"] for one in asked] == [[40, 100, 150], [100, 150]]
    assert asked[1]["resume_from"] == ["there"] * 4


def test_the_cost_is_told_before_training(asked, capsys):
    lab = a_lab()
    capsys.readouterr()
    lab.train(lab.configs())
    assert "4 runs" in capsys.readouterr().out
    for config in lab.configs():
        folder = model.run_dir(config)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
    lab.train(lab.configs())
    assert capsys.readouterr().out == ""


def test_too_little_disk_stops_before_training_unless_forced(asked, monkeypatch):
    monkeypatch.setattr("lab.plan.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    lab = a_lab()
    with pytest.raises(LawaError, match=r"disk.*force") as caught:
        lab.train(lab.configs())
    assert "\n" not in str(caught.value) and asked == []
    forced = a_lab(force=True)
    forced.train(forced.configs())
    assert len(asked) == 1
    for config in lab.configs():
        folder = model.run_dir(config)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("{}")
    lab.train(lab.configs())  # nothing is to be written
    assert len(asked) == 2


def test_too_little_memory_stops_before_training_unless_forced(asked, monkeypatch):
    monkeypatch.setattr("lab.plan._memory", lambda *_: 1000)
    lab = a_lab()
    with pytest.raises(LawaError, match=r"memory.*force"):
        lab.train(lab.configs())
    forced = a_lab(force=True)
    forced.train(forced.configs())
    assert len(asked) == 1


def test_without_a_disk_budget_every_checkpoint_is_kept(asked):
    lab = a_lab()
    lab.train(lab.configs())
    assert {"keep", "disk_budget"} & asked[0].keys() == set()


@pytest.mark.parametrize("gigabytes", [0.0, 0.1, 5.0])
def test_a_disk_budget_keeps_what_the_windows_need(gigabytes, asked):
    """0: as little as that; more: as many others as fit."""
    lab = a_lab(disk_budget=gigabytes)
    lab.train(lab.configs(), schemes={"wider": lawa(3, 40), "kept": "ema(0.9)"}, at=[130])
    size, keep = asked[0]["disk_budget"], asked[0]["keep"]
    vocab_size = model.open_corpus(lab.config.corpus).vocab_size
    steps = model.kept_steps(lab.config, vocab_size, keep, size)
    assert size == gigabytes * 1e9 or gigabytes == 0
    assert model.disk_bytes(lab.config, vocab_size, steps) <= size
    needed = {130, 90, 50}
    for point in lab.points(20):
        for spacing in (lab.spacing, lab.wide):
            window = {point - i * spacing for i in range(lab.k)}
            if min(window) > 0:
                needed |= window | {lab.middle(point, spacing=spacing)}
    assert needed <= steps
