"""Train and eval modes of a frozen base: dropout as in training, running statistics as they are.

``from_pretrained`` leaves a model in eval mode and Lightning never calls ``train()``, so dropout and activation checkpointing would
be off in silence; and BatchNorm would move statistics that belong to the frozen base and are in no adapter file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.errors import ConfigError
from lightning_peft.surgery.stack import RESERVED


class BaseModes:
    """The modes of one adapted root during training.

    Args:
        root: The adapted root.
        extras: Extra modules: they train, so nothing of them is held in eval.
        base_dropout: Keep the base's own dropout active.

    Raises:
        ConfigError: ``base_dropout=False``, and a checkpointed layer drops out in its own forward, where it cannot be told apart.
    """

    def __init__(self, root: nn.Module, extras: Iterable[nn.Module], *, base_dropout: bool) -> None:
        free = {id(m) for extra in extras for m in extra.modules()}
        base = [m for path, m in root.named_modules() if RESERVED not in path.split(".") and id(m) not in free]
        self.root = root
        self.before = [(module, module.training) for module in root.modules()]
        self.still = [m for m in base if has_statistics(m) or (not base_dropout and not _checkpoints(m))]
        if not base_dropout:
            for module in base:
                if _checkpoints(module) and any(
                    isinstance(getattr(module, a, 0), float) and getattr(module, a) > 0 for a in _RATES
                ):
                    raise ConfigError(
                        f"base_dropout=False: {type(module).__name__} must stay in train mode for activation checkpointing and has "
                        "dropout in its own forward. Set the dropout rates in the model's config to 0 instead."
                    )

    def apply(self) -> None:
        """Put everything into train mode but what has to stay still."""
        self.root.train()
        self.hold()

    def hold(self) -> None:
        """Keep still what something else has put into train mode again (a hook of the user's, a loop)."""
        for module in self.still:
            module.training = False

    def excuse_from_warning(self, fit_loop: Any) -> Callable[[], object]:
        """Keep Lightning from warning of modules in eval mode that are meant to be; it still counts all others.

        Returns:
            What takes it back.
        """
        original = getattr(fit_loop, WARNING, None)
        if original is not None:
            setattr(fit_loop, WARNING, functools.partial(self._warn, original))
        return functools.partial(fit_loop.__dict__.pop, WARNING, None)

    def _warn(self, original: Callable[[], None]) -> None:
        for module in self.still:
            module.training = True
        original()
        self.hold()

    def restore(self) -> None:
        """Give every module the mode that it had before."""
        for module, mode in self.before:
            module.training = mode


WARNING = "_warn_if_modules_in_eval_mode"
_RATES = ("dropout", "activation_dropout", "attention_dropout", "hidden_dropout")


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module moves running statistics in train mode."""
    return isinstance(module, _NormBase) and module.track_running_stats


def _checkpoints(module: nn.Module) -> bool:
    """Return whether a module recomputes its activations, which transformers does in train mode only."""
    return bool(getattr(module, "gradient_checkpointing", False))
