"""UniPELT: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577, section 3.

A bottleneck adapter, a prefix and LoRA in every block, each under a gate of its own; biases train without one. Figure 2 of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.nn.gates import GateKind
from lightning_peft.strategies.additive.pfeiffer import PfeifferAdapter
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning
from lightning_peft.strategies.hybrid.compose import Composition
from lightning_peft.strategies.hybrid.gated import Gated
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.selective.bitfit import BitFit
from lightning_peft.strategies.strategy import PEFTStrategy


@register(
    name="unipelt",
    family="hybrid",
    summary="A bottleneck adapter, a prefix and LoRA in every block, each under a learned gate.",
    paper="UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, arXiv 2110.07577",
    lr=5e-4,
    identity_at_init=False,
    adds_positions=True,
    ports=("attention_kv",),
    example={"num_virtual_tokens": 3, "projection_size": 5, "rank": 2, "reduction_factor": 1},
)
@dataclass(frozen=True, kw_only=True)
class UniPELT(Composition):
    """Prefix tuning, :class:`PfeifferAdapter` and LoRA on query and value, gated. Not an identity at the start: the prefix takes attention.

    The gate takes the place of LoRA's scaling, so there is no alpha: ``W x + g B A x``.

    Args:
        rank: r of LoRA.
        dropout: Dropout on the input of LoRA.
        reduction_factor: Hidden size divided by the width of the bottleneck.
        num_virtual_tokens: Length of the prefix.
        projection: Compute the prefix with an MLP.
        projection_size: Width of the MLP's hidden layer.
        bias: Train all biases as well, without a gate.
        gate: ``input`` (the paper's) or ``static``; see :class:`Gated` for causal models.
    """

    rank: int = 8
    dropout: float = 0.0
    reduction_factor: int = 16
    num_virtual_tokens: int = 10
    projection: bool = True
    projection_size: int = 512
    bias: bool = False
    gate: GateKind = "input"

    @property
    def strategies(self) -> tuple[PEFTStrategy, ...]:
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens, projection=self.projection, projection_size=self.projection_size
        )
        lora = LoRA(rank=self.rank, alpha=float(self.rank), dropout=self.dropout)  # scaling 1
        gated = (
            Gated(part=prefix, gate=self.gate),
            Gated(part=PfeifferAdapter(reduction_factor=self.reduction_factor, init="bert"), gate=self.gate, gate_std=0.02),
            Gated(part=lora, gate=self.gate),
        )
        return (*gated, BitFit()) if self.bias else gated
