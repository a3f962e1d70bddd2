"""LoRA+: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.nn.low_rank import LowRankAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.handle import Slot


@register(
    name="lora_plus",
    family="reparameterized",
    summary="LoRA with a larger learning rate for the factor that starts at zero.",
    paper="LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354",
    lr=5e-5,
    mergeable=True,
    layer_kinds=LoRA.info.layer_kinds,
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA whose B learns ``ratio`` times as fast as its A; the learning rate of the optimizer is that of A.

    The options of LoRA, and:

    Args:
        ratio: λ = η_B / η_A. Both factors of an embedding keep the optimizer's rate: there A starts at zero.
    """

    ratio: float = 16.0

    def validate(self) -> None:
        super().validate()
        require(0 < self.ratio < float("inf"), self, "ratio", "it must be positive and finite")

    def group_options(self, slot: Slot) -> dict[str, float]:
        adapter = slot.owner
        faster = isinstance(adapter, LowRankAdapter) and slot.attribute == "lora_B" and adapter.spec.kind != "embedding"
        return {"lr_scale": self.ratio} if faster and self.ratio != 1 else {}
