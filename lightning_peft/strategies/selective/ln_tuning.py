"""LN-tuning: Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", arXiv 2211.08682.

Gain and bias of every norm train in place; everything else is frozen. RMSNorms and BatchNorms are norms as well (the former as in
Zhao et al. 2023, "Tuning LayerNorm in Attention", arXiv 2312.11420).
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.errors import TargetError
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, Train
from lightning_peft.surgery.handle import Slot
from lightning_peft.surgery.walk import base_parameters


@register(
    name="ln_tuning",
    family="selective",
    summary="Trains the gains and biases of the norm layers and nothing else.",
    paper="Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models, arXiv 2211.08682",
    lr=1e-3,
    mergeable=True,
    layer_kinds=frozenset({"norm"}),
    default_roles=("norm",),
)
@dataclass(frozen=True, kw_only=True)
class LNTuning(PEFTStrategy):
    """Train norm layers: all of them, or the targeted ones. Weight decay is 0: it would pull gains away from 1."""

    def plan(self, anatomy: Anatomy) -> Plan:
        paths = {site.path for site in self.sites(anatomy)}
        found = [(path, name) for path, name, _ in base_parameters(anatomy.root) if path in paths]
        if not found:
            raise TargetError(f"LNTuning: the parameters of {', '.join(sorted(paths))} belong to other layers. Choose targets.")
        return Plan(tuple(Train(path, name) for path, name in found))

    def group_options(self, slot: Slot) -> dict[str, float]:
        return {"weight_decay": 0.0}
