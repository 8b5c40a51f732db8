"""The nanoGPT: a GPT-2 (or, by configuration, a GPT-NeoX) that trains on one machine and leaves a trajectory of checkpoints behind.

The sections follow the data: the model, Hugging Face folders, corpora, a run's configuration, training, evaluation, scales, text,
command line. Losses are nats per token. The architecture and its names are GPT-2's (Radford et al. 2019); the recipe is the one of the
LAWA paper (arXiv 2306.03241): pre-norm, tied embeddings, no biases, attention scores also divided by the layer's number.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import lawa_core
from lawa_core import LawaError, checkpoint_name

ROOT = Path(__file__).resolve().parent
DATA, RUNS = ROOT / "data", ROOT / "runs"


# ---- 1. The model -------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int  # width; n_head must divide it
    block_size: int  # longest sequence, tokens
    vocab_size: int
    bias: bool = False  # in linear layers and layer norms; OpenAI's GPT-2 has them, the paper's models do not
    scale_attn_by_inverse_layer_idx: bool = True  # attention scores divided by (layer index + 1), as in the paper's code
    gelu: str = "tanh"  # "tanh" is GPT-2's approximation, "none" the exact function
    # What GPT-NeoX (Black et al. 2022) does differently:
    rotary: float = 0.0  # share of each head's width turned by the token's position; 0: learned position embeddings
    parallel: bool = False  # attention and MLP both read the block's input, instead of the MLP reading attention's output
    tied: bool = True  # the embedding is also the output layer
    eps: float = 1e-5  # of the layer norms

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise LawaError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if not 0 <= self.rotary <= 1 or self.rotary_width % 2:
            raise LawaError(f"rotary must turn an even part of a head's width {self.n_embd // self.n_head}, got {self.rotary}")

    @property
    def rotary_width(self) -> int:
        return int(self.n_embd // self.n_head * self.rotary)


NEOX = {"bias": True, "scale_attn_by_inverse_layer_idx": False, "gelu": "none", "rotary": 0.25, "parallel": True, "tied": False}

# name: layers, heads, width, block size, and what is not as in the paper's GPT-2; parameters without embeddings are 12 * layers * width^2
PRESETS = {
    "nano": (2, 2, 64, 64),  # 0.1M, for tests and smoke
    "micro": (2, 4, 128, 128),  # 0.4M
    "mini": (4, 4, 256, 128),  # 3M
    "midi": (6, 6, 384, 256),  # 11M
    "gpt2-small": (12, 12, 768, 1024),  # 85M; the paper's three sizes
    "gpt2-medium": (24, 16, 1024, 1024),  # 302M
    "gpt2-large": (36, 20, 1280, 1024),  # 708M
    "neox-nano": (2, 4, 96, 128, NEOX),  # 0.2M, for replays without the Hub
    "pythia-70m": (6, 8, 512, 2048, NEOX),  # 19M; each also as -deduped: same shape, other data (arXiv 2304.01373)
    "pythia-160m": (12, 12, 768, 2048, NEOX),  # 85M
    "pythia-410m": (24, 16, 1024, 2048, NEOX),  # 302M
    "pythia-1b": (16, 8, 2048, 2048, NEOX),  # 805M
    "pythia-1.4b": (24, 16, 2048, 2048, NEOX),  # 1.2G
    "pythia-2.8b": (32, 32, 2560, 2048, NEOX),  # 2.5G
    "pythia-6.9b": (32, 32, 4096, 2048, NEOX),  # 6.4G
    "pythia-12b": (36, 40, 5120, 2048, NEOX),  # 11.3G
}
PADDED = {"pythia-6.9b": 256, "pythia-12b": 512}  # vocabularies padded to a multiple: of 128 times the devices a layer was split over


def preset(name: str, vocab_size: int) -> GPTConfig:
    """The architecture of that name for a vocabulary (padded to a multiple of 64, which matrix units like)."""
    name = name.removesuffix("-deduped")
    if name not in PRESETS:
        raise LawaError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    n_layer, n_head, n_embd, block_size, *other = PRESETS[name]
    multiple = PADDED.get(name, 64)
    return GPTConfig(n_layer, n_head, n_embd, block_size, -(-vocab_size // multiple) * multiple, **(other[0] if other else {}))


class LayerNorm(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.n_embd))
        self.bias = nn.Parameter(torch.zeros(c.n_embd)) if c.bias else None
        self.eps = c.eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


ROTARY_BASE = 10_000  # of the wavelengths, as in Su et al. (arXiv 2104.09864)


def rotary_table(T: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each (T, width), of position times frequency; float32."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(T, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the first `width` values of each head, as width / 2 pairs (i, i + width / 2), by the token's position. x: (B, nh, T, hs)."""
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = turned.chunk(2, -1)
    return torch.cat(((turned * cos + torch.cat((-b, a), -1) * sin).type_as(x), kept), -1)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.scale = (c.n_embd // c.n_head) ** -0.5 / (layer + 1 if c.scale_attn_by_inverse_layer_idx else 1)

    def forward(self, x, rotary=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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
        self.ln_1, self.attn = LayerNorm(c), Attention(c, layer)
        self.ln_2, self.mlp = LayerNorm(c), MLP(c)
        self.parallel = c.parallel

    def forward(self, x, rotary=None):
        y = x + self.attn(self.ln_1(x), rotary)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


class GPT(nn.Module):
    """GPT-2, or GPT-NeoX by configuration.

    `GPT(config, seed)` draws its weights from a generator of its own: normal(0, 0.02), residual projections / sqrt(2 n_layer).
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rotary else nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head(self) -> torch.Tensor:
        """The output layer's weights, (vocab, C)."""
        return (self.lm_head or self.wte).weight

    def hidden(self, idx):
        """idx: (B, T) int64. Returns what the output layer reads, (B, T, C)."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise LawaError(f"sequences have at most block_size = {self.config.block_size} tokens, got {T}")
        x, rotary = self.wte(idx), None  # (B, T, C)
        if self.config.rotary:
            rotary = rotary_table(T, self.config.rotary_width, idx.device)
        else:
            x = x + self.wpe.weight[:T]
        for block in self.h:
            x = block(x, rotary)
        return self.ln_f(x)

    def forward(self, idx, targets=None, reduction: str = "mean"):
        """idx, targets: (B, T) int64. Returns (logits (B, T, vocab), loss in nats; None without targets).

        The loss is a scalar, or (B, T) for reduction "none".
        """
        logits = F.linear(self.hidden(idx), self.head)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return logits, loss.view_as(targets) if reduction == "none" else loss

    def losses(self, idx, targets, memory: int = 1 << 27):
        """Losses in nats per token, (B, T), with no more than about `memory` bytes of logits at a time; for evaluation."""
        x, rows = self.hidden(idx).flatten(0, 1), max(memory // (4 * self.config.vocab_size), 1)
        parts = [F.cross_entropy(F.linear(part, self.head).float(), answers, reduction="none")
                 for part, answers in zip(x.split(rows), targets.flatten().split(rows), strict=True)]
        return torch.cat(parts).view_as(targets)

    def size(self) -> int:
        """Parameters, learned position embeddings left out (nanoGPT's count)."""
        return sum(p.numel() for name, p in self.named_parameters() if name != "wpe.weight")


# ---- 2. Hugging Face folders --------------------------------------------------------------------------------------------------------

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's GPT-2 keeps (in, out), torch's Linear (out, in)


@dataclass(frozen=True)
class Dialect:
    """How Hugging Face writes one architecture; the dictionaries go from our names to theirs."""
    class_name: str
    fields: dict  # of config.json
    implied: dict  # our fields that this architecture fixes
    needed: dict  # fields of config.json that must have this value
    parts: dict  # of tensors' names


DIALECTS = {  # by config.json's model_type
    "gpt2": Dialect(
        "GPT2LMHeadModel",
        {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions", "vocab_size": "vocab_size",
         "gelu": "activation_function", "eps": "layer_norm_epsilon", "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx"},
        {"rotary": 0.0, "parallel": False, "tied": True}, {"tie_word_embeddings": True},
        {"wte": "transformer.wte", "wpe": "transformer.wpe", "h": "transformer.h", "ln_f": "transformer.ln_f"}),
    "gpt_neox": Dialect(
        "GPTNeoXForCausalLM",
        {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size", "vocab_size": "vocab_size",
         "block_size": "max_position_embeddings", "gelu": "hidden_act", "eps": "layer_norm_eps", "rotary": "rotary_pct",
         "parallel": "use_parallel_residual"},
        {"scale_attn_by_inverse_layer_idx": False, "tied": False},
        {"tie_word_embeddings": False, "attention_bias": True, "rotary_emb_base": ROTARY_BASE},
        {"wte": "gpt_neox.embed_in", "h": "gpt_neox.layers", "ln_f": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
         "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_attn": "attention.query_key_value",
         "attn.c_proj": "attention.dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}),
}


def dialect(config: GPTConfig) -> str:
    """Hugging Face's model_type for a configuration; LawaError if it has none."""
    kind = "gpt_neox" if config.rotary else "gpt2"
    odd = [f"{name} = {getattr(config, name)}" for name, value in DIALECTS[kind].implied.items() if getattr(config, name) != value]
    if odd:
        raise LawaError(f"Hugging Face has no {kind} with {', '.join(odd)}; such a model cannot be written as a folder")
    return kind


def hf_name(name: str, kind: str) -> str:
    """Hugging Face's name of one of our tensors."""
    for ours, theirs in DIALECTS[kind].parts.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name


def _relaid(tensor, name: str, config: GPTConfig, outward: bool):
    """One of our tensors laid out as Hugging Face's (outward) or back; a view where it can be one."""
    if not config.rotary:
        return tensor.T if name.endswith(TRANSPOSED) else tensor
    if ".c_attn." not in name:
        return tensor
    # Our rows: all queries, all keys, all values; GPT-NeoX's: query, key and value of each head in turn.
    rows = (3, config.n_head) if outward else (config.n_head, 3)
    return tensor.unflatten(0, (*rows, -1)).transpose(0, 1).flatten(0, 2)


def hf_config(folder) -> GPTConfig:
    """The configuration of a Hugging Face GPT-2 or GPT-NeoX folder; LawaError for any other."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise LawaError(f"{folder} has no config.json; expected a Hugging Face GPT-2 or GPT-NeoX folder")
    hf = json.loads((folder / "config.json").read_text())
    kind, rope = hf.get("model_type"), hf.get("rope_parameters") or {}  # transformers 5 writes the rotary fields in there
    if kind not in DIALECTS:
        raise LawaError(f"{folder} holds a {kind}; expected one of {', '.join(DIALECTS)}")
    hf = {"rotary_pct": rope.get("partial_rotary_factor", 0.25), "rotary_emb_base": rope.get("rope_theta", ROTARY_BASE)} | hf
    known = {ours: hf[theirs] for ours, theirs in DIALECTS[kind].fields.items() if theirs in hf}
    width = 4 * known["n_embd"]
    needed = DIALECTS[kind].needed | {"intermediate_size": width, "n_inner": width}  # absent or null: 4 times the width
    odd = [f"{name} is {hf[name]}, expected {value}" for name, value in needed.items() if hf.get(name) not in (None, value)]
    if known.setdefault("gelu", "gelu_new" if kind == "gpt2" else "gelu") not in GELUS:
        odd.append(f"activation {known['gelu']}, expected one of {', '.join(GELUS)}")
    if odd:
        raise LawaError(f"{folder / 'config.json'}: {'; '.join(odd)}")
    known["gelu"] = GELUS[known["gelu"]]
    return GPTConfig(**{"scale_attn_by_inverse_layer_idx": False, "bias": True} | DIALECTS[kind].implied | known)


@torch.no_grad()
def fill(model: GPT, tensors) -> GPT:
    """Copy {Hugging Face's name: tensor} into the model, one at a time, from any float type and device. Other tensors are passed over."""
    kind = dialect(model.config)
    for name, parameter in model.named_parameters():
        theirs = hf_name(name, kind)
        if theirs not in tensors:  # saved without its output layer, as a bare backbone
            theirs = theirs.removeprefix("transformer.").removeprefix("gpt_neox.")
        tensor = _relaid(tensors[theirs], name, model.config, outward=False) if theirs in tensors else None
        if tensor is None or tensor.shape != parameter.shape:
            found = "is not there" if tensor is None else f"has shape {list(tensor.shape)}"
            raise LawaError(f"{theirs} {found}; expected {list(parameter.shape)} by its config.json")
        parameter.copy_(tensor)
    return model


def load_hf(folder) -> GPT:
    """A GPT, float32, from a Hugging Face GPT-2 or GPT-NeoX folder (safetensors or .bin, sharded or not); logits as in `transformers`."""
    return fill(blank(hf_config(folder)), lawa_core.open_checkpoint(folder))


def blank(config: GPTConfig, device="cpu", dtype=torch.float32) -> GPT:
    """A GPT whose weights are not set, made on the device itself: for `fill`."""
    with torch.device("meta"):
        return GPT(config).to(dtype).to_empty(device=device).eval()


def save_hf(folder, config: GPTConfig, state) -> None:
    """Write {name: tensor} of a GPT (a run's weights, or an average of them) as a folder that `transformers` loads."""
    kind, state = dialect(config), dict(state)
    for name, tensor in list(state.items()) if not config.bias else []:  # Hugging Face's always have biases; ours are zero
        if not name.startswith(("wte.", "wpe.", "lm_head.")):
            state[name.replace("weight", "bias")] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    tensors = {hf_name(name, kind): _relaid(tensor, name, config, outward=True).contiguous() for name, tensor in state.items()}
    fields = {"architectures": [DIALECTS[kind].class_name], "model_type": kind, **DIALECTS[kind].needed,
              **{theirs: getattr(config, ours) for ours, theirs in DIALECTS[kind].fields.items()},
              **({"intermediate_size": 4 * config.n_embd} if config.rotary else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)),
              DIALECTS[kind].fields["gelu"]: "gelu_new" if config.gelu == "tanh" else "gelu"}
    write_hf(folder, tensors, fields)


def write_hf(folder, tensors, fields: dict, like=None) -> None:
    """Write tensors under Hugging Face's names with a config.json of `fields` and of their real dtype, and the tokenizer from the folder `like`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in [path for pattern in lawa_core.COPIED for path in Path(like).glob(pattern)] if like else []:
        shutil.copyfile(source, Path(folder) / source.name)
    lawa_core.save(Path(folder) / "model.safetensors", tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with lawa_core.replacing(Path(folder) / "config.json") as part:
        part.write_text(json.dumps({name: value for name, value in fields.items() if name != "torch_dtype"} | {"dtype": dtype}, indent=2))


# ---- 3. Corpora ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Corpus:
    """data/NAME/: train.bin and val.bin, raw little-endian uint16 token ids (nanoGPT's format), described by meta.json."""
    folder: Path
    meta: dict
    train: np.ndarray  # (tokens,) uint16, mapped
    val: np.ndarray

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def val_bytes_per_token(self) -> float:
        return self.meta["val_bytes"] / self.meta["val_tokens"]

    @property
    def fingerprint(self) -> str:
        """Changes with the text, the split and the tokenizer; part of a run's name."""
        kept = {key: value for key, value in self.meta.items() if key not in ("python", "name")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def tokenizer(self):
        """tiktoken.Encoding: the corpus's own, or one of tiktoken's."""
        import base64

        import tiktoken
        if not (self.folder / self.meta["tokenizer"]).exists():
            return tiktoken.get_encoding(self.meta["tokenizer"])
        lines = (self.folder / self.meta["tokenizer"]).read_text().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding(self.name, pat_str=self.meta["pattern"], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.meta["eot_token"]})


def open_corpus(name) -> Corpus:
    """The corpus data/NAME/ (or any folder). Reads nothing but meta.json; LawaError with the command to run if it is not there."""
    folder = DATA / name if (DATA / str(name)).is_dir() else Path(name)
    if not (folder / "meta.json").exists():
        known = DATA / str(name) / "prepare.py"
        raise LawaError(f"no corpus {str(name)!r}: expected {folder / 'meta.json'}; run " + (
            f"python {known}" if known.exists() else f"python {DATA / 'text' / 'prepare.py'} YOUR_TEXT --name {Path(name).name}"))
    meta = json.loads((folder / "meta.json").read_text())
    splits = [np.memmap(folder / f"{split}.bin", "<u2", mode="r") for split in ("train", "val")]
    for split, tokens in zip(("train", "val"), splits, strict=True):
        if len(tokens) != meta[f"{split}_tokens"]:
            raise LawaError(f"{folder / split}.bin has {len(tokens)} tokens, meta.json says {meta[f'{split}_tokens']}; prepare the corpus again")
    return Corpus(folder, meta, *splits)


# ---- 4. A run's configuration -------------------------------------------------------------------------------------------------------

def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """What determines a run's numbers; its hash names the run folder. Defaults: the `laptop` scale."""
    preset: str = option("micro", f"architecture: {', '.join(PRESETS)}")
    corpus: str = option("stdlib", "folder under data/, or a path")
    lr: float = option(1e-3, "peak learning rate")
    max_iters: int = option(1000, "optimizer steps")
    batch_size: int = option(16, "sequences per micro-batch")
    accumulation: int = option(1, "micro-batches per step; their gradients are averaged")
    warmup_iters: int = option(100, "steps of linear warm-up")
    schedule: str = option("cosine", "after warm-up: cosine, constant, or wsd (constant, then a 1-sqrt cooldown)")
    min_lr_frac: float = option(0.1, "final learning rate as a share of the peak (cosine, wsd)")
    cooldown_frac: float = option(0.2, "wsd: share of the steps spent cooling down")
    weight_decay: float = option(0.1, "AdamW's, on matrices and embeddings only")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 for no clipping")
    ckpt_interval: int = option(20, "steps between checkpoints")
    seed: int = option(0, "of the initial weights and of the batches")
    ema: str = option("", "betas of averages updated every step, comma-separated; each becomes a trajectory ema-BETA/ in the run folder")
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
            ("ckpt_interval", f"between 1 and max_iters = {self.max_iters}", 1 <= self.ckpt_interval <= self.max_iters),
            ("seed", "at least 0", self.seed >= 0),
            ("dtype", "fp32, bf16 or auto", self.dtype in ("fp32", "bf16", "auto"))) if not right]
        if wrong:
            raise LawaError("; ".join(wrong))
        for beta in self.betas:
            lawa_core.ema(beta)

    @property
    def betas(self) -> tuple[float, ...]:
        return tuple(float(beta) for beta in self.ema.split(",") if beta.strip())

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * PRESETS[self.preset][3]

    @property
    def checkpoint_steps(self) -> list[int]:
        return list(range(self.ckpt_interval, self.max_iters + 1, self.ckpt_interval))


def pick_device(device: str = "auto") -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def run_dir(config: Config, runs=None, device: str = "auto") -> Path:
    """runs/<corpus>-<preset>-<hash>: the hash covers every field of the configuration and the corpus's content."""
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="bf16" if pick_device(device).type == "cuda" else "fp32")
    corpus = open_corpus(config.corpus)
    text = json.dumps(dataclasses.asdict(config) | {"corpus": corpus.fingerprint}, sort_keys=True)
    return Path(runs or RUNS) / f"{corpus.name}-{config.preset}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def learning_rate(config: Config, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up over warmup_iters + 1 steps (nanoGPT's), then the schedule."""
    if step < config.warmup_iters:
        return config.lr * (step + 1) / (config.warmup_iters + 1)
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_iters if config.schedule == "cosine" else config.max_iters - round(config.cooldown_frac * config.max_iters)
    x = min(max(step - begin, 0) / max(config.max_iters - begin, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * x)) if config.schedule == "cosine" else 1 - math.sqrt(x)
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * left)


def batch(tokens: np.ndarray, config: Config, step: int) -> np.ndarray:
    """The batch of step `step`: (sequences, block_size + 1) int64, a function of (seed, step) alone, so resuming or evaluating changes nothing."""
    block, sequences = PRESETS[config.preset][3], config.batch_size * config.accumulation
    generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
    starts = generator.integers(0, len(tokens) - block, sequences)
    return tokens[starts[:, None] + np.arange(block + 1)].astype(np.int64)


# ---- 5. Training --------------------------------------------------------------------------------------------------------------------

COLUMNS = ("step", "tokens", "lr", "loss", "grad_norm")  # of metrics.csv: loss in nats per token on the training batch, before the update


def train(config: Config, out_dir=None, *, device: str = "auto", threads: int | None = None, compile: bool | None = None, eval_interval: int = 0,
          state_seconds: float = 30, progress=None) -> Path:
    """Train a run, go on with an interrupted one, or find it finished. Returns its folder.

    The folder holds config.json, metrics.csv, ckpt_<step>.safetensors (weights, float32), ema-<beta>/ trajectories, resume.pt while unfinished, and
    summary.json once finished. What does not change the numbers: out_dir (default: named by the configuration's hash), device, threads (an
    interrupted run keeps its own), compile (default: on CUDA), eval_interval (steps between validation losses in val.csv; 0: none), state_seconds
    (at most so much work is lost to a kill, rounded up to a checkpoint), progress (called with (step, max_iters, loss)).
    Errors: LawaError for a bad configuration, a missing corpus, a loss that is not finite (the last good state is kept).
    """
    device = pick_device(device)
    config = dataclasses.replace(config, dtype=config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32")
    corpus = open_corpus(config.corpus)
    folder = Path(out_dir) if out_dir else run_dir(config)
    if len(corpus.train) <= PRESETS[config.preset][3]:
        raise LawaError(f"{corpus.name} has {len(corpus.train)} training tokens; expected more than one block of {PRESETS[config.preset][3]}")
    _claim(folder, config)
    with _locked(folder):
        if not (folder / "summary.json").exists():
            _Run(config, corpus, folder, device, threads, device.type == "cuda" if compile is None else compile).go(eval_interval, state_seconds, progress)
    return folder


def _claim(folder: Path, config: Config) -> None:
    """Write config.json, or refuse a folder of another run."""
    described = dataclasses.asdict(config) | {"tokens_per_step": config.tokens_per_step}
    if (folder / "config.json").exists():
        found = json.loads((folder / "config.json").read_text())
        changed = [f"{key} {found.get(key)!r} -> {described.get(key)!r}" for key in described | found if found.get(key) != described.get(key)]
        if changed:
            raise LawaError(f"{folder} holds a run of another configuration ({', '.join(changed)}); choose another --out_dir")
        return
    with lawa_core.replacing(folder / "config.json") as part:
        part.write_text(json.dumps(described, indent=1))


@contextlib.contextmanager
def _locked(folder: Path):
    """One process per run; another one waits and then finds the work done. The lock goes with its process, even after kill -9."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting: another process is training {folder.name}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Run:
    """One run in progress: model, optimizer, online averages, and how many steps are done."""

    def __init__(self, config: Config, corpus: Corpus, folder: Path, device, threads, compile):
        self.config, self.corpus, self.folder, self.device, self.done = config, corpus, folder, device, 0
        self.model = GPT(preset(config.preset, corpus.vocab_size), config.seed).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                                           lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type in ("cuda", "cpu"))
        self.ema = lawa_core.EMA(self.model, config.betas) if config.betas else None
        saved = torch.load(folder / "resume.pt", map_location=device, weights_only=True) if (folder / "resume.pt").exists() else None
        if threads or saved:
            torch.set_num_threads(saved["threads"] if saved else threads)  # sums may round differently with another number of threads
        if saved:
            self.done = saved["step"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema:
                self.ema.load_state_dict(saved["ema"])
        self.step_model = torch.compile(self.model) if compile else self.model

    def save_state(self) -> None:
        lawa_core.save(self.folder / "resume.pt", {
            "step": self.done, "threads": torch.get_num_threads(), "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None})

    def save_checkpoint(self) -> None:
        name = checkpoint_name(self.done)
        lawa_core.save(self.folder / name, self.model.state_dict())
        for beta in self.config.betas:
            lawa_core.save(self.folder / f"ema-{beta:g}" / name, self.ema.average(beta))

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns (loss, gradient norm), still on the device: reading them would stop it."""
        config, micro = self.config, self.config.batch_size
        tokens = torch.from_numpy(batch(self.corpus.train, config, self.done))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        tokens = tokens.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.done)
        total = 0.0
        for i in range(config.accumulation):
            part = tokens[i * micro:(i + 1) * micro]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                _, loss = self.step_model(part[:, :-1], part[:, 1:])
            (loss / config.accumulation).backward()
            total = total + loss.detach() / config.accumulation
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.ema:
            self.ema.update(self.done)
        return total, norm

    def go(self, eval_interval: int, state_seconds: float, progress) -> None:
        config, pending, begun, first, saved = self.config, [], time.monotonic(), self.done, time.monotonic()
        metrics = _Table(self.folder / "metrics.csv", COLUMNS, self.done)
        val = _Table(self.folder / "val.csv", ("step", "loss"), self.done) if eval_interval else None
        try:
            with _terminated():
                while self.done < config.max_iters:
                    lr = learning_rate(config, self.done)
                    pending.append((self.done + 1, (self.done + 1) * config.tokens_per_step, lr, *self.step()))
                    at_checkpoint = self.done % config.ckpt_interval == 0
                    if at_checkpoint or self.done % 10 == 0 or self.done == config.max_iters:
                        self._flush(metrics, pending, progress)
                    if at_checkpoint:
                        self.save_checkpoint()
                        if time.monotonic() - saved >= state_seconds:
                            self.save_state()
                            saved = time.monotonic()
                    if eval_interval and self.done % eval_interval == 0:
                        val.write([(self.done, float(evaluate(self.model, self.corpus).mean()))])
        except (KeyboardInterrupt, SystemExit):
            self._flush(metrics, pending, None)
            self.save_state()
            raise
        seconds = time.monotonic() - begun
        summary = {"steps": self.done, "parameters": self.model.size(), "seconds": round(seconds, 1),
                   "tokens_per_second": round((self.done - first) * config.tokens_per_step / max(seconds, 1e-9)),
                   "threads": torch.get_num_threads(), "device": self.device.type, "torch": torch.__version__}
        with lawa_core.replacing(self.folder / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1))
        (self.folder / "resume.pt").unlink(missing_ok=True)

    def _flush(self, metrics: _Table, pending: list, progress) -> None:
        rows = [(step, tokens, lr, float(loss), float(norm)) for step, tokens, lr, loss, norm in pending]
        pending.clear()
        for step, _, lr, loss, _ in rows:
            if not math.isfinite(loss):
                raise LawaError(f"{self.folder.name}: the loss is {loss} at step {step} (learning rate {lr:.2e}); lower --lr; the checkpoints before are kept")
        metrics.write(rows)
        if progress and rows:
            progress(self.done, self.config.max_iters, rows[-1][3])


class _Table:
    """A CSV that grows row by row, cut back to the step a run resumes from."""

    def __init__(self, path: Path, columns, done: int):
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines[1:] if line.count(",") == len(columns) - 1 and int(line.split(",")[0]) <= done]
        with lawa_core.replacing(path) as part:
            part.write_text("\n".join([",".join(columns), *kept, ""]))
        self.path = path

    def write(self, rows) -> None:
        with open(self.path, "a") as file:
            file.writelines(",".join(map(repr, row)) + "\n" for row in rows)


@contextlib.contextmanager
def _terminated():
    """Inside, SIGTERM raises SystemExit at a point where the state can be saved; only a main thread may do so."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_all(configs, jobs: int | None = None, every: float = 5.0) -> list[Path]:
    """Train the runs that are not finished, `jobs` processes at a time sharing the cores, and return all run folders, in order.

    jobs: default one per core on a CPU (small models use one core best), one on a GPU. Prints a line with rate and time left every `every` seconds.
    Errors: LawaError that names each failed run and its message, once all others are done. Interrupted, the runs save their state.
    """
    configs = list(configs)
    folders = [run_dir(config) for config in configs]
    waiting = {folder: config for folder, config in zip(folders, configs, strict=True) if not (folder / "summary.json").exists()}
    cores = os.cpu_count() or 1
    jobs = min(jobs or (1 if pick_device().type == "cuda" else cores), max(len(waiting), 1))
    total, begun, told, already = sum(config.max_iters for config in waiting.values()), time.monotonic(), 0.0, sum(map(steps_done, waiting))
    running, failed, missing = {}, [], dict(waiting)
    try:
        while missing or running:
            while missing and len(running) < jobs:
                folder = next(iter(missing))
                command = [sys.executable, str(ROOT / "model.py"), "train", *flags(missing.pop(folder)), "--out_dir", str(folder), "--threads", str(max(cores // jobs, 1))]
                running[folder] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            time.sleep(0.2)
            for folder, process in [(f, p) for f, p in running.items() if p.poll() is not None]:
                del running[folder]
                if process.returncode:
                    failed.append(f"{folder.name}: {(process.stderr.read().strip().splitlines() or ['no message'])[-1].removeprefix('error: ')}")
            if time.monotonic() - told > every or not (missing or running):
                told, done = time.monotonic(), sum(map(steps_done, waiting))
                rate = (done - already) / (told - begun)
                print(f"training: {len(waiting) - len(missing) - len(running)} of {len(waiting)} runs, {done:,} of {total:,} steps, {rate:.1f} steps/s, "
                      f"{(total - done) / max(rate, 1e-9):.0f} s left", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise LawaError("; ".join(failed))
    return folders


def steps_done(folder: Path) -> int:
    """Steps in a run's metrics.csv, from its last whole line."""
    try:
        lines = (folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def flags(config: Config) -> list[str]:
    """The command line of a configuration."""
    return [word for f in dataclasses.fields(config) for word in (f"--{f.name}", str(getattr(config, f.name)))]


# ---- 6. Evaluation ------------------------------------------------------------------------------------------------------------------

BLOCKS = 128  # validation blocks by default


@torch.inference_mode()
def evaluate(model: GPT, corpus: Corpus, n_blocks: int = BLOCKS, batch_tokens: int = 8192) -> np.ndarray:
    """Loss in nats per token of `n_blocks` fixed blocks spread evenly over the validation tokens: (n_blocks,) float64.

    The same blocks for every model of one block size, so that differences are paired. Draws no random numbers; leaves the model as it was.
    """
    block, device, training = model.config.block_size, next(model.parameters()).device, model.training
    n_blocks = min(n_blocks, (len(corpus.val) - 1) // block)
    if n_blocks < 1:
        raise LawaError(f"{corpus.name} has {len(corpus.val)} validation tokens; expected more than one block of {block}")
    starts = np.linspace(0, len(corpus.val) - block - 1, n_blocks).astype(np.int64)
    tokens = torch.from_numpy(corpus.val[starts[:, None] + np.arange(block + 1)].astype(np.int64))
    half = torch.float16 if next(model.parameters()).dtype == torch.float16 else torch.bfloat16
    model.eval()
    losses = []
    for part in tokens.split(max(batch_tokens // block, 1)):
        part = part.to(device)
        with torch.autocast(device.type, half, enabled=device.type == "cuda"):
            loss = model.losses(part[:, :-1], part[:, 1:])
        losses.append(loss.double().mean(1).cpu())
    model.train(training)
    return torch.cat(losses).numpy()


def evaluate_trajectory(run, schemes, at=None, n_blocks: int = BLOCKS, device: str = "auto", every: float = 5.0) -> list[dict]:
    """Losses of a run and of averages along it, each checkpoint read once; kept in eval.csv beside the run, so nothing is evaluated twice.

    Args: run: run folder; schemes: {label: scheme}; at: target steps, default all checkpoints; n_blocks: validation blocks.
    Returns rows {"run", "step", "scheme": label, "loss", "loss_se", "bpb", "gain", "gain_se", "n_blocks"}: loss in nats per token with its
    standard error over blocks, bpb in bits per byte of text, gain = run minus average on the same blocks (positive is good). The run itself
    is the scheme "run".
    """
    run, device = Path(run), pick_device(device)
    config = json.loads((run / "config.json").read_text())
    corpus, trajectory = open_corpus(config["corpus"]), lawa_core.open_trajectory(run)
    schemes, at = {"run": lawa_core.newest(), **schemes}, list(trajectory.steps if at is None else at)
    cache = _read_cache(run / "eval.csv")
    missing = [step for step in at if any((step, str(scheme), n_blocks) not in cache for scheme in schemes.values())]
    wanted = {name: scheme for name, scheme in schemes.items() if name == "run" or any((step, str(scheme), n_blocks) not in cache for step in missing)}
    if missing:
        model, done, told = GPT(preset(config["preset"], corpus.vocab_size)).to(device), 0, time.monotonic()
        own = None
        for step, name, state in lawa_core.sweep(trajectory, wanted, missing):
            model.load_state_dict(state)
            losses = evaluate(model, corpus, n_blocks)
            own = losses if name == "run" else own  # comes first at every step
            _add(cache, step, str(schemes[name]), n_blocks, losses, own)
            done += 1
            if time.monotonic() - told > every:
                told = time.monotonic()
                print(f"evaluating {run.name}: {done} of {len(missing) * len(wanted)} models", flush=True)
        _write_cache(run / "eval.csv", cache)
    scale = 1 / math.log(2) / corpus.val_bytes_per_token
    return [{"run": run.name, "step": step, "scheme": name, "bpb": cache[step, str(scheme), n_blocks]["loss"] * scale, "n_blocks": n_blocks,
             **cache[step, str(scheme), n_blocks]} for step in at for name, scheme in schemes.items()]


def replay(source, schemes, corpus: Corpus, at=None, *, n_blocks: int = BLOCKS, device: str = "auto", on_disk: bool = False, cache=None,
           each=None, every: float = 5.0) -> list[dict]:
    """Losses of a public model's checkpoints, and of averages along them, one model on the device at a time; nothing is trained.

    Averages are made while the model before is evaluated. Args: source: Hugging Face step folders, or "hub:NAME" and what else
    `open_trajectory` takes; schemes: {label: scheme}; corpus: text in the model's own tokens; on_disk: the window stays in files, see
    `lawa_core.stream`; cache: a CSV of finished rows, written after every step, so that an interrupted replay goes on; each: called with (step,
    label, {Hugging Face's name: tensor}) before the evaluation. Returns the rows of `evaluate_trajectory`.
    """
    trajectory, device = lawa_core.open_trajectory(source), pick_device(device)
    schemes, at = {"run": lawa_core.newest(), **schemes}, list(trajectory.steps if at is None else at)
    done = _read_cache(Path(cache)) if cache else {}
    missing = [step for step in at if any((step, str(scheme), n_blocks) not in done for scheme in schemes.values())]
    states, config, gpt = lawa_core.stream(trajectory, schemes, missing, on_disk), hf_config(trajectory.companions()), None
    own, begun, told, count, coming = None, time.monotonic(), 0.0, 0, lawa_core.soon(next, states, None)
    while item := coming.result():
        step, label, state = item
        if gpt is None:  # in half precision where the files are and the device is made for it
            half = device.type == "cuda" and next(iter(state.values())).dtype == torch.float16
            gpt = blank(config, device, torch.float16 if half else torch.float32)
        if each:
            each(step, label, state)
        fill(gpt, state)
        item = state = coming = None  # before the next one is made, so that there is only ever one
        coming, losses = lawa_core.soon(next, states, None), evaluate(gpt, corpus, n_blocks)
        own = losses if label == "run" else own
        _add(done, step, str(schemes[label]), n_blocks, losses, own)
        count += 1
        if cache and label == list(schemes)[-1]:
            _write_cache(Path(cache), done)
        if time.monotonic() - told > every:
            told, rate = time.monotonic(), count / (time.monotonic() - begun)
            print(f"{trajectory.name}: {count} of {len(missing) * len(schemes)} models evaluated, step {step}, "
                  f"{(len(missing) * len(schemes) - count) / rate:.0f} s left", flush=True)
    scale = 1 / math.log(2) / corpus.val_bytes_per_token
    return [{"run": trajectory.name, "step": step, "scheme": label, "bpb": done[step, str(scheme), n_blocks]["loss"] * scale,
             "n_blocks": n_blocks, **done[step, str(scheme), n_blocks]} for step in at for label, scheme in schemes.items()]


def _add(cache: dict, step: int, scheme: str, n_blocks: int, losses: np.ndarray, own: np.ndarray) -> None:
    gains, root = own - losses, math.sqrt(len(losses))
    spread = {"loss_se": losses.std(ddof=1) / root, "gain_se": gains.std(ddof=1) / root} if len(losses) > 1 else {"loss_se": math.nan, "gain_se": math.nan}
    cache[step, scheme, n_blocks] = {"loss": float(losses.mean()), "gain": float(gains.mean()), **{name: float(value) for name, value in spread.items()}}


def _read_cache(path: Path) -> dict:
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {(int(row["step"]), row["scheme"], int(row["n_blocks"])): {name: float(row[name]) for name in ("loss", "loss_se", "gain", "gain_se")}
                for row in csv.DictReader(file)}


def _write_cache(path: Path, cache: dict) -> None:
    with lawa_core.replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "scheme", "n_blocks", "loss", "loss_se", "gain", "gain_se"))
        writer.writerows([*key, *(repr(values[name]) for name in ("loss", "loss_se", "gain", "gain_se"))] for key, values in sorted(cache.items()))


# ---- 7. Scales ----------------------------------------------------------------------------------------------------------------------

# One recipe, many sizes. `lr` is the usual rate; sweeps multiply it, up to the paper's tenfold. The gpt2 scales are the paper's settings with the batch
# re-cut for one GPU (same tokens per step); the paper does not give its spacing, so those three are ours.
_RECIPE = {"corpus": "openwebtext", "max_iters": 70_000, "warmup_iters": 2000, "seeds": "0", "k": 5, "n_blocks": 512}
SCALES = {
    "smoke": {"preset": "nano", "corpus": "stdlib", "lr": 1e-3, "max_iters": 300, "batch_size": 8, "warmup_iters": 30, "ckpt_interval": 10, "seeds": "0,1",
              "k": 5, "spacing": 10, "n_blocks": 128},
    "laptop": {"preset": "micro", "corpus": "stdlib", "lr": 1e-3, "max_iters": 1000, "batch_size": 8, "warmup_iters": 100, "ckpt_interval": 20,
               "seeds": "0,1,2", "k": 5, "spacing": 20, "n_blocks": 128},
    "gpt2-small": {**_RECIPE, "preset": "gpt2-small", "lr": 6e-4, "batch_size": 16, "accumulation": 24, "ckpt_interval": 200, "spacing": 1000},
    "gpt2-medium": {**_RECIPE, "preset": "gpt2-medium", "lr": 3e-4, "batch_size": 12, "accumulation": 12, "ckpt_interval": 2000, "spacing": 2000},
    "gpt2-large": {**_RECIPE, "preset": "gpt2-large", "lr": 2e-4, "batch_size": 8, "accumulation": 6, "ckpt_interval": 1000, "spacing": 1000,
                   "min_lr_frac": 0.005},
}
GPUS = {"RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}  # dense bf16 peaks, FLOP/s, from the makers' data sheets


def scale_values(name: str) -> dict:
    if name not in SCALES:
        raise LawaError(f"scale must be one of {', '.join(SCALES)}, got {name!r}")
    return SCALES[name]


def scale_config(values, **given) -> Config:
    """The Config of a scale's (or a notebook's) values, with some of them given."""
    names = {f.name for f in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in (dict(values) | given).items() if name in names})


def cost(config: Config, vocab_size: int = 50_304) -> dict:
    """What a run takes: parameters, tokens, FLOPs (6 per parameter and token, attention 12 L C T per token: PaLM's count), bytes."""
    shape = preset(config.preset, vocab_size)
    with torch.device("meta"):
        parameters = GPT(shape).size()
    tokens = config.tokens_per_step * config.max_iters
    flops = tokens * (6 * parameters + 12 * shape.n_layer * shape.n_embd * shape.block_size)
    return {"parameters": parameters, "tokens": tokens, "flops": flops, "checkpoint_bytes": 4 * parameters * len(config.checkpoint_steps),
            "state_bytes": 16 * parameters}  # weights, gradients and AdamW's two moments, fp32


def plan(configs, rates: dict[str, float] | None = None) -> str:
    """A few lines: what the runs cost, and the hours at each rate (FLOP/s sustained; default: 40% of common GPUs' peaks)."""
    costs = [cost(config) if not Path(DATA / config.corpus / "meta.json").exists() else cost(config, open_corpus(config.corpus).vocab_size) for config in configs]
    flops, disk = sum(c["flops"] for c in costs), sum(c["checkpoint_bytes"] for c in costs)
    rates = rates or {f"{name} at 40% of its peak": 0.4 * peak for name, peak in GPUS.items()}
    return "\n".join([f"{len(costs)} runs of {costs[0]['parameters'] / 1e6:.2f}M parameters and {costs[0]['tokens'] / 1e6:,.1f}M tokens, {flops:.2e} FLOPs in all",
                      f"checkpoints {disk / 1e9:.2f} GB on disk, {costs[0]['state_bytes'] / 1e9:.2f} GB of weights and optimizer in memory, besides activations",
                      *(f"{flops / rate / 3600:.2f} hours on {name}" for name, rate in rates.items())])


# ---- 8. Text ------------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def sample(run, scheme=None, at: int | None = None, prompt: str = "\n", tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """`tokens` tokens of text after `prompt`, from a run's checkpoint at `at` (default the newest) or from an average there."""
    config = json.loads((Path(run) / "config.json").read_text())
    corpus = open_corpus(config["corpus"])
    tokenizer, generator = corpus.tokenizer(), torch.Generator().manual_seed(seed)
    model = GPT(preset(config["preset"], corpus.vocab_size))
    model.load_state_dict(lawa_core.average(run, scheme or lawa_core.newest(), at))
    idx = torch.tensor([tokenizer.encode_ordinary(prompt)])
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1, :corpus.vocab_size] / max(temperature, 1e-6)
        idx = torch.cat([idx, torch.multinomial(F.softmax(logits, -1), 1, generator=generator)], 1)
    return tokenizer.decode(idx[0].tolist())


# ---- 9. Command line ----------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples
  python model.py train --preset micro --corpus stdlib --lr 1e-3 --max_iters 200 --seed 0
  python model.py train --scale gpt2-small --lr 6e-3        the paper's high rate
  python model.py plan --scale gpt2-small
  python model.py sample RUN --scheme "lawa(k=5, spacing=20)" --prompt "def main("
exit status: 0 done, 1 the run failed, 2 bad usage or input, 130/143 interrupted with its state saved (the same command goes on)"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("model.py", description="Train and sample small and large GPT-2s.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "train a run, or go on with it"), ("plan", "print what a run costs")):
        sub = commands.add_parser(name, help=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--scale", help=f"start from the values of {', '.join(SCALES)}")
        for f in dataclasses.fields(Config):
            sub.add_argument(f"--{f.name}", type=type(f.default), help=f"{f.metadata['help']} (default {f.default!r})")
        if name == "train":
            sub.add_argument("--out_dir", help="the run folder (default: runs/<corpus>-<preset>-<hash of the configuration>)")
            sub.add_argument("--device", default="auto", help="cpu, cuda, mps (default: the best there is)")
            sub.add_argument("--threads", type=int, help="CPU threads")
            sub.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
            sub.add_argument("--eval_interval", type=int, default=0, help="steps between validation losses, in val.csv (default: none)")
            sub.add_argument("--state_seconds", type=float, default=30, help="seconds between resume states (default 30)")
    sub = commands.add_parser("sample", help="print text from a run or its average", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("run", help="run folder")
    sub.add_argument("--scheme", help='average first, for example "lawa(k=5, spacing=20)"')
    for flag, default, help in (("prompt", "\n", "text to go on from"), ("tokens", 200, "tokens of text"), ("temperature", 0.8, "0: the likeliest token"),
                                ("seed", 0, "of the draws"), ("at", None, "step (default: the newest)")):
        sub.add_argument(f"--{flag}", type=type(default) if default is not None else int, default=default, help=help)
    return parser


class _Bar(lawa_core.Progress):
    def __call__(self, step, max_iters, loss):
        super().__call__(step, max_iters, f"loss {loss:.3f}")


def main(argv=None) -> int:
    args = vars(_parser().parse_args(argv))
    command = args.pop("command")
    try:
        if command == "sample":
            args["scheme"] = args["scheme"] and lawa_core.parse_scheme(args["scheme"])
            print(sample(**args))
            return 0
        given = {f.name: args.pop(f.name) for f in dataclasses.fields(Config)}
        scale = args.pop("scale")
        config = scale_config(scale_values(scale) if scale else {}, **{name: value for name, value in given.items() if value is not None})
        print(plan([config]) if command == "plan" else train(config, **args, progress=_Bar("steps", 1)))
    except KeyboardInterrupt:
        print("interrupted, state saved; the same command goes on", file=sys.stderr)
        return 130
    except (LawaError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
