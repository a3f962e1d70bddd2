"""VeRA: Kopiczko et al. 2023, arXiv 2310.11454, equation 2: ``h = W x + Λ_b B Λ_d A x``; A and B random, frozen, shared."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.vector_scaling import SharedProjections, VectorScaledAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt


@register(
    name="vera",
    family="reparameterized",
    summary="Trains two vectors per layer around one pair of random matrices that all layers share.",
    paper="VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454",
    lr=4e-3,
    mergeable=True,
    layer_kinds=frozenset({"linear"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 4},
)
@dataclass(frozen=True, kw_only=True)
class VeRA(PEFTStrategy):
    """Vector-based random matrix adaptation of linear layers.

    Args:
        rank: Rows of A; the paper uses 256 to 1024, since only vectors train.
        dropout: Dropout on the input of the branch, in training.
        d_initial: Initial value of λ_d.
        projection_seed: Seed of the shared random matrices.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_seed: int = 0

    def validate(self) -> None:
        require(self.rank >= 1, self, "rank", "it must be at least 1")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(self.d_initial != 0.0, self, "d_initial", "with 0 no gradient ever reaches the vectors")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        bare = [s.key for s in sites if not s.spec.has_input]
        if bare:
            raise UnsupportedLayerError(
                f"VeRA: '{bare[0]}' can be adapted through its weight only; VeRA needs a layer's input. Exclude it."
            )
        shared = functools.partial(
            SharedProjections,
            rank=self.rank,
            widest_in=max(s.spec.in_features for s in sites),
            widest_out=max(s.spec.out_features for s in sites),
            seed=self.projection_seed,
        )
        build = functools.partial(VectorScaledAdapter, rank=self.rank, dropout=self.dropout, d_initial=self.d_initial)
        return Plan(tuple(adapt(site, build) for site in sites), {"vera": shared})
