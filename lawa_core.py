"""The averager: average the checkpoints of a training run, in memory, from file to file, or while it trains.

One sentence carries the file: an average is a row of weights over a trajectory,

    average = sum over steps s of  weight[s] * checkpoint[s]        (weights sum to 1)

so LAWA (arXiv 2306.03241), SWA (1803.05407), EMA and decay-shaped merges (WSM, 2507.17634) differ only in the row. Rows come from
lawa_schemes.py, checkpoints and trajectories, in whatever format, from lawa_files.py, and lawa_mix.py multiplies them, tile by tile. The
sections follow the data: averages in memory, averages from file to file, search, online averages, command line. File work needs numpy
alone; torch is imported by what needs it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from lawa_files import (
    ALLOW,
    DTYPES,
    FLOATS,
    INDEXES,
    SINGLES,
    SUFFIXES,
    Checkpoint,
    Entry,
    JobFailed,
    LawaError,
    Trajectory,
    _as_entries,
    _first_names,
    _header,
    _mismatches,
    _open_all,
    _open_safetensors,
    _sidecar,
    _some,
    _tensor,
    check as check,
    checkpoint_name,
    itemsize,
    open_checkpoint,
    open_trajectory,
    replacing,
    save,
    step_of as step_of,
)
from lawa_mix import TILE, Mixer, _block, _layout, _narrow, _tiles, _widen
from lawa_schemes import (
    _positive,
    decay as decay,
    ema,
    explicit as explicit,
    in_steps as in_steps,
    lawa,
    newest,
    parse_scheme as parse_scheme,
    row,
    scheme_dir as scheme_dir,
    swa,
    tokens as tokens,
)

__version__ = "0.1.0"


# ---- 1. Averages in memory ----------------------------------------------------------------------------------------------------------

def average(source, scheme=None, at: int | None = None, key: str | None = None) -> dict:
    """The average of a trajectory as {name: torch.Tensor}, fresh, on the CPU, each tensor of the newest checkpoint's dtype.

    Args: source: what `open_trajectory` takes; scheme: default the uniform mean of everything up to `at`; at: step, default the newest;
    key: as in `open_checkpoint`. Errors: LawaError for checkpoints that do not fit together, NaN, Inf.
    """
    trajectory = open_trajectory(source, key)
    weights = row(scheme or swa(), trajectory.steps, trajectory.steps[-1] if at is None else at)
    return _merge(weights, _open_all(trajectory, weights))


def _merge(weights: Mapping[int, float], opened: Mapping[int, Checkpoint], allow=()) -> dict:
    """The state dict of the checkpoints of one row, mixed tile by tile."""
    opened = {step: opened[step] for step in weights}
    entries, ties = _layout(opened)
    data = {name: np.empty(entry.nbytes, np.uint8) for name, entry in entries.items()}

    def write(_, name, offset, mixed):
        data[name][offset:offset + len(mixed)] = mixed
    mixer = Mixer(opened, np.array([list(weights.values())]), entries, write, allow)
    if problems := {problem for tile in _tiles(entries, TILE // 8) for problem in mixer(tile)}:
        raise LawaError("; ".join(sorted(problems)))
    state = {name: _tensor(raw, entries[name]) for name, raw in data.items()}
    return state | {name: state[kept] for name, kept in ties.items()}


def sweep(source, schemes: Mapping[str, Callable], at=None, key: str | None = None) -> Iterator[tuple[int, str, dict]]:
    """Yield (step, name, {tensor name: fresh torch.Tensor}) for every target step in `at` (default: all) and every scheme, in step order.

    Each checkpoint is read once; dtypes are the newest checkpoint's of each row. Memory: the checkpoints of the widest open window, in
    their own dtype; a scheme whose row at one target extends its row at the target before (EMA, SWA) keeps a sum in double instead.
    """
    trajectory = open_trajectory(source, key)
    targets = trajectory.steps if at is None else sorted(at)
    rows = {name: {target: row(scheme, trajectory.steps, target) for target in targets} for name, scheme in schemes.items()}
    opened = _open_all(trajectory, {step for scheme in rows.values() for weights in scheme.values() for step in weights},
                       ("duplicates", "averages"))
    running = {name: _Running(scheme, *_layout(opened)) for name, scheme in rows.items() if _extending(scheme)}
    keep = {step: max([t for name, scheme in rows.items() if name not in running for t in scheme if step in scheme[t]], default=0)
            for step in opened}  # the last target whose window holds the step
    held: dict[int, Checkpoint] = {}
    for step in sorted({*opened, *targets}):
        if step in opened:
            held[step] = _in_memory(opened.pop(step))
        for scheme in running.values() if step in held else ():
            scheme.add(step, held[step])
        for name in schemes if step in targets else ():
            yield step, name, running[name].average(step) if name in running else _merge(rows[name][step], held, ALLOW)
        held = {s: checkpoint for s, checkpoint in held.items() if keep[s] > step}


def stream(source, schemes: Mapping[str, Callable], at=None, on_disk: bool = False, allow=()) -> Iterator[tuple[int, str, dict]]:
    """`sweep` for checkpoints that are far away, or too big to open all at once: opened in order, let go after their last window.

    Yields as `sweep` does, but a state is the caller's to read only, until the next is asked for. Memory: the checkpoints of the widest
    window in their own dtype, of which the oldest makes room for the average; on_disk: the average alone, from files, tile by tile.
    Errors: LawaError for checkpoints that do not fit together, or hold identical weights unless "duplicates" is in `allow`.
    """
    trajectory = open_trajectory(source)
    rows, needed, last = _schedule(trajectory, schemes, at)
    trajectory.expect(needed)
    held, seen = {}, {}
    for step in needed:
        held[step] = trajectory[step] if on_disk else _in_memory(trajectory[step])
        problems = list(_mismatches(held[step], held[min(held)]))
        if (twin := seen.setdefault(held[step].sample, step)) != step and "duplicates" not in (*allow, *trajectory.allow):
            problems.append(f"steps {twin} and {step} of {trajectory.name} hold identical weights, so one is a wrong file; leave it out, "
                            f"or allow duplicates")
        if problems:
            raise LawaError("; ".join(problems))
        if not on_disk:
            trajectory.release(step)
        for name, scheme in rows.items():
            if step in scheme:
                spent = [s for s in held if last[s] <= step and name == next(reversed(rows)) and not on_disk]
                yield step, name, _weigh(scheme[step], held, spent)
        for spent in [s for s in held if last[s] <= step]:
            del held[spent]
            trajectory.release(spent)


def _schedule(trajectory: Trajectory, schemes: Mapping[str, Callable], at) -> tuple[dict, list[int], dict[int, int]]:
    """({scheme: {target: row}}, the steps needed in order, {step: the last target that needs it})."""
    targets = trajectory.steps if at is None else sorted(at)
    rows = {name: {target: row(scheme, trajectory.steps, target) for target in targets} for name, scheme in schemes.items()}
    last = {step: target for target in targets for scheme in rows.values() for step in (*scheme[target], target)}
    return rows, sorted(last), last


def _in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with all its bytes in memory, so that its files may go."""
    loaded = Checkpoint(checkpoint.path, checkpoint.entries, checkpoint.aliases, checkpoint.metadata)
    loaded.sample = checkpoint.sample
    for name, entry in checkpoint.entries.items():
        data = _loaded(entry)
        loaded.entries[name] = dataclasses.replace(entry, fill=functools.partial(_copy, data), peek=None, data=data)
    return loaded


def _copy(data: np.ndarray, start: int, out: np.ndarray) -> None:
    out[:] = data[start:start + len(out)]


def _loaded(entry: Entry) -> np.ndarray:
    """All bytes of a tensor, read a tile at a time into pages of their own."""
    data = _pages(entry.nbytes)
    for start in range(0, entry.nbytes, TILE):
        entry.fill(start, data[start:start + TILE])
    return data


def _pages(nbytes: int) -> np.ndarray:
    """Fresh bytes on pages of their own, which go back to the system as soon as they are dropped; the heap would keep some of them."""
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)[:nbytes]


def _weigh(weights: Mapping[int, float], held: Mapping[int, Checkpoint], spent) -> dict:
    """One row over the window as a state dict. Steps that are `spent` lose their tensors: the average is written over the oldest."""
    opened = {step: held[step] for step in weights}
    (entries, ties), state, data = _layout(opened), {}, {}

    def write(_, name, offset, mixed):
        data[name][offset:offset + len(mixed)] = mixed
    mixer = Mixer(opened, np.array([list(weights.values())]), entries, write)
    with ThreadPoolExecutor(max((os.cpu_count() or 2) - 1, 1)) as pool:
        for name, entry in entries.items():
            oldest = opened[min(opened)].entry(name)
            if len(opened) == 1:
                data[name] = _loaded(oldest) if oldest.data is None else oldest.data
            else:
                reuse = min(opened) in spent and oldest.dtype == entry.dtype and not opened[min(opened)].aliases  # tied ones may part later
                data[name] = oldest.data if reuse else _pages(entry.nbytes)
                if problems := {problem for found in pool.map(mixer, _tiles({name: entry}, TILE // 8)) for problem in found}:
                    raise LawaError("; ".join(sorted(problems)))
            state[name] = _tensor(data[name], entry)
            for step in spent:
                if not held[step].aliases:
                    held[step].entries.pop(name, None)
    return state | {name: state[kept] for name, kept in ties.items()}


def _ratio(before: Mapping[int, float], after: Mapping[int, float], boundary: int) -> float | None:
    """c if the row `after`, up to the step `boundary`, is c times the row `before`; None if it is not."""
    old = {step: weight for step, weight in after.items() if step <= boundary}
    pivot = max(before, key=lambda step: abs(before[step]))
    ratio = old.get(pivot, 0.0) / before[pivot]
    return ratio if all(abs(old.get(s, 0.0) - ratio * before.get(s, 0.0)) <= 1e-12 for s in before.keys() | old.keys()) else None


def _extending(rows: Mapping[int, Mapping[int, float]]) -> bool:
    """Whether each target's row extends the one before; a scheme of single checkpoints needs no sum."""
    return max(map(len, rows.values()), default=0) > 1 and all(_ratio(rows[a], rows[b], a) is not None for a, b in pairwise(rows))


class _Running:
    """The average of a scheme whose rows extend one another: one sum in double, to which each passing checkpoint is added."""

    def __init__(self, rows: Mapping[int, Mapping[int, float]], entries: Mapping[str, Entry], ties: Mapping[str, str]):
        self.rows, self.entries, self.ties, self.target, self.sums = rows, entries, ties, None, {}
        self.uniform = all(len(set(weights.values())) == 1 for weights in rows.values())  # then: a plain sum, and one division

    def add(self, step: int, checkpoint: Checkpoint) -> None:
        target = min((t for t in self.rows if t >= step), default=None)
        if target is None or not (weight := self.rows[target].get(step)):
            return
        self._move(target)
        self.newest = checkpoint
        for name in self.entries:
            if (entry := checkpoint.entry(name)).dtype in FLOATS:
                values = _widen(entry.read(0, entry.nbytes), entry.dtype).astype(np.longdouble if entry.dtype == "F64" else np.float64)
                values *= 1.0 if self.uniform else weight
                self.sums[name] = values + self.sums.get(name, 0.0)

    def _move(self, target: int) -> None:
        """From the row of the target before, in which what is summed so far had other weights, to this target's."""
        ratio = _ratio(self.rows[self.target], self.rows[target], self.target) if self.target not in (None, target) else 1.0
        if ratio == 0:
            self.sums = {}
        elif ratio != 1 and not self.uniform:
            self.sums = {name: total * ratio for name, total in self.sums.items()}
        self.target = target

    def average(self, target: int) -> dict:
        self._move(target)
        entries = {name: self.newest.entry(name) for name in self.entries}
        data = {name: entry.read(0, entry.nbytes).copy() for name, entry in entries.items()}
        for name, total in self.sums.items():
            values = total / len(self.rows[target]) if self.uniform else total
            data[name].view(DTYPES[entries[name].dtype][0])[:] = _narrow(values, entries[name].dtype)
        state = {name: _tensor(raw, entries[name]) for name, raw in data.items()}
        return state | {name: state[kept] for name, kept in self.ties.items()}


# ---- 2. Averages from file to file --------------------------------------------------------------------------------------------------

IN_MEMORY = 1 << 26  # bytes of tiles at most: with many checkpoints they shrink, so memory does not grow with k or N
COPIED = ("config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
          "chat_template*")  # what a Hugging Face folder holds beside its weights


def average_files(source, outputs: Mapping, *, dtype: str | None = None, threads: int | None = None, tile: int = TILE, progress=None,
                  allow=(), key: str | None = None, like=None, max_shard: int = 5_000_000_000) -> dict:
    """Write averages from file to file: every input byte read once, memory independent of model size and number of checkpoints.

    Args: source: what `open_trajectory` takes; outputs: {path: (scheme, at)}, a path ending in .safetensors or .pt, or else a Hugging Face
    folder (sharded beyond `max_shard` bytes; config and tokenizer copied from the folder `like`, default the newest input's); dtype: "F32",
    "BF16", ... for the float tensors, default each tensor's in the newest; threads: default one per core; tile: bytes; progress: called
    with (bytes done, bytes in all); allow: any of "nonfinite", "duplicates", "averages".
    Returns a report: outputs with their weights, bytes read and written, seconds. Errors: LawaError, JobFailed (disk full), and nothing is
    visible under an output's name. Killed, the same call goes on where it was.
    """
    begun, trajectory = time.perf_counter(), open_trajectory(source, key)
    _positive(threads=threads, tile=tile)
    if not outputs or dtype not in (None, *FLOATS):
        raise LawaError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}" if outputs else "expected at least one output, got none")
    rows = [row(scheme, trajectory.steps, at) for scheme, at in outputs.values()]
    opened = _open_all(trajectory, {step for weights in rows for step in weights}, allow)
    entries, ties = _layout(opened)
    entries = {name: dataclasses.replace(e, dtype=dtype if dtype and e.dtype in FLOATS else e.dtype) for name, e in entries.items()}
    sinks = [_Output(Path(path), entries, ties, _provenance(opened, weights, *target), max_shard)
             for (path, target), weights in zip(outputs.items(), rows, strict=True)]
    like = Path(like or opened[max(opened)].path)
    _refuse(sinks, trajectory, like)
    block = _block(len(opened))
    width = max(min(tile, IN_MEMORY // (len(opened) + len(rows))) // 8 // block, 1) * block  # values per tile, in whole blocks
    matrix = np.array([[weights.get(step, 0.0) for step in opened] for weights in rows])
    journal, written = sinks[0].part.with_suffix(".journal"), sum(sink.nbytes for sink in sinks)
    try:
        _stream(opened, matrix, entries, sinks, width, allow, threads or os.cpu_count() or 1, progress, journal)
        for sink in sinks:
            sink.finish(like, dtype or next((e.dtype for e in entries.values() if e.dtype in FLOATS), "F32"))
    except KeyboardInterrupt:
        raise  # what is written stays under its hidden name for the next call
    except BaseException as error:
        _remove(journal, *(sink.part for sink in sinks))
        if isinstance(error, OSError):
            raise JobFailed(f"cannot write {sinks[0].path}: {error.strerror}; {written:,} bytes are needed") from None
        raise
    _remove(journal)
    return {"outputs": [{"path": str(sink.path), "bytes": sink.nbytes, **sink.provenance} for sink in sinks], "bytes_written": written,
            "bytes_read": sum(checkpoint.nbytes for checkpoint in opened.values()), "seconds": round(time.perf_counter() - begun, 3)}


def sweep_files(source, schemes: Mapping[str, Callable], at, out_dir, **options) -> dict:
    """Write out_dir/<name>/ckpt_<step>.safetensors for every scheme and target step in one pass; each folder is again a trajectory."""
    outputs = {Path(out_dir) / name / checkpoint_name(step): (scheme, step) for name, scheme in schemes.items() for step in at}
    return average_files(source, outputs, **options)


def _provenance(opened: Mapping[int, Checkpoint], weights: Mapping[int, float], scheme, at: int) -> dict:
    """Enough to make the average again. The same in every process: no clock, no address of a function."""
    inputs = [{"step": step, "file": str(Path(*opened[step].path.parts[-2:])), "bytes": opened[step].nbytes,
               "sample_sha256": opened[step].sample} for step in weights]
    return {"version": __version__, "scheme": re.sub(r" at 0x\w+", "", str(scheme)), "at": at,
            "weights": {str(step): weight for step, weight in weights.items()}, "inputs": inputs}


def _refuse(sinks: list[_Output], trajectory: Trajectory, like: Path) -> None:
    """Refuse outputs that would do harm: an input, a folder in use, a disk too small."""
    inputs = {Path(source).resolve() for source in trajectory.sources.values() if not callable(source)}
    for sink in sinks:
        if inputs & {sink.path.resolve(), *sink.path.resolve().parents}:
            raise LawaError(f"{sink.path} is an input; choose another output")
        if sink.path.is_dir() and (not sink.is_folder or any(sink.path.iterdir())):
            raise LawaError(f"{sink.path} is a folder that is not empty; choose another output, or remove it")
    parent = next(path for path in sinks[0].path.resolve().parents if path.exists())
    if (need := sum(sink.nbytes for sink in sinks)) > (free := shutil.disk_usage(parent).free):
        raise JobFailed(f"disk full: {need:,} bytes are needed in {parent}, {free:,} are free")


def _stream(opened, rows: np.ndarray, entries, sinks: list[_Output], width: int, allow, threads: int, progress, journal: Path) -> None:
    """Mix the tiles of all tensors on threads: each tile of every checkpoint is read once, each tile of every output written once.

    The journal counts the tiles on disk, at most once a second, so that the very same job, if it was killed, goes on where it was.
    """
    tiles, problems, noted = _tiles(entries, width), set(), time.monotonic()
    sizes = [(stop - start) * sum(itemsize(c.entry(name).dtype) for c in opened.values()) for name, start, stop in tiles]  # bytes read
    plan = hashlib.sha256(repr((width, rows.tolist(), sorted(allow), [(sink.path, sink.headers) for sink in sinks],
                                [(c.files(), c.sample) for c in opened.values()])).encode()).hexdigest()
    first, total = 0, sum(sizes)
    with contextlib.suppress(OSError, ValueError):
        noted_plan, number = json.loads(journal.read_text())
        if noted_plan == plan and all(file.stat().st_size == size for sink in sinks for file, (_, size) in sink.headers.items()):
            first = number
    done, mixer = sum(sizes[:first]), Mixer(opened, rows, entries, lambda m, *mixed: sinks[m].write(*mixed), allow)
    with contextlib.ExitStack() as stack:
        if not first:
            _remove(journal)  # or it could speak, after another kill, of tiles in the files begun anew here
        for sink in sinks:
            sink.open(stack, fresh=first == 0)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, cancel_futures=True)
        for number, found in enumerate(pool.map(mixer, tiles[first:]), first + 1):
            problems.update(found)
            done += sizes[number - 1]
            if progress:
                progress(done, total)
            if time.monotonic() - noted > 1 and not problems:
                noted = time.monotonic()
                with replacing(journal) as part:
                    part.write_text(json.dumps([plan, number]))
    if problems:
        raise LawaError("; ".join(sorted(problems)))


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Output:
    """A file or Hugging Face folder being written: under a hidden name until it is whole."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], ties: Mapping[str, str], provenance: dict, max_shard: int):
        self.path, self.is_folder, self.provenance = path, path.suffix not in SUFFIXES, provenance
        self.part = path.parent / f".{path.name}.part"
        shards = _shards(entries, max_shard) if self.is_folder else {"": entries}
        layouts = {self.part / file: _header(shard, {"lawa": json.dumps(provenance)}, {a: b for a, b in ties.items() if b in shard})
                   for file, shard in shards.items()}
        self.headers = {file: (header, size) for file, (header, _, size) in layouts.items()}
        self.places = {name: (file, offset) for file, (_, offsets, _) in layouts.items() for name, offset in offsets.items()}
        self.nbytes = sum(size for _, size in self.headers.values())

    def open(self, stack: contextlib.ExitStack, fresh: bool) -> None:
        (self.part if self.is_folder else self.part.parent).mkdir(parents=True, exist_ok=True)
        self.files = {}
        for file, (header, size) in self.headers.items():
            self.files[file] = stack.enter_context(open(file, "wb" if fresh else "r+b", buffering=0))  # noqa: SIM115 - the stack closes it
            os.pwrite(self.files[file].fileno(), header, 0)
            self.files[file].truncate(size)

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        (file, offset), done = self.places[name], 0
        while done < len(data):
            done += os.pwrite(self.files[file].fileno(), data[done:], offset + start + done)

    def finish(self, like: Path, dtype: str) -> None:
        """Verify with the safetensors library, convert or complete, rename."""
        from safetensors import safe_open
        for file in self.headers:
            with safe_open(file, "numpy") as opened:
                if lost := {name for name, (place, _) in self.places.items() if place == file} - set(opened.keys()):
                    raise JobFailed(f"{self.path}: verification failed, the file written lacks {sorted(lost)[:3]}")
        if self.is_folder:
            self._complete_folder(like, dtype)
        elif self.path.suffix != ".safetensors":
            whole = _open_safetensors(self.part)
            state = {name: whole[name] for name in whole.entries}
            save(self.path, state | {alias: state[kept] for alias, kept in whole.aliases.items()})
            with replacing(_sidecar(self.path)) as part:
                part.write_text(json.dumps(self.provenance, indent=1))
            return _remove(self.part)
        os.replace(self.part, self.path)

    def _complete_folder(self, like: Path, dtype: str) -> None:
        if len(self.headers) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": {name: file.name for name, (file, _) in self.places.items()}}
            (self.part / INDEXES[0]).write_text(json.dumps(index, indent=1))
        for source in [path for pattern in COPIED for path in sorted(like.glob(pattern))]:
            shutil.copyfile(source, self.part / source.name)
        if (config := self.part / "config.json").exists():
            fields = json.loads(config.read_text())
            names = [name for name in ("dtype", "torch_dtype") if name in fields] or ["dtype"]
            config.write_text(json.dumps(fields | dict.fromkeys(names, DTYPES[dtype][1]), indent=2))


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


# ---- 3. Search ----------------------------------------------------------------------------------------------------------------------

def search(source, evaluate: Callable[[dict], object], at: int | None = None, budget: int = 12, ks=(2, 3, 5, 8, 12), key=None) -> dict:
    """The best LAWA window on a trajectory, in at most `budget` evaluations.

    Args: source: what `open_trajectory` takes; evaluate: {name: tensor} -> validation loss, or the losses of equally many blocks (paired,
    so that the answer comes with a standard error); lower is better, NaN is worst; at: step, default the newest; budget: evaluations, the
    run's own included.
    How: what decides is the window's span k * spacing (2507.17634), and gain against span is an inverted U; so a bisection over spans at
    the middle k, then the other k at the best span.
    Returns {"best": scheme, "gain", "gain_se", "sure": text, "trials": [{"scheme", "loss", "gain", "gain_se"}]}. Mutates nothing.
    """
    trajectory = open_trajectory(source, key)
    _positive(budget=budget)
    at = trajectory.steps[-1] if at is None else at
    losses: dict[object, np.ndarray] = {}

    def loss(scheme) -> float:
        if scheme not in losses and len(losses) < budget:
            losses[scheme] = np.atleast_1d(np.asarray(evaluate(average(trajectory, scheme, at)), float))
        return _mean(losses[scheme]) if scheme in losses else math.inf

    def fits(scheme) -> bool:
        with contextlib.suppress(LawaError):
            return len(row(scheme, trajectory.steps, at)) == scheme.k
        return False
    windows = [w for k in ks for step in trajectory.steps if step < at for w in [lawa(k, at - step)] if fits(w)]
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


def _mean(values: np.ndarray) -> float:
    return math.inf if np.isnan(values).any() else float(values.mean())


def _verdict(losses: Mapping, run) -> dict:
    def paired(values, than):  # (mean, standard error) of the differences block by block
        gains = than - values
        return float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
    best = min(losses, key=lambda scheme: _mean(losses[scheme]))
    trials = [{"scheme": str(scheme), "loss": float(values.mean()), "gain": gain, "gain_se": error}
              for scheme, values in losses.items() for gain, error in [paired(values, losses[run])]]
    gain, error = paired(losses[best], losses[run])
    if error is None:
        sure = "no spread known: the validation gave one number per model; give one per block to learn how sure this is"
    else:
        close = sum(more < 2 * spread for scheme in losses if scheme != best for more, spread in [paired(losses[best], losses[scheme])])
        sure = (f"gain {gain:+.4f} +- {error:.4f} (standard error over {len(losses[run])} blocks); "
                f"{close} other windows are within 2 standard errors")
    return {"best": best, "gain": gain, "gain_se": error, "sure": sure, "trials": trials}


# ---- 4. Online averages -------------------------------------------------------------------------------------------------------------

def live_state(model) -> dict:
    """{name: the model's own tensor}, through DDP, DataParallel and torch.compile wrappers: the unwrapped model's state_dict()."""
    import torch
    while hasattr(model, "_orig_mod") or isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


class _Online:
    """What LAWA, EMA and SWA share: when to update, state, and swapping the average into the model. Nothing feeds back into training."""

    def __init__(self, model, every: int, start: int):
        _positive(every=every)
        self.model, self.every, self.start, self.held = model, every, start, {}  # held: all state, nested dicts with tensors by name

    def _live(self) -> dict:
        """The model's tensors, tied ones once."""
        live = live_state(self.model)
        first = _first_names(live)
        return {name: tensor for name, tensor in live.items() if first[name] == name}

    def update(self, step: int) -> None:
        """Call after every optimizer.step() with the number of steps done; steps before `start`, off the grid or taken are ignored."""
        if step >= self.start and (step - self.start) % self.every == 0 and step > self.held.get("step", -1):
            self._take(step, self._live())
            self.held["step"] = step

    def average(self, *which) -> dict:
        """{name: fresh tensor} under the names of the model's state_dict(), in the model's dtypes; an EMA of several takes the beta."""
        averaged = self._average(*which)
        return {name: averaged[first] for name, first in _first_names(live_state(self.model)).items()}

    @contextlib.contextmanager
    def swapped(self, *which):
        """Inside, the model holds the average (of the given beta, for an EMA of several); after, its own weights again, to the bit."""
        import torch
        live, averaged = self._live(), self._average(*which)
        own = {name: tensor.clone() for name, tensor in live.items()}
        with torch.no_grad():
            try:
                for name, tensor in live.items():
                    tensor.copy_(averaged[name])
                yield self.model
            finally:
                for name, tensor in live.items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict:
        """A copy of all state; torch.save writes it and a weights-only torch.load reads it. Goes on bit for bit after load_state_dict."""
        return {"kind": type(self).__name__, "shapes": {n: list(t.shape) for n, t in self._live().items()}, "held": _copied(self.held)}

    def load_state_dict(self, state: Mapping) -> None:
        """Take a copy of a state of the same kind and model; LawaError if it is another's."""
        live = self._live()
        if state.get("kind") != type(self).__name__ or state["shapes"] != {name: list(tensor.shape) for name, tensor in live.items()}:
            raise LawaError(f"expected the state of {type(self).__name__} for this model, got that of {state.get('kind')} for "
                            f"{len(state.get('shapes', ()))} tensors, of other names or shapes")
        self.held = _copied(state["held"], {name: self._place(tensor) for name, tensor in live.items()})

    def _place(self, tensor):
        return tensor.device


def _copied(tree: Mapping, places: Mapping | None = None) -> dict:
    """A deep copy of nested dicts of tensors, each on the device that `places` gives its name."""
    return {key: _copied(value, places) if isinstance(value, Mapping) else value.to(places[key] if places else value.device, copy=True)
            if hasattr(value, "device") else value for key, value in tree.items()}


class LAWA(_Online):
    """The last k snapshots, `spacing` steps apart, as a window on the CPU or, with `folder`, on disk as a trajectory of checkpoints.

    A push costs one copy of the weights. `average()` is the mean of what the window holds, on the CPU, bit for bit what the function
    `average` makes of the same checkpoints. Source: arXiv 2306.03241.
    """

    def __init__(self, model, k: int, spacing: int, start: int = 0, folder=None):
        super().__init__(model, spacing, start)
        _positive(k=k)
        self.k, self.folder, self.held = k, folder and Path(folder), {"window": {}}  # {step: {name: tensor}}, on disk {step: {}}

    def _take(self, step, live):
        import torch
        window, oldest = self.held["window"], {}
        while len(window) >= self.k:
            oldest = window.pop(gone := min(window))
            if self.folder:
                (self.folder / checkpoint_name(gone)).unlink(missing_ok=True)
        if self.folder:
            save(self.folder / checkpoint_name(step), live_state(self.model))
            window[step] = {}
            return
        if {n: t.dtype for n, t in oldest.items()} != {n: t.dtype for n, t in live.items()}:  # else its memory is used again
            oldest = {name: torch.empty_like(tensor, device="cpu") for name, tensor in live.items()}
        torch._foreach_copy_(list(oldest.values()), list(live.values()))
        window[step] = oldest

    def _average(self):
        steps = sorted(self.held["window"])[-self.k:]
        if not steps:
            raise LawaError("the window is empty: call update(step) first")
        opened = {step: open_checkpoint(self.folder / checkpoint_name(step)) if self.folder else
                  Checkpoint(f"snapshot {step}", *_as_entries(self.held["window"][step], f"snapshot {step}")) for step in steps}
        return _merge(dict.fromkeys(steps, 1 / len(steps)), opened, ALLOW)

    def _place(self, tensor):
        return "cpu"


class EMA(_Online):
    """e <- e + (1 - beta)(w - e) every `every` steps since `start`, begun at the first w; one `beta` or several in one pass.

    Kept in `dtype` (default float32, wider where the model is), on the parameters' device. In float32 it strays from the closed form by
    up to about 1 / (1 - beta) / 2 ulp, as every fp32 EMA does; float64 agrees to 1 ulp. Parameters that do not move keep their bits.
    """

    def __init__(self, model, betas, every: int = 1, start: int = 0, dtype=None):
        super().__init__(model, every, start)
        self.betas, self.dtype, self.held = tuple(map(float, np.atleast_1d(betas))), dtype, {"shadows": {}, "others": {}}
        if not self.betas:
            raise LawaError("expected one beta or more, got none")
        for beta in self.betas:
            ema(beta)  # refuses a beta outside [0, 1)

    def _take(self, step, live):
        import torch
        floats, self.held["others"] = _parted(live)
        values = [tensor.to(torch.promote_types(tensor.dtype, self.dtype or torch.float32)) for tensor in floats.values()]
        for beta in self.betas:
            if beta in self.held["shadows"]:
                torch._foreach_lerp_(list(self.held["shadows"][beta].values()), values, 1 - beta)
            else:
                self.held["shadows"][beta] = {name: value.clone() for name, value in zip(floats, values, strict=True)}

    def _average(self, beta: float | None = None):
        shadow = self.held["shadows"].get(self.betas[0] if beta is None else beta)
        if not shadow:
            raise LawaError(f"no average for beta {self.betas[0] if beta is None else beta} of {self.betas}; call update(step) first")
        live = self._live()
        return {name: value.to(live[name].dtype, copy=True) for name, value in shadow.items()} | _copied(self.held["others"])

    def load_state_dict(self, state):
        if state.get("kind") == "EMA" and not set(state["held"]["shadows"]) <= set(self.betas):
            raise LawaError(f"expected the state of an EMA with betas {self.betas}, got {tuple(state['held']['shadows'])}")
        super().load_state_dict(state)


class SWA(_Online):
    """The uniform mean of every `every`-th step since `start` (arXiv 1803.05407), from a sum in double, for float64 in two doubles."""

    def __init__(self, model, start: int = 0, every: int = 1):
        super().__init__(model, every, start)
        self.held = {"count": 0, "sums": {}, "lost": {}, "others": {}}

    def _take(self, step, live):
        floats, self.held["others"] = _parted(live)
        sums, lost = self.held["sums"], self.held["lost"]
        for name, tensor in floats.items():
            value, before = tensor.double(), sums.get(name, 0.0)
            sums[name] = total = before + value
            if tensor.dtype == value.dtype:  # what the addition rounded off (Knuth's two-sum)
                lost[name] = lost.get(name, 0.0) + ((before - (total - value)) + (value - (total - (total - value))))
        self.held["count"] += 1

    def _average(self):
        count, lost, live = self.held["count"], self.held["lost"], self._live()
        if not count:
            raise LawaError("nothing averaged yet: call update(step) from step `start` on")
        means = {name: ((total + lost.get(name, 0.0)) / count).to(live[name].dtype) for name, total in self.held["sums"].items()}
        return means | _copied(self.held["others"])


def _parted(live: Mapping) -> tuple[dict, dict]:
    """(floating-point tensors, copies of the others, of which an average keeps the newest)."""
    floats = {name: tensor for name, tensor in live.items() if tensor.is_floating_point()}
    return floats, {name: tensor.clone() for name, tensor in live.items() if name not in floats}


# ---- 5. Command line ----------------------------------------------------------------------------------------------------------------

class Progress:
    """A bar with rate and time left on a terminal; nothing elsewhere."""

    def __init__(self, unit: str = "GB", scale: float = 1e9):
        self.begun, self.shown, self.unit, self.scale = time.monotonic(), 0.0, unit, scale

    def __call__(self, done: float, total: float, note: str = "") -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self.shown > 0.1 or done >= total):
            self.shown, rate = now, done / max(now - self.begun, 1e-9)
            bar = "#" * int(30 * done / max(total, 1))
            sys.stderr.write(f"\r[{bar:<30}] {done / self.scale:.4g} of {total / self.scale:.4g} {self.unit}, "
                             f"{rate / self.scale:.3g} {self.unit}/s, {(total - done) / max(rate, 1e-9):.0f} s left {note} "
                             + "\n" * (done >= total))


def main(argv=None) -> int:
    """The command line, `python lawa_core.py` or `lawa`: see lawa_cli.py."""
    import lawa_cli
    return lawa_cli.main(argv)


if __name__ == "__main__":
    sys.modules["lawa_core"] = sys.modules[__name__]  # or lawa_cli would compile and import this file once more
    sys.exit(main())
