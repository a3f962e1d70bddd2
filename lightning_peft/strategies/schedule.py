"""What a method does during training besides its forward. The trainer integration calls it; so can a plain loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, optim


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

    def before_step(self, optimizer: optim.Optimizer) -> None:
        """Called once per optimizer step, before it."""

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        """Called once per optimizer step, after it; ``skipped`` when the gradient scaler skipped it."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which :meth:`load_state_dict` continues exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
