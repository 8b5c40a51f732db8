"""The network: GPT-2 or, by configuration, GPT-NeoX, in one class; and Hugging Face folders of either, read and written.

The architecture and its names are GPT-2's (Radford et al. 2019), as the LAWA paper (arXiv 2306.03241) trains it: pre-norm, tied embeddings,
no biases, attention scores also divided by the layer's number. GPT-NeoX (arXiv 2204.06745) is what the Pythia models are.
"""
from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import lawa_core
from lawa_core import LawaError

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
    "pico": (2, 2, 32, 64),  # 0.02M
    "nano": (2, 2, 64, 64),  # 0.1M, for tests and smoke
    "micro": (2, 4, 128, 128),  # 0.4M
    "milli": (3, 4, 192, 128),  # 1.3M
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


PIECE = 1024  # tokens whose logits exist at a time on a CPU; fewer make smaller, slower matrix products


class LinearCrossEntropy(torch.autograd.Function):
    """Mean loss of the output layer, with its gradients made at once: how a CPU trains in float32.

    The logits are the largest array of a small model's step. Here they become probabilities, then their own gradient, in the memory in
    which they were made, with one exponential a logit instead of two. There is no second derivative. GPUs and compilers want the plain way.
    Takes x: (N, C), head: (vocab, C), both float32, and targets: (N,) int64, none outside the vocabulary. Returns a scalar, nats per token.
    """
    @staticmethod
    def forward(ctx, x, head, targets):
        dx, dhead, losses, room = torch.empty_like(x), torch.zeros_like(head), [], x.new_empty(min(len(x), PIECE), len(head))
        for part, answers, dpart in zip(x.split(PIECE), targets[:, None].split(PIECE), dx.split(PIECE), strict=True):
            logits = torch.mm(part, head.T, out=room[:len(part)])
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, answers)
            total = logits.exp_().sum(1, keepdim=True)
            losses.append(total.log() - right)
            logits *= 1 / (len(x) * total)  # softmax / N
            logits.scatter_add_(1, answers, logits.new_full(answers.shape, -1 / len(x)))  # (softmax - one-hot) / N
            torch.mm(logits, head, out=dpart)
            dhead.addmm_(logits.T, part)
        ctx.save_for_backward(dx, dhead)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx, upstream):
        dx, dhead = ctx.saved_tensors
        return upstream * dx, upstream * dhead, None


class GPT(nn.Module):
    """GPT-2, or GPT-NeoX by configuration.

    `GPT(config, seed)` draws its weights from a generator of its own: normal(0, 0.02), residual projections / sqrt(2 n_layer).
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config, device = config, torch.get_default_device()
        with torch.device("meta"):  # torch's own initialization would take time, and numbers from the global generator
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = None if config.rotary else nn.Embedding(config.block_size, config.n_embd)
            self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = LayerNorm(config)
            self.lm_head = None if config.tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device=device)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1), generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

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

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64. Returns (logits (B, T, vocab), None), or with targets (None, mean loss in nats)."""
        x = self.hidden(idx)
        if targets is None:
            return F.linear(x, self.head), None
        plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        loss = LinearCrossEntropy.apply if x.requires_grad and not plain else F.linear_cross_entropy
        return None, loss(x.flatten(0, 1), self.head, targets.flatten())

    def losses(self, idx, targets, memory: int = 36 << 20):
        """Losses in nats per token, (B, T), with no more than about `memory` bytes of logits at a time; for evaluation.

        36 MB are just above the 32 from which malloc gives back at once what is free.
        """
        x, rows = self.hidden(idx).flatten(0, 1), max(memory // (4 * self.config.vocab_size), 1)
        rows = min(rows, PIECE) if x.device.type == "cpu" else rows
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
        {"rotary": 0.0, "parallel": False, "tied": True}, {"tie_word_embeddings": True, "scale_attn_weights": True},
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
              **({"intermediate_size": 4 * config.n_embd} if config.rotary else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
              DIALECTS[kind].fields["gelu"]: "gelu_new" if config.gelu == "tanh" else "gelu"}
    write_hf(folder, tensors, fields)


def write_hf(folder, tensors, fields: dict, like=None) -> None:
    """Write tensors under Hugging Face's names, a config.json of `fields` and their real dtype, and the tokenizer of the folder `like`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in [path for pattern in lawa_core.COPIED for path in Path(like).glob(pattern)] if like else []:
        shutil.copyfile(source, Path(folder) / source.name)
    lawa_core.save(Path(folder) / "model.safetensors", tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with lawa_core.replacing(Path(folder) / "config.json") as part:
        part.write_text(json.dumps({name: value for name, value in fields.items() if name != "torch_dtype"} | {"dtype": dtype}, indent=2))
