"""Parameter-efficient fine-tuning for PyTorch Lightning.

The names below, and those of `lightning_peft.authoring` for methods of your own, are stable; other paths promise nothing. What needs
Lightning is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_peft import errors as errors
from lightning_peft.checkpoint import inspect_adapter as inspect_adapter
from lightning_peft.checkpoint import load_adapter as load_adapter
from lightning_peft.checkpoint import save_adapter as save_adapter
from lightning_peft.errors import PEFTError as PEFTError
from lightning_peft.loading.quantize import QuantizationReport as QuantizationReport
from lightning_peft.loading.quantize import quantization_report as quantization_report
from lightning_peft.loading.quantize import quantize as quantize
from lightning_peft.loading.saved import load_quantized as load_quantized
from lightning_peft.loading.saved import save_quantized as save_quantized
from lightning_peft.quantization.config import Quantization as Quantization
from lightning_peft.strategies import HRA as HRA
from lightning_peft.strategies import IA3 as IA3
from lightning_peft.strategies import MAM as MAM
from lightning_peft.strategies import MEFT as MEFT
from lightning_peft.strategies import OFT as OFT
from lightning_peft.strategies import SSF as SSF
from lightning_peft.strategies import AdaLoRA as AdaLoRA
from lightning_peft.strategies import AdaMix as AdaMix
from lightning_peft.strategies import BitFit as BitFit
from lightning_peft.strategies import Compacter as Compacter
from lightning_peft.strategies import CompacterPlusPlus as CompacterPlusPlus
from lightning_peft.strategies import Compose as Compose
from lightning_peft.strategies import DiffPruning as DiffPruning
from lightning_peft.strategies import DoRA as DoRA
from lightning_peft.strategies import DyLoRA as DyLoRA
from lightning_peft.strategies import FISHMask as FISHMask
from lightning_peft.strategies import Full as Full
from lightning_peft.strategies import Gated as Gated
from lightning_peft.strategies import Head as Head
from lightning_peft.strategies import HoulsbyAdapter as HoulsbyAdapter
from lightning_peft.strategies import LadderSideTuning as LadderSideTuning
from lightning_peft.strategies import LayerSelection as LayerSelection
from lightning_peft.strategies import LNTuning as LNTuning
from lightning_peft.strategies import LoHa as LoHa
from lightning_peft.strategies import LoKr as LoKr
from lightning_peft.strategies import LoRA as LoRA
from lightning_peft.strategies import LoRAFA as LoRAFA
from lightning_peft.strategies import LoRAPlus as LoRAPlus
from lightning_peft.strategies import MagnitudeMask as MagnitudeMask
from lightning_peft.strategies import MethodInfo as MethodInfo
from lightning_peft.strategies import Mixture as Mixture
from lightning_peft.strategies import MoRA as MoRA
from lightning_peft.strategies import ParallelAdapter as ParallelAdapter
from lightning_peft.strategies import PEFTStrategy as PEFTStrategy
from lightning_peft.strategies import PfeifferAdapter as PfeifferAdapter
from lightning_peft.strategies import PrefixTuning as PrefixTuning
from lightning_peft.strategies import PromptTuning as PromptTuning
from lightning_peft.strategies import PTuning as PTuning
from lightning_peft.strategies import PTuningV2 as PTuningV2
from lightning_peft.strategies import QDoRA as QDoRA
from lightning_peft.strategies import QLoRA as QLoRA
from lightning_peft.strategies import RandomMask as RandomMask
from lightning_peft.strategies import ReLoRA as ReLoRA
from lightning_peft.strategies import ReMoRA as ReMoRA
from lightning_peft.strategies import TokenRows as TokenRows
from lightning_peft.strategies import UniPELT as UniPELT
from lightning_peft.strategies import VeRA as VeRA
from lightning_peft.strategies import VisualPromptTuning as VisualPromptTuning
from lightning_peft.strategies import calibrate as calibrate
from lightning_peft.strategies import get_method as get_method
from lightning_peft.strategies import inject as inject
from lightning_peft.strategies import list_methods as list_methods
from lightning_peft.strategies import register as register
from lightning_peft.strategies import resolve as resolve
from lightning_peft.surgery.anatomy import anatomy_of as anatomy_of
from lightning_peft.surgery.handle import Handle as Handle
from lightning_peft.surgery.handle import handles as handles
from lightning_peft.surgery.targets import Targets as Targets

if TYPE_CHECKING:
    from lightning_peft import interop as interop
    from lightning_peft.cost import CostReport as CostReport
    from lightning_peft.cost import estimate as estimate
    from lightning_peft.training import PEFTCallback as PEFTCallback
    from lightning_peft.training import PEFTDataModule as PEFTDataModule
    from lightning_peft.training import PEFTLightningModule as PEFTLightningModule
    from lightning_peft.training import load_from_checkpoint as load_from_checkpoint
    from lightning_peft.training import shard as shard

__version__ = "0.1.0"
_COST = ("CostReport", "estimate")
_TRAINING = ("PEFTCallback", "PEFTDataModule", "PEFTLightningModule", "load_from_checkpoint", "shard")


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        return getattr(importlib.import_module("lightning_peft.training"), name)
    if name == "interop":
        return importlib.import_module("lightning_peft.interop")
    if name in _COST:
        return getattr(importlib.import_module("lightning_peft.cost"), name)
    raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "interop", *_COST, *_TRAINING})
