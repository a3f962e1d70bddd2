"""Trains until it is told to stop, or until rank one dies. Run by a test, in one process or two."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.training import faults
from tests.training.toys import Plain, callback, loader, trainer


class AtStep(pl.Callback):
    """Sends its own process a signal in the middle of a batch, on all ranks or on one; the others note how long they live on."""

    def __init__(self, step: int, number: int, rank: int | None = None) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.rank in (None, trainer.global_rank):
                os.kill(os.getpid(), self.number)
            self.since = time.monotonic()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        print(f"rank {trainer.global_rank} stopped after {time.monotonic() - self.since:.1f} seconds: {exception}", flush=True)


def main(folder: Path, what: str) -> None:
    warnings.simplefilter("ignore")
    if what == "sigterm":
        faults.fit(folder, "lora", AtStep(7, signal.SIGTERM), faults.SaveOnException(folder / "stopped.ckpt"))
        raise AssertionError("it was told to stop")
    keep = faults.SaveOnException(folder / "stopped.ckpt")
    stop = AtStep(3, signal.SIGKILL, rank=1) if what == "dies" else AtStep(3, signal.SIGTERM)
    run = trainer(folder, callback(), stop, keep, strategy="ddp", devices=2, enable_checkpointing=True, max_epochs=50)
    run.fit(Plain(), loader())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
