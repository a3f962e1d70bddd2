"""T-Few, arXiv 2205.05638: the recipe of configs/tfew.yaml. Its losses are tested in tests/nn/test_answer_choices.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import lightning_peft as lp
from lightning_peft.training.schedulers import factor

CONFIG = Path(__file__).parents[2] / "configs" / "tfew.yaml"


def test_the_recipe_is_the_papers() -> None:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    model, trainer = config["model"], config["trainer"]
    assert lp.get_method(model["strategy"]).cls is lp.IA3
    assert model["choice_losses"] == {"mc_loss": 1.0, "unlikely_loss": 1.0, "length_norm": 1.0}
    assert (model["lr"], model["lr_scheduler"], model["warmup"]) == (3e-3, "linear", 0.06)
    assert (trainer["max_steps"], trainer["gradient_clip_val"], config["data"]["batch_size"]) == (1000, 1.0, 8)
    assert factor(530, name="linear", warmup=60, total=1000) == pytest.approx(0.5)


def test_the_recipes_optimizer_is_the_authors() -> None:
    """torch's Adafactor takes the steps of transformers' with the authors' options: scaled by what it moves, no relative step."""
    torch.manual_seed(0)
    own = [torch.nn.Parameter(1 + 0.1 * torch.randn(shape, dtype=torch.float64)) for shape in [(7,), (5, 3)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in own]
    one = torch.optim.Adafactor(own, lr=3e-3)
    options = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    other = transformers.optimization.Adafactor(theirs, lr=3e-3, **options)
    start = [p.detach().clone() for p in own]
    for _ in range(20):
        for a, b in zip(own, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, before in zip(own, theirs, start, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
        assert (a - before).abs().max() > 3e-3


@pytest.mark.slow
def test_smollm2_learns_from_few_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model and data, 40 steps of 4 messages: better than untouched, by accuracy and F1 on held-out messages."""
    from examples.assets import smollm2, sms_spam
    from lightning_peft.training.cli import PEFTCLI

    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    monkeypatch.chdir(tmp_path)
    given = {"model.base": smollm2(), "data.data_path": sms_spam(), "trainer.max_steps": 40, "data.batch_size": 4}
    given |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "model.lr": 3e-2}
    cli = PEFTCLI(["--config", str(CONFIG), *(f"--{name}={value}" for name, value in given.items())], run=False)
    (before,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    (after,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    assert after["test_accuracy"] > before["test_accuracy"] + 0.05
    assert after["test_f1"] > before["test_f1"] + 0.2
