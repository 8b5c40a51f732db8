"""What notebooks share: settings, verdicts, figures, tables, and the record of what they found.

A notebook makes one `Lab` from its parameters, trains and evaluates through it, draws figures, sets
tables and states claims through it, and records them under its results folder, from which
lab/report.py builds the front page. How a claim is judged is in lab/statistics.py.
"""
from __future__ import annotations

import ast
import csv
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shlex
import time
from pathlib import Path

import numpy as np

import lawa_core
from lab.statistics import Difference, chosen_elsewhere, compare, difference, least_clear, pm
from lawa_core import LawaError

__all__ = [
    "DASHES", "MARKERS", "SHARES", "Lab", "band", "chosen_elsewhere", "clear_progress", "compare",
    "difference", "errorbars", "grid", "least_clear", "nearest", "numbers", "pm", "results_name"]

SHARES = (0.1, 0.2, 0.4, 0.6, 0.77)  # of a run, where claims are judged; the end apart
BRANCHES = (0.5, 0.75)  # where runs of other notebooks branch off, so that states are kept

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
    as "0,1,2" is a list of numbers; n_seeds: take only so many of the scale's seeds; trains: False
    where nothing is trained, and the scale but a label of the results.
    Attributes: values {parameter: value}; config (of `model.Config`, at the rate `lr`); rates, from
    the usual one to the high one, and lr, the one between; seeds; k, spacing and wide, the windows;
    at {share of the run: step} and end, where claims are judged; folder, of the results.
    Errors: LawaError that names every bad parameter, unknown, of the wrong type, or out of range,
    before anything is trained.
    """

    def __init__(self, name: str, question: str, namespace: dict, n_seeds: int | None = None,
                 trains: bool = True):
        import matplotlib.pyplot as plt

        import model
        self.begun = time.monotonic()
        self.name = name
        self.question = question
        self.given = _parameters(namespace)
        self.scale = self.given["scale"]
        self.values = model.scale_values(self.scale)
        own_seeds = numbers("seeds", self.values["seeds"], int)[:n_seeds]
        self.values["seeds"] = ",".join(map(str, own_seeds))
        for key, value in self.given.items():
            if value is not None:
                self.values[key] = value
        rates = self.values["lrs"]
        if self.given.get("lr") is not None:
            rates = self.values["lr"]
        # as typed: 6e-4 * 10 would be 0.005999999999999999, and name another run
        self.rates = sorted(float(f"{rate:.6g}") for rate in numbers("lrs", rates))
        self.lr = self.rates[len(self.rates) // 2]
        self.config = model.scale_config(self.values, lr=self.lr)
        model.open_corpus(self.config.corpus)  # and a missing corpus
        self.k = self.values["k"]
        self.spacing = self.values["spacing"]
        self.wide = max(self.values["wide"], self.spacing)
        self.seeds = numbers("seeds", self.values["seeds"], int)
        self.configs()  # refuses values out of range
        for spacing in (self.spacing, self.wide):
            lawa_core.lawa(self.k, spacing)  # refuses a window that is none
            if trains and spacing % self.config.ckpt_interval:
                raise LawaError(f"spacing must be a multiple of the checkpoint interval "
                                f"{self.config.ckpt_interval}, got {spacing}")
        self.at = {share: self.step(share) for share in SHARES}
        self.end = self.step(1)
        default = model.ROOT / "results" / f"scale-{self.scale}"
        self.folder = Path(self.values.get("out") or default) / results_name(name, self.given)
        self.trains = trains
        self.trained = 0  # runs
        self.figures = []
        self.tables = []
        self.claims = []
        plt.rcParams.update(STYLE)
        what = f"{self.config.preset}, {self.config.max_iters:,} steps, seeds {self.seeds}"
        if not trains:
            what = "nothing is trained"
        if self.scale == "smoke":
            what += "; a check of the machinery that prints no verdict: -p scale laptop gives one"
        shown = self.folder
        if shown.is_relative_to(model.ROOT):
            shown = shown.relative_to(model.ROOT)
        print(f"scale {self.scale}: {what}\nresults: {shown}")

    def step(self, share: float, config=None) -> int:
        """The checkpoint, one with all averages' files, nearest to a share of a run."""
        config = config or self.config
        apart = config.averages_interval or config.ckpt_interval
        steps = [step for step in config.checkpoint_steps if step % apart == 0]
        return steps[nearest(steps, share * config.max_iters)]

    def points(self, n: int = 20, config=None) -> list[int]:
        """About n such steps, evenly spread over a run, by default the scale's, and the shares'."""
        config = config or self.config
        shares = [*(i / n for i in range(1, n + 1)), *SHARES]
        return sorted({self.step(share, config) for share in shares})

    def middle(self, step: int, k: int | None = None, spacing: int | None = None,
               config=None) -> int:
        """The step in the middle of the window that ends at `step`, rounded to a checkpoint."""
        back = ((k or self.k) - 1) * (spacing or self.spacing) / 2
        steps = (config or self.config).checkpoint_steps
        return steps[nearest(steps, step - back)]

    def configs(self, rates=None, **given) -> list:
        """A configuration of this scale for every rate (default: all) and seed."""
        import model
        return [model.scale_config(self.values, **{"lr": rate, "seed": seed} | given)
                for rate in rates or self.rates for seed in self.seeds]

    def train(self, configs, state_at=(), *, schemes=None, at=(), **more) -> list[Path]:
        """Train what is not trained, with its cost printed first; returns the run folders.

        state_at: as for `runs.train_all`, with BRANCHES added; more: its other arguments. schemes,
        at: as for `evaluate`, and used with the parameter disk_budget (GB a run) only: checkpoints
        are kept that these need, beside those of both windows at 20 points; 0: no others.
        Errors: LawaError where disk or memory are not enough, unless the parameter force is set.
        """
        import model
        from lab.plan import plan, smallest
        from lab.runs import Windows, train_all, usual_jobs
        configs = list(configs)
        budget = self.values.get("disk_budget")
        if budget is not None:
            windows = [lawa_core.lawa(self.k, spacing) for spacing in (self.spacing, self.wide)]
            needs = []
            for config in configs:
                points = self.points(20, config)
                middles = [self.middle(point, self.k, window.spacing, config)
                           for point in points for window in windows]
                needs += [(tuple(windows), tuple(points)), ((), tuple(middles))]
                rules = schemes(config) if callable(schemes) else schemes or {}
                steps = at(config) if callable(at) else at
                stored = [rule for rule in rules.values() if not isinstance(rule, str)]
                needs.append((tuple(stored), tuple(steps)))
            keep = Windows(tuple(dict.fromkeys(needs)))
            size = budget * 1e9 or smallest(configs, keep)
            more = {"keep": keep, "disk_budget": size} | more
        states = sorted({*state_at, *(self.step(share) for share in BRANCHES)})
        missing = [c for c in configs if not (model.run_dir(c) / "summary.json").exists()]
        if missing:
            limits = {name: more[name] for name in ("keep", "disk_budget") if name in more}
            cost = plan(missing, states=len(states) + 1, jobs=usual_jobs(), **limits)
            print(cost)
            if cost.lacking and not self.values.get("force"):
                told = [f"not enough {what}: {words}" for what, words in cost.lacking.items()]
                raise LawaError("; ".join(told) + "; or go on all the same with -p force True")
        folders = train_all(configs, state_at=states, **more)
        self.trained += len(missing)
        if missing and clear_progress():
            print(cost)
        return folders

    def evaluate(self, configs, schemes, at, fields=("lr", "seed")) -> list[dict]:
        """Train what is not trained, evaluate runs and averages.

        schemes, at: as for `model.evaluate_trajectory`, or functions of the configuration that
        return them. Returns its rows with the configurations' `fields` before them.
        """
        import model
        configs = list(configs)
        rows = []
        runs = self.train(configs, schemes=schemes, at=at)
        for config, run in zip(configs, runs, strict=True):
            rules = schemes(config) if callable(schemes) else schemes
            steps = at(config) if callable(at) else at
            about = {field: getattr(config, field) for field in fields}
            for row in model.evaluate_trajectory(run, rules, steps, self.values["n_blocks"]):
                rows.append(about | row)
        clear_progress()
        return rows

    def figure(self, fig, name: str, title: str, caption: str) -> None:
        """Keep a matplotlib figure as PNG under the results; the notebook shows it as well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fig.savefig(self.folder / f"{name}.png", dpi=160, bbox_inches="tight")
        width, height = fig.get_size_inches()
        self.figures.append({"file": f"{name}.png", "title": title, "caption": caption,
                             "wide": bool(width > 2.5 * height)})

    def table(self, name: str, title: str, rows: list[dict], caption: str) -> None:
        """Keep rows, all with the same keys, as a table: CSV under the results; prints it too."""
        columns = list(rows[0])
        _write_csv(self.folder / f"{name}.csv", columns, rows)
        shown = [_shown([row[column] for row in rows]) for column in columns]
        self.tables.append({"file": f"{name}.csv", "title": title, "caption": caption,
                            "columns": columns, "rows": list(map(list, zip(*shown, strict=True)))})
        aligned = []
        for column, texts in zip(columns, shown, strict=True):
            width = max(map(len, (column, *texts)))
            words = any(isinstance(row[column], str) for row in rows)
            aligned.append([f"{text:{'<' if words else '>'}{width}}" for text in (column, *texts)])
        lines = ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]
        print(title, *lines, sep="\n")

    def claim(self, words: str, found: Difference | None, *, at: str, published: str, source: str,
              figure: str, later: bool = False, primary: str = "", value: float | None = None,
              split=None, note: str = "") -> str:
        """Judge a claim, print the verdict and keep it. Returns the outcome.

        Args: words: the claim; found: the difference it rests on, positive where it is true, None
        where nothing here tests it (note: why); at: where that was measured, "lr 1e-2, 40% of the
        run"; published: what is published on it, with source, which begins with its mark ([S] read
        in a source, [P] read off a plot, [I] inferred), later: by later work and not by the paper;
        value: a published number to draw beside ours; primary: which of the paper's primary claims
        this is, of report.PRIMARY; split: (noise removed, lag), two differences that make up the
        gain; figure: the name given to `figure`; note: a sentence.
        """
        outcome = "not tested here" if found is None else found.outcome
        if self.scale == "smoke":
            outcome = "check"
        lines = [f"{words}: {outcome.upper()}" if outcome != "check" else f"check: {words}"]
        lines.append(f"  here       {at}: {found or 'nothing'}")
        if split:
            lines.append(f"  of which   noise removed {split[0].mean:+.3f}, "
                         f"lag {split[1].mean:+.3f} nats")
        lines.append(f"  {'later work' if later else 'the paper'}  {published} {source}")
        if note:
            lines.append(f"  note       {note}")
        print("\n".join(lines))
        kept = {"claim": words, "outcome": outcome, "at": at, "published": published,
                "source": source, "later": later, "primary": primary, "value": value,
                "note": note, "figure": f"{figure}.png"}
        if found is not None:
            kept |= {"mean": _number(found.mean), "low": _number(found.low),
                     "high": _number(found.high), "p": found.p, "n": found.n, "over": found.over,
                     "margin": found.margin, "unit": found.unit,
                     "pairs": [[key, _number(a), _number(b)] for key, a, b in found.pairs]}
        if split:
            kept |= {"noise_removed": split[0].mean, "lag": split[1].mean}
        self.claims.append(kept)
        return outcome

    def record(self, rows: list[dict]) -> None:
        """Write rows.csv and, last and atomically, record.json: what lab/report.py reads."""
        import torch
        columns = [name for name in rows[0] if name not in ("losses", "gains")]  # arrays
        _write_csv(self.folder / "rows.csv", columns, rows)
        command = ["papermill", f"notebooks/{self.name}.ipynb", "out.ipynb", "-p", "scale",
                   self.scale]
        for key, value in changed_parameters(self.name, self.given).items():
            command += ["-p", key, str(value)]
        record = {
            "notebook": self.name, "title": self.name.replace("_", " "), "question": self.question,
            "scale": self.scale,
            "params": {key: value for key, value in self.values.items()
                       if key != "out" and (self.trains or self.given.get(key) is not None)},
            "command": shlex.join(command),
            "seconds": round(time.monotonic() - self.begun, 1), "runs_trained": self.trained,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
            "rows": "rows.csv", "figures": self.figures, "tables": self.tables,
            "claims": self.claims}
        with lawa_core.replacing(self.folder / "record.json") as part:
            part.write_text(json.dumps(record, indent=1, ensure_ascii=False))


def changed_parameters(name: str, given: dict) -> dict:
    """What of a notebook's given parameters, scale and out apart, is not as it is committed."""
    import model
    path = model.ROOT / "notebooks" / f"{name}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    committed = {}
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", ()):
            for node in ast.parse("".join(cell["source"])).body:
                committed[node.target.id] = ast.literal_eval(node.value)
    return {key: value for key, value in sorted(given.items())
            if key not in ("scale", "out") and value != committed.get(key)}


def results_name(name: str, given: dict) -> str:
    """The folder of a notebook's results: its name and what is not as committed, "x-lr=6e-4".

    How much disk a run may take changes no result.
    """
    import model
    words = name
    known = (model.ROOT / "notebooks" / f"{name}.ipynb").exists()
    for key, value in changed_parameters(name, given).items():
        if known and key not in ("disk_budget", "force"):
            words += re.sub(r"[^\w.=,+-]", "_", f"-{key}={value}")
    if len(words) > 120:  # a file system's names have 255 bytes
        words = f"{words[:100]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    return words


def clear_progress() -> bool:
    """In a notebook, take away the lines of progress, and what else the cell printed; is it one?"""
    from IPython import get_ipython
    from IPython.display import clear_output
    if get_ipython():
        clear_output(wait=True)
    return get_ipython() is not None


def _write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    with lawa_core.replacing(path) as part, \
            open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _shown(values: list) -> list[str]:
    """A column of a table as texts: floats with the decimals that the column needs, 4 at most."""
    floats = [value for value in values if isinstance(value, (float, np.floating))]
    places = max((len(f"{value:.4f}".rstrip("0").partition(".")[2]) for value in floats), default=0)
    texts = []
    for value in values:
        text = str(value)
        if value is None or value != value:  # nan
            text = "—"
        elif isinstance(value, (float, np.floating)):
            lost = value and not float(f"{value:.4f}")
            text = (f"{value:.2g}" if lost else f"{value:,.{places}f}").replace("-", "−")
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            text = f"{value:,}".replace("-", "−")
        texts.append(text)
    return texts


def _number(value) -> float | None:
    """The number; None for one that JSON does not know."""
    return float(value) if math.isfinite(value) else None


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


# ---- 2. Rows ----

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
