"""Hugging Face folders of GPT-2 and GPT-NeoX: read into a model.GPT, and written from one.

Other architectures are evaluated in the classes of `transformers` (see `public_model`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import lawa_core
from lawa_core import LawaError
from model import GPT, ROTARY_BASE, GPTConfig, empty_model

# config.json's activation -> GPTConfig.gelu
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
CONTEXT = 2048  # tokens in a block of text, at most, of an architecture that is not ours
# Hugging Face's GPT-2 keeps these as (in, out); torch's Linear, and so our GPT, as (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass(frozen=True)
class Architecture:
    """How Hugging Face writes one architecture."""

    class_name: str  # the class in transformers
    fields: dict  # our field of GPTConfig -> theirs in config.json
    implied: dict  # our fields that this architecture fixes
    needed: dict  # their fields that must have this value
    parts: dict  # our part of a tensor's name -> theirs


ARCHITECTURES = {  # by config.json's model_type
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        fields={
            "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
            "block_size": "n_positions", "vocab_size": "vocab_size",
            "gelu": "activation_function", "eps": "layer_norm_epsilon",
            "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
        },
        implied={"rotary": 0.0, "parallel": False, "tied": True},
        needed={"tie_word_embeddings": True, "scale_attn_weights": True},
        parts={
            "wte": "transformer.wte", "wpe": "transformer.wpe",
            "h": "transformer.h", "ln_f": "transformer.ln_f",
        },
    ),
    "gpt_neox": Architecture(
        class_name="GPTNeoXForCausalLM",
        fields={
            "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_embd": "hidden_size", "block_size": "max_position_embeddings",
            "vocab_size": "vocab_size", "gelu": "hidden_act", "eps": "layer_norm_eps",
            "rotary": "rotary_pct", "parallel": "use_parallel_residual",
        },
        implied={"scale_attn_by_inverse_layer_idx": False, "tied": False},
        needed={
            "tie_word_embeddings": False, "attention_bias": True, "rotary_emb_base": ROTARY_BASE,
        },
        parts={
            "wte": "gpt_neox.embed_in", "h": "gpt_neox.layers",
            "ln_f": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
            "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
            "attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense",
            "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h",
        },
    ),
}


def architecture(config: GPTConfig) -> str:
    """Hugging Face's model_type for a configuration, a key of ARCHITECTURES; LawaError if none."""
    kind = "gpt_neox" if config.rotary else "gpt2"
    odd = []
    for name, value in ARCHITECTURES[kind].implied.items():
        if getattr(config, name) != value:
            odd.append(f"{name} = {getattr(config, name)}")
    if odd:
        raise LawaError(
            f"Hugging Face has no {kind} with {', '.join(odd)}; "
            "such a model cannot be written as a folder"
        )
    return kind


def hf_name(name: str, kind: str) -> str:
    """Hugging Face's name of one of our tensors: "h.0.ln_1.weight" is "transformer.h.0.ln_1..."."""
    for ours, theirs in ARCHITECTURES[kind].parts.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\1{theirs}.", name)
    return name


def _relaid(tensor, name: str, config: GPTConfig, outward: bool):
    """One of our tensors laid out as Hugging Face's (outward), or back; a view where it can be."""
    if not config.rotary:
        return tensor.T if name.endswith(TRANSPOSED) else tensor
    if ".c_attn." not in name:
        return tensor
    # Rows of ours, (3, n_head, width): all queries, then all keys, then all values.
    # Rows of GPT-NeoX's, (n_head, 3, width): query, key and value of each head in turn.
    rows = (3, config.n_head) if outward else (config.n_head, 3)
    return tensor.unflatten(0, (*rows, -1)).transpose(0, 1).flatten(0, 2)


def hf_config(folder) -> GPTConfig:
    """The configuration of a Hugging Face GPT-2 or GPT-NeoX folder. LawaError for any other."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise LawaError(
            f"{folder} has no config.json; expected a Hugging Face GPT-2 or GPT-NeoX folder"
        )
    hf = json.loads(path.read_text())
    kind = hf.get("model_type")
    if kind not in ARCHITECTURES:
        raise LawaError(f"{folder} holds a {kind}; expected one of {', '.join(ARCHITECTURES)}")
    spec = ARCHITECTURES[kind]
    rope = hf.get("rope_parameters") or {}  # transformers 5 keeps the rotary fields in there
    hf.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    hf.setdefault("rotary_emb_base", rope.get("rope_theta", ROTARY_BASE))
    hf.setdefault(spec.fields["gelu"], "gelu_new" if kind == "gpt2" else "gelu")

    known = {ours: hf[theirs] for ours, theirs in spec.fields.items() if theirs in hf}
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if lacking := [spec.fields[ours] for ours in sizes if ours not in known]:
        raise LawaError(f"{path} lacks {', '.join(lacking)}")
    width = 4 * known["n_embd"]  # of the MLP; the field is named after the architecture
    odd = []
    for name, value in {**spec.needed, "intermediate_size": width, "n_inner": width}.items():
        if hf.get(name) not in (None, value):
            odd.append(f"{name} is {hf[name]}, expected {value}")
    if known["gelu"] not in GELUS:
        odd.append(f"activation {known['gelu']}, expected one of {', '.join(GELUS)}")
    if odd:
        raise LawaError(f"{path}: {'; '.join(odd)}")
    known["gelu"] = GELUS[known["gelu"]]
    usual = {"scale_attn_by_inverse_layer_idx": False, "bias": True}
    return GPTConfig(**{**usual, **spec.implied, **known})


@torch.no_grad()
def load_state(model: GPT, tensors) -> GPT:
    """Copy {Hugging Face's name: tensor} into the model and return it.

    Tensors may have any float dtype and lie on any device; they are read one at a time, and those
    that the model lacks are passed over. LawaError for one that is missing or has another shape.
    """
    kind = architecture(model.config)
    for name, parameter in model.named_parameters():
        theirs = hf_name(name, kind)
        if theirs not in tensors:  # saved without its output layer, as a bare backbone
            theirs = theirs.removeprefix("transformer.").removeprefix("gpt_neox.")
        expected = f"expected {list(parameter.shape)} by its config.json"
        if theirs not in tensors:
            raise LawaError(f"{theirs} is not there; {expected}")
        tensor = _relaid(tensors[theirs], name, model.config, outward=False)
        if tensor.shape != parameter.shape:
            raise LawaError(f"{theirs} has shape {list(tensor.shape)}; {expected}")
        parameter.copy_(tensor)
    return model


def dtype_of(fields: dict) -> torch.dtype:
    """The type in which a config.json says that weights are, or float32."""
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return half.get(fields.get("dtype") or fields.get("torch_dtype"), torch.float32)


def public_model(folder, device: torch.device) -> tuple[object, Callable, Callable]:
    """What evaluating a public model takes, from its folder's config.json alone.

    Returns (config with block_size and vocab_size; make(), which makes an empty model on the device
    with what `model.evaluate` asks of one; load(model, {file's name: tensor}), which copies weights
    into it). On a GPU weights are kept in the type of the files, elsewhere in float32. GPT-2 and
    GPT-NeoX become a `model.GPT`, any other architecture the class that transformers has for it.
    Errors: LawaError for one that neither knows, or without transformers.
    """
    path = Path(folder) / "config.json"
    fields = lawa_core.config_of(Path(folder))
    kind = fields.get("model_type")
    dtype = dtype_of(fields) if device.type == "cuda" else torch.float32
    refused = LawaError(f"{path}: a {kind} is evaluated through transformers: "
                        "pip install transformers")
    if kind in ARCHITECTURES or not fields:
        try:
            config = hf_config(folder)
            return config, lambda: empty_model(config, device, dtype), load_state
        except LawaError as error:
            if not fields:
                raise
            refused = error  # a variant that transformers may know
    try:
        import transformers
    except ImportError:
        raise refused from None
    with lawa_core.explained(f"{path}: transformers cannot read it"):
        theirs = transformers.AutoConfig.from_pretrained(folder)
        if type(theirs) not in transformers.AutoModelForCausalLM._model_mapping:
            raise LawaError(f"{path}: transformers has no language model for a {kind}")
        length = min(getattr(theirs, "max_position_embeddings", None) or CONTEXT, CONTEXT)
        config = SimpleNamespace(block_size=length, vocab_size=theirs.vocab_size)
    return config, lambda: Transformer(theirs, config, dtype, device).eval(), load_by_name


class Transformer(torch.nn.Module):
    """A model of `transformers` with what `model.evaluate` asks of one."""

    def __init__(self, theirs, config, dtype, device):
        super().__init__()
        import transformers
        from transformers.initialization import no_init_weights

        with no_init_weights(), device:
            self.net = transformers.AutoModelForCausalLM.from_config(theirs, dtype=dtype)
        self.net.tie_weights()
        self.config = config

    def losses(self, idx, targets):
        """Losses in nats, (B, T), a text of the batch at a time."""
        losses = []
        for text, answers in zip(idx, targets, strict=True):
            logits = self.net(text[None], use_cache=False).logits[0].float()  # (T, vocab)
            losses.append(F.cross_entropy(logits, answers, reduction="none"))
        return torch.stack(losses)


@torch.no_grad()
def load_by_name(model: Transformer, tensors) -> Transformer:
    """Copy {file's name: tensor} into a model whose parameters have the same names; return it.

    A tied parameter may be there under either name. LawaError for one that is missing or has
    another shape.
    """
    ours = model.net.state_dict()
    if "embed_out.weight" in tensors and "lm_head.weight" in ours:  # GPT-NeoX's, in transformers 5
        ours["embed_out.weight"] = ours.pop("lm_head.weight")
    first = lawa_core.first_names(ours)
    there = {first[name] for name in ours if name in tensors}
    for name, parameter in ours.items():
        expected = f"expected {list(parameter.shape)} by its config.json"
        if first[name] not in there:
            raise LawaError(f"{name} is not there; {expected}")
        if name in tensors:
            if tensors[name].shape != parameter.shape:
                raise LawaError(f"{name} has shape {list(tensors[name].shape)}; {expected}")
            parameter.copy_(tensors[name])
    return model


def load_hf(folder) -> GPT:
    """A GPT, float32, from a Hugging Face GPT-2 or GPT-NeoX folder; logits as in `transformers`.

    Weights may be safetensors or .bin, sharded or not, in any float dtype.
    """
    return load_state(empty_model(hf_config(folder)), lawa_core.open_checkpoint(folder))


def save_hf(folder, config: GPTConfig, state) -> None:
    """Write {name: tensor} of a GPT, a run's weights or an average of them, as a folder that
    `transformers` loads. Dtypes stay; `state` is not changed."""
    kind = architecture(config)
    spec = ARCHITECTURES[kind]
    state = dict(state)
    if not config.bias:  # Hugging Face's classes always have biases: write zeros
        for name, tensor in list(state.items()):
            if not name.startswith(("wte.", "wpe.", "lm_head.")):
                bias = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
                state[name.replace("weight", "bias")] = bias
    tensors = {}
    for name, tensor in state.items():
        relaid = _relaid(tensor, name, config, outward=True)
        tensors[hf_name(name, kind)] = relaid.contiguous()
    fields = {"architectures": [spec.class_name], "model_type": kind, **spec.needed}
    for ours, theirs in spec.fields.items():
        fields[theirs] = getattr(config, ours)
    fields[spec.fields["gelu"]] = "gelu_new" if config.gelu == "tanh" else "gelu"
    if kind == "gpt_neox":
        fields["intermediate_size"] = 4 * config.n_embd
    else:
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    write_hf(folder, tensors, fields)


def write_hf(folder, tensors, fields: dict, like=None) -> None:
    """Write {Hugging Face's name: tensor} with a config.json of `fields` and the tensors' dtype.

    like: a folder whose tokenizer is copied. The config.json is written last: where it is, the
    folder is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if like:
        for source in lawa_core.companions(like):
            if source.name != "config.json":
                shutil.copyfile(source, folder / source.name)
    lawa_core.save(folder / "model.safetensors", tensors)
    fields = {name: value for name, value in fields.items() if name != "torch_dtype"}
    fields["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with lawa_core.replacing(folder / "config.json") as part:
        part.write_text(json.dumps(fields, indent=2))
