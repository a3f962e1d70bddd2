"""The table at the start of training: what trains, where, how much of it, and what a checkpoint will weigh."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.walk import base_entries, base_parameters
from lightning_peft.training.shards import Shards

# State tensors per parameter, as torch's optimizers keep them; others are counted as Adam.
_STATE = {"SGD": 0, "Adagrad": 1, "RMSprop": 1, "Adadelta": 2, "Adafactor": 0}


@dataclass(frozen=True)
class Budget:
    """What trains, in numbers.

    Args:
        adapter: Entries of the adapter that train; shared ones once.
        others: Entries that train beside it (extra modules, parts outside the adapted root).
        base: Entries of the base below the adapted root; quantized ones by what they stand for.
        checkpoint: Expected bytes of a ``.ckpt``: tensors and optimizer state.
    """

    adapter: int
    others: int
    base: int
    checkpoint: int

    @property
    def share(self) -> float:
        """What trains, relative to the base."""
        return (self.adapter + self.others) / max(self.base, 1)


def budget(
    handle: Handle, others: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer], shards: Shards, *, full: bool
) -> Budget:
    """Count what trains on all ranks and estimate what a checkpoint weighs."""

    def entries(tensor: Tensor) -> int:
        return shards.shape(tensor).numel()

    def nbytes(tensors: Iterable[Tensor]) -> int:
        return sum(entries(t) * t.element_size() for t in tensors)

    base = [p for _, _, p in base_parameters(handle.root)]
    tensors = [s.tensor() for s in handle.slots] + list(others.values())
    unique = {id(t): t for t in tensors + (base if full else [])}
    training = handle.trainable_parameters()
    copies = max((_state_tensors(o) for o in optimizers), default=0)
    size = nbytes(unique.values()) + copies * nbytes([*training, *others.values()])
    adapter, beside = (sum(map(entries, tensors)) for tensors in (training, others.values()))
    return Budget(adapter, beside, base_entries(handle.root, entries), size)


def _state_tensors(optimizer: Optimizer) -> int:
    copies = _STATE.get(type(optimizer).__name__, 2)
    return copies + any(g.get("momentum", 0) or g.get("amsgrad", False) for g in optimizer.param_groups)


def render(handle: Handle, root: str, others: Mapping[str, nn.Parameter], counted: Budget, shards: Shards) -> Table:
    """Return the table; layers that differ in their number only share a row."""
    rows: dict[tuple[str, str], list[int]] = {}
    for slot in handle.trainable_slots():
        place, _, tensor = slot.key.rpartition(".")
        size = shards.shape(slot.tensor())
        rows.setdefault((_pattern(place), f"{tensor} {'x'.join(map(str, size))}"), []).append(size.numel())
    for name, parameter in others.items():
        place, _, tensor = name.rpartition(".")
        size = shards.shape(parameter)
        rows.setdefault((f"{place} (whole)", f"{tensor} {'x'.join(map(str, size))}"), []).append(size.numel())
    strategy = type(handle.strategy).__name__
    place = f"'{root}'" if root else "the LightningModule itself"
    table = Table(
        title=f"PEFT adapter '{handle.name}': {strategy} on {place}, a {type(handle.root).__name__}", title_justify="left"
    )
    for column, justify in (("where", "left"), ("trains", "left"), ("times", "right"), ("parameters", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (where, shape), sizes in rows.items():
        table.add_row(where or "(root)", shape, str(len(sizes)), f"{sum(sizes):,}")
    total = counted.adapter + counted.others
    table.add_section()
    table.add_row("total", f"{counted.share:.3%} of {counted.base:,}", "", f"{total:,}")
    table.add_row("checkpoint", "about", "", human(counted.checkpoint))
    return table


def show(table: Table) -> None:
    """Print the table to the terminal or notebook."""
    Console().print(table)


def human(size: int) -> str:
    """Return a number of bytes in words: ``1.5 MB``."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _pattern(place: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", place)
