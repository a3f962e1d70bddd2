"""Lightning without its classes: ``lightning.pytorch`` and ``pytorch_lightning`` are two copies of the same code.

A callback that asks ``isinstance`` of one of them locks out the users of the other, so classes are told by their names.
"""

from __future__ import annotations

from torch import nn


def is_a(thing: object, *names: str) -> bool:
    """Return whether the class of ``thing``, or one it inherits from, has one of these names."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def overrides(module: nn.Module, hook: str) -> bool:
    """Return whether the class of a LightningModule defines ``hook`` itself."""
    host = ("lightning", "pytorch_lightning")
    base = next((c for c in type(module).__mro__ if c.__name__ == "LightningModule" and c.__module__.split(".")[0] in host), None)
    if base is None:
        raise TypeError(f"{type(module).__name__} is not a LightningModule of lightning.pytorch or pytorch_lightning.")
    return getattr(type(module), hook) is not getattr(base, hook)
