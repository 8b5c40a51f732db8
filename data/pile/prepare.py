"""Prepare text to evaluate a model of the Pythia family on: val.bin in its own tokens, no training.

SOURCE is pile-10k, pile-uncopyrighted, wikitext or lambada, fetched from the Hub, or a file or
folder of yours: .jsonl and .parquet hold a document per row (.jsonl.gz and .jsonl.zst, too), any
other file is one document. Documents come in their order, up to --tokens. Such text may have been
trained on (meta.json and the output say what is known): it serves to compare checkpoints of a
replay with each other, and does not measure generalisation.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # corpus.py lies in data/
import corpus
from corpus import EOT, JSON_TOKENIZER

from lawa_core import LawaError


@dataclass(frozen=True)
class Source:
    """Text on the Hub."""

    repo: str  # REPO or REPO@REVISION
    pattern: str  # of its files
    column: str
    trained_on: str  # what is known of training on it


PARQUET = "@refs/convert/parquet"  # where the Hub keeps its own conversion of each data set
SOURCES = {
    "pile-10k": Source(f"NeelNanda/pile-10k{PARQUET}", "*train*.parquet", "text",
                       "the Pile's first 10,000 training documents"),
    "pile-uncopyrighted": Source("monology/pile-uncopyrighted", "val.jsonl.zst", "text",
                                 "the Pile's validation part, less five of its sets"),
    "wikitext": Source(f"EleutherAI/wikitext_document_level{PARQUET}", "wikitext-2-raw-v1/*test*",
                       "page", "Wikipedia, which is in the Pile"),
    "lambada": Source(f"EleutherAI/lambada_openai{PARQUET}", "default/*test*", "text",
                      "passages of novels, some of them in the Pile"),
}
WARNING = "replay text: a model may have been trained on it"
TOKENS = 10_000_000


# ---- tokenizer ----

ENDS = (EOT, "</s>", "<|end_of_text|>", "<eos>")  # Pythia's, Llama 2's, Llama 3's, Gemma's


class JsonTokenizer:
    """A model's own tokenizer.json, under the names of tiktoken.Encoding that corpus.py uses."""

    def __init__(self, path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises no other class
            raise LawaError(
                f"{path}: not a tokenizer.json ({corpus.first_line(error)})"
            ) from error
        self.tokenizer.encode_special_tokens = True  # a literal <|endoftext|> in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.n_vocab = max(self.tokenizer.get_vocab().values(), default=0) + 1  # it may have gaps
        ends = [self.tokenizer.token_to_id(end) for end in ENDS]
        found = [token for token in ends if token is not None]
        if not found:
            raise LawaError(f"{path}: has no end-of-text token, expected one of {', '.join(ENDS)}")
        self.eot_token = found[0]

    def encode_ordinary_batch(self, texts, num_threads=None):
        # takes all cores, unless RAYON_NUM_THREADS says otherwise
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [text.ids for text in encoded]


def find_tokenizer(given):
    """Return the Path of a tokenizer.json: a file, in a folder, or in a model on the Hub."""
    path = Path(given) / JSON_TOKENIZER if Path(given).is_dir() else Path(given)
    if path.is_file():
        return path
    if Path(given).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@\S+)?", given):
        advice = "give one, or a folder with one, or EleutherAI/pythia-1b"
        raise LawaError(f"--tokenizer {given}: no {JSON_TOKENIZER} there; {advice}")
    repo = corpus.HubRepo(given, "give it: --tokenizer FILE", "model")
    return repo.fetch(*repo.files(JSON_TOKENIZER))[JSON_TOKENIZER]


# ---- files -> documents ----


def find_files(source):
    """Return (Paths, what they are): files on the Hub, or at and under a path of the user's."""
    if source in SOURCES:
        known = SOURCES[source]
        advice = f"give the file as SOURCE, with --column {known.column}"
        repo = corpus.HubRepo(known.repo, advice)
        commit, sizes = repo.files(known.pattern)
        return list(repo.fetch(commit, sizes).values()), f"{repo.source} at {commit}"
    if not Path(source).exists():
        raise LawaError(f"{source}: neither one of {', '.join(SOURCES)} nor a file or folder")
    files = corpus.list_files([source])
    return [files[name] for name in sorted(files, key=corpus.numeric)], "local files"


def read_texts(path, column):
    """Yield the documents of a .parquet or .jsonl file; any other file is one document."""
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2].lower()
    try:
        if kind == "parquet":
            for texts in corpus.parquet_texts(path, column):
                yield from texts
            return
        with open_text(path) as file:
            if kind != "jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield json_text(f"{path}:{number}", line, column)
    except (UnicodeDecodeError, EOFError) as error:
        problem = "damaged, or neither UTF-8 text nor .jsonl nor .parquet"
        raise LawaError(f"{path}: {problem} ({corpus.first_line(error)})") from error


def open_text(path):
    """Open a text file in UTF-8, its line ends as they are, a .gz or .zst unpacked on the way."""
    if path.suffix == ".zst":
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
        return io.TextIOWrapper(file, "utf-8", newline="")
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", newline="")


def json_text(where, line, column):
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(line)[column]
        if isinstance(text, str):
            return text
    found = line[:60].strip()
    raise LawaError(f"{where}: expected a JSON object with a text {column!r}, found {found!r}")


# ---- folder ----


def build(source, column, tokenizer, limit, out, settings):
    """Write the corpus folder `out`; return its meta.json. LawaError leaves `out` as it was."""
    encoding = JsonTokenizer(tokenizer)
    files, origin = find_files(source)
    texts = (text for path in files for text in read_texts(path, column) if text.strip())
    with corpus.staging(out) as folder:
        path = folder / "val.bin"
        # this tokenizer takes texts of any length in one piece
        tokens, nbytes = corpus.write_tokens(
            path, texts, encoding, pieces=lambda text: [(text, True)], limit=limit
        )
        if not tokens:
            raise LawaError(f"{source}: no text found in {len(files)} files")
        (folder / "train.bin").touch()
        shutil.copyfile(tokenizer, folder / JSON_TOKENIZER)
        ids = np.fromfile(path, corpus.token_type(encoding.n_vocab))
        warning = f"{WARNING} ({SOURCES[source].trained_on})" if source in SOURCES else WARNING
        meta = settings | {
            "origin": origin,
            "vocab_size": encoding.n_vocab,
            "eot_token": encoding.eot_token,
            "split": "all of it is val",
            "documents": {"train": 0, "val": int(np.count_nonzero(ids == encoding.eot_token))},
            "train_tokens": 0,
            "train_bytes": 0,
            "val_tokens": tokens,
            "val_bytes": nbytes,
            "val_sha256": hashlib.sha256(ids).hexdigest(),
            "warning": warning,
        }
        corpus.write_meta(folder, meta)
    return meta


@corpus.one_line_errors
def main(argv=None):
    example = "python data/pile/prepare.py pile-10k --tokenizer EleutherAI/pythia-1b"
    parser = corpus.Parser(__doc__, example, val_fraction=None)
    parser.add_argument("source", metavar="SOURCE",
                        help=f"{', '.join(SOURCES)}, or a file or folder")
    parser.add_argument("--tokenizer", required=True, metavar="FILE_OR_FOLDER",
                        help="the model's tokenizer.json, or a model of the Hub")
    parser.add_argument("--tokens", type=int, default=TOKENS,
                        help="end with the document that reaches it (default: %(default)s)")
    parser.add_argument("--column", metavar="NAME",
                        help="of the text in .jsonl and .parquet files of yours (default: text)")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise LawaError(f"--tokens {args.tokens}: must be at least 1")
    begun, out = time.monotonic(), args.out or Path(__file__).resolve().parent
    known = SOURCES.get(args.source)
    column = args.column or (known.column if known else "text")
    tokenizer = find_tokenizer(args.tokenizer)
    name = args.source if known else Path(args.source).resolve().name
    settings = {
        "name": name,
        "tokens": args.tokens,
        "column": column,
        "tokenizer": JSON_TOKENIZER,
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    }
    # files of the user's may have changed
    if known and not args.force and corpus.is_finished(out, settings):
        print(f"{name} is up to date in {out} (--force rebuilds it)")
        return
    meta = build(args.source, column, tokenizer, args.tokens, out, settings)
    tokens, nbytes, documents = meta["val_tokens"], meta["val_bytes"], meta["documents"]["val"]
    print(f"val: {tokens:,} tokens, {nbytes:,} bytes, {documents:,} documents; {meta['warning']}")
    print(f"wrote {out} in {time.monotonic() - begun:.1f} s: vocabulary {meta['vocab_size']}")


if __name__ == "__main__":
    sys.exit(main())
