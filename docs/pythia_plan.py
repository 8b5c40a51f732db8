"""Print what replays of Pythia take, from the models' shapes alone: the numbers of docs/pythia.md.

    python docs/pythia_plan.py

Fetches nothing. The sizes are those of float16 weights and of the buffers that Pythia's files hold;
the notebook prints the plan from the Hub's own list.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.hub import HubTrajectory, span  # noqa: E402
from lawa_core import lawa, newest  # noqa: E402
from model import count_parameters, gpt_config  # noqa: E402

REPLAYS = (  # model, points, window on disk
    ("pythia-1b-deduped", "103000:143000:1000", False),
    ("pythia-12b-deduped", "103000:143000:10000", True),
    ("pythia-12b-deduped", "103000:143000:1000", True),
)
K, SPACING = 5, 1000  # window; steps between its checkpoints
TOKENS = 1_000_000  # evaluated per model
RATE = 100e6  # bytes per second


def main() -> None:
    for name, text, on_disk in REPLAYS:
        config = gpt_config(name, 50_277)
        parameters, _ = count_parameters(config)
        # Two bytes per parameter, and in every layer a mask of uint8 and a few values.
        buffers = config.block_size**2 + 2 + config.rotary_width
        size = 2 * parameters + config.n_layer * buffers

        targets = list(span(text))
        steps = sorted({t - j * SPACING for t in targets for j in range(K)})
        files = {"model.safetensors": SimpleNamespace(size=size)}
        trajectory = HubTrajectory(name, dict.fromkeys(steps, ("", files)), "nowhere")
        schemes = {"run": newest(), "lawa": lawa(K, SPACING)}
        plan = trajectory.plan(schemes, targets, on_disk, RATE)
        models = len(schemes) * len(targets)
        print(
            f"{name} {text}: {plan['revisions']} revisions of {size / 1e9:.2f} GB, "
            f"{plan['fetch_bytes'] / 1e9:,.0f} GB to fetch "
            f"({plan['hours']:.1f} hours at {RATE / 1e6:.0f} MB/s), "
            f"at most {plan['disk_bytes'] / 1e9:.1f} GB on disk, "
            f"{plan['memory_bytes'] / 1e9:.1f} GB of checkpoints in memory, "
            f"{2 * parameters / 1e9:.1f} GB on the GPU before activations, "
            f"{models} models and {2 * parameters * TOKENS * models:.1e} FLOPs "
            f"for {TOKENS:,} tokens each"
        )


if __name__ == "__main__":
    main()
