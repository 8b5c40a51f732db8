"""Replays: what averages of a public model's checkpoints would have given. Nothing is trained.

    python -m lab.replay EleutherAI/pythia-1b-deduped --steps 1000,30000,1000 --corpus pile

A replay is a job for a night: started again after any interruption it goes on, evaluates nothing
twice, fetches no whole file twice, and ends in the same numbers. Several processes (torchrun, a
Slurm array, --slice) share it. The notebook pythia_replay does the same, or finds it done, and
draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import lawa_core
import model as nanogpt
from lab.hf import dtype_of, public_model, save_hf, write_hf
from lab.hub import RATE, open_hub, span
from lab.plan import DEVICES, duration
from lab.statistics import LEVEL, MARGIN, Difference, difference
from lawa_core import LawaError, checkpoint_name, explicit, lawa, newest, row, scheme_dir, some
from model import (
    BLOCKS,
    Corpus,
    evaluate_trajectory,
    locked,
    mean_se,
    open_corpus,
    pick_device,
    read_losses,
)


def is_stand_in(model) -> bool:
    """Is it a preset, to be trained here, and so no public model?"""
    return str(model) in nanogpt.PRESETS and not str(model).startswith("pythia")


def export_steps(run, dtype=torch.float16) -> Path:
    """A run's checkpoints as Hugging Face folders RUN/hub/step<N>/, as a public model's revisions
    are. Those already there are kept. Returns RUN/hub."""
    run = Path(run)
    config = json.loads((run / "config.json").read_text())
    shape = nanogpt.gpt_config(config["preset"], open_corpus(config["corpus"]).vocab_size)
    trajectory = lawa_core.open_trajectory(run)
    for step in trajectory.steps:
        folder = run / "hub" / f"step{step}"
        if not (folder / "config.json").exists():  # the last file written
            state = {name: tensor.to(dtype) for name, tensor in trajectory[step].items()}
            save_hf(folder, shape, state)
    return run / "hub"


def replay(source, schemes, corpus: Corpus, at=None, *, n_blocks: int = BLOCKS,
           device: str = "auto", **more) -> list[dict]:
    """Losses of a public model's checkpoints, and of averages along them.

    One model is on the device, in half precision where that is CUDA and the files are.
    Args: source: a trajectory of Hugging Face step folders, such as `open_hub` returns, or what
    `lawa_core.open_trajectory` takes; corpus: text in the model's own tokens; the other arguments
    and the rows returned are those of `model.evaluate_trajectory`; states that `each` is called
    with have Hugging Face's names. Errors: LawaError for text in other tokens than the model's.
    """
    trajectory = lawa_core.open_trajectory(source)
    device = pick_device(device)
    like = trajectory.config_dir()
    config, make, load = public_model(like, device)
    _check_tokens(corpus, config, like)
    return evaluate_trajectory(trajectory, schemes, at, n_blocks, device.type, make=make,
                               corpus=corpus, load=load, **more)


def _check_tokens(corpus: Corpus, config, like: Path) -> None:
    """Refuse text in other tokens than the model's: its losses would look like losses."""
    other = corpus.vocab_size > config.vocab_size
    tokenizer = like / "tokenizer.json"
    if tokenizer.exists():
        own = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        gpt2 = lawa_core.config_of(like).get("model_type") == corpus.meta["tokenizer"] == "gpt2"
        other = other or (not gpt2 and corpus.meta.get("tokenizer_sha256") != own)
    if other:
        raise LawaError(f"{corpus.name} is not in this model's tokens; "
                        f"prepare the text again with --tokenizer {tokenizer}")


def folder_name(model: str) -> str:
    """A repository, or a folder's whole path, as the name of one folder."""
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    return place.strip("/").replace("/", "--")


# ---- The job -------------------------------------------------------------------------------------

@dataclass
class Job:
    """One public model, the points of its run that are evaluated, and where that is kept.

    Args:
        model: a repository on the Hub, or a folder of Hugging Face folders step<N>.
        points: steps at which the run and its averages are evaluated.
        corpus: text in the model's own tokens; eval_tokens: of it, per model evaluated.
        k, spacing: LAWA's window.
        running: also EMA and SWA over the same points, if these are evenly apart. They are made as
            training would make them, in float32 from point to point, and evaluated in the files'
            type. EMA's mean age is LAWA's; SWA is the mean of all points so far.
        tasks: of lm_eval; task_steps: points at which they are asked, default the last;
            task_limit: documents of each; task_path: a folder of further tasks.
        hub_folder: where revisions are fetched to, default ~/.cache/lawa/NAME. Files stay until
            every point that needs them is recorded, and then go.
        store: where losses, documents and rows are kept, default runs/replays/NAME.
        names, endpoint: as for `open_hub`; allow_duplicates: take revisions that share files.
        name: of the model, in words; default the repository's or folder's.
    Errors: LawaError for what cannot be, before weights are fetched.
    """
    model: str
    points: Sequence[int]
    corpus: Corpus
    k: int = 5
    spacing: int = 1000
    eval_tokens: int = 1_000_000
    running: bool = True
    tasks: Sequence[str] = ()
    task_steps: Sequence[int] = ()
    task_limit: int | None = None
    task_path: str | None = None
    device: str = "auto"
    hub_folder: Path | str | None = None
    store: Path | str | None = None
    names: str | None = None
    endpoint: str | None = None
    allow_duplicates: bool = False
    name: str = ""

    def __post_init__(self):
        self.model = str(self.model)
        self.name = self.name or self.model.rstrip("/").split("/")[-1]
        self.on_hub = not Path(self.model).is_dir()
        if self.on_hub and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", self.model):
            raise LawaError(f"{self.model} is no folder; expected one, or a repository on the Hub, "
                            "such as EleutherAI/pythia-1b-deduped")
        self.points = sorted(set(map(int, self.points)))
        if not self.points or self.points[0] < 0:
            raise LawaError(f"steps must be points of at least step 0, got {self.points}")
        if self.eval_tokens < 1:
            raise LawaError(f"eval_tokens must be at least 1, got {self.eval_tokens}")
        with lawa_core.explained(f"device {self.device!r} cannot be used here"):
            torch.empty(0, device=pick_device(self.device))
        self.schemes = {"lawa": lawa(self.k, self.spacing, start=1)}  # step 0 is noise
        apart = set(np.diff(self.points).tolist())
        self.running = self.running and len(apart) == 1
        if self.running:
            every, = apart
            back = (self.k - 1) * self.spacing / 2 / every  # LAWA's mean age, in points
            own = f"every={every}, start={self.points[0]})"
            self.schemes["ema"] = f"ema(beta={back / (1 + back):.6g}, {own}"
            self.schemes["swa"] = f"swa({own}"
        self.task_steps = sorted(self.task_steps) or self.points[-1:]
        if missing := set(self.task_steps) - set(self.points):
            raise LawaError(f"tasks can be asked at points only, not at step {min(missing)}; there "
                            f"are {some(self.points)}")
        if self.task_limit is not None and self.task_limit < 1:
            raise LawaError(f"task_limit must be at least 1, got {self.task_limit}")
        if self.tasks:
            self.tasks = list(dict.fromkeys(self.tasks))
            known_tasks(self.task_path, tuple(self.tasks))
        if self.store is None:
            self.store = nanogpt.RUNS / "replays" / folder_name(self.model)
        self.store = Path(self.store).absolute()
        # what goes when all is done: running averages, and models that wait for their tasks
        self.work = self.store / f"work-{self.points[0]}-{self.points[-1]}-{len(self.points)}"

    # ---- what there is ----

    @functools.cached_property
    def trajectory(self) -> lawa_core.Trajectory:
        """The checkpoints that the points' windows need."""
        allow = ["duplicates"] if self.allow_duplicates else []
        if not self.on_hub:
            found = lawa_core.open_trajectory(self.model)
            found.name, found.allow = self.name, allow
            return found
        window = {at - j * self.spacing for at in self.points for j in range(self.k)}
        needed = {step for step in window if step > 0} | set(self.points)
        return open_hub(self.model, needed, self.hub_folder, names=self.names, allow=allow,
                        keep=True, endpoint=self.endpoint)

    @functools.cached_property
    def last(self) -> int:
        """The newest step there is, on the Hub also beyond the points."""
        return self.trajectory.last if self.on_hub else self.trajectory.steps[-1]

    @functools.cached_property
    def like(self) -> Path:
        """The folder of the model's config.json and tokenizer."""
        return self.trajectory.config_dir()

    @functools.cached_property
    def block_size(self) -> int:
        """Tokens in a block of text."""
        return public_model(self.like, torch.device("cpu"))[0].block_size

    @functools.cached_property
    def n_blocks(self) -> int:
        """Blocks of text that a model is evaluated on: what was asked for, or all there are."""
        asked = max(self.eval_tokens // self.block_size, 2)
        return min(asked, (len(self.corpus.val) - 1) // self.block_size)

    @functools.cached_property
    def losses(self) -> Path:
        """Where they are kept, for every point and scheme, block by block."""
        device = pick_device(self.device).type
        return self.store / f"losses-{self.corpus.fingerprint}-{self.n_blocks}-{device}.npz"

    def _average(self, scheme: str, step: int) -> Path:
        """The file of a running average at a point."""
        return self.work / scheme_dir(scheme) / checkpoint_name(step)

    def _running(self) -> dict[str, list[int]]:
        """{running average: the points where it is on disk}."""
        return {scheme: [step for step in self.points if self._average(scheme, step).exists()]
                for label, scheme in self.schemes.items() if label != "lawa"}

    def _documents(self, step: int, label: str) -> dict[str, Path]:
        """{task: file of the answers of a model at a step}."""
        if step not in self.task_steps or not self.tasks:
            return {}
        scheme = scheme_dir(str(self.schemes.get(label, "newest")))
        part = "all" if self.task_limit is None else f"first{self.task_limit}"
        device = pick_device(self.device).type
        return {task: self.store / "documents" / (
                    f"step{step}-{scheme}-{task}-{part}-{device}{_content(self.task_path)}.json")
                for task in self.tasks}

    def _unanswered(self, step: int, label: str) -> list[str]:
        return [task for task, path in self._documents(step, label).items() if not path.exists()]

    def _answered(self, step: int) -> bool:
        return not any(self._unanswered(step, label) for label in ("run", *self.schemes))

    def _model(self, step: int, label: str) -> Path:
        """The folder of a model that waits for its tasks; its config.json is written last."""
        return self.work / "models" / f"step{step}-{label}"

    def _waits(self, step: int) -> bool:
        """Are all models there that still have tasks, so that weights are no longer needed?"""
        return all((self._model(step, label) / "config.json").exists()
                   for label in ("run", *self.schemes) if self._unanswered(step, label))

    def _lacking(self) -> tuple[list[int], list[int]]:
        """(points without losses, those whose models are to be made again for their tasks)."""
        known = read_losses(self.losses)
        wanted = [str(newest()), *map(str, self.schemes.values())]
        unknown = [step for step in self.points
                   if not all((step, scheme) in known for scheme in wanted)]
        again = [step for step in self.points if step not in unknown and not self._waits(step)]
        return unknown, again

    def _todo(self, points) -> list[int]:
        """Which of the points are not done."""
        lacking = set().union(*self._lacking())
        return [step for step in points if step in lacking or not self._answered(step)]

    def _window(self, points) -> set[int]:
        """The steps that LAWA and the run read at these points."""
        return {step for point in points
                for step in (point, *row(self.schemes["lawa"], self.trajectory.steps, point))}

    def _needed(self, lacking: list[int]) -> set[int]:
        """The steps whose checkpoints are still to be read, for the points that lack something."""
        needed = self._window(lacking)
        first, end = min(lacking, default=-1), max(lacking, default=-1)
        for made in self._running().values():  # and every point since the last one made
            last = max((step for step in made if step <= first), default=-1)
            needed |= {step for step in self.points if last < step <= end}
        return needed

    def _done(self) -> bool:
        return not self._todo(self.points)

    # ---- what is done ----

    def run(self, points=None) -> list[dict]:
        """Evaluate what is not recorded of the points, by default all, and ask their tasks.

        Returns the rows of `model.evaluate_trajectory`, each with "model", of these points.
        """
        points = self.points if points is None else sorted(points)
        self.store.mkdir(parents=True, exist_ok=True)
        self._check_weights()
        options = {"n_blocks": self.n_blocks, "device": self.device, "cache": self.losses}
        todo = self._todo(points)
        unknown, again = self._lacking()
        # what is done can be drawn while another job fetches
        refused = contextlib.nullcontext() if todo else contextlib.suppress(LawaError)
        with refused, self._alone():
            self._let_go()  # what a killed process left
            total = self.trajectory.to_fetch(self._needed(unknown + again)) if self.on_hub else 0
            with lawa_core.progress(total, f"fetching {self.name}", "B", unit_scale=True,
                                    disable=not total) as bar:
                while todo:
                    # up to the next point with tasks, whose models are let go before it goes on
                    stop = next((i for i, step in enumerate(todo) if not self._answered(step)),
                                len(todo) - 1)
                    piece, todo = todo[:stop + 1], todo[stop + 1:]
                    replay(self.trajectory, self.schemes, self.corpus, piece, **options,
                           each=functools.partial(self._each, bar), on_disk=True,
                           averages=self.work, redo=[step for step in again if step in piece])
                    self._ask(piece[-1])
                    self._let_go()
            if self._done():
                shutil.rmtree(self.work, ignore_errors=True)
        rows = replay(self.trajectory, self.schemes, self.corpus, points, **options)
        rows = [{"model": self.name} | line for line in rows]
        if points == self.points:
            self._write(rows)
        elif self._done():
            self.run()  # the last of several processes writes the rows of all
        return rows

    def _check_weights(self) -> None:
        """Refuse a store that holds results of other weights than there are now."""
        if self.on_hub:
            now = {step: commit for step, (commit, _) in self.trajectory.revisions.items()}
        else:
            now = {step: self.trajectory[step].fingerprint for step in self.trajectory.steps}
        path = self.store / "weights.json"
        with locked(self.store):
            kept = json.loads(path.read_text()) if path.exists() else {}
            now = {str(step): identity for step, identity in now.items()}
            if other := [step for step in now if kept.get(step, now[step]) != now[step]]:
                raise LawaError(f"{self.store} holds results of other weights at step "
                                f"{some(other)}; remove it, or give another store")
            with lawa_core.replacing(path) as part:
                part.write_text(json.dumps(kept | now))

    @contextlib.contextmanager
    def _alone(self):
        """Refuse to share a folder of fetched files with another job, which would take files away
        that this one needs; several processes of one job share it."""
        if not self.on_hub:
            yield
            return
        own = repr((self.store, self.points, self.k, self.spacing, self.losses.name, self.running))
        folder = self.trajectory.folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".job", "a+") as job:
            with contextlib.suppress(OSError):  # others are at work
                fcntl.flock(job, fcntl.LOCK_EX | fcntl.LOCK_NB)
                job.truncate(0)
                job.write(own)
                job.flush()
            fcntl.flock(job, fcntl.LOCK_SH)
            job.seek(0)
            if job.read() != own:
                raise LawaError(f"another replay is fetching to {folder}; wait for it, or give "
                                "another hub folder")
            yield

    def _each(self, bar, step: int, label: str, state: dict) -> None:
        """Before a model of a point is evaluated, which has its weights in the files' types."""
        if label == "run":
            self._let_go()
            self._advance(step)
            self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
            bar.update(self.on_hub and self.trajectory.fetched - bar.n)
        for name, tensor in state.items():
            state[name] = tensor.to(self._dtypes[name])
        folder = self._model(step, label)
        if self._unanswered(step, label) and not (folder / "config.json").exists():
            write_hf(folder, state, lawa_core.config_of(self.like), self.like)

    def _advance(self, step: int) -> None:
        """Bring EMA and SWA to a point, from the newest point where they are."""
        unknown, again = self._lacking()
        made = {scheme: max((at for at in there if at <= step), default=-1)
                for scheme, there in self._running().items()}
        for n, point in enumerate(self.points):
            if point > step:
                return
            for scheme, before in made.items():
                if point <= before:
                    continue
                self.trajectory[point]  # fetched, where it is not
                sources, weights = {point: self.trajectory.sources[point]}, (1,)
                if before >= 0:
                    sources[before] = self._average(scheme, before)
                    beta = getattr(lawa_core.parse_scheme(scheme), "beta", None)
                    weights = (n, 1) if beta is None else (beta, 1 - beta)
                path = self._average(scheme, point)
                path.parent.mkdir(parents=True, exist_ok=True)
                lawa_core.average_files(
                    lawa_core.Trajectory(sources), {path: (explicit(weights), point)},
                    dtype="F32", allow=lawa_core.ALLOW)
                if before >= 0 and not any(before <= at < point for at in unknown + again):
                    self._average(scheme, before).unlink()
                made[scheme] = point
            if self.on_hub and point < step and point not in self._window(unknown + again):
                self.trajectory.remove(point)

    def _let_go(self) -> None:
        """Remove the revisions and running averages that no point needs any more."""
        unknown, again = self._lacking()
        lacking = unknown + again
        needed = self._needed(lacking)
        for step in self.trajectory.steps if self.on_hub else ():
            if step not in needed:
                self.trajectory.remove(step)
        first = min(lacking, default=math.inf)
        for scheme, made in self._running().items():
            last = max((step for step in made if step <= first), default=-1)
            for step in made:
                if step < last or first == math.inf:
                    self._average(scheme, step).unlink()

    def _ask(self, step: int) -> None:
        """Put the tasks to the models of a point, keep the answers, let the models go."""
        for label in ("run", *self.schemes):
            files = self._documents(step, label)
            if tasks := self._unanswered(step, label):
                for answers in zero_shot(self._model(step, label), tasks, limit=self.task_limit,
                                         task_path=self.task_path, device=self.device):
                    path = files[answers["task"]]
                    path.parent.mkdir(exist_ok=True)
                    with lawa_core.replacing(path) as part:
                        part.write_text(json.dumps(answers))
            shutil.rmtree(self._model(step, label), ignore_errors=True)

    def _write(self, rows: list[dict]) -> None:
        with lawa_core.replacing(self.store / "rows.csv") as part, open(part, "w") as file:
            columns = ("model", "step", "scheme", "loss", "loss_se", "gain", "gain_se")
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def accuracies(self) -> list[dict]:
        """[{"model", "step", "scheme", "task", "accuracy", "stderr", "documents"}] so far;
        documents: (n,) 0 or 1 for each, the same documents for every model."""
        found = []
        for step in self.task_steps:
            for label in ("run", *self.schemes):
                for path in self._documents(step, label).values():
                    if path.exists():
                        about = {"model": self.name, "step": step, "scheme": label}
                        found.append(about | json.loads(path.read_text()))
        return found

    def plan(self, points=None) -> str:
        """What is still to do of the points, by default all, takes, in words; fetches config.json
        and the tokenizer alone."""
        points = self.points if points is None else points
        todo = self._todo(points)
        lines = [f"{self.name}: {len(points)} points, {len(todo)} to do"]
        if not todo:
            return lines[0]
        if not self.running:
            lines.append("  without EMA and SWA")
        models = 1 + len(self.schemes)
        itemsize = dtype_of(lawa_core.config_of(self.like)).itemsize
        width = 4 / itemsize  # of running averages, in float32, over the files'
        if self.on_hub:
            unknown, again = self._lacking()
            hub, needed = self.trajectory, self._needed(unknown + again)
            size = max(map(hub.nbytes, hub.steps))
            running = 2 * (len(self.schemes) - 1) * width * size
            # the window, the next revision, and two that wait until their points are recorded
            disk = (self.k + 3) * size + running + bool(self.tasks) * models * size
            nbytes = hub.to_fetch(needed)
            lines += [
                f"  {len(needed)} revisions, {nbytes / 1e9:.2f} GB to fetch: "
                f"{duration(nbytes / RATE)} at {RATE / 1e6:.0f} MB/s",
                f"  at most {disk / 1e9:.2f} GB on disk, {running / 1e9:.2f} GB of it EMA and SWA; "
                f"{size * (1 + width * self.running) / 1e9:.2f} GB of averages in memory"]
        else:
            size = self.trajectory[self.trajectory.steps[-1]].nbytes
        tokens = self.n_blocks * self.block_size
        flops = 2 * size / itemsize * tokens * models * len(todo)
        times = ", ".join(f"{duration(flops / rate)} on {name}"
                          for name, (rate, _) in DEVICES.items())
        lines.append(f"  {models * len(todo)} models of {size / itemsize / 1e6:,.1f}M "
                     f"parameters to evaluate on {tokens:,} tokens each: {flops:.1e} FLOPs, "
                     f"{times}")
        if self.tasks:
            steps = [step for step in todo if not self._answered(step)]
            lines.append(f"  tasks at {len(steps)} of the points: {', '.join(self.tasks)}")
        if self.on_hub:
            reported = [f"reported: {note}" for note in self.trajectory.notes]
            wrong = [*self.trajectory.twins, *reported]
            lines += [f"  duplicates: {line}" for line in wrong or ["none by the Hub's hashes"]]
        return "\n".join(lines)


@functools.cache
def _content(folder: str | None) -> str:
    """A hash of a folder's files, which tasks are made of; "" without one."""
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return f"-{digest.hexdigest()[:8]}"


@functools.cache
def known_tasks(task_path: str | None, tasks: tuple[str, ...]):
    """lm_eval's TaskManager for these tasks, of a folder alone where that has them all: its own are
    ten thousand files. LawaError without lm_eval, or for a task that it does not know."""
    try:
        import lm_eval.tasks as known
    except ImportError:
        raise LawaError('zero-shot tasks need lm_eval: pip install "lawa-lab[zeroshot]"') from None
    for alone in (True, False):
        if task_path is not None or not alone:
            path = task_path and str(task_path)
            found = known.TaskManager(include_path=path, include_defaults=not alone)
            unknown = [task for task in tasks if task not in found.all_subtasks]
            if not unknown:
                return found
    groups = [task for task in unknown if task in found.all_tasks]
    if groups:
        raise LawaError(f"{', '.join(groups)} stands for several tasks of lm_eval; give those")
    raise LawaError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and "
                    "task_path is a folder of further ones")


def zero_shot(folder, tasks: Sequence[str], *, device: str = "auto", task_path=None,
              **options) -> list[dict]:
    """Accuracy of a Hugging Face folder on tasks of lm-evaluation-harness.

    task_path: a folder of further tasks; options: what lm_eval's `simple_evaluate` takes besides,
    such as limit. Returns rows {"task", "accuracy", "stderr", "documents": 0 or 1 for each}.
    Errors: LawaError without the extra `zeroshot`, for a task that is unknown or has no accuracy.
    """
    options.setdefault("task_manager", known_tasks(task_path, tuple(tasks)))
    import lm_eval
    import transformers
    transformers.utils.logging.disable_progress_bar()
    device, dtype = pick_device(device), "float32"
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        dtype = lawa_core.config_of(Path(folder)).get("dtype", dtype)
    source = {"pretrained": str(folder), "dtype": dtype}
    with lawa_core.explained(f"zero-shot tasks {', '.join(tasks)}"):
        found = lm_eval.simple_evaluate(
            model="hf", model_args=source, tasks=list(tasks), device=str(device), **options)
    gc.collect()  # its model, before the next one is made
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows = []
    for task, values in found["results"].items():
        if "acc,none" not in values:
            raise LawaError(f"task {task} has no accuracy; expected one of several choices, or "
                            "words to be guessed")
        answers = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        right = [float(sample["acc"]) for sample in answers]
        rows.append({"task": task, "accuracy": values["acc,none"],
                     "stderr": mean_se(np.array(right))[1], "documents": right})
    return rows


# ---- What it shows -------------------------------------------------------------------------------

class Curves:
    """What a job found, as arrays over its points.

    Attributes: steps (points,); losses {scheme: (points, blocks)}; loss {scheme: (points,)}, their
    means; stride, steps between points; window, how many points in a row share checkpoints of
    LAWA's; full, the indices of points whose window is full; spikes, see there.
    """

    def __init__(self, job: Job, rows: list[dict]):
        self.name = job.name
        self.steps = np.array(job.points)
        self.losses = {}
        for scheme in ("run", *job.schemes):
            own = [line["losses"] for line in rows
                   if (line["model"], line["scheme"]) == (job.name, scheme)]
            self.losses[scheme] = np.array(own)
        self.loss = {scheme: values.mean(1) for scheme, values in self.losses.items()}
        back = (job.k - 1) * job.spacing
        self.stride = int(np.diff(self.steps).min(initial=job.spacing))
        self.window = back // self.stride + 1
        begun = min(step for step in job.trajectory.steps if step)
        self.full = np.flatnonzero(self.steps - back >= begun)
        self.spikes = spikes(self.loss["run"])

    def gains(self, better: str = "lawa", than: str = "run") -> list[Difference]:
        """At each point, by how much a scheme is better than another, paired over blocks."""
        return [difference(values, over="blocks")
                for values in self.losses[than] - self.losses[better]]

    def mean_gain(self, better: str = "lawa", than: str = "run") -> Difference:
        """The mean over the points with a full window (see `over_points`)."""
        gains = (self.loss[than] - self.loss[better])[self.full]
        return over_points(gains, self.window) if len(gains) else None

    def near(self, share: float, whole: int) -> int | None:
        """The index of the point at a share of the whole run, if there is one within a stride."""
        i = int(np.abs(self.steps - share * whole).argmin())
        return i if abs(self.steps[i] - share * whole) <= self.stride else None

    def heights(self) -> list[tuple[int, int, Difference]]:
        """Of each spike (its index; where LAWA is highest while the spike is in its window; by how
        much more the run rises there than LAWA, each above its own two points before)."""
        found = []
        for first, i in self.spikes:
            last = i + int(self.loss["lawa"][i:i + self.window].argmax())
            rise, averaged = (
                self.losses[scheme][at] - self.losses[scheme][[first - 2, first - 1]].mean(0)
                for scheme, at in (("run", i), ("lawa", last)))  # (blocks,)
            found.append((i, last, difference(rise - averaged, over="blocks")))
        return found


def spikes(loss) -> list[tuple[int, int]]:
    """The spikes of a run's loss, (points,): (index of the first point, of the highest) of each.

    A point belongs to one if it stands above the median of the five points around it by at least
    0.02 nats and ten times the usual (median) deviation; points in a row are one spike. The first
    quarter falls too steeply to tell, and the last two points have no neighbours after them.
    """
    padded = np.pad(loss, 2, mode="edge")
    above = loss - np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    settled = np.arange(len(loss)) >= max(len(loss) // 4, 2)
    settled[-2:] = False
    high = np.flatnonzero(settled & (above > max(10 * np.median(np.abs(above)), 0.02)))
    groups = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1) if len(high) else []
    return [(int(group[0]), int(group[np.argmax(loss[group])])) for group in groups]


def better_answers(accuracies: list[dict], better: str = "lawa", than: str = "run") -> list[dict]:
    """[{"model", "step", "task", "found"}]: by how many in a hundred documents more a scheme is
    right than another, paired over documents."""
    answers = {}
    for line in accuracies:
        key = line["model"], line["step"], line["task"]
        answers.setdefault(key, {})[line["scheme"]] = np.array(line["documents"])
    found = []
    for (name, step, task), by_scheme in answers.items():
        if {better, than} <= by_scheme.keys():
            more = difference(100 * (by_scheme[better] - by_scheme[than]), margin=0.5,
                              unit="% of documents", over="documents")
            found.append({"model": name, "step": step, "task": task, "found": more})
    return found


def over_points(values, length: int, *, margin: float = MARGIN, unit: str = "nats",
                draws: int = 4000) -> Difference:
    """The mean over the points of one run, with an interval by a moving-block bootstrap.

    Neighbouring points share checkpoints, so that pieces of `length` points are drawn, as long as
    a window (Künsch, Annals of Statistics 17, 1989). With fewer than three pieces' points there is
    no interval. values: (points,) in order of steps, positive where they speak for the claim.
    """
    values = np.asarray(values, float)
    n = len(values)
    mean = float(values.mean())
    if n < 3 * length or not np.isfinite(values).all():
        return Difference(mean, -math.inf, math.inf, 1.0, n, "points", margin, unit)
    pieces = -(-n // length)
    starts = np.random.default_rng(0).integers(0, n - length + 1, (draws, pieces))
    drawn = starts[:, :, None] + np.arange(length)  # (draws, pieces, length): indices
    means = values[drawn.reshape(draws, -1)[:, :n]].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return Difference(mean, float(low), float(high), min(float(p), 1.0), n, "points", margin, unit)


# ---- Command line --------------------------------------------------------------------------------

# torchrun's variables, by which lm_eval would join processes, each with another model, to a group
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
         "MASTER_PORT")


def share(text: str | None = None) -> tuple[int, int]:
    """(number of this process, of how many), as --slice, torchrun or a Slurm array says."""
    told = os.environ
    number, count, source = 0, 1, ""
    if text is not None:
        source = f"--slice {text}"
        number, _, count = text.partition("/")
    elif "RANK" in told and "WORLD_SIZE" in told:
        source = "torchrun's RANK and WORLD_SIZE"
        number, count = told["RANK"], told["WORLD_SIZE"]
    elif "SLURM_ARRAY_TASK_ID" in told and "SLURM_ARRAY_TASK_COUNT" in told:
        source = "Slurm's array of tasks"
        number, count = told["SLURM_ARRAY_TASK_ID"], told["SLURM_ARRAY_TASK_COUNT"]
    with lawa_core.explained(f"{source}: expected R/N with R from 0 to N - 1, as 0/4"):
        number, count = int(number), int(count)
        if source.startswith("Slurm"):
            first, step = told.get("SLURM_ARRAY_TASK_MIN", 0), told.get("SLURM_ARRAY_TASK_STEP", 1)
            number = (number - int(first)) // int(step)
        if not 0 <= number < count:
            raise ValueError(f"{number}/{count}")
    return number, count


def parts(jobs: Sequence[Job], number: int, count: int) -> list[tuple[Job, list[int]]]:
    """Which points of which jobs are this process's: whole models, or pieces where they are few."""
    pieces = -(-count // len(jobs))
    units = [(job, piece.tolist()) for job in jobs
             for piece in np.array_split(job.points, min(pieces, len(job.points)))]
    return units[number::count]


def parser() -> argparse.ArgumentParser:
    made = lawa_core.Parser(
        "python -m lab.replay", description=__doc__.split("\n\n")[0],
        epilog="Several processes share the work under torchrun, in a Slurm array, or by --slice: "
        "docs/many-machines.md. Models, plans and what they take: docs/pythia.md.")
    add = made.add_argument
    add("models", nargs="+", metavar="MODEL",
        help="a repository on the Hub, such as EleutherAI/pythia-1b-deduped, or a folder of "
        "Hugging Face folders step<N>")
    add("--steps", required=True, metavar="START,STOP,STRIDE", help="points that are evaluated")
    add("--corpus", required=True, help="text in the models' own tokens: a folder under data/, as "
        "data/pile/prepare.py makes it, or any")
    add("-k", type=int, default=5, help="checkpoints in LAWA's window (default %(default)s)")
    add("--spacing", type=int, default=1000, help="steps between them (default %(default)s)")
    add("--eval-tokens", type=int, default=1_000_000,
        help="tokens of the text per model (default %(default)s)")
    add("--alone", action="store_true", help="no EMA and SWA over the same points beside LAWA")
    add("--tasks", default="", help="zero-shot tasks of lm_eval, such as lambada_openai,sciq")
    add("--task-steps", default="", help="points at which they are asked (default the last)")
    add("--task-limit", type=int, help="documents of each task (default all)")
    add("--task-path", metavar="DIR", help="folder of further tasks")
    add("--device", default="auto", help="cuda, mps or cpu (default the best there is)")
    add("--hub-folder", type=Path, metavar="DIR",
        help="where revisions are fetched to, a folder for each model (default ~/.cache/lawa)")
    add("--store", type=Path, metavar="DIR",
        help="where results are kept, a folder for each model (default runs/replays)")
    add("--names", metavar="REGEX", help="which revisions, and where their names have the step, "
        r"such as 'stage1-step(\d+)-' (default step<N>)")
    add("--endpoint", metavar="URL", help="another server than huggingface.co")
    add("--allow-duplicates", action="store_true", help="take revisions that share files")
    add("--slice", metavar="R/N", help="do the part R, from 0, of N (default all, or as torchrun "
        "or Slurm say)")
    add("--dry-run", action="store_true",
        help="print revisions, bytes, hours and known duplicates; fetch no weights")
    return made


def main(argv=None) -> int:
    try:
        args = parser().parse_args(argv)
        number, count = share(args.slice)
        if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        for name in RANKS:
            os.environ.pop(name, None)
        together = len(args.models) >= count  # a process has whole models
        if not together and not args.alone:
            print("EMA and SWA are left out: they need a model's points in order, and here "
                  f"{count} processes share {len(args.models)} of them")
        with lawa_core.explained(f"--task-steps must be steps such as 103000,143000, got "
                                 f"{args.task_steps!r}"):
            task_steps = list(map(int, words(args.task_steps)))
        jobs = jobs_of(
            args.models, hub_folder=args.hub_folder, store=args.store, points=span(args.steps),
            corpus=open_corpus(args.corpus), k=args.k, spacing=args.spacing,
            eval_tokens=args.eval_tokens, running=together and not args.alone,
            tasks=words(args.tasks), task_steps=task_steps,
            task_limit=args.task_limit, task_path=args.task_path, device=args.device,
            names=args.names, endpoint=args.endpoint,
            allow_duplicates=args.allow_duplicates or args.dry_run)
        mine = parts(jobs, number, count)
        for job, points in mine:  # all are listed before the first weights are fetched
            print(job.plan(points), flush=True)
        if not args.dry_run:
            for job, points in mine:
                job.run(points)
                print(f"{job.name}: {len(points)} points done; kept in {job.store}", flush=True)
    except (LawaError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def words(text) -> list[str]:
    """The parts of a text between commas, or of a list."""
    parts = text if isinstance(text, list | tuple) else str(text).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def jobs_of(models: Sequence[str], hub_folder=None, store=None, **options) -> list[Job]:
    """A job for each model, with folders of its own in those given."""
    jobs = []
    last = [model.rstrip("/").split("/")[-1] for model in models]
    for model, name in zip(models, last, strict=True):
        own = {key: Path(folder) / folder_name(model)
               for key, folder in (("hub_folder", hub_folder), ("store", store)) if folder}
        jobs.append(Job(model, **own, **options, name=model if last.count(name) > 1 else name))
    return jobs


if __name__ == "__main__":
    sys.exit(main())
