"""Recipes: what determines a run's numbers, its learning rates and batches, the scales from a laptop to the paper's, and what they cost.

Losses are nats per token. The recipe is the one of the LAWA paper (arXiv 2306.03241).
"""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import lawa_core
from corpora import ROOT, Corpus, open_corpus
from gpt import GPT, PRESETS, GPTConfig, preset
from lawa_core import LawaError, scheme_dir

RUNS = ROOT / "runs"


# ---- 1. A run's configuration -------------------------------------------------------------------------------------------------------

def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers; its hash names the run folder. Defaults: the `laptop` scale."""
    preset: str = option("micro", f"architecture: {', '.join(PRESETS)}")
    corpus: str = option("stdlib", "folder under data/, or a path")
    lr: float = option(1e-3, "peak learning rate")
    max_iters: int = option(1000, "optimizer steps")
    batch_size: int = option(8, "sequences per micro-batch")
    accumulation: int = option(1, "micro-batches per step, over all ranks; their gradients are averaged")
    warmup_iters: int = option(100, "steps of linear warm-up")
    schedule: str = option("cosine", "after warm-up: cosine, constant, or wsd (constant, then a 1-sqrt cooldown)")
    min_lr_frac: float = option(0.1, "final learning rate as a share of the peak (cosine, wsd)")
    cooldown_frac: float = option(0.2, "wsd: share of the steps spent cooling down")
    hold_frac: float = option(1.0, "cosine: share of the steps after which the rate stays as it is then, as SWA wants it")
    weight_decay: float = option(0.1, "AdamW's, on matrices and embeddings only")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no clipping")
    ckpt_interval: int = option(20, "steps between checkpoints")
    seed: int = option(0, "of the initial weights and of the batches")
    averages: str = option("", 'kept while training, each as a trajectory in the run folder: "ema(0.99); swa(start=500); lawa(5, 20)"')
    burst_at: int = option(0, "step at which a burst of too high a rate begins, to provoke a loss spike")
    burst_iters: int = option(0, "its length in steps; 0: no burst")
    burst_factor: float = option(1.0, "the rate is multiplied by this meanwhile")
    init_from: str = option("", "checkpoint or average to start from, with a fresh optimizer, instead of random weights")
    init_step: int = option(0, "the step that init_from counts as: schedule and batches go on from there")
    dtype: str = option("auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, else fp32")

    def __post_init__(self):
        wrong = [f"{name} must be {what}, got {getattr(self, name)!r}" for name, what, right in (
            ("preset", f"one of {', '.join(PRESETS)}", self.preset in PRESETS),
            ("schedule", "cosine, constant or wsd", self.schedule in ("cosine", "constant", "wsd")),
            ("lr", "above 0", 0 < self.lr < math.inf),
            ("max_iters", "at least 1", self.max_iters >= 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("accumulation", "at least 1", self.accumulation >= 1),
            ("warmup_iters", f"between 0 and max_iters = {self.max_iters}", 0 <= self.warmup_iters <= self.max_iters),
            ("min_lr_frac", "between 0 and 1", 0 <= self.min_lr_frac <= 1),
            ("cooldown_frac", "above 0, at most 1", 0 < self.cooldown_frac <= 1),
            ("hold_frac", "above 0, at most 1", 0 < self.hold_frac <= 1),
            ("weight_decay", "at least 0", 0 <= self.weight_decay < math.inf),
            ("beta1", "in [0, 1)", 0 <= self.beta1 < 1),
            ("beta2", "in [0, 1)", 0 <= self.beta2 < 1),
            ("grad_clip", "at least 0", 0 <= self.grad_clip < math.inf),
            ("ckpt_interval", f"between 1 and max_iters = {self.max_iters}", 1 <= self.ckpt_interval <= self.max_iters),
            ("seed", "at least 0", self.seed >= 0),
            ("burst_iters", "at least 0", self.burst_iters >= 0),
            ("burst_factor", "above 0", 0 < self.burst_factor < math.inf),
            ("init_step", f"between 0 and max_iters = {self.max_iters}, and 0 without init_from",
             0 <= self.init_step < self.max_iters and bool(self.init_from or not self.init_step)),
            ("dtype", "fp32, bf16 or auto", self.dtype in ("fp32", "bf16", "auto"))) if not right]
        if wrong:
            raise LawaError("; ".join(wrong))
        if strange := [text for text, scheme in self.online.items() if type(scheme) not in ONLINE]:
            raise LawaError(f"averages must be lawa, ema or swa, got {strange[0]!r}")
        if len(set(map(scheme_dir, self.online))) < len([text for text in self.averages.split(";") if text.strip()]):
            raise LawaError(f"averages must be different, got {self.averages!r}")

    @property
    def online(self) -> dict[str, object]:
        """{text: scheme} of the averages kept while training."""
        return {text.strip(): lawa_core.parse_scheme(text) for text in self.averages.split(";") if text.strip()}

    @property
    def block_size(self) -> int:
        return PRESETS[self.preset][3]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.block_size

    @property
    def checkpoint_steps(self) -> list[int]:
        return [step for step in range(self.ckpt_interval, self.max_iters + 1, self.ckpt_interval) if step > self.init_step]

    def resolved(self, device: torch.device) -> Config:
        """The same with dtype "auto" replaced by what the device gets."""
        return self if self.dtype != "auto" else dataclasses.replace(self, dtype="bf16" if device.type == "cuda" else "fp32")


ONLINE = {lawa_core.ema: lambda model, s: lawa_core.EMA(model, s.beta, s.every or 1, s.start),
          lawa_core.swa: lambda model, s: lawa_core.SWA(model, s.start, s.every or 1),
          lawa_core.lawa: lambda model, s: lawa_core.LAWA(model, s.k, s.spacing or 1, s.start)}


def pick_device(device: str = "auto") -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def run_dir(config: Config, runs=None, device: str = "auto") -> Path:
    """runs/<corpus>-<preset>-<hash>: the hash covers every field of the configuration and the content of corpus and init_from."""
    corpus, values = open_corpus(config.corpus), dataclasses.asdict(config.resolved(pick_device(device)))
    values |= {"corpus": corpus.fingerprint, "init_from": config.init_from and lawa_core.open_checkpoint(config.init_from).sample}
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    return Path(runs or RUNS) / f"{corpus.name}-{config.preset}-{name}"


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up over warmup_iters + 1 steps (nanoGPT's), the schedule, the burst."""
    peak = config.lr * (config.burst_factor if config.burst_at <= step < config.burst_at + config.burst_iters else 1)
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        begin, step = config.warmup_iters, min(step, round(config.hold_frac * config.max_iters))
    else:
        begin = config.max_iters - round(config.cooldown_frac * config.max_iters)
    x = min(max(step - begin, 0) / max(config.max_iters - begin, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * x)) if config.schedule == "cosine" else 1 - math.sqrt(x)
    return peak * (config.min_lr_frac + (1 - config.min_lr_frac) * left)


def batch(tokens: np.ndarray, config: Config, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The batch of step `step`: (sequences, block_size + 1) int64, or the share of it that rank `rank` of `world` takes.

    A function of (seed, step) alone, so neither resuming nor evaluating nor the number of ranks changes it.
    """
    generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    starts = generator.integers(0, len(tokens) - config.block_size, config.batch_size * config.accumulation)
    starts = np.split(starts, world)[rank]
    return tokens[starts[:, None] + np.arange(config.block_size + 1)].astype(np.int64)


def _known(tokens: np.ndarray, corpus: Corpus) -> np.ndarray:
    """The tokens, if the corpus's vocabulary has them all."""
    if tokens.max() >= corpus.vocab_size:
        raise LawaError(f"{corpus.folder} holds token {tokens.max()}, but its vocabulary has {corpus.vocab_size}; prepare the corpus again")
    return tokens


def kept_steps(config: Config, vocab_size: int, keep, disk_budget: float) -> set[int]:
    """The steps whose checkpoints are written: all, or what the scheme `keep` needs at as many evenly spaced targets as fit the budget."""
    steps, size = config.checkpoint_steps, checkpoint_bytes(config, vocab_size)
    for stride in range(1, len(steps) + 1):
        targets = steps[::-1][::stride]  # the last checkpoint always
        needed = set(targets).union(*(lawa_core.row(keep, steps, target) for target in targets)) if keep else set(targets)
        if len(needed) * size <= disk_budget or (keep is None and disk_budget == math.inf):
            return needed
    raise LawaError(f"disk_budget must hold at least one window of {len(needed)} checkpoints of {size:,} bytes, got {disk_budget:,.0f}")


# ---- 2. Scales ----------------------------------------------------------------------------------------------------------------------

# One recipe, many sizes. `lr` is the usual rate; sweeps multiply it, up to the paper's tenfold. The gpt2 scales are the paper's settings
# with the batch re-cut for one GPU (same tokens per step); the paper does not give its spacing, so those three are ours.
_OPENWEBTEXT = {"corpus": "openwebtext", "seeds": "0", "k": 5, "n_blocks": 512, "averages": "ema(0.9); ema(0.999)"}
_PAPER = {**_OPENWEBTEXT, "max_iters": 70_000, "warmup_iters": 2000}
SCALES = {
    "smoke": {"preset": "nano", "corpus": "stdlib", "lr": 1e-3, "max_iters": 400, "batch_size": 8, "warmup_iters": 40, "ckpt_interval": 10,
              "seeds": "0,1", "k": 3, "spacing": 10, "n_blocks": 64, "averages": "ema(0.9); ema(0.98); lawa(3, 1)"},
    "laptop": {"preset": "micro", "corpus": "stdlib", "lr": 1e-3, "max_iters": 1000, "batch_size": 8, "warmup_iters": 100,
               "ckpt_interval": 20, "seeds": "0,1,2", "k": 5, "spacing": 20, "n_blocks": 64,
               "averages": "ema(0.9); ema(0.98); ema(0.99); lawa(5, 1); lawa(5, 5)"},
    "gpu-hour": {**_OPENWEBTEXT, "preset": "midi", "lr": 6e-4, "max_iters": 10_000, "warmup_iters": 300, "batch_size": 32,
                 "accumulation": 4, "ckpt_interval": 100, "spacing": 100},
    "gpt2-small": {**_PAPER, "preset": "gpt2-small", "lr": 6e-4, "batch_size": 16, "accumulation": 24, "ckpt_interval": 200,
                   "spacing": 1000},
    "gpt2-medium": {**_PAPER, "preset": "gpt2-medium", "lr": 3e-4, "batch_size": 12, "accumulation": 12, "ckpt_interval": 2000,
                    "spacing": 2000},
    "gpt2-large": {**_PAPER, "preset": "gpt2-large", "lr": 2e-4, "batch_size": 8, "accumulation": 6, "ckpt_interval": 1000,
                   "spacing": 1000, "min_lr_frac": 0.005},
}
DEVICES = {  # sustained FLOP/s and memory in GB: for GPUs 40% of the dense bf16 peak on the maker's data sheet, for CPU cores measured
    "two CPU cores": (120e9, 16), "RTX 4090": (66e12, 24), "A100": (125e12, 80), "H100": (396e12, 80)}


def scale_values(name: str) -> dict:
    if name not in SCALES:
        raise LawaError(f"scale must be one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]


def scale_config(values, **given) -> Config:
    """The Config of a scale's (or a notebook's) values, with some of them given."""
    names = {f.name for f in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in (dict(values) | given).items() if name in names})


@functools.cache
def _parameters(shape: GPTConfig) -> tuple[int, int]:
    """(all parameters, those without position embeddings)."""
    with torch.device("meta"):
        model = GPT(shape)
    return sum(p.numel() for p in model.parameters()), model.size()


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """What one checkpoint and those of the averages kept while training take on disk: float32 weights."""
    return 4 * _parameters(preset(config.preset, vocab_size))[0] * (1 + len(config.online))


def cost(config: Config, vocab_size: int = 50_257, keep=None, disk_budget: float = math.inf) -> dict:
    """What a run takes: parameters, tokens, FLOPs (6 per parameter and token, attention 12 L C T per token: PaLM's count), bytes by part.

    Activations: 34 bytes per token, layer and unit of width in bf16 (arXiv 2205.05198, without attention scores), twice that in fp32, and
    the logits with their gradient.
    """
    shape, (every, counted) = preset(config.preset, vocab_size), _parameters(preset(config.preset, vocab_size))
    tokens = config.tokens_per_step * (config.max_iters - config.init_step)
    copies = {lawa_core.ema: 1, lawa_core.swa: 2, lawa_core.lawa: 0}  # in float32; SWA sums in double, LAWA's window lies on the CPU
    wide, micro = 1 if config.dtype == "bf16" else 2, config.batch_size * shape.block_size
    memory = {"weights": 4 * every, "gradients": 4 * every, "AdamW": 8 * every,
              "averages": sum(4 * every * copies[type(scheme)] for scheme in config.online.values()),
              "activations": micro * shape.n_layer * shape.n_embd * 34 * wide, "logits": micro * shape.vocab_size * (4 + 4 * wide)}
    flops = tokens * (6 * counted + 12 * shape.n_layer * shape.n_embd * shape.block_size)
    disk = checkpoint_bytes(config, vocab_size) * len(kept_steps(config, vocab_size, keep, disk_budget))
    return {"parameters": counted, "tokens": tokens, "flops": flops, "memory": memory, "checkpoint_bytes": disk}


def plan(configs, keep=None, disk_budget: float = math.inf) -> str:
    """A few lines: what the runs take, time on common devices, and whether disk and memory suffice here. Other arguments as for `train`."""
    device = pick_device()
    configs = [config.resolved(device) for config in configs]
    sizes = {name: _vocab_size(name) for name in {config.corpus for config in configs}}
    costs = [cost(config, sizes[config.corpus], keep, disk_budget) for config in configs]
    flops, disk = sum(c["flops"] for c in costs), sum(c["checkpoint_bytes"] for c in costs)
    parts = max((c["memory"] for c in costs), key=lambda parts: sum(parts.values()))
    memory, free = sum(parts.values()), shutil.disk_usage(next(path for path in (RUNS, *RUNS.parents) if path.exists())).free
    there = torch.cuda.mem_get_info()[0] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    times = [f"{_duration(flops / rate)} on {name} at {rate / 1e12:g} TFLOP/s{' (too small)' if memory > size * 1e9 else ''}"
             for name, (rate, size) in DEVICES.items()]
    return "\n".join([
        f"{len(costs)} run{'s' * (len(costs) > 1)}: up to {max(c['parameters'] for c in costs) / 1e6:.2f}M parameters in "
        f"{configs[0].dtype}, {sum(c['tokens'] for c in costs) / 1e6:,.1f}M tokens, {flops:.2e} FLOPs in all",
        f"time: about {', '.join(times)}",
        f"disk: {disk / 1e9:.2f} GB of checkpoints, {free / 1e9:.0f} GB free: "
        f"{'enough' if disk < free else 'NOT ENOUGH; raise ckpt_interval, or set disk_budget and keep'}",
        f"memory: {memory / 1e9:.2f} GB ({', '.join(f'{name} {size / 1e9:.2f}' for name, size in parts.items() if size)}), "
        f"{there / 1e9:.0f} GB on this {device.type}: {'enough' if memory < there else 'NOT ENOUGH; lower batch_size'}"])


def _vocab_size(corpus: str) -> int:
    try:
        return open_corpus(corpus).vocab_size
    except LawaError:  # not prepared yet: GPT-2's
        return 50_257


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400 * 2), ("hours", 3600 * 2), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / size * 2:.1f} {unit}"
    return f"{seconds:.1f} s"
