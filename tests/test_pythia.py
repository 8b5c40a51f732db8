"""Pythia: GPT-NeoX in the GPT class, Hugging Face folders both ways, trajectories from the Hub, and replays of them."""

import json
import os

import pytest
import torch

from lawa_core import LawaError, average, lawa, save
from model import GPT, NEOX, PRESETS, GPTConfig, load_hf, preset, save_hf

os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
SIZES = [name for name in PRESETS if name.startswith("pythia")]
# By the models' config.json on the Hub: layers, width, heads, vocabulary; and all parameters (arXiv 2304.01373, table 1).
PUBLISHED = {"pythia-70m": (6, 512, 8, 50304, 70_426_624), "pythia-160m": (12, 768, 12, 50304, 162_322_944),
             "pythia-410m": (24, 1024, 16, 50304, 405_334_016), "pythia-1b": (16, 2048, 8, 50304, 1_011_781_632),
             "pythia-1.4b": (24, 2048, 16, 50304, 1_414_647_808), "pythia-2.8b": (32, 2560, 32, 50304, 2_775_208_960),
             "pythia-6.9b": (32, 4096, 32, 50432, 6_857_302_016), "pythia-12b": (36, 5120, 40, 50688, 11_846_072_320)}


def narrow(name: str) -> GPTConfig:
    """A preset's heads and rotary share, at a sixth of its layers and 16 or 8 values per head."""
    layers, heads, *_ = PRESETS[name]
    return GPTConfig(max(layers // 6, 1), heads, heads * (16 if heads < 32 else 8), 64, 128, **NEOX)


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def spread(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter matters: biases and norms are random, and weights large enough that attention is not flat."""
    gpt, generator = GPT(config, seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gpt.parameters():
            p += torch.randn(p.shape, generator=generator) * (0.1 if p.dim() == 1 else config.n_embd ** -0.5)
    return gpt


def tokens(config: GPTConfig, length: int = 48, batch: int = 2):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def same_logits(ours: GPT, folder, idx, tolerance: float = 1e-4) -> None:
    a, b = ours(idx)[0], theirs(folder)(idx).logits
    assert a.std() > 0.3  # logits that say something
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- GPT-NeoX -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SIZES)
def test_presets_are_the_published_shapes(name):
    with torch.device("meta"):
        gpt = GPT(preset(f"{name}-deduped", 50_277))  # the tokenizer's size; the presets pad it
    c = gpt.config
    assert (c.n_layer, c.n_embd, c.n_head, c.vocab_size, gpt.size()) == PUBLISHED[name]
    assert c.block_size == 2048 and c.rotary_width == c.n_embd // c.n_head // 4


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_transformers_for_every_shape_family(tmp_path, name):
    gpt = spread(narrow(name))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    same_logits(gpt, tmp_path, tokens(gpt.config))


@pytest.mark.parametrize("name", ["pythia-70m", "pythia-160m"])
def test_logits_equal_transformers_at_full_size(tmp_path, name):
    gpt = spread(preset(name, 50_277))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    same_logits(gpt, tmp_path, tokens(gpt.config, 64, 1))


def test_gpt2_folders_still_equal_transformers(tmp_path):
    gpt = spread(preset("nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    same_logits(gpt, tmp_path, tokens(gpt.config))
    torch.testing.assert_close(load_hf(tmp_path)(tokens(gpt.config))[0], gpt(tokens(gpt.config))[0])


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "float16", "sequential", "transformers 5"])
def test_folders_of_transformers_load(tmp_path, layout):
    """Written by transformers in each layout the Hub has, read here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
                                        max_position_embeddings=64, use_parallel_residual=layout != "sequential", initializer_range=0.2)
    net = transformers.GPTNeoXForCausalLM(config)
    if layout == "float16":
        net = net.half()
    net.save_pretrained(tmp_path, max_shard_size="50KB" if layout == "sharded" else "5GB")
    if layout == "bin":
        state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in net.state_dict().items()}  # as the Hub's files have it
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if layout != "transformers 5":  # the fields as the Hub's configs have them
        fields = json.loads((tmp_path / "config.json").read_text())
        fields.pop("rope_parameters", None)
        (tmp_path / "config.json").write_text(json.dumps(fields | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    gpt = load_hf(tmp_path)
    assert gpt.config.parallel == (layout != "sequential") and next(gpt.parameters()).dtype == torch.float32
    same_logits(gpt, tmp_path, tokens(gpt.config))


def test_save_and_load_return_the_same_bits(tmp_path):
    gpt = spread(preset("neox-nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    back = load_hf(tmp_path)
    assert back.config == gpt.config and all(torch.equal(t, back.state_dict()[n]) for n, t in gpt.state_dict().items())


def test_folder_averaged_here_gives_the_same_logits_there(tmp_path):
    config = preset("neox-nano", 200)
    for step in (1, 2, 3):
        save_hf(tmp_path / f"step{step}", config, spread(config, step).state_dict())
    mean = average(tmp_path, lawa(3))
    assert set(mean) == set(average(tmp_path / "step3"))
    (tmp_path / "mean").mkdir()
    save(tmp_path / "mean" / "model.safetensors", mean)
    (tmp_path / "mean" / "config.json").write_text((tmp_path / "step3" / "config.json").read_text())
    same_logits(load_hf(tmp_path / "mean"), tmp_path / "mean", tokens(config))


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "holds a llama; expected one of gpt2, gpt_neox"),
    ({"hidden_act": "silu"}, "activation silu, expected one of"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ({"rotary_emb_base": 500_000}, "rotary_emb_base is 500000, expected 10000"),
    ({"intermediate_size": 96}, "intermediate_size is 96, expected 384"),
    ({"num_hidden_layers": 3}, r"layers.2.input_layernorm.weight is not there; expected \[96\]"),
    ({"vocab_size": 320}, r"gpt_neox.embed_in.weight has shape \[256, 96\]; expected \[320, 96\]"),
])
def test_folders_that_do_not_fit_are_refused(tmp_path, change, message):
    gpt = GPT(preset("neox-nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | change))
    with pytest.raises(LawaError, match=message):
        load_hf(tmp_path)


@pytest.mark.parametrize("change, message", [({"tied": True}, "no gpt_neox with tied = True"),
                                             ({"rotary": 0.0}, "no gpt2 with parallel = True, tied = False")])
def test_architectures_without_a_hugging_face_class_are_refused(tmp_path, change, message):
    config = GPTConfig(1, 2, 16, 8, 64, **NEOX | change)
    with pytest.raises(LawaError, match=message):
        save_hf(tmp_path / "out", config, GPT(config).state_dict())
    assert not (tmp_path / "out").exists()


def test_rotary_width_must_be_even():
    with pytest.raises(LawaError, match="even part of a head's width 12"):
        GPTConfig(1, 2, 24, 8, 64, **NEOX)


@pytest.mark.parametrize("config", [preset("nano", 500), preset("neox-nano", 500)], ids=["gpt2", "neox"])
def test_losses_in_pieces_are_the_losses(config):
    gpt, idx = spread(config), tokens(config, 41)
    whole = gpt(idx[:, :-1], idx[:, 1:], reduction="none")[1]
    pieces = gpt.losses(idx[:, :-1], idx[:, 1:], memory=7 * 4 * config.vocab_size)  # seven tokens at a time
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    assert pieces.shape == whole.shape == (2, 40)


def test_a_gpt2_keeps_its_weights_and_logits():
    """The golden sum of logits of the smallest GPT-2 preset: if it moves, GPT-NeoX has changed GPT-2's path."""
    gpt = GPT(preset("nano", 256), seed=3)
    assert list(dict(gpt.named_children())) == ["wte", "wpe", "h", "ln_f"] and gpt.head is gpt.wte.weight
    logits = gpt(torch.arange(32)[None])[0].double()
    assert abs(logits.square().mean().item() - 0.027437265819762302) < 1e-9
