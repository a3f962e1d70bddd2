"""Toy LightningModules as users write them, data that has random order and dropout, and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.strategies.registry import _METHODS, register

LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0", "3"], "dropout": 0.1}}


def data(size: int = 16, width: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(size, width, generator=generator), torch.randn(size, 2, generator=generator))


def loader(size: int = 16, *, shuffle: bool = True, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(data(size), batch_size=batch_size, shuffle=shuffle)


def network() -> nn.Sequential:
    """The same "pretrained" weights every time, whatever the global seed is."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


class Plain(pl.LightningModule):
    """An existing project's module: all parameters go to the optimizer."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self(x) - y) ** 2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return loader(8, shuffle=False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class InConfigureModel(Plain):
    """Builds its network in ``configure_model``."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class InSetup(Plain):
    """Builds its network in ``setup``."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net = None

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = network()


class EarlyOptimizer(Plain):
    """Its optimizer exists before ``fit``, as with ``LightningCLI --optimizer``."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.early = torch.optim.AdamW(self.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.early, lambda step: 1.0)

    def configure_optimizers(self) -> Any:
        return [self.early], [self.schedule]


class Interrupt(pl.Callback):
    """Presses Ctrl-C at a step, in the middle of everything."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def callback(strategy: Any = None, **options: Any) -> lp.PEFTCallback:
    options.setdefault("verbose", False)
    options.setdefault("export", False)
    return lp.PEFTCallback(LORA if strategy is None else strategy, **options)


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that are not adapters'."""
    return {k: v.clone() for k, v in module.state_dict().items() if "peft" not in k.split(".")}


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all adapter tensors."""
    return {k: v.clone() for k, v in module.state_dict().items() if "peft" in k.split(".")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def registered(cls: Any) -> Iterator[Any]:
    """Register a strategy for the length of a test; the contract suite must not see it."""
    before = dict(_METHODS)
    more = {"mergeable": True, "layer_kinds": frozenset({"linear"})}
    try:
        yield register(name=cls.__name__.lower(), family="reparameterized", summary="For a test.", paper="none", **more)(cls)
    finally:
        _METHODS.clear()
        _METHODS.update(before)
