"""How fast, lean and exact the averager is, against the tools people use and against the floor.

    python benchmarks/averaging.py           everything at GPT-2-124M's size, about 20 minutes
    python benchmarks/averaging.py --only A --size small
    python benchmarks/averaging.py --only A B C --beside ANOTHER_CHECKOUT

A  one mean of k = 5 checkpoints: fp32, bf16, and a 1.4B-parameter model in bf16 for its memory
B  a sliding window over N = 20 checkpoints, k = 3, 5, 10, every full window written
C  three k and three beta in one pass over N = 20, against one scheme and against six jobs
D  online averages in a training loop, per update

A contender is a whole process (in D a call inside one). Contenders take turns, so a slow spell of
the machine hits them all, and a ratio is the median over repetitions of the ratio within one. The
floor is what every averager must do: read each input once (`cat`), write each output once (`cp`).
The peers get an environment of their own. Linux only: memory and bytes read come from /proc.
The table is printed and kept in averaging.json beside this script, {"workloads": {name: {"n",
"rows", "reach", "notes", "machine"}}}, in seconds and bytes; a workload that is run again replaces
its own entry only. From there docs/benchmarks.md is renewed, between its marks.
Exit status: 0 measured, whatever was reached; 1 nothing could be measured; 2 bad usage;
130 interrupted, with the finished workloads kept.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "mergekit": ["mergekit==0.1.5", "torch==2.13.0"],
    "ema-pytorch": ["ema-pytorch==0.8.3", "torch==2.13.0"],
    # without torchvision, whose builds fit one build of torch each
    "timm": ["--no-deps", "timm==1.0.31"],
}


# ---- 1. Checkpoints ------------------------------------------------------------------------------

# layers, width, vocabulary, block size
GPT2 = {"full": (12, 768, 50257, 1024), "small": (6, 384, 4096, 256)}  # full: 124,439,808 values
PYTHIA = {  # Pythia-1.4B's; both its embeddings as one tensor
    "full": (24, 2048, 100608, 2048),
    "small": (8, 768, 16384, 256),
}
FIXTURES = {  # dtype, checkpoints, sizes
    "fp32": ("F32", 20, GPT2),
    "bf16": ("BF16", 5, GPT2),
    "1.4B": ("BF16", 5, PYTHIA),
}
BYTES = {"F32": 4, "BF16": 2}  # per value
DIGITS = {"F32": 24, "BF16": 8}  # binary digits of the significand
SPACING = 100  # steps between checkpoints


def shapes(layers: int, width: int, vocab: int, block: int) -> dict[str, tuple[int, ...]]:
    """GPT-2's tensors: {name: shape}."""
    linear = {  # (rows, columns) in widths
        "attn.c_attn": (1, 3),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (1, 4),
        "mlp.c_proj": (4, 1),
    }
    weights = {"wte": (vocab, width), "wpe": (block, width)}
    for layer in range(layers):
        for name, (rows, columns) in linear.items():
            weights[f"h.{layer}.{name}"] = (rows * width, columns * width)
        weights[f"h.{layer}.ln_1"] = (width,)
        weights[f"h.{layer}.ln_2"] = (width,)
    weights["ln_f"] = (width,)
    biased = [name for name in weights if name not in ("wte", "wpe")]
    found = {f"{name}.weight": shape for name, shape in weights.items()}
    return found | {f"{name}.bias": weights[name][-1:] for name in biased}


def values_in(fixture: str, size: str) -> int:
    """Values of one checkpoint; times BYTES it is S."""
    return sum(map(math.prod, shapes(*FIXTURES[fixture][2][size]).values()))


def make_checkpoints(folder: Path, fixture: str, size: str) -> list[Path]:
    """A trajectory's files, oldest first; made unless `folder` is there.

    A common base, and in each file a little noise of its own.
    """
    dtype, count, sizes = FIXTURES[fixture]
    paths = [folder / f"ckpt_{SPACING * (i + 1)}.safetensors" for i in range(count)]
    if folder.exists():
        return paths
    table = {}
    offset = 0
    for name, shape in shapes(*sizes[size]).items():
        end = offset + BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    total = values_in(fixture, size)
    tile = 1 << 20
    # values are slices of these: drawing 1e10 takes minutes
    normal = np.random.default_rng(0).standard_normal(4 * tile, np.float32)
    for number, path in enumerate(paths):
        base = np.random.default_rng(1)
        noise = np.random.default_rng(2 + number)
        with open(part / path.name, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for start in range(0, total, tile):
                at = base.integers(3 * tile)
                own = noise.integers(3 * tile)
                values = 0.02 * normal[at : at + tile] + 1e-3 * normal[own : own + tile]
                values = values[: total - start]
                if dtype == "BF16":
                    values = (values.view(np.uint32) >> 16).astype(np.uint16)
                file.write(values)
    os.sync()  # or the disk would still be writing when the first contender runs
    part.rename(folder)
    return paths


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (dtype, mapped bytes)} of a safetensors file, without the reader under test."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    return {
        name: (info["dtype"], data[slice(*info["data_offsets"])]) for name, info in table.items()
    }


def doubles(tensor: tuple[str, np.ndarray], start: int, stop: int) -> np.ndarray:
    """Values [start, stop) of one of `read_tensors`."""
    dtype, raw = tensor
    raw = raw[start * BYTES[dtype] : stop * BYTES[dtype]]
    if dtype == "F32":
        return raw.view("<f4").astype(np.float64)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def compare(
    output: Path, weights: dict[Path, float], most: int = 1 << 26, tile: int = 1 << 18
) -> tuple[float, float]:
    """How far the output is from sum(weight * input) / sum(weight) in float64:
    (most ulp of its type, share of values more than 1 ulp off).

    Where the inputs cancel, a sum that was rounded on its way is off by any number of ulp, so the
    share says more about such a contender. Tiles spread over all tensors are compared, `most`
    values or so: every second tile of GPT-2, every 22nd of the 1.4B model.
    """
    got = read_tensors(output)
    inputs = [read_tensors(path) for path in weights]
    if any(got.keys() != tensors.keys() for tensors in inputs):
        return math.inf, 1.0

    def errors(place) -> tuple[float, int, int]:
        name, start = place
        exact = 0.0
        for tensors, weight in zip(inputs, weights.values(), strict=True):
            exact = exact + weight * doubles(tensors[name], start, start + tile)
        exact /= sum(weights.values())
        # 2^(e-1) <= |exact| < 2^e, or subnormal
        exponent = np.maximum(np.where(exact == 0, -125, np.frexp(exact)[1]), -125)
        ulp = np.ldexp(1.0, exponent - DIGITS[got[name][0]])
        off = np.abs(doubles(got[name], start, start + tile) - exact) / ulp
        off = np.nan_to_num(off, nan=math.inf)
        return float(off.max(initial=0)), int((off > 1).sum()), len(off)

    places = []
    values = 0
    for name, (dtype, raw) in got.items():
        count = len(raw) // BYTES[dtype]
        places += [(name, start) for start in range(0, count, tile)]
        values += count
    stride = math.ceil(values / most)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        worst, bad, count = zip(*pool.map(errors, places[::stride]), strict=True)
    return max(worst), sum(bad) / sum(count)


# ---- 2. What runs in a process of its own --------------------------------------------------------


def load_and_sum(out, *inputs):
    """The script people write: load, add in the checkpoints' own type, divide, save."""
    from safetensors.torch import load_file, save_file

    total = load_file(inputs[0])
    for path in inputs[1:]:
        for name, tensor in load_file(path).items():
            total[name] += tensor
    save_file({name: tensor / len(inputs) for name, tensor in total.items()}, out)


def timm_method(out, *inputs):
    """The steps of timm's avg_checkpoints.py, which its wheel lacks: sums in float64, written as
    float32 whatever came in."""
    import torch
    from safetensors.torch import load_file, save_file

    total = {}
    for path in inputs:
        for name, tensor in load_file(path).items():
            total[name] = total[name].add_(tensor.double()) if name in total else tensor.double()
    most = torch.finfo(torch.float32).max
    for name, tensor in total.items():
        total[name] = tensor.div_(len(inputs)).clamp_(-most, most).float()
    save_file(total, out)


def one_pass(k, folder, out):
    """Every full window, reading N S bytes."""
    from lawa_core import lawa, open_trajectory, sweep_files

    sweep_files(folder, {"lawa": lawa(int(k))}, open_trajectory(folder).steps[int(k) - 1 :], out)


def fresh_means(k, folder, out):
    """Every full window anew, reading (N - k + 1) k S bytes."""
    from lawa_core import average_files, checkpoint_name, lawa, open_trajectory

    for at in open_trajectory(folder).steps[int(k) - 1 :]:
        average_files(folder, {Path(out) / "lawa" / checkpoint_name(at): (lawa(int(k)), at)})


STEP = "a training step"
TOKENS_PER_STEP = 16 * 8 * 3 * 1024  # GPT-2-small's in the paper:
# micro-batch x accumulation x GPUs x block


def online(size, repeats):
    """Workload D; prints {"seconds": {contender: one per call}, "notes"} as JSON."""
    import torch

    import model

    torch.set_num_threads(os.cpu_count())  # a busy machine gets fewer by default
    config = model.gpt_config("gpt2-small", 50257)
    if size == "small":
        config = model.gpt_config("mini", 2048)
    gpt = model.GPT(config)
    seconds = {STEP: training_step(gpt, int(repeats))}
    calls, notes = averagers(gpt)
    for repetition in range(-2, 4 * int(repeats)):  # two calls to warm up
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if repetition >= 0:
                seconds.setdefault(name, []).append(time.perf_counter() - begun)
    notes.append(
        f"{STEP}: forward and backward of {config.block_size} tokens, measured and scaled to the "
        f"paper's {TOKENS_PER_STEP:,}, and one AdamW step; fp32 on the CPU, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(json.dumps({"seconds": seconds, "notes": notes}))


def training_step(gpt, repeats: int) -> list[float]:
    """Seconds of one training step at the paper's batch, once per repetition.

    Leaves no gradients.
    """
    import torch

    optimizer = torch.optim.AdamW(gpt.parameters(), fused=True)
    block = gpt.config.block_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(gpt.config.vocab_size, (1, block + 1), generator=generator)
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        gpt(tokens[:, :-1], tokens[:, 1:])[1].backward()
        middle = time.perf_counter()
        optimizer.step()
        seconds.append((middle - begun) * TOKENS_PER_STEP / block + time.perf_counter() - middle)
        optimizer.zero_grad()
    return seconds[1:]  # the first one allocates


def averagers(gpt, beta: float = 0.999) -> tuple[dict[str, Callable], list[str]]:
    """({contender: one update}, notes on who is missing)."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    import lawa_core

    weights = [p.detach() for p in gpt.parameters()]
    copies = [w.clone() for w in weights]
    window = lawa_core.LAWA(gpt, k=2, spacing=1)
    ema = lawa_core.EMA(gpt, beta)
    averaged = AveragedModel(gpt, multi_avg_fn=get_ema_multi_avg_fn(beta))
    steps = itertools.count()

    def copy_weights():
        for copy, w in zip(copies, weights, strict=True):
            copy.copy_(w)

    calls = {
        "floor: one copy of the weights": copy_weights,
        "lawa EMA": lambda: ema.update(next(steps)),
        "lawa LAWA push": lambda: window.update(next(steps)),
        "torch AveragedModel, foreach": lambda: averaged.update_parameters(gpt),
    }
    notes = []
    for name, more in {"ema-pytorch": ema_pytorch, "timm": timm}.items():
        try:
            calls |= more(gpt, beta)
        except (ImportError, AttributeError, TypeError, OSError) as error:
            notes.append(f"{name} left out: {error}")
    return calls, notes


def ema_pytorch(gpt, beta: float) -> dict[str, Callable]:
    from ema_pytorch import EMA

    options = {
        "beta": beta,
        "update_after_step": 0,
        "update_every": 1,
        "include_online_model": False,
    }
    return {
        "ema_pytorch EMA": EMA(gpt, **options).update,
        "ema_pytorch EMA, foreach": EMA(gpt, **options, use_foreach=True).update,
    }


def timm(gpt, beta: float) -> dict[str, Callable]:
    """ModelEmaV3 from its one file, because `import timm` wants torchvision."""
    package = util.find_spec("timm")
    if not package:
        raise ImportError("No module named 'timm'")
    file = Path(package.origin).parent / "utils" / "model_ema.py"
    spec = util.spec_from_file_location("model_ema", file)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    average = module.ModelEmaV3(gpt, decay=beta)
    return {"timm ModelEmaV3, foreach": lambda: average.update(gpt)}


WORKERS = {
    function.__name__: function
    for function in (load_and_sum, timm_method, one_pass, fresh_means, online)
}


def worker(python, function: Callable, *args) -> list[str]:
    """The command that runs one of WORKERS."""
    script = str(Path(__file__).resolve())
    return [str(python), script, "worker", function.__name__, *map(str, args)]


# ---- 3. Measuring --------------------------------------------------------------------------------


class Failed(Exception):
    """A command or a workload that cannot run, and why."""


@dataclass
class Contender:
    name: str  # ratios refer to the first names that begin with "floor" and "lawa"
    commands: list[list[str]]  # run one after another
    # {pattern of an output: the weights it should have}
    checks: dict[str, dict[Path, float]] = field(default_factory=dict)


PEAKS = {"VmHWM": "resident", "RssAnon": "anonymous", "RssFile": "mapped"}  # /proc/PID/status, kB


def measure(commands: list[list[str]], log: Path) -> dict[str, float]:
    """{seconds, bytes read, and peak bytes resident, anonymous and file-mapped} of the commands.

    Read are the bytes that read() and its kin returned, cached or not; pages of a mapped file are
    not among them. Memory is sampled every 5 ms, but `resident` is the kernel's own peak.
    """
    total = {"seconds": 0.0, "read": 0, **dict.fromkeys(PEAKS.values(), 0)}
    for command in commands:
        if not shutil.which(command[0]):
            raise Failed(f"{Path(command[0]).name} is not installed")
        begun = time.perf_counter()
        with (
            open(log, "w") as errors,
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process,
        ):
            proc = Path(f"/proc/{process.pid}")
            ended = os.pidfd_open(process.pid)
            while not select.select([ended], [], [], 0.005)[0]:
                for line in (proc / "status").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in PEAKS:
                        total[PEAKS[key]] = max(total[PEAKS[key]], 1024 * int(value.split()[0]))
            total["seconds"] += time.perf_counter() - begun
            # rchar; there until the process is waited for
            total["read"] += int((proc / "io").read_text().split()[1])
            os.close(ended)
        if process.returncode:
            said = [line.strip() for line in log.read_text().splitlines() if line.strip()]
            raise Failed(said[-1][:200] if said else f"exit status {process.returncode}")
    return total


def take_turns(
    contenders: list[Contender], repeats: int, out: Path, progress: Callable
) -> tuple[dict, dict, list[str]]:
    """({contender: [measurement]}, {contender: what `compare` found}, notes).

    Who fails is left out from then on, with a note.
    """
    runs = {contender.name: [] for contender in contenders}
    errors, notes = {}, []
    for repetition in range(repeats):
        # there and back: whoever runs after a heavy writer would always pay for it
        for contender in contenders[:: 1 if repetition % 2 == 0 else -1]:
            if contender.name not in runs:
                continue
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            os.sync()  # what the one before wrote
            try:
                runs[contender.name].append(measure(contender.commands, out.with_suffix(".log")))
                if repetition == 0 and contender.checks:
                    found = [
                        compare(next(out.glob(pattern)), weights)
                        for pattern, weights in contender.checks.items()
                    ]
                    errors[contender.name] = tuple(map(max, zip(*found, strict=True)))
            except (Failed, StopIteration) as error:
                del runs[contender.name]
                notes.append(f"{contender.name} left out: {error or 'it wrote no output'}")
        last = [f"{name} {done[-1]['seconds']:.2f} s" for name, done in runs.items()]
        progress(repetition + 1, ", ".join(last))
    return runs, errors, notes


def table_rows(runs: dict[str, list[dict]], errors: dict[str, tuple[float, float]]) -> list[dict]:
    """One row per contender: seconds, their median and spread, ratios, peaks over the repetitions,
    errors."""

    def ratio(mine, prefix):
        theirs = next((other for name, other in runs.items() if name.startswith(prefix)), [])
        pairs = zip(mine, theirs, strict=False)
        return median([a["seconds"] / b["seconds"] for a, b in pairs]) if theirs else None

    rows = []
    for name, done in runs.items():
        seconds = [run["seconds"] for run in done]
        rows.append(
            {
                "contender": name,
                **{key: max(run[key] for run in done) for key in done[0]},
                "median": median(seconds),
                "min": min(seconds),
                "max": max(seconds),
                "to_floor": ratio(done, "floor"),
                "to_ours": ratio(done, "lawa"),
                **dict(zip(("ulp", "off"), errors.get(name, ()), strict=False)),
                "seconds": seconds,
            }
        )
    return rows


# ---- 4. The workloads ----------------------------------------------------------------------------

LAWA = [sys.executable, str(ROOT / "lawa_core.py")]


def floor(inputs, out: Path, outputs: int) -> Contender:
    copies = [["cp", str(inputs[0]), str(out / str(number))] for number in range(outputs)]
    return Contender("floor", [["cat", *map(str, inputs)], *copies])


def uniform(inputs) -> dict[Path, float]:
    return dict.fromkeys(inputs, 1)


def ours_alone(inputs, out: Path, peers: Path) -> list[Contender]:
    target = str(out / "average.safetensors")
    command = [*LAWA, "average", *map(str, inputs), "-o", target, "--json"]
    return [floor(inputs, out, 1), Contender("lawa", [command], {"*.safetensors": uniform(inputs)})]


def one_mean(inputs, out: Path, peers: Path) -> list[Contender]:
    inputs = inputs[:5]
    target = out / "average.safetensors"
    config = inputs[0].with_name("mergekit.yml")
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    config.write_text(json.dumps({"merge_method": "linear", "models": models}))  # JSON is YAML
    others = {
        "mergekit": [str(peers.with_name("mergekit-pytorch")), str(config), str(out)],
        "timm's method": worker(peers, timm_method, target, *inputs),
        "load and sum": worker(sys.executable, load_and_sum, target, *inputs),
    }
    check = {"*.safetensors": uniform(inputs)}
    contenders = ours_alone(inputs, out, peers)
    return contenders + [Contender(name, [run], check) for name, run in others.items()]


def windows(k: int, inputs, out: Path, peers: Path) -> list[Contender]:
    check = {f"lawa/{inputs[-1].name}": uniform(inputs[-k:])}
    contenders = [floor(inputs, out, len(inputs) - k + 1)]
    for name, run in {"lawa": one_pass, "fresh means": fresh_means}.items():
        command = worker(sys.executable, run, k, inputs[0].parent, out)
        contenders.append(Contender(name, [command], check))
    return contenders


SIX = [
    *(f"lawa(k={k})" for k in (3, 5, 10)),
    *(f"ema(beta={beta})" for beta in (0.8, 0.9, 0.95)),
]  # an EMA reads all N, as the six do


def six_schemes(inputs, out: Path, peers: Path) -> list[Contender]:
    def job(schemes, folder: Path) -> list[str]:
        command = [*LAWA, "sweep", str(inputs[0].parent), "-o", str(folder), "--json"]
        command += ["--every", str(SPACING * len(inputs))]  # at the newest alone
        for scheme in schemes:
            command += ["--scheme", scheme]
        return command

    ema = {path: 0.9 ** (len(inputs) - 1 - i) * (0.1 if i else 1) for i, path in enumerate(inputs)}
    check = {"lawa*k=5/*": uniform(inputs[-5:]), "ema*0.9/*": ema}
    six_jobs = [job([scheme], out / str(number)) for number, scheme in enumerate(SIX)]
    return [
        floor(inputs, out, len(SIX)),
        # what is written is most of the difference
        Contender("floor, one scheme", floor(inputs, out, 1).commands),
        Contender("lawa, six schemes", [job(SIX, out)], check),
        Contender("lawa, one scheme", [job(["ema(beta=0.9)"], out)]),
        Contender("lawa, six jobs", six_jobs),
    ]


@dataclass
class Workload:
    name: str
    estimate: float  # seconds per repetition on 2 cores at full size; for the forecast only
    fixture: str | None = None
    outputs: int = 0  # checkpoints on disk at once
    # of (inputs, folder to write to, the peers' python)
    contenders: Callable[[list[Path], Path, Path], list[Contender]] | None = None


WORKLOADS = [
    Workload("A fp32", 26, "fp32", 1, one_mean),
    Workload("A bf16", 20, "bf16", 1, one_mean),
    Workload("A 1.4B", 20, "1.4B", 1, ours_alone),
    *(
        Workload(f"B k={k}", 40, "fp32", 21 - k, lambda *given, k=k: windows(k, *given))
        for k in (3, 5, 10)
    ),
    Workload("C", 35, "fp32", 6, six_schemes),
    Workload("D", 18),
]


# ---- 5. What was to be reached -------------------------------------------------------------------


def over(a: str, b: str) -> Callable:
    """a's time over b's: median of the ratios within a repetition."""

    def measured(result, rows):
        pairs = zip(rows[a]["seconds"], rows[b]["seconds"], strict=False)
        return median([x / y for x, y in pairs])

    return measured


def ours(key: str, unit: float = 1.0) -> Callable:
    """The value of the first contender that begins with "lawa"."""

    def measured(result, rows):
        return next(row for name, row in rows.items() if name.startswith("lawa"))[key] / unit

    return measured


def share_read(result, rows) -> float:
    return ours("read")(result, rows) / result["input_bytes"]


MOST, LEAST = "at most", "at least"
EMA, PUSH = "lawa EMA", "lawa LAWA push"
COPY, FOREACH = "floor: one copy of the weights", "torch AveragedModel, foreach"
SIX_AT_ONCE, ONE = "lawa, six schemes", "lawa, one scheme"
REACH = [  # workloads whose name begins so, what, how it is measured, the bound
    ("A fp32", "our time / the floor's", over("lawa", "floor"), MOST, 1.3),
    ("A fp32", "mergekit's time / ours", over("mergekit", "lawa"), LEAST, 8),
    ("A bf16", "mergekit's time / ours", over("mergekit", "lawa"), LEAST, 6),
    ("A", "our MB resident", ours("resident", 1e6), MOST, 120),
    ("B", "bytes read / (N S)", share_read, MOST, 1.05),
    ("B k=10", "time of a fresh mean per window / ours", over("fresh means", "lawa"), LEAST, 4),
    ("C", "time of six schemes / of one", over(SIX_AT_ONCE, ONE), MOST, 1.5),
    ("D", "our EMA / AveragedModel with foreach", over(EMA, FOREACH), MOST, 1),
    ("D", "our LAWA push / one copy of the weights", over(PUSH, COPY), MOST, 1.2),
    ("D", f"{EMA} / {STEP}", over(EMA, STEP), MOST, 0.01),
    ("D", f"{PUSH} / {STEP}", over(PUSH, STEP), MOST, 0.01),
    *((letter, "our error, ulp", ours("ulp"), MOST, 1) for letter in "ABC"),
]


def reached(name: str, result: dict) -> list[dict]:
    """[{what, expected, measured, reached}]; None where a contender is missing."""
    rows = {row["contender"]: row for row in result["rows"]}
    lines = []
    for prefix, what, measured, relation, bound in REACH:
        if not name.startswith(prefix):
            continue
        try:
            value = measured(result, rows)
            holds = value <= bound if relation == MOST else value >= bound
        except (KeyError, StopIteration):
            value = holds = None
        expected = f"{relation} {bound:g}"
        lines.append({"what": what, "expected": expected, "measured": value, "reached": holds})
    return lines


# ---- 6. Command line -----------------------------------------------------------------------------


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


OUTCOMES = {True: "reached", False: "NOT reached", None: "not measured"}


def markdown(workloads: dict[str, dict]) -> str:
    """The table, one line per figure to reach, the notes."""
    columns = {
        "÷ floor": ("to_floor", 1),
        "÷ ours": ("to_ours", 1),
        "GB read": ("read", 1e9),
        "MB anonymous": ("anonymous", 1e6),
        "MB file-mapped": ("mapped", 1e6),
        "max ulp": ("ulp", 1),
        "% off > 1 ulp": ("off", 0.01),
    }
    heads = ["workload", "contender", "median", "spread", *columns]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    notes = []
    for name, result in workloads.items():
        for row in result["rows"]:
            unit, scale = ("s", 1) if row["median"] >= 1 else ("ms", 1e3)
            middle, low, high = (number(row[key] * scale) for key in ("median", "min", "max"))
            cells = [name, row["contender"], f"{middle} {unit}", f"{low}–{high}"]
            cells += [number(row.get(key) and row[key] / by) for key, by in columns.values()]
            lines.append(f"| {' | '.join(cells)} |")
        for line in result["reach"]:
            notes.append(
                f"- {name}: {line['what']}: expected {line['expected']}, "
                f"measured {number(line['measured'])}: {OUTCOMES[line['reached']]}"
            )
        notes += [f"- {name}: {note}" for note in result["notes"]]
    lines.append(
        "\nGB read are those of read() and its kin; mergekit, timm's method, and load and sum map "
        "their files instead.\n"
    )
    return "\n".join([*lines, *notes])


def versions(python) -> dict[str, str]:
    if not Path(python).exists():
        return {}
    command = [str(python), "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
    wanted = (*PEERS, "numpy", "safetensors", "torch")
    return {name: version for name, version in found.items() if name in wanted}


def make_peers(folder: Path) -> Path:
    """The peers' Python. What will not install is reported, and its contenders then fail on their
    own."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=False)
    for name in PEERS.keys() - versions(python).keys():
        print(f"installing {name} into {folder}, once", file=sys.stderr)
        command = [str(python), "-m", "pip", "install", "-q", *PEERS[name]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason given"]
            print(f"{name} will not install: {said[-1]}", file=sys.stderr)
    return python


def machine(load: float, peers: Path) -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "kernel": platform.release(),
        "load": load,
        "python": platform.python_version(),
        "versions": versions(sys.executable),
        "peers": versions(peers),
    }


def beside(other: Path, contenders: list[Contender]) -> list[Contender]:
    """The floor, and the averager of this checkout and of another one in turns; no peers."""
    turns = []
    for contender in contenders:
        if contender.name.startswith(("floor", "lawa")):
            turns.append(contender)
        if contender.name.startswith("lawa"):
            commands = []
            for command in contender.commands:
                python, script, *rest = command
                script = str(other / Path(script).relative_to(ROOT))
                commands.append([python, script, *rest])
            turns.append(Contender(f"{contender.name}, beside", commands, contender.checks))
    return turns


def run_files(workload: Workload, args, progress) -> dict:
    """A workload of files. Errors: Failed when the disk is too small."""
    folder = args.dir / f"{workload.fixture}-{args.size}"
    out = args.dir / "out"
    dtype, count, _ = FIXTURES[workload.fixture]
    size = BYTES[dtype] * values_in(workload.fixture, args.size)
    need = 1.05 * size * (workload.outputs + (0 if folder.exists() else count))
    free = shutil.disk_usage(args.dir).free
    if need > free:
        raise Failed(
            f"it needs {need / 1e9:.0f} GB in {args.dir}, {free / 1e9:.0f} GB are free; "
            "give another --dir"
        )
    inputs = make_checkpoints(folder, workload.fixture, args.size)
    # warm: nobody pays for a cold cache
    measure([["cat", *map(str, inputs)]], out.with_suffix(".log"))
    contenders = workload.contenders(inputs, out, args.python)
    if args.beside:
        contenders = beside(args.beside, contenders)
    runs, errors, notes = take_turns(contenders, args.repeats, out, progress)
    rows = table_rows(runs, errors)
    return {"n": args.repeats, "input_bytes": size * len(inputs), "rows": rows, "notes": notes}


def run_online(workload: Workload, args, progress) -> dict:
    """Workload D in the peers' environment, or without them where there is none."""
    python = args.python if "torch" in versions(args.python) else sys.executable
    command = worker(python, online, args.size, args.repeats)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    found = json.loads(done.stdout)
    progress(args.repeats, "done")
    runs = {name: [{"seconds": s} for s in seconds] for name, seconds in found["seconds"].items()}
    return {"n": 4 * args.repeats, "rows": table_rows(runs, {}), "notes": found["notes"]}


def store(path: Path, name: str, result: dict) -> None:
    """Put one workload's results into the JSON, atomically; the others stay."""
    known = json.loads(path.read_text())["workloads"] if path.exists() else {}
    workloads = dict(sorted((known | {name: result}).items()))
    kept = {"workloads": workloads, "markdown": markdown(workloads)}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(part, path)


def renew_docs() -> None:
    """Write the table into docs/benchmarks.md, from the JSON."""
    sys.path.insert(0, str(ROOT))
    try:
        from lab.report import renew

        renew()
    except (ImportError, ValueError, OSError) as error:
        print(
            f"docs/benchmarks.md is as it was ({error}); to renew it: python -m lab.report --renew",
            file=sys.stderr,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir())
    parser.add_argument(
        "--only", nargs="+", choices="ABCD", default=[*"ABCD"], help="these workloads"
    )
    parser.add_argument("--repeats", type=int, default=5, help="(default 5)")
    parser.add_argument(
        "--size",
        choices=("full", "small"),
        default="full",
        help="small: a tenth, to try the script; results go to --dir",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=scratch / "lawa-benchmark",
        help="for checkpoints, 30 GB (default %(default)s)",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=scratch / "lawa-peers",
        help="the peers' environment, kept (default %(default)s)",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        help="another checkout, whose averager takes turns with this one's; without the peers, and "
        "results go to --dir",
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.beside and not (args.beside / "lawa_core.py").exists():
        parser.error(f"--beside must be a checkout of this project, got {args.beside}")
    return args


def remove(args, keep) -> None:
    """Remove what this script wrote into its folder, except results and the fixtures to keep."""
    shutil.rmtree(args.dir / "out", ignore_errors=True)
    for fixture in FIXTURES.keys() - {*keep}:
        shutil.rmtree(args.dir / f"{fixture}-{args.size}", ignore_errors=True)
        shutil.rmtree(args.dir / f"{fixture}-{args.size}.part", ignore_errors=True)
    (args.dir / "out.log").unlink(missing_ok=True)


def main() -> int:
    load = os.getloadavg()[0]
    args = parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    args.python = args.peers / "bin" / "python"
    if {*args.only} & {*"AD"} and not args.beside:
        args.python = make_peers(args.peers.absolute())
    results = args.dir / "averaging.json"
    if args.size == "full" and not args.beside:
        results = Path(__file__).with_suffix(".json")
    todo = [w for w in WORKLOADS if w.name[0] in args.only]
    about = machine(load, args.python)
    shrunk = 1 if args.size == "full" else 0.15
    left = {w.name: w.estimate * args.repeats * shrunk for w in todo}  # seconds
    print(
        f"{len(todo)} workloads, {args.repeats} repetitions: about {sum(left.values()) / 60:.0f} "
        f"minutes on 2 quiet cores; the load is {load:.1f}"
        f"{', too much for timings' * (load > 0.5)}",
        file=sys.stderr,
    )
    measured = {}
    try:
        for number, workload in enumerate(todo):
            begun = time.monotonic()

            def progress(done: int, text: str, name=workload.name, begun=begun) -> None:
                left[name] = (time.monotonic() - begun) / done * (args.repeats - done)
                print(
                    f"{name}  {done} of {args.repeats}  {text}; "
                    f"{sum(left.values()) / 60:.1f} minutes left",
                    file=sys.stderr,
                    flush=True,
                )

            try:
                run = run_files if workload.fixture else run_online
                result = run(workload, args, progress)
                result["size"] = args.size
                result["date"] = datetime.date.today().isoformat()
                result["machine"] = about
                result["reach"] = reached(workload.name, result)
                measured[workload.name] = result
                store(results, workload.name, result)
            except Failed as error:
                print(f"{workload.name} skipped: {error}", file=sys.stderr)
            left[workload.name] = 0
            remove(args, FIXTURES if args.keep else [later.fixture for later in todo[number + 1 :]])
    except KeyboardInterrupt:
        return 130
    finally:
        remove(args, FIXTURES if args.keep else ())
        if measured and args.size == "full" and not args.beside:
            renew_docs()
    print(f"{markdown(measured)}\n\nresults in {results}")
    return 0 if measured else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        sys.path.insert(0, str(ROOT))
        WORKERS[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main())
