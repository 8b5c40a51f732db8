"""Runs the notebooks as jobs through submitit: on Slurm where there is one, else as processes here.

    pip install submitit
    python docs/submit.py --gpus 1 --hours 24 -- --scale gpt2-small
    python docs/submit.py --local -- --scale smoke --only lr_sweep

What follows `--` goes to `run_all.sh --list`, which prints one self-contained command per notebook;
each is a job. Jobs that need the same run find it: one trains, the others wait. Exit status 1 if
any failed.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import submitit

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--local", action="store_true", help="processes of this machine, also where there is Slurm"
    )
    parser.add_argument("--gpus", type=int, default=0, help="per job (default 0)")
    parser.add_argument("--cpus", type=int, default=2, help="per job (default 2)")
    parser.add_argument("--hours", type=float, default=2, help="per job (default 2)")
    parser.add_argument(
        "--logs", type=Path, default=ROOT / "results" / "jobs", help="folder of the jobs' output"
    )
    parser.add_argument("options", nargs="*", help="for run_all.sh, after --")
    args = parser.parse_args()
    listed = subprocess.run(
        [ROOT / "run_all.sh", *args.options, "--list"], check=True, capture_output=True, text=True
    )
    executor = submitit.AutoExecutor(folder=args.logs, cluster="local" if args.local else None)
    executor.update_parameters(
        timeout_min=round(args.hours * 60),
        cpus_per_task=args.cpus,
        gpus_per_node=args.gpus,
        name="lawa-lab",
    )
    jobs = {
        line: executor.submit(submitit.helpers.CommandFunction(shlex.split(line)))
        for line in listed.stdout.splitlines()
    }
    failed = 0
    for line, job in jobs.items():
        error = job.exception()
        failed += error is not None
        print(f"{'FAILED' if error else 'done  '} job {job.job_id}: {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
