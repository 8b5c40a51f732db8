"""Naive references for the tests: every checkpoint in memory, extended precision, explicit loops.

Nothing here imports the code under test. Slow on purpose; read it next to the formula it states.
"""

import hashlib
import json
import math
import os
import struct
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------ weights


def lawa_weights(steps, at, k, spacing=None, start=0):
    """Mean of the k latest checkpoints, walking back from `at` one by one."""
    if at < start:
        return {at: Fraction(1)}
    window = [at]
    while len(window) < k:
        if spacing is None:
            older = [s for s in steps if s < window[-1]]
            if not older:
                break
            step = max(older)
        else:
            step = window[-1] - spacing
        if step < start or step < min(steps):
            break
        if step not in steps:
            raise KeyError(step)
        window.append(step)
    return {s: Fraction(1, len(window)) for s in window}


def swa_weights(steps, at, start=0, every=None):
    """Uniform mean of start, start + every, ... up to `at`; every=None: of all steps since
    start."""
    if at < start:
        return {at: Fraction(1)}
    kept = [
        s for s in steps if start <= s <= at and (every is None or (s - start) % every == 0)
    ] or [at]
    return {s: Fraction(1, len(kept)) for s in kept}


def ema_weights(steps, at, beta, every=None, start=0):
    """The recursion average = beta * average + (1 - beta) * newest, followed weight by weight."""
    if at < start:
        return {at: Fraction(1)}
    grid = sorted(
        s for s in steps if start <= s <= at and (every is None or (s - start) % every == 0)
    ) or [at]
    beta, weights = Fraction(beta), {}
    for s in grid:
        if not weights:
            weights = {s: Fraction(1)}
            continue
        weights = {t: w * beta for t, w in weights.items()}
        weights[s] = 1 - beta
    return {s: w for s, w in weights.items() if w}


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def decay_weights(window, shape):
    """WSM's closed form over theta_0..theta_n: c_n = w_n, c_j = w_j - w_{j+1}, c_0 = 1 - w_1."""
    n = window - 1
    if n == 0:
        return [1.0]
    w = [shape(j / (n + 1)) for j in range(n + 1)]
    return [1 - w[1]] + [w[j] - w[j + 1] for j in range(1, n)] + [w[n]]


def decayed_walk(thetas, shape):
    """What those weights mean: replay each update theta_j - theta_{j-1}, scaled by the decayed rate
    w_j."""
    theta = np.array(thetas[0], dtype=np.longdouble)
    for j in range(1, len(thetas)):
        theta = theta + shape(j / len(thetas)) * (
            np.array(thetas[j], np.longdouble) - np.array(thetas[j - 1])
        )
    return theta


# ------------------------------------------------------------------ arithmetic

# significant bits and exponent of the smallest subnormal, per output type
FORMAT = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.float16: (11, -24),
    torch.bfloat16: (8, -133),
}


def wide(tensor):
    """Any torch tensor as an array of long double, exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy().astype(np.longdouble)


def weighted_sum(tensors, weights):
    """sum_i w_i * x_i in long double, term by term; equal weights as a sum and one division, since
    1/5 is no long double either."""
    if isinstance(weights[0], Fraction) and weights == [Fraction(1, len(tensors))] * len(tensors):
        return weighted_sum(tensors, [1] * len(tensors)) / len(tensors)
    total = np.zeros(tuple(tensors[0].shape), np.longdouble)
    for tensor, weight in zip(tensors, weights, strict=True):
        w = (
            np.longdouble(weight.numerator) / np.longdouble(weight.denominator)
            if isinstance(weight, Fraction)
            else weight
        )
        total = total + np.longdouble(w) * wide(tensor)
    return total


def exact_sum(tensors, weights):
    """The same with rational numbers and one rounding to long double: no error at all before it."""
    flat = [t.double().reshape(-1).tolist() for t in tensors]
    out = []
    for values in zip(*flat, strict=True):
        total = sum(
            (Fraction(w) * Fraction(x) for w, x in zip(weights, values, strict=True)), Fraction(0)
        )
        high = float(total)
        out.append(np.longdouble(high) + np.longdouble(float(total - Fraction(high))))
    return np.array(out, np.longdouble).reshape(tuple(tensors[0].shape))


def ulp(values, dtype):
    """Distance between neighbouring numbers of `dtype` around each value."""
    bits, smallest = FORMAT[dtype]
    _, exponent = np.frexp(np.asarray(values, np.longdouble))
    return np.ldexp(np.longdouble(1), np.maximum(exponent - bits, smallest))


def ulps_off(got, want):
    """Largest error of tensor `got` against the array `want`, in units of got's own type."""
    if got.numel() == 0:
        return 0.0
    return float(np.max(np.abs(wide(got) - want) / ulp(want, got.dtype)))


def assert_close(got, want, ulps=1.0):
    assert tuple(got.shape) == np.shape(want)
    off = ulps_off(got, want)
    assert off <= ulps, f"off by {off:.3g} units in the last place of {got.dtype}"


def average(states, weights):
    """The oracle for whole checkpoints: {name: long double array}, or the newest tensor where it is
    no float."""
    newest = states[-1]
    return {
        name: weighted_sum([s[name] for s in states], weights) if t.is_floating_point() else t
        for name, t in newest.items()
    }


def assert_state(got, want, ulps=1.0):
    """Every tensor of `got` against what `average` returned."""
    assert set(got) == set(want)
    for name, expected in want.items():
        if isinstance(expected, torch.Tensor):
            assert bits(got[name]) == bits(expected), name
        else:
            assert_close(got[name], expected, ulps)


def bits(tensor):
    """Type, shape and raw bytes: equal only for bit-identical tensors, NaN and -0.0 included."""
    tensor = tensor.detach().cpu().contiguous()
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tuple(tensor.shape), raw


def state_bits(state):
    return {name: bits(state[name]) for name in state}


# ------------------------------------------------------------------ files

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path, tensors, metadata=None):
    """The format by hand: 8 bytes of header length, the JSON header, the data."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, tensor in tensors.items():
        dtype, shape, raw = bits(tensor)
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return Path(path)


def read_safetensors(path):
    """-> ({name: tensor}, metadata), read by hand."""
    raw = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    out = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
        tensor = torch.from_numpy(array)
        out[name] = tensor.view(torch.bfloat16) if entry["dtype"] == "BF16" else tensor
    return out, metadata


def digest(*paths):
    """{file: (sha256, mtime)} of files and whole folders, to show that nothing was touched."""
    files = []
    for path in map(Path, paths):
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), os.stat(p).st_mtime_ns) for p in files
    }


WATCH = """
import threading, time
from pathlib import Path
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) << 10
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
def measured(work):
    '''Megabytes of anonymous memory at the peak of work(), beyond what was held before.'''
    held = peak[0] = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    result = work()
    return (max(peak[0], anonymous()) - held) / (1 << 20), result
# for child processes: mapped files do not count, and neither does memory that was reserved and
# never touched
"""


HOOK = """
import json, sys
seen = []
def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("socket.connect", "subprocess.Popen", "os.mkdir", "os.rename"):
        seen.append([event, str(args[0])])
sys.addaudithook(hook)
"""  # for child processes: what they write, start or connect to, in `seen`


def bytes_read():
    """Bytes this process has asked the kernel for with read calls (mapped pages do not count)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])


def write_distributed(folder, state):
    """As torch.distributed.checkpoint writes it, without its warning that this is one process."""
    import torch.distributed.checkpoint as dcp

    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


# ------------------------------------------------------------------ fixtures


def example(step, dtype=torch.float32, big=()):
    """A small checkpoint: matrices, a scalar, an empty tensor, integer and boolean buffers. `big`
    adds one more shape."""
    rng = torch.Generator().manual_seed(1000 + step)
    state = {
        "wte.weight": torch.randn(
            130, 70, generator=rng
        ),  # 9,100 elements: more than one block of 8,192 and no multiple
        "h.0.mlp.weight": torch.randn(7, 3, generator=rng) * 1e-3,
        "h.0.scale": torch.randn((), generator=rng),
        "h.0.empty": torch.zeros(0, 4),
    }
    if big:
        state["h.1.big"] = torch.randn(*big, generator=rng)
    state = {name: t.to(dtype) for name, t in state.items()}
    state["h.0.position_ids"] = (
        torch.arange(5) * step
    )  # averages would not be integers, sums would not be ours
    state["h.0.mask"] = torch.tensor([True, False, step % 20 == 0])
    state["h.0.bytes"] = torch.tensor([250, step % 256, 3], dtype=torch.uint8)
    return state


def constant(value, dtype=torch.float32):
    """A checkpoint whose every weight is `value`: averages can be worked out by hand."""
    return {
        "w": torch.full((4, 3), float(value), dtype=dtype),
        "b": torch.full((), float(value), dtype=dtype),
    }


def write_run(folder, steps, make=constant):
    """folder/ckpt_<step>.safetensors for every step, written by hand; -> list of paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_safetensors(folder / f"ckpt_{s}.safetensors", make(s)) for s in steps]
