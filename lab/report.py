"""Builds results/index.html from what the notebooks recorded: `python -m lab.report [RESULTS]`.

Reads every <notebook>/record.json (written by lab.Lab) in the results folder and writes index.html
beside them: one file without JavaScript that opens from disk and links to the figures, tables,
rows and executed notebooks by relative path. `--publish` writes what the repository shows of the
results; of notebooks that are not in the results folder that stays as it is.
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
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import IdentityTransform, blended_transform_factory

from lab.statistics import LEVEL, holm
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

# colour and words of each outcome: symbol and word both, so that none depends on colour
BADGES = {
    "holds": ("yes", "✓ holds"), "opposite": ("no", "✗ opposite"),
    "no difference": ("same", "= no difference"), "cannot tell": ("open", "? cannot tell"),
    "not tested here": ("open", "– not tested here"), "check": ("open", "◦ check")}

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
    """One folder under the results, which lab.Lab names <notebook> or <notebook>-<name>=<value>."""
    folder: Path
    notebook: str
    changed: str  # what a variant's parameters changed, "lr=6e-4"; "" for the committed ones
    record: dict  # record.json, or {} when there is none that can be read
    problem: str  # why there is none, or ""
    failed: str  # "" or the last error of a failed run newer than the executed notebook

    def has(self, file) -> bool:
        """Is this a file directly in the notebook's folder?"""
        return Path(str(file)).name == str(file) and (self.folder / str(file)).is_file()


def read_entries(results: Path) -> list[Entry]:
    """All notebooks with a record, an executed or a failed copy, in the order of the claims."""
    entries = []
    for folder in sorted(results.iterdir()) if results.is_dir() else []:
        files = ("record.json", f"{folder.name}.ipynb", f"{folder.name}.failed.ipynb")
        path, executed, failed = (folder / file for file in files)
        found = path.exists() or executed.exists() or failed.exists()
        if folder.name.startswith(".") or not found:
            continue
        notebook, changed = re.fullmatch(r"(?s)(.+?)(?:-([^-=]+=.*))?", folder.name).groups("")
        problem = failure = ""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {type(record).__name__}")
            for key in ("figures", "tables", "claims"):
                items = record.get(key, [])
                if not isinstance(items, list) or not all(isinstance(it, dict) for it in items):
                    raise ValueError(f"{key!r} must be a list of objects")
        except FileNotFoundError:
            record, problem = {}, "record.json is missing"
        except (ValueError, OSError) as error:
            record, problem = {}, f"record.json cannot be read: {error}"
        age = executed.stat().st_mtime if executed.exists() else 0
        if failed.exists() and failed.stat().st_mtime >= age:
            failure = last_error(failed)
        entries.append(Entry(folder, notebook, changed, record, problem, failure))
    return sorted(entries, key=lambda entry: (*place(entry.notebook), entry.changed))


def place(notebook: str) -> tuple:
    """What notebooks are sorted by."""
    return ORDER.index(notebook) if notebook in ORDER else len(ORDER), notebook


def last_error(notebook: Path) -> str:
    found = "the error is in the partial notebook"
    try:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    found = f"{output['ename']}: {output['evalue']}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        pass
    return found


# ---- 2. Claims ----

class Claim:
    """A claim as `lab.Lab.claim` kept it; a text that is missing is "", a number None."""
    TEXTS = ("claim", "at", "published", "source", "unit", "over", "note", "figure")
    NUMBERS = ("value", "mean", "low", "high", "p", "n", "margin", "noise_removed", "lag")

    def __init__(self, notebook: str, number: int, kept: dict):
        self.notebook = notebook  # its folder's name
        self.anchor = f"{notebook}-{number}"
        for key in self.TEXTS:
            setattr(self, key, "" if kept.get(key) is None else str(kept[key]))
        for key in self.NUMBERS:
            setattr(self, key, real(kept.get(key)))
        self.p = 1.0 if self.p is None else self.p  # what nothing tests
        self.later = kept.get("later") is True
        self.primary = kept["primary"] if str(kept.get("primary")) in PRIMARY else ""
        self.outcome = kept["outcome"] if str(kept.get("outcome")) in BADGES else "cannot tell"
        self.holm = None  # p adjusted, where judged together with the others
        self.alone = ""  # the outcome before that, where it changed
        # [seed or block, what the claim favours, what it is compared with], and the differences in
        # favour of the claim: a pair does not say whether less is better, the claim's mean does
        self.pairs, self.differences = kept.get("pairs") or [], []
        try:
            values = [one - other for _, one, other in self.pairs]
            mean = sum(values) / len(values)
            if math.isclose(abs(mean), abs(self.mean), rel_tol=1e-3, abs_tol=1e-6):
                sign = 1 if mean * self.mean >= 0 else -1
                self.differences = [sign * value for value in values]
        except (TypeError, ValueError, ZeroDivisionError):
            pass  # not all are numbers, or there are none

    @property
    def group(self) -> str:
        if self.primary:
            return "primary"
        if self.outcome == "not tested here":
            return "untested"
        return "later" if self.later else "paper"

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
        if self.mean is None:
            return ""
        ends = "no interval"
        if self.low is not None and self.high is not None:
            ends = f"{self.amount(self.low)}, {self.amount(self.high)}"
        return f"{self.amount(self.mean)} [{ends}] {self.unit}".strip()

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
        if not unclear or None in (self.mean, self.low, self.high, self.margin, self.n):
            return ""
        # the interval must lie on one side of zero, or within the margin
        enough = max(abs(self.mean), self.margin - abs(self.mean)) or 1e-9
        wanted = math.ceil(self.n * ((self.high - self.low) / 2 / enough) ** 2)
        many = f"about {wanted}" if wanted <= 100 else "more than 100"
        return f"With a spread like this, {many} seeds would tell."


def real(value) -> float | None:
    """A finite number, else None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None


def claims_of(records: dict[str, dict]) -> list[Claim]:
    """The claims of {notebook: record}; the primary ones first, in order and judged together.

    One that is not recorded or not tested counts with p = 1, so that what is said of the others can
    only get firmer as notebooks come in.
    """
    claims, primary = [], {}
    for notebook, record in records.items():
        for number, kept in enumerate(record.get("claims", [])):
            claim = Claim(notebook, number, kept)
            claims.append(claim)
            if claim.primary in primary:
                claim.primary = ""
            elif claim.primary:
                primary[claim.primary] = claim
    if primary:
        ps = [primary[key].p if key in primary else 1.0 for key in PRIMARY]
        for key, adjusted in zip(PRIMARY, holm(ps), strict=True):
            claim = primary.get(key)
            if claim and claim.outcome in ("holds", "opposite"):
                claim.holm = adjusted
                if adjusted > 1 - LEVEL + 1e-12:
                    claim.alone, claim.outcome = claim.outcome, "cannot tell"
    order = [*PRIMARY, ""]
    return sorted(claims, key=lambda claim: order.index(claim.primary))


def grouped(claims: list[Claim]) -> dict[str, list[Claim]]:
    return {group: [claim for claim in claims if claim.group == group] for group in GROUPS}


# ---- 3. Figures ----

# on a light page; in the page's style each is a variable, which has another value in the dark
COLOURS = {
    "ink": "#1b2430", "soft": "#5a6675", "line": "#d9dee5", "back": "#ffffff", "band": "#dfe5ec",
    "yes": "#14703a", "no": "#ab2323", "same": "#0b5cad", "open": "#596575"}
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.sans-serif": ["DejaVu Sans"],
    "font.size": 14, "xtick.labelsize": 14, "ytick.labelsize": 16, "axes.titlesize": 14,
    "text.color": COLOURS["ink"], "ytick.labelcolor": COLOURS["ink"],
    "xtick.labelcolor": COLOURS["soft"], "axes.labelcolor": COLOURS["soft"],
    "axes.titlecolor": COLOURS["soft"], "grid.color": COLOURS["line"], "grid.linewidth": 1,
    "figure.facecolor": COLOURS["back"], "figure.dpi": 72}  # a pixel is a point


def draw(ax, claims: list[Claim], scale: list[Claim], size: float, bent: bool, up: int = 0) -> None:
    """The claims' dots with their 90% intervals, in rows 0, 1, ...; published values `up` rows on.

    Filled where the outcome is plain, hollow where it is not. On an axis with zero, the margins and
    all that is drawn of `scale`; bent: linear near zero and logarithmic beyond. size: of the dots.
    """
    values = [0.0]
    for claim in scale:
        margin = 1.3 * (claim.margin or 0)
        drawn = (claim.mean, claim.low, claim.high, claim.value, margin, -margin)
        values += [value for value in drawn if value is not None]
        if not bent and claim.over == "seeds":
            values += claim.differences
    low, high = min(values), max(values)
    if bent:
        margin = max(claim.margin or 0 for claim in scale)
        knee = 10 ** round(math.log10(2 * margin or (high - low) / 20 or 1))
        ax.set_xscale("symlog", linthresh=knee)
        ax.xaxis.get_major_locator().set_params(numticks=7)
        ax.set_xlim(1.2 * min(low, -knee), 1.2 * max(high, knee))
    else:
        rest = 0.08 * (high - low) or 1
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.set_xlim(low - rest, high + rest)
    ax.xaxis.set_major_formatter(
        lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
    ax.set_frame_on(False)
    ax.tick_params(which="both", length=0)
    ax.set_axisbelow(True)
    ax.grid(axis="x")
    ax.axvline(0, color=COLOURS["ink"], linewidth=1.5, zorder=1)
    for y, claim in enumerate(claims):
        margin = claim.margin or 0
        ax.barh(y + up / 2, 2 * margin, 1 + up, -margin, color=COLOURS["band"], zorder=0)
        known = None not in (claim.low, claim.high)
        ends = [[claim.mean - claim.low], [claim.high - claim.mean]] if known else None
        colour = COLOURS[claim.badge[0]]
        plain = claim.outcome in ("holds", "opposite", "no difference")
        ax.errorbar(claim.mean, y, xerr=ends, fmt="o", color=colour, markersize=size,
                    markerfacecolor=colour if plain else COLOURS["back"], markeredgewidth=2,
                    elinewidth=2.5, capsize=size / 2 + 2, capthick=2.5)
        if claim.value is not None:
            ax.plot(claim.value, y + up, "D", markerfacecolor="none", markersize=size / 2 + 6,
                    markeredgecolor=COLOURS["ink"], markeredgewidth=1.8)


@matplotlib.rc_context(STYLE)
def forest(claims: list[Claim], width: int, page: bool = True) -> str:
    """One figure of all claims with an interval, grouped; within a group a panel for each unit.

    From 700 pixels on words, interval and outcome stand side by side, below that one over another,
    so that type has the same size on a desk and on a phone. "" where no claim has an interval.
    """
    wide = width >= 700
    left, right = (430, width - 232) if wide else (14, width - 14)
    panels = []  # (group, where it begins; the claims; all of that unit, which have one axis)
    shown = [claim for claim in claims if claim.mean is not None]
    units = sorted({claim.unit for claim in shown}, key=lambda unit: (unit != "nats", unit))
    for group, title in GROUPS.items():
        for unit in units:
            alike = [claim for claim in shown if claim.unit == unit]
            rows = [claim for claim in alike if claim.group == group]
            if rows:
                panels.append((title, rows, alike))
                title = ""
    if not panels:
        return ""
    words = {claim: textwrap.fill(claim.claim, 56 if wide else width // 8) for claim in shown}
    lines = max(text.count("\n") + 1 for text in words.values())
    row = max(36, 18 * lines) + 10 if wide else 36 * lines + 26  # pixels
    height = sum((60 if title else 34) + row * len(rows) + 28 for title, rows, _ in panels)
    figure = Figure((width / 72, height / 72), layout="none")
    top = 0
    for title, rows, alike in panels:
        top += 60 if title else 34
        bottom = top + row * len(rows)
        ax = figure.add_axes((left / width, 1 - bottom / height,
                              (right - left) / width, (bottom - top) / height))
        draw(ax, rows, alike, 8, bent=True)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks([])
        ax.set_title(rows[0].unit, pad=8)
        across = blended_transform_factory(IdentityTransform(), ax.transData)  # pixels, rows
        ax.text(0, -0.5 - 34 / row, title, fontsize=16, weight="bold", transform=across)
        for y, claim in enumerate(rows):
            texts = ((words[claim], {"url": f"#{claim.anchor}" if page else None}),
                     (claim.badge[1], {"color": COLOURS[claim.badge[0]], "weight": "bold"}),
                     (claim.here.removesuffix(claim.unit).strip(), {"color": COLOURS["soft"]}))
            places = ((0, -13, "left", "bottom"), (0, 13, "left", "top"),
                      (width, 13, "right", "top"))
            if wide:
                places = ((0, 0, "left", "center"), (right + 20, -9, "left", "center"),
                          (right + 20, 9, "left", "center"))
            for (text, look), (x, below, ha, va) in zip(texts, places, strict=True):
                ax.text(x, y + below / row, text, ha=ha, va=va, transform=across, **look)
        top = bottom + 28
    return svg(figure, "Every claim’s difference with its 90% interval", page)


@matplotlib.rc_context(STYLE)
def card_figure(claim: Claim) -> str:
    """A claim's own figure: what is published and what was found here, on one axis, large."""
    values = {"here": claim.mean}
    if claim.value is not None:
        values["published"] = claim.value
    width, height = 320, 52 * len(values) + 44
    figure = Figure((width / 72, height / 72), layout="none")
    ax = figure.add_axes((92 / width, 42 / height, 214 / width, 52 * len(values) / height))
    draw(ax, [claim], [claim], 13, bent=False, up=len(values) - 1)
    ax.set_ylim(-0.5, len(values) - 0.5)
    ax.set_yticks(range(len(values)), values)
    ax.set_xlabel(claim.unit)
    for y, value in enumerate(values.values()):
        ax.annotate(claim.amount(value), (value, y), (0, 10), textcoords="offset points",
                    ha="center", fontsize=16)
    if claim.over == "seeds":
        ax.plot(claim.differences, [-0.33] * len(claim.differences), "|", color=COLOURS["soft"],
                markersize=8, markeredgewidth=1.5)
    return svg(figure, f"{claim.claim}: {claim.here}")


def svg(figure: Figure, title: str, page: bool = True) -> str:
    """The figure as a part of the page with the page's colours, or as a file of its own."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids that no other figure has
        figure.savefig(file, format="svg",
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    if not page:
        return file.getvalue()
    drawn = file.getvalue().partition("<svg")[2].partition(">")[2]
    drawn = re.sub(r'<style.*?</style>| id="[\w.]+_\d+"| target="_blank"', "", drawn)
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">'
                  f"<title>{escape(title)}</title>{drawn}")


# ---- 4. The page ----

def duration(records: list[dict]) -> str:
    """What the records took together, as far as they say."""
    total = sum(real(record.get("seconds")) or 0 for record in records)
    minutes, seconds = divmod(round(total), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def distinct(records: list[dict], key: str) -> str:
    return ", ".join(sorted({str(record[key]) for record in records if record.get(key)}))


def cells_of(table: dict) -> list[list[tuple[str, bool]]]:
    """The header and the rows of a table as `lab.Lab.table` kept it; [] for one that is malformed.

    A cell is its text, and whether all its column holds are numbers.
    """
    columns, rows = table.get("columns"), table.get("rows")
    if not columns or not isinstance(columns, list) or not isinstance(rows, list):
        return []
    if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        return []
    texts = [["—" if cell is None else str(cell) for cell in row] for row in (columns, *rows)]
    numbers = [all(re.fullmatch(r"[+−-]?(inf|[\d,.]+(e[+−-]?\d+)?)|—", text) for text in column)
               for column in zip(*texts[1:], strict=True)] or [False] * len(columns)
    return [list(zip(row, numbers, strict=True)) for row in texts]


def build(results: Path) -> Path:
    """Write results/index.html atomically; LawaError when there is nothing to show."""
    entries = read_entries(results)
    if not entries:
        raise LawaError(f"no records in {results}: expected <notebook>/record.json, "
                         "run ./run_all.sh first")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "plural": plural, "distinct": distinct,
                            "cells": cells_of, "card_figure": card_figure}
    claims = claims_of({entry.folder.name: entry.record for entry in entries if not entry.changed})
    variants = []  # what they claim stands in their own sections alone
    for entry in entries:
        if entry.changed:
            variants += claims_of({entry.folder.name: entry.record})
    html = environment.get_template("report.html").render(
        entries=entries, records=[entry.record for entry in entries], claims=claims,
        variants=variants, groups=grouped(claims), titles=GROUPS, primary=PRIMARY, badges=BADGES,
        colours=COLOURS, wide=forest(claims, 1040), narrow=forest(claims, 358))
    with replacing(results / "index.html") as part:
        part.write_text(html, encoding="utf-8")
    return results / "index.html"


# ---- 5. What the repository shows of the results ----

def publish(results: Path, root: Path = ROOT) -> list[Path]:
    """Copy the records and the headline's figure to docs/, and renew the pages from there.

    Records of notebooks with other than the committed parameters are left out; those in docs/ of
    notebooks that are not in the results stay, so that one can be done again alone.
    """
    records = {entry.folder.name: entry.record for entry in read_entries(results)
               if entry.record and not entry.changed}
    if not records:
        raise LawaError(f"no records in {results}; run ./run_all.sh first")
    path = root / "docs/claims.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    stay = {record["notebook"]: record for record in before if "claims" in record}
    if "lr_sweep" not in stay | records:
        raise LawaError(f"no record of lr_sweep in {results} or {path}; run ./run_all.sh first")
    headline = "gain_over_steps.png"
    figure = (results / "lr_sweep" / headline).read_bytes() if "lr_sweep" in records else None

    # docs/claims.json: the records without tables and pairs over blocks, which are many, with
    # numbers of six digits, and paths of this machine cut to their names
    kept = []
    for name, record in sorted((stay | records).items(), key=lambda item: place(item[0])):
        claims = [claim | {"pairs": []} if claim.get("over") == "blocks" else claim
                  for claim in record.get("claims", [])]
        kept.append(record | {"notebook": name, "claims": claims})
        kept[-1].pop("tables", None)
    kept = json.loads(json.dumps(kept), parse_float=lambda digits: float(f"{float(digits):.6g}"),
                      parse_constant=lambda _: None)
    text = re.sub(r"(?:(?<=\\[nt])|(?<![\w.:/~]))/(?:[^\s/'\":,]+/)+([^\s/'\":,]+)", r"\1",
                  json.dumps(kept, indent=1, ensure_ascii=False))

    # docs/claims.csv: a line per claim and seed, so that every interval can be made again; where
    # there are no pairs the mean
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("notebook", "claim", "unit", "over", "seed_or_block", "favoured", "compared",
                     "difference"))
    for claim in claims_of({record["notebook"]: record for record in json.loads(text)}):
        about = (claim.notebook, claim.claim, claim.unit, claim.over)
        rows = [(*pair, f"{difference:.6g}")
                for pair, difference in zip(claim.pairs, claim.differences, strict=False)]
        if claim.mean is not None:
            rows = rows or [(f"mean of {claim.n} {claim.over}", "", "", claim.mean)]
        writer.writerows((*about, *row) for row in rows)
    if len(file.getvalue().encode()) > CSV_BYTES:
        raise LawaError(f"docs/claims.csv would take more than {CSV_BYTES:,} bytes")
    (root / "docs").mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    (root / "docs/claims.csv").write_text(file.getvalue(), encoding="utf-8")
    if figure:
        (root / "docs" / headline).write_bytes(figure)
    return renew(root)


def renew(root: Path = ROOT) -> list[Path]:
    """Write the generated parts of README.md and docs/ anew from docs/ and benchmarks/.

    Nothing is written if one of the PAGES lacks a mark.
    """
    found = made(root)
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
    texts |= {root / name: text for name, text in found.items() if name.endswith(".svg")}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def made(root: Path = ROOT) -> dict[str, str]:
    """{part of one of the PAGES: Markdown} and {file: SVG}, for what there is."""
    found = {}
    if (root / "docs/plan.txt").exists():
        plan = (root / "docs/plan.txt").read_text(encoding="utf-8").strip()
        found["plan"] = f"```\n{plan}\n```"
    for path in sorted((root / "benchmarks").glob("*.json")):
        found[path.stem] = json.loads(path.read_text(encoding="utf-8"))["markdown"]
    path = root / "docs/claims.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if not records or not all("claims" in record for record in records):  # of a former form
        return found
    claims = claims_of({record["notebook"]: record for record in records})

    def table(rows: list[tuple[str, Claim | None]]) -> str:
        lines = ["| claim | published | here, with 90% interval | outcome | n |",
                 "|---|---|---|---|---|"]
        for words, claim in rows:
            cells = [words, "—", "—", "not recorded", "—"]
            if claim:
                whose = "later work: " if claim.later else ""
                here = "; ".join(filter(None, (claim.here, claim.at, claim.split, claim.note)))
                outcome = f"{claim.badge[1]}. {claim.judged}" if claim.judged else claim.badge[1]
                cells = [f"{words} (`{claim.notebook}`)",
                         f"{whose}{claim.published} {claim.source}", here or "—", outcome,
                         claim.sample or "—"]
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    # README: the figure with what the first two claims say of it, then the six in a table
    primary = {claim.primary: claim for claim in claims if claim.primary}
    record = next(record for record in records if record["notebook"] == "lr_sweep")
    words = []
    for key in ("early", "rates"):
        if key in primary:
            claim = primary[key]
            words.append(f"*{claim.claim}*: **{claim.badge[1]}**: {claim.here} ({claim.at}; "
                         f"{claim.sample}). Published: {claim.published} {claim.source}.")
    spent = ", its runs found trained,"
    if record.get("runs_trained"):
        spent = f" in {duration([record])}"
    words.append(f"Scale `{record.get('scale')}`, made by `{record.get('command')}`{spent} on "
                 f"{record.get('machine')}.")
    figure = "![Gain of LAWA over training steps](docs/gain_over_steps.png)"
    found["headline"] = f"{figure}\n\n{' '.join(words)}"
    rows = [(f"{words}: *{primary[key].claim}*" if key in primary else words, primary.get(key))
            for key, words in PRIMARY.items()]
    figure = "![The paper’s claims: each difference with its 90% interval](docs/claims.svg)"
    found["claims"] = f"{table(rows)}\n\n{figure}"
    paper = [claim for claim in claims if claim.group in ("primary", "paper")]
    found["docs/claims.svg"] = forest(paper, 1040, page=False)

    # docs/claims.md: all of them
    found["docs/claims_all.svg"] = forest(claims, 1040, page=False)
    parts = ["![Every claim’s difference with its 90% interval](claims_all.svg)"]
    for group, inside in grouped(claims).items():
        if inside:
            rows = [(claim.claim, claim) for claim in inside]
            parts.append(f"## {GROUPS[group]}\n\n{table(rows)}")
    parts.append(f"Scale {distinct(records, 'scale')}; {duration(records)} of notebooks in all, "
                 f"which trained {sum(record.get('runs_trained', 0) for record in records)} runs "
                 "and found the others trained.")
    found["all claims"] = "\n\n".join(parts)
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m lab.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "results",
                        help="default: results/ in the project")
    parser.add_argument("--publish", action="store_true",
                        help="instead copy the records to docs/, where those of other notebooks "
                        "stay, and renew the tables there and in README.md")
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
