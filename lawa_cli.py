"""The averager's command line: inspect, average, sweep, search, export (`lawa --help`)."""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lawa_core import (
    ALLOW,
    FLOATS,
    JobFailed,
    LawaError,
    Progress,
    Trajectory,
    _positive,
    average_files,
    check,
    in_steps,
    itemsize,
    lawa,
    newest,
    open_trajectory,
    parse_scheme,
    save,
    scheme_dir,
    search,
    swa,
    sweep_files,
)
from lawa_mix import TILE, _finite, _tiles, _widen

EXAMPLES = """examples
  lawa inspect runs/my-run                                       what is there, what is wrong with it
  lawa average ckpt_800.pt ckpt_900.pt ckpt_1000.pt -o avg.pt    the mean of these three
  lawa average runs/my-run -k 5 --spacing 1000 -o avg.safetensors
  lawa average runs/my-run --scheme "ema(beta=0.99)" --at 20000 --dtype BF16 -o hf-folder
  lawa sweep runs/my-run --scheme "lawa(k=5, spacing=1000)" --scheme "decay(window=5000)" --every 1000 -o averages
  lawa search runs/my-run --command "python validate.py {}"      the best window; the command prints the loss, or one per block
  lawa export averages/lawa/ckpt_20000.safetensors --like hf-folder -o new-hf-folder

what an average does: inputs are never changed. Names and shapes must agree; float tensors are averaged in double precision and rounded
once; integer tensors come from the newest checkpoint; tied tensors stay tied. NaN, Inf, identical checkpoints and averages among the
inputs are refused (--allow). The output appears under its name when it is whole; stopped, the same command goes on where it was.

schemes (steps are read from the names; every=, spacing=, start=, window= in steps)
  lawa(k=5, spacing=100)                  mean of the k latest checkpoints, spacing apart; without spacing the k latest there are
  swa(start=0, every=10)                  mean of everything since start
  ema(beta=0.99)                          e <- beta e + (1 - beta) w over the checkpoints
  decay(window=1000, shape='1-sqrt')      weights that act like a learning-rate decay; shapes linear, cosine, 1-sqrt
  explicit([0.2, 0.8])                    these weights, the last for the newest, divided by their sum
  newest                                  one checkpoint as it is

exit status: 0 done, 1 the job failed or inspect found problems, 2 bad usage or input, 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise LawaError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lawa", description="Average the checkpoints of a training run.", epilog=EXAMPLES,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *groups):
        sub = commands.add_parser(name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = sub.add_argument
        add("inputs", nargs="+", metavar="CKPT", help="checkpoints (.safetensors, .pt, Hugging Face or torch distributed folders), or one "
            "run folder or glob of them; steps are read from the names")
        add("--key", help="where a nested .pt holds its weights (default: model, state_dict, module, or at the top)")
        add("--json", action="store_true", help="print the result as JSON")
        if "scheme" in groups:
            add("--scheme", action="append", default=[], help="how to average, see below (default: the uniform mean of all inputs)")
            add("-k", "--k", type=int, help="short for --scheme lawa: checkpoints in the window")
            add("--spacing", type=int, help="with -k or --weights: steps between the checkpoints (default: the latest there are)")
            add("--weights", help="short for --scheme explicit: weights, oldest first, as 0.2,0.3,0.5 (divided by their sum)")
            add("--tokens-per-step", type=int, help="durations are given in tokens, this many per step")
        if "at" in groups:
            add("--at", type=int, help="the step to average at (default: the newest)")
        if "output" in groups:
            add("-o", "--out", required=True, help="FILE.safetensors, FILE.pt or a new Hugging Face folder; for sweep a folder")
            add("--dtype", type=str.upper, choices=FLOATS, help="type of the float tensors written (default: the newest input's)")
            add("--like", help="Hugging Face folder to copy config and tokenizer from (default: the newest input, if it is one)")
            add("--max-shard", type=float, default=5, help="GB per shard of a Hugging Face folder (default 5)")
            add("--threads", type=int, help="default: one per core")
            add("--allow", action="append", default=[], choices=ALLOW, help="average in spite of NaN or Inf, byte-identical checkpoints, "
                "averages among the inputs")
        return add
    command("inspect", "Show a trajectory: steps, sizes, types, how far the weights moved, problems. Reads every byte once.")
    command("average", "Write one average of checkpoints.", "scheme", "at", "output")
    add = command("sweep", "Write the averages of several schemes at many steps, in one pass over the checkpoints.", "scheme", "output")
    add("--every", type=int, default=1, help="average at the steps that are multiples of this (default: every checkpoint)")
    add = command("search", "Find the best LAWA window with a validation command.", "at")
    add("--command", dest="run", required=True, help="program with {} for the checkpoint's path; prints the loss, or one per block, last")
    add("--budget", type=int, default=12, help="evaluations at most (default 12)")
    command("export", "Write one checkpoint as a Hugging Face folder.", "at", "output")
    return parser


def _schemes(args) -> dict[str, Callable]:
    """{name: scheme} from the command line; the names are folder names."""
    if args.command == "export":
        return {"newest": newest()}
    if bool(args.scheme) + (args.k is not None) + (args.weights is not None) > 1:
        raise LawaError("expected only one of --scheme, --k and --weights, got more")
    if args.spacing is not None and args.k is None and args.weights is None:
        raise LawaError("--spacing goes with --k or --weights; a --scheme has its own, as in lawa(k=5, spacing=100)")
    schemes = {scheme_dir(text): parse_scheme(text) for text in args.scheme}
    if args.weights is not None:
        schemes["explicit"] = parse_scheme(f"explicit([{args.weights}], spacing={args.spacing})")
    if args.k is not None:
        schemes["lawa"] = lawa(args.k, args.spacing)
    if args.tokens_per_step is not None:
        schemes = {name: in_steps(scheme, args.tokens_per_step) for name, scheme in schemes.items()}
    return schemes or {"mean": swa()}


def _inspect(trajectory: Trajectory) -> dict:
    """What `lawa inspect` shows. moved: norm of the difference to the checkpoint before, relative to the norm. Reads every byte once."""
    opened = {}
    for step in trajectory.steps:
        with contextlib.suppress(LawaError):  # check lists what cannot be opened
            opened[step] = trajectory[step]
    norms, moves, problems, progress, done = dict.fromkeys(opened, 0.0), dict.fromkeys(opened, 0.0), {}, Progress(), 0
    entries = opened[max(opened)].entries if opened else {}
    for name, start, stop in _tiles({name: entry for name, entry in entries.items() if entry.dtype in FLOATS}, TILE // 8):
        before = None
        for step, checkpoint in opened.items():
            entry = checkpoint.entry(name) if name in checkpoint else None
            if entry is None or entry.shape != entries[name].shape or entry.dtype not in FLOATS:
                continue
            raw = entry.read(start * itemsize(entry.dtype), stop * itemsize(entry.dtype))
            values = _widen(raw, entry.dtype).astype(np.float64)
            if not _finite(raw, entry.dtype):
                problems[f"{entry.path}: {name} holds NaN or Inf"] = True
            norms[step] += float(values @ values)
            moves[step] += 0.0 if before is None else float((values - before) @ (values - before))
            before, done = values, done + len(raw)
        progress(done, max(done, sum(checkpoint.nbytes for checkpoint in opened.values())))
    rows = [{"step": step, "bytes": checkpoint.nbytes, "parameters": sum(entry.numel for entry in checkpoint.entries.values()),
             "dtypes": sorted(set(checkpoint.dtypes.values())), "norm": math.sqrt(norms[step]) if math.isfinite(norms[step]) else None,
             "moved": math.sqrt(moves[step] / norms[step]) if 0 < norms[step] < math.inf and step > min(opened) else None}
            for step, checkpoint in opened.items()]
    return {"trajectory": trajectory.name, "checkpoints": rows, "problems": check(trajectory) + list(problems)}


def _validate(command: str) -> Callable[[dict], list[float]]:
    """An `evaluate` that runs the command on a checkpoint file, without a shell, and reads the numbers of its last line."""
    words = shlex.split(command)
    if not any("{}" in word for word in words):
        raise LawaError(f"--command needs {{}} where the checkpoint's path goes, got {command!r}")

    def evaluate(state):
        with tempfile.TemporaryDirectory() as folder:
            save(path := Path(folder) / "candidate.safetensors", state)
            done = subprocess.run([word.replace("{}", str(path)) for word in words], capture_output=True, text=True)
        numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf", (done.stdout.strip().splitlines() or [""])[-1])
        if done.returncode or not numbers:
            said = (done.stderr or done.stdout).strip()[-200:]
            raise JobFailed(f"the validation command exited with {done.returncode} and printed {said!r}")
        return [float(number) for number in numbers]
    return evaluate


def _run(args) -> dict:
    trajectory = open_trajectory(args.inputs[0] if len(args.inputs) == 1 else args.inputs, args.key)
    if args.command == "inspect":
        return _inspect(trajectory)
    if args.command == "search":
        found = search(trajectory, _validate(args.run), args.at, args.budget)
        return found | {"best": str(found["best"])}
    schemes = _schemes(args)
    options = {"dtype": args.dtype, "threads": args.threads, "allow": args.allow, "like": args.like, "progress": Progress(),
               "max_shard": int(args.max_shard * 1e9)}
    if args.command == "sweep":
        _positive(every=args.every)
        return sweep_files(trajectory, schemes, [step for step in trajectory.steps if step % args.every == 0], args.out, **options)
    if len(schemes) > 1:
        raise LawaError(f"average writes one average, got {len(schemes)} schemes; use sweep")
    scheme, = schemes.values()
    return average_files(trajectory, {args.out: (scheme, trajectory.steps[-1] if args.at is None else args.at)}, **options)


def _show(result: dict) -> None:
    for line in result.get("checkpoints", []):
        moved = "-" if line["moved"] is None else f"{line['moved']:.2e}"
        print(f"step {line['step']:>9}  {line['bytes'] / 1e6:>10.1f} MB  {line['parameters']:>13,} values  "
              f"{','.join(line['dtypes'])}  moved {moved}")
    for line in result.get("trials", []):
        print(f"loss {line['loss']:.5f}  gain {line['gain']:+.5f}  {line['scheme']}")
    for line in result.get("outputs", []):
        print(f"{line['path']}: {line['scheme']} at step {line['at']}, {len(line['weights'])} checkpoints")
    if "seconds" in result:
        print(f"read {result['bytes_read'] / 1e9:.2f} GB, wrote {result['bytes_written'] / 1e9:.2f} GB in {result['seconds']:.2f} s")
    if "sure" in result:
        print(f"best: {result['best']}; {result['sure']}")
    for problem in result.get("problems", []):
        print(f"problem: {problem}")


def main(argv=None) -> int:
    try:
        args = _parser().parse_args(argv)
        result = _run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except (LawaError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, LawaError) and not isinstance(error, JobFailed) else 1
    print(json.dumps(result, indent=1)) if args.json else _show(result)
    return 1 if result.get("problems") else 0


if __name__ == "__main__":
    sys.exit(main())
