"""OFT: Qiu et al. 2023, arXiv 2306.07280: ``W' = W Rᵀ`` with R orthogonal and block-diagonal, on the input side as in HF peft."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from lightning_peft.errors import ConfigError
from lightning_peft.nn.orthogonal import BlockRotationAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Build, Plan, adapt
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import values_for


@register(
    name="oft",
    family="reparameterized",
    summary="Rotates the input of a layer in blocks, which keeps the angles between the rows of its weight.",
    paper="Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"linear", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"block_size": 2},
)
@dataclass(frozen=True, kw_only=True)
class OFT(PEFTStrategy):
    """Orthogonal fine-tuning with Cayley's parametrisation, R = (I − Q)(I + Q)⁻¹ in each block.

    Args:
        block_size: β, a divisor of the input width of every adapted layer.
        block_size_per_target: Other sizes for some targets, by role, name, glob or ``re:`` pattern; the first match wins.
        share_blocks: All blocks of a layer are one.
        neumann_terms: Approximate the inverse by so many terms of Neumann's series, 5 in HF peft; 0 computes it. HF's series is that
            of −Q: a file made there with it holds −Q.
        epsilon: COFT: keep ‖Q‖ of a block within ε / sqrt(number of blocks), 6e-5 in HF peft; None for no bound.
    """

    block_size: int = 32
    block_size_per_target: dict[str, int] = field(default_factory=dict)
    share_blocks: bool = False
    neumann_terms: int = 0
    epsilon: float | None = None

    def validate(self) -> None:
        rule = "a rotation needs at least 2 dimensions"
        require(self.block_size >= 2, self, "block_size", rule)
        require(all(b >= 2 for b in self.block_size_per_target.values()), self, "block_size_per_target", rule)
        require(self.neumann_terms == 0 or self.neumann_terms >= 2, self, "neumann_terms", "it must be 0 (exact) or at least 2")
        require(self.epsilon is None or 0 < self.epsilon < math.inf, self, "epsilon", "it must be positive and finite, or None")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        sizes = values_for(sites, self.block_size_per_target, self.block_size, anatomy)
        return Plan(tuple(adapt(site, self._build(site, size)) for site, size in zip(sites, sizes, strict=True)))

    def _build(self, site: Site, size: int) -> Build:
        width = site.spec.in_features
        if width % size:
            fitting = [b for b in range(2, min(width, 64) + 1) if width % b == 0]
            raise ConfigError(
                f"OFT: block_size={size} does not divide the input of '{site.key}', {width} wide. Sizes that do: "
                f"{', '.join(map(str, fitting)) or 'none'}. Choose one, for this layer alone in block_size_per_target, or exclude it."
            )
        return functools.partial(
            BlockRotationAdapter,
            block_size=size,
            share_blocks=self.share_blocks,
            neumann_terms=self.neumann_terms,
            epsilon=self.epsilon,
        )
