"""Print what replays of Pythia take, from the models' shapes alone: the numbers of docs/pythia.md. Fetches nothing.

    python docs/plan.py

The sizes are those of float16 weights and of the buffers that Pythia's files hold; the notebook prints the plan from the Hub's own list.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpt  # noqa: E402
import lawa_core  # noqa: E402
import lawa_hub  # noqa: E402

REPLAYS = (
    ("pythia-1b-deduped", "103000:143000:1000", False, 1_000_000),
    ("pythia-12b-deduped", "103000:143000:10000", True, 1_000_000),
    ("pythia-12b-deduped", "103000:143000:1000", True, 1_000_000),
)
K, SPACING, RATE = 5, 1000, 100e6  # window, its steps, bytes per second


def copy_bytes(config) -> int:
    """Bytes of one revision: two per parameter, and in every layer a mask of uint8 and a few values."""
    return 2 * gpt.blank(config, "meta").size() + config.n_layer * (
        config.block_size**2 + 2 + config.rotary_width
    )


def main() -> None:
    for name, text, on_disk, tokens in REPLAYS:
        config, targets = gpt.preset(name, 50_277), list(lawa_hub.span(text))
        steps = sorted({t - j * SPACING for t in targets for j in range(K)})
        file = SimpleNamespace(size=copy_bytes(config))
        trajectory = lawa_hub.HubTrajectory(
            name,
            {step: ("", {"model.safetensors": file}) for step in steps},
            "nowhere",
            (),
            False,
            None,
        )
        plan = trajectory.plan(
            {"run": lawa_core.newest(), "lawa": lawa_core.lawa(K, SPACING)}, targets, on_disk, RATE
        )
        parameters, models = gpt.blank(config, "meta").size(), 2 * len(targets)
        print(
            f"{name} {text}: {plan['revisions']} revisions of {file.size / 1e9:.2f} GB, {plan['fetch_bytes'] / 1e9:,.0f} GB to fetch "
            f"({plan['hours']:.1f} hours at {RATE / 1e6:.0f} MB/s), at most {plan['disk_bytes'] / 1e9:.1f} GB on disk, "
            f"{plan['memory_bytes'] / 1e9:.1f} GB of checkpoints in memory, {2 * parameters / 1e9:.1f} GB on the GPU before activations, "
            f"{models} models and {2 * parameters * tokens * models:.1e} FLOPs for {tokens:,} tokens each"
        )


if __name__ == "__main__":
    main()
