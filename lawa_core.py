"""The averager: average the checkpoints of a training run, in memory, file to file, or online.

One sentence carries the file: an average is a row of weights over a trajectory,

    average = sum over steps s of  weight[s] * checkpoint[s]        (weights sum to 1)

so LAWA (arXiv 2306.03241), SWA (1803.05407), EMA and decay-shaped merges (WSM, 2507.17634) differ
only in the row. The sections follow the data: 1 errors and progress, 2 schemes, 3 checkpoints in
and out, 4 trajectories, 5 the engine, 6 averages, 7 search, 8 online averages, 9 command line.

A scheme in lower case, `lawa(k=5)`, is a rule for weights; in upper case, `LAWA(model, k=5)`, it
follows a model in training. Files are read and written with numpy alone; torch is imported where
tensors are handed out or a .pt is read. Copy this file anywhere: it needs no other of its project.
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__version__ = "0.2.0"


# ---- 1. Errors and progress ----------------------------------------------------------------------

class LawaError(ValueError):
    """A mistake the user can mend: says what was expected, what came, and what to do."""


class JobFailed(LawaError):
    """The input was right and the work failed all the same: a full disk, a crashed validation."""


def refuse(problems) -> None:
    """Raise the problems, if there are any, as one line."""
    if problems:
        more = f"; and {len(problems) - 6} more" * (len(problems) > 6)
        raise LawaError("; ".join(problems[:6]) + more)


@contextlib.contextmanager
def explained(text: str, kind: type = LawaError):
    """Whatever a broken file or a full disk makes a library raise, as a line that `text` begins."""
    try:
        yield
    except (LawaError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch.distributed's are no Exceptions
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{text} ({reason})") from None


def progress(total: float | None, desc: str = "", unit: str = "it", **options):
    """A tqdm bar on a terminal; elsewhere a line every five seconds, none for shorter work.

    Returns a context manager with `update(n)` and `set_postfix_str(text)`; silent without tqdm.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        silent = SimpleNamespace(n=0, update=lambda n: None, set_postfix_str=lambda text: None)
        return contextlib.nullcontext(silent)

    def write(text: str) -> None:  # for logs and notebooks, where no carriage return goes back
        if text.strip():
            print(text.strip(), flush=True)
    if not (sys.stderr and sys.stderr.isatty()):
        line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
        options |= {"file": SimpleNamespace(write=write), "mininterval": 5, "delay": 5,
                    "bar_format": line}
    bar = tqdm(total=total, desc=desc, unit=unit, **options)
    bar.set_postfix_str = functools.partial(bar.set_postfix_str, refresh=False)
    return bar


# ---- 2. Schemes ----------------------------------------------------------------------------------
# A scheme is a function from (available steps, target step) to {step: weight}, summing to 1.

def some(steps) -> str:
    """A few of many steps, for an error."""
    if len(steps) <= 6:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]} ({len(steps)} steps)"


def positive(**values) -> None:
    """Refuse a value that is neither None nor a whole number of at least 1."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LawaError(f"{name} must be a whole number of at least 1, got {value!r}")


def latest(steps, at: int, start: int, every: int | None, anchor: int, k: int = 0) -> list[int]:
    """The k latest (0: all) of the steps from `start` to `at`; [at] where there are none.

    every: only those on the grid anchor + n * every, all of which must be there.
    """
    window = [step for step in steps if start <= step <= at]
    if every is not None and window:
        window = list(range(window[0] + (anchor - window[0]) % every, at + 1, every))
    window = window[-k:] or [at]
    missing = sorted(set(window) - set(steps))
    if missing:
        raise LawaError(f"no checkpoint at step {missing[0]}, which an average at step {at} with "
                        f"spacing {every} needs; there are {some(steps)}; use a spacing that is "
                        "a multiple of the checkpoint interval")
    return window


def equal(window) -> dict[int, float]:
    return dict.fromkeys(window, 1 / len(window))


class Scheme:
    """What the schemes share: counts and durations in steps are whole numbers of at least 1."""

    def __post_init__(self):
        counts = ("k", "spacing", "every", "window")
        positive(**{name: getattr(self, name) for name in counts if hasattr(self, name)})
        if not isinstance(getattr(self, "start", 0), int):
            raise LawaError(f"start must be a step, a whole number, got {self.start!r}")


@dataclass(frozen=True)
class newest(Scheme):
    """The run itself."""

    def __call__(self, steps, at):
        return {at: 1.0}


@dataclass(frozen=True)
class lawa(Scheme):
    """Latest weight averaging: the mean of the k latest checkpoints (arXiv 2306.03241, 2209.14981).

    spacing: steps between them; None: the k latest there are. start: no earlier step counts; before
    it the average is the run itself. A window part full divides by what it holds.
    """
    k: int
    spacing: int | None = None
    start: int = 0

    def __call__(self, steps, at):
        return equal(latest(steps, at, self.start, self.spacing, at, self.k))


@dataclass(frozen=True)
class swa(Scheme):
    """Stochastic weight averaging: the mean of every `every`-th step since `start` (1803.05407)."""
    start: int = 0
    every: int | None = None

    def __call__(self, steps, at):
        return equal(latest(steps, at, self.start, self.every, self.start))


@dataclass(frozen=True)
class ema(Scheme):
    """Exponential moving average e <- beta e + (1 - beta) w, begun at the first w.

    Updated every `every` steps since `start`; None: at every checkpoint. half_life instead of beta:
    the steps in which what is remembered halves, or a share of the steps so far, as "5%".
    """
    beta: float | None = None
    every: int | None = None
    start: int = 0
    half_life: float | str | None = None

    def __post_init__(self):
        super().__post_init__()
        with explained("ema takes a beta in [0, 1) or a half_life above 0, as 500 (steps) or 5% "
                       f"(of the steps so far), got {self.beta!r} and {self.half_life!r}"):
            if (self.beta is None) == (self.half_life is None) or not 0 <= self.kept(1, 100) < 1:
                raise ValueError("one of the two, in its range")

    def kept(self, gap: int, at: int) -> float:
        """The share that is left of a sum after `gap` steps, in the average at step `at`."""
        if self.half_life is None:
            return self.beta
        words = str(self.half_life)
        half = float(words.removesuffix("%")) * (at / 100 if words.endswith("%") else 1)
        return 0.5 ** (gap / half)

    def __call__(self, steps, at):
        window = latest(steps, at, self.start, self.every, self.start)
        weights, rest = {}, 1.0  # rest: what the steps before have of the sum
        for before, step in reversed(list(pairwise(window))):
            kept = self.kept(step - before, at)
            weights[step] = rest * (1 - kept)
            rest *= kept
        return weights | {window[0]: rest}


SHAPES = {  # share of the learning rate that is left, over the share of the decay that is done
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


@dataclass(frozen=True)
class decay(Scheme):
    """Merge weights that emulate a learning-rate decay over the last `window` steps (2507.17634).

    With theta_0 ... theta_n in the window and the curve w_j = shape(j / (n + 1)): c_n = w_n,
    c_j = w_j - w_{j+1}, c_0 = 1 - w_1; a linear decay is the uniform mean. shape: "linear",
    "cosine", "1-sqrt" or a function of x in [0, 1].
    """
    window: int
    shape: str | Callable[[float], float] = "1-sqrt"
    every: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.shape) and self.shape not in SHAPES:
            raise LawaError(f"shape must be {', '.join(SHAPES)} or a function, got {self.shape!r}")

    def __call__(self, steps, at):
        window = latest(steps, at, max(at - self.window, min(steps)), self.every, at)
        shape = self.shape if callable(self.shape) else SHAPES[self.shape]
        curve = [float(shape(j / len(window))) for j in range(1, len(window))]
        falls = [before - after for before, after in pairwise([1.0, *curve, 0.0])]
        return dict(zip(window, falls, strict=True))


@dataclass(frozen=True)
class explicit(Scheme):
    """Given weights, the last for the newest checkpoint, divided by their sum.

    A checkpoint of weight zero is not read; a negative weight extrapolates.
    """
    weights: tuple[float, ...]
    spacing: int | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if not 1e-12 < abs(math.fsum(self.weights)) < math.inf:
            raise LawaError(f"weights must be finite, with a sum other than 0, got {self.weights}")

    def __call__(self, steps, at):
        window = latest(steps, at, 0, self.spacing, at, len(self.weights))
        if len(window) < len(self.weights):
            raise LawaError(f"{len(self.weights)} weights need as many checkpoints by step {at}; "
                            f"there are {len(window)}")
        total = math.fsum(self.weights)
        return {step: w / total for step, w in zip(window, self.weights, strict=True)}


@dataclass(frozen=True)
class blend(Scheme):
    """A share of an average, the rest the newest checkpoint."""
    share: float
    average: Callable

    def __call__(self, steps, at):
        weights = {step: self.share * weight for step, weight in self.average(steps, at).items()}
        return weights | {at: weights.get(at, 0) + 1 - self.share}


SCHEMES = {scheme.__name__: scheme for scheme in (newest, lawa, swa, ema, decay, explicit)}


def parse_scheme(text: str):
    """The scheme that a text such as "lawa(k=5, spacing=100)" writes: literals only, not run."""
    with explained(f"scheme {text!r} not understood; expected {', '.join(SCHEMES)}, with arguments "
                   "as in lawa(k=5, spacing=100), ema(half_life=5%), explicit([0.2, 0.8])"):
        shares = re.sub(r"(?<!['\"\d.])(\d+(?:\.\d+)?%)", r"'\1'", text.strip())  # no Python
        call = ast.parse(shares if "(" in shares else f"{shares}()", mode="eval").body
        args = [ast.literal_eval(arg) for arg in call.args]
        keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        return SCHEMES[call.func.id](*args, **keywords)


def scheme_dir(text: str) -> str:
    """The one name of the folder that holds a scheme's averages: "ema(0.99)" -> "ema-0.99"."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")


def tokens(n: float, per_step: int) -> int:
    """A duration of `n` tokens in steps of `per_step` tokens; LawaError unless it is whole."""
    positive(per_step=per_step)
    if n % per_step:
        raise LawaError(f"{n:g} tokens are {n / per_step:.3f} steps of {per_step} tokens; expected "
                        f"a multiple, such as {round(n / per_step) * per_step}")
    return int(n // per_step)


class Row:
    """How the average of `scheme` at step `at` is made of the steps there are: in their order,

        sum <- keep * sum + add[step] * checkpoint[step],    at the end    sum / total.

    keep is 1, or an EMA's beta; the adds are the weights, or 1 where all are equal, so that a mean
    is a sum with one division. SWA's and EMA's goes on from the sum of the row `before`, which is
    kept, and to which `todo` is added; a window that slides is summed anew, since what leaves it
    would leave its rounding behind. reads: the steps whose checkpoints this takes.
    weights: {step: weight}, ascending, without zeros, divided by their sum.
    """

    def __init__(self, scheme, steps, at: int, before: Row | None = None):
        if at not in steps:
            raise LawaError(f"no checkpoint at step {at}; there are {some(steps)}")
        given = {step: float(weight) for step, weight in sorted(scheme(steps, at).items())}
        total = math.fsum(given.values())
        if not set(given) <= set(steps) or not 1e-12 < abs(total) < math.inf:
            raise LawaError(f"{scheme} gives weights that sum to {total} over steps "
                            f"{some(list(given))}; expected 1, on available steps")
        self.scheme, self.at = scheme, at
        self.weights = {step: weight / total for step, weight in given.items() if weight}
        self.keep, self.add = 1.0, self.weights
        if isinstance(scheme, ema) and scheme.beta:
            self.keep, self.add = scheme.beta, dict.fromkeys(given, 1.0)
            self.add[min(given)] = 1 / (1 - scheme.beta)
        elif len(set(self.weights.values())) == 1:
            self.add = dict.fromkeys(self.weights, 1.0)
        self.total = np.longdouble(0)
        for add in self.add.values():
            self.total = self.keep * self.total + add
        self.newest, self.todo = max(self.add), self.add
        self.goes_on = self.kept = False  # from the row before; for the row after
        grows = isinstance(scheme, swa) or self.keep != 1
        if grows and before and before.scheme == scheme:
            self.goes_on = before.kept = before.add.items() <= self.add.items()
        if self.goes_on:
            self.todo = dict(sorted(self.add.items() - before.add.items()))
        self.reads = {*self.todo, self.newest}


def row(scheme, steps, at: int) -> dict[int, float]:
    """The scheme's weights {step: weight} at step `at`: ascending, without zeros, summing to 1."""
    return Row(scheme, steps, at).weights


# ---- 3. Checkpoints in and out -------------------------------------------------------------------

# safetensors' code: (numpy's storage type, torch's name). numpy has no bfloat16: uint16 holds it.
DTYPES = {
    "F64": ("<f8", "float64"), "F32": ("<f4", "float32"), "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"), "I64": ("<i8", "int64"), "I32": ("<i4", "int32"),
    "I16": ("<i2", "int16"), "I8": ("<i1", "int8"), "U8": ("<u1", "uint8"),
    "U16": ("<u2", "uint16"), "U32": ("<u4", "uint32"), "U64": ("<u8", "uint64"),
    "BOOL": ("?", "bool"),
}
CODES = {f"torch.{name}": code for code, (_, name) in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")  # averaged; all others are copied from the newest checkpoint
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")  # the last as in .pth.tar
FOREIGN = {  # endings of what is not read: how to make of it what is
    (".gguf", ".onnx"): "average the checkpoints it was made from",
    (".npz",): "save its arrays with safetensors.numpy.save_file",
    (".h5", ".msgpack"): "load it with from_tf or from_flax in transformers 4 and save that",
    ("optim_states.pt",): "it is DeepSpeed's optimizer; its zero_to_fp32.py makes a model of all",
    (".distcp", ".index.json"): "give the folder that it lies in",
}
# The weights of a Hugging Face folder, in the order in which transformers looks for them.
WEIGHTS = [f"{name}{end}" for name in (
    "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
) for end in ("", ".index.json")]
COPIED = ("*.json", "*.py", "*.model", "*.tiktoken", "*.jinja", "*.spm", "*.bpe", "vocab*",
          "merges*")  # beside the weights
# Where a .pt keeps the weights; the first is Lightning's, beside their average.
NESTED = ("current_model_state", "model", "state_dict", "model_state_dict", "module")
NOT_WEIGHTS = re.compile(r"""  # names of files, folders and groups of tensors
    (?<!model_)(?<!model_and_)optim | ^opt$ | sched | (?<!up)scaler | (?<!optim_)rng | dataloader
    | training_args | trainer | ^resume(?![a-z]) | ^(train(_state)?|other)(\.pt)?$ | ^state_\d+\.pt$
    | \.index\.json$ | ^tmp[-_] | ^\.
    """, re.IGNORECASE | re.VERBOSE)
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # torch.compile's and DDP's prefixes
# One file of a model that was split over several.
PART = re.compile(r"(?<![a-z])(?:rank|tp|pp|dp|fsdp|shard|part|layer|consolidated)[-_.]?\d+|"
                  r"\d+-of-(?!0*1\b)\d+", re.IGNORECASE)
SCALES = re.compile(r"(scales?|scale_inv|SCB|absmax)$")  # of quantised weights
STAMP = attrgetter("st_ino", "st_size", "st_mtime_ns")  # of os.stat: changes when its file does


class Stored:
    """One tensor of a checkpoint, not yet read; tied names share one.

    dtype: torch's or safetensors' code; read(start, stop): its bytes, row-major, not to be changed.
    """

    def __init__(self, dtype, shape, path, read: Callable[[int, int], np.ndarray]):
        self.dtype = CODES.get(str(dtype), str(dtype))
        if self.dtype not in DTYPES:
            raise LawaError(f"{path} holds {dtype}, which is not averaged; expected one of "
                            f"{', '.join(DTYPES)}")
        self.shape, self.path, self.read = tuple(shape), str(path), read
        self.itemsize, self.numel = np.dtype(DTYPES[self.dtype][0]).itemsize, math.prod(shape)
        self.nbytes = self.numel * self.itemsize
        self.kind = f"{'float' if self.dtype in FLOATS else self.dtype} {list(shape)}"

    def tensor(self, data: np.ndarray):
        """All its bytes as a torch.Tensor on the same memory."""
        import torch
        storage, name = DTYPES[self.dtype]
        return torch.from_numpy(data.view(storage)).view(getattr(torch, name)).reshape(self.shape)


class Checkpoint(UserDict):
    """A lazy mapping name -> torch.Tensor (a fresh CPU copy at every look-up), opened by header.

    data: {name: Stored}; metadata: the header's strings; nbytes: tied tensors count once; left_out:
    what else the file holds, in words; put_back: makes of an average's state dict what a torch file
    like this one holds, other keys and all.
    """

    def __init__(self, path, stored: Mapping[str, Stored], metadata: Mapping | None = None,
                 left_out=(), put_back: Callable[[dict], dict] = dict):
        self.path, self.data, self.metadata = Path(path), dict(stored), dict(metadata or {})
        self.left_out, self.put_back = list(left_out), put_back
        if not stored:
            raise LawaError(f"{path} holds no tensors; expected a model's weights")
        if "__metadata__" in stored:
            raise LawaError(f"{path} holds __metadata__, which no tensor may be called; rename it")
        self.dtypes = {name: one.dtype for name, one in stored.items()}
        self.shapes = {name: one.shape for name, one in stored.items()}
        self.nbytes = sum(one.nbytes for one in set(stored.values()))

    def __getitem__(self, name):
        stored = self.data[name]
        return stored.tensor(stored.read(0, stored.nbytes).copy())

    @functools.cached_property
    def ties(self) -> dict[str, str]:
        """{further name: first name} of tied tensors."""
        first = {stored: name for name, stored in reversed(self.data.items())}
        return {name: first[s] for name, s in self.data.items() if first[s] != name}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over 64 bytes from the middle of every tensor: equal for identical weights."""
        digest = hashlib.sha256()
        for name in sorted(self.data.keys() - self.ties.keys()):
            stored = self.data[name]
            middle = max(stored.nbytes - 64, 0) // 16 * 8
            digest.update(name.encode(errors="surrogatepass"))
            digest.update(stored.read(middle, min(middle + 64, stored.nbytes)))
        return digest.hexdigest()

    def equals(self, other: Checkpoint) -> bool:
        """Whether both are the same, byte for byte; stops at the first difference."""
        if self.dtypes != other.dtypes or self.shapes != other.shapes:
            return False
        for name, stored in self.data.items():
            for start in range(0, stored.nbytes, 1 << 20):
                place = start, min(start + (1 << 20), stored.nbytes)
                if not np.array_equal(stored.read(*place), other.data[name].read(*place)):
                    return False
        return True


def open_checkpoint(path, key: str | None = None) -> Checkpoint:
    """Open .safetensors, .pt/.pth/.bin/.ckpt, or a Hugging Face or torch distributed folder.

    key: where a nested .pt or distributed checkpoint holds its weights, as "a.b", or "." for all
    that it holds; default: see `weights_of`. Wrappers' prefixes `_orig_mod.` and `module.` in
    front of all names are stripped. Reads the header; only tensors are unpickled.
    Errors: LawaError for a missing, truncated, corrupt or unsafe file, naming it, and for a part of
    a split model, placeholders of a sharded one, and quantised weights.
    """
    path = Path(path)
    if not path.exists():
        raise LawaError(f"no such checkpoint: {path}")
    whole_model(path)
    if (path / ".metadata").exists():
        found = open_distributed(path, key)
    elif path.is_dir():
        found = open_hf(path, key)
    else:
        found = open_file(path, key)
    bare = {WRAPPERS.sub("", name): stored for name, stored in found.data.items()}
    if all(map(WRAPPERS.match, found)) and len(bare) == len(found):  # a wrapper prefixes all names
        found = Checkpoint(path, bare, found.metadata, found.left_out, found.put_back)
    scaled = {name.rpartition(".")[0] for name in found if SCALES.search(name)}
    for name, stored in found.data.items():
        if stored.shape == (0,):
            raise LawaError(f"{path}: {name} has shape [0], a placeholder of sharded training; put "
                            "the model together first (zero_to_fp32.py, a full state dict)")
        integer = stored.dtype not in (*FLOATS, "BOOL", "I64") and len(stored.shape) > 1
        if integer and scaled & {name, name.rpartition(".")[0]}:
            raise LawaError(f"{path}: {name} is quantised, {stored.dtype} with scales beside it; "
                            "average the checkpoints it was made from")
    return found


def whole_model(path: Path) -> None:
    """Refuse a file or folder that is one of the parts of a split model."""
    for level in (path, *path.parents[:2]):  # such as tp_rank_0/weights/model.pt
        rankless = PART.sub("#", level.name)
        if rankless != level.name:
            beside = level.absolute().parent.iterdir()
            alike = [other for other in beside if PART.sub("#", other.name) == rankless]
            if len(alike) > 1 or (level.is_file() and "-of-" in level.name):
                raise LawaError(f"{level} is one rank's part of a model that was split; give the "
                                "folder with their index, or join them first (zero_to_fp32.py)")
        if read_name(level.name)[0]:  # the step's own folder or file
            return


def open_file(path: Path, key: str | None) -> Checkpoint:
    """A file by its name's ending."""
    with open(path, "rb") as file:
        if file.read(19) == b"version https://git":
            raise LawaError(f"{path} is a pointer of git-lfs, not the file; run git lfs pull")
    if path.suffix == ".safetensors":
        if key not in (None, "."):
            raise LawaError(f"{path} has no keys to choose from, got --key {key}; leave it out")
        return open_safetensors(path)
    for ends, advice in FOREIGN.items():
        if path.name.lower().endswith(ends):
            raise LawaError(f"{path} is not read; {advice}")
    if path.suffix not in SUFFIXES:
        raise LawaError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    return open_torch(path, key)


def open_hf(path: Path, key: str | None) -> Checkpoint:
    """A Hugging Face folder: of its weights those that transformers would load."""
    problems = []
    for name in (file for file in WEIGHTS if (path / file).is_file()):
        index, places, files = path / name, {}, [name]
        with explained(f"{index}: corrupt index"):
            if name.endswith(".index.json"):
                places = dict(json.loads(index.read_text())["weight_map"].items())
                files = sorted(set(places.values()))
            lost = [f for f in files if Path(f).name != f or not (path / f).is_file()]
        if not lost:
            break  # else a whole single file counts, if there is one
        problems.append(f"{path}: missing shard {', '.join(lost)}, named in {name}; fetch it again")
    else:
        refuse(problems or [f"{path} is no checkpoint: expected one of {', '.join(WEIGHTS[:4])}, "
                            ".metadata in it"])
    stored, metadata = {}, {}
    for file in files:
        part = open_file(path / file, key)
        lacking = {name for name in places if places[name] == file} - part.keys()
        stale = lacking | (part.keys() - places.keys())
        if places and stale:
            raise LawaError(f"{index} is stale: {min(stale)} is not where it says; write it again")
        stored |= {name: one for name, one in part.data.items() if places.get(name, file) == file}
        metadata |= part.metadata
    left_out = {name: "a buffer" for name, one in stored.items() if is_buffer(name, one)}
    kept = {name: one for name, one in stored.items() if name not in left_out}
    left_out |= {other.name: "not the model's own file" for other in candidates(path.iterdir())
                 if other.name not in files and (other.is_file() or is_checkpoint(other))}
    return Checkpoint(path, kept, metadata, [f"{name} ({why})" for name, why in left_out.items()])


def is_buffer(name: str, stored: Stored) -> bool:
    """Is it a causal mask, its fill value or rotary frequencies, which some revisions have?"""
    end = name.rpartition(".")[2]
    if end != "bias":
        return end == "inv_freq" or (end == "masked_bias" and stored.numel == 1)
    if len(stored.shape) < 2 or stored.numel != stored.shape[-1] ** 2:
        return False
    return stored.dtype in ("BOOL", "U8") or np.array_equal(
        widen(stored.read(0, stored.nbytes), stored.dtype), np.tri(stored.shape[-1]).ravel())


def read_file(path: Path, known: tuple, offset: int, start: int, stop: int) -> np.ndarray:
    """Bytes [start, stop) behind `offset`, fresh, of a file whose STAMP is still `known`."""
    out, done = np.empty(stop - start, np.uint8), 0
    try:
        with open(path, "rb", buffering=0) as file:  # for every tile: a few of 100 microseconds
            if STAMP(os.stat(file.fileno())) != known:
                raise LawaError(f"{path} changed while it was read; wait until its writer is done")
            while done < len(out):  # a read may come back short
                done += (count := os.preadv(file.fileno(), [out[done:]], offset + start + done))
                if not count:
                    raise LawaError(f"{path} is truncated: it ends in a tensor; copy it again")
    except OSError as error:
        raise LawaError(f"cannot read {path} ({error.strerror})") from None
    return out


def open_safetensors(path: Path) -> Checkpoint:
    """Layout: u64 length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, the tensors."""
    known, stored = STAMP(os.stat(path)), {}
    size = known[1]
    with (explained(f"{path}: truncated, corrupt or no safetensors file; copy it again"),
          open(path, "rb") as file):
        base = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(base - 8, size)))
        metadata = header.pop("__metadata__", {})
        for name, info in header.items():
            start, stop = info["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*info["shape"], start))
            read = functools.partial(read_file, path, known, base + start)
            stored[name] = Stored(info["dtype"], info["shape"], path, read)
            if not whole or stop - start != stored[name].nbytes or base + stop > size:
                raise ValueError(f"{name!r}: type, shape, offsets and the file's size disagree")
        # ours, and those of safetensors.torch.save_model, {name left out: name kept}
        ties = {name: kept for name, kept in metadata.items() if "." in name}
        with contextlib.suppress(ValueError, TypeError):
            ties |= json.loads(metadata.get("ties", "{}"))
        stored |= {name: stored[kept] for name, kept in ties.items() if kept in stored} | stored
    return Checkpoint(path, stored, metadata)


def open_torch(path: Path, key: str | None) -> Checkpoint:
    """A file of torch.save, its tensors mapped, with the weights at the top or under a key."""
    import torch
    try:
        with (warnings.catch_warnings(action="ignore"),
              torch.serialization.safe_globals([argparse.Namespace])):  # a trainer's arguments
            blob = torch.load(path, map_location="cpu", weights_only=True,
                              mmap=zipfile.is_zipfile(path))  # else older than torch 1.6
    except Exception as error:  # whose text goes on to advise what would run the file's code
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        why = (f"no readable torch file ({type(error).__name__}); copy it again, or save a state "
               "dict alone")
        if unsafe:
            why = f"refused, it holds {unsafe[1]}, which could run code; save the state dict alone"
        raise LawaError(f"{path}: {why}") from None
    if not isinstance(blob, Mapping):
        raise LawaError(f"{path} holds a {type(blob).__name__}; expected a state dict")
    with explained(f"{path}: not understood"):
        found = list(leaves(blob))
    tensors = {place: value for place, value in found if isinstance(value, torch.Tensor)}
    twice = Counter(".".join(place) for place, value in found if isinstance(value, torch.Tensor))
    refuse([f"{path} holds {name!r} more than once, such as 0 and '0'; rename one"
            for name, count in twice.items() if count > 1])
    prefix, names, outside = weights_of(tensors, key, path)
    # what is no tensor among the weights, such as a module's extra state
    extra = {".".join(place[len(prefix):]): value for place, value in found
             if place[:len(prefix)] == prefix and not isinstance(value, torch.Tensor)
             and (prefix or "_extra_state" in place[-1])}
    # what is beside the weights, but for other groups of tensors
    groups = {place[0] for place in tensors if len(place) > 1 or place in names}
    rest = {name: value for name, value in blob.items()
            if str(name) not in groups and not NOT_WEIGHTS.search(str(name))}

    def put_back(state):
        state = state | extra if prefix else state
        for name in reversed(prefix):  # current_model_state has become an average
            state = {"state_dict" if name == "current_model_state" else name: state}
        return rest | state
    weights = from_memory({name: tensors[place] for place, name in names.items()}, path)
    weights.left_out = outside + [f"{name} (no tensor)" for name in extra]
    weights.put_back = put_back
    if sidecar(path).exists():
        weights.metadata["lawa"] = sidecar(path).read_text()
    return weights


def leaves(tree: Mapping, above=()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(its keys from the top, value) of what nested dictionaries, and lists of tensors, hold."""
    import torch
    for name, value in tree.items():
        inside = value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(one, (torch.Tensor, Mapping, list, tuple)) for one in inside):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value


def weights_of(tensors, key: str | None, origin):
    """Which of a file's tensors, given by their keys from the top, are the weights.

    key as for `open_checkpoint`. Without: what lies under Lightning's current_model_state, else
    under the one of NESTED that is there, else the tensors at the top, if nothing is beside them
    but optimizers. Returns (the keys that lead to them, {place: name}, in words what is left out).
    """
    groups = dict.fromkeys(place[0] for place in tensors if len(place) > 1)
    known = [name for name in NESTED if name in groups]
    others = [name for name in groups if not NOT_WEIGHTS.search(name)]
    if key is not None:
        prefix = () if key == "." else (key,) if key in groups else tuple(key.split("."))
    else:
        prefix = tuple(known[:1]) if len(known) == 1 or "current_model_state" in known else ()
    names = {place: ".".join(place[len(prefix):]) for place in tensors
             if place[:len(prefix)] == prefix != place
             and (prefix or key == "." or len(place) == 1)}
    outside = Counter(place[0] for place in tensors if place not in names)
    left_out = [f"{name} ({n} tensor{'s' * (n > 1)})" for name, n in outside.items()]
    if (prefix and not names) or (key is None and not prefix and others):
        held = ", ".join([*left_out, *names.values()][:8]) or "no tensors"
        what = f"one of {', '.join(NESTED)}" if key is None else f"a state dict under {key!r}"
        raise LawaError(f"{origin} holds {held}; expected {what}; say which with --key "
                        f"{(known or others or ['NAME'])[0]}, or --key . for all")
    return prefix, names, left_out


def from_memory(tensors: Mapping, origin) -> Checkpoint:
    """{name: torch tensor or numpy array} as a checkpoint, read where it lies, not copied.

    What is no tensor is passed over: step counters beside the weights are no weights.
    """
    import torch
    kept = {name: torch.as_tensor(value).detach() for name, value in tensors.items()
            if isinstance(value, (torch.Tensor, np.ndarray))}
    for name, value in kept.items():
        whole = type(value) is torch.Tensor and value.layout == torch.strided
        if not whole or value.is_nested or value.is_meta:
            raise LawaError(f"{origin}: {name} is a tensor without plain values (sparse, nested, "
                            "meta, distributed or quantised); save it dense and whole")
    stored = {}
    for name, first in first_names(kept).items():
        value = kept[name]
        read = functools.partial(read_tensor, value)
        stored[name] = stored.get(first) or Stored(value.dtype, value.shape, origin, read)
    return Checkpoint(origin, stored)


def first_names(tensors: Mapping) -> dict[str, str]:
    """{name: the first name of the same place in memory}: tied tensors have one."""
    seen, first = {}, {}
    for name, t in tensors.items():
        place = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        first[name] = seen.setdefault(place, name) if t.numel() else name
    return first


def read_tensor(tensor, start: int, stop: int) -> np.ndarray:
    """Bytes [start, stop) of a tensor that may lie in a mapped file, on a device, or with gaps."""
    import torch
    first, last = start // tensor.element_size(), stop // tensor.element_size()
    if tensor.is_contiguous():
        values = tensor.view(-1)[first:last]
    else:  # gathered, a few at a time: an index takes 8 bytes a value and axis
        places = torch.arange(first, last, device=tensor.device).split(1 << 13)
        values = torch.cat([tensor[torch.unravel_index(some, tensor.shape)] for some in places])
    return values.cpu().view(torch.uint8).numpy()


def open_distributed(folder: Path, key: str | None) -> Checkpoint:
    """torch.distributed.checkpoint: pieces in .distcp files, put together a tensor at a time."""
    import torch
    import torch.distributed.checkpoint as dcp
    tensors = {}  # {keys from the top, such as ("model", "wte.weight"): (name, what it is)}
    with (explained(f"{folder}: not a readable distributed checkpoint"),
          open(folder / ".metadata", "rb") as file):
        index = Index(file).load()
        for name, info in index.state_dict_metadata.items():
            keys = (index.planner_data or {}).get(name, (name,))
            if name.startswith("optimizer."):  # flat, among flat weights
                keys = name.split(".", 1)
            if hasattr(info, "chunks"):
                tensors[tuple(map(str, keys))] = name, info
    _, own, outside = weights_of(list(tensors), key, folder)

    held = {}  # the one tensor of which tile after tile is read

    def read(name, info, start, stop):
        tensor = held.get(name)
        if tensor is None:
            held.clear()
            tensor = torch.empty(info.size, dtype=info.properties.dtype)
            with (explained(f"{folder}: cannot read {name}"),
                  warnings.catch_warnings(action="ignore")):  # that this is one process
                dcp.load({name: tensor}, checkpoint_id=folder, no_dist=True)
            held[name] = tensor
        return read_tensor(tensor, start, stop)
    stored = {}
    for keys, name in own.items():
        info = tensors[keys][1]
        reader = functools.partial(read, *tensors[keys])
        stored[name] = Stored(info.properties.dtype, info.size, folder, reader)
    return Checkpoint(folder, stored, left_out=outside)


class Index(pickle.Unpickler):
    """A distributed checkpoint's index is a pickle: of these classes, none of which runs code."""
    plain = re.compile(r"""
        torch\.distributed\.checkpoint\.(metadata\.(Metadata(Index)?|TensorProperties|StorageMeta
            |(Bytes|Chunk|Tensor)StorageMetadata|_MEM_FORMAT_ENCODING)|filesystem\._StorageInfo)
        | torch\.(Size|bool|(q?u?int|b?float|complex)\d+(_e\dm\w+)?|serialization\._get_layout)
        | collections\.OrderedDict | pathlib\.(Posix|Windows)Path""", re.VERBOSE)

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.0 to 3.11.3 write an enum's
            return lambda kind, member: kind.__members__[member]
        if not self.plain.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"refused, {module}.{name} could run code")
        return super().find_class(module, name)


def plan_file(stored: Mapping[str, Stored], ties: Mapping[str, str], metadata: Mapping):
    """A safetensors file's (header, {name: offset}, size); widest types first keeps all aligned."""
    table, offset = {}, 0
    for name in sorted(stored, key=lambda name: -stored[name].itemsize):
        one, start = stored[name], offset
        offset += one.nbytes
        table[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": (start, offset)}
    own = {"ties": json.dumps(ties)} if ties else {}
    text = json.dumps({"__metadata__": {"format": "pt", **metadata, **own}} | table).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    offsets = {name: base + info["data_offsets"][0] for name, info in table.items()}
    return len(text).to_bytes(8, "little") + text, offsets, base + offset


@contextlib.contextmanager
def sole_writer(path: Path):
    """Hold the lock of an output; JobFailed if another job, or thread, has it."""
    import fcntl
    lock = path.parent / f".{path.name}.lock"
    with explained(f"cannot write {path}", JobFailed):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with open(lock, "w") as file, contextlib.ExitStack() as stack:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobFailed(f"another job is writing {path}; wait, or choose another") from None
        except OSError:
            pass  # a file system without locks
        stack.callback(remove, lock)
        yield


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A hidden name beside `path` to write a file or folder to: renamed to `path` on success,
    removed on failure, so that nothing half-written is ever seen. JobFailed if the system refuses.
    """
    path = Path(path)
    part = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise JobFailed(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        remove(part)


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_left_parts(path: Path) -> None:
    """Remove what killed processes left under `replacing`'s hidden names for `path`."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(part.name.split(".")[-3]), 0)
            except ProcessLookupError:
                remove(part)


def save(path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Write {name: torch.Tensor or numpy array} to .safetensors (with `metadata`) or .pt.

    Atomic; tied tensors are written once; nothing is mutated.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise LawaError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    with replacing(path) as part, open(part, "wb") as file:
        if path.suffix != ".safetensors":
            import torch
            state = {name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
                     for name, value in tensors.items()}
            with explained(f"cannot write {path}", JobFailed):
                torch.save(state, file)
            return
        kept, ties = layout({0: from_memory(tensors, path)})
        header, offsets, _ = plan_file(kept, ties, metadata or {})
        file.write(header)
        for name in offsets:
            file.write(kept[name].read(0, kept[name].nbytes))


def companions(folder) -> list[Path]:
    """What goes with the weights of a Hugging Face folder: config, code, tokenizer, processor."""
    found = {path for pattern in COPIED for path in Path(folder).glob(pattern)}
    return [path for path in sorted(found) if path.is_file() and not NOT_WEIGHTS.search(path.name)]


def config_of(folder: Path) -> dict:
    """The config.json of a Hugging Face folder; empty without one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    with explained(f"{path}: expected a JSON object; mend it, or give a folder with --like"):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")).items())


def sidecar(path: Path) -> Path:
    """Where an averaged .pt, which has no header, keeps its provenance."""
    return path.with_name(f"{path.name}.lawa.json")


# ---- 4. Trajectories -----------------------------------------------------------------------------

ALLOW = ("nonfinite", "duplicates", "averages")  # what an average may be forced to accept
SOURCES: dict[str, Callable] = {}  # "hub": opens what stands behind "hub:"; lab.hub puts it in


def checkpoint_name(step: int) -> str:
    """The one name of a checkpoint's file; `step_of` reads it back."""
    return f"ckpt_{step}.safetensors"


# A step is the number behind one of the first words, or in front of one of the second (12epoch);
# the finest kind of word counts.
KEYS = {
    "step": ("(?:global[-_]?)?step|iteration|iter|it|update|ba", "step|iteration|iter|update"),
    "checkpoint": ("checkpoint|ckpt", "checkpoint|ckpt"),
    "epoch": ("epoch|ep", "epoch|ep"),
}
NUMBER = r"\d{1,18}(?:(?:\.\d+)?e\+?\d{1,2}|(?:\.\d+)?[km])?"  # also 10k, 1.5M, 1e4, 1e+06
END = r"(?![a-z\d]|[.,]\d)"
EXPONENTS = str.maketrans({"k": "e3", "m": "e6"})
WORDS = f"(?:{'|'.join(first for first, _ in KEYS.values())})s?"
AVERAGE = re.compile(  # or a link to one of the others: its number is of something else
    "(?<![a-z])(?:best|last|latest|avg|ave(?:raged?)?|swa|ema|soup|merged)(?![a-z])")
NOISE = re.compile(rf"""
    (?<![a-z]) (?!{WORDS}=) [a-z]+ = -?[\d.]+ (?:e[-+]?\d+)?  # any other word with =
    | \d+-of-\d+                                              # parts
    | (?<![a-z]) (?:
        (?:max|min|total|warmup|decay|save|eval|log|per)_{WORDS}
        | [a-z]*(?:loss|acc(?:uracy)?|ppl|bleu|[wc]er|score|reward|error|metric)(?:_{WORDS})?
        | [a-z]*(?:rank|seed|size|tokens?)
        | lr|wd|bs|beta|dropout|warmup|f1|top\d|auc|map|iou|fid|fp|bf|int|q|x|gpu
        | tp|pp|dp|fsdp|part|shard|consolidated|v|version|stage|phase|fold|run|exp|trial
    ) [-_.=]? [-+]? (?!20\d{{6}}(?!\d)) \d+ (?:\.\d+)* (?:e[-+]?\d+)? [a-z]? (?![a-z\d])
    """, re.VERBOSE)
TOKENS = {  # what the rest of a name is made of: at each place the first that fits
    **{kind: rf"""
        (?<![a-z]) (?:{first})s? [-_=. ]? {NUMBER} {END} (?:(?:[-_]\d+)+(?![a-z\d.]))?
        | (?<![a-z\d.,]) {NUMBER} [-_]? (?:{second})s? (?![a-z]|[-_=. ]?{NUMBER}{END})"""
       for kind, (first, second) in KEYS.items()},
    "other": r"""
        \d+\.\d+(?![kme\d])                                      # decimals
        | [\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}                # hashes
        | (?<![a-z\d]) (?=[\da-f]*\d[a-f]) [\da-f]{7,40} (?![a-z\d])""",
    "alone": rf"(?<![a-z\d%]){NUMBER}(?![a-z\d])",
    "joined": rf"(?<![a-z\d])[a-z]+\d+{END}",
}
TOKEN = re.compile("|".join(f"(?P<{kind}>{text})" for kind, text in TOKENS.items()), re.VERBOSE)


@functools.cache  # a run's names are read again whenever it is opened
def read_name(name: str) -> tuple[str, list[int]]:
    """(what its numbers count: step, checkpoint, epoch or nothing; the steps it may mean)."""
    stem, found = name.lower(), {}
    while stem.endswith(SUFFIXES):
        stem = stem.rpartition(".")[0]
    if AVERAGE.search(stem):
        return "", []
    for token in TOKEN.finditer(NOISE.sub("~", stem)):
        kind, texts = token.lastgroup, re.findall(NUMBER, token[0])
        numbers = [int(t) if t.isdigit() else round(float(t.translate(EXPONENTS))) for t in texts]
        if token[0].startswith("checkpoint_") and len(numbers) == 2 and numbers == sorted(numbers):
            kind, numbers = "step", numbers[1:]  # fairseq's epoch and update
        found.setdefault(kind, set()).update(numbers)
    for kind in (*KEYS, "alone", "joined"):
        if kind in found:
            return kind if kind in KEYS else "", sorted(found[kind])
    return "", []


def read_path(path: Path, above=None, pattern: str | None = None) -> tuple[str, list[int]]:
    """As `read_name`, for a path, of which what is `above` is not read: the nearest folder or file
    that has one of KEYS counts, else a bare number in the last name, or the folder around it if
    that is a number and nothing else. Or (nothing, what group 1 of the pattern finds in it)."""
    if pattern is not None:
        with explained(f"--step-regex {pattern!r}: expected a pattern with one group"):
            match = re.search(pattern, path.as_posix())
            return "", [int(match[1])] if match else []
    parts = (path.absolute().relative_to(above) if above else path).parts or ("",)
    names = [read_name(part) for part in reversed(parts)]
    for kind, steps in names:
        if kind:
            return kind, steps
    around = len(parts) > 1 and re.fullmatch(NUMBER, parts[-2].lower())
    return names[1] if around and not names[0][1] else names[0]


def step_of(path) -> int | None:
    """The step that a path names, by the grammar above; None if it names none, or two."""
    _, steps = read_path(Path(path))
    return steps[0] if len(steps) == 1 else None


class Trajectory:
    """The checkpoints of one run, {step: path}: `steps` ascending, `trajectory[step]` opens one."""
    allow: tuple | list = ()  # some of ALLOW
    passed_over: list | tuple = ()  # names in the run folder that name no step, or hold no weights
    notes: list | tuple = ()  # what is known of these checkpoints besides, for `inspect`

    def __init__(self, sources: Mapping[int, Path], name="the list", key=None):
        self.sources, self.name, self.key = dict(sorted(sources.items())), name, key
        self.steps = list(self.sources)

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, step) -> Checkpoint:
        if step not in self.sources:
            raise LawaError(f"no step {step} in {self.name}; there are {some(self.steps)}")
        return open_checkpoint(self.sources[step], self.key)

    def expect(self, steps) -> None:
        """A hook: these steps will be asked for, in order; what is far can be fetched ahead."""

    def release(self, step: int) -> None:
        """A hook: this step will not be asked for again; what was fetched can go."""

    def config_dir(self) -> Path:
        """The folder where the newest checkpoint's config and tokenizer are."""
        path = self[self.steps[-1]].path
        return path if path.is_dir() else path.parent


def open_trajectory(source, key: str | None = None, *, steps=None,
                    step_regex: str | None = None) -> Trajectory:
    """Open a run folder, a folder of step folders (step1000/, checkpoint-500/), a glob, a list of
    checkpoint paths, or what SOURCES knows, such as "hub:EleutherAI/pythia-1b-deduped".

    Steps come from the names (see `read_name`; what all paths have in common is not read), or from
    `steps`, one for each path of a list, or from group 1 of `step_regex` in each path. In a folder,
    what names no step (a `latest` link, ckpt_best.pt), optimizer files and hidden files are passed
    over; in a list or glob they are errors. A single checkpoint needs no step.
    Errors: LawaError for nothing found, steps that cannot be told, two files of one step.
    """
    if isinstance(source, Trajectory):
        return source
    kind, _, rest = str(source).partition(":")
    listed, over = not isinstance(source, (str, os.PathLike)) or source == "", []
    if listed:
        name, paths = "the list", list(map(Path, source))
        refuse([f"no such checkpoint: {path}" for path in paths if not path.exists()])
    elif kind in SOURCES:
        return SOURCES[kind](rest)
    elif kind == "hub":
        raise LawaError(f"{source} is opened by the command `lawa`, or after `import lab.hub`")
    else:
        name, paths = Path(source).name, [Path(source)]
        if paths[0].is_dir():
            paths, over = inside_run(paths[0], step_regex)
        elif not paths[0].exists():
            found = map(Path, glob.glob(str(source), recursive=True))
            paths = [path for path in candidates(found) if weights_in(path)]
    if not paths:
        raise LawaError(f"no checkpoints in {source}; expected ckpt_1000.safetensors, step1000/")
    if steps is not None:
        listed = listed or Path(source).is_file()
        if not listed or len(steps) != len(paths) or min(steps) < 0 or step_regex is not None:
            raise LawaError("--steps gives a step of at least 0 for each path of a list, without "
                            f"--step-regex; got {some(steps)} for {len(paths)} in {name}")
        readings = [("", [int(step)]) for step in steps]
    elif len(paths) == 1 and step_regex is None:
        step = step_of(paths[0])
        readings = [("", [1 if step is None else step])]
    else:
        above = os.path.commonpath([path.absolute().parent for path in paths])
        readings = [read_path(path, above, step_regex) for path in paths]
    if any(len(found) != 1 for _, found in readings) or len({kind for kind, _ in readings}) > 1:
        told = [f"{path} {' or '.join(map(str, found)) or 'none'} {kind}".rstrip()
                for path, (kind, found) in zip(paths, readings, strict=True)]
        raise LawaError(f"cannot tell the steps of {name}, read: {', '.join(told[:6])}"
                        f"{', ...' * (len(told) > 6)}; give them with --steps 100,200,300 for a "
                        r"list of paths in their order, or --step-regex 'name_(\d+)'")
    opened = {}
    for (_, (step,)), path in zip(readings, paths, strict=True):
        path = weights_in(path) or path
        if step in opened and not (path.exists() and path.samefile(opened[step])):
            raise LawaError(f"two checkpoints for step {step}: {opened[step]} and {path}; keep one")
        opened[step] = path
    run = Trajectory(opened, name, key)
    run.passed_over = over
    return run


def inside_run(folder: Path, step_regex: str | None) -> tuple[list[Path], list[str]]:
    """(what in a run folder is named by a step and holds weights, the names of what else may hold
    some); where nothing is, the one checkpoint that the folder is."""
    named, over = {}, []
    for path in candidates(folder.iterdir()):
        kind, steps = read_path(path, folder.absolute(), step_regex)
        # a folder that is no checkpoint itself may be anything, unless it names a step
        clear = kind or step_regex or not path.is_dir() or is_checkpoint(path)
        if steps and (clear or path.name.isdigit()) and (weights_in(path) or not path.exists()):
            named[path] = steps  # a dead link is an error
        elif clear:
            over.append(path.name)
    own = read_name(folder.absolute().name)[1]  # checkpoint-500/global_step500 is no run
    if named and not (is_checkpoint(folder) and own in named.values()):
        blank = functools.partial(re.sub, r"\d[\d.,]*(?:e\+?\d+)?[a-zA-Z]?(?![a-zA-Z])", "0")
        shapes = {blank(path.name) for path in named}
        refuse([f"{folder / name} is named as those that have a step, but has none; give a list "
                r"with --steps, or --step-regex 'name_(\d+)'"
                for name in over if blank(name) in shapes])
        return list(named), over
    inside = weights_in(folder)
    foreign = [p for p in sorted(folder.iterdir()) if p.name.lower().endswith(sum(FOREIGN, ()))]
    if foreign and not inside:
        open_file(foreign[0], None)  # which says what to do with it
    return ([inside] if inside else []), []


def candidates(paths) -> list[Path]:
    """Of files and folders those that may be weights or hold some, by their names."""
    return [path for path in sorted(paths) if not NOT_WEIGHTS.search(path.name)
            and (path.suffix in SUFFIXES or path.is_dir() or not path.exists())]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds weights that Hugging Face or torch.distributed wrote."""
    return any((path / name).exists() for name in (*WEIGHTS, ".metadata"))


def weights_in(path: Path, depth: int = 2) -> Path | None:
    """The one checkpoint that a path is or holds, up to `depth` folders below; or None."""
    if not path.is_dir() or is_checkpoint(path):
        return path if path.exists() else None
    inside = [weights_in(p, depth - 1) for p in candidates(path.iterdir()) if depth or p.is_file()]
    found = [weights for weights in inside if weights]
    # of the parts of a split model the first is taken, and refused when it is opened
    if len({PART.sub("", str(f)) for f in found}) > 1:
        names = [str(f.relative_to(path)) for f in found]
        raise LawaError(f"{path} holds several checkpoints: {some(names)}; give the folder of one "
                        f"run, a glob of one of a step's, such as '{path.parent / '*' / names[0]}',"
                        " or a list with --steps")
    return found[0] if found else None


def mismatches(checkpoint: Checkpoint, newest: Checkpoint) -> list[str]:
    """Names, shapes and kinds that differ from the newest checkpoint's, a line each."""
    ours = {name: stored.kind for name, stored in checkpoint.data.items()}
    theirs = {name: stored.kind for name, stored in newest.data.items()}
    names = sorted(dict(ours.items() ^ theirs.items()))
    return [f"{checkpoint.path}: {name} is {ours.get(name, 'missing')}, expected "
            f"{theirs.get(name, 'no such tensor')} as in {newest.path}" for name in names[:6]]


def open_steps(trajectory: Trajectory, steps, allow=()) -> tuple[dict[int, Checkpoint], list[str]]:
    """The checkpoints that can be opened, and what is wrong with them as a set, a line each."""
    refuse([f"unknown permission {name}; expected some of {', '.join(ALLOW)}"
            for name in sorted(set(allow) - set(ALLOW))])
    opened, problems, first = {}, [], {}
    for step in sorted(steps):
        try:
            opened[step] = trajectory[step]
        except LawaError as error:
            problems.append(str(error))
    for checkpoint in opened.values():
        problems += mismatches(checkpoint, opened[max(opened)])
        if "duplicates" not in allow:
            twin = first.setdefault(checkpoint.fingerprint, checkpoint)
            if twin is not checkpoint and twin.equals(checkpoint):
                problems.append(f"{twin.path} and {checkpoint.path} hold identical weights, so one "
                                "is a wrong file; leave it out (or --allow duplicates)")
    averages = [str(c.path) for c in opened.values() if "lawa" in c.metadata]
    if "averages" not in allow and 0 < len(averages) < len(opened):
        problems.append(f"{', '.join(averages)} already an average, others are none; leave it out "
                        "(or --allow averages)")
    return opened, problems


def check(source, key: str | None = None) -> list[str]:
    """Every problem of a trajectory as text: what averaging would refuse, and gaps in its steps."""
    trajectory = open_trajectory(source, key)
    _, problems = open_steps(trajectory, trajectory.steps)
    usual = np.median(np.diff(trajectory.steps)) if len(trajectory) > 2 else math.inf
    return problems + [
        f"gap: no checkpoint between steps {a} and {b}; others are {usual:g} apart"
        for a, b in pairwise(trajectory.steps) if b - a > usual]


# ---- 5. The engine -------------------------------------------------------------------------------
# One loop makes every average: for each tile of each tensor, read it in every checkpoint, make all
# rows of it, write it. A value of an average depends on the same value of its checkpoints alone, in
# one order, so the bits are the same for any tile, any number of threads, and any route here.

TILE = 1 << 21  # bytes of doubles of one checkpoint at a time; in smaller ones threads fight for
IN_MEMORY = 1 << 25  # Python's lock. With many checkpoints they shrink, to so many bytes in all.
WIDE = {"F64": np.longdouble}  # what a type is summed in; all others in double


def mix(opened: Mapping[int, Checkpoint], rows: Mapping[object, Row], wanted: Mapping[str, Stored],
        write: Callable, *, sums: dict | None = None, allow=(), threads: int | None = None,
        tile: int = TILE, progress: Callable | None = None) -> None:
    """Make the averages {output: row} by calls of write(output, tensor, offset, bytes).

    wanted: their names, types and shapes. Floats are summed in double (long double for float64) and
    rounded once; a lone checkpoint's bytes are taken as they are; what is no float comes from the
    newest of the row. sums: of a single row {tensor: (numel,) double}, from which it goes on, and
    where it leaves its own. write is called on several threads, progress with (bytes read, bytes in
    all). Errors: LawaError that names who made an average NaN or infinite.
    """
    threads = threads or os.cpu_count() or 1
    np.empty(16 << 20, np.uint8)  # freed, it teaches glibc to keep a tile's memory for the next one
    width = max(min(tile // 8, IN_MEMORY // (12 * threads * (len(opened) + 2))), 1)
    tiles = [(name, start, min(start + width, stored.numel)) for name, stored in wanted.items()
             for start in range(0, stored.numel, width)]
    problems = set()

    def make(place) -> int:
        """One tile of every row; returns the bytes read."""
        name, start, stop = place
        dtype = wanted[name].dtype
        floats, wide = dtype in FLOATS, WIDE.get(dtype, np.float64)
        stored = {step: checkpoint.data[name] for step, checkpoint in opened.items()}
        raws, values = {}, {}
        for step, one in stored.items():
            raws[step] = one.read(start * one.itemsize, stop * one.itemsize)
            if floats:
                values[step] = widen(raws[step], one.dtype)
        total = sums[name][start:stop] if sums else np.empty(stop - start, wide)
        for output, this in rows.items():
            data = raws[this.newest]
            lone = len(this.add) == 1 and stored[this.newest].dtype == dtype
            if floats and (this.kept or not lone):
                parts = (values[step] if add == 1 else values[step].astype(wide) * add
                         for step, add in this.todo.items())
                if not this.goes_on:
                    np.copyto(total, next(parts))
                for part in parts:
                    if this.keep != 1:
                        total *= this.keep
                    total += part
                if not lone:
                    data = narrow(total / wide(this.total), dtype)
            if "nonfinite" not in allow and not finite(data, dtype):
                bad = [f"{one.path}: {name} holds NaN or Inf; leave it out (or --allow nonfinite)"
                       for step, one in stored.items() if not finite(raws[step], one.dtype)]
                problems.update(bad or [f"{name} overflows {dtype}; take a wider --dtype"])
            write(output, name, start * wanted[name].itemsize, data)
        return sum(map(len, raws.values()))

    total = sum(checkpoint.data[name].nbytes for checkpoint in opened.values() for name in wanted)
    with ThreadPoolExecutor(threads) as pool:
        over = pool.map if len(tiles) > 1 < threads else map
        for done in accumulate(over(make, tiles)):
            if progress:
                progress(done, total)
    refuse(sorted(problems))


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of floats as an array that numpy can count with, exactly."""
    if dtype != "BF16":
        return raw.view(DTYPES[dtype][0])
    bits = raw.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as the bytes of a type, rounded once, to nearest even; numpy has no bfloat16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype(DTYPES[dtype][0]).view(np.uint8)
        single = values.astype(np.float32)
    bits, nan = single.view(np.uint32), np.isnan(single)
    # Rounding twice, to fp32 and to bf16, errs only where the first lands half-way between two
    # bf16: there, step off to the side on which the value is.
    half = np.flatnonzero(bits & 0xFFFF == 0x8000)
    aside = np.sign(np.abs(values[half]) - np.abs(single[half]))
    bits[half] += aside.astype(np.int32).view(np.uint32)
    bits += (bits >> 16 & 1) + 0x7FFF
    bits >>= 16
    bits[nan] = 0x7FC0
    return bits.astype("<u2").view(np.uint8)


def finite(data: np.ndarray, dtype: str) -> bool:
    return dtype not in FLOATS or bool(np.isfinite(widen(data, dtype)).all())


# ---- 6. Averages ---------------------------------------------------------------------------------

def average(source, scheme=None, at: int | None = None, key: str | None = None) -> dict:
    """The average of a trajectory as {name: torch.Tensor}, fresh, on the CPU.

    source: what `open_trajectory` takes; scheme: default the uniform mean of all up to `at`; at:
    step, default the newest. Each tensor has the newest checkpoint's dtype. Errors: LawaError for
    checkpoints that do not fit together, NaN, Inf.
    """
    trajectory = open_trajectory(source, key)
    this = Row(scheme or swa(), trajectory.steps, trajectory.steps[-1] if at is None else at)
    opened, problems = open_steps(trajectory, this.add)
    refuse(problems)
    return state_dict(opened, this)


def state_dict(opened: Mapping[int, Checkpoint], this: Row, sums=None, allow=()) -> dict:
    """One row as {name: fresh torch.Tensor}."""
    wanted, ties = layout(opened)
    if sums is not None:  # what is tied now may not have been before
        wanted, ties = opened[max(opened)].data, {}
        if not this.goes_on:
            sums |= {name: np.empty(stored.numel, WIDE.get(stored.dtype, np.float64))
                     for name, stored in wanted.items()}
    data = {name: np.empty(stored.nbytes, np.uint8) for name, stored in wanted.items()}

    def write(_, name, start, part):
        data[name][start:start + len(part)] = part
    mix(opened, {None: this}, wanted, write, sums=sums, allow=allow)
    state = {name: wanted[name].tensor(raw) for name, raw in data.items()}
    return state | {name: state[kept] for name, kept in ties.items()}


def layout(opened: Mapping[int, Checkpoint]) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, ties) of an average: the newest's; what is tied in every checkpoint stays tied."""
    newest = opened[max(opened)]
    ties = dict(newest.ties)
    for checkpoint in opened.values():
        ties = {name: kept for name, kept in ties.items()
                if checkpoint.data[name] is checkpoint.data[kept]}
    return {name: s for name, s in newest.data.items() if name not in ties}, ties


def sweep(source, schemes: Mapping[str, Callable], at=None, key: str | None = None, *,
          on_disk: bool = False, allow=()) -> Iterator[tuple[int, str, dict]]:
    """Yield (step, name, {tensor: fresh torch.Tensor}) for every target step and scheme, in order.

    at: targets, default all steps. Checkpoints are opened in order, read once, and let go after
    their last window. Memory: the checkpoints of the widest open window, in their own dtype; for
    a scheme whose rows go on from one another (EMA, SWA) one sum in double instead. on_disk:
    windows are read from their files at every target. allow: as for `average_files`.
    Errors: LawaError for checkpoints that do not fit together.
    """
    trajectory = open_trajectory(source, key)
    targets = trajectory.steps if at is None else sorted(set(at))
    plan, last, own = {}, {}, {}  # rows by target and name; of each step the last target to read it
    for target in targets:
        own = plan[target] = {name: Row(scheme, trajectory.steps, target, own.get(name))
                              for name, scheme in schemes.items()}
        for this in own.values():
            last |= dict.fromkeys(this.reads, target)
    trajectory.expect(sorted(last))
    held, seen, kept = {}, {}, {}  # checkpoints by step, steps by fingerprint, sums by scheme
    for step in sorted({*last, *targets}):
        if step in last:
            held[step] = trajectory[step]
            refuse(mismatches(held[step], held[min(held)]))
            if "duplicates" not in (*allow, *trajectory.allow):
                twin = seen.setdefault(held[step].fingerprint, step)
                if twin != step:
                    raise LawaError(f"steps {twin} and {step} of {trajectory.name} hold identical "
                                    "weights; leave the wrong one out, or allow duplicates")
            if not on_disk:
                for stored in set(held[step].data.values()):  # its files may go
                    data = stored.read(0, stored.nbytes)
                    stored.read = lambda start, stop, data=data: data[start:stop]
                trajectory.release(step)
        for name, this in plan.get(step, {}).items():
            sums = kept.setdefault(name, {}) if this.kept or this.goes_on else None
            yield step, name, state_dict({s: held[s] for s in this.reads}, this, sums, allow)
        for spent in [s for s in held if last[s] <= step]:
            del held[spent]
            if on_disk:
                trajectory.release(spent)


def average_files(source, outputs: Mapping, *, dtype: str | None = None, allow=(), like=None,
                  key: str | None = None, threads: int | None = None, tile: int = TILE,
                  progress=None) -> dict:
    """Write averages from file to file, every byte read once, in little memory at any size.

    source: what `open_trajectory` takes; outputs: {path: (scheme, at)}, a path that ends in
    .safetensors or .pt, else a Hugging Face folder (config and tokenizer from the folder `like`,
    default the newest input's); dtype: "F32", "BF16", ... of the float tensors, default each one's
    in the newest; threads: default one per core; tile: bytes; progress: called with (bytes done,
    bytes in all); allow: of "nonfinite", "duplicates", "averages".
    Returns a report: outputs with their weights, bytes read and written, seconds. Errors:
    LawaError, JobFailed (disk full); then, and if killed, no output's name is seen.
    """
    begun, trajectory = time.perf_counter(), open_trajectory(source, key)
    positive(threads=threads, tile=tile)
    if not outputs or dtype not in (None, *FLOATS):
        raise LawaError(f"expected outputs and a dtype of {FLOATS}, got {len(outputs)}, {dtype!r}")
    inputs = {Path(path).resolve() for path in trajectory.sources.values()}
    rows, this = {}, None
    for path, (scheme, at) in outputs.items():
        path = Path(path)
        if path in rows:
            raise LawaError(f"{path} is given twice; give each average an output of its own")
        if inputs & {path.resolve(), *path.resolve().parents}:
            raise LawaError(f"{path} is an input; choose another output")
        # a slip makes no folder, whose name may have a number behind its dot
        if path.suffix not in SUFFIXES and re.match(r"\.[a-z]", path.suffix, re.IGNORECASE):
            raise LawaError(f"{path}: {path.suffix} is not written; expected .safetensors, .pt, or "
                            "the name of a new folder without such an ending")
        if path.is_dir() and (path.suffix in SUFFIXES or any(path.iterdir())):
            raise LawaError(f"{path} is a folder that is not empty; choose another, or remove it")
        this = rows[path] = Row(scheme, trajectory.steps, at, this)
    steps = set().union(*(this.add for this in rows.values()))
    opened, problems = open_steps(trajectory, steps, allow)
    refuse(problems)
    last = opened[max(opened)]
    if like is not None and not Path(like).is_dir():
        raise LawaError(f"--like must be a folder with a config.json, got {like}")
    like = Path(like or last.path)
    config_of(like)  # refuses a broken one
    wanted, ties = layout(opened)
    for name, stored in wanted.items():
        if dtype and stored.dtype in FLOATS:
            wanted[name] = Stored(dtype, stored.shape, stored.path, stored.read)
    report, headers, places, files = {}, {}, {}, {}  # by path
    for path, this in rows.items():
        used = [{"step": step, "file": str(Path(*opened[step].path.parts[-2:])),
                 "bytes": opened[step].nbytes, "sample_sha256": opened[step].fingerprint}
                for step in this.add]
        # enough to make it again, and the same in every process: no clock, no address
        note = {"version": __version__, "scheme": re.sub(r" at 0x\w+", "", str(this.scheme)),
                "at": this.at, "weights": {str(step): w for step, w in this.weights.items()},
                "inputs": used}
        headers[path], places[path], size = plan_file(wanted, ties, {"lawa": json.dumps(note)})
        report[path] = {"path": str(path), "bytes": size, **note}
    total = sum(output["bytes"] for output in report.values())
    parent = next(parent for parent in path.resolve().parents if parent.exists())
    if total > (free := shutil.disk_usage(parent).free):
        raise JobFailed(f"disk full: {total:,} bytes are needed in {parent}, {free:,} are free")

    def write(path, name, start, data):
        done, place = 0, places[path][name] + start
        while done < len(data):
            done += os.pwrite(files[path].fileno(), data[done:], place + done)
    with contextlib.ExitStack() as stack:  # on leaving, the hidden names become the outputs'
        stack.enter_context(sole_writer(min(rows)))
        for path in rows:
            remove_left_parts(path)  # large ones, which else nobody would see
            part = stack.enter_context(replacing(path))
            if path.suffix not in SUFFIXES:
                part.mkdir()
                name = Path(next(iter(last.data.values())).path).name
                # what a library looks for; a pytorch_model is a .bin
                stem = re.match("adapter_model|diffusion_pytorch_model|", name)[0] or "model"
                part /= f"{stem}.safetensors"
            files[path] = stack.enter_context(open(part, "wb", buffering=0))
            files[path].truncate(report[path]["bytes"])
            files[path].write(headers[path])
        mix(opened, rows, wanted, write, allow=allow, threads=threads, tile=tile, progress=progress)
        for path, file in files.items():
            finish(path, Path(file.name), like, last, report[path])
    return {"outputs": list(report.values()), "left_out": last.left_out,
            "passed_over": list(trajectory.passed_over),
            "bytes_read": sum(c.nbytes for c in opened.values()),
            "bytes_written": total, "seconds": round(time.perf_counter() - begun, 3)}


def finish(path: Path, part: Path, like: Path, newest: Checkpoint, note: Mapping) -> None:
    """Make of the safetensors file `part` what `path` is to be: the rest of a folder, or a .pt,
    which a trainer's .pt gives its other keys."""
    whole = open_safetensors(part)  # which also checks what was written
    if path.suffix not in SUFFIXES:
        for source in companions(like):
            shutil.copyfile(source, part.parent / source.name)
        config = part.parent / "config.json"
        if config.exists():  # says the type in which the weights are
            fields = config_of(part.parent)
            dtype = next((code for code in whole.dtypes.values() if code in FLOATS), "F32")
            names = fields.keys() & {"dtype", "torch_dtype"} or {"dtype"}
            fields |= dict.fromkeys(names, DTYPES[dtype][1])
            config.write_text(json.dumps(fields, indent=2))
    elif path.suffix != ".safetensors":
        import torch
        state = {name: whole[name] for name in whole if name not in whole.ties}
        state |= {name: state[kept] for name, kept in whole.ties.items()}
        # not to a path, which would be in the file's bytes
        with explained(f"cannot write {path}", JobFailed), open(part, "wb") as file:
            torch.save(newest.put_back(state), file)
        with replacing(sidecar(path)) as text:
            text.write_text(json.dumps(note, indent=1))


def sweep_files(source, schemes: Mapping[str, Callable], at, out_dir, **options) -> dict:
    """Write out_dir/<name>/ckpt_<step>.safetensors for every scheme and target step in one pass.

    Each folder is again a trajectory. options, report and errors: those of `average_files`.
    """
    outputs = {Path(out_dir) / name / checkpoint_name(step): (scheme, step)
               for name, scheme in schemes.items() for step in at}
    return average_files(source, outputs, **options)


# ---- 7. Search -----------------------------------------------------------------------------------

def predicted_gain(window: Mapping[int, float], noise: float, tau: float, drift: float) -> float:
    """What a mean, {step: weight}, gains over its newest step in a model (after 2301.02312): noise,
    in nats, that relaxes in tau steps averages out; a drift in nats per step makes the mean lag."""
    steps, weights = np.array(list(window.items()), float).T
    alike = np.exp(-abs(np.subtract.outer(steps, steps)) / tau)
    return noise * (1 - weights @ alike @ weights) - drift * (weights @ (steps.max() - steps))


def fit_gains(windows, gains) -> tuple[float, float, float]:
    """The model's (noise, tau, drift) for the gains of windows, by least squares, none below 0.

    Leave out windows so wide that they lose much: the drift is taken as steady."""
    gains, steps = np.asarray(gains, float), sorted(set().union(*windows))
    lag = np.array([predicted_gain(window, 0, 1, 1) for window in windows])
    found = []
    for tau in np.geomspace(np.diff(steps).min() / 4, steps[-1] - steps[0], 100):
        removed = np.array([predicted_gain(window, 1, tau, 0) for window in windows])
        both = np.linalg.lstsq(np.array([removed, lag]).T, gains, rcond=None)[0]
        one, other = (max(part @ gains / (part @ part), 0) for part in (removed, lag))
        for noise, drift in ((one, 0), (0, other), both):  # both may have one below 0
            if noise >= 0 and drift >= 0:
                miss = ((noise * removed + drift * lag - gains) ** 2).sum()
                found.append((miss, noise, tau, drift))
    return tuple(map(float, min(found)[1:]))


def propose(windows: Mapping, known: Mapping) -> tuple[str, lawa | None]:
    """(what the model says in words, its best of {scheme: weights}), from {scheme: its gain}."""
    if len(known) < 4:
        return f"cannot tell: only {len(known)} windows to fit it to", None
    gains = list(known.values())
    noise, tau, drift = fit = fit_gains([windows[w] for w in known], gains)
    expected = {w: predicted_gain(window, *fit) for w, window in windows.items()}
    miss = math.dist(gains, [expected[w] for w in known]) / math.sqrt(len(known))
    model = (f"from {len(known)} evaluations: noise {noise:.2g} nats, relaxation {tau:.2g} steps, "
             f"drift {drift:.1g} nats per step; ")
    if noise == 0 or miss > max(gains) / 4:
        return f"{model}cannot tell: no noise, or gains missed, by {miss:.2g} nats", None
    top = max(windows, key=expected.get)
    return f"{model}predicts best {top}, gain {expected[top]:+.4f}", top


def search(source, evaluate: Callable[[dict], object], at: int | None = None, budget: int = 12,
           ks=(2, 3, 5, 8, 12), key: str | None = None) -> dict:
    """The best LAWA window on a trajectory, in at most `budget` evaluations, the run's included.

    source: what `open_trajectory` takes; evaluate: {name: tensor} -> loss, or the losses of equally
    many blocks, paired, so that the answer has a standard error; NaN is worst; at: default newest.
    Gain over span k * spacing is an inverted U (2507.17634): half of the budget goes to a grid of
    spans, in equal ratios, at the middle k, one evaluation to what a model fitted to these
    proposes, the rest to windows of the spans nearest to the best.
    Returns {"best": scheme, "gain", "gain_se", "sure": text, "model": text, "trials": [{"scheme",
    "loss", "gain", "gain_se"}]}.
    """
    trajectory = open_trajectory(source, key)
    positive(budget=budget)
    at = trajectory.steps[-1] if at is None else at
    windows = {}  # {scheme: its weights}
    for k, before in product(ks, trajectory.steps):
        spacing = at - before
        window = [at - n * spacing for n in range(k)]
        if spacing > 0 and set(window).issubset(trajectory.steps):
            windows[lawa(k, spacing)] = equal(window)
    if not windows:
        raise LawaError(f"no window of {ks[0]} or more evenly spaced checkpoints ends at step "
                        f"{at}; there are {some(trajectory.steps)}")
    run, losses = newest(), {}  # {scheme: (blocks,)}

    def best_of(schemes):
        """Evaluate these as far as the budget goes; returns the best of all so far."""
        for scheme in schemes:
            if scheme not in losses and len(losses) < budget:
                found = evaluate(average(trajectory, scheme, at))
                losses[scheme] = np.atleast_1d(np.asarray(found, float))
                if losses[scheme].shape != losses[run].shape:
                    raise LawaError(f"evaluate gave {losses[scheme].size} losses for {scheme} and "
                                    f"{losses[run].size} for the run; expected as many")
        return min(losses, key=lambda w: np.nan_to_num(losses[w].mean(), nan=math.inf))

    def gain(scheme, than=run) -> dict[str, float | None]:
        """How much lower the scheme's loss is, and the standard error over blocks."""
        gains = losses[than] - losses[scheme]
        error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
        return {"gain": float(gains.mean()), "gain_se": error}
    spans = {run: 1} | {w: w.k * w.spacing for w in windows}
    middle = max(w.k for w in windows if w.k <= sorted(ks)[len(ks) // 2])
    line = sorted((w for w in windows if w.k == middle), key=spans.get)
    places = np.geomspace(1, len(line), budget // 2).round().astype(int)
    best = best_of([run, *(line[place - 1] for place in places)])
    gains = {w: gain(w)["gain"] for w in losses if w != run}
    most = gain(best)["gain"]  # what loses more than this is too wide for the model
    model, top = propose(windows, {w: g for w, g in gains.items() if -most < g < math.inf})
    best = best_of([top] if top else [])
    if top in losses:
        model += f", measured {gain(top)['gain']:+.4f}"
    best = best_of(sorted(windows, key=lambda w: abs(math.log(spans[w] / spans[best]))))
    found = {"best": best, **gain(best)}
    sure = "no spread known: the validation gave one number per model; give one per block"
    if found["gain_se"] is not None:
        others = [gain(best, scheme) for scheme in losses if scheme != best]
        close = sum(other["gain"] < 2 * other["gain_se"] for other in others)
        sure = (f"gain {found['gain']:+.4f} +- {found['gain_se']:.4f} (standard error over "
                f"{len(losses[best])} blocks); {close} other windows are within 2 standard errors")
    trials = [{"scheme": str(scheme), "loss": float(values.mean()), **gain(scheme)}
              for scheme, values in losses.items()]
    return found | {"sure": sure, "model": model, "trials": trials}


# ---- 8. Online averages --------------------------------------------------------------------------

def copied(tree: Mapping, devices: Mapping) -> dict:
    """A deep copy of nested dicts of tensors, each on the device of its name, if there is one."""
    copy = dict(tree)
    for name, value in tree.items():
        if isinstance(value, Mapping):
            copy[name] = copied(value, devices)
        elif hasattr(value, "device"):
            copy[name] = value.to(devices.get(name, value.device), copy=True)
    return copy


class Online:
    """What LAWA, EMA and SWA share: when to update, state, and swapping the average in and out.

    Nothing feeds back into training. held: all state, nested dicts with tensors by name.
    """
    place = None  # the device of the state; None: the model's
    inside = False  # of `swapped`

    def __init__(self, model, every: int, start: int, **held):
        positive(every=every)
        self.model, self.every, self.start, self.held = model, every, start, held

    def live(self) -> tuple[dict, dict]:
        """({name here: the model's own tensor}, {name in the model: name here}).

        Here tied tensors are one, and names lack what DDP, DataParallel and torch.compile put in.
        """
        import torch
        model = self.model
        wrappers = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
        while hasattr(model, "_orig_mod") or isinstance(model, wrappers):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()
                   if isinstance(tensor, torch.Tensor)}  # an extra state may be anything
        refuse([f"{name} is complex, which is not averaged; keep two real tensors"
                for name, tensor in tensors.items() if tensor.is_complex()])
        names = {name: first.replace("_orig_mod.", "")  # of a part that was compiled
                 for name, first in first_names(tensors).items()}
        return {names[name]: tensor for name, tensor in tensors.items()}, names

    def update(self, step: int) -> None:
        """Call after every optimizer.step() with the number of steps done.

        Steps before `start`, off the grid start + n * every, or taken already are ignored.
        """
        self.expect_own_weights()
        due = step >= self.start and (step - self.start) % self.every == 0
        if due and step > self.held.get("step", -1):
            live, _ = self.live()
            floats = {name: t for name, t in live.items() if t.is_floating_point()}
            others = {name: t.to(self.place or t.device, copy=True) for name, t in live.items()
                      if name not in floats}  # of which an average keeps the newest
            self.take(step, floats)
            self.held |= {"step": step, "others": others}

    def average(self, *which) -> dict:
        """{name: fresh tensor} with the model's names and dtypes; of several betas, `which`."""
        if "step" not in self.held:
            raise LawaError("nothing averaged yet: call update(step) first, from step `start` on")
        live, names = self.live()
        fresh = self.averaged(live, *which) | copied(self.held["others"], {})
        return {name: fresh[here] for name, here in names.items()}

    @contextlib.contextmanager
    def swapped(self, *which):
        """Inside, the model holds the average; after, its own weights again, to the bit."""
        import torch
        self.expect_own_weights()
        live, names = self.live()
        averaged, own = self.average(*which), copied(live, {})
        self.inside = True
        with torch.no_grad():
            try:
                torch._foreach_copy_([live[names[name]] for name in averaged], [*averaged.values()])
                yield self.model
            finally:
                torch._foreach_copy_(list(live.values()), list(own.values()))
                self.inside = False

    def expect_own_weights(self) -> None:
        """A checkpoint saved inside `swapped` would hold the average, and be resumed from."""
        if self.inside:
            raise LawaError("the model holds the average here; leave swapped() first, and save "
                            "checkpoints and update outside it")

    def state_dict(self) -> dict:
        """A copy of all state, for torch.save and a weights-only torch.load."""
        self.expect_own_weights()
        shapes = {name: list(tensor.shape) for name, tensor in self.live()[0].items()}
        held = copied(self.held, {})
        return {"kind": type(self).__name__, "shapes": shapes, "held": held}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on from a copy of the state, to the same bits; LawaError if it is another model's."""
        live, kind, theirs = self.live()[0], type(self).__name__, state.get("shapes", {})
        shapes = {name: list(tensor.shape) for name, tensor in live.items()}
        other = [name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name)]
        if state.get("kind") != kind or other:
            raise LawaError(f"expected the state of {kind} for this model, got that of "
                            f"{state.get('kind')}; tensors that differ: {some(other) or 'none'}")
        devices = {name: self.place or tensor.device for name, tensor in live.items()}
        self.held = copied(state["held"], devices)


class LAWA(Online):
    """The last k snapshots, `spacing` steps apart, on the CPU (arXiv 2306.03241).

    An update costs one copy of the weights. `average()` is the mean of what the window holds, on
    the CPU, bit for bit what the function `average` makes of the same checkpoints.
    """
    place = "cpu"

    def __init__(self, model, k: int, spacing: int, start: int = 0):
        super().__init__(model, spacing, start, window={})  # {step: {name: tensor}}
        positive(k=k)
        self.k = k

    def take(self, step, floats):
        import torch
        window, oldest = self.held["window"], {}
        while len(window) >= self.k:
            oldest = window.pop(min(window))
        if {n: t.dtype for n, t in oldest.items()} != {n: t.dtype for n, t in floats.items()}:
            oldest = {name: torch.empty_like(t, device="cpu") for name, t in floats.items()}
        torch._foreach_copy_(list(oldest.values()), list(floats.values()))  # its memory again
        window[step] = oldest

    def averaged(self, live):
        steps = sorted(self.held["window"])[-self.k:]
        opened = {step: from_memory(self.held["window"][step], f"step {step}") for step in steps}
        return state_dict(opened, Row(lawa(self.k), steps, steps[-1]), allow=ALLOW)


class EMA(Online):
    """e <- e + (1 - beta)(w - e) every `every` steps since `start`, begun at the first w.

    One beta or several in one pass; kept in `dtype` (default float32, wider where the model is). In
    float32 it strays from the closed form by up to 1 / (1 - beta) / 2 ulp, as every such EMA does;
    float64 agrees to 1 ulp. What does not move keeps its bits.
    """

    def __init__(self, model, betas, every: int = 1, start: int = 0, dtype=None):
        super().__init__(model, every, start, shadows={})  # {beta: {name: tensor}}
        self.betas, self.dtype = tuple(map(float, np.atleast_1d(betas))), dtype
        for beta in self.betas or (None,):
            ema(beta)  # refuses none, and one outside [0, 1)

    def take(self, step, floats):
        import torch
        least = self.dtype or torch.float32
        values = [t.to(torch.promote_types(t.dtype, least)) for t in floats.values()]
        for beta in self.betas:
            shadow = self.held["shadows"].setdefault(beta, {})
            if shadow:
                torch._foreach_lerp_(list(shadow.values()), values, 1 - beta)
            else:
                shadow |= dict(zip(floats, map(torch.clone, values), strict=True))

    def averaged(self, live, beta: float | None = None):
        beta, shadows = self.betas[0] if beta is None else beta, self.held["shadows"]
        if beta not in shadows:
            raise LawaError(f"no average for beta {beta}; there are {some(list(shadows))}")
        return {n: t.to(live[n].dtype, copy=True) for n, t in shadows[beta].items()}

    def load_state_dict(self, state):
        betas = tuple(state["held"]["shadows"]) if state.get("kind") == "EMA" else ()
        if not set(betas) <= set(self.betas):
            raise LawaError(f"expected the state of an EMA with betas {self.betas}, got {betas}")
        super().load_state_dict(state)


class SWA(Online):
    """The mean of every `every`-th step since `start` (arXiv 1803.05407), from a sum in double,
    for float64 in two doubles."""

    def __init__(self, model, start: int = 0, every: int = 1):
        super().__init__(model, every, start, count=0, sums={}, lost={})

    def take(self, step, floats):
        sums, lost = self.held["sums"], self.held["lost"]
        for name, tensor in floats.items():
            value, before = tensor.double(), sums.get(name, 0.0)
            total = sums[name] = before + value
            if tensor.dtype == value.dtype:  # what the addition rounded off (Knuth's two-sum)
                part = total - value
                lost[name] = lost.get(name, 0.0) + (before - part) + (value - (total - part))
        self.held["count"] += 1

    def averaged(self, live):
        means = {}
        for name, total in self.held["sums"].items():
            exact = total + self.held["lost"].get(name, 0.0)
            means[name] = (exact / self.held["count"]).to(live[name].dtype)
        return means


# ---- 9. Command line -----------------------------------------------------------------------------

EXAMPLES = """examples
  lawa inspect runs/my-run                                       what is there, what is wrong
  lawa average ckpt_800.pt ckpt_900.pt ckpt_1000.pt -o avg.pt    the mean of these three
  lawa average runs/my-run -k 5 --spacing 1000 -o avg.safetensors
  lawa average "out/checkpoint-*/unet" --blend 0.5 -o avg        half average, half newest
  lawa average a.pt b.pt c.pt --steps 100,200,300 -o avg.pt      where names do not tell the steps
  lawa sweep runs/my-run --scheme "lawa(5, 1000)" --scheme "decay(5000)" --every 1000 -o averages
  lawa search runs/my-run --command "python validate.py {}"      prints the loss, or one per block
  lawa export runs/my-run/ckpt_20000.pt --like hf-folder -o new-hf-folder

schemes (spacing, every, start, window are in steps)
  lawa(k=5, spacing=100)              the mean of the k latest, spacing apart; else the k latest
  swa(start=0, every=10)              the mean of all since start
  ema(beta=0.99)                      e <- beta e + (1 - beta) w over the checkpoints
  ema(half_life=5%)                   forgets half in 5% of the steps so far; or in 500 steps
  decay(window=1000, shape='1-sqrt')  acts like a learning-rate decay; also linear, cosine
  explicit([0.2, 0.8])                these weights, the last for the newest, divided by their sum
  newest                              one checkpoint as it is

Steps are read from names, never from their order: the number beside step, iter, ckpt, checkpoint
or else epoch, or the only bare number. Metrics, rates, seeds, versions, parts, hashes and averages
(best, last, ema) are none; what has two readings is refused, and told with --steps or --step-regex.
docs/formats.md has the grammar and a table of tools.

Inputs are never changed. Floats are averaged in double precision, integers come from the newest,
tied tensors stay tied. NaN, Inf, identical checkpoints and averages among the inputs are refused
(--allow). An output appears when it is whole; a killed job begins anew.
Exit status: 0 done, 1 failed or inspect found problems, 2 bad usage or input, 130 interrupted."""

def whole_numbers(text: str) -> list[int]:
    return [int(word) for word in text.replace(",", " ").split()]


INPUTS = {
    "inputs": {"nargs": "+", "metavar": "CKPT", "help": "checkpoints, or a folder or glob of them"},
    "--key": {"help": "where a .pt holds its weights, as a.b; . for all (default: model, ...)"},
    "--steps": {"type": whole_numbers, "help": "the steps of the inputs, in order, as 100,200,300"},
    "--step-regex": {"help": r"where a path has its step, as 'name_(\d+)'"},
    "--json": {"action": "store_true", "help": "print the result as JSON"},
}
AT = {"--at": {"type": int, "help": "the step to average at (default: the newest)"}}
HOW = {
    "--scheme": {"action": "append", "default": [], "help": "see below (default: the mean of all)"},
    "-k --k": {"type": int, "help": "short for --scheme lawa: checkpoints in the window"},
    "--spacing": {"type": int, "help": "with -k or --weights: steps between the checkpoints"},
    "--weights": {"help": "short for --scheme explicit: weights, oldest first, as 0.2,0.3,0.5"},
    "--blend": {"type": float, "help": "share of the average; the rest is the newest checkpoint"},
    "--tokens-per-step": {"type": int, "help": "durations are in tokens, this many per step"},
}
OUT = {
    "-o --out": {"required": True, "help": "FILE.safetensors, FILE.pt, or a new folder"},
    "--dtype": {"type": str.upper, "choices": FLOATS, "help": "of floats (default: the newest's)"},
    "--like": {"help": "Hugging Face folder to copy config and tokenizer from"},
    "--threads": {"type": int, "help": "default: one per core"},
    "--allow": {"action": "append", "default": [], "choices": ALLOW, "help": "take such inputs"},
}
EVERY = {"--every": {"type": int, "default": 1, "help": "average at the multiples of this"}}
TRY = {
    "--command": {"dest": "run", "required": True, "help": "program with {} for the checkpoint"},
    "--pattern": {"help": r"where its output has the loss (default: its last line, numbers alone)"},
    "--budget": {"type": int, "default": 12, "help": "evaluations at most (default 12)"},
}
COMMANDS = {  # name: (what it does, its options)
    "inspect": ("Show steps, sizes, types, how far the weights moved, and problems.", INPUTS),
    "average": ("Write one average of checkpoints.", INPUTS | HOW | AT | OUT),
    "sweep": ("Write averages of several schemes at many steps.", INPUTS | HOW | EVERY | OUT),
    "search": ("Find the best LAWA window: a validation command, and a model.", INPUTS | AT | TRY),
    "export": ("Write one checkpoint as a Hugging Face folder.", INPUTS | AT | OUT),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise LawaError(f"{message}; see {self.prog} --help")


def schemes_of(args) -> dict[str, Callable]:
    """{name of its folder: scheme} from the command line."""
    texts = {scheme_dir(text): text for text in args.scheme}
    if args.k is not None:
        texts["lawa"] = f"lawa({args.k}, {args.spacing})"
    if args.weights is not None:
        texts["explicit"] = f"explicit([{args.weights}], {args.spacing})"
    if args.command == "average" and len(texts) > 1:
        raise LawaError("average takes one of --scheme, -k and --weights; sweep takes several")
    if args.spacing is not None and texts.keys().isdisjoint(("lawa", "explicit")):
        raise LawaError("--spacing is for -k and --weights; a --scheme has its own: lawa(5, 100)")
    schemes = {name: parse_scheme(text) for name, text in texts.items()} or {"mean": swa()}
    if args.tokens_per_step is not None:
        for name, scheme in schemes.items():
            steps = {field: tokens(n, args.tokens_per_step) for field, n in vars(scheme).items()
                     if n and field in ("spacing", "start", "every", "window")}
            if isinstance(half := getattr(scheme, "half_life", None), (int, float)):
                steps["half_life"] = half / args.tokens_per_step
            schemes[name] = replace(scheme, **steps)
    if args.blend is not None:
        if not math.isfinite(args.blend):
            raise LawaError(f"--blend is the average's share, such as 0.5, got {args.blend}")
        schemes = {name: blend(args.blend, scheme) for name, scheme in schemes.items()}
    return schemes


def inspect(trajectory: Trajectory) -> dict:
    """What `lawa inspect` shows: size, types and norm at each step, and how far the weights moved
    (norm of the change since the checkpoint before, over the norm). Reads every byte once."""
    problems = check(trajectory)  # which lists what cannot be opened, and differs
    opened, _ = open_steps(trajectory, trajectory.steps, ALLOW)
    squares, changes, rows = Counter(), Counter(), []
    with progress(sum(c.nbytes for c in opened.values()), "inspect", "B", unit_scale=True) as bar:
        for name in dict.fromkeys(name for checkpoint in opened.values() for name in checkpoint):
            before = None
            for step, checkpoint in opened.items():
                stored = checkpoint.data.get(name)
                if not stored or stored.dtype not in FLOATS or name in checkpoint.ties:
                    continue
                raw = stored.read(0, stored.nbytes)
                values = widen(raw, stored.dtype).astype(np.float64)
                if not finite(raw, stored.dtype):
                    problems.append(f"{stored.path}: {name} holds NaN or Inf")
                squares[step] += float(values @ values)
                if before is not None and len(before) == len(values):
                    changes[step] += float((values - before) @ (values - before))
                before = values
                bar.update(len(raw))
    for step, checkpoint in opened.items():
        norm = math.sqrt(squares[step]) if math.isfinite(squares[step]) else None
        rows.append({"step": step, "bytes": checkpoint.nbytes, "left_out": checkpoint.left_out,
                     "parameters": sum(stored.numel for stored in set(checkpoint.data.values())),
                     "dtypes": sorted(set(checkpoint.dtypes.values())), "norm": norm,
                     "moved": math.sqrt(changes[step]) / norm if rows and norm else None})
    return {"trajectory": trajectory.name, "checkpoints": rows, "problems": problems,
            "passed_over": list(trajectory.passed_over), "notes": list(trajectory.notes)}


def validation(command: str, pattern: str | None = None) -> Callable[[dict], list[float]]:
    """An `evaluate` that runs the command on a checkpoint file, without a shell, and reads its last
    line, which must be numbers and nothing else, or group 1 of the last match of `pattern`."""
    with explained("expected --command 'program {}' and --pattern 'val loss (\\S+)' or none, got "
                   f"{command!r} and {pattern!r}"):
        words = shlex.split(command)
        if "{}" not in command or (pattern and not re.compile(pattern).groups):
            raise ValueError("no {}, where the checkpoint's path goes, or no group, as (\\S+)")

    def evaluate(state):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/candidate.safetensors"
            save(path, state)
            filled = [word.replace("{}", path) for word in words]
            done = subprocess.run(filled, capture_output=True, text=True, errors="replace")
        losses, last = [], done.stdout.strip().rpartition("\n")[2]
        told = last.replace(",", " ").split()
        if pattern:
            told = [match[1] for match in re.finditer(pattern, done.stdout)][-1:]
        with contextlib.suppress(ValueError, TypeError):  # words, a group that is not there
            losses = [float(word) for word in told]
        if done.returncode or not losses:
            said = ((done.stderr.strip() if done.returncode else "") or last)[-200:]
            raise JobFailed(f"the validation command exited with {done.returncode} and printed "
                            f"{said!r}; expected 0 and a last line of a loss, or one per block, "
                            "alone; or say where it is with --pattern 'val loss (\\S+)'")
        return losses
    return evaluate


def run(args) -> dict:
    source = args.inputs[0] if len(args.inputs) == 1 else args.inputs
    trajectory = open_trajectory(source, args.key, steps=args.steps, step_regex=args.step_regex)
    if args.command == "inspect":
        return inspect(trajectory)
    if args.command == "search":
        return search(trajectory, validation(args.run, args.pattern), args.at, args.budget)
    schemes = {"newest": newest()} if args.command == "export" else schemes_of(args)
    with progress(None, args.command, "B", unit_scale=True, delay=1) as bar:
        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)
        options = {"dtype": args.dtype, "threads": args.threads, "allow": args.allow,
                   "like": args.like, "progress": show}
        if args.command != "sweep":
            at = trajectory.steps[-1] if args.at is None else args.at
            return average_files(trajectory, {args.out: (*schemes.values(), at)}, **options)
        targets = [step for step in trajectory.steps if args.every > 0 and step % args.every == 0]
        if not targets:
            raise LawaError(f"--every {args.every} takes none of steps {some(trajectory.steps)}")
        return sweep_files(trajectory, schemes, targets, args.out, **options)


def lines_of(result: dict) -> Iterator[str]:
    """A result for people."""
    for line in result.get("checkpoints", []):
        moved = "-" if line["moved"] is None else f"{line['moved']:.2e}"
        yield (f"step {line['step']:>9}  {line['bytes'] / 1e6:>10.1f} MB  "
               f"{line['parameters']:>13,} values  {','.join(line['dtypes'])}  moved {moved}")
    for line in result.get("trials", []):
        yield f"loss {line['loss']:.5f}  gain {line['gain']:+.5f}  {line['scheme']}"
    for line in result.get("outputs", []):
        yield (f"{line['path']}: {line['scheme']} at step {line['at']}, "
               f"{len(line['weights'])} checkpoints")
    parts = [result, *result.get("checkpoints", [])]
    left_out = list(dict.fromkeys(name for part in parts for name in part.get("left_out", [])))
    for kind, names in (("left out", left_out), ("passed over", result.get("passed_over"))):
        if names:
            yield f"{kind}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
    if "seconds" in result:
        yield (f"read {result['bytes_read'] / 1e9:.2f} GB, wrote "
               f"{result['bytes_written'] / 1e9:.2f} GB in {result['seconds']:.2f} s")
    if "sure" in result:
        yield f"model {result['model']}\nbest: {result['best']}; {result['sure']}"
    for kind in ("problem", "note"):
        for text in result.get(f"{kind}s", []):
            yield f"{kind}: {text}"


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    style = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser("lawa", description="Average the checkpoints of a training run.", **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, options) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, **style)
        for flags, how in options.items():
            command.add_argument(*flags.split(), **how)
    with contextlib.suppress(AttributeError):  # a name may have bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    result = {}
    try:
        args = parser.parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # progress; the result alone can be piped
            result = run(args)
        told = [json.dumps(result, indent=1, default=str)] if args.json else lines_of(result)
        print(*told, sep="\n", flush=True)
    except BrokenPipeError:  # what reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (LawaError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) and not isinstance(error, JobFailed) else 1
    return 0 if result and not result.get("problems") else 1


if __name__ == "__main__":
    sys.exit(main())
