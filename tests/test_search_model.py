"""The model of a gain (noise, relaxation time, drift): its fit, and what search makes of it."""

import json
import math
import re
import shlex
import sys

import numpy as np
import pytest
import reference as ref
import torch

import lawa_core
from lawa_core import ema, fit_gains, lawa, predicted_gain, row

STEPS = list(range(25, 4001, 25))
TRUTH = (0.12, 60.0, 1e-4)  # nats, steps, nats per step


def windows_of(schemes, at=4000):
    return [row(scheme, STEPS, at) for scheme in schemes]


FIVES = windows_of([lawa(5, 25 * m) for m in (1, 2, 3, 4, 6, 8, 12, 16, 24)])


# ---- the model ----


@pytest.mark.parametrize("scheme", [lawa(2, 25), lawa(5, 100), lawa(12, 50), ema(0.8, start=3000)])
def test_predicted_gain_by_hand(scheme):
    """Sums written out, over pairs of checkpoints."""
    window = row(scheme, STEPS, 4000)
    left = lag = 0.0
    for i, a in window.items():
        lag += a * (4000 - i)
        for j, b in window.items():
            left += a * b * math.exp(-abs(i - j) / 60)
    assert predicted_gain(window, *TRUTH) == pytest.approx(0.12 * (1 - left) - 1e-4 * lag)


def test_predicted_gain_of_a_dense_mean():
    """Over W consecutive steps: E (1 - phi(W / tau)) - W |L'| / 2, the formula of a steady OU
    process, phi(x) = 2 (x - 1 + e^-x) / x^2."""
    width, (noise, tau, drift) = 600, TRUTH
    window = dict.fromkeys(range(width), 1 / width)
    x = width / tau
    phi = 2 * (x - 1 + math.exp(-x)) / x**2
    expected = noise * (1 - phi) - drift * width / 2
    assert predicted_gain(window, *TRUTH) == pytest.approx(expected, abs=2e-4)


def test_predicted_gain_is_what_an_average_of_noise_gains():
    """A quadratic loss, weights of one Ornstein-Uhlenbeck process per coordinate, no drift."""
    rng = np.random.default_rng(0)
    tau, keep = 60.0, math.exp(-25 / 60)
    weights = np.empty((4, 20_000))
    weights[0] = rng.standard_normal(20_000)
    for i in range(1, 4):
        weights[i] = keep * weights[i - 1] + math.sqrt(1 - keep**2) * rng.standard_normal(20_000)
    gain = (weights[-1] ** 2).mean() - (weights.mean(0) ** 2).mean()
    window = {25 * i: 0.25 for i in range(4)}
    assert predicted_gain(window, 1.0, tau, 0.0) == pytest.approx(gain, abs=0.03)


def test_newest_alone_gains_nothing():
    assert predicted_gain({100: 1.0}, *TRUTH) == 0


# ---- its fit ----


def test_fit_finds_what_is_there():
    gains = [predicted_gain(window, *TRUTH) for window in FIVES]
    noise, tau, drift = fit_gains(FIVES, gains)
    assert noise == pytest.approx(0.12, rel=0.05)
    assert tau == pytest.approx(60, rel=0.1)
    assert drift == pytest.approx(1e-4, rel=0.05)


def test_fit_of_noisy_gains_predicts_the_best_window():
    """Gains known to +-0.003 nats, as on 500 blocks: the parameters vary, the best window holds."""
    rng = np.random.default_rng(1)
    exact = np.array([predicted_gain(window, *TRUTH) for window in FIVES])
    given_up, noises = [], []
    for _ in range(40):
        fit = fit_gains(FIVES, exact + 0.003 * rng.standard_normal(len(FIVES)))
        noises.append(fit[0])
        chosen = max(range(len(FIVES)), key=lambda i, fit=fit: predicted_gain(FIVES[i], *fit))
        given_up.append(exact.max() - exact[chosen])
    assert np.median(noises) == pytest.approx(0.12, rel=0.15)
    assert max(given_up) < 0.005


def test_fit_carries_over_to_other_schemes():
    """Fitted to k = 5, it says what a dense mean and an EMA gain."""
    fit = fit_gains(FIVES, [predicted_gain(window, *TRUTH) for window in FIVES])
    for window in windows_of([lawa(40, 25), ema(0.95, start=1000)]):
        expected = predicted_gain(window, *TRUTH)
        assert predicted_gain(window, *fit) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_is_below_zero(sign):
    """Drift alone, and a run whose loss rises: neither noise nor drift is made negative."""
    gains = [sign * predicted_gain(window, 0, 1, 1e-3) for window in FIVES]
    noise, tau, drift = fit_gains(FIVES, gains)
    assert noise >= 0 and tau > 0 and drift >= 0
    if sign > 0:
        assert noise == pytest.approx(0, abs=1e-6) and drift == pytest.approx(1e-3)
    else:
        assert drift == 0


# ---- search ----


def synthetic(tmp_path, truth=TRUTH, blocks=1, spread=0.0):
    """A trajectory and an `evaluate` whose gains are the model's, found by the age of a mean.

    A checkpoint's weights are one-hot, so that an average tells its own weights.
    """
    steps = STEPS[:80]
    ref.write_run(
        tmp_path / "run", steps, lambda s: {"w": torch.eye(len(steps))[s // 25 - 1].double()}
    )
    rng = np.random.default_rng(3)

    def evaluate(state):
        weights = {s: w for s, w in zip(steps, state["w"].tolist(), strict=True) if w}
        loss = 4 - predicted_gain(weights, *truth)
        return list(loss + spread * rng.standard_normal(blocks))

    return lawa_core.open_trajectory(tmp_path / "run"), evaluate


@pytest.mark.parametrize("spread", [0, 0.002])
def test_search_says_what_it_predicts_and_measures(spread, tmp_path):
    trajectory, evaluate = synthetic(tmp_path, spread=spread)
    found = lawa_core.search(trajectory, evaluate)
    words = found["model"]
    pattern = r"predicts best (lawa\(.*\)), gain ([-+.\d]+), measured ([-+.\d]+)"
    scheme, predicted, measured = re.search(pattern, words).groups()
    assert float(predicted) == pytest.approx(float(measured), abs=0.002 + 4 * spread)
    assert words.startswith("from ") and len(found["trials"]) <= 12
    assert scheme in [trial["scheme"] for trial in found["trials"]]
    # no window at all is much better than the one that was chosen
    windows = []
    for k in (2, 3, 5, 8, 12):
        windows += [lawa(k, s) for s in range(25, 2000, 25) if (k - 1) * s < 2000]
    best = max(predicted_gain(row(w, trajectory.steps, 2000), *TRUTH) for w in windows)
    gained = predicted_gain(row(found["best"], trajectory.steps, 2000), *TRUTH)
    assert best - gained < 0.004 + 2 * spread


def test_search_counts_the_proposal(tmp_path):
    trajectory, evaluate = synthetic(tmp_path)
    seen = []
    found = lawa_core.search(trajectory, lambda s: seen.append(1) or evaluate(s), budget=10)
    assert len(seen) == len(found["trials"]) == 10


def test_search_cannot_tell_without_noise(tmp_path):
    """A run that only drifts: its averages are worse, and no window is proposed."""
    trajectory, evaluate = synthetic(tmp_path, (0.0, 10.0, 1e-4))
    found = lawa_core.search(trajectory, evaluate)
    assert "cannot tell" in found["model"] and "predicts" not in found["model"]
    assert str(found["best"]) == "newest()"


def test_search_cannot_tell_from_losses_that_are_no_such_gains(tmp_path):
    """Gains that jump about: the fit is poor, and it says so."""
    trajectory, _ = synthetic(tmp_path)
    rng = np.random.default_rng(0)
    found = lawa_core.search(trajectory, lambda state: 4 + rng.standard_normal(), budget=16)
    assert "cannot tell" in found["model"]


def test_search_cannot_tell_from_few_windows(tmp_path):
    trajectory, evaluate = synthetic(tmp_path)
    found = lawa_core.search(trajectory, evaluate, budget=4)
    assert "cannot tell: only" in found["model"]


def test_the_command_line_prints_it(tmp_path, capsys):
    synthetic(tmp_path)
    script = tmp_path / "validate.py"
    script.write_text(
        "import sys, numpy as np, lawa_core\n"
        "w = lawa_core.open_checkpoint(sys.argv[1])['w'].numpy()\n"
        "window = {25 * (i + 1): x for i, x in enumerate(w) if x}\n"
        f"print(4 - lawa_core.predicted_gain(window, *{TRUTH}))\n"
    )
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{}}"
    given = ["search", str(tmp_path / "run"), "--command", command]
    assert lawa_core.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"model from \d+ evaluations: noise 0\.1", line)]
    assert lawa_core.main([*given, "--json"]) == 0
    assert "predicts best" in json.loads(capsys.readouterr().out)["model"]
