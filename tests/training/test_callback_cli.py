"""A foreign LightningCLI project that only adds the callback in its YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from tests.training.toys import Plain, adapter_state, loader


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns of arguments that belong to pytest."""
    monkeypatch.setattr("sys.argv", ["main.py"])


ROOT = Path(__file__).parents[2]


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(8, shuffle=False)


class Project(Plain):
    """Leaves its optimizer to the CLI, which builds it from model.parameters() before fit (S2)."""

    configure_optimizers = pl.LightningModule.configure_optimizers


class Wide(Plain):
    """Wide enough for the rank of the shipped file."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))

    def forward(self, x: Any) -> Any:
        return self.net(x)[:, :2]


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1, "accelerator": "cpu"}


def run(folder: Path, callback: Any, *more: str, cls: Any = Plain) -> LightningCLI:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {**QUIET, "default_root_dir": str(folder), "callbacks": [callback]}}))
    return LightningCLI(
        cls, Data, args=["fit", "--config", str(config), *more], save_config_callback=None, seed_everything_default=1
    )


@pytest.mark.parametrize(
    "strategy",
    [
        {"class_path": "LoRA", "init_args": {"rank": 4, "targets": ["net.0"]}},
        {"class_path": "lightning_peft.LoRA", "init_args": {"rank": 2, "targets": "all-linear"}},
        "bitfit",
        "full",
        ["bitfit", {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0"]}}],
    ],
    ids=str,
)
def test_strategy_in_yaml(strategy: Any, tmp_path: Path) -> None:
    init = {"strategy": strategy, "gradient_sentinel": "raise", "verbose": False}
    cli = run(tmp_path, {"class_path": "lightning_peft.PEFTCallback", "init_args": init})
    before = Plain().state_dict()
    after = cli.model.state_dict()
    assert any(k not in before or not torch.equal(before[k], v) for k, v in after.items())
    assert (tmp_path / "adapter" / "last" / "adapter.json").is_file()


def test_optimizer_that_the_cli_builds_trains_the_adapter(tmp_path: Path) -> None:
    init = {"strategy": {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "3"]}}, "verbose": False}
    more = [
        "--optimizer",
        "torch.optim.AdamW",
        "--optimizer.lr",
        "0.01",
        "--lr_scheduler",
        "torch.optim.lr_scheduler.ExponentialLR",
    ]
    callback = {"class_path": "lightning_peft.PEFTCallback", "init_args": init}
    cli = run(tmp_path, callback, *more, "--lr_scheduler.gamma", "0.9", cls=Project)
    adapter = adapter_state(cli.model)
    assert len(adapter) == 4
    assert all(value.abs().max() > 0 for value in adapter.values())
    assert len(cli.trainer.optimizers[0].state_dict()["state"]) == 4


@pytest.mark.parametrize(
    ("strategy", "message"),
    [("lroa", "'lora'"), ({"class_path": "LoRA", "init_args": {"rnk": 4}}, "rnk"), ({"method": "lora"}, "class_path")],
)
def test_typo_is_found_before_anything_runs(strategy: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    """jsonargparse puts our message among its own, or prints it and exits."""
    callback = {"class_path": "lightning_peft.PEFTCallback", "init_args": {"strategy": strategy}}
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(tmp_path, callback)
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_shipped_config_runs(tmp_path: Path) -> None:
    path = ROOT / "configs" / "callback.yaml"
    config = yaml.safe_load(path.read_text())
    (callback,) = config["trainer"]["callbacks"]
    assert set(config) == {"trainer"}  # the one thing that a project adds
    config["trainer"].update(QUIET, default_root_dir=str(tmp_path))
    own = tmp_path / "project.yaml"
    own.write_text(yaml.safe_dump({"trainer": {**QUIET, "default_root_dir": str(tmp_path)}}))
    args = ["fit", "--config", str(own), "--config", str(path)]
    cli = LightningCLI(Wide, Data, args=args, save_config_callback=None, seed_everything_default=1)
    assert callback["class_path"] == "lightning_peft.PEFTCallback"
    assert adapter_state(cli.model)
