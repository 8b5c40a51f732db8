"""Folders that were once averaged wrongly in silence: now the right mean, or one line.

The files of a row hold 1, 2, 4, ... in their order, so that the mean tells which were read.
"""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import lawa_core

STEPS = ("ckpt_100.pt", "ckpt_200.pt", "ckpt_300.pt")
TRAINER = ("checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors")
RANKS = [f"step_{step}/tp_rank_{rank}/weights/model.pt" for step in (1, 2) for rank in (0, 1)]
SEVERAL = "holds several checkpoints"
AS_OTHERS = "named as those that have a step"
PARTS = "one rank's part"


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"w": torch.full((3,), float(value))}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.fixture
def average(tmp_path, monkeypatch, capsys):
    """average(folder, arguments): the value of the mean, or the line that refuses."""
    monkeypatch.chdir(tmp_path)

    def run(folder="run", *arguments, out="mean.safetensors"):
        status = lawa_core.main(["average", folder, *arguments, "-o", out])
        said = capsys.readouterr()
        if status:
            assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
            return said.err
        return load_file(out)["w"][0].item(), said.out

    return run


def make(folder, names):
    for i, name in enumerate(names):
        put(folder / name, 2**i)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("seed_1.pt", "seed_2.pt", "seed_3.pt"), SEVERAL),
        (("seed_123456.pt", "seed_234567.pt"), SEVERAL),
        (("fold_0.safetensors", "fold_1.safetensors"), SEVERAL),
        (("val_loss=0.92.ckpt", "val_loss=0.82.ckpt"), SEVERAL),
        (("last_Ant_ep_100.pth", "last_Ant_ep_200.pth", "Ant.pth"), SEVERAL),
        (("reward_90000.pt", "reward_95000.pt", "reward_100000.pt"), SEVERAL),
        (("step%20100.pt", "step%20200.pt"), SEVERAL),
        (("step_1/stage1.pt", "step_1/stage2.pt", "step_2/stage1.pt"), SEVERAL),
        (("step_1/model/model.safetensors", "step_1/metrics.pt"), SEVERAL),
        (("step_1/fsdp_0.pt", "step_1/fsdp_1.pt"), PARTS),
        (RANKS, PARTS),
        ([f"step_1/layer_0{i}-model_00-model_states.pt" for i in (0, 2)], PARTS),
        (("epoch_0.5.pt", "epoch_1.pt", "epoch_1.5.pt"), AS_OTHERS),
        (("ckpt_500M.pt", "ckpt_900M.pt", "ckpt_1B.pt"), AS_OTHERS),
        (("checkpoint_2023_12_31.pt", "checkpoint_2024_01_31.pt"), "cannot tell the steps"),
        (("checkpoint_1000_91.pt", "checkpoint_2000_88.pt"), "cannot tell the steps"),
        (("gemma-3-270m-it_lora_5.pt", "gemma-3-270m-it_lora_6.pt"), "cannot tell the steps"),
        (("gemma-3-270m-it_500.pt", "gemma-3-270m-it_600.pt"), 3 / 2),
        (("bc5000.pt", "bc7500.pt", "bc10000.pt"), 7 / 3),
        (("ckpt_100.pt", "ckpt_200.pt", "resumed_ckpt_300.pt"), 7 / 3),
        (("model_800000.pt", "model_900000.pt", "model_1e+06.pt"), 7 / 3),
        (("model_1000.pt", "model_2000.pt", "model_fp16.pt"), 3 / 2),
        ((*TRAINER, "tmp-checkpoint-1500/model.safetensors"), 3 / 2),
        (("upscaler_1.pt", "upscaler_2.pt"), 3 / 2),
    ],
)
def test_a_folder_gives_the_mean_of_its_steps_or_one_line(tmp_path, average, names, expected):
    make(tmp_path / "run", names)
    found = average()
    if isinstance(expected, str):
        assert expected in found
    else:
        assert found[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("names", "arguments", "expected"),
    [
        (("model_800000.pt", "model_900000.pt", "model_1e+06.pt"), ("-k", "1"), 4),
        (("model_1e5.pt", "model_1.5e5.pt", "model_2e5.pt"), ("-k", "2"), 3),
        (("ckpt2-50000steps.pt", "ckpt1-100000steps.pt"), ("-k", "1"), 2),
        (("epoch_2_1000steps.pt", "epoch_1_2000steps.pt"), ("-k", "1"), 2),
        (STEPS, ("--scheme", "ema(half_life=100)"), 2.75),
        (STEPS, ("--scheme", "ema(half_life=1e5)", "--tokens-per-step", "1000"), 2.75),
    ],
)
def test_the_steps_decide_what_is_latest(tmp_path, average, names, arguments, expected):
    make(tmp_path / "run", names)
    assert average("run", *arguments)[0] == expected


@pytest.mark.parametrize(
    "folder", ["bert-3epochs", "sft_epoch3", "gpt2-10k-steps", "gemma-3-270m-it"]
)
def test_a_run_whose_folder_names_a_number_is_a_run(tmp_path, average, folder):
    make(tmp_path / folder, (*TRAINER, "model.safetensors"))
    value, said = average(folder)
    assert value == 1.5 and "passed over: model.safetensors" in said


def test_a_checkpoint_that_holds_its_own_parts_is_no_run(tmp_path, average):
    parts = "global_step500/mp_rank_00_model_states.pt"
    make(tmp_path / "checkpoint-500", ("model.safetensors", parts))
    assert average("checkpoint-500")[0] == 1


def test_one_rank_of_several_is_refused_alone_too(tmp_path, average):
    make(tmp_path / "run", [f"ep3-ba5000-rank{rank}.pt" for rank in (0, 1)])
    assert PARTS in average("run/ep3-ba5000-rank0.pt")


def test_a_dead_link_is_no_gap(tmp_path, average):
    make(tmp_path / "run", STEPS)
    (tmp_path / "run" / STEPS[1]).unlink()
    (tmp_path / "run" / STEPS[1]).symlink_to("gone")
    assert "no such checkpoint" in average()


def test_the_files_beside_a_model_are_named(tmp_path, average):
    make(
        tmp_path / "run",
        [f"step_{s}/{n}.safetensors" for s in (1, 2) for n in ("model", "model_1")],
    )
    value, said = average()
    assert value == 2.5 and "left out: model_1.safetensors" in said


def test_lists_of_layers_are_averaged(tmp_path, average):
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        one, two, three = (torch.full((2,), float(step)) for _ in range(3))
        torch.save({"model": {"w": one, "h": [{"w": two}, [three]]}}, f"run/ckpt_{step}.pt")
    assert average()[0] == 1.5
    state = load_file("mean.safetensors")
    assert {name: t[0].item() for name, t in state.items()} == {
        "w": 1.5,
        "h.0.w": 1.5,
        "h.1.0": 1.5,
    }


def test_another_groups_extra_state_stays_out_of_the_weights(tmp_path, average):
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        group = {"w": torch.full((2,), float(step))}
        checkpoint = {"model": group, "ema": group | {"_extra_state": step}}
        torch.save(checkpoint, f"run/ckpt_{step}.pt")
    lawa_core.main(["average", "run", "-o", "mean.pt"])
    assert list(torch.load("mean.pt", weights_only=True)["model"]) == ["w"]


def test_four_bits_with_scales_are_refused(tmp_path, average):
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        codes = torch.full((8, 1), step, dtype=torch.uint8)
        state = {"q.weight": codes, "q.weight.absmax": torch.full((2,), float(step))}
        save_file(state, f"run/ckpt_{step}.safetensors")
    assert "quantised" in average()


@pytest.mark.parametrize("out", ["a.PT", "a.th", "a.pt ", "a.pt.bak", "a.Safetensors", "a.gguf"])
def test_a_slip_in_the_outputs_name_makes_no_folder(tmp_path, average, out):
    make(tmp_path / "run", STEPS)
    assert "is not written" in average(out=out) and not os.path.exists(out)


@pytest.mark.parametrize("text", ["", "[1]", '"gpt2"', '{"a": 1', "\xff"])
def test_a_broken_config_is_named_before_anything_is_written(tmp_path, average, text):
    make(tmp_path / "run", TRAINER)
    (tmp_path / "run" / "checkpoint-1000" / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in average(out="folder") and not os.path.exists("folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scheme", "swa(start='100')"), "start must be"),
        (("--scheme", "lawa(2, None, None)"), "start must be"),
        (("--like", "typo"), "--like must be a folder"),
        (("--steps", "1,2,3"), "--steps"),
        (("--step-regex", "("), "--step-regex"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, average, arguments, words):
    make(tmp_path / "run", STEPS)
    assert words in average("run", *arguments)


def test_an_empty_source_is_not_this_folder(tmp_path, average):
    make(tmp_path, STEPS)
    assert "error" in average("")
