"""Corpora: folders of token ids that data/NAME/prepare.py wrote, or that others prepared for nanoGPT and modded-nanogpt."""
from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lawa_core import LawaError

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


@dataclass(frozen=True)
class Corpus:
    """data/NAME/: train.bin and val.bin, raw little-endian uint16 token ids (nanoGPT's format), described by meta.json."""
    folder: Path
    meta: dict
    train: np.ndarray | Shards  # (tokens,) uint16, mapped; empty where the text only serves to evaluate
    val: np.ndarray | Shards

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @functools.cached_property
    def val_bytes_per_token(self) -> float:
        """Bytes of text per token (an end-of-text has none); measured where meta.json does not say, nan without the tokenizer at hand."""
        if "val_bytes" in self.meta:
            return self.meta["val_bytes"] / self.meta["val_tokens"]
        try:
            tokenizer = self.tokenizer()
        except OSError:  # tiktoken cannot download it
            return math.nan
        counts = np.bincount(self.val[:10_000_000], minlength=self.vocab_size)
        sizes = np.array([len(tokenizer.decode_single_token_bytes(token)) for token in range(self.vocab_size)])
        sizes[self.meta["eot_token"]] = 0
        return float(counts @ sizes / counts.sum())

    @property
    def fingerprint(self) -> str:
        """Changes with the text, the split and the tokenizer; part of a run's name."""
        kept = {key: value for key, value in self.meta.items() if key not in ("python", "name")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def tokenizer(self):
        """tiktoken.Encoding: the corpus's own, or one of tiktoken's; encode_ordinary and decode alone for a model's tokenizer.json."""
        import base64

        import tiktoken
        if self.meta["tokenizer"] == "tokenizer.json":
            from tokenizers import Tokenizer
            own = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            return SimpleNamespace(encode_ordinary=lambda text: own.encode(text, add_special_tokens=False).ids, decode=own.decode)
        if not (self.folder / self.meta["tokenizer"]).exists():
            return tiktoken.get_encoding(self.meta["tokenizer"])
        lines = (self.folder / self.meta["tokenizer"]).read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding(self.name, pat_str=self.meta["pattern"], mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": self.meta["eot_token"]})


class Shards:
    """Mapped files one after another as one array of tokens: len, and slices and integer arrays as indices (they give copies)."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index) -> np.ndarray:
        index = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        which, tokens = np.searchsorted(self.ends, index, "right"), np.empty(index.shape, np.uint16)
        for i in np.unique(which):
            tokens[which == i] = self.parts[i][index[which == i] - self.ends[i] + len(self.parts[i])]
        return tokens


def map_tokens(path: Path) -> np.ndarray:
    """(tokens,) uint16 of a file of nothing but tokens, or of a shard of modded-nanogpt: 256 int32 first, 20240520, 1, tokens."""
    if not path.stat().st_size:
        return np.empty(0, "<u2")
    if path.stat().st_size % 2:
        raise LawaError(f"{path} has {path.stat().st_size} bytes; expected an even number, of uint16 tokens; fetch or prepare it again")
    header = np.fromfile(path, "<i4", 256)
    if tuple(header[:2]) != (20240520, 1):
        return np.memmap(path, "<u2", mode="r")
    tokens = np.memmap(path, "<u2", mode="r", offset=1024)
    if len(tokens) != header[2]:
        raise LawaError(f"{path} has {len(tokens)} tokens, its header says {header[2]}; fetch it again")
    return tokens


def foreign_corpus(folder: Path) -> Corpus | None:
    """Token files that others prepared: nanoGPT's train.bin and val.bin, or modded-nanogpt's *_train_*.bin and *_val_*.bin."""
    if any(folder.glob(".partial-*")) or any(folder.glob("tokenizer.*")):  # a prepare.py of ours was killed in here
        return None
    splits = []
    for split in ("train", "val"):
        files = [folder / f"{split}.bin"] if (folder / f"{split}.bin").exists() else sorted(folder.glob(f"*_{split}_*.bin"))
        if not files:
            return None
        splits.append(Shards([map_tokens(file) for file in files]) if len(files) > 1 else map_tokens(files[0]))
    meta = {"name": folder.resolve().name, "vocab_size": 50_257, "eot_token": 50_256, "tokenizer": "gpt2"}
    for split, tokens in zip(("train", "val"), splits, strict=True):
        meta |= {f"{split}_tokens": len(tokens), f"{split}_begin": hashlib.sha256(tokens[:100_000].tobytes()).hexdigest()}
    return Corpus(folder, meta, *splits)


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_corpus(name) -> Corpus:
    """The corpus data/NAME/ (or any folder), tokens mapped. LawaError with the command to run if it is not there.

    Without a meta.json, nanoGPT's own token files or modded-nanogpt's shards are taken for GPT-2's tokens, and that is said on stderr.
    """
    folder = DATA / name if (DATA / str(name)).is_dir() else Path(name)
    if not (folder / "meta.json").exists() and (found := foreign_corpus(folder)):
        say_once(f"{folder} has no meta.json: its {len(found.train):,} + {len(found.val):,} tokens are taken for GPT-2's")
        return found
    if not (folder / "meta.json").exists():
        known = DATA / str(name) / "prepare.py"
        raise LawaError(f"no corpus {str(name)!r}: expected {folder / 'meta.json'}; run " + (
            f"python {known}" if known.exists() else f"python {DATA / 'text' / 'prepare.py'} YOUR_TEXT --name {Path(name).name}"))
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits, counts = [map_tokens(folder / f"{split}.bin") for split in ("train", "val")], [meta["train_tokens"], meta["val_tokens"]]
        missing = {"name", "vocab_size", "eot_token", "tokenizer"} - set(meta)
    except (ValueError, KeyError, TypeError, OSError) as error:
        damaged = LawaError(f"{folder}: damaged meta.json or .bin ({error}); prepare it again")
        raise error if isinstance(error, LawaError) else damaged from None
    if missing:
        raise LawaError(f"{folder / 'meta.json'} lacks {', '.join(sorted(missing))}; prepare the corpus again")
    for split, tokens, count in zip(("train", "val"), splits, counts, strict=True):
        if len(tokens) != count:
            raise LawaError(f"{folder / split}.bin has {len(tokens)} tokens, meta.json says {meta[f'{split}_tokens']}; "
                            "prepare the corpus again")
    return Corpus(folder, meta, *splits)
