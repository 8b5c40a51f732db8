"""docs/recipes.md as it stands, with the real libraries."""

import re
from pathlib import Path

import pytest
import reference as ref
import torch
from torch import nn

from lawa_core import EMA, LAWA, SWA, average, lawa

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


def recipe(title, **names):
    """Run the code block under a heading; -> its names."""
    block = re.search(
        rf"^## {title}$.*?^```python\n(.*?)^```$", RECIPES.read_text(), re.MULTILINE | re.DOTALL
    )[1]
    exec(
        compile(block, f"recipes.md: {title}", "exec"), names
    )  # the documentation is the code under test
    return names


def mean(states, steps):
    return ref.average([states[s] for s in steps], [1 / len(steps)] * len(steps))


def test_plain_loop():
    model, states, seen = nn.Linear(3, 2), {}, {}

    def train_step(model, step):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(step)))
        states[step] = {n: t.clone() for n, t in model.state_dict().items()}

    def evaluate(model):
        seen.update({n: t.clone() for n, t in model.state_dict().items()})

    names = recipe(
        "A plain loop", model=model, train_step=train_step, evaluate=evaluate, max_iters=100
    )
    ref.assert_state(seen, mean(states, [20, 40, 60, 80, 100]))
    ref.assert_state(names["averages"][2].average(), mean(states, range(50, 101, 10)))
    assert ref.state_bits(model.state_dict()) == ref.state_bits(states[100])


class Regression(nn.Module):
    """Takes and returns what the Trainer expects."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        loss = (self.layer(x).squeeze(-1) - labels).square().mean()
        return {"loss": loss, "logits": self.layer(x)}


def examples(n=64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=rng)
    return [{"x": row, "labels": row.sum()} for row in x]


def hf_trainer(folder, model, callback, max_steps):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=max_steps,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        seed=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        lr_scheduler_type="constant",
    )
    return Trainer(
        model, arguments, train_dataset=examples(), eval_dataset=examples(), callbacks=[callback]
    )


def test_hugging_face_trainer(tmp_path):
    """Online equals the mean of the folders the Trainer saved; evaluation sees it; resumed in the
    middle equals uninterrupted."""
    pytest.importorskip("accelerate")
    callback = recipe("Hugging Face Trainer")["Averaging"]

    def make(model):
        return LAWA(model, k=3, spacing=2)

    model = Regression()
    averaging = callback(make)
    trainer = hf_trainer(tmp_path / "whole", model, averaging, 10)
    trainer.train()
    online, own = averaging.online.average(), trainer.evaluate()["eval_loss"]
    assert ref.state_bits(average(tmp_path / "whole", lawa(3, spacing=2))) == ref.state_bits(online)
    with averaging.online.swapped():
        assert trainer.evaluate()["eval_loss"] != own
    assert trainer.evaluate()["eval_loss"] == own

    hf_trainer(tmp_path / "parts", Regression(), callback(make), 6).train()
    resumed = callback(make)
    hf_trainer(tmp_path / "parts", Regression(), resumed, 10).train(resume_from_checkpoint=True)
    assert ref.state_bits(resumed.online.average()) == ref.state_bits(online)


@pytest.mark.parametrize(
    ("make", "batches"),
    [(lambda m: LAWA(m, k=3, spacing=2), 1), (lambda m: EMA(m, 0.5), 1), (lambda m: SWA(m), 2)],
    ids=["lawa", "ema", "swa, two batches a step"],
)
def test_lightning(make, batches, tmp_path):
    """Validation sees the average; resumed in the middle equals uninterrupted."""
    lightning = pytest.importorskip("lightning")
    callback, seen, states = recipe("Lightning")["Averaging"], [], {}

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Regression()

        def training_step(self, batch, _):
            return self.net(**batch)["loss"]

        def on_train_batch_end(self, *_):
            states[self.global_step] = {n: t.clone() for n, t in self.state_dict().items()}

        def validation_step(self, batch, _):
            seen.append(self.net.layer.weight.detach().clone())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(averaging, steps, resume=None):
        loader = torch.utils.data.DataLoader(examples(), batch_size=8)
        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[averaging],
            logger=False,
            enable_progress_bar=False,
            accelerator="cpu",
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            num_sanity_val_steps=0,
            accumulate_grad_batches=batches,
        )
        trainer.fit(module := Module(), loader, loader, ckpt_path=resume)
        return trainer, module

    whole = callback(make)
    _, module = fit(whole, 16)
    want = ref.state_bits(whole.online.average())
    if isinstance(whole.online, SWA):
        ref.assert_state(whole.online.average(), mean(states, range(1, 17)))
    assert ref.bits(seen[-1]) == want["net.layer.weight"] != ref.bits(module.net.layer.weight)
    trainer, _ = fit(callback(make), 8)
    trainer.save_checkpoint(tmp_path / "step=8.ckpt")
    resumed = callback(make)
    fit(resumed, 16, tmp_path / "step=8.ckpt")
    assert ref.state_bits(resumed.online.average()) == want
    assert set(average([tmp_path / "step=8.ckpt"])) == set(want)
