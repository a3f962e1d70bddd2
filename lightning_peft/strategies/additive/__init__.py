"""Methods that add modules, scales or tokens."""

from lightning_peft.strategies.additive.compacter import Compacter as Compacter
from lightning_peft.strategies.additive.compacter import CompacterPlusPlus as CompacterPlusPlus
from lightning_peft.strategies.additive.houlsby import HoulsbyAdapter as HoulsbyAdapter
from lightning_peft.strategies.additive.ia3 import IA3 as IA3
from lightning_peft.strategies.additive.p_tuning import PTuning as PTuning
from lightning_peft.strategies.additive.p_tuning import PTuningV2 as PTuningV2
from lightning_peft.strategies.additive.parallel_adapter import ParallelAdapter as ParallelAdapter
from lightning_peft.strategies.additive.pfeiffer import PfeifferAdapter as PfeifferAdapter
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning as PrefixTuning
from lightning_peft.strategies.additive.prompt_tuning import PromptTuning as PromptTuning
from lightning_peft.strategies.additive.ssf import SSF as SSF
from lightning_peft.strategies.additive.visual_prompt_tuning import VisualPromptTuning as VisualPromptTuning
