"""What runs cost before they are trained: `python -m lab.plan --scale gpt2-small`."""
from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from dataclasses import dataclass

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
         disk_budget: float = math.inf, states: int = 1) -> dict:
    """What a run takes: parameters, tokens, flops; in bytes checkpoint_bytes, state_bytes, and
    memory and host ({part: bytes}), on the device and on the CPU beside it.

    FLOPs: 6 per parameter and token, and 12 L C T per token for attention (PaLM's count).
    Activations: 34 bytes per token, layer and unit of width in bf16 (arXiv 2205.05198, without
    attention scores), twice that in fp32, and the logits with their gradient.
    keep, disk_budget: as for `model.train`; states: files of its whole state, averages included.
    """
    shape = model.gpt_config(config.preset, vocab_size)
    every, counted = model.count_parameters(shape)  # without position embeddings
    tokens = config.tokens_per_step * (config.max_iters - config.init_step)
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size

    wide = 1 if config.dtype == "bf16" else 2
    micro = config.batch_size * shape.block_size  # tokens of a micro-batch
    schemes = config.online.values()
    averages = sum(COPIES[type(scheme)] for scheme in schemes)
    windows = sum(scheme.k for scheme in schemes if isinstance(scheme, lawa_core.lawa))
    memory = {
        "weights": 4 * every, "gradients": 4 * every, "AdamW": 8 * every,
        "averages": 4 * every * averages,
        "activations": micro * shape.n_layer * shape.n_embd * 34 * wide,
        "logits": micro * shape.vocab_size * (4 + 4 * wide)}
    # of what is being written there is a copy
    host = {"LAWA's windows": 4 * every * windows, "files": 4 * every * (1 + len(schemes))}

    kept = model.kept_steps(config, vocab_size, keep, disk_budget)
    disk = model.disk_bytes(config, vocab_size, kept)
    state = 4 * every * (3 + averages + windows)  # weights, AdamW's two moments
    flops = tokens * (6 * counted + attention)
    return {"parameters": counted, "tokens": tokens, "flops": flops, "memory": memory,
            "host": host, "checkpoint_bytes": disk, "state_bytes": states * state}


@dataclass(frozen=True)
class Plan:
    """What runs take and what is there; as text, a few lines. Sizes in bytes."""
    runs: int
    dtype: str
    parameters: int  # of the largest
    tokens: int
    flops: float
    checkpoints: int  # on disk, as are
    states: int
    written: int  # of them already
    free: int
    memory: dict  # {part: bytes} of the run that takes most
    host: dict
    jobs: int  # runs at a time
    device: str
    installed: int  # memory: of the device
    ram: int

    @property
    def disk(self) -> int:
        """What is still to be written."""
        return max(self.checkpoints + self.states - self.written, 0)

    @property
    def needed(self) -> int:
        """Memory on the device; a GPU has one run, a CPU has `jobs` with what they keep beside."""
        there = sum(self.memory.values())
        return there if self.device == "cuda" else self.jobs * (there + sum(self.host.values()))

    @property
    def lacking(self) -> dict[str, str]:
        """What is not enough, of "disk", "memory" and "host memory": what is needed, what is there,
        what to do. Empty where all is."""
        found = {}
        if self.disk > self.free:
            found["disk"] = (
                f"{self.disk / 1e9:.1f} GB of checkpoints and states are to be written, "
                f"{self.free / 1e9:.1f} GB are free: raise ckpt_interval or set disk_budget (GB a "
                "run)")
        if self.needed > self.installed:
            found["memory"] = (
                f"{self.needed / 1e9:.1f} GB are needed, {self.installed / 1e9:.1f} GB are there: "
                "lower batch_size and raise gradient_accumulation_steps as much")
        host = self.jobs * sum(self.host.values())
        if self.device == "cuda" and host > self.ram:
            found["host memory"] = (
                f"{host / 1e9:.1f} GB are needed, {self.ram / 1e9:.1f} GB are there: keep fewer "
                "averages, or fewer runs at a time")
        return found

    def __str__(self) -> str:
        times = []
        parts = {name: size for name, size in self.memory.items() if size}
        memory = sum(parts.values())
        for name, (rate, size) in DEVICES.items():
            small = " (too small)" if memory > size * 1e9 else ""
            times.append(
                f"{duration(self.flops / rate)} on {name} at {rate / 1e12:g} TFLOP/s{small}")
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        beside = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.host.items() if size)
        room = fits = "enough"
        if "disk" in self.lacking:
            room = "NOT ENOUGH; raise ckpt_interval, or set disk_budget and keep"
        if {"memory", "host memory"} & set(self.lacking):
            fits = "NOT ENOUGH; lower batch_size, or runs at a time"
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs, {self.jobs} at a time"
        each = "" if self.runs == 1 else " a run"
        written = f" ({self.written / 1e9:.2f} GB of them there)" if self.written else ""
        return "\n".join([
            f"{runs}: up to {self.parameters / 1e6:.2f}M parameters in {self.dtype}, "
            f"{self.tokens / 1e6:,.1f}M tokens, {self.flops:.2e} FLOPs in all",
            f"time: about {', '.join(times)}",
            f"disk: {self.checkpoints / 1e9:.2f} GB of checkpoints, {self.states / 1e9:.2f} GB of "
            f"states{written}, {self.free / 1e9:.0f} GB free: {room}",
            f"memory{each}: {memory / 1e9:.2f} GB ({listed}), beside it on the CPU {beside}; "
            f"{self.installed / 1e9:.0f} GB on this {self.device}: {fits}"])


def smallest(configs, keep) -> int:
    """The least disk_budget of `model.train`, in bytes, that holds what `keep` needs in each run.
    """
    sizes = []
    for config in configs:
        steps = config.checkpoint_steps
        needed = lawa_core.row(keep, steps, steps[-1])
        sizes.append(model.disk_bytes(config, _vocab_size(config.corpus), needed))
    return max(sizes)


def plan(configs, keep=None, disk_budget: float = math.inf, states: int = 1, jobs: int = 1) -> Plan:
    """What these runs take, from where they are.

    keep, disk_budget: as for `model.train`; states: files of a run's state; jobs: runs at a time.
    """
    device = model.pick_device()
    configs = [config.resolved(device) for config in configs]
    costs = [cost(config, _vocab_size(config.corpus), keep, disk_budget, states)
             for config in configs]

    def memory(cost: dict) -> int:
        return sum(cost["memory"].values())
    largest = max(costs, key=memory)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Plan(
        runs=len(costs), dtype=configs[0].dtype, parameters=max(c["parameters"] for c in costs),
        tokens=sum(c["tokens"] for c in costs), flops=sum(c["flops"] for c in costs),
        checkpoints=sum(c["checkpoint_bytes"] for c in costs),
        states=sum(c["state_bytes"] for c in costs), written=sum(map(_written, configs)),
        free=shutil.disk_usage(_nearest_folder(model.RUNS)).free, memory=largest["memory"],
        host=largest["host"], jobs=min(jobs, len(costs)), device=device.type,
        installed=_memory(device, ram), ram=ram)


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


def _written(config: model.Config) -> int:
    """Bytes that an interrupted run has on disk, links to another's files too."""
    try:
        folder = model.run_dir(config)
    except LawaError:  # the corpus is not prepared
        return 0
    files = [*folder.rglob("ckpt_*.safetensors"), *folder.glob("*.pt")]
    return sum(file.stat().st_size for file in files)


def _memory(device, ram: int) -> int:
    """Bytes: free on a GPU, installed for a CPU."""
    if device.type == "cuda":
        import torch
        return torch.cuda.mem_get_info()[0]
    return ram


def duration(seconds: float) -> str:
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
