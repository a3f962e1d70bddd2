"""Unstructured masks: a small share of all weights trains, chosen by a score, everything else is frozen.

``θ = θ₀ + m ⊙ δ`` with a fixed binary m of round(share · N) ones. Only the δ of masked entries are stored and trained.

Random: the baseline of Sung et al. 2021, arXiv 2111.09839. Smallest magnitude: PaFi, Liao et al. 2023, "Parameter-Efficient Fine-Tuning
without Introducing New Latency", arXiv 2305.16742.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.nn.masking import Mask, MaskedEntries, random_scores
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import ALL_KINDS, PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt, loaded_weight
from lightning_peft.surgery.handle import Slot
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import Targets

MASK = "mask"


@dataclass(frozen=True, kw_only=True)
class WholeModel(PEFTStrategy):
    """What methods have in common that look at all weights.

    ``targets=None`` means every weight and bias of every layer but embeddings and the output head; raw parameters that belong to no
    layer (class tokens, position tables) are left out.

    Args:
        share: Share of the entries of all adapted weights that change.
    """

    share: float = 0.005
    biases: bool = True

    def validate(self) -> None:
        require(0 < self.share <= 1, self, "share", "it must lie above 0, and at most at 1")

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        if self.targets is not None:
            return super().sites(anatomy)
        kinds = self.info.layer_kinds - {"embedding"}
        exclude = tuple(role for role in ("head", "embedding") if anatomy.role_names(role))
        return Targets(include=("*",), exclude=exclude).resolve(anatomy, kinds=kinds)

    def segments(self, sites: Iterable[Site]) -> tuple[int, ...]:
        """Return the number of entries of every weight, and of the bias after it where the layer has one."""
        sizes: list[int] = []
        for site in sites:
            spec = site.spec
            sizes.append(math.prod((*spec.batch, spec.out_features, spec.in_features)))
            sizes += [spec.out_features] * self.has_segment(site)
        return tuple(sizes)

    def has_segment(self, site: Site) -> bool:
        """Return whether the bias of a site takes part."""
        return self.biases and site.spec.has_bias and not site.spec.batch

    def masked(
        self,
        sites: tuple[Site, ...],
        sizes: tuple[int, ...],
        keep: int | tuple[int, ...],
        scores: Callable[[int], Iterable[Tensor]] | None,
    ) -> Plan:
        """Return the plan in which one mask over all segments has the changes."""
        self.require_some(keep if isinstance(keep, int) else sum(keep), sizes)
        edits, segment = [], 0
        for site in sites:
            biases = self.has_segment(site)
            edits.append(adapt(site, functools.partial(MaskedEntries, shared=MASK, segment=segment, biases=biases)))
            segment += 1 + biases
        return Plan(tuple(edits), {MASK: functools.partial(Mask, sizes=sizes, keep=keep, scores=scores)})

    def require_some(self, keep: int, sizes: tuple[int, ...]) -> None:
        """Raise :class:`ConfigError` if the share leaves nothing to train."""
        if not keep:
            raise ConfigError(
                f"{type(self).__name__}: share={self.share} of {sum(sizes):,} entries rounds to none. Raise share, or adapt more layers."
            )

    def group_options(self, slot: Slot) -> dict[str, float]:
        # Decay would pull the changes to 0, which is the base: a penalty on δ, not the usual one on θ.
        return {"weight_decay": 0.0}


@dataclass(frozen=True, kw_only=True)
class MaskStrategy(WholeModel):
    """What mask methods have in common: everything but the scores.

    The mask keeps round(share · N) of the N entries, those with the highest scores in the whole model; among equal ones those that
    come first. Weight decay of the values is 0: it would act on the change, not on the weight.

    Args:
        share: Share of the entries of all adapted weights that change.
        biases: Biases are among them.
        per_tensor: Keep this share of each weight and each bias instead.
    """

    per_tensor: bool = False

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        sizes = self.segments(sites)
        keep: int | tuple[int, ...] = round(self.share * sum(sizes))
        if self.per_tensor:
            keep = tuple(round(self.share * size) for size in sizes)
        return self.masked(sites, sizes, keep, self.scores(anatomy, sites, sizes))

    @abstractmethod
    def scores(
        self, anatomy: Anatomy, sites: tuple[Site, ...], sizes: tuple[int, ...]
    ) -> Callable[[int], Iterable[Tensor]] | None:
        """Return what gives, for a seed, the scores of all segments; None if they come from data."""


@register(
    name="random_mask",
    family="selective",
    summary="Trains a random share of all weights and nothing else.",
    paper="the baseline of Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839",
    lr=1e-3,
    mergeable=True,
    layer_kinds=ALL_KINDS,
    example={"share": 0.1},
)
@dataclass(frozen=True, kw_only=True)
class RandomMask(MaskStrategy):
    """Train a share of the weights, chosen by the seed of torch."""

    def scores(self, anatomy: Anatomy, sites: tuple[Site, ...], sizes: tuple[int, ...]) -> Callable[[int], Iterable[Tensor]]:
        return functools.partial(random_scores, sizes=sizes)


@register(
    name="magnitude_mask",
    family="selective",
    summary="Trains the share of all weights with the smallest (PaFi) or largest magnitude and nothing else.",
    paper="Parameter-Efficient Fine-Tuning without Introducing New Latency, arXiv 2305.16742",
    lr=1e-3,
    mergeable=True,
    layer_kinds=ALL_KINDS,
    example={"share": 0.1},
)
@dataclass(frozen=True, kw_only=True)
class MagnitudeMask(MaskStrategy):
    """Train a share of the weights, chosen by their absolute value; needs no data, but the values of the base.

    Args:
        select: ``smallest`` (PaFi) or ``largest``.
    """

    select: Literal["smallest", "largest"] = "smallest"

    def scores(self, anatomy: Anatomy, sites: tuple[Site, ...], sizes: tuple[int, ...]) -> Callable[[int], Iterable[Tensor]]:
        places = tuple((site, site.module(anatomy.root), self.has_segment(site)) for site in sites)
        return functools.partial(_magnitudes, places=places, sign=1 if self.select == "largest" else -1)


def _magnitudes(seed: int, places: tuple[tuple[Site, nn.Module, bool], ...], sign: int) -> Iterator[Tensor]:
    for site, module, has_bias in places:
        yield sign * loaded_weight(site, module).abs()
        if has_bias:
            bias = site.bias(module)
            assert bias is not None
            yield sign * bias.abs()
