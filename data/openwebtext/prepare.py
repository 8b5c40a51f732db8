"""Prepare OpenWebText (8 million web pages, 9 billion tokens) as nanoGPT does: same split, order.

The parquet conversion is fetched from the Hub (24 GB), or read from --parquet FOLDER. All cores
tokenize; a killed run goes on where it was, apart from the parts of 32,768 documents at hand.
nanoGPT shuffles the documents with the `datasets` library and lets the first 0.05% be val; that
library's shuffle is numpy's permutation, so the very same documents are val here, and train.bin has
nanoGPT's order. At the end the counts are held against nanoGPT's: a difference is explained in the
output and in meta.json. Disk: 42 GB at the peak (36 beside parquet files of your own), 18 GB at the
end. A folder with nanoGPT's own train.bin and val.bin, or with modded-nanogpt's shards, needs none
of this: it is read as it is.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # corpus.py lies in data/
import corpus

from lawa_core import JobFailed, LawaError, progress, replacing

SOURCE = "Skylion007/openwebtext@refs/convert/parquet"
COLUMN = "text"
# nanoGPT's counts
KNOWN = {"documents": 8_013_769, "train_tokens": 9_035_582_198, "val_tokens": 4_434_897}
PART = 32_768  # documents that a thread holds at a time: some 80 MB of token ids
READ = 1 << 25  # token ids that are read at a time, of all parts together: 64 MB
TOKEN_BYTES = 2 / 4.4  # of token ids per byte of text: OpenWebText has 4.4 bytes per GPT-2 token
PARQUET_TOKEN_BYTES = 0.75  # of token ids per byte of its parquet conversion


@dataclass(frozen=True)
class Part:
    """Some of the documents of a parquet file."""

    file: str
    first: int  # in the file
    start: int  # the same one, counted over all files
    count: int
    ids: Path  # where their tokens go, each document closed by end-of-text; appears when whole


# ---- where the parquet files come from ----
# Both kinds have a name that changes with the files, left_out (the number, by --files), and
# files(work), which returns {name: Path}.


class Folder:
    """Parquet files at and under a folder of the user's."""

    def __init__(self, folder, limit):
        files = corpus.list_files([folder])
        found = [name for name in sorted(files, key=corpus.numeric) if name.endswith(".parquet")]
        if not found:
            raise LawaError(f"{folder}: no .parquet files in it")
        self.paths = {name: files[name] for name in found[:limit]}
        self.left_out = len(found) - len(self.paths)
        self.name = f"parquet files {manifest(self.paths)}"

    def files(self, work):
        return self.paths


class Hub:
    """Parquet files on the Hub, fetched into the work folder, removed when all are tokenized."""

    def __init__(self, source, limit):
        self.repo = corpus.HubRepo(source, "give its folder: --parquet FOLDER")
        self.commit, found = self.repo.files("*.parquet")
        self.sizes = dict(list(found.items())[:limit])  # {path: bytes}
        self.left_out = len(found) - len(self.sizes)
        self.name = f"{source} at {self.commit}"

    def files(self, work):
        folder = work / "parquet"
        missing = [size for path, size in self.sizes.items() if not (folder / path).exists()]
        if missing:
            # the tokens are written while the parquet files are still there
            tokens = PARQUET_TOKEN_BYTES * sum(self.sizes.values())
            check_disk(work, sum(missing) + tokens, "the parquet files and the token ids")
        return self.repo.fetch(self.commit, self.sizes, folder)


def manifest(paths):
    """Return a sha256 over the names and footers of parquet files ({name: Path}).

    A footer holds rows, sizes, offsets, statistics; 8 bytes follow: its length and "PAR1".
    """
    digest = hashlib.sha256()
    for name, path in paths.items():
        length = corpus.open_parquet(path, COLUMN).metadata.serialized_size
        with open(path, "rb") as file:
            file.seek(-8 - length, os.SEEK_END)
            digest.update(f"{hashlib.sha256(file.read()).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def check_disk(work, wanted, what):
    """Raise LawaError unless `wanted` bytes are free where the folder is."""
    free = shutil.disk_usage(work).free
    if free < wanted:
        amounts = f"{free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB needed"
        raise LawaError(f"{work}: {amounts} for {what}; make room, or see --out")


# ---- plan -> parts -> tokens ----


def plan(source, work):
    """Return (parts, bytes of text).

    Kept in plan.json: a run that goes on need not have the parquet files any more.
    """
    path = work / "plan.json"
    if not path.exists():
        rows, nbytes = {}, 0
        for name, file in source.files(work).items():
            meta = corpus.open_parquet(file, COLUMN).metadata
            rows[name] = meta.num_rows
            column = meta.schema.names.index(COLUMN)
            for i in range(meta.num_row_groups):
                nbytes += meta.row_group(i).column(column).total_uncompressed_size
        with replacing(path) as part:
            part.write_text(json.dumps({"rows": rows, "text_bytes": nbytes}))
    found = json.loads(path.read_text())
    parts, start = [], 0
    for name, rows in found["rows"].items():
        for first in range(0, rows, PART):
            ids = work / f"part-{start + first:09d}.bin"
            parts.append(Part(name, first, start + first, min(PART, rows - first), ids))
        start += rows
    return parts, found["text_bytes"]


def order_of(documents, val_fraction, seed):
    """Return (document at each place, how many of the first places are val).

    As datasets' train_test_split, which nanoGPT calls: its shuffle is numpy's permutation of the
    documents by default_rng(seed); val comes first, rounded up.
    """
    order = np.random.default_rng(seed).permutation(documents)
    return order, math.ceil(val_fraction * documents)


def tokenize_all(parts, source, work, places, encoding, jobs):
    """Write the token ids of the parts that are not there yet, `jobs` at a time."""
    todo = [part for part in parts if not part.ids.exists()]
    if not todo:
        return
    files = source.files(work)
    documents = sum(part.count for part in parts)
    done = documents - sum(part.count for part in todo)
    stop, lock = threading.Event(), threading.Lock()
    with (progress(documents, "tokenizing", " documents", initial=done) as bar,
          ThreadPoolExecutor(jobs) as pool):  # threads suffice: tiktoken lets go of Python's lock

        def count(texts):
            """Count texts as done; False once the work is to stop."""
            with lock:
                bar.update(texts)
            return not stop.is_set()

        running = [
            pool.submit(tokenize, part, files[part.file], places, encoding, count)
            for part in todo
        ]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def tokenize(part, path, places, encoding, count):
    """Write a part's token ids (uint16), in the order of the documents' places."""
    documents = []
    for texts in corpus.parquet_texts(path, COLUMN, part.first, part.count):
        documents += [encode(text, encoding) for text in texts]
        if not count(len(texts)):
            return
    order = np.argsort(places[part.start : part.start + part.count])
    with replacing(part.ids) as whole, open(whole, "wb") as file:
        file.writelines(documents[i] for i in order)
        file.flush()
        os.fsync(file.fileno())


def encode(text, encoding):
    """Return a document's token ids and end-of-text, (tokens,) uint16; <|endoftext|> is text."""
    pieces = [piece for piece, _ in corpus.pieces(text)]
    ids = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([*ids, [encoding.eot_token]]).astype("<u2")


# ---- parts -> corpus ----


def merge(parts, order, n_val, encoding, folder):
    """Write val.bin and train.bin into `folder`, document order[0] first; return meta's counts.

    Each part lies in that order already, so all are read from front to back.
    """
    readers = [read_part(part.ids, encoding.eot_token, READ // len(parts) + 1) for part in parts]
    starts = [part.start for part in parts]
    part_of = np.searchsorted(starts, order, "right") - 1  # the part that each document is in
    # bytes of text in each token; end-of-text, the last one, has none
    sizes = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token)]
    sizes = np.array([*sizes, 0], np.uint8)
    meta = {"documents": {}}
    with progress(len(order), "writing", " documents") as bar:
        for side, sources in (("val", part_of[:n_val]), ("train", part_of[n_val:])):
            digest, tokens, nbytes = hashlib.sha256(), 0, 0
            with open(folder / f"{side}.bin", "wb") as file:
                for at in range(0, len(sources), PART):
                    documents = [next(readers[i]) for i in sources[at : at + PART]]
                    block = np.concatenate(documents)
                    file.write(block)
                    digest.update(block)
                    tokens += len(block)
                    nbytes += int(sizes[block].sum())
                    bar.update(len(documents))
            meta["documents"][side] = len(sources)
            meta[f"{side}_tokens"] = tokens
            meta[f"{side}_bytes"] = nbytes
            meta[f"{side}_sha256"] = digest.hexdigest()
    return meta


def read_part(path, eot_token, at_once):
    """Yield a part's documents, token ids with their end-of-text, `at_once` tokens in memory.

    No file stays open in between, since there may be more parts than a process may open.
    """
    at, rest = 0, []
    while len(tokens := np.fromfile(path, "<u2", at_once, offset=2 * at)):
        at += len(tokens)
        *documents, begun = np.split(tokens, np.flatnonzero(tokens == eot_token) + 1)
        if documents:
            yield np.concatenate([*rest, documents[0]])
            yield from documents[1:]
            rest = []
        rest.append(begun)  # of a document whose end is still to come


def differences(meta, left_out):
    """Return ({count: found - nanoGPT's}, why): empty where the corpus is nanoGPT's."""
    found = meta | {"documents": sum(meta["documents"].values())}
    differ = {key: found[key] - known for key, known in KNOWN.items() if found[key] != known}
    documents = differ.get("documents", 0)
    if not differ:
        why = ""
    elif left_out:
        why = (f"--files left {left_out} parquet files out, so the documents are fewer and the "
               "split is another one")
    elif documents < 0:
        why = ("documents are missing: the conversion is partial or a file of it is not there; "
               "the split is another one, too")
    elif documents > 0:
        why = ("there are too many documents: files given twice, of another split or another "
               "version; the split is another one, too")
    elif sum(differ.values()):
        why = ("as many documents, but not the same text: a mirror that changed it, or another "
               "version")
    else:
        why = ("the same documents, but others of them are val: another order, --seed or "
               "--val-fraction")
    return differ, why


def report(meta):
    for side, documents in sorted(meta["documents"].items()):
        tokens, nbytes = meta[f"{side}_tokens"], meta[f"{side}_bytes"]
        print(f"{side}: {tokens:,} tokens, {nbytes:,} bytes, {documents:,} documents")
    if not meta["differences"]:
        print("the counts are nanoGPT's, so the split is, too")
        return
    for key, difference in meta["differences"].items():
        more = "more" if difference > 0 else "fewer"
        print(f"{key}: {abs(difference):,} {more} than nanoGPT's {KNOWN[key]:,}")
    print(f"likely because {meta['why']}")


def room_needed(work, nbytes):
    """Return the bytes of disk that tokenizing and writing `nbytes` of text still take.

    The fetched parquet files go in between.
    """
    tokens = TOKEN_BYTES * nbytes
    there = sum(path.stat().st_size for path in work.rglob("part-*.bin"))
    parquet = sum(path.stat().st_size for path in work.rglob("*.parquet"))
    return max(tokens - there, 2 * tokens - there - parquet)


def work_folder(out, identity):
    """Return the folder for what is done so far of the corpus of these settings and source."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return out / f".partial-{digest[:12]}"


def build(source, out, settings, encoding, jobs):
    """Build the corpus in `out`, by way of its work folder there; return its meta.json."""
    identity = settings | {"source": source.name}
    work = work_folder(out, identity)
    work.mkdir(parents=True, exist_ok=True)
    parts, nbytes = plan(source, work)
    documents = sum(part.count for part in parts)
    order, n_val = order_of(documents, settings["val_fraction"], settings["seed"])
    if n_val >= documents:
        raise LawaError(f"{documents} documents are too few to set {n_val} aside for val")
    merged = work / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of a run killed while it wrote them
    room = room_needed(work, nbytes)
    check_disk(work, room, "the token ids (twice while they are put in order)")
    places = np.argsort(order)  # of each document
    tokenize_all(parts, source, work, places, encoding, jobs)
    shutil.rmtree(work / "parquet", ignore_errors=True)
    merged.mkdir()
    meta = identity | {
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "split": "nanoGPT's: shuffled documents, val first",
    }
    meta |= merge(parts, order, n_val, encoding, merged)
    meta["differences"], meta["why"] = differences(meta, source.left_out)
    corpus.write_meta(merged, meta)
    corpus.publish(merged, out)
    shutil.rmtree(work)
    return meta


def up_to_date(out, settings):
    if not corpus.is_finished(out, settings):
        return False
    source = json.loads((out / "meta.json").read_text(encoding="utf-8"))["source"]
    work = work_folder(out, settings | {"source": source})
    shutil.rmtree(work, ignore_errors=True)  # of a run killed at the very end
    print(f"openwebtext is up to date in {out} (--force rebuilds it)")
    return True


@corpus.one_line_errors
def main(argv=None):
    example = "python data/openwebtext/prepare.py --files 4 --out data/openwebtext-small"
    parser = corpus.Parser(__doc__, example, val_fraction=0.0005, seed=2357)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", metavar="REPO@REVISION",
                       help=f"a data set on the Hub with parquet files (default: {SOURCE})")
    where.add_argument("--parquet", type=Path, metavar="FOLDER",
                       help="parquet files that you have, with a column 'text'")
    parser.add_argument("--files", type=int, metavar="N",
                        help="only the first N parquet files, some 113M tokens each (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                        help="threads, some 0.2 GB each (default: all cores)")
    args = parser.parse_args(argv)
    corpus.check_settings(50_257, args.val_fraction)
    for flag, value in (("files", args.files), ("jobs", args.jobs)):
        if value is not None and value < 1:
            raise LawaError(f"--{flag} {value}: must be at least 1")
    begun, out = time.monotonic(), args.out or Path(__file__).resolve().parent
    settings = {
        "name": "openwebtext",
        "tokenizer": "gpt2",
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "files": args.files,
    }
    # with no source given, a finished corpus of any source will do, and needs no network
    given = args.force or args.source or args.parquet
    if not given and up_to_date(out, settings):
        return
    encoding = corpus.known_tokenizer("gpt2")
    if args.parquet:
        source = Folder(args.parquet, args.files)
    else:
        source = Hub(args.source or SOURCE, args.files)
    if not args.force and up_to_date(out, settings | {"source": source.name}):
        return
    try:
        report(build(source, out, settings, encoding, args.jobs))
    except JobFailed as error:
        raise LawaError(f"{error}; the same command goes on") from error
    except OSError as error:
        reason = error.strerror or error
        raise LawaError(f"cannot write {out}: {reason}; the same command goes on") from error
    print(f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {encoding.n_vocab}")


if __name__ == "__main__":
    sys.exit(main())
