"""LoKr: LyCORIS, arXiv 2309.14859: ``ΔW = c W₁ ⊗ W₂``; with whole factors it is KronA, arXiv 2212.10650."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.products import KroneckerAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.ranked import RankedStrategy
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.sites import Site


@register(
    name="lokr",
    family="reparameterized",
    summary="Adds a Kronecker product of two small matrices, of high rank for few parameters.",
    paper="LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 1, "alpha": 2.0},
)
@dataclass(frozen=True, kw_only=True)
class LoKr(RankedStrategy):
    """Low-rank Kronecker product. The sizes of the factors follow from those of the layer.

    Args:
        rank: r of the second factor, where a product of two is smaller than it; any rank fits, a large one means whole factors.
        alpha: Numerator of the scaling c = alpha / r.
        factor: Rows and columns of the first factor, where they divide those of the layer, else the most to accept; -1 makes both
            factors as equal as possible.
        decompose_both: The first factor is a product of two as well, where that is smaller.
    """

    alpha: float = 8.0
    factor: int = -1
    decompose_both: bool = False

    def validate(self) -> None:
        super().validate()
        require(self.factor == -1 or self.factor >= 1, self, "factor", "it must be -1 or at least 1")

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        options = dict(rank=rank, scaling=alpha / rank, dropout=self.dropout)
        return functools.partial(KroneckerAdapter, **options, factor=self.factor, decompose_both=self.decompose_both)  # type: ignore[arg-type]
