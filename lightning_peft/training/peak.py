"""The most memory that a run took, as the machine saw it, beside what the cost model says of the same run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.cost import estimate, size
from lightning_peft.nn.chunked_loss import IGNORE

_PROCESS = Path("/proc/self")


SMALL = 32 * 2**20  # bytes of a module below which the resident set of a process says more about libraries than about the module


def watch(module: nn.Module) -> PeakMemory | None:
    """Begin to watch the device of a module; None where there is nothing to see: a small module on the CPU, another device."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    device = next((t.device for t in tensors.values()), torch.device("meta"))
    held = sum(t.nbytes for t in tensors.values())
    if device.type == "cuda" or (device.type == "cpu" and held >= SMALL):
        return PeakMemory(device, held)
    return None


class PeakMemory:
    """Watches one device from its making.

    On CUDA the numbers are those of torch's allocator; on the CPU they are the resident set of the process, whose highest value the
    system keeps.

    Args:
        device: CPU or CUDA.
        held: Bytes of the module that is there already. What is resident besides, such as libraries, is not counted.
    """

    def __init__(self, device: torch.device, held: int) -> None:
        self.device = device
        self.largest: tuple[int, int, float] | None = None  # batch, tokens, share of them with a label
        self.padded = False
        self.others = self.highest_before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.others, self.highest_before = max(0, resident() - held), highest()

    def saw(self, batch: Any) -> None:
        """Take note of a batch of texts: the largest decides."""
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        labels, labelled = batch.get("labels"), 1.0
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            labelled = max(float((labels != IGNORE).float().mean()), 1 / ids.numel())
        if self.largest is None or ids.numel() >= self.largest[0] * self.largest[1]:
            self.largest, mask = (ids.shape[0], ids.shape[1], labelled), batch.get("attention_mask")
            self.padded = isinstance(mask, Tensor) and not bool(mask.all())

    def describe(self, root: nn.Module, trainer: Any, loss: Literal["chunked", "full"]) -> str:
        """Return a line with the peak seen and, for a language model, the peak estimated.

        Args:
            root: The model with its adapters.
            trainer: The Trainer, whose precision and optimizer count.
            loss: How the logits are made.
        """
        expected = None
        with contextlib.suppress(Exception):  # an estimate is no reason for a run to fail
            expected = self._estimate(root, trainer, loss)
        beside = (
            ""
            if expected is None or self.largest is None
            else f"; estimated {size(expected)} for {self.largest[0]} × {self.largest[1]} tokens"
        )
        return f"peak memory of fit: {self._seen()}{beside}."

    def most(self) -> int:
        """Return the most bytes so far, without what was resident besides the module when the watch began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, highest() - self.others)

    def _seen(self) -> str:
        if self.device.type == "cuda":
            return size(self.most())
        least = "" if highest() > self.highest_before else "at most "  # as much was resident before, when the base was loaded
        return f"{least}{size(self.most())} resident, beside {size(self.others)} of libraries and data"

    def _estimate(self, root: nn.Module, trainer: Any, loss: Literal["chunked", "full"]) -> int | None:
        if self.largest is None or trainer.world_size > 1 or len(trainer.optimizers) != 1:
            return None
        batch, length, labelled = self.largest
        optimizer, precision = trainer.optimizers[0], str(trainer.precision)
        accepted = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        return estimate(
            root,
            None,
            batch_size=batch,
            sequence_length=length,
            precision=precision if precision.endswith("mixed") else "32-true",  # else the weights have their dtype already
            optimizer=lambda parameters: type(optimizer)(parameters, **options),
            loss=loss,
            labelled=labelled,
            padded=self.padded,
            device="cuda" if self.device.type == "cuda" else "cpu",
            generate=False,
        ).peak


def resident() -> int:
    """Return the bytes of this process that lie in memory."""
    return status("VmRSS") or highest()


def highest() -> int:
    """Return the most bytes of this process that have lain in memory."""
    found = status("VmHWM")
    if found is not None or sys.platform == "win32":
        return found or 0
    resource = importlib.import_module("resource")  # Windows has none
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def forget_highest() -> None:
    """Let Linux begin anew with the most bytes of this process; elsewhere nothing can."""
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def status(key: str) -> int | None:
    """Return a line of Linux's account of this process in bytes, None elsewhere."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else int(found.split()[1]) * 1024
