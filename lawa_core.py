"""The averager: read the checkpoints of a training run, average them, write the average.

One sentence carries the file: an average is a row of weights over a trajectory,

    average = sum over steps s of  weight[s] * checkpoint[s]        (weights sum to 1)

so LAWA (arXiv 2306.03241), SWA (1803.05407), EMA and decay-shaped merges (WSM, 2507.17634) differ only in the row. The sections
follow the data: checkpoints on disk, trajectories, schemes (rows), arithmetic, averages in memory, averages from file to file,
search, online averages, command line. File work needs numpy alone; torch is imported by the functions that hand out tensors or read
.pt files, because importing it takes longer than averaging five GPT-2s.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import errno
import fnmatch
import functools
import glob
import hashlib
import json
import math
import mmap
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

__version__ = "0.1.0"


class LawaError(ValueError):
    """A mistake the user can mend: says what was expected, what came, and what to do."""


# ---- 1. Checkpoints on disk ---------------------------------------------------------------------------------------------------------

# safetensors' dtype code -> (numpy storage type, torch's name). numpy has no bfloat16: its bits travel as uint16.
DTYPES = {"F64": ("<f8", "float64"), "F32": ("<f4", "float32"), "F16": ("<f2", "float16"), "BF16": ("<u2", "bfloat16"),
          "I64": ("<i8", "int64"), "I32": ("<i4", "int32"), "I16": ("<i2", "int16"), "I8": ("<i1", "int8"), "U8": ("<u1", "uint8"),
          "U16": ("<u2", "uint16"), "U32": ("<u4", "uint32"), "U64": ("<u8", "uint64"), "BOOL": ("?", "bool")}
FLOATS = ("F64", "F32", "F16", "BF16")  # these are averaged; every other type is copied from the newest checkpoint
CODES = {torch_name: code for code, (_, torch_name) in DTYPES.items()}
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SINGLES, INDEXES = ("model.safetensors", "pytorch_model.bin"), ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NESTED = ("model", "state_dict", "model_state_dict", "module")  # where trainers put the weights inside a .pt
BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$")  # no weights, though Hugging Face's files hold them
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # torch.compile's and DDP's prefixes; only in front: encoder.module.w keeps its name


def itemsize(dtype: str) -> int:
    return np.dtype(DTYPES[dtype][0]).itemsize


def checkpoint_name(step: int) -> str:
    """The one name of a checkpoint's file; `step_of` reads it back."""
    return f"ckpt_{step}.safetensors"


def step_of(path) -> int | None:
    """The training step in a path's name: the number after step/iter/ckpt/checkpoint, else the last number; None if it has none."""
    path = Path(path)
    stem = path.stem if path.suffix in SUFFIXES else path.name
    if re.fullmatch(r"(pytorch_)?model|consolidated|weights", stem):  # step1000/model.safetensors
        stem = path.absolute().parent.name
    numbers = re.findall(r"(?:step|iter|ckpt|checkpoint)s?[-_=]?(\d+)", stem, re.IGNORECASE) or re.findall(r"\d+", stem)
    return int(numbers[-1]) if numbers else None


def _stamp(path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)  # bounded, for trajectories of more files than a process may hold open
def _open_file(path: str, stamp: tuple):
    if _stamp(path) != stamp:
        raise LawaError(f"{path} changed while it was being read; wait until its writer is done")
    return open(path, "rb", buffering=0)  # noqa: SIM115 - closed when the cache lets go of it


@dataclass
class Entry:
    """One tensor of a checkpoint, not yet read: bytes at an offset of a file, or a function that returns them (torch's formats)."""
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    path: str
    offset: int = 0  # bytes from the start of the file
    stamp: tuple = ()  # the file's identity when its header was read
    load: Callable[[], np.ndarray] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(self.dtype)

    @functools.cached_property
    def loaded(self) -> np.ndarray:
        return self.load()

    def in_memory(self) -> Entry:
        """The same tensor, its bytes read now."""
        data = _pages(self.nbytes)
        for start in range(0, self.nbytes, TILE):
            data[start:start + TILE] = self.read(start, min(start + TILE, self.nbytes), copy=False)
        return dataclasses.replace(self, load=lambda: data)

    def read(self, start: int = 0, stop: int | None = None, copy: bool = True) -> np.ndarray:
        """This tensor's bytes [start, stop) as a uint8 array, fresh unless copy=False finds them in memory."""
        if self.load and not copy:
            return self.loaded[start:stop]
        out = np.empty((self.nbytes if stop is None else stop) - start, np.uint8)
        if self.load:
            out[:] = self.loaded[start:start + len(out)]
            return out
        file, done = _open_file(self.path, self.stamp), 0
        while done < len(out):  # a read may come back short
            done += (count := os.preadv(file.fileno(), [out[done:]], self.offset + start + done))
            if count == 0:
                raise LawaError(f"{self.path} is truncated: it ends inside a tensor; copy it again")
        return out


def _pages(nbytes: int) -> np.ndarray:
    """Fresh bytes on pages of their own, which go back to the system as soon as they are dropped; the heap would keep some of them."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:nbytes]


class Checkpoint(Mapping):
    """A lazy mapping name -> torch.Tensor (a fresh CPU copy at every look-up). Opening it reads headers only.

    `entries` holds every tensor once; `aliases` {name: name in entries} the further names of tied ones; `metadata` the header's strings.
    """

    def __init__(self, path, entries: Mapping[str, Entry], aliases: Mapping[str, str] | None = None, metadata: Mapping | None = None):
        self.path, self.metadata = Path(path), dict(metadata or {})
        self.entries = _strip(entries, path)
        self.aliases = {name: WRAPPERS.sub("", kept) for name, kept in _strip(aliases or {}, path).items()}
        if not entries or self.entries.keys() & self.aliases.keys():
            raise LawaError(f"{path} holds {'one tensor under two names' if entries else 'no tensors'}; expected a model's weights")

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def shapes(self) -> dict[str, tuple]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @functools.cached_property
    def sample(self) -> str:
        """sha256 over 64 bytes from the middle of every tensor: equal for identical weights, cheap at any size."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            middle = max(entry.nbytes - 64, 0) // 2
            digest.update(name.encode() + entry.read(middle, min(middle + 64, entry.nbytes)).tobytes())
        return digest.hexdigest()

    def __getitem__(self, name):
        entry = self.entries[self.aliases.get(name, name)]
        return _tensor(entry.read(), entry.dtype, entry.shape)

    def __contains__(self, name):
        return name in self.entries or name in self.aliases

    def __iter__(self):
        return iter([*self.entries, *self.aliases])

    def __len__(self):
        return len(self.entries) + len(self.aliases)


def _strip(named: Mapping, path) -> dict:
    stripped = {WRAPPERS.sub("", name): value for name, value in named.items()}
    if len(stripped) < len(named):
        twice = next(name for name in named if WRAPPERS.sub("", name) != name and WRAPPERS.sub("", name) in named)
        raise LawaError(f"{path}: {twice!r} and {WRAPPERS.sub('', twice)!r} are one name once wrapper prefixes are stripped; keep one")
    return stripped


def _tied(state: Mapping[str, Checkpoint], aliases: Mapping[str, str]) -> dict:
    """The state dict with its tied names, which share one tensor."""
    return {**state, **{alias: state[kept] for alias, kept in aliases.items()}}


def _tensor(data: np.ndarray, dtype: str, shape):
    """Bytes -> torch.Tensor on the same memory."""
    import torch
    return torch.from_numpy(data).view(getattr(torch, DTYPES[dtype][1])).reshape(shape)


def open_checkpoint(path, key: str | None = None) -> Checkpoint:
    """Open .safetensors, .pt/.pth/.bin/.ckpt, a Hugging Face folder (single or sharded) or a torch distributed checkpoint folder.

    Args: path; key: where a nested .pt or distributed checkpoint holds its weights (default: `model`, `state_dict`,
    `model_state_dict`, `module`, or at the top). Wrapper prefixes `_orig_mod.` and `module.` are stripped. Only tensors are unpickled.
    Returns a `Checkpoint`. Errors: LawaError for a missing, truncated, corrupt or unsafe file, naming it.
    """
    path = Path(path)
    if not path.exists():
        raise LawaError(f"no such checkpoint: {path}")
    if not path.is_dir():
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path, key)
    if (path / ".metadata").exists():
        return _open_distributed(path, key)
    for index in INDEXES:
        if (path / index).exists():
            return _open_sharded(path, index, key)
    for single in SINGLES:
        if (path / single).exists():
            inside = open_checkpoint(path / single, key)
            return Checkpoint(path, _weights(inside.entries), inside.aliases, inside.metadata)
    raise LawaError(f"{path} is no checkpoint: expected one of {', '.join((*SINGLES, *INDEXES, '.metadata'))} in it")


def _open_safetensors(path: Path) -> Checkpoint:
    """Layout: u64 length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors."""
    stamp = _stamp(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        base = 8 + (struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else stamp[1])
        if base > stamp[1]:
            raise LawaError(f"{path} is truncated or no safetensors file: {stamp[1]} bytes, expected a header of {base}")
        try:
            header = json.loads(file.read(base - 8))
            metadata = header.pop("__metadata__", {})
            spans = {name: info["data_offsets"] for name, info in header.items()}
            entries = {name: Entry(info["dtype"], tuple(info["shape"]), str(path), base + spans[name][0], stamp) for name, info in header.items()}
            sound = all(entry.dtype not in DTYPES or 0 <= spans[name][0] == spans[name][1] - entry.nbytes for name, entry in entries.items())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise LawaError(f"{path}: corrupt safetensors header ({error}); copy it again") from None
    strange = [f"{name} has type {entry.dtype}" for name, entry in entries.items() if entry.dtype not in DTYPES]
    if strange or not sound:
        raise LawaError(f"{path}: {strange[0]}, expected one of {', '.join(DTYPES)}" if strange else
                        f"{path}: corrupt safetensors header (offsets and shapes disagree); copy it again")
    if max((base + stop for _, stop in spans.values()), default=0) > stamp[1]:
        raise LawaError(f"{path} is truncated: its header promises more than its {stamp[1]} bytes; copy it again")
    aliases = {name: kept for name, kept in metadata.items() if kept in entries and name not in entries}  # safetensors' save_model writes so
    return Checkpoint(path, entries, aliases, metadata)


def _open_torch(path: Path, key: str | None) -> Checkpoint:
    import torch
    try:
        try:
            blob = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            blob = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        raise LawaError(f"{path}: refused, it holds {unsafe[1]}, and unpickling that could run code; save the state dict alone" if unsafe else
                        f"{path}: not a readable torch checkpoint ({(str(error) or 'empty').splitlines()[0]}); copy it again") from None
    if not isinstance(blob, Mapping) or (key and not isinstance(blob.get(key), Mapping)):
        raise LawaError(f"{path} holds {', '.join(map(str, blob))[:200] if isinstance(blob, Mapping) else type(blob).__name__}; "
                        f"expected a state dict{f' under {key!r}' if key else ''}")
    nested = [name for name in NESTED if isinstance(blob.get(name), Mapping)]
    entries, aliases = _as_entries(blob[key or nested[0]] if key or nested else blob, path)
    return Checkpoint(path, entries, aliases)


def _as_entries(tensors: Mapping, origin) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries, aliases) of a mapping name -> torch tensor; names of one place in memory become one entry and aliases.

    What is no tensor is passed over: step counters beside the weights are no weights.
    """
    import torch
    seen, entries, aliases = {}, {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if tensor.numel() and place in seen:
                aliases[name] = seen[place]
            else:
                seen[place], entries[name] = name, _torch_entry(tensor, origin)
    return entries, aliases


def _torch_entry(tensor, origin) -> Entry:
    import torch
    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None or tensor.layout != torch.strided:
        raise LawaError(f"{origin}: a tensor of type {tensor.dtype}, {tensor.layout}, cannot be averaged; expected one of {', '.join(CODES)}")
    # Loading maps the file's own memory where the tensor is contiguous and copies this one tensor where not.
    return Entry(code, tuple(tensor.shape), str(origin),
                 load=lambda: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _open_sharded(folder: Path, index: str, key: str | None) -> Checkpoint:
    try:
        places = _strip(json.loads((folder / index).read_text())["weight_map"], folder / index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, LawaError) else LawaError(f"{folder / index}: corrupt index ({error})") from None
    missing = [shard for shard in sorted(set(places.values())) if not (folder / shard).exists()]
    if missing:
        raise LawaError(f"{folder}: missing shard {', '.join(missing)}, named in {index}; fetch it again")
    shards = {shard: open_checkpoint(folder / shard, key) for shard in sorted(set(places.values()))}
    stale = [name for name, shard in places.items() if name not in shards[shard]] + [n for s in shards.values() for n in s if n not in places]
    if stale:
        raise LawaError(f"{folder / index} is stale: {stale[0]} is not where it says; write the index again")
    return Checkpoint(folder, _weights({name: entry for shard in shards.values() for name, entry in shard.entries.items()}),
                      {name: kept for shard in shards.values() for name, kept in shard.aliases.items()})


def _weights(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Without the causal mask, its fill value and the rotary frequencies, which some revisions of a model have and others lack."""
    return {name: entry for name, entry in entries.items() if not (BUFFERS.search(name) and (len(entry.shape) != 1 or "inv_freq" in name))}


def _open_distributed(folder: Path, key: str | None) -> Checkpoint:
    """torch.distributed.checkpoint: .distcp files and an index, which is a pickle; the unpickler here knows torch's index classes only."""
    import pickle

    import torch
    import torch.distributed.checkpoint as dcp

    class IndexUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            plain = ("torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", "pathlib.PosixPath", "pathlib.WindowsPath")
            own = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem") and "." not in name
            found = super().find_class(module, name) if own or f"{module}.{name}" in plain or module == "torch" else None
            defined_there = own and isinstance(found, type) and found.__module__ == module  # not what those modules import
            if f"{module}.{name}" in plain or defined_there or (module == "torch" and isinstance(found, torch.dtype)):
                return found
            raise LawaError(f"{folder / '.metadata'}: refused, it holds {module}.{name}, and unpickling that could run code")
    try:
        with open(folder / ".metadata", "rb") as file:
            index = IndexUnpickler(file).load()
        tensors = {name: info for name, info in index.state_dict_metadata.items() if hasattr(info, "properties")}
    except Exception as error:
        raise error if isinstance(error, LawaError) else LawaError(f"{folder}: not a readable distributed checkpoint ({error})") from None
    places = {name: tuple(map(str, (index.planner_data or {}).get(name, (name,)))) for name in tensors}  # ("model", "wte.weight")
    under = key or next((name for name in NESTED if any(place[0] == name and len(place) > 1 for place in places.values())), None)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return index

    def entry(name):
        tensor = torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype, device="meta")

        def load():
            real = {name: torch.empty_like(tensor, device="cpu")}
            dcp.load(real, storage_reader=Reader(folder), no_dist=True)
            return _torch_entry(real[name], folder).load()
        return dataclasses.replace(_torch_entry(tensor, folder), load=load)
    return Checkpoint(folder, {".".join(place[1:] if under else place): entry(name) for name, place in places.items() if under in (None, place[0])})


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(header, {name: offset in the file}, file size) of a safetensors file; the widest types first keeps every tensor aligned."""
    table, offset = {}, 0
    for name in sorted(entries, key=lambda name: -itemsize(entries[name].dtype)):
        table[name] = {"dtype": entries[name].dtype, "shape": entries[name].shape, "data_offsets": (offset, offset + entries[name].nbytes)}
        offset += entries[name].nbytes
    text = json.dumps(({"__metadata__": dict(metadata)} if metadata else {}) | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + info["data_offsets"][0] for name, info in table.items()}, base + offset


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A hidden name beside `path` to write to: renamed to `path` on success, removed on failure. Nothing half-written is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict {name: torch.Tensor} to .safetensors or .pt, atomically; shared storage is written once. Copies nothing."""
    with replacing(path) as part:
        if Path(path).suffix != ".safetensors":
            import torch
            torch.save(dict(tensors), part)
            return
        entries, aliases = _as_entries(tensors, path)
        header, offsets, _ = _header(entries, {"format": "pt", **(metadata or {}), **aliases})
        with open(part, "wb") as file:
            file.write(header)
            for name in offsets:
                file.write(entries[name].loaded)


# ---- 2. Trajectories ----------------------------------------------------------------------------------------------------------------

NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|training_args|trainer|resume|^\.", re.IGNORECASE)


class Trajectory:
    """The checkpoints of one run in order: `steps` ascending, `trajectory[step]` opens one (header only)."""
    allow = ()  # what to take in spite of itself: "duplicates"

    def __init__(self, paths: Mapping[int, Path], key: str | None = None, name: str = "the list"):
        self.paths, self.key, self.name = dict(sorted(paths.items())), key, name

    @property
    def steps(self) -> list[int]:
        return list(self.paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, step) -> Checkpoint:
        if step not in self.paths:
            raise LawaError(f"no checkpoint at step {step} in {self.name}; there are {_some(self.steps)}")
        return open_checkpoint(self.paths[step], self.key)

    def expect(self, steps) -> None:
        """These steps will be asked for, in this order: what must be fetched can be fetched ahead."""

    def release(self, step: int) -> None:
        """This step will not be asked for again: what was fetched can go."""

    def companions(self) -> Path:
        """The folder where the newest checkpoint's config and tokenizer are."""
        newest = self.paths[self.steps[-1]]
        return newest if newest.is_dir() else newest.parent


def _some(steps) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 6 else f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]} ({len(steps)} steps)"


def open_trajectory(source, key: str | None = None) -> Trajectory:
    """Open a run folder, a folder of step folders (step1000/, checkpoint-500/), a glob, a list of checkpoint paths, or a model's
    revisions on the Hub: "hub:EleutherAI/pythia-1b-deduped", all of them, or "hub:NAME@START:STOP:STRIDE", both ends included.

    Steps come from the names, in numeric order. In a folder, what names no step (a `latest` link, ckpt_best.pt), optimizer files and
    hidden files are passed over; in a list they are errors, unless no name has a step: then the order given counts.
    Errors: LawaError for nothing found, a name without a step, two files of one step.
    """
    if isinstance(source, Trajectory):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _trajectory([Path(path) for path in source], key, "the list")
    if str(source).startswith("hub:"):
        return open_hub(str(source)[4:])
    source = Path(source)
    if source.is_dir() and not _is_checkpoint(source):
        found = [path for path in source.iterdir() if step_of(path) is not None and _is_checkpoint(path)]
    elif source.exists():
        found = [source]
    else:
        found = [Path(path) for path in glob.glob(str(source)) if not NOT_WEIGHTS.search(Path(path).name)]
    if not found:
        raise LawaError(f"no checkpoints in {source}; expected files such as {checkpoint_name(1000)} or folders such as step1000/")
    return _trajectory(found, key, source.name)


def _is_checkpoint(path: Path) -> bool:
    if NOT_WEIGHTS.search(path.name):
        return False
    return path.suffix in SUFFIXES if path.is_file() else any((path / name).exists() for name in (*SINGLES, *INDEXES, ".metadata"))


def _trajectory(paths: list[Path], key: str | None, name: str) -> Trajectory:
    steps = [step_of(path) for path in paths]
    if all(step is None for step in steps):
        steps = list(range(1, len(paths) + 1))
    found: dict[int, Path] = {}
    for step, path in zip(steps, paths, strict=True):
        if step is None:
            raise LawaError(f"{path} names no step while others do; expected names such as {checkpoint_name(1000)}")
        if step in found and not (path.exists() and path.samefile(found[step])):
            raise LawaError(f"two checkpoints for step {step}: {found[step]} and {path}; keep one")
        found[step] = path
    if not found:
        raise LawaError("expected at least one checkpoint, got an empty list")
    return Trajectory(found, key, name)


def _open_steps(trajectory: Trajectory, steps, allow=()) -> dict[int, Checkpoint]:
    """Open `steps`, ascending, and refuse them if they do not belong together: every problem at once, before anything is written."""
    opened, problems = {}, []
    for step in sorted(steps):
        try:
            opened[step] = trajectory[step]
        except LawaError as error:
            problems.append(str(error))
    problems += [problem for checkpoint in opened.values() for problem in _mismatches(checkpoint, opened[max(opened)])]
    averages = [str(checkpoint.path) for checkpoint in opened.values() if "lawa" in checkpoint.metadata]
    if "averages" not in allow and 0 < len(averages) < len(opened):
        problems.append(f"{', '.join(averages)} already an average, says its header, among checkpoints that are none; leave it out")
    if "duplicates" not in allow and not problems:
        problems += [f"{a.path} and {b.path} hold identical weights, so one is a wrong file; leave it out (or --allow duplicates)"
                     for a, b in _identical(opened)]
    if problems:
        raise LawaError("; ".join(problems))
    return opened


def _mismatches(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[str]:
    """Names, shapes and kinds that differ from the newest checkpoint's, each with file and tensor."""
    for name in sorted(checkpoint.keys() ^ newest.keys())[:6]:
        yield f"{checkpoint.path}: tensor {name} is {'extra: not' if name in checkpoint else 'missing: it is'} in {newest.path}"
    for name in checkpoint.entries.keys() & newest.entries.keys():
        ours, theirs = checkpoint.entries[name], newest.entries[name]
        if ours.shape != theirs.shape:
            yield f"{checkpoint.path}: {name} has shape {list(ours.shape)}, expected {list(theirs.shape)} as in {newest.path}"
        elif ours.dtype != theirs.dtype and not (ours.dtype in FLOATS and theirs.dtype in FLOATS):
            yield f"{checkpoint.path}: {name} is {ours.dtype}, expected {theirs.dtype} as in {newest.path}"


def _identical(opened: Mapping[int, Checkpoint], tile: int = 1 << 20) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Pairs of byte-identical checkpoints, as on the Hub's mislabelled Pythia branches. Only those with equal samples are compared whole."""
    first: dict[str, Checkpoint] = {}
    for b in opened.values():
        a = first.setdefault(b.sample, b)
        if a is not b and all(np.array_equal(a.entries[name].read(start, min(start + tile, entry.nbytes)), entry.read(start, min(start + tile, entry.nbytes)))
                              for name, entry in b.entries.items() for start in range(0, entry.nbytes, tile)):
            yield a, b


def check(source, key: str | None = None) -> list[str]:
    """Every problem of a trajectory as text: what averaging would refuse, and gaps in its steps. Reads headers and samples."""
    trajectory, problems = open_trajectory(source, key), []
    try:
        _open_steps(trajectory, trajectory.steps)
    except LawaError as error:
        problems = str(error).split("; ")
    usual = np.median(np.diff(trajectory.steps)) if len(trajectory) > 2 else math.inf
    return problems + [f"gap: no checkpoint between steps {a} and {b}; others are {usual:g} apart" for a, b in pairwise(trajectory.steps) if b - a > usual]


# ---- 2b. Trajectories on the Hub ----------------------------------------------------------------------------------------------------

PREFERRED = (("model.safetensors", r"model-(\d+)-of-(\d+)\.safetensors"), ("pytorch_model.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin"))


def open_hub(repo: str, steps=None, folder=None, *, allow=(), keep: bool = False, token=None, endpoint: str | None = None) -> HubTrajectory:
    """The revisions step<N> of a model on the Hugging Face Hub. Lists their files and compares them; fetches nothing yet.

    Args: repo: "EleutherAI/pythia-1b-deduped", or with "@START:STOP:STRIDE" instead of `steps`; steps: default all there are; folder: where
    step folders are fetched to, default ~/.cache/lawa/NAME; allow: "duplicates" takes revisions that share files; keep: files stay after
    use; token: default the one you are logged in with; endpoint: another server than huggingface.co.
    Errors: LawaError for a missing revision, shard or token, a hub that is down, revisions with the same weights. Needs huggingface_hub.
    """
    repo, _, wanted = repo.partition("@")
    with _hub(repo):
        from huggingface_hub import HfApi
        api = HfApi(endpoint=endpoint, token=token)
        commits = {int(ref.name[4:]): ref.target_commit for ref in api.list_repo_refs(repo).branches if re.fullmatch(r"step\d+", ref.name)}
    steps = sorted(span(wanted) if wanted else commits if steps is None else set(steps))
    missing = [f"step{step}" for step in steps if step not in commits]
    if missing or not steps:
        raise LawaError(f"{repo} has no revision {_some(missing) or 'named step<N>'}; there are {_some(sorted(commits)) or 'none'}")

    def listed(step):
        with _hub(f"{repo} step{step}"):
            return _wanted(f"{repo} step{step}", list(api.list_repo_tree(repo, revision=commits[step])))
    with ThreadPoolExecutor(8) as pool:
        files = dict(zip(steps, pool.map(listed, steps), strict=True))
    if "duplicates" not in allow and (twins := list(_twins(files))):
        raise LawaError(f"{repo}: {'; '.join(twins)}; these are wrong uploads: leave out steps, or allow duplicates")
    return HubTrajectory(repo, {step: (commits[step], files[step]) for step in steps}, folder, allow, keep, api)


def span(text: str) -> range:
    """The steps that "START:STOP:STRIDE" (or with commas) writes, both ends included."""
    try:
        start, stop, stride = map(int, re.split("[:,]", text))
        return range(start, stop + 1, stride)
    except ValueError:
        raise LawaError(f"steps must be START:STOP:STRIDE, such as 103000:143000:1000, got {text!r}") from None


def _wanted(revision: str, listing) -> dict[str, object]:
    """{name: the Hub's record} of the files to fetch: config.json and one whole copy of the weights, safetensors if there is one."""
    files, incomplete = {file.path: file for file in listing}, []
    config = {name: files[name] for name in ("config.json",) if name in files}
    for single, pattern in PREFERRED:
        shards = {name: found for name in files if (found := re.fullmatch(pattern, name))}
        numbers = {int(found[1]) for found in shards.values()}
        lacking = [n for n in range(1, max((int(found[2]) for found in shards.values()), default=0) + 1) if n not in numbers]
        if single in files:
            return config | {single: files[single]}
        if (index := f"{single}.index.json") in files and shards and not lacking:
            return config | {name: files[name] for name in (index, *sorted(shards))}
        incomplete += [f"shard {n} of {single}" for n in lacking] + [index] * (bool(shards) and index not in files)
    raise LawaError(f"{revision} lacks {', '.join(incomplete) or 'weights: expected ' + ' or '.join(single for single, _ in PREFERRED)}; "
                    f"leave this step out")


def _identity(file) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _twins(files: Mapping[int, Mapping]) -> Iterator[str]:
    """Revisions that share weight files, by the sha256 that the Hub lists: known before a byte is fetched."""
    weights = {step: {_identity(file) for name, file in names.items() if not name.endswith(".json")} for step, names in files.items()}
    groups: dict[str, list[int]] = {}
    for step, names in weights.items():
        for identity in names:
            groups.setdefault(identity, []).append(step)
    for steps in sorted({tuple(group) for group in groups.values() if len(group) > 1}):
        whole = all(weights[step] == weights[steps[0]] for step in steps)
        yield f"steps {_some(steps)} hold {'identical weights' if whole else 'partly identical weights, some shards are the same file'}"


@contextlib.contextmanager
def _hub(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises, as one line that says what to do."""
    try:
        import huggingface_hub.errors as hub
    except ImportError:
        raise LawaError('the Hub needs huggingface_hub: pip install "lawa-lab[hub]"') from None
    try:
        yield
    except LawaError:
        raise
    except Exception as error:  # the client's own errors, its HTTP library's, the disk's
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        reason = next((text for kind, text in (
            (hub.RevisionNotFoundError, "no such revision on the Hub"),
            (hub.RemoteEntryNotFoundError, "a file it lists is missing on the Hub"),
            (hub.RepositoryNotFoundError, "no such model, or it needs a token: check the name, `hf auth login` or set HF_TOKEN"),
            (hub.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it and start again")) if isinstance(error, kind)), None)
        if status in (401, 403) and not reason:
            reason = "access refused: `hf auth login` or set HF_TOKEN"
        elif getattr(error, "errno", None) == errno.ENOSPC:
            reason = "the disk is full; free some, or choose another folder"
        elif "Consistency check" in str(error):
            reason = "the download was cut short"
        first = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        reason = reason or f"the Hub cannot be reached ({status or first})"
        raise LawaError(f"{what}: {reason}; what is fetched is kept, run again to go on") from None


def soon(function: Callable, *args) -> Future:
    """The future of a call in a thread of its own, for which an interrupted program does not wait."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future


class HubTrajectory(Trajectory):
    """Revisions on the Hub, each fetched once when asked for, the next one meanwhile (see `open_hub`, `expect`, `release`).

    `fetched` counts bytes received. Files are checked against the Hub's sha256; an interrupted fetch goes on with the first file it lacks.
    """

    def __init__(self, repo: str, revisions: Mapping[int, tuple[str, Mapping]], folder, allow, keep: bool, api):
        self.folder = Path(folder or Path.home() / ".cache" / "lawa" / repo.replace("/", "--")).absolute()
        super().__init__({step: self.folder / f"step{step}" for step in revisions}, None, repo)
        self.revisions, self.allow, self.keep, self.api = dict(revisions), allow, keep, api
        self.order, self.pending, self.fetched, self.begun, self.told = [], {}, 0, None, math.inf

    def nbytes(self, step: int) -> int:
        return sum(file.size for file in self.revisions[step][1].values())

    def expect(self, steps) -> None:
        self.order = list(steps)

    def __getitem__(self, step) -> Checkpoint:
        if step not in self.paths:
            return super().__getitem__(step)
        try:
            self._start(step).result()
        except BaseException:
            self.pending.pop(step, None)  # asked for again, it is tried again
            raise
        for following in self.order[self.order.index(step) + 1:][:1] if step in self.order else ():
            self._start(following)
        return super().__getitem__(step)

    def release(self, step: int) -> None:
        if self.pending.pop(step, None) and not self.keep:
            _open_file.cache_clear()  # a file still open keeps its place on the disk
            shutil.rmtree(self.paths[step], ignore_errors=True)

    def plan(self, schemes: Mapping[str, Callable], at=None, on_disk: bool = False, rate: float | None = None) -> dict:
        """What `stream` with these arguments will take: revisions, bytes to fetch, bytes on disk and in memory at most, hours of fetching.

        rate: bytes/s, default measured. What is on disk already is not fetched again.
        """
        _, needed, last = _schedule(self, schemes, at)
        size = {step: self.nbytes(step) for step in needed}
        held = [sum(size[s] for s in needed[:i + 1] if last[s] >= step) for i, step in enumerate(needed)]
        resting = held if on_disk else [size[step] for step in needed]
        todo = sum(file.size for step in needed for name, file in self.revisions[step][1].items() if not (self.paths[step] / name).exists())
        rate = rate or self.measure()
        disk = max(now + ahead for now, ahead in zip(resting, [*size.values(), 0][1:], strict=True))
        return {"revisions": len(needed), "fetch_bytes": todo, "disk_bytes": disk, "memory_bytes": 0 if on_disk else max(held), "rate": rate,
                "hours": todo / rate / 3600}

    def companions(self) -> Path:
        step = self.steps[-1]
        with _hub(f"{self.name} step{step}"):
            names = [file.path for file in self.api.list_repo_tree(self.name, revision=self.revisions[step][0])]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in COPIED):
                self._download(step, name, self.folder / "model")
        return self.folder / "model"

    def measure(self, size: int = 8 << 20) -> float:
        """Bytes per second of one request for the first `size` bytes of the weights."""
        import huggingface_hub as hub
        commit, files = self.revisions[self.steps[0]]
        url = hub.hf_hub_url(self.name, max(files, key=lambda name: files[name].size), revision=commit, endpoint=self.api.endpoint)
        headers, begun = hub.utils.build_hf_headers(token=self.api.token) | {"Range": f"bytes=0-{size - 1}"}, time.perf_counter()
        with _hub(self.name):
            response = hub.get_session().get(url, headers=headers, follow_redirects=True)
            hub.utils.hf_raise_for_status(response)
        return len(response.content) / (time.perf_counter() - begun)

    def _start(self, step: int) -> Future:
        if step not in self.pending:
            self.pending[step] = soon(self._fetch, step)
        return self.pending[step]

    def _fetch(self, step: int) -> None:
        target = self.paths[step]
        if self.begun is None:
            self.begun = self.told = time.monotonic()
        target.mkdir(parents=True, exist_ok=True)
        needed = sum(file.size for name, file in self.revisions[step][1].items() if not (target / name).exists())
        if (free := shutil.disk_usage(target).free) < needed:
            raise LawaError(f"{self.name} step{step} takes {needed / 1e9:.2f} GB, {self.folder} has {free / 1e9:.2f} GB left; "
                            f"free some, or choose another folder; what is fetched is kept, run again to go on")
        for name, file in self.revisions[step][1].items():
            fresh = not (target / name).exists()
            self._download(step, name, target)
            size = (target / name).stat().st_size
            if size == file.size and fresh and file.lfs:
                with open(target / name, "rb") as opened:
                    size = file.size if hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256 else None
            if size != file.size:
                (target / name).unlink()
                raise LawaError(f"{self.name} step{step}: {name} is not the file that the Hub lists (its sha256 or size differs); run again")

    def _download(self, step: int, name: str, target: Path) -> None:
        from huggingface_hub.utils import tqdm

        class Meter(tqdm):  # the client reports to a progress bar
            def __init__(bar, *args, **options):
                super().__init__(*args, **options | {"disable": True})

            def update(bar, n=1):
                self._count(n or 0)
        with _hub(f"{self.name} step{step}"):
            self.api.hf_hub_download(self.name, name, revision=self.revisions[step][0], local_dir=target, tqdm_class=Meter)

    def _count(self, size: float) -> None:
        self.fetched += size
        if time.monotonic() - self.told > 10 and self.fetched:
            self.told, seconds = time.monotonic(), time.monotonic() - self.begun
            total = sum(self.nbytes(step) for step in self.order or self.pending)
            print(f"{self.name}: {self.fetched / 1e9:.2f} of {total / 1e9:.2f} GB fetched, {self.fetched / seconds / 1e6:.0f} MB/s, "
                  f"{(total - self.fetched) / self.fetched * seconds:.0f} s left", flush=True)


# ---- 3. Schemes: rows of weights --------------------------------------------------------------------------------------------------------

def _grid(steps, at: int, every: int | None, start: int) -> list[int]:
    """The available steps start, start + every, ... up to `at`, ascending; LawaError names a step that should be there and is not."""
    have = [step for step in steps if start <= step <= at]
    if every is None or not have:
        return have
    first = have[0] + (start - have[0]) % every
    return _present(range(first, at + 1, every), have, every, at)


def _present(wanted, have, every: int, at: int) -> list[int]:
    missing = sorted(set(wanted) - set(have))
    if missing:
        raise LawaError(f"no checkpoint at step {missing[0]}, which an average at step {at} with spacing {every} needs; there are {_some(have)}; "
                        f"use a spacing that is a multiple of the checkpoint interval")
    return list(wanted)


def _positive(**values) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LawaError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class newest:
    """The run itself: {at: 1}."""

    def __call__(self, steps, at):
        return {at: 1.0}


@dataclass(frozen=True)
class lawa:
    """Latest weight averaging: the mean of the k latest checkpoints at, at - spacing, ... not before `start` (arXiv 2306.03241; 2209.14981).

    spacing in steps (None: the k latest there are). A window part full divides by what it holds; before `start` it is the run itself.
    """
    k: int
    spacing: int | None = None
    start: int = 0

    def __post_init__(self):
        _positive(k=self.k, spacing=self.spacing)

    def __call__(self, steps, at):
        have = [step for step in steps if self.start <= step <= at]
        if self.spacing is None or not have:
            window = have[-self.k:]
        else:
            window = _present(range(at, have[0] - 1, -self.spacing)[:self.k], have, self.spacing, at)
        return {step: 1 / len(window) for step in window} or {at: 1.0}


@dataclass(frozen=True)
class swa:
    """Stochastic weight averaging: the uniform mean of every `every`-th step since `start` (arXiv 1803.05407)."""
    start: int = 0
    every: int | None = None

    def __post_init__(self):
        _positive(every=self.every)

    def __call__(self, steps, at):
        window = _grid(steps, at, self.every, self.start)
        return {step: 1 / len(window) for step in window} or {at: 1.0}


@dataclass(frozen=True)
class ema:
    """Exponential moving average, updated every `every` steps since `start`: e <- beta e + (1 - beta) w, begun at the first w."""
    beta: float
    every: int | None = None
    start: int = 0

    def __post_init__(self):
        _positive(every=self.every)
        if not 0 <= self.beta < 1:
            raise LawaError(f"beta must be in [0, 1), got {self.beta!r}")

    def __call__(self, steps, at):
        window = _grid(steps, at, self.every, self.start)
        powers = [self.beta ** (len(window) - 1 - i) for i in range(len(window))]
        return {step: p * (1.0 if i == 0 else 1 - self.beta) for i, (step, p) in enumerate(zip(window, powers, strict=True))} or {at: 1.0}


SHAPES = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "1-sqrt": lambda x: 1 - math.sqrt(x)}


@dataclass(frozen=True)
class decay:
    """Merge weights that emulate a learning-rate decay over the last `window` steps (WSM, arXiv 2507.17634).

    With theta_0 ... theta_n in the window and decay curve w_j = shape(j / (n + 1)): c_n = w_n, c_j = w_j - w_{j+1}, c_0 = 1 - w_1. A linear decay
    is the uniform mean. shape: "linear", "cosine", "1-sqrt" or a function of x in [0, 1] that gives the share of the learning rate left.
    """
    window: int
    shape: str | Callable[[float], float] = "1-sqrt"
    every: int | None = None

    def __post_init__(self):
        _positive(window=self.window, every=self.every)
        if not callable(self.shape) and self.shape not in SHAPES:
            raise LawaError(f"shape must be one of {', '.join(SHAPES)} or a function, got {self.shape!r}")

    def __call__(self, steps, at):
        first = max(at - self.window, min(steps))
        window = lawa(k=len(steps), spacing=self.every, start=first)(steps, at)
        shape = self.shape if callable(self.shape) else SHAPES[self.shape]
        curve = [1.0] + [float(shape(j / len(window))) for j in range(1, len(window))] + [0.0]
        return {step: before - after for step, before, after in zip(sorted(window), curve, curve[1:], strict=False)}


@dataclass(frozen=True)
class explicit:
    """Given weights, the last one for the newest checkpoint; divided by their sum. Zero weights are not read, negative ones extrapolate."""
    weights: tuple[float, ...]
    spacing: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        total = math.fsum(self.weights)
        if not self.weights or not math.isfinite(total) or abs(total) < 1e-12:
            raise LawaError(f"weights must be finite and have a sum other than 0, got {list(self.weights)}")

    def __call__(self, steps, at):
        window = sorted(lawa(len(self.weights), self.spacing)(steps, at))
        if len(window) < len(self.weights):
            raise LawaError(f"{len(self.weights)} weights need as many checkpoints up to step {at}; there are {len(window)}")
        return {step: weight / math.fsum(self.weights) for step, weight in zip(window, self.weights, strict=True)}


SCHEMES = {scheme.__name__: scheme for scheme in (newest, lawa, swa, ema, decay, explicit)}
DURATIONS = ("spacing", "start", "every", "window")  # fields given in steps


def tokens(n: float, per_step: int) -> int:
    """A duration of `n` tokens in steps of `per_step` tokens; LawaError unless it is a whole number of steps."""
    steps = n / per_step
    if steps != int(steps):
        raise LawaError(f"{n:g} tokens are {steps:.3f} steps of {per_step} tokens; expected a multiple, such as {round(steps) * per_step}")
    return int(steps)


def in_steps(scheme, per_step: int):
    """The scheme whose durations were given in tokens, in steps."""
    given = {name: getattr(scheme, name) for name in DURATIONS if getattr(scheme, name, None)}
    return dataclasses.replace(scheme, **{name: tokens(value, per_step) for name, value in given.items()})


def parse_scheme(text: str):
    """The scheme that a text such as "lawa(k=5, spacing=100)" writes: literals only, nothing is run."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, args, keywords = (call.func.id, call.args, call.keywords) if isinstance(call, ast.Call) else (call.id, [], [])
        return SCHEMES[name](*map(ast.literal_eval, args), **{word.arg: ast.literal_eval(word.value) for word in keywords})
    except LawaError as error:
        raise LawaError(f"scheme {text!r}: {error}") from None
    except (SyntaxError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LawaError(f"scheme {text!r} not understood ({error}); expected one of lawa(k=5, spacing=100), swa(start=0, every=10), ema(beta=0.99), "
                        "decay(window=1000, shape='1-sqrt'), explicit([0.2, 0.8])") from None


def row(scheme, steps, at: int) -> dict[int, float]:
    """The scheme's weights {step: weight} at step `at`, checked: finite, summing to 1, on available steps; zeros left out."""
    if at not in steps:
        raise LawaError(f"no checkpoint at step {at}; there are {_some(steps)}")
    weights = {step: float(weight) for step, weight in sorted(scheme(steps, at).items()) if weight != 0}
    if not set(weights) <= set(steps) or not abs(math.fsum(weights.values()) - 1) < 1e-9:
        raise LawaError(f"{scheme} gives weights that sum to {math.fsum(weights.values())} over steps {_some(list(weights))}; expected 1, on available steps")
    return weights


# ---- 4. Arithmetic ------------------------------------------------------------------------------------------------------------------

BLOCK = 8192  # values per matrix product: 20 checkpoints x 8192 doubles stay in the cache


def _widen(raw: np.ndarray, dtype: str, into: np.ndarray) -> None:
    """Raw bytes of floats -> doubles."""
    values = raw.view(DTYPES[dtype][0])
    into[:len(values)] = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def _narrow(values: np.ndarray, dtype: str, raw: np.ndarray) -> None:
    """Doubles -> raw bytes, rounded once, to nearest even."""
    if dtype != "BF16":
        raw.view(DTYPES[dtype][0])[:] = values
        return
    # Rounding to fp32 and then to bf16 could land one ulp off; rounding to odd in between keeps the second rounding exact.
    single = values.astype(np.float32)
    error = values - single
    bits = single.view(np.uint32)
    bits -= ((error < 0) & (single > 0)) | ((error > 0) & (single < 0))  # back toward zero
    bits |= error != 0
    bits += 0x7FFF + ((bits >> 16) & 1)
    raw.view(np.uint16)[:] = np.where(np.isnan(values), 0x7FC0, bits >> 16)


def _finite(raw: np.ndarray, dtype: str) -> bool:
    if dtype == "BF16":
        return not np.any((raw.view(np.uint16) & 0x7F80) == 0x7F80)
    values = raw.view(DTYPES[dtype][0])
    return bool(np.isfinite(values.sum(dtype=np.float64)) or np.isfinite(values).all())  # the sum is one pass; it may overflow


@np.errstate(over="ignore", invalid="ignore")
def mix(rows: np.ndarray, raws: list[np.ndarray], dtypes: list[str], out_dtypes: list[str]) -> list[np.ndarray]:
    """rows @ raws for one tensor, or one tile of it: the arithmetic of every average here.

    Args: rows (M, N) weights; raws: N byte arrays (uint8) of equally many values, oldest first, and their dtype codes; out_dtypes: M codes.
    Returns M fresh byte arrays. Products and sums run in double (long double where an input is double) and are rounded once. Equal
    weights become a sum and one division, so uniform means are those of exact arithmetic wherever the sum is exact. Blocks have one shape
    whatever the tile, so the bits depend neither on tiles nor on threads. A lone weight of 1 copies bytes; what is no float is copied
    from the newest checkpoint of its row.
    """
    last = [int(np.flatnonzero(weights)[-1]) for weights in rows]
    if dtypes[0] not in FLOATS:
        return [raws[n].copy() for n in last]
    count = len(raws[0]) // itemsize(dtypes[0])
    outs = [raws[n].copy() if weights[n] == 1 and np.count_nonzero(weights) == 1 and dtypes[n] == dtype else
            None for weights, n, dtype in zip(rows, last, out_dtypes, strict=True)]
    todo = [m for m, out in enumerate(outs) if out is None]
    outs = [np.empty(count * itemsize(dtype), np.uint8) if out is None else out for out, dtype in zip(outs, out_dtypes, strict=True)]
    wide = np.longdouble if "F64" in dtypes else np.float64
    uniform = np.array([np.ptp(weights[weights != 0]) == 0 for weights in rows])
    divisor = np.where(uniform, np.count_nonzero(rows, axis=1), 1).astype(wide)
    rows = np.where(uniform[:, None], rows != 0, rows).astype(wide)
    bands = [(band, np.flatnonzero(rows[band].any(axis=0))) for band in (todo[i:i + 8] for i in range(0, len(todo), 8))]
    x = np.zeros((len(raws), BLOCK), wide)
    for start in range(0, count if todo else 0, BLOCK):
        stop = min(start + BLOCK, count)
        for n, (raw, dtype) in enumerate(zip(raws, dtypes, strict=True)):
            _widen(raw[start * itemsize(dtype):stop * itemsize(dtype)], dtype, x[n])
        for band, used in bands:  # neighbouring targets share most of their window: multiply that band of checkpoints only
            y = rows[band, used[0]:used[-1] + 1] @ x[used[0]:used[-1] + 1]
            y /= divisor[band, None]
            for m, values in zip(band, y, strict=True):
                size = itemsize(out_dtypes[m])
                _narrow(values[:stop - start], out_dtypes[m], outs[m][start * size:stop * size])
    if len(rows) > 1:  # 0 * NaN is NaN: a row that came out so is mixed again from its own checkpoints alone
        for m in [m for m in todo if not _finite(outs[m], out_dtypes[m])]:
            own = np.flatnonzero(rows[m])
            outs[m], = mix(rows[m:m + 1, own] / divisor[m], [raws[n] for n in own], [dtypes[n] for n in own], [out_dtypes[m]])
    return outs


# ---- 5. Averages in memory ----------------------------------------------------------------------------------------------------------

def average(source, scheme=None, at: int | None = None, key: str | None = None) -> dict:
    """The average of a trajectory as {name: torch.Tensor}, fresh, on the CPU.

    Args: source: what `open_trajectory` takes; scheme: default the uniform mean of everything up to `at`; at: step, default the newest;
    key: as in `open_checkpoint`. Errors: LawaError for checkpoints that do not fit together, NaN, Inf.
    """
    trajectory = open_trajectory(source, key)
    weights = row(scheme or swa(), trajectory.steps, trajectory.steps[-1] if at is None else at)
    opened, coefficients, state = _open_steps(trajectory, weights), np.array([list(weights.values())]), {}
    for name, last in opened[max(opened)].entries.items():
        entries = [checkpoint.entries[name] for checkpoint in opened.values()]
        raws = [entry.read() for entry in entries]
        data, = mix(coefficients, raws, [entry.dtype for entry in entries], [last.dtype])
        if last.dtype in FLOATS and not _finite(data, last.dtype):
            raise LawaError("; ".join(_blame(name, entries, raws, last.dtype)))
        state[name] = _tensor(data, last.dtype, last.shape)
    return _tied(state, opened[max(opened)].aliases)


def _blame(name: str, entries: list[Entry], raws: list[np.ndarray], out_dtype: str) -> list[str]:
    """Who made an average of tensor `name` non-finite."""
    guilty = [f"{entry.path}: {name} holds NaN or Inf; leave it out (or --allow nonfinite)"
              for entry, raw in zip(entries, raws, strict=True) if not _finite(raw, entry.dtype)]
    return guilty or [f"{name} overflows {out_dtype} in the average; write it with a wider --dtype"]


def sweep(source, schemes: Mapping[str, Callable], at=None, key: str | None = None) -> Iterator[tuple[int, str, dict]]:
    """Yield (step, name, {tensor name: fresh torch.Tensor}) for every target step in `at` (default: all) and every scheme, in step order.

    Each checkpoint is read once. Memory: the checkpoints of the widest open window, in their own dtype; a scheme whose row at one target
    extends its row at the target before (EMA, SWA) keeps a running average in double instead.
    """
    trajectory = open_trajectory(source, key)
    targets = sorted(trajectory.steps if at is None else at)
    rows = {name: {target: row(scheme, trajectory.steps, target) for target in targets} for name, scheme in schemes.items()}
    needed = sorted({step for scheme in rows.values() for weights in scheme.values() for step in weights}.union(targets))
    opened = _open_steps(trajectory, needed, allow=("duplicates", "averages"))
    running = {name: _Running(scheme) for name, scheme in rows.items() if _extending(scheme)}
    keep = {step: max([t for name, scheme in rows.items() if name not in running for t in scheme if step in scheme[t]], default=step)
            for step in needed}  # the last target whose window holds the step
    held: dict[int, dict[str, np.ndarray]] = {}
    for step in needed:
        entries = opened[step].entries
        held[step] = {name: entry.read() for name, entry in entries.items()}
        for scheme in running.values():
            scheme.add(step, held[step], entries)
        for name in schemes if step in targets else ():
            data = running[name].result(entries) if name in running else _mix_held(rows[name][step], held, opened)
            yield step, name, _tied({n: _tensor(raw, entries[n].dtype, entries[n].shape) for n, raw in data.items()}, opened[step].aliases)
        held = {s: tensors for s, tensors in held.items() if keep[s] > step}


def _mix_held(weights: Mapping[int, float], held, opened) -> dict[str, np.ndarray]:
    coefficients, dtypes = np.array([list(weights.values())]), {n: entry.dtype for n, entry in opened[max(weights)].entries.items()}
    return {name: mix(coefficients, [held[s][name] for s in weights], [opened[s].entries[name].dtype for s in weights], [dtype])[0]
            for name, dtype in dtypes.items()}


def stream(source, schemes: Mapping[str, Callable], at=None, on_disk: bool = False, allow=()) -> Iterator[tuple[int, str, dict]]:
    """`sweep` for checkpoints that are far away, or too big to open all at once: opened in order, let go after their last window.

    Yields as `sweep` does, but a state is the caller's to read only, until the next is asked for. Memory: the checkpoints of the widest
    window in their own dtype, of which the oldest makes room for the average; on_disk: the average alone, from files, tile by tile.
    Errors: LawaError for checkpoints that do not fit together, or hold identical weights unless "duplicates" is in `allow`.
    """
    trajectory = open_trajectory(source)
    rows, needed, last = _schedule(trajectory, schemes, at)
    trajectory.expect(needed)
    held, seen, before = {}, {}, None
    for step in needed:
        checkpoint = trajectory[step]
        problems = list(_mismatches(checkpoint, before or checkpoint))
        if (twin := seen.setdefault(checkpoint.sample, step)) != step and "duplicates" not in (*allow, *trajectory.allow):
            problems.append(f"steps {twin} and {step} of {trajectory.name} hold identical weights, so one is a wrong file; leave it out, "
                            f"or allow duplicates")
        if problems:
            raise LawaError("; ".join(problems))
        held[step] = {name: entry if on_disk else entry.in_memory() for name, entry in checkpoint.entries.items()}
        if not on_disk:
            trajectory.release(step)
        before = Checkpoint(checkpoint.path, {name: dataclasses.replace(e, load=None) for name, e in checkpoint.entries.items()}, checkpoint.aliases)
        for name, scheme in rows.items():
            if step in scheme:
                spent = [s for s in held if last[s] <= step and name == next(reversed(rows)) and not on_disk]
                yield step, name, _tied(_weigh(scheme[step], held, spent), checkpoint.aliases)
        for spent in [s for s in held if last[s] <= step]:
            del held[spent]
            if on_disk:
                trajectory.release(spent)


def _schedule(trajectory: Trajectory, schemes: Mapping[str, Callable], at) -> tuple[dict, list[int], dict[int, int]]:
    """({scheme: {target: row}}, the steps needed in order, {step: the last target that needs it})."""
    targets = sorted(trajectory.steps if at is None else at)
    rows = {name: {target: row(scheme, trajectory.steps, target) for target in targets} for name, scheme in schemes.items()}
    last = {step: target for target in targets for scheme in rows.values() for step in (*scheme[target], target)}
    return rows, sorted(last), last


def _weigh(weights: Mapping[int, float], held: Mapping[int, dict[str, Entry]], spent=()) -> dict:
    """One row over entries, {name: torch.Tensor}. Steps that are `spent` lose their entries: the average is written over the oldest."""
    state, coefficients = {}, np.array([list(weights.values())])
    for name in list(held[max(weights)]):
        entries = [held[step][name] for step in weights]
        state[name] = _tensor(_mix_tiles(coefficients, name, entries, min(weights) in spent), entries[-1].dtype, entries[-1].shape)
        for step in spent:
            held[step].pop(name, None)
    return state


def _mix_tiles(coefficients: np.ndarray, name: str, entries: list[Entry], overwrite: bool) -> np.ndarray:
    dtypes, oldest, newest = [entry.dtype for entry in entries], entries[0], entries[-1]
    if len(entries) == 1:
        return (newest if newest.load else newest.in_memory()).loaded
    out = oldest.loaded if overwrite and oldest.load and oldest.dtype == newest.dtype else _pages(newest.nbytes)

    def tile(start):
        stop = min(start + TILE // 2, newest.numel)
        raws = [entry.read(start * itemsize(entry.dtype), stop * itemsize(entry.dtype), copy=False) for entry in entries]
        mixed, = mix(coefficients, raws, dtypes, [newest.dtype])
        if newest.dtype in FLOATS and not _finite(mixed, newest.dtype):
            raise LawaError("; ".join(_blame(name, entries, raws, newest.dtype)))
        out[start * itemsize(newest.dtype):stop * itemsize(newest.dtype)] = mixed
    with ThreadPoolExecutor(max((os.cpu_count() or 2) - 1, 1)) as pool:
        list(pool.map(tile, range(0, newest.numel, TILE // 2)))
    return out


def _ratio(before: Mapping[int, float], after: Mapping[int, float], boundary: int) -> float | None:
    """c if the row `after`, up to the step `boundary`, is c times the row `before`; None if it is not."""
    old = {step: weight for step, weight in after.items() if step <= boundary}
    pivot = max(before, key=lambda step: abs(before[step]))
    ratio = old.get(pivot, 0.0) / before[pivot]
    return ratio if all(abs(old.get(s, 0.0) - ratio * before.get(s, 0.0)) <= 1e-12 for s in before.keys() | old.keys()) else None


def _extending(scheme: Mapping[int, Mapping[int, float]]) -> bool:
    """Whether each target's row extends the one before; a scheme of one target or of single checkpoints needs no running average."""
    return max(map(len, scheme.values())) > 1 and all(_ratio(scheme[a], scheme[b], a) is not None for a, b in pairwise(scheme))


class _Running:
    """The average of a scheme whose rows extend one another: one sum in double, to which each passing checkpoint is added."""

    def __init__(self, rows: Mapping[int, Mapping[int, float]]):
        self.rows, self.target, self.sums = rows, None, {}

    def add(self, step: int, raws: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> None:
        target = min((t for t in self.rows if t >= step), default=None)
        if target is None:
            return
        scale = 1.0 if self.target in (None, target) else _ratio(self.rows[self.target], self.rows[target], self.target)
        self.target, weight = target, self.rows[target].get(step, 0.0)
        for name, entry in entries.items():
            if entry.dtype not in FLOATS:
                self.sums[name] = raws[name] if weight else self.sums.get(name, raws[name])
            elif weight or scale != 1:
                values = np.empty(entry.numel, np.longdouble if entry.dtype == "F64" else np.float64)
                _widen(raws[name], entry.dtype, values)
                values *= weight
                self.sums[name] = values + scale * self.sums[name] if scale and name in self.sums else values

    def result(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
        out = {name: np.empty(entries[name].nbytes, np.uint8) for name in self.sums}
        for name, values in self.sums.items():
            if entries[name].dtype in FLOATS:
                _narrow(values, entries[name].dtype, out[name])
            else:
                out[name][:] = values
        return out


# ---- 6. Averages from file to file --------------------------------------------------------------------------------------------------

TILE = 1 << 20  # bytes read at a time from each checkpoint
IN_MEMORY = 1 << 26  # bytes of tiles at most: with many checkpoints they shrink, so memory does not grow with k or N
COPIED = ("config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
          "chat_template*")  # what a Hugging Face folder holds beside its weights


class _Output:
    """A file or Hugging Face folder being written: under a hidden name until it is whole."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], aliases: Mapping[str, str], provenance: dict, max_shard: int):
        self.path, self.is_folder, self.provenance = path, path.suffix not in SUFFIXES, provenance
        self.part = path.parent / f".{path.name}.part"
        shards = _shards(entries, max_shard) if self.is_folder else {"": entries}
        layouts = {self.part / file: _header(shard, {"format": "pt", "lawa": json.dumps(provenance), **aliases}) for file, shard in shards.items()}
        self.headers = {file: (header, size) for file, (header, _, size) in layouts.items()}
        self.places = {name: (file, offset) for file, (_, offsets, _) in layouts.items() for name, offset in offsets.items()}
        self.nbytes = sum(size for _, size in self.headers.values())

    def open(self, stack: contextlib.ExitStack, fresh: bool) -> None:
        (self.part if self.is_folder else self.part.parent).mkdir(parents=True, exist_ok=True)
        self.files = {file: stack.enter_context(open(file, "wb" if fresh else "r+b", buffering=0)) for file in self.headers}
        for file, (header, size) in self.headers.items():
            os.pwrite(self.files[file].fileno(), header, 0)
            self.files[file].truncate(size)

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        (file, offset), done = self.places[name], 0
        while done < len(data):
            done += os.pwrite(self.files[file].fileno(), data[done:], offset + start + done)

    def finish(self, like: Path | None, dtype: str) -> None:
        """Verify with the safetensors library, convert or complete, rename."""
        from safetensors import safe_open
        found = set()
        for file in self.headers:
            with safe_open(file, "numpy") as opened:
                found |= set(opened.keys())
        if found != set(self.places):
            raise LawaError(f"{self.path}: verification failed, the file written lacks {sorted(set(self.places) - found)[:3]}")
        if self.is_folder:
            self._complete_folder(like, dtype)
        elif self.path.suffix != ".safetensors":
            whole = _open_safetensors(self.part)
            save(self.path, _tied({name: whole[name] for name in whole.entries}, whole.aliases))
            Path(f"{self.path}.lawa.json").write_text(json.dumps(self.provenance, indent=1))
            return self.discard()
        os.replace(self.part, self.path)

    def _complete_folder(self, like: Path | None, dtype: str) -> None:
        if len(self.headers) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": {name: file.name for name, (file, _) in self.places.items()}}
            (self.part / INDEXES[0]).write_text(json.dumps(index, indent=1))
        for source in [path for pattern in COPIED for path in sorted(like.glob(pattern))] if like else []:
            shutil.copyfile(source, self.part / source.name)
        if (config := self.part / "config.json").exists():
            fields = json.loads(config.read_text())
            names = [name for name in ("dtype", "torch_dtype") if name in fields] or ["dtype"]
            config.write_text(json.dumps(fields | dict.fromkeys(names, DTYPES[dtype][1]), indent=2))

    def discard(self) -> None:
        shutil.rmtree(self.part, ignore_errors=True) if self.part.is_dir() else self.part.unlink(missing_ok=True)


def _shards(entries: Mapping[str, Entry], max_shard: int) -> dict[str, dict[str, Entry]]:
    """Hugging Face's names and order: tensors fill a shard until `max_shard` bytes."""
    groups, size = [{}], 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.nbytes > max_shard:
            groups, size = [*groups, {}], 0
        groups[-1][name] = entry
        size += entry.nbytes
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    return dict(zip(names if len(groups) > 1 else SINGLES[:1], groups, strict=True))


def average_files(source, outputs: Mapping, *, dtype: str | None = None, threads: int | None = None, tile: int = TILE, progress=None,
                  allow=(), key: str | None = None, like=None, max_shard: int = 5_000_000_000) -> dict:
    """Write averages from file to file: every input byte read once, memory independent of model size and number of checkpoints.

    Args: source: what `open_trajectory` takes; outputs: {path: (scheme, at)}, a path ending in .safetensors or .pt, or else a Hugging Face
    folder (sharded beyond `max_shard` bytes; config and tokenizer copied from the folder `like`, default the newest input's); dtype: "F32",
    "BF16", ... for the float tensors, default each tensor's in the newest; threads: default one per core; tile: bytes; progress: called
    with (bytes done, bytes in all); allow: any of "nonfinite", "duplicates", "averages".
    Returns a report: outputs with their weights, bytes read and written, seconds. Errors: LawaError, and nothing is visible under an
    output's name. Killed, the same call goes on where it was.
    """
    begun, trajectory = time.perf_counter(), open_trajectory(source, key)
    rows = {Path(path): row(scheme, trajectory.steps, at) for path, (scheme, at) in outputs.items()}
    opened = _open_steps(trajectory, {step for weights in rows.values() for step in weights}, allow)
    newest = opened[max(opened)]
    entries = {name: dataclasses.replace(e, dtype=dtype if dtype and e.dtype in FLOATS else e.dtype) for name, e in newest.entries.items()}
    sinks = [_Output(path, entries, newest.aliases, _provenance(opened, weights, *target), max_shard)
             for (path, weights), target in zip(rows.items(), outputs.values(), strict=True)]
    _refuse(sinks, opened)
    job = _Job(opened, list(rows.values()), entries, sinks, tile, allow)
    try:
        job.run(threads or os.cpu_count() or 1, progress)
        for sink in sinks:
            sink.finish(Path(like or newest.path), dtype or next((e.dtype for e in entries.values() if e.dtype in FLOATS), "F32"))
    except KeyboardInterrupt:
        raise  # what is written stays under its hidden name for the next call
    except BaseException as error:
        for sink in sinks:
            sink.discard()
        job.journal.unlink(missing_ok=True)
        raise LawaError(f"cannot write {sinks[0].path}: {error.strerror}; {sum(sink.nbytes for sink in sinks):,} bytes are needed"
                        ) from None if isinstance(error, OSError) else error
    job.journal.unlink(missing_ok=True)
    return {"outputs": [{"path": str(sink.path), "bytes": sink.nbytes, **sink.provenance} for sink in sinks],
            "bytes_read": sum(checkpoint.nbytes for checkpoint in opened.values()), "bytes_written": sum(sink.nbytes for sink in sinks),
            "seconds": round(time.perf_counter() - begun, 3)}


def sweep_files(source, schemes: Mapping[str, Callable], at, out_dir, **options) -> dict:
    """Write out_dir/<name>/ckpt_<step>.safetensors for every scheme and target step in one pass; each folder is again a trajectory."""
    outputs = {Path(out_dir) / name / checkpoint_name(step): (scheme, step) for name, scheme in schemes.items() for step in at}
    return average_files(source, outputs, **options)


def _provenance(opened: Mapping[int, Checkpoint], weights: Mapping[int, float], scheme, at: int) -> dict:
    inputs = [{"step": step, "file": str(Path(*opened[step].path.parts[-2:])), "bytes": opened[step].nbytes, "sample_sha256": opened[step].sample}
              for step in weights]
    return {"version": __version__, "scheme": str(scheme), "at": at, "weights": {str(step): w for step, w in weights.items()}, "inputs": inputs}


def _refuse(sinks: list[_Output], opened: Mapping[int, Checkpoint]) -> None:
    """Refuse outputs that would do harm: an input, a folder in use, a disk too small."""
    inputs = {Path(path).resolve() for c in opened.values() for path in (c.path, *(entry.path for entry in c.entries.values()))}
    for sink in sinks:
        if sink.path.resolve() in inputs:
            raise LawaError(f"{sink.path} is an input; choose another output")
        if sink.path.is_dir() and (not sink.is_folder or any(sink.path.iterdir())):
            raise LawaError(f"{sink.path} is a folder that is not empty; choose another output, or remove it")
    parent = next(path for path in sinks[0].path.resolve().parents if path.exists())
    if (need := sum(sink.nbytes for sink in sinks)) > (free := shutil.disk_usage(parent).free):
        raise LawaError(f"disk full: {need:,} bytes are needed in {parent}, {free:,} are free")


class _Job:
    """The tiles of all tensors, mixed by threads: each tile of every checkpoint read once, each tile of every output written once.

    A journal beside the first output counts the tiles on disk, at most once a second, so that a killed job goes on where it was.
    """

    def __init__(self, opened: Mapping[int, Checkpoint], rows, entries: Mapping[str, Entry], sinks: list[_Output], tile: int, allow):
        self.inputs = {name: [checkpoint.entries[name] for checkpoint in opened.values()] for name in entries}
        self.rows = np.array([[weights.get(step, 0.0) for step in opened] for weights in rows])
        self.entries, self.sinks, self.allow, self.problems = entries, sinks, allow, set()
        width = max(min(tile, IN_MEMORY // (len(opened) + len(rows))) // 8 // BLOCK, 1) * BLOCK  # values, in whole blocks
        self.tasks = [(name, start, min(start + width, entry.numel)) for name, entry in entries.items() for start in range(0, entry.numel, width)]
        self.journal = sinks[0].path.parent / f".{sinks[0].path.name}.journal"
        self.plan = hashlib.sha256(repr((width, self.rows.tolist(), [(s.path, s.nbytes) for s in sinks],
                                         [(c.path, c.sample) for c in opened.values()])).encode()).hexdigest()

    def run(self, threads: int, progress) -> None:
        first, total, noted = self._resumed(), sum(e.nbytes for entries in self.inputs.values() for e in entries), time.monotonic()
        with contextlib.ExitStack() as stack:
            for sink in self.sinks:
                sink.open(stack, fresh=first == 0)
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            stack.callback(pool.shutdown, cancel_futures=True)
            done = sum(self._read(task) for task in self.tasks[:first])
            for number, (task, _) in enumerate(zip(self.tasks[first:], pool.map(self._mix, self.tasks[first:]), strict=True), first + 1):
                done += self._read(task)
                if progress:
                    progress(done, total)
                if time.monotonic() - noted > 1:
                    noted = time.monotonic()
                    with replacing(self.journal) as part:
                        part.write_text(json.dumps([self.plan, number]))
                for entry in self.inputs[task[0]] if task[2] == self.entries[task[0]].numel else ():
                    entry.__dict__.pop("loaded", None)  # frees torch tensors that had to be copied
        if self.problems:
            raise LawaError("; ".join(sorted(self.problems)))

    def _resumed(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            plan, number = json.loads(self.journal.read_text())
            if plan == self.plan and all(file.stat().st_size == size for s in self.sinks for file, (_, size) in s.headers.items()):
                return number
        return 0

    def _read(self, task) -> int:
        return (task[2] - task[1]) * sum(itemsize(entry.dtype) for entry in self.inputs[task[0]])

    def _mix(self, task) -> None:
        name, start, stop = task
        inputs, dtype = self.inputs[name], self.entries[name].dtype
        raws = [entry.read(start * itemsize(entry.dtype), stop * itemsize(entry.dtype)) for entry in inputs]
        for weights, sink, data in zip(self.rows, self.sinks, mix(self.rows, raws, [e.dtype for e in inputs], [dtype] * len(self.sinks)), strict=True):
            if "nonfinite" not in self.allow and dtype in FLOATS and not _finite(data, dtype):
                own = np.flatnonzero(weights)
                self.problems.update(_blame(name, [inputs[n] for n in own], [raws[n] for n in own], dtype))
            sink.write(name, start * itemsize(dtype), data)


# ---- 7. Search ----------------------------------------------------------------------------------------------------------------------

def search(source, evaluate: Callable[[dict], object], at: int | None = None, budget: int = 12, ks=(2, 3, 5, 8, 12), key=None) -> dict:
    """The best LAWA window on a trajectory, in at most `budget` evaluations.

    Args: source: what `open_trajectory` takes; evaluate: {name: tensor} -> validation loss, or the losses of equally many blocks (paired, so
    that the answer comes with a standard error); lower is better; at: step, default the newest; budget: evaluations, the run's own included.
    How: what decides is the window's span k * spacing (2507.17634), and gain against span is an inverted U; so a golden-section-like search over
    spans at the middle k, then the other k at the best span.
    Returns {"best": scheme, "gain", "gain_se", "sure": text, "trials": [{"scheme", "loss", "gain", "gain_se"}]}. Mutates nothing.
    """
    trajectory = open_trajectory(source, key)
    at = trajectory.steps[-1] if at is None else at
    losses: dict[object, np.ndarray] = {}

    def loss(scheme) -> float:
        if scheme not in losses and len(losses) < budget:
            losses[scheme] = np.atleast_1d(np.asarray(evaluate(average(trajectory, scheme, at)), float))
        return float(losses[scheme].mean()) if scheme in losses else math.inf

    def fits(scheme) -> bool:
        with contextlib.suppress(LawaError):
            return len(row(scheme, trajectory.steps, at)) == scheme.k
        return False
    back = [at - step for step in trajectory.steps if step < at]
    windows = [scheme for k in ks for spacing in back for scheme in [lawa(k, spacing)] if fits(scheme)]
    if not windows:
        raise LawaError(f"no window of {ks[0]} or more evenly spaced checkpoints ends at step {at}; there are {_some(trajectory.steps)}")
    run, middle = newest(), sorted(ks)[len(ks) // 2]
    loss(run)
    line = sorted([w for w in windows if w.k == middle] or windows, key=lambda w: w.k * w.spacing)
    low, high = 0, len(line) - 1
    while low < high and len(losses) < budget - len(ks) + 1:  # spans in order: the loss falls, then rises
        left = (low + high) // 2
        low, high = (low, left) if loss(line[left]) <= loss(line[left + 1]) else (left + 1, high)
    best = min(losses.keys() - {run} or {line[low]}, key=loss)
    for scheme in sorted(windows, key=lambda w: abs(math.log(w.k * w.spacing / (best.k * best.spacing)))):
        loss(scheme)
    return _verdict(losses, run)


def _verdict(losses: Mapping, run) -> dict:
    best, trials = min(losses, key=lambda scheme: losses[scheme].mean()), []
    for scheme, values in losses.items():
        gains = losses[run] - values  # paired block by block
        error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
        trials.append({"scheme": str(scheme), "loss": float(values.mean()), "gain": float(gains.mean()), "gain_se": error})
    top = next(trial for trial in trials if trial["scheme"] == str(best))
    if not top["gain_se"]:
        sure = "no spread known: the validation gave one number per model; give one per block to learn how sure this is"
    else:
        close = sum(losses[s].mean() - losses[best].mean() < 2 * np.std(losses[s] - losses[best], ddof=1) / math.sqrt(len(losses[s])) for s in losses if s != best)
        sure = f"gain {top['gain']:+.4f} +- {top['gain_se']:.4f} (standard error over {len(losses[run])} blocks); {close} other windows are within 2 standard errors"
    return {"best": best, "gain": top["gain"], "gain_se": top["gain_se"], "sure": sure, "trials": trials}


# ---- 8. Online averages -------------------------------------------------------------------------------------------------------------

def live_state(model) -> dict:
    """{name: the model's own tensor}, through DDP and torch.compile wrappers; tied tensors under their first name only."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    entries = {}
    for name, tensor in model.state_dict(keep_vars=False).items():
        if not any(tensor.is_set_to(other) for other in entries.get(tensor.data_ptr(), {}).values()):
            entries.setdefault(tensor.data_ptr(), {})[name] = tensor
    return {name: tensor for group in entries.values() for name, tensor in group.items()}


class _Online:
    """What LAWA, EMA and SWA share: when to update, and swapping the average into the model. Averages never feed back into training."""

    def __init__(self, model, every: int, start: int):
        _positive(every=every)
        self.model, self.every, self.start, self.others = model, every, start, {}

    def update(self, step: int) -> None:
        """Call after every optimizer.step() with the number of steps done; steps before `start` or off the grid are ignored."""
        if step >= self.start and (step - self.start) % self.every == 0:
            live = live_state(self.model)
            self.others = {name: tensor.clone() for name, tensor in live.items() if not tensor.is_floating_point()}
            self._take(step, {name: tensor for name, tensor in live.items() if tensor.is_floating_point()})

    @contextlib.contextmanager
    def swapped(self, *which):
        """Inside, the model holds the average (of the given beta, for an EMA of several); after, its own weights again, to the bit."""
        import torch
        live, averaged = live_state(self.model), self.average(*which)
        own = {name: tensor.clone() for name, tensor in live.items()}
        with torch.no_grad():
            try:
                for name, tensor in live.items():
                    tensor.copy_(averaged[name])
                yield self.model
            finally:
                for name, tensor in live.items():
                    tensor.copy_(own[name])


class LAWA(_Online):
    """The last k snapshots, `spacing` steps apart, as a window on the CPU or, with `folder`, on disk as a trajectory of checkpoints.

    A push costs one copy of the weights. `average()` is the mean of what the window holds, {name: CPU tensor}, bit for bit what
    `average` makes of the same checkpoints on disk. Source: arXiv 2306.03241.
    """

    def __init__(self, model, k: int, spacing: int, start: int = 0, folder=None):
        super().__init__(model, spacing, start)
        _positive(k=k)
        self.k, self.folder, self.window = k, folder and Path(folder), {}  # window: {step: {name: tensor}, or the file's path}

    def _take(self, step, live):
        import torch
        oldest = self.window.pop(min(self.window)) if len(self.window) == self.k else None
        if self.folder:
            self.window[step] = str(self.folder / checkpoint_name(step))
            save(self.window[step], live | self.others)
            if oldest:
                Path(oldest).unlink(missing_ok=True)
            return
        slot = oldest or {name: torch.empty_like(tensor, device="cpu") for name, tensor in live.items()}
        torch._foreach_copy_(list(slot.values()), [tensor.detach() for tensor in live.values()])
        self.window[step] = slot

    def average(self) -> dict:
        if not self.window:
            raise LawaError("the window is empty: call update(step) first")
        if self.folder:
            return average(list(self.window.values()))
        snapshots = [_as_entries(snapshot, "window")[0] for snapshot in self.window.values()]
        rows = np.full((1, len(snapshots)), 1 / len(snapshots))
        mixed = {name: mix(rows, [s[name].loaded for s in snapshots], [s[name].dtype for s in snapshots], [e.dtype])[0] for name, e in snapshots[0].items()}
        return {name: _tensor(data, snapshots[0][name].dtype, snapshots[0][name].shape) for name, data in mixed.items()} | self.others

    def state_dict(self) -> dict:
        return {"window": {step: held if self.folder else {n: t.clone() for n, t in held.items()} for step, held in self.window.items()},
                "others": dict(self.others)}

    def load_state_dict(self, state: Mapping) -> None:
        self.window = {step: held if self.folder else {n: t.clone() for n, t in held.items()} for step, held in state["window"].items()}
        self.others = dict(state["others"])


class EMA(_Online):
    """e <- e + (1 - beta)(w - e) every `every` steps since `start`, begun at the first w; one `beta` or several in one pass.

    Kept in `dtype`, on the parameters' device. In float32 it strays from the closed form by up to about 1 / (1 - beta) / 2 ulp, as every
    fp32 EMA does; float64 agrees to 1 ulp. Parameters that do not move keep their bits.
    """

    def __init__(self, model, betas, every: int = 1, start: int = 0, dtype=None):
        import torch
        super().__init__(model, every, start)
        self.betas, self.dtype, self.shadows = tuple(map(float, np.atleast_1d(betas))), dtype or torch.float32, {}
        for beta in self.betas:
            ema(beta)  # refuses a beta outside [0, 1)

    def _take(self, step, live):
        import torch
        values = [tensor.detach().to(self.dtype) for tensor in live.values()]
        for beta in self.betas:
            if beta in self.shadows:
                torch._foreach_lerp_(list(self.shadows[beta].values()), values, 1 - beta)
            else:
                self.shadows[beta] = {name: value.clone() for name, value in zip(live, values, strict=True)}

    def average(self, beta: float | None = None) -> dict:
        beta = self.betas[0] if beta is None else beta
        if beta not in self.shadows:
            raise LawaError(f"no average for beta {beta}: " + ("call update(step) first" if beta in self.betas else f"there are {self.betas}"))
        live = live_state(self.model)
        return {name: value.to(live[name].dtype, copy=True) for name, value in self.shadows[beta].items()} | self.others

    def state_dict(self) -> dict:
        return {"shadows": {beta: {n: t.clone() for n, t in shadow.items()} for beta, shadow in self.shadows.items()}, "others": dict(self.others)}

    def load_state_dict(self, state: Mapping) -> None:
        self.shadows = {beta: {n: t.clone() for n, t in shadow.items()} for beta, shadow in state["shadows"].items()}
        self.others = dict(state["others"])


class SWA(_Online):
    """The uniform mean of every `every`-th step since `start`, kept as a sum in double (arXiv 1803.05407)."""

    def __init__(self, model, start: int = 0, every: int = 1):
        super().__init__(model, every, start)
        self.sums, self.count = {}, 0

    def _take(self, step, live):
        for name, tensor in live.items():
            self.sums[name] = self.sums[name] + tensor.detach() if self.count else tensor.detach().double()
        self.count += 1

    def average(self) -> dict:
        if not self.count:
            raise LawaError("nothing averaged yet: call update(step) from step `start` on")
        live = live_state(self.model)
        return {name: (total / self.count).to(live[name].dtype) for name, total in self.sums.items()} | self.others

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "count": self.count, "others": dict(self.others)}  # the sums are replaced, never changed in place

    def load_state_dict(self, state: Mapping) -> None:
        self.sums, self.count, self.others = dict(state["sums"]), state["count"], dict(state["others"])


# ---- 9. Command line ----------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples
  lawa inspect runs/my-run                                       what is there, what is wrong with it
  lawa average ckpt_800.pt ckpt_900.pt ckpt_1000.pt -o avg.pt    the mean of these three
  lawa average runs/my-run -k 5 --spacing 1000 -o avg.safetensors
  lawa average runs/my-run --scheme "ema(beta=0.99)" --at 20000 --dtype BF16 -o hf-folder
  lawa sweep runs/my-run --scheme "lawa(k=5, spacing=1000)" --scheme "decay(window=5000)" --every 1000 -o averages/
  lawa search runs/my-run --command "python validate.py {}"      the best window; the command prints the loss, or one per block
  lawa export averages/lawa/ckpt_20000.safetensors --like hf-folder -o new-hf-folder
exit status: 0 done, 1 the job failed, 2 bad usage or input, 130 interrupted (the same command goes on)"""


class Progress:
    """A bar with rate and time left on a terminal; nothing elsewhere."""

    def __init__(self, unit: str = "GB", scale: float = 1e9):
        self.begun, self.shown, self.unit, self.scale = time.monotonic(), 0.0, unit, scale

    def __call__(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self.shown > 0.1 or done >= total):
            self.shown, rate = now, done / max(now - self.begun, 1e-9)
            sys.stderr.write(f"\r[{'#' * int(30 * done / max(total, 1)):<30}] {done / self.scale:.4g} of {total / self.scale:.4g} {self.unit}, "
                             f"{rate / self.scale:.3g} {self.unit}/s, {(total - done) / max(rate, 1e-9):.0f} s left {note} " + "\n" * (done >= total))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lawa", description="Average the checkpoints of a training run.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *groups):
        sub = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("inputs", nargs="+", metavar="CKPT", help="checkpoints (.safetensors, .pt, Hugging Face or distributed folders), or one run "
                         "folder or glob; steps are read from the names")
        sub.add_argument("--key", help="where a nested .pt holds its weights (default: model, state_dict, module, or at the top)")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        for group in groups:
            group(sub)

    def scheme(sub):
        sub.add_argument("--scheme", action="append", default=[], help="a row of weights: lawa(k=5, spacing=100), swa(start=0, every=10), ema(beta=0.99), "
                         "decay(window=1000, shape='1-sqrt'), explicit([0.2, 0.8]); default: the uniform mean of all inputs")
        sub.add_argument("-k", "--k", type=int, help="LAWA: checkpoints in the window")
        sub.add_argument("--spacing", type=int, help="LAWA: steps between them (default: the k latest there are)")
        sub.add_argument("--weights", help="explicit weights, oldest first: 0.2,0.3,0.5 (divided by their sum)")
        sub.add_argument("--tokens-per-step", type=int, help="durations in schemes are in tokens, this many per step")

    def target(sub):
        sub.add_argument("--at", type=int, help="the step to average at (default: the newest)")

    def output(sub):
        sub.add_argument("-o", "--out", required=True, help="FILE.safetensors, FILE.pt or a new Hugging Face folder; for sweep a folder")
        sub.add_argument("--dtype", type=str.upper, choices=FLOATS, help="type of the float tensors written (default: the newest input's)")
        sub.add_argument("--like", help="Hugging Face folder to copy config and tokenizer from (default: the newest input, if it is one)")
        sub.add_argument("--max-shard", type=float, default=5, help="GB per shard of a Hugging Face folder (default 5)")
        sub.add_argument("--threads", type=int, help="default: one per core")
        sub.add_argument("--allow", action="append", default=[], choices=["nonfinite", "duplicates", "averages"], help="average in spite of NaN or Inf, "
                         "byte-identical checkpoints, averages among the inputs")
    command("inspect", "Show a trajectory: steps, spacing, size, types, distance between neighbours, problems.")
    command("average", "Write one average of checkpoints.", scheme, target, output)
    command("sweep", "Write the averages of several schemes at many steps, in one pass over the checkpoints.", scheme, output,
            lambda sub: sub.add_argument("--every", type=int, help="steps between targets (default: every checkpoint)"))
    command("search", "Find the best LAWA window with a validation command.", target,
            lambda sub: sub.add_argument("--command", dest="run", required=True, help="program with {} for the checkpoint; prints the loss, or one per block"),
            lambda sub: sub.add_argument("--budget", type=int, default=12, help="evaluations at most (default 12)"))
    command("export", "Write one checkpoint as a Hugging Face folder.", target, output)
    return parser


def _scheme(args) -> dict[str, Callable]:
    """{name: scheme} from the command line; the names are folder names."""
    texts = {re.sub(r"[^\w.=-]+", "-", text).strip("-"): parse_scheme(text) for text in getattr(args, "scheme", [])}
    if getattr(args, "weights", None):
        texts["explicit"] = parse_scheme(f"explicit([{args.weights}], spacing={args.spacing})")
    elif getattr(args, "k", None) is not None:
        texts["lawa"] = lawa(args.k, args.spacing)
    if getattr(args, "tokens_per_step", None):
        texts = {name: in_steps(scheme, args.tokens_per_step) for name, scheme in texts.items()}
    return texts or {"mean": newest() if args.command == "export" else swa()}


def _inspect(trajectory: Trajectory) -> dict:
    """What `lawa inspect` shows. Distance: norm of the difference to the checkpoint before, relative to the norm; reads every byte once."""
    table, before, progress = [], None, Progress()
    for number, step in enumerate(trajectory.steps):
        checkpoint = trajectory[step]
        now = {name: tensor.double() for name, tensor in checkpoint.items() if tensor.is_floating_point() and name in checkpoint.entries}
        norm = math.sqrt(sum(float(t.square().sum()) for t in now.values()))
        moved = None if before is None else math.sqrt(sum(float((t - before[n]).square().sum()) for n, t in now.items() if before.get(n, t).shape == t.shape and n in before))
        table.append({"step": step, "bytes": checkpoint.nbytes, "parameters": sum(e.numel for e in checkpoint.entries.values()),
                      "dtypes": sorted(set(checkpoint.dtypes.values())), "norm": norm, "moved": moved and moved / norm})
        before = now
        progress((number + 1) * checkpoint.nbytes, len(trajectory) * checkpoint.nbytes)
    return {"trajectory": trajectory.name, "checkpoints": table, "problems": check(trajectory)}


def _validate(command: str) -> Callable[[dict], list[float]]:
    """An `evaluate` that runs the command on a checkpoint file, without a shell, and reads the numbers of its last line."""
    words = shlex.split(command)
    if not any("{}" in word for word in words):
        raise LawaError(f"--command needs {{}} where the checkpoint's path goes, got {command!r}")

    def evaluate(state):
        with tempfile.TemporaryDirectory() as folder:
            save(path := Path(folder) / "candidate.safetensors", state)
            done = subprocess.run([word.replace("{}", str(path)) for word in words], capture_output=True, text=True)
        numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf", (done.stdout.strip().splitlines() or [""])[-1])
        if done.returncode or not numbers:
            raise RuntimeError(f"the validation command exited with {done.returncode} and printed {(done.stderr or done.stdout).strip()[-200:]!r}")
        return [float(number) for number in numbers]
    return evaluate


def _run(args) -> dict:
    source = args.inputs[0] if len(args.inputs) == 1 else args.inputs
    trajectory = open_trajectory(source, args.key)
    if args.command == "inspect":
        return _inspect(trajectory)
    if args.command == "search":
        found = search(trajectory, _validate(args.run), args.at, args.budget)
        return found | {"best": str(found["best"])}
    options = {"dtype": args.dtype, "threads": args.threads, "allow": args.allow, "like": args.like, "max_shard": int(args.max_shard * 1e9), "progress": Progress()}
    schemes = _scheme(args)
    if args.command == "sweep":
        at = [step for step in trajectory.steps if step % (args.every or 1) == 0]
        return sweep_files(trajectory, schemes, at, args.out, **options)
    if len(schemes) > 1:
        raise LawaError(f"average writes one average, got {len(schemes)} schemes; use sweep")
    return average_files(trajectory, {args.out: (next(iter(schemes.values())), trajectory.steps[-1] if args.at is None else args.at)}, **options)


def _show(result: dict) -> None:
    for line in result.get("checkpoints", []):
        moved = f"{line['moved']:.2e}" if line["moved"] is not None else "-"
        print(f"step {line['step']:>9}  {line['bytes'] / 1e6:>10.1f} MB  {line['parameters']:>13,} values  {','.join(line['dtypes'])}  moved {moved}")
    for line in result.get("trials", []):
        print(f"loss {line['loss']:.5f}  gain {line['gain']:+.5f}  {line['scheme']}")
    for line in result.get("outputs", []):
        print(f"{line['path']}: {line['scheme']} at step {line['at']}, {len(line['weights'])} checkpoints")
    if "seconds" in result:
        print(f"read {result['bytes_read'] / 1e9:.2f} GB, wrote {result['bytes_written'] / 1e9:.2f} GB in {result['seconds']:.2f} s")
    if "sure" in result:
        print(f"best: {result['best']}; {result['sure']}")
    for problem in result.get("problems", []):
        print(f"problem: {problem}")


def main(argv=None) -> int:
    args = _parser().parse_args(argv)
    try:
        result = _run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except (LawaError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) else 1
    print(json.dumps(result, indent=1)) if args.json else _show(result)
    return 1 if result.get("problems") else 0


if __name__ == "__main__":
    sys.exit(main())
