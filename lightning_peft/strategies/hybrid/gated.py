"""Gated: any strategy of layer adapters, or a prefix, under learned gates; nothing in a method knows of it.

Gates of UniPELT: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577, section
3: ``y0 + g (y - y0)`` for the adapter of a layer, ``g K_p`` and ``g V_p`` for a prefix, g one scalar for each example, adapter and layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.gates import Gate, GateKind, build_gate
from lightning_peft.strategies.hybrid.wrapping import Wrapping
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.handle import Handle, Slot


@register(
    name="gated",
    family="hybrid",
    summary="Puts every adapter of a strategy under a learned gate.",
    paper="the gates of UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning, arXiv 2110.07577",
    example={"part": {"class_path": "PfeifferAdapter", "init_args": {"width": 4, "activation": "gelu"}}},
)
@dataclass(frozen=True, kw_only=True)
class Gated(Wrapping):
    """A strategy with one gate for each of its adapters. Its adapters join the forward of a layer, or are prefixes.

    With ``gate="input"`` the gain of an example is a mean over all its positions, padding included. So in a causal model what a position
    sees depends on later ones, and generation with a cache, which runs one position at a time, computes other gains than training
    did: take ``gate="static"`` there.

    Args:
        part: The strategy, its name or a mapping.
        gate: ``input`` (UniPELT's: from what the adapter reads) or ``static`` (one learned number).
        gate_std: Standard deviation of an input gate's weights at the start, with bias 0; None for weights and bias like ``nn.Linear``.
    """

    gate: GateKind = "input"
    gate_std: float | None = None

    def validate(self) -> None:
        super().validate()
        require(self.gate_std is None or self.gate_std > 0, self, "gate_std", "it must be positive")

    def plan(self, anatomy: Anatomy) -> Plan:
        gate = functools.partial(build_gate, kind=self.gate, std=self.gate_std)
        return self.inner.plan(anatomy).changed(lambda edit: edit.gated(gate, anatomy))

    def schedule(self, handle: Handle) -> Schedule:
        return self.inner.schedule(self.unwrapped(handle))

    def group_options(self, slot: Slot) -> dict[str, float]:
        return {"weight_decay": 0.0} if isinstance(slot.owner, Gate) else self.inner.group_options(slot)

    def may_rest(self, slot: Slot) -> bool:
        return not isinstance(slot.owner, Gate) and self.inner.may_rest(slot)
