"""What notebooks share: settings, statistics, the figures' style, the record of what they found.

A notebook makes one `Lab` from its parameters, draws figures through it, states verdicts through it
and records both under its results folder, from which lab/report.py builds the front page.
"""
from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import shlex
import time
from pathlib import Path

import numpy as np

import lawa_core
from lawa_core import LawaError

# names that a kernel brings along, and that are no misspelt parameters
IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}

# so that curves tell apart in black and white
MARKERS = tuple("os^Dv")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    "figure.figsize": (8, 4.2), "figure.dpi": 90, "figure.constrained_layout.use": True,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10, "axes.titlesize": 11, "legend.frameon": False}

# what a parameter may be given for its annotation, besides None, and the words for it
TAKES = {
    float: ((int, float), "a number"), int: ((int,), "a whole number"),
    bool: ((bool,), "True or False"),
    str: ((str, int, float, list), "a text or a list of numbers")}


# ---- 1. A notebook's settings and results ----

class Lab:
    """A notebook's settings as attributes, and the collector of its results.

    Args: name: the notebook's; question: one line; namespace: the notebook's globals() right after
    the parameters cell: annotated names are parameters, None takes the scale's value, a text such
    as "0,1,2" is a list of numbers.
    Errors: LawaError that names every bad parameter, unknown, of the wrong type, or out of range,
    before anything is trained.
    """

    def __init__(self, name: str, question: str, namespace: dict):
        import matplotlib.pyplot as plt

        import model
        self.begun = time.monotonic()
        self.name = name
        self.question = question
        self.given = _parameters(namespace)
        self.values = dict(model.SCALES[self.given["scale"]])
        for key, value in self.given.items():
            if value is not None:
                self.values[key] = value
        self.config = model.scale_config(self.values)  # refuses values out of range
        model.open_corpus(self.config.corpus)  # and a missing corpus
        self.k = self.values["k"]
        self.spacing = self.values["spacing"]
        self.seeds = numbers("seeds", self.values["seeds"], int)
        lawa_core.lawa(self.k, self.spacing)  # refuses a window that is none
        if self.spacing % self.config.ckpt_interval:
            raise LawaError(f"spacing must be a multiple of the checkpoint interval "
                            f"{self.config.ckpt_interval}, got {self.spacing}")
        default = model.ROOT / "results" / f"scale-{self.values['scale']}"
        self.folder = Path(self.values.get("out") or default) / name
        self.figures = []
        self.verdicts = []
        plt.rcParams.update(STYLE)

    def points(self, n: int = 20, config=None) -> list[int]:
        """About n checkpoint steps, evenly spread over a run, by default the scale's."""
        config = config or self.config
        steps = config.checkpoint_steps
        found = {steps[nearest(steps, config.max_iters * i / n)] for i in range(1, n + 1)}
        return sorted(found)

    def evaluate(self, configs, schemes, at, fields=("lr", "seed")) -> list[dict]:
        """Train what is not trained, evaluate runs and averages.

        schemes, at: as for `model.evaluate_trajectory`, or functions of the configuration that
        return them. Returns its rows with the configurations' `fields` before them.
        """
        import model
        from lab.plan import plan
        from lab.runs import train_all
        configs = list(configs)
        missing = [c for c in configs if not (model.run_dir(c) / "summary.json").exists()]
        if missing:
            print(plan(missing))
        rows = []
        for config, run in zip(configs, train_all(configs), strict=True):
            rules = schemes(config) if callable(schemes) else schemes
            steps = at(config) if callable(at) else at
            about = {field: getattr(config, field) for field in fields}
            for row in model.evaluate_trajectory(run, rules, steps, self.values["n_blocks"]):
                rows.append(about | row)
        return rows

    def figure(self, fig, name: str, title: str, caption: str) -> None:
        """Keep a matplotlib figure as PNG under the results; the notebook shows it as well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fig.savefig(self.folder / f"{name}.png", dpi=160, bbox_inches="tight")
        self.figures.append({"file": f"{name}.png", "title": title, "caption": caption})

    def verdict(self, claim: str, *, holds: bool | None, ours: str, evidence: str, paper: str,
                source: str, n: int, figure: str) -> None:
        """Print a verdict and keep it.

        holds: None where this scale cannot tell; ours, paper: what was found here and there;
        evidence: on what the verdict rests; source: of the published value; n: seeds; figure: the
        name given to `figure`.
        """
        word = {True: "holds", False: "does not hold", None: "undecided"}[holds]
        scale = self.values["scale"]
        print(f"{claim}: {word} at scale {scale} ({evidence}). Here: {ours}. Paper: {paper}.")
        self.verdicts.append({
            "claim": claim, "paper": paper, "paper_source": source, "ours": ours, "holds": holds,
            "evidence": evidence, "n": n, "figure": f"{figure}.png"})

    def record(self, rows: list[dict]) -> None:
        """Write rows.csv and, last and atomically, record.json: what lab/report.py reads."""
        import torch
        path = self.folder / "rows.csv"
        with lawa_core.replacing(path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        command = ["papermill", f"notebooks/{self.name}.ipynb", "out.ipynb"]
        for key, value in self.given.items():
            if value is not None and key != "out":
                command += ["-p", key, str(value)]
        record = {
            "notebook": self.name, "title": self.name.replace("_", " "), "question": self.question,
            "scale": self.values["scale"],
            "params": {key: value for key, value in self.values.items() if key != "out"},
            "command": shlex.join(command),
            "seconds": round(time.monotonic() - self.begun, 1),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
            "rows": "rows.csv", "figures": self.figures, "verdicts": self.verdicts}
        with lawa_core.replacing(self.folder / "record.json") as part:
            part.write_text(json.dumps(record, indent=1, ensure_ascii=False))


def _parameters(namespace: dict) -> dict:
    """The annotated names of a notebook's globals with their values; LawaError for bad ones."""
    import model
    known = namespace.get("__annotations__")
    if not known:
        known = namespace["__annotate__"](1)  # Python 3.14 keeps annotations in a function
    given = {key: namespace[key] for key in known}
    problems = []
    # what papermill was told under a name that is no parameter; a notebook run anew, after cells
    # that made names of their own, is known by the Lab among them
    if not any(isinstance(value, Lab) for value in namespace.values()):
        for key, value in namespace.items():
            strange = key not in known and key not in IPYTHON and not key.startswith("_")
            if strange and isinstance(value, (int, float, str, list, dict)):
                problems.append(f"unknown parameter {key!r}; known are {', '.join(known)}")
    for key, kind in known.items():
        types, words = TAKES[kind]
        value = given[key]
        # True is an int in Python, but no number here
        fits = isinstance(value, types) and isinstance(value, bool) == (kind is bool)
        if value is not None and not fits:
            problems.append(f"{key} must be {words}, got {value!r}")
    scale = given.get("scale")
    if not isinstance(scale, str) or scale not in model.SCALES:
        problems.append(f"scale must be one of {', '.join(model.SCALES)}, got {scale!r}")
    if problems:
        raise LawaError("; ".join(problems))
    return given


def numbers(name: str, value, kind=float) -> list:
    """A parameter that is a list of numbers: "1,3,10", 3 or [1, 3].

    LawaError for anything else, an empty list, or one number twice.
    """
    words = value
    if isinstance(value, str):
        words = value.replace(",", " ").split()
    elif not isinstance(value, (list, tuple)):
        words = [value]
    try:
        found = [kind(word) for word in words]
    except (TypeError, ValueError):
        raise LawaError(f"{name} must be numbers such as '1,3,10', got {value!r}") from None
    if not found or len(set(found)) < len(found):
        raise LawaError(f"{name} must be at least one number, none twice, got {value!r}")
    return found


# ---- 2. Statistics ----

def grid(rows: list[dict], column: str, **axes) -> np.ndarray:
    """`column` of the rows as an array, nan where there is no row.

    axes: a keyword that is a list makes an axis, in order; a single value selects: scheme="lawa".
    """
    lists = {}
    fixed = {}
    for name, values in axes.items():
        if isinstance(values, (list, tuple)):
            lists[name] = list(values)
        else:
            fixed[name] = values
    out = np.full([len(values) for values in lists.values()], np.nan)
    for row in rows:
        selected = all(row[name] == value for name, value in fixed.items())
        if selected and all(row[name] in values for name, values in lists.items()):
            place = tuple(values.index(row[name]) for name, values in lists.items())
            out[place] = row[column]
    return out


def nearest(steps, wanted: float) -> int:
    """The index of the step nearest to `wanted`, the first of two that are as near."""
    return min(range(len(steps)), key=lambda i: abs(steps[i] - wanted))


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
        chosen.append(int(np.nanargmax(others.mean(1))))
    return chosen


def beyond_spread(differences) -> bool | None:
    """Is a paired difference positive for every seed, and its mean above its standard deviation?

    None for a single seed.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return None
    return bool((differences > 0).all() and differences.mean() > differences.std(ddof=1))


def in_favour(differences) -> str:
    """"3 of 3 seeds": how many of the paired differences are positive."""
    return f"{int((np.asarray(differences) > 0).sum())} of {len(differences)} seeds"


def mean_se(values) -> tuple[float, float]:
    """(mean, standard error of the mean); nan for a single value's error."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def pm(values, digits: int = 3) -> str:
    """"+0.041 ± 0.006": mean and standard error of a few differences."""
    mean, error = mean_se(values)
    spread = f" ± {error:.{digits}f}" if math.isfinite(error) else " (one seed)"
    return f"{mean:+.{digits}f}{spread}"


# ---- 3. Figures ----

def band(ax, x, values, label: str, number: int, **style) -> None:
    """A curve of the mean over seeds with a band from the lowest to the highest seed.

    values: (seeds, len(x)); number: which of the colours, markers and dashes; style: matplotlib's
    keywords that go before them.
    """
    values = np.asarray(values)
    style = {
        "color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4,
        "markevery": 3, "linestyle": DASHES[number % len(DASHES)]} | style
    ax.plot(x, values.mean(0), label=label, **style)
    if len(values) > 1:
        lowest = values.min(0)
        ax.fill_between(x, lowest, values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def errorbars(ax, x, values, **style) -> None:
    """Means over seeds with bars from the lowest to the highest seed.

    values: (len(x), seeds); style: matplotlib's keywords.
    """
    values = np.asarray(values)
    mean = values.mean(1)
    bars = [mean - values.min(1), values.max(1) - mean]
    ax.errorbar(x, mean, yerr=bars, **{"capsize": 3} | style)
