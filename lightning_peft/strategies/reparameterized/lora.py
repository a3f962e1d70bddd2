"""LoRA: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.

``h = W x + c B A x`` with A (r x in), B (out x r), c = alpha / r; only A and B train, B starts at zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.low_rank import FROM_WEIGHT, LoRAInit, LowRankAdapter
from lightning_peft.quantization.preparation import loftq_factors, recipe_of
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.ranked import RankedStrategy
from lightning_peft.strategies.strategy import ALL_KINDS
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Build, Plan, Train
from lightning_peft.surgery.layers import DENSE, storage_of
from lightning_peft.surgery.sites import Site
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
class LoRA(RankedStrategy):
    """Low-rank adaptation of any layer kind.

    Args:
        rank: r, between 1 and the smaller side of the layer.
        alpha: Numerator of the scaling c = alpha / r.
        dropout: Dropout on the input of the low-rank branch, in training, between 0 and 1; embeddings have none.
        rank_stabilized: Use c = alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).
        rank_per_target: Other ranks for some targets, by role, name, glob or ``re:`` pattern; the first match wins.
        alpha_per_target: Other alphas for some targets.
        bias: Train no biases, those of the adapted layers, or all of the model.
        init: ``default``, ``gaussian``, ``pissa`` (principal singular vectors, arXiv 2404.02948), ``olora`` (QR decomposition, arXiv
            2406.01775; under both the base stays as it is) or ``loftq`` (what quantization has lost, arXiv 2310.08659; the base was
            made by ``lp.quantize(model, loftq=...)``).
    """

    rank_stabilized: bool = False
    bias: Literal["none", "adapted", "all"] = "none"
    init: LoRAInit = "default"

    @property
    def identity_at_init(self) -> bool:
        # Two equal products cancel up to rounding only (PiSSA, OLoRA); LoftQ is to be closer to the dense base than the quantized one is.
        return self.init in ("default", "gaussian")

    def plan(self, anatomy: Anatomy) -> Plan:
        plan = super().plan(anatomy)
        if self.bias == "none":
            return plan
        paths = {s.path for s in self.sites(anatomy)} if self.bias == "adapted" else None
        found = biases(anatomy.root, paths)
        if not found:
            raise ConfigError(
                f"{type(self).__name__}: bias='{self.bias}', but {'the model has' if paths is None else 'the adapted layers have'} no bias."
            )
        return Plan((*plan.edits, *(Train(path, name) for path, name in found)))

    def check_base(self, anatomy: Anatomy) -> None:
        super().check_base(anatomy)
        if self.init == "loftq":
            sites = self.sites(anatomy)
            for site, rank in zip(sites, self.ranks(sites, anatomy), strict=True):
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

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        spec, name = site.spec, type(self).__name__
        limit = min(spec.out_features, spec.in_features * spec.groups)
        if rank > limit:
            raise ConfigError(
                f"{name}: rank={rank} is beyond '{site.key}' ({spec.out_features} x {spec.in_features}), where at most {limit} makes "
                "sense. Lower it, or set rank_per_target for this layer."
            )
        if rank % spec.groups:
            raise ConfigError(f"{name}: rank={rank} at '{site.key}' must be a multiple of its {spec.groups} convolution groups.")
        if self.init in FROM_WEIGHT and spec.groups > 1:
            raise UnsupportedLayerError(
                f"{name}: init='{self.init}' at '{site.key}': a grouped convolution cannot be decomposed as a whole. Exclude it, or take "
                "init='default'."
            )
        return self.adapter(rank, alpha / (rank**0.5 if self.rank_stabilized else rank))

    def adapter(self, rank: int, scaling: float) -> Build:
        """Return what builds the adapter of one layer."""
        return functools.partial(LowRankAdapter, rank=rank, scaling=scaling, dropout=self.dropout, init=self.init)
