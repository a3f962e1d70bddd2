"""A language model in a user's own LightningModule, for runs with and without gradient checkpointing."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_peft.surgery.recompute import recomputed_blocks
from tests.training import tiny

LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1, "targets": "all-linear"}}


class Language(pl.LightningModule):
    """Its model is in eval mode, as from_pretrained leaves it, and asks for no ``use_cache=False``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.network()

    def network(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return LlamaForCausalLM(tiny.llama(attention_dropout=0.1)).eval()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(input_ids=batch, labels=batch).loss)

    def val_dataloader(self) -> Any:
        return batches(1, shuffle=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def batches(count: int = 4, *, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(torch.randint(4, tiny.VOCABULARY, (2 * count, 9), generator=generator), batch_size=2, shuffle=shuffle)  # type: ignore[arg-type]


class Watch(pl.Callback):
    """Counts the runs of each block's MLP, per batch; notes which blocks recompute and what wants a gradient."""

    def __init__(self) -> None:
        self.runs: dict[str, Counter[str]] = {"train": Counter(), "val": Counter()}
        self.blocks: dict[str, list[str]] = {}
        self.wanted: dict[str, bool] = {}
        self.stage = ""
        self.hooks: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for path, module in pl_module.named_modules():
            if path.endswith("mlp"):
                self.hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self.count(path)))
            if path.endswith(("embed_tokens", "layers.0", "layers.1")):
                self.hooks.append(module.register_forward_hook(lambda m, a, out, path=path: self.note(path, out)))

    def count(self, path: str) -> None:
        if self.stage:
            self.runs[self.stage][path.rsplit(".", 2)[-2]] += 1

    def note(self, path: str, out: Tensor) -> None:
        if self.stage == "train":
            self.wanted[path.rsplit(".", 1)[-1]] = out.requires_grad

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.stage = "train"
        self.blocks["train"] = recomputed_blocks(pl_module)

    def on_train_batch_end(self, *_: Any) -> None:
        self.stage = ""

    def on_validation_batch_start(self, *_: Any) -> None:
        self.stage = "val"

    def on_validation_batch_end(self, *_: Any) -> None:
        self.stage = ""

    def on_fit_end(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def in_a_process_of_its_own(script: str, folder: Path) -> str:
    """Run a test module as a script and return what it printed; a fork would inherit the locks of this process's threads."""
    result = subprocess.run(
        [sys.executable, "-m", script, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=180
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
