"""Build a corpus folder from text files: files -> documents -> split -> tokenizer -> tokens.

The folder holds train.bin and val.bin (token ids, little-endian uint16, or uint32 where the
vocabulary is above 65,536; <|endoftext|> after each document), meta.json, and a tokenizer that is
the corpus's own: tokenizer.tiktoken (a line per token: base64 of its bytes, rank) or a model's
tokenizer.json. The prepare.py scripts share this file. `build` holds all text in memory: fine for a
gigabyte or two; what reads parquet does not.
"""

import argparse
import base64
import functools
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # lawa_core.py lies above data/
from lawa_core import LawaError, progress

TOKENIZER = "tokenizer.tiktoken"
JSON_TOKENIZER = "tokenizer.json"
# published in this order: meta.json says that the others are there
FILES = ("train.bin", "val.bin", TOKENIZER, JSON_TOKENIZER, "meta.json")
EOT = "<|endoftext|>"
# GPT-4's split pattern: byte pairs merge within its matches only
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# that pattern and GPT-2's split here too, so a text cut here gets the same tokens
CUT = re.compile(r"\S\r?\n(?=\S)|\S(?= \S)")
# characters; tiktoken and rustbpe crash on a million blanks in a row, so they get less at a time
PIECE = 1 << 17
MIN_FILES = 20  # with fewer files, each is cut in two rather than going to one side as a whole


class Parser(argparse.ArgumentParser):
    """The flags of every prepare.py, those of a split unless `val_fraction` is None."""

    def __init__(self, doc, example, val_fraction=0.05, seed=0):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, epilog=f"example: {example}", formatter_class=raw)
        default = "(default: %(default)s)"
        if val_fraction is not None:
            self.add_argument("--val-fraction", type=float, default=val_fraction, metavar="F",
                              help=f"of the text {default}")
            self.add_argument("--seed", type=int, default=seed, metavar="S",
                              help=f"of the split {default}")
        self.add_argument("--out", type=Path, metavar="DIR",
                          help="where to write (default: the corpus's own folder)")
        self.add_argument("--force", action="store_true",
                          help="rebuild even if the corpus is up to date")

    def error(self, message):  # in one line, unlike argparse's
        self.exit(2, f"error: {message} (see --help)\n")


def one_line_errors(main):
    """Decorate a script's main(argv) so that it returns an exit status.

    0; 2 after one line on stderr for a mistake, an unusable file or an optional package that is
    not installed; 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            return 0
        except KeyboardInterrupt:
            print("interrupted; the same command does what is left", file=sys.stderr)
            return 130
        except ModuleNotFoundError as error:
            package = error.name.partition(".")[0]
            text = f"this needs {package}: pip install {package}"
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else error
        except LawaError as error:
            text = error
        print(f"error: {text}", file=sys.stderr)
        return 2

    return wrapped


def first_line(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


def numeric(name):
    """Sorting key: numbers within names count as numbers."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


# ---- files -> documents ----


def list_files(paths, leave_out=()):
    """Return {relative name: Path} of the files at and under `paths`.

    Hidden files, and folders in `leave_out`, are passed over. Names are relative to the deepest
    folder that holds all of `paths`, so a file given twice counts once.
    """

    def fail(error):  # os.walk passes over an unreadable folder in silence otherwise
        raise error

    found, folders = [], []
    for path in paths:
        root = Path(path).resolve()
        if root.is_file():
            found.append(root)
            folders.append(root.parent)
            continue
        if not root.is_dir():
            raise LawaError(f"{path}: no such file or folder")
        folders.append(root)
        for folder, subfolders, names in os.walk(root, onerror=fail):
            wanted = (name for name in subfolders if name not in leave_out)
            subfolders[:] = [name for name in wanted if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    base = os.path.commonpath(folders)
    return {path.relative_to(base).as_posix(): path for path in found if path.is_file()}


def read_documents(files):
    """Return ({name: text} in the order of names, files skipped as binary or not UTF-8).

    Blank files are left out, and of identical ones one is kept: a copy in val would measure memory.
    """
    documents, seen, skipped = {}, set(), 0
    for name, path in sorted(files.items()):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # no text file has one
            skipped += 1
        elif text.strip() and text not in seen:
            seen.add(text)
            documents[name] = text
    return documents, skipped


def manifest(documents):
    """Return the sha256 of what `sha256sum` prints for the files of {name: text}."""
    return sha256("".join(f"{sha256(text)}  {name}\n" for name, text in documents.items()))


def sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # names: any bytes


# ---- parquet -> texts ----


def open_parquet(path, column):
    """Return a pyarrow ParquetFile with that text column, mapped: a big one costs no memory."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        problem = f"not a whole parquet file, fetch it again ({first_line(error)})"
        raise LawaError(f"{path}: {problem}") from error
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise LawaError(f"{path}: has no column {column!r}, only {names}")
    return file


def parquet_texts(path, column, first=0, count=None):
    """Yield lists of texts, of rows `first` to `first + count` (None: the end); a null is empty."""
    import pyarrow

    file = open_parquet(path, column)
    stop = file.metadata.num_rows if count is None else first + count
    end = 0  # of the row group at hand
    try:
        for group in range(file.num_row_groups):
            at, end = end, end + file.metadata.row_group(group).num_rows
            if end <= first or at >= stop:
                continue
            for batch in file.iter_batches(256, [group], [column]):
                rows = batch.column(0)[max(first - at, 0) : max(stop - at, 0)].to_pylist()
                at += len(batch)
                if rows:
                    yield [text or "" for text in rows]
                if at >= stop:
                    return
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LawaError(f"{path}: damaged, fetch it again ({first_line(error)})") from error


# ---- the Hub -> files ----


class HubRepo:
    """A repository on the Hub, read through huggingface_hub, which caches and resumes.

    source: REPO or REPO@REVISION; instead: what to do with files fetched by hand; kind: "dataset"
    or "model". What goes wrong is one LawaError that says what to fetch by hand.
    """

    def __init__(self, source, instead, kind="dataset"):
        self.source, self.instead, self.kind = source, instead, kind
        self.repo, _, revision = source.partition("@")
        self.revision = revision or "main"

    def files(self, pattern):
        """Return (commit, {path: bytes}) of the files that match, numbers in numeric order."""
        from huggingface_hub import HfApi

        with self.errors(pattern):
            info = HfApi().repo_info(
                self.repo, revision=self.revision, repo_type=self.kind, files_metadata=True
            )
        found = {file.rfilename: file.size for file in info.siblings}
        sizes = {path: found[path] for path in sorted(found, key=numeric) if fnmatch(path, pattern)}
        if not sizes:
            some = ", ".join(list(found)[:5]) or "nothing"
            raise LawaError(f"{self.source} on the Hub has no file {pattern}, only {some}")
        return info.sha, sizes

    def fetch(self, commit, sizes, folder=None):
        """Return {path: Path} of files ({path: bytes}), fetched where they are not there yet.

        They go into `folder`, or else into the Hub's cache.
        """
        from huggingface_hub import hf_hub_download

        paths = {}
        with progress(sum(sizes.values()), "fetching", "B", unit_scale=True) as bar:
            for path, nbytes in sizes.items():
                with self.errors(path):
                    found = hf_hub_download(
                        self.repo, path, repo_type=self.kind, revision=commit, local_dir=folder
                    )
                paths[path] = Path(found)
                bar.update(nbytes)
        return paths

    @contextmanager
    def errors(self, pattern):
        from huggingface_hub.errors import HTTPError  # httpx's

        try:
            yield
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            kind = "datasets/" if self.kind == "dataset" else ""
            page = f"https://huggingface.co/{kind}{self.repo}/tree/{quote(self.revision, safe='')}"
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise LawaError(
                f"cannot fetch {pattern} from {page} ({reason}); run the same command where the "
                f"Hub can be reached, or fetch it by hand and {self.instead}"
            ) from error


# ---- split ----


def split(documents, val_fraction, seed):
    """Return (train, val, rule), lists of the texts of {name: text}.

    Both are in the order of a seeded hash of the names, so any part is a sample. Rule "files":
    whole files go to val, in that order, while they fit into `val_fraction` of all bytes. Rule
    "tails", with fewer than MIN_FILES files or files too big to fit: the end of each file is val.
    """
    order = sorted(documents, key=lambda name: sha256(f"{seed}:{name}"))
    sizes = {name: len(text.encode()) for name, text in documents.items()}
    wanted = room = val_fraction * sum(sizes.values())
    train, val = [], []
    for name in order:
        if sizes[name] <= room:
            val.append(documents[name])
            room -= sizes[name]
        else:
            train.append(documents[name])
    if len(documents) >= MIN_FILES and room <= wanted / 2 and train:
        return train, val, "files"
    train, val = [], []
    for name in order:
        head, tail = cut_tail(documents[name], val_fraction)
        train.append(head)
        if tail:
            val.append(tail)
    return train, val, "tails"


def cut_tail(text, fraction):
    """Return (head, tail), the tail at least `fraction` of the text (at most half as much again).

    It begins after a blank line, or else a line end, a space, anywhere. With nothing to cut, the
    tail is empty.
    """
    size = max(1, round(fraction * len(text)))
    cut = len(text) - size
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, max(0, cut - size // 2), cut)
        if at >= 0:
            cut = at + len(mark)
            break
    head, tail = text[:cut], text[cut:]
    return (head, tail) if head.strip() and tail.strip() else (text, "")


# ---- tokenizer and token ids ----


def token_type(vocab_size):
    """Return numpy's type of the ids of a vocabulary of that size."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def train_tokenizer(texts, vocab_size):
    """Return a byte-pair tiktoken.Encoding: 256 bytes, merges, and <|endoftext|> as the last id."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    parts = (piece for text in texts for piece, _ in pieces(text))
    trainer.train_from_iterator(parts, vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        most = f"the training text yields only {len(ranks) + 1}"
        raise LawaError(f"--vocab-size {vocab_size}: too large, {most}")
    return tiktoken.Encoding(
        "corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: vocab_size - 1}
    )


def known_tokenizer(name):
    """Return tiktoken's encoding `name`, which tiktoken downloads at its first use."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # those of requests are, too
        advice = "go online once, or set TIKTOKEN_CACHE_DIR"
        raise LawaError(f"tiktoken cannot download {name!r}: {advice}") from error


def write_tokenizer(path, encoding):
    lines = []
    for rank in range(encoding.eot_token):
        token = base64.b64encode(encoding.decode_single_token_bytes(rank))
        lines.append(f"{token.decode()} {rank}\n")
    path.write_text("".join(lines))


def pieces(text):
    """Yield (piece, whether it is the last) of at most 2 * PIECE characters, cut between words."""
    start = 0
    while len(text) - start > 2 * PIECE:
        cut = CUT.search(text, start + PIECE, start + 2 * PIECE)
        end = cut.end() if cut else start + 2 * PIECE
        yield text[start:end], False
        start = end
    yield text[start:], True


def write_tokens(path, texts, encoding, pieces=pieces, limit=None):
    """Write the ids of an iterable of texts, <|endoftext|> after each.

    Returns (tokens, UTF-8 bytes of text). With a `limit`, the text that reaches so many tokens is
    the last, and whole.
    """
    tokens, nbytes, kind = 0, 0, token_type(encoding.n_vocab)
    parts = (part for text in texts for part in pieces(text))
    with (open(path, "wb") as file,
          progress(limit, path.name, " tokens", unit_scale=True) as bar):
        while batch := list(islice(parts, 128)):
            batch_texts = [piece for piece, _ in batch]
            encoded = encoding.encode_ordinary_batch(batch_texts, num_threads=os.cpu_count() or 1)
            for ids, (piece, last) in zip(encoded, batch, strict=True):
                if last:
                    ids.append(encoding.eot_token)
                file.write(np.array(ids, kind).tobytes())
                tokens += len(ids)
                nbytes += len(piece.encode())
                bar.update(len(ids))
                if limit and tokens >= limit and last:
                    return tokens, nbytes
    return tokens, nbytes


# ---- folder ----


@contextmanager
def staging(out):
    """Yield a temporary folder inside `out`; at the end its files replace the corpus there.

    On failure nothing is left. LawaError where the disk is full or not writable.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
            yield Path(folder)
            publish(Path(folder), out)
    except OSError as error:
        raise LawaError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it is not empty: a corpus is there
            out.rmdir()


def publish(folder, out):
    """Move a corpus's files from `folder` to `out`, on the same disk, in place of those there."""
    # killed from here on: no meta.json, rather than a mixed corpus
    (out / "meta.json").unlink(missing_ok=True)
    for name in FILES:
        if (folder / name).exists():
            os.replace(folder / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def write_meta(folder, meta):
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def is_finished(out, settings):
    """Tell whether `out` holds a whole corpus with these settings, a dict of keys in meta.json."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        width = np.dtype(token_type(meta["vocab_size"])).itemsize
        for side in ("train", "val"):
            if (out / f"{side}.bin").stat().st_size != width * meta[f"{side}_tokens"]:
                return False
        own = meta["tokenizer"] in (TOKENIZER, JSON_TOKENIZER)
        if own and not (out / meta["tokenizer"]).is_file():
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(meta.get(key) == value for key, value in settings.items())


def check_settings(vocab_size, val_fraction):
    if not 0 < val_fraction < 1:
        raise LawaError(f"--val-fraction {val_fraction}: must lie between 0 and 1")
    if not 257 <= vocab_size <= 65536:
        limits = f"257 (256 bytes and {EOT}) to 65536"
        raise LawaError(f"--vocab-size {vocab_size}: must be {limits}")


def build(name, files, out, vocab_size, val_fraction, seed, tokenizer=None, force=False):
    """Build the corpus `name` in the folder `out` from `files`, unless it is there already.

    files: {relative name: Path}; tokenizer: an encoding of tiktoken's, None trains one with
    `vocab_size` ids on the training text. Raises LawaError, and then leaves `out` as it was.
    """
    check_settings(vocab_size, val_fraction)
    begun = time.monotonic()
    own = {out.resolve() / file for file in FILES}  # the text may lie where the corpus goes
    files = {key: path for key, path in files.items() if path not in own}
    documents, skipped = read_documents(files)
    if not documents:
        raise LawaError(f"no text found: {len(files)} files, {skipped} of them binary or not UTF-8")
    settings = {
        "name": name,
        "val_fraction": val_fraction,
        "seed": seed,
        "manifest_sha256": manifest(documents),
        "tokenizer": tokenizer or TOKENIZER,
    }
    if not tokenizer:
        settings["vocab_size"] = vocab_size
    if not force and is_finished(out, settings):
        print(f"{name} is up to date in {out} (--force rebuilds it)")
        return

    train, val, rule = split(documents, val_fraction, seed)
    if not val:
        raise LawaError("the text is too short to set a part of it aside for val: give more")
    print(f"{name}: {len(documents)} files of text, {skipped} skipped as binary or not UTF-8; "
          "tokenizing", flush=True)
    encoding = known_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, vocab_size)
    meta = settings | {
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "split": rule,
        "skipped": skipped,
        "python": platform.python_version(),
        "documents": {"train": len(train), "val": len(val)},
    }
    with staging(out) as folder:
        for side, texts in (("train", train), ("val", val)):
            tokens, nbytes = write_tokens(folder / f"{side}.bin", texts, encoding)
            meta[f"{side}_tokens"] = tokens
            meta[f"{side}_bytes"] = nbytes
            print(f"{side}: {tokens:,} tokens, {nbytes:,} bytes, {len(texts)} documents")
        if not tokenizer:
            write_tokenizer(folder / TOKENIZER, encoding)
            meta["pattern"] = PATTERN
        write_meta(folder, meta)
    seconds = time.monotonic() - begun
    print(f"wrote {out} in {seconds:.1f} s: vocabulary {encoding.n_vocab}, split by {rule}")
