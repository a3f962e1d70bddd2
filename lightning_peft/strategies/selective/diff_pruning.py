"""Diff pruning: Guo et al. 2021, "Parameter-Efficient Transfer Learning with Diff Pruning", arXiv 2012.07463.

``θ = θ₀ + z ⊙ w`` with hard-concrete gates z and a penalty on the expected number of open ones (section 3.1), then only the largest
entries of z ⊙ w, which train on (section 3.3). Structured: gates of groups on top (section 3.2); a group is a parameter tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, optim

from lightning_peft.errors import ConfigError
from lightning_peft.nn.hard_concrete import GatedDifference
from lightning_peft.nn.masking import top_entries
from lightning_peft.strategies.install import exchange, start_from
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.selective.masks import WholeModel
from lightning_peft.strategies.strategy import ALL_KINDS, Calibration, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt
from lightning_peft.surgery.handle import Handle, Slot
from lightning_peft.types import in_pieces


@register(
    name="diff_pruning",
    family="selective",
    summary="Learns a sparse change of all weights, its places by gates and its values together.",
    paper="Parameter-Efficient Transfer Learning with Diff Pruning, arXiv 2012.07463",
    lr=1e-5,
    mergeable=True,
    layer_kinds=ALL_KINDS,
    example={"share": 0.1},
)
@dataclass(frozen=True, kw_only=True)
class DiffPruning(WholeModel):
    """Learn where and by how much a small share of the weights changes.

    Three stages of one run: gates and values train; at the end of this, round(share · N) entries stay, those of the largest change in
    the whole model; these train on, and all others are the base's again, bit for bit. Evaluation uses the gates without noise.

    Memory in training, and the file of a run, are of the size of the adapted weights twice: a value and a gate for each.
    :meth:`finish` turns a finished adapter into the few entries that it has kept, which is what to save and share.

    Args:
        share: Share of the entries of all adapted weights that change in the end.
        biases: Biases are among them.
        structured: Each weight and each bias has a gate for the whole of it as well.
        penalty: λ, on the expected number of open gates.
        alpha: Start of the gates' α.
        alpha_lr_scale: Learning rate of the gates, as a multiple of that of the values; the paper's are 0.1 and 1e-5.
        fine_tune: Share of the steps that come after the pruning.
        finished: The adapter is what :meth:`finish` made; not for a new run.
    """

    structured: bool = False
    penalty: float = 1.25e-7
    alpha: float = 5.0
    alpha_lr_scale: float = 1e4
    fine_tune: float = 0.4
    finished: bool = False

    def validate(self) -> None:
        super().validate()
        require(self.penalty >= 0, self, "penalty", "it must not be negative")
        require(-20 < self.alpha < 20, self, "alpha", "beyond 20 a gate is stuck")
        require(self.alpha_lr_scale >= 0, self, "alpha_lr_scale", "it must not be negative")
        require(0 < self.fine_tune < 1, self, "fine_tune", "it must lie between 0 and 1")

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        sizes = self.segments(sites)
        keep = round(self.share * sum(sizes))
        if self.finished:
            return self.masked(sites, sizes, keep, None)
        self.require_some(keep, sizes)
        build = functools.partial(GatedDifference, alpha=self.alpha, structured=self.structured)
        return Plan(tuple(adapt(site, functools.partial(build, biases=self.has_segment(site))) for site in sites))

    def schedule(self, handle: Handle) -> Schedule:
        return Schedule() if self.finished else Stages(self, handle)

    @property
    def from_data(self) -> bool:
        return self.finished  # a finished adapter comes from a run

    def calibrate(self, handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Calibration:
        raise ConfigError(
            "DiffPruning(finished=True) is what finish(handle) makes of a trained adapter, and its file brings it; for a new run leave "
            "finished out."
        )

    def finish(self, handle: Handle, *, anatomy: Any = None) -> Handle:
        """Replace a trained adapter by one of the same effect that holds the kept entries only, as index and value.

        Args:
            handle: The adapter, after the pruning; it is removed.
            anatomy: As it was given to :func:`lightning_peft.inject`.

        Raises:
            ConfigError: The adapter is not one of this strategy alone, or its run has not come to the pruning.
            MergeError: It is merged.
            ConflictError: There are other adapters on the model.
        """
        adapters = [e.adapter for e in handle.entries if isinstance(e.adapter, GatedDifference)]
        if handle.strategy != self or self.finished:
            raise ConfigError(f"DiffPruning.finish: adapter '{handle.name}' is {handle.strategy}, which is not of this strategy.")
        if not all(adapter.fixed for adapter in adapters):
            raise ConfigError(
                f"DiffPruning.finish: adapter '{handle.name}' is not pruned yet. Train to the end of the run first."
            )
        with torch.no_grad():
            kept = torch.cat([adapter.diff_alpha.cpu() > 0 for adapter in adapters])
            values = torch.cat([adapter.difference().cpu() for adapter in adapters])[kept]
        sparse = exchange(handle, replace(self, finished=True), "finish()", dtype=values.dtype, anatomy=anatomy)
        found = {"values": values, "indices": kept.nonzero().flatten()}
        start_from(sparse, {slot.key: found[slot.attribute] for slot in sparse.slots})
        return sparse

    def group_options(self, slot: Slot) -> dict[str, float]:
        options = super().group_options(slot)
        return {**options, "lr_scale": self.alpha_lr_scale} if slot.attribute.startswith("diff_alpha") else options

    def may_rest(self, slot: Slot) -> bool:
        # After the pruning gates are open or closed for good, and a tensor may have no entry that was kept.
        adapter = slot.owner
        if not isinstance(adapter, GatedDifference) or not adapter.fixed:
            return super().may_rest(slot)
        return slot.attribute != "diff_w" or not bool((adapter.diff_alpha > 0).any())


class Stages(Schedule):
    """Draws gates and adds the penalty, prunes, and holds what was pruned at zero."""

    def __init__(self, strategy: DiffPruning, handle: Handle) -> None:
        self.strategy = strategy
        self.adapters = [e.adapter for e in handle.entries if isinstance(e.adapter, GatedDifference)]
        self.step, self.total_steps = 0, 0
        self._optimizer: optim.Optimizer | None = None

    @property
    def prune_at(self) -> int:
        """After so many steps."""
        return self.total_steps - round(self.strategy.fine_tune * self.total_steps)

    @property
    def pruned(self) -> bool:
        """The mask is fixed."""
        return self.step >= self.prune_at

    def on_start(self, total_steps: int) -> None:
        self.total_steps = total_steps
        if in_pieces(p for adapter in self.adapters for p in adapter.parameters()):
            raise ConfigError("DiffPruning compares the changes of all weights, which lie in pieces (FSDP). Train with DDP.")
        if not 0 < self.prune_at < total_steps:
            raise ConfigError(
                f"DiffPruning: fine_tune={self.strategy.fine_tune} of {total_steps} steps leaves {self.prune_at} before the pruning and "
                f"{total_steps - self.prune_at} after it; both stages need one. Train longer, or change fine_tune."
            )
        self._tell()

    def penalty(self) -> Tensor | None:
        if self.pruned or not self.strategy.penalty:
            return None
        return self.strategy.penalty * sum((a.open_gates() for a in self.adapters[1:]), self.adapters[0].open_gates())

    def before_step(self, optimizer: optim.Optimizer) -> None:
        self._optimizer = optimizer
        if self.pruned:  # what is left of the gates' momentum would move them
            for alpha in self._alphas():
                alpha.grad = None

    @torch.no_grad()
    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        if skipped:
            return
        was_pruned, self.step = self.pruned, self.step + 1
        if was_pruned:
            for adapter in self.adapters:  # exactly zero, whatever decay and momentum have made of it; the gates are 0 or 1
                adapter.diff_w.copy_(adapter.difference())
        elif self.pruned:
            self._prune()
            self._forget(optimizer or self._optimizer)
        self._tell()

    def _prune(self) -> None:
        sizes = [sum(adapter.sizes) for adapter in self.adapters]

        def changes() -> Iterator[Tensor]:
            for adapter in self.adapters:
                yield adapter.difference().abs()

        kept = torch.zeros(sum(sizes), dtype=torch.bool)
        kept[top_entries(changes, round(self.strategy.share * sum(sizes)))] = True
        for adapter, part in zip(self.adapters, kept.split(sizes), strict=True):
            adapter.fix(part.to(adapter.diff_w.device))

    def _forget(self, optimizer: optim.Optimizer | None) -> None:
        """Drop the moments, which belong to changes that were made behind other gates."""
        if optimizer is None:
            raise ConfigError(
                "DiffPruning resets the optimizer when it prunes. Call after_step(optimizer) with it, not with None."
            )
        for adapter in self.adapters:
            for parameter in adapter.parameters():
                optimizer.state.pop(parameter, None)

    def _alphas(self) -> Iterator[Tensor]:
        for adapter in self.adapters:
            yield from (p for name, p in adapter.named_parameters() if name != "diff_w")

    def _tell(self) -> None:
        for adapter in self.adapters:
            adapter.step = None if self.pruned else self.step

    def on_end(self) -> None:
        for adapter in self.adapters:
            adapter.step = None

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "total_steps": self.total_steps, "seeds": [adapter.seed for adapter in self.adapters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total_steps = state["step"], state["total_steps"]
        for adapter, seed in zip(self.adapters, state["seeds"], strict=True):
            adapter.seed = seed
        self._tell()
