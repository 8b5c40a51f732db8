"""Print what replays of Pythia take, from the models' shapes alone: the tables of docs/pythia.md.

    python docs/pythia_plan.py            # prints them
    python docs/pythia_plan.py --write    # renews them in docs/pythia.md, between its marks

Fetches nothing. The sizes are those of float16 weights and of the buffers that Pythia's files hold;
`python -m lab.replay ... --dry-run` prints the plan from the Hub's own list.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.hub import RATE, span  # noqa: E402
from model import count_parameters, gpt_config  # noqa: E402

SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")  # pythia-...-deduped
SECTIONS = {
    "early": "1000,30000,1000",
    "middle": "31000,102000,1000",
    "late": "103000,143000,1000",
    "whole run": "1000,143000,1000",
}
K, SPACING = 5, 1000  # checkpoints in the window; steps between them
MODELS = 4  # evaluated at each point: run, LAWA, EMA, SWA
TOKENS = 1_000_000  # evaluated per model
FLOPS = 0.4 * 989e12  # a second: 40%, an assumption, of an H100's dense bf16 in NVIDIA's data sheet
VOCABULARY = 50_277  # of Pythia's tokenizer; the models pad it
BEGIN, END = "<!-- begin plan -->", "<!-- end plan -->"


def sizes(model: str) -> tuple[int, int]:
    """(parameters, bytes of one revision) of a preset."""
    config = gpt_config(model, VOCABULARY)
    parameters, _ = count_parameters(config)
    # Two bytes per parameter, and in every layer a mask of uint8 and a few values.
    buffers = config.block_size**2 + 2 + config.rotary_width
    return parameters, 2 * parameters + config.n_layer * buffers


def revisions(points: range) -> set[int]:
    """The steps that are fetched: the points and their windows; step 0 is left out."""
    window = {point - i * SPACING for point in points for i in range(K)}
    return {step for step in window if step > 0}


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 10e9 else f"{size / 1e9:,.0f}"


def hours(seconds: float) -> str:
    if seconds < 0.05 * 3600:
        return "< 0.1"
    return f"{seconds / 3600:.1f}" if seconds < 10 * 3600 else f"{seconds / 3600:,.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> str:
    """One table of what does not depend on the points, and one of what does."""
    fixed, work = [], []
    for size in SIZES:
        parameters, copy = sizes(f"pythia-{size}")
        alone = (K + 3) * copy  # the window and three copies more
        running = 2 * 2 * 4 * parameters  # EMA and SWA: two files each, float32
        point = MODELS * 2 * parameters * TOKENS  # two operations per parameter and token
        seconds = point / FLOPS
        fixed.append([
            size, f"{parameters / 1e6:,.0f}M", f"{copy / 1e9:.2f}", gigabytes(alone + running),
            gigabytes(alone), gigabytes(3 * copy), gigabytes(2 * parameters), f"{point:.1e}",
        ])
        cells = []
        for text in SECTIONS.values():
            points = span(text)
            fetched = len(revisions(points)) * copy
            cells.append(f"{gigabytes(fetched)} GB: {hours(fetched / RATE)} h, "
                         f"{hours(len(points) * seconds)} h")
        work.append([size, *cells])
    heads = []
    for name, text in SECTIONS.items():
        points = span(text)
        heads.append(f"{name}: {len(points)} points, {len(revisions(points))} revisions")
    return "\n\n".join([
        table(["pythia-…-deduped", "parameters", "one revision, GB", "disk at most, GB",
               "the same `--alone`, GB", "host memory of averages, GB",
               "weights on the GPU, GB", "FLOPs a point"], fixed),
        table(["pythia-…-deduped", *heads], work),
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew them in docs/pythia.md")
    text = tables()
    if not parser.parse_args().write:
        print(text)
        return
    page = ROOT / "docs" / "pythia.md"
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        sys.exit(f"error: {page} must hold {BEGIN} and {END}, once each")
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
