"""DoRA: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 6."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.weight_decomposed import WeightDecomposedAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.surgery.edits import Build


@register(
    name="dora",
    family="reparameterized",
    summary="LoRA for the direction of every weight row, and a trained length for each.",
    paper="DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353",
    lr=2e-4,
    mergeable=True,
    identity_at_init=False,
    layer_kinds=frozenset({"linear", "embedding", "conv", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: W' = m ⊙ (W + c·BA) / ‖W + c·BA‖, norms along the rows.

    The options of LoRA, and:

    Args:
        detach_norm: The norm is a constant in the backward pass, as in the paper (section 4.3), which saves memory and time.
    """

    detach_norm: bool = True

    @property
    def identity_at_init(self) -> bool:
        return False  # the bias is added after the scaling, which rounds differently

    def adapter(self, rank: int, scaling: float) -> Build:
        return functools.partial(
            WeightDecomposedAdapter,
            rank=rank,
            scaling=scaling,
            dropout=self.dropout,
            init=self.init,
            detach_norm=self.detach_norm,
        )
