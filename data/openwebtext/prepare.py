"""Prepare OpenWebText (8 million web pages, 9 billion tokens) as nanoGPT does: GPT-2 tokens, the same split, the same order.

The parquet conversion is fetched from the Hub (24 GB), or read from --parquet FOLDER. All cores tokenize; a killed run
goes on where it was, apart from the parts of 32,768 documents at hand. nanoGPT shuffles the documents with the
`datasets` library and lets the first 0.05% be val; that library's shuffle is numpy's permutation, so the very same
documents are val here, and train.bin has nanoGPT's order. At the end the counts are held against nanoGPT's: a
difference is explained in the output and in meta.json. Disk: 42 GB at the peak (36 beside parquet files of your own),
18 GB at the end. A folder with nanoGPT's own train.bin and val.bin, or with modded-nanogpt's shards, needs none of
this: corpora.py reads it as it is.
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

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # corpus.py lies in data/, which is no package
import corpus
from corpus import CorpusError, Parser, Progress, one_line_errors

SOURCE = "Skylion007/openwebtext@refs/convert/parquet"
COLUMN = "text"
KNOWN = {
    "documents": 8_013_769,
    "train_tokens": 9_035_582_198,
    "val_tokens": 4_434_897,
}  # nanoGPT's
PART = 32_768  # documents that a thread holds at a time: some 80 MB of token ids
TOKEN_BYTES = 2 / 4.4  # of token ids per byte of text, from OpenWebText's 4.4 bytes per GPT-2 token
PARQUET_TOKEN_BYTES = 0.75  # of token ids per byte of its parquet conversion


@dataclass(frozen=True)
class Part:
    """Documents `first` to `first + count` of a parquet file, `start` to `start + count` of them all."""

    file: str
    first: int
    start: int
    count: int

    def paths(self, work):
        """(token ids, their documents' sizes); the second is written last, so it says that both are there."""
        return work / f"part-{self.start:09d}.bin", work / f"part-{self.start:09d}.npy"

    def is_done(self, work):
        ids, sizes = self.paths(work)
        return (
            sizes.exists() and ids.exists() and ids.stat().st_size == 2 * np.load(sizes)[:, 0].sum()
        )


# ---- where the parquet files come from: both have a name that changes with the files, left_out (by --files), and files() ----


class Folder:
    """Parquet files at and under a folder of the user's."""

    def __init__(self, folder, limit):
        found = {
            name: path
            for name, path in corpus.list_files([folder]).items()
            if name.endswith(".parquet")
        }
        if not found:
            raise CorpusError(f"{folder}: no .parquet files in it")
        self.paths = {name: found[name] for name in sorted(found, key=corpus.numeric)[:limit]}
        self.left_out = len(found) - len(self.paths)
        self.name = f"parquet files {manifest(self.paths)}"

    def files(self, work, wanted=None):
        """Return {name: Path} of the parquet files, at least of those `wanted`."""
        return self.paths


class Hub:
    """Parquet files on the Hub, fetched into the work folder, from which they go when all are tokenized."""

    def __init__(self, source, limit):
        self.repo = corpus.HubRepo(source, "give its folder: --parquet FOLDER")
        self.commit, found = self.repo.files("*.parquet")
        self.sizes = {path: found[path] for path in list(found)[:limit]}
        self.left_out = len(found) - len(self.sizes)
        self.name = f"{source} at {self.commit}"

    def files(self, work, wanted=None):
        sizes = {
            path: size for path, size in self.sizes.items() if wanted is None or path in wanted
        }
        missing = sum(
            size for path, size in sizes.items() if not (work / "parquet" / path).exists()
        )
        tokens = PARQUET_TOKEN_BYTES * sum(
            sizes.values()
        )  # written while the parquet files are still there
        if missing:
            corpus.check_disk(work, missing + tokens, "the parquet files and the token ids")
        return self.repo.fetch(self.commit, sizes, work / "parquet")


def manifest(paths):
    """Return a sha256 over the names and footers of parquet files ({name: Path}): rows, sizes, offsets, statistics."""
    digest = hashlib.sha256()
    for name, path in paths.items():
        corpus.open_parquet(path, COLUMN)
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(
                file.read(4), "little"
            )  # of the footer; then come 4 bytes "PAR1"
            file.seek(-8 - length, os.SEEK_END)
            digest.update(f"{hashlib.sha256(file.read()).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


# ---- plan -> parts -> tokens ----


def plan(source, work):
    """Return (parts, bytes of text), kept in plan.json: a run that goes on need not have the parquet files any more."""
    path = work / "plan.json"
    if not path.exists():
        files = {
            name: corpus.open_parquet(file, COLUMN).metadata
            for name, file in source.files(work).items()
        }
        found = {
            "rows": {name: meta.num_rows for name, meta in files.items()},
            "text_bytes": sum(map(text_bytes, files.values())),
        }
        path.with_suffix(".part").write_text(json.dumps(found))
        os.replace(path.with_suffix(".part"), path)
    found = json.loads(path.read_text())
    parts, start = [], 0
    for name, rows in found["rows"].items():
        parts += [
            Part(name, first, start + first, min(PART, rows - first))
            for first in range(0, rows, PART)
        ]
        start += rows
    return parts, found["text_bytes"]


def text_bytes(meta):
    """Bytes of a parquet file's texts before compression, about."""
    groups = (meta.row_group(i) for i in range(meta.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema == COLUMN
    )


def order_of(documents, val_fraction, seed):
    """Return (document at each place, how many of the first places are val): datasets' train_test_split, which nanoGPT calls.

    Its shuffle is numpy's permutation of the documents by default_rng(seed); val comes first, rounded up.
    """
    return np.random.default_rng(seed).permutation(documents), math.ceil(val_fraction * documents)


def tokenize_all(parts, source, work, places, encoding, jobs):
    """Write the token ids of the parts that are not there yet, `jobs` at a time."""
    todo = [part for part in parts if not part.is_done(work)]
    if not todo:
        return
    files = source.files(work, {part.file for part in todo})
    documents = sum(part.count for part in parts)
    progress = Progress(
        "tokenizing", "documents", documents, documents - sum(part.count for part in todo)
    )
    stop = threading.Event()
    with ThreadPoolExecutor(
        jobs
    ) as pool:  # threads suffice: tiktoken works outside of the interpreter's lock
        running = [
            pool.submit(tokenize, part, files[part.file], work, places, encoding, progress, stop)
            for part in todo
        ]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    progress.close()


def tokenize(part, path, work, places, encoding, progress, stop):
    """Write a part's token ids (uint16) and sizes ((documents, 2) int64: tokens, bytes of text), in the order of the documents' places."""
    documents, sizes = [], []
    for texts in corpus.parquet_texts(path, COLUMN, part.first, part.count):
        if stop.is_set():
            return
        documents += [encode(text, encoding) for text in texts]
        sizes += [len(text.encode()) for text in texts]
        progress.add(len(texts))
    order = np.argsort(places[part.start : part.start + part.count])
    ids, table = part.paths(work)
    with open(ids.with_suffix(".bin.part"), "wb") as file:
        file.writelines(documents[i] for i in order)
        file.flush()
        os.fsync(file.fileno())
    os.replace(ids.with_suffix(".bin.part"), ids)
    with open(table.with_suffix(".part"), "wb") as file:
        np.save(file, np.stack([[len(ids) for ids in documents], sizes], 1)[order])
    os.replace(table.with_suffix(".part"), table)


def encode(text, encoding):
    """Return a document's token ids and end-of-text, (tokens,) uint16; a literal <|endoftext|> is text."""
    ids = [
        encoding.encode_to_numpy(piece, disallowed_special=()) for piece, _ in corpus.pieces(text)
    ]
    return np.concatenate([*ids, [encoding.eot_token]]).astype("<u2")


# ---- parts -> corpus ----


def merge(parts, order, n_val, work, folder):
    """Write val.bin and train.bin into `folder`, document order[0] first; return meta.json's counts.

    Each part lies in that order already, so all are read from front to back, PART documents' worth at a time.
    """
    readers = [read_part(part, work) for part in parts]
    starts = np.array([part.start for part in parts])
    progress, meta = Progress("writing", "documents", len(order)), {"documents": {}}
    for side, places in (("val", order[:n_val]), ("train", order[n_val:])):
        digest, sizes = hashlib.sha256(), np.zeros(2, np.int64)
        with open(folder / f"{side}.bin", "wb") as file:
            for at in range(0, len(places), PART):
                source = (
                    np.searchsorted(starts, places[at : at + PART], "right") - 1
                )  # the part that each document is in
                taken = {
                    i: readers[i](count)
                    for i, count in enumerate(np.bincount(source).tolist())
                    if count
                }
                sizes += sum(size for _, size in taken.values())
                documents = {i: iter(ids) for i, (ids, _) in taken.items()}
                block = np.concatenate([next(documents[i]) for i in source.tolist()])
                digest.update(block)
                file.write(block)
                progress.add(len(source))
        meta |= {
            f"{side}_tokens": int(sizes[0]),
            f"{side}_bytes": int(sizes[1]),
            f"{side}_sha256": digest.hexdigest(),
        }
        meta["documents"][side] = len(places)
    progress.close()
    return meta


def read_part(part, work):
    """Return a function that takes a part's next `count` documents: (list of token ids, their tokens and bytes in all)."""
    ids, table = part.paths(work)
    sizes = np.load(table)
    at = 0

    def take(count):
        nonlocal at
        begin, size = sizes[:at, 0].sum(), sizes[at : at + count]
        at += count
        tokens = np.fromfile(ids, "<u2", size[:, 0].sum(), offset=2 * begin)
        return np.split(tokens, np.cumsum(size[:-1, 0])), size.sum(0)

    return take


def differences(meta, left_out):
    """Return ({count: found - nanoGPT's}, why): empty where the corpus is nanoGPT's."""
    found = meta | {"documents": sum(meta["documents"].values())}
    differ = {key: found[key] - known for key, known in KNOWN.items() if found[key] != known}
    if not differ:
        return {}, ""
    total = differ.get("train_tokens", 0) + differ.get("val_tokens", 0)
    if left_out:
        why = f"--files left {left_out} parquet files out, so the documents are fewer and the split is another one"
    elif differ.get("documents", 0) < 0:
        why = "documents are missing: the conversion is partial or a file of it is not there; the split is another one, too"
    elif differ.get("documents", 0) > 0:
        why = "there are too many documents: files given twice, of another split or another version; the split is another one, too"
    elif total:
        why = (
            "as many documents, but not the same text: a mirror that changed it, or another version"
        )
    else:
        why = "the same documents, but others of them are val: another order, --seed or --val-fraction"
    return differ, why


def report(meta):
    for side in ("train", "val"):
        print(
            f"{side}: {meta[f'{side}_tokens']:,} tokens, {meta[f'{side}_bytes']:,} bytes, {meta['documents'][side]:,} documents"
        )
    if not meta["differences"]:
        print("the counts are nanoGPT's, so the split is, too")
    for key, difference in meta["differences"].items():
        print(
            f"{key}: {abs(difference):,} {'more' if difference > 0 else 'fewer'} than nanoGPT's {KNOWN[key]:,}"
        )
    if meta["differences"]:
        print(f"likely because {meta['why']}")


def room_needed(work, nbytes):
    """Return the bytes of disk that tokenizing and writing the corpus still take; the fetched parquet files go in between."""
    tokens = TOKEN_BYTES * nbytes
    there, parquet = (
        sum(path.stat().st_size for path in work.rglob(pattern))
        for pattern in ("part-*.bin", "*.parquet")
    )
    return max(tokens - there, 2 * tokens - there - parquet)


def work_folder(out, identity):
    """Return the folder for what is done so far of the corpus with these settings and this source."""
    return out / f".partial-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"


def build(source, out, settings, encoding, jobs):
    """Build the corpus in `out`, by way of its work folder there; return its meta.json."""
    identity = settings | {"source": source.name}
    work = work_folder(out, identity)
    work.mkdir(parents=True, exist_ok=True)
    parts, nbytes = plan(source, work)
    order, n_val = order_of(
        sum(part.count for part in parts), settings["val_fraction"], settings["seed"]
    )
    if n_val >= len(order):
        raise CorpusError(f"{len(order)} documents are too few to set {n_val} aside for val")
    merged = work / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # of a run killed while it wrote them
    corpus.check_disk(
        work, room_needed(work, nbytes), "the token ids (twice while they are put in order)"
    )
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    tokenize_all(parts, source, work, places, encoding, jobs)
    shutil.rmtree(work / "parquet", ignore_errors=True)
    merged.mkdir()
    meta = identity | {
        "vocab_size": encoding.n_vocab,
        "eot_token": encoding.eot_token,
        "split": "nanoGPT's: shuffled documents, val first",
    }
    meta |= merge(parts, order, n_val, work, merged)
    meta["differences"], meta["why"] = differences(meta, source.left_out)
    (merged / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    corpus.publish(merged, out)
    shutil.rmtree(work)
    return meta


@one_line_errors
def main(argv=None):
    parser = Parser(
        __doc__,
        "python data/openwebtext/prepare.py --files 4 --out data/openwebtext-small",
        0.0005,
        2357,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--source",
        metavar="REPO@REVISION",
        help=f"a data set on the Hub with parquet files (default: {SOURCE})",
    )
    where.add_argument(
        "--parquet",
        type=Path,
        metavar="FOLDER",
        help="parquet files that you have, with a column 'text'",
    )
    parser.add_argument(
        "--files",
        type=int,
        metavar="N",
        help="only the first N parquet files, some 113M tokens each (default: all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads, some 0.2 GB each (default: all cores)",
    )
    args = parser.parse_args(argv)
    check(args)
    out = args.out or Path(__file__).resolve().parent
    settings = {
        "name": "openwebtext",
        "tokenizer": "gpt2",
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "files": args.files,
    }
    given = args.force or args.source or args.parquet
    if not given and up_to_date(out, settings):
        return
    encoding = corpus.known_tokenizer("gpt2")
    source = (
        Folder(args.parquet, args.files) if args.parquet else Hub(args.source or SOURCE, args.files)
    )
    if not args.force and up_to_date(out, settings | {"source": source.name}):
        return
    begun = time.monotonic()
    try:
        report(build(source, out, settings, encoding, args.jobs))
    except OSError as error:
        raise CorpusError(
            f"cannot write {out}: {error.strerror or error}; the same command goes on"
        ) from error
    print(f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {encoding.n_vocab}")


def check(args):
    corpus.check_settings(50_257, args.val_fraction)
    for flag, value in (("files", args.files), ("jobs", args.jobs)):
        if value is not None and value < 1:
            raise CorpusError(f"--{flag} {value}: must be at least 1")


def up_to_date(out, settings):
    if not corpus.is_finished(out, settings):
        return False
    source = json.loads((out / "meta.json").read_text(encoding="utf-8"))["source"]
    shutil.rmtree(
        work_folder(out, settings | {"source": source}), ignore_errors=True
    )  # of a run killed at the very end
    print(f"openwebtext is up to date in {out} (--force rebuilds it)")
    return True


if __name__ == "__main__":
    sys.exit(main())
