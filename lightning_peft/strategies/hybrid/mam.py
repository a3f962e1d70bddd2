"""MAM adapter: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, section 4.6.

A prefix with a small bottleneck in attention, and a scaled parallel adapter beside the feed-forward sub-layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.strategies.additive.parallel_adapter import ParallelAdapter
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning
from lightning_peft.strategies.hybrid.compose import Composition
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy


@register(
    name="mam",
    family="hybrid",
    summary="Prefix tuning in attention and a scaled parallel adapter beside the feed-forward sub-layer.",
    paper="Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366",
    lr=2e-4,
    identity_at_init=False,
    adds_positions=True,
    ports=("attention_kv",),
    example={"num_virtual_tokens": 3, "projection_size": 5, "width": 12},
)
@dataclass(frozen=True, kw_only=True)
class MAM(Composition):
    """Prefix tuning plus :class:`ParallelAdapter`. Not an identity at the start: the prefix takes attention.

    Args:
        num_virtual_tokens: p; 30 for summarisation, 16 for GLUE in the paper.
        projection: Compute the prefix with an MLP.
        projection_size: Width of the MLP's hidden layer.
        width: r of the adapter; None is half of the hidden size, the paper's 512 of 1024 (16 for GLUE).
        scaling: Factor of the adapter; the paper has 4, and 2 for GLUE.
    """

    num_virtual_tokens: int = 30
    projection: bool = True
    projection_size: int = 800
    width: int | None = None
    scaling: float = 4.0

    @property
    def strategies(self) -> tuple[PEFTStrategy, ...]:
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens, projection=self.projection, projection_size=self.projection_size
        )
        return prefix, ParallelAdapter(width=self.width, reduction_factor=2, scaling=self.scaling)
