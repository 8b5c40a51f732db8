"""Files: formats read and written, trajectories, the checks before an average, and what is left
behind when something fails."""

import enum
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies as st

import lawa_core
from lawa_core import (
    LawaError,
    average,
    average_files,
    check,
    explicit,
    lawa,
    newest,
    open_checkpoint,
    open_trajectory,
    save,
    swa,
)

HOME = Path(lawa_core.__file__).parent
TENS = [10, 20, 30]


@pytest.fixture(autouse=True)
def torch_import_is_quiet(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("ckpt_200.safetensors", 200),
        ("runs/run7/ckpt_12.pt", 12),
        ("step1000", 1000),
        ("checkpoint-500", 500),
        ("ckpt_000300.pt", 300),
        ("pythia-1.4b/step3000", 3000),
        ("epoch=3-step=1200.ckpt", 1200),
        ("pytorch_model_300.bin", 300),
        ("runs/gpt2/step0", 0),
    ],
)
def test_step_of(path, step):
    assert lawa_core.step_of(path) == step
    assert lawa_core.step_of(Path(path)) == step


def test_the_naming_function_and_its_reader_agree():
    assert lawa_core.checkpoint_name(200) == "ckpt_200.safetensors"
    for step in (0, 7, 900, 1000, 10**9):
        assert lawa_core.step_of(lawa_core.checkpoint_name(step)) == step


@pytest.mark.parametrize("path", ["ckpt_best.safetensors", "run7/latest.pt", "weights"])
def test_names_without_a_step(path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # whose own name counts for a bare "weights"
    assert lawa_core.step_of(path) is None


# ------------------------------------------------------------------ formats


def write_hf(folder, state, suffix="safetensors", shards=1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    put = (
        ref.write_safetensors
        if suffix == "safetensors"
        else lambda path, part: torch.save(part, path)
    )
    if shards == 1:
        put(folder / f"{stem}.{suffix}", state)
        return folder
    names, weight_map = sorted(state), {}
    for i in range(shards):
        part = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        put(folder / part, {n: state[n] for n in names[i::shards]})
        weight_map.update(dict.fromkeys(names[i::shards], part))
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def wrapped(path, state, key, **extra):
    torch.save({key: state, **extra}, path)
    return path


def legacy(path, state):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def plain(path, state):
    torch.save(state, path)
    return path


ADAM = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3}]}
WRITERS = {
    "safetensors": lambda d, s: ref.write_safetensors(d / "a_1.safetensors", s),
    "pt": lambda d, s: plain(d / "a_1.pt", s),
    "pth": lambda d, s: plain(d / "a_1.pth", s),
    "bin": lambda d, s: plain(d / "a_1.bin", s),
    "ckpt": lambda d, s: wrapped(d / "a_1.ckpt", s, "state_dict", epoch=3),
    "legacy pt": lambda d, s: legacy(d / "a_1.pt", s),
    "model": lambda d, s: wrapped(
        d / "a_1.pt",
        s,
        "model",
        optimizer=ADAM,
        iter_num=1,
        config={"lr": 1e-3},
        best=torch.tensor(3.0),
    ),
    "module": lambda d, s: wrapped(d / "a_1.pt", s, "module", optimizer=ADAM),
    "ordered": lambda d, s: plain(d / "a_1.pt", __import__("collections").OrderedDict(s)),
    "parameters": lambda d, s: plain(
        d / "a_1.pt", {n: torch.nn.Parameter(t, t.is_floating_point()) for n, t in s.items()}
    ),
    "hf": lambda d, s: write_hf(d / "step1", s),
    "hf shards": lambda d, s: write_hf(d / "step1", s, shards=3),
    "hf bin": lambda d, s: write_hf(d / "step1", s, "bin"),
    "hf bin shards": lambda d, s: write_hf(d / "step1", s, "bin", shards=2),
    "dcp": lambda d, s: ref.write_distributed(d / "step1", s),
    "dcp nested": lambda d, s: ref.write_distributed(
        d / "step1", {"model": s, "optimizer": {"exp_avg": torch.ones(3)}}
    ),
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_format_is_read_bit_for_bit(kind, tmp_path):
    """Names, types, shapes, bytes; nothing of the optimizer among the names."""
    state = ref.example(7, torch.bfloat16)
    path = WRITERS[kind](tmp_path, state)
    before = ref.digest(path)
    checkpoint = open_checkpoint(path)
    assert ref.state_bits(checkpoint) == ref.state_bits(state)
    assert (
        len(checkpoint) == len(state)
        and "wte.weight" in checkpoint
        and "optimizer" not in checkpoint
    )
    assert dict(checkpoint.dtypes) == {n: ref.NAMES[t.dtype] for n, t in state.items()}
    assert {n: tuple(s) for n, s in checkpoint.shapes.items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in state.values())
    assert Path(checkpoint.path) == path
    with pytest.raises(KeyError):
        checkpoint["no.such.tensor"]
    assert ref.digest(path) == before


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_format_is_averaged(kind, tmp_path):
    """Two steps in the same format, through a folder, in memory and to a file."""
    states = {10: ref.example(10), 20: ref.example(20)}
    for step, state in states.items():
        part = tmp_path / f"part{step}"
        part.mkdir()
        made = WRITERS[kind](part, state)
        target = tmp_path / "run" / made.name.replace("1", str(step))
        target.parent.mkdir(exist_ok=True)
        shutil.move(made, target)
    want = ref.average(list(states.values()), [0.5, 0.5])
    trajectory = open_trajectory(tmp_path / "run")
    assert list(trajectory.steps) == [10, 20] and len(trajectory) == 2
    ref.assert_state(average(trajectory), want)
    average_files(trajectory, {tmp_path / "out.safetensors": (lawa(2), 20)}, tile=4096)
    ref.assert_state(ref.read_safetensors(tmp_path / "out.safetensors")[0], want)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "hf shards"])
def test_opening_reads_only_the_header(kind, tmp_path):
    path = WRITERS[kind](tmp_path, {"w": torch.ones(1 << 21), "v": torch.ones(3)})
    open_checkpoint(path)
    before = ref.bytes_read()
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes["w"] == (1 << 21,)
    assert checkpoint["v"].tolist() == [1, 1, 1]
    assert ref.bytes_read() - before < 1 << 20


def test_many_checkpoints_need_few_open_files(tmp_path):
    """300 opened at a time where the system allows 64 files; none is left open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for s in range(300):
        save(tmp_path / f"ckpt_{s}.safetensors", {"w": torch.full((3,), float(s))})
    trajectory = open_trajectory(tmp_path)
    opened = [trajectory[step] for step in trajectory.steps]
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 64, before[1]))
    try:
        assert [float(checkpoint["w"][0]) for checkpoint in opened] == list(range(300))
        assert average(trajectory)["w"].tolist() == [149.5] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(os.listdir("/proc/self/fd")) == held


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "ckpt_1.safetensors"
    save(path, {"w": torch.zeros(3)})
    checkpoint = open_checkpoint(path)
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(LawaError, match=r"ckpt_1\.safetensors changed while it was read"):
        checkpoint["w"]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "hf bin"])
def test_tensors_are_copies(kind, tmp_path):
    path = WRITERS[kind](tmp_path, {"w": torch.ones(5)})
    before, checkpoint = ref.digest(path), open_checkpoint(path)
    checkpoint["w"].zero_()
    assert checkpoint["w"].tolist() == [1] * 5
    assert ref.digest(path) == before


def test_key_chooses_the_state_dict(tmp_path):
    path = tmp_path / "ckpt_5.pt"
    torch.save({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}, path)
    assert open_checkpoint(path)["w"].tolist() == [0, 0]
    assert open_checkpoint(path, key="ema")["w"].tolist() == [1, 1]
    assert average([path], key="ema")["w"].tolist() == [1, 1]
    with pytest.raises(LawaError, match=r"ckpt_5\.pt.*nothing|nothing.*ckpt_5\.pt"):
        open_checkpoint(path, key="nothing")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["_orig_mod.w", "_orig_mod.h.b"], ["w", "h.b"]),
        (["module.w", "module.h.b"], ["w", "h.b"]),
        (["_orig_mod.module.w"], ["w"]),
        (["module._orig_mod.w"], ["w"]),
        (["encoder.module.w", "a._orig_mod.b"], ["encoder.module.w", "a._orig_mod.b"]),
        (["module.encoder.module.w"], ["encoder.module.w"]),
        (["modules.w", "my_module.w"], ["modules.w", "my_module.w"]),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_prefixes_are_stripped_only_as_prefixes(written, read, kind, tmp_path):
    path = WRITERS[kind](tmp_path, {n: torch.ones(2) for n in written})
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint) == sorted(read)
    assert all(checkpoint[n].tolist() == [1, 1] for n in read)


def test_prefixes_may_differ_between_checkpoints(tmp_path):
    ref.write_safetensors(tmp_path / "ckpt_1.safetensors", {"w": torch.tensor([1.0])})
    torch.save({"_orig_mod.w": torch.tensor([3.0])}, tmp_path / "ckpt_2.pt")
    assert average(tmp_path)["w"].item() == 2.0


# ------------------------------------------------------------------ save


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", list(ref.FORMAT), ids=str)
def test_save_round_trip(suffix, dtype, tmp_path):
    """0-d, empty, every type, strided and expanded tensors; read back by the format's own library
    too."""
    wide = torch.arange(12.0).reshape(3, 4).to(dtype)
    state = {
        **ref.example(3, dtype),
        "t": wide.t(),
        "column": wide[:, 1],
        "row": wide[1],
        "same": torch.ones(1, dtype=dtype).expand(5),
    }
    path = tmp_path / f"ckpt_3.{suffix}"
    save(path, state, {"note": "kept"})
    assert os.listdir(tmp_path) == [path.name]
    want = ref.state_bits(state)
    checkpoint = open_checkpoint(path)
    assert ref.state_bits(checkpoint) == want
    if suffix == "pt":
        assert ref.state_bits(torch.load(path, weights_only=True)) == want
    else:
        assert ref.state_bits(ref.read_safetensors(path)[0]) == want
        assert checkpoint.metadata["note"] == "kept"
        assert all(isinstance(v, str) for v in checkpoint.metadata.values())


def test_save_takes_numpy(tmp_path):
    import numpy as np

    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.asfortranarray(np.eye(3)),
    }
    save(tmp_path / "ckpt_1.safetensors", arrays)
    got = open_checkpoint(tmp_path / "ckpt_1.safetensors")
    assert (
        got["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        and got["b"].item() == 3
        and got["c"].dtype == torch.float64
    )
    assert got["c"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tied_weights_are_neither_doubled_nor_lost(suffix, tmp_path):
    """Through save, and through an average of a .pt whose two names share one storage."""

    def tied(value):
        w = torch.full((1000,), float(value))
        return {"wte.weight": w, "ln.weight": torch.full((3,), float(value)), "lm_head.weight": w}

    save(tmp_path / f"one.{suffix}", tied(1))
    for s in (1, 3):
        torch.save(tied(s), tmp_path / f"ckpt_{s}.pt")
    average_files(open_trajectory(tmp_path), {tmp_path / f"mean.{suffix}": (lawa(2), 3)})
    for name, value in {"one": 1.0, "mean": 2.0}.items():
        path = tmp_path / f"{name}.{suffix}"
        assert path.stat().st_size < 7500  # 4,000 bytes once; twice would be 8,000
        checkpoint = open_checkpoint(path)
        assert (
            sorted(checkpoint)
            == sorted(checkpoint.shapes)
            == sorted(checkpoint.dtypes)
            == ["lm_head.weight", "ln.weight", "wte.weight"]
        )
        assert {t.unique().item() for t in checkpoint.values()} == {value}
    if suffix == "pt":
        loaded = torch.load(tmp_path / "one.pt", weights_only=True)
        assert loaded["wte.weight"].data_ptr() == loaded["lm_head.weight"].data_ptr()


@pytest.mark.parametrize("newest_is_tied", [True, False])
def test_tied_in_one_checkpoint_and_not_in_the_other(newest_is_tied, tmp_path):
    """A .pt whose two names share a storage beside a safetensors file that holds both."""

    def make(step, tied):
        w = torch.full((5,), float(step))
        if tied:
            torch.save({"wte": w, "head": w}, tmp_path / f"ckpt_{step}.pt")
        else:
            ref.write_safetensors(tmp_path / f"ckpt_{step}.safetensors", {"wte": w, "head": w + 1})

    make(10, not newest_is_tied)
    make(20, newest_is_tied)
    got = average(tmp_path)
    average_files(open_trajectory(tmp_path), {tmp_path / "mean.safetensors": (lawa(2), 20)})
    for mean in (got, open_checkpoint(tmp_path / "mean.safetensors")):
        assert mean["wte"].tolist() == [15.0] * 5
        assert mean["head"].tolist() == [15.5] * 5


def test_metadata_adds_no_tensors(tmp_path):
    """A note that happens to be a tensor's name."""
    save(tmp_path / "ckpt_1.safetensors", {"w": torch.ones(2)}, {"largest": "w", "w": "w"})
    assert list(open_checkpoint(tmp_path / "ckpt_1.safetensors")) == ["w"]
    assert open_checkpoint(tmp_path / "ckpt_1.safetensors").metadata["largest"] == "w"


def test_a_window_whose_oldest_is_tied_and_whose_newest_is_not(tmp_path):
    """The average may not be written over a tensor that another name still needs."""
    tied = torch.ones(4)
    save(tmp_path / "ckpt_1.safetensors", {"a": tied, "b": tied})
    save(tmp_path / "ckpt_2.safetensors", {"a": torch.full((4,), 3.0), "b": torch.full((4,), 5.0)})
    ((_, _, state),) = lawa_core.sweep(tmp_path, {"lawa": lawa(2, 1)}, [2])
    assert (state["a"].tolist(), state["b"].tolist()) == ([2] * 4, [3] * 4)


def test_tied_weight_absent_from_the_file_stays_absent(tmp_path):
    """A safetensors file that ties lm_head to wte does not hold lm_head: nor does the average."""
    ref.write_run(tmp_path / "run", TENS)
    assert set(average(tmp_path / "run")) == {"w", "b"}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_slices_of_one_storage_are_kept_apart(suffix, tmp_path):
    whole = torch.arange(10.0)
    state = {"low": whole[:4], "high": whole[4:], "overlap": whole[2:7]}
    save(tmp_path / f"ckpt_1.{suffix}", state)
    got = open_checkpoint(tmp_path / f"ckpt_1.{suffix}")
    assert {n: got[n].tolist() for n in got} == {
        "low": [0, 1, 2, 3],
        "high": [4, 5, 6, 7, 8, 9],
        "overlap": [2, 3, 4, 5, 6],
    }


def test_save_replaces_atomically(tmp_path):
    """A writer killed again and again: the name always holds one whole checkpoint, the old or the
    new."""
    path = tmp_path / "ckpt_1.safetensors"
    save(path, {"w": torch.zeros(1 << 18)})
    code = f"""
import torch, lawa_core
print(flush=True)
for v in range(1, 10**6):
    lawa_core.save({str(path)!r}, {{"w": torch.full((1 << 18,), float(v))}})
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=HOME, stdout=subprocess.PIPE)
    child.stdout.readline()
    stop = time.monotonic() + 0.3
    try:
        while time.monotonic() < stop:
            assert len(set(ref.read_safetensors(path)[0]["w"].tolist())) == 1
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    values = set(ref.read_safetensors(path)[0]["w"].tolist())
    assert len(values) == 1 and values != {0.0}


@pytest.mark.parametrize("name", ["ckpt_1.xyz", "ckpt_1"])
def test_save_refuses_unknown_suffixes(name, tmp_path):
    with pytest.raises(LawaError, match=name):
        save(tmp_path / name, {"w": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------ trajectories


def test_steps_are_ordered_as_numbers(tmp_path):
    """900 before 1000, whatever the alphabet says; optimizer files, logs and `best` are no
    checkpoints."""
    ref.write_run(tmp_path, [1000, 900, 20000])
    for name in ("config.json", "metrics.csv", "README.md"):
        (tmp_path / name).write_text("{}")
    for name in (
        "optimizer_900.pt",
        "resume.pt",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
    ):
        torch.save({"state": torch.ones(3)}, tmp_path / name)
    shutil.copy(tmp_path / "ckpt_900.safetensors", tmp_path / "ckpt_best.safetensors")
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.steps) == [900, 1000, 20000]
    assert trajectory[900]["b"].item() == 900.0
    assert average(trajectory, lawa(2), at=1000)["b"].item() == 950.0


@pytest.mark.parametrize("pattern", ["step{}", "checkpoint-{}", "global_step{}", "iter_{:07d}"])
def test_step_folders(pattern, tmp_path):
    for s in (5, 10, 100):
        write_hf(tmp_path / pattern.format(s), ref.constant(s))
        torch.save(ADAM, tmp_path / pattern.format(s) / "optimizer.pt")
        (tmp_path / pattern.format(s) / "tokenizer.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "latest").write_text(pattern.format(100))  # DeepSpeed's text file
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.steps) == [5, 10, 100]
    assert average(trajectory, lawa(2))["b"].item() == 55.0


def test_symlinked_latest_is_not_counted_twice(tmp_path):
    ref.write_run(tmp_path / "files", TENS)
    (tmp_path / "files" / "latest.safetensors").symlink_to("ckpt_30.safetensors")
    (tmp_path / "files" / "ckpt_latest.safetensors").symlink_to("ckpt_30.safetensors")
    for s in TENS:
        write_hf(tmp_path / "folders" / f"step{s}", ref.constant(s))
    (tmp_path / "folders" / "latest").symlink_to("step30")
    for kind in ("files", "folders"):
        trajectory = open_trajectory(tmp_path / kind)
        assert list(trajectory.steps) == TENS
        assert check(trajectory) == []


def test_sources_of_every_kind(tmp_path):
    paths = ref.write_run(tmp_path / "run", [5, 10, 15])
    run = str(tmp_path / "run")
    for source in (
        Path(run),
        run + "/",
        run + "/*.safetensors",
        paths[::-1],
        [str(p) for p in paths],
    ):
        trajectory = open_trajectory(source)
        assert list(trajectory.steps) == [5, 10, 15]
        assert [trajectory[s]["b"].item() for s in trajectory.steps] == [5, 10, 15]
    assert list(open_trajectory(str(tmp_path / "run" / "ckpt_1*.safetensors")).steps) == [10, 15]
    assert "run" in open_trajectory(tmp_path / "run").name
    with pytest.raises((LawaError, KeyError), match="12"):
        open_trajectory(tmp_path / "run")[12]


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d / "no_such_folder",
        lambda d: d / "empty_folder",
        lambda d: d / "only_logs",
        lambda d: str(d / "no_such_*.safetensors"),
        lambda d: [d / "no_such_1.safetensors"],
        lambda d: [],
    ],
    ids=["no folder", "empty folder", "only logs", "glob of nothing", "no file", "no paths"],
)
def test_nothing_there(make, tmp_path):
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "only_logs").mkdir()
    (tmp_path / "only_logs" / "metrics.csv").write_text("step,loss\n")
    source = make(tmp_path)
    name = Path(source if not isinstance(source, list) else (source or [""])[0]).name
    with pytest.raises(LawaError) as caught:
        average(open_trajectory(source))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_two_files_for_one_step(tmp_path):
    """In a folder, and in a list: which one is meant is the user's to say."""
    ref.write_run(tmp_path / "run", TENS)
    torch.save(ref.constant(99), tmp_path / "run" / "ckpt_20.pt")
    with pytest.raises(LawaError, match=r"\b20\b"):
        found(tmp_path / "run")
    ref.write_run(tmp_path / "b", [10])
    with pytest.raises(LawaError, match=r"\b10\b"):
        found([tmp_path / "run" / "ckpt_10.safetensors", tmp_path / "b" / "ckpt_10.safetensors"])


def found(source):
    """Open and average; or the problems that check() lists, as an error: both are a refusal."""
    trajectory = open_trajectory(source)
    if problems := check(trajectory):
        raise LawaError(problems[0])
    return average(trajectory)


def test_a_list_with_a_nameless_file_is_refused(tmp_path):
    paths = ref.write_run(tmp_path, TENS)
    best = shutil.copy(paths[0], tmp_path / "ckpt_best.safetensors")
    with pytest.raises(LawaError, match="ckpt_best"):
        open_trajectory([*paths, best])


# ------------------------------------------------------------------ checks before an average


def swap(state, **changes):
    return {n: t for n, t in {**state, **changes}.items() if t is not None}


MISMATCHES = {
    "missing key": (lambda s: swap(s, b=None), ["b"]),
    "extra key": (lambda s: swap(s, extra=torch.ones(2)), ["extra"]),
    "renamed key": (lambda s: swap(s, b=None, c=torch.ones(())), ["b", "c"]),
    "shape that would broadcast": (lambda s: swap(s, b=torch.ones(1)), ["b"]),
    "shape that would broadcast back": (lambda s: swap(s, w=torch.ones(3)), ["w"]),
    "same size, other shape": (lambda s: swap(s, w=torch.ones(3, 4)), ["w"]),
    "float against integer": (lambda s: swap(s, w=torch.ones(4, 3, dtype=torch.int64)), ["w"]),
}


@pytest.mark.parametrize("which", [20, 30], ids=["older differs", "newest differs"])
@pytest.mark.parametrize("case", list(MISMATCHES))
def test_names_and_shapes_are_strict(case, which, tmp_path):
    """File and tensor are named, nothing is written, nothing is changed."""
    change, names = MISMATCHES[case]
    run = tmp_path / "run"
    ref.write_run(run, TENS, lambda s: change(ref.constant(s)) if s == which else ref.constant(s))
    before = ref.digest(run)
    trajectory = open_trajectory(run)
    out = tmp_path / "out.safetensors"
    for attempt in (
        lambda: average(trajectory),
        lambda: average_files(trajectory, {out: (lawa(3), 30)}),
    ):
        with pytest.raises(LawaError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message and "ckpt_" in message
        assert any(n in message for n in names), message
    problems = check(trajectory)
    assert any(f"ckpt_{which}" in p for p in problems) or any(
        "ckpt_" in p and any(n in p for n in names) for p in problems
    ), problems
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert ref.digest(run) == before


def test_a_mismatch_outside_the_window_does_not_matter(tmp_path):
    ref.write_run(
        tmp_path / "run", TENS, lambda s: {"other": torch.ones(1)} if s == 10 else ref.constant(s)
    )
    assert average(tmp_path / "run", lawa(2))["b"].item() == 25.0
    average_files(open_trajectory(tmp_path / "run"), {tmp_path / "out.safetensors": (lawa(2), 30)})
    assert ref.read_safetensors(tmp_path / "out.safetensors")[0]["b"].item() == 25.0


def troubled(folder):
    """A gap at 40, the same bytes under 10 and 60, another shape and type in 70."""
    ref.write_run(folder, [10, 20, 30, 50, 60, 70])
    shutil.copy(folder / "ckpt_10.safetensors", folder / "ckpt_60.safetensors")
    ref.write_safetensors(
        folder / "ckpt_70.safetensors",
        {"w": torch.ones(4, 3, dtype=torch.float16), "b": torch.ones(2)},
    )
    return folder


@pytest.mark.parametrize(
    "words", [["30", "50"], ["ckpt_10", "ckpt_60"], ["ckpt_70", "b"]], ids=["gap", "twins", "shape"]
)
def test_check_lists_every_problem(words, tmp_path):
    assert any(
        all(word in p for word in words) for p in check(open_trajectory(troubled(tmp_path / "run")))
    )


def test_check_writes_whole_sentences(tmp_path):
    """One string per problem, not its halves; each names a file or, for a gap, its steps."""
    run = troubled(tmp_path / "run")
    (run / "ckpt_20.safetensors").write_bytes(b"broken")
    problems = check(open_trajectory(run))
    assert any("ckpt_20" in p for p in problems)
    assert all(
        isinstance(p, str) and "\n" not in p and ("ckpt_" in p or "30" in p) for p in problems
    ), problems


def test_check_finds_nothing_wrong(tmp_path):
    assert check(open_trajectory(ref.write_run(tmp_path, [10, 20, 30, 40]))) == []


def test_twins_are_found_in_every_format(tmp_path):
    """The same tensors under two steps, though the containers differ in their bytes."""
    state = ref.example(1)
    write_hf(tmp_path / "run" / "step1", state)
    write_hf(tmp_path / "run" / "step2", state, shards=2)
    write_hf(tmp_path / "run" / "step3", ref.example(3))
    assert any("1" in p and "2" in p for p in check(open_trajectory(tmp_path / "run")))


def test_duplicates_are_refused_unless_allowed(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    ref.write_run(run, TENS)
    shutil.copy(run / "ckpt_10.safetensors", run / "ckpt_20.safetensors")
    trajectory = open_trajectory(run)
    with pytest.raises(LawaError) as caught:
        average_files(trajectory, {out: (lawa(3), 30)})
    assert "10" in str(caught.value) and "20" in str(caught.value)
    assert not out.exists()
    average_files(trajectory, {out: (lawa(3), 30)}, allow={"duplicates"})
    assert ref.read_safetensors(out)[0]["b"].item() == pytest.approx(50 / 3, rel=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", list(ref.FORMAT), ids=str)
def test_nonfinite_weights_are_refused_unless_allowed(value, dtype, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    ref.write_run(
        run,
        TENS,
        lambda s: {
            "w": torch.full((9,), float(s), dtype=dtype),
            "bad": torch.tensor([1.0, s, value if s == 20 else s], dtype=dtype),
        },
    )
    trajectory = open_trajectory(run)
    with pytest.raises(LawaError, match=r"bad"):
        average_files(trajectory, {out: (lawa(3), 30)}, tile=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    average_files(trajectory, {out: (lawa(3), 30)}, tile=8, allow={"nonfinite"})
    got = ref.read_safetensors(out)[0]
    assert got["w"].tolist() == [20.0] * 9
    assert got["bad"].tolist()[:2] == [1.0, 20.0] and str(got["bad"].tolist()[2]) == str(value)


@pytest.mark.parametrize("pattern", [0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0xFFFF8000])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_nan_is_noticed_in_every_output_type(pattern, dtype, tmp_path):
    """A float32 NaN of all ones, rounded by adding to its bits, would come out as 0."""
    bad = torch.tensor([pattern], dtype=torch.uint32).view(torch.float32)
    ref.write_run(
        tmp_path / "run",
        TENS,
        lambda s: {"w": torch.cat([torch.ones(3) * s, bad if s == 20 else torch.ones(1)])},
    )
    trajectory, out = open_trajectory(tmp_path / "run"), tmp_path / "out.safetensors"
    for window in (lawa(3), lawa(2)):
        with pytest.raises(LawaError, match=r"ckpt_20.*\bw\b"):
            average_files(trajectory, {out: (window, 30)}, dtype=dtype)
        average_files(trajectory, {out: (window, 30)}, dtype=dtype, allow={"nonfinite"})
        assert ref.read_safetensors(out)[0]["w"].isnan().tolist() == [False, False, False, True]
        out.unlink()
    with pytest.raises(LawaError, match=r"ckpt_20.*\bw\b"):
        average(trajectory)


def test_overflow_of_a_narrow_output_is_refused(tmp_path):
    """Finite in float32, infinite in float16."""
    ref.write_run(tmp_path / "run", TENS, lambda s: {"w": torch.tensor([1.0, 70000.0 + s])})
    out = tmp_path / "out.safetensors"
    with pytest.raises(LawaError, match="w"):
        average_files(open_trajectory(tmp_path / "run"), {out: (lawa(3), 30)}, dtype="F16")
    assert not out.exists()
    average_files(open_trajectory(tmp_path / "run"), {out: (lawa(3), 30)}, dtype="BF16")
    assert out.exists()


def test_sums_do_not_overflow_on_the_way(tmp_path):
    """Three numbers near the largest float16 (or float32) have a mean, though no sum."""
    for dtype, value in ((torch.float16, 65504.0), (torch.float32, 3e38), (torch.float64, 1.7e308)):
        run = tmp_path / str(dtype)
        ref.write_run(run, TENS, lambda s, v=value, d=dtype: {"w": torch.tensor([v, s], dtype=d)})
        want = torch.tensor(value, dtype=dtype).item()
        assert average(run)["w"].tolist() == [want, 20.0]
        average_files(open_trajectory(run), {tmp_path / "out.safetensors": (swa(), 30)})
        assert ref.read_safetensors(tmp_path / "out.safetensors")[0]["w"].tolist() == [want, 20.0]


@pytest.mark.parametrize("name", ["ckpt_40.safetensors", "ckpt_40.pt", "ckpt_40"])
def test_earlier_output_is_not_taken_for_a_checkpoint(name, tmp_path):
    """An average written into the run folder, under a name that looks like a step."""
    run = tmp_path / "run"
    ref.write_run(run, TENS)
    average_files(open_trajectory(run), {run / name: (lawa(2), 30)})
    trajectory = open_trajectory(run)
    with pytest.raises(LawaError, match="ckpt_40"):
        average_files(trajectory, {tmp_path / "out.safetensors": (lawa(2), 40)})
    average_files(trajectory, {tmp_path / "out.safetensors": (lawa(2), 40)}, allow={"averages"})
    assert ref.read_safetensors(tmp_path / "out.safetensors")[0]["b"].item() == 27.5


def test_unknown_permissions_are_refused(tmp_path):
    ref.write_run(tmp_path / "run", TENS)
    with pytest.raises(LawaError, match="nonfinit"):
        average_files(
            open_trajectory(tmp_path / "run"),
            {tmp_path / "out.safetensors": (lawa(2), 30)},
            allow={"nonfinit"},
        )


@pytest.mark.parametrize(
    "how", ["itself", "dots", "symlink", "hard link", "input outside the window"]
)
def test_output_over_an_input_is_refused(how, tmp_path):
    run = tmp_path / "run"
    paths = ref.write_run(run, TENS)
    out = {
        "itself": paths[2],
        "dots": run / ".." / "run" / "ckpt_20.safetensors",
        "symlink": tmp_path / "link.safetensors",
        "hard link": tmp_path / "hard.safetensors",
        "input outside the window": paths[0],
    }[how]
    if how == "symlink":
        out.symlink_to(paths[2])
    if how == "hard link":
        os.link(paths[2], out)
    before = ref.digest(run)
    if how == "hard link":  # replacing one of two names harms nothing
        average_files(open_trajectory(run), {out: (lawa(2), 30)})
    else:
        with pytest.raises(LawaError, match=out.name):
            average_files(open_trajectory(run), {out: (lawa(2), 30)})
    assert ref.digest(run) == before


# ------------------------------------------------------------------ broken files


def cut(path, n):
    raw = path.read_bytes()
    path.write_bytes(raw[:n] if n >= 0 else raw[: len(raw) + n])
    return path


def header(path, change):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return path


def entry(**changes):
    return lambda h: {**h, "w": {**h["w"], **changes}}


def shard_index(folder, change):
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, "weight_map": change(data["weight_map"])}))
    return folder


def st_file(d):
    return ref.write_safetensors(d / "ckpt_7.safetensors", ref.constant(7))


def pt_file(d):
    return plain(d / "ckpt_7.pt", ref.constant(7))


def shard_folder(d):
    return write_hf(d / "step7", {"a": torch.ones(4), "b": torch.ones(4)}, shards=2)


def raw_file(path, content):
    path.write_bytes(content)
    return path


def without(folder, name):
    (folder / name).unlink()
    return folder


# what a clone without git-lfs holds
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
SHARD = "model-00002-of-00002.safetensors"
BROKEN = {
    "truncated data": (lambda d: cut(st_file(d), -1), ["ckpt_7"]),
    "truncated header": (lambda d: cut(st_file(d), 20), ["ckpt_7"]),
    "shorter than a length": (lambda d: cut(st_file(d), 5), ["ckpt_7"]),
    "empty file": (lambda d: cut(st_file(d), 0), ["ckpt_7"]),
    "huge header length": (
        lambda d: raw_file(d / "ckpt_7.safetensors", b"\xff" * 7 + b"\x0f" + b"{}"),
        ["ckpt_7"],
    ),
    "negative header length": (
        lambda d: raw_file(d / "ckpt_7.safetensors", b"\xff" * 8 + b"{}"),
        ["ckpt_7"],
    ),
    "header is no JSON": (
        lambda d: raw_file(d / "ckpt_7.safetensors", struct.pack("<Q", 8) + b"{nonsens"),
        ["ckpt_7"],
    ),
    "header is a list": (
        lambda d: raw_file(d / "ckpt_7.safetensors", struct.pack("<Q", 2) + b"[]"),
        ["ckpt_7"],
    ),
    "not UTF-8": (
        lambda d: raw_file(d / "ckpt_7.safetensors", struct.pack("<Q", 4) + b"\xff\xfe\x00{"),
        ["ckpt_7"],
    ),
    "offsets past the end": (
        lambda d: header(st_file(d), entry(data_offsets=[0, 10**6], shape=[250000])),
        ["ckpt_7"],
    ),
    "offsets backwards": (lambda d: header(st_file(d), entry(data_offsets=[48, 0])), ["ckpt_7"]),
    "negative offsets": (lambda d: header(st_file(d), entry(data_offsets=[-48, 0])), ["ckpt_7"]),
    "shape against size": (lambda d: header(st_file(d), entry(shape=[4, 4])), ["ckpt_7"]),
    "negative shape": (lambda d: header(st_file(d), entry(shape=[-4, -3])), ["ckpt_7"]),
    "entry without offsets": (
        lambda d: header(st_file(d), lambda h: {**h, "w": {"dtype": "F32", "shape": [4, 3]}}),
        ["ckpt_7"],
    ),
    "unknown type": (lambda d: header(st_file(d), entry(dtype="F13")), ["ckpt_7"]),
    "shape is text": (lambda d: header(st_file(d), entry(shape="ab")), ["ckpt_7"]),
    "shape of fractions": (lambda d: header(st_file(d), entry(shape=[4.0, 3.0])), ["ckpt_7"]),
    "offsets of fractions": (
        lambda d: header(st_file(d), entry(data_offsets=[0.0, 48.0])),
        ["ckpt_7"],
    ),
    "type is a list": (lambda d: header(st_file(d), entry(dtype=["F32"])), ["ckpt_7"]),
    "metadata is a number": (
        lambda d: header(st_file(d), lambda h: {"__metadata__": 3, **h}),
        ["ckpt_7"],
    ),
    "no tensors": (lambda d: ref.write_safetensors(d / "ckpt_7.safetensors", {}), ["ckpt_7"]),
    "truncated pt": (lambda d: cut(pt_file(d), -200), ["ckpt_7"]),
    "empty pt": (lambda d: cut(pt_file(d), 0), ["ckpt_7"]),
    "text as pt": (lambda d: raw_file(d / "ckpt_7.pt", LFS), ["ckpt_7"]),
    "text as safetensors": (lambda d: raw_file(d / "ckpt_7.safetensors", LFS), ["ckpt_7"]),
    "pt holds a list": (lambda d: plain(d / "ckpt_7.pt", [torch.ones(2)]), ["ckpt_7"]),
    "pt holds no tensor": (lambda d: plain(d / "ckpt_7.pt", {"epoch": 3}), ["ckpt_7"]),
    "pt holds only an optimizer": (
        lambda d: plain(d / "ckpt_7.pt", {"optimizer": ADAM, "epoch": 1}),
        ["ckpt_7"],
    ),
    "missing shard": (lambda d: without(shard_folder(d), SHARD), ["step7", SHARD]),
    "index names a tensor its shard lacks": (
        lambda d: shard_index(shard_folder(d), lambda m: {**m, "c": SHARD}),
        ["step7", "c"],
    ),
    "index swaps shards": (
        lambda d: shard_index(
            shard_folder(d), lambda m: dict(zip(m, list(m.values())[::-1], strict=True))
        ),
        ["step7"],
    ),
    "index is no JSON": (
        lambda d: (
            (shard_folder(d) / "model.safetensors.index.json").write_text("{") and d / "step7"
        ),
        ["step7"],
    ),
    "index without a map": (
        lambda d: (
            (shard_folder(d) / "model.safetensors.index.json").write_text("{}") and d / "step7"
        ),
        ["step7"],
    ),
    "index maps to numbers": (
        lambda d: shard_index(shard_folder(d), lambda m: dict.fromkeys(m, 3)),
        ["step7"],
    ),
    "index maps to folders": (
        lambda d: shard_index(shard_folder(d), lambda m: dict.fromkeys(m, "..")),
        ["step7"],
    ),
    "map is a list": (lambda d: shard_index(shard_folder(d), list), ["step7"]),
    "truncated shard": (lambda d: cut(shard_folder(d) / SHARD, -3).parent, ["step7", SHARD]),
    "folder without weights": (
        lambda d: without(write_hf(d / "step7", ref.constant(7)), "model.safetensors"),
        ["step7"],
    ),
    "no such file": (lambda d: d / "ckpt_7.safetensors", ["ckpt_7"]),
    "unknown suffix": (lambda d: raw_file(d / "ckpt_7.xyz", b"abc"), ["ckpt_7"]),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_named(case, tmp_path):
    """One line, the file's name, and no other kind of exception: at opening, or at the latest when
    the tensors are read."""
    make, names = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(LawaError) as caught:
        dict(open_checkpoint(path))
    message = str(caught.value)
    assert all(n in message for n in names), message
    assert "\n" not in message
    ref.write_safetensors(tmp_path / "ckpt_8.safetensors", ref.constant(8))
    with pytest.raises(LawaError) as caught:
        average_files(
            open_trajectory([path, tmp_path / "ckpt_8.safetensors"]),
            {tmp_path / "out.safetensors": (lawa(2), 8)},
        )
    assert names[0] in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4
    )
)
def test_any_damage_to_a_header(changes):
    """Random bytes written over the length and the JSON: read as something, or refused; never
    another exception."""
    with tempfile.TemporaryDirectory() as folder:
        path = ref.write_safetensors(
            Path(folder) / "ckpt_7.safetensors", ref.constant(7), {"format": "pt"}
        )
        raw = bytearray(path.read_bytes())
        size = 8 + struct.unpack("<Q", raw[:8])[0]
        for place, new in changes:
            raw[place % size : place % size + len(new)] = new
        path.write_bytes(raw)
        try:
            dict(open_checkpoint(path))
        except LawaError as error:
            assert "ckpt_7" in str(error) and "\n" not in str(error)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class EvilSystem(Evil):
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("evil", [Evil, EvilSystem])
@pytest.mark.parametrize(
    "kind",
    ["zip", "legacy", "bare pickle", "hf bin", "hf bin shard", "dcp", "inside the optimizer"],
)
def test_code_in_a_pickle_is_refused_and_not_run(kind, evil, tmp_path):
    mark = tmp_path / "it_ran"
    payload = {"w": torch.ones(2), "x": evil(mark)}
    path = tmp_path / "ckpt_5.pt"
    if kind == "zip":
        torch.save(payload, path)
    elif kind == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps({"x": evil(mark)}))
    elif kind == "inside the optimizer":
        torch.save({"model": {"w": torch.ones(2)}, "optimizer": evil(mark)}, path)
    elif kind == "dcp":
        path = ref.write_distributed(tmp_path / "step5", {"w": torch.ones(2)})
        (path / ".metadata").write_bytes(pickle.dumps(evil(mark)))
    else:
        path = write_hf(
            tmp_path / "step5",
            {"a": torch.ones(2), "b": torch.ones(2)},
            "bin",
            shards=2 if "shard" in kind else 1,
        )
        torch.save(payload, sorted(path.glob("*.bin"))[0])
    with pytest.raises(LawaError) as caught:
        dict(open_checkpoint(path))
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()


def test_dcp_metadata_that_hides_code_among_real_classes(tmp_path):
    """The true metadata, with one more object on the stack."""
    mark = tmp_path / "it_ran"
    folder = ref.write_distributed(tmp_path / "step5", {"w": torch.ones(2)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = EvilSystem(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(LawaError, match="step5"):
        dict(open_checkpoint(folder))
    assert not mark.exists()


def test_dcp_metadata_of_another_kind(tmp_path):
    folder = ref.write_distributed(tmp_path / "step5", {"w": torch.ones(2)})
    for content in (pickle.dumps({"w": 1}), b"", b"not a pickle"):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(LawaError, match="step5"):
            dict(open_checkpoint(folder))


def test_dcp_missing_piece(tmp_path):
    folder = ref.write_distributed(tmp_path / "step5", {"w": torch.ones(2)})
    for piece in folder.glob("*.distcp"):
        piece.unlink()
    with pytest.raises(LawaError, match="step5"):
        dict(open_checkpoint(folder))


SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, Replicate, distribute_tensor
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for step in (10, 20):
    w, v = torch.arange(35.0).reshape(5, 7) * step, torch.arange(12.0).reshape(3, 4) + step
    state = {
        "w": distribute_tensor(w, mesh, [Shard(0)]),
        "v": distribute_tensor(v, mesh, [Shard(1)]),
        "r": distribute_tensor(v[0].clone(), mesh, [Replicate()]),
    }
    dcp.save({"model": state}, checkpoint_id=f"{folder}/step{step}")
dist.barrier()
os._exit(0)  # the group's own teardown is not what is tested
"""


def test_dcp_written_by_two_ranks(tmp_path):
    """Uneven rows, columns and replicas of DTensors: the pieces are put together."""
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    errors = [r.communicate(timeout=90)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], errors
    got = open_checkpoint(tmp_path / "step10")
    assert got["w"].tolist() == (torch.arange(35.0).reshape(5, 7) * 10).tolist()
    trajectory = open_trajectory([tmp_path / "step10", tmp_path / "step20"])
    average_files(trajectory, {tmp_path / "out.safetensors": (lawa(2), 20)}, tile=8)
    out = ref.read_safetensors(tmp_path / "out.safetensors")[0]
    for mean in (average(trajectory), out):
        assert mean["w"].tolist() == (torch.arange(35.0).reshape(5, 7) * 15).tolist()
        assert mean["v"].tolist() == (torch.arange(12.0).reshape(3, 4) + 15).tolist()
        assert mean["r"].tolist() == [15, 16, 17, 18]


# ------------------------------------------------------------------ interrupted

STEPS = list(range(1, 7))
RECIPE = {"a": (3, 6), "b": (2, 5), "c": (6, 6)}  # name: k, at


def job(run, out, prelude="", call="None"):
    outputs = ", ".join(
        f"{str(out / n)!r} + '.safetensors': (lawa_core.lawa({k}), {at})"
        for n, (k, at) in RECIPE.items()
    )
    return [
        sys.executable,
        "-c",
        f"""
import os, signal, sys, lawa_core
# a shell's background jobs are born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
{prelude}
trajectory = lawa_core.open_trajectory({str(run)!r})
outputs = {{{outputs}}}
lawa_core.average_files(trajectory, outputs, tile=65536, threads=1, progress={call})
""",
    ]


def pieces(s):
    rng = torch.Generator().manual_seed(s)
    return {f"h.{i}.w": torch.randn(60000, generator=rng) for i in range(6)} | {
        "n": torch.tensor(s)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run, its three averages, and how often progress was reported."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ref.write_run(folder / "run", STEPS, pieces)
    (folder / "out").mkdir()
    calls = []
    outputs = {folder / "out" / f"{n}.safetensors": (lawa(k), at) for n, (k, at) in RECIPE.items()}
    average_files(
        open_trajectory(folder / "run"),
        outputs,
        tile=65536,
        threads=1,
        progress=lambda *a: calls.append(a),
    )
    for n, (k, at) in RECIPE.items():
        states = [pieces(s) for s in range(at - k + 1, at + 1)]
        ref.assert_state(
            ref.read_safetensors(folder / "out" / f"{n}.safetensors")[0],
            ref.average(states, [1 / k] * k),
        )
    return folder, {p.name: p.read_bytes() for p in (folder / "out").iterdir()}, len(calls)


KILL = """
count = 0
def stop(*args):
    global count
    count += 1
    if count == {n}: os.kill(os.getpid(), signal.{signal})
"""


SLOW = """
count = 0
def stop(*args):
    global count
    count += 1
    if count == {n}: time.sleep(1.1)                        # progress is noted once a second
    if count == {n} + 3: os.kill(os.getpid(), signal.SIGKILL)
    print(count, flush=True)
"""


def stopped_late(run, out, calls, change=lambda part: part):
    """A job that has noted its progress and then dies in the middle."""
    command = [
        change(part) for part in job(run, out, "import time\n" + SLOW.format(n=calls // 2), "stop")
    ]
    assert subprocess.run(command, cwd=HOME, capture_output=True).returncode == -signal.SIGKILL


@pytest.mark.parametrize("where", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_killed_half_way_and_run_again_gives_the_same_bytes(where, undisturbed, tmp_path):
    folder, want, calls = undisturbed
    out = tmp_path / "out"
    out.mkdir()
    before = ref.digest(folder / "run")
    died = subprocess.run(
        job(
            folder / "run", out, KILL.format(n=max(1, int(where * calls)), signal="SIGKILL"), "stop"
        ),
        cwd=HOME,
    )
    assert died.returncode == -signal.SIGKILL
    for p in out.glob("*.safetensors"):  # what has its final name is whole
        assert p.read_bytes() == want[p.name]
    again = subprocess.run(job(folder / "run", out), cwd=HOME, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == want  # and nothing else is left
    assert ref.digest(folder / "run") == before


def test_remains_of_another_job_are_not_mixed_in(undisturbed, tmp_path):
    """Killed, then the run is trained anew (same names, same sizes): the second call must not trust
    the first one's half."""
    folder, _, calls = undisturbed
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder / "run", run)
    out.mkdir()
    stopped_late(run, out, calls)
    ref.write_run(run, STEPS, lambda s: {n: t + 1 for n, t in pieces(s).items()})
    again = subprocess.run(job(run, out), cwd=HOME, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    for n, (k, at) in RECIPE.items():
        states = [{m: t + 1 for m, t in pieces(s).items()} for s in range(at - k + 1, at + 1)]
        ref.assert_state(
            ref.read_safetensors(out / f"{n}.safetensors")[0], ref.average(states, [1 / k] * k)
        )


def test_remains_of_other_weights_are_not_mixed_in(undisturbed, tmp_path):
    folder, want, calls = undisturbed
    out = tmp_path / "out"
    out.mkdir()
    stopped_late(
        folder / "run",
        out,
        calls,
        lambda part: part.replace("lawa_core.lawa(", "lawa_core.ema(1 / "),
    )
    assert subprocess.run(job(folder / "run", out), cwd=HOME).returncode == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == want


def test_a_repaired_input_is_read_again(undisturbed, tmp_path):
    """Killed; then one input is copied anew and differs in a single value that no sample would
    see."""
    folder, _, calls = undisturbed
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder / "run", run)
    out.mkdir()
    stopped_late(run, out, calls)
    fixed = pieces(6)
    fixed["h.0.w"][17] += 1
    ref.write_safetensors(run / "ckpt_6.safetensors", fixed)
    assert subprocess.run(job(run, out), cwd=HOME).returncode == 0
    for n, (k, at) in RECIPE.items():
        states = [fixed if s == 6 else pieces(s) for s in range(at - k + 1, at + 1)]
        ref.assert_state(
            ref.read_safetensors(out / f"{n}.safetensors")[0], ref.average(states, [1 / k] * k)
        )


def test_a_nan_seen_before_the_kill_is_not_forgotten(undisturbed, tmp_path):
    """It sits in the first tensor; the job dies later; the second call must still refuse."""
    folder, _, calls = undisturbed
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder / "run", run)
    out.mkdir()
    bad = pieces(6)
    bad["h.0.w"][17] = float("nan")
    ref.write_safetensors(run / "ckpt_6.safetensors", bad)
    stopped_late(run, out, calls)
    again = subprocess.run(job(run, out), cwd=HOME, capture_output=True, text=True)
    assert again.returncode != 0 and "h.0.w" in again.stderr
    assert list(out.glob("*.safetensors")) == []


@pytest.mark.parametrize(
    "name", ["w", "www"]
)  # with one of these lengths the headers of both types have the same length
def test_remains_of_another_type_are_not_mixed_in(name, tmp_path):
    """float16 and bfloat16 outputs have the same size: the first half of one must not end up in the
    other."""
    run, out = tmp_path / "run", tmp_path / "out"
    states = {
        s: {name: torch.randn(1_600_000, generator=torch.Generator().manual_seed(s))}
        for s in (1, 2)
    }
    ref.write_run(run, states, states.get)
    out.mkdir()

    def command(dtype, prelude="", call="None"):
        return [
            sys.executable,
            "-c",
            f"""
import os, signal, time, lawa_core
{prelude}
outputs = {{{str(out / "mean.safetensors")!r}: (lawa_core.lawa(2), 2)}}
lawa_core.average_files({str(run)!r}, outputs, dtype={dtype!r}, tile=65536, threads=1,
                        progress={call})
""",
        ]

    died = subprocess.run(command("F16", SLOW.format(n=4), "stop"), cwd=HOME, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert subprocess.run(command("BF16"), cwd=HOME).returncode == 0
    got = ref.read_safetensors(out / "mean.safetensors")[0]
    assert got[name].dtype == torch.bfloat16
    ref.assert_state(got, ref.average(list(states.values()), [0.5, 0.5]))


def test_rerun_of_a_finished_job_changes_nothing(undisturbed, tmp_path):
    folder, want, _ = undisturbed
    outputs = {tmp_path / f"{n}.safetensors": (lawa(k), at) for n, (k, at) in RECIPE.items()}
    for _ in range(2):
        average_files(open_trajectory(folder / "run"), outputs, tile=65536, threads=2)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == want


def test_interrupt_leaves_no_output(undisturbed, tmp_path):
    folder, want, calls = undisturbed
    command = job(
        folder / "run", tmp_path, KILL.format(n=int(0.2 * calls), signal="SIGINT"), "stop"
    )
    done = subprocess.run(command, cwd=HOME, capture_output=True)
    assert done.returncode != 0
    assert all(p.read_bytes() == want[p.name] for p in tmp_path.glob("*.safetensors"))
    assert subprocess.run(job(folder / "run", tmp_path), cwd=HOME).returncode == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == want


def test_a_reader_that_fails_half_way_leaves_nothing(undisturbed, tmp_path):
    """A checkpoint cut short while the job runs."""
    folder, _, calls = undisturbed
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder / "run", run)
    out.mkdir()
    done = [0]

    def shrink(*_):
        done[0] += 1
        if done[0] == calls // 3:
            for p in run.iterdir():
                os.truncate(p, p.stat().st_size // 4)

    with pytest.raises(LawaError, match=r"ckpt_\d"):
        average_files(
            open_trajectory(run),
            {out / f"{n}.safetensors": (lawa(k), at) for n, (k, at) in RECIPE.items()},
            tile=65536,
            threads=1,
            progress=shrink,
        )
    assert list(out.glob("*.safetensors")) == []


FULL = """
import resource, sys, lawa_core
if {limit}: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)
try:
    if {save}:
        import torch
        lawa_core.save({out!r} + "/ckpt_1.safetensors", {{"w": torch.ones(300000)}})
    else:
        outputs = {{{out!r} + "/mean.safetensors": (lawa_core.lawa(3), 6)}}
        lawa_core.average_files(lawa_core.open_trajectory({run!r}), outputs)
except (lawa_core.LawaError, OSError) as error:
    # save may pass on the system's error, if that names the file
    assert isinstance(error, lawa_core.LawaError) or {save}, error
    print("refused:", error)
"""


def small_disk(folder):
    """Prefix of a command that runs with a 512 KB file system at `folder`; None where this user may
    not mount one."""
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=512k none {folder} && "$@" && ls -A {folder}',
        "sh",
    ]
    try:
        return (
            command
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0
            else None
        )
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("how", ["file size limit", "full disk"])
@pytest.mark.parametrize("what", ["average_files", "save"])
def test_disk_full(how, what, undisturbed, tmp_path):
    """A clear error that names the output, and the space is given back."""
    folder, _, _ = undisturbed
    before = ref.digest(folder / "run")
    prefix = []
    if how == "full disk" and (prefix := small_disk(tmp_path)) is None:
        pytest.skip("this user may not mount a small file system")
    code = FULL.format(
        limit=512 << 10 if how == "file size limit" else 0,
        save=what == "save",
        run=str(folder / "run"),
        out=str(tmp_path),
    )
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    first, *listing = done.stdout.splitlines()
    assert first.startswith("refused:") and str(tmp_path) in first
    assert listing == [] and os.listdir(tmp_path) == []
    assert ref.digest(folder / "run") == before


@pytest.mark.parametrize(
    ("name", "at", "dtype", "named"),
    [
        ("file/mean.safetensors", 30, None, "mean.safetensors"),
        ("mean.safetensors", 35, None, "35"),
        ("mean.safetensors", 30, "int7", "int7"),
        ("mean.safetensors", 30, "I64", "I64"),  # would cut off every fraction
    ],
)
def test_outputs_that_cannot_be(name, at, dtype, named, tmp_path):
    ref.write_run(tmp_path / "run", TENS)
    (tmp_path / "file").write_text("")
    with pytest.raises(LawaError, match=named):
        average_files(
            open_trajectory(tmp_path / "run"), {tmp_path / name: (lawa(2), at)}, dtype=dtype
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_no_outputs_at_all(tmp_path):
    with pytest.raises(LawaError):
        average_files(open_trajectory(ref.write_run(tmp_path, TENS)), {})


def test_one_bad_output_of_several_stops_all(tmp_path):
    """Checked before the first byte is written."""
    ref.write_run(tmp_path / "run", TENS)
    outputs = {
        tmp_path / "a.safetensors": (lawa(2), 30),
        tmp_path / "b.safetensors": (explicit([1, 1], spacing=7), 30),
    }
    with pytest.raises(LawaError, match=r"\b23\b"):
        average_files(open_trajectory(tmp_path / "run"), outputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


# ------------------------------------------------------------------ Hugging Face


def test_averaged_folder_loads_in_transformers(tmp_path):
    """A tiny random GPT-2, three steps, tied head: the average as a folder, opened by the other
    library."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16)
    states = {}
    for s in TENS:
        torch.manual_seed(s)
        model = transformers.GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / "run" / f"step{s}")
        states[s] = {n: t.detach().clone() for n, t in model.named_parameters()}
    before = ref.digest(tmp_path / "run")
    average_files(open_trajectory(tmp_path / "run"), {tmp_path / "mean": (newest_two(), 30)})
    mean = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "mean")
    want = ref.average([states[20], states[30]], [0.5, 0.5])
    ref.assert_state(dict(mean.named_parameters()), want)
    assert mean.lm_head.weight.data_ptr() == mean.transformer.wte.weight.data_ptr()
    assert ref.digest(tmp_path / "run") == before


def newest_two():
    return lawa(2)


def test_copied_config_states_the_real_type(tmp_path):
    """A config that says float16 beside float32 weights would make loaders round them."""
    for s in (1, 2):
        write_hf(tmp_path / "run" / f"step{s}", ref.constant(s, torch.float16))
        (tmp_path / "run" / f"step{s}" / "config.json").write_text(
            '{"model_type": "gpt2", "torch_dtype": "float16"}'
        )
    average_files(open_trajectory(tmp_path / "run"), {tmp_path / "mean": (lawa(2), 2)}, dtype="F32")
    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    assert "float16" not in json.dumps(config) and "float32" in json.dumps(config)
    assert open_checkpoint(tmp_path / "mean")["b"].item() == 1.5


def test_newest_alone_is_the_file_itself(tmp_path):
    """Tensors of the run itself, whatever `at` is."""
    ref.write_run(tmp_path / "run", TENS, ref.example)
    for s in TENS:
        average_files(
            open_trajectory(tmp_path / "run"), {tmp_path / f"run_{s}.safetensors": (newest(), s)}
        )
        assert ref.state_bits(
            ref.read_safetensors(tmp_path / f"run_{s}.safetensors")[0]
        ) == ref.state_bits(ref.example(s))


@pytest.mark.parametrize("name", ["TORCH_CONTIGUOUS_FORMAT", "__class__"])
def test_an_index_that_names_an_enum_by_getattr(name, tmp_path):
    """As Python 3.11.0 to 3.11.3 pickle one; an attribute that is no member is refused."""
    ref.write_distributed(tmp_path / "step7", {"w": torch.ones(3)})
    index = pickle.loads((tmp_path / "step7" / ".metadata").read_bytes())

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, enum.Enum):
                return getattr, (type(value), name)
            return NotImplemented

    with open(tmp_path / "step7" / ".metadata", "wb") as file:
        Pickler(file).dump(index)
    if name == "__class__":
        with pytest.raises(LawaError, match="not a readable distributed checkpoint"):
            open_checkpoint(tmp_path / "step7")
    else:
        assert open_checkpoint(tmp_path / "step7")["w"].tolist() == [1, 1, 1]
