"""What a method does during training besides its forward. The trainer integration calls it; so can a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, optim


@dataclass(frozen=True)
class SecondPass:
    """A method's wish to see every training batch twice.

    Args:
        loss: Given the logits of the first and of the second pass, (rows, classes) each, returns a mean over rows to add to the loss.
        outputs: Where the logits are in what the adapted root returns: the name of an attribute or key, a position in a tuple, or
            ``.`` for all of it; None: its ``logits``.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: str | None = None


class Schedule:
    """No-op schedule. One object per handle and run.

    The order within an optimizer step is ``penalty`` (before backward), ``before_step`` (after backward and unscaling, before
    clipping), the optimizer's step, ``after_step`` (gradients are still there).
    """

    def on_start(self, total_steps: int) -> None:
        """Called once before training, with the number of optimizer steps of the whole run.

        Raises:
            ConfigError: The schedule does not fit into ``total_steps``.
        """

    def penalty(self) -> Tensor | None:
        """Return a scalar to add to the loss, or None."""
        return None

    def second_pass(self) -> SecondPass | None:
        """Return how to compare two passes over a batch, or None if one is enough.

        The second pass runs inside ``in_pass(1)`` (:mod:`lightning_peft.surgery.passes`) with the arguments of the first one.
        """
        return None

    def before_step(self, optimizer: optim.Optimizer) -> None:
        """Called once per optimizer step, before it."""

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        """Called once per optimizer step, after it; ``skipped`` when the gradient scaler skipped it."""

    def on_end(self) -> None:
        """Called when the run is over, also after an error: without a run, the adapters act in training mode as in evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which :meth:`load_state_dict` continues exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
