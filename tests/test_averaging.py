"""Schemes and their arithmetic: weights, in-memory averages, sweeps, and file to file streaming."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import lawa_core
from lawa_core import (
    LawaError,
    average,
    average_files,
    decay,
    ema,
    explicit,
    lawa,
    newest,
    open_trajectory,
    row,
    swa,
    sweep,
)

quick = settings(max_examples=60, deadline=None)
TENS = [10, 20, 30, 40, 50]


def averaged(folder, scheme, at=None, out="out.safetensors", **options):
    """average_files on a folder, read back by hand."""
    trajectory = open_trajectory(folder)
    average_files(
        trajectory, {folder.parent / out: (scheme, at or trajectory.steps[-1])}, **options
    )
    return ref.read_safetensors(folder.parent / out)[0]


# ------------------------------------------------------------------ weights, written out

THIRD = 1 / 3


@pytest.mark.parametrize(
    ("scheme", "steps", "at", "want"),
    [
        # lawa: not yet full, exactly full, sliding, k = 1
        (lawa(3), TENS, 10, {10: 1}),
        (lawa(3), TENS, 20, {10: 1 / 2, 20: 1 / 2}),
        (lawa(3), TENS, 30, {10: THIRD, 20: THIRD, 30: THIRD}),
        (lawa(3), TENS, 50, {30: THIRD, 40: THIRD, 50: THIRD}),
        (lawa(1), TENS, 40, {40: 1}),
        (lawa(100), TENS, 50, dict.fromkeys(TENS, 1 / 5)),
        # spacing: every second checkpoint, from `at` backwards; the window ends where the run began
        (lawa(3, spacing=20), TENS, 50, {10: THIRD, 30: THIRD, 50: THIRD}),
        (lawa(3, spacing=20), TENS, 40, {20: 1 / 2, 40: 1 / 2}),
        (lawa(3, spacing=100), TENS, 50, {50: 1}),
        # a window crossing `start`, and before `start` the run itself
        (lawa(3, start=30), TENS, 20, {20: 1}),
        (lawa(3, start=30), TENS, 30, {30: 1}),
        (lawa(3, start=30), TENS, 40, {30: 1 / 2, 40: 1 / 2}),
        (lawa(3, spacing=10, start=30), TENS, 50, {30: THIRD, 40: THIRD, 50: THIRD}),
        (lawa(2, start=25), TENS, 50, {40: 1 / 2, 50: 1 / 2}),
        # without spacing, gaps in the run do not matter
        (lawa(3), [1, 2, 50, 1000], 1000, {2: THIRD, 50: THIRD, 1000: THIRD}),
        (swa(), TENS, 30, {10: THIRD, 20: THIRD, 30: THIRD}),
        (swa(start=20), TENS, 10, {10: 1}),
        (swa(start=20), TENS, 50, {20: 1 / 4, 30: 1 / 4, 40: 1 / 4, 50: 1 / 4}),
        (swa(start=10, every=20), TENS, 50, {10: THIRD, 30: THIRD, 50: THIRD}),
        (newest(), TENS, 40, {40: 1}),
        (ema(0.5), TENS, 10, {10: 1}),
        (ema(0.5), TENS, 40, {40: 1 / 2, 30: 1 / 4, 20: 1 / 8, 10: 1 / 8}),
        (ema(0.75), TENS, 30, {30: 0.25, 20: 0.1875, 10: 0.5625}),
        (ema(0.5, every=20, start=10), TENS, 50, {50: 1 / 2, 30: 1 / 4, 10: 1 / 4}),
        (
            ema(0.5, every=20),
            TENS,
            50,
            {40: 1 / 2, 20: 1 / 2},
        ),  # the grid begins at `start`, as it does online
        (ema(0.5, start=30), TENS, 20, {20: 1}),
        (ema(0.5, start=30), TENS, 50, {50: 1 / 2, 40: 1 / 4, 30: 1 / 4}),
        (decay(5), TENS, 50, {50: 1}),  # the window is in steps
        (decay(30, "linear"), TENS, 50, {20: 1 / 4, 30: 1 / 4, 40: 1 / 4, 50: 1 / 4}),
        (decay(35, "linear"), TENS, 50, {20: 1 / 4, 30: 1 / 4, 40: 1 / 4, 50: 1 / 4}),
        (decay(10, "cosine"), TENS, 50, {40: 1 / 2, 50: 1 / 2}),
        (
            decay(30),
            TENS,
            50,
            {
                20: 0.5,
                30: math.sqrt(0.5) - 0.5,
                40: math.sqrt(0.75) - math.sqrt(0.5),
                50: 1 - math.sqrt(0.75),
            },
        ),
        (decay(40, "linear", every=20), TENS, 50, {10: THIRD, 30: THIRD, 50: THIRD}),
        (decay(1000, "linear"), TENS, 20, {10: 1 / 2, 20: 1 / 2}),
        (decay(10, lambda x: 1.0), TENS, 50, {50: 1}),  # no decay: the newest checkpoint
        (explicit([1]), TENS, 50, {50: 1}),
        (
            explicit([1, 2, 5]),
            TENS,
            50,
            {30: 1 / 8, 40: 2 / 8, 50: 5 / 8},
        ),  # normalised, the last one to the newest
        (
            explicit([1, 0, 3]),
            TENS,
            50,
            {30: 1 / 4, 50: 3 / 4},
        ),  # a zero weight needs no checkpoint
        (explicit([-1, 3]), TENS, 50, {40: -1 / 2, 50: 3 / 2}),  # extrapolation
        (explicit([1, 3], spacing=20), TENS, 50, {30: 1 / 4, 50: 3 / 4}),
    ],
)
def test_weights(scheme, steps, at, want):
    got = row(scheme, steps, at)
    assert set(got) == set(want)
    assert got == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize(
    ("scheme", "steps", "at", "named"),
    [
        (lawa(4, spacing=10), [10, 20, 40, 50], 50, "30"),
        (lawa(3, spacing=15), TENS, 50, "35"),
        (ema(0.9, every=10), [10, 20, 40, 50], 50, "30"),
        (decay(40, every=10), [10, 20, 40, 50], 50, "30"),
        (explicit([1, 1, 1], spacing=10), [10, 20, 40, 50], 50, "30"),
        (lawa(3), TENS, 45, "45"),
        (newest(), TENS, 45, "45"),
        (ema(0.9), TENS, 60, "60"),
        (swa(), TENS, 45, "45"),
    ],
)
def test_missing_step_is_named(scheme, steps, at, named):
    with pytest.raises(LawaError, match=rf"\b{named}\b"):
        row(scheme, steps, at)


BAD = {
    "k is 0": lambda: lawa(0),
    "k is negative": lambda: lawa(-1),
    "k is 2.5": lambda: lawa(2.5),
    "spacing is 0": lambda: lawa(3, spacing=0),
    "spacing is negative": lambda: lawa(3, spacing=-10),
    "beta is negative": lambda: ema(-0.1),
    "beta is 1.5": lambda: ema(1.5),
    "beta is NaN": lambda: ema(math.nan),
    "every is 0": lambda: ema(0.9, every=0),
    "every is 0 in swa": lambda: swa(every=0),
    "every is negative": lambda: swa(every=-1),
    "window is 0": lambda: decay(0),
    "unknown shape": lambda: decay(4, "no such shape"),
    "every is 0 in decay": lambda: decay(4, every=0),
    "no weights": lambda: explicit([]),
    "a weight is NaN": lambda: explicit([1, math.nan]),
    "a weight is Inf": lambda: explicit([1, math.inf]),
    "sum 0": lambda: explicit([1, -1]),
    "all 0": lambda: explicit([0, 0]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scheme_parameters_are_refused(case):
    """When the scheme is made, or at the latest when it is asked for weights."""
    with pytest.raises(LawaError):
        row(BAD[case](), TENS, 50)


def test_tokens_become_steps():
    assert lawa_core.tokens(2_097_152_000, 2_097_152) == 1000
    with pytest.raises(LawaError, match="2097152"):
        lawa_core.tokens(2_097_152_001, 2_097_152)
    with pytest.raises(LawaError):
        lawa_core.tokens(0, 0)


grids = st.tuples(st.integers(1, 30), st.integers(1, 50), st.integers(0, 7)).map(
    lambda t: [t[2] * t[1] + i * t[1] for i in range(t[0])]
)


@quick
@given(grids, st.data())
def test_weights_agree_with_the_naive_walk(steps, data):
    """Every window fill of every scheme, against explicit loops; sums are 1, nothing later than
    `at`, no zeros."""
    at = data.draw(st.sampled_from(steps))
    gap = steps[1] - steps[0] if len(steps) > 1 else 1
    start = data.draw(st.sampled_from([0, *steps]))
    stride = data.draw(st.sampled_from([None, gap, 2 * gap, 3 * gap]))
    k = data.draw(st.integers(1, 12))
    beta = data.draw(st.sampled_from([0.0, 0.2, 0.9, 0.999]))
    cases = [
        (lawa(k, stride, start), ref.lawa_weights(steps, at, k, stride, start)),
        (ema(beta, stride, start), ref.ema_weights(steps, at, beta, stride, start)),
    ]
    if stride is None or start in steps:
        cases.append((swa(start, stride), ref.swa_weights(steps, at, start, stride)))
    for scheme, want in cases:
        got = row(scheme, steps, at)
        assert set(got) == set(want), scheme
        assert got == pytest.approx({s: float(w) for s, w in want.items()}, rel=1e-12), scheme
        assert math.fsum(got.values()) == pytest.approx(1, abs=1e-12)


@quick
@given(st.integers(1, 12), st.sampled_from([*ref.SHAPES, "callable"]), st.integers(1, 15))
def test_decay_weights_replay_the_updates_at_a_decayed_rate(window, shape, n):
    """sum_j c_j theta_j = theta_0 + sum_j w_j (theta_j - theta_{j-1}), for full and part-full
    windows."""
    fraction = ref.SHAPES.get(shape, lambda x: 1 - x * x)
    scheme = decay(max(1, 7 * (window - 1)), shape if shape in ref.SHAPES else fraction)
    steps = [7 * (i + 1) for i in range(n)]
    held = min(window, n)
    thetas = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9][:held], float)
    got = row(scheme, steps, steps[-1])
    merged = sum(got.get(s, 0.0) * theta for s, theta in zip(steps[-held:], thetas, strict=True))
    assert merged == pytest.approx(float(ref.decayed_walk(thetas, fraction)), rel=1e-12)
    closed = {
        s: c
        for s, c in zip(steps[-held:], ref.decay_weights(held, fraction), strict=True)
        if abs(c) > 1e-15
    }
    assert {s: c for s, c in got.items() if abs(c) > 1e-15} == pytest.approx(closed, rel=1e-12)


def test_schemes_are_values():
    """Frozen, comparable and printable with their parameters: they name rows of results."""
    assert lawa(5, spacing=10) == lawa(5, spacing=10) != lawa(5, spacing=20)
    assert hash(ema(0.9)) == hash(ema(0.9))
    assert "5" in repr(lawa(5)) and "lawa" in repr(lawa(5)).lower()
    with pytest.raises(AttributeError):
        lawa(5).k = 6


# ------------------------------------------------------------------ arithmetic


def spread(dtype, n, seed=0):
    """n tensors whose large parts cancel in the mean: sums kept in 32 or fewer bits lose the
    rest."""
    rng = torch.Generator().manual_seed(seed)
    large = {torch.float64: 1.0, torch.float32: 3e3, torch.float16: 200.0, torch.bfloat16: 100.0}[
        dtype
    ]
    base = torch.randn(40, 30, generator=rng, dtype=torch.float64)
    out = [
        base
        + large * (1 if i % 2 else -1)
        + torch.randn(40, 30, generator=rng, dtype=torch.float64)
        for i in range(n)
    ]
    return [{"w": t.to(dtype)} for t in out]


@pytest.mark.parametrize("dtype", list(ref.FORMAT), ids=str)
@pytest.mark.parametrize(
    ("n", "scheme", "weights"),
    [
        (2, lawa(2), [Fraction(1, 2)] * 2),
        (3, lawa(3), [Fraction(1, 3)] * 3),
        (10, lawa(10), [Fraction(1, 10)] * 10),
        (24, swa(), [Fraction(1, 24)] * 24),
        (10, ema(0.8), [Fraction(w) for w in ref.ema_weights(range(10), 9, 0.8).values()]),
        (
            5,
            explicit([0.2, -0.1, 0.5, 0.3, 0.1]),
            [Fraction(w) for w in (0.2, -0.1, 0.5, 0.3, 0.1)],
        ),
        (8, decay(7), [Fraction(w) for w in ref.decay_weights(8, ref.SHAPES["1-sqrt"])]),
    ],
    ids=lambda x: None if isinstance(x, list) else str(x),
)
def test_one_unit_in_the_last_place(dtype, n, scheme, weights, tmp_path):
    """In memory and file to file, against exact rational arithmetic."""
    states = spread(dtype, n)
    folder = tmp_path / "run"
    ref.write_run(folder, range(n), lambda s: states[s])
    want = ref.exact_sum([s["w"] for s in states], weights)
    if (
        dtype is torch.float64
    ):  # weights are doubles: their own rounding is amplified where large parts cancel
        ulps = 1 + 4 * float(np.max(sum(abs(ref.wide(s["w"])) for s in states) / n / abs(want)))
    else:
        ulps = 0.5 + 1e-4  # one rounding
    ref.assert_close(average(folder, scheme)["w"], want, ulps)
    ref.assert_close(averaged(folder, scheme)["w"], want, ulps)


def test_float64_is_summed_in_more_than_float64(tmp_path):
    """1 and 63 terms below half its last place: a running sum of doubles loses every one of them,
    the mean is 5 units too low."""
    values = [1.0] + [2.0**-55 * (1 + i / 64) for i in range(63)]
    folder = tmp_path / "run"
    ref.write_run(
        folder, range(64), lambda s: {"w": torch.tensor([values[s]], dtype=torch.float64)}
    )
    want = math.fsum(values) / 64
    assert average(folder)["w"].item() == pytest.approx(want, abs=math.ulp(want))
    assert averaged(folder, swa())["w"].item() == pytest.approx(want, abs=math.ulp(want))


@pytest.mark.parametrize(
    ("dtype", "step_up"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_rounded_once(dtype, step_up, tmp_path):
    """A mean just above the midpoint of two narrow numbers: rounding to float32 on the way would
    fall to the even one."""
    offsets = [1, 0, 2, -2, 3, -3, 4, -4]  # mean 1/8 of float32's last place
    folder = tmp_path / "run"
    ref.write_run(
        folder, range(8), lambda s: {"w": torch.tensor([1 + step_up / 2 + offsets[s] * 2**-23])}
    )
    got = averaged(folder, swa(), dtype=ref.NAMES[dtype])["w"]
    assert got.dtype == dtype
    assert got.item() == 1 + step_up


def test_weights_are_not_rounded_to_the_tensors_type(tmp_path):
    """0.2 in bfloat16 is 0.2002: five of them times 256 would give 256.25, which bfloat16 shows as
    256; so use float32 out."""
    folder = tmp_path / "run"
    ref.write_run(folder, range(5), lambda s: {"w": torch.full((3,), 256.0, dtype=torch.bfloat16)})
    got = averaged(
        folder, explicit([0.1, 0.2, 0.3, 0.25, 0.15]), dtype="F32", allow={"duplicates"}
    )["w"]
    assert got.tolist() == [256.0] * 3


@pytest.mark.parametrize("dtype", list(ref.FORMAT), ids=str)
def test_k_1_copies_bytes(dtype, tmp_path):
    """Also -0.0, subnormals, infinities and every NaN payload."""
    size = torch.finfo(dtype).bits // 8
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 10_000 * size, np.uint8)).view(
        dtype
    )
    finite = {
        "w": torch.where(raw.isfinite(), raw, -0.0),
        "zero": torch.tensor([-0.0], dtype=dtype),
    }
    odd = {**finite, "w": raw, "nan": torch.tensor([math.nan, math.inf], dtype=dtype)}
    ref.write_run(
        tmp_path / "odd",
        [1, 2],
        lambda s: odd if s == 2 else {n: torch.ones_like(t) for n, t in odd.items()},
    )
    ref.write_run(
        tmp_path / "finite",
        [1, 2],
        lambda s: finite if s == 2 else {n: torch.ones_like(t) for n, t in finite.items()},
    )
    for scheme in (lawa(1), newest(), explicit([0, 1]), ema(0.0), lawa(5, start=99)):
        assert ref.state_bits(average(tmp_path / "finite", scheme)) == ref.state_bits(finite)
        assert ref.state_bits(
            averaged(tmp_path / "odd", scheme, allow={"nonfinite"})
        ) == ref.state_bits(odd)


@pytest.mark.parametrize("dtype", list(ref.FORMAT), ids=str)
def test_integers_come_from_the_newest_and_types_stay(dtype, tmp_path):
    folder = tmp_path / "run"
    ref.write_run(folder, TENS, lambda s: ref.example(s, dtype))
    states = [ref.example(s, dtype) for s in (30, 40, 50)]
    want = ref.average(states, [THIRD] * 3)
    for got in (average(folder, lawa(3)), averaged(folder, lawa(3))):
        ref.assert_state(got, want)
        assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in states[-1].items()}


def test_a_checkpoint_of_weight_zero_is_not_read(tmp_path):
    """It may be broken, or hold a NaN."""
    ref.write_run(
        tmp_path / "run",
        [1, 2, 3],
        lambda s: {"w": torch.full((2,), math.nan if s == 2 else float(s))},
    )
    assert average(tmp_path / "run", explicit([1, 0, 3]))["w"].tolist() == [2.5, 2.5]
    (tmp_path / "run" / "ckpt_2.safetensors").write_bytes(b"broken")
    assert averaged(tmp_path / "run", explicit([1, 0, 3]))["w"].tolist() == [2.5, 2.5]


def test_a_nan_reaches_only_the_averages_that_hold_it(tmp_path):
    """Several outputs share one pass; 0 * NaN is NaN."""
    rows = {1: [1, 1, -math.inf], 2: [math.nan, 2, 2], 3: [3, 3, 3]}
    ref.write_run(
        tmp_path / "run", rows, lambda s: {"w": torch.tensor(rows[s], dtype=torch.float32)}
    )
    outputs = {tmp_path / f"{at}.safetensors": (lawa(2), at) for at in (1, 2, 3)} | {
        tmp_path / "x.safetensors": (explicit([1, 0, 1]), 3)
    }
    average_files(open_trajectory(tmp_path / "run"), outputs, allow={"nonfinite"})
    got = {p.stem: ref.read_safetensors(p)[0]["w"].tolist() for p in outputs}
    assert got["1"] == [1, 1, -math.inf]
    assert math.isnan(got["2"][0]) and got["2"][1:] == [1.5, -math.inf]
    assert math.isnan(got["3"][0]) and got["3"][1:] == [2.5, 2.5]
    assert got["x"] == [2, 2, -math.inf]


def test_mixed_types_between_files(tmp_path):
    """bf16, fp64 and fp16 checkpoints averaged exactly, the output in the newest's type."""
    types = {10: torch.bfloat16, 20: torch.float64, 30: torch.float16}
    ref.write_run(tmp_path / "run", types, lambda s: ref.example(s, types[s]))
    want = ref.average([ref.example(s, t) for s, t in types.items()], [THIRD] * 3)
    for got in (average(tmp_path / "run"), averaged(tmp_path / "run", lawa(3))):
        assert got["wte.weight"].dtype == torch.float16
        ref.assert_state(got, want)


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16"])
def test_output_type_is_chosen(name, tmp_path):
    ref.write_run(tmp_path / "run", TENS, ref.example)
    dtype = next(d for d, code in ref.NAMES.items() if code == name)
    got = averaged(tmp_path / "run", lawa(5), dtype=name)
    want = ref.average([ref.example(s) for s in TENS], [Fraction(1, 5)] * 5)
    assert {t.dtype for n, t in got.items() if n in ("wte.weight", "h.0.scale")} == {dtype}
    assert got["h.0.position_ids"].dtype == torch.int64
    ref.assert_state(got, want)


@settings(quick, max_examples=25)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 9)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.data(),
)
def test_any_values_any_weights(rows, data):
    """Each row is a checkpoint; averaged in memory by weights of either sign, subnormals and huge
    ratios included."""
    weights = data.draw(
        st.lists(st.integers(-4, 9), min_size=len(rows), max_size=len(rows)).filter(
            lambda w: sum(w) > 0
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        tensors = [torch.from_numpy(row.copy()) for row in rows]
        paths = ref.write_run(
            Path(folder), range(len(rows)), lambda s: {"w": tensors[s], "i": torch.tensor(s)}
        )
        got = average(paths, explicit(weights))["w"]
    total = sum(weights)
    want = ref.exact_sum(tensors, [Fraction(w, total) for w in weights])
    room = (
        sum(abs(w) * np.abs(ref.wide(t)) for w, t in zip(weights, tensors, strict=True))
        / total
        * np.longdouble(2.0**-50)
    )
    assert np.all(np.abs(ref.wide(got) - want) <= ref.ulp(want, torch.float32) + room)


def test_average_accepts_every_kind_of_source_and_step(tmp_path):
    paths = ref.write_run(tmp_path / "run", TENS)
    for source in (
        tmp_path / "run",
        str(tmp_path / "run"),
        str(tmp_path / "run" / "ckpt_*.safetensors"),
        paths,
        [str(p) for p in paths],
        open_trajectory(paths),
    ):
        assert average(source)["w"].tolist() == [[30.0] * 3] * 4  # uniform mean of 10..50
        assert average(source, lawa(2), at=40)["b"].item() == 35.0


def test_average_is_a_copy(tmp_path):
    ref.write_run(tmp_path / "run", [1])
    trajectory = open_trajectory(tmp_path / "run")
    average(trajectory)["w"].zero_()
    assert average(trajectory)["w"].tolist() == [[1.0] * 3] * 4


# ------------------------------------------------------------------ sweep

SCHEMES = {
    "run": newest(),
    "lawa3": lawa(3),
    "wide": lawa(4, spacing=20),
    "swa": swa(30),
    "ema": ema(0.6),
    "wsm": decay(30),
    "mine": explicit([1, 2]),
}


def naive_weights(name, steps, at):
    return {
        "run": lambda: {at: Fraction(1)},
        "lawa3": lambda: ref.lawa_weights(steps, at, 3),
        "wide": lambda: ref.lawa_weights(steps, at, 4, 20),
        "swa": lambda: ref.swa_weights(steps, at, 30),
        "ema": lambda: ref.ema_weights(steps, at, 0.6),
        "wsm": lambda: dict(
            zip(
                steps[max(0, steps.index(at) - 3) : steps.index(at) + 1],
                ref.decay_weights(min(4, steps.index(at) + 1), ref.SHAPES["1-sqrt"]),
                strict=True,
            )
        ),
        "mine": lambda: {steps[steps.index(at) - 1]: Fraction(1, 3), at: Fraction(2, 3)},
    }[name]()


def check_sweep(rows, steps, targets, names, make):
    assert [(s, n) for s, n, _ in rows] == [(s, n) for s in targets for n in names]
    for step, name, state in rows:
        weights = naive_weights(name, steps, step)
        ref.assert_state(
            state,
            ref.average([make(s) for s in sorted(weights)], [weights[s] for s in sorted(weights)]),
        )


@pytest.mark.parametrize("targets", [None, [30, 50, 80], [80]], ids=str)
def test_sweep_is_every_average_at_every_step(targets, tmp_path):
    """Rows are collected before they are compared: a buffer reused between two of them would
    show."""
    steps = [10 * i for i in range(1, 9)]
    ref.write_run(tmp_path / "run", steps, ref.example)
    schemes = {n: s for n, s in SCHEMES.items() if n != "mine"}
    rows = list(sweep(open_trajectory(tmp_path / "run"), schemes, at=targets))
    check_sweep(rows, steps, targets or steps, list(schemes), ref.example)


def test_sweep_rows_may_be_changed_by_their_owner(tmp_path):
    steps = [10, 20, 30, 40]
    ref.write_run(tmp_path / "run", steps)
    for step, name, state in sweep(
        open_trajectory(tmp_path / "run"), {"run": newest(), "same": newest(), "swa": swa()}
    ):
        want = (
            step if name != "swa" else sum(steps[: steps.index(step) + 1]) / (steps.index(step) + 1)
        )
        assert state["w"].tolist() == [[want] * 3] * 4
        for tensor in state.values():
            tensor.fill_(-1)


def test_sweep_forgets_what_left_the_window(tmp_path):
    """1000 checkpoints, a huge value and a NaN pass by: sums that add and subtract would keep a
    residue for ever."""

    def make(s):
        value = {500: 1e30, 600: math.nan}.get(s, 1e-3 * (s % 7 + 1))
        return {"w": torch.tensor([value, value])}

    steps = list(range(1000))
    ref.write_run(tmp_path / "run", steps, make)
    for step, _, state in sweep(
        open_trajectory(tmp_path / "run"), {"lawa": lawa(5)}, allow=("nonfinite", "duplicates")
    ):
        window = [make(s)["w"] for s in steps[max(0, step - 4) : step + 1]]
        want = ref.weighted_sum(window, [Fraction(1, len(window))] * len(window))
        if math.isnan(want[0]):
            assert torch.isnan(state["w"]).all()
        else:
            ref.assert_close(state["w"], want)


def test_sweep_refuses_bad_targets_and_missing_steps(tmp_path):
    ref.write_run(tmp_path / "run", [10, 20, 40])
    trajectory = open_trajectory(tmp_path / "run")
    with pytest.raises(LawaError, match=r"\b25\b"):
        list(sweep(trajectory, {"run": newest()}, at=[10, 25]))
    with pytest.raises(LawaError, match=r"\b30\b"):
        list(sweep(trajectory, {"lawa": lawa(3, spacing=10)}, at=[40]))


@pytest.mark.parametrize("how", ["sweep", "sweep_files", "average_files", "average"])
def test_every_checkpoint_is_read_once(how, tmp_path):
    """Counted by the kernel. The lower bound says that this count still sees how files are read."""
    steps = list(range(1, 13))
    paths = ref.write_run(
        tmp_path / "run",
        steps,
        lambda s: {"w": torch.full((300, 1000), float(s)), "v": torch.arange(9.0) * s},
    )
    size = sum(p.stat().st_size for p in paths)
    trajectory = open_trajectory(tmp_path / "run")
    schemes = {
        "lawa3": lawa(3),
        "lawa6": lawa(6),
        "ema9": ema(0.9),
        "ema5": ema(0.5),
        "swa": swa(4),
    }
    average(paths[:1])  # imports whatever it imports
    before = ref.bytes_read()
    if how == "sweep":
        for _ in sweep(trajectory, schemes):
            pass
    elif how == "sweep_files":
        lawa_core.sweep_files(trajectory, schemes, steps, tmp_path / "out")
    elif how == "average_files":
        average_files(
            trajectory, {tmp_path / f"{n}.safetensors": (s, 12) for n, s in schemes.items()}
        )
    else:
        average(trajectory, swa())
    read = ref.bytes_read() - before
    assert size <= read < 1.1 * size


@pytest.mark.parametrize("threads", [1, 2])
def test_sweep_files_makes_trajectories(threads, tmp_path):
    steps = [10 * i for i in range(1, 7)]
    ref.write_run(tmp_path / "run", steps, ref.example)
    schemes = {n: SCHEMES[n] for n in ("lawa3", "ema", "wsm")}
    before = ref.digest(tmp_path / "run")
    lawa_core.sweep_files(
        open_trajectory(tmp_path / "run"), schemes, [20, 40, 60], tmp_path / "out", threads=threads
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(schemes)
    for name in schemes:
        assert sorted(p.name for p in (tmp_path / "out" / name).iterdir()) == [
            f"ckpt_{s}.safetensors" for s in (20, 40, 60)
        ]
        trajectory = open_trajectory(tmp_path / "out" / name)
        assert list(trajectory.steps) == [20, 40, 60]
        check_sweep(
            [(s, name, dict(trajectory[s])) for s in (20, 40, 60)],
            steps,
            [20, 40, 60],
            [name],
            ref.example,
        )
    assert ref.digest(tmp_path / "run") == before


# ------------------------------------------------------------------ file to file


def stored(tmp_path, kind, steps, make):
    """The same trajectory in several formats, each written by the format's own library or by
    hand."""
    folder = tmp_path / kind
    folder.mkdir()
    for s in steps:
        state = make(s)
        if kind == "safetensors":
            ref.write_safetensors(folder / f"ckpt_{s}.safetensors", state)
        elif kind == "pt":
            torch.save(state, folder / f"ckpt_{s}.pt")
        elif kind == "nanogpt":
            torch.save(
                {
                    "model": {f"_orig_mod.{n}": t for n, t in state.items()},
                    "optimizer": {"state": {}},
                    "iter_num": s,
                },
                folder / f"ckpt_{s}.pt",
            )
        elif kind == "shards":
            step = folder / f"step{s}"
            step.mkdir()
            names = sorted(state)
            cut = 2 + s // 10 % 3  # shard borders differ between checkpoints
            parts = {
                "model-00001-of-00002.safetensors": names[:cut],
                "model-00002-of-00002.safetensors": names[cut:],
            }
            for part, held in parts.items():
                ref.write_safetensors(step / part, {n: state[n] for n in held}, {"format": "pt"})
            index = {
                "metadata": {},
                "weight_map": {n: part for part, held in parts.items() for n in held},
            }
            (step / "model.safetensors.index.json").write_text(json.dumps(index))
            (step / "config.json").write_text("{}")
        elif kind == "dcp":
            import torch.distributed.checkpoint as dcp

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(state, checkpoint_id=folder / f"step{s}", no_dist=True)
        elif kind == "bin":
            step = folder / f"checkpoint-{s}"
            step.mkdir()
            torch.save(state, step / "pytorch_model.bin")
            (step / "config.json").write_text("{}")
    return folder


def large(s):
    return ref.example(
        s, torch.bfloat16 if s % 20 else torch.float32, big=(251, 1201)
    )  # 1.2 MB in float32: 2 tiles of 1 MiB


def test_same_bits_for_any_tile_thread_count_and_format(tmp_path):
    steps = [10, 20, 30]
    folders = [
        stored(tmp_path, kind, steps, large)
        for kind in ("safetensors", "pt", "nanogpt", "shards", "bin")
    ]
    want = ref.average([large(s) for s in steps], [0.2, 0.5, 0.3])
    seen = {}
    for folder in folders:
        for tile, threads in (
            [(4096, 1), (65536, 2), (1 << 20, 1), (1 << 20, 2)]
            if folder is folders[0]
            else [(65536, 2)]
        ):
            got = averaged(folder, explicit([0.2, 0.5, 0.3]), tile=tile, threads=threads)
            seen[folder.name, tile, threads] = ref.state_bits(got)
            if len(seen) == 1:
                ref.assert_state(got, want)
    first = seen.pop(("safetensors", 4096, 1))
    for case, got in seen.items():
        assert got == first, case


@pytest.mark.parametrize("bad", [{"tile": 0}, {"tile": -1}, {"threads": -1}], ids=str)
def test_nonsense_sizes(bad, tmp_path):
    """Refused, or the right numbers: never a file of zeros."""
    ref.write_run(tmp_path / "run", TENS)
    try:
        assert averaged(tmp_path / "run", lawa(2), **bad)["b"].item() == 45.0
    except LawaError:
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("tile", [1, 8, 4096])
def test_tiles_smaller_than_anything(tile, tmp_path):
    """A tile of one byte still moves forward (and one of 8 cannot hold a long double)."""
    make = {
        torch.float64: lambda s: {
            "w": torch.arange(7.0, dtype=torch.float64) * s,
            "e": torch.zeros(0, 2),
        },
        torch.bfloat16: lambda s: {
            "w": torch.arange(7.0, dtype=torch.bfloat16) * s,
            "e": torch.zeros(0, 2),
        },
    }
    for dtype, build in make.items():
        folder = tmp_path / str(dtype) / "run"
        ref.write_run(folder, [1, 3], build)
        assert averaged(folder, lawa(2), tile=tile)["w"].tolist() == [0, 2, 4, 6, 8, 10, 12]


def test_several_outputs_at_once(tmp_path):
    ref.write_run(tmp_path / "run", TENS)
    trajectory = open_trajectory(tmp_path / "run")
    outputs = {
        tmp_path / "a.safetensors": (lawa(2), 50),
        tmp_path / "b.pt": (lawa(3), 30),
        tmp_path / "c.safetensors": (newest(), 10),
    }
    average_files(trajectory, outputs)
    assert ref.read_safetensors(tmp_path / "a.safetensors")[0]["w"].tolist() == [[45.0] * 3] * 4
    assert torch.load(tmp_path / "b.pt", weights_only=True)["b"].item() == 20.0
    assert ref.read_safetensors(tmp_path / "c.safetensors")[0]["b"].item() == 10.0


def test_provenance_names_inputs_weights_and_scheme(tmp_path):
    """Enough to make the file again: each input with its exact weight, and the scheme in words."""
    ref.write_run(tmp_path / "run", TENS)
    average_files(
        open_trajectory(tmp_path / "run"),
        {tmp_path / "out.safetensors": (explicit([0.1, 0.2, 0.7]), 50)},
    )
    text = "\n".join(
        f"{k}: {v}" for k, v in ref.read_safetensors(tmp_path / "out.safetensors")[1].items()
    )
    for name, weight in {
        "ckpt_30.safetensors": 0.1,
        "ckpt_40.safetensors": 0.2,
        "ckpt_50.safetensors": 0.7,
    }.items():
        assert name in text
        assert any(float(number) == pytest.approx(weight, rel=1e-15) for number in numbers(text)), (
            weight,
            text,
        )
    assert "explicit" in text
    assert "ckpt_20" not in text


def test_provenance_is_the_same_in_every_process(tmp_path):
    """A decay shape given as a function must not leave its address in memory in the header."""
    ref.write_run(tmp_path / "run", TENS)
    average_files(
        open_trajectory(tmp_path / "run"),
        {tmp_path / "out.safetensors": (decay(20, lambda x: 1 - x), 50)},
    )
    assert "0x" not in str(ref.read_safetensors(tmp_path / "out.safetensors")[1])


def numbers(text):
    return re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?", text)


def child(code, *flags):
    """Run Python that measures itself; -> what it printed."""
    command = [sys.executable, *flags, "-c", ref.WATCH + code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(lawa_core.__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "shards", "transposed pt", "dcp"])
def test_memory_does_not_grow_with_the_model(kind, tmp_path):
    """Inputs of 5 x 48 MB in tensors of 16 MB. Only distributed checkpoints, put together from
    pieces, may hold one tensor each
    (and two more in the holes of the allocator)."""
    base = {
        n: torch.randn(4, 1 << 20, generator=torch.Generator().manual_seed(i))
        for i, n in enumerate("abc")
    }

    def make(s):
        for t in base.values():
            t[0, s] += 1
        return {n: t.t() for n, t in base.items()} if kind == "transposed pt" else base

    folder = stored(tmp_path, kind.split()[-1], range(5), make)
    out = tmp_path / "out.safetensors"
    (peak,) = child(
        f"""
import lawa_core
{"" if kind in ("safetensors", "shards") else "import torch, torch.distributed.checkpoint"}
trajectory = lawa_core.open_trajectory({str(folder)!r})
outputs = {{{str(out)!r}: (lawa_core.lawa(5), 4)}}
print(measured(lambda: lawa_core.average_files(trajectory, outputs, threads=1))[0])
""",
        "-W",
        "ignore",
    )
    assert float(peak) < {"transposed pt": 40, "dcp": 24 + 13 * 16}.get(kind, 24)
    got = ref.read_safetensors(out)[0]["b"]
    got = got.t() if kind == "transposed pt" else got
    assert got[3, 1000:1010].tolist() == base["b"][3, 1000:1010].tolist()


@pytest.mark.parametrize("kind", ["safetensors", "dcp"])
def test_sweep_memory_is_bounded(kind, tmp_path):
    """40 checkpoints of 2 MB with windows and running averages at every step: never the whole run
    (80 MB) at once."""
    folder = stored(tmp_path, kind, range(40), lambda s: {"w": torch.full((1 << 19,), float(s))})
    peak, mean = child(
        f"""
import torch, torch.distributed.checkpoint, lawa_core
trajectory = lawa_core.open_trajectory({str(folder)!r})
schemes = {{"lawa": lawa_core.lawa(4), "swa": lawa_core.swa(), "ema": lawa_core.ema(0.9)}}
def work():
    for _, name, state in lawa_core.sweep(trajectory, schemes):
        if name == "swa": last = state["w"][7].item()
    return last
print(*measured(work))
""",
        "-W",
        "ignore",
    )
    assert float(peak) < {"dcp": 64}.get(kind, 45)
    assert float(mean) == 19.5


def test_input_files_are_closed_afterwards(tmp_path):
    """An open descriptor keeps a deleted file's space: a replay that deletes what it no longer
    needs would fill the disk."""
    paths = ref.write_run(tmp_path / "run", TENS)
    average(paths)
    list(sweep(open_trajectory(paths), {"lawa": lawa(2)}))
    averaged(tmp_path / "run", lawa(2))
    held = [
        os.readlink(f)
        for f in Path("/proc/self/fd").iterdir()
        if f.is_symlink() and os.path.lexists(f)
    ]
    assert [f for f in held if str(tmp_path) in f] == []


def test_progress_reaches_the_end(tmp_path):
    ref.write_run(tmp_path / "run", TENS, large)
    calls = []
    average_files(
        open_trajectory(tmp_path / "run"),
        {tmp_path / "out.safetensors": (lawa(3), 50)},
        tile=65536,
        progress=lambda *args: calls.append(args),
    )
    done, total = zip(*calls, strict=True)
    assert len(calls) > 10 and list(done) == sorted(set(done))
    assert (
        set(total)
        == {sum(t.numel() * t.element_size() for s in (30, 40, 50) for t in large(s).values())}
        == {done[-1]}
    )


# ------------------------------------------------------------------ search


def drift(tmp_path, n=41, gap=10):
    """Weights equal to their step: the average of a window is its centre, at - spacing * (k - 1) /
    2."""
    ref.write_run(
        tmp_path / "run", range(0, n * gap, gap), lambda s: {"w": torch.tensor([float(s)])}
    )
    return open_trajectory(tmp_path / "run")


@pytest.mark.parametrize("lag", [10, 40, 100])
def test_search_finds_the_best_span(lag, tmp_path):
    """A loss with one minimum over the lag of the window's centre, so over its span; 12 evaluations
    of 60 possible windows."""
    trajectory, seen = drift(tmp_path), []

    def evaluate(state):
        seen.append(state["w"].item())
        miss = abs(400 - state["w"].item() - lag)
        return [2 + miss, 3 + miss, 7 + miss]  # paired blocks

    found = lawa_core.search(trajectory, evaluate, budget=12)
    assert len(seen) <= 12 and len(set(seen)) > 4
    best = found["best"]
    assert abs(best.spacing * (best.k - 1) / 2 - lag) <= 0.25 * lag
    assert found["gain"] == pytest.approx(lag - abs(best.spacing * (best.k - 1) / 2 - lag))
    assert found["gain_se"] == pytest.approx(0, abs=1e-9)
    assert len(found["trials"]) == len(seen)
    assert found["gain"] == pytest.approx(max(trial["gain"] for trial in found["trials"]))


def test_search_gain_is_paired(tmp_path):
    """Blocks of very different difficulty: the standard error is of the differences, not of the
    losses."""

    def evaluate(state):
        better = 0.0 if state["w"].item() == 400 else 0.5
        return [1.0 - better, 100.0 - better - 0.1, 10.0 - better + 0.1]

    found = lawa_core.search(drift(tmp_path), evaluate, budget=4)
    run = next(t for t in found["trials"] if t["scheme"].startswith("newest"))
    assert run["gain"] == 0 and run["loss"] == pytest.approx(37.0)
    assert found["gain"] == pytest.approx(0.5)
    assert found["gain_se"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_search_keeps_to_its_budget(budget, tmp_path):
    seen = []
    found = lawa_core.search(
        drift(tmp_path), lambda state: seen.append(state) or float(len(seen)), budget=budget
    )
    assert len(seen) <= budget
    assert found["gain_se"] is None  # one number per model has no spread
    assert str(found["best"]).startswith("newest")  # every later answer was worse


def test_search_does_not_choose_a_nan(tmp_path):
    """The run itself, or a window, may be in the middle of a loss spike."""
    for bad in (lambda w: w == 400, lambda w: w < 390):
        found = lawa_core.search(
            drift(tmp_path),
            lambda state, b=bad: math.nan if b(state["w"].item()) else state["w"].item(),
            budget=8,
        )
        loss = next(t["loss"] for t in found["trials"] if t["scheme"] == str(found["best"]))
        assert not math.isnan(loss)


def test_search_without_a_window(tmp_path):
    with pytest.raises(LawaError, match="30"):
        lawa_core.search(ref.write_run(tmp_path / "run", [10, 20, 30]), lambda state: 0.0, at=10)
    with pytest.raises(LawaError):
        lawa_core.search(ref.write_run(tmp_path / "run", [10, 20, 30]), lambda state: 0.0, budget=0)


# ------------------------------------------------------------------ the helpers themselves


def test_the_ruler_measures():
    """Two units off is seen, one is not: for each type, around 1, at a power of two from below, and
    at zero."""
    for dtype, (bits, smallest) in ref.FORMAT.items():
        for value in (1.0, 1.5, 1024.0, 0.0):
            x = torch.tensor([value], dtype=dtype)
            unit = (
                2.0 ** max(math.floor(math.log2(value)) + 1 - bits, smallest)
                if value
                else 2.0**smallest
            )
            assert ref.ulps_off(x, np.array([value], np.longdouble) + np.longdouble(unit)) == 1
            assert ref.ulps_off(x, np.array([value], np.longdouble) + 2 * np.longdouble(unit)) == 2
            with pytest.raises(AssertionError):
                ref.assert_close(x, np.array([value], np.longdouble) + 2 * np.longdouble(unit))


def test_the_files_by_hand_are_the_real_format(tmp_path):
    from safetensors.torch import load_file, save_file

    state = ref.example(20, torch.bfloat16)
    assert ref.state_bits(
        load_file(ref.write_safetensors(tmp_path / "a.safetensors", state))
    ) == ref.state_bits(state)
    save_file(state, tmp_path / "b.safetensors", {"by": "the library"})
    got, metadata = ref.read_safetensors(tmp_path / "b.safetensors")
    assert ref.state_bits(got) == ref.state_bits(state)
    assert metadata == {"by": "the library"}


def test_a_validation_with_other_blocks_is_refused(tmp_path):
    counts = iter([3, 3, 1])
    with pytest.raises(LawaError, match=r"gave 1 losses for lawa.* and 3 for the run"):
        lawa_core.search(drift(tmp_path), lambda state: [1.0] * next(counts))


def test_a_path_given_twice_is_refused(tmp_path):
    run = ref.write_run(tmp_path / "run", TENS)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    outputs = {str(a): (swa(), 30), b: (swa(), 50), a: (swa(), 40)}
    with pytest.raises(LawaError, match=r"a\.safetensors is given twice"):
        average_files(run, outputs)
    assert not a.exists() and not b.exists()
