"""All methods. Importing the package registers them; third parties register by entry point ``lightning_peft.methods``."""

from lightning_peft.strategies.additive import HoulsbyAdapter as HoulsbyAdapter
from lightning_peft.strategies.additive import PrefixTuning as PrefixTuning
from lightning_peft.strategies.additive import PromptTuning as PromptTuning
from lightning_peft.strategies.architectural import LadderSideTuning as LadderSideTuning
from lightning_peft.strategies.baselines import Full as Full
from lightning_peft.strategies.baselines import Head as Head
from lightning_peft.strategies.hybrid import Compose as Compose
from lightning_peft.strategies.install import inject as inject
from lightning_peft.strategies.registry import get_method as get_method
from lightning_peft.strategies.registry import list_methods as list_methods
from lightning_peft.strategies.registry import register as register
from lightning_peft.strategies.registry import resolve as resolve
from lightning_peft.strategies.reparameterized import AdaLoRA as AdaLoRA
from lightning_peft.strategies.reparameterized import DoRA as DoRA
from lightning_peft.strategies.reparameterized import LoRA as LoRA
from lightning_peft.strategies.reparameterized import QDoRA as QDoRA
from lightning_peft.strategies.reparameterized import QLoRA as QLoRA
from lightning_peft.strategies.reparameterized import VeRA as VeRA
from lightning_peft.strategies.selective import BitFit as BitFit
from lightning_peft.strategies.selective import TokenRows as TokenRows
from lightning_peft.strategies.strategy import MethodInfo as MethodInfo
from lightning_peft.strategies.strategy import PEFTStrategy as PEFTStrategy
