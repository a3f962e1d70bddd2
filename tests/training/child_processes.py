"""Trains in two forked or spawned processes and checks what the parent gets back. Run by a test in a process of its own.

A fork of the test process would inherit the locks of whatever threads earlier tests have left there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.training.toys import Plain, adapter_state, callback, loader, same, trainer


class RanksAgree(pl.Callback):
    """S5: adapters that came after the wrap would diverge."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        ranks: list[Any] = [None, None]
        torch.distributed.all_gather_object(ranks, adapter_state(pl_module))
        assert same(*ranks)


def main(folder: Path, strategy: str) -> None:
    options = {"strategy": strategy, "devices": 2, "enable_checkpointing": True}
    with pytest.raises(
        Exception, match=r"Call callback\.apply\(module\) before trainer\.fit"
    ):  # torch's own, with the child's message
        trainer(folder, callback(), **options).fit(Plain(), loader())

    module, peft = Plain(), callback()
    peft.apply(module)
    start = adapter_state(module)
    run = trainer(folder, peft, RanksAgree(), **options)
    run.fit(module, loader())
    trained = adapter_state(module)
    assert all(not torch.equal(start[k], trained[k]) for k in start), "S8: the parent has untrained adapters"
    file = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert same(trained, file["state_dict"])
    states = file["callbacks"]["lightning_peft.PEFTCallback[default]"]["rng"]
    assert len(states) == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    print("parent has the trained adapter")
