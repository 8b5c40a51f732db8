"""Prepare text to evaluate a model of the Pythia family on, in its own tokens: val.bin and no training tokens.

SOURCE is pile-10k, pile-uncopyrighted, wikitext or lambada, fetched from the Hub, or a file or folder of yours: .jsonl
and .parquet hold a document per row (.jsonl.gz and .jsonl.zst, too), any other file is one document. Documents come in
their order, up to --tokens. Such text may have been trained on (meta.json and the output say what is known): it serves
to compare checkpoints of a replay with each other, and does not measure generalisation.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # corpus.py lies in data/, which is no package
import corpus
from corpus import JSON_TOKENIZER, CorpusError, JsonTokenizer, Parser, one_line_errors


@dataclass(frozen=True)
class Source:
    """Text on the Hub: its repository and revision, which files, which column, and what is known of training on it."""

    repo: str
    pattern: str
    column: str
    trained_on: str


PARQUET = "@refs/convert/parquet"  # where the Hub keeps its own conversion of each data set
SOURCES = {
    name: Source(*values)
    for name, *values in (
        (
            "pile-10k",
            f"NeelNanda/pile-10k{PARQUET}",
            "*train*.parquet",
            "text",
            "the Pile's first 10,000 training documents",
        ),
        (
            "pile-uncopyrighted",
            "monology/pile-uncopyrighted",
            "val.jsonl.zst",
            "text",
            "the Pile's validation part, less five of its sets",
        ),
        (
            "wikitext",
            f"EleutherAI/wikitext_document_level{PARQUET}",
            "wikitext-2-raw-v1/*test*",
            "page",
            "Wikipedia, which is in the Pile",
        ),
        (
            "lambada",
            f"EleutherAI/lambada_openai{PARQUET}",
            "default/*test*",
            "text",
            "passages of novels, some of them in the Pile",
        ),
    )
}
WARNING = "replay text: a model may have been trained on it"
TOKENS = 10_000_000


def find_tokenizer(given):
    """Return the Path of a tokenizer.json: a file, in a folder, or in a model's repository on the Hub."""
    path = Path(given) / JSON_TOKENIZER if Path(given).is_dir() else Path(given)
    if path.is_file():
        return path
    if Path(given).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", given):
        raise CorpusError(
            f"--tokenizer {given}: no {JSON_TOKENIZER} there; give one, or a folder with one, or EleutherAI/pythia-1b"
        )
    repo = corpus.HubRepo(given, "give it: --tokenizer FILE", "model")
    return repo.fetch(*repo.files(JSON_TOKENIZER))[JSON_TOKENIZER]


def open_tokenizer(path):
    try:
        return JsonTokenizer(path)
    except CorpusError:
        raise
    except Exception as error:  # the tokenizers package raises no other class
        raise CorpusError(f"{path}: not a tokenizer.json ({corpus.first_line(error)})") from error


def find_files(source):
    """Return (list of Paths, what they are): files on the Hub, or at and under a path of the user's."""
    if source not in SOURCES:
        if not Path(source).exists():
            raise CorpusError(f"{source}: neither one of {', '.join(SOURCES)} nor a file or folder")
        files = corpus.list_files([source])
        return [files[name] for name in sorted(files, key=corpus.numeric)], "local files"
    repo = corpus.HubRepo(
        SOURCES[source].repo, f"give the file as SOURCE, with --column {SOURCES[source].column}"
    )
    commit, sizes = repo.files(SOURCES[source].pattern)
    return list(repo.fetch(commit, sizes).values()), f"{repo.source} at {commit}"


def build(source, column, tokenizer, limit, out, settings):
    """Write the corpus folder `out`; return its meta.json. CorpusError leaves `out` as it was."""
    encoding = open_tokenizer(tokenizer)
    files, origin = find_files(source)
    texts = (text for path in files for text in corpus.stream_texts(path, column) if text.strip())
    with corpus.staging(out) as folder:
        tokens, nbytes = corpus.write_tokens(
            folder / "val.bin", texts, encoding, corpus.whole, limit
        )
        if not tokens:
            raise CorpusError(f"{source}: no text found in {len(files)} files")
        (folder / "train.bin").touch()
        shutil.copyfile(tokenizer, folder / JSON_TOKENIZER)
        ids = np.fromfile(folder / "val.bin", "<u2")
        meta = settings | {
            "origin": origin,
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "split": "all of it is val",
        }
        meta |= {
            "documents": {"train": 0, "val": int(np.count_nonzero(ids == encoding.eot_token))},
            "train_tokens": 0,
            "train_bytes": 0,
        }
        meta |= {
            "val_tokens": tokens,
            "val_bytes": nbytes,
            "val_sha256": hashlib.sha256(ids).hexdigest(),
        }
        meta["warning"] = (
            f"{WARNING} ({SOURCES[source].trained_on})" if source in SOURCES else WARNING
        )
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


@one_line_errors
def main(argv=None):
    parser = Parser(
        __doc__,
        "python data/pile/prepare.py pile-10k --tokenizer EleutherAI/pythia-1b",
        val_fraction=None,
    )
    parser.add_argument(
        "source", metavar="SOURCE", help=f"{', '.join(SOURCES)}, or a file or folder"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FILE_OR_FOLDER",
        help="the model's tokenizer.json, or a model of the Hub",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        help="end with the document that reaches it (default: %(default)s)",
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="of the text in .jsonl and .parquet files of yours (default: text)",
    )
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise CorpusError(f"--tokens {args.tokens}: must be at least 1")
    begun, out = time.monotonic(), args.out or Path(__file__).resolve().parent
    known = args.source in SOURCES
    column = args.column or (SOURCES[args.source].column if known else "text")
    tokenizer = find_tokenizer(args.tokenizer)
    name = args.source if known else Path(args.source).resolve().name
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    settings = {
        "name": name,
        "tokens": args.tokens,
        "column": column,
        "tokenizer": JSON_TOKENIZER,
        "tokenizer_sha256": digest,
    }
    if (
        known and not args.force and corpus.is_finished(out, settings)
    ):  # files of the user's may have changed
        print(f"{name} is up to date in {out} (--force rebuilds it)")
        return
    meta = build(args.source, column, tokenizer, args.tokens, out, settings)
    print(
        f"val: {meta['val_tokens']:,} tokens, {meta['val_bytes']:,} bytes, {meta['documents']['val']:,} documents; {meta['warning']}"
    )
    print(f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {meta['vocab_size']}")


if __name__ == "__main__":
    sys.exit(main())
