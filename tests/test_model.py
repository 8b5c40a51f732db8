"""model.py: the GPT against transformers, training against a textbook loop, kills at any moment,
evaluation, the command line."""

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F

import model
from lawa_core import LawaError, ema, lawa, open_trajectory, parse_scheme
from model import (
    GPT,
    Config,
    GPTConfig,
    LinearCrossEntropy,
    batch,
    evaluate,
    evaluate_trajectory,
    learning_rate,
    open_corpus,
    run_dir,
    train,
)

ROOT = Path(__file__).resolve().parents[1]
BYTES_PER_TOKEN = (
    1.25  # what the made-up meta.json claims, so that bits per byte differ from bits per token
)


# ---- helpers -------------------------------------------------------------------------------------


def write_corpus(folder, seed=0, vocab_size=257, train_tokens=20_000, val_tokens=3000, **meta):
    """A corpus as data/corpus.py writes it: random words in UTF-8, one token per byte,
    end-of-text is 256."""
    rng = np.random.default_rng(seed)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 8)))) for _ in range(60)]
    folder.mkdir(parents=True)
    for side, length in (("train", train_tokens), ("val", val_tokens)):
        text = " ".join(words[i] for i in rng.integers(0, len(words), length))[:length]
        np.frombuffer(text.encode(), np.uint8).astype("<u2").tofile(folder / f"{side}.bin")
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (folder / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    described = {
        "name": folder.name,
        "val_fraction": 0.1,
        "seed": seed,
        "tokenizer": "tokenizer.tiktoken",
        "vocab_size": vocab_size,
        "eot_token": 256,
        "split": "files",
        "skipped": 0,
        "python": "3.11.0",
        "pattern": r"\w+|\W+",
        "manifest_sha256": hashlib.sha256(str(seed).encode()).hexdigest(),
        "documents": {"train": 1, "val": 1},
        "train_tokens": train_tokens,
        "val_tokens": val_tokens,
        "train_bytes": int(train_tokens * BYTES_PER_TOKEN),
        "val_bytes": int(val_tokens * BYTES_PER_TOKEN),
    }
    (folder / "meta.json").write_text(json.dumps(described | meta))
    return folder


def rows(folder, file="metrics.csv"):
    """The rows of a table of numbers."""
    with open(folder / file, newline="") as lines:
        return [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)
        ]


def column(folder, name):
    return [row[name] for row in rows(folder)]


def checkpoints(folder):
    """{path within the folder: bits of every tensor}, averages included."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        path.relative_to(folder).as_posix(): ref.state_bits(ref.read_safetensors(path)[0])
        for path in files
    }


def weights(folder, step):
    return ref.read_safetensors(folder / f"ckpt_{step}.safetensors")[0]


def listing(folder):
    """Every file of a run but its lock, hidden ones included."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )


def digest(folder):
    return {path: seen for path, seen in ref.digest(folder).items() if not path.endswith(".lock")}


def assert_same_run(got, want):
    """The same rows and weights, bit for bit, and the same files."""
    for table in want.glob("*.csv"):
        assert (got / table.name).read_text() == table.read_text()
    assert checkpoints(got) == checkpoints(want)
    assert listing(got) == listing(want)


def assert_near(got, want, start, tolerance):
    """Weights moved from `start` alike: the difference is small against the way gone."""
    for name in want:
        moved, off = (want[name] - start[name]).norm(), (got[name] - want[name]).norm()
        assert off <= tolerance * moved, f"{name}: {off / moved:.2e} of the way off"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture(scope="module")
def config(corpus):
    return Config(
        preset="nano",
        corpus=str(corpus),
        lr=3e-3,
        max_iters=12,
        batch_size=4,
        warmup_iters=3,
        ckpt_interval=2,
        seed=7,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The run that most tests look at; nobody may change it."""
    return train(config, tmp_path_factory.mktemp("runs") / "shared")


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


# ---- child processes -----------------------------------------------------------------------------

SERVER = """
import json, os, resource, signal, sys
import model, numpy.random, tiktoken, torch._dynamo  # once: every job is a fork
print("ready", flush=True)
def signal_at(countdown, number, folder):
    def hook(event, args):
        nonlocal countdown
        if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder):
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), number)
    sys.addaudithook(hook)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        for number, path in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        if "largest_file" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        if "signal_at" in job:
            signal_at(*job["signal_at"])
        sys.exit(model.main(job["argv"]))
"""  # signal_at: that signal at the n-th opening, renaming or removal of a file in the folder


class Child:
    """`python model.py ARGV...` as a process of its own, without the seconds of importing torch."""

    def __init__(self, server, log, argv, **options):
        self.server, self.log = server, log
        log.mkdir(parents=True, exist_ok=True)
        self.pid = self.ask(
            {
                "argv": [str(word) for word in argv],
                "out": str(log / "out"),
                "err": str(log / "err"),
                **options,
            }
        )

    def ask(self, job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)
        return self.wait()

    def wait(self):
        return self.ask({"wait": self.pid})

    out = property(lambda self: (self.log / "out").read_text())
    err = property(lambda self: (self.log / "err").read_text())


@pytest.fixture(scope="module")
def server():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


@pytest.fixture
def child(server, tmp_path):
    """child(argv..., **options) -> Child"""
    numbers = iter(range(1000))
    return lambda *argv, **options: Child(server, tmp_path / f"log{next(numbers)}", argv, **options)


@pytest.fixture
def command(child):
    """command(argv...) -> (exit status, stdout, stderr)"""

    def call(*argv, **options):
        process = child(*argv, **options)
        return process.wait(), process.out, process.err

    return call


def flags(config, out_dir=None, **more):
    fields = (
        dataclasses.asdict(config)
        | {"threads": 1}
        | ({"out_dir": out_dir} if out_dir else {})
        | more
    )
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# ---- killed, interrupted, out of disk ------------------------------------------------------------


@pytest.fixture(scope="module")
def long(config):
    """Accumulation, clipping, two online averages and validation: all that a resume has to bring
    back."""
    return changed(
        config,
        max_iters=36,
        batch_size=2,
        gradient_accumulation_steps=2,
        ckpt_interval=3,
        grad_clip=0.5,
        averages="ema(0.5); ema(0.9)",
    )


@pytest.fixture(scope="module")
def undisturbed(long, server, tmp_path_factory):
    """(folder, seconds) of the long run in one go."""
    folder, begun = tmp_path_factory.mktemp("runs") / "undisturbed", time.monotonic()
    process = Child(
        server,
        tmp_path_factory.mktemp("log"),
        ["train", *flags(long, folder, state_seconds=0, eval_interval=5)],
    )
    assert process.wait() == 0, process.err
    return folder, time.monotonic() - begun


def assert_whole(folder, want):
    """What a killed run leaves in view is whole: a trajectory that can be averaged at once."""
    found, expected = checkpoints(folder), checkpoints(want)
    assert found.items() <= expected.items()


def go_on_to_the_end(child, argv, folder, want):
    """Finish a killed run; the checkpoints before its last two must not be written again, or it
    began anew."""
    kept = sorted(folder.glob("ckpt_*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[:-2]
    before = {path: path.stat().st_mtime_ns for path in kept}
    process = child(*argv)
    assert process.wait() == 0, process.err
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert_same_run(folder, want)


@pytest.mark.parametrize("seed", range(4))
def test_killed_while_touching_files(seed, long, undisturbed, child, tmp_path):
    """Five kills per run, each at a random opening, renaming or removal: in checkpoints, resume
    states, rows."""
    rng, killed = random.Random(seed), 0
    folder = tmp_path / "run"
    argv = ["train", *flags(long, folder, state_seconds=0, eval_interval=5)]
    for _ in range(5):
        killed += (
            child(*argv, signal_at=(rng.randint(1, 40), signal.SIGKILL, str(folder))).wait()
            == -signal.SIGKILL
        )
        assert_whole(folder, undisturbed[0])
    assert killed >= 4
    go_on_to_the_end(child, argv, folder, undisturbed[0])


def test_killed_at_twenty_random_moments(long, undisturbed, child, tmp_path):
    """The moments are spread over a run's time on this machine; a run that survives is compared
    and the next one begun."""
    rng, number, killed = random.Random(20), 0, 0
    while killed < 20:
        folder = tmp_path / f"run{number}"
        argv = ["train", *flags(long, folder, state_seconds=0, eval_interval=5)]
        process = child(*argv)
        time.sleep(rng.random() * undisturbed[1] / 2)
        status = process.kill()
        assert status in (0, -signal.SIGKILL), process.err
        killed += status != 0
        if folder.exists():
            assert_whole(folder, undisturbed[0])
        if status == 0 or killed == 20 or rng.random() < 0.15:
            go_on_to_the_end(child, argv, folder, undisturbed[0])
            number += 1
            assert number < 40


SIGNALS = pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)


def check_interrupted(process, child, argv, folder, want):
    """One line, and without any earlier resume state the work is still there."""
    assert len(process.err.strip().splitlines()) == 1 and "Traceback" not in process.err
    assert_whole(folder, want)
    go_on_to_the_end(child, argv, folder, want)


@SIGNALS
def test_interrupted_while_touching_files(number, status, long, undisturbed, child, tmp_path):
    """In the midst of writing checkpoints, averages, rows."""
    for moment in random.Random(2).sample(range(20, 70), 3):
        folder = tmp_path / f"run{moment}"
        argv = ["train", *flags(long, folder, state_seconds=1e9, eval_interval=5)]
        process = child(*argv, signal_at=(moment, number, str(folder)))
        assert process.wait() == status, f"at the {moment}th: {process.err}"
        check_interrupted(process, child, argv, folder, undisturbed[0])


@SIGNALS
def test_interrupted_at_random_moments(number, status, long, undisturbed, child, tmp_path):
    """Mostly in the midst of a step, whose update must be whole or not have been."""
    rng = random.Random(3)
    for i in range(3):
        folder = tmp_path / f"run{i}"
        argv = ["train", *flags(long, folder, state_seconds=1e9, eval_interval=5)]
        process = child(*argv)
        first = folder / f"ckpt_{rng.randrange(6, 27, 3)}.safetensors"
        until(first.exists)
        time.sleep(0.03 * rng.random())  # a few steps, far from the end
        assert process.kill(number) == status, process.err
        check_interrupted(process, child, argv, folder, undisturbed[0])


def test_two_processes_of_one_run(long, undisturbed, child, tmp_path):
    """The second waits for the first and finds the work done."""
    folder = tmp_path / "run"
    argv = ["train", *flags(long, folder, state_seconds=0, eval_interval=5)]
    processes = [child(*argv) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0], [
        process.err for process in processes
    ]
    assert_same_run(folder, undisturbed[0])


@pytest.mark.parametrize("largest_file, survives", [(600_000, "checkpoints"), (300_000, "nothing")])
def test_full_disk(largest_file, survives, long, undisturbed, child, command, tmp_path):
    """Files may not grow beyond a limit: first resume states (1.5 MB) cannot be written, then
    not even checkpoints (0.5 MB)."""
    folder = tmp_path / "run"
    argv = ["train", *flags(long, folder, state_seconds=0, eval_interval=5)]
    status, _, err = command(*argv, largest_file=largest_file)
    assert status == 1
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert_whole(folder, undisturbed[0])
    assert bool(checkpoints(folder)) == (survives == "checkpoints")
    assert child(*argv).wait() == 0
    assert_same_run(folder, undisturbed[0])


def test_real_command_killed_and_resumed(long, undisturbed, tmp_path):
    """The same through `python model.py` itself, from another folder."""
    folder = tmp_path / "run"
    argv = [
        sys.executable,
        str(ROOT / "model.py"),
        "train",
        *map(str, flags(long, folder, state_seconds=0, eval_interval=5)),
    ]
    with subprocess.Popen(
        argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: (folder / "ckpt_12.safetensors").exists())
        process.kill()
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith(str(folder))
    assert_same_run(folder, undisturbed[0])


# ---- what training computes ----------------------------------------------------------------------


def naive_rate(schedule, step, lr, total, warmup, floor, cooldown):
    """Step is 0-based. nanoGPT's warm-up and cosine; Hägele et al. 2024's 1-sqrt cooldown."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return (
            lr * floor
            + (lr - lr * floor) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        )
    begin = total - cooldown
    return (
        lr
        if step < begin
        else lr * floor + (lr - lr * floor) * (1 - math.sqrt((step - begin) / cooldown))
    )


SCHEDULES = [  # schedule, max_iters, warmup_iters, min_lr_frac, cooldown_frac
    ("cosine", 100, 10, 0.1, 0.2),
    ("cosine", 100, 0, 0.0, 0.2),
    ("cosine", 7, 7, 0.1, 0.2),
    ("constant", 50, 5, 0.1, 0.2),
    ("wsd", 100, 10, 0.0, 0.2),
    ("wsd", 100, 10, 0.1, 0.5),
    ("wsd", 50, 0, 0.1, 1.0),
]


@pytest.mark.parametrize("schedule, total, warmup, floor, cooldown", SCHEDULES)
def test_learning_rate(schedule, total, warmup, floor, cooldown):
    fields = {
        "schedule": schedule,
        "max_iters": total,
        "warmup_iters": warmup,
        "min_lr_frac": floor,
        "cooldown_frac": cooldown,
    }
    config = Config(lr=6e-3, ckpt_interval=1, **fields)
    want = [
        naive_rate(schedule, step, 6e-3, total, warmup, floor, round(cooldown * total))
        for step in range(total)
    ]
    assert [learning_rate(config, step) for step in range(total)] == pytest.approx(want, rel=1e-12)
    assert learning_rate(config, 0) == pytest.approx(
        6e-3 / (warmup + 1)
    )  # never 0: the first step counts


def naive_training(config, tokens, vocab_size):
    """The recipe written out, one tensor at a time: mean loss of the whole batch, clipping,
    AdamW with decay on matrices only.

    Returns the rows, the initial weights, and the weights after every step.
    """
    net = GPT(model.gpt_config(config.preset, vocab_size), config.seed)
    params = dict(net.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    table, trail = [], {}
    for step in range(config.max_iters):
        data = torch.from_numpy(np.asarray(batch(tokens, config, step), np.int64))
        loss = F.cross_entropy(net(data[:, :-1])[0].flatten(0, 1), data[:, 1:].flatten())
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        shrink = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        lr = naive_rate(
            config.schedule,
            step,
            config.lr,
            config.max_iters,
            config.warmup_iters,
            config.min_lr_frac,
            round(config.cooldown_frac * config.max_iters),
        )
        with torch.no_grad():
            for name, p in params.items():
                g = grads[name] * shrink
                first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
                second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
                if p.dim() == 2:
                    p -= lr * config.weight_decay * p
                p -= (
                    lr
                    * first[name]
                    / (1 - config.beta1 ** (step + 1))
                    / ((second[name] / (1 - config.beta2 ** (step + 1))).sqrt() + 1e-8)
                )
        table.append((step + 1, (step + 1) * data[:, 1:].numel(), lr, loss.item(), norm))
        trail[step + 1] = {name: p.detach().clone() for name, p in params.items()}
    return table, start, trail


RECIPES = {
    "plain": {},
    "clipped at times": {"grad_clip": 1.3, "lr": 2e-2},
    "never clipped": {"grad_clip": 0.0, "lr": 2e-2},
    "accumulated": {"gradient_accumulation_steps": 3, "batch_size": 2, "grad_clip": 0.5},
    "decayed": {"weight_decay": 3.0, "warmup_iters": 0},
    "wsd": {"schedule": "wsd", "cooldown_frac": 0.5, "min_lr_frac": 0.0},
    "constant": {"schedule": "constant", "beta1": 0.8, "beta2": 0.99},
}


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_the_textbook_loop(name, config, corpus, tmp_path):
    config = changed(config, max_iters=8, **RECIPES[name])
    table, start, trail = naive_training(config, open_corpus(corpus).train, 257)
    run = train(config, tmp_path / "run")
    assert (run / "metrics.csv").read_text().splitlines()[0] == "step,tokens,lr,loss,grad_norm"
    assert [tuple(row.values()) for row in rows(run)] == [
        pytest.approx(row, rel=2e-4) for row in table
    ]
    for step in config.checkpoint_steps:
        assert_near(weights(run, step), trail[step], start, 1e-4)


def test_recipes_differ(config, corpus):
    """What the test above tells apart: the recipes end far from one another, by more than its
    tolerance."""
    ends = {}
    for name, fields in RECIPES.items():
        _, start, trail = naive_training(
            changed(config, max_iters=8, **fields), open_corpus(corpus).train, 257
        )
        ends[name] = torch.cat(
            [(weight - start[key]).flatten() for key, weight in trail[8].items()]
        )
    for one, other in itertools.combinations(ends, 2):
        assert (ends[one] - ends[other]).norm() > 1e-2 * ends[one].norm(), (one, other)


def test_weight_decay_on_matrices_only(config, tmp_path):
    """After one step from the same weights: layer norms agree bit for bit, matrices differ by lr
    * decay * weight."""
    one = changed(config, max_iters=1, warmup_iters=0, ckpt_interval=1)
    without, decayed = (
        weights(train(changed(one, weight_decay=decay), tmp_path / str(decay)), 1)
        for decay in (0.0, 0.5)
    )
    start = GPT(model.gpt_config("nano", 257), one.seed).state_dict()
    assert {weight.dim() for weight in without.values()} == {1, 2}
    for name, weight in without.items():
        if weight.dim() == 1:
            assert torch.equal(decayed[name], weight), name
        else:
            torch.testing.assert_close(
                weight - decayed[name], one.lr * 0.5 * start[name], rtol=1e-3, atol=2e-7
            )


def test_accumulation_1x16_equals_4x4(config, corpus, tmp_path):
    splits = [
        changed(config, batch_size=size, gradient_accumulation_steps=16 // size, max_iters=6)
        for size in (16, 4)
    ]
    tokens = open_corpus(corpus).train
    assert all(
        np.array_equal(*(batch(tokens, split, step) for split in splits)) for step in range(6)
    )
    one, four = (train(split, tmp_path / str(split.batch_size)) for split in splits)
    assert column(one, "tokens") == column(four, "tokens")
    for name in ("loss", "grad_norm"):  # the norm too: AdamW forgives a loss that is not divided
        assert column(four, name) == pytest.approx(column(one, name), rel=1e-4)
    assert_near(
        weights(four, 6),
        weights(one, 6),
        GPT(model.gpt_config("nano", 257), config.seed).state_dict(),
        1e-2,
    )


def test_evaluation_does_not_change_training(config, run, tmp_path):
    for interval in (1, 5):
        other = train(config, tmp_path / str(interval), eval_interval=interval)
        assert (other / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
        assert checkpoints(other) == checkpoints(run)
        assert [row["step"] for row in rows(other, "val.csv")] == list(
            range(interval, 13, interval)
        )


def test_a_finished_run_needs_no_network(config, run, monkeypatch):
    monkeypatch.delattr(model, "GPT")
    assert train(config, run) == run
    with pytest.raises(LawaError, match="holds a run of another configuration"):
        train(changed(config, seed=config.seed + 1), run)


def test_lines_that_are_no_rows_are_dropped_from_a_table(tmp_path):
    """A crash of the machine may leave blank lines and zeros behind the last row."""
    table = tmp_path / "val.csv"
    table.write_text("step,loss\n1,5.0\n2,4.0\n3,3.0\n\n\0\0\n\0\0,4")
    model.start_table(table, "step,loss", 2)
    assert table.read_text() == "step,loss\n1,5.0\n2,4.0\n"


BESIDE = {
    "checkpoints": ({"ckpt_interval": 3}, {}),
    "averages": ({"averages": "ema(0.5)"}, {}),
    "resume states": ({}, {"state_seconds": 0}),
    "progress": ({}, {"bar": True}),
}


@pytest.mark.parametrize("fields, options", BESIDE.values(), ids=BESIDE)
def test_training_is_not_changed_by(fields, options, config, run, tmp_path):
    other = train(changed(config, **fields), tmp_path / "run", **options)
    assert (other / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert checkpoints(other)["ckpt_12.safetensors"] == checkpoints(run)["ckpt_12.safetensors"]


def test_training_is_deterministic_whatever_the_global_generators_say(config, run, tmp_path):
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same_run(train(config, tmp_path / "run"), run)


def test_training_learns(config, tmp_path):
    losses = column(
        train(changed(config, max_iters=60, ckpt_interval=60), tmp_path / "run"), "loss"
    )
    assert losses[0] == pytest.approx(math.log(320), abs=0.1)  # 257 tokens, padded to 320
    assert np.mean(losses[-5:]) < losses[0] - 1


def test_ema_trajectories(config, tmp_path):
    """Each beta leaves a trajectory of its own; it is the EMA of every step, also between
    checkpoints."""
    betas = ["0.5", "0.9"]
    every = train(changed(config, ckpt_interval=1), tmp_path / "every")
    run = train(
        changed(config, ckpt_interval=4, averages="; ".join(f"ema({beta})" for beta in betas)),
        tmp_path / "run",
    )
    steps = list(range(1, 13))
    states = {step: weights(every, step) for step in steps}
    for beta in betas:
        trajectory = open_trajectory(run / f"ema-{beta}")
        assert trajectory.steps == [4, 8, 12]
        for step in trajectory.steps:
            row = ref.ema_weights(steps, step, beta)
            want = ref.average([states[s] for s in sorted(row)], [row[s] for s in sorted(row)])
            for name, value in want.items():
                error = abs(ref.wide(trajectory[step][name]) - value).max()
                assert error <= 4 * torch.finfo(torch.float32).eps * abs(value).max(), name


@pytest.mark.parametrize("links", [True, False])
def test_a_run_that_begins_with_another_has_the_bits_it_has_alone(
    links, config, tmp_path, monkeypatch
):
    """Files and all; and the other one is left as it is alone, but for its states."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: os.stat("/no links here"))
    trunk = changed(config, averages="ema(0.9); lawa(2, 1)", schedule="constant")
    first = train(trunk, tmp_path / "trunk", state_at=[9, 10, 12])
    before = digest(first)
    branches = {
        9: changed(trunk, averages="", burst_at=9, burst_iters=2, burst_factor=3.0),
        10: changed(trunk, averages="ema(0.9)", schedule="wsd", cooldown_frac=0.25),
        12: changed(trunk, max_iters=16),
    }
    for step, branch in branches.items():
        state = first / f"state_{step}.pt"
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(
                model, "batch", lambda *args, cut=batch, s=seen: s.append(args[2]) or cut(*args)
            )
            folder = train(branch, tmp_path / f"from{step}", resume_from=state)
        assert seen == list(range(step, branch.max_iters))
        assert_same_run(folder, train(branch, tmp_path / f"alone{step}"))
    assert digest(first) == before
    for state in first.glob("state_*"):
        state.unlink()
    assert_same_run(first, train(trunk, tmp_path / "again"))


def test_a_run_that_has_begun_goes_on_from_its_own_state(
    config, run, tmp_path, nan_at, monkeypatch
):
    first = train(config, tmp_path / "first", state_at=[4])
    other = train(changed(config, lr=1e-2), tmp_path / "other", state_at=[4])
    folder = tmp_path / "run"
    nan_at(4)  # of those from step 5 on
    with pytest.raises(LawaError, match="step 8"):
        train(config, folder, state_seconds=0, resume_from=first / "state_4.pt")
    monkeypatch.undo()
    train(config, folder, resume_from=other / "state_4.pt")  # not taken: it has begun
    assert_same_run(folder, run)


def test_a_beginning_that_lacks_an_average_is_refused(config, tmp_path):
    first = train(config, tmp_path / "first", state_at=[4])
    with pytest.raises(LawaError, match="trained alike"):
        state = first / "state_4.pt"
        train(changed(config, averages="ema(0.9)"), tmp_path / "run", resume_from=state)


def test_a_run_whose_beginning_is_gone_begins_by_itself(config, run, tmp_path):
    assert_same_run(train(config, tmp_path / "run", resume_from=tmp_path / "state_4.pt"), run)


def test_run_folder(config, run):
    """What DESIGN.md lists, and no more: nothing half-written, no resume state once the run is
    finished."""
    assert listing(run) == sorted(
        [
            "config.json",
            "metrics.csv",
            "summary.json",
            *(f"ckpt_{step}.safetensors" for step in range(2, 13, 2)),
        ]
    )
    found = json.loads((run / "config.json").read_text())
    assert found.items() >= {**dataclasses.asdict(config), "dtype": "fp32"}.items()
    assert isinstance(json.loads((run / "summary.json").read_text()), dict)
    assert open_trajectory(run).steps == [2, 4, 6, 8, 10, 12]
    assert {tensor.dtype for tensor in weights(run, 12).values()} == {torch.float32}
    assert column(run, "step") == list(range(1, 13))
    assert column(run, "tokens") == [step * 4 * 64 for step in range(1, 13)]


def test_bf16_autocast(config, run, tmp_path):
    """Near the float32 run, and not the same; weights stay float32."""
    other = train(changed(config, dtype="bf16"), tmp_path / "run")
    assert column(other, "loss") == pytest.approx(column(run, "loss"), abs=0.05)
    assert column(other, "loss") != column(run, "loss")
    assert {tensor.dtype for tensor in weights(other, 12).values()} == {torch.float32}


# ---- batches -------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step(config):
    tokens = np.random.default_rng(0).integers(0, 257, 5000).astype(np.uint16)
    seen = {
        (seed, step): batch(tokens, changed(config, seed=seed), step)
        for seed in range(4)
        for step in range(10)
    }
    torch.manual_seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for (seed, step), want in reversed(seen.items()):
        other = changed(
            config,
            seed=seed,
            lr=1.0,
            max_iters=99,
            ckpt_interval=7,
            schedule="wsd",
            weight_decay=0.0,
        )
        assert np.array_equal(batch(tokens, other, step), want)
    assert (
        torch.equal(torch.get_rng_state(), state[0])
        and np.random.get_state()[1].tolist() == state[1]
    )
    assert len({found.tobytes() for found in seen.values()}) == len(seen)
    sequences = np.concatenate(list(seen.values()))
    assert sequences.shape == (40 * 4, 65)
    assert len(np.unique(sequences, axis=0)) > 140  # 160 draws from 4,935 places seldom meet


def test_batches_are_contiguous_and_reach_both_ends(config):
    """With 10 places to start at, each is drawn, and no other."""
    tokens = np.arange(64 + 10, dtype=np.uint16)
    drawn = np.concatenate([batch(tokens, config, step) for step in range(50)]).astype(int)
    assert np.array_equal(drawn - drawn[:, :1], np.broadcast_to(np.arange(65), drawn.shape))
    assert set(drawn[:, 0]) == set(range(10))


# ---- run folders and refusals --------------------------------------------------------------------

OTHER_TEXT = {
    "preset": "micro",
    "schedule": "wsd",
    "averages": "ema(0.9)",
    "dtype": "bf16",
}  # another legal value of each text field


def other_value(field, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.5 or 0.25 if isinstance(value, float) else OTHER_TEXT[field]


def test_same_config_same_folder(config, corpus, tmp_path):
    folder = run_dir(config, tmp_path)
    assert folder == run_dir(dataclasses.replace(config), tmp_path)
    assert folder.parent == tmp_path and folder.name.startswith("tiny-nano-")
    code = (
        "import sys, json, model; config = model.Config(**json.loads(sys.argv[1])); "
        "print(model.run_dir(config, sys.argv[2]))"
    )
    argv = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config)), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        argv, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    assert done.stdout.strip() == str(folder), done.stderr


def test_same_corpus_elsewhere_is_the_same_run(config, corpus, tmp_path):
    copied = shutil.copytree(corpus, tmp_path / "tiny")
    assert run_dir(changed(config, corpus=str(copied)), tmp_path) == run_dir(config, tmp_path)


def test_any_other_field_is_another_folder(config, tmp_path):
    fields = {
        name: other_value(name, value)
        for name, value in dataclasses.asdict(config).items()
        if name not in ("corpus", "init_from", "init_step")
    }
    fields["averages_interval"] = 2 * config.ckpt_interval
    folders = {
        name: run_dir(changed(config, **{name: value}), tmp_path) for name, value in fields.items()
    }
    assert len({run_dir(config, tmp_path), *folders.values()}) == len(folders) + 1


def test_a_start_from_weights_is_named_by_their_content(config, run, tmp_path):
    copied = shutil.copy(run / "ckpt_4.safetensors", tmp_path / "average.safetensors")
    starts = [
        changed(config, init_from=str(path), init_step=step)
        for path, step in (
            (run / "ckpt_4.safetensors", 4),
            (copied, 4),
            (run / "ckpt_4.safetensors", 5),
            (run / "ckpt_6.safetensors", 4),
        )
    ]
    folders = [run_dir(start, tmp_path) for start in starts]
    assert folders[0] == folders[1] and len({*folders, run_dir(config, tmp_path)}) == 4


def test_start_from_weights(config, run, tmp_path):
    """It begins with those weights, at that step of schedule and batches, with a fresh
    optimizer."""
    start = train(
        changed(config, init_from=str(run / "ckpt_4.safetensors"), init_step=4, max_iters=6),
        tmp_path / "start",
    )
    assert [row["step"] for row in rows(start)] == [5, 6]
    assert rows(start)[0]["loss"] == rows(run)[4]["loss"] and rows(start)[0]["lr"] != 0
    assert sorted(path.name for path in start.glob("ckpt_*")) == ["ckpt_6.safetensors"]


def test_burst(config, run, tmp_path):
    """Only the rate of the burst's steps differs; before it, so do no bits."""
    burst = changed(config, burst_at=6, burst_iters=2, burst_factor=10.0)
    ratios = [
        learning_rate(burst, step) / learning_rate(config, step) for step in range(config.max_iters)
    ]
    assert ratios == pytest.approx([10 if 6 <= step < 8 else 1 for step in range(config.max_iters)])
    folder = train(burst, tmp_path / "burst")
    assert checkpoints(folder)["ckpt_6.safetensors"] == checkpoints(run)["ckpt_6.safetensors"]
    assert checkpoints(folder)["ckpt_8.safetensors"] != checkpoints(run)["ckpt_8.safetensors"]


def test_held_rate(config):
    """Cosine until the share hold_frac of the steps, then the rate it had there: what SWA asks
    for."""
    held = changed(config, hold_frac=0.75)
    assert [learning_rate(held, step) for step in range(9)] == [
        learning_rate(config, step) for step in range(9)
    ]
    assert {learning_rate(held, step) for step in range(9, 12)} == {learning_rate(config, 9)}


def test_online_averages_are_trajectories(config, run, tmp_path):
    """Each average kept while training equals the offline scheme over checkpoints of every step."""
    texts = {
        "ema(0.5)": "ema-0.5",
        "swa(start=4, every=2)": "swa-start=4-every=2",
        "lawa(3, 1)": "lawa-3-1",
    }
    folder = train(changed(config, ckpt_interval=1, averages="; ".join(texts)), tmp_path / "run")
    assert checkpoints(folder)["ckpt_12.safetensors"] == checkpoints(run)["ckpt_12.safetensors"]
    for text, name in texts.items():
        offline = model.lawa_core.average(folder, model.lawa_core.parse_scheme(text), 12)
        online = weights(folder / name, 12)
        for tensor in offline:
            torch.testing.assert_close(online[tensor], offline[tensor], rtol=1e-5, atol=1e-7)
    assert not (folder / "swa-start=4-every=2" / "ckpt_3.safetensors").exists()
    rows = evaluate_trajectory(
        folder, {"kept": "lawa(3, 1)", "after": lawa(3, 1)}, [12], n_blocks=4
    )
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], abs=1e-6)


@pytest.mark.parametrize("budget, kept", [(math.inf, 6), (4, 4), (2, 2), (1, 1)])
def test_disk_budget(budget, kept, config, tmp_path):
    """Checkpoints are thinned out evenly; the last is always there."""
    size = model.disk_bytes(config, 257, [2])
    steps = model.kept_steps(config, 257, None, budget * size)
    assert len(steps) <= kept and 12 in steps and steps <= set(config.checkpoint_steps)
    folder = train(config, tmp_path / "run", disk_budget=budget * size)
    assert {int(path.stem[5:]) for path in folder.glob("ckpt_*")} == steps


def test_disk_budget_keeps_whole_windows(config):
    size = model.disk_bytes(config, 257, [2])
    steps = model.kept_steps(config, 257, lawa(2, 2), 4 * size)
    assert steps >= {10, 12} and len(steps) <= 4
    with pytest.raises(LawaError, match="2 checkpoints"):
        model.kept_steps(config, 257, lawa(2, 2), size)


# ---- averages whose files are further apart ------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(config):
    """Checkpoints every 2 steps, files of two averages every 4."""
    return changed(config, averages="ema(0.5); lawa(2, 1)", averages_interval=4)


@pytest.fixture(scope="module")
def sparse_run(sparse, tmp_path_factory):
    return train(sparse, tmp_path_factory.mktemp("runs") / "sparse", state_at=[6])


def test_files_of_averages_only_at_their_interval(sparse, sparse_run, config, tmp_path):
    """The same averages and the same run as with a file at every checkpoint, but fewer files."""
    every = train(changed(sparse, averages_interval=0), tmp_path / "every")
    want = checkpoints(every)
    for path in [*want]:
        if "/" in path and int(Path(path).stem.removeprefix("ckpt_")) % 4:
            del want[path]
    assert checkpoints(sparse_run) == want
    assert open_trajectory(sparse_run).steps == [2, 4, 6, 8, 10, 12]
    for name in ("ema-0.5", "lawa-2-1"):
        assert open_trajectory(sparse_run / name).steps == [4, 8, 12]
    assert column(sparse_run, "loss") == column(every, "loss")


def test_an_average_is_evaluated_where_it_has_a_file(sparse_run, tmp_path):
    copy = shutil.copytree(sparse_run, tmp_path / "copy")
    found = evaluate_trajectory(copy, {"kept": "lawa(2, 1)"}, [4, 12], n_blocks=4)
    assert [row["step"] for row in found] == [4, 4, 12, 12]
    with pytest.raises(LawaError, match="ckpt_6"):
        evaluate_trajectory(copy, {"kept": "lawa(2, 1)"}, [6], n_blocks=4)


def on_disk(run):
    """Bytes of all checkpoints, but for their headers."""
    total = 0
    for path in run.rglob("*.safetensors"):
        tensors = ref.read_safetensors(path)[0].values()
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"averages": "ema(0.5)"},
        {"averages": "ema(0.5); lawa(2, 1)", "averages_interval": 4},
        {"averages": "ema(0.5)", "averages_interval": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [math.inf, 2_000_000])
def test_disk_bytes_are_what_is_on_disk(fields, limit, config, tmp_path):
    """Checkpoints and averages, whole and within a budget: the bytes of all weights."""
    config = changed(config, **fields)
    steps = model.kept_steps(config, 257, None, limit)
    run = train(config, tmp_path / "run", disk_budget=limit)
    predicted = model.disk_bytes(config, 257, steps)
    assert predicted == on_disk(run) <= limit
    files = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    assert predicted < files < 1.02 * predicted  # a header names a few dozen tensors


def test_a_budget_counts_averages_only_where_they_are_kept(sparse):
    """Four checkpoints fit with one file of each average, three with two."""
    one = model.disk_bytes(sparse, 257, [2])
    assert model.disk_bytes(sparse, 257, [4]) == 3 * one
    assert model.disk_bytes(sparse, 257, []) == 0
    assert model.disk_bytes(sparse, 257, sparse.checkpoint_steps) == (6 + 2 * 3) * one
    whole = model.kept_steps(sparse, 257, None, 12 * one)
    assert whole == {2, 4, 6, 8, 10, 12}
    assert model.kept_steps(sparse, 257, None, 11 * one) < whole


@pytest.mark.parametrize("interval", [3, 1, 5, -2, 7])
def test_an_interval_between_checkpoints_is_refused(interval, config):
    with pytest.raises(LawaError, match=rf"averages_interval.*ckpt_interval = 2, got {interval}"):
        changed(config, averages="ema(0.5)", averages_interval=interval)


def test_a_run_with_sparse_averages_goes_on(sparse, sparse_run, tmp_path, nan_at, monkeypatch):
    """Stopped between two files of the averages, it ends as in one go."""
    folder = tmp_path / "run"
    nan_at(8)
    with pytest.raises(LawaError, match="step 8"):
        train(sparse, folder, state_seconds=0, state_at=[6])
    monkeypatch.undo()
    assert not (folder / "ema-0.5" / "ckpt_8.safetensors").exists()
    assert_same_run(train(sparse, folder, state_at=[6]), sparse_run)


def test_a_run_with_sparse_averages_begins_with_another(sparse, sparse_run, tmp_path):
    """From the state of step 6, at which the averages have no file."""
    folder = train(sparse, tmp_path / "run", resume_from=sparse_run / "state_6.pt", state_at=[6])
    assert not (folder / "state_6.pt").exists()  # step 6 is behind it
    shutil.copy(sparse_run / "state_6.pt", folder)
    assert_same_run(folder, sparse_run)


LOSES_A_RANK = """
import os, signal, sys
import model
attempt, batch = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), model.batch

def batch_or_die(tokens, config, step, rank=0, world=1):
    print(f"attempt {attempt} at step {step}", flush=True)
    if (attempt, rank, step) == (0, 1, 7):
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(tokens, config, step, rank, world)
model.batch = batch_or_die
sys.exit(model.main(sys.argv[1:]))
"""


def torchrun(script, config, folder, *options, **environment):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", *options, str(script), "train"]
    return subprocess.run(
        [sys.executable, *launch, *map(str, flags(config, folder, state_seconds=0))],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_ranks_are_one_run(config, tmp_path):
    """torchrun with two processes: the same batches, losses and weights within fp32 noise; and
    the same bits when it is run again, or when a rank is lost on the way."""
    one, two, again, lost = (
        train(config, tmp_path / "one"),
        *(tmp_path / name for name in ("two", "again", "lost")),
    )
    for folder in (two, again):
        done = torchrun(ROOT / "model.py", config, folder, "--standalone")
        assert done.returncode == 0, done.stderr[-2000:]
    assert column(two, "loss") == pytest.approx(column(one, "loss"), abs=2e-5)
    assert_near(
        weights(two, 12),
        weights(one, 12),
        ref.read_safetensors(one / "ckpt_2.safetensors")[0],
        2e-3,
    )
    assert_same_run(again, two)
    (script := tmp_path / "loses_a_rank.py").write_text(LOSES_A_RANK)
    done = torchrun(
        script,
        config,
        lost,
        "--standalone",
        "--max_restarts=1",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )  # as documented
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    # it went on from its last state
    assert "attempt 1 at step 6" in said and "attempt 1 at step 5" not in said
    assert_same_run(lost, two)


def test_two_ranks_accumulate(config, tmp_path):
    """Two micro-batches a rank, whose gradients travel once, are the same run within fp32 noise."""
    one, two = train(config, tmp_path / "one"), tmp_path / "two"
    done = torchrun(
        ROOT / "model.py",
        changed(config, batch_size=1, gradient_accumulation_steps=4),
        two,
        "--standalone",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert column(two, "loss") == pytest.approx(column(one, "loss"), abs=2e-5)
    assert_near(
        weights(two, 12),
        weights(one, 12),
        ref.read_safetensors(one / "ckpt_2.safetensors")[0],
        2e-3,
    )


def test_a_restart_that_would_hang_is_refused(config, tmp_path):
    """torchrun's default keeps the addresses of the lost attempt."""
    (script := tmp_path / "loses_a_rank.py").write_text(LOSES_A_RANK)
    done = torchrun(script, config, tmp_path / "lost", "--standalone", "--max_restarts=1")
    assert done.returncode != 0 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
    assert (tmp_path / "lost/resume.pt").exists()


@pytest.mark.parametrize("fields", [{}, {"batch_size": 1, "gradient_accumulation_steps": 2}])
def test_batches_too_few_for_the_ranks(fields, config, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LawaError, match="3 equal ranks"):
        train(changed(config, **fields), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "meta", [{"manifest_sha256": "0" * 64}, {"vocab_size": 300}, {"val_fraction": 0.2}, {"seed": 5}]
)
def test_another_corpus_is_another_folder(meta, config, tmp_path):
    other = write_corpus(tmp_path / "tiny", **meta)
    assert run_dir(changed(config, corpus=str(other)), tmp_path) != run_dir(config, tmp_path)


def test_a_finished_run_is_not_trained_again(config, run, command):
    before = digest(run)
    assert train(config, run) == run
    assert train(config, run, eval_interval=1, state_seconds=0) == run
    status, out, _ = command("train", *flags(config, run))
    assert (status, out.strip().splitlines()[-1]) == (0, str(run))
    assert digest(run) == before


def test_a_folder_of_another_run_is_refused(config, run, command):
    before = digest(run)
    other = changed(config, lr=4e-3, batch_size=8)
    with pytest.raises(LawaError, match=r"lr .*0\.003.*0\.004") as caught:
        train(other, run)
    assert "batch_size" in str(caught.value) and str(run) in str(caught.value)
    assert not any(name in str(caught.value) for name in ("warmup_iters", "schedule", "beta1"))
    status, _, err = command("train", *flags(other, run))
    assert status == 2 and len(err.splitlines()) == 1 and "batch_size" in err
    assert digest(run) == before


def test_a_folder_of_another_text_is_refused(config, tmp_path):
    """A run named by hand whose corpus was prepared anew from another text would mix two
    trainings."""
    corpus = write_corpus(tmp_path / "mine")
    config = changed(config, corpus=str(corpus))
    run = train(config, tmp_path / "run")
    before = digest(run)
    shutil.rmtree(corpus)
    write_corpus(corpus, seed=1)
    with pytest.raises(LawaError, match="corpus"):
        train(config, run)
    assert digest(run) == before


@pytest.fixture
def nan_at(monkeypatch):
    """nan_at(n): the n-th training loss from now on is not a number."""

    def arrange(n):
        forward, calls = GPT.forward, iter(range(1, 10_000))

        def broken(self, *args, **options):
            logits, loss = forward(self, *args, **options)
            return logits, loss * math.nan if loss is not None and next(calls) >= n else loss

        monkeypatch.setattr(GPT, "forward", broken)

    return arrange


def test_nan_loss_keeps_the_last_good_state(config, run, nan_at, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    nan_at(8)
    with pytest.raises(LawaError, match="step 8") as caught:
        train(config, folder)
    assert (
        "nan" in str(caught.value) and "lr" in str(caught.value) and "\n" not in str(caught.value)
    )
    good = [f"ckpt_{step}.safetensors" for step in (2, 4, 6)]
    assert checkpoints(folder) == {
        name: bits for name, bits in checkpoints(run).items() if name in good
    }
    assert not (folder / "summary.json").exists()
    assert all(math.isfinite(loss) for loss in column(folder, "loss"))
    monkeypatch.undo()
    assert_same_run(train(config, folder), run)


def test_nan_loss_on_the_command_line(config, command, tmp_path):
    status, _, err = command(
        "train", *flags(changed(config, lr=1e30, warmup_iters=0), tmp_path / "run")
    )
    assert status == 1
    assert (
        len(err.strip().splitlines()) == 1
        and err.startswith("error: ")
        and "1e+30" in err.replace("1.00e", "1e")
    )
    assert not (tmp_path / "run" / "summary.json").exists()


BAD = {  # flags that replace good ones, and words of the one line that answers
    "no such corpus": ({"corpus": "nowhere"}, "no corpus 'nowhere' prepare.py"),
    "unknown preset": ({"preset": "colossal"}, "preset nano 'colossal'"),
    "unknown scale": ({"scale": "huge"}, "scale smoke laptop 'huge'"),
    "unknown schedule": ({"schedule": "linear"}, "schedule cosine 'linear'"),
    "unknown dtype": ({"dtype": "fp8"}, "dtype bf16 'fp8'"),
    "no rate": ({"lr": 0}, "lr above 0 got 0.0"),
    "negative rate": ({"lr": -1}, "lr above 0 got -1.0"),
    "infinite rate": ({"lr": "inf"}, "lr inf"),
    "rate is no number": ({"lr": "nan"}, "lr nan"),
    "no steps": ({"max_iters": 0}, "max_iters 0"),
    "no sequences": ({"batch_size": 0}, "batch_size 0"),
    "no micro-batches": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0"),
    "warm-up too long": ({"warmup_iters": 13}, "warmup_iters 12 13"),
    "negative warm-up": ({"warmup_iters": -1}, "warmup_iters -1"),
    "no checkpoint": ({"ckpt_interval": 13}, "ckpt_interval 12 13"),
    "interval 0": ({"ckpt_interval": 0}, "ckpt_interval 0"),
    "final rate above peak": ({"min_lr_frac": 1.5}, "min_lr_frac 1.5"),
    "no cooldown": ({"schedule": "wsd", "cooldown_frac": 0}, "cooldown_frac 0"),
    "negative decay": ({"weight_decay": -0.1}, "weight_decay -0.1"),
    "beta1 of 1": ({"beta1": 1}, "beta1 1"),
    "negative beta2": ({"beta2": -0.5}, "beta2 -0.5"),
    "negative clipping": ({"grad_clip": -1}, "grad_clip -1"),
    "negative seed": ({"seed": -1}, "seed -1"),
    "ema beta of 1": ({"averages": "ema(1)"}, "beta 1"),
    "no such average": ({"averages": "ema(0.9); fast"}, "fast"),
    "an average that only looks back": ({"averages": "decay(100)"}, "averages decay"),
    "average twice": ({"averages": "ema(0.9); ema(0.9)"}, "averages ema(0.9)"),
    "averages off the grid": ({"averages_interval": 3}, "averages_interval ckpt_interval 2 3"),
    "negative interval": ({"averages_interval": -2}, "averages_interval -2"),
    "burst backwards": ({"burst_iters": -1}, "burst_iters -1"),
    "burst of no rate": ({"burst_factor": 0}, "burst_factor 0"),
    "start without weights": ({"init_step": 3}, "init_step init_from"),
    "no threads": ({"threads": 0}, "threads 0"),
    "evaluation interval": ({"eval_interval": -1}, "eval_interval -1"),
    "two at once": ({"lr": -1, "batch_size": 0}, "lr batch_size"),
    "not a flag": ({"learning_rate": 1}, "--learning_rate"),
    "not an integer": ({"max_iters": "many"}, "--max_iters 'many'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, config, command, tmp_path):
    wrong, words = BAD[case]
    status, out, err = command("train", *flags(config, tmp_path / "run", **wrong))
    message = err.strip().splitlines()
    assert (status, out) == (2, "")
    if "usage:" not in err:  # argparse prints its usage first
        assert len(message) == 1 and err.startswith("error: ")
    assert (
        "Traceback" not in err and [word for word in words.split() if word not in message[-1]] == []
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, words", [(("sample", "nowhere"), "nowhere"), (("dance",), "dance"), ((), "command")]
)
def test_other_commands_refuse(argv, words, command, tmp_path):
    status, out, err = command(*argv)
    assert (status, out) == (2, "")
    assert "Traceback" not in err and all(
        word in err.strip().splitlines()[-1] for word in words.split()
    )


def test_config_is_frozen_and_knows_its_fields(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    with pytest.raises(TypeError):
        Config(learning_rate=1.0)


# ---- corpora -------------------------------------------------------------------------------------


def test_open_corpus(corpus):
    found = open_corpus(corpus)
    for side, length in (("train", 20_000), ("val", 3000)):
        assert np.array_equal(getattr(found, side), np.fromfile(corpus / f"{side}.bin", "<u2"))
        assert len(getattr(found, side)) == length
    assert (found.name, found.vocab_size, found.val_bytes_per_token) == (
        "tiny",
        257,
        BYTES_PER_TOKEN,
    )
    text = "def f(x):\n    return 'å'"
    assert found.tokenizer().encode_ordinary(text) == list(text.encode())


def damage(corpus, kind):
    files = {side: corpus / f"{side}.bin" for side in ("train", "val")}
    tokens = {side: np.fromfile(path, "<u2") for side, path in files.items()}
    if kind == "fewer tokens":
        tokens["train"][:-10].tofile(files["train"])
    elif kind == "more tokens":
        np.append(tokens["val"], tokens["val"][:5]).tofile(files["val"])
    elif kind == "half a token":
        files["train"].write_bytes(files["train"].read_bytes() + b"x")
    elif kind == "no file":
        files["val"].unlink()
    elif kind == "empty file":
        files["train"].write_bytes(b"")
    elif kind == "broken meta.json":
        (corpus / "meta.json").write_text('{"name": "tiny", ')
    else:
        (corpus / "meta.json").write_text('{"name": "tiny"}')


DAMAGES = [
    "fewer tokens",
    "more tokens",
    "half a token",
    "no file",
    "empty file",
    "broken meta.json",
    "keys missing",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_corpus_is_refused(kind, config, command, tmp_path):
    corpus = write_corpus(tmp_path / "tiny")
    damage(corpus, kind)
    with pytest.raises(LawaError, match=r"bin|meta\.json") as caught:
        open_corpus(corpus)
    assert str(corpus) in str(caught.value)
    status, _, err = command("train", *flags(changed(config, corpus=str(corpus)), tmp_path / "run"))
    assert status == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "token", [65_535, 300]
)  # 300: beyond the vocabulary of 257, within its padding to 320
def test_token_ids_beyond_the_vocabulary_are_refused(token, config, command, tmp_path):
    corpus = write_corpus(tmp_path / "tiny")
    np.full(20_000, token, "<u2").tofile(corpus / "train.bin")
    status, _, err = command("train", *flags(changed(config, corpus=str(corpus)), tmp_path / "run"))
    assert status in (1, 2) and err.startswith("error: ") and len(err.splitlines()) == 1
    assert "257" in err and str(token) in err


@pytest.mark.parametrize(
    "sizes, words", [({"train_tokens": 64}, "64 training"), ({"val_tokens": 64}, "64 validation")]
)
def test_a_corpus_shorter_than_a_block_is_refused(sizes, words, config, tmp_path):
    corpus = write_corpus(tmp_path / "tiny", **sizes)
    with pytest.raises(LawaError, match=words):
        train(changed(config, corpus=str(corpus)), tmp_path / "run", eval_interval=2)
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ---- evaluation ----------------------------------------------------------------------------------


class Recorder(GPT):
    """A GPT that remembers what it was asked."""

    def losses(self, idx, targets, **options):
        self.seen = [*getattr(self, "seen", []), (idx.clone(), targets.clone())]
        return super().losses(idx, targets, **options)


def blocks_of(corpus, n_blocks, seed=0):
    """The blocks that `evaluate` shows a model: (n_blocks, block_size + 1), and its losses."""
    net = Recorder(model.gpt_config("nano", 257), seed)
    losses = evaluate(net, corpus, n_blocks)
    idx, targets = (torch.cat(parts) for parts in zip(*net.seen, strict=True))
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    return torch.cat([idx, targets[:, -1:]], 1), losses


def naive_losses(state, blocks):
    """Nats per token of each block, one block at a time, log-softmax in double."""
    net = GPT(model.gpt_config("nano", 257))
    net.load_state_dict(state)
    out = []
    with torch.no_grad():
        for tokens in blocks:
            logits = net(tokens[None, :-1])[0][0].double().numpy()
            chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            out.append(-np.mean([chances[i, token] for i, token in enumerate(tokens[1:].tolist())]))
    return np.array(out)


@pytest.mark.parametrize("n_blocks", [1, 7, 46])  # 3000 tokens hold 46 blocks of 64 and a token
def test_evaluate_is_the_naive_loop(n_blocks, corpus):
    corpus = open_corpus(corpus)
    blocks, losses = blocks_of(corpus, n_blocks)
    assert (losses.shape, losses.dtype, blocks.shape) == ((n_blocks,), np.float64, (n_blocks, 65))
    assert losses == pytest.approx(
        naive_losses(GPT(model.gpt_config("nano", 257), 0).state_dict(), blocks), abs=2e-6
    )


def test_blocks_are_contiguous_spread_and_the_same_for_all_models(tmp_path):
    corpus = open_corpus(write_corpus(tmp_path / "tiny", vocab_size=320))
    np.random.default_rng(3).integers(0, 320, 3000).astype("<u2").tofile(corpus.folder / "val.bin")
    corpus = open_corpus(corpus.folder)
    blocks, _ = blocks_of(corpus, 20)
    windows = {corpus.val[i : i + 65].tobytes(): i for i in range(3000 - 64)}
    starts = [windows[block.numpy().astype("<u2").tobytes()] for block in blocks]
    gaps = np.diff(starts)
    assert gaps.min() >= 64 and gaps.max() - gaps.min() <= 1  # apart, and evenly
    assert starts[0] < 150 and starts[-1] > 3000 - 65 - 150
    assert torch.equal(blocks_of(corpus, 20, seed=1)[0], blocks)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_everything_as_it_was(training, corpus):
    net, corpus = GPT(model.gpt_config("nano", 257)).train(training), open_corpus(corpus)
    before, generators = (
        ref.state_bits(net.state_dict()),
        (torch.get_rng_state(), str(np.random.get_state())),
    )
    evaluate(net, corpus, 5)
    assert {module.training for module in net.modules()} == {training}
    assert ref.state_bits(net.state_dict()) == before
    assert (
        torch.equal(torch.get_rng_state(), generators[0])
        and str(np.random.get_state()) == generators[1]
    )
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


OPENED = []  # every file this process opens, while a test listens
LISTENING = [False]
sys.addaudithook(
    lambda event, args: LISTENING[0] and event == "open" and OPENED.append(str(args[0]))
)


def opened_by(work):
    """(result, names of the checkpoints that were opened)"""
    OPENED.clear()
    LISTENING[0] = True
    try:
        return work(), {Path(path).name for path in OPENED if "ckpt_" in path}
    finally:
        LISTENING[0] = False


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


SCHEMES = {  # label: scheme, its naive weights over steps 2, 4, ... 12
    "LAWA": (lawa(3, 2), lambda steps, at: ref.lawa_weights(steps, at, 3, 2)),
    "an EMA": (ema(0.6), lambda steps, at: ref.ema_weights(steps, at, 0.6)),
}


def plain(table):
    """Rows whose arrays are lists, to be compared by ==."""
    return [
        {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in row.items()}
        for row in table
    ]


def assert_rows(got, want):
    """The same rows in the same order, their numbers but for rounding."""
    names = ("run", "step", "scheme", "n_blocks")
    got, want = plain(got), plain(want)
    assert [tuple(row[name] for name in names) for row in got] == [
        tuple(row[name] for name in names) for row in want
    ]
    for found, row in zip(got, want, strict=True):
        assert set(found) == set(row)
        for name in set(row) - set(names):
            assert found[name] == pytest.approx(row[name], rel=1e-4, abs=2e-6), name


def test_evaluate_trajectory_is_the_naive_computation(copied, corpus):
    """Run minus average on the same blocks; standard errors over blocks; bits per byte."""
    blocks, _ = blocks_of(open_corpus(corpus), 20)
    states = {step: weights(copied, step) for step in range(2, 13, 2)}
    want = []
    for step in (2, 8, 12):
        own = naive_losses(states[step], blocks)
        for label, naive in {
            "run": lambda steps, at: {at: 1},
            **{label: naive for label, (_, naive) in SCHEMES.items()},
        }.items():
            row = naive(list(states), step)
            mean = ref.average([states[s] for s in sorted(row)], [row[s] for s in sorted(row)])
            losses = naive_losses(
                {name: torch.from_numpy(value.astype(np.float32)) for name, value in mean.items()},
                blocks,
            )
            want.append(
                {
                    "run": copied.name,
                    "step": step,
                    "scheme": label,
                    "n_blocks": 20,
                    "bpb": losses.mean() / math.log(2) / BYTES_PER_TOKEN,
                    "loss": losses.mean(),
                    "loss_se": losses.std(ddof=1) / math.sqrt(20),
                    "gain": (own - losses).mean(),
                    "gain_se": (own - losses).std(ddof=1) / math.sqrt(20),
                    "losses": losses,
                    "gains": own - losses,
                }
            )
    got = evaluate_trajectory(
        copied, {label: scheme for label, (scheme, _) in SCHEMES.items()}, (2, 8, 12), 20
    )
    assert_rows(got, want)
    gains = [row["gain"] for row in want if row["step"] == 12 and row["scheme"] != "run"]
    assert min(map(abs, gains)) > 1e-4  # large enough to tell the sign


def test_losses_of_blocks_agree_with_their_row(copied):
    """Block by block, in double; a row's mean and standard error are theirs."""
    schemes = {label: scheme for label, (scheme, _) in SCHEMES.items()}
    own = {}
    for row in evaluate_trajectory(copied, schemes, (4, 12), 10):
        losses, gains = row["losses"], row["gains"]
        assert losses.shape == gains.shape == (10,)
        assert losses.dtype == gains.dtype == np.float64
        for name, values in (("loss", losses), ("gain", gains)):
            assert row[name] == pytest.approx(values.mean(), rel=1e-12, abs=1e-15)
            assert row[f"{name}_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(10))
        if row["scheme"] == "run":
            own[row["step"]] = losses
            assert not gains.any()
        assert np.array_equal(gains, own[row["step"]] - losses)


def test_an_average_kept_while_training_is_not_taken_for_one_of_checkpoints(config, tmp_path):
    """Both are called ema(0.5), but one is of every step: each has its own losses."""
    run = train(changed(config, averages="ema(0.5)"), tmp_path / "run")
    asked = {"kept": "ema(0.5)", "after": ema(0.5)}
    for _ in range(2):  # the second time from the file
        _, kept, after = evaluate_trajectory(run, asked, [12], 4)
        assert abs(kept["loss"] - after["loss"]) > 1e-6
        (_, alone) = evaluate_trajectory(run, {"after": ema(0.5)}, [12], 4)
        assert alone["loss"] == after["loss"]


EVALUATES = """
import sys
import model, lawa_core
schemes = {text: lawa_core.parse_scheme(text) for text in sys.argv[2:]}
print("ready", flush=True)
sys.stdin.readline()
model.evaluate_trajectory(sys.argv[1], schemes, n_blocks=4)
"""


def test_two_processes_evaluate_at_once(copied):
    """Each keeps its rows after every step, and none of the other's are lost."""
    texts = [["lawa(2, 2)", "lawa(3, 2)"], ["ema(0.5)", "ema(0.9)"]]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([sys.executable, "-c", EVALUATES, copied, *own], env=environment, **pipes)
        for own in texts
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=300)
        assert process.returncode == 0
    named = ["newest()", *(str(parse_scheme(text)) for text in (*texts[0], *texts[1]))]
    expected = set(itertools.product(range(2, 13, 2), named))
    found = model.read_losses(copied / "eval_4.npz")
    assert set(found) == expected
    assert {values.shape for values in found.values()} == {(4,)}


def test_losses_kept_by_many_at_once(tmp_path):
    path = tmp_path / "run" / "eval_3.npz"
    with ThreadPoolExecutor(4) as pool:
        for i in range(40):
            values = np.full(3, i / 7)
            pool.submit(model.keep_losses, path, {(i, f"lawa({i % 3})"): values})
    found = model.read_losses(path)
    assert {key: values.tolist() for key, values in found.items()} == {
        (i, f"lawa({i % 3})"): [i / 7] * 3 for i in range(40)
    }
    assert listing(path.parent) == ["eval_3.npz"]  # nothing half-written stays
    model.keep_losses(path, {(0, "lawa(0)"): np.ones(3)})  # the newer one counts
    assert model.read_losses(path)[0, "lawa(0)"].tolist() == [1, 1, 1]
    assert model.read_losses(None) == {} == model.read_losses(tmp_path / "none.npz")


def test_evaluations_are_cached(copied):
    def ask(label="LAWA", scheme=SCHEMES["LAWA"][0], at=(4, 12), n_blocks=10):
        return opened_by(lambda: plain(evaluate_trajectory(copied, {label: scheme}, at, n_blocks)))

    first, opened = ask()
    assert opened == {
        "ckpt_2.safetensors",
        "ckpt_4.safetensors",
        "ckpt_8.safetensors",
        "ckpt_10.safetensors",
        "ckpt_12.safetensors",
    }
    assert (copied / "eval_10.npz").exists()
    again, opened = ask()
    assert (again, opened) == (first, set())
    renamed, opened = ask(label="another name")
    assert opened == set()
    assert [row | {"scheme": "LAWA"} if row["scheme"] != "run" else row for row in renamed] == first
    for change in ({"scheme": lawa(2, 2)}, {"n_blocks": 11}, {"at": (4, 10, 12)}):
        other, opened = ask(**change)
        assert opened and other != first, change
        assert ask(**change) == (other, set())
    assert ask() == (first, set())
    assert sorted(path.name for path in copied.glob("eval*")) == ["eval_10.npz", "eval_11.npz"]


def test_evaluation_is_the_same_in_one_go_or_piece_by_piece(copied, run, tmp_path):
    schemes = {label: scheme for label, (scheme, _) in SCHEMES.items()}
    whole = evaluate_trajectory(copied, schemes, None, 10)
    other = shutil.copytree(run, tmp_path / "other" / "copy")
    for label in schemes:
        for step in (12, 6):
            evaluate_trajectory(other, {label: schemes[label]}, (step,), 10)
    assert_rows(evaluate_trajectory(other, schemes, None, 10), whole)
    assert sorted({row["step"] for row in whole}) == [2, 4, 6, 8, 10, 12]
    assert_rows(
        evaluate_trajectory(other, {}, None, 10), [row for row in whole if row["scheme"] == "run"]
    )


def test_a_trajectory_of_another_model(copied, corpus, tmp_path):
    """With a model, a way to load it and a cache: the rows of a run, from files of other names."""
    want = evaluate_trajectory(copied, {"LAWA": lawa(2, 2)}, None, 10)
    (theirs := tmp_path / "theirs").mkdir()
    for path in copied.glob("ckpt_*"):
        state = ref.read_safetensors(path)[0]
        ref.write_safetensors(theirs / path.name, {f"x.{name}": t for name, t in state.items()})
    seen = []

    def load(net, state):
        net.load_state_dict({name.removeprefix("x."): tensor for name, tensor in state.items()})

    def each(step, label, state):
        assert all(name.startswith("x.") for name in state)
        if step == stop_at:
            raise KeyboardInterrupt
        seen.append((step, label))

    def ask(cache):
        return evaluate_trajectory(
            theirs,
            {"LAWA": lawa(2, 2)},
            n_blocks=10,
            make=lambda: model.empty_model(model.gpt_config("nano", 257)),
            corpus=open_corpus(corpus),
            load=load,
            each=each,
            on_disk=True,
            cache=cache,
        )

    stop_at = 8
    cache = tmp_path / "elsewhere" / "theirs.npz"
    with pytest.raises(KeyboardInterrupt):
        ask(cache)
    assert len(model.read_losses(cache)) >= 4  # of whole steps
    before = list(seen)
    stop_at = None
    got = plain(ask(cache))
    assert [row | {"run": copied.name} for row in got] == plain(want)
    assert (2, "run") in before and (2, "run") not in seen[len(before) :]  # not evaluated again
    assert plain(ask(None)) == got and list(theirs.glob("eval*")) == []


def test_a_trajectory_that_is_none_is_refused(tmp_path, copied):
    with pytest.raises(LawaError, match="nowhere"):
        evaluate_trajectory(tmp_path / "nowhere", {})
    with pytest.raises(LawaError, match="5"):
        evaluate_trajectory(copied, {}, (5,))
    assert list(copied.glob("eval*")) == []


# ---- the GPT -------------------------------------------------------------------------------------

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 97}
IDX = torch.from_numpy(np.random.default_rng(1).integers(0, 97, (2, 24)))


def hf_gpt2(**changes):
    """transformers' GPT-2 with every weight and bias random, large enough that each matters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(
        GPT2Config(**TINY | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return net


def logits(net, idx=IDX):
    with torch.no_grad():
        found = net(idx)
    return found[0] if isinstance(found, tuple) else found.logits


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("scaled", [True, False])
def test_loads_what_transformers_saves(scaled, activation, tmp_path):
    from lab.hf import load_hf

    theirs = hf_gpt2(scale_attn_by_inverse_layer_idx=scaled, activation_function=activation)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    assert (
        ours.config.n_layer,
        ours.config.block_size,
        ours.config.vocab_size,
        ours.config.bias,
    ) == (3, 24, 97, True)
    assert ours.config.scale_attn_by_inverse_layer_idx is scaled
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)
    other = hf_gpt2(scale_attn_by_inverse_layer_idx=not scaled, activation_function=activation)
    assert (logits(other) - logits(theirs)).abs().max() > 0.01  # the settings matter


@pytest.mark.parametrize("gelu", ["tanh", "none"])
@pytest.mark.parametrize("scaled, bias", [(True, False), (False, True), (True, True)])
def test_transformers_loads_what_save_hf_writes(scaled, bias, gelu, tmp_path):
    from transformers import AutoModelForCausalLM

    from lab.hf import load_hf, save_hf

    config = GPTConfig(
        3, 4, 32, 24, 97, bias=bias, scale_attn_by_inverse_layer_idx=scaled, gelu=gelu
    )
    ours, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    before = ref.state_bits(ours.state_dict())
    save_hf(tmp_path / "a b" / "folder", config, ours.state_dict())
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a b" / "folder", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        logits(load_hf(tmp_path / "a b" / "folder")), logits(ours), rtol=0, atol=1e-5
    )
    assert ref.state_bits(ours.state_dict()) == before
    assert sorted(os.listdir(tmp_path / "a b" / "folder")) == ["config.json", "model.safetensors"]


def as_hub_file(state):
    """The names of the Hub's openai-community/gpt2: no prefix, causal masks as buffers, no
    output layer."""
    found = {
        name.removeprefix("transformer."): tensor
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }
    return found | {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 24, 24)) for i in range(3)}


@pytest.mark.parametrize("layout", ["hub", "bin", "sharded", "bf16"])
def test_loads_other_layouts(layout, tmp_path):
    from lab.hf import load_hf

    theirs = hf_gpt2()
    if layout == "bf16":
        theirs.bfloat16().save_pretrained(tmp_path)
        theirs.float()
    else:
        theirs.save_pretrained(
            tmp_path, **({"max_shard_size": "50KB"} if layout == "sharded" else {})
        )
    if layout in ("hub", "bin"):
        (tmp_path / "model.safetensors").unlink()
        state = as_hub_file(theirs.state_dict())
        if layout == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            ref.write_safetensors(tmp_path / "model.safetensors", state)
    torch.testing.assert_close(logits(load_hf(tmp_path)), logits(theirs), rtol=0, atol=1e-4)


UNUSUAL = [
    {"layer_norm_epsilon": 1e-2},
    {"n_inner": 48},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
    {"activation_function": "relu"},
    {"activation_function": "gelu_pytorch_tanh"},
]


@pytest.mark.parametrize("changes", UNUSUAL, ids=str)
def test_unusual_settings_are_honoured_or_refused(changes, tmp_path):
    """Never other logits than transformers' without a word."""
    from lab.hf import load_hf

    theirs = hf_gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    try:
        ours = load_hf(tmp_path)
    except LawaError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)
        return
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


def test_folders_that_are_no_gpt2_are_refused(tmp_path):
    from lab.hf import load_hf

    with pytest.raises(LawaError, match="nowhere"):
        load_hf(tmp_path / "nowhere")
    hf_gpt2().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    with pytest.raises(LawaError, match="llama"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"n_layer": 4}))
    with pytest.raises(LawaError, match=r"h\.3"):
        load_hf(tmp_path)


@pytest.fixture(scope="module")
def net():
    """A small GPT with large random weights, so that everything matters."""
    found, generator = GPT(GPTConfig(3, 4, 32, 24, 97)), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return found


@pytest.mark.parametrize("position", [0, 1, 11, 22])
def test_future_tokens_do_not_matter(net, position):
    other = IDX.clone()
    other[:, position + 1 :] = (other[:, position + 1 :] + 1) % 97
    here, there = logits(net), logits(net, other)
    torch.testing.assert_close(there[:, : position + 1], here[:, : position + 1], rtol=0, atol=1e-5)
    assert ((there - here)[:, position + 1 :].abs().amax(-1) > 1e-2).all()
    torch.testing.assert_close(
        logits(net, IDX[:, : position + 1]), here[:, : position + 1], rtol=0, atol=1e-5
    )  # nor the length
    other = IDX.clone()
    other[:, position] = (other[:, position] + 1) % 97
    assert (
        (logits(net, other) - here)[:, position:].abs().amax(-1) > 1e-4
    ).all()  # but the past does, all of it


def test_loss(net):
    targets = torch.roll(IDX, -1, 1)
    each = -F.log_softmax(net(IDX)[0].double(), -1).gather(-1, targets[..., None])[..., 0]
    assert net(IDX, targets)[1].item() == pytest.approx(each.mean().item(), rel=1e-5)
    torch.testing.assert_close(net.losses(IDX, targets).double(), each, rtol=1e-4, atol=1e-5)
    assert net(IDX)[1] is None and net(IDX, targets)[0] is None


@pytest.mark.parametrize(
    "spread", [1, 300]
)  # of the logits; 300: most probabilities are 0 in float32, the right one's among them
@pytest.mark.parametrize(
    "tokens", [40, 1024, 2500]
)  # less than one piece; one; three, the last one shorter
def test_the_loss_on_a_cpu_is_the_float64_one(tokens, spread):
    draw = torch.Generator().manual_seed(0)
    x, head = (
        torch.randn(size, 16, generator=draw).mul_(scale).requires_grad_()
        for size, scale in ((tokens, 1), (100, spread / 4))
    )
    targets = torch.randint(100, (tokens,), generator=draw)
    exact = F.cross_entropy(F.linear(x.double(), head.double()), targets)
    loss = LinearCrossEntropy.apply(x, head, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for found, right in zip(
        *(torch.autograd.grad(3 * one, (x, head)) for one in (loss, exact)), strict=True
    ):
        largest = (
            right.abs().max().item()
        )  # a logit's rounding grows with the logit, and is a relative error of its probability
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-7 * max(spread, 10) * largest)


def test_the_loss_on_a_cpu_passes_on_what_is_no_number_and_may_be_gone_back_through_twice():
    x, head, targets = (
        torch.ones(3, 4, requires_grad=True),
        torch.eye(5, 4, requires_grad=True),
        torch.tensor([0, 1, 4]),
    )
    loss = LinearCrossEntropy.apply(x, head, targets)
    first, second = (torch.autograd.grad(loss, (x, head), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for odd in (math.nan, math.inf):
        assert not math.isfinite(LinearCrossEntropy.apply(x + odd, head, targets).item())


def test_the_loss_without_gradients_is_the_same(net):
    targets = torch.roll(IDX, -1, 1)
    with torch.no_grad():
        alone = net(IDX, targets)[1]
    assert not alone.requires_grad and alone.item() == pytest.approx(
        net(IDX, targets)[1].item(), rel=1e-6
    )


@pytest.mark.parametrize("tokens", [40, 2500])  # less than one piece; three, the last one shorter
def test_the_loss_in_pieces_has_the_gradients_of_the_whole(tokens):
    net = GPT(model.GPTConfig(1, 2, 16, tokens, 100), seed=3)
    idx, targets = torch.randint(100, (2, 1, tokens), generator=torch.Generator().manual_seed(0))
    net(idx, targets)[1].backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(idx)[0].flatten(0, 1), targets.flatten()).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


def test_too_long_a_sequence_is_refused(net):
    with pytest.raises(LawaError, match=r"24.*25"):
        net(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(LawaError, match="n_head"):
        GPTConfig(2, 3, 64, 64, 257)


def test_initial_weights():
    """normal(0, 0.02), residual projections divided by sqrt(2 n_layer), norms 1, biases 0
    (GPT-2)."""
    config = GPTConfig(4, 4, 128, 64, 512, bias=True)
    for name, p in GPT(config, 3).named_parameters():
        if p.dim() == 1:
            assert torch.equal(
                p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            ), name
            continue
        std = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
        noise = 5 / math.sqrt(
            p.numel()
        )  # five standard errors of the mean; of the standard deviation they are smaller
        assert (
            float(p.std()) == pytest.approx(std, rel=noise) and abs(float(p.mean())) < noise * std
        ), name
        assert 3 * std < float(p.abs().max()) < 6.5 * std, name


def test_initial_weights_depend_on_the_seed_alone():
    config = model.gpt_config("nano", 257)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ref.state_bits(GPT(config, 5).state_dict())
    assert torch.equal(torch.get_rng_state(), before), "GPT() draws from the global generator"
    torch.manual_seed(2)
    assert ref.state_bits(GPT(config, 5).state_dict()) == first
    assert ref.state_bits(GPT(config, 6).state_dict()) != first


SIZES = {  # layers, heads, width, and the millions of parameters that these sizes are known to have
    "gpt2-small": (12, 12, 768, 124),
    "gpt2-medium": (24, 16, 1024, 355),
    "gpt2-large": (36, 20, 1280, 774),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_the_papers_sizes(name):
    n_layer, n_head, width, millions = SIZES[name]
    with torch.device("meta"):
        net = GPT(model.gpt_config(name, 50_257))
    total, vocabulary = (
        sum(p.numel() for p in net.parameters()),
        50_304,
    )  # 50,257 padded to a multiple of 64
    assert (
        total == 12 * n_layer * width**2 + (2 * n_layer + 1) * width + (vocabulary + 1024) * width
    )
    assert total / 1e6 == pytest.approx(millions, abs=1.5)  # OpenAI's have biases
    assert net.config == GPTConfig(
        n_layer, n_head, width, 1024, vocabulary, bias=False, scale_attn_by_inverse_layer_idx=True
    )


# ---- scales --------------------------------------------------------------------------------------

PAPER = {  # tokens per step, checkpoint interval, usual rate, high rate, final rate of the high one
    "gpt2-small": (393_216, 200, 6e-4, 6e-3, 6e-4),
    "gpt2-medium": (147_456, 2000, 3e-4, 3e-3, 3e-4),
    "gpt2-large": (49_152, 1000, 2e-4, 2e-3, 1e-5),
}


def rates_of(values):
    return [float(rate) for rate in values["lrs"].split(",")]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_scales(name):
    tokens, interval, usual, high, final = PAPER[name]
    values = model.scale_values(name)
    assert rates_of(values) == [usual, high]
    config = model.scale_config(values)
    found = (config.preset, config.corpus, config.lr, config.ckpt_interval)
    assert found == (name, "openwebtext", usual, interval)
    assert (config.max_iters, config.warmup_iters, config.schedule) == (70_000, 2000, "cosine")
    optimizer = (config.beta1, config.beta2, config.weight_decay, config.grad_clip)
    assert optimizer == (0.9, 0.95, 0.1, 1.0)
    sequences = config.batch_size * config.gradient_accumulation_steps
    assert sequences * 1024 == config.tokens_per_step == tokens
    swept = model.scale_config(values, lr=high)
    assert learning_rate(swept, 70_000) == pytest.approx(final, rel=1e-6)


def test_the_window_of_the_released_interval():
    """k = 5 checkpoints 200 steps apart are 1.4% of the paper's run at GPT-2 small; the miniature
    has about that share, and a wider window beside it."""
    shares = {}
    for name in ("gpt2-small", "laptop"):
        values = model.SCALES[name]
        shares[name] = [values["k"] * values[key] / values["max_iters"]
                        for key in ("spacing", "wide")]
    assert shares["gpt2-small"][0] == pytest.approx(0.0143, abs=1e-4)
    assert shares["laptop"] == pytest.approx([0.0125, 0.05])
    assert shares["laptop"][0] == pytest.approx(shares["gpt2-small"][0], rel=0.15)


def test_the_laptop_is_a_miniature_of_the_papers_run():
    """Many small steps, the paper's share of warm-up, five seeds, enough text to tell 0.005."""
    values = model.SCALES["laptop"]
    config = model.scale_config(model.scale_values("laptop"))
    assert (config.max_iters, config.tokens_per_step, config.schedule) == (10_000, 512, "cosine")
    assert config.warmup_iters / config.max_iters == pytest.approx(2000 / 70_000, abs=0.002)
    assert len(values["seeds"].split(",")) == 5
    assert values["n_blocks"] >= 256 and values["n_blocks"] * config.block_size >= 32_000


@pytest.mark.parametrize("name", model.SCALES)
def test_every_scale_is_consistent(name):
    assert "lr" not in model.SCALES[name]  # a sweep's rates are the scale's
    values = model.scale_values(name)
    rates = rates_of(values)
    assert values["lr"] == rates[0] and sorted(set(rates)) == rates
    config = model.scale_config(values)
    assert config.lr == rates[0]
    assert values["k"] >= 1 and values["wide"] >= values["spacing"]
    for spacing in (values["spacing"], values["wide"]):
        assert spacing % config.ckpt_interval == 0
        # a full window past the warm-up
        assert config.warmup_iters + (values["k"] - 1) * spacing < config.max_iters
    for text, scheme in config.schemes():
        assert type(scheme) in model.ONLINE, text
    # files of averages lie where the run has a checkpoint, the last one among them
    assert config.max_iters % config.ckpt_interval == 0
    assert config.max_iters % (config.averages_interval or config.ckpt_interval) == 0


def test_smoke_and_laptop_differ():
    smoke, laptop = (model.scale_config(model.scale_values(name)) for name in ("smoke", "laptop"))
    assert smoke.max_iters * smoke.tokens_per_step < laptop.max_iters * laptop.tokens_per_step / 20


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(LawaError, match=r"smoke.*'huge'"):
        model.scale_values("huge")


# ---- text ----------------------------------------------------------------------------------------


def test_sample_is_deterministic_text(run, command):
    options = ((), (), ("--seed", 1), ("--scheme", "lawa(k=3, spacing=2)"))
    texts = [command("sample", run, "--prompt", "abc", "--tokens", 30, *more) for more in options]
    assert [status for status, _, _ in texts] == [0] * 4, texts
    assert [err for _, _, err in texts] == [""] * 4
    first, second, other, averaged = (out for _, out, _ in texts)
    assert first == second and first.startswith("abc") and len(first) > 4
    assert len({first, other, averaged}) == 3
    assert model.sample(run, prompt="abc", tokens=30) == first.removesuffix("\n")
    greedy = [
        model.sample(run, prompt="abc", tokens=10, temperature=0, seed=seed) for seed in (0, 1)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--prompt", ""), "prompt"),
        (("--scheme", "lawa(k=0)"), "k"),
        (("--at", "5"), "5"),
        (("--tokens", "-1"), "tokens"),
    ],
)
def test_sample_refuses(argv, words, run, command):
    status, out, err = command("sample", run, *argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and all(word in err for word in words.split())


# ---- importing, compiling ------------------------------------------------------------------------

IMPORT = ref.HOOK + """
import torch
seen.clear()  # what torch does is its own affair
import model
heavy = {"transformers", "matplotlib", "jupyter", "tiktoken"} & set(sys.modules)
print(json.dumps([model.__file__, seen, torch.cuda.is_initialized(), sorted(heavy)]))
"""


def test_import_from_anywhere_does_no_work(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert json.loads(done.stdout) == [str(ROOT / "model.py"), [], False, []]
    assert os.listdir(tmp_path) == []


@pytest.fixture(autouse=True, scope="module")
def compiling(request, config, tmp_path_factory):
    """Compiling takes a good part of a minute: it begins in the background with the first test,
    if its own will be run at all."""
    if not any(item.name == "test_torch_compile" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("compiled")
    argv = [
        sys.executable,
        str(ROOT / "model.py"),
        "train",
        "--compile",
        *map(str, flags(config, folder / "run")),
    ]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder) as process,
    ):
        yield process, folder
        process.kill()


def test_compile_where_torch_cannot(config, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", "/a b/torch/__init__.py")
    with pytest.raises(LawaError, match="/a b/torch"):
        train(config, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    " " in torch.__file__, reason="torch.compile does not quote the folder it lies in"
)
def test_torch_compile(compiling, config, run):
    process, folder = compiling
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()
    assert column(folder / "run", "loss") == pytest.approx(column(run, "loss"), rel=1e-4)
    assert list(weights(folder / "run", 12)) == list(weights(run, 12))
