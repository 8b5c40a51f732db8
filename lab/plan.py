"""What runs cost before they are trained: `python -m lab.plan --scale gpt2-small`."""
from __future__ import annotations

import argparse
import math
import os
import shutil
import sys

import lawa_core
import model
from lawa_core import LawaError

# sustained FLOP/s and memory in GB: for GPUs 40% of the dense bf16 peak on the maker's data sheet,
# for CPU cores measured
DEVICES = {
    "two CPU cores": (120e9, 16), "RTX 4090": (66e12, 24),
    "A100": (125e12, 80), "H100": (396e12, 80)}

# copies of the weights in float32 that an average kept while training takes: SWA sums in double,
# LAWA's window lies on the CPU
COPIES = {lawa_core.ema: 1, lawa_core.swa: 2, lawa_core.lawa: 0}


def cost(config: model.Config, vocab_size: int = 50_257, keep=None,
         disk_budget: float = math.inf) -> dict:
    """What a run takes: parameters, tokens, flops, memory ({part: bytes}) and checkpoint_bytes.

    FLOPs: 6 per parameter and token, and 12 L C T per token for attention (PaLM's count).
    Activations: 34 bytes per token, layer and unit of width in bf16 (arXiv 2205.05198, without
    attention scores), twice that in fp32, and the logits with their gradient.
    keep, disk_budget: as for `model.train`.
    """
    shape = model.gpt_config(config.preset, vocab_size)
    every, counted = model.count_parameters(shape)  # without position embeddings
    tokens = config.tokens_per_step * (config.max_iters - config.init_step)
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size

    wide = 1 if config.dtype == "bf16" else 2
    micro = config.batch_size * shape.block_size  # tokens of a micro-batch
    averages = sum(COPIES[type(scheme)] for scheme in config.online.values())
    memory = {
        "weights": 4 * every, "gradients": 4 * every, "AdamW": 8 * every,
        "averages": 4 * every * averages,
        "activations": micro * shape.n_layer * shape.n_embd * 34 * wide,
        "logits": micro * shape.vocab_size * (4 + 4 * wide)}

    kept = model.kept_steps(config, vocab_size, keep, disk_budget)
    disk = len(kept) * model.checkpoint_bytes(config, vocab_size)
    flops = tokens * (6 * counted + attention)
    return {"parameters": counted, "tokens": tokens, "flops": flops, "memory": memory,
            "checkpoint_bytes": disk}


def plan(configs, keep=None, disk_budget: float = math.inf) -> str:
    """A few lines: what runs take, time on common devices, whether disk and memory suffice here.

    keep, disk_budget: as for `model.train`.
    """
    device = model.pick_device()
    configs = [config.resolved(device) for config in configs]
    costs = [cost(config, _vocab_size(config.corpus), keep, disk_budget) for config in configs]
    flops = sum(c["flops"] for c in costs)
    tokens = sum(c["tokens"] for c in costs)
    disk = sum(c["checkpoint_bytes"] for c in costs)
    parameters = max(c["parameters"] for c in costs)
    parts = max((c["memory"] for c in costs), key=lambda parts: sum(parts.values()))
    memory = sum(parts.values())

    there = _nearest_folder(model.RUNS)
    free = shutil.disk_usage(there).free
    installed = _memory(device)
    times = []
    for name, (rate, size) in DEVICES.items():
        small = " (too small)" if memory > size * 1e9 else ""
        times.append(f"{_duration(flops / rate)} on {name} at {rate / 1e12:g} TFLOP/s{small}")
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    room = fits = "enough"
    if disk > free:
        room = "NOT ENOUGH; raise ckpt_interval, or set disk_budget and keep"
    if memory > installed:
        fits = "NOT ENOUGH; lower batch_size"
    runs = "1 run" if len(costs) == 1 else f"{len(costs)} runs"
    return "\n".join([
        f"{runs}: up to {parameters / 1e6:.2f}M parameters in {configs[0].dtype}, "
        f"{tokens / 1e6:,.1f}M tokens, {flops:.2e} FLOPs in all",
        f"time: about {', '.join(times)}",
        f"disk: {disk / 1e9:.2f} GB of checkpoints, {free / 1e9:.0f} GB free: {room}",
        f"memory: {memory / 1e9:.2f} GB ({listed}), "
        f"{installed / 1e9:.0f} GB on this {device.type}: {fits}"])


def _vocab_size(corpus: str) -> int:
    try:
        return model.open_corpus(corpus).vocab_size
    except LawaError:  # not prepared yet: GPT-2's
        return 50_257


def _nearest_folder(path):
    """The folder, or the one above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _memory(device) -> int:
    """Bytes: free on a GPU, installed for a CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m lab.plan", description=__doc__)
    model.add_config_flags(parser)
    args = vars(parser.parse_args(argv))
    try:
        config = model.take_config(args)
        print(plan([config], **args))
    except LawaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
