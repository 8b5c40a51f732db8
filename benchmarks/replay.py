"""What a replay costs over evaluating its models alone: time, bytes fetched, memory. Prints ratios.

    python benchmarks/replay.py [--preset pythia-70m] [--points 6] [--k 5] [--tokens 8192] [--repeats 3]

A model of the preset's shape with random weights is served by the tests' stand-in for the Hub, in float16 as Pythia is, and replayed from
there: N points, run and average. Each part runs in a process of its own: (a) evaluating the N + N models, already in files, one after the
other; (b) the replay with its window in memory; (c) with its window on disk. Parts alternate, and the ratios are of medians. Memory is what
a process maps and writes (anonymous), less what is there before the first checkpoint is opened.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
REPO, STEP = "EleutherAI/pythia-random", 1000


def anonymous() -> int:
    """Bytes of anonymous memory of this process, files mapped left out; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory while inside, above that at the start."""

    def __enter__(self):
        self.before, self.most, self.over = anonymous(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.005):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        self.bytes = self.most - self.before


def prepare(folder: Path, preset: str, revisions: int, tokens: int) -> None:
    """Step folders: one set of random weights, each revision a little further along a random direction; and text."""
    import torch

    import gpt

    config = gpt.preset(preset, 50_277)
    start, way = (dict(gpt.GPT(config, seed).state_dict()) for seed in (0, 1))
    for i in range(revisions):
        state = {name: (start[name] + 0.01 * i * way[name]).to(torch.float16) for name in start}
        gpt.save_hf(folder / "made" / f"step{(i + 1) * STEP}", config, state)
    val = (
        np.random.default_rng(0)
        .integers(0, 50_277, max(tokens, config.block_size) + 1)
        .astype("<u2")
    )
    (folder / "text").mkdir()
    for split, data in (("train", val[:0]), ("val", val)):
        data.tofile(folder / "text" / f"{split}.bin")
    (folder / "text" / "meta.json").write_text(
        json.dumps(
            {
                "name": "noise",
                "vocab_size": 50_277,
                "train_tokens": 0,
                "val_tokens": len(val),
                "val_bytes": len(val),
                "tokenizer": "none",
                "eot_token": 0,
            }
        )
    )


def alone(folder: Path, k: int, points: int, blocks: int) -> None:
    """Evaluate N + N models that lie ready, one after the other."""
    import gpt
    import lawa_core
    import model

    corpus, trajectory = (
        model.open_corpus(folder / "text"),
        lawa_core.open_trajectory(folder / "made"),
    )
    network = gpt.blank(gpt.hf_config(trajectory.companions()))
    for step in trajectory.steps[-points:]:
        for _ in ("run", "average"):
            model.evaluate(gpt.fill(network, trajectory[step]), corpus, blocks)


def replay(folder: Path, k: int, points: int, blocks: int, url: str, on_disk: bool) -> int:
    import lawa_core
    import lawa_hub
    import model
    import pythia

    trajectory = lawa_hub.open_hub(REPO, folder=folder / "cache", endpoint=url, token=False)
    pythia.replay(
        trajectory,
        {"lawa": lawa_core.lawa(k, STEP)},
        model.open_corpus(folder / "text"),
        trajectory.steps[-points:],
        n_blocks=blocks,
        device="cpu",
        on_disk=on_disk,
        every=1e9,
    )
    return sum(map(trajectory.nbytes, trajectory.steps))


def worker(part: str, folder: Path, k: int, points: int, blocks: int, url: str) -> None:
    import huggingface_hub.errors
    import huggingface_hub.hf_api  # noqa: F401 - what importing takes is not counted

    import pythia  # noqa: F401

    begun, needed = time.perf_counter(), 0
    with Peak() as peak:
        if part == "alone":
            alone(folder, k, points, blocks)
        else:
            needed = replay(folder, k, points, blocks, url, part == "on disk")
    print(
        json.dumps({"seconds": time.perf_counter() - begun, "bytes": peak.bytes, "needed": needed})
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default, text in (
        ("preset", "pythia-70m", "shape"),
        ("points", 6, "points replayed"),
        ("k", 5, "checkpoints in the window"),
        ("tokens", 8192, "tokens evaluated per model, as in pythia_replay"),
        ("repeats", 3, "of every part"),
    ):
        parser.add_argument(
            f"--{flag}", type=type(default), default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        part, folder, k, points, blocks, url = args.worker
        return worker(part, Path(folder), int(k), int(points), int(blocks), url)
    from hub_stand_in import Hub

    import gpt

    config = gpt.preset(args.preset, 50_277)
    blocks, results = max(args.tokens // config.block_size, 1), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.preset, args.points + args.k - 1, args.tokens)
        made = {path.name: path for path in sorted((folder / "made").iterdir())}
        with Hub({REPO: made}) as hub:
            for _ in range(args.repeats):
                for part in ("alone", "in memory", "on disk"):
                    hub.sent.clear()
                    command = [
                        sys.executable,
                        __file__,
                        "--worker",
                        part,
                        name,
                        str(args.k),
                        str(args.points),
                        str(blocks),
                        hub.url,
                    ]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    row = json.loads(done.stdout.splitlines()[-1]) | {
                        "sent": sum(hub.sent.values())
                    }
                    results.setdefault(part, []).append(row)
                    print(
                        f"{part:>10}: {row['seconds']:7.2f} s, peak {row['bytes'] / 1e6:.0f} MB, {row['sent'] / 1e6:.0f} MB fetched",
                        flush=True,
                    )
    report(config, args, results)


def report(config, args, results: dict) -> None:
    import gpt

    parameters = gpt.blank(config, "meta").size()
    live, stored = (
        4 * parameters,
        2 * parameters,
    )  # bytes: one model on the CPU in float32, one checkpoint in float16
    seconds = {
        part: statistics.median(row["seconds"] for row in rows) for part, rows in results.items()
    }
    memory = {part: max(row["bytes"] for row in rows) for part, rows in results.items()}
    fetched = [
        row["sent"] / row["needed"]
        for part, rows in results.items()
        if part != "alone"
        for row in rows
    ]
    print(
        f"{args.preset}: {parameters / 1e6:.1f}M parameters, {args.points} + {args.points} models, k = {args.k}, "
        f"median of {args.repeats}"
    )
    for part in ("in memory", "on disk"):
        print(
            f"window {part}: {seconds[part] / seconds['alone']:.3f} times evaluating alone (aim: at most 1.15)"
        )
    bound = live + args.k * stored + 300e6
    print(
        f"window in memory: peak {memory['in memory'] / bound:.3f} of a model, k checkpoints and 300 MB (aim: at most 1)"
    )
    print(
        f"window on disk: peak {memory['on disk'] / live:.3f} models of {live / 1e6:.0f} MB (aim: at most 2)"
    )
    print(
        f"evaluating alone: peak {memory['alone'] / live:.3f} models, so activations are {(memory['alone'] - live) / 1e6:.0f} MB"
    )
    print(f"fetched: {max(fetched):.3f} of one copy of each revision used")


if __name__ == "__main__":
    main()
