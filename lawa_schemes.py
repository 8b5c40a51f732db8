"""Schemes: every way to average, as a function from (available steps, target step) to a row of weights {step: weight} that sums to 1.

LAWA (arXiv 2306.03241), SWA (1803.05407), EMA, merge weights that emulate a decay of the learning rate (WSM, 2507.17634), and weights given
one by one; their texts, such as "lawa(k=5, spacing=1000)"; and durations in tokens.
"""
from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lawa_files import LawaError, _some


def _present(wanted, have, every: int, at: int) -> list[int]:
    """The wanted steps, all of which must be there."""
    if missing := sorted(set(wanted) - set(have)):
        raise LawaError(f"no checkpoint at step {missing[0]}, which an average at step {at} with spacing {every} needs; there are "
                        f"{_some(have)}; use a spacing that is a multiple of the checkpoint interval")
    return list(wanted)


def _grid(steps, at: int, every: int | None, start: int) -> list[int]:
    """The steps start, start + every, ... up to `at`, from the first there is; every None: all of them."""
    have = [step for step in steps if start <= step <= at]
    if every is None or not have:
        return have
    return _present(range(have[0] + (start - have[0]) % every, at + 1, every), have, every, at)


def _positive(**values) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LawaError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class newest:
    """The run itself: {at: 1}."""

    def __call__(self, steps, at):
        return {at: 1.0}


@dataclass(frozen=True)
class lawa:
    """Latest weight averaging: mean of the k latest checkpoints at, at - spacing, ... not before `start` (arXiv 2306.03241, 2209.14981).

    spacing in steps (None: the k latest there are). A window part full divides by what it holds; before `start` it is the run itself.
    """
    k: int
    spacing: int | None = None
    start: int = 0

    def __post_init__(self):
        _positive(k=self.k, spacing=self.spacing)

    def __call__(self, steps, at):
        window = [step for step in steps if self.start <= step <= at]
        if self.spacing and window:
            window = _present(range(at, window[0] - 1, -self.spacing)[:self.k], window, self.spacing, at)[::-1]
        window = window[-self.k:]
        return {step: 1 / len(window) for step in window} or {at: 1.0}


@dataclass(frozen=True)
class swa:
    """Stochastic weight averaging: the uniform mean of every `every`-th step since `start` (arXiv 1803.05407)."""
    start: int = 0
    every: int | None = None

    def __post_init__(self):
        _positive(every=self.every)

    def __call__(self, steps, at):
        window = _grid(steps, at, self.every, self.start)
        return {step: 1 / len(window) for step in window} or {at: 1.0}


@dataclass(frozen=True)
class ema:
    """Exponential moving average, updated every `every` steps since `start`: e <- beta e + (1 - beta) w, begun at the first w."""
    beta: float
    every: int | None = None
    start: int = 0

    def __post_init__(self):
        _positive(every=self.every)
        if not 0 <= self.beta < 1:
            raise LawaError(f"beta must be in [0, 1), got {self.beta!r}")

    def __call__(self, steps, at):
        window = _grid(steps, at, self.every, self.start)
        ages = {step: len(window) - 1 - i for i, step in enumerate(window)}
        return {step: self.beta ** age * (1.0 if step == window[0] else 1 - self.beta) for step, age in ages.items()} or {at: 1.0}


SHAPES = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "1-sqrt": lambda x: 1 - math.sqrt(x)}


@dataclass(frozen=True)
class decay:
    """Merge weights that emulate a learning-rate decay over the last `window` steps (WSM, arXiv 2507.17634).

    With theta_0 ... theta_n in the window and the curve w_j = shape(j / (n + 1)): c_n = w_n, c_j = w_j - w_{j+1}, c_0 = 1 - w_1. A linear
    decay is the uniform mean. shape: "linear", "cosine", "1-sqrt" or a function of x in [0, 1] that gives the share of the rate left.
    """
    window: int
    shape: str | Callable[[float], float] = "1-sqrt"
    every: int | None = None

    def __post_init__(self):
        _positive(window=self.window, every=self.every)
        if not callable(self.shape) and self.shape not in SHAPES:
            raise LawaError(f"shape must be one of {', '.join(SHAPES)} or a function, got {self.shape!r}")

    def __call__(self, steps, at):
        window = lawa(len(steps), self.every, max(at - self.window, min(steps)))(steps, at)
        shape = self.shape if callable(self.shape) else SHAPES[self.shape]
        curve = [1.0, *(float(shape(j / len(window))) for j in range(1, len(window))), 0.0]
        return {step: before - after for step, (before, after) in zip(window, pairwise(curve), strict=True)}


@dataclass(frozen=True)
class explicit:
    """Given weights, the last one for the newest checkpoint; divided by their sum. Zero weights are not read, negative ones extrapolate."""
    weights: tuple[float, ...]
    spacing: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        total = math.fsum(self.weights)
        if not self.weights or not math.isfinite(total) or abs(total) < 1e-12:
            raise LawaError(f"weights must be finite and have a sum other than 0, got {list(self.weights)}")

    def __call__(self, steps, at):
        window = lawa(len(self.weights), self.spacing)(steps, at)
        if len(window) < len(self.weights):
            raise LawaError(f"{len(self.weights)} weights need as many checkpoints up to step {at}; there are {len(window)}")
        return {step: weight / math.fsum(self.weights) for step, weight in zip(window, self.weights, strict=True)}


SCHEMES = {scheme.__name__: scheme for scheme in (newest, lawa, swa, ema, decay, explicit)}
DURATIONS = ("spacing", "start", "every", "window")  # fields given in steps


def tokens(n: float, per_step: int) -> int:
    """A duration of `n` tokens in steps of `per_step` tokens; LawaError unless it is a whole number of steps."""
    _positive(per_step=per_step)
    if n % per_step:
        raise LawaError(f"{n:g} tokens are {n / per_step:.3f} steps of {per_step} tokens; expected a multiple, such as "
                        f"{round(n / per_step) * per_step}")
    return int(n // per_step)


def in_steps(scheme, per_step: int):
    """The scheme whose durations were given in tokens, in steps."""
    given = {name: getattr(scheme, name) for name in DURATIONS if getattr(scheme, name, None)}
    return dataclasses.replace(scheme, **{name: tokens(value, per_step) for name, value in given.items()})


def scheme_dir(text: str) -> str:
    """The one name of the folder that holds a scheme's averages: "ema(0.99)" -> "ema-0.99"."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")


def parse_scheme(text: str):
    """The scheme that a text such as "lawa(k=5, spacing=100)" writes: literals only, nothing is run."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, args, keywords = (call.func.id, call.args, call.keywords) if isinstance(call, ast.Call) else (call.id, [], [])
        return SCHEMES[name](*map(ast.literal_eval, args), **{word.arg: ast.literal_eval(word.value) for word in keywords})
    except LawaError as error:
        raise LawaError(f"scheme {text!r}: {error}") from None
    except (SyntaxError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LawaError(f"scheme {text!r} not understood ({error}); expected one of lawa(k=5, spacing=100), swa(start=0, every=10), "
                        "ema(beta=0.99), decay(window=1000, shape='1-sqrt'), explicit([0.2, 0.8]), newest") from None


def row(scheme, steps, at: int) -> dict[int, float]:
    """The scheme's weights {step: weight} at step `at`, checked: finite, summing to 1, on available steps; ascending, zeros left out."""
    if at not in steps:
        raise LawaError(f"no checkpoint at step {at}; there are {_some(steps)}")
    weights = {step: float(weight) for step, weight in sorted(scheme(steps, at).items()) if weight != 0}
    if not set(weights) <= set(steps) or not abs(math.fsum(weights.values()) - 1) < 1e-9:
        raise LawaError(f"{scheme} gives weights that sum to {math.fsum(weights.values())} over steps {_some(list(weights))}; "
                        "expected 1, on available steps")
    return weights
