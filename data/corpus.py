"""Build a corpus folder from text files: files -> documents -> split -> tokenizer -> token ids -> folder.

The folder holds train.bin and val.bin (token ids, little-endian uint16, <|endoftext|> after each document), meta.json,
and a tokenizer that is the corpus's own: tokenizer.tiktoken (a line per token: base64 of its bytes, rank) or a model's
tokenizer.json. The prepare.py scripts share this file. `build` holds all text in memory: fine for a gigabyte or two;
what reads parquet and JSON lines, and the Hub, does not.
"""

import argparse
import base64
import functools
import gzip
import hashlib
import importlib
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np
import tiktoken

TOKENIZER = "tokenizer.tiktoken"
JSON_TOKENIZER = "tokenizer.json"
FILES = (
    "train.bin",
    "val.bin",
    TOKENIZER,
    JSON_TOKENIZER,
    "meta.json",
)  # in this order: meta.json says that the others are there
EOT = "<|endoftext|>"
# GPT-4's split pattern: byte pairs merge within its matches only
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
CUT = re.compile(
    r"\S\r?\n(?=\S)|\S(?= \S)"
)  # that pattern and GPT-2's split here too, so a text cut here gets the same tokens
PIECE = (
    1 << 17
)  # characters; tiktoken and rustbpe crash on a million blanks in a row, so they get less at a time
MIN_FILES = 20  # with fewer files, each is cut in two rather than going to one side as a whole


class CorpusError(ValueError):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    """The flags that every prepare.py has, those of a split unless `val_fraction` is None; usage errors take one line."""

    def __init__(self, doc, example, val_fraction=0.05, seed=0):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, epilog=f"example: {example}", formatter_class=raw)
        if val_fraction is not None:
            self.add_argument(
                "--val-fraction",
                type=float,
                default=val_fraction,
                metavar="F",
                help="of the text (default: %(default)s)",
            )
            self.add_argument(
                "--seed",
                type=int,
                default=seed,
                metavar="S",
                help="of the split (default: %(default)s)",
            )
        self.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help="where to write (default: the corpus's own folder)",
        )
        self.add_argument(
            "--force", action="store_true", help="rebuild even if the corpus is up to date"
        )

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def one_line_errors(main):
    """Decorate a script's main(argv): return 0, 2 after one line on stderr for a mistake or an unusable file, 130 for Ctrl-C."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except (CorpusError, OSError) as error:
            named = isinstance(error, OSError) and error.filename
            print(
                f"error: {error.filename}: {error.strerror}" if named else f"error: {error}",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command does what is left", file=sys.stderr)
            return 130
        return 0

    return wrapped


class Progress:
    """A line with rate and time left, every 5 seconds (on a terminal in place, twice a second); threads may share it.

    `total` and `done` (by an earlier run) are counts of `unit` times `scale`; without a total no time is foretold.
    """

    def __init__(self, what, unit, total=None, done=0, scale=1):
        self.what, self.unit, self.total, self.before, self.done, self.scale = (
            what,
            unit,
            total,
            done,
            done,
            scale,
        )
        self.begun = self.said = time.monotonic()
        self.lock, self.terminal = threading.Lock(), sys.stdout.isatty()

    def add(self, amount):
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now - self.said > (0.5 if self.terminal else 5):
                self.said = now
                line = self.line((self.done - self.before) / (now - self.begun))
                print(
                    f"\r{line:<100}" if self.terminal else line,
                    end="" if self.terminal else "\n",
                    flush=True,
                )

    def line(self, rate):
        """Text of a line at `rate` per second."""
        pace = f"{rate / self.scale:,.1f} {self.unit}/s"
        if not self.total:
            return f"{self.what}: {self.done / self.scale:,.0f} {self.unit} so far, {pace}"
        left = (self.total - self.done) / max(rate, 1e-9)
        left = f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
        share = f"{self.done / self.scale:,.0f} of {self.total / self.scale:,.0f} {self.unit} ({self.done / self.total:.0%})"
        return f"{self.what}: {share}, {pace}, {left}"

    def close(self):
        if self.terminal and self.done > self.before:
            print()


def need(package, module=None):
    """Return an optional package's module; CorpusError if it is not installed."""
    try:
        return importlib.import_module(module or package)
    except ImportError as error:
        raise CorpusError(f"this needs {package}: pip install {package}") from error


# ---- files -> documents ----


@dataclass(frozen=True)
class Document:
    name: str  # of its file, relative to the source folder, with forward slashes
    text: str

    @property
    def nbytes(self):  # in UTF-8
        return len(self.text.encode())


def list_files(paths, leave_out=()):
    """Return {relative name: Path} of the files at and under `paths`, without hidden ones and folders in `leave_out`.

    Names are relative to the deepest folder that holds all of `paths`, so a file given twice counts once.
    """
    roots = [Path(path).resolve() for path in paths]
    for path, root in zip(paths, roots, strict=True):
        if not (root.is_file() or root.is_dir()):
            raise CorpusError(f"{path}: no such file or folder")
    base = os.path.commonpath([root if root.is_dir() else root.parent for root in roots])
    found = (
        path for root in roots for path in ([root] if root.is_file() else _walk(root, leave_out))
    )
    return {path.relative_to(base).as_posix(): path for path in found if path.is_file()}


def _walk(root, leave_out):
    def fail(error):  # os.walk passes over an unreadable folder in silence otherwise
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [
            name for name in subfolders if name not in leave_out and not name.startswith(".")
        ]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def read_documents(files):
    """Return (documents in the order of their names, number of files skipped as binary or not UTF-8).

    Blank files are left out, and of identical files one is kept: a copy in val would measure memory.
    """
    documents, seen, skipped = [], set(), 0
    for name, path in sorted(files.items()):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # no text file has one
            skipped += 1
        elif text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document(name, text))
    return documents, skipped


def manifest(documents):
    """Return the sha256 of what `sha256sum` prints for the documents' files: a line of hash and name for each."""
    lines = (f"{hashlib.sha256(doc.text.encode()).hexdigest()}  {doc.name}\n" for doc in documents)
    return _sha256("".join(lines))


def _sha256(text):
    return hashlib.sha256(
        text.encode("utf-8", "surrogateescape")
    ).hexdigest()  # file names may be any bytes


# ---- big files -> documents: parquet, JSON lines, text ----


def open_parquet(path, column):
    """Return a pyarrow ParquetFile that has the text column; it maps the file, so a big one costs no memory."""
    pyarrow, parquet = need("pyarrow"), need("pyarrow", "pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise CorpusError(
            f"{path}: not a whole parquet file, fetch it again ({first_line(error)})"
        ) from error
    if column not in file.schema_arrow.names:
        raise CorpusError(
            f"{path}: has no column {column!r}, only {', '.join(file.schema_arrow.names)}"
        )
    return file


def parquet_texts(path, column, first=0, count=None):
    """Yield lists of the texts of rows `first` to `first + count` (None: to the end); a null is an empty text."""
    file = open_parquet(path, column)
    stop = file.metadata.num_rows if count is None else first + count
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    groups = np.flatnonzero(
        (ends > first) & (np.append(0, ends[:-1]) < stop)
    ).tolist()  # those that hold some of the rows
    at = int(np.append(0, ends)[groups[0]]) if groups else stop  # row that the next batch begins at
    try:
        for batch in file.iter_batches(256, groups, [column]):
            texts = (
                batch.column(0).slice(max(first - at, 0), max(stop - max(at, first), 0)).to_pylist()
            )
            if texts:
                yield [text or "" for text in texts]
            at += len(batch)
            if at >= stop:
                return
    except (need("pyarrow").ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: damaged, fetch it again ({first_line(error)})") from error


def stream_texts(path, column):
    """Yield the documents of a .parquet or .jsonl file (a .gz or .zst of one, too); any other file is one document."""
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2].lower()
    try:
        if kind == "parquet":
            for texts in parquet_texts(path, column):
                yield from texts
        elif kind == "jsonl":
            with open_text(path) as file:
                yield from (
                    json_text(f"{path}:{number}", line, column)
                    for number, line in enumerate(file, 1)
                    if line.strip()
                )
        else:
            with open_text(path) as file:
                yield file.read()
    except (UnicodeDecodeError, EOFError) as error:
        raise CorpusError(
            f"{path}: damaged, or neither UTF-8 text nor .jsonl nor .parquet ({first_line(error)})"
        ) from error


def open_text(path):
    """Open a text file in UTF-8, its line ends as they are; a .gz or .zst is unpacked along the way."""
    if path.suffix == ".zst":
        return io.TextIOWrapper(
            io.BufferedReader(need("pyarrow").input_stream(str(path), compression="zstd")),
            "utf-8",
            newline="",
        )
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="")


def json_text(where, line, column):
    with suppress(ValueError, KeyError, TypeError):
        if isinstance(text := json.loads(line)[column], str):
            return text
    raise CorpusError(
        f"{where}: expected a JSON object with a text {column!r}, found {line[:60].strip()!r}"
    )


def first_line(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


# ---- the Hub -> files ----


@dataclass(frozen=True)
class HubRepo:
    """A repository on the Hub, read through huggingface_hub. What goes wrong is one CorpusError that says what to fetch by hand."""

    source: str  # REPO or REPO@REVISION
    instead: str  # what to do with files fetched by hand
    kind: str = "dataset"  # or "model"

    @property
    def repo(self):
        return self.source.partition("@")[0]

    @property
    def revision(self):
        return self.source.partition("@")[2] or "main"

    def files(self, pattern):
        """Return (commit, {path: bytes}) of the files that match `pattern`, numbers in paths in numeric order."""
        hub = need("huggingface_hub")
        with self.errors(pattern):
            info = hub.HfApi().repo_info(
                self.repo, revision=self.revision, repo_type=self.kind, files_metadata=True
            )
        found = {file.rfilename: file.size for file in info.siblings}
        sizes = {path: found[path] for path in sorted(found, key=numeric) if fnmatch(path, pattern)}
        if not sizes:
            raise CorpusError(
                f"{self.source} on the Hub has no file {pattern}, only {', '.join(list(found)[:5]) or 'nothing'}"
            )
        return info.sha, sizes

    def fetch(self, commit, sizes, folder=None):
        """Return {path: Path} of files ({path: bytes}), fetched into `folder` (None: the Hub's cache) where they are not there yet.

        A file gets its name when it is whole; an interrupted one is fetched anew.
        """
        hub = need("huggingface_hub")
        there = {path: folder / path for path in sizes if folder and (folder / path).is_file()}
        progress = Progress(
            "fetching", "MB", sum(sizes.values()), sum(sizes[path] for path in there), 1e6
        )
        for path in [path for path in sizes if path not in there]:
            with self.errors(path):
                there[path] = Path(
                    hub.hf_hub_download(
                        self.repo, path, repo_type=self.kind, revision=commit, local_dir=folder
                    )
                )
            progress.add(sizes[path])
        progress.close()
        return there

    @contextmanager
    def errors(self, pattern):
        from huggingface_hub.errors import HTTPError  # httpx's

        page = f"https://huggingface.co/{'datasets/' * (self.kind == 'dataset')}{self.repo}/tree/{quote(self.revision, safe='')}"
        try:
            yield
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise CorpusError(
                f"cannot fetch {pattern} from {page} ({reason}); run the same command where the Hub can be reached, "
                f"or fetch it by hand and {self.instead}"
            ) from error


def numeric(name):
    """Sorting key: numbers within names count as numbers."""
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name))
    ]


# ---- split ----


def split(documents, val_fraction, seed):
    """Return (train, val, rule); both sides in the order of a seeded hash of the file names, so any part is a sample.

    Rule "files": whole files go to val, in that order, while they fit into `val_fraction` of all bytes.
    Rule "tails", with fewer than MIN_FILES files or files too big to fit: the last part of each file is val.
    """
    order = sorted(documents, key=lambda doc: _sha256(f"{seed}:{doc.name}"))
    wanted = room = val_fraction * sum(doc.nbytes for doc in documents)
    train, val = [], []
    for doc in order:
        fits = doc.nbytes <= room
        (val if fits else train).append(doc)
        room -= doc.nbytes * fits
    if len(documents) >= MIN_FILES and room <= wanted / 2 and train:
        return train, val, "files"
    heads, tails = zip(*(cut_tail(doc, val_fraction) for doc in order), strict=True)
    return list(heads), [tail for tail in tails if tail.text], "tails"


def cut_tail(doc, fraction):
    """Return (head, tail), the tail with at least `fraction` of the characters (at most half as much again).

    It begins after a blank line, or else a line end, a space, anywhere. With nothing to cut, the tail is empty.
    """
    size = max(1, round(fraction * len(doc.text)))
    cut = len(doc.text) - size
    for mark in ("\n\n", "\n", " "):
        at = doc.text.rfind(mark, max(0, cut - size // 2), cut)
        if at >= 0:
            cut = at + len(mark)
            break
    head, tail = doc.text[:cut], doc.text[cut:]
    if not (head.strip() and tail.strip()):
        head, tail = doc.text, ""
    return Document(doc.name, head), Document(doc.name, tail)


# ---- tokenizer and token ids ----


def train_tokenizer(documents, vocab_size):
    """Return a byte-pair tiktoken.Encoding of `vocab_size` ids: 256 bytes, merges, and <|endoftext|> as the last."""
    trainer = need("rustbpe").Tokenizer()
    texts = (piece for doc in documents for piece, _ in pieces(doc.text))
    trainer.train_from_iterator(texts, vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        raise CorpusError(
            f"--vocab-size {vocab_size}: too large, the training text yields only {len(ranks) + 1}"
        )
    return tiktoken.Encoding(
        "corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: vocab_size - 1}
    )


def known_tokenizer(name):
    """Return tiktoken's encoding `name`, which tiktoken downloads at its first use."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # those of requests are, too
        raise CorpusError(
            f"tiktoken cannot download {name!r}: go online once, or set TIKTOKEN_CACHE_DIR"
        ) from error


class JsonTokenizer:
    """A model's own tokenizer.json, through the `tokenizers` package, under the names of tiktoken.Encoding that are used here."""

    ENDS = (
        EOT,
        "</s>",
        "<|end_of_text|>",
        "<eos>",
    )  # what models call it; Pythia, Llama 2, Llama 3, Gemma

    def __init__(self, path):
        self.tokenizer = need("tokenizers").Tokenizer.from_file(str(path))
        self.tokenizer.encode_special_tokens = True  # a literal <|endoftext|> in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.n_vocab = self.tokenizer.get_vocab_size()
        found = (self.tokenizer.token_to_id(end) for end in self.ENDS)
        self.eot_token = next((token for token in found if token is not None), None)
        if self.eot_token is None:
            raise CorpusError(
                f"{path}: has no end-of-text token, expected one of {', '.join(self.ENDS)}"
            )
        if self.n_vocab > 65536:
            raise CorpusError(f"{path}: {self.n_vocab} token ids, at most 65536 fit into uint16")

    def encode_ordinary_batch(
        self, texts, num_threads=None
    ):  # takes all cores, unless RAYON_NUM_THREADS says otherwise
        return [
            encoded.ids
            for encoded in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]


def write_tokenizer(path, encoding):
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token))
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )


def pieces(text):
    """Yield (piece, whether it is the last) of at most 2 * PIECE characters, cut between words where there are any."""
    start = 0
    while len(text) - start > 2 * PIECE:
        cut = CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = cut.end() if cut else start + 2 * PIECE
        yield text[start:end], False
        start = end
    yield text[start:], True


def whole(text):
    """`pieces` for a tokenizer that takes texts of any length."""
    yield text, True


def write_tokens(path, texts, encoding, pieces=pieces, limit=None):
    """Write the ids of an iterable of texts, <|endoftext|> after each; return (tokens, UTF-8 bytes of text).

    With a `limit` the text that reaches so many tokens is the last, and whole.
    """
    tokens = nbytes = 0
    progress = Progress(path.name, "MB", scale=1e6)
    parts = (part for text in texts for part in pieces(text))
    with open(path, "wb") as file:
        while batch := list(islice(parts, 128)):
            encoded = encoding.encode_ordinary_batch(
                [piece for piece, _ in batch], num_threads=os.cpu_count() or 1
            )
            for ids, (piece, last) in zip(encoded, batch, strict=True):
                ids += [encoding.eot_token] * last
                file.write(np.array(ids, dtype="<u2").tobytes())
                tokens, nbytes = tokens + len(ids), nbytes + len(piece.encode())
                if limit and tokens >= limit and last:
                    return tokens, nbytes
            progress.add(nbytes - progress.done)
    return tokens, nbytes


# ---- folder ----


@contextmanager
def staging(out):
    """Yield a temporary folder inside `out`; at the end its files replace the corpus there. On failure nothing is left.

    Raises CorpusError where the disk is full or not writable.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    temporary = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
        yield temporary
        publish(temporary, out)
    except OSError as error:
        raise CorpusError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: the corpus is there
                folder.rmdir()


def publish(folder, out):
    """Move a corpus's files from `folder` to `out`, on the same disk, in place of the corpus there."""
    (out / "meta.json").unlink(
        missing_ok=True
    )  # killed from here on: no meta.json, rather than a mixed corpus
    for name in FILES:
        if (folder / name).exists():
            os.replace(folder / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def check_disk(folder, wanted, what):
    """Raise CorpusError unless `wanted` bytes are free where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise CorpusError(
            f"{folder}: {free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB needed for {what}; make room, or see --out"
        )


def is_finished(out, settings):
    """Tell whether `out` holds a whole corpus with these settings, a dict of keys in meta.json."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        whole = all(
            (out / f"{side}.bin").stat().st_size == 2 * meta[f"{side}_tokens"]
            for side in ("train", "val")
        )
        whole &= (
            meta["tokenizer"] not in (TOKENIZER, JSON_TOKENIZER)
            or (out / meta["tokenizer"]).is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return whole and all(meta.get(key) == value for key, value in settings.items())


def check_settings(vocab_size, val_fraction):
    if not 0 < val_fraction < 1:
        raise CorpusError(f"--val-fraction {val_fraction}: must lie between 0 and 1")
    if not 257 <= vocab_size <= 65536:
        raise CorpusError(
            f"--vocab-size {vocab_size}: must be 257 (256 bytes and {EOT}) to 65536 (uint16 token ids)"
        )


def build(name, files, out, vocab_size, val_fraction, seed, tokenizer=None, force=False):
    """Build the corpus `name` in the folder `out` from `files` ({relative name: Path}), unless it is there already.

    `tokenizer` names an encoding of tiktoken's; None trains one with `vocab_size` ids on the training text.
    Raises CorpusError, and then leaves `out` as it was.
    """
    check_settings(vocab_size, val_fraction)
    begun = time.monotonic()
    own = {out.resolve() / file for file in FILES}  # the text may lie where the corpus goes
    documents, skipped = read_documents(
        {key: path for key, path in files.items() if path not in own}
    )
    if not documents:
        raise CorpusError(
            f"no text found: {len(files)} files, {skipped} of them binary or not UTF-8"
        )
    settings = {
        "name": name,
        "val_fraction": val_fraction,
        "seed": seed,
        "manifest_sha256": manifest(documents),
    }
    settings |= (
        {"tokenizer": tokenizer}
        if tokenizer
        else {"tokenizer": TOKENIZER, "vocab_size": vocab_size}
    )
    if not force and is_finished(out, settings):
        print(f"{name} is up to date in {out} (--force rebuilds it)")
        return

    train, val, rule = split(documents, val_fraction, seed)
    if not val:
        raise CorpusError("the text is too short to set a part of it aside for val: give more")
    print(
        f"{name}: {len(documents)} files of text, {skipped} skipped as binary or not UTF-8; tokenizing",
        flush=True,
    )
    encoding = known_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, vocab_size)
    meta = settings | {
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "split": rule,
    }
    meta |= {"skipped": skipped, "python": platform.python_version(), "documents": {}}
    with staging(out) as folder:
        for side, docs in (("train", train), ("val", val)):
            tokens, nbytes = write_tokens(
                folder / f"{side}.bin", (doc.text for doc in docs), encoding
            )
            meta |= {f"{side}_tokens": tokens, f"{side}_bytes": nbytes}
            meta["documents"][side] = len(docs)
            print(f"{side}: {tokens:,} tokens, {nbytes:,} bytes, {len(docs)} documents")
        if not tokenizer:
            write_tokenizer(folder / TOKENIZER, encoding)
            meta["pattern"] = PATTERN
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(
        f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {encoding.n_vocab}, split by {rule}"
    )
