"""Builds results/index.html from what the notebooks recorded: `python -m lab.report [RESULTS]`.

Reads every <notebook>/record.json (written by lab.Lab) in the results folder and writes index.html
beside them: one file without JavaScript that opens from disk and links to the figures, rows and
executed notebooks by relative path. `--publish` writes what the repository shows of the results.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from lawa_core import LawaError, replacing

ROOT = Path(__file__).resolve().parents[1]

# the paper's claims first, in its order; other notebooks follow by name
ORDER = ("lr_sweep", "spacing_ablation", "averaging_baselines", "model_size", "annealing",
         "loss_spikes", "batch_and_rate", "blend", "budget")

# the paper's primary claims, after its abstract: one test each, judged together
PRIMARY = {
    "early": "averaging helps early in training",
    "rates": "higher learning rates gain more",
    "spacing": "gains grow with considerable spacing",
    "conventional": "LAWA beats conventional training",
    "ema": "LAWA beats EMA",
    "swa": "LAWA beats SWA"}

# class and words of each outcome: symbol and word both, so that none depends on colour
BADGES = {
    "holds": ("yes", "✓ holds"), "opposite": ("no", "✗ opposite"),
    "no difference": ("same", "= no difference"), "cannot tell": ("open", "? cannot tell"),
    "not tested here": ("none", "– not tested here"), "check": ("open", "◦ check")}

GROUPS = {
    "primary": "The paper’s six primary claims",
    "paper": "Other claims of the paper, exploratory",
    "later": "Later work, exploratory",
    "untested": "Not tested here"}

# the generated parts of each page, between <!-- begin NAME --> and <!-- end NAME -->
PAGES = {
    "README.md": ("headline", "claims"),
    "docs/claims.md": ("all claims",),
    "docs/benchmarks.md": ("averaging", "training"),
    "docs/plan.md": ("plan",)}
CSV_BYTES = 2_000_000  # docs/claims.csv stays below


# ---- 1. Read ----

@dataclass(frozen=True)
class Entry:
    """One folder under the results: of a notebook, or of one with other parameters."""
    name: str
    record: dict  # record.json, or {} when there is none that can be read
    problem: str  # why there is none, or ""
    failed: str  # "" or the last error of a failed run newer than the executed notebook
    folder: Path

    @property
    def notebook(self) -> str:
        """The notebook's name, of which a folder "lr_sweep-lr=6e-4" is a variant."""
        return notebook_of(self.folder)

    @property
    def plain(self) -> bool:
        """Run with the committed parameters, so that its claims are the page's."""
        return self.name == self.notebook

    @property
    def changed(self) -> str:
        """What a variant's parameters changed: "lr=6e-4"."""
        return self.name[len(self.notebook) + 1:]

    def has(self, file) -> bool:
        """Is this a file directly in the notebook's folder?"""
        return Path(str(file)).name == str(file) and (self.folder / str(file)).is_file()


def notebook_of(folder: Path) -> str:
    """lab.Lab keys a folder by the parameters that differ: <notebook>-<name>=<value>..."""
    name, equals, _ = folder.name.partition("=")
    return name.rpartition("-")[0] or name if equals else name


def read_entries(results: Path) -> list[Entry]:
    """All notebooks with a record, an executed or a failed copy, in the order of the claims."""
    entries = []
    for folder in sorted(results.iterdir()) if results.is_dir() else []:
        files = ("record.json", f"{folder.name}.ipynb", f"{folder.name}.failed.ipynb")
        shown = folder.is_dir() and not folder.name.startswith(".")
        if shown and any((folder / file).exists() for file in files):
            entries.append(read_entry(folder))
    known = {name: place for place, name in enumerate(ORDER)}
    entries.sort(key=lambda entry: (known.get(entry.notebook, len(ORDER)), entry.notebook,
                                    not entry.plain))
    return entries


def read_entry(folder: Path) -> Entry:
    record, problem = {}, ""
    try:
        record = checked(json.loads((folder / "record.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        problem = "record.json is missing"
    except (ValueError, OSError) as error:
        problem = f"record.json cannot be read: {error}"
    return Entry(folder.name, record, problem, last_failure(folder), folder)


def checked(record) -> dict:
    """The record, if it is an object whose lists hold objects; else ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    for key in ("figures", "claims"):
        items = record.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{key!r} must be a list of objects")
    return record


def last_failure(folder: Path) -> str:
    """The error in <name>.failed.ipynb where that is newer than the executed notebook, else ""."""
    failed = folder / f"{folder.name}.failed.ipynb"
    executed = folder / f"{folder.name}.ipynb"
    if not failed.exists():
        return ""
    if executed.exists() and executed.stat().st_mtime > failed.stat().st_mtime:
        return ""
    found = "the error is in the partial notebook"
    try:
        for cell in json.loads(failed.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    found = f"{output['ename']}: {output['evalue']}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        pass
    return found


# ---- 2. Claims ----

TEXTS = ("claim", "at", "published", "source", "unit", "over", "note", "figure")
NUMBERS = ("value", "mean", "low", "high", "p", "margin", "noise_removed", "lag")


@dataclass(frozen=True)
class Claim:
    """A claim as `lab.Lab.claim` kept it; a text that is missing is "", a number None."""
    notebook: str  # its folder's name
    number: int  # its place among that notebook's claims
    outcome: str  # after Holm's method, for the primary ones
    primary: str
    later: bool
    n: float | None
    pairs: list  # [seed or block, what the claim favours, what it is compared with]
    claim: str
    at: str
    published: str
    source: str
    unit: str
    over: str
    note: str
    figure: str
    value: float | None
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    margin: float | None
    noise_removed: float | None
    lag: float | None
    holm: float | None = None  # p adjusted, where judged together with the others
    alone: str = ""  # the outcome before that, where it changed

    @property
    def group(self) -> str:
        if self.primary:
            return "primary"
        if self.outcome == "not tested here":
            return "untested"
        return "later" if self.later else "paper"

    @property
    def anchor(self) -> str:
        return f"{self.notebook}-{self.number}"

    @property
    def badge(self) -> tuple[str, str]:
        return BADGES[self.outcome]

    def amount(self, value: float) -> str:
        """With its sign, and as many digits as the margin has."""
        digits = 3
        if self.unit != "nats":
            digits = min(3, max(0, -math.floor(math.log10(self.margin or 1)))) or 1
        return f"{value:+.{digits}f}".replace("-", "−")

    @property
    def here(self) -> str:
        """+0.041 [+0.035, +0.047] nats"""
        return f"{self.bare} {self.unit}".strip() if self.mean is not None else ""

    @property
    def bare(self) -> str:
        """The same without its unit."""
        ends = "no interval"
        if self.low is not None and self.high is not None:
            ends = f"{self.amount(self.low)}, {self.amount(self.high)}"
        return f"{self.amount(self.mean)} [{ends}]"

    @property
    def split(self) -> str:
        """What its gain is made of, where that was recorded."""
        if self.noise_removed is None or self.lag is None:
            return ""
        return (f"noise removed {self.amount(self.noise_removed)}, lag {self.amount(self.lag)} "
                f"{self.unit}")

    @property
    def sample(self) -> str:
        """5 seeds"""
        if self.n is None:
            return ""
        words = plural(round(self.n), self.over.removesuffix("s")).strip()
        return f"{words} of one seed" if self.over == "blocks" else words

    @property
    def judged(self) -> str:
        """A sentence on what Holm's method changed, and on what it would take to tell."""
        if self.alone:
            return (f"Its own interval says “{self.alone}”; judged together with the other "
                    f"primary claims it cannot tell (p = {self.p:.2g}, after Holm "
                    f"{self.holm:.2g}).")
        unclear = self.outcome == "cannot tell" and self.over == "seeds"
        if not unclear or None in (self.mean, self.low, self.high):
            return ""
        half = (self.high - self.low) / 2
        # the interval must lie on one side of zero, or within the margin
        enough = max(abs(self.mean), (self.margin or 0) - abs(self.mean))
        if not self.n or enough <= 0:
            return ""
        wanted = math.ceil(self.n * (half / enough) ** 2)
        many = f"about {wanted}" if wanted <= 100 else "more than 100"
        return f"With a spread like this, {many} seeds would tell."


def real(value) -> float | None:
    """A finite number, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def read_claims(notebook: str, record: dict) -> list[Claim]:
    """The claims of a record, whatever it lacks; a claim without a known outcome cannot tell."""
    claims = []
    for i, kept in enumerate(record.get("claims", [])):
        known = {key: "" if kept.get(key) is None else str(kept[key]) for key in TEXTS}
        known |= {key: real(kept.get(key)) for key in NUMBERS}
        pairs = kept.get("pairs")
        claims.append(Claim(
            notebook, i, **known,
            outcome=kept["outcome"] if str(kept.get("outcome")) in BADGES else "cannot tell",
            primary=kept["primary"] if str(kept.get("primary")) in PRIMARY else "",
            later=kept.get("later") is True, n=real(kept.get("n")),
            pairs=pairs if isinstance(pairs, list) else []))
    return claims


def judge(claims: list[Claim]) -> list[Claim]:
    """The claims, the primary ones judged together and in order before the others.

    One that is not recorded or not tested counts with p = 1, so that what is said of the others can
    only get firmer as notebooks come in.
    """
    primary = {}
    others = []
    for claim in claims:
        if claim.primary and claim.primary not in primary:
            primary[claim.primary] = claim
        else:
            others.append(replace(claim, primary=""))
    if not primary:
        return others
    from lab.statistics import LEVEL, holm
    ps = [1.0 if key not in primary or primary[key].p is None else primary[key].p
          for key in PRIMARY]
    judged = []
    for key, adjusted in zip(PRIMARY, holm(ps), strict=True):
        claim = primary.get(key)
        if claim and claim.outcome in ("holds", "opposite"):
            lost = adjusted > 1 - LEVEL + 1e-12
            claim = replace(claim, holm=adjusted, alone=claim.outcome if lost else "",
                            outcome="cannot tell" if lost else claim.outcome)
        if claim:
            judged.append(claim)
    return judged + others


def grouped(claims: list[Claim]) -> dict[str, list[Claim]]:
    return {group: [claim for claim in claims if claim.group == group] for group in GROUPS}


# ---- 3. Figures, as SVG ----

# for the page, whose colours follow light and dark, and for a file of its own
FIGURE_STYLE = """
svg text { fill: var(--ink); font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
svg .soft { fill: var(--soft); }
svg .strong { font-weight: 600; }
svg .badge-text { fill: currentColor; font-weight: 600; }
svg .large { font-size: 16px; paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg .rule { stroke: var(--line); }
svg .zero { stroke: var(--ink); stroke-width: 1.5; }
svg .band { fill: var(--band); }
svg .bar { stroke: currentColor; stroke-width: 2.5; }
svg .pair { stroke: var(--soft); stroke-width: 1.5; }
svg .dot { fill: currentColor; stroke: currentColor; stroke-width: 2; }
svg .hollow { fill: var(--back); stroke: currentColor; stroke-width: 2; }
svg .published { fill: none; stroke: var(--ink); stroke-width: 1.8; }
svg .yes { color: var(--yes); } svg .no { color: var(--no); } svg .same { color: var(--same); }
svg .open, svg .none { color: var(--open); }
""".strip()
LIGHT = """
svg { --ink: #1b2430; --soft: #5a6675; --line: #d9dee5; --back: #fff; --band: #e3e8ee;
      --yes: #14703a; --no: #ab2323; --same: #0b5cad; --open: #5a6675; }
""".strip()


def tag(name: str, *inside, **attributes) -> Markup:
    """An element; everything but Markup is escaped. class_ is class, text_anchor text-anchor."""
    words = []
    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        words.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    parts = "".join(escape(part) for part in inside)
    return Markup(f"<{name}{''.join(words)}>{parts}</{name}>")


@dataclass(frozen=True)
class Axis:
    """From values to pixels: linear, or with a `knee` linear near zero and logarithmic beyond."""
    low: float
    high: float
    left: float
    right: float
    knee: float | None = None

    def bent(self, value: float) -> float:
        return value if self.knee is None else math.asinh(value / self.knee)

    def x(self, value: float) -> float:
        low, high = self.bent(self.low), self.bent(self.high)
        share = (self.bent(value) - low) / (high - low)
        return self.left + share * (self.right - self.left)

    def ticks(self) -> list[float]:
        """Round values, zero among them, far enough from each other to be read."""
        if self.knee is None:
            rough = (self.high - self.low) / 4
            power = 10 ** math.floor(math.log10(rough))
            step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            return [i * step for i in range(first, last + 1)]
        power = math.floor(math.log10(self.knee))
        candidates = [digit * 10.0 ** (power + i) for i in range(9) for digit in (1, 3)]
        kept = [0.0]
        for sign in (1, -1):
            last = 0.0
            for size in candidates:
                value = sign * size
                far = abs(self.x(value) - self.x(last)) >= 44
                if self.low <= value <= self.high and far:
                    kept.append(value)
                    last = value
        return kept


def axis_of(claims: list[Claim], left: float, right: float, bent: bool) -> Axis:
    """An axis that holds zero, the margins, and all that is drawn of these claims."""
    values = [0.0]
    margin = max((claim.margin or 0 for claim in claims), default=0)
    for claim in claims:
        drawn = (claim.mean, claim.low, claim.high, claim.value)
        values += [value for value in drawn if value is not None]
        if not bent and claim.over == "seeds":
            values += [difference for _, difference in differences(claim)]
    low, high = min(*values, -1.3 * margin), max(*values, 1.3 * margin)
    if low == high:
        low, high = -1.0, 1.0
    rest = 0.06 * (high - low)
    if bent:
        return Axis(low * 1.15, high * 1.15, left, right, 2 * margin or (high - low) / 20)
    return Axis(low - rest, high + rest, left, right)


def tick_labels(axis: Axis, y: float) -> list[Markup]:
    values = [float(f"{value:.6g}") for value in axis.ticks()]
    digits = 0
    if axis.knee is None:  # all with as many digits as one of them needs
        digits = max(len(f"{value:g}".partition(".")[2]) for value in values)
    parts = []
    for value in values:
        words = f"{value:+.{digits}f}" if digits else f"{value:+g}"
        words = words.replace("-", "−") if value else "0"
        parts.append(tag("text", words, x=axis.x(value), y=y, text_anchor="middle", class_="soft"))
    return parts


def rules(axis: Axis, top: float, bottom: float) -> list[Markup]:
    """A rule at each tick; zero's is dark."""
    parts = []
    for value in axis.ticks():
        x = axis.x(value)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="rule" if value else "zero"))
    return parts


def interval(claim: Claim, axis: Axis, y: float, size: float) -> Markup:
    """The dot with its 90% interval; filled where the outcome is plain, hollow where it is not."""
    parts = []
    if claim.low is not None and claim.high is not None:
        low, high = axis.x(claim.low), axis.x(claim.high)
        parts.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_="bar"))
        for x in (low, high):
            parts.append(tag("line", x1=x, x2=x, y1=y - size - 2, y2=y + size + 2, class_="bar"))
    plain = claim.outcome in ("holds", "opposite", "no difference")
    parts.append(tag("circle", cx=axis.x(claim.mean), cy=y, r=size,
                     class_="dot" if plain else "hollow"))
    return tag("g", *parts, class_=claim.badge[0])


def diamond(x: float, y: float, size: float) -> Markup:
    return tag("path", d=f"M{x:.1f} {y - size:.1f}l{size} {size} {-size} {size} {-size} {-size}z",
               class_="published")


def margin_band(claim: Claim, axis: Axis, top: float, bottom: float) -> list[Markup]:
    if not claim.margin:
        return []
    left, right = axis.x(-claim.margin), axis.x(claim.margin)
    return [tag("rect", x=left, y=top, width=right - left, height=bottom - top, class_="band")]


def svg(parts: list, width: int, height: float, title: str, **attributes) -> Markup:
    return tag("svg", tag("title", title), *parts, viewBox=f"0 0 {width} {height:.0f}",
               width=width, height=round(height), role="img", **attributes)


def forest(groups: dict[str, list[Claim]], width: int, link: bool = True, **attributes) -> Markup:
    """One figure of all claims with an interval, grouped; within a group a panel for each unit.

    From 700 pixels on words, interval and outcome stand side by side, below that one over another,
    so that type has the same size on a desk and on a phone. link: rows lead to the claims' cards.
    """
    wide = width >= 700
    left, right = (430.0, width - 232.0) if wide else (14.0, width - 14.0)
    per_line = 56 if wide else width // 8
    drawn = [claim for claims in groups.values() for claim in claims if claim.mean is not None]
    axes = {}
    for claim in drawn:
        alike = [other for other in drawn if other.unit == claim.unit]
        axes[claim.unit] = axis_of(alike, left, right, bent=True)
    parts, y = [], 0.0
    for group, claims in groups.items():
        if any(claim.mean is not None for claim in claims):
            y += 26
            parts.append(tag("text", GROUPS[group], x=0, y=y, class_="strong large"))
        # nats first, then what is measured in something else
        for unit in sorted(axes, key=lambda unit: (unit != "nats", unit)):
            rows = [claim for claim in claims if claim.unit == unit and claim.mean is not None]
            if not rows:
                continue
            y += 24
            unit_at = {"x": (left + right) / 2, "text_anchor": "middle"} if wide else {"x": 0}
            parts.append(tag("text", unit, y=y, class_="soft", **unit_at))
            y += 10
            for claim in rows:
                row, y = forest_row(claim, axes[unit], y, width, per_line, link)
                parts += row
            parts += tick_labels(axes[unit], y + 18)
            y += 28
    return svg(parts, width, y + 6, "Every claim’s difference with its 90% interval", **attributes)


def forest_row(claim: Claim, axis: Axis, y: float, width: int, per_line: int,
               link: bool) -> tuple[list[Markup], float]:
    """A claim's row from y on, and where it ends."""
    lines = textwrap.wrap(claim.claim, per_line) or [claim.notebook]
    if width >= 700:
        height = max(18 * len(lines), 36) + 10
        top, bottom, at = y, y + height, y + height / 2
        first = at + 5 - 9 * (len(lines) - 1)
        x = axis.right + 20
        says = [tag("text", claim.badge[1], x=x, y=at - 4, class_="badge-text"),
                tag("text", claim.bare, x=x, y=at + 14, class_="soft")]
    else:
        top = y + 18 * len(lines) + 4
        bottom, at = top + 26, top + 13
        height = bottom - y + 30
        first = y + 15
        says = [tag("text", claim.badge[1], x=0, y=bottom + 15, class_="badge-text"),
                tag("text", claim.bare, x=width, y=bottom + 15, text_anchor="end", class_="soft")]
    words = [tag("text", line, x=0, y=first + 18 * i) for i, line in enumerate(lines)]
    if link:
        words = [tag("a", *words, href=f"#{claim.anchor}")]
    parts = [*margin_band(claim, axis, top, bottom), *rules(axis, top, bottom), *words,
             interval(claim, axis, at, 4.0), tag("g", *says, class_=claim.badge[0])]
    if claim.value is not None:
        parts.append(diamond(axis.x(claim.value), at, 8))
    return parts, y + height


def card_figure(claim: Claim) -> Markup:
    """A claim's own figure: what is published and what was found here, on one axis, large."""
    if claim.mean is None:
        return Markup()
    width, left, right = 320, 92.0, 306.0
    axis = axis_of([claim], left, right, bent=False)
    parts, y = [], 40.0
    rows = []
    if claim.value is not None:
        x = axis.x(claim.value)
        rows += [tag("text", "published", x=0, y=y + 5, class_="large"), diamond(x, y, 9),
                 label(claim.amount(claim.value), x, y - 16, axis)]
        y += 56
    rows += [tag("text", "here", x=0, y=y + 5, class_="large strong"),
             interval(claim, axis, y, 6.5),
             label(claim.amount(claim.mean), axis.x(claim.mean), y - 16, axis)]
    if claim.over == "seeds":
        for _, value in differences(claim):
            x = axis.x(value)
            rows.append(tag("line", x1=x, x2=x, y1=y + 13, y2=y + 21, class_="pair"))
    bottom = y + 30
    parts += margin_band(claim, axis, 8.0, bottom)
    parts += [*rules(axis, 8.0, bottom + 4), *tick_labels(axis, bottom + 18)]
    below = 0 if len(claim.unit) <= 12 else 20  # beside the ticks, or where there is room
    parts.append(tag("text", claim.unit, x=0, y=bottom + 18 + below, class_="soft"))
    title = f"{claim.claim}: {claim.here}"
    return svg([*parts, *rows], width, bottom + 26 + below, title)


def label(words: str, x: float, y: float, axis: Axis) -> Markup:
    """Centred over x, within the axis."""
    x = min(max(x, axis.left + 24), axis.right - 20)
    return tag("text", words, x=x, y=y + 4, text_anchor="middle", class_="large")


def differences(claim: Claim) -> list[tuple[object, float]]:
    """(seed or block, difference in favour of the claim) of its pairs, where they are numbers.

    A pair says what it compares and not whether less is better; the claim's mean says it.
    """
    found = []
    for pair in claim.pairs:
        values = [real(value) for value in pair[1:]] if isinstance(pair, list) else []
        if len(values) != 2 or None in values:
            return []
        found.append((pair[0], values[0] - values[1]))
    if not found or claim.mean is None:
        return []
    mean = sum(value for _, value in found) / len(found)
    near = 1e-3 * abs(claim.mean) + 1e-6
    for sign in (1, -1):
        if abs(sign * mean - claim.mean) <= near:
            return [(pair, sign * value) for pair, value in found]
    return []


# ---- 4. The page ----

def seconds(records: list[dict]) -> float:
    """What the records took together, as far as they say."""
    return sum(real(record.get("seconds")) or 0 for record in records)


def duration(records: list[dict]) -> str:
    minutes, rest = divmod(round(seconds(records)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def dash(value):
    """The value; a dash for nothing."""
    return "—" if value is None or value == "" else value


def sentence(value) -> str:
    return str(dash(value)).rstrip(".") + "."


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def distinct(records: list[dict], key: str) -> str:
    return ", ".join(sorted({str(record[key]) for record in records if record.get(key)}))


def setting(records: list[dict]) -> str:
    """The size of the runs, from the first record that says it: "nano, 10,000 steps, ..."."""
    for record in records:
        params = record.get("params")
        if isinstance(params, dict) and real(params.get("max_iters")) and params.get("preset"):
            words = f"{params['preset']}, {params['max_iters']:,} steps"
            if params.get("seeds") is not None:
                seeds = str(params["seeds"]).replace(",", " ").split()
                words += f", {plural(len(seeds), 'seed')}"
            return words
    return ""


def counts(claims: list[Claim]) -> list[tuple[str, str, int]]:
    """[(class, words, how many)] of the outcomes there are."""
    found = []
    for outcome, (class_, words) in BADGES.items():
        n = sum(claim.outcome == outcome for claim in claims)
        if n:
            found.append((class_, words, n))
    return found


def page(entries: list[Entry]) -> str:
    """index.html: the primary claims, all claims in one figure, cards, a section per notebook."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "duration": duration, "dash": dash, "sentence": sentence, "plural": plural,
        "distinct": distinct, "counts": counts, "card_figure": card_figure,
        "first_upper": lambda words: words[:1].upper() + words[1:],
        "first_lower": lambda words: words[:1].lower() + words[1:]}
    claims, variants = [], {}
    for entry in entries:
        found = read_claims(entry.name, entry.record)
        if entry.plain:
            claims += found
        else:
            variants[entry.name] = judge(found)
    claims = judge(claims)
    groups = grouped(claims)
    by_entry = {entry.name: [] for entry in entries} | variants
    for claim in claims:
        by_entry[claim.notebook].append(claim)
    drawn = any(claim.mean is not None for claim in claims)
    records = [entry.record for entry in entries]
    return environment.get_template("report.html").render(
        entries=entries, by_name={entry.name: entry for entry in entries}, records=records,
        groups=groups, titles=GROUPS, primary=PRIMARY, by_entry=by_entry, claims=claims,
        check=any(claim.outcome == "check" for claim in claims), setting=setting(records),
        wide=forest(groups, 1040, class_="wide") if drawn else "",
        narrow=forest(groups, 358, class_="narrow") if drawn else "",
        figure_style=Markup(FIGURE_STYLE))


def build(results: Path) -> Path:
    """Write results/index.html atomically; LawaError when there is nothing to show."""
    entries = read_entries(results)
    if not entries:
        raise LawaError(f"no records in {results}: expected <notebook>/record.json, "
                         "run ./run_all.sh first")
    with replacing(results / "index.html") as part:
        part.write_text(page(entries), encoding="utf-8")
    return results / "index.html"


# ---- 5. What the repository shows of the results ----

def publish(results: Path, root: Path = ROOT) -> list[Path]:
    """Copy the records and the headline's figure to docs/, and renew the pages from there.

    Records of notebooks with other than the committed parameters are left out.
    """
    entries = [entry for entry in read_entries(results) if entry.record and entry.plain]
    if "lr_sweep" not in [entry.name for entry in entries]:
        raise LawaError(f"no record of lr_sweep in {results}; run ./run_all.sh first")
    records = [entry.record | {"notebook": entry.name} for entry in entries]
    table = csv_of(records)
    text = json.dumps([tidy(slim(record)) for record in records], indent=1, ensure_ascii=False)
    figure = (results / "lr_sweep/gain_over_steps.png").read_bytes()
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs/claims.json").write_text(text + "\n", encoding="utf-8")
    (root / "docs/claims.csv").write_text(table, encoding="utf-8")
    (root / "docs/gain_over_steps.png").write_bytes(figure)
    return renew(root)


def slim(record: dict) -> dict:
    """A record without the pairs over blocks, which are many."""
    kept = []
    for claim in record.get("claims", []):
        blocks = claim.get("over") == "blocks"
        kept.append(claim | {"pairs": []} if blocks else claim)
    return record | {"claims": kept}


def tidy(value):
    """The same with numbers rounded to six digits, and paths of this machine cut to their names."""
    if isinstance(value, dict):
        return {key: tidy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [tidy(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/~])/(?:[^\s/'\":,]+/)+([^\s/'\":,]+)", r"\1", value)
    return value


def csv_of(records: list[dict]) -> str:
    """docs/claims.csv: a line per claim and seed, so that every interval can be made again.

    Of claims paired over blocks, and of those without pairs, the mean alone.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("notebook", "claim", "unit", "over", "seed_or_block", "favoured", "compared",
                     "difference"))
    for record in records:
        for claim in read_claims(record["notebook"], record):
            about = [claim.notebook, claim.claim, claim.unit, claim.over]
            if claim.mean is None:
                continue
            if claim.over == "blocks" or not differences(claim):
                where = f"mean of {claim.n} {claim.over}"
                writer.writerow([*about, where, "", "", f"{claim.mean:.6g}"])
                continue
            for pair, (_, value) in zip(claim.pairs, differences(claim), strict=True):
                numbers = [f"{number:.6g}" for number in (*pair[1:], value)]
                writer.writerow([*about, pair[0], *numbers])
    if len(file.getvalue().encode()) > CSV_BYTES:
        raise LawaError(f"docs/claims.csv would take more than {CSV_BYTES:,} bytes")
    return file.getvalue()


def renew(root: Path = ROOT) -> list[Path]:
    """Write the generated parts of README.md and docs/ anew from docs/ and benchmarks/.

    Nothing is written if one of the PAGES lacks a mark.
    """
    found = blocks(root)
    texts = {}
    for page, names in PAGES.items():
        text = (root / page).read_text(encoding="utf-8")
        for name in names:
            begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
            if text.count(begin) != 1 or text.count(end) != 1:
                raise LawaError(f"{page} must have one {begin} and one {end}")
            if name in found:
                before, rest = text.split(begin)
                after = rest.split(end)[1]
                text = f"{before}{begin}\n{found[name]}\n{end}{after}"
        texts[root / page] = text
    for file, text in drawings(root).items():
        texts[root / file] = text
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def published(root: Path) -> tuple[list[dict], list[Claim]]:
    """The records of docs/claims.json with their claims, judged; none where it has another form."""
    path = root / "docs/claims.json"
    if not path.exists():
        return [], []
    records = json.loads(path.read_text(encoding="utf-8"))
    if not all("claims" in record for record in records):
        return [], []
    claims = []
    for record in records:
        claims += read_claims(record["notebook"], record)
    return records, judge(claims)


def blocks(root: Path = ROOT) -> dict[str, str]:
    """{name: Markdown} of the generated parts, for what there is."""
    found = {}
    records, claims = published(root)
    if records:
        found["headline"] = headline(records, claims)
        found["claims"] = primary_claims(claims)
        found["all claims"] = all_claims(records, claims)
    if (root / "docs/plan.txt").exists():
        plan = (root / "docs/plan.txt").read_text(encoding="utf-8").strip()
        found["plan"] = f"```\n{plan}\n```"
    for file in sorted((root / "benchmarks").glob("*.json")):
        found[file.stem] = json.loads(file.read_text(encoding="utf-8"))["markdown"]
    return found


def drawings(root: Path = ROOT) -> dict[str, str]:
    """{file: SVG}: the paper's claims for README, and all of them."""
    _, claims = published(root)
    groups = grouped(claims)
    paper = {group: groups[group] for group in ("primary", "paper")}
    found = {}
    for file, shown in (("docs/claims.svg", paper), ("docs/claims_all.svg", groups)):
        if any(claim.mean is not None for inner in shown.values() for claim in inner):
            style = tag("style", Markup(LIGHT + FIGURE_STYLE))
            back = tag("rect", width="100%", height="100%", fill="#fff")
            drawn = forest(shown, 1040, link=False, xmlns="http://www.w3.org/2000/svg")
            start, title, rest = drawn.partition("<title>")
            found[file] = f"{start}{style}{back}{title}{rest}\n"
    return found


def headline(records: list[dict], claims: list[Claim]) -> str:
    record = next(record for record in records if record["notebook"] == "lr_sweep")
    drawn = {figure.get("file"): figure for figure in record.get("figures", [])}
    alt = drawn.get("gain_over_steps.png", {}).get("title", "Gain of LAWA over training steps")
    words = []
    for claim in claims:
        if claim.primary in ("early", "rates"):
            words.append(f"*{claim.claim}*: **{claim.badge[1]}**: {claim.here} ({claim.at}; "
                         f"{claim.sample}). Published: {claim.published} {claim.source}.")
    words.append(f"Scale `{record.get('scale')}`, made by `{record.get('command')}` in "
                 f"{duration([record])} on {record.get('machine')}.")
    return f"![{alt}](docs/gain_over_steps.png)\n\n{' '.join(words)}"


def primary_claims(claims: list[Claim]) -> str:
    found = {claim.primary: claim for claim in claims if claim.primary}
    rows = []
    for key, words in PRIMARY.items():
        if key in found:
            claim = found[key]
            rows.append([f"{words}: *{claim.claim}* (`{claim.notebook}`)", *cells(claim)])
        else:
            rows.append([words, "—", "—", "not recorded", "—"])
    figure = "![The paper’s claims: each difference with its 90% interval](docs/claims.svg)"
    drawn = any(claim.mean is not None for claim in claims)
    return f"{table(rows)}\n\n{figure}" if drawn else table(rows)


def all_claims(records: list[dict], claims: list[Claim]) -> str:
    parts = []
    if any(claim.mean is not None for claim in claims):
        parts.append("![Every claim’s difference with its 90% interval](claims_all.svg)")
    for group, found in grouped(claims).items():
        if found:
            rows = [[f"{claim.claim} (`{claim.notebook}`)", *cells(claim)] for claim in found]
            parts.append(f"## {GROUPS[group]}\n\n{table(rows)}")
    scales = distinct(records, "scale")
    parts.append(f"Scale {scales}; {duration(records)} of notebooks in all.")
    return "\n\n".join(parts)


def cells(claim: Claim) -> list:
    """A claim's cells: published, here, outcome, n."""
    here = "; ".join(filter(None, (claim.here, claim.at, claim.split, claim.note)))
    outcome = " ".join(filter(None, (f"{claim.badge[1]}.", claim.judged)))
    whose = "later work: " if claim.later else ""
    return [f"{whose}{claim.published} {claim.source}", here or "—",
            outcome if claim.judged else claim.badge[1], claim.sample or "—"]


def table(rows: list[list]) -> str:
    lines = ["| claim | published | here, with 90% interval | outcome | n |",
             "|---|---|---|---|---|"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m lab.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "results",
                        help="default: results/ in the project")
    parser.add_argument("--publish", action="store_true",
                        help="instead copy the records to docs/ and renew the tables there and in "
                        "README.md")
    parser.add_argument("--renew", action="store_true",
                        help="instead renew these tables from docs/ and benchmarks/ alone")
    args = parser.parse_args(argv)
    try:
        if args.publish:
            written = publish(args.results)
        elif args.renew:
            written = renew()
        else:
            written = [build(args.results)]
    except (LawaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
