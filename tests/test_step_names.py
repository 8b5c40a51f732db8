"""Steps are read from names, never guessed: the names that real tools give their checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lawa_core

# (name, its step, or None where it names none or can be read in more than one way)
NAMES = [
    # nanoGPT has one file, which is written over; nanochat
    ("ckpt.pt", None),
    ("out-shakespeare-char/ckpt.pt", None),
    ("ckpt_200.pt", 200),
    ("model_000500.pt", 500),
    ("base_checkpoints/d20/model_021400.pt", 21400),
    # transformers' Trainer, with and without what lies in its folders; PEFT
    ("checkpoint-500", 500),
    ("out/checkpoint-500/model.safetensors", 500),
    ("out/checkpoint-500/pytorch_model.bin", 500),
    ("out/checkpoint-500/model-00001-of-00003.safetensors", 500),
    ("llama-2-7b-lora/checkpoint-500/adapter_model.safetensors", 500),
    ("pytorch_model_300.bin", 300),
    ("pytorch_model.bin", None),
    ("model.safetensors", None),
    ("model-00001-of-00003.safetensors", None),
    # accelerate, and FSDP through it
    ("checkpoints/checkpoint_3", 3),
    ("step_500", 500),
    ("epoch_2/pytorch_model.bin", 2),
    ("epoch_3/step_500.pt", 500),
    ("checkpoint-500/pytorch_model_fsdp_0", 500),
    ("checkpoint-500/pytorch_model_fsdp_0/.metadata", 500),
    # Lightning
    ("epoch=3-step=500.ckpt", 500),
    ("epoch=0-step=0.ckpt", 0),
    ("epoch=3-step=500-v1.ckpt", 500),
    ("epoch=1-val_loss=0.92.ckpt", 1),
    ("epoch=2-step=1000-val_loss=1.25.ckpt", 1000),
    ("sample-mnist-epoch=02-val_loss=0.32.ckpt", 2),
    ("lightning_logs/version_3/checkpoints/epoch=0-step=100.ckpt", 100),
    ("val_loss=0.92.ckpt", None),
    ("best-checkpoint.ckpt", None),
    ("last.ckpt", None),
    ("last-v1.ckpt", None),
    # DeepSpeed, GPT-NeoX and Pythia
    ("global_step500", 500),
    ("global_step500/mp_rank_00_model_states.pt", 500),
    ("checkpoint-500/global_step500/mp_rank_00_model_states.pt", 500),
    ("global_step500_universal", 500),
    ("mp_rank_00_model_states.pt", None),
    ("pythia-1.4b/step3000", 3000),
    ("pythia-160m-seed3/step143000", 143000),
    # a word glued to what follows it
    ("step_100000acc0.95.pt", 100000),
    ("epoch_100acc0.85.pt", 100),
    ("ckpt_500acc93.1.pt", 500),
    ("step_000500acc_93.pt", 500),
    ("step500rank0.pt", 500),
    ("step_500v2.pt", 500),
    ("epoch3fp16.pt", 3),
    ("500_steps_2B_tokens.pt", 500),
    ("checkpoint-500.00001-of-00003.safetensors", 500),
    # Megatron, Composer
    ("iter_0000500", 500),
    ("iter_0000500/mp_rank_00/model_optim_rng.pt", 500),
    ("latest_checkpointed_iteration.txt", None),
    ("ep3-ba5000-rank0.pt", 5000),
    ("ep0-ba200", 200),
    ("latest-rank0.pt", None),
    # fairseq, ESPnet, icefall, WeNet, OpenNMT
    ("checkpoint3.pt", 3),
    ("checkpoint_3_5000.pt", 5000),
    ("checkpoint_best.pt", None),
    ("checkpoint_last.pt", None),
    ("checkpoint.best_loss_3.25.pt", None),
    ("12epoch.pth", 12),
    ("exp/asr_train_raw_bpe500/12epoch.pth", 12),
    ("valid.acc.ave_10best.pth", None),
    ("valid.loss.best.pth", None),
    ("epoch-30.pt", 30),
    ("epoch-30-avg-15.pt", None),
    ("avg_10.pt", None),
    ("demo-model_step_5000.pt", 5000),
    # timm, detectron2, mmengine, YOLO
    ("checkpoint-12.pth.tar", 12),
    ("output/train/20240102-101112-resnet50-224/checkpoint-12.pth.tar", 12),
    ("recovery-3-500.pth.tar", None),
    ("model_best.pth.tar", None),
    ("model_0004999.pth", 4999),
    ("model_final.pth", None),
    ("iter_40000.pth", 40000),
    ("best_coco_bbox_mAP_epoch_11.pth", None),
    ("epoch10.pt", 10),
    # torchtitan, OLMo, litgpt, torchtune, Llama
    ("checkpoint/step-500", 500),
    ("outputs/checkpoint/step-500/.metadata", 500),
    ("step500-unsharded", 500),
    ("step500-unsharded/model.pt", 500),
    ("latest-unsharded", None),
    ("stage1-step1000-tokens5B", 1000),
    ("stage2-ingredient1-step11931-tokens50B", 11931),
    ("step-00000500/lit_model.pth", 500),
    ("final/lit_model.pth", None),
    ("iter-001000-ckpt.pth", 1000),
    ("epoch_0/model-00001-of-00002.safetensors", 0),
    ("consolidated.00.pth", None),
    # models on the Hub: TinyLlama, Amber, CrystalCoder, SmolLM
    ("TinyLlama-1.1B-intermediate-step-480k-1T", 480_000),
    ("TinyLlama-1.1B-step-50K-105b", 50_000),
    ("ckpt_100", 100),
    ("CrystalCoder_phase1_checkpoint_055500", 55500),
    ("stage1-step-40000", 40000),
    # diffusers and other images, speech, games
    ("checkpoint-500/unet/diffusion_pytorch_model.safetensors", 500),
    ("mymodel-step00000500.safetensors", 500),
    ("mymodel-000003.safetensors", 3),
    ("model010000.pt", 10000),
    ("ema_0.9999_010000.pt", None),
    ("G_10000.pth", 10000),
    ("best_model_10000.pth", None),
    ("rl_model_10000_steps", 10000),
    # TensorFlow, t5x, JoeyNMT, nanotron: bare numbers and older keys
    ("model.ckpt-1000", 1000),
    ("checkpoint_1000000", 1_000_000),
    ("5000.ckpt", 5000),
    ("1000", 1000),
    ("1000/model.safetensors", 1000),
    ("model.3.pt", 3),
    ("model_00500.pt", 500),
    ("model1000.pt", 1000),
    ("gpt2_1000.pt", 1000),
    ("run7/ckpt_12.pt", 12),
    # the ways to write a key and a number
    ("global_step=500.pt", 500),
    ("step.500.pt", 500),
    ("iteration_300.pt", 300),
    ("it_300.pt", 300),
    ("update5000.pt", 5000),
    ("step1k.pt", 1000),
    ("step_1.5M.pt", 1_500_000),
    ("step1e4.pt", 10_000),
    ("100k_steps.pt", 100_000),
    # two of one fineness, or two bare numbers
    ("step_1_step_2.pt", None),
    ("step_1_000.pt", None),
    ("step_1,000.pt", None),
    ("epoch=1-epoch=2.ckpt", None),
    ("model_1_2.pt", None),
    # dates
    ("2024-01-02.pt", None),
    ("model-20240102-101112.pt", None),
    ("20240102T101112.pt", None),
    ("2024-01-02_step500.pt", 500),
    # seeds, rates, batch sizes, metrics, versions
    ("seed_3.pt", None),
    ("seed_3/model.safetensors", None),
    ("seed3/step_500.pt", 500),
    ("model_seed_3_1000.pt", 1000),
    ("lr0.001.pt", None),
    ("lr0.001_1000.pt", 1000),
    ("lr=3e-4-step=500.pt", 500),
    ("bs64.pt", None),
    ("bs64_500.pt", 500),
    ("loss_2.pt", None),
    ("acc91.pt", None),
    ("model_0.92.pt", None),
    ("loss=2.31-step=500.pt", 500),
    ("dropout=0.1-epoch=3.ckpt", 3),
    ("epoch=3-val_loss_epoch=2.ckpt", 3),
    ("epoch=3-max_steps=1000.ckpt", 3),
    ("model-v2.pt", None),
    ("rank_0.pt", None),
    # hashes
    ("3f9a1c2b7e.safetensors", None),
    ("607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors", None),
    ("550e8400-e29b-41d4-a716-446655440000.pt", None),
    ("run-20240102_101112-a1b2c3d4", None),
    # averages and links, and words that only look like them or like a key
    ("ema_500.pt", None),
    ("step500_ema.pt", None),
    ("averaged_500.pt", None),
    ("swa_model.pt", None),
    ("merged_1000.safetensors", None),
    ("soup.safetensors", None),
    ("gemma-500.pt", 500),
    ("wave_500.pt", 500),
    ("blast_500.pt", 500),
    ("samba64_500.pt", 500),
    ("deep3_500.pt", 500),
    ("bait7_500.pt", 500),
]


def S(v):
    return {"w": torch.full((4, 3), float(v))}


def write(folder, names):
    """A checkpoint for each name, whose every weight is 1, 2, ... in the order of the names."""
    paths = [folder / name for name in names]
    for v, path in enumerate(paths, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(S(v), path)
        else:
            torch.save(S(v), path)
    return paths


def lawa(capsys, *args):
    """(exit status, what it said on stderr) of the command."""
    capsys.readouterr()
    try:
        status = lawa_core.main([str(arg) for arg in args])
    except SystemExit as end:  # argparse ends so
        status = end.code
    return status, capsys.readouterr().err


def mean(capsys, out, *args):
    """The one value that all weights of an average have."""
    status, said = lawa(capsys, "average", *args, "-o", out)
    assert status == 0, said
    values = set(load_file(out)["w"].flatten().tolist())
    assert len(values) == 1
    return values.pop()


def refusal(capsys, out, *args):
    """The line that says why there is no average."""
    status, said = lawa(capsys, "average", *args, "-o", out)
    lines = said.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    assert not out.exists()
    return lines[0]


def offers(line):
    return "--steps" in line and "--step-regex" in line


@pytest.fixture
def out(tmp_path):
    return tmp_path / "result" / "mean.safetensors"


@pytest.fixture(autouse=True)
def result_folder(tmp_path):
    (tmp_path / "result").mkdir()


# ---- One name ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), NAMES, ids=[name for name, _ in NAMES])
def test_a_name_gives_its_step(name, step, monkeypatch):
    monkeypatch.chdir("/")  # the folders around a name are read too: here there are none
    assert lawa_core.step_of(name) == step
    assert lawa_core.step_of(Path(name)) == step


def test_no_name_is_tested_twice():
    names = [name for name, _ in NAMES]
    assert len(names) == len(set(names)) >= 70


# ---- All names of a trajectory are read in the same way ------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("step_100.pt", "epoch_3.pt"),
        ("step_100.pt", "checkpoint-200.pt"),
        ("checkpoint-100.pt", "200.pt"),
        ("epoch=1.ckpt", "epoch=2-step=200.ckpt"),
        ("checkpoint3.pt", "checkpoint_3_5000.pt"),  # fairseq: an epoch beside updates
        ("epoch_3.pt", "model_500.pt"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("given", ["folder", "glob", "list"])
def test_a_mixture_is_refused(given, names, tmp_path, out, capsys):
    paths = write(tmp_path / "run", names)
    source = {"folder": [tmp_path / "run"], "glob": [tmp_path / "run" / "*"], "list": paths}[given]
    line = refusal(capsys, out, *source)
    assert all(name in line for name in names) and offers(line)


def test_finer_keys_in_every_name_are_no_mixture(tmp_path):
    write(tmp_path, ["epoch=0-step=50.ckpt", "epoch=1-step=100.ckpt", "epoch=1-step=150.ckpt"])
    assert list(lawa_core.open_trajectory(tmp_path).steps) == [50, 100, 150]


# ---- Names without a reading, and with two -------------------------------------------------------


@pytest.mark.parametrize("name", ["step_1_step_2.pt", "step_1_000.pt"])
@pytest.mark.parametrize("given", ["folder", "list"])
def test_two_readings_are_refused(given, name, tmp_path, out, capsys):
    paths = write(tmp_path / "run", [name, "step_3.pt"])
    line = refusal(capsys, out, *(paths if given == "list" else [tmp_path / "run"]))
    assert name in line and offers(line)


def test_two_bare_numbers_are_refused(tmp_path, out, capsys):
    write(tmp_path / "run", ["model_1_10.pt", "model_1_20.pt"])
    line = refusal(capsys, out, tmp_path / "run")
    assert "model_1_10.pt" in line and "model_1_20.pt" in line and offers(line)


def test_a_folder_passes_over_what_names_no_step(tmp_path, out, capsys):
    run = tmp_path / "run"
    write(run, ["step_10.pt", "step_20.pt", "latest.pt", "ckpt_best.pt", "swa.pt", "final.pt"])
    assert mean(capsys, out, run) == 1.5


@pytest.mark.parametrize("given", ["glob", "list"])
def test_in_a_list_or_glob_no_reading_is_an_error(given, tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["step_10.pt", "step_20.pt", "ckpt_best.pt"])
    source = paths if given == "list" else [tmp_path / "run" / "*.pt"]
    line = refusal(capsys, out, *source)
    assert "ckpt_best.pt" in line and offers(line)


def test_a_list_of_words_is_refused(tmp_path, out, capsys):
    """Their order says nothing: a shell sorts it."""
    paths = write(tmp_path / "run", ["early.pt", "late.pt"])
    line = refusal(capsys, out, *paths)
    assert "early.pt" in line and "late.pt" in line and offers(line)


def test_two_files_of_one_step_are_refused(tmp_path, out, capsys):
    write(tmp_path / "run", ["step_10.pt", "step_20.pt", "step_020.pt"])
    line = refusal(capsys, out, tmp_path / "run")
    assert "step_20.pt" in line and "step_020.pt" in line


def test_a_single_checkpoint_needs_no_step(tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["ckpt.pt"])
    assert mean(capsys, out, *paths) == 1.0


# ---- What all paths have in common is not read ---------------------------------------------------


def test_the_number_of_the_common_parent_is_no_step(tmp_path, out, capsys):
    paths = write(tmp_path / "fresh lab2", ["one.pt", "two.pt"])
    line = refusal(capsys, out, *paths)
    assert "one.pt" in line and "two.pt" in line and offers(line)


@pytest.mark.parametrize("parent", ["fresh lab2", "step_7 lab", "epoch=3", "checkpoint-9/run8"])
@pytest.mark.parametrize("given", ["folder", "glob", "list"])
def test_the_common_parent_does_not_hide_the_names(given, parent, tmp_path):
    run = tmp_path / parent
    paths = write(run, ["1000.pt", "2000.pt", "900.pt"])
    source = {"folder": run, "glob": str(run / "*.pt"), "list": paths}[given]
    trajectory = lawa_core.open_trajectory(source)
    assert list(trajectory.steps) == [900, 1000, 2000]
    assert trajectory[900]["w"][0, 0] == 3.0


@pytest.mark.parametrize("given", ["folder", "glob", "list"])
def test_steps_of_folders_are_read_through_the_file_in_them(given, tmp_path):
    run = tmp_path / "fresh lab2"
    paths = write(run, ["step_9/model.safetensors", "step_10/model.safetensors"])
    source = {"folder": run, "glob": str(run / "*" / "model.safetensors"), "list": paths}[given]
    trajectory = lawa_core.open_trajectory(source)
    assert list(trajectory.steps) == [9, 10]
    assert trajectory[10]["w"][0, 0] == 2.0


# ---- The order given never decides ---------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_the_list_never_decides(order, tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["ckpt_9.pt", "ckpt_100.pt", "ckpt_1000.pt"])
    shuffled = [paths[i] for i in order]
    assert mean(capsys, out, *shuffled, "--weights", "1,3") == 2.75


@pytest.mark.parametrize(
    "names",
    [
        ("9.pt", "10.pt", "100.pt"),
        ("model_00009.pt", "model_00010.pt", "model_00100.pt"),
        ("model.9.pt", "model.10.pt", "model.100.pt"),
        ("model9.pt", "model10.pt", "model100.pt"),
        ("gpt2_9.pt", "gpt2_10.pt", "gpt2_100.pt"),
        ("9/model.safetensors", "10/model.safetensors", "100/model.safetensors"),
    ],
    ids=lambda names: names[0],
)
def test_bare_numbers_are_steps_in_numeric_order(names, tmp_path, out, capsys):
    write(tmp_path / "run", names)
    assert list(lawa_core.open_trajectory(tmp_path / "run").steps) == [9, 10, 100]
    assert mean(capsys, out, tmp_path / "run", "-k", 2) == 2.5


def test_a_metric_in_the_name_is_no_step(tmp_path, out, capsys):
    """The best loss is the smallest number: read as a step, it would be the oldest checkpoint."""
    losses = {1: "0.92", 2: "0.61", 3: "0.44", 4: "0.38"}
    run = tmp_path / "run"
    write(run, [f"epoch={epoch}-val_loss={loss}.ckpt" for epoch, loss in losses.items()])
    assert mean(capsys, out, run, "-k", 2) == 3.5
    assert list(lawa_core.open_trajectory(run).steps) == [1, 2, 3, 4]


# ---- Steps that are said: --steps, --step-regex --------------------------------------------------


def test_steps_are_given_in_the_order_of_the_files(tmp_path, out, capsys):
    late, first, middle = write(tmp_path / "run", ["a.pt", "b.pt", "c.pt"])
    files = (late, first, middle)
    assert mean(capsys, out, *files, "--steps", "300,100,200", "-k", 2) == 2.0
    steps = [300, 100, 200]
    trajectory = lawa_core.open_trajectory([str(path) for path in files], steps=steps)
    assert list(trajectory.steps) == [100, 200, 300]
    assert [trajectory[step]["w"][0, 0].item() for step in steps] == [1.0, 2.0, 3.0]


def test_given_steps_settle_what_the_names_leave_open(tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["step_1_000.pt", "epoch_3.pt", "best.pt"])
    assert mean(capsys, out, *paths, "--steps", "1000,2000,3000", "--weights", "1,3") == 2.75


@pytest.mark.parametrize("steps", ["100", "100,200,300", "100,100", "100,late", ""])
def test_wrong_steps_are_refused(steps, tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["a.pt", "b.pt"])
    refusal(capsys, out, *paths, "--steps", steps)


@pytest.mark.parametrize("given", ["folder", "glob", "list"])
def test_a_step_regex_reads_its_group_in_the_path(given, tmp_path, out, capsys):
    run = tmp_path / "run"
    paths = write(run, ["x_1_foo9_7.pt", "x_1_foo100_5.pt", "x_1_foo20_6.pt"])
    source = {"folder": [run], "glob": [run / "*.pt"], "list": paths}[given]
    assert mean(capsys, out, *source, "--step-regex", r"foo(\d+)", "-k", 2) == 2.5
    found = lawa_core.open_trajectory([str(path) for path in paths], step_regex=r"foo(\d+)").steps
    assert list(found) == [9, 20, 100]


def test_a_step_regex_reads_folders_too(tmp_path):
    paths = write(tmp_path, ["foo9_1/model.safetensors", "foo10_1/model.safetensors"])
    trajectory = lawa_core.open_trajectory([str(path) for path in paths], step_regex=r"foo(\d+)")
    assert list(trajectory.steps) == [9, 10]


@pytest.mark.parametrize("regex", [r"bar(\d+)", r"foo\d+", "foo(", r"(foo)\d+"])
def test_a_step_regex_that_reads_nothing_is_refused(regex, tmp_path, out, capsys):
    paths = write(tmp_path / "run", ["foo1.pt", "foo2.pt"])
    line = refusal(capsys, out, *paths, "--step-regex", regex)
    assert "step-regex" in line or "foo1.pt" in line
