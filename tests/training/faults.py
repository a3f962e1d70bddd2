"""Small runs that are interrupted in every way, for tests and for ``tests/benchmarks/kill_and_resume.py``.

The loader has a state, its order is random, the model has dropout, validation draws random numbers: what a resume could get wrong.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor
from transformers import LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.training.data.collators import BatchKey
from lightning_peft.training.data.loader import EpochSampler, StatefulLoader
from tests.training import tiny

STRATEGIES: dict[str, Any] = {
    "lora": lp.LoRA(rank=2, dropout=0.1, targets="all-linear"),
    "qlora": lp.LoRA(rank=2, dropout=0.1, targets="all-linear"),
    "adalora": lp.AdaLoRA(initial_rank=4, target_rank=2, targets="all-linear", warmup=1, final=2, dropout=0.1),
    "prefix": lp.PrefixTuning(num_virtual_tokens=3),
    "vera": lp.VeRA(rank=4, targets="all-linear", dropout=0.1),
    "meft": lp.MEFT(width=4),
    "ladder": lp.LadderSideTuning(reduction=4, heads=2),
    "fish": lp.FISHMask(share=0.05, samples=6),
    "diff": lp.DiffPruning(share=0.05, penalty=1e-4, fine_tune=0.5, alpha_lr_scale=10.0),
}
ROWS, BATCH = 10, 2  # five batches an epoch


class Row:
    """An example as the loader wants it."""

    choices = ()

    def __init__(self, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(5, 9, (), generator=generator))
        self.input_ids = torch.randint(4, tiny.VOCABULARY, (length,), generator=generator).numpy()


def collate(rows: Any, key: BatchKey) -> dict[str, Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = labels[i, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
    return {"input_ids": ids, "labels": labels}


def loader(rows: int = ROWS, *, shuffle: bool = True) -> StatefulLoader:
    data: Any = [Row(i) for i in range(rows)]
    return StatefulLoader(data, collate, EpochSampler([8] * rows, batch_size=BATCH, shuffle=shuffle, seed=5))


def base() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(tiny.llama(attention_dropout=0.1))


class Module(lp.PEFTLightningModule):
    """Its validation moves the random states, and a scheduler follows every step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        torch.rand(1)


def module(name: str = "lora", **options: Any) -> Module:
    if name == "qlora":
        options["quantization"] = "nf4"
    given = {"lr": "auto", "lr_scheduler": "linear", "warmup": 0.1, "callback": {"verbose": False, "export": False}}
    return Module(STRATEGIES[name], base(), **{**given, **options})


class SaveOnException(Checkpoint):
    """Lightning's ``OnExceptionCheckpoint``, without its advice about ``ckpt_path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.path)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **{"max_epochs": 3, **quiet, **options},
    )


def seed() -> None:
    random.seed(11)
    np.random.seed(11)
    torch.manual_seed(11)


def fit(
    folder: Path,
    name: str = "lora",
    *callbacks: Any,
    start: Path | None = None,
    keep: Any = None,
    more: Any = None,
    **options: Any,
) -> tuple[Module, pl.Trainer]:
    """Train from one seed; ``keep`` are options of a ModelCheckpoint in ``folder``; what interrupts is caught."""
    seed()
    checkpoints = [] if keep is None else [ModelCheckpoint(folder, **{"save_top_k": -1, "filename": "{step}", **keep})]
    run = trainer(folder, *callbacks, *checkpoints, **options)
    made = module(name, **(more or {}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        run.fit(made, loader(), loader(4, shuffle=False), ckpt_path=start)
    return made, run


def state(made: pl.LightningModule, run: pl.Trainer) -> dict[str, Any]:
    """Everything that the end of two equal runs has in common, as tensors."""
    found: dict[str, Any] = {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}
    for i, optimizer in enumerate(run.optimizers):
        for j, record in optimizer.state_dict()["state"].items():
            found |= {f"optimizer{i}.{j}.{k}": torch.as_tensor(v).clone() for k, v in record.items()}
        found[f"optimizer{i}.lr"] = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)
    found["random"] = torch.get_rng_state()
    found["steps"] = torch.tensor([run.global_step, run.current_epoch])
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal bit for bit."""
    return sorted(k for k in one.keys() | other.keys() if k not in one or k not in other or not torch.equal(one[k], other[k]))
