"""lab/plan.py: what runs cost, against the paper's numbers, and the command that prints it."""

import pytest

import model
from lab import plan

# tokens per step, checkpoint interval, usual rate, high rate, final rate of the high one
PAPER = {
    "gpt2-small": (393_216, 200, 6e-4, 6e-3, 6e-4),
    "gpt2-medium": (147_456, 2000, 3e-4, 3e-3, 3e-4),
    "gpt2-large": (49_152, 1000, 2e-4, 2e-3, 1e-5),
}


@pytest.fixture
def command(capsys):
    """`python -m lab.plan ARGV...`: (exit status, stdout, stderr)."""

    def run(*argv):
        status = plan.main(list(argv))
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_scales(name):
    tokens, interval, usual, high, final = PAPER[name]
    config = model.scale_config(model.scale_values(name))
    found = (config.preset, config.corpus, config.lr, config.ckpt_interval)
    assert found == (name, "openwebtext", usual, interval)
    assert (config.max_iters, config.warmup_iters, config.schedule) == (70_000, 2000, "cosine")
    optimizer = (config.beta1, config.beta2, config.weight_decay, config.grad_clip)
    assert optimizer == (0.9, 0.95, 0.1, 1.0)
    sequences = config.batch_size * config.gradient_accumulation_steps
    assert sequences * 1024 == config.tokens_per_step == tokens
    swept = model.scale_config(model.scale_values(name), lr=high)
    assert model.learning_rate(swept, 70_000) == pytest.approx(final, rel=1e-6)
    cost = plan.cost(config, 50_257)
    assert cost["tokens"] == 70_000 * tokens
    # attention comes on top
    assert cost["flops"] == pytest.approx(6 * cost["parameters"] * cost["tokens"], rel=0.35)


@pytest.mark.parametrize("name", model.SCALES)
def test_every_scale_is_consistent(name, command):
    values = model.scale_values(name)
    config = model.scale_config(values)
    assert values["spacing"] % config.ckpt_interval == 0 and values["k"] >= 1
    # a full window past the warm-up
    assert config.warmup_iters + (values["k"] - 1) * values["spacing"] < config.max_iters
    status, out, err = command("--scale", name)
    assert (status, err) == (0, "")
    words = ("parameters", "tokens", "FLOP", "time:", "disk:", "memory:")
    assert [word for word in words if word not in out] == []


def test_the_plan_follows_the_flags(command):
    small = command("--scale", "gpt2-small")[1]
    assert small != command("--scale", "gpt2-small", "--max_iters", "35000")[1]
    kept = ("--keep", "lawa(k=5, spacing=200)", "--disk_budget", "5")
    assert "NOT ENOUGH; raise" not in command("--scale", "gpt2-small", *kept)[1]


def test_the_plan_of_several_runs_is_their_sum():
    """With GPT-2's vocabulary for a corpus that is not prepared yet."""
    config = model.scale_config(model.scale_values("smoke"), corpus="not yet", dtype="fp32")
    cost = plan.cost(config, 50_257)
    first = plan.plan([config, config]).splitlines()[0]
    assert first.startswith(f"2 runs: up to {cost['parameters'] / 1e6:.2f}M parameters in fp32, ")
    assert f"{2 * cost['flops']:.2e} FLOPs in all" in first


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--scale", "huge"), "scale 'huge'"),
        (("--lr", "-1"), "lr -1"),
        (("--preset", "giant"), "preset 'giant'"),
        (("--keep", "lawa(0)"), "k 0"),
        (("--disk_budget", "0"), "disk_budget window"),
    ],
)
def test_bad_flags_are_one_line(argv, words, command):
    status, out, err = command(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in words.split() if word not in err] == []
