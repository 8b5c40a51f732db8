"""lab/runs.py: many runs at a time, to the bits each has alone, whatever fails or is killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import reference as ref

import lawa_core
import model
from lab import runs
from lab.runs import train_all
from lawa_core import LawaError
from model import Config, run_dir, train

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = 1_000_000  # steps, of runs that are stopped
THREADS = os.cpu_count() or 1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A short run on random bytes, in the format of data/corpus.py."""
    folder = tmp_path_factory.mktemp("corpora") / "tiny"
    folder.mkdir()
    sizes = {"train": 20_000, "val": 3000}
    for side, length in sizes.items():
        tokens = np.random.default_rng(0).integers(0, 256, length).astype("<u2")
        tokens.tofile(folder / f"{side}.bin")
    meta = {"name": "tiny", "vocab_size": 257, "eot_token": 256, "tokenizer": "gpt2"}
    meta |= {"manifest_sha256": "0", "seed": 0}
    meta |= {f"{s}_{unit}": n for s, n in sizes.items() for unit in ("tokens", "bytes")}
    (folder / "meta.json").write_text(json.dumps(meta))
    steps = {"max_iters": 12, "warmup_iters": 3, "ckpt_interval": 2}
    return Config(preset="pico", corpus=str(folder), lr=3e-3, batch_size=4, seed=7, **steps)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "RUNS", tmp_path / "runs")


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


def checkpoints(folder):
    """{path within the folder: bits of every tensor}, averages included."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, _ = ref.read_safetensors(path)
        found[path.relative_to(folder).as_posix()] = ref.state_bits(tensors)
    return found


def listing(folder):
    """Every file of a run but its lock, hidden ones included."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    files = [path for path in files if path.parent.name != "tb"]  # where tensorboard is installed
    return sorted(path.relative_to(folder).as_posix() for path in files)


def assert_same_run(got, want):
    """The same rows and weights, bit for bit, and the same files."""
    for table in want.glob("*.csv"):
        assert (got / table.name).read_text() == table.read_text()
    assert checkpoints(got) == checkpoints(want)
    assert listing(got) == listing(want)


def digest(folder):
    return {path: seen for path, seen in ref.digest(folder).items() if not path.endswith(".lock")}


def test_train_all(config, monkeypatch):
    """In order, each run once, what is finished left alone; one that fails is named when the others
    are done; every step is counted once."""
    totals, counted, shown = [], [], []

    real = lawa_core.progress

    def progress(total, desc, unit="it", disable=False, **options):
        if disable:  # of a run trained in this process
            return real(total, desc, unit, disable=True, **options)
        totals.append(total)
        bar = types.SimpleNamespace(update=counted.append, set_postfix_str=shown.append)
        return contextlib.nullcontext(bar)

    monkeypatch.setattr(lawa_core, "progress", progress)
    seeds = [changed(config, seed=seed) for seed in (0, 1)]
    done = train(seeds[0])
    before = digest(done)
    bad = changed(config, lr=1e30, warmup_iters=0)
    with pytest.raises(LawaError) as caught:
        train_all([bad, *seeds, seeds[1]], jobs=2)
    assert run_dir(bad).name in str(caught.value)
    assert run_dir(seeds[1]).name not in str(caught.value)
    assert "\n" not in str(caught.value) and "loss" in str(caught.value)
    assert digest(done) == before
    rows = (run_dir(seeds[1]) / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 13))
    assert totals == [24] and shown[-1] == "2 of 2 runs" and 12 <= sum(counted) <= 24
    monkeypatch.setattr(runs, "ProcessPoolExecutor", None)  # nothing to do: no process is started
    assert train_all([seeds[1], *seeds]) == [run_dir(seeds[1]), *map(run_dir, seeds)]


def test_a_worker_trains_each_run_to_the_bits_it_has_alone(config, tmp_path):
    """Runs that share a process, also after one that failed in it, share nothing else."""
    bad = changed(config, lr=1e30, warmup_iters=0)
    other = changed(config, preset="nano", averages="ema(0.9)")
    several = [changed(config, seed=1), other]
    with pytest.raises(LawaError):
        train_all([bad, *several], jobs=1)
    for number, one in enumerate(several):
        assert_same_run(run_dir(one), train(one, tmp_path / str(number), threads=THREADS))


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_that_begin_with_another_end_in_the_bits_they_have_alone(config, tmp_path, jobs):
    """Whatever comes later in them; and the other run is left as it is alone."""
    threads = max(THREADS // jobs, 1)
    trunk = changed(config, averages="ema(0.9); lawa(2, 1)", schedule="constant")
    later = {
        8: changed(trunk, averages="", burst_at=8, burst_iters=2, burst_factor=3.0),
        9: changed(trunk, averages="ema(0.9)", schedule="wsd", cooldown_frac=0.25),
        12: changed(trunk, max_iters=16),
    }
    (first,) = train_all([trunk], jobs, state_at=list(later))
    alone = train(trunk, tmp_path / "trunk", threads=threads, state_at=list(later))
    assert_same_run(first, alone)
    assert lawa_core.open_trajectory(first).steps == trunk.checkpoint_steps  # states are no weights
    before = digest(first)
    states = [first / f"state_{step}.pt" for step in later]
    folders = train_all(later.values(), jobs, resume_from=states)
    for step, config, folder in zip(later, later.values(), folders, strict=True):
        assert os.path.samefile(folder / "ckpt_8.safetensors", first / "ckpt_8.safetensors")
        assert_same_run(folder, train(config, tmp_path / str(step), threads=threads))
    assert digest(first) == before


def test_without_the_state_a_run_starts_at_its_beginning(config, tmp_path):
    """As when the run that should have left it was finished before."""
    (folder,) = train_all([config], 1, resume_from=[tmp_path / "state_4.pt"])
    assert_same_run(folder, train(config, tmp_path / "alone", threads=THREADS))


def test_a_run_that_has_begun_goes_on_with_its_own_state(config, tmp_path):
    other = train(changed(config, seed=8), tmp_path / "other", state_at=[4])
    train_all([config], 1)
    finished = digest(run_dir(config))
    train_all([config], 1, resume_from=[other / "state_4.pt"])
    assert digest(run_dir(config)) == finished


def test_as_many_states_as_runs(config):
    with pytest.raises(ValueError):
        train_all([config], resume_from=[])


# ---- several GPUs ----


def where(config, folder, options):
    """In place of training: note the GPU of this process, and wait until `seed` others have."""
    folder.mkdir(parents=True)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    (folder / f"{os.getpid()}-{gpu}").touch()
    for _ in range(600):
        pids = {path.name.split("-")[0] for path in folder.parent.glob("*/*-*")}
        if len(pids) >= config.seed // 10:
            break
        time.sleep(0.1)
    return ""


@pytest.mark.parametrize(
    ("devices", "jobs", "used"),
    [
        (["0", "1"], None, ["0", "1"]),
        (["GPU-a", "GPU-b", "GPU-c"], 2, ["GPU-a", "GPU-b"]),
        (["3", "5"], 3, ["3", "3", "5"]),
        ([], 2, ["none", "none"]),
    ],
)
def test_each_process_has_a_gpu_of_its_own(config, monkeypatch, devices, jobs, used):
    """And keeps it from run to run."""
    monkeypatch.delenv("LAWA_JOBS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(runs, "gpus", lambda: devices)
    monkeypatch.setattr(runs, "_train", where)
    seeds = [changed(config, seed=10 * len(used) + i) for i in range(len(used) + 2)]
    folders = train_all(seeds, jobs)
    notes = [path.name.split("-", 1) for folder in folders for path in folder.iterdir()]
    assert len(notes) == len(seeds)
    assert sorted(dict(notes).values()) == used


def test_gpus_are_those_that_may_be_used(monkeypatch):
    import torch

    monkeypatch.delenv("LAWA_JOBS", raising=False)
    assert runs.gpus() == [] and runs.usual_jobs() == THREADS
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runs.gpus() == ["0", "1"] and runs.usual_jobs() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-6")
    assert runs.gpus() == ["4", "GPU-6"]
    monkeypatch.setenv("LAWA_JOBS", "5")
    assert runs.usual_jobs() == 5


# ---- which checkpoints are kept ----


def test_windows_are_kept_whole_and_little_else(config):
    needs = (((lawa_core.lawa(2, 4),), (6, 10)), ((), (3, 4)))
    keep = runs.Windows(needs)
    (vocab, least) = 257, model.disk_bytes(config, 257, [2, 4, 6, 10, 12])
    assert model.kept_steps(config, vocab, keep, least) == {2, 4, 6, 10, 12}
    assert model.kept_steps(config, vocab, keep, 2 * least) == set(config.checkpoint_steps)
    with pytest.raises(LawaError, match="disk_budget"):
        model.kept_steps(config, vocab, keep, least - 1)
    (folder,) = train_all([config], 1, keep=keep, disk_budget=least)
    assert lawa_core.open_trajectory(folder).steps == [2, 4, 6, 10, 12]
    at = list(lawa_core.sweep(folder, {"two": lawa_core.lawa(2, 4)}, at=[6, 10]))
    assert [step for step, _, _ in at] == [6, 10]


# ---- TensorBoard ----


def test_events_for_tensorboard_where_it_is_installed(config, monkeypatch, tmp_path):
    """Loss, rate and gradient norm of every step, and the same run as without."""
    boards = []

    class Writer:
        """Stands for torch's SummaryWriter."""

        def __init__(self, folder, purge_step):
            self.folder, self.first, self.closed = folder, purge_step, False
            self.rows = []
            boards.append(self)

        def add_scalar(self, tag, value, step):
            self.rows.append((tag, value, step))

        def close(self):
            self.closed = True

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    alone = train(config, tmp_path / "alone", threads=THREADS)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    folder = train(config, tmp_path / "watched", threads=THREADS)
    assert_same_run(folder, alone)
    (board,) = boards
    assert board.closed and board.first == 1 and board.folder == folder / "tb"
    rates = [(step, value) for tag, value, step in board.rows if tag == "rate"]
    assert rates == [(step + 1, model.learning_rate(config, step)) for step in range(12)]
    assert {tag for tag, _, _ in board.rows} == {"loss", "rate", "gradient norm"}


def test_tensorboard_reads_what_is_written(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(config, tmp_path / "run")
    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))


# ---- what ends in the middle ----


def wait_for_steps(folders):
    """Until each run has rows in its metrics.csv."""
    for folder in folders:
        while (
            not (folder / "metrics.csv").exists()
            or "\n10," not in (folder / "metrics.csv").read_text()
        ):
            time.sleep(0.05)


def test_a_killed_process_is_an_error_that_names_the_runs(config):
    """The others save their states; no process is left; the same call goes on."""
    endless = [changed(config, max_iters=ENDLESS, seed=seed) for seed in (0, 1, 2)]
    folders = [run_dir(one) for one in endless]
    before = multiprocessing.active_children()

    def kill_one():
        wait_for_steps(folders[:2])
        new = [child for child in multiprocessing.active_children() if child not in before]
        new[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(LawaError, match="ended from outside") as caught:
        train_all(endless, jobs=2)
    killer.join()
    assert "\n" not in str(caught.value)
    assert all(folder.name in str(caught.value) for folder in folders)
    assert [child for child in multiprocessing.active_children() if child not in before] == []
    assert sum((folder / "resume.pt").exists() for folder in folders[:2]) >= 1
    assert not folders[2].exists()  # its turn had not come


SCRIPT = """
import pathlib, sys
import model
from lab.runs import train_all
model.RUNS = pathlib.Path(sys.argv[1])
configs = [model.Config(**fields) for fields in eval(sys.argv[2])]
print("begun", flush=True)
print(*train_all(configs, jobs=2), sep="\\n")
"""


def script(configs, *argv):
    """SCRIPT as a process, started with `argv`."""
    fields = repr([dataclasses.asdict(config) for config in configs])
    argv = [sys.executable, *argv, str(model.RUNS), fields]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a test runner in the background may itself have been told to ignore Ctrl-C
    deaf = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(argv, env=environment, text=True, **pipes, **deaf)


@pytest.mark.parametrize("how", ["-c", "file"])
def test_from_a_script_without_a_guard(config, tmp_path, how):
    """Its processes do not run the script again."""
    (tmp_path / "a script.py").write_text(SCRIPT)
    seeds = [changed(config, seed=seed) for seed in (0, 1)]
    with script(seeds, *(("-c", SCRIPT) if how == "-c" else (tmp_path / "a script.py",))) as child:
        out, err = child.communicate()
    assert (child.returncode, err) == (0, "")
    assert out.count("begun") == 1
    assert out.splitlines()[-2:] == [str(run_dir(one)) for one in seeds]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_runs_save_their_states(config, number):
    """Ctrl-C reaches this process alone, as from a notebook; or it is killed, they follow."""
    endless = [changed(config, max_iters=ENDLESS, seed=seed) for seed in (0, 1, 2)]
    folders = [run_dir(one) for one in endless]
    with script(endless, "-c", SCRIPT) as child:
        wait_for_steps(folders[:2])
        child.send_signal(number)
        _, err = child.communicate()
    assert child.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    for folder in folders[:2]:
        with model.locked(folder):  # once the run's process has ended
            assert (folder / "resume.pt").exists()
    assert not folders[2].exists()


IMPORT = ref.HOOK + """
import lab
light = "torch" not in sys.modules
import torch
seen.clear()  # what torch does is its own affair
import lab.plan, lab.runs
heavy = {"transformers", "matplotlib", "jupyter", "tiktoken"} & set(sys.modules)
print(json.dumps([light, lab.runs.__file__, seen, torch.cuda.is_initialized(), sorted(heavy)]))
"""


def test_import_from_anywhere_does_no_work(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == [True, str(ROOT / "lab" / "runs.py"), [], False, []]
    assert os.listdir(tmp_path) == []
