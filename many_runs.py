"""Many runs: trained several at a time in processes of their own, and what they share trained once."""
from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import lawa_core
from corpora import ROOT
from lawa_core import LawaError, scheme_dir
from model import flags, locked
from recipes import Config, learning_rate, pick_device, run_dir


def train_all(configs, jobs: int | None = None, every: float = 5.0) -> list[Path]:
    """Train the runs that are not finished, `jobs` processes at a time sharing the cores, and return all run folders, in order.

    Steps that two of the missing runs share, up to where their rates part, are trained once. jobs: default $LAWA_JOBS, else one per core on
    a CPU (small models use one core best), one on a GPU. Prints a line with rate and time left every `every` seconds. Errors: LawaError
    that names each failed run and its message, once all others are done. Interrupted, the runs save their state.
    """
    runs = [(run_dir(config), config) for config in configs]
    missing = {folder: config for folder, config in runs if not (folder / "summary.json").exists()}
    cores = os.cpu_count() or 1
    jobs = max(jobs or int(os.environ.get("LAWA_JOBS", 0)) or (1 if pick_device().type == "cuda" else cores), 1)
    threads = str(max(cores // jobs, 1))  # however many runs are missing: the bits depend on it
    report, trunks, workers, idle, busy, failed = _Report(missing, every), _trunks(missing), [], [], {}, []
    try:
        while missing or busy:
            unfinished = {*missing, *busy.values()}
            ready = [folder for folder in missing if folder not in trunks or trunks[folder][0] not in unfinished]
            for folder in ready[:jobs - len(busy)]:
                idle = [worker for worker in idle if worker.poll() is None]
                if not idle:
                    workers.append(_worker())
                    idle.append(workers[-1])
                config, worker = missing.pop(folder), idle.pop()
                if folder in trunks:
                    begin_with(*trunks[folder], folder, config)
                leave = ",".join({str(step) for trunk, step in trunks.values() if trunk == folder})
                words = (*flags(config), "--out_dir", str(folder), "--threads", threads, "--leave", leave)
                print(json.dumps(words), file=worker.stdin, flush=True)
                busy[worker] = folder
            answered = select.select([worker.stdout for worker in busy], [], [], 1.0)[0]
            for worker in [worker for worker in busy if worker.stdout in answered]:
                folder, answer = busy.pop(worker), worker.stdout.readline()
                wrong = json.loads(answer) if answer else _last_words(worker)
                failed += [f"{folder.name}: {wrong}"] if wrong else []
                idle += [worker] if answer else []
            report(len(missing) + len(busy))
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.communicate()
        for trunk, step in trunks.values():
            (trunk / f"state_{step}.pt").unlink(missing_ok=True)
    if failed:
        raise LawaError("; ".join(failed))
    return [folder for folder, _ in runs]


# what may differ between two configurations that train alike as long as their learning rates are the same
LATER = ("max_iters", "schedule", "min_lr_frac", "cooldown_frac", "hold_frac", "burst_at", "burst_iters", "burst_factor", "averages")


def shared_steps(a: Config, b: Config) -> int:
    """The steps for which the run b is the run a, bit for bit; 0 as well where b keeps averages that a does not."""
    same = all(getattr(a, f.name) == getattr(b, f.name) for f in fields(Config) if f.name not in LATER)
    if not same or not b.online.keys() <= a.online.keys():
        return 0
    steps = range(a.init_step, min(a.max_iters, b.max_iters))
    return next((step for step in steps if learning_rate(a, step) != learning_rate(b, step)), steps.stop)


def _trunks(missing: dict[Path, Config]) -> dict[Path, tuple[Path, int]]:
    """{run: (the run it begins with, for how many steps)}, for runs that share a quarter of their steps or more with one before them."""
    found, whole = {}, []
    for folder, config in missing.items():
        steps, trunk = max(((shared_steps(missing[trunk], config), trunk) for trunk in whole), default=(0, None))
        if steps < config.max_iters / 4 or (folder / "config.json").exists():
            whole.append(folder)
        else:
            found[folder] = (trunk, steps)
    return found


def begin_with(trunk: Path, step: int, folder: Path, config: Config) -> None:
    """Give a new run what the run `trunk` was until `step`: checkpoints (as links), metrics and the state that it left.

    Without a state, of a trunk that failed, or if another process has begun the run, nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (state := trunk / f"state_{step}.pt").exists() or (folder / "config.json").exists():
            return
        for part in ("", *map(scheme_dir, config.online)):
            (folder / part).mkdir(exist_ok=True)
            for path in (trunk / part).glob("ckpt_*.safetensors"):
                if lawa_core.step_of(path) <= step:
                    _link(path, folder / part / path.name)
        _link(trunk / "metrics.csv", folder / "metrics.csv")  # training replaces it by the rows up to the state's step
        _link(state, folder / "resume.pt")  # last: without it, a run starts at 0


def _link(path: Path, name: Path) -> None:
    """Another name for a file that nobody writes to again; a copy where the disk has no links."""
    with lawa_core.replacing(name) as part:
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)


def _worker() -> subprocess.Popen:
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is closed and gone with the worker
    command = [sys.executable, str(ROOT / "model.py"), "work"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    worker.errors = errors
    return worker


def _last_words(worker: subprocess.Popen) -> str:
    """Why a worker ended in the midst of a run."""
    status = worker.wait()
    worker.errors.seek(0)
    return (worker.errors.read().strip().splitlines() or [f"its process ended with exit status {status}"])[-1]


class _Report:
    """A line every few seconds about runs that other processes train: how many, steps, rate, time left."""

    def __init__(self, runs: dict[Path, Config], every: float):
        self.runs, self.every, self.begun, self.told = dict(runs), every, time.monotonic(), time.monotonic()
        self.total, self.first = sum(config.max_iters for config in runs.values()), self._done()

    def _done(self) -> int:
        return sum(map(steps_done, self.runs))

    def __call__(self, unfinished: int) -> None:
        now = time.monotonic()
        if self.runs and (now - self.told >= self.every or not unfinished):
            self.told, done = now, self._done()
            rate = (done - self.first) / (now - self.begun)
            left = f"{(self.total - done) / rate:.0f} s left" if rate else "starting"
            print(f"training: {len(self.runs) - unfinished} of {len(self.runs)} runs, {done:,} of {self.total:,} steps, "
                  f"{rate:.1f} steps/s, {left}", flush=True)


def steps_done(folder: Path) -> int:
    """Steps in a run's metrics.csv, from its last whole line."""
    try:
        lines = (folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0
