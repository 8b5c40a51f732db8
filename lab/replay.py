"""Replays: what averages of a public model's checkpoints would have given. Nothing is trained."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

import lawa_core
from lab.hf import hf_config, load_state, save_hf
from lab.statistics import LEVEL, MARGIN, Difference
from lawa_core import LawaError
from model import (
    BLOCKS,
    Corpus,
    GPTConfig,
    empty_model,
    evaluate_trajectory,
    gpt_config,
    open_corpus,
    pick_device,
)


def export_steps(run, dtype=torch.float16) -> Path:
    """A run's checkpoints as Hugging Face folders RUN/hub/step<N>/, as a public model's revisions
    are. Those already there are kept. Returns RUN/hub."""
    run = Path(run)
    config = json.loads((run / "config.json").read_text())
    shape = gpt_config(config["preset"], open_corpus(config["corpus"]).vocab_size)
    trajectory = lawa_core.open_trajectory(run)
    for step in trajectory.steps:
        folder = run / "hub" / f"step{step}"
        if not (folder / "config.json").exists():  # the last file written
            state = {name: tensor.to(dtype) for name, tensor in trajectory[step].items()}
            save_hf(folder, shape, state)
    return run / "hub"


def replay(source, schemes, corpus: Corpus, at=None, *, n_blocks: int = BLOCKS,
           device: str = "auto", on_disk: bool = False, cache=None, each=None) -> list[dict]:
    """Losses of a public model's checkpoints, and of averages along them.

    One model is on the device, in float16 where that is CUDA and the files are.
    Args: source: a trajectory of Hugging Face step folders, such as `open_hub` returns, or what
    `lawa_core.open_trajectory` takes; corpus: text in the model's own tokens; the other arguments
    and the rows returned are those of `model.evaluate_trajectory`; states that `each` is called
    with have Hugging Face's names. Errors: LawaError for text in other tokens than the model's.
    """
    trajectory = lawa_core.open_trajectory(source)
    device = pick_device(device)
    like = trajectory.config_dir()
    config = hf_config(like)
    _check_tokens(corpus, config, like / "tokenizer.json")
    fields = json.loads((like / "config.json").read_text())
    half = "float16" in (fields.get("dtype"), fields.get("torch_dtype"))  # of the files
    dtype = torch.float16 if half and device.type == "cuda" else torch.float32
    return evaluate_trajectory(
        trajectory, schemes, at, n_blocks, device.type, model=empty_model(config, device, dtype),
        corpus=corpus, load=load_state, each=each, on_disk=on_disk, cache=cache,
    )


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


def _check_tokens(corpus: Corpus, config: GPTConfig, tokenizer: Path) -> None:
    """Refuse text in other tokens than the model's: its losses would look like losses."""
    expected = corpus.meta.get("tokenizer_sha256")
    other = corpus.vocab_size > config.vocab_size
    if expected and tokenizer.exists():
        other = other or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != expected
    if other:
        raise LawaError(f"{corpus.name} is not in this model's tokens; "
                        f"prepare the text again with --tokenizer {tokenizer}")


def zero_shot(folder, tasks: list[str], *, device: str = "cpu", **options) -> list[dict]:
    """Accuracy of a Hugging Face folder on tasks of lm-evaluation-harness.

    options: what lm_eval's `simple_evaluate` takes besides, such as limit, task_manager.
    Returns rows {"task", "accuracy", "stderr"}. Needs the extra `zeroshot`.
    """
    try:
        import lm_eval
    except ImportError:
        raise LawaError('zero-shot tasks need lm_eval: pip install "lawa-lab[zeroshot]"') from None
    source = {"pretrained": str(folder), "dtype": "float16" if device == "cuda" else "float32"}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=source, tasks=tasks, device=device, **options
    )
    rows = []
    for task, values in found["results"].items():
        row = {"task": task, "accuracy": values["acc,none"], "stderr": values["acc_stderr,none"]}
        rows.append(row)
    return rows
