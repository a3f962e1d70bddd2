"""Lightning: the callback, the module, the data module, and loading what they saved. The only folder that imports Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.training.callback import PEFTCallback as PEFTCallback
    from lightning_peft.training.data import PEFTDataModule as PEFTDataModule
    from lightning_peft.training.load import load_from_checkpoint as load_from_checkpoint
    from lightning_peft.training.module import PEFTLightningModule as PEFTLightningModule
    from lightning_peft.training.units import shard as shard

# Loaded on first use: a project that only adds the callback does not import the data module's dependencies.
_HOMES = {
    "PEFTCallback": "callback",
    "PEFTDataModule": "data",
    "PEFTLightningModule": "module",
    "load_from_checkpoint": "load",
    "shard": "units",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lightning_peft.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightning_peft.training' has no attribute {name!r}")
