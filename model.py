"""The nanoGPT: train a GPT on one machine, leave a trajectory of checkpoints behind, and evaluate averages along it.

The sections follow the data: training, evaluation, text, command line. What a run is, and what it costs, is in recipes.py, the network
itself in gpt.py, corpora in corpora.py; many runs at a time are in many_runs.py. Losses are nats per token.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import lawa_core
from corpora import Corpus, open_corpus
from gpt import GPT, PRESETS as PRESETS, GPTConfig, blank, preset
from lawa_core import JobFailed, LawaError, checkpoint_name, scheme_dir
from recipes import (
    ONLINE,
    RUNS as RUNS,
    SCALES,
    Config,
    _known,
    _parameters,
    batch,
    checkpoint_bytes as checkpoint_bytes,
    cost as cost,
    kept_steps,
    learning_rate,
    pick_device,
    plan,
    run_dir,
    scale_config,
    scale_values,
)

# ---- 1. Training --------------------------------------------------------------------------------------------------------------------

COLUMNS = ("step", "tokens", "lr", "loss", "grad_norm")  # of metrics.csv: loss in nats per token on the training batch, before the update
READ_EVERY = 10  # steps between looking at the losses: a look makes a GPU wait


def train(config: Config, out_dir=None, *, device: str = "auto", threads: int | None = None, compile: bool | None = None,
          eval_interval: int = 0, state_seconds: float = 30, keep=None, disk_budget: float = math.inf, leave: Collection[int] = (),
          progress=None) -> Path:
    """Train a run, go on with an interrupted one, or find it finished. Returns its folder.

    The folder holds config.json, metrics.csv, ckpt_<step>.safetensors (weights, float32), a trajectory per average, resume.pt while
    unfinished, and summary.json once finished. Under torchrun every rank calls this; the batches are one process's, cut in equal parts, and
    rank 0 writes. Args: config; what does not change its numbers:
        out_dir: default named by the configuration's hash; device; compile: default on CUDA, unless torch's path has a space
        threads: an interrupted run keeps its own
        eval_interval: steps between validation losses in val.csv; 0: none
        state_seconds: at most so much work is lost to a kill, rounded up to a checkpoint
        keep, disk_budget: a scheme and bytes: only checkpoints that its windows need are written, for as many targets as fit
        leave: steps whose state stays as state_<step>.pt, for a run that begins with this one (see `many_runs.begin_with`)
        progress: called with (step, max_iters, loss)
    Errors: LawaError for a bad configuration or a missing corpus; JobFailed for a loss that is not finite or a full disk, the last good
    state is kept. Ctrl-C and SIGTERM save the state, then raise KeyboardInterrupt and SystemExit(143).
    """
    with _ranks(device) as (rank, world, device):
        config, corpus = config.resolved(device), open_corpus(config.corpus)
        folder = Path(out_dir) if out_dir else run_dir(config)
        share = config.batch_size * config.accumulation / world
        if share % min(config.batch_size, max(int(share), 1)):
            raise LawaError(f"batch_size x accumulation = {config.batch_size} x {config.accumulation} cannot be cut in {world} equal ranks")
        for split, tokens in (("training", corpus.train), ("validation", corpus.val)):
            if len(tokens) <= config.block_size and (split == "training" or eval_interval):
                raise LawaError(f"{corpus.name} has {len(tokens)} {split} tokens; expected more than one block of {config.block_size}")
        for name, value, least in (("threads", threads, 1), ("eval_interval", eval_interval, 0), ("state_seconds", state_seconds, 0)):
            if value is not None and not value >= least:
                raise LawaError(f"{name} must be at least {least}, got {value}")
        spaced = " " in torch.__file__  # torch.compile calls the C++ compiler without quoting its own folder
        if compile and spaced:
            raise LawaError(f"torch.compile fails where torch's folder has a space in its name: {torch.__file__}; leave --compile out")
        compile = device.type == "cuda" and not spaced if compile is None else compile
        written = kept_steps(config, corpus.vocab_size, keep, disk_budget)
        if rank == 0:
            _claim(folder, config, corpus)
        with locked(folder) if rank == 0 else contextlib.nullcontext():
            if world > 1:
                torch.distributed.barrier()  # the folder is claimed before the others look at it
            if not (folder / "summary.json").exists():
                for part in folder.rglob(".*.part") if rank == 0 else ():
                    part.unlink()  # what a killed process was writing
                run = _Run(config, corpus, folder, device, threads, compile, rank, world, written)
                run.go(eval_interval, state_seconds, leave, progress)
    return folder


@contextlib.contextmanager
def _ranks(device: str):
    """(rank, number of ranks, device): torchrun's environment says; gloo joins CPUs, nccl GPUs."""
    world, where = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if world == 1:
        yield 0, 1, where
        return
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's ranks meet through a store of addresses; one that outlives a lost rank leads the next ones nowhere, and they hang
        raise LawaError("a rank was lost, and torchrun restarts well only as TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone "
                        "(or --rdzv_backend=c10d); start it so, and it goes on from its last state")
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield torch.distributed.get_rank(), world, where
    finally:
        torch.distributed.destroy_process_group()


def _claim(folder: Path, config: Config, corpus: Corpus) -> None:
    """Write config.json, or refuse a folder of another run."""
    described = dataclasses.asdict(config) | {"tokens_per_step": config.tokens_per_step, "corpus_fingerprint": corpus.fingerprint}
    described["init_sample"] = config.init_from and lawa_core.open_checkpoint(config.init_from).sample
    if (folder / "config.json").exists():
        found = json.loads((folder / "config.json").read_text())
        changed = [f"{key} {found.get(key)!r} -> {described.get(key)!r}" for key in described | found
                   if found.get(key) != described.get(key) and key not in ("corpus", "init_from")]  # by content, not by path
        if changed:
            raise LawaError(f"{folder} holds a run of another configuration ({', '.join(changed)}); choose another --out_dir")
        return
    with lawa_core.replacing(folder / "config.json") as part:
        part.write_text(json.dumps(described, indent=1))


@contextlib.contextmanager
def locked(folder: Path):
    """One process per run; another one waits and then finds the work done. The lock goes with its process, even after kill -9."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"waiting: another process is at work on {folder.name}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _on_cpu(tree):
    """A copy of nested dicts and lists of tensors, on the CPU: what training changes next stays out of the file being written."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list) else tree


class _Behind:
    """A thread that does one thing behind the training: writing what was copied, or cutting the next batch. An error surfaces at `wait`."""

    def __init__(self):
        self.pool, self.last = ThreadPoolExecutor(1), None

    def start(self, work, *args) -> None:
        self.wait()
        self.last = self.pool.submit(work, *args)

    def wait(self):
        """The result of what was started last."""
        last, self.last = self.last, None
        return last and last.result()

    def close(self) -> None:
        self.pool.shutdown()


class _Run:
    """One run in progress: model, optimizer, averages, and how many steps are done."""

    def __init__(self, config: Config, corpus: Corpus, folder: Path, device, threads=None, compile=False, rank=0, world=1, written=None):
        self.config, self.corpus, self.folder, self.device = config, corpus, folder, device
        self.rank, self.world, self.written, self.done = rank, world, written or set(), config.init_step
        saved = torch.load(folder / "resume.pt", map_location=device, weights_only=True) if (folder / "resume.pt").exists() else None
        if threads or saved:
            torch.set_num_threads(saved["threads"] if saved else threads)  # sums may round differently with another number of threads
        self.model = GPT(preset(config.preset, corpus.vocab_size), config.seed).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type in ("cuda", "cpu"))
        self.averages = {text: ONLINE[type(scheme)](self.model, scheme) for text, scheme in config.online.items()}
        if saved:
            self._restore(saved)
        elif config.init_from:
            self.model.load_state_dict(dict(lawa_core.open_checkpoint(config.init_from)))
        self.step_model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True) if world > 1 else self.model
        self.synced = self.step_model  # under torch.compile the wrapper keeps its no_sync
        self.step_model = torch.compile(self.step_model) if compile else self.step_model
        self.writer, self.loader = _Behind(), _Behind()

    def _restore(self, saved: dict) -> None:
        self.done = saved["step"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for text, average in self.averages.items():
            average.load_state_dict(saved["averages"][text])

    def save_state(self, name: str = "resume.pt") -> None:
        self.writer.wait()  # one copy in memory at a time
        state = {"step": self.done, "threads": torch.get_num_threads(), "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(),
                 "averages": {text: average.state_dict() for text, average in self.averages.items()}}
        self.writer.start(lawa_core.save, self.folder / name, _on_cpu(state))

    def save_checkpoint(self) -> None:
        self.writer.wait()
        name = checkpoint_name(self.done)
        states = {self.folder / name: _on_cpu(dict(self.model.state_dict()))}
        for text, average in self.averages.items():
            with contextlib.suppress(LawaError):  # nothing averaged before its start
                states[self.folder / scheme_dir(text) / name] = _on_cpu(average.average())
        self.writer.start(lambda: [lawa_core.save(path, state) for path, state in states.items()])

    def _batch(self, step: int) -> torch.Tensor:
        tokens = torch.from_numpy(_known(batch(self.corpus.train, self.config, step, self.rank, self.world), self.corpus))
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns (this rank's loss, gradient norm), still on the device: reading them would stop it."""
        config, tokens = self.config, self.loader.wait()
        tokens = (self._batch(self.done) if tokens is None else tokens).to(self.device, non_blocking=True)
        if self.device.type == "cuda" and self.done + 1 < config.max_iters:  # cutting a batch takes a CPU less than handing it over
            self.loader.start(self._batch, self.done + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.done)
        parts, total = tokens.split(config.batch_size), 0.0
        for part in parts:
            alone = self.world > 1 and part is not parts[-1]  # gradients travel once per step
            with self.synced.no_sync() if alone else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                    _, loss = self.step_model(part[:, :-1], part[:, 1:])
                (loss / len(parts)).backward()
            total = total + loss.detach() / len(parts)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        for average in self.averages.values():
            average.update(self.done)
        return total, norm

    def go(self, eval_interval: int, state_seconds: float, leave: Collection[int], progress) -> None:
        """Train to the end, or to a signal."""
        config, begun, first, self.saved, self.pending = self.config, time.monotonic(), self.done, time.monotonic(), []
        self.metrics = _Table(self.folder / "metrics.csv", COLUMNS, self.done, self.rank == 0)
        self.val = _Table(self.folder / "val.csv", ("step", "loss"), self.done, self.rank == 0 and bool(eval_interval))
        with _signals() as caught:
            try:
                while self.done < config.max_iters:
                    loss, norm = self.step()
                    self.pending.append((self.done, self.done * config.tokens_per_step, self.optimizer.param_groups[0]["lr"], loss, norm))
                    self._look(caught, eval_interval, state_seconds, progress)
                    if self.done in leave and self.rank == 0:
                        self.save_state(f"state_{self.done}.pt")
                self.writer.wait()
            except OSError as error:
                raise JobFailed(f"cannot write {self.folder}: {error.strerror or error}; mend that, and the same command goes on from its "
                                "last state") from None
            finally:
                self.loader.close()
                self.writer.close()
        if self.rank == 0:
            self._summarize(first, time.monotonic() - begun)

    def _look(self, caught: list, eval_interval: int, state_seconds: float, progress) -> None:
        """After a step: losses, checkpoints, states and signals, each when it is due."""
        at_checkpoint = self.done % self.config.ckpt_interval == 0
        look = at_checkpoint or self.done % READ_EVERY == 0 or self.done == self.config.max_iters
        if look or (caught and self.world == 1):
            stop = self._flush(bool(caught), progress)
            if self.rank == 0 and at_checkpoint and self.done in self.written:
                self.save_checkpoint()
            self._validate(eval_interval)
            if self.rank == 0 and (stop or (at_checkpoint and time.monotonic() - self.saved >= state_seconds)):
                self.save_state()
                self.saved = time.monotonic()
            if stop:
                self.writer.wait()
                raise KeyboardInterrupt if caught == [signal.SIGINT] else SystemExit(128 + signal.SIGTERM)
        else:
            self._validate(eval_interval)

    def _validate(self, eval_interval: int) -> None:
        if self.rank == 0 and eval_interval and self.done % eval_interval == 0:
            self.val.write([(self.done, float(evaluate(self.model, self.corpus).mean()))])

    def _flush(self, stop: bool, progress) -> bool:
        """Read and write the pending losses, the mean over ranks; returns whether any rank was told to stop."""
        told = torch.full((2,), float(stop), device=self.device)
        numbers = torch.stack([*(torch.stack([loss, norm]) for *_, loss, norm in self.pending), told])
        if self.world > 1:
            torch.distributed.all_reduce(numbers)
            numbers /= self.world
        *pairs, (stopped, _) = numbers.tolist()
        rows = [(step, tokens, lr, *pair) for (step, tokens, lr, *_), pair in zip(self.pending, pairs, strict=True)]
        self.pending.clear()
        for step, _, lr, loss, norm in rows:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise JobFailed(f"{self.folder.name}: loss {loss}, gradient norm {norm} at step {step}, rate {lr:.2e}; lower --lr "
                               f"{self.config.lr:g}; the checkpoints and the state before are kept")
        self.metrics.write(rows)
        if progress and rows and self.rank == 0:
            progress(self.done, self.config.max_iters, rows[-1][3])
        return stopped > 0

    def _summarize(self, first: int, seconds: float) -> None:
        summary = {"steps": self.done, "parameters": self.model.size(), "seconds": round(seconds, 1),
                   "tokens_per_second": round((self.done - first) * self.config.tokens_per_step / max(seconds, 1e-9)), "ranks": self.world,
                   "threads": torch.get_num_threads(), "device": self.device.type, "torch": torch.__version__}
        with lawa_core.replacing(self.folder / "summary.json") as part:
            part.write_text(json.dumps(summary, indent=1))
        (self.folder / "resume.pt").unlink(missing_ok=True)


class _Table:
    """A CSV that grows row by row, cut back to the step a run resumes from; one that is not `kept` ignores its rows."""

    def __init__(self, path: Path, columns, done: int, kept: bool):
        self.path, self.kept = path, kept
        if not kept:
            return
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        whole = [line for line in lines if line.count(",") == len(columns) - 1 and int(line.split(",")[0]) <= done]
        with lawa_core.replacing(path) as part:
            part.write_text("\n".join([",".join(columns), *whole, ""]))

    def write(self, rows) -> None:
        if self.kept:
            with open(self.path, "a") as file:
                file.writelines(",".join(map(repr, row)) + "\n" for row in rows)


@contextlib.contextmanager
def _signals():
    """Inside, Ctrl-C and SIGTERM are noted in the list, for the loop to act between two steps; a second Ctrl-C interrupts at once."""
    caught = []

    def note(number, _):
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))
    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its signals are not ours
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- 2. Evaluation ------------------------------------------------------------------------------------------------------------------

BLOCKS = 128  # validation blocks by default
SMALL = 1 << 24  # parameters: up to this size a model is evaluated on one core, several side by side
VALUES = ("loss", "loss_se", "gain", "gain_se")  # of a row in eval.csv


@torch.inference_mode()
def evaluate(model: GPT, corpus: Corpus, n_blocks: int = BLOCKS, batch_tokens: int | None = None) -> np.ndarray:
    """Loss in nats per token of `n_blocks` fixed blocks spread evenly over the validation tokens: (n_blocks,) float64.

    The same blocks for every model of one block size, so that differences are paired. Draws no random numbers; leaves the model as it was.
    batch_tokens: at a time; default 8192, on a CPU 2048, whose activations are nearer to its caches and take little memory.
    """
    block, device, training = model.config.block_size, next(model.parameters()).device, model.training
    batch_tokens = batch_tokens or (2048 if device.type == "cpu" else 8192)
    n_blocks = min(n_blocks, (len(corpus.val) - 1) // block)
    if n_blocks < 1:
        raise LawaError(f"{corpus.name} has {len(corpus.val)} validation tokens; expected more than {block}, and n_blocks of at least 1")
    starts = np.linspace(0, len(corpus.val) - block - 1, n_blocks).astype(np.int64)
    tokens = torch.from_numpy(_known(corpus.val[starts[:, None] + np.arange(block + 1)].astype(np.int64), corpus))
    half = torch.float16 if next(model.parameters()).dtype == torch.float16 else torch.bfloat16
    model.eval()
    losses = []
    for part in tokens.split(max(batch_tokens // block, 1)):
        part = part.to(device)
        with torch.autocast(device.type, half, enabled=device.type == "cuda"):
            loss = model.losses(part[:, :-1], part[:, 1:])
        losses.append(loss.double().mean(1).cpu())
    model.train(training)
    return torch.cat(losses).numpy()


def evaluate_trajectory(run, schemes, at=None, n_blocks: int = BLOCKS, device: str = "auto", *, model: GPT | None = None,
                        corpus: Corpus | None = None, every: float = 5.0) -> list[dict]:
    """Losses of a run and of averages along it, each checkpoint read once; kept in eval.csv beside the run, so nothing is evaluated twice.

    Args: run: run folder, or any trajectory if `model` (of its shape; its weights are overwritten) and `corpus` are given; schemes:
    {label: scheme, or the text of an average kept while training}; at: target steps, default all checkpoints; n_blocks: validation blocks;
    every: seconds between lines of progress.
    Returns rows {"run", "step", "scheme": label, "loss", "loss_se", "bpb", "gain", "gain_se", "n_blocks"}: loss in nats per token with its
    standard error over blocks, bpb in bits per byte of text, gain = run minus average on the same blocks (positive is good). The run itself
    is the scheme "run".
    """
    device = pick_device(device)
    shape, corpus = (model.config, corpus) if model else _of_run(run)
    trajectory, folder = lawa_core.open_trajectory(run), Path(run) if isinstance(run, (str, os.PathLike)) and Path(run).is_dir() else None
    schemes, at = {"run": lawa_core.newest(), **schemes}, list(trajectory.steps if at is None else at)
    cache = _Cache(folder and folder / "eval.csv", n_blocks)
    missing = cache.missing(at, schemes)
    wanted = {name: scheme for name, scheme in schemes.items() if name == "run" or any(cache.get(step, scheme) is None for step in missing)}
    if not missing:
        return cache.table(trajectory.name, at, schemes, corpus)
    own, begun, told, total = None, time.monotonic(), time.monotonic(), len(missing) * len(wanted)
    averages = _states(trajectory, folder, wanted, missing)
    try:
        for done, (step, name, losses) in enumerate(_losses(averages, shape, corpus, n_blocks, device, model), 1):
            own = losses if name == "run" else own  # comes first at every step
            cache.add(step, schemes[name], losses, own)
            if time.monotonic() - told > every:
                told = time.monotonic()
                rate = done / (told - begun)
                left = (total - done) / rate
                print(f"evaluating {trajectory.name}: {done} of {total} models, {rate:.1f}/s, {left:.0f} s left", flush=True)
                cache.write()
    finally:
        if own is not None:
            cache.write()
    return cache.table(trajectory.name, at, schemes, corpus)


def _losses(states, shape: GPTConfig, corpus: Corpus, n_blocks: int, device: torch.device, model: GPT | None):
    """(step, name, losses) of each (step, name, weights), in order, while the next averages are made.

    Small models are evaluated side by side on a CPU, each on a core of its own: one does not keep several busy. A given `model` is the only
    one used.
    """
    threads = torch.get_num_threads()
    jobs = min(threads, 8) if device.type == "cpu" and not model and _parameters(shape)[0] <= SMALL else 1
    models, coming = [model or blank(shape, device) for _ in range(jobs)], collections.deque()

    def losses(state):
        free = models.pop()  # as many as there are threads in the pool
        free.to(device).load_state_dict(state)
        found = evaluate(free, corpus, n_blocks)
        models.append(free)
        return found
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        pool = stack.enter_context(ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads // jobs,)))
        stack.callback(pool.shutdown, cancel_futures=True)  # an interrupted evaluation does not wait for what is in the queue
        for step, name, state in states:
            coming.append((step, name, pool.submit(losses, state)))
            if len(coming) > jobs:
                step, name, found = coming.popleft()
                yield step, name, found.result()
        for step, name, found in coming:
            yield step, name, found.result()


def _of_run(run) -> tuple[GPTConfig, Corpus]:
    """(the shape of a run's model, its corpus)."""
    if not (Path(run) / "config.json").exists():
        raise LawaError(f"{run} is no run folder: expected {Path(run) / 'config.json'}, as `model.py train` writes it")
    config = json.loads((Path(run) / "config.json").read_text())
    corpus = open_corpus(config["corpus"])
    return preset(config["preset"], corpus.vocab_size), corpus


def _states(trajectory, folder: Path | None, schemes: dict, at: list) -> Iterator[tuple[int, str, dict]]:
    """(step, name, weights): averages along the trajectory, each followed at its step by those kept while training."""
    kept = {name: folder / scheme_dir(text) for name, text in schemes.items() if isinstance(text, str)}
    rows = {name: scheme for name, scheme in schemes.items() if name not in kept}
    for step, name, state in lawa_core.sweep(trajectory, rows, at):
        yield step, name, state
        if name == list(rows)[-1]:
            for own, path in kept.items():
                yield step, own, dict(lawa_core.open_checkpoint(path / checkpoint_name(step)))


class _Cache:
    """eval.csv: what was evaluated before. Several notebooks may add to one file at a time; with no path, nothing is kept."""

    def __init__(self, path: Path | None, n_blocks: int):
        self.path, self.n_blocks, self.rows = path, n_blocks, {}
        if path and path.exists():
            with open(path, newline="") as file:
                self.rows = {(int(row["step"]), row["scheme"], int(row["n_blocks"])): {name: float(row[name]) for name in VALUES}
                             for row in csv.DictReader(file)}

    def get(self, step: int, scheme) -> dict | None:
        return self.rows.get((step, str(scheme), self.n_blocks))

    def missing(self, at, schemes: dict) -> list[int]:
        """The steps at which a scheme was not evaluated yet."""
        return [step for step in at if any(self.get(step, scheme) is None for scheme in schemes.values())]

    def table(self, run: str, at, schemes: dict, corpus: Corpus) -> list[dict]:
        """The rows of `evaluate_trajectory`, once nothing is missing."""
        scale = 1 / math.log(2) / corpus.val_bytes_per_token
        found = [(step, name, self.get(step, scheme)) for step in at for name, scheme in schemes.items()]
        return [{"run": run, "step": step, "scheme": name, **values, "bpb": values["loss"] * scale, "n_blocks": self.n_blocks}
                for step, name, values in found]

    def add(self, step: int, scheme, losses: np.ndarray, own: np.ndarray) -> None:
        def mean_se(x):
            return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
        self.rows[step, str(scheme), self.n_blocks] = dict(zip(VALUES, (*mean_se(losses), *mean_se(own - losses)), strict=True))

    def write(self) -> None:
        if not self.path:
            return
        with locked(self.path.parent):
            rows = _Cache(self.path, self.n_blocks).rows | self.rows
            with lawa_core.replacing(self.path) as part, open(part, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("step", "scheme", "n_blocks", *VALUES))
                writer.writerows([*key, *(repr(values[name]) for name in VALUES)] for key, values in sorted(rows.items()))


# ---- 3. Text ------------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def sample(run, scheme=None, at: int | None = None, prompt: str = "\n", tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """`tokens` tokens of text after `prompt`, from a run's checkpoint at `at` (default the newest) or from an average there."""
    shape, corpus = _of_run(run)
    tokenizer, generator = corpus.tokenizer(), torch.Generator().manual_seed(seed)
    if tokens < 0 or not tokenizer.encode_ordinary(prompt):
        raise LawaError(f"expected tokens of at least 0 and a prompt that is not empty, got {tokens} and {prompt!r}")
    model = blank(shape)
    model.load_state_dict(lawa_core.average(run, scheme or lawa_core.newest(), at))
    idx = torch.tensor([tokenizer.encode_ordinary(prompt)])
    for _ in range(tokens):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1, :corpus.vocab_size] / max(temperature, 1e-6)
        idx = torch.cat([idx, torch.multinomial(F.softmax(logits, -1), 1, generator=generator)], 1)
    return tokenizer.decode(idx[0].tolist())


# ---- 4. Command line ----------------------------------------------------------------------------------------------------------------

EXAMPLES = """examples
  python model.py train --preset micro --corpus stdlib --lr 1e-3 --max_iters 200 --seed 0
  python model.py train --scale gpt2-small --lr 6e-3        the paper's high rate
  torchrun --nproc_per_node=4 model.py train --scale gpt2-small
  python model.py plan --scale gpt2-small
  python model.py sample RUN --scheme "lawa(k=5, spacing=20)" --prompt "def main("
exit status: 0 done, 1 the run failed, 2 bad usage or input, 130/143 interrupted with its state saved (the same command goes on)"""
TRAIN = (  # options of `train` that do not change the numbers: name, type, default, help
    ("out_dir", str, None, "the run folder (default: runs/<corpus>-<preset>-<hash of the configuration>)"),
    ("device", str, "auto", "cpu, cuda, mps (default: the best there is)"),
    ("threads", int, None, "CPU threads (default: torch's choice)"),
    ("eval_interval", int, 0, "steps between validation losses, in val.csv (default: none)"),
    ("state_seconds", float, 30.0, "seconds between resume states, which are written at checkpoints (default 30)"),
    ("leave", str, "", 'steps whose state stays as state_<step>.pt, e.g. "500,750"'))
SAMPLE = (("scheme", str, None, 'average first, for example "lawa(k=5, spacing=20)"'), ("at", int, None, "step (default: the newest)"),
          ("prompt", str, "\n", "text to go on from"), ("tokens", int, 200, "tokens of text (default 200)"),
          ("temperature", float, 0.8, "0: the likeliest token (default 0.8)"), ("seed", int, 0, "of the draws"))


def _parser() -> argparse.ArgumentParser:
    style = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("model.py", description="Train and sample small and large GPTs.", **style)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "train a run, or go on with it"), ("plan", "print what a run would take, and whether it fits here")):
        sub = commands.add_parser(name, help=text, description=text, **style)
        sub.add_argument("--scale", help=f"start from the values of {', '.join(SCALES)}")
        for f in dataclasses.fields(Config):
            sub.add_argument(f"--{f.name}", type=type(f.default), help=f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%"))
        sub.add_argument("--keep", help='write only checkpoints that this scheme needs, e.g. "lawa(k=5, spacing=200)", for as many targets '
                         "as fit --disk_budget")
        sub.add_argument("--disk_budget", type=float, help="GB that this run's checkpoints may take (default: no limit)")
        if name == "train":
            for flag, kind, default, help in TRAIN:
                sub.add_argument(f"--{flag}", type=kind, default=default, help=help)
            sub.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    commands.add_parser("work", help="train the runs that come on stdin, each a line with a JSON list of `train`'s options", **style)
    sub = commands.add_parser("sample", help="print text from a run or its average", **style)
    sub.add_argument("run", help="run folder")
    for flag, kind, default, help in SAMPLE:
        sub.add_argument(f"--{flag}", type=kind, default=default, help=help)
    return parser


def flags(config: Config) -> list[str]:
    """The command line of a configuration."""
    return [word for f in dataclasses.fields(config) for word in (f"--{f.name}", str(getattr(config, f.name)))]


class _Bar(lawa_core.Progress):
    def __call__(self, step, max_iters, loss):
        super().__call__(step, max_iters, f"loss {loss:.3f}")


def _configured(args: dict) -> Config:
    """Take the configuration out of the values of `train` or `plan`, and turn what is left into their arguments."""
    given = {f.name: args.pop(f.name) for f in dataclasses.fields(Config)}
    scale = args.pop("scale")
    args["keep"] = args["keep"] and lawa_core.parse_scheme(args["keep"])
    args["disk_budget"] = math.inf if args["disk_budget"] is None else args["disk_budget"] * 1e9
    return scale_config(scale_values(scale) if scale else {}, **{name: value for name, value in given.items() if value is not None})


def _train(args: dict) -> Path:
    config = _configured(args)
    args["leave"] = [int(step) for step in args["leave"].split(",") if step]
    return train(config, **args, progress=_Bar("steps", 1))


def _plan(args: dict) -> str:
    config = _configured(args)
    return plan([config], **args)


def _sample(args: dict) -> str:
    return sample(**args | {"scheme": args["scheme"] and lawa_core.parse_scheme(args["scheme"])})


def work() -> int:
    """Train the runs that come on stdin, each a line with a JSON list of `train`'s options; answer each with a JSON text, empty or what
    went wrong. For `many_runs.train_all`: starting Python and torch takes three seconds, which a short run should not pay again.
    """
    for line in sys.stdin:
        wrong = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                args = vars(_parser().parse_args(["train", *json.loads(line)]))
                del args["command"]
                _train(args)
            torch.compiler.reset()  # the next run's model is another
        except Exception as error:
            said = str(error) if isinstance(error, (LawaError, OSError, RuntimeError)) else ""
            wrong = " ".join((said or repr(error)).split())
        print(json.dumps(wrong), flush=True)
    return 0


def main(argv=None) -> int:
    args = vars(_parser().parse_args(argv))
    command = args.pop("command")
    try:
        if command == "work":
            return work()
        print({"train": _train, "plan": _plan, "sample": _sample}[command](args))
    except KeyboardInterrupt:
        print("interrupted, state saved; the same command goes on", file=sys.stderr)
        return 130
    except SystemExit:
        print("terminated, state saved; the same command goes on", file=sys.stderr)
        raise
    except (LawaError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) and not isinstance(error, JobFailed) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
