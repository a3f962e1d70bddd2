"""ReLoRA: Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695, algorithm 1; and ReMoRA.

ReMoRA: Jiang et al. 2024, arXiv 2405.12130, section 3.3. Both train in rounds. At the end of each, what was learnt is set aside
beside W, the branch starts anew, the optimizer forgets its moments, and the steps grow again from small ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.restarts import Restartable, RestartedLowRankAdapter, RestartedSquareMatrixAdapter
from lightning_peft.nn.square_matrix import MoRAType
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.reparameterized.mora import MoRA, SquareMatrixStrategy
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.edits import Build
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site


@dataclass(frozen=True, kw_only=True)
class InRounds(LoRA):
    """What ReLoRA and ReMoRA have in common: the options of LoRA, and the rounds.

    Args:
        rounds: Rounds of equal length into which the run is divided.
        warmup: Steps after a restart in which the updates grow to their full size: a whole number, or a fraction of a round when
            below 1.
    """

    rounds: int = 4
    warmup: float = 0.1

    def validate(self) -> None:
        super().validate()
        require(self.init in ("default", "gaussian"), self, "init", "every round starts anew; take 'default' or 'gaussian'")
        require(self.rounds >= 2, self, "rounds", "with one round it is the method without restarts")
        require(self.warmup >= 0, self, "warmup", "it must not be negative")

    def schedule(self, handle: Handle) -> Schedule:
        return Restarts(self, handle)


@register(
    name="relora",
    family="reparameterized",
    summary="LoRA in rounds: each adds a low-rank change to those before, so that the sum has a higher rank.",
    paper="ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv 2307.05695",
    lr=4e-4,
    mergeable=True,
    layer_kinds=LoRA.info.layer_kinds,
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "alpha": 4.0, "rounds": 2},
)
@dataclass(frozen=True, kw_only=True)
class ReLoRA(InRounds):
    """Low-rank adaptation with restarts. The change of a weight has rank up to ``rounds * rank``, and so many factors are in its file.

    Finished rounds lie beside the weight, not in it: nothing is rounded, quantized bases stay as they are, and the base comes back
    when the adapter is disabled. The learning rate may follow any scheduler; updates after a restart are scaled down on top of it.
    """

    def build(self, site: Site, rank: int, alpha: float) -> Build:
        if site.spec.groups > 1:
            raise UnsupportedLayerError(f"ReLoRA: '{site.key}' is a grouped convolution, whose rounds do not add up. Exclude it.")
        return super().build(site, rank, alpha)

    def adapter(self, rank: int, scaling: float) -> Build:
        options = dict(rank=rank, scaling=scaling, dropout=self.dropout, init=self.init, rounds=self.rounds)
        return functools.partial(RestartedLowRankAdapter, **options)  # type: ignore[arg-type]


@register(
    name="remora",
    family="reparameterized",
    summary="MoRA in rounds with other maps around the square matrix in each.",
    paper="MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning, arXiv 2405.12130, section 3.3",
    lr=5e-4,
    mergeable=True,
    layer_kinds=MoRA.info.layer_kinds,
    default_roles=("attention.query", "attention.value"),
    example={"rank": 2, "rounds": 2},
)
@dataclass(frozen=True, kw_only=True)
class ReMoRA(InRounds, SquareMatrixStrategy):
    """MoRA with restarts. Rounds of one type of maps add up in one square matrix, so memory grows with the types only.

    Args:
        mora_types: Types of the rounds, in turn; see :class:`MoRA`.
    """

    mora_types: tuple[MoRAType, ...] = (1, 2)

    def validate(self) -> None:
        super().validate()
        distinct = len(set(self.mora_types)) == len(self.mora_types)
        require(bool(self.mora_types) and distinct, self, "mora_types", "one or more different types are needed")

    @property
    def types(self) -> tuple[MoRAType, ...]:
        return self.mora_types

    def square(self, side: int) -> Build:
        return functools.partial(RestartedSquareMatrixAdapter, side=side, types=self.mora_types, dropout=self.dropout)


class Restarts(Schedule):
    """Restarts all adapters at the end of every round but the last."""

    def __init__(self, strategy: InRounds, handle: Handle) -> None:
        self.name, self.rounds, self.warmup = type(strategy).__name__, strategy.rounds, strategy.warmup
        self.adapters = [e.adapter for e in handle.entries if isinstance(e.adapter, Restartable)]
        self.step, self.total_steps = 0, 0
        self._optimizer: optim.Optimizer | None = None
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def on_start(self, total_steps: int) -> None:
        self.total_steps = total_steps
        if any(hasattr(p, "to_local") for p in self._parameters()):
            raise ConfigError(f"{self.name} cannot set sharded tensors aside. Train with DDP or on one device.")
        length = total_steps // self.rounds
        if self._warmup_steps() >= length:
            raise ConfigError(
                f"{self.name}: {self.rounds} rounds of {total_steps} steps have {length} each, and warmup={self.warmup} leaves none of "
                "them. Train longer, or lower rounds or warmup."
            )

    def _warmup_steps(self) -> int:
        return int(self.warmup * (self.total_steps // self.rounds)) if self.warmup < 1 else int(self.warmup)

    def round_at(self, step: int) -> int:
        """Return how many rounds are finished after ``step`` steps; the last one never ends."""
        return min(step * self.rounds // self.total_steps, self.rounds - 1)

    def pace(self, step: int) -> float:
        """Return by what the update of the step after ``step`` steps is multiplied."""
        finished = self.round_at(step)
        since = step - -(-finished * self.total_steps // self.rounds)
        return min(1.0, (since + 1) / (self._warmup_steps() + 1)) if finished else 1.0

    def _parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters()]

    def before_step(self, optimizer: optim.Optimizer) -> None:
        self._optimizer = optimizer
        if self.pace(self.step) < 1:
            self._before = [(p, p.detach().clone()) for p in self._parameters()]

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        before, self._before = self._before, []
        if skipped:
            return
        with torch.no_grad():
            # As a smaller learning rate would do it, whatever scheduler has set that of the group, and whoever else is in the group.
            for parameter, old in before:
                parameter.lerp_(old, 1 - self.pace(self.step))
        self.step += 1
        finished = self.round_at(self.step)
        if finished > self.round_at(self.step - 1):
            self._forget(optimizer or self._optimizer)
            for adapter in self.adapters:
                adapter.restart(finished)

    def _forget(self, optimizer: optim.Optimizer | None) -> None:
        """Drop the moments of the last round, which would carry the new one on along the old path."""
        if optimizer is None:
            raise ConfigError(
                f"{self.name} resets the optimizer at a restart. Call after_step(optimizer) with it, not with None."
            )
        for parameter in self._parameters():
            optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total_steps = state["step"], state["total_steps"]
