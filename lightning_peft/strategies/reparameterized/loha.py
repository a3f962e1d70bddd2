"""LoHa: FedPara, arXiv 2108.06098, equation 2; LyCORIS, arXiv 2309.14859: ``ΔW = c (A₁B₁) ⊙ (A₂B₂)``, of rank up to r²."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.errors import ConfigError
from lightning_peft.nn.products import HadamardAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.ranked import RankedStrategy
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.sites import Site


@register(
    name="loha",
    family="reparameterized",
    summary="Adds two low-rank products multiplied entry by entry, of up to the square of their rank.",
    paper="FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class LoHa(RankedStrategy):
    """Low-rank Hadamard product; in the forward it is computed as a product of rank r², and never made whole.

    Args:
        rank: r of both products.
        alpha: Numerator of the scaling c = alpha / r.
    """

    alpha: float = 8.0

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        limit = min(site.spec.out_features, site.spec.in_features)
        if rank > limit:
            raise ConfigError(
                f"LoHa: rank={rank} is beyond '{site.key}' ({site.spec.out_features} x {site.spec.in_features}), where at most {limit} "
                "makes sense. Lower it, or set rank_per_target for this layer."
            )
        return functools.partial(HadamardAdapter, rank=rank, scaling=alpha / rank, dropout=self.dropout)
