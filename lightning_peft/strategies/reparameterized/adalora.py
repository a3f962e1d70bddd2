"""AdaLoRA: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

Branch: equation 3. Orthogonality: equation 4. Importance: equations 8 to 10. Budget: equation 12.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from lightning_peft.errors import CompatibilityError, ConfigError
from lightning_peft.nn.adaptive_rank import AdaptiveRankAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt
from lightning_peft.surgery.handle import Handle
from lightning_peft.types import placed, whole


@register(
    name="adalora",
    family="reparameterized",
    summary="LoRA in SVD form that moves its rank budget to the layers where it matters.",
    paper="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "tensor"}),
    default_roles=("attention.query", "attention.value"),
    example={"initial_rank": 3, "target_rank": 2, "warmup": 0.2, "final": 0.2},
)
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(PEFTStrategy):
    """LoRA with a rank budget that shrinks and moves between layers during training.

    Args:
        initial_rank: Rank of every layer at the start.
        target_rank: Average rank at the end; the budget is ``target_rank`` times the number of layers.
        alpha: γ; the branch is scaled by γ / initial_rank.
        dropout: Dropout on the input of the branch, in training.
        warmup: Steps before the budget shrinks: a whole number of steps, or a fraction of the run when below 1.
        final: Steps after it has shrunk, with fixed ranks; as ``warmup``.
        interval: Steps between two allocations.
        beta1: Smoothing of the importance.
        beta2: Smoothing of its uncertainty.
        orthogonality: Weight of the orthogonality penalty.
    """

    initial_rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def validate(self) -> None:
        require(self.initial_rank >= 1, self, "initial_rank", "it must be at least 1")
        require(1 <= self.target_rank <= self.initial_rank, self, "target_rank", "it must lie between 1 and initial_rank")
        require(0 < self.alpha < math.inf, self, "alpha", "it must be positive and finite")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(self.warmup >= 0, self, "warmup", "it must not be negative")
        require(self.final >= 0, self, "final", "it must not be negative")
        require(self.interval >= 1, self, "interval", "it must be at least 1")
        require(0 <= self.beta1 < 1, self, "beta1", "it must lie in [0, 1)")
        require(0 <= self.beta2 < 1, self, "beta2", "it must lie in [0, 1)")
        require(self.orthogonality >= 0, self, "orthogonality", "it must not be negative")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        for site in sites:
            limit = min(site.spec.out_features, site.spec.in_features)
            if self.initial_rank > limit:
                raise ConfigError(
                    f"AdaLoRA: initial_rank={self.initial_rank} is beyond '{site.key}', where at most {limit} makes sense."
                )
            if site.spec.batch or site.spec.groups > 1:
                raise ConfigError(f"AdaLoRA: '{site.key}' is a stack or grouped; its ranks cannot be allocated. Exclude it.")
            if self.dropout and not site.spec.has_input:
                raise ConfigError(
                    f"AdaLoRA: dropout={self.dropout} at '{site.key}', which has no input of its own. Set dropout to 0."
                )
        build = functools.partial(AdaptiveRankAdapter, rank=self.initial_rank, alpha=self.alpha, dropout=self.dropout)
        return Plan(tuple(adapt(site, build) for site in sites))

    def schedule(self, handle: Handle) -> Schedule:
        return RankAllocation(self, handle)


class RankAllocation(Schedule):
    """Scores triplets after every optimizer step and switches off those beyond the budget."""

    def __init__(self, strategy: AdaLoRA, handle: Handle) -> None:
        self.strategy, self.handle = strategy, handle
        self.adapters = {e.key: e.adapter for e in handle.entries if isinstance(e.adapter, AdaptiveRankAdapter)}
        self.step, self.total_steps = 0, 0
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_start(self, total_steps: int) -> None:
        self.total_steps = total_steps
        if self._phase(self.strategy.warmup) + self._phase(self.strategy.final) >= total_steps:
            raise ConfigError(
                f"AdaLoRA: warmup={self.strategy.warmup} and final={self.strategy.final} leave no step of {total_steps} in which the "
                "budget could shrink. Train longer, or lower them."
            )

    def _phase(self, value: float) -> int:
        return int(value * self.total_steps) if value < 1 else int(value)

    def budget(self, step: int) -> tuple[int, bool]:
        """Return how many triplets stay after ``step`` steps, and whether this step allocates (equation 12)."""
        count, strategy = len(self.adapters), self.strategy
        start, stop = self._phase(strategy.warmup), self.total_steps - self._phase(strategy.final)
        first, last = strategy.initial_rank * count, strategy.target_rank * count
        if step <= start:
            return first, False
        if step >= stop:
            return last, True
        progress = (step - start) / (stop - start)
        return int(last + (first - last) * (1 - progress) ** 3), step % strategy.interval == 0

    def penalty(self) -> Tensor | None:
        if not self.strategy.orthogonality:
            return None
        norms = torch.stack([a.orthogonality() for a in self.adapters.values()])
        return self.strategy.orthogonality * norms.sum() / (2 * len(self.adapters))

    def before_step(self, optimizer: optim.Optimizer) -> None:
        # By reference, which clipping reaches: a loop of the user's own may call zero_grad() before after_step.
        for key, adapter in self.adapters.items():
            for name in ("lora_A", "lora_E", "lora_B"):
                gradient = getattr(adapter, name).grad
                if gradient is not None:
                    self._gradients[f"{key}.{name}"] = gradient

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        gradients, self._gradients = self._gradients, {}
        if skipped:
            return
        self.step += 1
        stop = self.total_steps - self._phase(self.strategy.final)
        # From the final phase on the ranks are fixed: the scores before it decide for the rest of the run, as in the authors' code.
        if self.step < stop or not self.importance:
            self._update_scores(gradients)
        budget, allocate = self.budget(self.step)
        if allocate:
            if not self.importance:
                raise ConfigError(
                    "AdaLoRA has seen no gradient to score its ranks by. Call before_step(optimizer) before every optimizer step, or "
                    "after_step before zero_grad()."
                )
            self._allocate(budget)

    @torch.no_grad()
    def _update_scores(self, gradients: dict[str, Tensor]) -> None:
        beta1, beta2 = self.strategy.beta1, self.strategy.beta2
        for key, adapter in self.adapters.items():
            for name in ("lora_A", "lora_E", "lora_B"):
                parameter = getattr(adapter, name)
                gradient = gradients.get(f"{key}.{name}", parameter.grad)
                if gradient is None:
                    continue
                now = whole(parameter * gradient).abs().float()  # the same on all ranks, which then drop the same triplets
                smooth = self.importance.setdefault(f"{key}.{name}", torch.zeros_like(now))
                spread = self.uncertainty.setdefault(f"{key}.{name}", torch.zeros_like(now))
                smooth.mul_(beta1).add_(now, alpha=1 - beta1)
                spread.mul_(beta2).add_((now - smooth).abs(), alpha=1 - beta2)

    def scores(self) -> dict[str, Tensor]:
        """Return the score of each triplet, ``(r,)`` per adapter: E's own plus the means over A's row and B's column."""

        def score(name: str) -> Tensor:
            return self.importance[name] * self.uncertainty[name]

        return {
            key: score(f"{key}.lora_E")[:, 0] + score(f"{key}.lora_A").mean(dim=1) + score(f"{key}.lora_B").mean(dim=0)
            for key in self.adapters
            if f"{key}.lora_E" in self.importance
        }

    @torch.no_grad()
    def _allocate(self, budget: int) -> None:
        scores = self.scores()
        dropped = self.strategy.initial_rank * len(scores) - budget
        if dropped <= 0:
            return
        order = torch.cat([s.cpu() for s in scores.values()]).argsort(stable=True)
        keep = torch.ones(order.numel(), dtype=torch.bool)
        keep[order[:dropped]] = False
        for key, part in zip(scores, keep.split(self.strategy.initial_rank), strict=True):
            adapter = self.adapters[key]
            weights = whole(adapter.lora_E.detach())
            adapter.lora_E.copy_(placed(weights.masked_fill(~part[:, None].to(weights.device), 0.0), adapter.lora_E))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "importance": {k: v.clone() for k, v in self.importance.items()},
            "uncertainty": {k: v.clone() for k, v in self.uncertainty.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {f"{key}.{name}" for key in self.adapters for name in ("lora_A", "lora_E", "lora_B")}
        foreign = set(state["importance"]) - known
        if foreign:
            raise CompatibilityError(f"AdaLoRA: the saved schedule scores '{min(foreign)}', which this model does not have.")
        self.step, self.total_steps = state["step"], state["total_steps"]
        devices = {f"{k}.{n}": getattr(a, n).device for k, a in self.adapters.items() for n in ("lora_A", "lora_E", "lora_B")}
        self.importance = {k: v.to(devices[k], copy=True) for k, v in state["importance"].items()}
        self.uncertainty = {k: v.to(devices[k], copy=True) for k, v in state["uncertainty"].items()}
