"""The command line: what goes in, what comes out, and how it fails."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reference as ref
import torch

import lawa_core

SCRIPT = Path(lawa_core.__file__)
TENS = [10, 20, 30, 40, 50]


def lawa_py(*args, cwd=None, **options):
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, **options
    )


def good(*args, **options):
    done = lawa_py(*args, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*args, status=2, **options):
    """The error line of a run that must fail: one line, nothing else on stderr, nothing on stdout
    that looks like success."""
    done = lawa_py(*args, **options)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == status, (done.returncode, done.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture
def run(tmp_path):
    """Checkpoints whose every weight is their step; the whole folder must be the same
    afterwards."""
    paths = ref.write_run(tmp_path / "run", TENS)
    before = ref.digest(tmp_path / "run")
    yield paths
    assert ref.digest(tmp_path / "run") == before


# ------------------------------------------------------------------ average


@pytest.mark.parametrize(
    ("args", "want"),
    [
        ([], 30.0),  # every checkpoint given, uniformly
        (["--k", 2], 45.0),
        (["--k", 3, "--spacing", 20], 30.0),
        (["--k", 2, "--spacing", 20], 40.0),
        (["--k", 2, "--at", 30], 25.0),
        (["--at", 20], 15.0),
        (["--weights", "1,3"], 47.5),
        (["--scheme", "swa", "--at", 40], 25.0),
        (["--scheme", "ema(0.5)", "--at", 30], 22.5),
        (["--scheme", "lawa(k=2, spacing=20)"], 40.0),
        (["--scheme", "decay(window=20, shape='linear')"], 40.0),
        (["--scheme", "explicit([1, 3])"], 47.5),
        (["--scheme", "newest"], 50.0),
        (["--weights", "1,3", "--spacing", 20], 45.0),
        (["--k", 2, "--spacing", 2000, "--tokens-per-step", 100], 40.0),
    ],
    ids=str,
)
def test_average(args, want, run, tmp_path):
    good("average", *run, "-o", tmp_path / "out.safetensors", *args)
    state = ref.read_safetensors(tmp_path / "out.safetensors")[0]
    assert state["w"].tolist() == [[want] * 3] * 4 and state["b"].item() == want


def test_average_of_a_folder_and_of_a_glob(run, tmp_path):
    good("average", tmp_path / "run", "-o", tmp_path / "a.safetensors", "--k", "2")
    good("average", "run/ckpt_*.safetensors", "-o", "b.safetensors", "--k", "2", cwd=tmp_path)
    assert ref.read_safetensors(tmp_path / "a.safetensors")[0]["b"].item() == 45.0
    assert ref.read_safetensors(tmp_path / "b.safetensors")[0]["b"].item() == 45.0


def test_the_order_of_the_arguments_does_not_matter(run, tmp_path):
    """Shells sort ckpt_900 after ckpt_1000."""
    good("average", *run[::-1], "-o", tmp_path / "out.safetensors", "--weights", "1,3")
    assert ref.read_safetensors(tmp_path / "out.safetensors")[0]["b"].item() == 47.5


@pytest.mark.parametrize("name", ["F16", "BF16", "F64"])
def test_dtype(name, run, tmp_path):
    good("average", *run, "-o", tmp_path / "out.safetensors", "--dtype", name)
    assert ref.NAMES[ref.read_safetensors(tmp_path / "out.safetensors")[0]["w"].dtype] == name


def test_pt_in_and_out_with_key(tmp_path):
    for s in (1, 3):
        torch.save(
            {"model": {"w": torch.zeros(2)}, "ema": {"_orig_mod.w": torch.full((2,), float(s))}},
            tmp_path / f"ckpt_{s}.pt",
        )
    good(
        "average",
        tmp_path / "ckpt_1.pt",
        tmp_path / "ckpt_3.pt",
        "-o",
        tmp_path / "out.pt",
        "--key",
        "ema",
    )
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert made["ema"]["w"].tolist() == [2.0, 2.0] and list(made) == ["ema"]
    line = refused(
        "average", tmp_path / "ckpt_1.pt", "-o", tmp_path / "other.pt", "--key", "nothing"
    )
    assert "nothing" in line and "ckpt_1" in line


def test_progress_goes_beside_the_result(run, monkeypatch, capsys):
    inspect = lawa_core.inspect

    def slow(trajectory):
        print("inspect: 1 of 2, 1 left")  # as `progress` does where there is no terminal
        return inspect(trajectory)

    monkeypatch.setattr(lawa_core, "inspect", slow)
    assert lawa_core.main(["inspect", *map(str, run), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["checkpoints"] and "1 of 2" in printed.err


def test_json_describes_the_output(run, tmp_path):
    out = tmp_path / "out.safetensors"
    report = json.loads(good("average", *run, "-o", out, "--weights", "0.25,0.75", "--json"))
    text = json.dumps(report)
    assert (
        "out.safetensors" in text
        and "ckpt_40" in text
        and "ckpt_50" in text
        and "ckpt_30" not in text
    )
    assert "0.25" in text and "0.75" in text


def test_no_torch_for_safetensors(run, tmp_path):
    """torch takes seconds to import and half a gigabyte of address space."""
    code = f"""
import runpy, sys
sys.argv = ["lawa_core.py", "average", *{[str(p) for p in run]!r}, "--k", "3"]
sys.argv += ["-o", {str(tmp_path / "out.safetensors")!r}]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [m for m in ("torch", "transformers", "matplotlib", "pandas", "scipy") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ref.read_safetensors(tmp_path / "out.safetensors")[0]["b"].item() == 40.0


def test_the_same_bytes_from_the_command_and_from_the_function(run, tmp_path):
    """No clock, host or user in the header: two runs, one result."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    good("average", tmp_path / "run", "-o", tmp_path / "a" / "mean.safetensors", "--k", "3")
    time.sleep(1.1)
    good("average", tmp_path / "run", "-o", tmp_path / "b" / "mean.safetensors", "--k", "3")
    assert (tmp_path / "a" / "mean.safetensors").read_bytes() == (
        tmp_path / "b" / "mean.safetensors"
    ).read_bytes()


# ------------------------------------------------------------------ how it fails


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--k", 0], "k"),
        (["--k", "two"], "k"),
        (["--k", -3], "k"),
        (["--k", 2, "--spacing", 0], "spacing"),
        (["--k", 2, "--spacing", 15], "35"),
        (["--k", 2, "--at", 45], "45"),
        (["--weights", "1,nan"], "nan"),
        (["--weights", "1,-1"], "0"),
        (["--weights", "one,two"], "one"),
        (["--weights", "1,2", "--k", 3], "k"),  # one of them would be ignored
        (["--spacing", 20], "spacing"),  # without --k it would be ignored
        (["--scheme", "swa", "--k", 3], "k"),
        (["--scheme", "swa", "--scheme", "newest"], "scheme"),
        (["--scheme", "__import__('os').system('true')"], "scheme"),
        (["--threads", -1], "threads"),
        (["--allow", "everything"], "everything"),
        (["--scheme", "magic"], "magic"),
        (["--dtype", "int7"], "int7"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids=str,
)
def test_bad_arguments(args, named, run, tmp_path):
    line = refused("average", *run, "-o", tmp_path / "out.safetensors", *args)
    assert named in line.lower()
    assert os.listdir(tmp_path) == ["run"]


def damage(case, folder):
    """Spoil a copy of the run; -> what the error must name."""
    newest = folder / "ckpt_50.safetensors"
    if case == "truncated":
        newest.write_bytes(newest.read_bytes()[:-7])
        return ["ckpt_50"]
    if case == "corrupt header":
        newest.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all.")
        return ["ckpt_50"]
    if case == "missing key":
        ref.write_safetensors(newest, {"w": torch.ones(4, 3)})
        return ["ckpt_", "b"]
    if case == "broadcast":
        ref.write_safetensors(newest, {"w": torch.ones(4, 3), "b": torch.ones(1)})
        return ["ckpt_", "b"]
    if case == "nan":
        ref.write_safetensors(
            newest, {"w": torch.full((4, 3), float("nan")), "b": torch.tensor(50.0)}
        )
        return ["ckpt_50", "w"]
    if case == "twins":
        shutil.copy(folder / "ckpt_40.safetensors", newest)
        return ["40", "50"]
    if case == "gone":
        newest.unlink()
        return ["ckpt_50"]
    torch.save({"w": os.system}, folder / "ckpt_60.pt")
    return ["ckpt_60"]


@pytest.mark.parametrize(
    "case",
    [
        "truncated",
        "corrupt header",
        "missing key",
        "broadcast",
        "nan",
        "twins",
        "gone",
        "pickle with code",
    ],
)
def test_bad_inputs(case, run, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(tmp_path / "run", folder)
    names = damage(case, folder)
    before = ref.digest(folder)
    done = lawa_py(
        "average",
        *[folder / p.name for p in run],
        *folder.glob("*.pt"),
        "-o",
        tmp_path / "out.safetensors",
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), (
        done.stderr
    )
    assert all(n in lines[0] for n in names), lines[0]
    assert ref.digest(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["bad", "run"]


def test_output_over_an_input(run, tmp_path):
    assert "ckpt_50" in refused("average", *run, "-o", run[-1])
    assert "ckpt_50" in refused(
        "average", "run", "-o", "run/../run/ckpt_50.safetensors", cwd=tmp_path
    )


def test_no_arguments_at_all():
    for args in ([], ["average"], ["no-such-command"]):
        done = lawa_py(*args)
        assert done.returncode == 2
        assert done.stderr.strip() and "Traceback" not in done.stderr


def test_an_unwritable_place(run, tmp_path):
    """A failed run, not a traceback."""
    (tmp_path / "file").write_text("")
    done = lawa_py("average", *run, "-o", tmp_path / "file" / "out.safetensors")
    assert (
        done.returncode in (1, 2)
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )


def test_disk_full(run, tmp_path):
    import resource

    paths = ref.write_run(
        tmp_path / "big", [1, 2], lambda s: {"w": torch.full((100_000,), float(s))}
    )
    out = tmp_path / "out.safetensors"
    line = refused(
        "average",
        *paths,
        "-o",
        out,
        status=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert "out.safetensors" in line
    assert sorted(os.listdir(tmp_path)) == ["big", "run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(number, tmp_path):
    """No traceback, no output under its final name, a status that says so."""
    base = torch.randn(4 << 20)
    for s in range(6):
        base[0] = s
        ref.write_safetensors(tmp_path / f"ckpt_{s}.safetensors", {"w": base})
    out = tmp_path / "out.safetensors"
    child = subprocess.Popen(
        [sys.executable, SCRIPT, "average", tmp_path, "-o", out, "--k", "6"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None and len(os.listdir(tmp_path)) == 6:  # until it begins to write
        time.sleep(0.002)
    child.send_signal(number)
    errors = child.communicate()[1]
    if child.returncode == 0:
        pytest.skip("it was faster than the signal")
    assert "Traceback" not in errors
    assert not out.exists()


# ------------------------------------------------------------------ the other commands


def test_inspect(run, tmp_path):
    """Steps, sizes, types."""
    text = good("inspect", tmp_path / "run")
    assert all(str(s) in text for s in TENS) and "F32" in text
    report = json.loads(good("inspect", tmp_path / "run", "--json"))
    assert [line["step"] for line in report["checkpoints"]] == TENS
    assert {(line["parameters"], line["bytes"]) for line in report["checkpoints"]} == {(13, 52)}
    assert report["problems"] == []


def test_inspect_of_zeros_and_of_integers(tmp_path):
    """A norm of 0 divides nothing."""
    ref.write_run(tmp_path / "zeros", [1, 2], lambda s: {"w": torch.zeros(3), "n": torch.tensor(s)})
    ref.write_run(tmp_path / "integers", [1, 2], lambda s: {"n": torch.tensor(s)})
    for name in ("zeros", "integers"):
        done = lawa_py("inspect", tmp_path / name)
        assert "Traceback" not in done.stderr, done.stderr[-300:]
        assert "1" in done.stdout and "2" in done.stdout


def test_inspect_shows_problems(run, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "bad")
    ref.write_safetensors(
        tmp_path / "bad" / "ckpt_40.safetensors", {"w": torch.ones(4, 4), "b": torch.ones(())}
    )
    done = lawa_py("inspect", tmp_path / "bad")
    assert "ckpt_40" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_inspect_nothing(tmp_path):
    assert "nothing_here" in refused("inspect", tmp_path / "nothing_here")


@pytest.mark.parametrize(
    "command", [[], ["average"], ["inspect"], ["sweep"], ["search"], ["export"]], ids=str
)
def test_help(command):
    assert "usage" in good(*command, "--help").lower()


# ------------------------------------------------------------------ sweep, export, search


def test_sweep(run, tmp_path):
    """A folder per scheme, each a trajectory."""
    good(
        "sweep",
        tmp_path / "run",
        "--scheme",
        "lawa(k=2)",
        "--scheme",
        "swa(start=20)",
        "--every",
        "20",
        "-o",
        tmp_path / "out",
    )
    folders = sorted(p for p in (tmp_path / "out").iterdir())
    assert len(folders) == 2
    want = {"lawa": {20: 15.0, 40: 35.0}, "swa": {20: 20.0, 40: 30.0}}
    for folder, name in zip(folders, ["lawa", "swa"], strict=True):
        assert folder.name.startswith(name)
        assert {
            s: ref.read_safetensors(folder / f"ckpt_{s}.safetensors")[0]["b"].item()
            for s in (20, 40)
        } == want[name]
        assert len(list(folder.iterdir())) == 2


def hugging_face(folder, state):
    folder.mkdir(parents=True)
    ref.write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text('{"model_type": "none", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "notes.txt").write_text("not for the copy")
    return folder


def test_export(run, tmp_path):
    """One checkpoint with another folder's config and tokenizer: the tensors bit for bit."""
    like = hugging_face(tmp_path / "like", ref.constant(1))
    good("export", run[2], "--like", like, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    got = ref.read_safetensors(tmp_path / "out" / "model.safetensors")
    assert ref.state_bits(got[0]) == ref.state_bits(ref.constant(30))
    assert got[1]["format"] == "pt"  # what transformers asks for
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "none"
    assert "out" in refused(
        "export", run[2], "--like", like, "-o", tmp_path / "out"
    )  # a folder in use is left alone


def test_average_of_folders_in_shards(tmp_path):
    """From shards cut differently to one file; config and tokenizer come from the newest input."""
    states = {s: {f"h.{i}": torch.full((1000,), float(s + i)) for i in range(5)} for s in (1, 3)}
    for s, cut in ((1, 2), (3, 4)):
        folder, names = hugging_face(tmp_path / "run" / f"step{s}", {}), sorted(states[s])
        (folder / "model.safetensors").unlink()
        parts = {"model-00001-of-00002.safetensors": names[:cut]}
        parts["model-00002-of-00002.safetensors"] = names[cut:]
        for part, held in parts.items():
            ref.write_safetensors(folder / part, {n: states[s][n] for n in held}, {"format": "pt"})
        places = {n: part for part, held in parts.items() for n in held}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "mean-v0.5"
    good("average", tmp_path / "run", "-o", out)
    got = ref.read_safetensors(out / "model.safetensors")[0]
    assert {n: set(t.tolist()) for n, t in got.items()} == {f"h.{i}": {2.0 + i} for i in range(5)}
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / "tokenizer.json").exists() and not (out / "notes.txt").exists()


VALIDATE = """
import json, struct, sys
raw = open(sys.argv[1], "rb").read()
size, = struct.unpack("<Q", raw[:8])
begin = json.loads(raw[8:8 + size])["b"]["data_offsets"][0] + 8 + size
value, = struct.unpack("<f", raw[begin:begin + 4])
print("a line without meaning 17")
print(abs(value - 30) + 1, abs(value - 30) + 1.5)
"""


def test_search(run, tmp_path):
    """Weights drift by 10 a checkpoint; the loss is least where the window's centre is 30: k = 5 at
    spacing 10."""
    script = tmp_path / "validate.py"
    script.write_text(VALIDATE)
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{}}"
    found = json.loads(good("search", tmp_path / "run", "--command", command, "--json"))
    assert found["best"].startswith("lawa(k=5, spacing=10")
    assert found["gain"] == pytest.approx(20)


def test_search_when_the_command_fails(run, tmp_path):
    for command in (
        "false {}",
        "true {}",
        "/no/such/program {}",
    ):  # fails, prints no number, is not there
        done = lawa_py("search", tmp_path / "run", "--command", command)
        assert (
            done.returncode == 1
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        )
    assert "{}" in refused("search", tmp_path / "run", "--command", "true")
