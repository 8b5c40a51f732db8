"""rows @ checkpoints: the arithmetic of every average, tile by tile.

A tile is the same stretch of one tensor in every checkpoint. `Mix` turns the tiles of N checkpoints into those of M averages; `Mixer` reads
them, mixes them, looks for NaN and hands them on, on as many threads as call it. numpy alone, in double, rounded once. What costs time here
is memory and Python's lock, not arithmetic: so every thread uses its own memory again, and numpy is called seldom, with much to do.
"""
from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lawa_files import DTYPES, FLOATS, Checkpoint, Entry, itemsize

TILE = 1 << 21  # bytes of doubles at a time from each checkpoint, so half of it in float32
BLOCK = 1 << 18  # values at a time; fewer at a time are more fights of the threads over Python's lock


class Room(threading.local):
    """Memory of each thread's own, used for tile after tile: fresh pages, which the system clears, cost as much as the arithmetic."""

    def __init__(self):
        self.held: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        """An array that holds anything, and is no longer what the same name was before."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self.held or self.held[name].nbytes < nbytes:
            self.held[name] = np.empty(nbytes, np.uint8)
        return self.held[name][:nbytes].view(dtype).reshape(shape)


def _block(n: int) -> int:
    """Values of each of n checkpoints per matrix product: a power of two, so that all of them stay in the cache as doubles (2 MB)."""
    return 1 << max(BLOCK // n, 1 << 10).bit_length() - 1


def _widen(raw: np.ndarray, dtype: str, room: Room | None = None) -> np.ndarray:
    """Raw bytes of floats as an array of floats that numpy can count with: exact. bfloat16 takes the room's "bits"."""
    values = raw.view(DTYPES[dtype][0])
    if dtype != "BF16":
        return values
    bits = (room or Room())("bits", values.shape, np.uint32)
    bits[...] = values
    bits <<= 16
    return bits.view(np.float32)


def _narrow(values: np.ndarray, dtype: str, room: Room | None = None) -> np.ndarray:
    """What to assign to an array of the type for doubles: rounded once, to nearest even. Save for bfloat16 numpy rounds so itself."""
    if dtype != "BF16":
        return values
    room, flat = room or Room(), values.reshape(-1)
    bits, rest = (room(name, flat.shape, np.uint32) for name in ("bits", "rest"))
    single = bits.view(np.float32)
    single[:] = flat
    nan = np.isnan(single)
    # Rounding twice, to fp32 and to bf16, errs only where the first rounding lands half-way between two bf16: there, step off to its side.
    np.bitwise_and(bits, 0xFFFF, out=rest)
    half = np.flatnonzero(rest == 0x8000)
    aside = np.abs(flat[half]) - np.abs(single[half])
    bits[half] += (aside > 0).astype(np.uint32) - (aside < 0).astype(np.uint32)
    np.right_shift(bits, 16, out=rest)
    rest &= 1
    rest += 0x7FFF
    bits += rest
    bits >>= 16
    bits[nan] = 0x7FC0
    return bits.reshape(values.shape)


def _finite(raw: np.ndarray, dtype: str) -> bool:
    if dtype == "BF16":
        return bool((raw.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7F80)
    return dtype not in FLOATS or bool(np.isfinite(raw.view(DTYPES[dtype][0])).all())


def _product(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y = weights @ x. Neighbouring targets share most of their window, so four rows at a time meet only the checkpoints they use; and the
    pieces stay below the 2^18 products from which OpenBLAS would start threads, which fight with ours (40 times slower on two cores)."""
    for m in range(0, len(weights), 4):
        used = np.flatnonzero(weights[m:m + 4].any(axis=0))
        some, part = weights[m:m + 4, used[0]:used[-1] + 1], x[used[0]:used[-1] + 1]
        width = 1 << ((1 << 18) // some.size).bit_length() - 1
        whole = x.shape[1] // width * width
        for start, stop, piece in ((0, whole, width), (whole, x.shape[1], x.shape[1] - whole)):
            if stop > start:  # all pieces in one call, as a stack of matrices: threads meet at Python's lock between calls
                stack = [array[:, start:stop].reshape(len(array), -1, piece).swapaxes(0, 1) for array in (part, y[m:m + 4])]
                np.matmul(some, stack[0], out=stack[1])


def _sum(parts: Iterator[np.ndarray], y: np.ndarray) -> None:
    """y = the parts added up one by one; numpy widens each a few thousand values ahead of the addition, in the cache."""
    y[:] = next(parts)
    for part in parts:
        y += part


class Mix:
    """rows @ raws for tensors of the same types, tile after tile: the arithmetic.

    Args: rows (M, N) weights, each row summing to 1; dtypes: codes of the N inputs, oldest first; out_dtype: code of the result.
    Products and sums run in double (long double where a type is double) and are rounded once. Equal weights become a sum and one
    division, so uniform means are those of exact arithmetic wherever the sum is exact. Means are summed value by value, and for products
    tiles are whole blocks, so the bits depend neither on tiles nor on threads. A lone weight gives the bytes as they are; what is no float
    comes from the newest of its row.
    """

    def __init__(self, rows: np.ndarray, dtypes: tuple[str, ...], out_dtype: str):
        self.rows, self.dtypes, self.out_dtype = rows, dtypes, out_dtype
        self.used = used = [np.flatnonzero(weights) for weights in rows]
        self.todo = [m for m, own in enumerate(used) if dtypes[0] in FLOATS and (len(own) > 1 or dtypes[own[0]] != out_dtype)]
        self.sizes, self.wide = [itemsize(dtype) for dtype in dtypes], np.longdouble if "F64" in (*dtypes, out_dtype) else np.float64
        uniform = np.array([np.ptp(weights[own]) == 0 for weights, own in zip(rows, used, strict=True)])[:, None]
        self.divisor = np.where(uniform, np.count_nonzero(rows, axis=1)[:, None], 1).astype(self.wide)[self.todo]
        self.weights = np.where(uniform, rows != 0, rows).astype(self.wide)[self.todo]
        self.is_mean = len(self.todo) == 1 and bool((self.weights == 1).all())  # of all the checkpoints
        self.block = BLOCK if self.is_mean else _block(len(dtypes))

    def __call__(self, raws, room: Room) -> list[np.ndarray]:
        """M byte arrays, to read only, until the room's next use. raws: bytes (uint8) of N equally many values, as an array (N, bytes) if
        all are of one type, else a list; room: memory to use."""
        outs = [raws[own[-1]] for own in self.used]
        if self.todo:
            count, size = len(raws[0]) // self.sizes[0], itemsize(self.out_dtype)
            mixed = room("mixed", (len(self.todo), count * size), np.uint8)
            with np.errstate(over="ignore", invalid="ignore"):
                for start in range(0, count, self.block):
                    stop = min(start + self.block, count)
                    y = self._sums(raws, start, stop, room)
                    y /= self.divisor
                    mixed[:, start * size:stop * size].view(DTYPES[self.out_dtype][0])[:] = _narrow(y, self.out_dtype, room)
            for m, out in zip(self.todo, mixed, strict=True):
                outs[m] = out
        return outs

    def _sums(self, raws, start: int, stop: int, room: Room) -> np.ndarray:
        """Values [start, stop) of the M sums, (M, values)."""
        places = [slice(start * size, stop * size) for size in self.sizes]
        y = room("y", (len(self.todo), stop - start), self.wide)
        parts = (_widen(raw[place], dtype, room) for raw, place, dtype in zip(raws, places, self.dtypes, strict=True))
        if self.is_mean:
            _sum(parts, y[0])
            return y
        x = room("x", (len(raws), stop - start), self.wide)
        if isinstance(raws, np.ndarray):
            x[:] = _widen(raws[:, places[0]], self.dtypes[0], room)  # in one call
        else:
            for values, part in zip(x, parts, strict=True):
                values[:] = part
        _product(self.weights, x, y)
        return y

    def alone(self, m: int, raws) -> np.ndarray:
        """Row m from its own checkpoints, since 0 * NaN is NaN where another's value is none."""
        own = self.used[m]
        return Mix(self.rows[m:m + 1, own], tuple(self.dtypes[n] for n in own), self.out_dtype)([raws[n] for n in own], Room())[0]


def _tiles(entries: Mapping[str, Entry], width: int) -> list[tuple[str, int, int]]:
    """(tensor, first value, last value + 1) of every tile, `width` values wide."""
    return [(name, start, min(start + width, entry.numel)) for name, entry in entries.items() for start in range(0, entry.numel, width)]


def _raws(inputs: list[Entry], start: int, stop: int, room: Room):
    """Values [start, stop) of one tensor of every checkpoint as `Mix` takes them: read into an array, unless they are in memory."""
    places = [(start * itemsize(entry.dtype), stop * itemsize(entry.dtype)) for entry in inputs]
    if len({entry.dtype for entry in inputs}) > 1 or any(entry.data is not None for entry in inputs):
        return [entry.read(*place) for entry, place in zip(inputs, places, strict=True)]
    raws = room("raws", (len(inputs), places[0][1] - places[0][0]), np.uint8)
    for entry, out in zip(inputs, raws, strict=True):
        entry.fill(places[0][0], out)
    return raws


class Mixer:
    """Reads one tile of every checkpoint, mixes it, and calls write(row, tensor, offset, bytes) for every row.

    Called with a tile, on any thread, it returns who made the average NaN or Inf.
    """

    def __init__(self, opened: Mapping[int, Checkpoint], rows: np.ndarray, entries: Mapping[str, Entry], write: Callable, allow=()):
        self.opened, self.rows, self.entries, self.write, self.allow, self.room = opened, rows, entries, write, allow, Room()
        self.mix = functools.cache(functools.partial(Mix, rows))

    def __call__(self, tile: tuple[str, int, int]) -> list[str]:
        name, start, stop = tile
        inputs, out, problems = [checkpoint.entry(name) for checkpoint in self.opened.values()], self.entries[name].dtype, []
        mix, raws = self.mix(tuple(entry.dtype for entry in inputs), out), _raws(inputs, start, stop, self.room)
        for m, data in enumerate(mix(raws, self.room)):
            if not _finite(data, out):
                data = mix.alone(m, raws) if len(mix.used[m]) < len(raws) else data
                problems += [] if "nonfinite" in self.allow or _finite(data, out) else self._blame(m, name, inputs, raws)
            self.write(m, name, start * itemsize(out), data)
        return problems

    def _blame(self, m: int, name: str, inputs: list[Entry], raws) -> list[str]:
        guilty = [inputs[n].path for n in np.flatnonzero(self.rows[m]) if not _finite(raws[n], inputs[n].dtype)]
        return [f"{path}: {name} holds NaN or Inf; leave it out (or --allow nonfinite)" for path in guilty] or [
            f"{name} overflows {self.entries[name].dtype} in the average; write it with a wider --dtype"]


def _layout(opened: Mapping[int, Checkpoint]) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries, ties) of an average: the newest's names and types; what is tied in every checkpoint stays tied."""
    newest = opened[max(opened)]
    ties = {name: kept for name, kept in newest.aliases.items() if all(c.aliases.get(name, name) == c.aliases.get(kept, kept)
                                                                       for c in opened.values())}
    return {name: newest.entry(name) for name in newest if name not in ties}, ties
