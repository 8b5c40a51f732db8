"""Builds results/index.html from what the notebooks recorded: `python -m lab.report [RESULTS]`.

Reads every <notebook>/record.json (written by lab.Lab) in the results folder and writes index.html
beside them: one file without JavaScript that opens from disk and links to the figures, rows and
executed notebooks by relative path. `--publish` writes what the repository shows of the results.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lawa_core import LawaError, replacing

ROOT = Path(__file__).resolve().parents[1]

# the paper's claims first, in its order; other notebooks follow by name
ORDER = ("lr_sweep", "spacing_ablation", "averaging_baselines", "model_size", "annealing",
         "loss_spikes", "batch_and_rate")

# symbol and word both, so that no verdict depends on colour
BADGES = {
    True: ("yes", "✓ holds"), False: ("no", "✗ does not hold"), None: ("open", "? undecided")}

# the paper's primary claims: its words, the notebook, how the verdict that stands for it begins
PRIMARY = (
    ("LAWA helps early in training", "pythia_replay", "Averages of public checkpoints"),
    ("higher learning rates gain more", "lr_sweep", "Higher learning rates gain more"),
    ("wider spacing gains more", "spacing_ablation", "Gains grow when checkpoints are sampled"),
    ("LAWA beats conventional training", "averaging_baselines", "LAWA beats the run at every"),
    ("LAWA beats EMA", "averaging_baselines", "LAWA beats EMA"),
    ("LAWA beats SWA", "averaging_baselines", "LAWA beats SWA started late"))

# the generated parts of each page, between <!-- begin NAME --> and <!-- end NAME -->
PAGES = {
    "README.md": ("headline", "claims"),
    "docs/claims.md": ("all claims",),
    "docs/benchmarks.md": ("averaging", "training"),
    "docs/plan.md": ("plan",)}


# ---- 1. Read ----

@dataclass(frozen=True)
class Entry:
    """One notebook's folder under the results."""
    name: str
    record: dict  # record.json, or {} when there is none that can be read
    problem: str  # why there is none, or ""
    failed: str  # "" or the last error of a failed run newer than the executed notebook
    folder: Path

    def has(self, file) -> bool:
        """Is this a file directly in the notebook's folder?"""
        return Path(str(file)).name == str(file) and (self.folder / str(file)).is_file()


def read_entries(results: Path) -> list[Entry]:
    """All notebooks with a record, an executed or a failed copy, in the order of the claims."""
    entries = []
    for folder in sorted(results.iterdir()) if results.is_dir() else []:
        files = ("record.json", f"{folder.name}.ipynb", f"{folder.name}.failed.ipynb")
        shown = folder.is_dir() and not folder.name.startswith(".")
        if shown and any((folder / file).exists() for file in files):
            entries.append(read_entry(folder))
    entries.sort(key=lambda entry: ORDER.index(entry.name) if entry.name in ORDER else len(ORDER))
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
    for key in ("figures", "verdicts"):
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


# ---- 2. The page ----

def outcome(verdict: dict) -> tuple[str, str]:
    """The badge's class and words. Anything but true and false is undecided."""
    holds = verdict.get("holds")
    return BADGES[holds if isinstance(holds, bool) else None]


def seconds(records: list[dict]) -> float:
    """What the records took together, as far as they say."""
    total = 0
    for record in records:
        value = record.get("seconds")
        if isinstance(value, int | float) and math.isfinite(value):
            total += value
    return total


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


def page(entries: list[Entry]) -> str:
    """index.html: the count of verdicts, a card per claim, a section per notebook."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "outcome": outcome, "duration": duration, "dash": dash, "sentence": sentence,
        "plural": plural, "distinct": distinct}
    records = [entry.record for entry in entries]
    kinds = []
    for record in records:
        for verdict in record.get("verdicts", []):
            kinds.append(outcome(verdict)[0])
    return environment.get_template("report.html").render(
        entries=entries, records=records, kinds=kinds, badges=BADGES.values())


def build(results: Path) -> Path:
    """Write results/index.html atomically; LawaError when there is nothing to show."""
    entries = read_entries(results)
    if not entries:
        raise LawaError(f"no records in {results}: expected <notebook>/record.json, "
                         "run ./run_all.sh first")
    with replacing(results / "index.html") as part:
        part.write_text(page(entries), encoding="utf-8")
    return results / "index.html"


# ---- 3. What the repository shows of the results ----

def publish(results: Path, root: Path = ROOT) -> list[Path]:
    """Copy the records and the headline's figure to docs/, and renew the pages from there."""
    records = [entry.record for entry in read_entries(results) if entry.record]
    if not any(record.get("notebook") == "lr_sweep" for record in records):
        raise LawaError(f"no record of lr_sweep in {results}; run ./run_all.sh first")
    text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    figure = (results / "lr_sweep/gain_over_steps.png").read_bytes()
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs/claims.json").write_text(text, encoding="utf-8")
    (root / "docs/gain_over_steps.png").write_bytes(figure)
    return renew(root)


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
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def blocks(root: Path = ROOT) -> dict[str, str]:
    """{name: Markdown} of the generated parts, for what there is."""
    found = {}
    if (root / "docs/claims.json").exists():
        records = json.loads((root / "docs/claims.json").read_text(encoding="utf-8"))
        found["headline"] = headline(records)
        found["claims"] = primary_claims(records)
        found["all claims"] = all_claims(records)
    if (root / "docs/plan.txt").exists():
        plan = (root / "docs/plan.txt").read_text(encoding="utf-8").strip()
        found["plan"] = f"```\n{plan}\n```"
    for file in sorted((root / "benchmarks").glob("*.json")):
        found[file.stem] = json.loads(file.read_text(encoding="utf-8"))["markdown"]
    return found


def headline(records: list[dict]) -> str:
    record = next(record for record in records if record["notebook"] == "lr_sweep")
    verdict = record["verdicts"][0]
    mark = verdict["paper_source"].split("]")[0]
    return (
        "![Gain of LAWA over the run, in nats per token, over training steps, for three learning "
        "rates](docs/gain_over_steps.png)\n\n"
        f"*{verdict['claim']}*: **{outcome(verdict)[1]}** at scale `{record['scale']}` "
        f"({verdict['evidence']}): {verdict['ours']}. Published, at 125M parameters: "
        f"{verdict['paper']} {mark}]. Made by `{record['command']}` in {duration([record])} on "
        f"{record['machine']}.")


def primary_claims(records: list[dict]) -> str:
    rows = []
    for words, notebook, beginning in PRIMARY:
        found = [words, "—", "—", "not recorded", "—"]
        for record in records:
            for verdict in record["verdicts"]:
                if record["notebook"] == notebook and verdict["claim"].startswith(beginning):
                    source = f"{words}: *{verdict['claim']}* (`{notebook}`)"
                    found = [source, *values(verdict)]
        rows.append(found)
    return table(rows)


def all_claims(records: list[dict]) -> str:
    rows = []
    for record in records:
        for verdict in record["verdicts"]:
            rows.append([f"{verdict['claim']} (`{record['notebook']}`)", *values(verdict)])
    scales = distinct(records, "scale")
    return f"{table(rows)}\n\nScale {scales}; {duration(records)} of notebooks in all."


def values(verdict: dict) -> list:
    """A verdict's cells: published, here, verdict, n."""
    return [f"{verdict['paper']} {verdict['paper_source']}",
            f"{verdict['ours']}; {verdict['evidence']}", outcome(verdict)[1], verdict["n"]]


def table(rows: list[list]) -> str:
    lines = ["| claim | published | here | verdict | n |", "|---|---|---|---|---|"]
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
