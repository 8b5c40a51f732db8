"""results/index.html: what it says, that no record can break it, that its links lead somewhere."""

import csv
import json
import os
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote

import matplotlib.axes
import pytest

import lawa_core
from lab import report

HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Collects tags, ids, links and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.links, self.alts, self.text = [], [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        self.links += [attrs["xlink:href"]] if tag == "a" and "xlink:href" in attrs else []
        self.alts += [attrs["alt"]] if "alt" in attrs else []

    def handle_data(self, data):
        self.text += data


def claim(words="High rates gain more", mean=0.04, half=0.01, outcome="holds", **changes):
    """A claim as lab.Lab.claim keeps it: three seeds around `mean`; mean=None: not tested here."""
    kept = {
        "claim": words,
        "outcome": outcome if mean is not None else "not tested here",
        "at": "lr 1e-2, 40% of the run",
        "published": "0.12 at 6e-3",
        "source": "[P] plot",
        "later": False,
        "primary": "",
        "value": None,
        "note": "",
        "figure": "gain.png",
    }
    if mean is not None:
        pairs = [[seed, 4 - mean + (seed - 1) / 100, 4.0] for seed in range(3)]
        found = {"mean": mean, "low": mean - half, "high": mean + half, "p": 0.001, "n": 3}
        kept |= found | {"over": "seeds", "margin": 0.005, "unit": "nats", "pairs": pairs}
    return kept | changes


def write(results, name="lr_sweep", files=("gain.png", "rows.csv"), **changes):
    """One notebook's folder as lab.Lab leaves it, with `changes` to its record."""
    folder = results / name
    folder.mkdir(parents=True)
    for file in (*files, f"{name}.ipynb"):
        (folder / file).write_bytes(b"x")
    record = {
        "notebook": name,
        "title": "Learning rates",
        "question": "Do high rates gain more?",
        "scale": "laptop",
        "params": {"k": 5},
        "command": f"papermill notebooks/{name}.ipynb out.ipynb",
        "seconds": 75.4,
        "figures": [{"file": "gain.png", "title": "Gain", "caption": "n = 3"}],
        "claims": [claim()],
        "rows": "rows.csv",
    }
    (folder / "record.json").write_text(json.dumps(record | changes))
    return folder


def assert_links_resolve(page, results):
    for link in page.links:
        if link.startswith("#"):
            assert unquote(link[1:]) in page.ids, link
        else:
            assert (results / unquote(link)).is_file(), link


def test_shows_what_was_recorded(tmp_path):
    write(tmp_path, claims=[claim(noise_removed=0.06, lag=0.02)])
    page = Page(report.build(tmp_path))
    for words in (
        "Learning rates",
        "Do high rates gain more?",
        "0.12 at 6e-3",
        "[P] plot",
        "+0.040 [+0.030, +0.050] nats",
        "lr 1e-2, 40% of the run; 3 seeds",
        "noise removed +0.060, lag +0.020 nats",
        "laptop",
    ):
        assert words in page.text
    assert "papermill notebooks/lr_sweep.ipynb out.ipynb" in page.text
    assert "1 min 15 s" in page.text
    assert page.alts == ["Gain"]


def test_every_link_resolves(tmp_path):
    write(tmp_path)
    write(
        tmp_path,
        "odd name #1 & ü",
        figures=[{"file": "a b#?.png", "title": "t"}],
        files=["a b#?.png", "rows.csv"],
    )
    page = Page(report.build(tmp_path))
    files = {link for link in page.links if not link.startswith("#")}
    assert len(files) == 6  # two figures, two notebooks, two CSVs
    assert_links_resolve(page, tmp_path)


@pytest.mark.parametrize("outcome", [*report.BADGES, "false", None, []])
def test_outcome_words(tmp_path, outcome):
    """Symbol and word, on the card, in the figure for all, in the section; unknown: cannot tell."""
    write(tmp_path, claims=[claim(outcome=outcome)])
    page = Page(report.build(tmp_path))
    known = outcome if isinstance(outcome, str) and outcome in report.BADGES else "cannot tell"
    words = report.BADGES[known][1]
    assert page.text.count(words) >= 2
    explained = page.text.index("How to read this page")
    assert words in page.text[:explained] + page.text[explained + 2000 :]


def test_a_claim_stands_under_its_figure(tmp_path):
    claims = [claim("about the figure"), claim("about nothing drawn", figure="gone.png")]
    write(tmp_path, claims=claims)
    html = report.build(tmp_path).read_text(encoding="utf-8")
    caption = html[html.index("<figcaption>") : html.index("</figcaption>")]
    assert "about the figure" in caption and "about nothing drawn" not in caption
    for words in ("about the figure", "about nothing drawn"):
        # figure of all claims, wide and narrow; card and its figure's title; the section
        assert html.count(words) == 5


def table(**changes):
    """A table as lab.Lab.table keeps it."""
    rows = [["pythia-1b", "143,000", "0.5756", "−0.0012"], ["pythia-2.8b", "143,000", "0.6", "—"]]
    columns = ["model", "step", "accuracy", "gain"]
    return {"file": "tasks.csv", "title": "Zero-shot accuracy", "caption": "Of 1,000 documents.",
            "columns": columns, "rows": rows} | changes


def test_a_table_stands_after_the_figures_with_its_numbers_to_the_right(tmp_path):
    write(tmp_path, tables=[table()], files=("gain.png", "rows.csv", "tasks.csv"))
    page = Page(report.build(tmp_path))
    assert_links_resolve(page, tmp_path)
    assert "lr_sweep/tasks.csv" in page.links
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    shown = html[html.index('<div class="table">') : html.index("</table>")]
    assert html.index("</figure>") < html.index(shown) < html.index("papermill notebooks/")
    assert "<h3>Zero-shot accuracy</h3>" in shown and "Of 1,000 documents." in shown
    head, *rows = [re.findall(r"<t[hd]([^>]*)>([^<]*)</t[hd]>", row)
                   for row in re.findall(r"(?s)<tr\b.*?</tr>", shown)]
    assert [text for _, text in head] == table()["columns"]
    assert [[text for _, text in row] for row in rows] == table()["rows"]
    for row in (head, *rows):
        assert ["class=number" in look for look, _ in row] == [False, True, True, True]


def test_what_a_number_in_a_table_is():
    def numeric(*texts):
        (_, number), = report.cells_of({"columns": ["c"], "rows": [[text] for text in texts]})[0]
        return number

    assert numeric("1", "−0.5", "1,234", "1e−07", "inf", "—", None)
    assert not numeric("1", "run") and not numeric("1b") and not numeric("—", "") and not numeric()


# ---- Which claims, and in what order ----


def six(**changes):
    """The primary claims; changes: {id: changes to it}."""
    return [claim(f"the test of {key}", primary=key, **changes.get(key, {}))
            for key in report.PRIMARY]


def test_the_order_of_the_page(tmp_path):
    """Primary claims, one figure of all, the paper's other ones, later work, what is not tested."""
    others = [
        claim("of others", later=True),
        claim("untested", None, note="no such model here"),
        claim("of the paper"),
    ]
    write(tmp_path, claims=others + six()[::-1])
    page = Page(report.build(tmp_path))
    text = page.text
    first, *rest = report.GROUPS.values()
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    heads = [first, "All claims in one figure", *rest, "Learning rates"]
    places = [html.index(f"<h2>{head}</h2>") for head in heads]
    assert places == sorted(places)
    ids = [name for name in page.ids if name.startswith("lr_sweep-")]
    cards = [int(name.rpartition("-")[2]) for name in ids]
    assert cards == [8, 7, 6, 5, 4, 3, 2, 0, 1]
    assert "Why: no such model here." in text
    assert page.tags.count("svg") == 2 + 8  # all claims, for a desk and a phone; 8 with a figure


def test_primary_claims_are_judged_together():
    """p = 0.03 alone holds; with five others at 0.001 as well; with others that tell nothing, not.

    Then it cannot tell, which is said, and its interval stays as it is.
    """
    def judged(weak, **changes):
        claims = six(swa=weak, **changes)
        return {found.primary: found for found in report.claims_of({"n": {"claims": claims}})}

    assert judged({"p": 0.03})["swa"].outcome == "holds"
    unclear = {key: {"p": 0.6, "outcome": "cannot tell"} for key in ("ema", "conventional")}
    found = judged({"p": 0.04}, **unclear)
    assert found["swa"].outcome == "cannot tell" and found["swa"].alone == "holds"
    assert found["swa"].holm == pytest.approx(0.12)
    assert "after Holm 0.12" in found["swa"].judged
    assert found["early"].outcome == "holds" and found["early"].holm == pytest.approx(0.006)
    flat = judged({"p": 0.04, "outcome": "no difference"}, **unclear)
    assert flat["swa"].outcome == "no difference"  # no claim of an effect, nothing to adjust


def test_a_primary_claim_not_yet_recorded_counts_against_the_others(tmp_path):
    claims = [claim(primary="early", p=0.03)]
    (found,) = report.claims_of({"n": {"claims": claims}})
    assert found.outcome == "cannot tell" and found.holm == pytest.approx(0.18)
    write(tmp_path, claims=claims)
    assert Page(report.build(tmp_path)).text.count("– not recorded") == 5


def test_what_it_would_take_to_tell():
    unclear = claim(mean=0.006, half=0.012, outcome="cannot tell")
    (found,) = report.claims_of({"n": {"claims": [unclear]}})
    assert found.judged == "With a spread like this, about 12 seeds would tell."


def test_smoke_is_a_check_and_counts_nothing(tmp_path):
    claims = [kept | {"outcome": "check"} for kept in six()]
    write(tmp_path, scale="smoke", claims=claims)
    page = Page(report.build(tmp_path))
    assert "A check of the machinery" in page.text
    header = page.text[: page.text.index(report.GROUPS["primary"])]
    assert not any(words in header for _, words in report.BADGES.values() if "check" not in words)
    write(tmp_path / "other", claims=six())
    page = Page(report.build(tmp_path / "other"))
    assert "A check of the machinery" not in page.text


def test_other_parameters_have_a_section_and_no_say(tmp_path):
    """A folder lr_sweep-lr=6e-4: after the plain one, and its claims are not the page's."""
    write(tmp_path, claims=[claim("plain", primary="early", p=0.001)])
    changed = [claim("changed", primary="early")]
    write(tmp_path, "lr_sweep-lr=6e-4", claims=changed, notebook="lr_sweep")
    write(tmp_path, "a-notebook-with-hyphens", claims=[claim("hyphens")])
    page = Page(report.build(tmp_path))
    assert_links_resolve(page, tmp_path)
    assert "Learning rates, with lr=6e-4" in page.text
    sections = [name for name in page.ids if "sweep" in name and not name.endswith("-0")]
    assert sections == ["lr_sweep", "lr_sweep-lr=6e-4"]
    first = page.text.index("Learning rates, with")
    assert "changed" not in page.text[:first] and "changed" in page.text[first:]
    assert "hyphens" in page.text[:first]


# ---- Figures ----


def words_of(drawn):
    """The words and numbers in an SVG, each line of type by itself."""
    return re.findall("<text[^>]*>([^<]*)</text>", drawn)


@pytest.mark.parametrize("width", [1040, 358])
def test_the_figure_of_all_claims(width, monkeypatch):
    """A dot for each claim with a value, where it is on an axis with all of it; every number."""
    drawn_at = []

    def errorbar(ax, mean, y, **_):
        low, high = ax.get_xlim()
        assert low < mean < high
        drawn_at.append(mean)

    means = [-0.02, 0.0, 0.003, 0.04, 0.3]
    claims = [claim(f"claim {mean} " * 9, mean, half=0.002) for mean in means]
    claims += [claim("steps", 12.0, 3.0, unit="% of the run", margin=1.0, value=18.0)]
    claims += [claim("alone", 0.01, low=None, high=None, outcome="cannot tell"), claim("no", None)]
    read = report.claims_of({"n": {"claims": claims}})
    words = words_of(report.forest(read, width))
    for found in read[:-1]:
        assert found.here.removesuffix(found.unit).strip() in words
    assert words.count("✓ holds") == 6 and words.count("? cannot tell") == 1
    assert "nats" in words and "% of the run" in words
    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", errorbar)
    report.forest(read, width)
    assert drawn_at == [*means, 0.01, 12.0]


@pytest.mark.parametrize("scale", [1e-6, 0.04, 1.0, 250.0])
def test_an_axis_has_zero_and_a_few_ticks(scale):
    """The bent one of all claims, the straight one of a card."""
    kept = claim(mean=scale, half=scale / 4, margin=scale / 9, pairs=[])
    read = report.claims_of({"n": {"claims": [kept]}})
    for drawn in (report.forest(read, 358), report.card_figure(*read)):
        ticks = [words for words in words_of(drawn) if re.fullmatch("0|[+−][0-9.e+−]+", words)]
        ticks = [words for words in ticks if words != read[0].amount(scale)]
        assert "0" in ticks and 2 <= len(ticks) <= 8, ticks


def test_a_card_shows_the_published_value_the_measured_one_and_the_seeds(monkeypatch):
    marks = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda ax, x, *_, **__: marks.append(x))
    words = words_of(report.card_figure(*report.claims_of({"n": {"claims": [claim(value=0.12)]}})))
    assert {"published", "here", "+0.120", "+0.040"} <= set(words)
    assert marks == [0.12, pytest.approx([0.05, 0.04, 0.03])]


def test_a_figure_follows_the_page_and_a_file_does_not():
    """Colours are the page's, which knows dark mode; a file has its own, on white."""
    read = report.claims_of({"n": {"claims": [claim("a $b_1$ & <c>")]}})
    here, file = report.forest(read, 1040), report.forest(read, 1040, page=False)
    assert "a $b_1$ &amp; &lt;c&gt;" in words_of(here)
    assert not re.search("#[0-9a-f]{6}", here) and "var(--back)" in here
    assert "#ffffff" in file and "var(" not in file
    assert file == report.forest(read, 1040, page=False)
    assert 'href="#n-0"' in here and "<a" not in file


@pytest.mark.parametrize("sign", [1, -1])
def test_differences_have_the_sign_of_the_claim(sign):
    """Pairs are losses, of which less is better, or gains, of which more is."""
    pairs = [[0, 3.9, 4.0], [1, 3.8, 4.0]]
    claims = [claim(mean=-0.15 * sign, pairs=pairs), claim(mean=7.0, pairs=pairs)]
    found, other = report.claims_of({"n": {"claims": claims}})
    assert found.differences == pytest.approx([-0.1 * sign, -0.2 * sign])
    assert other.differences == []


# ---- What no record can break ----


def test_hostile_strings_are_only_text(tmp_path):
    strange = dict.fromkeys(claim(), HOSTILE)
    plain = claim(HOSTILE, unit=HOSTILE, note=HOSTILE, source=HOSTILE, at=HOSTILE)
    figure = {"file": HOSTILE, "title": HOSTILE, "caption": HOSTILE}
    strings = dict.fromkeys(
        ("title", "question", "scale", "command", "finished", "machine", "rows", "seconds"), HOSTILE
    )
    kept = {"file": HOSTILE, "title": HOSTILE, "caption": HOSTILE}
    tables = [kept | {"columns": [HOSTILE], "rows": [[HOSTILE]]}, kept]
    folder = write(
        tmp_path, **strings, params={HOSTILE: HOSTILE}, figures=[figure], claims=[strange, plain],
        tables=tables)
    error = {"output_type": "error", "ename": HOSTILE, "evalue": HOSTILE}
    (folder / "lr_sweep.ipynb").unlink()
    (folder / "lr_sweep.failed.ipynb").write_text(json.dumps({"cells": [{"outputs": [error]}]}))
    page = Page(report.build(tmp_path))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 20
    assert_links_resolve(page, tmp_path)


@pytest.mark.parametrize("file", ["gone.png", "../outside.png", "", None])
def test_a_figure_that_is_not_there_is_named(tmp_path, file):
    (tmp_path / "outside.png").write_bytes(b"x")
    write(tmp_path, figures=[{"file": file, "title": "Gain"}])
    page = Page(report.build(tmp_path))
    assert "img" not in page.tags
    assert f"The figure {file} is missing" in page.text


@pytest.mark.parametrize(
    "changes",
    [{"columns": None}, {"columns": "abcd"}, {"columns": []}, {"rows": 3}, {"rows": None},
     {"rows": [["one"]]}, {"rows": ["text"]}, {"rows": [None]}],
    ids=str,
)
def test_a_table_that_is_none_spares_the_others(tmp_path, changes):
    write(tmp_path, tables=[table(**changes), {}, table(rows=[]), table(rows=[[None, 1, {}, []]])])
    page = Page(report.build(tmp_path))
    assert page.text.count("cannot be read") == 2 and page.tags.count("table") == 2
    assert "table as CSV: missing" in page.text
    assert_links_resolve(page, tmp_path)


def test_missing_files_are_said_not_linked(tmp_path):
    (write(tmp_path) / "rows.csv").unlink()
    page = Page(report.build(tmp_path))
    assert "rows as CSV: missing" in page.text
    assert_links_resolve(page, tmp_path)


@pytest.mark.parametrize(
    "broken",
    ["", "{oops", "[]", '{"claims": 3}', '{"figures": ["a.png"]}', '{"tables": [[]]}', "\udcff"])
def test_a_corrupt_record_spares_the_others(tmp_path, broken):
    write(tmp_path)
    (write(tmp_path, "spikes") / "record.json").write_bytes(
        broken.encode("utf-8", "surrogateescape")
    )
    page = Page(report.build(tmp_path))
    assert "record.json cannot be read" in page.text and "High rates gain more" in page.text
    assert_links_resolve(page, tmp_path)


def test_a_missing_record_is_said(tmp_path):
    (write(tmp_path) / "record.json").unlink()
    assert "record.json is missing" in Page(report.build(tmp_path)).text


def test_an_empty_record_is_no_error(tmp_path):
    (write(tmp_path) / "record.json").write_text('{"seconds": NaN}')
    assert "lr_sweep" in Page(report.build(tmp_path)).text


def test_a_failed_run_is_shown_until_it_succeeds(tmp_path):
    folder = write(tmp_path)
    failed = folder / "lr_sweep.failed.ipynb"
    error = {"output_type": "error", "ename": "LawaError", "evalue": "no step 7"}
    failed.write_text(json.dumps({"cells": [{"outputs": [error]}]}))
    executed = (folder / "lr_sweep.ipynb").stat().st_mtime_ns
    for age, shown in ((+1, True), (-1, False)):
        when = executed + age * 10**9
        os.utime(failed, ns=(when, when))
        text = Page(report.build(tmp_path)).text
        assert ("LawaError: no step 7" in text and "from an earlier run" in text) is shown
    assert_links_resolve(Page(report.build(tmp_path)), tmp_path)


def test_no_records_is_one_error_line(tmp_path, capsys):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "figures").mkdir()
    for results in (tmp_path, tmp_path / "nowhere"):
        assert report.main([str(results)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: no records in") and err.count("\n") == 1
    assert not (tmp_path / "index.html").exists()


def test_the_old_page_stands_until_the_new_one_is_whole(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    (tmp_path / "index.html").write_text("old")

    def interrupted(*_):
        raise OSError("disk full")

    monkeypatch.setattr(lawa_core.os, "replace", interrupted)
    assert report.main([str(tmp_path)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["index.html"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    write(tmp_path)
    html = report.build(tmp_path).read_text(encoding="utf-8")
    assert not any(
        word in html for word in ("http:", "https:", "//", "@import", "<script", "<link")
    )


# ---- What the repository shows ----


def write_project(root):
    """The pages with their marks, a record, a figure, a benchmark's results."""
    write(root / "results", files=("gain_over_steps.png", "rows.csv"), machine="2 cores")
    (root / "benchmarks").mkdir()
    (root / "benchmarks/averaging.json").write_text(json.dumps({"markdown": "| a | b |"}))
    (root / "docs").mkdir()
    for page, names in report.PAGES.items():
        marks = "".join(
            f"# {name}\n<!-- begin {name} -->\nstale\n<!-- end {name} -->\n" for name in names
        )
        (root / page).write_text(f"before\n{marks}after\n")
    return root


def record_claims(root, claims, **changes):
    path = root / "results/lr_sweep/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"claims": claims} | changes))


def read_pages(root):
    return {page: (root / page).read_text() for page in report.PAGES}


def test_publish_writes_the_tables_and_nothing_else(tmp_path):
    root = write_project(tmp_path)
    before = read_pages(root)
    written = report.publish(root / "results", root)
    drawn = [root / "docs/claims.svg", root / "docs/claims_all.svg"]
    assert written == [root / page for page in report.PAGES] + drawn
    texts = read_pages(root)
    assert all(text.startswith("before\n") and text.endswith("after\n") for text in texts.values())
    assert "stale" not in texts["README.md"] + texts["docs/claims.md"]
    row = (
        "| High rates gain more (`lr_sweep`) | 0.12 at 6e-3 [P] plot | +0.040 [+0.030, +0.050] "
        "nats; lr 1e-2, 40% of the run | ✓ holds | 3 seeds |"
    )
    assert row in texts["docs/claims.md"]
    assert "docs/gain_over_steps.png" in texts["README.md"]
    assert "docs/claims.svg" in texts["README.md"] and "claims_all.svg" in texts["docs/claims.md"]
    assert (root / "docs/gain_over_steps.png").exists()
    assert "| a | b |" in texts["docs/benchmarks.md"]
    assert texts["docs/plan.md"] == before["docs/plan.md"]  # what has no source is left as it is
    for path in drawn:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "<a" not in path.read_text() and "var(" not in path.read_text()
    report.renew(root)  # and once more from what was copied
    assert read_pages(root) == texts


def test_readme_shows_the_primary_claims(tmp_path):
    """One row each, in order; those without a record say so."""
    root = write_project(tmp_path)
    record_claims(root, [claim("Rates | more", primary="rates"), claim("later", later=True)])
    report.publish(root / "results", root)
    text = (root / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(report.PRIMARY) == 6
    assert [row.count("not recorded") for row in rows] == [1, 0, 1, 1, 1, 1]
    assert rows[1] == (
        "| higher learning rates gain more: *Rates \\| more* (`lr_sweep`) | 0.12 at 6e-3 [P] plot "
        "| +0.040 [+0.030, +0.050] nats; lr 1e-2, 40% of the run | ✓ holds | 3 seeds |"
    )
    assert "later work: 0.12" in (root / "docs/claims.md").read_text()


def test_what_is_published_names_no_machine_and_few_digits(tmp_path):
    root = write_project(tmp_path)
    params = {"corpus": "/home/someone/data/books", "url": "https://a.b/c/d", "share": 1 / 3}
    params["note"] = "see\n/home/someone/b"
    record_claims(root, [claim(mean=0.04)], params=params, command="papermill x -p a /tmp/q/y")
    write(root / "results", "lr_sweep-lr=6e-4", notebook="lr_sweep")
    report.publish(root / "results", root)
    (record,) = json.loads((root / "docs/claims.json").read_text())
    assert record["params"] == {
        "corpus": "books", "url": "https://a.b/c/d", "share": 0.333333, "note": "see\nb"}
    assert record["command"] == "papermill x -p a y"


def test_the_published_rows_give_the_intervals(tmp_path):
    """docs/claims.csv: seeds one by one, of blocks the mean."""
    root = write_project(tmp_path)
    blocks = claim("over blocks", over="blocks", n=512, pairs=[[i, 4.0, 4.04] for i in range(512)])
    record_claims(root, [claim(), blocks, claim("untested", None)])
    report.publish(root / "results", root)
    with open(root / "docs/claims.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed_or_block"] for row in rows] == ["0", "1", "2", "mean of 512 blocks"]
    values = [float(row["difference"]) for row in rows[:3]]
    assert sum(values) / 3 == pytest.approx(0.04)
    assert "untested" not in {row["claim"] for row in rows}
    (record,) = json.loads((root / "docs/claims.json").read_text())
    assert [len(kept.get("pairs", [])) for kept in record["claims"]] == [3, 0, 0]


def test_one_notebook_is_published_alone(tmp_path):
    """Records of the others, their claims and the headline's figure stay as they are."""
    root = write_project(tmp_path)
    write(root / "results", "annealing", claims=[claim("as it was", primary="ema")])
    write(root / "results", "zzz", claims=[claim("the last")])
    report.publish(root / "results", root)
    before = json.loads((root / "docs/claims.json").read_text())
    again = root / "again"
    write(again, "annealing", claims=[claim("done again")], tables=[table()])
    write(again, "blend", claims=[claim("new")])
    report.publish(again, root)
    after = json.loads((root / "docs/claims.json").read_text())
    names = [record["notebook"] for record in after]
    assert names == ["lr_sweep", "annealing", "blend", "zzz"]
    assert (after[0], after[3]) == (before[0], before[2])
    assert not any("tables" in record for record in after)
    with open(root / "docs/claims.csv", newline="") as file:
        claims = [row["claim"] for row in csv.DictReader(file)]
    assert claims[::3] == ["High rates gain more", "done again", "new", "the last"]
    assert "as it was" not in (root / "docs/claims.md").read_text()
    assert (root / "docs/gain_over_steps.png").read_bytes() == b"x"
    # once more, from all of them: what a record is does not depend on when it was published
    texts = read_pages(root) | {"json": (root / "docs/claims.json").read_text()}
    report.publish(again, root)
    assert read_pages(root) | {"json": (root / "docs/claims.json").read_text()} == texts


def test_publish_without_the_headline_is_an_error(tmp_path):
    """Where neither the results nor docs/ have it; and with nothing to publish."""
    root = write_project(tmp_path)
    write(root / "others", "blend")
    write(root / "variants", "blend-k=3", notebook="blend")
    before = read_pages(root)
    for results, words in (("others", "lr_sweep"), ("variants", "no records"),
                           ("nowhere", "no records")):
        with pytest.raises(lawa_core.LawaError, match=words):
            report.publish(root / results, root)
    assert read_pages(root) == before and not any((root / "docs").glob("claims.*[nv]"))


@pytest.mark.parametrize("page", report.PAGES)
def test_publish_needs_the_marks(tmp_path, page):
    root = write_project(tmp_path)
    before = read_pages(root) | {page: "no marks"}
    (root / page).write_text("no marks")
    with pytest.raises(
        ValueError, match=f"{page} must have one <!-- begin {report.PAGES[page][0]}"
    ):
        report.publish(root / "results", root)
    assert read_pages(root) == before  # none of them is written


def test_every_primary_claim_is_recorded():
    """docs/claims.json holds a claim for each row of README's table."""
    found = report.made()
    if "claims" not in found:
        pytest.skip("docs/claims.json has a former form: run python -m lab.report --publish")
    assert "not recorded" not in found["claims"]


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_are_what_their_sources_make_them(page):
    """Nothing in the generated tables was typed: making them again changes nothing."""
    text = (report.ROOT / page).read_text(encoding="utf-8")
    found = report.made()
    for name in report.PAGES[page]:
        if name not in found:
            pytest.skip(f"no source of {name!r} in its present form")
        assert f"<!-- begin {name} -->\n{found[name]}\n<!-- end {name} -->" in text


def test_the_drawings_are_what_their_source_makes_them():
    """In words and numbers; how a line is written is matplotlib's."""
    for file, text in report.made().items():
        if file.endswith(".svg"):
            assert words_of((report.ROOT / file).read_text(encoding="utf-8")) == words_of(text)
