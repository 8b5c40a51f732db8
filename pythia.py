"""Replays: the losses and zero-shot accuracy of a public model's checkpoints and of averages along them. Nothing is trained."""
from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch

import lawa_core
from corpora import Corpus, open_corpus
from gpt import GPTConfig, blank, fill, hf_config, preset, save_hf
from lawa_core import LawaError
from lawa_hub import soon
from model import BLOCKS, _Cache, evaluate, pick_device


def export_steps(run, dtype=torch.float16) -> Path:
    """A run's checkpoints as Hugging Face folders RUN/hub/step<N>/, as a public model's revisions are; those already there are kept."""
    run = Path(run)
    config = json.loads((run / "config.json").read_text())
    shape, trajectory = preset(config["preset"], open_corpus(config["corpus"]).vocab_size), lawa_core.open_trajectory(run)
    for step in trajectory.steps:
        folder = run / "hub" / f"step{step}"
        if not (folder / "config.json").exists():  # the last file written
            save_hf(folder, shape, {name: tensor.to(dtype) for name, tensor in trajectory[step].items()})
    return run / "hub"


def replay(source, schemes, corpus: Corpus, at=None, *, n_blocks: int = BLOCKS, device: str = "auto", on_disk: bool = False, cache=None,
           each=None, every: float = 5.0) -> list[dict]:
    """Losses of a public model's checkpoints, and of averages along them; nothing is trained, and one model is on the device at a time.

    Each average is made while the model before it is evaluated. Args: source: Hugging Face step folders, "hub:NAME", or what else
    `open_trajectory` takes; schemes: {label: scheme}; corpus: text in the model's own tokens; on_disk: the window stays in files, see
    `lawa_core.stream`; cache: a CSV of finished rows, written after every step: an interrupted replay goes on; each: called with (step,
    label, {Hugging Face's name: tensor}) before the evaluation. Returns the rows of `evaluate_trajectory`.
    """
    trajectory, device = lawa_core.open_trajectory(source), pick_device(device)
    schemes, at = {"run": lawa_core.newest(), **schemes}, list(trajectory.steps if at is None else at)
    done = _Cache(cache and Path(cache), n_blocks)
    missing = done.missing(at, schemes)
    config = hf_config(trajectory.companions())
    _check_tokens(corpus, config, trajectory.companions() / "tokenizer.json")
    states, gpt, own = lawa_core.stream(trajectory, schemes, missing, on_disk), None, None
    begun, told, count, total = time.monotonic(), 0.0, 0, len(missing) * len(schemes)
    coming = soon(next, states, None)
    while item := coming.result():
        step, label, state = item
        if gpt is None:  # in half precision where the files are and the device is made for it
            half = device.type == "cuda" and next(iter(state.values())).dtype == torch.float16
            gpt = blank(config, device, torch.float16 if half else torch.float32)
        if each:
            each(step, label, state)
        fill(gpt, state)
        item = state = coming = None  # let go before the next one is made: there is only ever one
        coming, losses = soon(next, states, None), evaluate(gpt, corpus, n_blocks)
        own, count = losses if label == "run" else own, count + 1
        done.add(step, schemes[label], losses, own)
        if label == list(schemes)[-1]:
            done.write()
        if time.monotonic() - told > every:
            told, rate = time.monotonic(), count / (time.monotonic() - begun)
            print(f"{trajectory.name}: step {step}, {count} of {total} models evaluated, {(total - count) / rate:.0f} s left", flush=True)
    return done.table(trajectory.name, at, schemes, corpus)


def _check_tokens(corpus: Corpus, config: GPTConfig, tokenizer: Path) -> None:
    """Refuse text in other tokens than the model's: its losses would look like losses."""
    made_with = corpus.meta.get("tokenizer_sha256")
    other = made_with and tokenizer.exists() and hashlib.sha256(tokenizer.read_bytes()).hexdigest() != made_with
    if other or corpus.vocab_size > config.vocab_size:
        raise LawaError(f"{corpus.name} is not in this model's tokens; prepare the text again with --tokenizer {tokenizer}")


def zero_shot(folder, tasks: list[str], *, device: str = "cpu", **options) -> list[dict]:
    """Accuracy of a Hugging Face folder on tasks of lm-evaluation-harness: rows {"task", "accuracy", "stderr"}.

    options: what lm_eval's `simple_evaluate` takes besides, such as limit, task_manager. Needs the extra `zeroshot`.
    """
    try:
        import lm_eval
    except ImportError:
        raise LawaError('zero-shot tasks need lm_eval: pip install "lawa-lab[zeroshot]"') from None
    source = {"pretrained": str(folder), "dtype": "float16" if device == "cuda" else "float32"}
    results = lm_eval.simple_evaluate(model="hf", model_args=source, tasks=tasks, device=device, **options)
    return [{"task": task, "accuracy": values["acc,none"], "stderr": values["acc_stderr,none"]}
            for task, values in results["results"].items()]
