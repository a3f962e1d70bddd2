"""Methods that add modules or tokens."""

from lightning_peft.strategies.additive.houlsby import HoulsbyAdapter as HoulsbyAdapter
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning as PrefixTuning
from lightning_peft.strategies.additive.prompt_tuning import PromptTuning as PromptTuning
