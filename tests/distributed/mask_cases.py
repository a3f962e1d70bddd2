"""What the ranks of a group run for methods that start from data, or draw random numbers in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

import lightning_peft as lp
from tests.distributed import cases

FISH = lp.FISHMask(share=0.05, samples=2 * cases.BATCH)
DIFF = lp.DiffPruning(share=0.05, penalty=1e-4, fine_tune=0.5, alpha_lr_scale=10.0)
METHODS = {"fish": FISH, "diff": DIFF, "random": lp.RandomMask(share=0.05)}


class Foreign(cases.Foreign):
    """A project of its own whose loss is that of each row by itself."""

    def __init__(self, peft: lp.PEFTCallback, how: str, given: dict[str, Tensor] | None = None) -> None:
        super().__init__(peft, how)
        self.given = given
        self.examples = 0

    def configure_model(self) -> None:
        if self.net is None and self.given is not None:
            self.net = cases.base()
            lp.inject(self.net, self.peft.strategy, calibration=self.given)
            if self.device_mesh is not None:  # FSDP1 wraps the whole module afterwards
                lp.shard(self.net, self.device_mesh["data_parallel"])
        super().configure_model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.examples += len(batch["input_ids"]) == 1
        return super().training_step(batch, batch_idx)


def fit(
    kind: str, method: str, folder: Path, given: dict[str, Tensor] | None = None, start: Path | None = None
) -> dict[str, Any]:
    """Train a few steps; return the adapter of this rank, and how many single examples its model has seen."""
    pl.seed_everything(1, verbose=False)
    peft = lp.PEFTCallback(METHODS[method], verbose=False)
    model = Foreign(peft, "lp.shard" if kind == "fsdp2" else "plain", given)
    run = cases.trainer(kind, folder, peft, max_steps=4)
    run.fit(model, cases.loader(kind), ckpt_path=start)
    run.save_checkpoint(folder / "end.ckpt")
    handle = lp.handles(model)["default"]
    # As lists: a tensor is sent as a handle on memory of a process that may have ended.
    state = {k: v.tolist() for k, v in handle.state_dict().items()} if kind == "ddp" else {}
    return {"state": state, "examples": model.examples}


def whole() -> Tensor:
    """The mask of all rows, in one process."""
    model = cases.base()
    rows = torch.utils.data.DataLoader(cases.Texts(), batch_size=cases.BATCH)
    return lp.calibrate(model, FISH, rows, lambda batch: model(**batch).loss)["shared-mask.indices"]
