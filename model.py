"""The nanoGPT: train a GPT, leave a trajectory of checkpoints, evaluate averages along it.

    python model.py train --preset micro --corpus stdlib --lr 1e-3

It reads in the order of the data: sizes and configuration, network, corpus, batches and rates, run
folder, training, evaluation, text, scales, command line. The recipe is the LAWA paper's (arXiv
2306.03241); losses are in nats per token. Many runs, their cost, public models: see lab/.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import lawa_core
from lawa_core import JobFailed, LawaError, checkpoint_name, scheme_dir

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
RUNS = ROOT / "runs"


def require(right, message: str) -> None:
    """Refuse what is not right: the message says what was expected, what came, what to do."""
    if not right:
        raise LawaError(message)

# ---- 1. Sizes and configuration ------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network, under GPT-2's names."""
    n_layer: int
    n_head: int
    n_embd: int  # width; n_head must divide it
    block_size: int  # longest sequence, tokens
    vocab_size: int
    bias: bool = False  # in linear layers and norms: OpenAI's GPT-2 has them, the paper's not
    scale_attn_by_inverse_layer_idx: bool = True  # scores / (layer index + 1), as in the paper
    gelu: str = "tanh"  # "tanh" is GPT-2's approximation, "none" the exact function
    # what GPT-NeoX (arXiv 2204.06745), and so Pythia, does differently:
    rotary: float = 0.0  # share of a head's width turned by position; 0: learned positions
    parallel: bool = False  # the MLP reads the block's input, not attention's output
    tied: bool = True  # the embedding is also the output layer
    eps: float = 1e-5  # of the layer norms

    def __post_init__(self):
        require(self.n_embd % self.n_head == 0,
                f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        require(0 <= self.rotary <= 1 and self.rotary_width % 2 == 0,
                "rotary must turn an even part of a head's width "
                f"{self.n_embd // self.n_head}, got {self.rotary}")

    @property
    def rotary_width(self) -> int:
        return int(self.n_embd // self.n_head * self.rotary)


NEOX = {"bias": True, "scale_attn_by_inverse_layer_idx": False, "gelu": "none",
        "rotary": 0.25, "parallel": True, "tied": False}
PRESETS = {  # layers, heads, width, block size, and what is not as in the paper's GPT-2
    "pico": (2, 2, 32, 64),  # 0.02M parameters without embeddings: 12 layers width^2
    "nano": (2, 2, 64, 64),  # 0.1M, for tests and scale smoke
    "micro": (2, 4, 128, 128),  # 0.4M
    "milli": (3, 4, 192, 128),  # 1.3M
    "mini": (4, 4, 256, 128),  # 3M
    "midi": (6, 6, 384, 256),  # 11M
    "gpt2-small": (12, 12, 768, 1024),  # 85M; the paper's three sizes
    "gpt2-medium": (24, 16, 1024, 1024),  # 302M
    "gpt2-large": (36, 20, 1280, 1024),  # 708M
    "neox-nano": (2, 4, 96, 128, NEOX),  # 0.2M, for replays without the Hub
    "pythia-70m": (6, 8, 512, 2048, NEOX),  # 19M (arXiv 2304.01373)
    "pythia-160m": (12, 12, 768, 2048, NEOX),  # 85M
    "pythia-410m": (24, 16, 1024, 2048, NEOX),  # 302M
    "pythia-1b": (16, 8, 2048, 2048, NEOX),  # 805M
    "pythia-1.4b": (24, 16, 2048, 2048, NEOX),  # 1.2G
    "pythia-2.8b": (32, 32, 2560, 2048, NEOX),  # 2.5G
    "pythia-6.9b": (32, 32, 4096, 2048, NEOX),  # 6.4G
    "pythia-12b": (36, 40, 5120, 2048, NEOX),  # 11.3G
}
PADDED = {"pythia-6.9b": 256, "pythia-12b": 512}  # 128 times the devices a layer was split over


def gpt_config(name: str, vocab_size: int) -> GPTConfig:
    """A preset's shape (-deduped: the same) for a vocabulary, padded as matrix units like it."""
    name = name.removesuffix("-deduped")
    require(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    n_layer, n_head, n_embd, block_size, *other = PRESETS[name]
    multiple = PADDED.get(name, 64)
    vocab_size = math.ceil(vocab_size / multiple) * multiple
    return GPTConfig(n_layer, n_head, n_embd, block_size, vocab_size, **(other[0] if other else {}))


ONLINE = {  # averages kept while training, by scheme
    lawa_core.ema: lambda net, s: lawa_core.EMA(net, s.beta, s.every or 1, s.start),
    lawa_core.swa: lambda net, s: lawa_core.SWA(net, s.start, s.every or 1),
    lawa_core.lawa: lambda net, s: lawa_core.LAWA(net, s.k, s.spacing or 1, s.start),
}


def one_of(*names: str):
    return f"one of {', '.join(names)}", lambda value, c: value in names


# rules: legal values in words, test(value, config)
ABOVE_0 = "above 0", lambda value, c: 0 < value < math.inf
AT_LEAST_0 = "at least 0", lambda value, c: 0 <= value < math.inf
AT_LEAST_1 = "at least 1", lambda value, c: value >= 1
BELOW_1 = "in [0, 1)", lambda value, c: 0 <= value < 1
SHARE = "above 0, at most 1", lambda value, c: 0 < value <= 1


def option(default, help: str, rule=("anything", lambda value, c: True)):
    return field(default=default, metadata={"help": help, "rule": rule})


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers; its hash names the run folder. Defaults: a short run."""
    preset: str = option("micro", f"architecture: {', '.join(PRESETS)}", one_of(*PRESETS))
    corpus: str = option("stdlib", "folder under data/, or a path")
    lr: float = option(1e-3, "peak learning rate", ABOVE_0)
    max_iters: int = option(1000, "optimizer steps", AT_LEAST_1)
    batch_size: int = option(8, "sequences per micro-batch", AT_LEAST_1)
    gradient_accumulation_steps: int = option(1, "micro-batches a step, of all ranks", AT_LEAST_1)
    warmup_iters: int = option(100, "steps of linear warm-up", (
        "between 0 and max_iters = {max_iters}", lambda value, c: 0 <= value <= c.max_iters))
    schedule: str = option(
        "cosine", "after warm-up: cosine, constant, or wsd (constant, then a 1-sqrt cooldown)",
        one_of("cosine", "constant", "wsd"))
    min_lr_frac: float = option(0.1, "final rate as a share of the peak (cosine, wsd)", (
        "between 0 and 1", lambda value, c: 0 <= value <= 1))
    cooldown_frac: float = option(0.2, "wsd: share of the steps spent cooling down", SHARE)
    hold_frac: float = option(1.0, "cosine: share after which the rate is held, for SWA", SHARE)
    weight_decay: float = option(0.1, "AdamW's, on matrices and embeddings only", AT_LEAST_0)
    beta1: float = option(0.9, "AdamW", BELOW_1)
    beta2: float = option(0.95, "AdamW", BELOW_1)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", AT_LEAST_0)
    ckpt_interval: int = option(20, "steps between checkpoints", (
        "between 1 and max_iters = {max_iters}", lambda value, c: 1 <= value <= c.max_iters))
    seed: int = option(0, "of the initial weights and of the batches", AT_LEAST_0)
    averages: str = option("", 'kept while training: "ema(0.99); swa(start=500); lawa(5, 20)"', (
        "lawa, ema or swa, no two the same", lambda value, c: c.keeps_distinct_averages()))
    averages_interval: int = option(0, "steps between their files; 0: with every checkpoint", (
        "a multiple of ckpt_interval = {ckpt_interval}",
        lambda value, c: value >= 0 and value % max(c.ckpt_interval, 1) == 0))
    burst_at: int = option(0, "step at which a burst of too high a rate begins, for a loss spike")
    burst_iters: int = option(0, "its length in steps; 0: no burst", AT_LEAST_0)
    burst_factor: float = option(1.0, "the rate is multiplied by this meanwhile", ABOVE_0)
    init_from: str = option("", "checkpoint to start from, with a fresh optimizer")
    init_step: int = option(0, "step that init_from counts as, for schedule and batches", (
        "between 0 and max_iters = {max_iters}, and 0 without init_from",
        lambda value, c: 0 <= value < c.max_iters and bool(c.init_from or not value)))
    dtype: str = option("auto", "fp32, bf16 (autocast), or auto: bf16 on CUDA, else fp32",
                        one_of("fp32", "bf16", "auto"))

    def __post_init__(self):
        wrong = []
        for f in dataclasses.fields(self):
            value, (legal, test) = getattr(self, f.name), f.metadata["rule"]
            if not test(value, self):
                wrong.append(f"{f.name} must be {legal.format_map(vars(self))}, got {value!r}")
        lawa_core.refuse(wrong)

    def schemes(self) -> list[tuple[str, object]]:
        """(text, scheme) of the averages kept while training."""
        texts = [text.strip() for text in self.averages.split(";") if text.strip()]
        return [(text, lawa_core.parse_scheme(text)) for text in texts]

    def keeps_distinct_averages(self) -> bool:
        folders = {scheme_dir(text) for text, scheme in self.schemes() if type(scheme) in ONLINE}
        return len(folders) == len(self.schemes())

    online = property(lambda self: dict(self.schemes()))  # {text: scheme}
    block_size = property(lambda self: PRESETS[self.preset][3])
    sequences = property(lambda self: self.batch_size * self.gradient_accumulation_steps)
    tokens_per_step = property(lambda self: self.sequences * self.block_size)

    @property
    def checkpoint_steps(self) -> list[int]:
        steps = range(self.ckpt_interval, self.max_iters + 1, self.ckpt_interval)
        return [step for step in steps if step > self.init_step]

    def resolved(self, device: torch.device) -> Config:
        """The same with dtype "auto" replaced by what the device gets."""
        dtype = "bf16" if device.type == "cuda" else "fp32"
        return dataclasses.replace(self, dtype=dtype) if self.dtype == "auto" else self


def pick_device(device: str = "auto") -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device((found or "cpu") if device == "auto" else device)

# ---- 2. The network: GPT-2 or, by configuration, GPT-NeoX ----------------------------------------


ROTARY_BASE = 10_000  # of the wavelengths, as in Su et al. (arXiv 2104.09864)


def rotary_table(T: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each (T, width), of position times frequency; float32."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(T, device=device), frequencies)  # (T, width / 2)
    angles = angles.repeat(1, 2)  # (T, width): both values of a pair turn alike
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each head's first `width` values, as pairs (i, i + width / 2). x: (B, nh, T, hs)."""
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = turned.chunk(2, -1)  # each (B, nh, T, width / 2)
    return torch.cat(((turned * cos + torch.cat((-b, a), -1) * sin).type_as(x), kept), -1)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        shrink = layer + 1 if c.scale_attn_by_inverse_layer_idx else 1
        self.scale = (c.n_embd // c.n_head) ** -0.5 / shrink

    def forward(self, x, rotary=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.gelu = c.gelu

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, c.eps, bias=c.bias)
        self.attn = Attention(c, layer)
        self.ln_2 = nn.LayerNorm(c.n_embd, c.eps, bias=c.bias)
        self.mlp = MLP(c)
        self.parallel = c.parallel

    def forward(self, x, rotary=None):
        y = x + self.attn(self.ln_1(x), rotary)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


PIECE = 1024  # tokens whose logits exist at a time on a CPU; fewer make slower matrix products


class LinearCrossEntropy(torch.autograd.Function):
    """Mean loss of the output layer, with its gradients made at once: how a CPU trains in float32.

    The logits, a small model's largest array, become probabilities and then their own gradient in
    the memory they were made in, with one exponential each instead of two; no second derivative.
    x: (N, C), head: (vocab, C), both float32, targets: (N,) int64. Returns a scalar.
    """
    @staticmethod
    def forward(ctx, x, head, targets):
        dx = torch.empty_like(x)
        dhead = torch.zeros_like(head)
        memory = x.new_empty(min(len(x), PIECE), len(head))  # (tokens, vocab)
        losses = []
        for start in range(0, len(x), PIECE):
            part = x[start:start + PIECE]  # (n, C)
            answers = targets[start:start + PIECE, None]  # (n, 1)
            logits = torch.mm(part, head.T, out=memory[:len(part)])  # (n, vocab)
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, answers)
            total = logits.exp_().sum(1, keepdim=True)
            losses.append(total.log() - right)
            logits *= 1 / (len(x) * total)  # softmax / N; below minus one-hot / N
            logits.scatter_add_(1, answers, logits.new_full(answers.shape, -1 / len(x)))
            torch.mm(logits, head, out=dx[start:start + PIECE])
            dhead.addmm_(logits.T, part)
        ctx.save_for_backward(dx, dhead)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, upstream):
        dx, dhead = ctx.saved_tensors
        return upstream * dx, upstream * dhead, None


class GPT(nn.Module):
    """GPT-2, or GPT-NeoX by configuration, with weights from a generator of its own:
    normal(0, 0.02), residual projections divided by sqrt(2 n_layer) (GPT-2), norms 1, biases 0.
    """
    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = c = config
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's own initialization takes time, and global randomness
            self.wte = nn.Embedding(c.vocab_size, c.n_embd)
            self.wpe = None if c.rotary else nn.Embedding(c.block_size, c.n_embd)
            self.h = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
            self.ln_f = nn.LayerNorm(c.n_embd, c.eps, bias=c.bias)
            self.lm_head = None if c.tied else nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.to_empty(device=device)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                shrink = math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    @property
    def head(self) -> torch.Tensor:
        """The output layer's weights, (vocab, C)."""
        return (self.lm_head or self.wte).weight

    def hidden(self, idx):
        """idx: (B, T) int64. Returns what the output layer reads, (B, T, C)."""
        T = idx.shape[1]
        longest = self.config.block_size
        require(longest >= T, f"sequences have at most block_size = {longest} tokens, got {T}")
        x = self.wte(idx)  # (B, T, C)
        rotary = None
        if self.config.rotary:
            rotary = rotary_table(T, self.config.rotary_width, idx.device)
        else:
            x = x + self.wpe.weight[:T]  # (T, C)
        for block in self.h:
            x = block(x, rotary)
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64. Returns (logits (B, T, vocab), None) or (None, mean loss)."""
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.head), None
        plain = not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        own = plain and x.requires_grad and (x.device.type, x.dtype) == ("cpu", torch.float32)
        loss = LinearCrossEntropy.apply if own else F.linear_cross_entropy
        return None, loss(x.flatten(0, 1), self.head, targets.flatten())

    def losses(self, idx, targets, memory: int = 36 << 20):
        """Losses in nats, (B, T), with at most about `memory` bytes of logits at a time: 36 MB are
        just above the 32 from which malloc gives back at once what is free."""
        x = self.hidden(idx).flatten(0, 1)  # (B T, C)
        rows = max(memory // (4 * self.config.vocab_size), 1)
        rows = min(rows, PIECE) if x.device.type == "cpu" else rows
        losses = []
        for part, answers in zip(x.split(rows), targets.flatten().split(rows), strict=True):
            logits = F.linear(part, self.head).float()  # (rows, vocab)
            losses.append(F.cross_entropy(logits, answers, reduction="none"))
        return torch.cat(losses).view_as(targets)

    def size(self) -> int:
        """Parameters, learned position embeddings left out (nanoGPT's count)."""
        return sum(p.numel() for name, p in self.named_parameters() if name != "wpe.weight")


def empty_model(config: GPTConfig, device="cpu", dtype=torch.float32) -> GPT:
    """A GPT whose weights are not set, made on the device itself; for weights to be copied into."""
    with torch.device("meta"):
        return GPT(config).to(dtype).to_empty(device=device).eval()


@functools.cache
def count_parameters(config: GPTConfig) -> tuple[int, int]:
    """(all parameters, those without position embeddings)."""
    with torch.device("meta"):
        net = GPT(config)
    return sum(p.numel() for p in net.parameters()), net.size()

# ---- 3. Corpus -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Folder data/NAME/: meta.json, and train.bin and val.bin, which hold raw little-endian tokens:
    uint16, or uint32 where the vocabulary is above 65,536."""
    folder: Path
    meta: dict
    train: np.ndarray | Shards  # (tokens,), mapped; empty where a text only evaluates
    val: np.ndarray | Shards

    name = property(lambda self: self.meta["name"])
    vocab_size = property(lambda self: self.meta["vocab_size"])

    @property
    def val_bytes_per_token(self) -> float:
        """Bytes of text per token; nan where meta.json does not tell."""
        return self.meta.get("val_bytes", math.nan) / self.meta["val_tokens"]

    @property
    def fingerprint(self) -> str:
        """Changes with the text, the split and the tokenizer; part of a run's name."""
        kept = {key: value for key, value in self.meta.items() if key not in ("python", "name")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def tokenizer(self):
        """A tiktoken.Encoding."""
        import tiktoken
        path = self.folder / self.meta["tokenizer"]
        require(path.suffix != ".json", f"{path} is not tiktoken's; read it with tokenizers")
        if not path.exists():
            return tiktoken.get_encoding(self.meta["tokenizer"])  # one of tiktoken's own, "gpt2"
        words = [line.split() for line in path.read_text().splitlines()]
        ranks = {base64.b64decode(word): int(rank) for word, rank in words}
        special = {"<|endoftext|>": self.meta["eot_token"]}
        return tiktoken.Encoding(self.name, pat_str=self.meta["pattern"], mergeable_ranks=ranks,
                                 special_tokens=special)

    def known(self, tokens: np.ndarray) -> torch.Tensor:
        """The tokens as int64, refused if the vocabulary lacks one."""
        largest = tokens.max(initial=0)
        require(largest < self.vocab_size, f"{self.folder} holds token {largest}, but "
                f"{self.meta['tokenizer']} has {self.vocab_size}; prepare the corpus again")
        return torch.from_numpy(tokens.astype(np.int64))


class Shards:
    """Mapped files as one array of tokens: len, slices, integer arrays as indices (give copies)."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        which = np.searchsorted(self.ends, index, "right")  # the part that each token lies in
        tokens = np.empty(index.shape, self.parts[0].dtype)
        for i in np.unique(which):
            here = which == i
            tokens[here] = self.parts[i][index[here] - self.ends[i]]  # counted from its end
        return tokens


def map_tokens(folder: Path, split: str, kind) -> np.ndarray | Shards:
    """(tokens,) of a type, of SPLIT.bin or of shards *_SPLIT_*.bin as modded-nanogpt has them.

    Empty where there is no file. A shard begins with 256 int32: 20240520, 1, the number of its
    uint16 tokens. Other headers are known by a date or a count, a small version, and little more.
    """
    plain = folder / f"{split}.bin"
    parts = []
    for path in [plain] if plain.exists() else sorted(folder.glob(f"*_{split}_*.bin")):
        size, header = path.stat().st_size, np.fromfile(path, "<i4", 256)
        require(size % kind.itemsize == 0, f"{path} has {size} bytes; expected a multiple of "
                f"{kind.itemsize}, of {kind} tokens; fetch or prepare it again")
        magic, version, count = header[:3].tolist() if len(header) == 256 else (0, 0, 0)
        shard = (magic, version, 2 * count) == (20240520, 1, size - 1024)
        told = 20_000_000 < magic < 21_000_000 or size - 1024 in (2 * count, 4 * count)
        headed = told and 0 < version < 1000 and np.count_nonzero(header) < 16
        require(shard or not headed, f"{path}: its header says {magic}, {version}, {count}; "
                f"expected 20240520, 1, {size // 2 - 512} or none; fetch it again or write uint16")
        parts.append(np.memmap(path, kind, "r", 1024 * shard) if size else np.empty(0, kind))
    return Shards(parts) if len(parts) > 1 else next(iter(parts), np.empty(0, kind))


def four_bytes_each(tokens) -> bool:
    """Whether tokens read as uint16 are low and high halves of uint32 in turn: the high below 16,
    as in vocabularies up to a million, and a tenth of the low above them all. Unless tokens of 2
    bytes alternate, the chance of that is below 0.9^100 = 1 in 37,000, and soon none."""
    low, high = tokens[:100_000:2], tokens[1:100_000:2]
    most = high.max(initial=0)
    return len(tokens) % 2 == 0 and len(high) >= 100 and most < 16 and (low > most).mean() > 0.1


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_corpus(name) -> Corpus:
    """The corpus data/NAME/, or any folder, with its tokens mapped; LawaError with what to run.

    Without a meta.json, token files as nanoGPT or modded-nanogpt write them are taken for GPT-2's
    tokens, which is said on stderr.
    """
    folder = DATA / str(name) if (DATA / str(name)).is_dir() else Path(name)
    about, meta, kind = folder / "meta.json", {}, np.dtype("<u2")
    if about.exists():
        needed = ("name", "vocab_size", "eot_token", "tokenizer", "train_tokens", "val_tokens")
        with lawa_core.explained(f"{about}: expected JSON with {', '.join(needed)}; prepare "
                                 "the corpus again"):
            meta = json.loads(about.read_text())
            meta |= {key: meta[key] for key in needed}  # KeyError names what it lacks
            kind = np.dtype("<u2" if meta["vocab_size"] <= 1 << 16 else "<u4")
    tokens = {split: map_tokens(folder, split, kind) for split in ("train", "val")}
    if not meta:
        command = f"python {DATA / str(name) / 'prepare.py'}"
        if not (DATA / str(name) / "prepare.py").exists():
            command = f"python {DATA / 'text' / 'prepare.py'} YOUR_TEXT --name {Path(name).name}"
        # tokens of their own: of a prepare.py that was killed, or nanoGPT's characters
        own = [*folder.glob(".partial-*"), *folder.glob("tokenizer.*"), *folder.glob("meta.pkl")]
        require(all(map(len, tokens.values())) and not own, f"no corpus {str(name)!r}: expected "
                f"{about}, which says whose the tokens are; run {command}")
        meta = {"name": folder.resolve().name,
                "vocab_size": 50_257, "eot_token": 50_256, "tokenizer": "gpt2"}
        for split, part in tokens.items():
            require(not four_bytes_each(part), f"{folder}: expected {split} tokens of 2 bytes, got "
                    "4 (every second uint16 is tiny); write uint16, or a meta.json if they are")
            begin = hashlib.sha256(part[:100_000].tobytes()).hexdigest()
            meta |= {f"{split}_tokens": len(part), f"{split}_begin": begin}
    corpus = Corpus(folder, meta, **tokens)
    for split, part in tokens.items():
        expected = meta[f"{split}_tokens"]
        require(len(part) == expected, f"{folder / split}.bin has {len(part)} tokens of "
                f"{kind.itemsize} bytes, meta.json says {expected}; prepare the corpus again")
        corpus.known(part[:100_000])
    if not about.exists():
        say_once(f"{folder} has no meta.json: its tokens are taken for GPT-2's")
    return corpus

# ---- 4. Batches and rates ------------------------------------------------------------------------


def batch(tokens, config: Config, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The batch of step `step`: (sequences, block_size + 1) int64, or rank `rank`'s share of it.

    A function of (seed, step) alone: resuming, evaluating, and more ranks do not change it.
    """
    generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    starts = generator.integers(0, len(tokens) - config.block_size, config.sequences)
    starts = np.split(starts, world)[rank]
    return tokens[starts[:, None] + np.arange(config.block_size + 1)].astype(np.int64)


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step` (0-based): warm-up, the schedule, the burst."""
    peak = config.lr
    if config.burst_at <= step < config.burst_at + config.burst_iters:
        peak *= config.burst_factor
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)  # nanoGPT's: never 0
    if config.schedule == "constant":
        return peak
    begin = config.warmup_iters
    if config.schedule == "wsd":
        begin = config.max_iters - round(config.cooldown_frac * config.max_iters)
    else:
        step = min(step, round(config.hold_frac * config.max_iters))
    x = min(max(step - begin, 0) / max(config.max_iters - begin, 1), 1.0)  # share of the decay done
    left = 0.5 * (1 + math.cos(math.pi * x))
    if config.schedule == "wsd":
        left = 1 - math.sqrt(x)  # Hägele et al. (arXiv 2405.18392)
    return peak * (config.min_lr_frac + (1 - config.min_lr_frac) * left)

# ---- 5. Run folder -------------------------------------------------------------------------------


BY_CONTENT = ("corpus", "init_from")  # fields that stand for a content: its path does not matter


def described(config: Config, corpus: Corpus) -> dict:
    """What config.json says."""
    start = config.init_from and lawa_core.open_checkpoint(config.init_from).fingerprint
    return dataclasses.asdict(config) | {
        "tokens_per_step": config.tokens_per_step, "corpus_fingerprint": corpus.fingerprint,
        "init_fingerprint": start}


def run_dir(config: Config, runs=None, device: str = "auto") -> Path:
    """runs/<corpus>-<preset>-<hash of every field and of the content of corpus and init_from>."""
    corpus = open_corpus(config.corpus)
    values = described(config.resolved(pick_device(device)), corpus)
    values = {key: value for key, value in values.items() if key not in BY_CONTENT}
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    return Path(runs or RUNS) / f"{corpus.name}-{config.preset}-{name}"


def claim(folder: Path, config: Config, corpus: Corpus) -> None:
    """Write config.json, or refuse a folder that holds another run."""
    path, wanted = folder / "config.json", described(config, corpus)
    if not path.exists():
        with lawa_core.replacing(path) as part:
            part.write_text(json.dumps(wanted, indent=1))
    found = json.loads(path.read_text())
    changes = [f"{key} {found.get(key)!r} -> {wanted.get(key)!r}" for key in wanted | found
               if key not in BY_CONTENT and found.get(key) != wanted.get(key)]
    require(not changes, f"{folder} holds a run of another configuration ({', '.join(changes)}); "
            "choose another --out_dir")


@contextlib.contextmanager
def locked(folder: Path):
    """One process per run folder; another waits. The lock goes with its process, even killed."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say_once(f"waiting: another process is at work on {folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def disk_bytes(config: Config, vocab_size: int, steps) -> int:
    """What checkpoints at these steps take, with those of the averages: float32 weights."""
    everything, _ = count_parameters(gpt_config(config.preset, vocab_size))
    averaged = [step for step in steps if step % (config.averages_interval or 1) == 0]
    return 4 * everything * (len(steps) + len(config.online) * len(averaged))


def kept_steps(config: Config, vocab_size: int, keep, disk_budget: float) -> set[int]:
    """The steps whose checkpoints are written: evenly spaced, as many as fit disk_budget bytes.

    With a scheme `keep`: all that its windows need, at as many evenly spaced targets as fit.
    """
    steps = config.checkpoint_steps
    for stride in range(1, len(steps) + 1):
        targets = steps[::-1][::stride]  # the last checkpoint always
        needed = set(targets)
        if keep:
            needed.update(*(lawa_core.row(keep, steps, target) for target in targets))
        size = disk_bytes(config, vocab_size, needed)
        if size <= disk_budget:
            return needed
    raise LawaError(f"disk_budget must hold at least one window of {len(needed)} checkpoints, "
                    f"{size:,} bytes, got {disk_budget:,.0f}")


def take_over(state: Path, folder: Path, config: Config) -> None:
    """Make a new run what the run with that state file was: links, as files are only replaced."""
    links = {}
    for place in ("", *map(scheme_dir, config.online)):
        for path in (state.parent / place).glob("ckpt_*.safetensors"):
            if lawa_core.step_of(path) <= lawa_core.step_of(state):
                links[folder / place / path.name] = path
    links[folder / "metrics.csv"] = state.parent / "metrics.csv"  # training cuts it at the state
    links[folder / "resume.pt"] = state  # last: without it, a run starts from its beginning
    for name, path in links.items():
        with lawa_core.replacing(name) as part:
            try:
                os.link(path, part)
            except OSError:  # a disk without links
                shutil.copyfile(path, part)

# ---- 6. Training ---------------------------------------------------------------------------------


READ_EVERY = 10  # steps between looking at the losses: a look makes a GPU wait


def adamw(net: nn.Module, config: Config) -> torch.optim.AdamW:
    """The optimizer; only matrices and embeddings decay."""
    matrices = [p for p in net.parameters() if p.dim() >= 2]
    vectors = [p for p in net.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    fused = matrices[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), fused=fused)


def train_step(network, optimizer, tokens, config: Config, step: int):
    """One optimizer step on tokens (sequences, block_size + 1), micro-batch by micro-batch.

    Returns (mean loss, gradient norm before clipping), on the device: reading them would stop it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    parts = tokens.split(config.batch_size)
    mean = 0.0
    for i, part in enumerate(parts):
        network.require_backward_grad_sync = i == len(parts) - 1  # between ranks, once per step
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            _, loss = network(part[:, :-1], part[:, 1:])
        (loss / len(parts)).backward()
        mean = mean + loss.detach() / len(parts)
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, norm


@contextlib.contextmanager
def joined_ranks(device: torch.device, world: int):
    """(rank, device) of this process, by torchrun's environment; gloo joins CPUs, nccl GPUs."""
    if world == 1:
        yield 0, device
        return
    # torchrun's store of addresses outlives a lost rank: the next ones would hang
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    require(first or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            "a rank was lost; torchrun restarts well only with --standalone or --rdzv_backend=c10d "
            "and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it; start it so, and it goes on")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield torch.distributed.get_rank(), device
    torch.distributed.destroy_process_group()  # not after an error, whose frames hold the network


def on_cpu(tree):
    """A copy of nested dicts and lists of tensors, on the CPU: training may change its own."""
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [on_cpu(value) for value in tree]
    return tree.detach().to("cpu", copy=True) if isinstance(tree, torch.Tensor) else tree


def start_table(path: Path, columns: str, step: int) -> None:
    """Begin a CSV, or cut it back to the step from which a run goes on."""
    whole = path.read_text().split("\n")[1:-1] if path.exists() else []
    rows = [line for line in whole if line.count(",") == columns.count(",")]
    kept = [line for line in rows if int(line.split(",")[0]) <= step]
    with lawa_core.replacing(path) as part:
        part.write_text("\n".join([columns, *kept, ""]))


def append(path: Path, rows) -> None:
    advice = f"cannot write {path}; mend that, and the same command goes on from its last state"
    with lawa_core.explained(advice, JobFailed), open(path, "a") as file:
        file.writelines(",".join(map(repr, row)) + "\n" for row in rows)


def train(config: Config, out_dir=None, *, device: str = "auto", threads: int | None = None,
          compile: bool | None = None, eval_interval: int = 0, state_seconds: float = 30,
          keep=None, disk_budget: float = math.inf, state_at=(), resume_from=None,
          bar: bool = False) -> Path:
    """Train a run, go on with an interrupted one, or find it finished. Returns its folder.

    It holds config.json, metrics.csv (loss on the batch before the update), ckpt_<step>.safetensors
    (float32 weights), a folder of these per average, resume.pt while unfinished, summary.json once
    finished. Under torchrun every rank calls this: the batches are one process's, cut in equal
    parts, and rank 0 writes. Beside the config, nothing changes a number:
        out_dir: default `run_dir`; threads: of a CPU, an interrupted run keeps its own
        compile: default on CUDA; eval_interval: steps between losses in val.csv, 0: none
        state_seconds: a kill loses at most so much work, rounded up to a checkpoint
        keep, disk_budget: see `kept_steps`; bar: show progress
        state_at: steps whose whole state stays as state_<step>.pt
        resume_from: such a file of a run that trains alike until then; if it is there, a run that
            has not begun takes it over, with checkpoints and rows, and ends as if trained alone
    Errors: LawaError for a bad configuration or corpus; JobFailed for a loss that is not finite or
    a full disk, what was saved is kept. Ctrl-C and SIGTERM save the state, then raise
    KeyboardInterrupt and SystemExit(143).
    """
    device = pick_device(device)
    config = config.resolved(device)
    corpus = open_corpus(config.corpus)
    folder = Path(out_dir) if out_dir else run_dir(config)
    resume, summary = folder / "resume.pt", folder / "summary.json"
    written = kept_steps(config, corpus.vocab_size, keep, disk_budget)

    # refuse what cannot work, before anything is written
    world = int(os.environ.get("WORLD_SIZE", 1))
    share = config.sequences // world  # of a rank
    require(config.sequences % world == 0 and share % min(config.batch_size, share) == 0,
            f"batch_size x gradient_accumulation_steps = {config.batch_size} x "
            f"{config.gradient_accumulation_steps} cannot be cut in {world} equal ranks")
    needed = {"training": corpus.train} | ({"validation": corpus.val} if eval_interval else {})
    for split, tokens in needed.items():
        require(len(tokens) > config.block_size, f"{corpus.name} has {len(tokens)} {split} tokens; "
                f"expected more than one block of {config.block_size}")
    lawa_core.positive(threads=threads)
    require(eval_interval >= 0, f"eval_interval must be at least 0, got {eval_interval}")
    require(state_seconds >= 0, f"state_seconds must be at least 0, got {state_seconds}")
    spaced = " " in torch.__file__  # torch.compile calls the compiler without quoting its folder
    require(not (compile and spaced), "torch.compile fails where torch's folder has a space in its "
            f"name: {torch.__file__}; leave --compile out")
    compile = device.type == "cuda" and not spaced if compile is None else compile
    if summary.exists():
        claim(folder, config, corpus)  # refuses a folder that holds another run
        return folder
    net = GPT(gpt_config(config.preset, corpus.vocab_size), config.seed)
    if config.init_from:
        with lawa_core.explained(f"{config.init_from}: expected a {config.preset}; choose another"):
            net.load_state_dict(dict(lawa_core.open_checkpoint(config.init_from)))

    with contextlib.ExitStack() as stack:
        rank, device = stack.enter_context(joined_ranks(device, world))
        if rank == 0:
            claim(folder, config, corpus)
            stack.enter_context(locked(folder))
            if not summary.exists():
                for part in folder.rglob(".*.part"):
                    part.unlink()  # what a killed process was writing
                if resume_from and Path(resume_from).exists() and not resume.exists():
                    take_over(Path(resume_from), folder, config)
        if world > 1:
            torch.distributed.barrier()  # only now may the others look into the folder
        if summary.exists():  # by now, if another process was at work on it
            return folder

        # set-up: the network, its optimizer and averages; or as an interrupted run had them
        if threads:
            torch.set_num_threads(threads)
        net.to(device)
        optimizer = adamw(net, config)
        averages = {text: ONLINE[type(scheme)](net, scheme) for text, scheme in config.schemes()}
        done = config.init_step
        if resume.exists():
            saved = torch.load(resume, map_location=device, weights_only=True)
            done = saved["step"]
            require(set(averages) <= set(saved["averages"]) and done <= config.max_iters,
                    f"{resume} is not the state of a run that trained alike; remove {folder}")
            torch.set_num_threads(saved["threads"])  # with others, sums may round differently
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            for text, average in averages.items():
                average.load_state_dict(saved["averages"][text])
            del saved
        network = net
        if world > 1:
            network = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        if compile:
            torch.compiler.reset()  # the run before in this process had another network
            network = torch.compile(network)
        if rank == 0:
            start_table(folder / "metrics.csv", "step,tokens,lr,loss,grad_norm", done)
        if rank == 0 and eval_interval:
            start_table(folder / "val.csv", "step,loss", done)

        def state() -> dict:
            kept = {text: average.state_dict() for text, average in averages.items()}
            return {"step": done, "threads": torch.get_num_threads(), "net": net.state_dict(),
                    "optimizer": optimizer.state_dict(), "averages": kept}

        pool = stack.enter_context(ThreadPoolExecutor(1))  # files are written behind the training
        writing = None

        def write(states: dict) -> None:
            """Write {path: state} as it is now; one copy in memory at a time."""
            nonlocal writing
            if writing:
                writing.result()  # an error of the writing before is raised here
            copies = on_cpu(states)
            writing = pool.submit(lambda: [lawa_core.save(*item) for item in copies.items()])

        # signals are noted, for the loop to act between two steps; a second Ctrl-C acts at once
        caught = []

        def note(number, _):
            caught.append(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(ValueError):  # not the main thread: its signals are not ours
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, note))
        shown = stack.enter_context(lawa_core.progress(
            config.max_iters, f"training {folder.name}", " step", initial=done,
            disable=rank > 0 or not bar))
        board = None
        if rank == 0:
            with contextlib.suppress(ImportError):  # TensorBoard may not be installed
                from torch.utils.tensorboard import SummaryWriter
                board = SummaryWriter(folder / "tb", purge_step=done + 1)
                stack.callback(board.close)

        first, begun, state_saved, pending = done, time.monotonic(), time.monotonic(), []
        while done < config.max_iters:
            # the next batch, (sequences, block_size + 1), is cut while a GPU still computes
            tokens = corpus.known(batch(corpus.train, config, done, rank, world))
            tokens = tokens.pin_memory() if device.type == "cuda" else tokens
            tokens = tokens.to(device, non_blocking=True)
            loss, norm = train_step(network, optimizer, tokens, config, done)
            done += 1
            for average in averages.values():
                average.update(done)
            lr = optimizer.param_groups[0]["lr"]
            pending.append((done, done * config.tokens_per_step, lr, loss, norm))
            if rank == 0 and eval_interval and done % eval_interval == 0:
                append(folder / "val.csv", [(done, float(evaluate(net, corpus).mean()))])
            at_checkpoint = done % config.ckpt_interval == 0
            look = at_checkpoint or done % READ_EVERY == 0 or done == config.max_iters
            if not (look or done in state_at or (caught and world == 1)):
                continue

            # read and log the losses since the last look, (steps + 1, 2): the mean over ranks
            flags = torch.full((2,), float(bool(caught)), device=device)  # a signal stops all
            numbers = torch.stack([*(torch.stack(row[3:]) for row in pending), flags])
            if world > 1:
                torch.distributed.all_reduce(numbers)
                numbers /= world
            *pairs, (stop, _) = numbers.tolist()
            rows = [(*row[:3], *pair) for row, pair in zip(pending, pairs, strict=True)]
            pending.clear()
            for step, _, lr, loss, norm in rows:
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise JobFailed(
                        f"{folder.name}: loss {loss}, gradient norm {norm} at step {step}, rate "
                        f"{lr:.2e}; lower --lr {config.lr:g}; what was saved before is kept")
                if board:
                    board.add_scalar("loss", loss, step)
                    board.add_scalar("rate", lr, step)
                    board.add_scalar("gradient norm", norm, step)
            shown.postfix = f"loss {loss:.3f}"
            shown.update(len(rows))

            # the first rank saves the weights and their averages, then the state
            if rank == 0:
                append(folder / "metrics.csv", rows)
                if done in written:
                    states = {folder / checkpoint_name(done): net.state_dict()}
                    due = averages if done % (config.averages_interval or 1) == 0 else {}
                    for text, average in due.items():
                        path = folder / scheme_dir(text) / checkpoint_name(done)
                        with contextlib.suppress(LawaError):  # nothing is averaged before its start
                            states[path] = average.average()
                    write(states)
                if done in state_at:
                    write({folder / f"state_{done}.pt": state()})
                late = at_checkpoint and time.monotonic() - state_saved >= state_seconds
                if stop or late:
                    write({resume: state()})
                    state_saved = time.monotonic()
            if stop:
                break

        # the end, or a signal
        network = None  # freed after the group of ranks, it would wait for ever
        if writing:
            writing.result()
        if done < config.max_iters:
            raise KeyboardInterrupt if signal.SIGINT in caught else SystemExit(143)
        seconds = max(time.monotonic() - begun, 1e-9)
        if rank == 0:
            with lawa_core.replacing(summary) as part:
                part.write_text(json.dumps({
                    "steps": done, "parameters": net.size(), "seconds": round(seconds, 1),
                    "tokens_per_second": round((done - first) * config.tokens_per_step / seconds),
                    "ranks": world, "threads": torch.get_num_threads(), "device": device.type,
                    "torch": torch.__version__}, indent=1))
            resume.unlink(missing_ok=True)
    return folder

# ---- 7. Evaluation -------------------------------------------------------------------------------


BLOCKS = 128  # validation blocks by default
SMALL = 1 << 24  # parameters: a CPU evaluates models up to this size side by side, a core for each


@torch.inference_mode()
def evaluate(model: GPT, corpus: Corpus, n_blocks: int = BLOCKS) -> np.ndarray:
    """Losses in nats per token of `n_blocks` fixed validation blocks: (n_blocks,) float64.

    They are spread evenly (fewer if the text is short), and the same for every model of one block
    size, so that differences are paired. Draws no random numbers; leaves the model as it was.
    """
    block = model.config.block_size
    n_blocks = min(n_blocks, (len(corpus.val) - 1) // block)
    require(n_blocks >= 1, f"{corpus.name} has {len(corpus.val)} validation tokens; expected more "
            f"than {block}, and n_blocks of at least 1")
    starts = np.linspace(0, len(corpus.val) - block - 1, n_blocks).astype(np.int64)
    tokens = corpus.known(corpus.val[starts[:, None] + np.arange(block + 1)])  # (blocks, block + 1)
    weight, training = next(model.parameters()), model.training
    half = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    at_a_time = 2048 if weight.device.type == "cpu" else 8192  # tokens; near a CPU's caches
    model.eval()
    losses = []
    for part in tokens.split(max(at_a_time // block, 1)):
        part = part.to(weight.device)
        with torch.autocast(weight.device.type, half, enabled=weight.device.type == "cuda"):
            loss = model.losses(part[:, :-1], part[:, 1:])  # (blocks at a time, block)
        losses.append(loss.double().mean(1).cpu())
    model.train(training)
    return torch.cat(losses).numpy()


def run_model(run) -> tuple[GPTConfig, Corpus]:
    """(shape of a run's model, its corpus)."""
    path = Path(run) / "config.json"
    require(path.exists(), f"{run} is no run folder: expected {path}, as model.py train writes it")
    config = json.loads(path.read_text())
    corpus = open_corpus(config["corpus"])
    return gpt_config(config["preset"], corpus.vocab_size), corpus


def read_losses(path: Path | None) -> dict:
    """{(step, scheme): (n_blocks,) losses} of an eval.npz; empty without one."""
    if not (path and path.exists()):
        return {}
    with np.load(path) as kept:
        keys = zip(kept["step"].tolist(), kept["scheme"].tolist(), strict=True)
        return dict(zip(keys, kept["losses"], strict=True))


def keep_losses(path: Path, losses: dict) -> None:
    """Add losses to an eval.npz, to which other processes may be adding theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent), lawa_core.replacing(path) as part:
        kept = dict(sorted((read_losses(path) | losses).items()))
        steps, schemes = zip(*kept, strict=True)
        with open(part, "wb") as file:
            np.savez(file, step=steps, scheme=schemes, losses=list(kept.values()))


def mean_se(x: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error)."""
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def evaluate_trajectory(run, schemes, at=None, n_blocks: int = BLOCKS, device: str = "auto", *,
                        make=None, corpus: Corpus | None = None, load=GPT.load_state_dict,
                        each=None, on_disk: bool = False, cache=None, averages=None,
                        redo=()) -> list[dict]:
    """Losses of a trajectory and of averages along it, of a run as of a public model's checkpoints.

    The next average is made while the last is evaluated, and never more than one waits. Losses are
    kept, block by block: nothing is evaluated twice, and what was interrupted goes on.
    Args: run: a run folder, or with `make` and `corpus` what `lawa_core.open_trajectory` takes
        schemes: {label: scheme, or the text of an average kept while training}; "run" is the run
        at: target steps, default all; n_blocks: see `evaluate`; on_disk: see `lawa_core.sweep`
        make: makes an empty model on the device, the only one used, if there is need of it
        load: load(model, state) copies an average in
        each: each(step, label, state) is called before an evaluation, and may change the state
        cache: Path of a .npz; default eval_<n_blocks>.npz in a run folder, else none
        averages: where those kept while training are, default the run; redo: steps done again
    Returns rows {"run", "step", "scheme": label, "loss", "loss_se", "bpb", "gain", "gain_se",
    "n_blocks", "losses", "gains"}: loss in nats per token, its standard error over blocks, bits per
    byte of text; gain = run minus average, positive is good; losses, gains: (n_blocks,) float64.
    """
    device, threads, jobs = pick_device(device), torch.get_num_threads(), 1
    allow = ()  # of a public model, twins are wrong files
    if make is None:
        shape, corpus = run_model(run)
        make = functools.partial(empty_model, shape, device)
        cache = cache or Path(run) / f"eval_{n_blocks}.npz"
        allow = ("nonfinite", "duplicates")
        if device.type == "cpu" and count_parameters(shape)[0] <= SMALL:
            jobs = min(threads, 8)
    trajectory = lawa_core.open_trajectory(run)
    schemes = {"run": lawa_core.newest(), **schemes}
    at = list(trajectory.steps if at is None else at)
    known = read_losses(cache)
    todo = {(step, label) for step in at for label, scheme in schemes.items()
            if step in redo or (step, str(scheme)) not in known}
    needed = {"run"} | {label for _, label in todo}
    wanted = {label: scheme for label, scheme in schemes.items() if label in needed}
    kept = {label: text for label, text in wanted.items() if isinstance(text, str)}
    swept = {label: scheme for label, scheme in wanted.items() if label not in kept}
    free, busy = [], deque()  # models; (step and scheme, model, its losses to come)
    if todo:
        free = [make() for _ in range(jobs)]

    def begin(step, label, state) -> None:
        """Begin an evaluation, if there is need of it, as soon as a model is free."""
        if each:
            each(step, label, state)
        if (step, label) in todo:
            net = free.pop() if free else finish()
            load(net, state)
            losses = pool.submit(evaluate, net, corpus, n_blocks)
            busy.append(((step, str(schemes[label])), net, losses))

    def finish() -> nn.Module:
        """Wait for the evaluation begun first, keep its losses; the model that is free now."""
        key, net, losses = busy.popleft()
        known[key] = losses.result()
        if cache:
            keep_losses(cache, {key: known[key]})
        shown.update(1)
        return net

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        pool = stack.enter_context(ThreadPoolExecutor(
            jobs, initializer=torch.set_num_threads, initargs=(threads // jobs,)))
        shown = stack.enter_context(
            lawa_core.progress(len(todo), f"evaluating {trajectory.name}", " model"))
        steps = sorted({step for step, _ in todo})
        for step, label, state in lawa_core.sweep(
                trajectory, swept, steps, on_disk=on_disk, allow=allow):
            begin(step, label, state)
            del state  # before the next one is made
            if label == next(iter(swept)):
                for own, text in kept.items():
                    path = Path(averages or run) / scheme_dir(text) / checkpoint_name(step)
                    begin(step, own, dict(lawa_core.open_checkpoint(path)))
        while busy:
            finish()

    scale = 1 / math.log(2) / corpus.val_bytes_per_token  # bits per byte of a nat per token
    table = []
    for step in at:
        own = known[step, str(schemes["run"])]
        for label, scheme in schemes.items():
            losses = known[step, str(scheme)]
            loss, loss_se = mean_se(losses)
            gain, gain_se = mean_se(own - losses)
            table.append({"run": trajectory.name, "step": step, "scheme": label, "loss": loss,
                          "loss_se": loss_se, "bpb": loss * scale, "gain": gain, "gain_se": gain_se,
                          "n_blocks": n_blocks, "losses": losses, "gains": own - losses})
    return table

# ---- 8. Text -------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(run, scheme=None, at: int | None = None, prompt: str = "\n", tokens: int = 200,
           temperature: float = 0.8, seed: int = 0) -> str:
    """Text after `prompt` from a run's checkpoint at `at` (default the newest) or an average."""
    shape, corpus = run_model(run)
    tokenizer = corpus.tokenizer()
    idx = torch.tensor([tokenizer.encode_ordinary(prompt)], dtype=torch.long)  # (1, T)
    require(tokens >= 0 and idx.numel(), "expected tokens of at least 0 and a prompt that is not "
            f"empty, got {tokens} and {prompt!r}")
    net = empty_model(shape)
    net.load_state_dict(lawa_core.average(run, scheme or lawa_core.newest(), at))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        logits, _ = net(idx[:, -shape.block_size:])
        logits = logits[:, -1, :corpus.vocab_size] / max(temperature, 1e-6)  # (1, vocab)
        token = torch.multinomial(F.softmax(logits, -1), 1, generator=generator)
        idx = torch.cat([idx, token], 1)
    return tokenizer.decode(idx[0].tolist())

# ---- 9. Scales -----------------------------------------------------------------------------------

# `lrs`: a sweep's rates, usual to high, in the paper the tenfold. `spacing` makes LAWA's window the
# share of the run that the released interval gives (1.4% at GPT-2 small); `wide` is one beside it.
# `laptop` is a miniature: many small steps, so that a step's noise, which averages remove, exceeds
# the drift (pilot in LOG.md). The gpt2 scales re-cut the batch for one GPU, at the same tokens.
PAPER = {"corpus": "openwebtext", "max_iters": 70_000, "warmup_iters": 2000, "seeds": "0", "k": 5,
         "n_blocks": 512, "averages": "ema(0.9); ema(0.999)"}
SCALES = {
    "smoke": {
        "preset": "nano", "corpus": "stdlib", "lrs": "1e-3,1e-2", "max_iters": 200, "batch_size": 8,
        "warmup_iters": 20, "ckpt_interval": 10, "seeds": "0,1", "k": 3, "spacing": 10, "wide": 20,
        "n_blocks": 64, "averages": "ema(0.9); ema(0.98); lawa(3, 1)"},
    "laptop": {
        "preset": "nano", "corpus": "stdlib", "lrs": "1e-3,3e-3,1e-2", "max_iters": 10_000,
        "batch_size": 8, "warmup_iters": 300, "ckpt_interval": 25, "averages_interval": 100,
        "seeds": "0,1,2,3,4", "k": 5, "spacing": 25, "wide": 100, "n_blocks": 512,
        "averages": "ema(0.9); ema(0.98); ema(0.995); lawa(5, 1); lawa(5, 5)"},
    "gpu-hour": {
        **PAPER, "preset": "midi", "lrs": "6e-4,1.8e-3,6e-3", "max_iters": 10_000,
        "warmup_iters": 300, "batch_size": 32, "gradient_accumulation_steps": 4,
        "ckpt_interval": 50, "averages_interval": 100, "spacing": 50, "wide": 200},
    "gpt2-small": {
        **PAPER, "preset": "gpt2-small", "lrs": "6e-4,6e-3", "batch_size": 16,
        "gradient_accumulation_steps": 24, "ckpt_interval": 200, "averages_interval": 1000,
        "spacing": 200, "wide": 1000},
    "gpt2-medium": {
        **PAPER, "preset": "gpt2-medium", "lrs": "3e-4,3e-3", "batch_size": 12,
        "gradient_accumulation_steps": 12, "ckpt_interval": 2000, "spacing": 2000, "wide": 2000},
    "gpt2-large": {
        **PAPER, "preset": "gpt2-large", "lrs": "2e-4,2e-3", "batch_size": 8, "min_lr_frac": 0.005,
        "gradient_accumulation_steps": 6, "ckpt_interval": 1000, "spacing": 1000, "wide": 1000},
}


def scale_values(name: str) -> dict:
    require(name in SCALES, f"scale must be one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name] | {"lr": float(SCALES[name]["lrs"].split(",")[0])}  # the usual rate


def scale_config(values, **given) -> Config:
    """The Config of a scale's (or a notebook's) values, with some of them given."""
    names = {f.name for f in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in {**values, **given}.items() if name in names})

# ---- 10. Command line ----------------------------------------------------------------------------


EXAMPLES = """examples
  python model.py train --preset micro --corpus stdlib --lr 1e-3 --max_iters 200 --seed 0
  python model.py train --scale gpt2-small --lr 6e-3        the paper's high rate
  torchrun --nproc_per_node=4 model.py train --scale gpt2-small
  python model.py sample RUN --scheme "lawa(k=5, spacing=20)" --prompt "def main("
exit status: 0 done, 1 the run failed, 2 bad usage or input, 130/143 interrupted with its state
saved (the same command goes on)"""
TRAIN = (  # options that do not change the numbers: name, type, default, help
    ("out_dir", str, None, "the run folder (default: runs/<corpus>-<preset>-<hash>)"),
    ("device", str, "auto", "cpu, cuda, mps (default: the best there is)"),
    ("threads", int, None, "CPU threads (default: torch's choice)"),
    ("eval_interval", int, 0, "steps between validation losses, in val.csv (default: none)"),
    ("state_seconds", float, 30.0, "seconds between states, written at checkpoints (default 30)"),
    ("state_at", str, "", 'steps whose state stays as state_<step>.pt, e.g. "500,750"'),
    ("resume_from", str, None, "such a state of a run that trains alike until then"))
SAMPLE = (
    ("scheme", str, None, 'average first, for example "lawa(k=5, spacing=20)"'),
    ("at", int, None, "step (default: the newest)"),
    ("prompt", str, "\n", "text to go on from"),
    ("tokens", int, 200, "tokens of text (default 200)"),
    ("temperature", float, 0.8, "0: the likeliest token (default 0.8)"),
    ("seed", int, 0, "of the draws"))


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """--scale, a flag per field of Config, --keep, --disk_budget; for `take_config`."""
    parser.add_argument("--scale", help=f"start from the values of {', '.join(SCALES)}")
    for f in dataclasses.fields(Config):
        help = f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=type(f.default), help=help)
    parser.add_argument("--keep", help="write only checkpoints that this scheme needs, e.g. "
                        '"lawa(k=5, spacing=200)", for as many targets as fit --disk_budget')
    parser.add_argument("--disk_budget", type=float, default=math.inf,
                        help="GB that this run's checkpoints may take (default: no limit)")


def take_config(args: dict) -> Config:
    """Take these flags' Config out of the parsed arguments; keep and disk_budget (bytes) stay."""
    values = {f.name: args.pop(f.name) for f in dataclasses.fields(Config)}
    given = {name: value for name, value in values.items() if value is not None}
    scale = args.pop("scale")
    args["keep"] = args["keep"] and lawa_core.parse_scheme(args["keep"])
    args["disk_budget"] *= 1e9
    return scale_config(scale_values(scale) if scale else {}, **given)


def main(argv=None) -> int:
    style = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        "model.py", description="Train and sample small and large GPTs.", **style)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a run, or go on with it", **style)
    add_config_flags(training)
    training.add_argument("--compile", action=argparse.BooleanOptionalAction,
                          help="torch.compile (default: on CUDA)")
    sampling = commands.add_parser("sample", help="print text from a run or its average", **style)
    sampling.add_argument("run", help="run folder")
    for command, options in ((training, TRAIN), (sampling, SAMPLE)):
        for name, kind, default, help in options:
            command.add_argument(f"--{name}", type=kind, default=default, help=help)
    args = vars(parser.parse_args(argv))
    try:
        if args.pop("command") == "train":
            config = take_config(args)
            args["state_at"] = [int(step) for step in args["state_at"].split(",") if step]
            with contextlib.redirect_stdout(sys.stderr):  # progress; the folder can be piped
                folder = train(config, **args, bar=True)
            print(folder)
        else:
            args["scheme"] = args["scheme"] and lawa_core.parse_scheme(args["scheme"])
            print(sample(**args))
    except (KeyboardInterrupt, SystemExit) as signalled:
        print("interrupted, state saved; the same command goes on", file=sys.stderr)
        return getattr(signalled, "code", 130)
    except (LawaError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) and not isinstance(error, JobFailed) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
