"""Pythia: GPT-NeoX in the GPT class, Hugging Face folders both ways, the Hub, and replays."""

import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy_task
from hub_stand_in import Fault, Hub

import lawa_core
import model
from lab import hub as lab_hub, replay, statistics
from lab.hf import load_hf, load_state, save_hf, write_hf
from lawa_core import LawaError, average, ema, lawa, newest, open_checkpoint, save
from model import GPT, NEOX, PRESETS, ROOT, GPTConfig, gpt_config

os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
SIZES = [name for name in PRESETS if name.startswith("pythia")]
# By the models' config.json on the Hub: layers, width, heads, vocabulary; and all parameters
# (arXiv 2304.01373, table 1).
PUBLISHED = {
    "pythia-70m": (6, 512, 8, 50304, 70_426_624),
    "pythia-160m": (12, 768, 12, 50304, 162_322_944),
    "pythia-410m": (24, 1024, 16, 50304, 405_334_016),
    "pythia-1b": (16, 2048, 8, 50304, 1_011_781_632),
    "pythia-1.4b": (24, 2048, 16, 50304, 1_414_647_808),
    "pythia-2.8b": (32, 2560, 32, 50304, 2_775_208_960),
    "pythia-6.9b": (32, 4096, 32, 50432, 6_857_302_016),
    "pythia-12b": (36, 5120, 40, 50688, 11_846_072_320),
}


def narrow(name: str) -> GPTConfig:
    """A preset's heads and rotary share, at a sixth of its layers and 16 or 8 values per head."""
    layers, heads, *_ = PRESETS[name]
    return GPTConfig(max(layers // 6, 1), heads, heads * (16 if heads < 32 else 8), 64, 128, **NEOX)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def spread(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter matters.

    Biases and norms are random, and weights large enough that attention is not flat.
    """
    gpt, generator = GPT(config, seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gpt.parameters():
            p += torch.randn(p.shape, generator=generator) * (
                0.1 if p.dim() == 1 else config.n_embd**-0.5
            )
    return gpt


def tokens(config: GPTConfig, length: int = 48, batch: int = 2):
    return torch.randint(
        0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)
    )


@torch.inference_mode()
def same_logits(ours: GPT, folder, idx, tolerance: float = 1e-4) -> None:
    a, b = ours(idx)[0], theirs(folder)(idx).logits
    assert a.std() > 0.3  # logits that say something
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- GPT-NeoX ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_presets_are_the_published_shapes(name):
    with torch.device("meta"):
        gpt = GPT(gpt_config(f"{name}-deduped", 50_277))  # the tokenizer's size; the presets pad it
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
    gpt = spread(gpt_config(name, 50_277))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    same_logits(gpt, tmp_path, tokens(gpt.config, 64, 1))


def test_gpt2_folders_still_equal_transformers(tmp_path):
    gpt = spread(gpt_config("nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    same_logits(gpt, tmp_path, tokens(gpt.config))
    torch.testing.assert_close(load_hf(tmp_path)(tokens(gpt.config))[0], gpt(tokens(gpt.config))[0])


@pytest.mark.parametrize(
    "layout", ["safetensors", "sharded", "bin", "float16", "sequential", "transformers 5"]
)
def test_folders_of_transformers_load(tmp_path, layout):
    """Written by transformers in each layout the Hub has, read here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        use_parallel_residual=layout != "sequential",
        initializer_range=0.2,
    )
    net = transformers.GPTNeoXForCausalLM(config)
    if layout == "float16":
        net = net.half()
    net.save_pretrained(tmp_path, max_shard_size="50KB" if layout == "sharded" else "5GB")
    if layout == "bin":
        state = {
            name.replace("lm_head", "embed_out"): tensor
            for name, tensor in net.state_dict().items()
        }  # as the Hub's files have it
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    if layout != "transformers 5":  # the fields as the Hub's configs have them
        fields = json.loads((tmp_path / "config.json").read_text())
        fields.pop("rope_parameters", None)
        (tmp_path / "config.json").write_text(
            json.dumps(fields | {"rotary_pct": 0.25, "rotary_emb_base": 10000})
        )
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "sharded")
    gpt = load_hf(tmp_path)
    assert (
        gpt.config.parallel == (layout != "sequential")
        and next(gpt.parameters()).dtype == torch.float32
    )
    same_logits(gpt, tmp_path, tokens(gpt.config))


def test_save_and_load_return_the_same_bits(tmp_path):
    gpt = spread(gpt_config("neox-nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    back = load_hf(tmp_path)
    assert back.config == gpt.config and all(
        torch.equal(t, back.state_dict()[n]) for n, t in gpt.state_dict().items()
    )


def test_folder_averaged_here_gives_the_same_logits_there(tmp_path):
    config = gpt_config("neox-nano", 200)
    for step in (1, 2, 3):
        save_hf(tmp_path / f"step{step}", config, spread(config, step).state_dict())
    mean = average(tmp_path, lawa(3))
    assert set(mean) == set(average(tmp_path / "step3"))
    (tmp_path / "mean").mkdir()
    save(tmp_path / "mean" / "model.safetensors", mean)
    (tmp_path / "mean" / "config.json").write_text((tmp_path / "step3" / "config.json").read_text())
    same_logits(load_hf(tmp_path / "mean"), tmp_path / "mean", tokens(config))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "holds a llama; expected one of gpt2, gpt_neox"),
        ({"hidden_act": "silu"}, "activation silu, expected one of"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
        ({"rotary_emb_base": 500_000}, "rotary_emb_base is 500000, expected 10000"),
        ({"intermediate_size": 96}, "intermediate_size is 96, expected 384"),
        (
            {"num_hidden_layers": 3},
            r"layers.2.input_layernorm.weight is not there; expected \[96\]",
        ),
        (
            {"vocab_size": 320},
            r"gpt_neox.embed_in.weight has shape \[256, 96\]; expected \[320, 96\]",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, change, message):
    gpt = GPT(gpt_config("neox-nano", 200))
    save_hf(tmp_path, gpt.config, gpt.state_dict())
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | change)
    )
    with pytest.raises(LawaError, match=message):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tied": True}, "no gpt_neox with tied = True"),
        ({"rotary": 0.0}, "no gpt2 with parallel = True, tied = False"),
    ],
)
def test_architectures_without_a_hugging_face_class_are_refused(tmp_path, change, message):
    config = GPTConfig(1, 2, 16, 8, 64, **NEOX | change)
    with pytest.raises(LawaError, match=message):
        save_hf(tmp_path / "out", config, GPT(config).state_dict())
    assert not (tmp_path / "out").exists()


def test_rotary_width_must_be_even():
    with pytest.raises(LawaError, match="even part of a head's width 12"):
        GPTConfig(1, 2, 24, 8, 64, **NEOX)


@pytest.mark.parametrize(
    "config", [gpt_config("nano", 500), gpt_config("neox-nano", 500)], ids=["gpt2", "neox"]
)
def test_losses_in_pieces_are_the_losses(config):
    gpt, idx = spread(config), tokens(config, 41)
    whole = F.cross_entropy(gpt(idx[:, :-1])[0].transpose(1, 2), idx[:, 1:], reduction="none")
    pieces = gpt.losses(
        idx[:, :-1], idx[:, 1:], memory=7 * 4 * config.vocab_size
    )  # seven tokens at a time
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    assert pieces.shape == whole.shape == (2, 40)


def test_a_gpt2_keeps_its_weights_and_logits():
    """The golden sum of logits of a small GPT-2: if it moves, GPT-NeoX has changed its path."""
    gpt = GPT(gpt_config("nano", 256), seed=3)
    assert (
        list(dict(gpt.named_children())) == ["wte", "wpe", "h", "ln_f"]
        and gpt.head is gpt.wte.weight
    )
    logits = gpt(torch.arange(32)[None])[0].double()
    assert abs(logits.square().mean().item() - 0.027437265819762302) < 1e-9


# ---- The Hub -------------------------------------------------------------------------------------

REPO, STEPS = "EleutherAI/pythia-nano", (0, 10, 20, 30, 40)
CONFIG = GPTConfig(2, 4, 32, 32, 64, **NEOX)


def revision(
    folder, step: int, layout: str = "single", buffers: bool = False, seed: int | None = None
):
    """A GPT-NeoX folder in float16 as the Hub has them, with or without buffers.

    layout: "single", "bin", "both", or that many shards.
    """
    save_hf(
        folder,
        CONFIG,
        {
            name: tensor.half()
            for name, tensor in spread(CONFIG, step if seed is None else seed).state_dict().items()
        },
    )
    state = dict(open_checkpoint(folder / "model.safetensors"))
    if buffers:
        for layer in range(CONFIG.n_layer):
            prefix = f"gpt_neox.layers.{layer}.attention."
            state |= {
                f"{prefix}bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril(),
                f"{prefix}rotary_emb.inv_freq": torch.rand(1),
                f"{prefix}masked_bias": torch.tensor(-1e9).half(),
            }  # -inf
    (folder / "model.safetensors").unlink()
    if layout in ("single", "both"):
        save(folder / "model.safetensors", state)
    if layout in ("bin", "both"):
        torch.save(state, folder / "pytorch_model.bin")
    if layout.isdigit():
        names, count = sorted(state), int(layout)
        places = {
            name: f"model-{i * count // len(names) + 1:05}-of-{count:05}.safetensors"
            for i, name in enumerate(names)
        }
        for shard in set(places.values()):
            save(folder / shard, {name: state[name] for name in names if places[name] == shard})
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def branches(tmp_path):
    """Five revisions, each in another layout, and `main`; what the Hub's are like."""
    layouts = [("single", False), ("bin", True), ("2", True), ("3", False), ("both", True)]
    made = {
        f"step{step}": revision(tmp_path / "made" / f"step{step}", step, *how)
        for step, how in zip(STEPS, layouts, strict=True)
    }
    return made | {"main": made["step40"]}


@pytest.fixture
def hub(branches):
    with Hub({REPO: branches}) as hub:
        yield hub


def opened(hub, tmp_path, *args, **options):
    return lab_hub.open_hub(
        REPO, *args, folder=tmp_path / "cache", endpoint=hub.url, **{"token": False} | options
    )


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between retries, skipped."""
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(
            f"{module}.time", types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
        )


def weights_sent(hub) -> int:
    return sum(size for name, size in hub.sent.items() if not name.endswith(".json"))


SCHEMES = {"run": newest(), "lawa": lawa(3, 10), "ema": ema(0.5)}


@pytest.mark.parametrize("on_disk", [False, True], ids=["window in memory", "window on disk"])
def test_every_layout_with_and_without_buffers_averages_by_name(hub, tmp_path, on_disk):
    """The average is that of the weights.

    There are uint8 masks, -inf fill values, .bin beside safetensors, shard borders that differ.
    """
    models = {step: GPT(CONFIG, step) for step in STEPS}
    for step in STEPS:
        load_state(models[step], open_checkpoint(tmp_path / "made" / f"step{step}"))
    for step, name, state in lawa_core.sweep(opened(hub, tmp_path), SCHEMES, on_disk=on_disk):
        assert not any(
            "masked" in tensor or tensor.endswith(("attention.bias", "inv_freq"))
            for tensor in state
        )
        weights = SCHEMES[name](STEPS, step)
        expected = {
            n: sum(w * models[s].state_dict()[n].double() for s, w in weights.items())
            for n in models[0].state_dict()
        }
        for n, tensor in load_state(GPT(CONFIG), state).state_dict().items():
            torch.testing.assert_close(
                tensor.double(), expected[n], rtol=2**-10, atol=1e-6
            )  # one rounding to float16


def wait_for(path) -> None:
    """Until a file is there; a minute at most."""
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("on_disk", [False, True], ids=["window in memory", "window on disk"])
def test_one_copy_is_fetched_the_next_meanwhile_and_the_disk_is_bounded(hub, tmp_path, on_disk):
    trajectory, most = opened(hub, tmp_path), 0
    schemes = SCHEMES | {"ema": newest()}
    planned = trajectory.to_fetch(STEPS)
    folders = {step: tmp_path / "cache" / f"step{step}" for step in STEPS}
    for step, name, _ in lawa_core.sweep(trajectory, schemes, on_disk=on_disk):
        following = STEPS.index(step) + 1
        if name == "run" and following < len(STEPS):
            for name in trajectory.revisions[STEPS[following]][1]:  # under way before anyone asked
                wait_for(folders[STEPS[following]] / name)
        most = max(most, sum(trajectory.nbytes(s) for s in STEPS if folders[s].exists()))
    assert weights_sent(hub) == sum(
        sum(file.size for name, file in files.items() if not name.endswith(".json"))
        for _, files in trajectory.revisions.values()
    )
    assert planned == sum(hub.sent.values()) == sum(map(trajectory.nbytes, STEPS))
    held = 4 if on_disk else 2  # k + 1 copies, or the one being read and the next
    assert most <= held * max(map(trajectory.nbytes, STEPS))
    assert not any(path.exists() for path in folders.values())
    assert trajectory.fetched == planned
    assert not open_deleted(tmp_path)  # they would keep the disk full


def open_deleted(folder) -> list[str]:
    """Deleted files under a folder that this process still holds open."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [
        target
        for target in targets
        if target.startswith(str(folder)) and target.endswith("(deleted)")
    ]


def test_memory_is_the_window(tmp_path):
    """No more than k checkpoints, the average, and two tensors at a time."""
    for step in range(1, 6):
        save(
            tmp_path / f"ckpt_{step}.safetensors",
            {f"layer{i}": torch.full((1 << 18,), float(step + i)) for i in range(32)},
        )
    one, tensor, k = 32 << 20, 1 << 20, 3
    for on_disk, most in ((False, (k + 1) * one + 2 * tensor), (True, one + 2 * tensor)):
        tracemalloc.start()
        for _, _, state in lawa_core.sweep(
            tmp_path, {"run": newest(), "lawa": lawa(k, 1)}, on_disk=on_disk
        ):
            del state
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tiles = k * lawa_core.TILE * 4  # tiles in double, and what reading takes
        assert peak <= most + tiles, f"{peak / one:.2f} checkpoints"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_checkpoint_with_nan_is_named(tmp_path, on_disk):
    for step in (1, 2, 3):
        save(
            tmp_path / f"ckpt_{step}.safetensors",
            {"w": torch.full((5,), float("nan") if step == 2 else float(step))},
        )
    with pytest.raises(LawaError, match=r"ckpt_2.safetensors: w holds NaN or Inf") as error:
        list(lawa_core.sweep(tmp_path, {"lawa": lawa(3, 1)}, [3], on_disk=on_disk))
    assert "ckpt_1" not in str(error.value) and "ckpt_3" not in str(error.value)


def test_a_window_in_memory_or_on_disk_gives_the_same_bits(tmp_path, branches):
    for on_disk in (False, True):
        streamed = {
            (step, name): {n: t.clone() for n, t in state.items()}
            for step, name, state in lawa_core.sweep(
                tmp_path / "made", {"run": newest(), "lawa": lawa(3, 10)}, on_disk=on_disk
            )
        }
        for step, name, state in lawa_core.sweep(
            tmp_path / "made", {"run": newest(), "lawa": lawa(3, 10)}
        ):
            assert state.keys() == streamed[step, name].keys() and all(
                torch.equal(t, streamed[step, name][n]) for n, t in state.items()
            )


@pytest.mark.parametrize(
    "seeds, steps, said",
    [
        ({10: 0}, STEPS, r"steps 0, 10 hold identical weights"),
        ({20: 40, 30: 40}, STEPS, r"steps 20, 30, 40 hold identical weights"),
        ({20: 40, 30: 40}, (0, 10, 20), None),
    ],
)
def test_duplicated_revisions_are_refused_before_anything_is_fetched(tmp_path, seeds, steps, said):
    made = {
        f"step{step}": revision(tmp_path / f"step{step}", step, seed=seeds.get(step))
        for step in STEPS
    }
    with Hub({REPO: made}) as hub:
        if said is None:
            assert opened(hub, tmp_path, steps).steps == list(steps)
            return
        with pytest.raises(LawaError, match=said):
            opened(hub, tmp_path, steps)
        assert not hub.sent and not any("resolve" in request for request in hub.log)
        trajectory = opened(hub, tmp_path, steps, allow=["duplicates"])
        states = list(lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False))
        assert len(states) == len(steps)


def test_a_shard_of_another_revision_is_refused(tmp_path):
    """12B's step50000 and step58000 hold the final model's first shard."""
    made = {f"step{step}": revision(tmp_path / f"step{step}", step, "2") for step in STEPS}
    shard = "model-00001-of-00002.safetensors"
    (made["step20"] / shard).write_bytes((made["step40"] / shard).read_bytes())
    with (
        Hub({REPO: made}) as hub,
        pytest.raises(LawaError, match="steps 20, 40 hold partly identical weights"),
    ):
        opened(hub, tmp_path)
    assert not hub.sent


def test_the_same_weights_in_another_format_are_refused_once_read(tmp_path):
    made = {
        "step1": revision(tmp_path / "step1", 1),
        "step2": revision(tmp_path / "step2", 1, "bin"),
    }
    with Hub({REPO: made}) as hub:
        trajectory = opened(hub, tmp_path)  # their sha256 differ
        with pytest.raises(LawaError, match=r"steps 1 and 2 of .* hold identical weights"):
            list(lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False))


def test_what_cannot_be_fetched_ahead_fails_when_its_turn_comes(hub, tmp_path, no_waiting):
    trajectory, passed = opened(hub, tmp_path), []
    commit, _ = trajectory.revisions[20]
    hub.faults.append(Fault(f"HEAD .*{commit}", 503, 99))
    with pytest.raises(LawaError, match=r"step20: the Hub cannot be reached \(503\)"):
        for step, _, _ in lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False):
            passed.append(step)
    assert passed == [0, 10]


def test_main_holds_both_formats_but_one_is_fetched(hub, tmp_path):
    trajectory = opened(hub, tmp_path, [40])
    list(lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False))
    assert set(hub.sent) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "lacking, said",
    [
        (
            "model-00002-of-00003.safetensors",
            "step30 lacks shard 2 of model.safetensors; leave this step out",
        ),
        (
            "model.safetensors.index.json",
            "step30 lacks model.safetensors.index.json; leave this step out",
        ),
        ("model-", "step30 lacks weights: expected model.safetensors or pytorch_model.bin"),
    ],
)
def test_a_missing_shard_is_named_before_anything_is_fetched(tmp_path, branches, lacking, said):
    for path in list(branches["step30"].iterdir()):
        if path.name.startswith(lacking):
            path.unlink()
    if lacking == "model-":
        (branches["step30"] / "model.safetensors.index.json").unlink()
    with Hub({REPO: branches}) as hub, pytest.raises(LawaError, match=said):
        opened(hub, tmp_path)
    assert not hub.sent


@pytest.mark.parametrize(
    "fault, said",
    [
        (
            Fault("HEAD .*resolve", 404, 9),
            "step30: a file it lists is missing on the Hub; what is fetched is kept, "
            "run again to go on",
        ),
        (Fault("HEAD .*resolve", 401, 9), "step30: no such model, or it needs a token"),
        (Fault("HEAD .*resolve", 403, 9), "step30: no such model, or it needs a token"),
        (
            Fault("HEAD .*resolve", 503, 99),
            r"step30: the Hub cannot be reached \(503\); what is fetched is kept",
        ),
        (Fault("GET /[0-9a-f]{64}", "short"), "step30: the download was cut short"),
        (
            Fault("GET /[0-9a-f]{64}", "corrupt"),
            r"step30: model-00001-of-00003.safetensors is not the file that the Hub lists",
        ),
        (Fault("GET /[0-9a-f]{64}", 503, 99), r"step30: the Hub cannot be reached \(503\)"),
    ],
)
def test_a_failing_fetch_is_one_line_and_is_gone_on_with(hub, tmp_path, no_waiting, fault, said):
    trajectory = opened(hub, tmp_path, keep=True)
    hub.faults.append(fault)
    with pytest.raises(LawaError, match=said) as error:
        trajectory[30]
    assert "\n" not in str(error.value)
    hub.faults.clear()
    assert len(trajectory[30]) == len(open_checkpoint(tmp_path / "made" / "step30"))
    before = weights_sent(hub)
    assert (
        trajectory[30] and len(opened(hub, tmp_path)[30]) and weights_sent(hub) == before
    )  # what is there is not fetched again


def test_a_cut_connection_goes_on_where_it_was(hub, tmp_path, no_waiting, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(Fault("GET /[0-9a-f]{64}", "cut"))
    trajectory = opened(hub, tmp_path, [0])
    list(lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False))
    assert (
        weights_sent(hub) - trajectory.revisions[0][1]["model.safetensors"].size < 1000
    )  # by a range request, less than a chunk twice


def test_an_interrupted_revision_keeps_its_whole_shards(hub, tmp_path, no_waiting):
    hub.faults.append(Fault("HEAD .*model-00003", 503, 99))
    with pytest.raises(LawaError, match="503"):
        opened(hub, tmp_path)[30]
    hub.faults.clear()
    trajectory = opened(hub, tmp_path)
    first = {name: size for name, size in hub.sent.items() if "-of-00003" in name}
    assert len(first) == 2 and trajectory.to_fetch([30]) < trajectory.nbytes(30) / 2
    trajectory[30]
    assert {
        name: hub.sent[name] for name in first
    } == first and "model-00003-of-00003.safetensors" in hub.sent


@pytest.mark.parametrize(
    "repo, steps, fault, said",
    [
        (REPO, [0, 15, 25], None, "no revision step15, step25; there are 0, 10, 20, 30, 40"),
        (f"{REPO}@0:40:20x", None, None, "steps must be START:STOP:STRIDE"),
        (
            "EleutherAI/pythia-9b",
            None,
            None,
            "EleutherAI/pythia-9b: no such model, or it needs a token",
        ),
        (REPO, None, Fault("refs", 503), r"the Hub cannot be reached \(503\)"),
        (REPO, None, Fault("tree", 503, 99), r"step\d+: the Hub cannot be reached \(503\)"),
    ],
)
def test_listing_fails_in_one_line(hub, no_waiting, repo, steps, fault, said):
    hub.faults += [fault] if fault else []
    with pytest.raises(LawaError, match=said):
        lab_hub.open_hub(repo, steps, endpoint=hub.url, token=False)


def test_no_server_at_all(tmp_path):
    with pytest.raises(LawaError, match=f"{REPO}: the Hub cannot be reached"):
        lab_hub.open_hub(REPO, endpoint="http://127.0.0.1:9", token=False)


def test_a_token_is_sent_to_the_hub_and_not_beyond(branches, tmp_path):
    with Hub({REPO: branches}, token="hf_test") as hub:
        with pytest.raises(LawaError, match="needs a token"):
            opened(hub, tmp_path)
        trajectory = opened(hub, tmp_path, token="hf_test")
        states = list(lawa_core.sweep(trajectory, {"run": newest()}, on_disk=False))
        assert len(states) == 5  # its storage refuses tokens


def test_a_full_disk(hub, tmp_path, monkeypatch):
    trajectory = opened(hub, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(
        LawaError,
        match=r"step0 takes 0.00 GB, .*cache has 0.00 GB left; free some, or choose another folder",
    ):
        trajectory[0]
    monkeypatch.undo()

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trajectory.api, "hf_hub_download", full)
    with pytest.raises(LawaError, match="step0: the disk is full; free some"):
        trajectory[0]
    assert not weights_sent(hub)


def test_code_in_a_bin_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    made = {
        "step1": revision(tmp_path / "step1", 1, "bin"),
        "step2": revision(tmp_path / "step2", 2, "bin"),
    }
    torch.save(
        {"gpt_neox.embed_in.weight": torch.ones(2), "bomb": Bomb()},
        made["step2"] / "pytorch_model.bin",
    )
    with (
        Hub({REPO: made}) as hub,
        pytest.raises(LawaError, match=r"step2/pytorch_model.bin: refused, it holds .*mkdir"),
    ):
        list(lawa_core.sweep(opened(hub, tmp_path), {"run": newest()}, on_disk=False))
    assert not (tmp_path / "ran").exists()


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(
        LawaError, match=r"the Hub needs huggingface_hub: pip install \"lawa-lab\[hub\]\""
    ):
        lab_hub.open_hub(REPO)


def test_hub_names_work_wherever_a_trajectory_does(hub, tmp_path, monkeypatch, capsys):
    local = {"folder": tmp_path / "cache", "endpoint": hub.url, "token": False}
    monkeypatch.setitem(lawa_core.SOURCES, "hub", functools.partial(lab_hub.open_hub, **local))
    assert lawa_core.open_trajectory(f"hub:{REPO}@10:40:10").steps == [10, 20, 30, 40]
    assert lab_hub.main(["average", f"hub:{REPO}@20:40:10", "-o", str(tmp_path / "out")]) == 0
    same_logits(load_hf(tmp_path / "out"), tmp_path / "out", tokens(CONFIG, 20))
    assert lab_hub.main(["average", f"hub:{REPO}@20:45:5", "-o", str(tmp_path / "out2")]) == 2
    assert "no revision step25, step35, step45" in capsys.readouterr().err


# ---- Replays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo, said", [("EleutherAI/pythia-2.8b", 2), ("EleutherAI/pythia-2.8b-deduped", 1), (REPO, 1),
                   ("allenai/OLMo-2-1124-7B", 1), ("nano/other", 0)]
)  # fmt: skip
def test_what_is_known_of_wrong_revisions_is_told(branches, tmp_path, repo, said):
    with Hub({repo: branches}) as hub:
        found = lab_hub.open_hub(repo, [10, 20], tmp_path / "cache", endpoint=hub.url, token=False)
        assert len(found.notes) == said
        told = lawa_core.inspect(found)
    assert told["notes"] == found.notes and [row["step"] for row in told["checkpoints"]] == [10, 20]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, seed in (("train", 0), ("val", 1)):
        np.random.default_rng(seed).integers(0, CONFIG.vocab_size, 999).astype("<u2").tofile(
            folder / f"{split}.bin"
        )
    (folder / "meta.json").write_text(
        json.dumps(
            {
                "name": "noise",
                "vocab_size": CONFIG.vocab_size,
                "train_tokens": 999,
                "val_tokens": 999,
                "val_bytes": 2997,
                "eot_token": 0,
                "tokenizer": "tokenizer.json",
                "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
            }
        )
    )
    return model.open_corpus(folder)


@pytest.mark.parametrize("source", ["hub", "folders"])
def test_replay_is_what_each_average_gives_by_itself(hub, tmp_path, corpus, source):
    trajectory, kept = opened(hub, tmp_path) if source == "hub" else tmp_path / "made", {}
    like = tmp_path / "made" / "step40"

    def each(step, label, state):
        if step == 30:
            kept[label] = tmp_path / label
            write_hf(kept[label], state, json.loads((like / "config.json").read_text()), like)

    rows = replay.replay(
        trajectory, {"lawa": lawa(3, 10)}, corpus, n_blocks=8, each=each, device="cpu"
    )
    assert [(row["step"], row["scheme"]) for row in rows] == [
        (step, label) for step in STEPS for label in ("run", "lawa")
    ]
    losses = {}
    for row in rows:
        state = average(tmp_path / "made", SCHEMES[row["scheme"]], row["step"])
        gpt = load_state(GPT(CONFIG), state)
        losses[row["scheme"]] = model.evaluate(gpt, corpus, 8)
        assert (
            abs(row["loss"] - losses[row["scheme"]].mean()) < 1e-9
            and abs(row["bpb"] * np.log(2) * 3 - row["loss"]) < 1e-9
        )
        assert abs(row["gain"] - (losses["run"] - losses[row["scheme"]]).mean()) < 1e-9
    for folder in kept.values():  # what was kept on the way opens elsewhere
        assert (
            json.loads((folder / "config.json").read_text())["dtype"] == "float16"
            and (folder / "tokenizer.json").exists()
        )
        same_logits(load_hf(folder), folder, tokens(CONFIG, 20))
    assert kept.keys() == {"run", "lawa"}


@pytest.mark.parametrize(
    "change", [{"vocab_size": CONFIG.vocab_size + 1}, {"tokenizer_sha256": "0" * 64}]
)
def test_text_in_other_tokens_is_refused(hub, tmp_path, corpus, change):
    corpus.meta.update(change)
    with pytest.raises(
        LawaError,
        match=r"noise is not in this model's tokens; "
        r"prepare the text again with --tokenizer .*tokenizer.json",
    ):
        replay.replay(opened(hub, tmp_path), {}, corpus, n_blocks=2, device="cpu")
    assert not weights_sent(hub)


def test_an_interrupted_replay_goes_on_where_it_was(hub, tmp_path, corpus):
    def stop(step, label, state):
        """While the run itself is evaluated at step 30: what came before is finished."""
        if step == 30 and label == "lawa":
            raise KeyboardInterrupt

    arguments = {
        "schemes": {"lawa": lawa(2, 10)},
        "corpus": corpus,
        "n_blocks": 4,
        "device": "cpu",
        "cache": tmp_path / "losses.npz",
    }

    def told(rows):
        """Rows without the arrays, which == does not compare as one."""
        return [{key: row[key] for key in row if key not in ("losses", "gains")} for row in rows]

    with pytest.raises(KeyboardInterrupt):
        replay.replay(opened(hub, tmp_path), each=stop, **arguments)
    hub.sent.clear()
    rows = replay.replay(opened(hub, tmp_path), **arguments)
    assert len(rows) == 10 and not any(
        name in hub.sent for name in ("pytorch_model.bin",)
    )  # step 10's: no longer needed
    hub.sent.clear()
    again = replay.replay(opened(hub, tmp_path), **arguments)
    assert told(again) == told(rows) and not weights_sent(hub)
    assert all(
        np.array_equal(one["losses"], other["losses"])
        for one, other in zip(again, rows, strict=True)
    )
    afresh = replay.replay(opened(hub, tmp_path), **arguments | {"cache": None})
    assert told(afresh) == told(rows)


def test_the_bootstrap_over_points_covers_the_mean_of_overlapping_windows():
    """Points as far as a window of five apart are independent: 90% intervals, within reason."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(200):
        noise = np.convolve(rng.normal(size=124), np.ones(5) / 5, mode="valid")  # 120 points
        found = replay.over_points(0.01 + noise, 10, draws=400)
        hits.append(found.low <= 0.01 <= found.high)
    assert 0.78 < np.mean(hits) < 0.96  # blocks are shorter than the whole: a little too narrow
    same = replay.over_points(np.full(40, 0.02), 5)
    assert (same.mean, same.low, same.high) == pytest.approx((0.02, 0.02, 0.02))
    assert same.outcome == "holds" and same.over == "points" and same.n == 40
    assert replay.over_points(np.full(14, 0.02), 5).outcome == "cannot tell"  # under three pieces


def test_steps_saved_are_none_for_the_run_itself_and_bounded_at_its_end():
    steps = np.arange(10, 110, 10)
    loss = 5 - steps / 100 + np.where(steps % 20 == 0, 0.15, 0)  # every other point is noisy
    saved, bound = statistics.steps_saved(steps, loss, loss)
    assert (saved == 0).all() and not bound.any()
    saved, bound = statistics.steps_saved(steps, 5 - steps / 100, 5 - (steps + 25) / 100)
    assert saved[:7] == pytest.approx(25) and not bound[:7].any()
    assert saved[7:] == pytest.approx([20, 10, 0]) and bound[7:].all()
    worse, _ = statistics.steps_saved(steps, 5 - steps / 100, 5 - (steps - 5) / 100)
    assert worse[1:] == pytest.approx(-5)


def replayed(loss, averaged, k=3, spacing=10):
    """Curves of made-up losses, (points, blocks) each."""
    steps = np.arange(1, len(loss) + 1) * spacing
    job = types.SimpleNamespace(
        name="m", points=steps, k=k, spacing=spacing, schemes={"lawa": None},
        trajectory=types.SimpleNamespace(steps=steps.tolist()),
    )
    rows = [
        {"model": "m", "scheme": scheme, "losses": blocks}
        for scheme, values in (("run", loss), ("lawa", averaged))
        for blocks in values
    ]
    return replay.Curves(job, rows)


def test_spikes_are_found_and_their_heights_compared():
    base = np.linspace(4, 3, 41)
    loss = base + 0.001 * np.random.default_rng(0).normal(size=41)
    assert replay.spikes(loss) == []
    loss[[20, 21, 30]] += [0.2, 0.5, 0.1]
    assert replay.spikes(loss) == [(20, 21), (30, 30)]  # points in a row are one spike
    early = base.copy()
    early[[3, 39]] += 1  # where nothing can be told
    assert replay.spikes(early) == []
    blocks = np.array([-0.1, 0, 0.1])
    averaged = base.copy()
    averaged[22] += 0.25  # in the spike's window, after its top
    averaged[25] += 0.9  # beyond it
    curves = replayed(loss[:, None] + blocks, averaged[:, None] + blocks)
    (top, last, found), (_, _, other) = curves.heights()
    assert (top, last) == (21, 22) and found.over == "blocks" and found.n == 3
    rise = loss[21] - (loss[18] + loss[19]) / 2
    assert found.mean == pytest.approx(rise - (averaged[22] - (averaged[18] + averaged[19]) / 2))
    assert other.outcome == "holds" and curves.window == 3


def test_gains_and_the_points_that_have_a_full_window():
    rng = np.random.default_rng(1)
    loss = 3 + rng.normal(size=(12, 8)) * 0.1
    curves = replayed(loss, loss - 0.05, k=4)
    assert curves.full.tolist() == list(range(3, 12))
    assert [found.outcome for found in curves.gains()] == ["holds"] * 12
    assert curves.mean_gain().mean == pytest.approx(0.05) and curves.mean_gain().n == 9
    assert curves.mean_gain("run", "lawa").mean == pytest.approx(-0.05)
    assert curves.near(0.5, 120) == 5 and curves.near(1, 200) is None
    assert replayed(loss[:3], loss[:3], k=4).mean_gain() is None


def test_answers_are_compared_document_by_document():
    about = {"model": "m", "step": 10, "task": "t"}
    right = {"run": [0, 0, 1, 1] * 25, "lawa": [0, 1, 1, 1] * 25, "ema": [0, 0, 1, 1] * 25}
    told = [about | {"scheme": scheme, "documents": one} for scheme, one in right.items()]
    (found,) = replay.better_answers(told)
    assert found["found"].mean == 25 and found["found"].outcome == "holds"
    assert found["found"].n == 100 and found["found"].over == "documents"
    (same,) = replay.better_answers(told, "ema")
    assert same["found"].outcome == "no difference"
    assert replay.better_answers(told, "swa") == []


# ---- Zero-shot and the notebook ------------------------------------------------------------------

def test_zero_shot_is_the_accuracy_of_the_folder(tmp_path, monkeypatch):
    """A task made here: which of two endings is likelier, by the harness and by our own logits."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    revision(tmp_path / "plain", 1)
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    write_hf(
        tmp_path / "hf",
        dict(open_checkpoint(tmp_path / "plain")),
        fields,
        toy_task.save_tokenizer(tmp_path / "tokenizer"),
    )
    items = toy_task.items("cat", "dog", "bird")
    toy_task.save_task(tmp_path / "task", tmp_path / "data.jsonl", items)
    (row,) = replay.zero_shot(tmp_path / "hf", ["toy"], task_path=tmp_path / "task")
    assert row["documents"] and np.mean(row["documents"]) == row["accuracy"]
    gpt, right = load_hf(tmp_path / "hf"), []
    for item in items:
        scores = []
        for ending in item["choices"]:
            words = f"{item['text']} {ending}".split()
            idx = torch.tensor([[toy_task.WORDS.index(word) for word in words]])
            scores.append(
                -gpt.losses(idx[:, :-1], idx[:, 1:])[0, -len(ending.split()) :].sum().item()
            )
        right.append(scores.index(max(scores)) == item["answer"])
    assert row["accuracy"] == np.mean(right) and 0 < row["accuracy"] < 1
    assert abs(row["stderr"] - np.std(right, ddof=1) / 3) < 1e-9  # nine items


def test_zero_shot_without_the_harness(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        LawaError, match=r"zero-shot tasks need lm_eval: pip install \"lawa-lab\[zeroshot\]\""
    ):
        replay.zero_shot(tmp_path, ["sciq"])


def test_the_notebook_replays_a_model_of_the_hub(hub, tmp_path, corpus):
    """Pythia's own path: listed, planned, fetched, averaged, drawn, recorded; nothing trained."""
    papermill = pytest.importorskip("papermill")
    parameters = {
        "model": REPO,
        "steps": "10,40,10",
        "k": 2,
        "spacing": 10,
        "corpus": str(corpus.folder),
        "eval_tokens": 256,
        "endpoint": hub.url,
        "hub_folder": str(tmp_path / "cache"),
        "device": "cpu",
        "store": str(tmp_path / "store"),
        "hours": 40.0,
        "out": str(tmp_path / "out"),
    }
    notebook = ROOT / "notebooks" / "pythia_replay.ipynb"
    made = papermill.execute_notebook(
        notebook,
        tmp_path / "made.ipynb",
        parameters,
        kernel_name="python3",
        cwd=str(tmp_path),
        progress_bar=False,
    )
    printed = "".join(
        output.get("text", "") for cell in made.cells for output in cell.get("outputs", [])
    )
    assert (
        "4 revisions, 0.00 GB to fetch" in printed
        and "pythia-nano: 4 points, 4 to do" in printed
    )
    (path,) = tmp_path.glob("out/pythia_replay*/record.json")
    record = json.loads(path.read_text())
    assert len(record["claims"]) == 6 and "GPU hours" in printed and len(record["figures"]) == 3
    assert "stand-in" not in printed  # claims of a model that was loaded are judged
    assert hub.sent["pytorch_model.bin"] and not any("step0/" in request for request in hub.log)
