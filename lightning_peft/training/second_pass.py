"""The second pass over every training batch that some methods ask for, under any LightningModule.

It runs as soon as the adapted root has run, with the same arguments, inside the user's ``training_step`` and with it inside the forward
of DDP and FSDP, autocast included. What comes of it waits for the next backward, where the callback adds it to the loss: so manual
optimisation, accumulation and gradient scaling are what they are for a method's penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.schedule import SecondPass
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.passes import in_pass, pass_number
from lightning_peft.surgery.recompute import GradientCheckpointing


class Repeater:
    """Runs batches a second time, from ``on_fit_start`` to the end of the run.

    Args:
        handle: The adapter.
        wish: What its method asks for.
        by_itself: The LightningModule calls :meth:`run`, since the root's output is not what it scores.
    """

    def __init__(self, handle: Handle, wish: SecondPass, *, by_itself: bool) -> None:
        self.handle, self.wish, self.by_itself = handle, wish, by_itself
        self.term: Tensor | None = None
        self.expecting = self.ran = False
        self.backwards = 0
        # Calls of the root in progress: whether another one ran in it. DDP runs training_step as a call of the LightningModule, which may
        # be the root, and calls itself in there.
        self._calls: list[bool] = []
        root = handle.root
        self._hooks: list[Any] = []
        if not by_itself:
            self._hooks = [
                root.register_forward_pre_hook(self._before_forward),
                root.register_forward_hook(self._after_forward, with_kwargs=True),
            ]

    def check(self, trainer: Any, checkpointing: GradientCheckpointing | None) -> None:
        """Refuse what cannot be combined with two passes.

        Raises:
            ConfigError: Re-entrant checkpointing on several ranks.
        """
        if checkpointing is not None and checkpointing.reentrant and trainer.world_size > 1:
            raise ConfigError(
                f"{type(self.handle.strategy).__name__} runs every batch twice, and under re-entrant gradient checkpointing each pass has a "
                "backward of its own, while DDP expects every gradient once. Use gradient_checkpointing={'reentrant': False}, or "
                "consistency=0."
            )

    def open(self) -> None:
        """Expect the root to run: a batch begins."""
        self.expecting, self.ran, self.term, self.backwards = True, False, None, 0
        self._calls.clear()

    def take(self, module: pl.LightningModule) -> Tensor | None:
        """Return what is to be added to the loss of this backward; None if it was added before, or by the module itself.

        Raises:
            ConfigError: The root has not run in ``training_step``.
        """
        self.backwards += 1
        if module.automatic_optimization:
            self._check_ran(module)
        term, self.term = self.term, None
        return term

    def end(self, module: pl.LightningModule) -> None:
        """Expect nothing any more: the batch is done."""
        if self.backwards:
            self._check_ran(module)
        self.expecting, self.term = False, None

    def _check_ran(self, module: nn.Module) -> None:
        if not self.ran:
            raise ConfigError(
                f"{type(self.handle.strategy).__name__} compares two passes of the adapted root, {type(self.handle.root).__name__}, but its "
                f"forward did not run in the training_step of {type(module).__name__}. Name the module that it calls: "
                "PEFTCallback(module=...). A PEFTLightningModule with a training_step of its own calls self.peft.second_pass. Or set consistency=0."
            )

    def run(self, first: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Run the second pass and return the loss between the two."""
        self.ran = True
        with in_pass(1):
            return self.wish.loss(first, again())

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _before_forward(self, root: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls.append(False)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _after_forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        around_another = self._calls.pop() if self._calls else False
        if self._calls:
            self._calls[-1] = True
        if around_another or not (self.expecting and root.training and torch.is_grad_enabled() and pass_number() == 0):
            return
        rows = _real(kwargs.get("attention_mask"))
        term = self.run(rows(self._logits(output)), lambda: rows(self._logits(root(*args, **kwargs))))
        self.term = term if self.term is None else self.term + term

    def _logits(self, output: Any) -> Tensor:
        where = self.wish.outputs
        if where == ".":
            found = output
        elif where is not None and where.isdecimal():
            found = output[int(where)] if isinstance(output, (tuple, list)) and int(where) < len(output) else None
        else:
            name = where or "logits"
            found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2 or found.shape[-1] < 2:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{type(self.handle.strategy).__name__} compares the logits of two passes, (..., classes) with two classes or more, and finds "
                f"{what} in {where or 'logits'!r} of the {type(output).__name__} that {type(self.handle.root).__name__} returns. Say where they "
                "are: outputs='name', outputs='0' in a tuple, outputs='.' for all of it; or set consistency=0 for a loss that is no "
                "distribution over classes."
            )
        return found

    def close(self) -> None:
        """Leave nothing on the root."""
        while self._hooks:
            self._hooks.pop().remove()


def _real(mask: Any) -> Callable[[Tensor], Tensor]:
    """Return what takes the rows (n, classes) of logits (..., classes) that are not padding."""

    def rows(logits: Tensor) -> Tensor:
        if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            return logits[mask.bool()]
        return logits.flatten(0, -2)

    return rows


__all__ = ["Repeater"]
