"""Speed of training: the project's step against two others and the machine, and what
checkpoints, averages and evaluation cost.

What is compared is timed in turns, round after round, in an order that rotates; ratios are taken
within a round. Printed and kept are medians over the rounds with the lowest and the highest; a
speed ratio above 1 says that the project is faster.

The rivals train the same shape from the same weights in fp32, with the project's batch size, AdamW
(fused, decay on matrices) and clipping: `textbook`, nanoGPT's published steps written again in
plain modules, and `transformers`' GPT-2 without dropout. Before anything is timed, all must report
the same loss on the same batches.

FLOPs per token = 6 N + 12 L C T (arXiv 2204.02311, appendix B): N parameters without position
embeddings, L layers, C width, T block size. Attention is counted in full; a causal kernel does
about half of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import lawa_core
import model
from lab.hf import save_hf
from lawa_core import LawaError

LAPTOP = model.SCALES["laptop"]


class Size(NamedTuple):
    batch: int  # sequences per step
    vocabulary: int | None = None  # default: the corpus's
    compared: int = 10  # steps whose losses are compared with the textbook's
    rounds: int | None = None  # default: --repeats
    blocks: int = 0  # per evaluation timed; 0: not in the table of costs


SIZES = {
    "nano": Size(8),
    "micro": Size(LAPTOP["batch_size"], blocks=128),
    "mini": Size(8, blocks=32),
    "midi": Size(4),
    "gpt2-small": Size(1, 50_257, compared=2, rounds=3, blocks=2),
}
PRODUCTS = (
    (1024, 128, 512),
    (1024, 256, 1024),
    (1024, 384, 1536),
    (1024, 768, 3072),
    (2048, 2048, 2048),
)  # tokens, width in, width out
# times as many rounds of growth, each as much shorter: a shared machine changes its speed within
# seconds
SHORTER = 5
# of a loss, relative: about 25 fp32 ulps; no weight decay, twice the scale in one layer show at
# 1e-5 within ten steps
TOLERANCE = 3e-6
EXAMPLES = """examples
  python benchmarks/training.py                       everything, a quarter of an hour on two cores
  python benchmarks/training.py --quick               under a minute
  python benchmarks/training.py --only growth costs   these again; the others' numbers stay
exit status: 0 measured, whether or not what was expected was reached; 1 a contestant disagrees or
fails; 2 bad usage; 130 interrupted"""


# ---- 1. The contestants --------------------------------------------------------------------------


def project(config, corpus):
    """The project's own steps: model, step() -> loss, batch(i) -> inputs and targets of step i."""
    network = model.GPT(model.gpt_config(config.preset, corpus.vocab_size), config.seed)
    optimizer = model.adamw(network, config)
    steps = itertools.count()

    def step():
        done = next(steps)
        tokens = corpus.known(model.batch(corpus.train, config, done))
        return model.train_step(network, optimizer, tokens, config, done)[0]

    def batch(step):
        tokens = torch.from_numpy(model.batch(corpus.train, config, step))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return SimpleNamespace(model=network, step=step, batch=batch)


class TextbookBlock(nn.Module):
    def __init__(self, width: int, heads: int, scale: float):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn = nn.ModuleDict(
            {
                "c_attn": nn.Linear(width, 3 * width, bias=False),
                "c_proj": nn.Linear(width, width, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width, bias=False),
                "c_proj": nn.Linear(4 * width, width, bias=False),
            }
        )

    def forward(self, x):
        B, T, C = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in parts
        )  # each (B, heads, T, C / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.attn["c_proj"](y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class Textbook(nn.Module):
    """The same GPT-2 as a textbook has it, under GPT-2's names, so that it takes the project's
    weights."""

    def __init__(self, c: model.GPTConfig, weights):
        super().__init__()
        self.wte, self.wpe = (
            nn.Embedding(c.vocab_size, c.n_embd),
            nn.Embedding(c.block_size, c.n_embd),
        )
        scale = (c.n_embd // c.n_head) ** -0.5
        self.h = nn.ModuleList(
            TextbookBlock(c.n_embd, c.n_head, scale / (layer + 1)) for layer in range(c.n_layer)
        )
        self.ln_f = nn.LayerNorm(c.n_embd, bias=False)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def hugging_face(c: model.GPTConfig, weights, folder):
    """`transformers`' GPT-2 with these weights, and its loss of (inputs, targets). No key-value
    cache: training has no use for one."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    save_hf(folder, c, weights)
    network = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
    return (
        network,
        lambda x, y: network(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss,
    )


def plain_loop(network, loss_of, config):
    """step(inputs, targets) -> loss: one optimizer step of a plain loop."""
    groups = [
        {
            "params": [p for p in network.parameters() if (p.dim() >= 2) == decays],
            "weight_decay": decays * config.weight_decay,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )

    def step(x, y):
        loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def draw(tokens, sequences: int, block: int):
    """A random batch, sequence by sequence: inputs and targets, each (sequences, block) int64."""
    starts = torch.randint(len(tokens) - block, (sequences,)).tolist()
    return [
        torch.stack(
            [
                torch.from_numpy(tokens[i + shift : i + shift + block].astype("int64"))
                for i in starts
            ]
        )
        for shift in (0, 1)
    ]


def contestants(ours, config, corpus, folder) -> dict:
    """{name: call of one step}, after steps that must give the project's losses; of transformers
    one step, since it trains biases too."""
    shape, weights = (
        ours.model.config,
        {name: tensor.clone() for name, tensor in ours.model.state_dict().items()},
    )
    textbook, compared = Textbook(shape, weights), SIZES[config.preset].compared
    loops = {"textbook": (plain_loop(textbook, textbook, config), compared)}
    if installed("transformers"):
        loops["transformers"] = plain_loop(*hugging_face(shape, weights, folder / "hf"), config), 1
    losses = [float(ours.step()) for _ in range(compared)]
    for name, (step, steps) in loops.items():
        for i in range(steps):
            loss = float(step(*ours.batch(i)))
            if not math.isclose(loss, losses[i], rel_tol=TOLERANCE):
                raise LawaError(
                    f"{config.preset}, step {i + 1}: expected {name} to have the project's loss "
                    f"{losses[i]}, got {loss}"
                )
    batch = functools.partial(draw, corpus.train, config.batch_size, shape.block_size)
    return {"project": ours.step} | {
        name: (lambda step=step: step(*batch())) for name, (step, _) in loops.items()
    }


# ---- 2. Timing -----------------------------------------------------------------------------------


def rotated(names, i: int) -> list:
    return [*names[i % len(names) :], *names[: i % len(names)]]


def in_turns(work: dict, rounds: int, seconds: float) -> dict[str, list[float]]:
    """{name: seconds per call, one value per round}. A turn calls for at least `seconds`, and at
    least once."""
    took = {name: [] for name in work}
    for i in range(rounds):
        for name in rotated(list(work), i):
            begun, passed, calls = time.perf_counter(), 0.0, 0
            while passed < seconds or not calls:
                work[name]()
                passed, calls = time.perf_counter() - begun, calls + 1
            took[name].append(passed / calls)
    return took


def spread(values) -> dict:
    return {
        "n": len(values),
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


def over(numerators, denominators, factor: float = 1) -> dict:
    """The ratio within each round."""
    return spread([factor * a / b for a, b in zip(numerators, denominators, strict=True)])


def multiply(m: int, k: int, n: int):
    return functools.partial(torch.mm, torch.randn(m, k), torch.randn(k, n))


@functools.cache
def products(seconds: float) -> dict[tuple, float]:
    """{(m, k, n): FLOP/s of torch.mm, sustained over `seconds`}."""
    return {
        shape: 2 * math.prod(shape) / in_turns({"mm": multiply(*shape)}, 1, seconds)["mm"][0]
        for shape in PRODUCTS
    }


def launch(commands) -> float:
    """Run them at once. Returns their tokens per second of training, added up, from their
    summaries: starting Python does not count."""
    running = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    try:
        errors = [process.communicate()[1] for process in running]
    finally:
        for process in running:  # still there only after an error or an interrupt
            process.terminate()
            process.wait()
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            said = (error.strip().splitlines() or ["no message"])[-1]
            raise LawaError(f"a training process ended with {process.returncode}: {said}")
    return sum(
        json.loads(Path(words[-1], "summary.json").read_text())["tokens_per_second"]
        for words in commands
    )


def flags(config) -> list[str]:
    """The command line of a configuration."""
    words = []
    for name, value in dataclasses.asdict(config).items():
        words += [f"--{name}", str(value)]
    return words


def command(folder, steps: int, threads: int, launcher=(), **given) -> list[str]:
    """`model.py train` of the first steps of a run of scale laptop, in a new folder: the last
    word."""
    config = model.scale_config(LAPTOP, max_iters=steps, warmup_iters=0, **given)
    return [
        sys.executable,
        *launcher,
        model.__file__,
        "train",
        *flags(config),
        "--device",
        "cpu",
        "--threads",
        str(threads),
        "--out_dir",
        tempfile.mkdtemp(dir=folder),
    ]


def side_by_side(folder, steps: int) -> float:
    return launch([command(folder, steps, 1, seed=seed) for seed in (0, 1)])


# ---- 3. Sections: each returns its rows ----------------------------------------------------------


def sized(preset: str):
    """(config, corpus) of a row: a constant rate, and a vocabulary of GPT-2's size where the row
    says so."""
    size, corpus = SIZES[preset], model.open_corpus(LAPTOP["corpus"])
    if size.vocabulary:
        corpus = dataclasses.replace(corpus, meta=corpus.meta | {"vocab_size": size.vocabulary})
    return model.Config(
        preset,
        LAPTOP["corpus"],
        batch_size=size.batch,
        warmup_iters=0,
        schedule="constant",
        dtype="fp32",
    ), corpus


def matmul(args, folder):
    rates = products(2 * args.seconds)
    best = max(rates.values())
    return [
        {"shape": " x ".join(map(str, shape)), "of_best": rate / best, "gflops": rate / 1e9}
        for shape, rate in rates.items()
    ]


def growth(args, folder):
    rates = products(2 * args.seconds)
    best, rows = max(rates, key=rates.get), []
    for preset in args.presets:
        config, corpus = sized(preset)
        ours = project(config, corpus)
        work = contestants(ours, config, corpus, folder) | {"mm": multiply(*best)}
        took = in_turns(
            work, SIZES[preset].rounds or SHORTER * args.repeats, args.seconds / SHORTER
        )
        c, parameters = ours.model.config, ours.model.size()
        flops = config.tokens_per_step * (6 * parameters + 12 * c.n_layer * c.n_embd * c.block_size)
        rows.append(
            {
                "preset": preset,
                "parameters": parameters,
                "batch": f"{config.batch_size} x {c.block_size}",
                **{
                    name: over(took[name], took["project"]) if name in took else None
                    for name in ("textbook", "transformers")
                },
                "share": over(took["mm"], took["project"], flops / (2 * math.prod(best))),
                "tokens_per_second": spread([config.tokens_per_step / t for t in took["project"]]),
            }
        )
        note(f"growth: {preset} done")
    return rows


def costs(args, folder):
    rows = []
    for preset in (preset for preset in args.presets if SIZES[preset].blocks):
        config, corpus = sized(preset)
        ours, blocks = project(config, corpus), SIZES[preset].blocks
        one, three = (lawa_core.EMA(ours.model, betas) for betas in ((0.99,), (0.9, 0.99, 0.999)))
        steps = itertools.count(1)  # an average passes over a step that it has taken
        work = {
            "step": ours.step,
            "checkpoint": functools.partial(
                lawa_core.save, folder / "checkpoint.safetensors", ours.model.state_dict()
            ),
            **{
                name: lambda average=average, steps=steps: average.update(next(steps))
                for name, average in (("ema", one), ("ema3", three))
            },
            "evaluation": functools.partial(model.evaluate, ours.model, corpus, blocks),
        }
        for call in work.values():  # warms up
            call()
        took = in_turns(work, SIZES[preset].rounds or args.repeats, args.seconds / 2)
        took["evaluation"] = [model.BLOCKS / blocks * t for t in took["evaluation"]]
        rows.append(
            {
                "preset": preset,
                **{name: over(took[name], took["step"]) for name in list(work)[1:]},
                "step_ms": spread([1e3 * t for t in took["step"]]),
                "step_tokens": config.tokens_per_step,
            }
        )
    return rows


def sweep(args, folder):
    """A run of a laptop sweep: it trains beside another, a thread each; then run and LAWA are
    evaluated at 20 points with all threads."""
    config = model.scale_config(LAPTOP)
    checkpoints = len(
        config.checkpoint_steps
    )  # the short run leaves as many, a step apart: reading and averaging them costs the same
    run = model.train(
        dataclasses.replace(config, max_iters=checkpoints, ckpt_interval=1, warmup_iters=0),
        folder / "short",
        device="cpu",
    )
    points, schemes = (
        [round(checkpoints * i / 20) for i in range(1, 21)],
        {"lawa": lawa_core.lawa(LAPTOP["k"], 1)},
    )
    training, evaluating = [], []
    for _ in range(args.repeats):
        training.append(
            config.tokens_per_step * config.max_iters / side_by_side(folder, args.steps)
        )
        (run / f"eval_{LAPTOP['n_blocks']}.npz").unlink(missing_ok=True)
        begun = time.perf_counter()
        model.evaluate_trajectory(run, schemes, points, LAPTOP["n_blocks"], device="cpu")
        evaluating.append(time.perf_counter() - begun)
    return [
        {
            "share": over(evaluating, [a + b for a, b in zip(training, evaluating, strict=True)]),
            "training_s": spread(training),
            "evaluation_s": spread(evaluating),
            "steps": config.max_iters,
            "points": len(points),
        }
    ]


def processes(args, folder):
    """Two processes with a thread each against one process with two; two runs one after the
    other go at the rate of one."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    work = {
        "one": lambda: launch([command(folder, args.steps, 2)]),
        "two runs side by side": lambda: side_by_side(folder, args.steps),
        "one run on two gloo ranks": lambda: launch([command(folder, args.steps, 1, ranks)]),
    }
    if "WORLD_SIZE" not in Path(model.__file__).read_text():
        note("processes: gloo ranks skipped, this model.py does not run under torchrun")
        del work["one run on two gloo ranks"]
    rates = {name: [] for name in work}
    for i in range(args.repeats):
        for name in rotated(list(work), i):
            rates[name].append(work[name]())
    return [
        {
            "what": name,
            "ratio": over(rates[name], rates["one"]),
            "two": spread(rates[name]),
            "one": spread(rates["one"]),
        }
        for name in list(work)[1:]
    ]


SECTIONS = {  # name: (function, title, {column: (heading, format)})
    "matmul": (
        matmul,
        "The machine's fp32 matrix products: torch.mm, sustained",
        {
            "shape": ("m x k x n", ""),
            "of_best": ("of the best", ".0%"),
            "gflops": ("GFLOP/s", ".0f"),
        },
    ),
    "growth": (
        growth,
        "Training steps over sizes",
        {
            "preset": ("preset", ""),
            "parameters": ("parameters", ",d"),
            "batch": ("batch x block", ""),
            "textbook": ("x textbook", ".2f"),
            "transformers": ("x transformers", ".2f"),
            "share": ("of the matrix-product rate", ".0%"),
            "tokens_per_second": ("tokens/s", ",.0f"),
        },
    ),
    "costs": (
        costs,
        "What else a run does, in training steps (100%: as long as one; "
        f"evaluation of {model.BLOCKS} blocks)",
        {
            "preset": ("preset", ""),
            "checkpoint": ("checkpoint write", ".1%"),
            "ema": ("EMA update, 1 beta", ".1%"),
            "ema3": ("3 betas", ".1%"),
            "evaluation": ("evaluation", ".0%"),
            "step_ms": ("a step, ms", ".1f"),
            "step_tokens": ("its tokens", ",d"),
        },
    ),
    "sweep": (
        sweep,
        "Averaging and evaluation in a sweep at scale laptop, per run",
        {
            "share": ("share of the time", ".1%"),
            "training_s": ("training, s", ".1f"),
            "evaluation_s": ("averaging and evaluation, s", ".1f"),
            "steps": ("steps", ",d"),
            "points": ("points", "d"),
        },
    ),
    "processes": (
        processes,
        "Two one-thread processes against one with two threads, runs of scale laptop",
        {
            "what": ("", ""),
            "ratio": ("x one process", ".2f"),
            "two": ("tokens/s", ",.0f"),
            "one": ("one process's tokens/s", ",.0f"),
        },
    ),
}


# ---- 4. What was expected ------------------------------------------------------------------------


def written_share(row) -> float:
    """Checkpoint writes in a run's time at the paper's batch and spacing: a write, in tokens
    trained meanwhile, over those between two."""
    paper = model.scale_config(model.SCALES["gpt2-small"])
    return (
        row["checkpoint"]["median"]
        * row["step_tokens"]
        / (paper.tokens_per_step * paper.ckpt_interval)
    )


def median(column: str):
    return lambda row: row[column]["median"]


# what, section, value of a row, rows that count, at least (1) or at most (-1), bound, format; the
# worst row is judged
REACH = (
    (
        "share of the matrix-product rate at laptop",
        "growth",
        median("share"),
        lambda r: r["preset"] == LAPTOP["preset"],
        1,
        0.65,
        ".1%",
    ),
    (
        "share of the matrix-product rate from 3M on",
        "growth",
        median("share"),
        lambda r: r["parameters"] >= 3e6,
        1,
        0.70,
        ".1%",
    ),
    ("speed against the textbook loop", "growth", median("textbook"), bool, 1, 0.97, ".3f"),
    (
        "speed against transformers",
        "growth",
        median("transformers"),
        lambda r: r["transformers"],
        1,
        1.2,
        ".3f",
    ),
    ("averaging and evaluation in a sweep's time", "sweep", median("share"), bool, -1, 0.20, ".1%"),
    (
        "checkpoint writes in the time of the paper's run",
        "costs",
        written_share,
        lambda r: r["preset"] == "gpt2-small",
        -1,
        0.02,
        ".3%",
    ),
    (
        "one run on two gloo ranks against one process",
        "processes",
        median("ratio"),
        lambda r: "gloo" in r["what"],
        1,
        0.9,
        ".3f",
    ),
    (
        "two runs side by side against one after the other",
        "processes",
        median("ratio"),
        lambda r: "gloo" not in r["what"],
        1,
        1.0,
        ".3f",
    ),
)


def reach(kept) -> list[dict]:
    found = []
    for what, section, value, counts, sign, bound, form in REACH:
        rows = [row for row in kept.get(section, {}).get("rows", []) if counts(row)]
        worst = min(rows, key=lambda row: sign * value(row), default=None)
        measured = value(worst) if worst else None
        reached = sign * measured >= sign * bound if worst else None
        words = {True: "reached", False: "NOT reached", None: "not measured"}[reached]
        where = (
            f"measured {measured:{form}}{f' ({name})' if (name := worst.get('preset')) else ''}: "
            if worst
            else ""
        )
        found.append(
            {
                "what": what,
                "at": "least" if sign > 0 else "most",
                "expected": bound,
                "measured": measured,
                "reached": reached,
                "line": f"{what}: expected at {'least' if sign > 0 else 'most'} {bound:{form}}, "
                f"{where}{words}",
            }
        )
    return found


# ---- 5. Command line -----------------------------------------------------------------------------


def cell(value, form: str) -> str:
    if isinstance(value, dict):
        between = f" ({value['low']:{form}} to {value['high']:{form}})" if value["n"] > 1 else ""
        return f"{value['median']:{form}}{between}"
    return "" if value is None else f"{value:{form}}"


def table(title: str, columns: dict, rows: list[dict]) -> str:
    lines = [[heading for heading, _ in columns.values()], ["---"] * len(columns)]
    lines += [[cell(row[key], form) for key, (_, form) in columns.items()] for row in rows]
    rounds = sorted(
        {value["n"] for row in rows for value in row.values() if isinstance(value, dict)}
    )
    counted = (
        f"; median, lowest and highest of {' or '.join(map(str, rounds))} rounds"
        if max(rounds, default=1) > 1
        else ""
    )
    return "\n".join([f"\n### {title}{counted}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def markdown(kept: dict, figures: list[dict] | None = None) -> str:
    """The tables of all sections measured so far, and the figures to reach: what README shows."""
    tables = [
        table(title, columns, kept[name]["rows"]).strip()
        for name, (_, title, columns) in SECTIONS.items()
        if name in kept
    ]
    lines = "\n".join(f"- {row['line']}" for row in (reach(kept) if figures is None else figures))
    return "\n\n".join([*tables, f"Expected and measured:\n\n{lines}"])


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def circumstances() -> dict:
    """What the numbers hold for. The load, of the minute before, tells whether the machine was
    quiet."""
    cpus = Path("/proc/cpuinfo")
    cpu = (
        cpus.read_text().partition("model name\t: ")[2].partition("\n")[0] if cpus.exists() else ""
    )
    return {
        "machine": {
            "cpu": cpu or platform.processor(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version()}
        | {name: installed(name) for name in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def kept_sections(path: Path | None) -> dict:
    if not (path and path.exists()):
        return {}
    try:
        return json.loads(path.read_text())["sections"]
    except (ValueError, KeyError, TypeError):
        raise LawaError(
            f"{path} is no JSON of this benchmark; move it away or give another --out"
        ) from None


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "training.py", description=__doc__, epilog=EXAMPLES, formatter_class=raw
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        metavar="PRESET",
        help=f"of {', '.join(SIZES)}",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="rounds (default 5, --quick 1; of growth five times as many; gpt2-small always 3)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of all but launched runs (default here %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="scale laptop's size only, in short; kept only if --out is given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file whose sections are replaced (default: training.json beside this script)",
    )
    args = parser.parse_args(argv)
    args.seconds, args.steps = (
        (0.2, 40) if args.quick else (0.5, 80)
    )  # of a turn; of a launched run
    args.repeats = (1 if args.quick else 5) if args.repeats is None else args.repeats
    if args.repeats < 1 or args.threads < 1:
        parser.error(
            f"--repeats and --threads must be at least 1, got {args.repeats} and {args.threads}"
        )
    if args.quick:
        args.presets = [LAPTOP["preset"]]
    args.out = args.out or (None if args.quick else Path(__file__).with_suffix(".json"))
    return args


def main(argv=None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    found = circumstances()
    if found["load"] > 0.5:
        note(
            f"the machine is busy (load {found['load']}): every number below is suspect, "
            "ratios of two processes to one most of all"
        )
    model.RUNS.mkdir(exist_ok=True)  # temporary files go where runs go: to the same disk
    try:
        kept = kept_sections(args.out)
        for name in args.only:
            section, title, columns = SECTIONS[name]
            begun = time.monotonic()
            with tempfile.TemporaryDirectory(dir=model.RUNS, prefix="benchmark-") as folder:
                rows = section(args, Path(folder))
            kept[name] = found | {"seconds": round(time.monotonic() - begun, 1), "rows": rows}
            print(table(title, columns, rows), flush=True)
            if args.out:
                with lawa_core.replacing(args.out) as part:
                    part.write_text(
                        json.dumps(
                            {"sections": kept, "reach": reach(kept), "markdown": markdown(kept)},
                            indent=1,
                        )
                    )
    except LawaError as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        note("interrupted; the sections finished before are kept")
        return 130
    print(markdown({}, reach(kept)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
