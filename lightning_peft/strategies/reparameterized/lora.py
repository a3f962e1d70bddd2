"""LoRA: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.

``h = W x + c B A x`` with A (r x in), B (out x r), c = alpha / r; only A and B train, B starts at zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.low_rank import LoRAInit, LowRankAdapter
from lightning_peft.quantization.preparation import loftq_factors, recipe_of
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import ALL_KINDS, PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Build, Edit, Plan, Train, adapt
from lightning_peft.surgery.layers import DENSE, storage_of
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import values_for
from lightning_peft.surgery.walk import biases


@register(
    name="lora",
    family="reparameterized",
    summary="Adds a trainable product of two thin matrices to frozen weights.",
    paper="LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685",
    lr=2e-4,
    mergeable=True,
    layer_kinds=ALL_KINDS,
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class LoRA(PEFTStrategy):
    """Low-rank adaptation of any layer kind.

    Args:
        rank: r, between 1 and the smaller side of the layer.
        alpha: Numerator of the scaling c = alpha / r.
        dropout: Dropout on the input of the low-rank branch, in training, between 0 and 1; embeddings have none.
        rank_stabilized: Use c = alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
        rank_per_target: Other ranks for some targets, by role, name, glob or ``re:`` pattern; the first match wins.
        alpha_per_target: Other alphas for some targets.
        bias: Train no biases, those of the adapted layers, or all of the model.
        init: ``default``, ``gaussian``, ``pissa`` (principal singular vectors, arXiv 2404.02948; the base stays as it is) or
            ``loftq`` (what quantization has lost, arXiv 2310.08659; the base was made by ``lp.quantize(model, loftq=...)``).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    rank_per_target: dict[str, int] = field(default_factory=dict)
    alpha_per_target: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "adapted", "all"] = "none"
    init: LoRAInit = "default"

    def validate(self) -> None:
        require(self.rank >= 1, self, "rank", "it must be at least 1")
        require(0 < self.alpha < math.inf, self, "alpha", "it must be positive and finite")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(all(r >= 1 for r in self.rank_per_target.values()), self, "rank_per_target", "each rank must be at least 1")
        finite = all(0 < a < math.inf for a in self.alpha_per_target.values())
        require(finite, self, "alpha_per_target", "each alpha must be positive and finite")

    @property
    def identity_at_init(self) -> bool:
        # PiSSA's two equal products cancel up to rounding; LoftQ is to be closer to the dense base than the quantized one is.
        return self.init in ("default", "gaussian")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        ranks = self._ranks(sites, anatomy)
        alphas = values_for(sites, self.alpha_per_target, self.alpha, anatomy)
        edits: list[Edit] = [self._edit(*each) for each in zip(sites, ranks, alphas, strict=True)]
        if self.bias != "none":
            paths = {s.path for s in sites} if self.bias == "adapted" else None
            found = biases(anatomy.root, paths)
            if not found:
                raise ConfigError(
                    f"{type(self).__name__}: bias='{self.bias}', but {'the model has' if paths is None else 'the adapted layers have'} no bias."
                )
            edits += [Train(path, name) for path, name in found]
        return Plan(tuple(edits))

    def check_base(self, anatomy: Anatomy) -> None:
        super().check_base(anatomy)
        if self.init == "loftq":
            sites = self.sites(anatomy)
            for site, rank in zip(sites, self._ranks(sites, anatomy), strict=True):
                self._check_prepared(site, rank, site.module(anatomy.root))

    def _check_prepared(self, site: Site, rank: int, module: nn.Module) -> None:
        name, factors, recipe = type(self).__name__, loftq_factors(module), recipe_of(module)
        if factors is None or storage_of(module) == DENSE:
            raise UnsupportedLayerError(
                f"{name}: init='loftq', but nothing is known of what quantization has lost of '{site.key}'. Quantize the dense model "
                f"with lp.quantize(model, loftq={{'rank': {rank}}}), or quantization={{..., 'loftq': {{'rank': {rank}}}}}, and name "
                "the layers that stay dense in neither targets."
            )
        kept = factors[0].shape[-1]
        if rank > kept or (recipe is not None and rank != kept):
            rule = (
                "which takes exactly this rank after more than one iteration"
                if recipe is not None
                else "which is the most there is"
            )
            raise ConfigError(
                f"{name}: rank={rank} at '{site.key}', but its base was prepared by LoftQ with rank {kept}, {rule}. Give both the same."
            )

    def _ranks(self, sites: Sequence[Site], anatomy: Anatomy) -> tuple[int, ...]:
        return values_for(sites, self.rank_per_target, self.rank, anatomy)

    def _edit(self, site: Site, rank: int, alpha: float) -> Edit:
        spec, name = site.spec, type(self).__name__
        limit = min(spec.out_features, spec.in_features * spec.groups)
        if rank > limit:
            raise ConfigError(
                f"{name}: rank={rank} is beyond '{site.key}' ({spec.out_features} x {spec.in_features}), where at most {limit} makes "
                "sense. Lower it, or set rank_per_target for this layer."
            )
        if rank % spec.groups:
            raise ConfigError(f"{name}: rank={rank} at '{site.key}' must be a multiple of its {spec.groups} convolution groups.")
        if self.dropout and not spec.has_input:
            raise UnsupportedLayerError(
                f"{name}: dropout={self.dropout} at '{site.key}', whose weight is read inside another forward: there is no input to "
                "drop. Set dropout to 0, or exclude it."
            )
        if self.init == "pissa" and spec.groups > 1:
            raise UnsupportedLayerError(
                f"{name}: init='pissa' at '{site.key}': a grouped convolution has no singular vectors as a whole."
            )
        return adapt(site, self.adapter(rank, alpha / (rank**0.5 if self.rank_stabilized else rank)))

    def adapter(self, rank: int, scaling: float) -> Build:
        """Return what builds the adapter of one layer."""
        return functools.partial(LowRankAdapter, rank=rank, scaling=scaling, dropout=self.dropout, init=self.init)
