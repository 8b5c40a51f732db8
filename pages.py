"""Builds results/index.html from what the notebooks recorded: `python pages.py [RESULTS_DIR]`.

Reads every `<notebook>/record.json` (written by lab.py) in the results folder and writes `index.html` beside them, one
file without JavaScript that opens from disk and links to the figures, rows and executed notebooks by relative path.
Needs nothing outside the standard library.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

TITLE = "Early weight averaging in language-model pre-training"
LEAD = (
    "Does the average of a training run’s latest checkpoints (LAWA) beat the run itself? Each published claim is "
    "tested by one notebook, and stands here beside the value measured."
)
# The paper's claims first, in its order; other notebooks follow by name.
ORDER = ("lr_sweep", "spacing_ablation", "averaging_baselines", "model_size", "annealing", "loss_spikes", "batch_and_rate")
# Symbol and word both, so that no verdict depends on colour.
BADGES = {True: ("yes", "✓ holds"), False: ("no", "✗ does not hold"), None: ("open", "? undecided")}
SOURCES = "[S] read in a source · [P] read off a published plot, about ±0.005 nats · [I] inferred · [?] not known"


@dataclass(frozen=True)
class Entry:
    """One notebook's folder under the results."""

    name: str
    record: dict  # record.json, or {} when there is none that can be read
    problem: str  # why there is none, or ""
    failed: str  # "" or the last error of a failed run newer than the executed notebook
    folder: Path


# --- read ---


def read_entries(results: Path) -> list[Entry]:
    """All notebooks with a record, an executed copy or a failed copy in `results`, in the order of the claims."""
    if not results.is_dir():
        return []
    folders = sorted(folder for folder in results.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    folders.sort(key=lambda folder: ORDER.index(folder.name) if folder.name in ORDER else len(ORDER))
    return [read_entry(folder) for folder in folders if is_notebook(folder)]


def is_notebook(folder: Path) -> bool:
    files = ("record.json", f"{folder.name}.ipynb", f"{folder.name}.failed.ipynb")
    return any((folder / file).exists() for file in files)


def read_entry(folder: Path) -> Entry:
    try:
        record, problem = check_record(json.loads((folder / "record.json").read_text(encoding="utf-8"))), ""
    except FileNotFoundError:
        record, problem = {}, "record.json is missing"
    except (ValueError, OSError) as error:
        record, problem = {}, f"record.json cannot be read: {error}"
    return Entry(folder.name, record, problem, read_failure(folder), folder)


def check_record(record) -> dict:
    """The record, if it is an object whose lists hold objects; else ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    for key in ("figures", "verdicts"):
        items = record.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"'{key}' must be a list of objects")
    return record


def read_failure(folder: Path) -> str:
    """The error of `<name>.failed.ipynb` where that is newer than the executed notebook, else an empty string."""
    failed, executed = folder / f"{folder.name}.failed.ipynb", folder / f"{folder.name}.ipynb"
    if not failed.exists() or (executed.exists() and executed.stat().st_mtime > failed.stat().st_mtime):
        return ""
    try:
        cells = json.loads(failed.read_text(encoding="utf-8"))["cells"]
        errors = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
        return f"{errors[-1]['ename']}: {errors[-1]['evalue']}"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError):
        return "the error is in the partial notebook"


# --- render ---


def text(value) -> str:
    """`value` for the page; a dash for nothing."""
    return "—" if value is None or value == "" else escape(str(value))


def sentence(value) -> str:
    return text(value).rstrip(".") + "."


def small(value) -> str:
    return f'<div class="small">{escape(str(value))}</div>' if value else ""


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def seconds(record: dict) -> float:
    value = record.get("seconds")
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


def duration(total: float) -> str:
    minutes, rest = divmod(round(total), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def href(entry: Entry, file: str) -> str:
    """The relative address of a file directly in the notebook's folder, or "" when there is no such file."""
    inside = Path(file).name == file and (entry.folder / file).is_file()
    return escape(f"{quote(entry.name)}/{quote(file)}") if inside else ""


def link(entry: Entry, file: str, label: str) -> str:
    address = href(entry, file)
    return f'<a href="{address}">{escape(label)}</a>' if address else f"{escape(label)}: missing"


def anchor(entry: Entry, label) -> str:
    """A link to the notebook's section on this page."""
    return f'<a href="#{quote(entry.name)}">{text(label)}</a>'


def outcome(verdict: dict) -> tuple[str, str]:
    """The badge's class and words. Anything but true and false is undecided."""
    holds = verdict.get("holds")
    return BADGES[holds if isinstance(holds, bool) else None]


def badge(verdict: dict) -> str:
    kind, words = outcome(verdict)
    return f'<span class="badge {kind}">{words}</span>'


def verdicts(entry: Entry) -> list[dict]:
    return entry.record.get("verdicts", [])


def claims(entries: list[Entry]) -> str:
    """A card per claim."""
    cards = "".join(card(entry, verdict) for entry in entries for verdict in verdicts(entry))
    return f'<ul class="cards">{cards}</ul><p class="small">{SOURCES}</p>' if cards else "<p>No notebook has recorded a verdict.</p>"


def card(entry: Entry, verdict: dict) -> str:
    """Published value beside ours, with the figure that shows it."""
    figure = href(entry, str(verdict.get("figure") or ""))
    image = f'<a class="paper" href="#{quote(entry.name)}"><img loading="lazy" src="{figure}" alt=""></a>' if figure else ""
    rows = (("Published", text(verdict.get("paper")) + small(verdict.get("paper_source"))),
            ("Here", text(verdict.get("ours")) + small(verdict.get("evidence"))),
            ("n", f"{text(verdict.get('n'))}, scale {text(entry.record.get('scale'))}"))
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    command = f"<details><summary>command</summary><pre>{text(entry.record.get('command'))}</pre></details>"
    return f'<li>{badge(verdict)}<h3>{anchor(entry, verdict.get("claim"))}</h3>{image}<dl>{facts}</dl>{command}</li>'


def section(entry: Entry) -> str:
    record = entry.record
    figures = record.get("figures", [])
    drawn = [figure.get("file") for figure in figures]
    loose = [verdict for verdict in verdicts(entry) if verdict.get("figure") not in drawn]
    return (
        f'<section id="{escape(entry.name)}"><h2>{text(record.get("title") or entry.name)}</h2>'
        f"{notices(entry)}"
        f'<p class="question">{escape(str(record.get("question", "")))}</p>'
        f'<div class="figures">{"".join(figure_html(entry, figure) for figure in figures)}</div>'
        f"{''.join(map(verdict_html, loose))}{source(entry) if record else ''}</section>"
    )


def notices(entry: Entry) -> str:
    """What went wrong, if anything did."""
    html = ""
    if entry.failed:
        partial = link(entry, f"{entry.name}.failed.ipynb", "partial notebook")
        older = " What follows is from an earlier run." if entry.record else ""
        html = f'<p class="notice"><b>✗ The last run failed:</b> {escape(entry.failed)} ({partial}).{older}</p>'
    elif entry.problem:
        html = f'<p class="notice"><b>✗ No result:</b> {escape(entry.problem)}.</p>'
    return html


def figure_html(entry: Entry, figure: dict) -> str:
    file, title = str(figure.get("file", "")), str(figure.get("title", "Figure"))
    if address := href(entry, file):
        image = f'<div class="paper"><img src="{address}" alt="{escape(title)}"></div>'
    else:
        image = f'<p class="notice">The figure {escape(file)} is missing.</p>'
    below = "".join(verdict_html(verdict) for verdict in verdicts(entry) if file and verdict.get("figure") == file)
    caption = escape(str(figure.get("caption", "")))
    return f"<figure>{image}<figcaption><strong>{sentence(title)}</strong> {caption}{below}</figcaption></figure>"


def verdict_html(verdict: dict) -> str:
    words = [str(verdict[key]) for key in ("ours", "evidence") if verdict.get(key)]
    detail = escape("; ".join(words))
    return f'<p class="verdict">{badge(verdict)} <strong>{sentence(verdict.get("claim"))}</strong> {detail}</p>'


def source(entry: Entry) -> str:
    """Where the result came from: the command, the settings, the files."""
    record = entry.record
    facts = [f"scale {text(record.get('scale'))}", duration(seconds(record)), text(record.get("finished"))]
    files = [(f"{entry.name}.ipynb", "executed notebook"), (str(record.get("rows") or "rows.csv"), "rows as CSV")]
    files = [(f"{entry.name}.html", "the notebook as a page")] * bool(href(entry, f"{entry.name}.html")) + files
    links = " · ".join([link(entry, file, label) for file, label in files] + facts)
    return f"<pre>{text(record.get('command'))}</pre>{parameters(record)}<p class='small'>{links}</p>"


def parameters(record: dict) -> str:
    params = record.get("params")
    if not isinstance(params, dict) or not params:
        return ""
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in params.items())
    return f"<details><summary>{plural(len(params), 'parameter')}</summary><dl>{items}</dl></details>"


def header(entries: list[Entry]) -> str:
    records = [entry.record for entry in entries]
    facts = [
        "scale " + listing(record.get("scale") for record in records),
        plural(len(entries), "notebook"),
        f"{duration(sum(map(seconds, records)))} of computing",
        listing(record.get("machine") for record in records),
    ]
    line = " · ".join(fact for fact in facts if fact)
    return f'<header><h1>{TITLE}</h1><p>{LEAD}</p>{tiles(entries)}<p class="small">{line}</p>{troubled(entries)}</header>'


def tiles(entries: list[Entry]) -> str:
    """How many claims hold, do not hold, are undecided."""
    kinds = [outcome(verdict)[0] for entry in entries for verdict in verdicts(entry)]
    items = (f'<li class="{kind}"><b>{kinds.count(kind)}</b> {words}</li>' for kind, words in BADGES.values())
    return f'<ul class="tiles">{"".join(items)}</ul>'


def troubled(entries: list[Entry]) -> str:
    names = [anchor(entry, entry.name) for entry in entries if entry.failed or entry.problem]
    return f'<p class="notice"><b>✗ Failed or without a result:</b> {", ".join(names)}</p>' if names else ""


def listing(values) -> str:
    """The distinct values, for the page."""
    return ", ".join(sorted({escape(str(value)) for value in values if value}))


def page(entries: list[Entry]) -> str:
    body = header(entries) + f"<h2>Claims</h2>{claims(entries)}" + "".join(map(section, entries))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


CSS = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #5a6675; --line: #d9dee5; --back: #fff; --panel: #f5f7f9;
  --link: #0b5cad; --yes: #14703a; --no: #ab2323; --open: #5a6675; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9fabb9; --line: #36404c; --back: #14191f;
  --panel: #1d242c; --link: #7fb8f2; --yes: #6fd195; --no: #ff9a92; --open: #b4bfcb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 17px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .75rem;
  text-wrap: balance; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .5rem; }
header { margin-bottom: 2.5rem; } header > p { max-width: 44rem; margin: .75rem 0; }
section { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 2rem; }
a { color: var(--link); text-underline-offset: .15em; }
.small { color: var(--soft); font-size: .85rem; }
.question { font-size: 1.1rem; color: var(--soft); max-width: 44rem; margin: 0 0 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; margin: 1.25rem 0; padding: 0; }
.tiles li { border: 1px solid var(--line); border-radius: 10px; padding: .5rem 1rem; background: var(--panel); }
.tiles b { font-size: 1.5rem; margin-right: .35rem; font-variant-numeric: tabular-nums; }
.yes { color: var(--yes); } .no { color: var(--no); } .open { color: var(--open); }
.badge { display: inline-block; border: 1.5px solid currentColor; border-radius: 99px; padding: 0 .65em;
  font-weight: 600; font-size: .85rem; white-space: nowrap; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); list-style: none;
  margin: 1rem 0; padding: 0; }
.cards li { border: 1px solid var(--line); border-radius: 12px; padding: 1rem; background: var(--panel); display: flex;
  flex-direction: column; align-items: flex-start; gap: .6rem; }
.cards h3 { font-size: 1.02rem; line-height: 1.35; margin: 0; } .cards h3 a { color: inherit; text-decoration: none; }
.cards h3 a:hover { text-decoration: underline; }
.cards .paper { display: block; width: 100%; padding: .4rem; } .cards img { width: 100%; aspect-ratio: 16 / 9; object-fit: contain; }
.cards dl { font: inherit; font-size: .9rem; gap: .35rem .8rem; margin: 0; width: 100%; } .cards dt { color: var(--soft); }
.cards details { width: 100%; } .cards pre { margin: .4rem 0 0; padding: .5rem .7rem; background: var(--back); }
.figures { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
figure { margin: 0; } figure:only-child { max-width: 46rem; }
.paper { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .75rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption, .verdict { font-size: .95rem; }
figcaption { margin-top: .6rem; }
.verdict { margin: .6rem 0; } .verdict .badge { margin-right: .3rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; margin: 1.25rem 0 .75rem; }
details { font-size: .9rem; } summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; font-family: monospace; }
dd { margin: 0; overflow-wrap: anywhere; }
.notice { border-left: 4px solid var(--no); background: var(--panel); padding: .7rem 1rem; margin: 0 0 1rem; }
@media screen and (max-width: 760px) {
  main { padding: 1.5rem 1rem 3rem; } .tiles { gap: .4rem; } .tiles li { padding: .3rem .6rem; font-size: .85rem; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --panel: #fff; --link: #000; --yes: #000; --no: #000;
    --open: #000; }
  body { font-size: 10.5pt; } main { padding: 0; } figure, .cards li, pre, p { break-inside: avoid; }
  h2, .question { break-after: avoid; } details { display: none; }
  section { margin-top: 1.5rem; padding-top: 1rem; } .figures { grid-template-columns: 1fr 1fr; }
}
"""


# --- write ---


def build(results: Path) -> Path:
    """Writes `results`/index.html atomically and returns its path; ValueError when there is nothing to show."""
    entries = read_entries(results)
    if not entries:
        raise ValueError(f"no records in {results}: expected <notebook>/record.json, run ./run_all.sh first")
    path = results / "index.html"
    temporary = path.with_name(f".index.html.{os.getpid()}")
    try:
        temporary.write_text(page(entries), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- publish: what the repository shows of the results ---


def publish(results: Path, root: Path) -> Path:
    """Copy the records and the headline's figure from `results` to docs/, and write README.md's tables anew from docs/ and benchmarks/."""
    records = [entry.record for entry in read_entries(results) if entry.record]
    first = next((record for record in records if record.get("notebook") == "lr_sweep"), None)
    if not first:
        raise ValueError(f"no record of lr_sweep in {results}; run ./run_all.sh first")
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs/claims.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / "docs/gain_over_steps.png").write_bytes((results / "lr_sweep/gain_over_steps.png").read_bytes())
    return readme(root)


def readme(root: Path) -> Path:
    """README.md with the tables between its `begin` and `end` marks made from docs/claims.json and benchmarks/*.json."""
    path = root / "README.md"
    whole = path.read_text(encoding="utf-8")
    for name, block in blocks(root).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if whole.count(begin) != 1 or whole.count(end) != 1:
            raise ValueError(f"README.md must have one {begin} and one {end}")
        before, rest = whole.split(begin)
        whole = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    path.write_text(whole, encoding="utf-8")
    return path


def blocks(root: Path) -> dict[str, str]:
    """{name: Markdown} of README.md's generated parts, for what there is."""
    found = {}
    if (root / "docs/claims.json").exists():
        records = json.loads((root / "docs/claims.json").read_text(encoding="utf-8"))
        found |= {"headline": headline(records), "claims": claims_table(records)}
    if (root / "docs/plan.txt").exists():
        found["plan"] = f"```\n{(root / 'docs/plan.txt').read_text(encoding='utf-8').strip()}\n```"
    for file in sorted((root / "benchmarks").glob("*.json")):
        found[file.stem] = json.loads(file.read_text(encoding="utf-8"))["markdown"]
    return found


def headline(records: list[dict]) -> str:
    record = next(record for record in records if record["notebook"] == "lr_sweep")
    verdict = record["verdicts"][0]
    return (f"![Gain of LAWA over the run, in nats per token, over training steps, for three learning rates](docs/gain_over_steps.png)\n\n"
            f"*{verdict['claim']}*: **{outcome(verdict)[1]}** at scale `{record['scale']}` ({verdict['evidence']}): {verdict['ours']}. "
            f"Published, at 125M parameters: {verdict['paper']} {verdict['paper_source'].split(']')[0]}]. Made by `{record['command']}` in "
            f"{duration(seconds(record))} on {record['machine']}.")


def claims_table(records: list[dict]) -> str:
    rows = ["| claim | published | here | verdict | n |", "|---|---|---|---|---|"]
    for record in records:
        for verdict in record["verdicts"]:
            cells = (f"{verdict['claim']} (`{record['notebook']}`)", f"{verdict['paper']} {verdict['paper_source']}",
                     f"{verdict['ours']}; {verdict['evidence']}", outcome(verdict)[1], verdict["n"])
            rows.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    scales = sorted({record["scale"] for record in records})
    return "\n".join(rows) + f"\n\nScale {', '.join(scales)}; {duration(sum(map(seconds, records)))} of notebooks in all."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pages.py", description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("results", nargs="?", type=Path, default=default, help="default: results/ in the project")
    parser.add_argument("--publish", action="store_true", help="instead copy records to docs/ and renew README.md's tables")
    parser.add_argument("--readme", action="store_true", help="instead renew README.md's tables from docs/ and benchmarks/")
    args, root = parser.parse_args(argv), Path(__file__).resolve().parent
    try:
        print(publish(args.results, root) if args.publish else readme(root) if args.readme else build(args.results))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
