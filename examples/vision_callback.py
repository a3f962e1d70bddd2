"""LoRA for an existing LightningModule: a small convolutional network on handwritten digits, with one callback added.

`Digits` is a plain project: it trains all its parameters and knows nothing of adapters. It is trained on the digits 0 to 4 first;
then the callback adapts it to the digits 5 to 9, training the adapters and a new head while everything else stays frozen.

    python examples/vision_callback.py

Data: the 1797 images of 8 x 8 pixels that scikit-learn ships. Runs in about ten seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp

# ---------------------------------------------------------------------- an existing project


class Digits(pl.LightningModule):
    """Three convolutions and a linear head."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((-1, -2)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def loaders(first: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return training and test loaders of the five digits from `first` on, labelled 0 to 4."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels) - first
    mine = ((y >= 0) & (y < 5)).nonzero().flatten()
    train, test = mine[mine % 4 > 0], mine[mine % 4 == 0]
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(x[test], y[test]), batch_size=512),
    )


# ---------------------------------------------------------------------- what is added


def main(folder: Path, epochs: int = 10) -> dict[str, float]:
    """Pretrain, adapt, and come back from the saved adapter; return the accuracies."""
    pl.seed_everything(0)
    quiet = dict(accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False, max_epochs=epochs)
    old, new = loaders(0), loaders(5)

    module = Digits()
    pl.Trainer(default_root_dir=folder / "pretrained", **quiet).fit(module, old[0])

    peft = lp.PEFTCallback(
        lp.LoRA(rank=4, targets=["body.3", "body.6"]),  # the names that `print(module)` shows
        module="body",
        extra_modules=["head"],
    )
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[peft], **quiet)
    before = trainer.test(module, new[1], verbose=False)[0]["accuracy"]
    trainer.fit(module, new[0])
    after = trainer.test(module, new[1], verbose=False)[0]["accuracy"]

    # The same adapter on the untouched base, in another program: the base, then the folder.
    fresh = Digits()
    fresh.load_state_dict(torch.load(next((folder / "pretrained").rglob("*.ckpt")), weights_only=True)["state_dict"])
    lp.load_adapter(fresh, folder / "adapter" / "last")
    again = pl.Trainer(**quiet).test(fresh, new[1], verbose=False)[0]["accuracy"]

    files = {p.name: p.stat().st_size for p in (folder / "adapter" / "last").iterdir()}
    print(
        f"accuracy on 5 to 9: {before:.3f} before, {after:.3f} after, {again:.3f} from {files} in {folder / 'adapter' / 'last'}"
    )
    return {"before": before, "after": after, "again": again}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where checkpoints and adapters go (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    main(arguments.folder or Path(tempfile.mkdtemp(prefix="vision_callback-")))
