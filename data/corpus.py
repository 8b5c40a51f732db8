"""Build a corpus folder from text files: files -> documents -> split -> tokenizer -> token ids -> folder.

The folder holds train.bin and val.bin (token ids, little-endian uint16, <|endoftext|> after each document),
tokenizer.tiktoken (a line per token: base64 of its bytes, rank) and meta.json. The prepare.py scripts share this file.
All text is held in memory: fine for a gigabyte or two.
"""

import argparse
import base64
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken

TOKENIZER = "tokenizer.tiktoken"
FILES = ("train.bin", "val.bin", TOKENIZER, "meta.json")  # in this order: meta.json says that the others are there
EOT = "<|endoftext|>"
# GPT-4's split pattern: byte pairs merge within its matches only
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
LINE_END = re.compile(r"\S\r?\n(?=\S)")  # that pattern splits here too, so a text cut here gets the same tokens
PIECE = 1 << 17  # characters; tiktoken and rustbpe crash on a million blanks in a row, so they get less at a time
MIN_FILES = 20  # with fewer files, each is cut in two rather than going to one side as a whole


class CorpusError(ValueError):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    """The flags that every prepare.py has; usage errors take one line."""

    def __init__(self, doc, example):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, epilog=f"example: {example}", formatter_class=raw)
        self.add_argument("--val-fraction", type=float, default=0.05, metavar="F", help="of the text (default: 0.05)")
        self.add_argument("--seed", type=int, default=0, metavar="S", help="of the split by file names (default: 0)")
        self.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the corpus's own folder)")
        self.add_argument("--force", action="store_true", help="rebuild even if the corpus is up to date")

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def one_line_errors(main):
    """Decorate a script's main(argv): return 0, or 2 after one line on stderr for a mistake or an unusable file."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except (CorpusError, OSError) as error:
            named = isinstance(error, OSError) and error.filename
            print(f"error: {error.filename}: {error.strerror}" if named else f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return wrapped


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
    found = (path for root in roots for path in ([root] if root.is_file() else _walk(root, leave_out)))
    return {path.relative_to(base).as_posix(): path for path in found if path.is_file()}


def _walk(root, leave_out):
    def fail(error):  # os.walk passes over an unreadable folder in silence otherwise
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in leave_out and not name.startswith(".")]
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
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # file names may be any bytes


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
    try:
        import rustbpe
    except ImportError as error:
        raise CorpusError("training a tokenizer needs rustbpe: pip install rustbpe") from error
    trainer = rustbpe.Tokenizer()
    texts = (piece for doc in documents for piece, _ in pieces(doc.text))
    trainer.train_from_iterator(texts, vocab_size - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        raise CorpusError(f"--vocab-size {vocab_size}: too large, the training text yields only {len(ranks) + 1}")
    return tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={EOT: vocab_size - 1})


def known_tokenizer(name):
    """Return tiktoken's encoding `name`, which tiktoken downloads at its first use."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # those of requests are, too
        raise CorpusError(f"tiktoken cannot download {name!r}: go online once, or set TIKTOKEN_CACHE_DIR") from error


def write_tokenizer(path, encoding):
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token))
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))


def pieces(text):
    """Yield (piece, whether it is the last) of at most 2 * PIECE characters, cut at line ends where there are any."""
    start = 0
    while len(text) - start > 2 * PIECE:
        line_end = LINE_END.search(text, start + PIECE, start + 2 * PIECE)
        end = line_end.end() if line_end else start + 2 * PIECE
        yield text[start:end], False
        start = end
    yield text[start:], True


def write_tokens(path, texts, encoding):
    """Write the ids of an iterable of texts, <|endoftext|> after each; return (tokens, UTF-8 bytes of text)."""
    tokens = nbytes = 0
    begun = said = time.monotonic()
    parts = (part for text in texts for part in pieces(text))
    with open(path, "wb") as file:
        while batch := list(islice(parts, 128)):
            encoded = encoding.encode_ordinary_batch([piece for piece, _ in batch], num_threads=os.cpu_count() or 1)
            for ids, (piece, last) in zip(encoded, batch, strict=True):
                ids += [encoding.eot_token] * last
                file.write(np.array(ids, dtype="<u2").tobytes())
                tokens, nbytes = tokens + len(ids), nbytes + len(piece.encode())
            if time.monotonic() - said > 5:
                said = time.monotonic()
                rate = nbytes / 1e6 / (said - begun)
                print(f"{path.name}: {nbytes / 1e6:,.0f} MB of text so far, {rate:.1f} MB/s", flush=True)
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
        (out / "meta.json").unlink(missing_ok=True)  # killed from here on: no meta.json, rather than a mixed corpus
        for name in FILES:
            if (temporary / name).exists():
                os.replace(temporary / name, out / name)
            else:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: the corpus is there
                folder.rmdir()


def is_finished(out, settings):
    """Tell whether `out` holds a whole corpus with these settings, a dict of keys in meta.json."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        whole = all((out / f"{side}.bin").stat().st_size == 2 * meta[f"{side}_tokens"] for side in ("train", "val"))
        whole &= meta["tokenizer"] != TOKENIZER or (out / TOKENIZER).is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return whole and all(meta.get(key) == value for key, value in settings.items())


def check_settings(vocab_size, val_fraction):
    if not 0 < val_fraction < 1:
        raise CorpusError(f"--val-fraction {val_fraction}: must lie between 0 and 1")
    if not 257 <= vocab_size <= 65536:
        raise CorpusError(f"--vocab-size {vocab_size}: must be 257 (256 bytes and {EOT}) to 65536 (uint16 token ids)")


def build(name, files, out, vocab_size, val_fraction, seed, tokenizer=None, force=False):
    """Build the corpus `name` in the folder `out` from `files` ({relative name: Path}), unless it is there already.

    `tokenizer` names an encoding of tiktoken's; None trains one with `vocab_size` ids on the training text.
    Raises CorpusError, and then leaves `out` as it was.
    """
    check_settings(vocab_size, val_fraction)
    begun = time.monotonic()
    own = {out.resolve() / file for file in FILES}  # the text may lie where the corpus goes
    documents, skipped = read_documents({key: path for key, path in files.items() if path not in own})
    if not documents:
        raise CorpusError(f"no text found: {len(files)} files, {skipped} of them binary or not UTF-8")
    settings = {"name": name, "val_fraction": val_fraction, "seed": seed, "manifest_sha256": manifest(documents)}
    settings |= {"tokenizer": tokenizer} if tokenizer else {"tokenizer": TOKENIZER, "vocab_size": vocab_size}
    if not force and is_finished(out, settings):
        print(f"{name} is up to date in {out} (--force rebuilds it)")
        return

    train, val, rule = split(documents, val_fraction, seed)
    if not val:
        raise CorpusError("the text is too short to set a part of it aside for val: give more")
    print(f"{name}: {len(documents)} files of text, {skipped} skipped as binary or not UTF-8; tokenizing", flush=True)
    encoding = known_tokenizer(tokenizer) if tokenizer else train_tokenizer(train, vocab_size)
    meta = settings | {"vocab_size": encoding.n_vocab, "eot_token": encoding.eot_token, "split": rule}
    meta |= {"skipped": skipped, "python": platform.python_version(), "documents": {}}
    with staging(out) as folder:
        for side, docs in (("train", train), ("val", val)):
            tokens, nbytes = write_tokens(folder / f"{side}.bin", (doc.text for doc in docs), encoding)
            meta |= {f"{side}_tokens": tokens, f"{side}_bytes": nbytes}
            meta["documents"][side] = len(docs)
            print(f"{side}: {tokens:,} tokens, {nbytes:,} bytes, {len(docs)} documents")
        if not tokenizer:
            write_tokenizer(folder / TOKENIZER, encoding)
            meta["pattern"] = PATTERN
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {encoding.n_vocab}, split by {rule}")
