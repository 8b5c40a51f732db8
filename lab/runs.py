"""Many runs, several at a time, in processes of their own."""
from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import types
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import lawa_core
import model
from lawa_core import LawaError


@dataclass(frozen=True)
class Windows:
    """As `keep` of a run: every checkpoint that these averages need at these steps.

    needs: pairs (schemes, steps at which they are taken). What else fits the disk budget is kept as
    well, evenly spread (see `model.kept_steps`, which always asks at the last step of the run).
    """
    needs: tuple

    def __call__(self, steps, at):
        if at < steps[-1]:
            return {at: 1.0}
        return lawa_core.equal(_needed(self.needs, tuple(steps)))


@functools.cache
def _needed(needs: tuple, steps: tuple) -> list[int]:
    found = {steps[-1]}
    for schemes, targets in needs:
        for target in set(targets) & set(steps):
            found.add(target)
            for scheme in schemes:
                found.update(lawa_core.row(scheme, steps, target))
    return sorted(found)


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU of this machine that may be used; empty without."""
    import torch
    if model.pick_device().type != "cuda":
        return []
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return [name.strip() for name in names][:count]


def usual_jobs() -> int:
    """Runs at a time: $LAWA_JOBS, else one per GPU, else one per core, which small models use best.
    """
    return int(os.environ.get("LAWA_JOBS", 0)) or len(gpus()) or os.cpu_count() or 1


def train_all(configs, jobs: int | None = None, *, state_at=(), resume_from=None, keep=None,
              disk_budget: float = math.inf) -> list[Path]:
    """Train the runs that are not finished, `jobs` at a time, and return all run folders, in order.

    Each process has a GPU of its own, in turn where there are more processes than GPUs.
    configs: of `model.Config`; one that comes twice is trained once. jobs: processes that share the
    cores, default `usual_jobs`. state_at, keep, disk_budget: as for `model.train`, for every run.
    resume_from: for each run a state file that another one left, or None; where there is no such
    file the run starts at its beginning.
    Errors: LawaError that names each failed run with its message, once all others are done.
    Interrupted, the runs save their states, and the same call goes on from there.
    """
    configs = list(configs)
    states = list(resume_from) if resume_from is not None else [None] * len(configs)
    folders = [model.run_dir(config) for config in configs]
    missing = {}
    for folder, config, state in zip(folders, configs, states, strict=True):
        if not (folder / "summary.json").exists():
            missing.setdefault(folder, (config, state))
    if not missing:
        return folders

    jobs = jobs or usual_jobs()
    # however many runs are missing: the bits depend on it
    threads = max((os.cpu_count() or 1) // jobs, 1)
    processes = min(jobs, len(missing))
    before = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()  # a GPU for each process, which takes one as it starts
    for name in itertools.islice(itertools.cycle(gpus()), processes):
        places.put(name)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(places,))
    futures = {}
    with pool:
        try:
            with _no_script():
                for folder, (config, state) in missing.items():
                    options = {"threads": threads, "state_at": state_at, "resume_from": state,
                               "keep": keep, "disk_budget": disk_budget}
                    futures[pool.submit(_train, config, folder, options)] = folder
            total = sum(config.max_iters for config, _ in missing.values())
            _watch(futures, total)
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in before:
                    process.terminate()  # it saves its run's state; the pool waits for that
            raise

    failed, unfinished = [], []
    for future, folder in futures.items():
        if isinstance(future.exception(), BrokenProcessPool):
            unfinished.append(folder.name)
        elif future.result():
            failed.append(f"{folder.name}: {future.result()}")
    if unfinished:
        failed.append("a training process was ended from outside, perhaps for want of memory; not "
                      f"finished: {', '.join(unfinished)}; the same call goes on with them")
    if failed:
        raise LawaError("; ".join(failed))
    return folders


def _watch(futures: dict[Future, Path], total: int) -> None:
    """Show how many of the runs' steps are done, until all runs have ended."""
    done = sum(map(_steps_done, futures.values()))
    running = set(futures)
    shown = lawa_core.progress(total - done, "training", unit=" step")
    with shown as bar:
        while running:
            _, running = wait(running, timeout=1)
            now = sum(map(_steps_done, futures.values()))
            bar.update(now - done)
            bar.set_postfix_str(f"{len(futures) - len(running)} of {len(futures)} runs")
            done = now


def _steps_done(folder: Path) -> int:
    """The step in the last whole line of a run's metrics.csv."""
    try:
        with open(folder / "metrics.csv", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 500, 0))
            lines = file.read().split(b"\n")
        return int(lines[-2].split(b",")[0])
    except (OSError, IndexError, ValueError):  # no file yet, or only the names of the columns
        return 0


# In the processes


def _begin(places) -> None:
    """Take a GPU, before CUDA begins, and follow the parent."""
    if not places.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = places.get()
    _follow_parent()


def _train(config: model.Config, folder: Path, options: dict) -> str:
    """Train one run; what went wrong in one line, or nothing."""
    try:
        model.train(config, folder, **options)
    except (KeyboardInterrupt, SystemExit):
        os._exit(130)  # the state is saved; else the pool would go on with the next run
    except Exception as error:
        told = str(error) if isinstance(error, (LawaError, OSError, RuntimeError)) else ""
        return " ".join((told or repr(error)).split())
    return ""


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it, whatever ends it."""
    def follow():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


class _no_script:
    """Meanwhile, processes start without the caller's script, which they would run again."""

    def __enter__(self):
        self.main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")

    def __exit__(self, *_):
        sys.modules["__main__"] = self.main
