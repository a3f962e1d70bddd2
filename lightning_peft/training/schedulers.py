"""Learning-rate schedules over the whole run: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import functools
import math
from typing import Literal, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.errors import ConfigError

ScheduleName: TypeAlias = Literal["cosine", "linear", "constant"]
SCHEDULES = ("cosine", "linear", "constant")


def factor(step: int, *, name: ScheduleName, warmup: int, total: float) -> float:
    """Return the multiplier of the learning rate in optimizer step ``step``, counted from 0.

    It rises to 1 over ``warmup`` steps, the first of which already moves, and falls to 0 at step ``total``.
    """
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done


def scheduler(optimizer: Optimizer, name: ScheduleName, *, warmup: float, total: float) -> LambdaLR:
    """Return the schedule.

    Args:
        optimizer: Every group keeps its own learning rate as the peak.
        name: Shape after the warm-up.
        warmup: Steps, or below 1 a share of all steps.
        total: Optimizer steps of the run; may be infinite for ``constant``.

    Raises:
        ConfigError: ``total`` is infinite where the schedule needs an end, or the warm-up is negative or too long.
    """
    if not math.isfinite(total) and (name != "constant" or 0 < warmup < 1):
        raise ConfigError(
            f"lr_scheduler={name!r}, warmup={warmup} need a run with an end: set max_epochs or max_steps, or use constant."
        )
    steps = math.ceil(warmup * total) if 0 < warmup < 1 else int(warmup)
    if not 0 <= steps <= total:
        raise ConfigError(f"warmup={warmup}, but it must lie between 0 and the {total} optimizer steps of the run.")
    return LambdaLR(optimizer, functools.partial(factor, name=name, warmup=steps, total=total))
