"""Replays: what averages of a public model's checkpoints would have given. Nothing is trained.

    python -m lab.replay EleutherAI/pythia-1b-deduped --steps 1000,30000,1000 --corpus pile

A replay is a job for a night: started again after any interruption it goes on, evaluates nothing
twice, fetches no whole file twice, and ends in the same numbers. Several processes (torchrun, a
Slurm array, --slice) share it. The notebook pythia_replay does the same, or finds it done, and
draws it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import lawa_core
import model as nanogpt
from lab.hf import public_model, save_hf, write_hf
from lab.hub import open_hub, span
from lab.plan import DEVICES, duration
from lab.statistics import LEVEL, MARGIN, Difference, difference
from lawa_core import LawaError, checkpoint_name, explicit, lawa, newest, row, scheme_dir
from model import BLOCKS, Corpus, evaluate_trajectory, open_corpus, pick_device, read_losses


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
    _check_tokens(corpus, config, like / "tokenizer.json")
    return evaluate_trajectory(trajectory, schemes, at, n_blocks, device.type, make=make,
                               corpus=corpus, load=load, **more)


def _check_tokens(corpus: Corpus, config, tokenizer: Path) -> None:
    """Refuse text in other tokens than the model's: its losses would look like losses."""
    expected = corpus.meta.get("tokenizer_sha256")
    other = corpus.vocab_size > config.vocab_size
    if expected and tokenizer.exists():
        other = other or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != expected
    if other:
        raise LawaError(f"{corpus.name} is not in this model's tokens; "
                        f"prepare the text again with --tokenizer {tokenizer}")


# ---- The job -------------------------------------------------------------------------------------

@dataclass
class Job:
    """One public model, the points of its run that are evaluated, and where that is kept.

    Args:
        model: a repository on the Hub, or a folder of Hugging Face folders step<N>.
        points: steps at which the run and its averages are evaluated.
        corpus: text in the model's own tokens; eval_tokens: of it, per model evaluated.
        k, spacing: LAWA's window.
        running: also EMA and SWA over the same points, which are made as training would make
            them, in float32 from point to point. EMA's mean age is LAWA's; SWA is the mean of all
            points so far.
        tasks: of lm_eval; task_steps: points at which they are asked, default the last;
            task_limit: documents of each; task_path: a folder of further tasks.
        hub_folder: where revisions are fetched to, default ~/.cache/lawa/NAME. Files stay until
            every point that needs them is recorded, and then go.
        store: where losses, documents and rows are kept, default runs/replays/NAME.
        names, endpoint: as for `open_hub`; allow_duplicates: take revisions that share files.
        name: of the model, in words; default the repository's or folder's.
    Errors: LawaError for what cannot be, before anything is fetched.
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
        self.points = sorted(set(map(int, self.points)))
        if not self.points or self.points[0] < 0:
            raise LawaError(f"steps must be points of at least step 0, got {self.points}")
        self.schemes = {"lawa": lawa(self.k, self.spacing)}
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
                            f"are {lawa_core.some(self.points)}")
        if self.task_limit is not None and self.task_limit < 1:
            raise LawaError(f"task_limit must be at least 1, got {self.task_limit}")
        if self.tasks:
            known_tasks(self.task_path, tuple(self.tasks))
        if self.store is None:
            self.store = nanogpt.RUNS / "replays" / self._store_name()
        self.store = Path(self.store).absolute()

    def _store_name(self) -> str:
        """The repository's name; a folder's with a hash of what lies there and when it was made."""
        if self.on_hub:
            return self.model.replace("/", "--")
        files = sorted(Path(self.model).resolve().glob("*/*"))
        made = [f"{path} {path.stat().st_mtime_ns}" for path in files]
        return f"{self.name}-{hashlib.sha256(repr(made).encode()).hexdigest()[:10]}"

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
        needed = {step for step in window if step > 0} | set(self.points)  # step 0 is noise
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
    def n_blocks(self) -> int:
        """Blocks of text that a model is evaluated on."""
        config, _, _ = public_model(self.like, torch.device("cpu"))
        return max(self.eval_tokens // config.block_size, 2)

    @functools.cached_property
    def losses(self) -> Path:
        """Where they are kept, for every point and scheme, block by block."""
        device = pick_device(self.device).type
        return self.store / f"losses-{self.corpus.fingerprint}-{self.n_blocks}-{device}.npz"

    def _averages(self, scheme: str) -> dict[int, Path]:
        """{point: file} of a running average that are there."""
        files = {step: self.store / scheme_dir(scheme) / checkpoint_name(step)
                 for step in self.points}
        return {step: path for step, path in files.items() if path.exists()}

    def _documents(self, step: int) -> dict[tuple[str, str], Path]:
        """{(scheme, task): file} of the answers at a step."""
        if step not in self.task_steps:
            return {}
        part = "" if self.task_limit is None else f"-first{self.task_limit}"
        schemes = {"run": newest(), **self.schemes}
        return {(label, task): self.store / "documents" / (
                    f"step{step}-{scheme_dir(str(scheme))}-{task}{part}.json")
                for label, scheme in schemes.items() for task in self.tasks}

    def _answered(self, step: int) -> bool:
        return all(path.exists() for path in self._documents(step).values())

    def _model(self, step: int, label: str) -> Path:
        """The folder of a model that waits for its tasks; its config.json is written last."""
        return self.store / "models" / f"step{step}-{scheme_dir(str(self.schemes.get(label)))}"

    def _waits(self, step: int) -> bool:
        """Are all models of a step there, and so their weights no longer needed?"""
        return all((self._model(step, label) / "config.json").exists()
                   for label in ("run", *self.schemes))

    def _lacking(self) -> tuple[list[int], list[int]]:
        """(points without losses, those whose models are to be made again for their tasks)."""
        known = read_losses(self.losses)
        wanted = [str(newest()), *map(str, self.schemes.values())]
        unknown = [step for step in self.points
                   if not all((step, scheme) in known for scheme in wanted)]
        again = [step for step in self.points if step not in unknown
                 and not self._answered(step) and not self._waits(step)]
        return unknown, again

    # ---- what is done ----

    def run(self, points=None) -> list[dict]:
        """Evaluate what is not recorded of the points, by default all, and ask their tasks.

        Returns the rows of `model.evaluate_trajectory`, each with "model", of these points.
        """
        points = self.points if points is None else sorted(points)
        self.store.mkdir(parents=True, exist_ok=True)
        self._let_go()  # what a killed process left
        unknown, again = self._lacking()
        todo = [step for step in points if step in {*unknown, *again} or not self._answered(step)]
        options = {"n_blocks": self.n_blocks, "device": self.device, "cache": self.losses}
        total = 0
        if todo and self.on_hub:
            total = self.trajectory.plan(self._windows(), todo, True)["fetch_bytes"]
        with lawa_core.progress(total, f"fetching {self.name}", "B", unit_scale=True,
                                disable=not total) as bar:
            while todo:
                # up to the next point with tasks, whose models are let go before it goes on
                stop = next((i for i, step in enumerate(todo) if not self._answered(step)),
                            len(todo) - 1)
                piece, todo = todo[:stop + 1], todo[stop + 1:]
                replay(self.trajectory, self.schemes, self.corpus, piece, **options,
                       each=functools.partial(self._each, bar), on_disk=True,
                       averages=self.store, anew=[step for step in again if step in piece])
                self._ask(piece[-1])
                self._let_go()
        if not any(self._lacking()):
            for name in ("models", *map(scheme_dir, map(str, self.schemes.values()))):
                shutil.rmtree(self.store / name, ignore_errors=True)
        rows = replay(self.trajectory, self.schemes, self.corpus, points, **options)
        rows = [{"model": self.name} | line for line in rows]
        if points == self.points:
            self._write(rows)
        elif not any(self._lacking()):
            self.run()  # the last of several processes writes the rows of all
        return rows

    def _windows(self) -> dict:
        """The schemes that read checkpoints."""
        return {"run": newest(), "lawa": self.schemes["lawa"]}

    def _each(self, bar, step: int, label: str, state: dict) -> None:
        """Before a model of a point is evaluated."""
        if label == "run":
            self._let_go()
            self._advance(step)
            self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
            if self.on_hub:
                bar.update(self.trajectory.fetched - bar.n)
        folder = self._model(step, label)
        if not self._answered(step) and not (folder / "config.json").exists():
            state = {name: tensor.to(self._dtypes[name]) for name, tensor in state.items()}
            write_hf(folder, state, lawa_core.config_of(self.like), self.like)

    def _advance(self, step: int) -> None:
        """Bring EMA and SWA to a point, from the newest point where they are."""
        for label, scheme in self.schemes.items():
            if label == "lawa":
                continue
            made = self._averages(scheme)
            at = max((point for point in made if point <= step), default=None)
            beta = getattr(lawa_core.parse_scheme(scheme), "beta", None)
            for n, point in enumerate(self.points):
                if point > step or (at is not None and point <= at):
                    continue
                self.trajectory[point]  # fetched, where it is not
                sources, weights = {point: self.trajectory.sources[point]}, (1,)
                if at is not None:
                    sources[at] = self.store / scheme_dir(scheme) / checkpoint_name(at)
                    weights = (n, 1) if beta is None else (beta, 1 - beta)
                path = self.store / scheme_dir(scheme) / checkpoint_name(point)
                path.parent.mkdir(exist_ok=True)
                lawa_core.average_files(
                    lawa_core.Trajectory(sources), {path: (explicit(weights), point)},
                    dtype="F32", allow=lawa_core.ALLOW)
                at = point

    def _let_go(self) -> None:
        """Remove the revisions and running averages that no point needs any more."""
        unknown, again = self._lacking()
        lacking = sorted(unknown + again)
        if self.on_hub:
            needed = {step for point in lacking
                      for step in row(self.schemes["lawa"], self.trajectory.steps, point)}
            for step in self.trajectory.steps:
                if step not in needed:
                    self.trajectory.remove(step)
        for label, scheme in self.schemes.items():
            if label != "lawa":
                made = self._averages(scheme)
                first = [point for point in made if lacking and point <= lacking[0]]
                for point, path in made.items():
                    if not lacking or (first and point < first[-1]):
                        path.unlink(missing_ok=True)

    def _ask(self, step: int) -> None:
        """Put the tasks to the models of a point, keep the answers, let the models go."""
        files = self._documents(step)
        for label in ("run", *self.schemes):
            folder = self._model(step, label)
            tasks = [task for (of, task), path in files.items() if of == label
                     and not path.exists()]
            if tasks:
                for answers in zero_shot(folder, tasks, limit=self.task_limit,
                                         task_path=self.task_path,
                                         device=pick_device(self.device).type):
                    path = files[label, answers["task"]]
                    path.parent.mkdir(exist_ok=True)
                    with lawa_core.replacing(path) as part:
                        part.write_text(json.dumps(answers))
            shutil.rmtree(folder, ignore_errors=True)

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
            for (label, _), path in self._documents(step).items():
                if path.exists():
                    about = {"model": self.name, "step": step, "scheme": label}
                    found.append(about | json.loads(path.read_text()))
        return found

    def plan(self, points=None) -> str:
        """What is still to do of the points, by default all, takes, in words; fetches config.json
        and the tokenizer alone."""
        points = self.points if points is None else points
        unknown, again = self._lacking()
        todo = sorted({*unknown, *again} & set(points))
        lines = [f"{self.name}: {len(points)} points, {len(todo)} to do"]
        if not todo:
            return lines[0]
        models = len(todo) * (1 + len(self.schemes))
        size = self.trajectory[self.trajectory.steps[-1]].nbytes if not self.on_hub else 0
        if self.on_hub:
            hub = self.trajectory
            found = hub.plan(self._windows(), todo, True)
            size = max(map(hub.nbytes, hub.steps))
            width = 4 / self._itemsize()  # of running averages, in float32, over the files'
            running = 2 * (len(self.schemes) - 1) * width * size
            tasks = (1 + len(self.schemes)) * size if self.tasks else 0
            # the window and the next one, and what waits until the last point is recorded
            disk = found["disk_bytes"] + 2 * size + running + tasks
            lines += [
                f"  {found['revisions']} revisions, {found['fetch_bytes'] / 1e9:.2f} GB to fetch, "
                f"{found['hours']:.1f} hours at {found['rate'] / 1e6:.0f} MB/s",
                f"  at most {disk / 1e9:.2f} GB on disk ({running / 1e9:.2f} GB of it EMA and "
                f"SWA), {size / 1e9:.2f} GB of an average in memory"]
        flops = 2 * size / self._itemsize() * self.eval_tokens * models
        times = ", ".join(f"{duration(flops / rate)} on {name}"
                          for name, (rate, _) in DEVICES.items())
        lines.append(f"  {models} models of {size / self._itemsize() / 1e6:,.1f}M parameters to "
                     f"evaluate on {self.eval_tokens:,} tokens each: {flops:.1e} FLOPs, {times}")
        if self.on_hub:
            reported = [f"reported: {note}" for note in self.trajectory.notes]
            wrong = [*self.trajectory.twins, *reported]
            lines += [f"  duplicates: {line}" for line in wrong or ["none by the Hub's hashes"]]
        return "\n".join(lines)

    def _itemsize(self) -> int:
        fields = lawa_core.config_of(self.like)
        half = (fields.get("dtype") or fields.get("torch_dtype")) in ("float16", "bfloat16")
        return 2 if half else 4


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
            unknown = [task for task in tasks if task not in found.all_tasks]
            if not unknown:
                return found
    raise LawaError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and "
                    "task_path is a folder of further ones")


def zero_shot(folder, tasks: Sequence[str], *, device: str = "cpu", task_path=None,
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
    half = lawa_core.config_of(Path(folder)).get("dtype") if device == "cuda" else "float32"
    source = {"pretrained": str(folder), "dtype": half}
    with lawa_core.explained(f"zero-shot tasks {', '.join(tasks)}"):
        found = lm_eval.simple_evaluate(
            model="hf", model_args=source, tasks=list(tasks), device=device, **options)
    rows = []
    for task, values in found["results"].items():
        if "acc,none" not in values:
            raise LawaError(f"task {task} has no accuracy; expected one of several choices, or "
                            "words to be guessed")
        answers = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        rows.append({"task": task, "accuracy": values["acc,none"],
                     "stderr": values["acc_stderr,none"],
                     "documents": [float(sample["acc"]) for sample in answers]})
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
        self.full = np.flatnonzero(self.steps - back >= min(job.trajectory.steps))
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
        together = len(args.models) >= count  # a process has whole models
        if not together and not args.alone:
            print("EMA and SWA are left out: they need a model's points in order, and here "
                  f"{count} processes share {len(args.models)} of them")
        jobs = jobs_of(
            args.models, hub_folder=args.hub_folder, store=args.store, points=span(args.steps),
            corpus=open_corpus(args.corpus), k=args.k, spacing=args.spacing,
            eval_tokens=args.eval_tokens, running=together and not args.alone,
            tasks=words(args.tasks), task_steps=list(map(int, words(args.task_steps))),
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
    except (LawaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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
        place = str(Path(model).resolve()) if Path(model).is_dir() else model
        place = place.strip("/").replace("/", "--")
        own = {key: Path(folder) / place
               for key, folder in (("hub_folder", hub_folder), ("store", store)) if folder}
        jobs.append(Job(model, **own, **options, name=model if last.count(name) > 1 else name))
    return jobs


if __name__ == "__main__":
    sys.exit(main())
