"""MoRA: Jiang et al. 2024, "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130, equations 3 to 9.

``h = W x + expand(M compress(x))`` with a square M (r̂ x r̂), r̂ = ⌊sqrt((in + out) r) + 1/2⌋, that starts at zero. ReMoRA is in
:mod:`.relora`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass

from lightning_peft.errors import ConfigError
from lightning_peft.nn.square_matrix import MoRAType, SquareMatrixAdapter, side_of
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.sites import Site


@dataclass(frozen=True, kw_only=True)
class SquareMatrixStrategy(LoRA):
    """What MoRA and ReMoRA have in common: the options of LoRA, and the size of M."""

    def validate(self) -> None:
        super().validate()
        require(self.init == "default", self, "init", "M always starts at zero; take 'default'")

    @property
    @abstractmethod
    def types(self) -> tuple[MoRAType, ...]:
        """The types of maps that stand around M during a run."""

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        spec, name = site.spec, type(self).__name__
        side = side_of(rank, spec.out_features, spec.in_features, self.types)
        if not 1 <= side <= 2 * spec.in_features:
            raise ConfigError(
                f"{name}: rank={rank} at '{site.key}' ({spec.out_features} x {spec.in_features}) makes a square matrix of side {side}, "
                f"which must lie between 1 and {2 * spec.in_features}, twice what it reads. Set rank_per_target for this layer."
            )
        return self.square(side)

    @abstractmethod
    def square(self, side: int) -> Build:
        """Return what builds the adapter of one layer."""


@register(
    name="mora",
    family="reparameterized",
    summary="Adds one trainable square matrix of high rank, with as many numbers as LoRA's two thin ones.",
    paper="MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning, arXiv 2405.12130",
    lr=3e-4,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2},
)
@dataclass(frozen=True, kw_only=True)
class MoRA(SquareMatrixStrategy):
    """High-rank updating: the options of LoRA, so that its name is all that has to change in a configuration.

    ``rank`` is that of the LoRA with as many trainable numbers. MoRA has no scaling: ``alpha``, ``alpha_per_target`` and
    ``rank_stabilized`` are accepted and mean nothing.

    Args:
        mora_type: Which inputs share an entry of M, and which outputs. 6 rotates blocks of the input, for small ranks as 8; 1 sums
            features and repeats outputs r̂ apart, for large ranks as 128; 2 does so with neighbours; 3 sums neighbours and repeats
            r̂ apart; 4 the other way round.
    """

    mora_type: MoRAType = 6

    @property
    def types(self) -> tuple[MoRAType, ...]:
        return (self.mora_type,)

    def square(self, side: int) -> Build:
        return functools.partial(SquareMatrixAdapter, side=side, mora_type=self.mora_type, dropout=self.dropout)
