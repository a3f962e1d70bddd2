"""DyLoRA: Valipour et al. 2022, arXiv 2210.07558, algorithm 1: one training gives a LoRA of every rank up to R."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import optim

from lightning_peft.errors import ConfigError, MergeError, UnsupportedLayerError
from lightning_peft.nn.low_rank import NestedRankAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site
from lightning_peft.types import stable_seed


@register(
    name="dylora",
    family="reparameterized",
    summary="LoRA trained at a random rank in every step, so that it can be cut to any smaller rank afterwards.",
    paper="DyLoRA: Parameter Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation, arXiv 2210.07558",
    lr=2e-4,
    mergeable=True,
    layer_kinds=LoRA.info.layer_kinds,
    default_roles=("attention.query", "attention.value"),
    example={"rank": 3, "alpha": 4.0},
)
@dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRA):
    """LoRA for a range of ranks. ``rank`` is the largest; evaluation and merging take it, unless :meth:`use_rank` says otherwise.

    The options of LoRA, and:

    Args:
        frozen: In a step of rank b only the b-th row of A and column of B learn (the paper's "frozen" mode).
    """

    frozen: bool = False

    def validate(self) -> None:
        super().validate()
        require(self.init in ("default", "gaussian"), self, "init", "the ranks are nested; take 'default' or 'gaussian'")

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        if site.spec.groups > 1:
            raise UnsupportedLayerError(f"DyLoRA: '{site.key}' is a grouped convolution, whose ranks are not nested. Exclude it.")
        return super().build(site, rank, alpha)

    def adapter(self, rank: int, scaling: float) -> Build:
        options = dict(rank=rank, scaling=scaling, dropout=self.dropout, init=self.init, frozen=self.frozen)
        return functools.partial(NestedRankAdapter, **options, power=0.5 if self.rank_stabilized else 1.0)  # type: ignore[arg-type]

    def schedule(self, handle: Handle) -> Schedule:
        return RandomRanks(handle)

    @staticmethod
    def use_rank(handle: Handle, rank: int) -> None:
        """Evaluate and merge at a smaller rank; layers that have fewer keep theirs. Not saved.

        Raises:
            ConfigError: The rank is below 1 or beyond the largest, or the adapter has no nested ranks.
            MergeError: The adapter is merged.
        """
        adapters = _nested(handle)
        most = max((adapter.rank for adapter in adapters), default=0)
        if not 1 <= rank <= most:
            raise ConfigError(f"DyLoRA: rank={rank}, but adapter '{handle.name}' has ranks from 1 to {most}.")
        if handle.merged:
            raise MergeError(
                f"use_rank() while adapter '{handle.name}' is merged: its effect is in the weights. Call unmerge() first."
            )
        for adapter in adapters:
            adapter.used_rank = min(rank, adapter.rank)


def _nested(handle: Handle) -> list[NestedRankAdapter]:
    return [e.adapter for e in handle.entries if isinstance(e.adapter, NestedRankAdapter)]


class RandomRanks(Schedule):
    """Draws the rank of every step, the same share of the largest in all layers; equal on all ranks of a distributed run."""

    def __init__(self, handle: Handle) -> None:
        self.adapters = _nested(handle)
        self.step, self.seed = 0, self.adapters[0].seed

    def on_start(self, total_steps: int) -> None:
        self._draw()

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(stable_seed(self.seed, self.step))
        share = float(torch.rand((), generator=generator, dtype=torch.float64))
        for adapter in self.adapters:
            adapter.trained_rank = 1 + int(share * adapter.rank)

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        self.step += not skipped
        self._draw()

    def on_end(self) -> None:
        for adapter in self.adapters:
            adapter.trained_rank = adapter.used_rank

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seed = state["step"], state["seed"]
        self._draw()
