"""What the notebooks share apart from training and averaging: their settings, the figures' style, and the record of what they found.

A notebook makes one `Lab` from its parameters, draws figures through it, states verdicts through it and records both under its results
folder, from which pages.py builds the front page.
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
from corpora import ROOT
from lawa_core import LawaError

IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}  # names a kernel brings along
MARKERS, DASHES = tuple("os^Dv"), ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # so that curves tell apart in black and white


class Lab:
    """A notebook's settings as attributes, and the collector of its results.

    Args: name: the notebook's; question: one line; namespace: the notebook's globals() right after the parameters cell: annotated names are
    parameters, None takes the scale's value, a text such as "0,1,2" is a list of numbers.
    Errors: LawaError naming every bad parameter at once, unknown, of the wrong type, or out of range, before anything is trained.
    """

    def __init__(self, name: str, question: str, namespace: dict):
        import model
        known = namespace.get("__annotations__") or namespace["__annotate__"](1)  # Python 3.14 keeps them in a function
        given = {key: namespace[key] for key in known}
        again = any(isinstance(value, Lab) for value in namespace.values())  # run anew, after cells that made names of their own
        strange = [key for key, value in namespace.items() if not again and key not in known and key not in IPYTHON and key[0] != "_"
                   and isinstance(value, (int, float, str, list, dict))]
        problems = [f"unknown parameter {key!r}; known are {', '.join(known)}" for key in strange]
        problems += [f"{key} must be {TAKES[kind][1]}, got {given[key]!r}" for key, kind in known.items() if not _fits(given[key], kind)]
        values = dict(model.scale_values(given["scale"])) if given.get("scale") in model.SCALES else {}
        if not values:
            problems.append(f"scale must be one of {', '.join(model.SCALES)}, got {given.get('scale')!r}")
        if problems:
            raise LawaError("; ".join(problems))
        values |= {key: value for key, value in given.items() if value is not None}
        self.name, self.question, self.values, self.given, self.begun = name, question, values, given, time.monotonic()
        self.config = model.scale_config(values)  # refuses values out of range
        model.open_corpus(self.config.corpus)  # and a missing corpus
        self.k, self.spacing, self.seeds = values["k"], values["spacing"], numbers("seeds", values["seeds"], int)
        if self.spacing % self.config.ckpt_interval:
            raise LawaError(f"spacing must be a multiple of the checkpoint interval {self.config.ckpt_interval}, got {self.spacing}")
        lawa_core.lawa(self.k, self.spacing)
        self.folder = Path(values.get("out") or ROOT / "results" / f"scale-{values['scale']}") / name
        self.figures, self.verdicts = [], []
        _style()

    def points(self, n: int = 20, config=None) -> list[int]:
        """About n checkpoint steps, evenly spread over a run, by default the scale's: where losses are evaluated."""
        config = config or self.config
        return sorted({min(config.checkpoint_steps, key=lambda step: abs(step - config.max_iters * i / n)) for i in range(1, n + 1)})

    def evaluate(self, configs, schemes, at, fields=("lr", "seed")) -> list[dict]:
        """Train what is not trained, evaluate run and averages; rows of `model.evaluate_trajectory` with the configurations' `fields`.

        schemes, at: as for `model.evaluate_trajectory`, or functions of the configuration that return them.
        """
        import model
        from many_runs import train_all
        configs = list(configs)
        if missing := [config for config in configs if not (model.run_dir(config) / "summary.json").exists()]:
            print(model.plan(missing))
        schemes, at = (given if callable(given) else lambda config, given=given: given for given in (schemes, at))
        return [{field: getattr(config, field) for field in fields} | row
                for config, run in zip(configs, train_all(configs), strict=True)
                for row in model.evaluate_trajectory(run, schemes(config), at(config), self.values["n_blocks"])]

    def figure(self, fig, name: str, title: str, caption: str) -> None:
        """Keep a matplotlib figure as PNG under the results; the notebook shows it as well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fig.savefig(self.folder / f"{name}.png", dpi=160, bbox_inches="tight")
        self.figures.append({"file": f"{name}.png", "title": title, "caption": caption})

    def verdict(self, claim: str, holds: bool | None, ours: str, evidence: str, paper: str, source: str, n: int, figure: str) -> None:
        """State a verdict: prints it, keeps it. holds: None where this scale cannot tell."""
        word = {True: "holds", False: "does not hold", None: "undecided"}[holds]
        print(f"{claim}: {word} at scale {self.values['scale']} ({evidence}). Here: {ours}. Paper: {paper}.")
        self.verdicts.append({"claim": claim, "paper": paper, "paper_source": source, "ours": ours, "holds": holds, "evidence": evidence,
                              "n": n, "figure": f"{figure}.png"})

    def record(self, rows: list[dict]) -> None:
        """Write rows.csv and, last and atomically, record.json: what the front page and the README are built from."""
        import torch
        with lawa_core.replacing(self.folder / "rows.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        changed = {key: value for key, value in self.given.items() if value is not None and key != "out"}
        flags = [word for key, value in changed.items() for word in ("-p", key, str(value))]
        command = shlex.join(["papermill", f"notebooks/{self.name}.ipynb", "out.ipynb", *flags])
        record = {"notebook": self.name, "title": self.name.replace("_", " "), "question": self.question, "scale": self.values["scale"],
                  "params": {key: value for key, value in self.values.items() if key != "out"}, "command": command,
                  "seconds": round(time.monotonic() - self.begun, 1),
                  "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                  "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}", "rows": "rows.csv",
                  "figures": self.figures, "verdicts": self.verdicts}
        with lawa_core.replacing(self.folder / "record.json") as part:
            part.write_text(json.dumps(record, indent=1, ensure_ascii=False))


def numbers(name: str, value, kind=float) -> list:
    """A parameter that is a list of numbers: "1,3,10", 3 or [1, 3]. LawaError for anything else, an empty list, or one number twice."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        found = [kind(word) for word in words]
    except (TypeError, ValueError):
        raise LawaError(f"{name} must be numbers such as '1,3,10', got {value!r}") from None
    if not found or len(set(found)) < len(found):
        raise LawaError(f"{name} must be at least one number, none twice, got {value!r}")
    return found


TAKES = {float: ((int, float), "a number"), int: ((int,), "a whole number"), bool: ((bool,), "True or False"),
         str: ((str, int, float, list), "a text or a list of numbers")}  # what parameters may be given, besides None


def _fits(value, kind) -> bool:
    return value is None or (isinstance(value, TAKES[kind][0]) and isinstance(value, bool) == (kind is bool))


def grid(rows: list[dict], column: str, **axes) -> np.ndarray:
    """`column` of the rows as an array: an axis for each keyword that is a list, in order; a single value selects, as in scheme="lawa"."""
    lists = {name: list(values) for name, values in axes.items() if isinstance(values, (list, tuple))}
    fixed = {name: value for name, value in axes.items() if name not in lists}
    out = np.full([len(values) for values in lists.values()], np.nan)
    for row in rows:
        if all(row[name] == value for name, value in fixed.items()) and all(row[name] in values for name, values in lists.items()):
            out[tuple(values.index(row[name]) for name, values in lists.items())] = row[column]
    return out


def chosen_elsewhere(values) -> list[int]:
    """For each seed the candidate that is best on the mean of the *other* seeds, so no run chooses for itself.

    values: (candidates, seeds), higher is better, nan where a candidate does not exist. A single seed chooses for itself.
    """
    values = np.asarray(values, float)
    seeds = range(values.shape[1])
    return [int(np.nanargmax(values[:, [other for other in seeds if other != seed] or [seed]].mean(1))) for seed in seeds]


def beyond_spread(differences) -> bool | None:
    """Is a paired difference positive for every seed and its mean above its standard deviation? None for a single seed."""
    differences = np.asarray(differences, float)
    return bool((differences > 0).all() and differences.mean() > differences.std(ddof=1)) if len(differences) > 1 else None


def in_favour(differences) -> str:
    """"3 of 3 seeds": how many of the paired differences are positive."""
    return f"{int((np.asarray(differences) > 0).sum())} of {len(differences)} seeds"


def mean_se(values) -> tuple[float, float]:
    """(mean, standard error of the mean); nan for a single value's error."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def pm(values, digits: int = 3) -> str:
    """"+0.041 ± 0.006": mean and standard error of a few differences."""
    mean, error = mean_se(values)
    return f"{mean:+.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else " (one seed)")


def band(ax, x, values, label: str, number: int, **style) -> None:
    """A curve of the mean over seeds with a band from the lowest to the highest. values: (seeds, steps)."""
    values = np.asarray(values)
    style = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)], "markersize": 4,
             "markevery": 3} | style
    ax.plot(x, values.mean(0), label=label, **style)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _style() -> None:
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.figsize": (8, 4.2), "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 10,
                         "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 11, "legend.frameon": False})
