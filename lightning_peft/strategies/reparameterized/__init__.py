"""Methods that express a change of weights with few parameters."""

from lightning_peft.strategies.reparameterized.adalora import AdaLoRA as AdaLoRA
from lightning_peft.strategies.reparameterized.dora import DoRA as DoRA
from lightning_peft.strategies.reparameterized.dylora import DyLoRA as DyLoRA
from lightning_peft.strategies.reparameterized.hra import HRA as HRA
from lightning_peft.strategies.reparameterized.loha import LoHa as LoHa
from lightning_peft.strategies.reparameterized.lokr import LoKr as LoKr
from lightning_peft.strategies.reparameterized.lora import LoRA as LoRA
from lightning_peft.strategies.reparameterized.lora_fa import LoRAFA as LoRAFA
from lightning_peft.strategies.reparameterized.lora_plus import LoRAPlus as LoRAPlus
from lightning_peft.strategies.reparameterized.mora import MoRA as MoRA
from lightning_peft.strategies.reparameterized.oft import OFT as OFT
from lightning_peft.strategies.reparameterized.qlora import QDoRA as QDoRA
from lightning_peft.strategies.reparameterized.qlora import QLoRA as QLoRA
from lightning_peft.strategies.reparameterized.relora import ReLoRA as ReLoRA
from lightning_peft.strategies.reparameterized.relora import ReMoRA as ReMoRA
from lightning_peft.strategies.reparameterized.vera import VeRA as VeRA
