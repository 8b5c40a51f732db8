"""The layouts that trainers leave behind: a test for each row of the table in docs/formats.md.

Each makes the layout, with the library itself where it is a requirement of the tests, averages two
checkpoints whose weights are all 1 and all 3, and sees what the row says is refused.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import reference as ref
import torch
from safetensors.torch import load_file, save_file

import lawa_core

PAGE = Path(lawa_core.__file__).parent / "docs" / "formats.md"
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"params": [0]}]}


def S(v):
    return {"w": torch.full((4, 3), float(v))}


def put(path, state):
    """A file of torch.save, of safetensors, or of text, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    elif isinstance(state, str):
        path.write_text(state)
    else:
        torch.save(state, path)


def put_trainer_files(folder):
    put(folder / "optimizer.pt", OPTIMIZER)
    put(folder / "scheduler.pt", {"last_epoch": 1})
    put(folder / "rng_state.pth", {"cpu": torch.get_rng_state()})
    put(folder / "training_args.bin", {"seed": 0})
    put(folder / "trainer_state.json", '{"global_step": 1}')


def fill(module, v):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float(v))


def value(state):
    """The one value that all its tensors have everywhere."""
    values = {x for tensor in state.values() for x in tensor.float().flatten().tolist()}
    assert len(values) == 1
    return values.pop()


def average(*words):
    """(exit status, stdout, stderr) of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = lawa_core.main(["average", *map(str, words)])
        except SystemExit as end:  # argparse ends so
            status = end.code
    return status, out.getvalue(), err.getvalue()


def written(out, *words):
    """Where the average of what is given was written to."""
    status, _, said = average(*words, "-o", out)
    assert status == 0, said
    return out


def mean(made, *words):
    return value(load_file(written(made / "mean.safetensors", *words)))


def refusal(made, *words):
    """The line that says why there is no average."""
    status, _, said = average(*words, "-o", made / "refused.safetensors")
    lines = said.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    assert not (made / "refused.safetensors").exists()
    return lines[0]


@pytest.fixture
def made(tmp_path):
    """A folder for what is written."""
    folder = tmp_path / "made"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


# ---- The page ------------------------------------------------------------------------------------


def tools():
    """The first column of the page's last table, without links."""
    table = PAGE.read_text(encoding="utf-8").split("## Tools")[1]
    rows = re.findall(r"^\| (?!tool )(.+?) \|", table, re.M)
    return [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", row) for row in rows]


def test_every_tool_of_the_page_has_a_test():
    names = ["test_" + re.sub(r"\W+", "_", tool.lower()) for tool in tools()]
    assert len(names) >= 17 and len(set(names)) == len(names)
    assert [name for name in names if name not in globals()] == []


def test_the_steps_of_the_page_are_those_of_the_code(monkeypatch):
    monkeypatch.chdir("/")
    steps = PAGE.read_text(encoding="utf-8").split("## Steps")[1].split("## Weights")[0]
    rows = re.findall(r"^\| (`.+) \| (.+?) \| .+ \|$", steps, re.M)
    assert len(rows) >= 10
    for names, want in rows:
        names = re.findall("`(.+?)`", names)
        wanted = want.split(":")[0].replace(",", "").split("; ")
        if len(wanted) == 1:
            wanted *= len(names)
        assert len(wanted) == len(names), names
        for name, step in zip(names, wanted, strict=True):
            assert lawa_core.step_of(name) == (None if step == "none" else int(step)), name


# ---- Files of torch.save -------------------------------------------------------------------------


def test_nanogpt(run, made):
    for v, step in ((1, 500), (3, 1000)):
        weights = {f"_orig_mod.{name}": tensor for name, tensor in S(v).items()}
        checkpoint = {
            "model": weights,
            "optimizer": OPTIMIZER,
            "model_args": {"n_layer": 1},
            "iter_num": step,
            "best_val_loss": torch.tensor(4.0),
            "config": {"out_dir": "out"},
        }
        put(run / f"ckpt_{step}.pt", checkpoint)
        put(run / {1: "early", 3: "late"}[v] / "ckpt.pt", checkpoint)
    got = torch.load(written(made / "mean.pt", run / "ckpt_500.pt", run / "ckpt_1000.pt"))
    assert value(got["model"]) == 2.0
    assert got["model_args"] == {"n_layer": 1} and got["config"] == {"out_dir": "out"}
    assert got["iter_num"] == 1000 and "optimizer" not in got
    files = [run / "early" / "ckpt.pt", run / "late" / "ckpt.pt"]
    assert "--steps" in refusal(made, *files)
    assert mean(made, *files, "--steps", "500,1000") == 2.0


def test_nanochat(run, made):
    for v, step in ((1, 500), (3, 1000)):
        put(run / "d20" / f"model_{step:06}.pt", S(v))
        put(run / "d20" / f"optim_{step:06}_rank0.pt", OPTIMIZER)
        put(run / "d20" / f"meta_{step:06}.json", '{"step": 1}')
    assert mean(made, run / "d20") == 2.0
    put(run / "d26" / "model_000500.pt", S(5))
    line = refusal(made, run / "d20" / "model_000500.pt", run / "d26" / "model_000500.pt")
    assert "model_000500.pt" in line


def test_timm(run, made):
    for v, epoch in ((1, 8), (3, 12)):
        checkpoint = {
            "epoch": epoch,
            "arch": "resnet50",
            "optimizer": OPTIMIZER,
            "version": 2,
            "args": argparse.Namespace(model="resnet50"),
            "state_dict": S(v),
            "state_dict_ema": S(10 * v),
            "metric": 0.5,
        }
        for name in (f"checkpoint-{epoch}", "last", "model_best"):
            put(run / f"{name}.pth.tar", checkpoint)
    status, said, _ = average(run, "-o", made / "mean.safetensors")
    assert status == 0 and "left out: " in said and "state_dict_ema" in said
    assert value(load_file(made / "mean.safetensors")) == 2.0
    assert mean(made, run, "--key", "state_dict_ema") == 20.0
    put(run / "recovery-3-500.pth.tar", checkpoint)
    assert "recovery-3-500.pth.tar" in refusal(made, run)
    assert mean(made, run / "checkpoint-*.pth.tar") == 2.0


def test_fairseq(run, made):
    names = ("checkpoint_1_500", "checkpoint_2_1000", "checkpoint_best", "checkpoint_last")
    for v, name in zip((1, 3, 5, 7), names, strict=True):
        checkpoint = {
            "args": None,
            "cfg": {"task": "lm"},
            "model": S(v),
            "optimizer_history": [{"num_updates": 500}],
            "extra_state": {"epoch": 1},
            "last_optimizer_state": OPTIMIZER,
        }
        put(run / f"{name}.pt", checkpoint)
    assert mean(made, run) == 2.0
    put(run / "checkpoint1.pt", checkpoint)
    line = refusal(made, run)
    assert "checkpoint1.pt" in line and "checkpoint_1_500.pt" in line
    assert mean(made, run / "checkpoint_*_*.pt") == 2.0
    put(run / "epochs" / "checkpoint1.pt", S(1))
    put(run / "epochs" / "checkpoint2.pt", S(3))
    assert mean(made, run / "epochs") == 2.0


def test_espnet(run, made):
    for v, name in ((1, "9epoch"), (3, "10epoch"), (5, "valid.acc.ave_10best")):
        put(run / f"{name}.pth", S(v))
    put(run / "checkpoint.pth", {"model": S(7), "optimizers": [OPTIMIZER], "reporter": {}})
    (run / "latest.pth").symlink_to("10epoch.pth")
    (run / "valid.acc.best.pth").symlink_to("9epoch.pth")
    assert mean(made, run) == 2.0
    assert mean(made, run / "*epoch.pth") == 2.0
    assert "valid.acc.ave_10best.pth" in refusal(made, run / "*.pth")


def test_lightning(run, made):
    """Its callback WeightAveraging stores averages as state_dict: the run's weights are wanted."""
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4, 3))

        def training_step(self, batch, index):
            return self.w.sum()  # so that each step of SGD takes away 1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run,
            callbacks=[
                callbacks.ModelCheckpoint(run, every_n_train_steps=1, save_top_k=-1),
                callbacks.WeightAveraging(),
            ],
        )
        trainer.fit(Net(), torch.utils.data.DataLoader(range(3)))
    saved = [f"epoch=0-step={step}.ckpt" for step in (1, 2, 3)]
    assert sorted(path.name for path in run.glob("*.ckpt")) == saved
    stored = torch.load(run / saved[2], weights_only=True)
    assert value(stored["current_model_state"]) == -3.0 and value(stored["state_dict"]) == -2.0
    assert mean(made, run, "-k", 2) == -2.5
    shutil.copy(run / saved[2], run / "last.ckpt")
    assert mean(made, run, "-k", 2) == -2.5
    shutil.copy(run / saved[2], run / "epoch=0-step=3-v1.ckpt")
    assert "epoch=0-step=3-v1.ckpt" in refusal(made, run)


# ---- Folders for each step, with a file of torch.save in them ------------------------------------


def test_deepspeed(run, made):
    for v, step in ((1, 500), (3, 1000)):
        folder = run / f"global_step{step}"
        states = {"module": S(v), "buffer_names": [], "optimizer": None, "global_steps": step}
        put(folder / "mp_rank_00_model_states.pt", states)
        shard = {"optimizer_state_dict": {"fp32_flat_groups": [torch.ones(12)]}}
        put(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", shard)
    put(run / "latest", "global_step1000")
    assert mean(made, run) == 2.0
    optimizer = run / "global_step500" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert "optim_states" in refusal(made, optimizer)
    put(run / "global_step1000" / "mp_rank_01_model_states.pt", states)
    assert "mp_rank_0" in refusal(made, run)
    assert "mp_rank_0" in refusal(made, run / "*" / "mp_rank_00_model_states.pt")
    for ranks in (1, 2):
        zero3 = run / f"zero3 on {ranks}"
        for rank in range(ranks):
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            for step in (500, 1000):
                put(zero3 / f"global_step{step}" / name, {"module": {"w": torch.empty(0)}})
        assert "zero_to_fp32" in refusal(made, zero3)


def test_megatron(run, made):
    for v, step in ((1, 500), (3, 1000)):
        embedding = {"word_embeddings": {"weight": S(v)["w"]}}
        checkpoint = {
            "args": argparse.Namespace(num_layers=1),
            "checkpoint_version": 3.0,
            "iteration": step,
            "model": {"language_model": {"embedding": embedding, "encoder": S(v)}},
            "optimizer": {"optimizer": OPTIMIZER},
            "opt_param_scheduler": {"num_steps": step},
            "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
        }
        put(run / f"iter_{step:07}" / "mp_rank_00" / "model_optim_rng.pt", checkpoint)
    put(run / "latest_checkpointed_iteration.txt", "1000")
    state = load_file(written(made / "mean.safetensors", run))
    assert value(state) == 2.0
    assert sorted(state) == [
        "language_model.embedding.word_embeddings.weight",
        "language_model.encoder.w",
    ]
    for step in (500, 1000):
        rank = run / f"iter_{step:07}" / "mp_rank_01"
        put(rank / "model_optim_rng.pt", checkpoint)
    assert "mp_rank_0" in refusal(made, run)


def test_megatron_distributed(run, made):
    """Its format torch_dist: names are flat, the optimizer's among them."""
    for v, step in ((1, 500), (3, 1000)):
        state = {
            "decoder.w": S(v)["w"],
            "optimizer.state.exp_avg.decoder.w": torch.ones(4, 3),
            "rng_state/shard_0_1": io.BytesIO(b"rng"),
        }
        ref.write_distributed(run / f"iter_{step:07}", state)
        put(run / f"iter_{step:07}" / "common.pt", {"iteration": step})
        put(run / f"iter_{step:07}" / "metadata.json", '{"sharded_backend": "torch_dist"}')
    state = load_file(written(made / "mean.safetensors", run))
    assert sorted(state) == ["decoder.w"] and value(state) == 2.0


def test_olmo(run, made):
    for v, step in ((1, 500), (3, 1000)):
        folder = run / f"step{step}-unsharded"
        put(folder / "model.pt", S(v))
        put(folder / "optim.pt", OPTIMIZER)
        put(folder / "train.pt", {"global_step": step, "rng": {"torch": torch.get_rng_state()}})
        put(folder / "config.yaml", "model: {}")
        put(run / f"stage1-step{step}-tokens5B" / "model.safetensors", S(10 * v))
    (run / "latest-unsharded").symlink_to("step1000-unsharded")
    assert mean(made, run / "*00-unsharded") == 2.0
    assert mean(made, run / "stage1-*") == 20.0
    for folder in run.glob("stage1-*"):
        shutil.rmtree(folder)
    assert mean(made, run) == 2.0
    for step in (500, 1000):
        for rank in (0, 1):
            put(run / "sharded" / f"step{step}" / f"rank{rank}.pt", {"model": S(1)})
    assert "rank0" in refusal(made, run / "sharded")


def test_olmo_core(run, made):
    for v, step in ((1, 500), (3, 1000)):
        folder = run / f"step{step}"
        state = {"model": S(v), "optim": {"state.w.exp_avg": torch.ones(4, 3)}}
        ref.write_distributed(folder / "model_and_optim", state)
        put(folder / "train" / "rank0.pt", {"global_step": step, "rng": torch.get_rng_state()})
        put(folder / "config.json", "{}")
    assert mean(made, run) == 2.0


def test_litgpt(run, made):
    for v, name in ((1, "step-00000500"), (3, "step-00001000"), (5, "final")):
        checkpoint = {"model": S(v), "optimizer": OPTIMIZER, "iter_num": 8, "step_count": 2}
        put(run / name / "lit_model.pth", checkpoint)
        put(run / name / "hyperparameters.yaml", "seed: 1")
        put(run / name / "model_config.yaml", "name: pythia-14m")
    assert mean(made, run) == 2.0
    files = [run / name / "lit_model.pth" for name in ("step-00001000", "final")]
    assert "final" in refusal(made, *files)
    assert mean(made, *files, "--steps", "1000,1500") == 4.0


# ---- Distributed checkpoints ---------------------------------------------------------------------


def test_fsdp(run, made):
    for v, step in ((1, 500), (3, 1000)):
        folder = run / "sharded" / f"checkpoint-{step}"
        ref.write_distributed(folder / "pytorch_model_fsdp_0", {"model": S(v)})
        ref.write_distributed(
            folder / "optimizer_0", {"optimizer": {"state.w.exp_avg": torch.ones(2)}}
        )
        put_trainer_files(folder)
        put(run / "full" / f"checkpoint-{step}" / "pytorch_model_fsdp.bin", S(v))
        for rank in (0, 1):
            name = f"pytorch_model_fsdp_rank{rank}.bin"
            put(run / "local" / f"checkpoint-{step}" / name, S(v))
    assert mean(made, run / "sharded") == 2.0
    assert mean(made, run / "full") == 2.0
    assert "rank0" in refusal(made, run / "local")


@pytest.mark.parametrize("under", ["top", "model"])
def test_torchtitan(under, run, made):
    """Newer versions save the model's tensors at the top, older ones under `model`."""
    for v, step in ((1, 500), (3, 1000)):
        state = {
            "optimizer": {"state.w.exp_avg": torch.ones(4, 3), "param_groups.w.lr": 0.1},
            "lr_scheduler": {"last_epoch": step},
            "dataloader": {"dp_rank_0": b"state"},
            "train_state": {"step": torch.tensor(step), "log_steps": io.BytesIO(b"steps")},
        }
        if under == "top":
            state |= S(v)
        else:
            state["model"] = S(v)
        ref.write_distributed(run / "checkpoint" / f"step-{step}", state)
    assert mean(made, run / "checkpoint") == 2.0
    assert "nothing" in refusal(made, run / "checkpoint", "--key", "nothing")


# ---- Hugging Face folders ------------------------------------------------------------------------


def test_transformers_trainer(run, made):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    for v, step, size in ((1, 500, "5GB"), (3, 1000, 600), (5, None, "5GB")):
        folder = run if step is None else run / f"checkpoint-{step}"
        fill(model, v)
        model.save_pretrained(folder, max_shard_size=size)
        put_trainer_files(folder)
    output = written(made / "mean", run)
    assert value(transformers.GPT2LMHeadModel.from_pretrained(output).state_dict()) == 2.0
    files = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    assert not files & {"model.safetensors.index.json", "trainer_state.json", "optimizer.pt"}
    part = next((run / "checkpoint-1000").glob("model-00001-of-*.safetensors"))
    assert part.name in refusal(made, part)


def test_accelerate(run, made):
    accelerate = pytest.importorskip("accelerate")
    naming = accelerate.utils.ProjectConfiguration(run, automatic_checkpoint_naming=True)
    accelerator = accelerate.Accelerator(cpu=True, project_config=naming)
    net = torch.nn.Linear(3, 1)
    net, _ = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    for v in (1, 3):
        fill(net, v)
        accelerator.save_state()
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["checkpoint_0", "checkpoint_1"]
    assert mean(made, run / "checkpoints") == 2.0
    for v, name in ((1, "step_500"), (3, "step_1000"), (5, "epoch_1")):
        put(run / "out" / name / "pytorch_model.bin", S(v))
    line = refusal(made, run / "out")
    assert "step_500" in line and "epoch_1" in line and "--step-regex" in line
    assert mean(made, run / "out" / "step_*") == 2.0


def test_diffusers(run, made):
    name = "diffusion_pytorch_model.safetensors"
    for v, step in ((1, 500), (3, 1000)):
        folder = run / f"checkpoint-{step}"
        put(folder / "unet" / name, S(v))
        put(folder / "unet" / "config.json", '{"_class_name": "UNet2DConditionModel"}')
        put(folder / "optimizer.bin", OPTIMIZER)
        put(folder / "scheduler.bin", {"last_epoch": step})
        put(folder / "random_states_0.pkl", {"torch_manual_seed": torch.get_rng_state()})
        lora = run / "lora" / folder.name / "pytorch_lora_weights.safetensors"
        put(lora, {"unet.lora_A.weight": torch.full((2, 3), float(v))})
    assert mean(made, run / "lora") == 2.0
    shutil.rmtree(run / "lora")
    assert mean(made, run) == 2.0
    for step in (500, 1000):
        put(run / f"checkpoint-{step}" / "text_encoder" / "model.safetensors", S(9))
    line = refusal(made, run)
    assert "unet" in line and "text_encoder" in line and "*" in line
    assert mean(made, run / "checkpoint-*" / "unet") == 2.0


def test_peft(run, made):
    for v, step in ((1, 500), (3, 1000)):
        folder = run / f"checkpoint-{step}"
        factors = {"lora_A.weight": torch.full((2, 3), float(v))}
        factors["lora_B.weight"] = torch.full((4, 2), float(v))
        put(folder / "adapter_model.safetensors", factors)
        put(folder / "adapter_config.json", '{"peft_type": "LORA", "r": 2}')
        put_trainer_files(folder)
    output = written(made / "mean", run)
    assert value(load_file(output / "adapter_model.safetensors")) == 2.0
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    assert not (output / "model.safetensors").exists()
    assert not (output / "trainer_state.json").exists()
    wider = {"lora_A.weight": torch.ones(5, 3), "lora_B.weight": torch.ones(4, 5)}
    put(run / "checkpoint-1500" / "adapter_model.safetensors", wider)
    assert "lora_A.weight" in refusal(made, run)


def test_mergekit(run, made):
    folders = [run / "linear-a", run / "linear-b"]
    for v, folder in zip((1, 3), folders, strict=True):
        parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        for name, part in parts.items():
            put(folder / part, {name: S(v)["w"]})
        index = {"metadata": {"mergekit_version": "0.1"}, "weight_map": parts}
        put(folder / "model.safetensors.index.json", json.dumps(index))
        put(folder / "config.json", '{"model_type": "llama"}')
        put(folder / "mergekit_config.yml", "merge_method: linear")
    line = refusal(made, *folders)
    assert "linear-a" in line and "linear-b" in line and "--steps" in line
    assert mean(made, *folders, "--steps", "1,2") == 2.0
