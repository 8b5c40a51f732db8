"""What a replay costs over evaluating its models alone: time, bytes fetched, memory. Prints ratios.

    python benchmarks/replay.py [--preset pythia-70m] [--points 6] [--k 5] [--tokens 8192]
                                [--repeats 3]

A model of the preset's shape with random weights is served by the tests' stand-in for the Hub, in
float16 as Pythia is, and replayed from there: N points, run and average. Each part runs in a
process of its own: (a) evaluating the N + N models, already in files, one after the other; (b) the
replay with its window in memory; (c) with its window on disk. Parts alternate, and the ratios are
of medians. Memory is what a process maps and writes (anonymous), less what is there before the
first checkpoint is opened.
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
    """Text, and step folders: random weights, each a little further along one direction."""
    import torch

    from lab.hf import save_hf
    from model import GPT, gpt_config

    config = gpt_config(preset, 50_277)
    start = GPT(config, 0).state_dict()
    way = GPT(config, 1).state_dict()
    for i in range(revisions):
        state = {name: (start[name] + 0.01 * i * way[name]).to(torch.float16) for name in start}
        save_hf(folder / "made" / f"step{(i + 1) * STEP}", config, state)
    val = (
        np.random.default_rng(0)
        .integers(0, 50_277, max(tokens, config.block_size) + 1)
        .astype("<u2")
    )
    (folder / "text").mkdir()
    for split in ("train", "val"):
        val.tofile(folder / "text" / f"{split}.bin")
    (folder / "text" / "meta.json").write_text(
        json.dumps(
            {
                "name": "noise",
                "vocab_size": 50_277,
                "train_tokens": len(val),
                "val_tokens": len(val),
                "val_bytes": len(val),
                "tokenizer": "none",
                "eot_token": 0,
            }
        )
    )


def alone(folder: Path, k: int, points: int, blocks: int) -> None:
    """Evaluate N + N models that lie ready, one after the other."""
    import lawa_core
    from lab.hf import hf_config, load_state
    from model import empty_model, evaluate, open_corpus

    corpus = open_corpus(folder / "text")
    trajectory = lawa_core.open_trajectory(folder / "made")
    network = empty_model(hf_config(trajectory.config_dir()))
    for step in trajectory.steps[-points:]:
        for _ in ("run", "average"):
            evaluate(load_state(network, trajectory[step]), corpus, blocks)


def replay(folder: Path, k: int, points: int, blocks: int, url: str, on_disk: bool) -> int:
    """Replay from the stand-in; the bytes of one copy of each revision."""
    import lab.replay
    from lab.hub import open_hub
    from lawa_core import lawa
    from model import open_corpus

    trajectory = open_hub(REPO, folder=folder / "cache", endpoint=url, token=False)
    lab.replay.replay(
        trajectory,
        {"lawa": lawa(k, STEP)},
        open_corpus(folder / "text"),
        trajectory.steps[-points:],
        n_blocks=blocks,
        device="cpu",
        on_disk=on_disk,
    )
    return sum(map(trajectory.nbytes, trajectory.steps))


def worker(part: str, folder: Path, k: int, points: int, blocks: int, url: str) -> None:
    import huggingface_hub.errors
    import huggingface_hub.hf_api  # noqa: F401 - what importing takes is not counted

    import lab.replay  # noqa: F401

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

    from model import gpt_config

    config = gpt_config(args.preset, 50_277)
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
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    row = json.loads(done.stdout.splitlines()[-1]) | {
                        "sent": sum(hub.sent.values())
                    }
                    results.setdefault(part, []).append(row)
                    print(
                        f"{part:>10}: {row['seconds']:7.2f} s, peak {row['bytes'] / 1e6:.0f} MB, "
                        f"{row['sent'] / 1e6:.0f} MB fetched",
                        flush=True,
                    )
    report(config, args, results)


def report(config, args, results: dict) -> None:
    from model import count_parameters

    parameters, _ = count_parameters(config)
    live = 4 * parameters  # bytes of one model on the CPU in float32
    stored = 2 * parameters  # bytes of one checkpoint in float16
    seconds, memory, fetched = {}, {}, []
    for part, rows in results.items():
        seconds[part] = statistics.median(row["seconds"] for row in rows)
        memory[part] = max(row["bytes"] for row in rows)
        if part != "alone":
            fetched += [row["sent"] / row["needed"] for row in rows]
    print(
        f"{args.preset}: {parameters / 1e6:.1f}M parameters, {args.points} + {args.points} models, "
        f"k = {args.k}, median of {args.repeats}"
    )
    for part in ("in memory", "on disk"):
        ratio = seconds[part] / seconds["alone"]
        print(f"window {part}: {ratio:.3f} times evaluating alone (aim: at most 1.15)")
    bound = live + (args.k + 1) * stored + 300e6
    print(
        f"window in memory: peak {memory['in memory'] / bound:.3f} of a model, k checkpoints, "
        f"the average and 300 MB (aim: at most 1)"
    )
    print(
        f"window on disk: peak {memory['on disk'] / live:.3f} models of {live / 1e6:.0f} MB "
        f"(aim: at most 2)"
    )
    print(
        f"evaluating alone: peak {memory['alone'] / live:.3f} models, "
        f"so activations are {(memory['alone'] - live) / 1e6:.0f} MB"
    )
    print(f"fetched: {max(fetched):.3f} of one copy of each revision used")


if __name__ == "__main__":
    main()
