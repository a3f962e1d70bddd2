"""Compacter: Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv 2106.04647.

Houlsby's adapters, and with Compacter++ those behind the feed-forward sub-layer alone, whose two matrices are sums of Kronecker products
with n small rules that all layers share. Deviations: training starts at the identity (``init="compacter"`` is the paper's near
identity), and the norms train only with ``train_norms=True``, as they do in the paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.errors import ConfigError
from lightning_peft.nn.hypercomplex import RULES, CompacterAdapter, CompacterInit, HypercomplexRules
from lightning_peft.strategies.additive.bottleneck import BottleneckStrategy
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, Edit, Plan
from lightning_peft.surgery.sites import Site


@register(
    name="compacter",
    family="additive",
    summary="Bottlenecks after attention and feed-forward sub-layers, made of Kronecker products with shared factors.",
    paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647",
    lr=3e-3,
    layer_kinds=frozenset({"linear"}),
    default_roles=("attention.output", "mlp.down"),
    example={"width": 4, "n": 2},
)
@dataclass(frozen=True, kw_only=True)
class Compacter(BottleneckStrategy):
    """Hypercomplex bottleneck adapters.

    Args:
        width: Bottleneck width r, a multiple of n; None means the hidden size divided by ``reduction_factor``, up to the next multiple.
        reduction_factor: d / r, used when ``width`` is None.
        n: Number of rules, and side of these matrices; the width of every adapted layer is a multiple of it. The paper uses 4, 8, 12.
        phm_rank: k, rank of the factors that belong to a layer.
        init: ``identity`` (exact identity at the start) or ``compacter`` (the paper's near identity).
        train_norms: Train the norm layers as well, as the paper does.
    """

    reduction_factor: int = 32
    n: int = 4
    phm_rank: int = 1
    init: CompacterInit = "identity"

    def validate(self) -> None:
        super().validate()
        require(self.n >= 1, self, "n", "it must be at least 1")
        require(self.phm_rank >= 1, self, "phm_rank", "it must be at least 1")
        require(self.width is None or self.width % self.n == 0, self, "width", f"it must be a multiple of n={self.n}")

    def plan(self, anatomy: Anatomy) -> Plan:
        return Plan(super().plan(anatomy).edits, {RULES: functools.partial(HypercomplexRules, n=self.n)})

    def edits(self, anatomy: Anatomy, site: Site) -> tuple[Edit, ...]:
        if site.spec.out_features % self.n:
            raise ConfigError(
                f"{type(self).__name__}: n={self.n} does not divide the width {site.spec.out_features} of '{site.key}'. Choose a divisor, or "
                "exclude the layer."
            )
        build = functools.partial(
            CompacterAdapter, width=self.width_at(site), rank=self.phm_rank, activation=self.activation, init=self.init
        )
        return (Attach(site, build),)

    def width_at(self, site: Site) -> int:
        width = super().width_at(site)
        return -(-width // self.n) * self.n


@register(
    name="compacter_plus_plus",
    family="additive",
    summary="Compacter's bottlenecks after the feed-forward sub-layers only.",
    paper="Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647",
    lr=3e-3,
    layer_kinds=Compacter.info.layer_kinds,
    default_roles=("mlp.down",),
    example=Compacter.info.example,
)
@dataclass(frozen=True, kw_only=True)
class CompacterPlusPlus(Compacter):
    """Hypercomplex bottleneck adapters behind the feed-forward layers. The options are those of :class:`Compacter`."""
