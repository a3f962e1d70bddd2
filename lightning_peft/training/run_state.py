"""What a PEFT callback keeps while the Trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_peft.checkpoint import AdapterFile
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.bookmark import Bookmark
from lightning_peft.training.modes import BaseModes
from lightning_peft.training.peak import PeakMemory
from lightning_peft.training.second_pass import Repeater
from lightning_peft.training.sentinel import GradientSentinel


@dataclass(eq=False)
class Run:
    """What one ``fit``, ``validate``, ``test`` or ``predict`` keeps; nothing of it is pickled or copied with the callback."""

    stage: str
    undo: list[Callable[[], object]] = field(default_factory=list)
    modes: BaseModes | None = None
    schedule: Schedule | None = None
    sentinel: GradientSentinel | None = None
    stepping: Optimizer | None = None  # the last one that took a step on the adapter in this batch
    step: int = 0
    scale: float | None = None
    finished: bool = False
    saved_schedule: dict[str, Any] | None = None
    bookmark: Bookmark | None = None  # where the run would continue; shared by all callbacks of a Trainer
    finishing: bool = False  # within what belongs to a step after it
    pending_init: AdapterFile | None = None
    peak: PeakMemory | None = None
    repeater: Repeater | None = None  # where the method runs each batch twice
    fresh: Handle | None = None  # installed by this run, which has not trained it yet

    def schedule_state(self) -> dict[str, Any]:
        """Return the schedule's state; before it has started, what it is going to continue from."""
        return self.saved_schedule or {} if self.schedule is None else self.schedule.state_dict()
