"""Folders as real training leaves them: weights among other things, several files that could be
meant, formats that are none, jobs that meet each other, and odd tensors."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference as ref
import torch
from torch import nn

import lawa_core
from lawa_core import EMA, LAWA, SWA, LawaError, average_files, lawa, open_checkpoint

SCRIPT = Path(lawa_core.__file__)
STEPS = (100, 200, 300)
ADAM = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3}]}


def S(value):
    return {"w": torch.full((4, 3), float(value))}


def drawn(step):
    """A checkpoint of random weights, others at every step."""
    rng = torch.Generator().manual_seed(step)
    return {"w": torch.randn(4, 3, generator=rng), "h.0.b": torch.randn(5, generator=rng)}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        ref.write_safetensors(path, content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        torch.save(content, path)
    return path


def put_run(folder, make, pattern="ckpt_{}.pt", steps=STEPS):
    """A checkpoint `make(step)` at every step; a pattern without a suffix is a distributed one."""
    write = put if Path(pattern).suffix else ref.write_distributed
    return [write(folder / pattern.format(step), make(step)) for step in steps]


def assert_mean(got, states):
    """Every tensor of `got` is the mean of the states in double precision, rounded once."""
    assert set(got) == set(states[-1])
    for name, newest in states[-1].items():
        want = torch.stack([state[name].double() for state in states]).mean(0)
        assert got[name].dtype == newest.dtype, name
        assert got[name].shape == newest.shape, name
        assert torch.allclose(got[name].double(), want, rtol=2**-23, atol=1e-12), name


def one_line(err):
    """The error that `err` is: exactly one line."""
    assert "Traceback" not in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


@pytest.fixture
def command(capsys, tmp_path):
    """The command line in this process, in four calls."""
    result = tmp_path / "average.safetensors"

    def run(*args):
        """-> exit status, stdout, stderr"""
        capsys.readouterr()
        status = lawa_core.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    def good(*args):
        """-> all that it says"""
        status, out, err = run(*args)
        assert status == 0, err
        assert "Traceback" not in err
        return out + err

    def mean(*args):
        """-> the tensors that `lawa average` writes, read by hand"""
        result.unlink(missing_ok=True)
        good("average", *args, "-o", result)
        return ref.read_safetensors(result)[0]

    def refused(*args, status=2):
        """-> the line"""
        got, out, err = run(*args)
        assert got == status, (got, out, err)
        return one_line(err)

    def no_mean(*args):
        """-> the line with which `lawa average` refuses, writing nothing"""
        result.unlink(missing_ok=True)
        line = refused("average", *args, "-o", result)
        assert not result.exists()
        return line

    return SimpleNamespace(
        run=run, good=good, mean=mean, refused=refused, no_mean=no_mean, out=result
    )


# ------------------------------------------------------------------ weights among other things

LAYOUTS = pytest.mark.parametrize("pattern", ["ckpt_{}.pt", "step{}"], ids=["torch", "dcp"])


@LAYOUTS
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_are_found_under_their_usual_names(key, pattern, command, tmp_path):
    optimizer = {"exp_avg": torch.ones(3)}
    put_run(tmp_path / "run", lambda s: {key: drawn(s), "optimizer": optimizer}, pattern)
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


@LAYOUTS
def test_weights_are_found_at_the_top(pattern, command, tmp_path):
    optimizer = {"exp_avg": torch.ones(3)}
    put_run(tmp_path / "run", lambda s: {**drawn(s), "optimizer": optimizer}, pattern)
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


def test_the_current_weights_win_over_a_running_average(command, tmp_path):
    """With Lightning's WeightAveraging, state_dict holds the average."""

    def make(step):
        averaging = {"n_averaged": torch.tensor(step)}
        return {
            "state_dict": S(1e6),
            "current_model_state": drawn(step),
            "averaging_state": averaging,
        }

    put_run(tmp_path / "run", make, "step={}.ckpt")
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


@LAYOUTS
def test_two_groups_of_weights_ask_for_a_key(pattern, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"model": drawn(s), "module": S(s)}, pattern)
    line = command.no_mean(tmp_path / "run")
    assert "--key" in line and "model" in line and "module" in line
    assert_mean(command.mean(tmp_path / "run", "--key", "model"), [drawn(s) for s in STEPS])
    assert_mean(command.mean(tmp_path / "run", "--key", "module"), [S(s) for s in STEPS])


def test_a_group_without_tensors_is_no_group_of_weights(command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"model": drawn(s), "state_dict": {}, "module": "net"})
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


@LAYOUTS
def test_an_unknown_group_is_offered_as_the_key(pattern, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"net": drawn(s), "epoch": s}, pattern)
    assert "--key net" in command.no_mean(tmp_path / "run")
    assert_mean(command.mean(tmp_path / "run", "--key", "net"), [drawn(s) for s in STEPS])


@LAYOUTS
def test_several_unknown_groups_are_listed(pattern, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"generator": drawn(s), "critic": S(s)}, pattern)
    line = command.no_mean(tmp_path / "run")
    assert "generator" in line and "critic" in line and "--key" in line


def test_another_group_beside_tensors_at_the_top_is_not_dropped(command, tmp_path):
    put_run(tmp_path / "run", lambda s: {**drawn(s), "decoder": S(s)})
    line = command.no_mean(tmp_path / "run")
    assert "decoder" in line and "--key" in line
    everything = [{**drawn(s), "decoder.w": S(s)["w"]} for s in STEPS]
    assert_mean(command.mean(tmp_path / "run", "--key", "."), everything)


@LAYOUTS
def test_nested_dictionaries_are_flattened(pattern, command, tmp_path):
    def make(step):
        weights = drawn(step)
        return {"model": {"lm": {"emb": weights["w"], "out": {"b": weights["h.0.b"]}}}}

    put_run(tmp_path / "run", make, pattern)
    flat = [{"lm.emb": drawn(s)["w"], "lm.out.b": drawn(s)["h.0.b"]} for s in STEPS]
    assert_mean(command.mean(tmp_path / "run"), flat)


@LAYOUTS
def test_a_key_is_a_path(pattern, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"agent": {"actor": drawn(s), "critic": S(s)}}, pattern)
    got = command.mean(tmp_path / "run", "--key", "agent.actor")
    assert_mean(got, [drawn(s) for s in STEPS])
    line = command.no_mean(tmp_path / "run", "--key", "agent.nobody")
    assert "agent.nobody" in line


@LAYOUTS
def test_a_key_may_have_dots(pattern, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {"model.ema": S(s), "model.raw": drawn(s)}, pattern)
    got = command.mean(tmp_path / "run", "--key", "model.raw")
    assert_mean(got, [drawn(s) for s in STEPS])


def test_names_twice_among_settings_are_no_names_of_weights(command, tmp_path):
    settings = {"a.b": 1, "a": {"b": 2}, 0: 1, "0": 2}
    put_run(tmp_path / "run", lambda s: {"state_dict": drawn(s), "hyper_parameters": settings})
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])
    twice = {"model": {0: torch.ones(2), "0": torch.zeros(2)}}
    put(tmp_path / "other" / "ckpt_1.pt", twice)
    assert "more than once" in command.no_mean(tmp_path / "other" / "ckpt_1.pt")


def test_one_folder_under_two_names_is_one_checkpoint(command, tmp_path):
    paths = put_run(tmp_path / "run", drawn, "step_{}/x.pt")
    (tmp_path / "run" / "step-200").symlink_to("step_200")
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])
    twice = [*(path.parent for path in paths), paths[1]]
    assert_mean(command.mean(*twice), [drawn(s) for s in STEPS])


@LAYOUTS
def test_what_is_left_out_is_named(pattern, command, tmp_path):
    paths = put_run(tmp_path / "run", lambda s: {"model": drawn(s), "shadow": S(s)}, pattern)
    assert any("shadow" in text for text in open_checkpoint(paths[0]).left_out)
    said = command.good("average", tmp_path / "run", "-o", command.out)
    (line,) = [line for line in said.splitlines() if "left out: " in line]
    assert "shadow" in line
    assert "shadow" in command.good("inspect", tmp_path / "run")
    found = json.loads(command.good("inspect", tmp_path / "run", "--json"))
    assert len(found["checkpoints"]) == len(STEPS)
    assert all("shadow" in json.dumps(entry["left_out"]) for entry in found["checkpoints"])


def test_nothing_left_out_is_said_by_saying_nothing(command, tmp_path):
    paths = put_run(tmp_path / "run", drawn, "ckpt_{}.safetensors")
    assert not open_checkpoint(paths[0]).left_out
    assert "left out" not in command.good("average", tmp_path / "run", "-o", command.out)


TRIANGLE = torch.tril(torch.ones(6, 6))
BUFFERS = {
    "h.0.attn.bias": TRIANGLE.bool().reshape(1, 1, 6, 6),
    "h.1.attn.bias": TRIANGLE.byte().reshape(1, 1, 6, 6),
    "h.2.attn.bias": TRIANGLE.reshape(1, 1, 6, 6),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "h.0.attn.rotary_emb.inv_freq": 1 / 10_000 ** (torch.arange(0, 8, 2) / 8),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("having", [(100,), (300,)], ids=["in the oldest", "in the newest"])
def test_buffers_that_only_some_releases_write_are_left_out(having, file, command, tmp_path):
    def make(step):
        return {**drawn(step), **(BUFFERS if step in having else {})}

    put_run(tmp_path / "run", make, "step{}/" + file)
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])
    left_out = open_checkpoint(tmp_path / "run" / f"step{having[0]}").left_out
    assert all(any(name in text for text in left_out) for name in BUFFERS)


@pytest.mark.parametrize("shape", [(9,), (6, 6), (1, 1, 6, 6)], ids=str)
def test_a_learned_bias_is_no_mask(shape, command, tmp_path):
    def make(step):
        rng = torch.Generator().manual_seed(step)
        return {**drawn(step), "h.0.attn.bias": torch.randn(shape, generator=rng)}

    paths = put_run(tmp_path / "run", make, "step{}/model.safetensors")
    assert_mean(command.mean(tmp_path / "run"), [make(s) for s in STEPS])
    put(paths[0], drawn(100))
    assert "h.0.attn.bias" in command.no_mean(tmp_path / "run")


def test_a_square_of_ones_is_no_mask(command, tmp_path):
    """Only exactly a lower triangle of ones is."""

    def make(step):
        return {**drawn(step), "h.0.attn.bias": torch.ones(6, 6)}

    put_run(tmp_path / "run", make, "step{}/model.safetensors")
    assert_mean(command.mean(tmp_path / "run"), [make(s) for s in STEPS])


# ------------------------------------------------------------------ what is not the whole weights


def test_placeholders_of_sharded_training_are_refused(command, tmp_path):
    empty = {"w": torch.empty(0), "v": torch.empty(0)}
    put_run(tmp_path / "run", lambda s: {"module": {**empty, "seen": torch.tensor(float(s))}})
    assert "zero_to_fp32" in command.no_mean(tmp_path / "run")


PARTS = {
    "hugging face": [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)],
    "deepspeed": [f"mp_rank_0{i}_model_states.pt" for i in (0, 1)],
    "llama": [f"consolidated.0{i}.pth" for i in (0, 1)],
}


@pytest.mark.parametrize("kind", list(PARTS))
def test_one_part_of_a_split_model_is_refused(kind, command, tmp_path):
    for step in STEPS:
        for name in PARTS[kind]:
            put(tmp_path / f"step{step}" / name, S(step))
    line = command.no_mean(tmp_path / "step300" / PARTS[kind][0])
    assert "part" in line.replace("model_states", "") or "split" in line
    firsts = [tmp_path / f"step{step}" / PARTS[kind][0] for step in STEPS]
    assert PARTS[kind][0] in command.no_mean(*firsts)


def test_a_part_without_its_fellows_beside_it_is_refused_by_its_name(command, tmp_path):
    line = command.no_mean(put(tmp_path / PARTS["hugging face"][0], S(1)))
    assert "00001-of-00003" in line


QUANTISED = {
    "gptq": {"q.qweight": torch.ones(4, 2, dtype=torch.int32), "q.scales": torch.ones(2)},
    "bitsandbytes": {"q.weight": torch.ones(4, 2, dtype=torch.int8), "q.SCB": torch.ones(4)},
    "scaled": {"q.weight": torch.ones(4, 2, dtype=torch.int8), "q.weight_scale": torch.ones(4)},
}


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_quantised_weights_are_refused(kind, command, tmp_path):
    put_run(tmp_path / "run", lambda s: {**drawn(s), **QUANTISED[kind]})
    line = command.no_mean(tmp_path / "run")
    assert re.search("quanti[sz]", line) and "q." in line


def test_small_integers_without_scales_are_buffers(command, tmp_path):
    table = torch.tensor([3, 1, 2], dtype=torch.int8)
    put_run(tmp_path / "run", lambda s: {**drawn(s), "table": table + s // 100})
    got = open_checkpoint(tmp_path / "run" / "ckpt_300.pt")["table"]
    command.good("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    out = open_checkpoint(tmp_path / "out.pt")
    assert out["table"].tolist() == got.tolist() == [6, 4, 5]
    assert_mean({n: out[n] for n in drawn(1)}, [drawn(s) for s in STEPS])


# ------------------------------------------------------------------ the right file

INDEX = "model.safetensors.index.json"
ORDER = [
    "model.safetensors",
    INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
]


def put_weights(folder, name, value):
    """The file `name` with weights of `value`; an index with its one shard."""
    if not name.endswith(".index.json"):
        return put(folder / name, S(value))
    stem, suffix = name.removesuffix(".index.json").rsplit(".", 1)
    shard = f"{stem}-00001-of-00001.{suffix}"
    put(folder / shard, S(value))
    return put(folder / name, {"metadata": {}, "weight_map": {"w": shard}})


@pytest.mark.parametrize("first", range(len(ORDER)), ids=ORDER)
def test_of_several_files_the_right_one_wins(first, tmp_path):
    for rank, name in list(enumerate(ORDER))[first:]:
        put_weights(tmp_path / "step7", name, rank)
    assert open_checkpoint(tmp_path / "step7")["w"].tolist() == S(first)["w"].tolist()


def test_an_index_without_its_shards_is_passed_over(command, tmp_path):
    """A copy that left the large files out, then the .bin was made."""
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        put_weights(folder, INDEX, 1e6)
        (folder / "model-00001-of-00001.safetensors").unlink()
        put(folder / "pytorch_model.bin", drawn(step))
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


def test_of_a_tensor_in_two_shards_the_index_says_which(command, tmp_path):
    folder = tmp_path / "checkpoint-100"
    for i in (1, 2):
        put(folder / f"model-0000{i}-of-00002.safetensors", S(i) | {f"own{i}": torch.ones(2) * i})
    for i in (1, 2):
        places = {"own1": 1, "own2": 2, "w": i}
        where = {name: f"model-0000{j}-of-00002.safetensors" for name, j in places.items()}
        put(folder / "model.safetensors.index.json", {"weight_map": where})
        found = open_checkpoint(folder)
        assert torch.equal(found["w"], S(i)["w"]) and set(found) == set(places)
    put(folder / "model.safetensors.index.json", {"weight_map": where | {"lost": where["w"]}})
    assert "lost is not where it says" in command.no_mean(folder)


def test_an_index_without_its_shards_and_no_other_file_is_an_error(command, tmp_path):
    put_weights(tmp_path / "step7", INDEX, 1)
    (tmp_path / "step7" / "model-00001-of-00001.safetensors").unlink()
    assert "model-00001-of-00001.safetensors" in command.no_mean(tmp_path / "step7")


def test_a_run_that_holds_the_final_model_too_is_a_run(command, tmp_path):
    put_run(tmp_path / "run", drawn, "checkpoint-{}/model.safetensors")
    put(tmp_path / "run" / "model.safetensors", S(1e6))
    put(tmp_path / "run" / "config.json", {})
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


@pytest.mark.parametrize("inner", ["inner/model.pt", "any.pth", "inner/deeper/model.safetensors"])
def test_a_step_folder_with_one_checkpoint_below_counts(inner, command, tmp_path):
    put_run(tmp_path / "run", drawn, "step-{}/" + inner)
    assert_mean(command.mean(tmp_path / "run"), [drawn(s) for s in STEPS])


def test_a_step_folder_with_several_checkpoints_below_is_an_error(command, tmp_path):
    for part, make in {"unet": drawn, "text_encoder": S}.items():
        put_run(tmp_path / "run", make, f"checkpoint-{{}}/{part}/model.safetensors")
    line = command.no_mean(tmp_path / "run")
    assert "unet" in line and "text_encoder" in line and "*" in line
    got = command.mean(f"{tmp_path}/run/checkpoint-*/unet")
    assert_mean(got, [drawn(s) for s in STEPS])


KEPT = [
    "adapter_config.json",
    "modeling_net.py",
    "merges.txt",
    "tokenizer.model",
    "bpe.tiktoken",
    "chat_template.jinja",
]
NOT_KEPT = ["trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state.pth"]


def test_an_output_folder_is_a_folder_of_its_kind(command, tmp_path):
    """The weights' own name, everything that loading needs, nothing of the trainer."""
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        put(folder / "adapter_model.safetensors", drawn(step))
        for name in KEPT + NOT_KEPT:
            (folder / name).write_text("{}")
    command.good("average", tmp_path / "run", "-o", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(["adapter_model.safetensors", *KEPT])
    got = ref.read_safetensors(tmp_path / "out" / "adapter_model.safetensors")[0]
    assert_mean(got, [drawn(s) for s in STEPS])


@pytest.mark.parametrize(
    ("name", "stale", "written"),
    [
        ("pytorch_model.bin", None, "model.safetensors"),
        ("pytorch_model.bin", INDEX, "model.safetensors"),
        (INDEX, None, "model.safetensors"),
        ("pytorch_model.bin.index.json", None, "model.safetensors"),
        ("adapter_model.bin", None, "adapter_model.safetensors"),
        ("adapter_model.safetensors", INDEX, "adapter_model.safetensors"),
        ("adapter_model.bin", "pytorch_model.bin.index.json", "adapter_model.safetensors"),
        ("diffusion_pytorch_model.bin", None, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_output_folder_has_the_file_that_its_library_loads(
    name, stale, written, command, tmp_path
):
    """`stale`: an index whose shards are gone."""
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        put_weights(folder, name, step)
        if stale:
            put(folder / stale, {"weight_map": {"w": "gone.bin"}})
    command.good("average", tmp_path / "run", "-o", tmp_path / "out")
    (weights,) = (tmp_path / "out").iterdir()
    assert weights.name == written
    assert_mean(ref.read_safetensors(weights)[0], [S(s) for s in STEPS])


class Tied(nn.Module):
    def __init__(self, step=0):
        super().__init__()
        torch.manual_seed(step)
        self.wte = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.wte.weight


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out"])
def test_names_tied_by_the_header_stay_tied(out, command, tmp_path):
    """safetensors.torch.save_model writes one of two tied names, and the other into the header."""
    from safetensors.torch import load_model, save_model

    for step in STEPS:
        folder = tmp_path / "run" / f"step{step}"
        folder.mkdir(parents=True)
        save_model(Tied(step), str(folder / "model.safetensors"))
        put(folder / "config.json", {})
    command.good("average", tmp_path / "run", "-o", tmp_path / out)
    fresh = Tied()
    if out.endswith(".pt"):
        state = torch.load(tmp_path / out, weights_only=True)
        assert state["wte.weight"].data_ptr() == state["head.weight"].data_ptr()
        fresh.load_state_dict(state)
    else:
        path = tmp_path / out
        if path.is_dir():
            path = path / "model.safetensors"
        assert load_model(fresh, str(path)) == (set(), [])
    states = [Tied(s).state_dict() for s in STEPS]
    assert_mean(fresh.state_dict(), states)


def test_a_trainers_file_keeps_its_structure(command, tmp_path):
    """nanoGPT's sample.py builds the model from model_args."""

    def make(step):
        return {
            "model": drawn(step),
            "optimizer": ADAM,
            "scaler": {"scale": torch.tensor(2.0)},
            "model_args": {"n_layer": 2},
            "iter_num": step,
            "best_val_loss": torch.tensor(3.0),
            "config": {"dataset": "x"},
            "rng_state": torch.get_rng_state(),
        }

    put_run(tmp_path / "run", make)
    command.good("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_mean(got["model"], [drawn(s) for s in STEPS])
    assert got["model_args"] == {"n_layer": 2} and got["config"] == {"dataset": "x"}
    assert got["iter_num"] == 300
    assert not {"optimizer", "scaler", "rng_state"} & set(got)
    again = open_checkpoint(tmp_path / "out.pt")
    assert_mean({name: again[name] for name in again}, [drawn(s) for s in STEPS])


def test_a_lightning_file_keeps_its_structure(command, tmp_path):
    def make(step):
        return {
            "epoch": 3,
            "global_step": step,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": drawn(step),
            "hyper_parameters": {"width": 7},
            "optimizer_states": [ADAM],
            "lr_schedulers": [{"last_epoch": 3}],
        }

    put_run(tmp_path / "run", make, "epoch=3-step={}.ckpt")
    command.good("average", tmp_path / "run", "-o", tmp_path / "out.pt")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_mean(got["state_dict"], [drawn(s) for s in STEPS])
    assert got["hyper_parameters"] == {"width": 7}
    assert got["pytorch-lightning_version"] == "2.5.0" and got["global_step"] == 300
    assert not got.get("optimizer_states") and not got.get("lr_schedulers")


# ------------------------------------------------------------------ search

VALIDATE = """
import json, struct, sys
raw = open(sys.argv[1], "rb").read()
size, = struct.unpack("<Q", raw[:8])
begin = json.loads(raw[8:8 + size])["w"]["data_offsets"][0] + 8 + size
loss = 1 + abs(struct.unpack("<f", raw[begin:begin + 4])[0] - 200)
print(sys.argv[2].replace("LOSS", str(loss)).replace("|", chr(10)))
"""


def validating(folder, text):
    """A command that prints `text` with the loss, 1 where the weights are 200."""
    put_run(folder / "run", S, "ckpt_{}.safetensors")
    (folder / "validate.py").write_text(VALIDATE)
    parts = [sys.executable, str(folder / "validate.py")]
    return f"{shlex.join(parts)} {{}} {shlex.quote(text)}"


def search(tmp_path, text, *more):
    """The arguments of a short search."""
    budget = ["--budget", "4", "--json"]
    return ["search", tmp_path / "run", "--command", validating(tmp_path, text), *budget, *more]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("step 7|LOSS", None),
        ("val loss 9999|val loss LOSS|done in 3 s", r"val loss ([\d.]+)"),
        ("loss: LOSS nats, 12 tokens", r"loss: ([\d.]+) nats"),
    ],
)
def test_search_reads_the_loss(text, pattern, command, tmp_path):
    more = ["--pattern", pattern] if pattern else []
    found = json.loads(command.good(*search(tmp_path, text, *more)))
    assert found["best"].startswith("lawa(k=3")
    assert found["gain"] == pytest.approx(100)
    assert min(trial["loss"] for trial in found["trials"]) == pytest.approx(1)


@pytest.mark.parametrize("text", ["val loss LOSS", "LOSS nats", "LOSS|step 300"])
def test_search_refuses_a_last_line_of_words(text, command, tmp_path):
    status, _, err = command.run(*search(tmp_path, text))
    assert status in (1, 2)
    last = text.rsplit("|", 1)[-1].replace("LOSS", "101.0")
    assert last in one_line(err)


@pytest.mark.parametrize("pattern", ["no such words ([0-9.]+)", "loss (", "loss [0-9.]+"])
def test_search_refuses_a_pattern_that_reads_nothing(pattern, command, tmp_path):
    status, _, err = command.run(*search(tmp_path, "val loss LOSS", "--pattern", pattern))
    assert status in (1, 2)
    assert "pattern" in one_line(err)


# ------------------------------------------------------------------ jobs that meet


OUTPUTS = pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out"])


def meeting(run, out, second):
    """Average `run` into `out`, and call `second` once while that goes on."""
    calls = []

    def progress(*_):
        if not calls:
            calls.append(True)
            calls.append(second())

    average_files(run, {out: (lawa(3), 300)}, progress=progress)
    assert calls
    return calls[1]


def assert_whole(out):
    got = open_checkpoint(out)
    assert_mean({name: got[name] for name in got}, [drawn(s) for s in STEPS])


def put_hf_run(folder):
    put_run(folder, drawn, "step{}/model.safetensors")
    for step in STEPS:
        put(folder / f"step{step}" / "config.json", {})


@OUTPUTS
def test_a_second_job_of_this_process_is_refused(out, tmp_path):
    put_hf_run(tmp_path / "run")

    def second():
        with pytest.raises(LawaError, match="another job") as caught:
            average_files(tmp_path / "run", {tmp_path / out: (lawa(1), 300)})
        return str(caught.value)

    line = meeting(tmp_path / "run", tmp_path / out, second)
    assert "\n" not in line and out in line
    assert_whole(tmp_path / out)
    assert {name.replace(".lawa.json", "") for name in os.listdir(tmp_path)} == {"run", out}


@OUTPUTS
def test_a_second_process_is_refused(out, tmp_path):
    put_hf_run(tmp_path / "run")
    args = ["average", tmp_path / "run", "-k", "1", "-o", tmp_path / out]
    done = meeting(
        tmp_path / "run",
        tmp_path / out,
        lambda: subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True),
    )
    assert done.returncode in (1, 2)
    assert "another job" in one_line(done.stderr)
    assert_whole(tmp_path / out)
    assert {name.replace(".lawa.json", "") for name in os.listdir(tmp_path)} == {"run", out}


def test_two_jobs_with_two_outputs_do_not_meet(tmp_path):
    put_hf_run(tmp_path / "run")
    other = tmp_path / "other.safetensors"
    meeting(
        tmp_path / "run",
        tmp_path / "out.safetensors",
        lambda: average_files(tmp_path / "run", {other: (lawa(3), 300)}),
    )
    assert_whole(tmp_path / "out.safetensors")
    assert_whole(other)


def test_a_killed_job_holds_nothing(tmp_path):
    put_hf_run(tmp_path / "run")
    out = tmp_path / "out.safetensors"
    code = f"""
import os, lawa_core
def die(*_):
    os.kill(os.getpid(), {int(signal.SIGKILL)})
lawa_core.average_files({str(tmp_path / "run")!r}, {{{str(out)!r}: (lawa_core.lawa(3), 300)}},
    progress=die)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    average_files(tmp_path / "run", {out: (lawa(3), 300)})
    assert_whole(out)
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "run"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    """One job after another writes the mean of all or the newest alone; a thread reads."""

    def make(step):
        return {"w": torch.full((1 << 14,), float(step))}

    put_run(tmp_path / "run", make, "ckpt_{}.safetensors")
    out = tmp_path / "out.safetensors"
    average_files(tmp_path / "run", {out: (lawa(3), 300)})
    stop, seen, wrong = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                values = set(ref.read_safetensors(out)[0]["w"].tolist())
            except Exception as error:
                values = {repr(error)}
            seen.update(values)
            if len(values) != 1:
                wrong.append(values)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(20):
            average_files(tmp_path / "run", {out: (lawa(1 + 2 * (number % 2)), 300)})
    finally:
        stop.set()
        reader.join()
    assert not wrong and seen <= {200.0, 300.0}


@pytest.mark.parametrize("name", ["avg.safetensor", "avg.gguf", "avg.npz"])
def test_an_output_of_no_known_kind_is_refused(name, command, tmp_path):
    put_run(tmp_path / "run", drawn, "ckpt_{}.safetensors")
    assert name in command.refused("average", tmp_path / "run", "-o", tmp_path / name)
    assert os.listdir(tmp_path) == ["run"]


def test_a_full_disk_under_a_pt_is_one_line(command, tmp_path, monkeypatch):
    put_run(tmp_path / "run", drawn, "ckpt_{}.pt")

    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file "
            "data/0: file write failed\nframe #0: c10::ThrowEnforceNotMet(char const*, int)\n"
        )

    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "out.pt"
    assert "out.pt" in command.refused("average", tmp_path / "run", "-o", out, status=1)
    assert os.listdir(tmp_path) == ["run"]


# ------------------------------------------------------------------ odd tensors, no traceback

EYE = torch.eye(3)
ODD = {
    "sparse": lambda s: {"w": (EYE * s).to_sparse()},
    "sparse rows": lambda s: {"w": (EYE * s).to_sparse_csr()},
    "meta": lambda s: {"w": torch.empty(3, device="meta")},
    "nested": lambda s: {"w": torch.nested.nested_tensor([torch.ones(2) * s, torch.ones(3)])},
    "complex": lambda s: {"w": torch.tensor([1 + 2j, 3 - 1j]) * s},
    "float8": lambda s: {"w": torch.tensor([1.0, -2.0]).mul(s / 100).to(torch.float8_e4m3fn)},
    "conjugate": lambda s: {"w": (torch.tensor([1 + 2j, 3 - 1j]) * s).conj()},
    "negative view": lambda s: {"w": torch.tensor([[1 + 2j, 3 - 1j]]).mul(s).conj().imag},
    "bool": lambda s: {"w": torch.tensor([True, False])},
    "keys that are numbers": lambda s: {0: torch.ones(3) * s, 1: torch.ones(2) * s},
    "keys that are tuples": lambda s: {("a", 1): torch.ones(3) * s},
    "an empty key": lambda s: {"": torch.ones(3) * s},
    "a number and its text": lambda s: {0: torch.ones(3) * s, "0": torch.ones(3) * s + 1},
    "a dotted and a nested name": lambda s: {
        "model": {"a.b": torch.ones(3) * s, "a": {"b": torch.ones(3) * s + 1}}
    },
    "metadata": lambda s: {"__metadata__": torch.ones(3) * s, "v": torch.ones(2) * s},
    "surrogate": lambda s: {"\ud800": torch.ones(3) * s},
    "line break": lambda s: {"a\nb": torch.ones(3) * s, "a": "\n"},
    "a list of tensors": lambda s: {"w": torch.ones(3) * s, "more": [torch.ones(2) * s]},
    "a storage": lambda s: {"w": torch.ones(3) * s, "raw": torch.ones(2).untyped_storage()},
    "a tensor alone": lambda s: torch.ones(3) * s,
    "a number alone": lambda s: s,
    "nothing": lambda s: None,
}


def flat(tree, path=()):
    """{dotted name: [its tensors]}; two paths may make one name."""
    if isinstance(tree, torch.Tensor):
        return {".".join(map(str, path)): [tree]}
    found = {}
    if isinstance(tree, dict):
        for key, value in tree.items():
            for name, tensors in flat(value, (*path, key)).items():
                found.setdefault(name, []).extend(tensors)
    return found


def dense(tensor):
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def assert_odd_mean(out, make, said):
    """Every tensor of the average is the mean, and every tensor of the checkpoint is in it or is
    named."""
    got = torch.load(out, weights_only=True) if out.suffix == ".pt" else open_checkpoint(out)
    got = flat(dict(got.items()))
    trees = [make(s) for s in STEPS]
    states = [flat(tree.get("model", tree) if isinstance(tree, dict) else tree) for tree in trees]
    for name, newest in states[-1].items():
        means = got.get(name, got.get(f"model.{name}", []))
        assert len(means) == len(newest) or ("left out" in said and name in said), name
        for place, mean in enumerate(means):
            values = [dense(state[name][place]).to(torch.complex128) for state in states]
            want = values[-1] if newest[place].dtype == torch.bool else sum(values) / len(values)
            close = torch.allclose(dense(mean).to(torch.complex128), want, rtol=2**-3, atol=0)
            if newest[place].dtype != torch.float8_e4m3fn:
                close &= torch.allclose(dense(mean).to(torch.complex128), want, rtol=2**-22, atol=0)
            assert close, name


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_averaged_right_or_refused_in_one_line(kind, suffix, command, tmp_path):
    put_run(tmp_path / "run", ODD[kind])
    out = tmp_path / f"out.{suffix}"
    status, said, err = command.run("average", tmp_path / "run", "-o", out, "--allow", "duplicates")
    if status == 0:
        assert_odd_mean(out, ODD[kind], said + err)
    else:
        assert status == 2, (status, err)
        one_line(err)
        assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.filterwarnings("ignore")
def test_inspect_of_odd_tensors_has_no_traceback(kind, command, tmp_path):
    put_run(tmp_path / "run", ODD[kind])
    status, _, err = command.run("inspect", tmp_path / "run")
    assert status in (0, 1, 2)
    assert not err or one_line(err)


@pytest.mark.parametrize("kind", ["sparse", "sparse rows", "meta", "keys that are numbers"])
def test_a_tensor_that_cannot_be_averaged_is_named(kind, command, tmp_path):
    """Beside one that can: refused or left out, in either case not in silence."""
    put_run(tmp_path / "run", lambda s: {"model": {"fine": torch.ones(2) * s, "odd": ODD[kind](s)}})
    status, said, err = command.run("average", tmp_path / "run", "-o", command.out)
    if status == 0:
        got = ref.read_safetensors(command.out)[0]
        assert got["fine"].tolist() == [200.0, 200.0]
        assert any(name.startswith("odd.") for name in got) or "odd" in said + err
    else:
        assert "odd" in one_line(err)


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_closed_pipe_is_no_traceback(more, tmp_path):
    """`lawa inspect run | head -1`: the reader is gone before the first line is written."""
    put_run(tmp_path / "run", drawn, "ckpt_{}.safetensors")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, SCRIPT, "inspect", tmp_path / "run", *more]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "BrokenPipe" not in done.stderr and "Exception ignored" not in done.stderr
    assert not done.stderr or one_line(done.stderr)


def test_an_output_that_is_closed_is_no_traceback(tmp_path):
    put_run(tmp_path / "run", drawn, "ckpt_{}.safetensors")
    command = shlex.join([sys.executable, str(SCRIPT), "inspect", str(tmp_path / "run")])
    done = subprocess.run(["bash", "-c", f"{command} >&-"], capture_output=True, text=True)
    assert not done.stderr or one_line(done.stderr)


# ------------------------------------------------------------------ what kind of file it is


@pytest.mark.parametrize("name", ["ckpt_7.safetensors", "ckpt_7.pt"])
def test_a_damaged_file_is_to_be_copied_again(name, command, tmp_path):
    path = put(tmp_path / name, drawn(7))
    path.write_bytes(path.read_bytes()[:-50])
    assert "copy it again" in command.no_mean(path)


FORMATS = {
    "ckpt_7.gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "gguf"),
    "ckpt_7.npz": (b"PK\x03\x04" + b"\0" * 64, "npz"),
    "ckpt_7.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "h5"),
    "ckpt_7.msgpack": (b"\x81\xa1w\x01", "msgpack"),
    "ckpt_7.onnx": (b"\x08\x07\x12\x07pytorch", "onnx"),
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_foreign_format_is_named_with_what_to_do(name, command, tmp_path):
    """A tool that converts it, or the checkpoints that it was made from."""
    content, kind = FORMATS[name]
    (tmp_path / name).write_bytes(content)
    line = command.no_mean(tmp_path / name)
    assert kind in line.lower() and "copy it again" not in line
    assert re.search("convert|transformers|save_file|flax|average the", line), line


def test_deepspeeds_optimizer_states_are_named(command, tmp_path):
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path = put(tmp_path / "global_step7" / name, {"optimizer_state_dict": ADAM})
    line = command.no_mean(path)
    assert "zero_to_fp32" in line and "copy it again" not in line


def test_what_is_not_damaged_is_not_to_be_copied_again(command, tmp_path):
    code = put(tmp_path / "ckpt_1.pt", {"model": drawn(1), "trainer": os.system})
    group = put(tmp_path / "ckpt_2.pt", {"net": drawn(2)})
    nothing = put(tmp_path / "ckpt_3.pt", {"epoch": 3})
    text = tmp_path / "ckpt_4.xyz"
    text.write_text("words")
    for path in (code, group, nothing, text, tmp_path / "ckpt_5.pt"):
        assert "copy it again" not in command.no_mean(path)


# ------------------------------------------------------------------ online

ONLINE = {
    "lawa": lambda m: LAWA(m, k=2, spacing=1),
    "ema": lambda m: EMA(m, 0.5, dtype=torch.float64),
    "swa": lambda m: SWA(m),
}
kinds = pytest.mark.parametrize("kind", list(ONLINE))


def step_on(net, online, step):
    """The weights become what `drawn` says of the step."""
    with torch.no_grad():
        for n, tensor in enumerate(net.parameters()):
            rng = torch.Generator().manual_seed(100 * step + n)
            tensor.copy_(torch.randn(tensor.shape, generator=rng))
    online.update(step)
    return {name: tensor.detach().clone() for name, tensor in net.named_parameters()}


class Keeps(nn.Module):
    """A layer beside a state that is no tensor."""

    def __init__(self, extra):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@kinds
def test_complex_parameters_are_refused(kind):
    net = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(LawaError, match="complex"):
        online = ONLINE[kind](net)
        online.update(1)


@kinds
@pytest.mark.parametrize("extra", [{"scale": [1, 2]}, None, torch.ones(2), b"bytes"], ids=repr)
def test_modules_with_an_extra_state_work(extra, kind, tmp_path):
    """Transformer Engine's layers have one."""
    net = Keeps(extra)
    online = ONLINE[kind](net)
    states = [step_on(net, online, step) for step in (1, 2)]
    got = online.average()
    assert_mean({name: got[name] for name in states[0]}, states)
    before = ref.bits(net.layer.weight)
    with online.swapped():
        assert ref.bits(net.layer.weight) == ref.bits(got["layer.weight"])
    assert ref.bits(net.layer.weight) == before
    torch.save(online.state_dict(), tmp_path / "online.pt")
    fresh = ONLINE[kind](Keeps(extra))
    fresh.load_state_dict(torch.load(tmp_path / "online.pt", weights_only=True))
    again = fresh.average()
    assert ref.bits(again["layer.weight"]) == ref.bits(got["layer.weight"])


@kinds
@pytest.mark.parametrize("saved", ["compiled", "plain"])
def test_a_state_moves_between_compiled_blocks_and_plain_ones(saved, kind):
    """torch.compile of a block puts `_orig_mod.` in the middle of names."""

    def build(compiled):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        if compiled:
            net[1] = torch.compile(net[1], backend="eager")
        return net

    first, second = build(saved == "compiled"), build(saved != "compiled")
    online, other = ONLINE[kind](first), ONLINE[kind](second)
    states = [step_on(first, online, step) for step in (1, 2)]
    other.load_state_dict(online.state_dict())
    want = {name.replace("_orig_mod.", ""): tensor for name, tensor in online.average().items()}
    got = {name.replace("_orig_mod.", ""): tensor for name, tensor in other.average().items()}
    assert ref.state_bits(got) == ref.state_bits(want)
    plain = [{n.replace("_orig_mod.", ""): t for n, t in state.items()} for state in states]
    assert_mean(got, plain)


@kinds
def test_inside_swapped_nothing_is_taken_for_the_runs_own(kind):
    net = nn.Linear(3, 2)
    online = ONLINE[kind](net)
    states = [step_on(net, online, step) for step in (1, 2)]
    with online.swapped():
        with pytest.raises(LawaError, match="swapped"):
            online.state_dict()
        with pytest.raises(LawaError, match="swapped"):
            online.update(3)
    assert ref.bits(net.weight) == ref.bits(states[-1]["weight"])
    assert online.state_dict()
    assert_mean(online.average(), states)


# ------------------------------------------------------------------ blends and half-lives


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["-k", 2, "--blend", 0.5], 275.0),
        (["-k", 3, "--blend", 0.5], 250.0),
        (["-k", 3, "--blend", 1], 200.0),
        (["-k", 2, "--blend", 0.5, "--at", 200], 175.0),
        (["--scheme", "swa(start=200)", "--blend", 0.5], 275.0),
        (["--scheme", "ema(half_life=100)"], 225.0),
        (["--scheme", "ema(half_life=50)"], 100 / 16 + 200 * 3 / 16 + 300 * 3 / 4),
        (["--scheme", "ema(half_life=50%)", "--at", 200], 150.0),
    ],
    ids=str,
)
def test_blends_and_half_lives(args, want, command, tmp_path):
    put_run(tmp_path / "run", S, "ckpt_{}.safetensors")
    assert command.mean(tmp_path / "run", *args)["w"].tolist() == S(want)["w"].tolist()


def test_a_blend_is_a_scheme():
    """The share is the average's; the rest is the newest checkpoint's."""
    row = lawa_core.row(lawa_core.blend(0.25, lawa(2)), STEPS, 300)
    assert row == pytest.approx({200: 0.125, 300: 0.875})


@pytest.mark.parametrize(
    "args",
    [
        ["--blend", "nan"],
        ["--blend", "half"],
        ["--scheme", "ema(half_life=0)"],
        ["--scheme", "ema(half_life=-5)"],
        ["--scheme", "ema(half_life=0%)"],
        ["--scheme", "ema(0.9, half_life=500)"],
        ["--scheme", "ema()"],
    ],
    ids=str,
)
def test_a_blend_or_half_life_without_meaning_is_refused(args, command, tmp_path):
    put_run(tmp_path / "run", S, "ckpt_{}.safetensors")
    line = command.no_mean(tmp_path / "run", *args)
    assert re.search("blend|half_life|ema|beta", line)
