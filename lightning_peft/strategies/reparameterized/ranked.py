"""What methods with a rank per layer have in common: the rank, its scaling, other values for some targets, dropout of the branch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Build, Edit, Plan, adapt
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import values_for


@dataclass(frozen=True, kw_only=True)
class RankedStrategy(PEFTStrategy):
    """A branch beside each adapted layer, whose size follows from a rank.

    Args:
        rank: r.
        alpha: Numerator of the scaling.
        dropout: Dropout on the input of the branch, in training, between 0 and 1; embeddings have none.
        rank_per_target: Other ranks for some targets, by role, name, glob or ``re:`` pattern; the first match wins.
        alpha_per_target: Other alphas for some targets.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_per_target: dict[str, int] = field(default_factory=dict)
    alpha_per_target: dict[str, float] = field(default_factory=dict)

    def validate(self) -> None:
        require(self.rank >= 1, self, "rank", "it must be at least 1")
        require(0 < self.alpha < math.inf, self, "alpha", "it must be positive and finite")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(all(r >= 1 for r in self.rank_per_target.values()), self, "rank_per_target", "each rank must be at least 1")
        finite = all(0 < a < math.inf for a in self.alpha_per_target.values())
        require(finite, self, "alpha_per_target", "each alpha must be positive and finite")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        alphas = values_for(sites, self.alpha_per_target, self.alpha, anatomy)
        return Plan(tuple(self._edit(*each) for each in zip(sites, self.ranks(sites, anatomy), alphas, strict=True)))

    def ranks(self, sites: Sequence[Site], anatomy: Anatomy) -> tuple[int, ...]:
        """Return the rank at each site."""
        return values_for(sites, self.rank_per_target, self.rank, anatomy)

    def _edit(self, site: Site, rank: int, alpha: float) -> Edit:
        if self.dropout and not site.spec.has_input:
            raise UnsupportedLayerError(
                f"{type(self).__name__}: dropout={self.dropout} at '{site.key}', whose weight is read inside another forward: there is no "
                "input to drop. Set dropout to 0, or exclude it."
            )
        return adapt(site, self.build(site, rank, alpha))

    @abstractmethod
    def build(self, site: Site, rank: int, alpha: float) -> Build:
        """Return what builds the adapter of one layer.

        Raises:
            ConfigError: The rank does not fit the layer.
            UnsupportedLayerError: The layer is none for this method.
        """
