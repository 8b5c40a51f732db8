"""lab/plan.py: what runs cost, against the paper's numbers, and the command that prints it."""

import dataclasses
import types

import pytest

import lab.runs
import model
from lab import Lab, plan
from lawa_core import LawaError, ema, lawa

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
    first = str(plan.plan([config, config])).splitlines()[0]
    size = f"{cost['parameters'] / 1e6:.2f}M parameters in fp32, "
    assert first.startswith(f"2 runs, 1 at a time: up to {size}")
    assert f"{2 * cost['flops']:.2e} FLOPs in all" in first


def small(**fields):
    values = {"max_iters": 100, "ckpt_interval": 10, "averages": "", "dtype": "fp32"} | fields
    return model.scale_config(model.scale_values("smoke"), **values)


def test_averages_kept_while_training_take_memory_and_states():
    """EMA a copy of the weights on the device, SWA a sum in double, LAWA its window on the CPU."""
    copies = {"": (0, 0), "ema(0.9)": (1, 0), "swa(10)": (2, 0), "lawa(3, 1)": (0, 3)}
    alone = plan.cost(small())
    weights = alone["memory"]["weights"]
    assert alone["state_bytes"] == 3 * weights
    for averages, (there, beside) in copies.items():
        cost = plan.cost(small(averages=averages), states=2)
        assert cost["memory"]["averages"] == there * weights
        assert cost["host"]["LAWA's windows"] == beside * weights
        assert cost["host"]["files"] == (1 + bool(averages)) * weights
        assert cost["state_bytes"] == 2 * (3 + there + beside) * weights


@pytest.fixture
def needs():
    """A plan by itself, with room for everything."""
    return plan.Plan(
        *(2, "fp32", 10**8, 10**9, 1e18),
        *(10**12, 10**10, 0, 2 * 10**12),
        *({"weights": 10**10}, {"files": 10**9}, 2, "cpu", 5 * 10**10, 5 * 10**10),
    )


def test_what_is_not_enough_is_data(needs):
    change = dataclasses.replace
    assert needs.lacking == {} and "NOT ENOUGH" not in str(needs)
    scarce = change(needs, free=10**12)
    assert list(scarce.lacking) == ["disk"] and str(scarce).count("NOT ENOUGH") == 1
    for words in ("1010.0 GB", "1000.0 GB are free", "ckpt_interval", "disk_budget"):
        assert words in scarce.lacking["disk"]
    assert change(scarce, written=10**11).lacking == {}  # an interrupted run goes on
    assert needs.needed == 2 * 11 * 10**9  # two runs on one CPU
    assert list(change(needs, installed=2 * 10**10).lacking) == ["memory"]
    assert change(needs, jobs=1, installed=2 * 10**10).lacking == {}
    gpu = change(needs, device="cuda", installed=2 * 10**10)
    assert gpu.lacking == {}  # each has a GPU of its own
    assert list(change(gpu, ram=10**9).lacking) == ["host memory"]


# ---- how Lab uses it ----


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """What Lab.train asks for, instead of training it."""
    monkeypatch.setattr(model, "RUNS", tmp_path / "runs")
    asked = []

    def train_all(configs, **options):
        asked.append(options)
        return [model.run_dir(config) for config in configs]

    monkeypatch.setattr(lab.runs, "train_all", train_all)
    return asked


def settings(tmp_path, **values):
    names = {"scale": str, "disk_budget": float, "force": bool, "out": str}
    given = {"scale": "smoke", "disk_budget": None, "force": False, "out": str(tmp_path)} | values
    return Lab("some", "What?", {"__annotations__": names, **given})


def test_what_does_not_fit_is_not_trained_unless_forced(tmp_path, trained, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    lab = settings(tmp_path)
    with pytest.raises(LawaError) as caught:
        lab.train(lab.configs())
    told = str(caught.value)
    assert trained == [] and "\n" not in told
    for words in ("not enough disk: 0.", "0.0 GB are free", "disk_budget", "-p force True"):
        assert words in told
    forced = settings(tmp_path, force=True)
    assert len(forced.train(forced.configs())) == 4
    assert len(trained) == 1 and capsys.readouterr().out.count("NOT ENOUGH") == 2
    usage.free = 10**12
    lab.train(lab.configs())
    assert set(trained[1]) == {"state_at"}  # all checkpoints are kept


def test_a_disk_budget_keeps_what_a_notebook_needs(tmp_path, trained, capsys):
    lab = settings(tmp_path, disk_budget=0)
    configs = lab.configs(max_iters=4000)
    own = {"own": lawa(2, 70), "kept": "ema(0.9)"}
    lab.train(configs, schemes=own, at=[330])
    options = trained[0]
    kept = model.kept_steps(configs[0], 257, options["keep"], options["disk_budget"])
    needed = {260, 330}
    for point in lab.points(20, configs[0]):
        for spacing in (lab.spacing, lab.wide):
            needed.update(range(max(point - (lab.k - 1) * spacing, spacing), point + 1, spacing))
    assert needed <= kept and len(kept) < 250  # of 400
    told = f"{4 * options['disk_budget'] / 1e9:.2f} GB of checkpoints"
    assert told in capsys.readouterr().out

    lab = settings(tmp_path, disk_budget=1)
    lab.train(configs, schemes=lambda config: {"e": ema(0.5, 100, 500)}, at=lambda config: [900])
    assert trained[1]["disk_budget"] == 1e9
    assert set(trained[1]["keep"](configs[0].checkpoint_steps, 4000)) >= {500, 600, 700, 800, 900}
    with pytest.raises(LawaError, match="disk_budget"):
        lab = settings(tmp_path, disk_budget=1e-3)
        lab.train(configs)


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
