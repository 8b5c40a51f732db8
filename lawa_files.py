"""Checkpoints and trajectories: what the averager reads, in every format that is around, and what it writes.

The sections follow the data: a checkpoint is a lazy mapping from names to tensors, of which opening reads the header only; formats that
are read (safetensors, Hugging Face folders, .pt, torch's distributed checkpoints); what is written; and a trajectory, the checkpoints of a
run in order, with the checks that they belong together. numpy does the file work; torch is imported by what hands out tensors or reads
.pt files, because importing it takes longer than averaging five GPT-2s.
"""
from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np


class LawaError(ValueError):
    """A mistake the user can mend: says what was expected, what came, and what to do."""


class JobFailed(LawaError):
    """The input was right and the work failed all the same: a full disk, a validation program that crashed."""


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
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # torch.compile's and DDP's prefixes


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


@contextlib.contextmanager
def _explained(text: str):
    """Whatever a broken file makes its reader raise, as one line that begins with `text`."""
    try:
        yield
    except LawaError:
        raise
    except Exception as error:
        raise LawaError(f"{text} ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, not yet read."""
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    path: str
    fill: Callable[[int, np.ndarray], None]  # (start, out): its bytes from `start` on, row-major, into an array of uint8
    peek: Callable[[], bytes] | None = None  # some of its bytes, where reading a part costs as much as the whole
    data: np.ndarray | None = None  # all its bytes, where they are in memory

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its bytes [start, stop), to read only: fresh, or where they are in memory."""
        if self.data is not None:
            return self.data[start:stop]
        self.fill(start, out := np.empty(stop - start, np.uint8))
        return out

    def sample(self) -> bytes:
        middle = max(self.nbytes - 64, 0) // 16 * 8
        return self.peek() if self.peek else self.read(middle, min(middle + 64, self.nbytes)).tobytes()


class Checkpoint(Mapping):
    """A lazy mapping name -> torch.Tensor (a fresh CPU copy at every look-up). Opening it reads headers only.

    `entries` holds every tensor once; `aliases` {name: name in entries} the further names of tied ones; `metadata` the header's strings.
    """

    def __init__(self, path, entries: Mapping[str, Entry], aliases: Mapping[str, str] | None = None, metadata: Mapping | None = None):
        self.path, self.entries, self.aliases, self.metadata = Path(path), dict(entries), dict(aliases or {}), dict(metadata or {})
        if not entries:
            raise LawaError(f"{path} holds no tensors; expected a model's weights")

    def entry(self, name: str) -> Entry:
        return self.entries[self.aliases.get(name, name)]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: self.entry(name).dtype for name in self}

    @property
    def shapes(self) -> dict[str, tuple]:
        return {name: self.entry(name).shape for name in self}

    @functools.cached_property
    def sample(self) -> str:
        """sha256 over 64 bytes from the middle of every tensor: equal for identical weights, cheap at any size."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(name.encode() + entry.sample())
        return digest.hexdigest()

    def files(self) -> list[tuple]:
        """(path, inode, size, time of change) of every file it is read from."""
        inside = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return [(str(path), *_stamp(path)) for path in inside if path.exists()]

    def __getitem__(self, name):
        entry = self.entry(name)
        entry.fill(0, data := np.empty(entry.nbytes, np.uint8))
        return _tensor(data, entry)

    def __contains__(self, name):
        return name in self.entries or name in self.aliases

    def __iter__(self):
        return iter([*self.entries, *self.aliases])

    def __len__(self):
        return len(self.entries) + len(self.aliases)


def _tensor(data: np.ndarray, entry: Entry):
    """Bytes -> torch.Tensor of the entry's type and shape, on the same memory."""
    import torch
    storage, name = DTYPES[entry.dtype]
    return torch.from_numpy(data.view(storage)).view(getattr(torch, name)).reshape(entry.shape)


def open_checkpoint(path, key: str | None = None) -> Checkpoint:
    """Open .safetensors, .pt/.pth/.bin/.ckpt, a Hugging Face folder (single or sharded) or a torch distributed checkpoint folder.

    Args: path; key: where a nested .pt or distributed checkpoint holds its weights (default: `model`, `state_dict`,
    `model_state_dict`, `module`, or at the top). Wrapper prefixes `_orig_mod.` and `module.` in front of all names are stripped. Only
    tensors are unpickled. Returns a `Checkpoint`. Errors: LawaError for a missing, truncated, corrupt or unsafe file, naming it.
    """
    return _stripped(_open(Path(path), key))


def _open(path: Path, key: str | None) -> Checkpoint:
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
            inside = _open(path / single, key)
            return Checkpoint(path, _weights(inside.entries), inside.aliases, inside.metadata)
    raise LawaError(f"{path} is no checkpoint: expected one of {', '.join((*SINGLES, *INDEXES, '.metadata'))} in it")


def _weights(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Without the causal mask, its fill value and the rotary frequencies, which some revisions of a model have and others lack."""
    return {name: entry for name, entry in entries.items() if not (BUFFERS.search(name) and (len(entry.shape) != 1 or "inv_freq" in name))}


def _stripped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under its model's own names: a wrapper puts its prefix in front of all of them."""
    bare = {name: WRAPPERS.sub("", name) for name in checkpoint}
    if len(set(bare.values())) < len(bare):
        twice = next(new for old, new in bare.items() if old != new and new in bare)
        raise LawaError(f"{checkpoint.path} holds {twice!r} with and without a wrapper's prefix; keep one")
    if any(old == new for old, new in bare.items()):
        return checkpoint
    entries = {bare[name]: entry for name, entry in checkpoint.entries.items()}
    return Checkpoint(checkpoint.path, entries, {bare[name]: bare[kept] for name, kept in checkpoint.aliases.items()}, checkpoint.metadata)


def _open_safetensors(path: Path) -> Checkpoint:
    """Layout: u64 length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors."""
    source, entries = _File(path), {}
    with open(path, "rb") as file, _explained(f"{path}: corrupt safetensors header; copy it again"):
        if _stamp(file.fileno()) != source.stamp:
            raise LawaError(f"{path} changed while it was being read; wait until its writer is done")
        base, size = 8 + int.from_bytes(file.read(8).ljust(8, b"\xff"), "little"), source.stamp[1]
        if base > size:
            raise LawaError(f"{path} is truncated or no safetensors file: {size} bytes, expected a header of {base}")
        header = json.loads(file.read(base - 8))
        metadata = header.pop("__metadata__", {})
        for name, info in header.items():
            dtype, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
            if dtype not in DTYPES:
                raise LawaError(f"{path}: {name!r} has type {dtype!r}, expected one of {', '.join(DTYPES)}")
            if not all(type(n) is int and n >= 0 for n in (*shape, start)) or stop - start != math.prod(shape) * itemsize(dtype):
                raise ValueError(f"{name!r}: type, shape and offsets disagree")
            if base + stop > size:
                raise LawaError(f"{path} is truncated: its header promises {base + stop} bytes, there are {size}; copy it again")
            entries[name] = Entry(dtype, shape, str(path), functools.partial(source.fill, base + start))
        aliases = {name: kept for name, kept in json.loads(metadata.get("ties", "{}")).items() if kept in entries and name not in entries}
    return Checkpoint(path, entries, aliases, metadata)


def _stamp(file) -> tuple[int, int, int]:
    """What changes when a file does: (inode, size in bytes, time of change)."""
    stat = os.stat(file)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class _File:
    """A file to read from, open while it is needed: opening it for every tile takes half as long as reading. Of more than MOST files, which
    the system might not allow, the others are opened for every read. An open file that is replaced is read on as it was; one that is
    written to is refused."""
    MOST, kept, number = 128, 0, None

    def __init__(self, path):
        self.path, self.stamp = str(path), _stamp(path)
        if _File.kept < self.MOST:
            with contextlib.suppress(OSError):  # too many are open: then for every read
                self.number = os.open(path, os.O_RDONLY)
                _File.kept += 1

    def __del__(self):
        if self.number is not None:
            os.close(self.number)
            _File.kept -= 1

    def fill(self, offset: int, start: int, out: np.ndarray) -> None:
        """Bytes from offset + start on into out."""
        number, done = self.number, 0
        try:
            number = os.open(self.path, os.O_RDONLY) if number is None else number
            if _stamp(number) != self.stamp:
                raise LawaError(f"{self.path} changed while it was being read; wait until its writer is done")
            while done < len(out):  # a read may come back short
                done += (count := os.preadv(number, [out[done:]], offset + start + done))
                if not count:
                    raise LawaError(f"{self.path} is truncated: it ends inside a tensor; copy it again")
        except OSError as error:
            raise LawaError(f"cannot read {self.path} ({error.strerror})") from None
        finally:
            if number != self.number:
                os.close(number)


def _open_torch(path: Path, key: str | None) -> Checkpoint:
    import torch
    try:
        try:
            blob = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            blob = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe, reason = re.search(r"GLOBAL (\S+)", str(error)), (str(error) or "empty").splitlines()[0]
        reason = "no file of tensors" if "weights_only" in reason else reason  # torch goes on to advise what would run the file's code
        raise LawaError(f"{path}: refused, it holds {unsafe[1]}, and unpickling that could run code; save the state dict alone"
                        if unsafe else f"{path}: not a readable torch checkpoint ({reason}); copy it again") from None
    if not isinstance(blob, Mapping) or (key and not isinstance(blob.get(key), Mapping)):
        raise LawaError(f"{path} holds {', '.join(map(str, blob))[:200] if isinstance(blob, Mapping) else type(blob).__name__}; "
                        f"expected a state dict{f' under {key!r}' if key else ''}")
    key = key or next((name for name in NESTED if isinstance(blob.get(name), Mapping)), None)
    sidecar = _sidecar(path)
    return Checkpoint(path, *_as_entries(blob[key] if key else blob, path), {"lawa": sidecar.read_text()} if sidecar.exists() else {})


def _as_entries(tensors: Mapping, origin) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries, aliases) of a mapping name -> torch tensor or numpy array; names of one place in memory become one entry and aliases.

    What is no tensor is passed over: step counters beside the weights are no weights.
    """
    import torch
    found = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
             for name, value in tensors.items() if isinstance(value, (torch.Tensor, np.ndarray))}
    first = _first_names(found)
    return ({name: Entry(_code(tensor.dtype, origin), tuple(tensor.shape), str(origin), functools.partial(_read_tensor, tensor))
             for name, tensor in found.items() if first[name] == name}, {name: kept for name, kept in first.items() if kept != name})


def _first_names(tensors: Mapping) -> dict[str, str]:
    """{name: the first name of the same place in memory}: tied tensors have one."""
    seen: dict[tuple, str] = {}
    return {name: seen.setdefault((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()), name) if t.numel() else name
            for name, t in tensors.items()}


def _code(dtype, origin) -> str:
    if (code := CODES.get(str(dtype).removeprefix("torch."))) is None:
        raise LawaError(f"{origin}: a tensor of type {dtype} cannot be averaged; expected {', '.join(CODES)}")
    return code


def _read_tensor(tensor, start: int, out: np.ndarray) -> None:
    """A part of a tensor, which may lie in a mapped file, on a device, or with gaps: then only that part is gathered."""
    import torch
    first, last = start // tensor.element_size(), (start + len(out)) // tensor.element_size()
    if tensor.is_contiguous() or last - first == tensor.numel():
        part = tensor.contiguous().view(-1)[first:last].cpu()
    else:
        places = torch.arange(first, last, device=tensor.device).split(1 << 13)  # an index takes 8 bytes a value and axis: few at a time
        part = torch.cat([tensor[torch.unravel_index(some, tensor.shape)].cpu() for some in places])
    out[:] = (part.view(torch.uint16) if part.dtype == torch.bfloat16 else part).numpy().view(np.uint8)


def _open_sharded(folder: Path, index: str, key: str | None) -> Checkpoint:
    with _explained(f"{folder / index}: corrupt index"):
        places = dict(json.loads((folder / index).read_text())["weight_map"].items())
        names = sorted(set(places.values()))
        missing = [shard for shard in names if Path(shard).name != shard or not (folder / shard).is_file()]
    if missing:
        raise LawaError(f"{folder}: missing shard {', '.join(missing)}, named in {index}; fetch it again")
    shards = {shard: _open(folder / shard, key) for shard in names}
    if stale := [*(name for name, shard in places.items() if name not in shards[shard]),
                 *(n for s in shards.values() for n in s if n not in places)]:
        raise LawaError(f"{folder / index} is stale: {stale[0]} is not where it says; write the index again")
    entries, *rest = ({name: value for shard in shards.values() for name, value in getattr(shard, part).items()}
                      for part in ("entries", "aliases", "metadata"))
    return Checkpoint(folder, _weights(entries), *rest)


def _open_distributed(folder: Path, key: str | None) -> Checkpoint:
    """torch.distributed.checkpoint: .distcp files of pieces, and an index of them. A tensor is put together when it is read."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import MetadataIndex
    with _explained(f"{folder}: not a readable distributed checkpoint"):
        index = _unpickled_index(folder / ".metadata")
        tensors = {name: info for name, info in index.state_dict_metadata.items() if hasattr(info, "chunks")}
        places = {name: tuple(map(str, (index.planner_data or {}).get(name, (name,)))) for name in tensors}  # ("model", "wte.weight")
    reader, held = FileSystemReader(folder), {}  # held: the one tensor of which tile after tile is being read

    def place(name, chunk):
        found = index.storage_data[MetadataIndex(name, chunk.offsets)]
        return found, folder / found.relative_path

    def piece(name, chunk):
        found, path = place(name, chunk)
        with open(path, "rb") as file:
            return torch.load(reader._slice_file(file, found), map_location="cpu", weights_only=True)

    def peek(name):
        with _explained(f"{folder}: cannot read {name}"):
            found, path = place(name, tensors[name].chunks[0])
            _File(path).fill(found.offset + found.length // 2, 0, some := np.empty(64, np.uint8))
            return some.tobytes()

    def whole(name, info):
        if len(info.chunks) == 1:
            return piece(name, info.chunks[0])
        tensor = torch.empty(info.size, dtype=info.properties.dtype)
        for chunk in info.chunks:
            tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece(name, chunk)
        return tensor

    def fill(name, start, out):
        if (tensor := held.get(name)) is None:
            held.clear()
            with _explained(f"{folder}: cannot read {name}"):
                held[name] = tensor = whole(name, tensors[name])
        _read_tensor(tensor, start, out)

    def entry(name):
        info = tensors[name]
        readers = functools.partial(fill, name), functools.partial(peek, name)
        return Entry(_code(info.properties.dtype, folder), tuple(info.size), str(folder), *readers)
    under = key or next((name for name in NESTED if any(place[0] == name and len(place) > 1 for place in places.values())), None)
    return Checkpoint(folder, {".".join(place[1:] if under else place): entry(name) for name, place in places.items()
                               if under in (None, place[0])})


def _unpickled_index(path: Path):
    """A distributed checkpoint's index is a pickle: only these classes are let in, and none of them runs code."""
    import pickle

    import torch
    plain = {"torch.distributed.checkpoint.metadata": ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
                                                       "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
             "torch.distributed.checkpoint.filesystem": ("_StorageInfo",), "torch.serialization": ("_get_layout",),
             "collections": ("OrderedDict",), "pathlib": ("PosixPath", "WindowsPath"),
             "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)))}

    class Index(pickle.Unpickler):
        def find_class(self, module, name):
            if name not in plain.get(module, ()):
                raise LawaError(f"{path}: refused, it holds {module}.{name}, and unpickling that could run code")
            return super().find_class(module, name)
    with open(path, "rb") as file:
        return Index(file).load()


# ---- 2. Writing ---------------------------------------------------------------------------------------------------------------------

def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str], ties: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(header, {name: offset in the file}, file size) of a safetensors file; the widest types first keeps every tensor aligned."""
    table, offset = {}, 0
    for name in sorted(entries, key=lambda name: -itemsize(entries[name].dtype)):
        table[name] = {"dtype": entries[name].dtype, "shape": entries[name].shape, "data_offsets": (offset, offset + entries[name].nbytes)}
        offset += entries[name].nbytes
    metadata = {"format": "pt", **metadata, **({"ties": json.dumps(ties)} if ties else {})}
    text = json.dumps({"__metadata__": metadata} | table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + info["data_offsets"][0] for name, info in table.items()}, base + offset


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A hidden name beside `path` to write to: renamed to `path` on success, removed on failure. Nothing half-written is ever seen.

    Errors: JobFailed, naming `path`, where the system refuses (disk full, no permission).
    """
    path = Path(path)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise JobFailed(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save(path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict {name: torch.Tensor or numpy array} to .safetensors (with `metadata`) or .pt, atomically; tied tensors once."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise LawaError(f"{path}: unknown kind of file; expected a name that ends in one of {', '.join(SUFFIXES)}")
    with replacing(path) as part, open(part, "wb") as file:
        if path.suffix != ".safetensors":
            import torch
            torch.save({name: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for name, t in tensors.items()}, file)
            return
        entries, ties = _as_entries(tensors, path)
        header, offsets, _ = _header(entries, metadata or {}, ties)
        file.write(header)
        for name in offsets:
            file.write(entries[name].read(0, entries[name].nbytes))


def _sidecar(path: Path) -> Path:
    """Where an averaged .pt, which has no header, keeps its provenance."""
    return path.with_name(f"{path.name}.lawa.json")


# ---- 3. Trajectories ----------------------------------------------------------------------------------------------------------------

NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|training_args|trainer|resume|^\.", re.IGNORECASE)
ALLOW = ("nonfinite", "duplicates", "averages")  # what an average may be forced to accept


class Trajectory:
    """The checkpoints of one run in order: `steps` ascending, `trajectory[step]` opens one (header only).

    `sources` maps a step to a path, or to a function that opens its checkpoint wherever it is.
    """
    allow: tuple | list = ()  # some of ALLOW

    def __init__(self, sources: Mapping[int, Path | Callable[[], Checkpoint]], name: str = "the list", key: str | None = None):
        self.sources, self.name, self.key = dict(sorted(sources.items())), name, key

    @property
    def steps(self) -> list[int]:
        return list(self.sources)

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, step) -> Checkpoint:
        if step not in self.sources:
            raise LawaError(f"no checkpoint at step {step} in {self.name}; there are {_some(self.steps)}")
        source = self.sources[step]
        return source() if callable(source) else open_checkpoint(source, self.key)

    def expect(self, steps) -> None:
        """These steps will be asked for, in this order: what must be fetched can be fetched ahead."""

    def release(self, step: int) -> None:
        """This step will not be asked for again: what was fetched can go."""

    def companions(self) -> Path:
        """The folder where the newest checkpoint's config and tokenizer are."""
        newest = self[self.steps[-1]].path
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
        return _trajectory([Path(path) for path in source], "the list", key)
    if str(source).startswith("hub:"):
        from lawa_hub import open_hub
        return open_hub(str(source)[4:])
    path = Path(source)
    if path.is_dir() and not _is_checkpoint(path):
        found = [inside for inside in path.iterdir() if step_of(inside) is not None and _is_checkpoint(inside)]
    else:
        found = [path] if path.exists() else [inside for inside in map(Path, glob.glob(str(source))) if _is_checkpoint(inside)]
    if not found:
        raise LawaError(f"no checkpoints in {source}; expected files such as {checkpoint_name(1000)} or folders such as step1000/")
    return _trajectory(found, path.name, key)


def _is_checkpoint(path: Path) -> bool:
    if NOT_WEIGHTS.search(path.name):
        return False
    return path.suffix in SUFFIXES if path.is_file() else any((path / name).exists() for name in (*SINGLES, *INDEXES, ".metadata"))


def _trajectory(paths: list[Path], name: str, key: str | None) -> Trajectory:
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
    return Trajectory(found, name, key)


def _open_all(trajectory: Trajectory, steps, allow=()) -> dict[int, Checkpoint]:
    """Open `steps`, ascending; refuse them, with every problem at once, if they do not belong together."""
    if unknown := set(allow) - set(ALLOW):
        raise LawaError(f"unknown permission {', '.join(sorted(unknown))}; expected some of {', '.join(ALLOW)}")
    opened, problems = _opened(trajectory, steps, allow)
    if problems:
        raise LawaError("; ".join(problems))
    return opened


def _opened(trajectory: Trajectory, steps, allow=()) -> tuple[dict[int, Checkpoint], list[str]]:
    """The checkpoints that can be opened, and what is wrong with them as a set: one line per problem, naming file and tensor."""
    opened, problems = {}, []
    for step in sorted(steps):
        try:
            opened[step] = trajectory[step]
        except LawaError as error:
            problems.append(str(error))
    problems += [problem for checkpoint in opened.values() for problem in _mismatches(checkpoint, opened[max(opened)])]
    averages = [str(checkpoint.path) for checkpoint in opened.values() if "lawa" in checkpoint.metadata]
    if "averages" not in allow and 0 < len(averages) < len(opened):
        problems.append(f"{', '.join(averages)} already an average, says its header, among checkpoints that are none; leave it out "
                        "(or --allow averages)")
    if "duplicates" not in allow:
        problems += [f"{a.path} and {b.path} hold identical weights, so one is a wrong file; leave it out (or --allow duplicates)"
                     for a, b in _identical(opened)]
    return opened, problems


def _mismatches(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[str]:
    """Names, shapes and kinds that differ from the newest checkpoint's."""
    for name in sorted(checkpoint.keys() ^ newest.keys())[:6]:
        yield f"{checkpoint.path}: tensor {name} is {'extra: not' if name in checkpoint else 'missing: it is'} in {newest.path}"
    for name in sorted(checkpoint.keys() & newest.keys()):
        ours, theirs = checkpoint.entry(name), newest.entry(name)
        if ours.shape != theirs.shape:
            yield f"{checkpoint.path}: {name} has shape {list(ours.shape)}, expected {list(theirs.shape)} as in {newest.path}"
        elif ours.dtype != theirs.dtype and not {ours.dtype, theirs.dtype} <= set(FLOATS):
            yield f"{checkpoint.path}: {name} is {ours.dtype}, expected {theirs.dtype} as in {newest.path}"


def _identical(opened: Mapping[int, Checkpoint], tile: int = 1 << 20) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    """Pairs of byte-identical checkpoints, as on the Hub's mislabelled Pythia branches. Those with equal samples are compared whole."""
    first: dict[str, Checkpoint] = {}
    for b in opened.values():
        a = first.setdefault(b.sample, b)
        if a is not b and a.dtypes == b.dtypes and a.shapes == b.shapes and all(
                np.array_equal(a.entry(name).read(start, stop), entry.read(start, stop)) for name, entry in b.entries.items()
                for start in range(0, entry.nbytes, tile) for stop in [min(start + tile, entry.nbytes)]):
            yield a, b


def check(source, key: str | None = None) -> list[str]:
    """Every problem of a trajectory as text: what averaging would refuse, and gaps in its steps. Reads headers and samples."""
    trajectory = open_trajectory(source, key)
    problems = _opened(trajectory, trajectory.steps)[1]
    usual = np.median(np.diff(trajectory.steps)) if len(trajectory) > 2 else math.inf
    return problems + [f"gap: no checkpoint between steps {a} and {b}; others are {usual:g} apart"
                       for a, b in pairwise(trajectory.steps) if b - a > usual]
