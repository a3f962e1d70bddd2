"""Methods that express a change of weights with few parameters."""

from lightning_peft.strategies.reparameterized.adalora import AdaLoRA as AdaLoRA
from lightning_peft.strategies.reparameterized.dora import DoRA as DoRA
from lightning_peft.strategies.reparameterized.lora import LoRA as LoRA
from lightning_peft.strategies.reparameterized.qlora import QDoRA as QDoRA
from lightning_peft.strategies.reparameterized.qlora import QLoRA as QLoRA
from lightning_peft.strategies.reparameterized.vera import VeRA as VeRA
