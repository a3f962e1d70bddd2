"""HRA: Yuan et al. 2024, arXiv 2405.17484: ``W' = W H_1 ... H_r`` with Householder reflections H_i = I − 2 u_i u_iᵀ / ‖u_i‖²."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from lightning_peft.errors import ConfigError
from lightning_peft.nn.orthogonal import ReflectionAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt
from lightning_peft.surgery.targets import values_for


@register(
    name="hra",
    family="reparameterized",
    summary="Reflects the input of a layer several times: an orthogonal change of low rank.",
    paper="Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, arXiv 2405.17484",
    lr=1e-3,
    mergeable=True,
    identity_at_init=False,
    layer_kinds=frozenset({"linear", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2},
)
@dataclass(frozen=True, kw_only=True)
class HRA(PEFTStrategy):
    """Householder reflection adaptation. At the start the reflections cancel in pairs, up to rounding.

    Args:
        rank: Number of reflections, even; the change of the weight has at most this rank.
        rank_per_target: Other ranks for some targets, by role, name, glob or ``re:`` pattern; the first match wins.
    """

    rank: int = 8
    rank_per_target: dict[str, int] = field(default_factory=dict)

    def validate(self) -> None:
        rule = "it must be even and at least 2: a reflection without its pair would change the model before the first step"
        require(self.rank >= 2 and self.rank % 2 == 0, self, "rank", rule)
        require(all(r >= 2 and r % 2 == 0 for r in self.rank_per_target.values()), self, "rank_per_target", rule)

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        edits = []
        for site, rank in zip(sites, values_for(sites, self.rank_per_target, self.rank, anatomy), strict=True):
            if rank > site.spec.in_features:
                raise ConfigError(
                    f"HRA: rank={rank} is beyond the input of '{site.key}', {site.spec.in_features} wide. Lower it, or set "
                    "rank_per_target for this layer."
                )
            edits.append(adapt(site, functools.partial(ReflectionAdapter, rank=rank)))
        return Plan(tuple(edits))
