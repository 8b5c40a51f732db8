"""results/index.html: what it says, that no record can break it, that its links lead somewhere."""

import json
import os
from html.parser import HTMLParser
from urllib.parse import unquote

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
        self.alts += [attrs["alt"]] if "alt" in attrs else []

    def handle_data(self, data):
        self.text += data


def write(results, name="lr_sweep", files=("gain.png", "rows.csv"), **changes):
    """One notebook's folder as lab.Lab leaves it, with `changes` to its record."""
    folder = results / name
    folder.mkdir(parents=True)
    for file in (*files, f"{name}.ipynb"):
        (folder / file).write_bytes(b"x")
    verdict = {
        "claim": "High rates gain more",
        "paper": "0.12",
        "paper_source": "[P] plot",
        "ours": "0.14",
        "n": 3,
    }
    record = {
        "notebook": name,
        "title": "Learning rates",
        "question": "Do high rates gain more?",
        "scale": "laptop",
        "params": {"k": 5},
        "command": f"papermill notebooks/{name}.ipynb out.ipynb",
        "seconds": 75.4,
        "figures": [{"file": "gain.png", "title": "Gain", "caption": "n = 3"}],
        "verdicts": [verdict | {"holds": True, "evidence": "3 of 3 seeds"}],
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
    write(tmp_path)
    page = Page(report.build(tmp_path))
    for words in (
        "Learning rates",
        "Do high rates gain more?",
        "0.12",
        "[P] plot",
        "0.14",
        "3 of 3 seeds",
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
    assert (
        len([link for link in page.links if not link.startswith("#")]) == 6
    )  # two figures, two notebooks, two CSVs
    assert_links_resolve(page, tmp_path)


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        (True, "✓ holds"),
        (False, "✗ does not hold"),
        (None, "? undecided"),
        ("false", "? undecided"),
        ([], "? undecided"),
    ],
)
def test_verdict_words(tmp_path, holds, words):
    write(tmp_path, verdicts=[{"claim": "c", "holds": holds}])
    page = Page(report.build(tmp_path))
    # once in the count on top, once in the table, once in the notebook's section; the other two
    # only in the count
    assert {badge: page.text.count(badge) for _, badge in report.BADGES.values()} == {
        badge: 3 if badge == words else 1 for _, badge in report.BADGES.values()
    }


def test_a_verdict_stands_under_its_figure(tmp_path):
    verdicts = [
        {"claim": "about the figure", "figure": "gain.png"},
        {"claim": "about nothing drawn"},
    ]
    write(tmp_path, verdicts=verdicts)
    html = report.build(tmp_path).read_text(encoding="utf-8")
    caption = html[html.index("<figcaption>") : html.index("</figcaption>")]
    assert "about the figure" in caption and "about nothing drawn" not in caption
    assert (
        html.count("about the figure") == html.count("about nothing drawn") == 2
    )  # and both in the table


def test_hostile_strings_are_only_text(tmp_path):
    verdict = dict.fromkeys(
        ("claim", "paper", "paper_source", "ours", "evidence", "n", "holds"), HOSTILE
    )
    figure = {"file": HOSTILE, "title": HOSTILE, "caption": HOSTILE}
    strings = dict.fromkeys(
        ("title", "question", "scale", "command", "finished", "machine", "rows", "seconds"), HOSTILE
    )
    folder = write(
        tmp_path, **strings, params={HOSTILE: HOSTILE}, figures=[figure], verdicts=[verdict]
    )
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


def test_missing_files_are_said_not_linked(tmp_path):
    (write(tmp_path) / "rows.csv").unlink()
    page = Page(report.build(tmp_path))
    assert "rows as CSV: missing" in page.text
    assert_links_resolve(page, tmp_path)


@pytest.mark.parametrize(
    "broken", ["", "{oops", "[]", '{"verdicts": 3}', '{"figures": ["gain.png"]}', "\udcff"]
)
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


def read_pages(root):
    return {page: (root / page).read_text() for page in report.PAGES}


def test_publish_writes_the_tables_and_nothing_else(tmp_path):
    root = write_project(tmp_path)
    before = read_pages(root)
    assert report.publish(root / "results", root) == [root / page for page in report.PAGES]
    texts = read_pages(root)
    assert all(text.startswith("before\n") and text.endswith("after\n") for text in texts.values())
    assert "stale" not in texts["README.md"] + texts["docs/claims.md"]
    row = "| High rates gain more (`lr_sweep`) | 0.12 [P] plot | 0.14; 3 of 3 seeds | ✓ holds | 3 |"
    assert row in texts["docs/claims.md"]
    assert "docs/gain_over_steps.png" in texts["README.md"]
    assert (root / "docs/gain_over_steps.png").exists()
    assert "| a | b |" in texts["docs/benchmarks.md"]
    assert texts["docs/plan.md"] == before["docs/plan.md"]  # what has no source is left as it is
    report.renew(root)  # and once more from what was copied
    assert read_pages(root) == texts


def test_readme_shows_the_primary_claims(tmp_path):
    """One row each, in order; those without a recorded verdict say so."""
    root = write_project(tmp_path)
    record = root / "results/lr_sweep/record.json"
    claim = {"claim": "Higher learning rates gain more | from averaging", "holds": True}
    verdict = claim | {"paper": "p", "paper_source": "[S]", "ours": "o", "evidence": "e", "n": 3}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"verdicts": [verdict]}))
    report.publish(root / "results", root)
    text = (root / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(report.PRIMARY) == 6
    assert [row.count("not recorded") for row in rows] == [1, 0, 1, 1, 1, 1]
    assert rows[1] == (
        "| higher learning rates gain more: *Higher learning rates gain more \\| from averaging* "
        "(`lr_sweep`) | p [S] | o; e | ✓ holds | 3 |"
    )


@pytest.mark.parametrize("page", report.PAGES)
def test_publish_needs_the_headline_and_the_marks(tmp_path, page):
    root = write_project(tmp_path)
    before = read_pages(root) | {page: "no marks"}
    (root / page).write_text("no marks")
    with pytest.raises(
        ValueError, match=f"{page} must have one <!-- begin {report.PAGES[page][0]}"
    ):
        report.publish(root / "results", root)
    assert read_pages(root) == before  # none of them is written
    with pytest.raises(ValueError, match="lr_sweep"):
        report.publish(root / "nowhere", root)


def test_every_primary_claim_is_recorded():
    """docs/claims.json holds a verdict for each row of README's table."""
    records = json.loads((report.ROOT / "docs/claims.json").read_text(encoding="utf-8"))
    assert "not recorded" not in report.primary_claims(records)


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_are_what_their_sources_make_them(page):
    """Nothing in the generated tables was typed: making them again changes nothing."""
    text = (report.ROOT / page).read_text(encoding="utf-8")
    found = report.blocks()
    for name in report.PAGES[page]:
        assert f"<!-- begin {name} -->\n{found[name]}\n<!-- end {name} -->" in text
