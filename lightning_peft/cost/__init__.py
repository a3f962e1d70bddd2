"""What training with a strategy costs, before it runs: memory, FLOPs, KV cache. The numbers come from running without numbers."""

from lightning_peft.cost.estimate import estimate as estimate
from lightning_peft.cost.estimate import memory as memory
from lightning_peft.cost.report import CostReport as CostReport
from lightning_peft.cost.report import DeviceShare as DeviceShare
from lightning_peft.cost.report import GenerationCost as GenerationCost
from lightning_peft.cost.report import size as size
